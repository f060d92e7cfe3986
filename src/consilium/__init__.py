"""Federated fine-tuning of mixture-of-experts models.

    import consilium

    experiment = consilium.recipes.find("fedmoe-docstrings").make()
    summary = consilium.run(experiment, "runs/first")
    table = consilium.compare("fedmoe-docstrings", ["FedMoE", "FedAvg"], seeds=3)
    run = consilium.load_run("runs/first")

Names are imported lazily, on first use, so `import consilium` itself is fast. Their types are in __init__.pyi.
"""

from importlib import import_module

_PLACES = {
    "algorithms.affinitymoe": ("AffinityMoE",),
    "algorithms.ditto": ("Ditto",), "algorithms.fedopt": ("FedAdam", "FedAvgM", "FedYogi"),
    "algorithms.fedrep": ("FedPer", "FedRep"), "algorithms.finetuned": ("FedAvgFT", "FedProxFT"),
    "algorithms.nestedmoe": ("NestedMoE",),
    "algorithms.comigs": ("CoMiGS",),
    "algorithms.fedamole": ("FedAMoLE",),
    "algorithms.fedckd": ("FedCKD", "pFedSD"),
    "algorithms.fedlease": ("FedLEASE",),
    "algorithms.fedpe": ("FedPE",),
    "algorithms.flame": ("FLAME", "UBSMoE"),
    "algorithms.flex": ("FLEx",),
    "algorithms.flux": ("Flux",),
    "algorithms.heterofl": ("FedDropout", "FedRolex", "HeteroFL"),
    "algorithms.pfedafm": ("pFedAFM",),
    "algorithms.pfedmoap": ("pFedMoAP",),
    "algorithms.rollingmoe": ("RollingMoE",),
    "algorithms.fd": ("FD",), "algorithms.fedapen": ("FedAPEN",), "algorithms.fedavg": ("FedAvg",),
    "algorithms.fedgh": ("FedGH",), "algorithms.fedkd": ("FedKD",), "algorithms.fedmoe": ("FedMoE",),
    "algorithms.fedmrl": ("FedMRL",), "algorithms.fedprox": ("FedProx",), "algorithms.fedproto": ("FedProto",),
    "algorithms.fedssa": ("FedSSA",), "algorithms.fedtgp": ("FedTGP",), "algorithms.fml": ("FML",),
    "algorithms.hfedmoe": ("HFedMoE",), "algorithms.lgfedavg": ("LGFedAvg",), "algorithms.pfedmoe": ("pFedMoE",),
    "algorithms.randommoe": ("RandomMoE",), "algorithms.scaffold": ("SCAFFOLD",),
    "algorithms.standalone": ("Standalone",),
    "api": ("Run", "compare", "load_run"),
    "core": ("Algorithm", "Client", "ClientInfo", "Payload", "Sampling", "Server", "setting"),
    "data.arrays": ("ImageData", "TableData"), "data.code": ("CodeData",), "data.docstrings": ("DocstringData",),
    "data.language": ("LanguageData",), "data.textfile": ("TextFileData",),
    "errors": ("ConsiliumError",), "experiment": ("Experiment",), "models.cohort": ("Cohort",),
    "moe.build": ("ModelSource",), "moe.surgery": ("slice_experts",), "loop": ("resume", "run"), "fit": ("Fit",),
}  # fmt: skip
_HOME = {name: f"consilium.{place}" for place, names in _PLACES.items() for name in names}

__all__ = sorted([*_HOME, "recipes"])


def __getattr__(name: str) -> object:
    if name == "recipes":
        return import_module("consilium.recipes")
    if name == "__version__":
        from importlib.metadata import version

        return version("consilium")
    if name not in _HOME:
        raise AttributeError(f"module 'consilium' has no attribute {name!r}")
    attribute = globals()[name] = getattr(import_module(_HOME[name]), name)
    return attribute


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
