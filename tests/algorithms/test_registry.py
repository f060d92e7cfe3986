"""The suite every method must pass; a new file in algorithms/ is in it at once, with its default settings.

A method runs in every world it is for: on a mixture of experts under its own name, as "FedAvg:cohort" with one small
model for all, as "FedProto:mixed" with small models that differ.

The server and the client half are always built from separate Setup objects, and the client's does not say who else is
in the federation: all that a client half may use is its payload and its context.
"""

import dataclasses
import itertools
import math
from contextlib import nullcontext
from functools import cache

import pytest
import tiny
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.hfedmoe import HFedMoE
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.core import Algorithm, Client, Server, Work
from consilium.engine.codec import decode, encode
from consilium.engine.workers import forked
from consilium.errors import BudgetError
from consilium.params import checksum

DEFAULTS = {name: cls for name, cls in Algorithm.registry.items() if cls.__module__.startswith("consilium.")}
VARIANTS = {
    "FedAvg-fit": lambda: FedAvg("fit"),
    "FedMoE-restless": lambda: FedMoE(stage1="none", patience=1, K=2, freeze=False, floor=0.0),
    "FedMoE-tokens": lambda: FedMoE(stage1="forward", patience=1, usage="served", rank="layer", weight="tokens"),
    "HFedMoE-random": lambda: HFedMoE(select="random", experts="plain", router="row", weight="batches", per_layer=True),
    "pFedMoE-local": lambda: pFedMoE(mixing="local"),
}
"""Settings besides the defaults that are worth the whole suite."""
METHODS = {
    name if world == "moe" else f"{name}:{world}": make
    for name, make in {**DEFAULTS, **VARIANTS}.items()
    for world in make().worlds
}
MOE = [name for name in METHODS if ":" not in name]
SMALL = [name for name in METHODS if ":" in name]
every_method = pytest.mark.parametrize("name", METHODS)

ROUNDS = 3
_number = itertools.count()


def setup(name, model_type="olmoe", backwards=False, dtype="float32"):
    """The world that a method's name says. Two clients are short of memory: not all can hold all experts."""
    if name in SMALL:
        made = tiny.small_setup(name.partition(":")[2], clients_per_round=4)
        return dataclasses.replace(made, clients=made.clients[::-1]) if backwards else made
    source = tiny.source(model_type, dtype=dtype)
    memory = {"animal-00": tiny.bytes_for(3, source), "colour-01": tiny.bytes_for(5, source)}
    made = tiny.setup(source, memory=memory, clients_per_round=4)
    return dataclasses.replace(made, clients=made.clients[::-1]) if backwards else made


def halves(name, made):
    """(server, client half), each from its own Setup, the client's without the list of clients."""
    algorithm = METHODS[name]()
    alone = dataclasses.replace(made, model=dataclasses.replace(made.model), clients=())
    return algorithm.server(made), algorithm.client(alone)


def context(name, client):
    return tiny.small_context(client, name.partition(":")[2]) if name in SMALL else tiny.context(client)


def outcome(server, records, events):
    """Everything about a run that must not depend on the engine, without the seconds."""
    told = [
        {
            "selected": record["selected"],
            "unable": dict(sorted(record["unable"].items())),
            "test": dict(sorted((record["test"] or {}).items())),
            "clients": {c: {k: v for k, v in told.items() if k != "seconds"} for c, told in record["clients"].items()},
        }
        for record in records
    ]
    events = sorted(events, key=lambda event: (event["round"], event["client"]))
    return checksum(server.params), told, server.structure(), server.usage(), events


def run(name, model_type="olmoe", strict=False, backwards=False, resume_after=None, workers=1, dtype="float32"):
    """The outcome of a short run, and the states it leaves on the clients."""
    made = setup(name, model_type, backwards, dtype)
    server, client = halves(name, made)
    engine = tiny.engine(server, client, made, tiny.root / f"run-{next(_number)}", strict)
    with forked(workers, engine.work) if workers > 1 else nullcontext() as engine.workers:
        return _rounds(name, engine, lambda: setup(name, model_type, backwards, dtype), strict, resume_after)


def _rounds(name, engine, make, strict, resume_after):
    server, records, events = engine.server, [], []
    for number in range(1, ROUNDS + 1):
        records.append(engine.round(number, test=number == ROUNDS))
        events += [{"round": number, **event} for event in server.events()]
        if number == resume_after:
            state, store = decode(encode(server.state())), engine.store
            made = make()
            server, client = halves(name, made)
            server.restore(state)
            engine = tiny.engine(server, client, made, store.folder, strict)
            engine.store.versions = dict(store.versions)
    states = {c: (checksum(engine.store.load(c).params), engine.store.load(c).scalars) for c in tiny.IDS}
    return outcome(server, records, events), states


