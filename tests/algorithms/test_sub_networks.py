"""HeteroFL, FedRolex, FedDropout and FedPE: windows, cutting and merging by hand; RollingMoE's windows."""

import pytest
import tiny
import torch
from torch import nn

from consilium.algorithms.fedpe import FedPE, expanded, pruned
from consilium.algorithms.heterofl import FedDropout, FedRolex, HeteroFL, window
from consilium.algorithms.rollingmoe import RollingMoE
from consilium.core import Payload
from consilium.errors import ConfigError
from consilium.models.cohort import Cohort
from consilium.models.narrow import chain, cut, narrowed, params_of, put


def test_windows_by_hand():
    """Six units, share 1/2: three of them; the rolling window of round 5 begins at unit 4 and goes around the end."""
    assert window(6, 0.5, 5, "static") == [0, 1, 2]
    assert window(6, 0.5, 1, "rolling") == [0, 1, 2] and window(6, 0.5, 5, "rolling") == [0, 4, 5]
    drawn = window(6, 0.5, 1, "random", "seed")
    assert len(set(drawn)) == 3 and drawn == window(6, 0.5, 1, "random", "seed")
    assert len({tuple(window(6, 0.5, t, "random", "seed")) for t in range(1, 9)}) > 1
    assert window(6, 0.01, 1, "static") == [0] and window(3, 0.5, 1, "static") == [0, 1]


