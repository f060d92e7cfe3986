"""Export of a model from a run or a site, and its use.

deployed.py   the model that a client would deploy: of a finished run, or as last delivered to a site
folder.py     that model as a directory: for transformers, for PEFT, or with its keep-map; heads, labels, tokenizer
cohort.py     the same for a client's own small model
card.py       README.md of the directory
predict.py    labels and texts from such a directory
commands.py   `consilium export | predict | chat`
"""
