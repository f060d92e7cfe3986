"""Adapters on the experts: nothing changes at first, only they and the head are trained, hooks still see routers."""

import pytest
import tiny
import torch

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.fedprox import FedProx
from consilium.core import Payload
from consilium.errors import ConfigError
from consilium.moe.addressing import (
    expert_of,
    flatten,
    is_adapter,
    parameters,
    router_row_of,
    select,
    table,
    travels,
    unpack,
)
from consilium.moe.lora import Lora, add_expert_lora, add_lora, initial_adapters
from consilium.moe.routing import Tap
from consilium.training import local_round


@pytest.fixture(params=tiny.CASES, ids="-".join)
def case(request):
    source = tiny.source(*request.param)
    labels = tiny.TASKS["animal"] if source.form == "classification" else ()
    return source.build(source.load() | tiny.heads("animal", labels), "animal", labels).eval(), tiny.batch(source)


def test_the_output_does_not_change(case):
    model, batch = case
    with torch.no_grad():
        before = model(batch)[0]
        add_expert_lora(model, 2)
        torch.testing.assert_close(model(batch)[0], before, rtol=0, atol=1e-6)


def test_only_adapters_and_head_are_trained(case):
    model, batch = case
    model_type = model.config.model_type
    adapters = add_expert_lora(model, 2)
    assert model.config.model_type == model_type
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name or name.startswith("head.")}
    assert {id(p) for p in adapters} == {id(p) for n, p in model.named_parameters() if "lora_" in n}
    logits, labels = model(batch)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= trainable
    for block in model.blocks():
        gradients = [
            p.grad for n, p in model.backbone.named_parameters() if n.startswith(block + ".") and "lora_B" in n
        ]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), f"{block} has no adapter that learns"


def test_every_expert_of_every_block_has_adapters(case):
    """Two adapted matrices (in and out) per expert, each with A and B of rank 2: 8 experts * 2 * (D + F) * 2."""
    model, _ = case
    fused = 32 + 2 * 16 + 16 + 32  # gate and up in one
    shapes = {"switch_transformers": 32 + 16 + 16 + 32}
    size = sum(p.numel() for p in add_expert_lora(model, 2))
    assert size == len(model.blocks()) * 8 * 2 * shapes.get(model.family.model_type, fused)


def test_hooks_still_see_the_routers(case):
    model, batch = case
    with Tap(model) as tap, torch.no_grad(), tap.batch(batch, count=True):
        model(batch)
    before = tap.usage
    add_expert_lora(model, 2)
    with Tap(model) as tap, torch.no_grad(), tap.batch(batch, count=True):
        model(batch)
    assert all(torch.equal(before.demand[b], n) for b, n in tap.usage.demand.items())
    assert tap.usage.slots == before.slots


# --- our own adapters -------------------------------------------------------------------------------------------------

LORA = Lora(rank=2, alpha=3.0)


def adapted(case, lora=LORA):
    """A model with adapters of random values, and its batch."""
    model, batch = case
    add_lora(model, lora, seed=1)
    rng = torch.Generator().manual_seed(2)
    for parameter in model.adapters.parameters():
        parameter.data.normal_(std=0.2, generator=rng)
    return model, batch


def merged(model, source):
    """The same model without adapters: W + scale B A for every expert."""
    flat = source.load() | {k: t for k, t in flatten(model).items() if k.startswith("head.")}
    adapters = model.adapters.named()
    for name in (n.removesuffix(".lora_A") for n in adapters if n.endswith(".lora_A")):
        update = model.adapters.scale * (adapters[f"{name}.lora_B"] @ adapters[f"{name}.lora_A"]).detach()
        key = name if name in flat else f"{name}.weight"
        flat[key] = flat[key] + (update.t() if model.family.model_type == "gpt_oss" else update)
    return source.build(flat, model.task, model.labels).eval()


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    source = tiny.source(request.param)
    labels = tiny.TASKS["animal"]
    model = source.build(source.load() | tiny.heads("animal", labels), "animal", labels).eval()
    return source, (model, tiny.batch(source))


def gradients(model, batch):
    logits, labels = model(batch)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    return logits.detach(), {path: p.grad for path, p in parameters(model).items() if p.grad is not None}


def test_new_adapters_change_nothing_and_a_is_the_same_for_all(case):
    model, batch = case
    with torch.no_grad():
        before = model(batch)[0]
        add_lora(model, LORA, seed=5)
        torch.testing.assert_close(model(batch)[0], before, rtol=0, atol=1e-6)
    assert tiny.same(initial_adapters(model, LORA, 5), {k: t.detach() for k, t in model.adapters.named().items()})


