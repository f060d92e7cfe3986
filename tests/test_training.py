"""The local loop: exact numbers, determinism, the order of what is done to gradients, and whole rounds in each form."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.algorithms import register_all
from consilium.core import Algorithm, Payload, experts_to_scalars
from consilium.data.task import Split
from consilium.errors import ConfigError, ModelError
from consilium.fit import Fit
from consilium.moe.addressing import expert_of, flatten, parameters, select
from consilium.moe.budget import MemoryModel
from consilium.moe.routing import Tap
from consilium.params import checksum
from consilium.scoring import evaluate
from consilium.setup import EVALUATION
from consilium.training import fit, local_round, local_test

CLIENT = "animal-00"


def started(setup, client=CLIENT, seed=0):
    """(model, encoded training data, context) of a client about to train on the initial parameters."""
    context = tiny.context(client, setup.model.form, seed)
    model = setup.build(select(setup.initial_params(), context.info.task), context)
    return model, setup.encode(context, context.data.train), context


def trained(setup, seed=0, correct=None, **changes):
    model, data, context = started(setup, seed=seed)
    fitted = fit(model, data, setup.fit, context, correct, **changes)
    return fitted, flatten(model)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0}, {"lr": -1.0}, {"lr": math.nan}, {"head_lr": 0}, {"head_lr": math.inf}, {"epochs": 0}, {"batch_size": 0},
     {"max_length": 0}, {"target_length": 0}, {"label_smoothing": 1.1}, {"label_smoothing": -0.1}, {"balance": -1},
     {"weight_decay": -1}, {"balance": math.nan}, {"clip": -1}, {"clip": math.nan}, {"optimizer": "lion"},
     {"precision": "float16"},
     {"momentum": 0.9}, {"momentum": -0.1, "optimizer": "sgd"}, {"momentum": 1.0, "optimizer": "sgd"}],
    ids=str,
)  # fmt: skip
def test_refused_settings(bad):
    with pytest.raises(ConfigError, match=rf"fit\.{next(iter(bad))} is "):
        Fit(**bad)


def test_initial_params_are_the_backbone_and_zero_heads():
    setup = tiny.setup()
    params = setup.initial_params()
    heads = {key: t for key, t in params.items() if key.startswith("head.")}
    assert set(heads) == {
        f"head.{t}.{c}.{leaf}" for t, cs in tiny.TASKS.items() for c in cs for leaf in ("weight", "bias")
    }
    assert all(not t.any() and t.shape in ((32,), ()) for t in heads.values())
    assert tiny.same({key: t for key, t in params.items() if key not in heads}, setup.model.load())


def test_largest_uniform():
    """One byte less than n experts need gives n - 1; no limit gives all; too little for one gives 0."""
    setup = tiny.setup()
    for n in (1, 2, 5, 8):
        assert setup.largest_uniform(tiny.bytes_for(n)) == n
        assert setup.largest_uniform(tiny.bytes_for(n) - 1) == n - 1
        assert setup.largest_uniform(2 * tiny.bytes_for(n), share=0.5) == n
        assert setup.largest_uniform(tiny.bytes_for(n, references=2), references=2) == n
    assert setup.largest_uniform(None) == 8


def test_lacks_says_what_is_needed_and_what_there_is():
    setup = tiny.setup(memory=tiny.bytes_for(2))
    client = setup.clients[0]
    assert setup.lacks(client, dict.fromkeys(setup.model.counts, 2)) is None
    assert setup.lacks(client, dict.fromkeys(setup.model.counts, 3)).startswith("needs ")
    assert setup.lacks(client, dict.fromkeys(setup.model.counts, 2), references=1) is not None
    assert tiny.setup().lacks(tiny.infos()[0], setup.model.counts) is None


def test_the_footprint_is_of_training_or_of_the_evaluation_after_it():
    """Evaluation takes four times the batch; the rank of adapters reaches the memory model."""
    setup = tiny.setup(batch_size=2)
    counts = setup.model.counts
    shape = {"max_length": 12, "target_length": 5, "optimizer": "adamw"}
    memory = MemoryModel.of(setup.model)
    evaluation = memory.footprint(counts, mode="forward", batch_size=8, **shape)
    training = memory.footprint(counts, mode="lora", batch_size=2, rank=16, **shape)
    assert EVALUATION == 4 and setup.footprint(counts, "forward") == evaluation
    assert training.total > evaluation.total and setup.footprint(counts, "lora", rank=16) == training
    few = tiny.infos(setup.footprint(counts, "lora", rank=8).total)[0]
    assert setup.lacks(few, counts, "lora", rank=8) is None and setup.lacks(few, counts, "lora", rank=16)


# --- fit --------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits():
    """Dropout and the order of batches included, whatever the state of the global generator; another seed differs."""
    setup = tiny.setup()
    torch.manual_seed(1)
    first = trained(setup)
    torch.manual_seed(2)
    again = trained(setup)
    assert (first[0].loss, checksum(first[1])) == (again[0].loss, checksum(again[1]))
    assert checksum(first[1]) != checksum(trained(setup, seed=1)[1])


def test_dropout_is_on():
    loss = [trained(tiny.setup(tiny.source(dropout_rate=rate)), seed=3)[0].loss for rate in (0.0, 0.5)]
    assert loss[0] != loss[1]


def test_no_gradient_is_there_during_a_forward_pass_nor_afterwards():
    setup = tiny.setup(batch_size=3)
    model, data, context = started(setup)
    held = []
    model.register_forward_pre_hook(lambda *_: held.append(sum(p.grad is not None for p in model.parameters())))
    assert fit(model, data, setup.fit, context).steps == 3
    assert held == [0, 0, 0] and all(p.grad is None for p in model.parameters())


def test_the_outside_generator_is_left_alone():
    setup = tiny.setup()
    model, data, context = started(setup)
    state = torch.get_rng_state()
    fit(model, data, setup.fit, context)
    evaluate(model, data, context, setup)
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_epochs_and_progress():
    """8 examples in batches of 3 are 3 steps an epoch, the last of 2 examples."""
    setup = tiny.setup(batch_size=3, epochs=2)
    model, data, context = started(setup)
    calls = []
    context.progress = lambda *call: calls.append(call)
    assert fit(model, data, setup.fit, context).steps == 6
    assert calls == [(i, 6) for i in range(1, 7)]
    assert fit(model, data, setup.fit, context, epochs=1).steps == 3


def test_a_step_of_sgd_by_hand():
    """Only the head is trained; it starts from zero, so p = 1/3 for every class and example.

    Four examples of classes 0 1 2 0, label smoothing 0.3: the target of class c is 0.7 + 0.1 for c, 0.1 elsewhere.
    d loss / d bias_c = mean over examples of (p_c - target_c): for class 0 (two hits): 1/3 - (2 * 0.8 + 2 * 0.1) / 4
    = 1/3 - 0.45; for classes 1 and 2 (one hit): 1/3 - (0.8 + 3 * 0.1) / 4 = 1/3 - 0.275. d loss / d W_c is the same
    mean, weighted by the pooled hidden states. One step of head_lr = 0.5 goes down that slope; the loss was ln 3.
    """
    source = tiny.source(dropout_rate=0.0)
    setup = tiny.setup(
        source, optimizer="sgd", head_lr=0.5, lr=9.0, label_smoothing=0.3, balance=0.0, clip=0.0, batch_size=4
    )
    model, _, context = started(setup)
    model.backbone.requires_grad_(False)
    split = context.data.train
    data = setup.encode(context, Split(split.texts[:4], split.targets[:4]))
    before = {path: p.clone() for path, p in parameters(model).items()}
    targets, pooled = [], []
    model.register_forward_pre_hook(lambda _, args: targets.extend(args[0]["labels"].tolist()))
    model.head.register_forward_hook(lambda _, args, __: pooled.extend(args[0].detach()))
    fitted = fit(model, data, setup.fit, context)
    assert fitted.loss == pytest.approx(math.log(3), rel=1e-6) and fitted.steps == 1
    step = [-0.5 * (1 / 3 - 0.45), -0.5 * (1 / 3 - 0.275), -0.5 * (1 / 3 - 0.275)]
    assert model.head.bias.tolist() == pytest.approx(step, rel=1e-5)
    for c in range(3):
        slope = sum((1 / 3 - (0.8 if t == c else 0.1)) * h for t, h in zip(targets, pooled, strict=True)) / 4
        torch.testing.assert_close(model.head.weight[c], -0.5 * slope, rtol=1e-4, atol=1e-6)
    for path, p in parameters(model).items():
        assert path.startswith("head.") or torch.equal(p, before[path])


def test_the_loss_by_hand():
    """One step: smoothed cross-entropy from the logits, plus 0.5 times the mean over layers of E * sum_e f_e P_e."""
    source = tiny.source(dropout_rate=0.0)
    setup = tiny.setup(source, label_smoothing=0.2, balance=0.5, batch_size=8)
    model, data, context = started(setup)
    with torch.no_grad():
        for name, p in parameters(model).items():
            if name.startswith("head."):
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
    seen = {}
    model.register_forward_hook(lambda _, args, output: seen.update(batch=args[0], logits=output[0].detach()))
    for name, block in model.blocks().items():
        block.router.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output[2].detach()}))
    fitted = fit(model, data, setup.fit, context)
    expected = 0.0
    for logits, label in zip(seen["logits"].double(), seen["batch"]["labels"], strict=True):
        log_p = logits - logits.exp().sum().log()
        expected += (-0.8 * log_p[label] - 0.2 * log_p.mean()).item() / 8
    for name in source.counts:
        f, P, tokens = [0] * 8, [0.0] * 8, 0
        for logits, mask in zip(seen[name].double(), seen["batch"]["attention_mask"], strict=True):
            for token in logits[mask.bool()]:
                p = (token.exp() / token.exp().sum()).tolist()
                f[p.index(max(p))] += 1
                P = [a + b for a, b in zip(P, p, strict=True)]
                tokens += 1
        expected += 0.5 * 8 * sum(a / tokens * b / tokens for a, b in zip(f, P, strict=True)) / 2
    assert fitted.loss == pytest.approx(expected, rel=1e-5)


def test_momentum_by_hand():
    """Two steps of rate 0.5 and momentum 0.9: v1 = g1, v2 = 0.9 g1 + g2; the weights go by -0.5 (v1 + v2). Begun anew
    in the next call: its first step goes by -0.5 g3 alone."""
    setup = tiny.setup(optimizer="sgd", lr=0.5, head_lr=0.5, momentum=0.9, clip=0.0, batch_size=4)
    model, data, context = started(setup)
    assert len(data) == 8
    start = [p.detach().clone() for p in parameters(model).values()]
    seen = []

    def keep(trainable, weights):
        seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainable.values()])

    fit(model, data, setup.fit, context, keep)
    middle = [p.detach().clone() for p in parameters(model).values()]
    for before, after, g1, g2 in zip(start, middle, *seen, strict=True):
        torch.testing.assert_close(after, before - 0.5 * (g1 + (0.9 * g1 + g2)), rtol=1e-4, atol=1e-6)
    fit(model, setup.encode(context, Split(context.data.train.texts[:4], context.data.train.targets[:4])), setup.fit,
        context, keep)  # fmt: skip
    for before, after, g3 in zip(middle, parameters(model).values(), seen[2], strict=True):
        torch.testing.assert_close(after, before - 0.5 * g3, rtol=1e-4, atol=1e-6)


def test_corrections_come_before_clipping():
    """`correct` sees the raw gradient; what it leaves is clipped to 0.01, and SGD of rate 1 moves by exactly that."""
    setup = tiny.setup(optimizer="sgd", lr=1.0, head_lr=1.0, clip=0.01, batch_size=8)
    norms, paths = [], []

    def correct(trainable, weights):
        norms.append(math.sqrt(sum(float(p.grad.norm()) ** 2 for p in trainable.values() if p.grad is not None)))
        paths.append(set(trainable))
        for p in trainable.values():
            p.grad = torch.ones_like(p)

    model, data, context = started(setup)
    before = {path: p.detach().clone() for path, p in parameters(model).items()}
    fit(model, data, setup.fit, context, correct)
    assert norms[0] > 0.02
    assert paths == [set(parameters(model))]
    moves = {path: before[path] - p.detach() for path, p in parameters(model).items()}
    length = math.sqrt(sum(float(move.norm()) ** 2 for move in moves.values()))
    assert length == pytest.approx(0.01, rel=1e-3)
    each = 0.01 / math.sqrt(sum(p.numel() for p in before.values()))
    assert all(move.mean().item() == pytest.approx(each, rel=0.05) for move in moves.values())


def test_experts_that_no_token_reached_have_no_gradient():
    """A Switch expert is a module of its own: unreached, its `grad` is None and AdamW leaves it alone."""
    setup = tiny.setup(batch_size=1, weight_decay=0.1)
    reached: set[str] = set()

    def correct(trainable, weights):
        reached.update(path for path, p in trainable.items() if p.grad is not None)

    model, data, context = started(setup)
    before = {path: p.detach().clone() for path, p in parameters(model).items()}
    fit(model, data, setup.fit, context, correct, epochs=1)
    unreached = {path for path in before if ".experts." in path} - reached
    assert 0 < len(unreached) < 32
    assert all(torch.equal(before[path], parameters(model)[path]) for path in unreached)


@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe"])
def test_gradient_checkpointing_changes_no_result(model_type):
    """Same dropout masks when recomputed, same balance loss: the same training."""
    plain, saved = (
        trained(tiny.setup(tiny.source(model_type), gradient_checkpointing=on, balance=0.1)) for on in (False, True)
    )
    assert plain[0].loss == pytest.approx(saved[0].loss, rel=1e-5)
    for key, tensor in plain[1].items():
        torch.testing.assert_close(saved[1][key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_a_client_can_learn_its_data_by_heart(model_type, form):
    """Train on four examples until they are answered without a mistake: loss, targets and generation fit together."""
    quiet = {"dropout_rate": 0.0} if model_type == "switch_transformers" else {"attention_dropout": 0.0}
    setup = tiny.setup(
        tiny.source(model_type, form, **quiet), epochs=60, lr=5e-3, label_smoothing=0.0, target_length=12, max_length=24
    )
    model, _, context = started(setup)
    split = Split(context.data.train.texts[:4], context.data.train.targets[:4])
    data = setup.encode(context, split)
    fit(model, data, setup.fit, context)
    assert evaluate(model, data, context, setup) == 1.0


# --- evaluate ---------------------------------------------------------------------------------------------------------


@given(st.permutations(range(8)))
def test_the_order_of_examples_does_not_matter(order):
    setup, model, context = _scored()
    split = context.data.train
    shuffled = Split([split.texts[i] for i in order], [split.targets[i] for i in order])
    assert evaluate(model, setup.encode(context, shuffled), context, setup) == _scored.value


def _scored():
    """A model that is right about some of the training examples and wrong about others; made once."""
    if not hasattr(_scored, "made"):
        setup = tiny.setup()
        params = setup.initial_params() | tiny.heads("animal", tiny.TASKS["animal"])
        context = tiny.context()
        model = setup.build(select(params, "animal"), context)
        _scored.value = evaluate(model, setup.encode(context, context.data.train), context, setup)
        assert 0 < _scored.value < 1
        _scored.made = (setup, model, context)
    return _scored.made


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_the_batch_size_and_the_tap_do_not_change_the_score(model_type, form):
    setup = tiny.setup(tiny.source(model_type, form), batch_size=4)
    one = tiny.setup(setup.model, batch_size=1)
    context = tiny.context("colour-00", form)
    params = setup.initial_params() | (tiny.heads("colour", tiny.TASKS["colour"]) if form == "classification" else {})
    model = setup.build(select(params, "colour"), context)
    model.train()
    data = setup.encode(context, context.data.train)
    with Tap(model) as tap, Tap(model) as tap_one:
        scores = [
            evaluate(model, data, context, setup),
            evaluate(model, data, context, setup, tap),
            evaluate(model, data, context, one, tap_one),
        ]
    assert len(set(scores)) == 1
    assert all(torch.equal(tap.usage.demand[b], n) for b, n in tap_one.usage.demand.items())
    assert tap.usage.slots == tap_one.usage.slots


# --- a round, and a test ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "form"), tiny.CASES)
def test_a_round_in_every_form(model_type, form):
    """Train one epoch, validate with usage, flatten, generate and score: for a sub-MoE with uneven layers."""
    setup = tiny.setup(tiny.source(model_type, form))
    context = tiny.context("number-00", form)
    held = {block: ((0, 5), (2, 3, 7))[i % 2] for i, block in enumerate(setup.model.counts)}
    everything = setup.initial_params()
    sent = Payload(
        {
            "params": select(everything, "number", held),
            "router": {k: t for k, t in everything.items() if ".router." in k},
        },
        experts_to_scalars(held),
    )
    before = {key: t.clone() for key, t in sent.group("params").items()}
    model, reply = local_round(setup, sent, context, usage=True)
    assert tiny.same(sent.group("params"), before), "the payload is the server's own memory"
    assert reply.group("params").keys() == before.keys()
    assert checksum(reply.group("params")) != checksum(before) and tiny.same(
        reply.group("params"), flatten(model, held)
    )
    for which in ("demand", "served"):
        assert {block: (n.shape, n.dtype) for block, n in reply.group(which).items()} == dict.fromkeys(
            held, ((8,), torch.int64)
        )
    for block, ids in held.items():
        outside = [i for i in range(8) if i not in ids]
        assert reply.group("served")[block][outside].sum() == 0
        assert reply.group("demand")[block][outside].sum() > 0
    told = reply.scalars
    assert (told["num_examples"], told["steps"], told["experts"]) == (7, 2, sum(map(len, held.values())))
    assert 0 <= told["validation"] <= 1 and math.isfinite(told["train_loss"])
    told_bytes = {key: n for key, n in told.items() if key == "footprint"}
    assert told_bytes == setup.reported({b: len(ids) for b, ids in held.items()})
    score = local_test(setup, Payload({"params": reply.group("params")}, sent.scalars), context)
    assert 0 <= score.scalars["score"] <= 1 and score.scalars["examples"] == 4 and not score.groups


def test_a_round_without_usage_sends_parameters_alone():
    setup = tiny.setup()
    context = tiny.context("animal-01")
    sent = Payload({"params": select(setup.initial_params(), "animal")})
    _, reply = local_round(setup, sent, context)
    assert set(reply.groups) == {"params"}
    # two labels of three: the head row that this client does not have does not come back
    assert set(sent.group("params")) - set(reply.group("params")) == {
        "head.animal.fish.weight",
        "head.animal.fish.bias",
    }


# --- the experts that learn -------------------------------------------------------------------------------------------


def chosen_by(places):
    """A choice that is the same in every batch."""
    return lambda tap: None if places is None else {block: places for block in tap.held}


@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe"])
def test_choosing_all_is_training_all(model_type):
    """By SGD, which a gradient of zeros does not move; dropout is off, since its masks are drawn elsewhere."""
    off = {"dropout_rate": 0.0} if model_type == "switch_transformers" else {"attention_dropout": 0.0}
    setup = tiny.setup(tiny.source(model_type, **off), optimizer="sgd", lr=0.1)
    plain, choosing = trained(setup), trained(setup, choose=chosen_by(None))
    assert choosing[0].loss == pytest.approx(plain[0].loss, abs=1e-5)
    for key, tensor in plain[1].items():
        torch.testing.assert_close(choosing[1][key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["switch_transformers", "olmoe", "gpt_oss"])
def test_only_the_chosen_experts_move(model_type):
    """Every bit of the others stays, weight decay or not; participation says who was trained."""
    setup = tiny.setup(tiny.source(model_type), epochs=2, weight_decay=0.1)
    before = select(setup.initial_params(), "animal")
    fitted, after = trained(setup, choose=chosen_by((1, 4, 6)))
    for block, batches in fitted.trained.items():
        assert batches.dtype == torch.int64 and batches.shape == (8,)
        assert {i for i in range(8) if batches[i]} <= {1, 4, 6} and batches.max() <= fitted.steps == 4
        for place in range(8):
            keys = [key for key in before if expert_of(key) == (block, place)]
            assert keys and all(torch.equal(before[k], after[k]) == (batches[place] == 0) for k in keys)
    assert any(batches.any() for batches in fitted.trained.values())


def test_an_expert_with_only_padding_is_not_trained():
    """Participation is counted by real tokens: in every batch, exactly of the experts that computed one."""
    setup = tiny.setup(tiny.source("olmoe"), batch_size=8)
    model, data, context = started(setup)
    seen = {}

    def choose(tap):
        for block in tap.held:
            seen[block] = seen.get(block, 0) + (tap.served(block) > 0).long()

    fitted = fit(model, data, setup.fit, context, choose=choose)
    assert all(torch.equal(fitted.trained[block], n) for block, n in seen.items())


def test_moments_are_kept_for_as_many_experts_as_are_chosen(monkeypatch):
    """Two experts a batch, other ones each time: never do more than two per block have moments."""
    setup = tiny.setup(tiny.source("olmoe"), epochs=4, batch_size=4)
    optimizers, kept, calls = [], [], []
    made = Fit.descent
    monkeypatch.setattr(Fit, "descent", lambda *a: optimizers.append(made(*a)) or optimizers[-1])

    def choose(tap):
        calls.append(2 * len(calls) % 8)
        return {block: (calls[-1], calls[-1] + 1) for block in tap.held}

    def count(trainable, weights):
        state = optimizers[0].state
        kept.append({expert_of(name) for name, leaf in trainable.items() if leaf in state and expert_of(name)})
        having = {expert_of(name) for name, leaf in trainable.items() if leaf.grad is not None and expert_of(name)}
        assert {place for _, place in having} <= {calls[-1], calls[-1] + 1}

    trained(setup, correct=count, choose=choose)
    assert len(calls) == 8 and max(len(experts) for experts in kept) <= 2 * 2
    assert any(len(experts) > 0 for experts in kept[1:])


def test_a_choice_of_experts_that_are_not_there_is_refused():
    setup = tiny.setup()
    for choice, what in (({"nowhere": (0,)}, "not a sparse block"), (None, "no expert in place 8")):
        with pytest.raises(ModelError, match=what):
            trained(setup, choose=lambda tap, c=choice: c or {next(iter(tap.held)): (8,)})


def test_a_round_reports_who_was_trained():
    setup = tiny.setup(tiny.source("mixtral"))
    held = {block: (1, 3, 5) for block in setup.model.counts}
    payload = Payload({"params": select(setup.initial_params(), "animal", held)}, experts_to_scalars(held))
    _, reply = local_round(setup, payload, tiny.context(), choose=chosen_by((0, 2)))
    assert all(t.shape == (3,) and t[1] == 0 for t in reply.group("trained").values())
    assert reply.group("trained").keys() == held.keys()


SMOOTHED = ["FedAvg", "FML", "FedKD", "FedAPEN", "FD", "FedProto", "FedTGP", "FedMRL", "pFedMoE"]


@pytest.mark.parametrize("name", SMOOTHED)
def test_labels_are_smoothed_in_every_method(name):
    """Also where a method has a loss of its own."""
    register_all()
    losses, world = [], "cohort" if name == "FedAvg" else "mixed"
    for smoothing in (0.0, 0.5):
        setup, context = tiny.small_setup(world, label_smoothing=smoothing), tiny.small_context(world=world)
        method = Algorithm.registry[name]()
        reply = method.client(setup).train(method.server(setup).deliver(context.info), context)
        losses.append(reply.scalars["train_loss"])
    assert abs(losses[0] - losses[1]) > 1e-3
