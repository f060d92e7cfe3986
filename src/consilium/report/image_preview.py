"""A look at images before they are used: what lies there, how a run would deal it, and the command that runs on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from consilium.data.arrays import ImageData
from consilium.data.sets import is_directory, is_hub_name, open_set
from consilium.data.task import Federation
from consilium.errors import ConfigError
from consilium.report.preview import Preview, counts_of

__all__ = ["holds_images", "preview_images"]

ROLES = ("image", "label", "client")


def holds_images(path: Path) -> bool:
    """Whether `consilium data` takes a path for images: a directory, .npz, a data set or table with such a column."""
    if is_directory(path) or is_hub_name(path):
        from datasets import Dataset, Image

        found = open_set(path)
        features = (found if isinstance(found, Dataset) else next(iter(found.values()))).features
        return any(isinstance(kind, Image) for kind in features.values())
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


def preview_images(path: Path, given: Mapping[str, str], settings: Mapping[str, Any], size: int, seed: int) -> Preview:
    """Read the images and deal them as `consilium run pfedmoe-images` would.

    Args:
        given: role -> column, of "image", "label", "client". settings: clients, partition, alpha, classes of the split.
        size: of a side, 0: as they are.

    Raises:
        ConfigError: for a role that images do not have. DataError: as the data source does.
    """
    if odd := [role for role in given if role not in ROLES]:
        raise ConfigError(f"--{odd[0]} is a column of texts; {path.name} holds images, with {', '.join(ROLES)}")
    chosen = {key: value for key, value in settings.items() if value is not None and "client" not in given}
    data = ImageData(path, size=size, **given, **chosen)
    federation = data.load(seed)
    source = federation.source
    roles = {role: source[role] for role in ROLES if source.get(role)}
    told = {"path": str(path)} | dict(given) | {key: str(value) for key, value in chosen.items()}
    told |= {"size": str(size)} if size else {}
    counts = counts_of(federation)
    facts = [_shape(federation), *([", ".join(f"{role}: {column}" for role, column in roles.items())] if roles else [])]
    if left := source["rows"] - sum(sum(of_client.values()) for of_client in counts.values()):
        facts.append(f"{left} of {source['rows']} belong to no client of this split")
    return Preview(
        source["rows"],
        {},
        roles,
        "pfedmoe-images",
        told,
        federation,
        counts,
        facts=tuple(facts),
        model=_model(federation),
    )


def _shape(federation: Federation) -> str:
    """What one image is, and where they were."""
    source = federation.source
    colours, height, width = (1, 1, 1, *federation.shape)[-3:]
    where = source.get("format", "arrays")
    return f"{where}: {width} x {height} pixels, {'grey' if colours == 1 else f'{colours} channels'}"


def _model(federation: Federation) -> tuple[str, ...]:
    """Flags of models that fit the images: the five CNNs want 16 pixels a side, with padding 4."""
    if len(federation.shape) != 3 or min(federation.shape[1:]) < 4:
        return ("--model.architectures", "mlp-1", "mlp-2", "mlp-3", "--model.small", "mlp-3")
    return ("--model.kernel", "3", "--model.padding", "1") if min(federation.shape[1:]) < 16 else ()
