"""Every method for mixtures of experts with adapters on the experts, under every rule: what travels, key by key."""

import itertools
import math
from typing import get_args

import pytest
import tiny
import torch
from test_registry import METHODS, MOE, halves, setup

from consilium.core import ClientState
from consilium.errors import ConfigError
from consilium.moe.addressing import is_adapter, travels
from consilium.moe.lora import Lora, is_folded
from consilium.moe.rules import ANY_RANK, FOLDS, PAIRWISE, Rule

RULES = get_args(Rule)
ALONE = {rule: {"lora_B"} if rule == "ffa" else {"lora_A"} for rule in ("ffa", "share_a")}
"""Rules of which one half alone leaves a client."""


OWN_ADAPTERS = {"FedAMoLE", "CoMiGS", "FedLEASE", "pFedMoAP", "FLEx", "Flux"}
"""Methods that train adapters or experts of their own."""


def refused(name, rule):
    """Whether a method says that it cannot go by a rule."""
    method = METHODS[name]()
    if name in OWN_ADAPTERS:
        return True
    return rule in PAIRWISE and (name in ("FedAvgM", "FedAdam", "FedYogi") or (method.exchanges and not method.merges))


CASES = [("FedAvg", rule) for rule in RULES] + [
    (name, rule)
    for i, name in enumerate(MOE)
    for rule in ("mean", ("alternate", "share_a", "residual")[i % 3])
    if name != "FedAvg"
]
"""FedAvg under all rules, the others under the mean and one of the other kinds in turn."""


