"""Data rooms: one module per source of examples, each giving a `Federation` of clients that never share a row.

`task` holds the types, `source` reads documentation with `ast`, `docstrings` makes tasks of it, `textfile` reads
CSV, JSONL and Parquet files, and `partition` is the only module that imports flwr_datasets.
"""
