"""What a site prints of a run: that it is connected, each round, and the end."""

import dataclasses
import logging
import re

import loopback
import runs
import tiny

import consilium.engine.flower as flower
from consilium.core import Sampling
from consilium.loop import serve


def test_a_site_shows_the_federation(tmp_path, caplog):
    caplog.set_level(logging.INFO, "consilium")
    data = runs.table(tmp_path, clients=1)
    made = runs.experiment(data, model=tiny.source(), sampling=Sampling(1), rounds=2, evaluate_every=2)
    flower.save_site(tmp_path / "state/site.json", "site-0", made)
    grid = loopback.Loopback([{"site": str(tmp_path / "state/site.json")}])
    serve(dataclasses.replace(made, name="short"), tmp_path / "run", grid, ["site-0"], 5.0)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    patterns = [
        "connected; a run of 2 rounds asks who is here",
        r"round 1 of 2: trained, loss \d\.\d{3}; received [\d.]+ [kM]B, sent [\d.]+ [kM]B, \d+\.\d s",
        r"round 2 of 2: trained, loss \d\.\d{3}; received .*",
        r"round 2 of 2: the delivered model scores [01]\.\d{3} on the test data here "
        r"\(bag of words, trained on this site's data alone: [01]\.\d{3}\); received [\d.]+ [kM]B",
        rf"the run is done: `consilium export {re.escape(str(tmp_path))}/state --out DIR` takes the model away",
    ]
    told = [line for line in lines if "site-0: " in line]
    assert len(told) == len(patterns), told
    for line, pattern in zip(told, patterns, strict=True):
        assert re.fullmatch(f"site-0: {pattern}", line), line
