"""Taps against counting by hand, token by token, from what each router was given."""

import copy
from functools import cache
from math import exp, log

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.errors import ModelError
from consilium.moe.addressing import load_flat, router_row_of, select
from consilium.moe.routing import Tap
from consilium.moe.surgery import slice_experts


@cache
def full(model_type, form, **changes):
    source = tiny.source(model_type, form, **changes)
    params = source.load() | tiny.heads("animal", tiny.TASKS["animal"])
    return source, params, tiny.batch(source)


def build(model_type, form, held=None, **changes):
    """The model, or the sub-model of what is held."""
    source, params, _ = full(model_type, form, **changes)
    labels = tiny.TASKS["animal"] if form == "classification" else ()
    return source.build(params, "animal", labels, held).eval()


whole = cache(build)
"""The full model, shared: not to be changed."""


def outside_rows(params, held):
    """Router rows of what is not held."""
    return {k: t for k, t in params.items() if ".router." in k and k not in select(params, "", held)}


def rank(model, logits, correction, among):
    """Experts, the first choice first. Of eight experts, only those of the best groups."""
    family, config = model.family, model.config
    score = {i: logits[i] for i in among}
    if family.correction and family.score == "sigmoid":
        score = {i: 1 / (1 + exp(-logits[i])) + correction[i] for i in among}
    elif family.correction:
        score = {i: exp(logits[i]) / sum(exp(logits[j]) for j in among) + correction[i] for i in among}
    if family.groups and len(among) == 8:
        size = 8 // config.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
        groups.sort(
            key=lambda group: -sum(sorted(score[i] for i in group)[-(1 if family.model_type == "deepseek_v2" else 2) :])
        )
        among = [i for group in groups[: config.topk_group] for i in group]
    return sorted(among, key=lambda i: -score[i])


