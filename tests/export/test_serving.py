"""What serving programs read: an exported model has the tensors of its base's checkpoint, by name and shape."""

import pytest
import tiny
from safetensors import safe_open

from consilium.moe.build import ModelSource
from consilium.moe.uniform import uniform


def layout(folder):
    """Name -> shape of every tensor in the safetensors of a folder."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_an_export_has_the_layout_of_the_checkpoint(kind, tmp_path):
    """With all experts the same names and shapes; with three of eight the same names but for the experts that are gone,
    which are numbered anew."""
    source = ModelSource(str(tiny.directory(kind, "text-to-text")), "text-to-text")
    original, params = layout(tiny.directory(kind, "text-to-text")), source.load()
    whole = source.build(params, "", ())
    whole.backbone.save_pretrained(tmp_path / "whole")
    assert layout(tmp_path / "whole") == original
    model = source.build(params, "", (), dict.fromkeys(source.counts, (1, 4, 6)))
    model.backbone.config, _ = uniform(model)
    model.backbone.save_pretrained(tmp_path / "part")
    part = layout(tmp_path / "part")
    assert set(part) <= set(original)
    gone = set(original) - set(part)
    assert all(any(f".experts.{i}." in key for i in range(3, 8)) for key in gone)
    for key, shape in part.items():
        assert shape == original[key] or (3 in shape and 8 in original[key])
