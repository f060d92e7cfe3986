"""A client's own small model as a directory: model.safetensors (a state dict), config.json, a card.

What is saved is the model that the client's half scores at the end of the run: its extractor and head, or with pFedMoE
the mixture of the shared and its own extractor. transformers knows no such model: `load` reads it back.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from consilium.algorithms.pfedmoe import Mixture
from consilium.core import ClientContext, derive_seed
from consilium.engine.rounds import tested
from consilium.errors import ConfigError
from consilium.experiment import from_json, to_json
from consilium.export.deployed import Finished
from consilium.export.folder import USE, new_folder
from consilium.models.cohort import SplitModel
from consilium.models.encoders import is_function
from consilium.setup import Setup

__all__ = ["load", "write"]


@dataclass(frozen=True)
class _Watching(Setup):
    """A Setup that remembers the models it made."""

    made: list[SplitModel] = field(default_factory=list)

    def split_model(self, *args: Any, **kwargs: Any) -> SplitModel:
        self.made.append(super().split_model(*args, **kwargs))
        return self.made[-1]


def write(out: Path, run: Finished, client: str | None) -> list[str]:
    """Write the model of a client of a finished run; returns what is to be said.

    Raises:
        ConfigError: without a client, or where a client predicts with more than one model, or not by its head.
    """
    if client is None:
        names = ", ".join(info.id for info in run.setup.clients)
        raise ConfigError(f"small models are the clients' own: name a client, --client: {names}")
    info, experiment = run.info(client), run.experiment
    setup = _Watching(**{name: getattr(run.setup, name) for name in Setup.__dataclass_fields__})
    data = experiment.data.load(experiment.seed).clients[client]
    context = ClientContext(
        info=info,
        data=data,
        device=torch.device("cpu"),
        seed=derive_seed(experiment.seed, "client", experiment.rounds, client),
        state=run.store.load(client),
    )
    method = type(experiment.algorithm).__name__
    score = tested(experiment.algorithm.client(setup), run.server().deliver(info), context).scalars["score"]
    model = setup.made[-1].eval()
    # The score of what is saved must be the score that the run tells, or else it is not what the client predicts with.
    if len(setup.made) != 1 or _score(model, setup, context) != score:
        raise ConfigError(f"with {method} a client predicts by more than one model and its head: there is none to take")
    told = {
        "experiment": to_json(experiment),
        "architecture": info.architecture,
        "shape": list(setup.shape),
        "task": data.task.name,
        "labels": list(data.task.labels),
    }
    with new_folder(out) as folder:
        save_file({key: t.contiguous() for key, t in model.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(told, indent=1) + "\n")
        (folder / USE).write_text(json.dumps({"format": "cohort"}) + "\n")
        (folder / "README.md").write_text(_card(told, method, client, run.summary["rounds"], score))
    return [f"{out}: the model of {client} after {run.summary['rounds']} rounds (accuracy {score:.3f})"]


def load(folder: Path, own_code: bool = False) -> SplitModel:
    """The model that `write` saved, in evaluation mode: `model.head(model.backbone(x))` are the logits [B, C] of
    examples x [B, *shape], of texts token ids [B, L]; `model.labels` are their names.

    Args:
        own_code: import the functions of one's own that made its extractors; the folder names them, so do so only
            with folders of one's own.

    Raises:
        ConfigError: if there are such functions, and `own_code` is not given.
    """
    told = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    experiment, shape = from_json(told["experiment"]), tuple(told["shape"])
    named = [name for name in (told["architecture"], experiment.model.small) if is_function(name)]
    if named and not own_code:
        raise ConfigError(
            f"{folder} has {named[0]} imported; if the folder and that code are yours, load it with own_code"
        )
    own = experiment.model.extractor(told["architecture"], shape)
    backbone: nn.Module = own
    if any(key.startswith("backbone.shared.") for key in tensors):
        shared = experiment.model.extractor(experiment.model.small, shape)
        backbone = Mixture(shared, own, torch.Size(shape).numel(), experiment.algorithm)
    model = SplitModel(backbone, told["task"], tuple(told["labels"]))
    model.load_state_dict(tensors)
    return model.eval()


def _score(model: SplitModel, setup: Setup, context: ClientContext) -> float:
    from consilium.training import evaluate

    return evaluate(model, setup.encode(context, context.data.test), context, setup)


def _card(told: dict[str, Any], method: str, client: str, rounds: int, score: float) -> str:
    labels, shape = told["labels"], ", ".join(map(str, told["shape"])) or "tokens"
    kind = {3: "image-classification", 0: "text-classification"}.get(len(told["shape"]), "tabular-classification")
    return f"""---
library_name: consilium
pipeline_tag: {kind}
tags: ["consilium", "federated-learning"]
---

# {told["experiment"]["name"]}: the model of client {client}

`{told["architecture"]}` trained by {method} in {rounds} rounds with Consilium; the data stayed with the clients. No
differential privacy was used.

| | |
|---|---|
| Task | {told["task"]}: {len(labels)} labels, {", ".join(map(str, labels[:12]))} |
| Input | {" x ".join(map(str, told["shape"])) or "token ids"}, made as in training |
| Accuracy | {score:.3f} on its own test examples |

```python
from pathlib import Path
from consilium.export.cohort import load

model = load(Path("DIR"))
print([model.labels[i] for i in model.head(model.backbone(x)).argmax(-1)])  # x: [B, {shape}]
```
"""
