"""Data rooms: one module per source of examples, each giving a `Federation` of clients that never share a row.

`task` holds the types, `source` reads documentation with `ast`, `docstrings` makes tasks of it, `textfile` reads
CSV, JSONL and Parquet files, `images` recognises images by what a path holds (`columns`: tables of them, `binaries`:
CIFAR's and MNIST's own files, `pixels`: the only module that imports PIL), `arrays` deals images and rows of numbers to
clients, `tensor` is what they become, and `partition` is the only module that imports flwr_datasets.
"""