@pytest.mark.parametrize(("name", "rule"), [case for case in CASES if not refused(*case)])
def test_two_rounds_in_which_only_what_the_rule_merges_travels(name, rule, tmp_path):
    made = setup(name)
    made = tiny.setup(made.model, clients_per_round=4, clients=tiny.infos(), lora=Lora(rank=2, rule=rule))
    server, client = halves(name, made)
    engine, replies, train = tiny.engine(server, client, made, tmp_path), [], client.train
    client.train = lambda payload, context: replies.append((context.round, train(payload, context))) or replies[-1][1]
    carried, carry = [], engine._carry
    engine._carry = lambda payload: carried.append(payload) or carry(payload)
    before = {key: tensor.clone() for key, tensor in server.params.items()}
    records = [engine.round(number, test=number == 2) for number in (1, 2)]
    odd = {key for p in carried for group in p.groups.values() for key in group if "." in key and "lora" not in key}
    assert not [key for key in odd if ".experts." in key]  # no expert's own weights, in whatever group
    assert all(travels(key) for payload in carried for key in payload.groups.get("params", {}))
    folds = {key for payload in carried for key in payload.groups.get("base", {})}
    assert all(is_folded(key) for key in folds) and bool(folds) == (rule in FOLDS and METHODS[name]().exchanges)
    for number, reply in replies:
        halves_sent = {key.rsplit(".", 1)[1] for key in reply.group("params") if is_adapter(key)}
        assert halves_sent <= ALONE.get(rule, {"lora_A", "lora_B"})
        if rule == "alternate":  # A in even rounds, but B as long as all B that a client holds are zero
            assert len(halves_sent) < 2 and (name != "FedAvg" or halves_sent == {"lora_B" if number == 1 else "lora_A"})
        assert not [key for group in reply.groups.values() for key in group if is_folded(key)]
    for told in records[1]["clients"].values():
        assert told["rejected"] is None and math.isfinite(told["train_loss"])
    assert all(0 <= score <= 1 for score in records[1]["test"].values()) and records[1]["test"]
    if METHODS[name]().exchanges:
        assert any(is_adapter(key) and not torch.equal(server.params[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("FedAvg", rule) for rule in sorted(ANY_RANK)]
    + list(zip(["FedMoE", "HFedMoE", "FedRep", "Standalone"], itertools.cycle(sorted(ANY_RANK)))),
)
def test_ranks_follow_the_memory_of_the_devices(name, rule, tmp_path):
    """Two devices have room for rank 1 and rank 3 of 4 with all experts; their pairs have these shapes both ways."""
    lora = Lora(rank=4, rule=rule, ranks="memory")
    small = dict(batch_size=1, max_length=4, lora=lora)  # where rows are short, adapters are what counts
    made = tiny.setup(tiny.source("olmoe"), **small)
    memory = {c: made.with_rank(r).footprint(made.model.counts).total for c, r in (("animal-00", 1), ("colour-01", 3))}
    made = tiny.setup(tiny.source("olmoe"), memory=memory, clients_per_round=6, **small)
    ranks = {info.id: made.rank_of(info) for info in made.clients}
    assert ranks == {c: {"animal-00": 1, "colour-01": 3}.get(c, 4) for c in tiny.IDS}
    server, client = halves(name, made)
    seen, train = {}, client.train

    def spy(payload, context):
        reply = train(payload, context)
        for sent in (payload, reply):
            pairs = {key: t for key, t in sent.group("params").items() if is_adapter(key)}
            shapes = {t.shape[0] if key.endswith("_A") else t.shape[1] for key, t in pairs.items()}
            seen.setdefault(context.info.id, set()).update(shapes)
        return reply

    client.train = spy
    engine = tiny.engine(server, client, made, tmp_path, strict=True)
    records = [engine.round(number, test=number == 2) for number in (1, 2)]
    assert all(told["rejected"] is None for record in records for told in record["clients"].values())
    if name == "Standalone":
        assert not seen.get("animal-00")
        kept = engine.store.load("animal-00").params
        assert {t.shape[0] for key, t in kept.items() if is_adapter(key) and key.endswith("_A")} == {1}
    elif name != "HFedMoE":  # whose devices hold fewer experts first
        assert all(shapes == {ranks[c]} for c, shapes in seen.items()) and "animal-00" in seen
    assert len(records[1]["test"]) == 6


def test_share_a_keeps_b_in_the_clients_state_and_scores_with_it(tmp_path):
    """B is under "engine/private/", which no method sees; without it the delivered model is another one."""
    made = tiny.setup(tiny.source("olmoe"), clients_per_round=6, lora=Lora(rank=2, rule="share_a"), lr=0.05)
    server, client = halves("FedAvg", made)
    engine = tiny.engine(server, client, made, tmp_path)
    engine.round(1, test=False)
    state = engine.store.load("animal-00").params
    assert state and all(key.startswith("engine/private/") and key.endswith("lora_B") for key in state)
    assert any(tensor.any() for tensor in state.values())
    sent = server.deliver(made.clients[0])
    own = {key.removeprefix("engine/private/"): t for key, t in state.items()}
    params = made.both_halves(sent.group("params"), own)
    built = made.build(params, tiny.context())
    assert all(torch.equal(t, own[key]) for key, t in built.adapters.named().items() if key.endswith("lora_B"))
    context = tiny.context()
    context.private = ClientState(dict(own))
    again = made.build_sent(sent, context)
    assert all(torch.equal(a, b) for a, b in zip(built.adapters.parameters(), again.adapters.parameters(), strict=True))


def test_what_a_rule_adds_to_the_base_is_in_the_model_that_is_built():
    """lora_W of ones moves every adapted weight by one, and nothing else."""
    made = tiny.setup(tiny.source("mixtral"), lora=Lora(rank=2, rule="stack"))
    params = made.initial_params()
    moved = {key: torch.ones_like(t) if is_folded(key) else t for key, t in params.items()}
    plain = made.build_sent(made.sub_moe(params, "animal", None), tiny.context())
    model = made.build_sent(made.sub_moe(moved, "animal", None), tiny.context())
    for (path, old), new in zip(plain.backbone.named_parameters(), model.backbone.parameters(), strict=True):
        expert = path.endswith(("gate_up_proj", "down_proj"))
        torch.testing.assert_close(new, old + 1 if expert else old)


@pytest.mark.parametrize("name", ["SCAFFOLD", "AffinityMoE"])
def test_methods_that_merge_by_themselves_refuse_rules_for_pairs(name, tmp_path):
    import runs

    from consilium.core import Algorithm
    from consilium.fit import Fit

    base = runs.experiment(runs.table(tmp_path), "FedAvg", fit=Fit(lora=Lora(rank=2, rule="svd")))
    import dataclasses

    with pytest.raises(ConfigError, match="merges by itself"):
        dataclasses.replace(base, algorithm=Algorithm.registry[name]())


@pytest.mark.parametrize("rule", sorted(PAIRWISE))
def test_an_optimiser_at_the_server_refuses_rules_for_pairs(rule):
    made = tiny.setup(tiny.source("olmoe"), lora=Lora(rank=2, rule=rule))
    with pytest.raises(ConfigError, match="number by number"):
        METHODS["FedAdam"]().server(made)
