"""The judge, check by check: a good reply, one bad one for each check, and no check that could be left out."""

import ast
import dataclasses
import inspect
import math
import textwrap
from pathlib import Path

import pytest
import runs
import torch

from consilium import params
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.fedtgp import FedTGP
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.core import ClientInfo, Payload, Server
from consilium.engine import judge
from consilium.engine.flower import Limits, records
from consilium.fit import Fit
from consilium.params import Like

INFO = ClientInfo("a", 12, "t")
SENT = Payload({"params": {"w": torch.ones(2, 3), "head.t.x.bias": torch.ones(())}})
GOOD = Payload(
    {
        "params": {"w": torch.zeros(2, 3), "head.t.x.bias": torch.ones(())},
        "usage": {
            "b": torch.tensor([0.0, 1.0]),
            "none": torch.ones(0),
            "counts": torch.tensor([2**40]),
            "low": -torch.ones(1),
        },
        "u": {"f": torch.ones(3, 1)},
    },
    {
        "num_examples": 12, "validation": 1, "train_loss": -0.5, "steps": 0, "perplexity": 1.5, "experts": 4, "cut": 0,
        "footprint": 2**40, "seconds_evaluate": 0.1, "anything": [1], "report/x": "y",
    },
)  # fmt: skip


class Asking(Server):
    """Expects the params back, usage in [0, 1], a factor of any rank, and no text "lie"."""

    configure = aggregate = deliver = None

    def expects(self, client, sent):
        like = {"b": Like((2,), torch.float32, 0, 1), "none": Like((0,), torch.float32, 0, 1)}
        like |= {"counts": Like((1,), torch.int64, least=0), "low": Like((1,), torch.float32, most=0)}
        factors = {"f": Like((3, None), torch.float32, needed=False)}
        return {**super().expects(client, sent), "usage": like, "u": factors}

    def objection(self, client, sent, reply):
        return "it lies\nbadly" if reply.scalars.get("lie") else None


def tensor(group, key, value):
    held = {**GOOD.groups.get(group, {}), key: value}
    return Payload({**GOOD.groups, group: {k: t for k, t in held.items() if t is not None}}, GOOD.scalars)


def scalar(name, value):
    return Payload(GOOD.groups, {k: v for k, v in {**GOOD.scalars, name: value}.items() if v is not None})


BAD = [
    (tensor("params", "w", None), "params w is missing"),
    (tensor("params", "v", torch.ones(2)), "params v was not asked of this client"),
    (tensor("control", "w", torch.ones(2)), "control w was not asked of this client"),
    (Payload({**GOOD.groups, "control": {}}, GOOD.scalars), "group 'control' was not asked of this client"),
    (Payload({"params": GOOD.groups["params"]}, GOOD.scalars), "usage b is missing"),
    (tensor("params", "w", torch.ones(2, 3, 1)), "has shape (2, 3, 1), it must be (2, 3)"),
    (tensor("params", "w", torch.ones(3)), "has shape (3,), it must be (2, 3)"),
    (tensor("params", "w", torch.ones(3, 2)), "has shape (3, 2), it must be (2, 3)"),
    (tensor("params", "w", torch.ones(1, 3)), "has shape (1, 3), it must be (2, 3)"),
    (tensor("params", "w", torch.ones(())), "has shape (), it must be (2, 3)"),
    (tensor("params", "head.t.x.bias", torch.ones(1)), "has shape (1,), it must be ()"),
    (tensor("u", "f", torch.ones(2, 1)), "has shape (2, 1), it must be (3, None)"),
    (tensor("params", "w", torch.ones(2, 3).double()), "is torch.float64, it must be torch.float32"),
    (tensor("params", "w", torch.ones(2, 3).bfloat16()), "is torch.bfloat16, it must be torch.float32"),
    (tensor("params", "w", torch.tensor([[0, 1, math.nan], [0, 0, 0]])), "params w is not finite"),
    (tensor("params", "w", torch.tensor([[0, 1, 0], [0, 0, -math.inf]])), "params w is not finite"),
    (tensor("usage", "b", torch.tensor([-0.1, 1.0])), "usage b has numbers outside 0..1"),
    (tensor("usage", "b", torch.tensor([0.0, 1.1])), "usage b has numbers outside 0..1"),
    (tensor("usage", "counts", torch.tensor([-1])), "usage counts has numbers outside 0..inf"),
    (tensor("usage", "low", torch.ones(1)), "usage low has numbers outside -inf..0"),
    (scalar("num_examples", None), "num_examples is missing"),
    (scalar("num_examples", 0), "num_examples is 0; it must be a whole number within 1..12"),
    (scalar("num_examples", -9), "num_examples is -9"),
    (scalar("num_examples", 13), "num_examples is 13"),
    (scalar("num_examples", 2**62), "num_examples is 4611686018427387904"),
    (scalar("num_examples", True), "num_examples is True"),
    (scalar("num_examples", 3.0), "num_examples is 3.0"),
    (scalar("num_examples", "7"), "num_examples is '7'"),
    (scalar("num_examples", [7]), "num_examples is [7]"),
    (scalar("validation", 1.01), "validation is 1.01; it must be a finite number within 0..1"),
    (scalar("validation", math.nan), "validation is nan"),
    (scalar("train_loss", math.inf), "train_loss is inf; it must be a finite number"),
    (scalar("train_loss", -math.inf), "train_loss is -inf"),
    (scalar("steps", -1), "steps is -1"),
    (scalar("steps", "x" * 10**6), "steps is 'xxx"),
    (scalar("lie", True), "it lies badly"),
]
FINE = [
    GOOD,
    tensor("params", "head.t.x.bias", None),
    tensor("u", "f", torch.ones(3, 7)),
    tensor("u", "f", None),
    scalar("train_loss", None),
    scalar("num_examples", 1),
    tensor("params", "w", torch.full((2, 3), 3e38)),  # finite, though its sum is not
    scalar("footprint", "x" * 10**6),  # what is only recorded is no reason
    scalar("seconds_evaluate", -0.1),
    scalar("perplexity", math.nan),
    scalar("foreign", "x" * 10**6),
]


