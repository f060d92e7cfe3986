"""A preview of images before they are used: their content, their split in a run, and the command that runs on them."""

from collections import defaultdict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from consilium.cli.views.display import write_figure
from consilium.cli.views.preview import Preview, counts_of
from consilium.data.arrays import ImageData
from consilium.data.pixels import Images
from consilium.data.sets import is_directory, is_hub_name, open_set
from consilium.data.table import parts_of
from consilium.data.task import Federation
from consilium.errors import ConfigError

__all__ = ["holds_images", "preview_images"]

ROLES = ("image", "label", "client")
ROWS, COLUMNS = 24, 8
"""The size of a contact sheet: the most classes, and the most images of each class."""


def holds_images(path: Path) -> bool:
    """Return whether `consilium data` treats a path as images.

    Images are a directory, an .npz file, or a data set or table that has a column of images. A directory of tables
    counts only if each of them has such a column.
    """
    if is_directory(path) or is_hub_name(path):
        from datasets import Dataset, Image

        data_set = open_set(path)
        features = (data_set if isinstance(data_set, Dataset) else next(iter(data_set.values()))).features
        return any(isinstance(kind, Image) for kind in features.values())
    if path.is_dir() and (tables := parts_of(path)):
        return all(holds_images(file) for file in tables)
    if str(path) == "digits" or path.is_dir() or path.suffix.lower() == ".npz":
        return True
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    try:
        fields = pq.read_schema(path)
    except (OSError, pa.ArrowException):
        return False
    kinds = [field.type.field("bytes").type if _is_image(field.type) else field.type for field in fields]
    return any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in kinds)


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def preview_images(
    path: Path, given: Mapping[str, str], settings: Mapping[str, Any], size: int, seed: int, sheet: Path | None = None
) -> Preview:
    """Read the images and partition them as `consilium run pfedmoe-images` would.

    Args:
        given: role -> column, for the roles "image", "label" and "client".
        settings: clients, partition, alpha and classes of the split; pages and axes of the images.
        size: side of an image in pixels; 0: as they are.
        sheet: file for a contact sheet with some images of each class, as they were read; None: no sheet.

    Raises:
        ConfigError: if a role does not exist for images.
        DataError: for the same reasons as the data source.
    """
    if wrong_roles := [role for role in given if role not in ROLES]:
        raise ConfigError(f"--{wrong_roles[0]} is a column of texts; {path.name} holds images, with {', '.join(ROLES)}")
    split_keys = () if "client" not in given else ("clients", "partition", "alpha", "classes")
    options = {key: value for key, value in settings.items() if value is not None and key not in split_keys}
    data = ImageData(path, size=size, **given, **options)
    images = data.read()
    federation = data.deal(images, seed)
    source = federation.source
    roles = {role: source[role] for role in ROLES if source.get(role)}
    flags = {"path": str(path)} | dict(given) | {key: str(value) for key, value in options.items()}
    flags |= {"size": str(size)} if size else {}
    counts = counts_of(federation)
    facts = [_shape(federation), *([", ".join(f"{role}: {column}" for role, column in roles.items())] if roles else [])]
    if unassigned_rows := source["rows"] - sum(sum(of_client.values()) for of_client in counts.values()):
        facts.append(f"{unassigned_rows} of {source['rows']} belong to no client of this split")
    facts += _oddities(images)
    if sheet is not None and images.x.ndim == 4:
        facts.append(f"images as they were read: {_draw(images, sheet)}")
    return Preview(
        source["rows"],
        {},
        roles,
        "pfedmoe-images",
        flags,
        federation,
        counts,
        facts=tuple(facts),
        model=_model(federation),
    )


def _shape(federation: Federation) -> str:
    """Return the size and channels of one image, and the format of the source."""
    source = federation.source
    colours, height, width = (1, 1, 1, *federation.shape)[-3:]
    source_format = source.get("format", "arrays")
    return f"{source_format}: {width} x {height} pixels, {'grey' if colours == 1 else f'{colours} channels'}"


def _oddities(found: Images) -> list[str]:
    """Return a line each for files that were skipped, for images that are blank and for images that are identical."""
    facts = []
    if skipped_files := found.source.get("litter"):
        names = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in list(skipped_files.items())[:5])
        facts.append(f"skipped {sum(skipped_files.values())} of the operating system or hidden: {names}")
    flat_images = found.x.reshape(len(found), -1)
    if blank_count := int((flat_images == flat_images[:, :1]).all(1).sum()):
        facts.append(f"warning: blank images (all pixels alike): {blank_count} of {len(found)}")
    places: dict[bytes, list[int]] = defaultdict(list)
    for row, pixels in enumerate(flat_images):
        places[sha256(pixels.tobytes()).digest()].append(row)
    if copies := [rows for rows in places.values() if len(rows) > 1]:
        conflict_count = sum(len(rows) for rows in copies if len(set(found.y[rows].tolist())) > 1)
        facts.append(
            f"warning: images that are identical to another: {sum(map(len, copies))} of {len(found)}"
            + (f", {conflict_count} of them to one of another class" if conflict_count else "")
        )
    return facts


def _draw(found: Images, target: Path) -> Path:
    """Draw a contact sheet with one row of evenly spaced images per class."""
    from matplotlib.figure import Figure

    classes = range(min(len(found.labels), ROWS))
    figure = Figure(figsize=(COLUMNS + 1.6, 1.05 * len(classes) + 0.3), layout="constrained")
    axes = figure.subplots(len(classes), COLUMNS, squeeze=False)
    span = (0, 255) if found.x.dtype == np.uint8 else (found.x.min(), found.x.max())
    for row, kind in enumerate(classes):
        members = np.flatnonzero(found.y == kind)
        indices = members[np.linspace(0, len(members) - 1, min(COLUMNS, len(members))).round().astype(int)]
        for column, panel in enumerate(axes[row]):
            panel.set_axis_off()
            if column < len(indices):
                x = found.x[indices[column]]
                image = (x.transpose(1, 2, 0) - span[0]) / ((span[1] - span[0]) or 1) if len(x) == 3 else x[0]
                panel.imshow(image, cmap="gray", vmin=span[0], vmax=span[1], interpolation="nearest")
        name = found.labels[kind][:24].replace("$", r"\$")
        axes[row, 0].text(-0.1, 0.5, name, ha="right", va="center", fontsize=8, transform=axes[row, 0].transAxes)
    return write_figure(figure, target)


def _model(federation: Federation) -> tuple[str, ...]:
    """Return the flags of models that fit the images.

    The five CNNs need 16 pixels a side, or 4 with padding.
    """
    if len(federation.shape) != 3 or min(federation.shape[1:]) < 4:
        return ("--model.architectures", "mlp-1", "mlp-2", "mlp-3", "--model.small", "mlp-3")
    return ("--model.kernel", "3", "--model.padding", "1") if min(federation.shape[1:]) < 16 else ()
