"""The table of `consilium plan`: memory, bytes, steps and time of every client, before any training.

The server half of the method makes its payloads for the first round, for all clients at once. The experts and bytes of
these payloads are counted. The time is an estimate: 6 floating point operations per active parameter and token of a
step (4 with adapters, which need no gradients of the frozen weights), at half the rate of matrix products that this
machine shows now.
"""

import dataclasses
import math
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from consilium.core import ClientInfo, Payload, counts_of, experts_from_scalars
from consilium.experiment import Experiment
from consilium.moe.budget import MemoryModel, human
from consilium.moe.families import experts_per_token
from consilium.prepare import prepare
from consilium.setup import Setup

__all__ = ["Forecast", "forecasts", "print_plan"]

SIDE, EFFICIENCY = 1024, 0.5
"""The side of the timed matrices, and the share of the measured rate that training reaches."""


@dataclass(frozen=True)
class Forecast:
    """The needs of one client in a round in which it takes part.

    Args:
        client: name of the client.
        examples: examples for training.
        experts: experts that it holds, over all layers; None if there are none.
        memory: bytes while it trains; None for small models, which have no memory model.
        down: bytes of tensors that it receives.
        up: bytes of tensors that it sends at least.
        steps: steps of the optimizer.
        seconds: estimated time.
        note: reason why it cannot take part, or "".
    """

    client: str
    examples: int
    experts: int | None
    memory: int | None
    down: int
    up: int
    steps: int
    seconds: float
    note: str = ""


def forecasts(experiment: Experiment, rate: float | None = None) -> list[Forecast]:
    """Return a forecast for every client, in the order of the clients.

    Args:
        rate: floating point operations per second of matrix products; None: measured on this machine.

    Raises:
        ConsiliumError: if the experiment cannot be run.
    """
    preparation = prepare(experiment)
    sampling = dataclasses.replace(experiment.sampling, clients_per_round=len(preparation.infos))
    preparation = prepare(dataclasses.replace(experiment, sampling=sampling))
    server, setup, rate = preparation.server, preparation.setup, rate or _rate()
    reasons = {info.id: server.unable(info) for info in preparation.infos}
    able_infos = [info for info in preparation.infos if reasons[info.id] is None]
    payloads = server.configure(1, able_infos)
    return [
        _forecast(setup, info, payloads[info.id], rate)
        if info.id in payloads
        else Forecast(info.id, info.num_examples, None, None, 0, 0, 0, 0.0, reasons[info.id] or "not chosen")
        for info in preparation.infos
    ]


def _forecast(setup: Setup, info: ClientInfo, payload: Payload, rate: float) -> Forecast:
    down = sum(t.numel() * t.element_size() for group in payload.groups.values() for t in group.values())
    up = sum(t.numel() * t.element_size() for t in payload.groups.get("params", {}).values())
    fit = setup.fit
    steps = fit.epochs * math.ceil(info.num_examples / fit.batch_size)
    if not setup.model.shared:
        parameters = sum(t.numel() for t in payload.groups.get("params", {}).values())
        operations = 6.0 * parameters * info.num_examples * fit.epochs
        return Forecast(info.id, info.num_examples, None, None, down, up, steps, operations / rate / EFFICIENCY)
    expert_ids = experts_from_scalars(payload.scalars)
    counts = counts_of(expert_ids) if expert_ids else dict(setup.model.counts)
    tokens = sum(fit.lengths.values()) * info.num_examples * fit.epochs
    operations = (4.0 if fit.lora.rank else 6.0) * active_parameters(setup, counts) * tokens
    memory = setup.footprint(counts).total
    experts = sum(counts.values()) or None
    return Forecast(info.id, info.num_examples, experts, memory, down, up, steps, operations / rate / EFFICIENCY)


def active_parameters(setup: Setup, counts: dict[str, int]) -> int:
    """Return the number of parameters that one token passes.

    These are all parameters outside the experts, and those of the experts that the token takes.
    """
    memory, k = MemoryModel.of(setup.model), experts_per_token(setup.model.config)
    return memory.dense_params + sum(
        min(k, n) * memory.expert_params[block] + n * memory.row_params[block] for block, n in counts.items()
    )


def _rate() -> float:
    """Return the floating point operations per second of float32 matrix products on this machine."""
    a = torch.ones(SIDE, SIDE)
    a @ a
    seconds = min(_seconds(lambda: a @ a) for _ in range(3))
    return 2.0 * SIDE**3 / seconds


def _seconds(call: object) -> float:
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


def print_plan(experiment: Experiment, out: Console) -> None:
    """Print one row per client, and the traffic and time of a run of all rounds."""
    all_forecasts = forecasts(experiment)
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for title in ("client", "examples", "experts", "memory", "down", "up", "steps", "time"):
        table.add_column(title, justify="left" if title == "client" else "right", no_wrap=True)
    for forecast in all_forecasts:
        cells = [
            str(forecast.experts or ""),
            "" if forecast.memory is None else human(forecast.memory),
            human(forecast.down),
            human(forecast.up),
        ]
        row = (
            [*cells, str(forecast.steps), f"{forecast.seconds:.1f} s"]
            if not forecast.note
            else ["", "", "", "", "", ""]
        )
        table.add_row(forecast.client, str(forecast.examples), *row)
    out.print(table)
    for forecast in all_forecasts:
        if forecast.note:
            out.print(
                f"{forecast.client} cannot take part: {forecast.note}", highlight=False, markup=False, soft_wrap=True
            )
    able_forecasts = [forecast for forecast in all_forecasts if not forecast.note]
    share = min(experiment.sampling.clients_per_round, len(able_forecasts)) / max(len(able_forecasts), 1)
    traffic_bytes = sum(forecast.down + forecast.up for forecast in able_forecasts) * share * experiment.rounds
    out.print(
        f"{experiment.rounds} rounds of {min(experiment.sampling.clients_per_round, len(able_forecasts))} clients: "
        f"about {human(round(traffic_bytes))} over the network, "
        f"{sum(forecast.seconds for forecast in able_forecasts) * share * experiment.rounds:.0f} s "
        "of training one after the other (an estimate from the rate of matrix products here)",
        highlight=False,
        soft_wrap=True,
    )
