"""Some experts of a model, read without the others."""

import pytest
import tiny
import torch
import transformers

from consilium.errors import ModelError
from consilium.moe import partial
from consilium.moe.addressing import select
from consilium.moe.build import ModelSource


def uneven(source) -> dict[str, tuple[int, ...]]:
    """Other experts, and another number of them, in every block."""
    ids = [(1, 4, 6), (0, 7), (2, 3, 5, 6)]
    return {block: tiny.fewest(source.config.model_type, ids[i % 3]) for i, block in enumerate(source.counts)}


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_what_is_read_is_the_part_of_the_whole_to_the_bit(model_type, form):
    source = tiny.source(model_type, form)
    held = uneven(source)
    part, whole = source.load(held), select(source.load(), "", held)
    assert part.keys() == whole.keys()
    for key, tensor in whole.items():
        assert part[key].dtype == tensor.dtype and torch.equal(part[key], tensor), key


def test_nothing_of_the_others_is_read(monkeypatch):
    """Of a fused tensor only rows, and no file of another kind is touched."""
    read = []
    rows = partial._rows

    def spied(part, total, ids):
        tensor = rows(part, total, ids)
        read.append((total, len(tensor)))
        return tensor

    monkeypatch.setattr(partial, "_rows", spied)
    source = tiny.source("gpt_oss", "classification")  # its checkpoints have all experts of a layer in one tensor
    held = dict.fromkeys(source.counts, (2, 5))
    state = partial.held_weights(source.location, None, source.skeleton("", ()), held)
    assert read and all(total == 8 and rows == 2 for total, rows in read)
    expert = sum(
        t.numel() // 8 for name, t in source.skeleton("", ()).backbone.named_parameters() if ".experts." in name
    )
    whole = sum(t.numel() for t in source.skeleton("", ()).backbone.parameters())
    rows = 6 * sum(
        t.numel() // 8 for name, t in source.skeleton("", ()).backbone.named_parameters() if ".router." in name
    )
    assert sum(t.numel() for t in state.values()) == whole - 6 * expert - rows


def test_shards_are_read_one_by_one(tmp_path):
    source = tiny.source("olmoe", "text-to-text")
    cls = getattr(transformers, tiny.FAMILIES["olmoe"].classes["text-to-text"])
    cls.from_pretrained(source.location).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    held = dict.fromkeys(source.counts, (0, 3, 7))
    part, whole = ModelSource(str(tmp_path), "text-to-text").load(held), source.load(held)
    assert part.keys() == whole.keys() and all(torch.equal(part[key], whole[key]) for key in whole)


def test_what_cannot_be_read_says_so(tmp_path):
    source = tiny.source("olmoe")
    source.config.save_pretrained(tmp_path)
    held = dict.fromkeys(source.counts, (0, 3))
    with pytest.raises(ModelError, match=r"has no model\.safetensors or model\.safetensors\.index\.json"):
        ModelSource(str(tmp_path)).load(held)
    with pytest.raises(ModelError, match="experts \\[3, 0\\] must be ascending"):
        source.load(dict.fromkeys(source.counts, (3, 0)))
