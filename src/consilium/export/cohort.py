"""A client's own small model as a directory: model.safetensors (a state dict), config.json, model.pt2, a card.

The saved model is the one that the client half scores at the end of the run: its extractor and head or, with pFedMoE
and pFedAFM, the mixture of the shared extractor and its own. transformers does not know such models. model.pt2 is the
whole model as written by `torch.export`, which plain torch loads. `load` reads the other two files if this package is
installed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from consilium.algorithms.pfedafm import FeatureMixture
from consilium.algorithms.pfedmoe import Mixture
from consilium.core import ClientContext, ClientInfo, ClientState, Payload, derive_seed
from consilium.data.arrays import ImageData, Scale, TableData, matrix
from consilium.data.encode import encode
from consilium.data.pixels import Pages, stack
from consilium.data.table import read_table
from consilium.data.task import ClientData, Split, Task
from consilium.data.tensor import TensorSplit, of_texts
from consilium.engine.rounds import tested
from consilium.errors import ConfigError, first_line
from consilium.escape import markdown, markdown_code, one_line
from consilium.experiment import Experiment, from_json, to_json
from consilium.export.card import private
from consilium.export.deployed import Finished
from consilium.export.folder import USE, new_folder
from consilium.models.cohort import SplitModel
from consilium.models.encoders import is_function
from consilium.setup import CohortSetup, Setup

__all__ = ["Own", "Small", "load", "write"]


@dataclass(frozen=True)
class _Watching(CohortSetup):
    """A Setup that remembers the models it made."""

    made: list[SplitModel] = field(default_factory=list)

    def split_model(self, *args: Any, **kwargs: Any) -> SplitModel:
        self.made.append(super().split_model(*args, **kwargs))
        return self.made[-1]


@dataclass(frozen=True)
class Own:
    """A client of a cohort as it is at the end of a run or at its site.

    Args:
        setup: setup with the labels of its task.
        context: its data and state.
        sent: the payload that it was last delivered for prediction.
        rounds: number of rounds until then.
        spent: privacy that was spent, as the summary records it.
        scale: scale of its columns; None: its data is no table.
        name: name of the client, if it differs from the id.
        notes: notes on the reading of the data.
    """

    experiment: Experiment
    setup: Setup
    context: ClientContext
    sent: Payload
    rounds: int
    spent: Mapping[str, Any] | None
    scale: Scale | None
    name: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def of_run(cls, run: Finished, client: str | None) -> "Own":
        """Return a client at the end of a run.

        Raises:
            ConfigError: if no client is given, or for an unknown one.
        """
        if client is None:
            names = ", ".join(run.name(info.id) for info in run.setup.clients)
            raise ConfigError(f"small models are the clients' own: name a client, --client: {names}")
        info, experiment, rounds = run.info(client), run.experiment, run.summary["rounds"]
        data = experiment.data.load(experiment.seed).clients[info.id]
        context = _context(experiment, rounds, info, data, run.store.load(info.id))
        scale = experiment.data.scale(info.id, experiment.seed) if isinstance(experiment.data, TableData) else None
        payload = run.server().deliver(info)
        privacy = run.summary.get("privacy")
        return cls(
            experiment, run.setup, context, payload, rounds, privacy, scale, run.name(info.id), run.notes(info.id)
        )

    @classmethod
    def of_site(cls, given: dict[str, Any], data: ClientData, sent: Payload, told: dict[str, Any]) -> "Own":
        """Return the client at a site, from the payload that the site was `delivered`."""
        from consilium.engine.flower import OWN, relabelled

        site_experiment, heads = from_json(given["experiment"]), json.loads(str(told["heads"]))
        data = relabelled(data, heads.get(data.task.name, data.task.labels))
        experiment, task = (
            replace(from_json(json.loads(str(told["experiment"]))), data=site_experiment.data),
            data.task.name,
        )
        setup = experiment.setup(heads.items() or [(task, data.task.labels)], shape=data.train.shape)
        info = ClientInfo(str(given["name"]), len(data.train), task, architecture=site_experiment.model.architecture(0))
        state_scalars = {
            key.removeprefix(f"{OWN}/"): value for key, value in sent.scalars.items() if key.startswith(f"{OWN}/")
        }
        context = _context(experiment, int(told["round"]), info, data, ClientState(sent.group(OWN), state_scalars))
        scalars = {k: value for k, value in sent.scalars.items() if not k.startswith((f"{OWN}/", "engine/"))}
        sent = Payload({name: params for name, params in sent.groups.items() if name != OWN}, scalars)
        scale = Scale.of_json(given["scale"]) if "scale" in given else None
        return cls(experiment, setup, context, sent, int(told["round"]), None, scale)


def _context(
    experiment: Experiment, rounds: int, info: ClientInfo, data: ClientData, state: ClientState
) -> ClientContext:
    seed = derive_seed(experiment.seed, "client", rounds, info.id)
    return ClientContext(info=info, data=data, device=torch.device("cpu"), seed=seed, state=state)


def write(out: Path, own: Own) -> list[str]:
    """Write a client's model, and return the messages for the user.

    Raises:
        ConfigError: if a client holds or predicts with more than one model, or does not predict with its head.
    """
    setup = _Watching(**{f.name: getattr(own.setup, f.name) for f in fields(CohortSetup)})
    experiment, context, client = own.experiment, own.context, own.name or own.context.info.id
    task, method = context.data.task, type(experiment.algorithm).__name__
    score = tested(experiment.algorithm.client(setup), own.sent, context, experiment.privacy)[1].scalars["score"]
    model = setup.made[-1].eval()
    # A model that does not reproduce the score of the run is not the one that the client predicts with.
    if len(setup.made) != 1 or _score(model, setup, context) != score:
        raise ConfigError(f"with {method} a client predicts by more than one model and its head: there is none to take")
    config = {
        "experiment": to_json(experiment),
        "architecture": context.info.architecture,
        "shape": list(setup.shape),
        "task": task.name,
        "labels": list(task.labels),
        **({"table": asdict(own.scale)} if own.scale else {}),
    }
    with new_folder(out) as folder:
        save_file(
            {key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        x = setup.encode(context, context.data.test).batch([0, 0], context.device)["x"]
        try:
            saved_model = load(folder, own_code=True)  # the user has just run this code
        except RuntimeError as error:
            raise ConfigError(
                f"with {method} a client holds more than one model and its head, which cannot be exported"
            ) from error
        failure = _exported(saved_model, x, folder, own.scale)
        (folder / USE).write_text(json.dumps({"format": "cohort"}) + "\n")
        privacy_text = private(own.spent, experiment)
        (folder / "README.md").write_text(_card(config, method, client, own.rounds, score, privacy_text, not failure))
    notes = [f"{out}: the model of {client} after {own.rounds} rounds (accuracy {score:.3f})"]
    notes += [f"note: no model.pt2, torch.export cannot write this model ({failure})"] if failure else []
    flag = Small(saved_model, experiment, setup.shape, own.scale).flag
    notes += [f"note: {note}" for note in own.notes]
    notes += [f"try it: consilium predict {out} {flag}"] if flag else []
    return [one_line(note) for note in notes]


class _Logits(nn.Module):
    """A module that maps [B, *S] to logits [B, C] in one call.

    For a table, the input holds the numbers of its columns, with nan for missing ones.
    """

    def __init__(self, model: SplitModel, scale: Scale | None):
        super().__init__()
        self.backbone, self.head, self.scaled = model.backbone, model.head, scale is not None
        if scale:
            self.register_buffer("mean", torch.tensor(scale.mean))
            self.register_buffer("deviation", torch.tensor(scale.deviation))

    def forward(self, x: Tensor) -> Tensor:
        if self.scaled:
            x = torch.where(x.isnan(), 0, (x - self.mean) / self.deviation)
        return self.head(self.backbone(x))


def _exported(model: SplitModel, x: Tensor, folder: Path, scale: Scale | None) -> str:
    """Write model.pt2 for any number of examples like x [2, *S]; return "", or the reason why torch cannot."""
    if x.dtype == torch.int64:
        return "how many columns of token ids it reads depends on the texts"
    try:
        program = torch.export.export(_Logits(model, scale), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    except Exception as error:
        return first_line(error)[:200]
    program.example_inputs = None  # these are rows of the client's data, and would be pickled
    torch.export.save(program, folder / "model.pt2")
    return ""


@dataclass(frozen=True)
class Small:
    """An exported small model, ready to predict.

    Args:
        shape: shape of an example.
        scale: scale of a table's columns; None: the model does not read a table.
    """

    model: SplitModel
    experiment: Experiment
    shape: tuple[int, ...]
    scale: Scale | None = None

    @classmethod
    def of(cls, folder: Path) -> "Small":
        """Load an exported small model.

        Raises:
            ConfigError: see `load`.
        """
        config = json.loads((folder / "config.json").read_text())
        scale = Scale.of_json(config["table"]) if "table" in config else None
        return cls(load(folder), from_json(config["experiment"]), tuple(config["shape"]), scale)

    @property
    def flag(self) -> str:
        """Return the flag of `consilium predict` for the model's input, or "" if there is none."""
        kinds = {0: '--text "..."', 3: "--image FILE"}
        return "--table FILE" if self.scale else kinds.get(len(self.shape), "")

    @property
    def reads(self) -> str:
        """Return the kind of input that the model reads, and the flag for it."""
        kind = "a table" if self.scale else {0: "texts", 3: "images"}.get(len(self.shape), "arrays")
        return f"{kind}: {self.flag or 'consilium.export.cohort.load gives it to you'}"

    def labelled(self, value: str | Path) -> tuple[str, float]:
        """Return the most probable label of a text, or of the image in a file, and its probability.

        Raises:
            ConfigError: for a model of a table, or an image of another shape.
            DataError: for a broken file.
        """
        return self._labels(self._image(Path(value)) if self.shape else self._text(str(value)))[0]

    def labelled_rows(self, path: Path) -> list[tuple[str, float]]:
        """Return the most probable label and its probability for every row of a table.

        The file may be any that `TableData` could read; columns that the model does not use are ignored.

        Raises:
            ConfigError: for a model that does not read a table.
            DataError: for a file, a column or a value that cannot be used.
        """
        if self.scale is None:
            raise ConfigError(f"this model reads {self.reads}")
        x = matrix(read_table(path, None, self.scale.columns), self.scale.columns)
        return self._labels(torch.from_numpy(self.scale.standardised(x).astype(np.float32)))

    def _labels(self, x: Tensor) -> list[tuple[str, float]]:
        with torch.inference_mode():
            best = self.model.head(self.model.backbone(x)).softmax(-1).max(-1)
        labels = self.model.labels
        return [(labels[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def _image(self, path: Path) -> Tensor:
        data = self.experiment.data
        if not isinstance(data, ImageData) or len(self.shape) != 3:
            raise ConfigError(f"this model reads {self.reads}")
        colours, height, width = self.shape
        pages: Pages = "first" if data.pages == "first" else "refuse"
        x = torch.from_numpy(stack(1, [(str(path), path)], data.size, pages)[0])
        if x.shape[2:] != (height, width) or x.shape[1] > colours:
            image_text = f"{x.shape[3]} x {x.shape[2]} pixels, {'grey' if x.shape[1] == 1 else 'in colour'}"
            colour_text = "grey" if colours == 1 else "in colour"
            raise ConfigError(f"{path} is {image_text}; the model was trained on {width} x {height}, {colour_text}")
        split = TensorSplit(x.expand(1, colours, height, width), torch.zeros(1).long(), torch.tensor([0]), ("",))
        return split.batch([0], torch.device("cpu"))["x"]

    def _text(self, text: str) -> Tensor:
        labels, fit = self.model.labels, self.experiment.fit
        task = Task(self.model.task, "classification", labels, "accuracy")
        tokens = encode(Split([text], [labels[0]]), task, self.experiment.model.tokenizer(), "classification",
                        fit.max_length, fit.target_length)  # fmt: skip
        return of_texts(tokens, labels, fit.max_length).x


def load(folder: Path, own_code: bool = False) -> SplitModel:
    """Load the model that `write` saved, in evaluation mode.

    `model.head(model.backbone(x))` gives the logits [B, C] of examples x [B, *shape] or, for texts, of token ids x [B,
    L]. `model.labels` holds the names of the classes.

    Args:
        own_code: import the user's own functions that made the extractors. The folder names these functions, so set it
            only for your own folders.

    Raises:
        ConfigError: if there are such functions, and `own_code` is not given.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    experiment, shape = from_json(config["experiment"]), tuple(config["shape"])
    function_names = [name for name in (config["architecture"], experiment.model.small) if is_function(name)]
    if function_names and not own_code:
        raise ConfigError(
            f"{folder} has {function_names[0]} imported; if the folder and that code are yours, load it with own_code"
        )
    extractor = experiment.model.extractor(config["architecture"], shape)
    backbone: nn.Module = extractor
    if any(key.startswith("backbone.shared.") for key in tensors):
        shared_extractor = experiment.model.extractor(experiment.model.small, shape)
        if "backbone.alpha" in tensors:
            backbone = FeatureMixture(extractor, shared_extractor)
        else:
            backbone = Mixture(shared_extractor, extractor, torch.Size(shape).numel(), experiment.algorithm)
    model = SplitModel(backbone, config["task"], tuple(config["labels"]))
    model.load_state_dict(tensors)
    return model.eval()


def _score(model: SplitModel, setup: Setup, context: ClientContext) -> float:
    from consilium.scoring import evaluate

    return evaluate(model, setup.encode(context, context.data.test), context, setup)


def _card(told: dict[str, Any], method: str, client: str, rounds: int, score: float, private: str, plain: bool) -> str:
    labels, shape = told["labels"], ", ".join(map(str, told["shape"])) or "tokens"
    kind = {3: "image-classification", 0: "text-classification"}.get(len(told["shape"]), "tabular-classification")
    use = _plain(told) if plain else _packaged(shape)
    return f"""---
library_name: {"pytorch" if plain else "consilium"}
pipeline_tag: {kind}
tags: ["consilium", "federated-learning"]
---

# {markdown(told["experiment"]["name"])}: the model of client {markdown(client)}

{markdown_code(told["architecture"])} trained by {method} in {rounds} rounds with Consilium; the data stayed with the
clients.
{private}

| | |
|---|---|
| Task | {markdown(told["task"])}: {len(labels)} labels, {markdown(", ".join(map(str, labels[:12])))} |
| Input | {markdown(_input(told))} |
| Accuracy | {score:.3f} on its own test examples |

{use}"""


def _input(told: dict[str, Any]) -> str:
    if "table" in told:
        columns = ", ".join(told["table"]["columns"])
        return f"the columns {columns}; mean and deviation of the client's rows are in config.json and model.pt2"
    return f"{' x '.join(map(str, told['shape'])) or 'token ids'}, made as in training"


def _packaged(shape: str) -> str:
    return f"""```python
from pathlib import Path
from consilium.export.cohort import load

model = load(Path("DIR"))
print([model.labels[i] for i in model.head(model.backbone(x)).argmax(-1)])  # x: [B, {shape}]
```
"""


def _plain(told: dict[str, Any]) -> str:
    """Return the lines that load the model in plain torch; for an image, they begin with reading the file."""
    shape, lines = told["shape"], ["import json", "from pathlib import Path", "", "import torch"]
    reading_lines: list[str] = []
    if len(shape) == 3 and told["experiment"]["data"]["type"] == "ImageData":
        lines = ["import json", "from pathlib import Path", "", "import numpy as np", "import torch"]
        size, mode = told["experiment"]["data"]["size"], "L" if shape[0] == 1 else "RGB"
        lines += ["from PIL import Image, ImageOps" if size else "from PIL import Image"]
        fit_code = f"ImageOps.fit(image, ({size}, {size}), Image.Resampling.BILINEAR)"
        array_code = "[None, None]" if shape[0] == 1 else ".transpose(2, 0, 1)[None]"
        reading_lines = [f'image = Image.open("...").convert("{mode}")', *([f"image = {fit_code}"] if size else [])]
        reading_lines += [f"x = torch.from_numpy(np.array(image, np.float32){array_code} / 127.5 - 1)"]
    if "table" in told:
        lines.insert(3, "import pandas")
        reading_lines = ['columns = json.loads(Path("DIR/config.json").read_text())["table"]["columns"]']
        reading_lines += ['x = torch.tensor(pandas.read_csv("...")[columns].to_numpy("float32"))  # missing: NaN']
    code = [*lines, "", 'model = torch.export.load("DIR/model.pt2").module()']
    code += ['labels = json.loads(Path("DIR/config.json").read_text())["labels"]', *reading_lines]
    code += [f"print([labels[i] for i in model(x).argmax(-1)])  # x: [B, {', '.join(map(str, shape))}]"]
    return "```python\n" + "\n".join(code) + "\n```\n"
