"""Data sources: one module per source of examples. Each returns a `Federation` of clients that never share a row.

`task` holds the types. `source` reads documentation with `ast`, and `docstrings` makes tasks from it. `textfile` reads
CSV, JSONL and Parquet files. `images` detects the format of images from the contents of a path (`columns`: tables of
images; `binaries`: CIFAR's and MNIST's own files; `pixels`: the only module that imports PIL). `arrays` deals images
and rows of numbers to clients, and `tensor` holds them as tensors. `partition` is the only module that imports
flwr_datasets.
"""
