"""Our own computation of the experts against transformers' own: values, gradients, the active ones alone."""

from contextlib import contextmanager
from functools import partial

import pytest
import tiny
import torch
from torch.nn import functional as F

from consilium import products
from consilium.moe import kernel
from consilium.moe.addressing import expert_of, flatten, parameters, table, unpack
from consilium.moe.experts import Experts
from consilium.moe.lora import Lora, add_lora
from consilium.moe.routing import Tap
from consilium.moe.surgery import slice_experts

ACTIVE = (1, 2, 5)
ONEDNN = pytest.mark.skipif(not products.faster(), reason="on this processor torch's own products are as fast")


def build(model_type, form="classification", dtype="float32", **changes):
    """A model with random heads, in eval mode (no dropout, no jitter), and a batch."""
    source = tiny.source(model_type, form, dtype, **changes)
    labels = tiny.TASKS["animal"] if form == "classification" else ()
    heads = {key: t.to(source.torch_dtype) for key, t in tiny.heads("animal", labels).items()}
    return source.build(source.load() | heads, "animal", labels).eval(), tiny.batch(source)


@pytest.fixture(params=tiny.FAMILIES)
def case(request):
    return build(request.param)


@pytest.fixture(params=["one by one", "at once", pytest.param("by oneDNN", marks=ONEDNN)], autouse=True)
def way(request, monkeypatch):
    """Everything here holds as on a CPU, also with all products by oneDNN, and as on a GPU, where families that keep
    experts in one tensor differ."""
    if request.param == "at once":
        monkeypatch.setattr(kernel, "GROUPED", ("cpu",))
    if request.param == "by oneDNN":
        monkeypatch.setattr(products, "LARGE", 0)
        monkeypatch.setattr(products, "NARROW", 1)
    return request.param


def outcome(model, batch, leaves=None):
    """(loss, gradients by flat local name) of one step; nothing is left behind."""
    logits, labels = model(batch)
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    names, leaves = table(model), leaves or {}
    grads = unpack(names, {path: p.grad for path, p in parameters(model).items() if p.grad is not None})
    grads |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for tensor in [*model.parameters(), *leaves.values()]:
        tensor.grad = None
    return loss.detach(), grads


def ours(model, batch, active=None, **settings):
    with Experts(model, **settings) as experts:
        experts.active = active
        return outcome(model, batch, experts.leaves)


def assert_same(found, expected, rtol=1e-5, atol=1e-5):
    """An expert that no token reached has no gradient in ours, and zeros in a fused tensor."""
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    assert found[1].keys() <= expected[1].keys()
    for name, gradient in expected[1].items():
        close = torch.zeros_like(gradient) if name not in found[1] else found[1][name]
        torch.testing.assert_close(close, gradient, rtol=rtol, atol=atol)


@contextmanager
def detached(model, active):
    """transformers' own forward, twice: the outputs of the experts that are not active are constants."""
    family, modules = model.family, {}

    def forward(block, module, hidden, routed, weights):
        places = routed.argmax(-1) if family.dispatch else routed
        mask = torch.isin(places, torch.tensor(active[block])).to(weights.dtype)
        rest = type(module).forward(module, hidden, routed, weights * (1 - mask)).detach()
        return type(module).forward(module, hidden, routed, weights * mask) + rest

    for name, block in model.blocks().items():
        modules[name] = block.get_submodule(family.experts)
        modules[name].forward = partial(forward, name, modules[name])
    yield
    for module in modules.values():
        del module.forward


@pytest.mark.parametrize("which", tiny.CASES, ids="-".join)
def test_values_and_gradients_are_those_of_transformers(which):
    model, batch = build(*which)
    expected = outcome(model, batch)
    for keep in (False, True):
        assert_same(ours(model, batch, keep=keep), expected)


