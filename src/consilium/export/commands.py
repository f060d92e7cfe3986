"""The commands `consilium export | predict | chat`: their flags, and what they print."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from consilium.errors import ConfigError
from consilium.escape import one_line, terminal

__all__ = ["Chat", "Export", "Predict"]


@dataclass(frozen=True)
class Export:
    """Export a client's model as a directory that plain transformers loads with from_pretrained.

    Args:
        run: directory of a finished run; at a site, its --state folder, for the model that was last delivered to it.
        out: directory to write; it must be new or empty.
        client: client of the model; all: every client, each in its own folder in --out; default: the global model. At a
            site, the model is always its own.
        format: transformers: adapters merged, and one number of experts in all layers, where that is exact; adapter:
            LoRA for PEFT; consilium: every layer as it is, with a keep-map.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Path
    client: str | None = None
    format: Literal["transformers", "adapter", "consilium"] = "transformers"

    def lines(self) -> Iterator[str]:
        """Export the model, and yield the messages for the user, line by line."""
        from consilium.export.deployed import Finished
        from consilium.export.folder import new_folder

        if self.client != "all" or (self.run / "site.json").exists():
            yield from self._one()
            return
        run = Finished.of(self.run)
        with new_folder(self.out, keep=False):  # raises an error unless it is new or empty
            pass
        written_count = 0
        for info in run.setup.clients:
            if reason := run.summary["clients"][info.id]["reason"]:
                yield one_line(f"note: there is no model for {run.name(info.id)}: it {reason}")
                continue
            yield from replace(self, client=info.id, out=self.out / info.id)._one()
            written_count += 1
        yield f"{written_count} of {len(run.setup.clients)} clients: {one_line(self.out)}/CLIENT"

    def _one(self) -> Iterator[str]:
        from consilium.experiment import from_json
        from consilium.export import cohort
        from consilium.export.deployed import Finished, delivered, of_run, of_site
        from consilium.export.folder import new_folder, write

        with new_folder(self.out, keep=False):  # checked before the weights are read, which takes time
            pass
        if (self.run / "site.json").exists():
            delivery = delivered(self.run)
            settings = delivery[0]
            if self.client not in (None, settings["name"]):
                raise ConfigError(f"{self.run} is the state of site {settings['name']}, not of {self.client!r}")
            if not from_json(settings["experiment"]).model.shared:
                yield from cohort.write(self.out, cohort.Own.of_site(*delivery))
                return
            deployed = of_site(*delivery)
        else:
            run = Finished.of(self.run)
            if not run.experiment.model.shared:
                yield from cohort.write(self.out, cohort.Own.of_run(run, self.client))
                return
            deployed = of_run(run, self.client)
        notes = write(self.out, deployed, self.format)
        title = f"the model of {deployed.client}" if deployed.client else "the global model"
        scores = ", ".join(
            f"{task} {metric} {'not scored' if score is None else f'{score:.3f}'}"
            for task, (metric, score) in deployed.scores.items()
        )
        yield one_line(f"{self.out}: {title} after {deployed.rounds} rounds ({scores})")
        for note in notes:
            yield one_line(f"note: {note}")
        if self.format != "adapter":
            yield one_line(f"try it: consilium {_tries(deployed.kind, self.out)}")


def _tries(kind: str, folder: Path) -> str:
    """Return the command that tries a model."""
    return f"chat {folder}" if kind == "conversation" else f'predict {folder} --text "..."'


