"""The result of a run: summary.json, and the best round so far."""

from collections.abc import Mapping, Sequence
from typing import Any

from consilium.core import ClientInfo
from consilium.data.simple import simple_scores
from consilium.engine.checkpoint import ClientStore
from consilium.engine.judge import number as is_number
from consilium.errors import RoundError
from consilium.params import checksum
from consilium.prepare import Prepared
from consilium.rundir import RunDirectory

__all__ = ["best_round", "summarise"]


def best_round(
    best: dict[str, Any] | None, record: Mapping[str, Any], infos: Sequence[ClientInfo]
) -> dict[str, Any] | None:
    """Return the number, stage and score of the round with the best validation so far; None if no client gave a score.

    The score is the mean over tasks of the validation scores in the accepted replies, of the models as trained. Test
    data is not used. A new stage of the method starts over, because its models are different.

    Args:
        best: the best of the rounds before.
        record: the record of this round.
    """
    tasks: dict[str, list[float]] = {}
    for info in infos:
        report = record["clients"].get(info.id)
        if report and not report["rejected"] and report["validation"] is not None and not record.get("abandoned"):
            tasks.setdefault(info.task, []).append(report["validation"])
    if not tasks:
        return best
    score = sum(sum(values) / len(values) for values in tasks.values()) / len(tasks)
    if best and best["stage"] == record["stage"] and score <= best["validation"]:
        return best
    return {"round": record["round"], "stage": record["stage"], "validation": score}


def summarise(prepared: Prepared, folder: RunDirectory, store: ClientStore, writing: float) -> dict[str, Any]:
    """Return the result of all rounds, as docs/run-directory.md describes it.

    Args:
        writing: seconds spent on writing the last round's files.
    """
    rounds = list(folder.rounds())
    tested_rounds = [record for record in rounds if record["test"] is not None]
    if not tested_rounds:
        raise RoundError(
            f"the budget of privacy ended before a round counted and was scored; see {folder.path}/privacy.jsonl"
        )
    last_record, infos, server = tested_rounds[-1], prepared.infos, prepared.server
    experts_by_client = server.structure() or {}
    tasks = {}
    for task in sorted({info.task for info in infos}):
        members = [info.id for info in infos if info.task == task and info.id in last_record["test"]]
        tasks[task] = {
            "metric": prepared.metrics[task],
            "score": last_record["scores"].get(task),
            "clients": len(members),
        }
    states_are_remote = prepared.roster is not None  # states stay at the sites
    peak_bytes: dict[str, int] = {}
    for record in rounds:
        for client, values in record["clients"].items():
            peak_bytes[client] = max(peak_bytes.get(client, 0), values["peak_bytes_model"] or 0)
    clients = {}
    for info in infos:
        lack = server.unable(info)
        clients[info.id] = {
            "task": info.task,
            "test": last_record["test"].get(info.id),
            "memory_bytes": info.memory_bytes,
            "experts": [len(ids) for ids in experts_by_client[info.id].values()]
            if info.id in experts_by_client
            else None,
            "peak_bytes_model": peak_bytes.get(info.id) or None,
            "reason": f"cannot hold the model: {lack}" if lack else None,
            "state": checksum(store.load(info.id).params)
            if info.id in store.versions and not states_are_remote
            else None,
        }
    counts = [r["experts_mean"] for r in rounds if r["experts_mean"] is not None]
    seconds = {
        key: sum(_plausible(r["seconds"][key]) for r in rounds) for key in ("round", "train", "evaluate", "engine")
    }
    return {
        "algorithm": type(prepared.experiment.algorithm).__name__,
        "name": prepared.experiment.name,
        "seed": prepared.experiment.seed,
        "rounds": len(rounds),
        "tasks": tasks,
        "mean": last_record["scores"].get("mean"),
        **_papers_metric(rounds),
        **({"simple": simple} if (simple := _simple(prepared)) else {}),
        "clients": clients,
        "coverage": f"{len(last_record['test'])}/{len(infos)}",
        "skipped": dict(prepared.partition["skipped"]),
        "bytes_down": sum(r["bytes_down"] for r in rounds),
        "bytes_up": sum(r["bytes_up"] for r in rounds),
        "seconds": {
            "total": seconds["round"] + writing,
            "train": seconds["train"],
            "evaluate": seconds["evaluate"],
            "engine": seconds["engine"] + writing,
        },
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in rounds),
        "experts": {"start": counts[0], "end": counts[-1]} if counts else None,
        "weights": checksum(server.params),
    }


def _simple(prepared: Prepared) -> dict[str, Any] | None:
    """Return the scores of a simple model, or None.

    There are none in a deployment, whose data is elsewhere, or if clients do not disclose exact scores.
    """
    if prepared.federation is None or prepared.experiment.privacy.scores != "exact":
        return None
    return simple_scores(prepared.federation)


def _papers_metric(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metric that the pFedMoE family reports, for runs of a cohort.

    It is the mean test accuracy before aggregation of the clients that took part in a round, maximised over all rounds.
    It is optimistic, because the test data selects the round.
    """
    key = "test before aggregation"
    means = [
        sum(scores) / len(scores)
        for record in rounds
        if (scores := [_plausible(c["report"][key]) for c in record["clients"].values() if key in c.get("report", {})])
    ]
    return {"best_round_before_aggregation": max(means)} if means else {}


def _plausible(value: float) -> float:
    """Return the value, or 0 if it is so large that only a lying client can have reported it.

    Replies are bounded now, but a run that began with an earlier version may contain such numbers.
    """
    return value if is_number(value, 0, 1e100) else 0.0