@pytest.mark.parametrize(("reply", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_one_bad_reply_for_each_check(reply, reason):
    said = judge.objection(Asking(), INFO, SENT, reply)
    assert reason in said and len(said) <= 1000 and said.isprintable()


def test_good_replies_are_accepted():
    assert [judge.objection(Asking(), INFO, SENT, reply) for reply in FINE] == [None] * len(FINE)


def test_numbers_of_a_reply_that_may_be_recorded():
    told = judge.numbers({"steps": 3, "cut": -1, "train_loss": math.nan, "validation": True, "experts": "x", "y": 1})
    assert told == {"steps": 3}


# --- property 22: without any one of the checks, another verdict ------------------------------------------------------

CHECKS = [
    params.Like.objection, params.finite, judge._tensors, judge._scalars, judge.number, judge.objection, judge.numbers,
    judge.diverged, judge.check_sent, judge.tally, judge.one_line,
]  # fmt: skip
EQUIVALENT = {
    "is_bounded",  # spares looking for the extremes of numbers that have no bounds
    "not tensor.is_floating_point()",  # whole numbers are finite: spares looking
    "bool(tensor.sum().isfinite())",  # a finite sum: spares looking at each
    "'a whole number' if kind is int else 'a finite number'",  # words
    "f' within {least:.16g}..{most:.16g}' if least > -math.inf else ''",
}


class Without(ast.NodeTransformer):
    """Leaves out the n-th check: a condition that no longer holds, or one part of an `and` or `or`."""

    def __init__(self, n):
        self.left, self.what = n, None

    def _here(self, node):
        self.left -= 1
        if self.left == -1:
            self.what = ast.unparse(node)
        return self.left == -1

    def visit_If(self, node):
        if ast.unparse(node.test) not in EQUIVALENT and self._here(node.test):
            node.test = ast.Constant(False)
        return self.generic_visit(node)

    def visit_IfExp(self, node):
        if ast.unparse(node) not in EQUIVALENT and self._here(node):
            node.test = ast.Constant(False)
        return self.generic_visit(node)

    def visit_BoolOp(self, node):
        self.generic_visit(node)
        for value in list(node.values):
            if ast.unparse(value) not in EQUIVALENT and self._here(value):
                node.values = [other for other in node.values if other is not value]
        return node.values[0] if len(node.values) == 1 else node

    def visit_Compare(self, node):
        """a <= x <= b: one side of it."""
        if len(node.ops) == 2 and self._here(node):
            return ast.Compare(node.left, node.ops[:1], node.comparators[:1])
        if len(node.ops) == 2 and self._here(node):
            return ast.Compare(node.comparators[0], node.ops[1:], node.comparators[1:])
        return self.generic_visit(node)


SPOILT = [torch.ones(2), torch.tensor([1.0, math.inf]), torch.tensor([math.nan]), torch.tensor([2**40])]
LOSSES = [{}, {"train_loss": math.nan}, {"train_loss": "x"}, {"train_loss": 0.5}]
ENDS = [Payload({"g": {"x": tensor}}, loss) for tensor in SPOILT for loss in LOSSES]
"""What a client may have been sent, or be about to send."""


def struck():
    """Two rejections, one good reply, three rejections and a fourth."""
    strikes = {}
    told = [judge.tally(strikes, {"clients": {"a": {"rejected": r}}}) for r in ("x", "y", None, "x", "y", "z", "w")]
    return told, strikes


def verdicts():
    calls = [lambda reply=reply: judge.objection(Asking(), INFO, SENT, reply) is None for reply in FINE]
    calls += [lambda reply=reply: judge.objection(Asking(), INFO, SENT, reply) is None for reply, _ in BAD]
    calls += [lambda check=check, end=end: check(end) for check in (judge.diverged, judge.check_sent) for end in ENDS]
    calls += [struck, lambda: judge.one_line("a\nb\x1b"), lambda: judge.numbers({"steps": 3, "cut": -1, "y": 1})]
    return outcomes(calls)


def outcomes(calls):
    found = []
    for call in calls:
        try:
            found.append(call())
        except Exception as error:
            found.append(type(error))
    return found


def survivors(checks, verdicts, monkeypatch):
    """What could be left out of the checks without another verdict; how many were tried."""
    whole, tried, found = verdicts(), 0, []
    for check in checks:
        module = inspect.getmodule(check)
        *owner, name = check.__qualname__.split(".")
        home = getattr(module, owner[0]) if owner else module
        for n in range(99):
            tree, without = ast.parse(textwrap.dedent(inspect.getsource(check))), Without(n)
            tree = ast.fix_missing_locations(without.visit(tree))
            if without.what is None:
                break
            names = dict(vars(module))
            exec(compile(tree, "<mutant>", "exec"), names)
            with monkeypatch.context() as patch:
                patch.setattr(home, name, names[name])
                if verdicts() == whole:
                    found.append(f"{check.__qualname__} without {without.what}")
            tried += 1
    return found, tried


def test_no_check_can_be_left_out(monkeypatch):
    found, tried = survivors(CHECKS, verdicts, monkeypatch)
    assert tried > 25 and not found


# --- the same at a site: what a server says of itself, and what it may ask --------------------------------------------

TOLD = {
    "protocol": records.PROTOCOL, "experiment": "{}", "heads": "{}", "run": "", "model": "", "client": "a", "round": 2,
    "version": 1, "seed": 0, "cap": "1GB", "reply": "exact", "zstd": False, "deadline": 9.0, "base": "", "hold": False,
}  # fmt: skip
SAYS = [
    TOLD, *({**TOLD, name: other} for name in TOLD for other in (None, 1, "x", True)),
    TOLD | {"protocol": 7}, TOLD | {"version": 2},
    TOLD | {"version": 3}, TOLD | {"version": -1}, TOLD | {"round": 0, "version": 0}, {**TOLD, "more": 1},
]  # fmt: skip
WORDS = ["{", "[]", "1", "{}", '{"a": 1}', '{"a": []}', "[" * 100_000]
MOST = Limits(lr=1, epochs=3, steps=20, batch_size=8, rounds=5, bytes="1KB")
ASKS = [
    {}, {"rounds": 6}, {"algorithm": FedMoE(stage1_epochs=4)}, {"algorithm": SCAFFOLD(eta_l=2)},
    {"algorithm": pFedMoE()}, {"algorithm": SCAFFOLD(eta_g=2)}, {"algorithm": FedTGP(server_epochs=9, eta_s=2)},
    *({"fit": Fit(**{"batch_size": 4, **fit})} for fit in (
        {"lr": 2}, {"head_lr": 2}, {"epochs": 3}, {"epochs": 4}, {"batch_size": 9}, {"epochs": 3, "batch_size": 1},
        {"epochs": 3, "batch_size": 1, "rows": "documents"}, {"epochs": 3, "batch_size": 1, "rows": "blocks"})),
]  # fmt: skip
NO_LIMITS = [
    {"lr": 0}, {"lr": -1}, {"lr": math.nan}, {"lr": math.inf}, {"lr": "1"}, {"lr": True}, {"lr": 1}, {"epochs": 0},
    {"epochs": 1.5}, {"epochs": 2}, {"steps": True}, {"bytes": "much"}, {"bytes": 5}, {"bytes": "0KB"}, {"bytes": "1B"},
    {"bytes": ""}, {"memory": ""}, {"memory": "x"}, {"memory": "1GB"}, {"tokens": 0}, {"seconds": 0}, {"days": 0.5},
]  # fmt: skip


def verdicts_of_a_site():
    base = runs.of_world("moe", Path("no-file.jsonl"), FedMoE(stage1_epochs=1), rounds=5)
    small = runs.of_world("cohort", Path("no-file"), FedTGP(), rounds=5)
    worlds = {"FedTGP": small, "pFedMoE": small}

    def asks(change):
        made = worlds.get(type(change.get("algorithm")).__name__, base)
        return dataclasses.replace(made, **{"fit": Fit(batch_size=4, lr=0.1), **change})

    calls = [lambda told=told: records.checked(told, records.TOLD) is told for told in SAYS]
    calls += [lambda told=told: records.checked(told, records.SAID) is told for told in SAYS]
    calls += [lambda w=w, what=what: records.parsed(what, w) for w in WORDS for what in ("experiment", "heads")]
    calls += [lambda change=change: MOST.check(asks(change), 10) for change in ASKS]
    calls += [lambda n=n: MOST.check_round(n) for n in (5, 6)] + [lambda n=n: MOST.check_bytes(n) for n in (1000, 1001)]
    calls += [lambda cap=cap: MOST.cap(cap) for cap in ("1GB", "1B")] + [
        lambda bad=bad: Limits(**bad) for bad in NO_LIMITS
    ]
    return outcomes(calls)


def test_no_check_of_a_site_can_be_left_out(monkeypatch):
    checks = [
        records.checked, records.parsed, Limits.__post_init__, Limits.check, Limits.check_round, Limits.check_bytes,
    ]  # fmt: skip
    found, tried = survivors(checks, verdicts_of_a_site, monkeypatch)
    assert tried > 15 and not found
