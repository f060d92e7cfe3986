"""The engine in process: lazy, one reply at a time, everything metered; with toy halves, then with real ones."""

import gc
import json
import math
import time
import weakref

import pytest
import tiny
import torch

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.core import Client, ClientState, Payload, Server, derive_seed
from consilium.engine.codec import encode
from consilium.engine.local import LocalEngine
from consilium.errors import BudgetError, PayloadError


class ToyServer(Server):
    """Sends its weights to everybody in `takes`, sums what returns. `small`: who cannot hold the model."""

    def __init__(self, takes=tiny.IDS, small=()):
        self.params, self.takes, self.small, self.merged = {"w": torch.zeros(100)}, takes, small, []

    def unable(self, client):
        return "needs 2 MB, has 1 MB" if client.id in self.small else None

    def configure(self, round, clients):
        able = [c.id for c in clients if c.id in self.takes and c.id not in self.small]
        return {client: Payload({"params": self.params}) for client in reversed(able)}

    def aggregate(self, round, replies):
        for client, reply in replies:
            self.merged.append(client)
            self.params = {"w": self.params["w"] + reply.group("params")["w"]}
        return {"clients": float(len(self.merged))}

    def deliver(self, client):
        return Payload({"params": self.params})


class ToyClient(Client):
    """Adds one; counts its rounds in its state; remembers what it saw for the test."""

    def __init__(self, **scalars):
        self.scalars, self.seen, self.contexts = scalars, [], []

    def train(self, payload, context):
        self.seen.append(("train", context.info.id, payload))
        self.contexts.append((context.info.id, context.seed))
        rounds = context.state.scalars.get("rounds", 0) + 1
        context.state.scalars["rounds"] = rounds
        context.state.params["own"] = torch.full((2,), float(rounds))
        context.progress(1, 2)
        reply = {"w": payload.group("params")["w"] + 1}
        return Payload({"params": reply}, {"num_examples": context.info.num_examples, **self.scalars})

    def evaluate(self, payload, context):
        self.seen.append(("evaluate", context.info.id, payload))
        context.state.scalars["rounds"] = -1  # must not survive
        return Payload(scalars={"score": len(context.info.id) / 10, "examples": 4})


def made(folder, server=None, client=None, **options):
    return LocalEngine(
        server or ToyServer(),
        client or ToyClient(),
        tiny.infos(),
        tiny.federation(),
        tiny.ClientStore(folder),
        seed=7,
        **options,
    )


# --- the round ------------------------------------------------------------------------------------------------------


def test_clients_work_in_id_order_and_only_when_the_server_asks(tmp_path):
    """The server sees animal-00's reply before animal-01 begins."""
    engine = made(tmp_path)
    seen = []

    def aggregate(round, replies):
        for client, _ in replies:
            seen.append((client, len(engine.client.seen)))
        return {}

    engine.server.aggregate = aggregate
    engine.round(1, test=False)
    assert seen == [(client, n) for n, client in enumerate(sorted(tiny.IDS), 1)]


def test_a_record_says_who_took_part_and_is_json(tmp_path):
    record = made(tmp_path, ToyServer(takes=("animal-00", "number-01"), small=("number-00",))).round(4, test=False)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["round"] == 4 and record["stage"] == ""
    assert record["selected"] == ["animal-00", "number-01"] == list(record["clients"])
    assert record["unable"] == {"number-00": "needs 2 MB, has 1 MB"}
    assert record["test"] is None and record["scores"] is None and record["experts_mean"] is None
    assert record["server"] == {"clients": 2.0}
    assert record["clients"]["animal-00"]["examples"] == tiny.SIZES["animal-00"]


def test_scores_are_means_over_clients_of_a_task_then_over_tasks(tmp_path):
    """Scores are the ids' lengths / 10: 0.9 for animal-xx, colour-xx and number-xx."""
    record = made(tmp_path, ToyServer(takes=("animal-00",), small=("colour-01",))).round(1, test=True)
    assert set(record["test"]) == set(tiny.IDS) - {"colour-01"}
    assert record["scores"] == pytest.approx({"animal": 0.9, "colour": 0.9, "number": 0.9, "mean": 0.9})


def test_by_task_by_hand(tmp_path):
    """animal (1 + 0) / 2, colour 0.5; their mean 0.5, not the mean over three clients."""
    by_task = made(tmp_path)._by_task({"animal-00": 1.0, "animal-01": 0.0, "colour-00": 0.5})
    assert by_task == {"animal": 0.5, "colour": 0.5, "mean": 0.5}


