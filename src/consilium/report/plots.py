"""All figures of the report: their titles, how to read them, and the functions that draw them.

To add a figure, write a function that returns a `Drawing` (or raises `NothingToDraw` with the reason) and add a line to
`FIGURES`. The page, the tests and the size limits follow from this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from consilium.report import costs, counts, curves, gains, likeness, maps, tradeoff
from consilium.report.costs import memory, time_split, traffic, traffic_per_client
from consilium.report.counts import expert_counts
from consilium.report.curves import scores_over_bytes, scores_over_rounds, scores_over_seconds
from consilium.report.gains import gain_over_standalone
from consilium.report.likeness import likeness_map
from consilium.report.maps import expert_map, gate_weights, training_heat_map, usage_heat_map
from consilium.report.style import Drawing, NothingToDraw
from consilium.report.tradeoff import score_for_cost

__all__ = [
    "FIGURES",
    "FigureKind",
    "NothingToDraw",
    "expert_counts",
    "expert_map",
    "gain_over_standalone",
    "gate_weights",
    "likeness_map",
    "memory",
    "score_for_cost",
    "scores_over_bytes",
    "scores_over_rounds",
    "scores_over_seconds",
    "time_split",
    "traffic",
    "traffic_per_client",
    "training_heat_map",
    "usage_heat_map",
]


@dataclass(frozen=True)
class FigureKind:
    """One figure of the report.

    Args:
        section: section of the page in which it stands.
        read: description of the drawing, and how to read it.
        look: what to look for.
        each_run: `draw` takes one run and is called for each; otherwise it takes all runs and compares them.
        only_if_drawn: leave the figure out of the page, without a message, if no run has anything to draw.
    """

    name: str
    section: str
    title: str
    read: str
    look: str
    draw: Callable[[Any], Drawing]
    each_run: bool = False
    only_if_drawn: bool = False


FIGURES: tuple[FigureKind, ...] = (
    FigureKind(
        "scores_over_rounds",
        "Scores",
        "Score over rounds",
        "One panel per task. The bold line is the mean test score over the task's clients, on examples that nobody "
        "trained on, in the rounds in which everybody was evaluated; over several seeds it is "
        "the mean of a method's runs. The thin line, left "
        "out where more than four runs are compared, is the validation score of only those clients that took part in "
        "a round; it jumps because other clients take part each time. The scale "
        "does not start at zero. A shaded strip is FedMoE's stage one, in which experts are chosen.",
        "A line still rising at its right end wants more rounds. A validation line well above the test line means "
        "that clients learn their own examples by heart. Faint lines far apart mean that the mean hides clients "
        "that are served badly.",
        curves.scores_over_rounds,
    ),
    FigureKind(
        "scores_over_bytes",
        "Scores",
        "Score for the traffic",
        "The same test scores, but placed by what had been sent until then: all clients, both directions together. "
        "Rounds are free in a simulation; bytes are what a consortium pays for.",
        "The line that is higher at the same place gives more for the same traffic. A line that is short and low may "
        "still be the better bargain.",
        curves.scores_over_bytes,
    ),
    FigureKind(
        "gain_over_standalone",
        "Scores",
        "What each client gains over training alone",
        "One panel per method; a bar is a client, from the one that gains least at the bottom to the one that gains "
        "most. Its length is the client's test score at the end less its score in the run of Standalone on the same "
        "data, in points of a hundred. The scale is the same in all panels; the dotted line is the mean. Names are "
        "left out where there are more than forty bars.",
        "Bars to the left: these clients would be better off alone, whatever the mean says. A mean carried by few "
        "long bars is a method for these few.",
        gains.gain_over_standalone,
        only_if_drawn=True,
    ),
    FigureKind(
        "scores_over_seconds",
        "Scores",
        "Score for the time",
        "The same test scores, placed by the seconds that the run had taken until then: "
        "what the comparison cost on this machine, not how long a federation would wait.",
        "A method that ends higher but later may only have been given more time.",
        curves.scores_over_seconds,
        only_if_drawn=True,
    ),
    FigureKind(
        "score_for_cost",
        "Scores",
        "Score for the cost of the whole run",
        "A mark is a method: the mean score of its finished runs at the end, against all bytes sent and received, the "
        "time taken, and the memory that the largest client needs. Bars are standard deviations over its runs.",
        "A method that another one passes both upwards and to the left has nothing to offer on this cost.",
        tradeoff.score_for_cost,
        only_if_drawn=True,
    ),
    FigureKind(
        "usage_heat_map",
        "Experts",
        "What each client asks of the experts",
        "One panel per sparse layer; a row is a client, a column is an expert. The stronger the colour, the larger "
        "the share of the client's tokens that its router would send to this expert, whether the client holds it or "
        "not. Rows are grouped by task.",
        "Clients of one task should look alike, and tasks unlike each other: then leaving out the pale experts costs "
        "little. Rows with an even colour mean that experts have not specialised, and that choosing among them is "
        "close to chance.",
        maps.usage_heat_map,
        each_run=True,
        only_if_drawn=True,
    ),
    FigureKind(
        "likeness_map",
        "Experts",
        "Which clients are alike",
        "A row is a client, and the columns are the same clients in the same order. The stronger the colour, the more "
        "alike the two clients use the experts: the cosine of their shares of all layers, less the mean of all "
        "clients. Clients that are alike stand next to each other.",
        "Dark squares along the diagonal are groups of clients with text of one kind, found without anybody showing "
        "text. Averaging within a group helps most where the group is short of text. Without squares there are no "
        "groups, and weighing clients by likeness has nothing to go by.",
        likeness.likeness_map,
        each_run=True,
        only_if_drawn=True,
    ),
    FigureKind(
        "training_heat_map",
        "Experts",
        "Which experts each client's batches trained",
        "As above, but the stronger the colour, the larger the share of the client's batches in which this expert "
        "learned, when the client last took part. A client whose device is small trains few experts in each batch.",
        "Rows that are pale all over: little is learned there. A column dark in a single row: only this client's "
        "data shapes that expert. Columns without colour keep the value that the run began with.",
        maps.training_heat_map,
        each_run=True,
        only_if_drawn=True,
    ),
    FigureKind(
        "expert_map",
        "Experts",
        "Which client holds which expert",
        "One panel per sparse layer, with rows and columns as above. Grey: held from start to end. Plus: added "
        "during the run. Minus: held at first, given up later. Empty: never held at either end. The title counts "
        "experts per client in this layer, at the start and at the end, and in brackets all additions and removals.",
        "Columns that are full down to the last row are experts that everybody needs. Empty columns are experts "
        "that nobody trains: they keep the value of the model that the run began with.",
        maps.expert_map,
        each_run=True,
        only_if_drawn=True,
    ),
    FigureKind(
        "expert_counts",
        "Experts",
        "How many experts each client holds",
        "One panel per task. Each thin line is one client's number of experts, all layers together; the bold line is "
        "the task's mean. A step is a round in which the server changed the client's structure.",
        "Lines that draw together: clients of a task agree on a size. A line that goes up and back down is a trial "
        "that did not help and was taken back.",
        counts.expert_counts,
        each_run=True,
    ),
    FigureKind(
        "gate_weights",
        "Experts",
        "What the gate gives to the shared extractor",
        "A row is a client, a column is a class. The stronger the colour, the larger the mean weight that the "
        "client's gate gives to the shared extractor on its validation examples of the class; the rest, up to 100 %, "
        "goes to the client's own. Taken from the last round in which the client took part. Empty: the client has no "
        "such examples.",
        "Columns that differ within a row: the gate decides by the data, and mixing by a fixed share would lose that. "
        "A row near 0 % makes no use of what is shared, one near 100 % none of its own model.",
        maps.gate_weights,
        each_run=True,
        only_if_drawn=True,
    ),
    FigureKind(
        "adapter_ranks",
        "Experts",
        "Rank of the merged adapters",
        "Left: how many directions the merged updates really use, as the mean over all adapted matrices (exp of the "
        "entropy of the singular values). Right: the share of their squared singular values beyond the smallest rank "
        "that took part in the round.",
        "Lines that fall round after round while clients of large rank take part: rank collapse. Rules that keep the "
        "mean of the products, or that merge row by row, do not have it.",
        curves.adapter_ranks,
        only_if_drawn=True,
    ),
    FigureKind(
        "traffic",
        "Cost",
        "Traffic",
        "What all clients together received and sent over the whole run, and how this sum grows. Counted on what is "
        "handed over, without the network's own overhead.",
        "A steep start is a one-time cost, such as sending everybody the full model for stage one. The slope after "
        "that is the price of one more round.",
        costs.traffic,
    ),
    FigureKind(
        "traffic_per_client",
        "Cost",
        "Traffic per client",
        "The same traffic, client by client. Clients differ because they hold different numbers of experts and are "
        "drawn for different numbers of rounds.",
        "A client with much more traffic than its neighbours: check that its line can carry it.",
        costs.traffic_per_client,
        each_run=True,
    ),
    FigureKind(
        "memory",
        "Cost",
        "Memory on the devices",
        "The bar is what the method needs on this client at the worst moment of a round, estimated from parameters, "
        "gradients, optimizer and activations. The upright mark is what the device has; the percentage is how much "
        "of it is used. Where there is no mark, the run sets no limit.",
        "Bars that pass the mark: these clients cannot take part, and the scores above are without them. Bars far "
        "below it: room for more experts.",
        costs.memory,
        each_run=True,
    ),
    FigureKind(
        "time_split",
        "Cost",
        "Where the time goes",
        "Seconds of the whole run, by what they were spent on: training on the clients, evaluation on the clients, "
        "and the engine (handing over, aggregation, checkpoints). Clients of a simulation run one after another, so "
        "this is not how long a real federation would wait.",
        "Evaluation longer than training: evaluate in fewer rounds. A long engine part: the models are large "
        "compared with the work done on them.",
        costs.time_split,
    ),
)