def small():
    """Two inputs, FC1 of three units, FC2 of two: a chain with known weights."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU())
    params = {
        "1.weight": torch.arange(6.0).view(3, 2), "1.bias": torch.tensor([0.0, 10.0, 20.0]),
        "3.weight": torch.arange(6.0).view(2, 3), "3.bias": torch.tensor([1.0, 2.0]),
    }  # fmt: skip
    net.load_state_dict(params)
    return net, params


def test_cutting_by_hand():
    """Units 0 and 2 of FC1: its rows 0 and 2, and of FC2 the columns 0 and 2. 2 * 2 + 2 + 2 * 2 + 2 = 12 numbers."""
    net, params = small()
    links = chain(net)
    sub = cut(params, links, {"1": [0, 2]})
    assert sub["1.weight"].tolist() == [[0, 1], [4, 5]] and sub["1.bias"].tolist() == [0, 20]
    assert sub["3.weight"].tolist() == [[0, 2], [3, 5]] and sub["3.bias"].tolist() == [1, 2]
    assert params_of(links, {"1": [0, 2]}) == 12 == sum(t.numel() for t in sub.values())
    assert params_of(links, {}) == sum(t.numel() for t in params.values()) == 17


def test_merging_by_hand():
    """Weights 1 and 3. Unit 0 is of both: (1 * 1 + 3 * 5) / 4 = 4; unit 1 of the second alone: 5; unit 2 stays."""
    net, params = small()
    links = chain(net)
    sums = {key: torch.zeros_like(t, dtype=torch.float64) for key, t in params.items()}
    counts = {key: torch.zeros_like(t) for key, t in sums.items()}
    for units, value, weight in (({"1": [0]}, 1.0, 1.0), ({"1": [0, 1]}, 5.0, 3.0)):
        sub = {key: torch.full_like(t, value) for key, t in cut(params, links, units).items()}
        put(sums, counts, sub, links, units, weight)
    merged = {key: torch.where(counts[key] > 0, sums[key] / counts[key].clamp(min=1), -1) for key in sums}
    assert merged["1.weight"].tolist() == [[4, 4], [5, 5], [-1, -1]] and merged["1.bias"].tolist() == [4, 5, -1]
    assert merged["3.weight"].tolist() == [[4, 5, -1], [4, 5, -1]] and merged["3.bias"].tolist() == [4, 4]


@pytest.mark.parametrize("name", ["cnn-5", "mnist-5", "mlp-3"])
def test_a_sub_network_computes_what_the_whole_does_with_the_other_units_at_zero(name):
    """Of every layer the odd units; also through the Flatten between convolutions and linear layers."""
    cohort, shape = Cohort((name,), name, width=6, kernel=3, padding=1), (3, 8, 8)
    whole = cohort.extractor(name, shape).eval()
    links = chain(whole)
    units = {link.name: list(range(1, link.units, 2)) for link in links[:-1]}
    params = {key: t.detach().clone() for key, t in whole.named_parameters()}
    for link in links[:-1]:
        gone = [u for u in range(link.units) if u not in units[link.name]]
        whole.get_submodule(link.name).weight.data[gone] = 0
        whole.get_submodule(link.name).bias.data[gone] = 0
    sub = narrowed(cohort.extractor(name, shape), units).eval()
    sub.load_state_dict(cut(params, links, units))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(sub(x), whole(x))
    assert params_of(links, units) == sum(p.numel() for p in sub.parameters())


@pytest.mark.parametrize("method", [HeteroFL(), FedRolex(), FedDropout()], ids=lambda m: type(m).__name__)
def test_what_travels_is_the_sub_network(method):
    setup = tiny.small_setup("cohort", clients_per_round=6)
    server, client = method.server(setup), method.client(setup)
    for round in (1, 3):
        for who, sent in server.configure(round, setup.clients).items():
            share = server.share[who]
            hidden = {link.name: link.units for link in server.links[:-1]}
            ids = {k.removeprefix("units/"): v for k, v in sent.scalars.items()}
            assert set(ids) == (set() if share == 1 else set(hidden))
            assert all(len(own) == -(-hidden[layer] * share // 1) for layer, own in ids.items())
            if share < 1 and type(method).__name__ == "HeteroFL":
                assert all(own == list(range(len(own))) for own in ids.values())
            reply = client.train(sent, tiny.small_context(who, "cohort"))
            assert {k: t.shape for k, t in reply.group("params").items()} == {
                k: t.shape for k, t in sent.group("params").items()
            }


def test_with_shares_of_one_it_is_fedavg():
    from consilium.algorithms.fedavg import FedAvg

    setup = tiny.small_setup("cohort", clients_per_round=6)
    results = []
    for method in (HeteroFL((1.0,)), FedAvg()):
        server, client = method.server(setup), method.client(setup)
        sent = server.configure(1, setup.clients)
        server.aggregate(1, iter([(c, client.train(sent[c], tiny.small_context(c, "cohort"))) for c in sorted(sent)]))
        results.append(server.params)
    for key, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][key], rtol=1e-6, atol=1e-7)


def test_models_that_are_no_chain_are_refused():
    with pytest.raises(ConfigError, match="no chain of layers"):
        chain(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="BatchNorm1d"):
        chain(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


# --- FedPE ------------------------------------------------------------------------------------------------------------


def test_pruning_by_hand():
    """Half of four: the two lowest go, of equals the higher unit; half of one: it stays."""
    known = {"a": {0: 1.0, 3: 5.0, 4: 1.0, 7: 2.0}, "b": {2: 0.0}}
    assert pruned(known, 0.5) == {"a": [3, 7], "b": [2]} and pruned(known, 0.25)["a"] == [0, 3, 7]
    assert pruned(known, 0.0) == {"a": [0, 3, 4, 7], "b": [2]}


def test_expanding_by_hand():
    """Relative to their layers: a: 3/2 and 1/2; b: 4/3, 2/3. A unit of a has 5 numbers, of b 1; room for 6 more:
    a's 1 (1.5), then b's 6 (1.33); a's other does not fit, b's 5 would make 7."""
    others = {"a": {1: 3.0, 2: 1.0}, "b": {5: 2.0, 6: 4.0}}
    units = {"a": [0], "b": [0]}
    grown = expanded(units, others, lambda u: 5 * len(u["a"]) + len(u["b"]), 12)
    assert grown == {"a": [0, 1], "b": [0, 6]} and units == {"a": [0], "b": [0]}


def test_a_change_that_costs_validation_is_taken_back_and_rho_halved():
    setup = tiny.small_setup("cohort", clients_per_round=6)
    server = FedPE(shares=(0.5,), rho=0.5, expand=False).server(setup)
    info, begun = setup.clients[0], server.held[setup.clients[0].id]

    def reply(validation):
        sent = server.deliver(info)
        importance = {layer: torch.arange(1.0, len(ids) + 1) for layer, ids in server.held[info.id].items()}
        groups = {"params": sent.group("params"), "saliency": importance}
        return iter([(info.id, Payload(groups, {"num_examples": 1, "validation": validation}))])

    server.aggregate(1, reply(0.8))
    layer = next(iter(begun))
    after = server.held[info.id]
    assert after[layer] == begun[layer][len(begun[layer]) // 2 :]  # the lower half went
    server.aggregate(2, reply(0.7))
    assert server.held[info.id] == begun and server.judged[info.id] == {"factor": 0.5}
    server.aggregate(3, reply(0.7))
    quarter = len(begun[layer]) - int(0.25 * len(begun[layer]))
    assert len(server.held[info.id][layer]) == quarter
    assert [event["event"] for event in server.events()] == ["shrink", "rollback", "shrink"]


def test_a_client_never_has_more_parameters_than_its_budget():
    setup = tiny.small_setup("cohort", clients_per_round=6)
    method = FedPE(shares=(0.5, 0.25), rho=0.4)
    server, client = method.server(setup), method.client(setup)
    before = {c: dict(units) for c, units in server.held.items()}
    for round in (1, 2):
        sent = server.configure(round, setup.clients)
        server.aggregate(
            round, iter([(c, client.train(sent[c], tiny.small_context(c, "cohort"))) for c in sorted(sent)])
        )
        assert all(params_of(server.links, units) <= server.budget[c] for c, units in server.held.items())
    assert any(server.held[c] != before[c] for c in before)


# --- RollingMoE -------------------------------------------------------------------------------------------------------


def test_the_window_of_experts_rolls():
    """Three of eight experts: 0 1 2, then 1 2 3; by step 3 in the third round 6 7 0."""
    setup = tiny.setup(tiny.source("olmoe"), clients_per_round=6)
    server = RollingMoE(experts=3).server(setup)
    for round, ids in ((1, (0, 1, 2)), (2, (1, 2, 3)), (7, (0, 6, 7))):
        server.configure(round, setup.clients)
        assert all(held == dict.fromkeys(setup.model.counts, ids) for held in server.structure().values())
    server = RollingMoE(experts=3, step=3).server(setup)
    server.configure(3, setup.clients)
    assert server.structure()["animal-00"] == dict.fromkeys(setup.model.counts, (0, 6, 7))