def test_nobody_able(tmp_path):
    with pytest.raises(BudgetError, match=r"6 are unable, e\.g\. animal-00 needs 2 MB, has 1 MB"):
        made(tmp_path, ToyServer(small=tiny.IDS)).round(1, test=True)


def test_a_client_that_raises_ends_the_round(tmp_path):
    engine = made(tmp_path)
    engine.client.train = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.round(1, test=False)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_diverged_loss_is_recorded_as_null(tmp_path, loss):
    record = made(tmp_path, client=ToyClient(train_loss=loss, validation=0.5)).round(1, test=False)
    assert record["clients"]["animal-00"]["train_loss"] is None
    assert record["clients"]["animal-00"]["validation"] == 0.5
    said = f"train_loss is {loss}; it must be a finite number that a float32 can hold"
    assert record["clients"]["animal-00"]["rejected"] == said
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reply_that_is_not_finite_never_reaches_the_server(tmp_path, value):
    """One client sends one such value: the server merges as if that client had not answered, its state stays."""

    class Diverging(ToyClient):
        def train(self, payload, context):
            reply = super().train(payload, context)
            context.state.params = {"kept": torch.ones(1)}
            if context.info.id == "animal-00":
                reply.groups["params"]["w"][0] = value
            return reply

    engine = made(tmp_path, client=Diverging())
    record = engine.round(1, test=False)
    assert {c: r["rejected"] for c, r in record["clients"].items() if r["rejected"]} == {
        "animal-00": "params w is not finite"
    }
    without = made(tmp_path / "b", ToyServer(takes=tuple(c for c in tiny.IDS if c != "animal-00")))
    without.round(1, test=False)
    assert tiny.same(engine.server.params, without.server.params)
    assert engine.store.versions.keys() == set(tiny.IDS) - {"animal-00"}


def test_seeds_follow_from_run_round_and_client_alone(tmp_path):
    all_of_them, one = ToyClient(), ToyClient()
    made(tmp_path / "a", client=all_of_them).round(3, test=False)
    made(tmp_path / "b", ToyServer(takes=("number-00",)), one).round(3, test=False)
    assert dict(all_of_them.contexts)["number-00"] == dict(one.contexts)["number-00"]
    assert dict(one.contexts)["number-00"] == derive_seed(7, "client", 3, "number-00")
    assert len({seed for _, seed in all_of_them.contexts}) == len(tiny.IDS)


def test_what_a_client_draws_from_the_global_generator_follows_from_its_seed(tmp_path):
    """PEFT initialises adapters so. The generator outside is left as it was."""

    class Drawing(ToyClient):
        def train(self, payload, context):
            self.seen.append(torch.rand(3).tolist())
            return super().train(payload, context)

    drawn = []
    for run in range(2):
        client = Drawing()
        torch.manual_seed(run)
        made(tmp_path / str(run), client=client).round(1, test=True)
        drawn.append([x for x in client.seen if isinstance(x, list)])
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(run))
    assert drawn[0] == drawn[1] and len({tuple(x) for x in drawn[0]}) == len(tiny.IDS)


def test_progress_names_client_and_phase(tmp_path):
    steps = []
    made(tmp_path, ToyServer(takes=("animal-00",)), progress=lambda *step: steps.append(step)).round(1, test=True)
    assert steps[0] == ("animal-00", "train", 1, 2)
    assert [step for step in steps if step[1] == "test"] == [(c, "test", i, 6) for i, c in enumerate(tiny.IDS)]


# --- memory, state, the byte boundary ---------------------------------------------------------------------------------


def test_one_reply_is_in_memory_at_a_time(tmp_path):
    """When a client begins, no tensor of an earlier reply is left, though the server's loop still names the reply."""
    alive, counts = [], []

    class Watched(ToyClient):
        def train(self, payload, context):
            self.seen.clear()
            counts.append(sum(ref() is not None for ref in alive))
            reply = super().train(payload, context)
            alive.append(weakref.ref(reply.group("params")["w"]))
            return reply

    for strict in (False, True):
        made(tmp_path / str(strict), client=Watched(), strict=strict).round(1, test=False)
    assert len(counts) == 2 * len(tiny.IDS) and set(counts) == {0}


def test_a_server_that_hoards_replies_is_told(tmp_path):
    engine = made(tmp_path)
    engine.server.aggregate = lambda _, replies: {"sum": sum(len(r.group("params")) for _, r in list(replies))}
    with pytest.raises(PayloadError, match="merges each reply before it asks for the next"):
        engine.round(1, test=False)