def test_who_is_not_active_is_a_constant(case):
    """No gradient in its own tensors, nor through it in routers and lower layers; the value does not change."""
    model, batch = case
    active = {block: ACTIVE for block in model.blocks()}
    with detached(model, active):
        expected = outcome(model, batch)
    for keep in (False, True):
        found = ours(model, batch, active, keep=keep)
        assert_same(found, expected)
        reached = {expert_of(name)[1] for name in found[1] if expert_of(name)}
        assert reached and reached <= set(ACTIVE)


def test_a_block_that_is_not_named_learns_nothing(case):
    model, batch = case
    first, *_ = model.blocks()
    found = ours(model, batch, {first: ACTIVE})[1]
    assert {expert_of(name)[0] for name in found if expert_of(name)} == {first}


def test_sliced_models_with_uneven_counts(case):
    model, batch = case
    first, last = model.blocks()
    few = tiny.fewest(model.family.model_type, (6,))
    slice_experts(model, {first: (0, 2, 3, 7), last: few})
    assert_same(ours(model, batch), outcome(model, batch))
    active = {first: (1, 3), last: (0,)}
    with detached(model, active):
        expected = outcome(model, batch)
    assert_same(ours(model, batch, active), expected)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe", "gpt_oss"])
def test_gradient_checkpointing(model_type, keep):
    """The forward runs again during the backward pass; checkpointing only works in train mode, so dropout is zero."""
    off = "dropout_rate" if model_type == "switch_transformers" else "attention_dropout"
    model, batch = build(model_type, **{off: 0.0})
    active = {block: ACTIVE for block in model.blocks()}
    expected = ours(model.train(), batch, active, keep=keep)
    model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(ours(model, batch, active, keep=keep), expected, rtol=0, atol=0)


def test_bfloat16(case):
    """We are about as near to the exact gradients of the experts as transformers' own computation is."""
    model, batch = case
    exact = outcome(model, batch)[1]
    model.backbone.bfloat16(), model.head.bfloat16()
    stock, own = outcome(model, batch)[1], ours(model, batch)[1]

    def error(grads):
        names = [name for name in own if expert_of(name)]
        assert all(grads[name].dtype == torch.bfloat16 for name in names)
        return torch.cat([(grads[name].float() - exact[name]).flatten() for name in names]).norm()

    assert 0 < error(own) <= 1.5 * error(stock)


def test_an_expert_without_a_token_has_no_gradient():
    """Of two tokens at most four experts of eight see one."""
    model, batch = build("olmoe")
    batch = {key: t[:1, :2] if t.ndim == 2 else t[:1] for key, t in batch.items()}
    with Tap(model) as tap, tap.batch(batch):
        model(batch)
    hit = {(block, place) for block in tap.held for place in range(8) if torch.isin(place, tap._routed[block])}
    assert 4 <= len(hit) <= 8
    assert {expert_of(name) for name in ours(model, batch)[1] if expert_of(name)} == hit


def test_dropout_in_the_backward_pass_is_that_of_the_forward_pass():
    """Kept or computed again, whoever is active: the same seed gives the same gradients."""
    model, batch = build("switch_transformers", dropout_rate=0.5)
    model.train()
    results = []
    for keep, active in ((True, None), (False, None), (False, {block: ACTIVE for block in model.blocks()})):
        torch.manual_seed(0)
        results.append(ours(model, batch, active, keep=keep))
    assert_same(results[1], results[0])
    last = list(model.blocks())[-1]  # above it nothing depends on who is active
    own = [n for n in results[2][1] if expert_of(n) and expert_of(n)[0] == last]
    assert own
    for name in own:
        torch.testing.assert_close(results[2][1][name], results[0][1][name])
    torch.manual_seed(1)
    assert ours(model, batch)[0] != results[0][0]


def test_leaves_share_storage_with_the_model(case):
    """A step on the leaves is seen by `flatten`; all expert tensors are leaves and nothing else is."""
    model, _ = case
    leaves = Experts(model).leaves
    assert leaves.keys() == {name for name in flatten(model) if expert_of(name)}
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.fill_(0.5)
    assert all((t == 0.5).all() == bool(expert_of(name)) for name, t in flatten(model).items() if t.numel() > 1)