def plain(name, model_type="olmoe", dtype="float32"):
    return _plain(name, model_type, dtype)


@cache
def _plain(name, model_type, dtype):
    return run(name, model_type, dtype=dtype)


# --- how it is declared -----------------------------------------------------------------------------------------------


def test_the_suite_knows_the_methods():
    known = {"FedAvg", "FedProx", "SCAFFOLD", "Standalone", "RandomMoE", "FedMoE", "HFedMoE", "pFedMoE"}
    assert known <= DEFAULTS.keys()


@pytest.mark.parametrize("name", DEFAULTS)
def test_it_is_a_frozen_dataclass_with_defaults_and_words_for_every_field(name):
    cls = DEFAULTS[name]
    assert cls.__name__ == name and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert cls() == cls() and hash(cls()) == hash(cls())
    documented = cls.__doc__.partition("Args:")[2]
    for field in dataclasses.fields(cls):
        assert f" {field.name}:" in documented, f"{name}.{field.name} is not documented"
    assert cls.__module__.startswith("consilium.algorithms.")


@every_method
def test_it_builds_two_halves(name):
    server, client = halves(name, setup(name))
    assert isinstance(server, Server) and isinstance(client, Client)
    assert not hasattr(client, "server") and not hasattr(server, "client")


# --- other families, without a limit on memory ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_type"),
    [*((name, "deepseek_v3") for name in MOE), ("SCAFFOLD", "ernie4_5_moe"), ("FedMoE", "phimoe")],
)
def test_other_families_run(name, model_type, tmp_path):
    """Correction biases, kept in a buffer or a frozen parameter, go out and come home as they were."""
    made = tiny.setup(tiny.source(model_type), clients_per_round=3)
    server, client = halves(name, made)
    engine = tiny.engine(server, client, made, tmp_path, strict=True)
    before = {key: t.clone() for key, t in server.params.items()}
    records = [engine.round(number, test=number == 2) for number in (1, 2, 3)]
    for record in records:
        assert record["selected"] and not record["unable"]
        assert all(told["peak_bytes_model"] > 0 for told in record["clients"].values() if told["train_loss"])
        assert all(math.isfinite(told["train_loss"] or 0) for told in record["clients"].values())
    assert checksum(server.params) != checksum(before) or name == "Standalone"
    for key, tensor in before.items():
        if key.endswith("e_score_correction_bias"):
            assert torch.equal(server.params[key], tensor)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_type", "dtype"),
    [(name, "olmoe", "float32") for name in METHODS]
    + [(name, *(("olmoe", "bfloat16") if i % 2 else ("switch_transformers", "float32"))) for i, name in enumerate(MOE)],
)
def test_bytes_on_the_way_change_no_bit(name, model_type, dtype):
    """Every payload through the codec: the same parameters, scores, structures, events and client states. Nothing but
    the run's seed decides them."""
    torch.manual_seed(123456)
    assert plain(name, model_type, dtype) == run(name, model_type, strict=True, dtype=dtype)


@every_method
def test_worker_processes_change_no_bit(name):
    """Clients side by side, each in a process of its own: the same everything."""
    assert plain(name) == run(name, workers=2)


@pytest.mark.parametrize("name", SMALL)
def test_small_models_in_bfloat16(name, tmp_path):
    """Weights and what travels stay float32 and near those of float32 training; they are not the same."""
    made = setup(name)
    low = dataclasses.replace(made, fit=dataclasses.replace(made.fit, precision="bfloat16"))
    sides = []
    for which, one in (("float32", made), ("bfloat16", low)):
        server, client = halves(name, one)
        engine = tiny.engine(server, client, one, tmp_path / which)
        engine.round(1, test=True)
        states = {f"{c}/{k}": t for c in tiny.IDS for k, t in engine.store.load(c).params.items()}
        sides.append({**server.params, **states})
    full, half = sides
    assert full.keys() == half.keys() and all(full[key].dtype == half[key].dtype for key in full)
    assert any(not torch.equal(full[key], half[key]) for key in full)
    for key in full:
        torch.testing.assert_close(half[key], full[key], rtol=0.05, atol=0.02)


@every_method
def test_the_order_in_which_clients_are_listed_does_not_matter(name):
    assert plain(name) == run(name, backwards=True)


@every_method
def test_a_restored_server_goes_on_to_the_same_bits(name):
    assert plain(name) == run(name, resume_after=2)