@dataclass(frozen=True)
class Predict:
    """Print the answers of an exported model, one line per text, image or row.

    An answer is a label (task, label, probability, text) or a generated text.

    Args:
        folder: directory that `consilium export` wrote.
        text: text in quotes; may be repeated; default: the lines of standard input.
        image: image file, for a model of images; may be repeated.
        table: file with the columns that the model was trained on; its rows are numbered from 0.
        csv: file with texts: CSV or another format that training reads, see --column.
        column: column of --csv with the texts; default: text, or the only column.
        tokens: largest number of generated tokens, >= 1; default: as in training.
        top: number of labels of a text, the most probable first, >= 1.
        json: print one line of JSON per text, with its labels and probabilities or the generated text; texts keep their
            line breaks. Lines of standard input may then be JSON strings.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    table: Path | None = None
    csv: Path | None = None
    column: str = ""
    tokens: int | None = None
    top: int = 1
    json: bool = False

    def lines(self) -> Iterator[str]:
        """Yield one line per text and task, per image, or per row."""
        from consilium.export.folder import use_of
        from consilium.export.predict import Taken

        _positive(self.tokens)
        lines = (line.rstrip("\n") for line in sys.stdin if line.strip())
        if self.column and not self.csv:
            raise ConfigError(f"--column is {self.column!r}, but no file is given: --csv FILE --column {self.column}")
        if self.top < 1:
            raise ConfigError(f"--top is {self.top}; it must be at least 1")
        if use_of(self.folder)["format"] == "cohort":
            from consilium.export.cohort import Small

            if self.top > 1 or self.json or self.csv:
                raise ConfigError(f"--top, --json and --csv are for models of texts; {self.folder} holds a small model")

            small_model = Small.of(self.folder)
            if self.table:
                for row, (label, probability) in enumerate(small_model.labelled_rows(self.table)):
                    yield f"{terminal(label)}\t{probability:.3f}\trow {row}"
                return
            if small_model.scale or (self.text if small_model.shape else self.image):
                raise ConfigError(f"{self.folder} reads {small_model.reads}")
            for value in self.text or self.image or lines:
                label, probability = small_model.labelled(value)
                yield f"{terminal(label)}\t{probability:.3f}\t{one_line(value, 60)}"
            return
        model = Taken.of(self.folder)
        if self.image or self.table:
            raise ConfigError(f"{self.folder} reads texts: --text, or --csv FILE --column COLUMN")
        texts = self._of_file() if self.csv else self.text
        for text in texts or (map(_unquoted, lines) if self.json else lines):
            if self.json and model.kind != "classification":
                yield json.dumps({"text": text, "written": model.written(text, self.tokens)})
                continue
            if self.json:
                yield json.dumps({"text": text, "labels": list(map(asdict, next(model.labelled([text], self.top))))})
                continue
            if model.kind != "classification":
                yield terminal(" ".join(model.written(text, self.tokens).split()))
                continue
            for answer in next(model.labelled([text], self.top)):
                task = f"{terminal(answer.task)}\t" if len(model.models) > 1 else ""
                yield f"{task}{terminal(answer.label)}\t{answer.probability:.3f}\t{one_line(text, 60)}"

    def _of_file(self) -> list[str]:
        """Return the texts of --csv; an empty cell is an empty text, so that answers keep the order of the rows."""
        from consilium.data.table import read_table

        assert self.csv is not None
        table = read_table(self.csv)
        columns = table.column_names
        column = self.column or ("text" if "text" in columns else columns[0] if len(columns) == 1 else "")
        if not column:
            raise ConfigError(f"--column is missing: {self.csv.name} has {' | '.join(columns[:40])}")
        table.require([column])
        return [text or "" for text in table.texts(column)]


def _unquoted(line: str) -> str:
    """Return the string of JSON that a line holds, else the line itself."""
    try:
        value = json.loads(line)
    except ValueError:
        return line
    return value if isinstance(value, str) else line


@dataclass(frozen=True)
class Chat:
    """Talk to an exported causal model: each line is a message, and the end of the input ends the chat.

    Args:
        folder: directory that `consilium export` wrote.
        tokens: largest number of tokens in an answer, >= 1; default: as in training.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    tokens: int | None = None

    def lines(self) -> Iterator[str]:
        """Yield one answer per line; earlier turns are remembered as far as they fit."""
        from consilium.export.predict import Taken

        _positive(self.tokens)
        model = Taken.of(self.folder)
        if model.kind == "classification" or model.source.config.is_encoder_decoder:
            raise ConfigError(f"{self.folder} holds no causal language model: use `consilium predict {self.folder}`")
        conversation: list[dict[str, str]] = []
        while True:
            print("> ", end="", flush=True) if sys.stdin.isatty() else None
            line = sys.stdin.readline()
            if not line:
                return
            if line.strip():
                conversation.append({"role": "user", "content": line.strip()})
                conversation.append({"role": "assistant", "content": model.answered(conversation, self.tokens)})
                yield terminal(conversation[-1]["content"], keep="\n\t")


def _positive(tokens: int | None) -> None:
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--tokens is {tokens}; it must be at least 1")
