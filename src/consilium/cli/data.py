"""The command `consilium data`."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from consilium.cli.parsing import parse
from consilium.cli.screen import out
from consilium.errors import ConfigError
from consilium.escape import print_line


def data_command(args: list[str]) -> None:
    """consilium data PATH [--text COLUMN] [--label COLUMN] [--client COLUMN] ... [--out split.png]"""
    from consilium.cli.views.display import save_picture, show
    from consilium.cli.views.images import holds_images, preview_images
    from consilium.cli.views.preview import preview
    from consilium.cli.views.roles import NAMES
    from consilium.data.dialect import Dialect
    from consilium.moe.build import ModelSource
    from consilium.recipes import find

    def parameters(
        file: Annotated[Path, tyro.conf.Positional],
        text: str = "",
        label: str = "",
        prompt: str = "",
        response: str = "",
        context: str = "",
        input: str = "",
        choices: str = "",
        messages: str = "",
        image: str = "",
        client: str = "",
        separator: str = "",
        quote: str = "",
        encoding: str = "",
        model: str = "docstring-switch",
        clients: int | None = None,
        partition: str | None = None,
        alpha: float | None = None,
        classes: int | None = None,
        size: int = 0,
        pages: str | None = None,
        axes: str | None = None,
        seed: int = 0,
        out: Path | None = None,
    ) -> dict[str, Any]:
        """Look at data before using it. Columns that are not named are guessed by their names.

        Args:
            file: a .csv, .tsv, .json, .jsonl, .parquet or .xlsx file, a folder of them, a directory of `datasets`, or
                owner/name on the hub; of images: a folder per class, Parquet, .npz, CIFAR's *.bin, MNIST's files.
            text: column of the text.
            label: column of the label.
            prompt: column of the prompt or question.
            response: column of the answer.
            context: column of a text that the prompt is about.
            input: column of the input that the prompt is applied to.
            choices: column of the answers to choose from.
            messages: column of conversations.
            image: column of encoded images.
            client: column with the client of each row; "none": the rows are partitioned again.
            separator: separator of the fields of a text file, if it is not recognised: one character, or "tab".
            quote: quote around these fields: one character, or "none".
            encoding: encoding of a text file, e.g. cp1252.
            model: model with the tokenizer that counts the tokens.
            clients: number of clients, without a client column.
            partition: iid, dirichlet or pathological, without a client column.
            alpha: parameter of the dirichlet partition.
            classes: classes per client, for images and the pathological partition.
            size: side in pixels to which images are scaled and cropped; 0: as they are.
            pages: pages or frames to read from image files with several: first or all.
            axes: axes of one image in an .npz file: CHW or HWC.
            seed: seed of the split.
            out: file for the picture of the split; default: NAME-split.png here.
        """
        return dict(locals())

    options = parse(parameters, args, "consilium data")
    path, seed = options["file"], options["seed"]
    columns = {role: options[role] for role in (*NAMES, "image") if options[role]}
    settings = {key: options[key] for key in ("clients", "partition", "alpha")}
    if holds_images(path):
        settings |= {key: options[key] for key in ("classes", "pages", "axes")}
        sheet = options["out"] or Path(f"{path.stem}-split.png")
        sheet = sheet.with_name(f"{sheet.stem}-images.png" if options["out"] else f"{path.stem}-images.png")
        data_preview = preview_images(path, columns, settings, options["size"], seed, sheet)
    elif image_flags := [name for name in ("image", "classes", "size", "pages", "axes") if options[name]]:
        raise ConfigError(f"--{image_flags[0]} is for images; {path} is a table without a column of encoded images")
    else:
        dialect = Dialect(options["separator"], options["quote"], options["encoding"])
        model = "" if options["model"] == "docstring-switch" else options["model"]
        data_preview = preview(
            path,
            columns,
            ModelSource(options["model"]).tokenizer(),
            settings,
            seed,
            dialect,
            model,
            lambda name: find(name).make().fit,
        )
    show(data_preview, out)
    target = save_picture(data_preview, options["out"] or Path(f"{path.stem}-split.png"))
    print_line(out, f"picture: {target}")