def test_frozen_experts_are_constants():
    model, batch = build("mixtral")
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    assert Experts(model).leaves == {}
    assert ours(model, batch)[1].keys() == {f"head.animal.{c}.{t}" for c in model.labels for t in ("weight", "bias")}


def test_outside_the_context_transformers_computes(case):
    model, _ = case
    modules = [block.get_submodule(model.family.experts) for block in model.blocks().values()]
    with Experts(model):
        assert all("forward" in module.__dict__ for module in modules)
        with Experts(model):
            pass
        assert all("forward" in module.__dict__ for module in modules)
    assert not any("forward" in module.__dict__ for module in modules)


def test_generation_is_the_same():
    model, batch = build("olmoe", "text-to-text")
    expected = model.generate(batch, 4)
    with Experts(model):
        assert torch.equal(model.generate(batch, 4), expected)


@pytest.mark.parametrize("active", [None, ACTIVE], ids=["all", "some"])
@pytest.mark.parametrize("targets", [(), ("down_proj",)], ids=["both", "one"])
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_adapters_at_once_are_those_one_by_one(model_type, targets, active, monkeypatch, way):
    model, batch = build(model_type)
    add_lora(model, Lora(rank=8, targets=targets))
    for name, p in model.adapters.named().items():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    products = []
    monkeypatch.setattr(kernel, "grouped_mm", lambda *a, **k: products.append(a) or torch._grouped_mm(*a, **k))
    chosen = active and {block: active for block in model.blocks()}
    found = ours(model, batch, chosen)
    assert bool(products) == (way == "at once")
    monkeypatch.setattr(kernel, "GROUPED", ())
    assert_same(found, ours(model, batch, chosen))
    assert any("lora_A" in name for name in found[1]) and any("lora_B" in name for name in found[1])


@pytest.mark.parametrize("model_type", ["olmoe", "switch_transformers"])
@torch.no_grad()
def test_contributions_by_hand(model_type):
    """Token by token: of each expert that computes it, the gate times the norm of its output, padding left out."""
    model, batch = build(model_type)
    real = batch["attention_mask"].reshape(-1).bool()
    experts = Experts(model, measure=True)
    layers = dict(zip(experts.places, experts._layers, strict=True))
    expected = {name: torch.zeros(len(places), dtype=torch.float64) for name, places in experts.places.items()}

    def computed(layer, place: int, x_1D):
        h, y = torch.empty(1, layer.first[place].width), torch.empty(1, layer.second[place].width)
        layer.first[place].forward(x_1D, 1, layer.tensors, h)
        layer.second[place].forward(layer.activation(h), 1, layer.tensors, y)
        return y

    def by_hand(name, hidden, routed, weights):
        layer = layers[name]
        x_TD, gates_TK = hidden.reshape(-1, hidden.shape[-1]), weights.reshape(len(real), -1)
        places_TK = routed.reshape(len(real), -1)
        if layer.dispatch:
            served_T, places_T = routed.reshape(len(real), -1).max(-1)
            places_TK = places_T.masked_fill(served_T == 0, len(layer.first))[:, None]
        for token in torch.nonzero(real).flatten().tolist():
            for place, gate in zip(places_TK[token].tolist(), gates_TK[token].tolist(), strict=True):
                if place < len(layer.first):
                    expected[name][place] += gate * float(computed(layer, place, x_TD[token : token + 1]).norm())
        return kernel.compute(layer, hidden, routed, weights)

    for name, block in model.blocks().items():
        block.get_submodule(model.family.experts).forward = partial(by_hand, name)
    experts.masks = model.masks(batch)
    model(batch)
    assert any(total.sum() > 0 for total in expected.values())
    for name, total in expected.items():
        torch.testing.assert_close(experts.contributions[name], total, rtol=1e-4, atol=1e-6)