def test_outputs_and_gradients_are_those_of_the_merged_weights(family):
    """d loss / d A = scale B^T dW and d loss / d B = scale dW A^T, with dW the gradient of the merged weight."""
    source, case = family
    model, batch = adapted(case)
    plain = merged(model, source)
    logits, grads = gradients(model, batch)
    expected, full = gradients(plain, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    full = unpack({k: n for k, n in table(plain).items() if k in full}, full)
    adapters = model.adapters.named()
    learning = 0
    for name in (n.removesuffix(".lora_A") for n in adapters if n.endswith(".lora_A")):
        weight = full.get(name, full.get(f"{name}.weight"))
        a, b = adapters[f"{name}.lora_A"].detach(), adapters[f"{name}.lora_B"].detach()
        if f"{name}.lora_A" not in grads:
            assert weight is None or not weight.any()
            continue
        weight = weight.t() if model.family.model_type == "gpt_oss" else weight
        learning += 1
        torch.testing.assert_close(grads[f"{name}.lora_A"], LORA.scale * b.t() @ weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads[f"{name}.lora_B"], LORA.scale * weight @ a.t(), rtol=1e-4, atol=1e-5)
    assert learning > 8
    routers = [path for path in grads if f".{model.family.router}." in path]
    assert routers and {path for path in grads if not path.startswith("head.")} == {
        *routers,
        *(adapters & grads.keys()),
    }


def test_targets_and_a_frozen_router():
    source = tiny.source("olmoe")
    model = source.build(source.load() | tiny.heads("animal", ("cat",)), "animal", ("cat",))
    add_lora(model, Lora(rank=1, targets=("down_proj",), router=False))
    trainable = {path for path, p in parameters(model).items() if p.requires_grad}
    assert len(trainable) == 2 * 8 * 2 + 2 and all(".down_proj.lora_" in p or p.startswith("head.") for p in trainable)


@pytest.mark.parametrize(
    ("lora", "what"),
    [(dict(rank=17), "at most 16"), (dict(rank=1, targets=("up",)), "has gate_up_proj, down_proj")],
)
def test_what_does_not_fit_the_family_is_refused(lora, what):
    with pytest.raises(ConfigError, match=what):
        initial_adapters(tiny.source("olmoe").skeleton("", ()), Lora(**lora), 0)


@pytest.mark.parametrize("bad", [dict(rank=-1), dict(alpha=-1.0), dict(alpha=float("nan")), dict(base="int8"),
                                 dict(rule="median"), dict(ranks="memory")], ids=str)  # fmt: skip
def test_refused_settings(bad):
    with pytest.raises(ConfigError, match=rf"lora\.{next(iter(bad))} is "):
        Lora(**bad)


def test_adapters_travel_by_the_ids_of_the_full_model():
    """A slice takes its experts' adapters; only they, router rows and head rows are in `flatten`, and come back."""
    setup = tiny.setup(tiny.source("deepseek_v3"), lora=LORA)
    sent = setup.initial_params()
    kinds = {"adapter" if is_adapter(k) else "row" if router_row_of(k) else k.split(".")[0] for k in sent}
    assert kinds == {"adapter", "row", "head"}
    held = {block: (1, 4) for block in setup.model.counts}
    chosen = select(sent, "animal", held)
    rng = torch.Generator().manual_seed(0)
    chosen = {k: torch.randn(t.shape, generator=rng).to(t.dtype) for k, t in chosen.items()}
    model = setup.build(chosen, tiny.context(), held)
    assert tiny.same(flatten(model, held), chosen)
    assert {expert_of(k)[1] for k in chosen if is_adapter(k)} == {1, 4}
    base = setup.model.load()
    name = next(iter(held)) + ".experts.{}.down_proj"
    fused = model.backbone.get_parameter(name.replace(".{}", ""))
    assert torch.equal(fused[1], base[name.format(4)])


# --- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FedAvg(), FedMoE(stage1_epochs=1), FedProx(mu=0.1)], ids=lambda m: type(m).__name__)
def test_methods_run_on_adapters(method, tmp_path):
    """Nothing but adapters, router rows and head rows travels, and they change."""
    setup = tiny.setup(tiny.source("mixtral"), clients_per_round=2, lora=Lora(rank=2))
    server, client = method.server(setup), method.client(setup)
    before, sent = dict(server.params), []
    train = client.train
    client.train = lambda payload, context: sent.append(payload) or sent.append(train(payload, context)) or sent[-1]
    engine = tiny.engine(server, client, setup, tmp_path, strict=True)
    for round in (1, 2):
        engine.round(round, test=round == 2)
    assert sent and all(travels(key) for payload in sent for key in payload.group("params"))
    moved = {key for key, t in server.params.items() if not torch.equal(t, before[key])}
    assert {"lora_A", "lora_B"} <= {key.rsplit(".", 1)[1] for key in moved} and any(router_row_of(k) for k in moved)


def test_choice_and_adapters_together():
    """HFedMoE's selection with adapters: those of experts that were not chosen stay, bit for bit."""
    setup = tiny.setup(tiny.source("olmoe"), lora=LORA)
    sent = select(setup.initial_params(), "animal")
    reply = local_round(
        setup, Payload({"params": sent}), tiny.context(), choose=lambda tap: {b: (0, 3) for b in tap.held}
    )[1]
    after = reply.group("params")
    moved = {expert_of(key)[1] for key in sent if is_adapter(key) and not torch.equal(sent[key], after[key])}
    assert moved and moved <= {0, 3}
