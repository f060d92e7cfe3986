"""FLAME and UB-SMoE: weights, scales, balanced routing and filled gradients by hand; what leaves a client."""

import dataclasses

import pytest
import tiny
import torch
from torch import nn

from consilium.algorithms.flame import FLAME, UBSMoE, activation_weight
from consilium.core import ClientState, Payload
from consilium.moe.active import Balanced, activate, add_scales, fill_gradients, scales_of
from consilium.moe.addressing import parameters, table
from consilium.moe.surgery import attribute


def test_weights_by_activation_by_hand():
    """5 examples, k = 2: 10 + 20 + 0 slots are 15 tokens. t = 2: expert 0 has 5 (10/15)^2, expert 1 5 (15/15)^2 as no
    token counts twice, expert 2 nothing; the trunk 5."""
    counts = torch.tensor([10, 20, 0])
    reply = Payload({"served": {"b": counts}}, {"num_examples": 5})
    weight = activation_weight(reply, 2, 2.0)
    assert weight("b.experts.0.w") == pytest.approx(5 * (10 / 15) ** 2)
    assert weight("b.experts.1.w.lora_A") == 5 and weight("b.experts.2.w") == 0
    assert weight("b.router.0.weight") == pytest.approx(5 * (10 / 15) ** 2) and weight("embed.weight") == 5
    assert activation_weight(reply, 2, 0.0) == 5


def test_k_follows_what_is_given_or_the_memory():
    made = tiny.setup(tiny.source("olmoe"))
    assert FLAME(k=(1, 2)).server(made).k == dict(zip(sorted(tiny.IDS), (1, 2, 1, 2, 1, 2), strict=True))
    need = made.footprint(made.model.counts).total
    memory = {"animal-00": need // 2, "animal-01": need, "colour-00": need // 5}
    k = FLAME().server(tiny.setup(tiny.source("olmoe"), memory=memory)).k
    assert (k["animal-00"], k["animal-01"], k["colour-00"], k["number-00"]) == (1, 2, 1, 2)


def built(model_type="olmoe", held=None):
    source = tiny.source(model_type)
    params = source.load(held) | tiny.heads("animal", tiny.TASKS["animal"])
    return source.build(params, "animal", tiny.TASKS["animal"], held), tiny.batch(source)


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "switch_transformers"])
def test_fewer_experts_are_active(model_type):
    model, _ = built(model_type)
    activate(model, 1)
    if model.family.top_k is not None:
        assert all(attribute(block, model.family.top_k) == 1 for block in model.blocks().values())
    activate(model, 5)  # never more than before
    if model.family.top_k is not None:
        assert all(attribute(block, model.family.top_k) == 1 for block in model.blocks().values())


def test_a_scale_of_zero_takes_the_experts_away_and_one_changes_nothing():
    model, batch = built()
    model.eval()
    with torch.no_grad():
        before = model(batch)[0]
        add_scales(model, {})
        assert torch.equal(model(batch)[0], before)
        for block in model.blocks().values():
            block.experts.output_scale.zero_()
        without = model(batch)[0]
    for block in model.blocks().values():
        block.experts.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[0], without)
    assert all(value == 0 for value in scales_of(model).values()) and len(scales_of(model)) == 2


def test_balanced_routing_by_hand():
    """E = 3, k = 1, N = 2, reach 1. Logits (3, 2.5, 2.9): candidates 0 and 2. Usage (0.8, 0.1, 0.1): u*/u - 1 =
    -0.583, 2.33, 2.33; tanh = -0.525, 0.981, 0.981. Moved: 2.475, 3.881: expert 2, with weight 1 / (1 + e^-1.406).
    Then u = 0.5 u + 0.5 (0, 0, 1) = (0.4, 0.05, 0.55)."""
    hook = Balanced(2, 1.0, 0.5, normal=False)
    hook.u = torch.tensor([0.8, 0.1, 0.1])
    logits = torch.tensor([[3.0, 2.5, 2.9]])
    out = hook(nn.Identity().train(), (), (logits, torch.tensor([[0.9]]), torch.tensor([[0]])))
    moved = logits[0] + torch.tanh(torch.tensor([1 / 2.4, 1 / 0.3, 1 / 0.3]) - 1)
    assert out[2].tolist() == [[2]] and torch.equal(out[0], logits)
    torch.testing.assert_close(out[1], (moved[2] - moved[0]).sigmoid().view(1, 1))
    torch.testing.assert_close(hook.u, torch.tensor([0.4, 0.05, 0.55]))
    before = (logits, torch.tensor([[0.9]]), torch.tensor([[0]]))
    assert hook(nn.Identity().eval(), (), before) is before  # scoring is as the model has it


