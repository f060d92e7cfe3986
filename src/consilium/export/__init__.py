"""Taking a model away from a run or a site, and trying it.

deployed.py   what a client would deploy: of a finished run, or as a site was last delivered it
folder.py     that model as a directory: for transformers, for PEFT, or with its keep-map; heads, labels, tokenizer
cohort.py     the same for a client's own small model
card.py       README.md of the directory
predict.py    labels and texts from such a directory
commands.py   `consilium export | predict | chat`
"""