def by_hand(model, batch, params, held, run):
    """(demand, served): loops over sequences and tokens, with each router's input caught on its way in.

    Demand: the top-k of all eight rows. Served: the top-k of the held rows; a Switch expert serves, in each sequence,
    only the first `expert_capacity` positions that chose it, and padding takes part in that. Groups restrict the
    demand, and what is served where all eight are held.
    """
    inputs = {}
    hooks = [
        block.get_submodule(model.family.router).register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, args[0].detach().clone())
        )
        for name, block in model.blocks().items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    demand, served = {}, {}
    masks = {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"] != -100}
    for name, hidden in inputs.items():
        mask = masks["decoder" if name.startswith("decoder") else "encoder"]
        rows = torch.stack([params[f"{name}.router.{i}.weight"] for i in range(8)])
        zero = torch.zeros(())
        bias = torch.stack([params.get(f"{name}.router.{i}.bias", zero) for i in range(8)])
        correction = [params.get(f"{name}.router.{i}.e_score_correction_bias", zero).item() for i in range(8)]
        demand[name], served[name] = [0] * 8, [0] * 8
        k = getattr(model.config, "num_experts_per_tok", 1)
        hidden = hidden.reshape(*mask.shape, 32)
        for sequence, real in zip(hidden, mask, strict=True):
            used = [0] * 8
            for token, is_real in zip(sequence, real.tolist(), strict=True):
                ranking = rank(model, (rows @ token + bias).tolist(), correction, list(range(8)))
                chosen = ranking
                if len(held[name]) < 8:
                    chosen = rank(model, (rows @ token + bias).tolist(), correction, held[name])
                chosen = chosen[:k]
                for i in chosen:
                    used[i] += 1
                    fits = used[i] <= getattr(
                        model.blocks()[name].get_submodule(model.family.router), "expert_capacity", 10**9
                    )
                    served[name][i] += is_real and fits
                for i in ranking[:k]:
                    demand[name][i] += is_real
    return demand, served


def lists(counts):
    return {block: n.tolist() for block, n in counts.items()}


def everything(source):
    return dict.fromkeys(source.counts, tuple(range(8)))


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
@settings(max_examples=8)
@given(data=st.data())
def test_usage_is_exact(model_type, form, data):
    """Demand over all rows, served over the held ones, padding left out: for any sub-MoE."""
    source, params, batch = full(model_type, form)
    some = st.sets(st.integers(0, 7), min_size=tiny.FAMILIES[model_type].least).map(lambda ids: tuple(sorted(ids)))
    held = data.draw(st.fixed_dictionaries(dict.fromkeys(source.counts, some)))
    model = slice_experts(copy.deepcopy(whole(model_type, form)), held)
    with Tap(model, held, outside_rows(params, held), source.counts) as tap, torch.no_grad():

        def run():
            with tap.batch(batch, count=True):
                model(batch)

        demand, served = by_hand(model, batch, params, held, run)
    assert lists(tap.usage.demand) == demand
    assert lists(tap.usage.served) == served
    for block, slots in tap.usage.slots.items():
        assert slots == sum(demand[block])
        assert tap.usage.probability()[block].sum().item() == pytest.approx(1)
        assert tap.usage.demand[block].dtype == torch.int64


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_the_full_model_serves_what_is_demanded(model_type, form):
    source, params, batch = full(model_type, form)
    model = build(model_type, form)
    with Tap(model) as tap, torch.no_grad():

        def run():
            with tap.batch(batch, count=True):
                model(batch)

        demand, _ = by_hand(model, batch, params, everything(source), run)
    assert lists(tap.usage.demand) == lists(tap.usage.served) == demand
    assert all(sum(n > 0 for n in counts) > 2 for counts in demand.values()), "routing of the tiny model is degenerate"


def test_transformers_own_router_logits_agree():
    """The same counts from `output_router_logits`, for a causal model."""
    source, _, batch = full("olmoe", "text-to-text")
    model = build("olmoe", "text-to-text")
    with Tap(model) as tap, torch.no_grad(), tap.batch(batch, count=True):
        output = model.backbone(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
        )
    mask = batch["attention_mask"].reshape(-1).bool()
    for logits, block in zip(output.router_logits, source.counts, strict=True):
        counts = torch.bincount(logits[mask].topk(2).indices.flatten(), minlength=8)
        assert torch.equal(tap.usage.demand[block], counts)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_the_backward_pass_is_not_counted(model_type, form, checkpointing):
    """Gradient checkpointing runs every block again in the backward pass; the counts stay those of one forward pass."""
    source, params, batch = full(model_type, form)
    model = build(model_type, form)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointing:
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    for name, block in model.blocks().items():
        block.get_submodule(model.family.router).register_forward_hook(lambda *_, name=name: calls.append(name))
    model.train()
    with Tap(model) as tap:

        def run():
            with tap.batch(batch, count=True):
                logits, labels = model(batch)
            (torch.nn.functional.cross_entropy(logits, labels) + tap.balance_loss()).backward()

        demand, _ = by_hand(model, batch, params, everything(source), run)
    assert len(calls) == (2 if checkpointing else 1) * len(source.counts), "checkpointing was not what was tested"
    assert lists(tap.usage.demand) == demand


def test_capacity_drops_are_not_served():
    """With room for one token per expert and sequence, more is demanded than served, and both counts are exact."""
    source, params, batch = full("switch_transformers", "classification", expert_capacity=1)
    model = build("switch_transformers", "classification", expert_capacity=1)
    with Tap(model) as tap, torch.no_grad():

        def run():
            with tap.batch(batch, count=True):
                model(batch)

        demand, served = by_hand(model, batch, params, everything(source), run)
    assert lists(tap.usage.demand) == demand and lists(tap.usage.served) == served
    assert sum(map(sum, served.values())) < sum(map(sum, demand.values()))
    assert tap.usage.probability("served")[next(iter(source.counts))].sum() < 1


@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe"])
def test_batches_add_up_and_only_counted_ones(model_type):
    _, _, batch = full(model_type, "classification")
    model = build(model_type, "classification")
    with Tap(model) as tap, torch.no_grad():
        for count in (True, False, True):
            with tap.batch(batch, count=count):
                model(batch)
        model(batch)  # outside: not seen at all
        twice = lists(tap.usage.demand)
    with Tap(model) as once, torch.no_grad(), once.batch(batch, count=True):
        model(batch)
    assert twice == {block: [2 * n for n in counts] for block, counts in lists(once.usage.demand).items()}


def test_without_outside_rows_demand_is_over_the_held_ones():
    source, _, batch = full("olmoe", "classification")
    held = dict.fromkeys(source.counts, (2, 6, 7))
    model = build("olmoe", "classification", held)
    with Tap(model, held, None, source.counts) as tap, torch.no_grad(), tap.batch(batch, count=True):
        model(batch)
    for block in source.counts:
        assert torch.equal(tap.usage.demand[block], tap.usage.served[block])
        assert tap.usage.demand[block].shape == (8,)
        assert tap.usage.demand[block][[0, 1, 3, 4, 5]].sum() == 0


def test_demand_of_one_expert_is_still_top_k():
    """A layer with one expert serves one slot per token; its router still demands two."""
    source, params, batch = full("olmoe", "classification")
    held = dict.fromkeys(source.counts, (3,))
    model = build("olmoe", "classification", held)
    with (
        Tap(model, held, outside_rows(params, held), source.counts) as tap,
        torch.no_grad(),
        tap.batch(batch, count=True),
    ):
        model(batch)
    tokens = int(batch["attention_mask"].sum())
    for block in source.counts:
        assert tap.usage.demand[block].sum() == 2 * tokens == tap.usage.slots[block]
        assert tap.usage.served[block].tolist() == [0, 0, 0, tokens, 0, 0, 0, 0]


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_a_tap_changes_nothing_and_goes_away(model_type):
    _, _, batch = full(model_type, "classification")
    model = build(model_type, "classification")
    with torch.no_grad():
        before = model(batch)[0]
        with Tap(model) as tap, tap.batch(batch, count=True):
            during = model(batch)[0]
        assert torch.equal(before, during)
    routers = [block.get_submodule(model.family.router) for block in model.blocks().values()]
    assert not any(router._forward_hooks for router in routers)


def test_a_batch_that_is_not_the_one_that_ran():
    _, _, batch = full("olmoe", "classification")
    model = build("olmoe", "classification")
    other = {key: value[:1] for key, value in batch.items()}
    says = pytest.raises(ModelError, match=r"routed .* tokens, the batch has")
    with Tap(model) as tap, torch.no_grad(), says, tap.batch(other, count=True):
        model(batch)


# --- the balance loss, by hand ----------------------------------------------------------------------------------------


def route(model, tap, logits, mask=None):
    """Let every router see tokens that give exactly these logits: {block: T rows of E numbers}; returns the loss."""
    tokens = len(next(iter(logits.values())))
    mask = torch.ones(1, tokens, dtype=torch.int64) if mask is None else torch.tensor([mask])
    with tap.batch({"attention_mask": mask}):
        for name, block in model.blocks().items():
            rows = torch.tensor(logits[name])
            router = block.get_submodule(model.family.router)
            with torch.no_grad():
                router.get_parameter(model.family.rows[0]).copy_(torch.eye(32)[: rows.shape[1]])
            router(torch.nn.functional.pad(rows, (0, 32 - rows.shape[1])).unsqueeze(0))
    return tap.balance_loss().item()


def one_hot(expert, n=8, height=50.0):
    return [height * (i == expert) for i in range(n)]


def test_an_even_router_costs_one_top_1():
    """Token t goes to expert t with probability 1: f_e = P_e = 1/8, and 8 * 8 * 1/64 = 1."""
    model = build("switch_transformers", "classification")
    with Tap(model) as tap:
        assert route(model, tap, {block: [one_hot(t) for t in range(8)] for block in model.blocks()}) == pytest.approx(
            1
        )


def test_a_collapsed_router_costs_E_top_1():
    """All tokens to expert 3: f_3 = P_3 = 1, and 8 * 1 = 8."""
    model = build("switch_transformers", "classification")
    with Tap(model) as tap:
        assert route(model, tap, {block: [one_hot(3)] * 5 for block in model.blocks()}) == pytest.approx(8)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe"])
def test_top_2_with_a_correction(model_type):
    """Every token prefers 3, then 4; a correction of 9 for 5 and 6 moves the choice f there, and leaves P alone.

    Sigmoids, each divided by their sum: P = (1/2, .., 1/2, 1, 1) / 5 with the ones at 3 and 4, 8 * (P_5 + P_6) / 2 =
    8 * 0.1. Softmax: P_5 = P_6 = 0.
    """
    one = {"n_group": 1, "topk_group": 1} if tiny.FAMILIES[model_type].groups else {}
    source, params, _ = full(model_type, "classification", **one)
    high = {
        k: torch.full_like(t, 9.0 * (router_row_of(k)[1] in (5, 6))) for k, t in params.items() if "correction" in k
    }
    params = params | high
    model = source.build(params, "animal", tiny.TASKS["animal"]).eval()
    row = [50.0 * (i in (3, 4)) for i in range(8)]
    with Tap(model) as tap:
        loss = route(model, tap, dict.fromkeys(model.blocks(), [row] * 3))
    assert loss == pytest.approx(0.8 if model_type == "deepseek_v3" else 0, abs=1e-6)


def test_top_2():
    """Even: token t to t and t + 1, half each: f_e = P_e = 1/8, loss 1. Collapsed to a pair: 8 * 2 * 1/4 = 4."""
    model = build("olmoe", "classification")
    pairs = [[50.0 * (i in (t, (t + 1) % 8)) for i in range(8)] for t in range(8)]
    with Tap(model) as tap:
        assert route(model, tap, dict.fromkeys(model.blocks(), pairs)) == pytest.approx(1)
        assert route(model, tap, dict.fromkeys(model.blocks(), pairs[:1] * 3)) == pytest.approx(4)


@pytest.mark.parametrize(("model_type", "expected"), [("switch_transformers", 2.0), ("olmoe", 1.375)])
def test_each_layer_has_its_own_E_and_padding_does_not_count(model_type, expected):
    """Layer A, E = 2, logits (0, ln 3), so P = (1/4, 3/4); layer B, E = 4, logits ln (5, 2, 1, 0+), P = (5, 2, 1, 0)/8.

    Top-1: f = (0, 1): 2 * 3/4 = 1.5; f = (1, 0, 0, 0): 4 * 5/8 = 2.5; the mean is 2.
    Top-2: f = (1/2, 1/2): 2 * 1/2 = 1; f = (1/2, 1/2, 0, 0): 4 * 7/16 = 1.75; the mean is 1.375.
    A third token is padding and would prefer other experts.
    """
    source = tiny.source(model_type)
    first, second = source.counts
    model = build(model_type, "classification", {first: (0, 5), second: (1, 2, 3, 7)})
    a, b = [0.0, log(3)], [log(5), log(2), 0.0, -90.0]
    logits = {first: [a, a, [90.0, 0.0]], second: [b, b, [0.0, 0.0, 9.0, 90.0]]}
    with Tap(model) as tap:
        assert route(model, tap, logits, mask=[1, 1, 0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_the_balance_loss_trains_every_router(model_type, checkpointing):
    _, _, batch = full(model_type, "classification")
    model = build(model_type, "classification")
    if checkpointing:
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    with Tap(model) as tap:
        with tap.batch(batch):
            model(batch)
        tap.balance_loss().backward()
    for block in model.blocks().values():
        rows = block.get_submodule(model.family.router).get_parameter(model.family.rows[0])
        assert rows.grad is not None and rows.grad.abs().sum() > 0


def test_a_tap_survives_loading():
    """Hooks sit on modules, so new weights are watched too."""
    source, params, batch = full("olmoe", "classification")
    model = build("olmoe", "classification")
    with Tap(model) as tap, torch.no_grad():
        load_flat(model, params)
        with tap.batch(batch, count=True):
            model(batch)
    assert set(tap.usage.demand) == set(source.counts)


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_gates_and_what_a_batch_was_served(model_type, form):
    """Gates of each real token by hand from its logits; slots served as the counting pass has them."""
    model, (_, _, batch) = whole(model_type, form), full(model_type, form)
    with Tap(model) as tap, torch.no_grad():
        with tap.batch(batch, count=True):
            model(batch)
        gates, served = tap.gates(), {block: tap.served(block) for block in tap.logits}
        logits, masks = tap.logits, model.masks(batch)
    assert {block: n.tolist() for block, n in served.items()} == lists(tap.usage.served)
    for block, gates_TE in gates.items():
        mask = masks["decoder" if block.startswith("decoder") else "encoder"].reshape(-1)
        assert gates_TE.dtype == torch.float32
        for token, gate in zip(logits[block][mask].tolist(), gates_TE.tolist(), strict=True):
            weigh = (lambda x: 1 / (1 + exp(-x))) if model.family.score == "sigmoid" else exp
            total = sum(map(weigh, token))
            assert gate == pytest.approx([weigh(x) / total for x in token], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe"])
def test_routers_that_answer_in_another_order_are_refused(model_type):
    """As those of transformers 5.17 did: the first and the last of the three values changed places."""
    source = tiny.source(model_type)
    model, batch = source.build(source.load() | tiny.heads("animal", ("cat",)), "animal", ("cat",)), tiny.batch(source)
    for block in model.blocks().values():
        router = block.get_submodule(model.family.router)
        router.register_forward_hook(lambda module, args, output: (output[1], output[0], *output[2:])[::-1])
    refused = pytest.raises(ModelError, match=r"does not answer as it does in transformers 5\.23")
    with Tap(model) as tap, refused, tap.batch(batch):
        model(batch)