@every_method
def test_it_trains_somebody_and_scores_whoever_is_able(name):
    (_, records, structure, _, _), _ = plain(name)
    made = setup(name)
    for record in records:
        assert record["selected"] and set(record["clients"]) == set(record["selected"])
        assert not set(record["selected"]) & set(record["unable"])
    assert all(0 <= score <= 1 for score in records[-1]["test"].values())
    assert set(records[-1]["test"]) == set(tiny.IDS) - set(records[-1]["unable"])
    for client, held in (structure or {}).items():
        assert client in tiny.IDS and list(held) == list(made.model.counts)
        assert all(ids and list(ids) == sorted(set(ids)) and ids[-1] < 8 for ids in held.values())


@pytest.mark.parametrize("name", MOE)
def test_nobody_trains_more_than_its_memory_holds(name):
    """By the memory model's own figure in every record."""
    limits = {c.id: c.memory_bytes for c in setup(name).clients if c.memory_bytes}
    for record in plain(name)[0][1]:
        for client, told in record["clients"].items():
            assert told["peak_bytes_model"] <= limits.get(client, float("inf"))


@every_method
def test_dropouts(name):
    """A round from which some or all replies are missing ends well; without any reply no parameter changes."""
    made = setup(name)
    server, client = halves(name, made)
    before = checksum(server.params)
    server.configure(1, made.clients)
    server.aggregate(1, iter(()))
    assert checksum(server.params) == before
    for number, keep in ((2, 1), (3, 0), (4, 2)):
        sent = server.configure(number, made.clients)
        keys = {key: t.shape for key, t in server.params.items()}
        before = checksum(server.params)
        replies = [(c, client.train(sent[c], context(name, c))) for c in sorted(sent)[:keep]]
        server.aggregate(number, iter(replies))
        assert {key: t.shape for key, t in server.params.items()} == keys
        assert keep or checksum(server.params) == before
        assert all(t.isfinite().all() for t in server.params.values())
    for info in made.clients:
        if server.unable(info) is None:
            server.deliver(info)


@every_method
def test_what_was_sent_is_not_changed_afterwards(name):
    """Neither training nor merging writes into a payload: a client may be slow, and a server's model is its own."""
    made = setup(name)
    server, client = halves(name, made)
    sent = server.configure(1, made.clients)
    before = {c: decode(encode(payload)) for c, payload in sent.items()}
    replies = [(c, client.train(sent[c], context(name, c))) for c in sorted(sent)]
    replied = [decode(encode(reply)) for _, reply in replies]
    server.aggregate(1, iter(replies))
    assert all(tiny.payloads_equal(before[c], payload) for c, payload in sent.items())
    assert all(tiny.payloads_equal(copy, reply) for copy, (_, reply) in zip(replied, replies, strict=True))


@every_method
def test_evaluating_changes_nothing(name):
    made = setup(name)
    server, client = halves(name, made)
    info = next(c for c in made.clients if server.unable(c) is None)
    before = checksum(server.params)
    owned = context(name, info.id)
    first, second = (client.evaluate(server.deliver(info), owned) for _ in range(2))
    assert tiny.payloads_equal(first, second) and not first.groups
    assert first.scalars["examples"] == 4 and 0 <= first.scalars["score"] <= 1
    assert not owned.state.params and not owned.state.scalars and checksum(server.params) == before


@every_method
@pytest.mark.parametrize(
    "budget", [{"steps": 0}, {"tokens": 1}, {"memory": 1}, {"seconds": 0}, {"deadline": 0}], ids=str
)
def test_a_budget_ends_the_work_of_a_client(name, budget):
    """Whatever the method: before a step of an optimiser, and before a model is built that memory does not allow."""
    made, steps, built = setup(name), [], []
    server, half = halves(name, made)
    client, sent = next(iter(server.configure(1, made.clients).items()))
    info = next(info for info in made.clients if info.id == client)
    handles = [
        register_optimizer_step_post_hook(lambda *_: steps.append(1)),
        register_module_forward_pre_hook(lambda *_: built.append(1)),
    ]
    try:
        own = dataclasses.replace(context(name, client), work=Work(**budget))
        trains = "steps" not in budget or not name.startswith(("FedMoE-tokens", "AffinityMoE"))  # which look at first
        with pytest.raises(BudgetError) if trains else nullcontext():
            half.train(sent, own)
        if "steps" not in budget:
            own = dataclasses.replace(context(name, client), work=Work(**budget))
            with pytest.raises(BudgetError):
                half.evaluate(server.deliver(info), own)
    finally:
        for handle in handles:
            handle.remove()
    assert not steps and ("memory" not in budget or not built)