@pytest.mark.parametrize("model_type", ["olmoe", "switch_transformers"])
def test_experts_without_tokens_get_a_part_of_the_mean_gradient(model_type):
    """Expert 1 has gradients of ones, expert 2 of threes, the others none: half of the mean is one."""
    model, _ = built(model_type)
    names = table(model)
    trainable = parameters(model)
    for path, p in trainable.items():
        name = names[path]
        if isinstance(name, tuple) and ".experts." in name[0]:
            p.grad = torch.zeros_like(p)
            p.grad[1], p.grad[2] = 1.0, 3.0
        elif isinstance(name, str) and ".experts." in name:
            p.grad = {"1": torch.ones_like(p), "2": torch.full_like(p, 3.0)}.get(
                name.split(".experts.")[1].split(".")[0]
            )
    fill_gradients(model, None, 0.5)(trainable, trainable)
    seen = 0
    for path, p in trainable.items():
        name = names[path]
        if ".experts." not in (name if isinstance(name, str) else name[0]):
            continue
        parts = p.grad if isinstance(name, tuple) else [p.grad]
        ids = range(len(parts)) if isinstance(name, tuple) else [int(name.split(".experts.")[1].split(".")[0])]
        for i, part in zip(ids, parts, strict=True):
            assert (part == {1: 1.0, 2: 3.0}.get(i, 1.0)).all()
            seen += 1
    assert seen >= 32


def test_what_leaves_a_client_and_what_stays():
    made = tiny.setup(tiny.source("olmoe"), clients_per_round=6)
    method = FLAME(k=(1,))
    server, client = method.server(made), method.client(made)
    sent = server.configure(1, made.clients)["animal-00"]
    assert sent.scalars["k"] == 1
    context = tiny.context()
    reply = client.train(sent, context)
    assert reply.group("params").keys() == sent.group("params").keys()  # no scale among them
    assert set(reply.groups) == {"params", "served"}
    kept = context.private.params
    assert set(kept) == {f"scale/{block}" for block in made.model.counts} and not context.state.params
    assert all(value != 1 for value in kept.values())  # they were trained
    tokens = {block: int(n.sum()) for block, n in reply.group("served").items()}
    assert len(set(tokens.values())) == 1 and tokens.popitem()[1] > 0
    moved = {k: ClientState({key: value * 3 for key, value in kept.items()}) for k in "a"}["a"]
    scored = dataclasses.replace(context, private=moved)
    told = client.evaluate(server.deliver(made.clients[0]), scored).scalars
    assert {"score", "full_k"} <= told.keys()


def test_without_temperature_nothing_is_told_of_usage():
    made = tiny.setup(tiny.source("olmoe"), clients_per_round=6)
    method = UBSMoE(k=(1,))
    server, client = method.server(made), method.client(made)
    sent = server.configure(1, made.clients)["animal-00"]
    reply = client.train(sent, tiny.context())
    assert set(reply.groups) == {"params"} and "served" not in server.expects(made.clients[0], sent)


def test_with_experts_by_memory_the_larger_sets_contain_the_smaller():
    source = tiny.source("olmoe")
    memory = {"animal-00": tiny.bytes_for(3, source), "colour-00": tiny.bytes_for(5, source)}
    server = FLAME(experts="memory").server(tiny.setup(source, memory=memory))
    small, large = server.structure()["animal-00"], server.structure()["colour-00"]
    for block in small:
        assert len(small[block]) == 3 and len(large[block]) == 5 and set(small[block]) < set(large[block])
