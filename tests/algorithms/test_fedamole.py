"""FedAMoLE: the mixture by hand, reverse selection against all assignments, the published traffic, what travels."""

import itertools

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from consilium.algorithms.fedamole import SHARED, FedAMoLE, reverse_selection, scores
from consilium.core import Payload
from consilium.errors import ConfigError
from consilium.moe.lora import Lora
from consilium.moe.mixtures import AdapterMixture, Mixing, initial_pair, initial_route, layers, mixtures

# --- the mixture of a layer -------------------------------------------------------------------------------------------


def mixture(names=("shared", "e0", "e1", "e2"), top_k=2, router="dot", slots=None, rank=1):
    made = AdapterMixture(
        nn.Linear(2, 2, bias=False), names, ("shared",), slots or names[1:], Mixing(rank, 2.0, top_k, router)
    ).eval()
    rng = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng)
    return made


def test_the_output_of_a_layer_by_hand():
    """r = 1, s = 2, P x = 2, A_e x = 1, 2, 3 for x = (1, 0): z = 2, 4, 6. Of these 4 and 6 are kept:
    g = 1 / (1 + e^2), e^2 / (1 + e^2). y = W0 x + 2 B_s A_s x + 2 (g_1 2 B_1 + g_2 3 B_2)."""
    made = mixture()
    made.route.data = torch.tensor([[2.0, 0.0]])
    made.base.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for name, a, b in (
        ("shared", 1.0, (1.0, 1.0)),
        ("e0", 1.0, (9.0, 9.0)),
        ("e1", 2.0, (1.0, 0.0)),
        ("e2", 3.0, (0.0, 1.0)),
    ):
        made.pairs[name].a.data, made.pairs[name].b.data = torch.tensor([[a, 0.0]]), torch.tensor(b)[:, None]
    g1, g2 = torch.tensor([4.0, 6.0]).softmax(0).tolist()
    expected = torch.tensor([[1 + 2 + 2 * g1 * 2, 0 + 2 + 2 * g2 * 3]])
    torch.testing.assert_close(made(torch.tensor([[1.0, 0.0]])), expected)
    # J sum P f: P = softmax(2, 4, 6), f = 0, 1/2, 1/2
    p = torch.tensor([2.0, 4.0, 6.0]).softmax(0)
    torch.testing.assert_close(made.balance, 3 * (p[1] + p[2]) / 2)


def test_with_b_zero_the_output_is_that_of_the_base():
    made, x = mixture(), torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    for pair in made.pairs.values():
        pair.b.data.zero_()
    assert torch.equal(made(x), made.base(x))


def test_the_names_of_experts_do_not_matter():
    made, other = mixture(), mixture(("shared", "e2", "e0", "e1"))
    other.load_state_dict(made.state_dict())
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made(x), other(x))


def test_measured_are_means_over_real_tokens():
    made = mixture()
    x = torch.tensor([[[1.0, 0.0], [5.0, 5.0]], [[3.0, 0.0], [0.0, 0.0]]])
    made.mask, made.measure = torch.tensor([[True, False], [True, False]]), True
    made(x)
    assert made.count == 2
    mean = torch.tensor([2.0, 0.0])
    torch.testing.assert_close((made.sums["token"] / 2).float(), made.route.detach() @ mean)
    torch.testing.assert_close((made.sums["e1"] / 2).float(), made.pairs["e1"].a.detach() @ mean)
    assert made.used.sum() == 4  # two tokens, two experts each


def test_the_gradient_reaches_an_expert_through_the_router_too():
    """With B = 0 the output does not depend on A_e, but the load balance does."""
    made = mixture()
    for pair in made.pairs.values():
        pair.b.data.zero_()
    made(torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
    made.balance.backward()
    assert all(made.pairs[name].a.grad.abs().sum() > 0 for name in ("e0", "e1", "e2"))


# --- reverse selection ------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    """r = 4: <E, t> / 2 = 1 and 0 for the two clients."""
    s_EK = scores(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 5.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))
    torch.testing.assert_close(s_EK, torch.tensor([[1.0, 0.0]]).softmax(-1))


@given(experts=st.integers(1, 4), clients=st.integers(1, 4), choices=st.integers(1, 3), seed=st.integers(0, 1000))
def test_the_assignment_is_the_best_of_all(experts, clients, choices, seed):
    """Against every 0/1 matrix with the same sums."""
    rng = torch.Generator().manual_seed(seed)
    s_EK = torch.rand(experts, clients, generator=rng, dtype=torch.float64)
    most = (1 + torch.randint(experts, (clients,), generator=rng)).tolist()
    choices = min(choices, clients)
    least = [int(experts * choices >= clients)] * clients
    x_EK, per_expert = reverse_selection(s_EK, choices, least, most)
    assert x_EK.sum(1).tolist() == per_expert and sum(per_expert) == min(experts * choices, sum(most))
    assert all(low <= n <= high for low, n, high in zip(least, x_EK.sum(0).tolist(), most, strict=True))
    rows = [list(itertools.combinations(range(clients), n)) for n in per_expert]
    best = 0.0
    for combination in itertools.product(*rows):
        held = [sum(k in chosen for chosen in combination) for k in range(clients)]
        if all(low <= n <= high for low, n, high in zip(least, held, most, strict=True)):
            best = max(best, sum(float(s_EK[e, k]) for e, chosen in enumerate(combination) for k in chosen))
    assert float((s_EK * x_EK).sum()) == pytest.approx(best)


