"""Methods that cut models to a device's memory, on every family and in both forms. A method more is a line more."""

import math

import pytest
import tiny
import torch

from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.hfedmoe import HFedMoE
from consilium.core import counts_of
from consilium.moe.build import ModelSource


def three_trained(source: ModelSource) -> int:
    """A device that can train three experts per layer."""
    return tiny.bytes_for(3, source)


def three_held(source: ModelSource) -> int:
    """A device that can hold three experts per layer, and train as few in a batch as the family's router needs."""
    least = tiny.FAMILIES[source.config.model_type].least * len(source.counts)
    return tiny.setup(source).footprint(dict.fromkeys(source.counts, 3), trained=least).total


METHODS = {
    "FedMoE": (lambda: FedMoE(stage1="forward", alpha=1.0), three_trained),
    "HFedMoE": (HFedMoE, three_held),
}
CLIENTS = ("animal-00", "animal-01")


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
@pytest.mark.parametrize("name", METHODS)
def test_two_rounds_within_the_memory_of_devices(name, model_type, form, tmp_path):
    """One device holds all, the other a part: both train, within their bytes, and are scored."""
    source, (make, small) = tiny.source(model_type, form), METHODS[name]
    memory = {"animal-00": tiny.bytes_for(8, source, 1), "animal-01": small(source)}
    infos = tuple(info for info in tiny.infos(memory) if info.id in CLIENTS)
    made, algorithm = tiny.setup(source, clients=infos), make()
    server, client = algorithm.server(made), algorithm.client(made)
    engine = tiny.engine(server, client, made, tmp_path, strict=True)
    before = {key: tensor.clone() for key, tensor in server.params.items()}
    engine.round(1, test=False)
    record = engine.round(2, test=True)
    assert record["selected"] == list(CLIENTS) and set(record["test"]) == set(CLIENTS)
    for info in infos:
        told = record["clients"][info.id]
        assert told["rejected"] is None and math.isfinite(told["train_loss"])
        assert 0 < told["peak_bytes_model"] <= info.memory_bytes
        assert all(n >= tiny.FAMILIES[model_type].least for n in counts_of(server.structure()[info.id]).values())
    assert sum(counts_of(server.structure()["animal-01"]).values()) < sum(source.counts.values())
    moved = {key for key, tensor in server.params.items() if not torch.equal(tensor, before[key])}
    assert any(".experts." in key for key in moved) and any(".router." in key for key in moved)
    assert not any(key.endswith("e_score_correction_bias") for key in moved)