def test_the_clients_own_payload_is_not_emptied(tmp_path):
    kept = {}

    class Keeping(ToyClient):
        def train(self, payload, context):
            return kept.setdefault(context.info.id, super().train(payload, context))

    made(tmp_path, client=Keeping()).round(1, test=False)
    assert all(reply.group("params")["w"].numel() == 100 for reply in kept.values())


def test_state_lives_on_disk_between_rounds(tmp_path):
    def states():
        return {id(x) for x in gc.get_objects() if type(x) is ClientState}

    before = states()
    engine = made(tmp_path, ToyServer(takes=("animal-00",)))
    for round in (1, 2, 5):
        engine.round(round, test=True)
        fresh = tiny.ClientStore(tmp_path, dict(engine.store.versions))
        assert fresh.versions == {"animal-00": round}
    assert engine.store.load("animal-00").scalars == {"rounds": 3}
    assert engine.store.load("animal-00").params["own"].tolist() == [3, 3]
    assert states() <= before


def test_strict_hands_over_copies_and_plain_hands_over_the_tensors(tmp_path):
    for strict in (False, True):
        engine = made(tmp_path / str(strict), ToyServer(takes=("animal-00",)), strict=strict)
        sent = engine.server.params["w"]
        engine.round(1, test=False)
        got = engine.client.seen[0][2].group("params")["w"]
        assert torch.equal(got, sent)
        assert (got is sent) is not strict


def test_strict_and_plain_give_the_same_bits(tmp_path):
    finals = []
    for strict in (False, True):
        setup = tiny.setup(clients_per_round=2)
        algorithm = SCAFFOLD()
        engine = tiny.engine(
            algorithm.server(setup), algorithm.client(setup), setup, tmp_path / str(strict), strict=strict
        )
        for round in (1, 2):
            engine.round(round, test=False)
        finals.append(engine.server.params)
    assert tiny.same(*finals)


# --- the meter --------------------------------------------------------------------------------------------------------


def blob_bytes(payload):
    """Bytes of a payload's tensors as they lie in the codec's blob, counted from the blob's own header."""
    blob = encode(payload)
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    assert len(blob) - 8 - size == sum(end - start for start, end in spans)
    return len(blob) - 8 - size


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("algorithm", [FedAvg(), SCAFFOLD()], ids=lambda a: type(a).__name__)
def test_the_bytes_reported_are_the_bytes_of_the_payloads(tmp_path, algorithm, strict):
    setup = tiny.setup()
    client = algorithm.client(setup)
    down, up = {}, {}
    real = client.train

    def train(payload, context):
        down[context.info.id] = blob_bytes(payload)
        reply = real(payload, context)
        up[context.info.id] = blob_bytes(reply)
        return reply

    client.train = train
    record = tiny.engine(algorithm.server(setup), client, setup, tmp_path, strict=strict).round(1, test=True)
    assert {c: r["bytes_down"] for c, r in record["clients"].items()} == down
    assert {c: r["bytes_up"] for c, r in record["clients"].items()} == up
    assert record["bytes_down"] == sum(down.values()) > 0
    assert record["bytes_up"] == sum(up.values()) > 0


def test_seconds_add_up_and_nothing_is_negative(tmp_path):
    setup = tiny.setup()
    algorithm = FedAvg()
    record = tiny.engine(algorithm.server(setup), algorithm.client(setup), setup, tmp_path).round(1, test=True)
    seconds, clients = record["seconds"], record["clients"].values()
    assert seconds["round"] == pytest.approx(seconds["train"] + seconds["evaluate"] + seconds["engine"])
    assert seconds["train"] == pytest.approx(sum(c["seconds"]["train"] for c in clients))
    assert seconds["evaluate"] > sum(c["seconds"]["evaluate"] for c in clients) > 0
    assert min(seconds.values()) >= 0
    assert record["peak_rss_bytes"] > 50e6


def test_seconds_of_training_and_validation_are_told_apart(tmp_path):
    """The client says that 0.02 s of its round were validation: training is the rest of what was measured."""

    class Slow(ToyClient):
        def train(self, payload, context):
            time.sleep(0.05)
            return super().train(payload, context)

    engine = made(tmp_path, ToyServer(takes=("animal-00",)), Slow(seconds_evaluate=0.02))
    seconds = engine.round(1, test=False)["clients"]["animal-00"]["seconds"]
    assert seconds["evaluate"] == 0.02
    assert 0.03 <= seconds["train"] < 5