def test_where_clients_have_little_room_the_lowest_scored_experts_get_fewer_places():
    """3 experts with 2 places each, room for 5: expert 1, whose best two scores have the lowest sum, gets one."""
    s_EK = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.1], [0.9, 0.1, 0.9]])
    x_EK, per_expert = reverse_selection(s_EK, 2, [1, 1, 1], [2, 2, 1])
    assert per_expert == [2, 1, 2]
    assert x_EK.tolist() == [[True, True, False], [False, True, False], [True, False, True]]


def test_too_few_experts_are_refused():
    with pytest.raises(ConfigError, match="2 places, but 3 clients need 3"):
        reverse_selection(torch.rand(2, 3), 1, [1, 1, 1], [2, 2, 2])


# --- traffic ----------------------------------------------------------------------------------------------------------


def test_the_published_traffic():
    """25.66 MB per client and round for Llama-3.2-1B: 16 layers, query 2048 x 2048 and value 512 x 2048, rank 8,
    bfloat16, up and down. 30 experts with 2 places among 10 clients are 6 each, and one shared; P once per layer:
    (7 * 851,968 + 524,288) * 2 bytes * 2 = 25.95 MB."""
    rng, params = torch.Generator().manual_seed(0), {}
    for layer, (path, y) in itertools.product(range(16), (("q_proj", 2048), ("v_proj", 512))):
        for name in (SHARED, *range(30 * 2 // 10)):
            a, b = initial_pair(2048, y, 8, rng)
            params |= {f"{layer}.{path}.pairs.{name}.a": a, f"{layer}.{path}.pairs.{name}.b": b}
        params[f"{layer}.{path}.route"] = initial_route(8, 2048, rng)
    sent = Payload({"params": {key: tensor.bfloat16() for key, tensor in params.items()}})
    assert 2 * sent.nbytes == (7 * 851_968 + 524_288) * 2 * 2 == 25_952_256
    assert 2 * sent.nbytes / 1e6 == pytest.approx(25.66, rel=0.02)


# --- what travels -----------------------------------------------------------------------------------------------------


def test_key_by_key_what_travels():
    made = tiny.setup(tiny.source("olmoe"), clients_per_round=6)
    method = FedAMoLE(E=9, r=2, max_experts=4)
    server, client = method.server(made), method.client(made)
    paths = layers(made.model)
    assert {path.rsplit(".", 1)[1] for path in paths} == {"q_proj", "v_proj"} and len(paths) == 4
    sent = server.configure(1, made.clients)
    for who, payload in sent.items():
        held = server.held[who]
        wanted = {f"{p}.pairs.{n}.{leaf}" for p in paths for n in (SHARED, *held[p]) for leaf in "ab"}
        wanted |= {f"{path}.route" for path in paths}
        keys = payload.group("params").keys()
        assert {key for key in keys if not key.startswith("head.")} == wanted and not payload.scalars
        assert {key.split(".")[1] for key in keys if key.startswith("head.")} == {who.partition("-")[0]}
        assert all(2 <= len(names) <= 4 for names in held.values())
    for path in paths:  # every expert has two clients
        assert all(sum(name in server.held[c][path] for c in tiny.IDS) == 2 for name in server.names)
    reply = client.train(sent["animal-01"], tiny.context("animal-01"))
    own = {k for k in sent["animal-01"].group("params") if ".fish." not in k}  # of the task's labels it has two
    assert reply.group("params").keys() == own and set(reply.groups) == {"params", "token", "experts"}
    assert reply.group("token").keys() == paths.keys()
    held = server.held["animal-01"]
    assert reply.group("experts").keys() == {f"{path}/{name}" for path in paths for name in held[path]}
    assert all(t.shape == (2,) for group in ("token", "experts") for t in reply.group(group).values())


def test_only_adapters_routers_and_the_head_learn():
    made = tiny.setup(tiny.source("olmoe"))
    method = FedAMoLE(E=6, r=2)
    server = method.server(made)
    models, params = method.models(made), server.deliver(made.clients[0]).group("params")
    model = models.build(params, tiny.context())
    learns = {path for path, p in model.named_parameters() if p.requires_grad}
    assert learns and all(".pairs." in path or path.endswith(".route") or path.startswith("head.") for path in learns)
    assert all(p.dtype == torch.float32 for _, m in mixtures(model) for k, p in m.named_parameters() if "base" not in k)


def test_memory_bounds_the_experts_of_a_client():
    method = FedAMoLE(E=12, r=2, max_experts=6)
    made = tiny.setup(tiny.source("olmoe"))
    models = method.models(made)
    memory = {"animal-00": models.need(4), "animal-01": models.need(3) - 1}
    server = method.server(tiny.setup(tiny.source("olmoe"), memory=memory))
    assert server.most["animal-00"] == 3 and server.most["colour-00"] == 6
    assert "lacks" in server.unable(next(c for c in server.setup.clients if c.id == "animal-01"))
    assert "animal-01" not in server.held


def test_equally_many_experts_within_the_memory_of_each_client():
    """Twelve experts with two clients each are four for each of six clients; one whose memory takes three has three."""
    made = tiny.setup(tiny.source("olmoe"))
    algorithm = FedAMoLE(E=12, choices=2, top_k=2, even=True)
    server = algorithm.server(made)
    server.most["animal-00"] = 3
    server._assign(1)
    counts = {c: {len(names) for names in held.values()} for c, held in server.held.items()}
    assert counts["animal-00"] == {3} and all(n == {4} for c, n in counts.items() if c != "animal-00")


def test_adapters_of_the_run_are_refused():
    with pytest.raises(ConfigError, match="has adapters of its own"):
        FedAMoLE().server(tiny.setup(tiny.source("olmoe"), lora=Lora(rank=2)))
