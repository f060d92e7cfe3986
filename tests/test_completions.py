"""How models go on with the clients' test texts: which clients, which prompts, and what a run and its report keep."""

import json
from dataclasses import replace

import tiny

from consilium.algorithms.fedamole import FedAMoLE
from consilium.algorithms.fedavg import FedAvg
from consilium.completions import PROMPT, _cut, completions, spaced
from consilium.core import ClientInfo
from consilium.data.code import CodeData
from consilium.data.task import Federation, Split
from consilium.loop import run
from consilium.recipes.code import affinitymoe_code
from consilium.report import read_runs, render


def test_clients_are_evenly_spaced():
    """Of ten clients three: 0, 10 / 3 and 20 / 3, rounded down."""
    clients = [ClientInfo(f"c{place}", 1, "next") for place in range(10)]
    assert [client.id for client in spaced(clients, 3)] == ["c0", "c3", "c6"]
    assert spaced(clients, 99) == clients and spaced([], 3) == []


def test_a_prompt_ends_behind_a_line():
    lines = "x" * 149 + "\n" + "y" * 49 + "\n" + "z" * 500
    prompt, rest = _cut(lines)
    assert len(prompt) == 200 and prompt.endswith("y\n") and rest == "z" * PROMPT
    assert _cut("z" * 1000) == ("z" * PROMPT, "z" * PROMPT)  # no line to end at
    assert _cut("short") == ("sh", "ort")


def test_a_run_keeps_completions_and_the_report_shows_them(tmp_path):
    base = affinitymoe_code()
    cell = replace(
        base,
        data=CodeData(("json", "metrics"), 2, train=4, validation=4, test=4),
        sampling=replace(base.sampling, clients_per_round=2),
        rounds=2,
        evaluate_every=2,
        completions=1,
    )
    run(cell, tmp_path / "run")
    (row,) = json.loads((tmp_path / "run" / "completions.json").read_text())["completions"]
    assert row["client"] == "json-0" and row["prompt"] and row["text"]
    assert row["before"] and row["after"] and row["before"] != row["after"]
    page = render(read_runs([tmp_path / "run"]))
    assert 'id="completions"' in page and "a test text begins with" in page and "public model" in page


def test_clients_that_are_sent_a_part_of_a_model_are_left_out():
    """FedAMoLE sends adapters of its own, with which no plain model can be built; FedAvg sends a whole one."""
    setup = tiny.setup(tiny.source("olmoe", "text-to-text"), clients_per_round=6)
    clients = {}
    for client, data in tiny.federation("text-to-text").clients.items():
        clients[client] = replace(data, task=replace(data.task, form="language"), test=Split(["", ""], ["a b c d"] * 2))
    federation = Federation(clients)
    assert len(completions(setup, FedAvg().server(setup), setup.clients, federation, 2)) == 2
    assert completions(setup, FedAMoLE(E=6, r=2).server(setup), setup.clients, federation, 2) == []
