"""`Experiment.layers`: weights of the layers, by which a device's room is divided among them in every method."""

import dataclasses

import pytest
import tiny

from consilium.algorithms.fedavg import FedAvg, common_experts
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.flame import _nested
from consilium.algorithms.hfedmoe import HFedMoE
from consilium.algorithms.nestedmoe import NestedMoE
from consilium.algorithms.randommoe import RandomMoE
from consilium.algorithms.rollingmoe import RollingMoE
from consilium.core import counts_of
from consilium.errors import ConfigError
from consilium.recipes.code import affinitymoe_code
from consilium.recipes.digits import pfedmoe_digits


def weighted(*layers: float):
    """Devices with room for four of eight experts in each of the two layers: eight in all."""
    return dataclasses.replace(tiny.setup(memory=tiny.bytes_for(4)), layers=layers)


def sizes(experts) -> list[int]:
    return list(counts_of(experts).values())


@pytest.mark.parametrize("method", [RandomMoE(), NestedMoE(), RollingMoE()], ids=lambda method: type(method).__name__)
def test_fixed_sub_moes_follow_the_weights(method):
    for layers, expected in ((3, 1), [6, 2]), ((1, 1), [4, 4]), ((), [4, 4]), ((1, 7), [1, 7]):
        experts = method.server(weighted(*layers)).structure()
        assert {tuple(sizes(ids)) for ids in experts.values()} == {tuple(expected)}


def test_a_window_of_uneven_layers_moves_in_each():
    server = RollingMoE(step=1).server(weighted(3, 1))
    server._roll(4)
    for ids in server.structure().values():
        assert list(ids.values()) == [(0, 3, 4, 5, 6, 7), (3, 4)]


def test_the_common_sub_moe_follows_the_weights():
    assert sizes(common_experts(weighted(3, 1), "fit")) == [6, 2]
    assert sizes(common_experts(weighted(), "fit")) == [4, 4]
    server = FedAvg(experts="fit").server(weighted(3, 1))
    payload = server.configure(1, server.setup.clients)
    assert payload and all(sizes(server.held_by(c)) == [6, 2] for c in server.setup.clients)


def test_fedmoe_takes_the_most_used_experts_of_each_layer_in_the_given_numbers():
    setup = weighted(3, 1)
    server = FedMoE(stage1="none", alpha=1.0).server(setup)
    assert {tuple(sizes(ids)) for ids in server.structure().values()} == {(6, 2)}
    measured = FedMoE(stage1="forward", alpha=1.0).server(setup)
    measured._set_structures()
    usage = measured.p[tiny.IDS[0]]
    for block, ids in measured.structure()[tiny.IDS[0]].items():
        absent = [e for e in range(8) if e not in ids]
        assert min(usage[block][list(ids)]) >= max(usage[block][absent])
    assert {tuple(sizes(ids)) for ids in measured.structure().values()} == {(6, 2)}


def test_an_hfedmoe_device_holds_its_experts_in_the_given_numbers():
    setup = dataclasses.replace(tiny.setup(memory=tiny.bytes_for(1)), layers=(3, 1))
    held = HFedMoE().server(setup).resident(setup.clients[0])
    assert sizes(held) == list(setup.spread(sum(sizes(held))).values())
    assert 8 > sizes(held)[0] > sizes(held)[1]


def test_flame_follows_the_weights():
    setup = weighted(3, 1)
    assert sizes(_nested(setup, setup.clients[0])) == [6, 2]


@pytest.mark.parametrize("layers", [(1.0,), (1.0, 2.0, 1.0), (1.0, -1.0, 1.0, 1.0), (0.0, 1.0, 1.0, 1.0)])
def test_weights_that_do_not_fit_the_model_are_refused(layers):
    with pytest.raises(ConfigError, match=r"layers"):
        dataclasses.replace(affinitymoe_code(), layers=layers)


def test_weights_of_small_models_are_refused():
    with pytest.raises(ConfigError, match="0 layers with experts"):
        dataclasses.replace(pfedmoe_digits(), layers=(1.0, 1.0))
