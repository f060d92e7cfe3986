"""`consilium plan`: what is predicted is what a first round then shows."""

import json
import math

import runs

from consilium.algorithms.fedavg import FedAvg
from consilium.cli.views.forecast import active_parameters, forecasts
from consilium.loop import run
from consilium.moe.families import experts_per_token
from consilium.prepare import prepare


def test_a_forecast_is_what_the_round_shows(tmp_path):
    """Bytes and memory to the byte; steps and operations by hand; a client without the memory is named."""
    experiment = runs.experiment(runs.table(tmp_path), FedAvg(), rounds=1)
    found = {one.client: one for one in forecasts(experiment, rate=1e9)}
    setup = prepare(experiment).setup
    run(experiment, tmp_path / "run")
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert record["selected"]
    for client in record["selected"]:
        told, one = record["clients"][client], found[client]
        assert one.memory == told["peak_bytes_model"]
        assert one.steps == experiment.fit.epochs * math.ceil(one.examples / experiment.fit.batch_size)
        tokens = sum(experiment.fit.lengths.values()) * one.examples * experiment.fit.epochs
        operations = 6 * active_parameters(setup, dict(setup.model.counts)) * tokens
        assert math.isclose(one.seconds, operations / 1e9 / 0.5)
    assert experts_per_token(setup.model.config) >= 1
