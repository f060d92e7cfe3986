"""Checkpoints and client states: all of a committed round or nothing of it, a broken newest file costs one round."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from consilium.core import ClientState, Payload
from consilium.engine.checkpoint import (
    KEEP,
    ClientStore,
    append_json,
    load_checkpoint,
    save_checkpoint,
    write_atomic,
)
from consilium.errors import CheckpointError


def server_state(round):
    return Payload({"params": {"w": torch.full((3,), float(round))}}, {"method": f"after {round}"})


def commit(folder, round, *trained):
    """One round in which the clients in `trained` leave a state."""
    found = load_checkpoint(folder / "checkpoints")
    store = ClientStore(folder / "clients", found[2] if found else {})
    for client in trained:
        store.save(client, ClientState({"own": torch.full((2,), float(round))}, {"seen": round}), round)
    save_checkpoint(folder / "checkpoints", round, server_state(round), store)


def resumed(folder):
    """Round, the server's value, and every client's value, as a resumed run finds them."""
    round, server, versions, _ = load_checkpoint(folder / "checkpoints")
    store = ClientStore(folder / "clients", versions)
    states = {client: store.load(client) for client in versions}
    assert server.scalars == {"method": f"after {round}"}
    assert all(state.scalars["seen"] == state.params["own"][0] for state in states.values())
    return round, server.group("params")["w"][0].item(), {c: s.scalars["seen"] for c, s in states.items()}


def test_nothing_to_resume_from(tmp_path):
    assert load_checkpoint(tmp_path / "checkpoints") is None
    (tmp_path / "round-1.safetensors").write_bytes(b"not ours")
    (tmp_path / ".round-00001.safetensors.tmp").write_bytes(b"torn")
    assert load_checkpoint(tmp_path) is None


def test_what_was_saved_comes_back(tmp_path):
    commit(tmp_path, 1, "a", "b")
    commit(tmp_path, 2, "b")
    assert resumed(tmp_path) == (2, 2.0, {"a": 1, "b": 2})


def test_round_numbers_beyond_five_digits_sort_by_number(tmp_path):
    commit(tmp_path, 99_999, "a")
    commit(tmp_path, 100_000, "a")
    assert resumed(tmp_path)[0] == 100_000


def test_a_client_without_state_starts_empty_and_leaves_no_file(tmp_path):
    store = ClientStore(tmp_path)
    assert store.load("new") == ClientState()
    store.save("new", ClientState(), 1)
    assert store.versions == {} and list(tmp_path.iterdir()) == []


def test_a_state_given_up_is_gone(tmp_path):
    store = ClientStore(tmp_path)
    store.save("a", ClientState({"x": torch.ones(1)}), 1)
    store.save("a", ClientState(), 2)
    assert store.load("a") == ClientState()


def test_two_checkpoints_are_kept_with_the_states_they_name(tmp_path):
    """b trained in rounds 1 and 4 only; rounds 4 and 5 may be resumed from, so its states 1..3 are past use."""
    for round, trained in enumerate((["a", "b"], ["a"], ["a"], ["a", "b"], ["a"]), 1):
        commit(tmp_path, round, *trained)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors"))
    assert KEEP == 2
    assert files == [
        "checkpoints/round-00004.safetensors",
        "checkpoints/round-00005.safetensors",
        "clients/a/round-00004.safetensors",
        "clients/a/round-00005.safetensors",
        "clients/b/round-00004.safetensors",
    ]


def spoil(path, how):
    blob = path.read_bytes()
    flipped = bytearray(blob)
    flipped[-1] ^= 1
    changed = {"empty": b"", "torn": blob[: len(blob) // 2], "one bit": bytes(flipped), "text": b"hello"}
    changed["scalar"] = blob.replace(b"after", b"AFTER")
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["empty", "torn", "one bit", "text", "scalar"])
def test_a_broken_newest_checkpoint_costs_one_round(tmp_path, how, caplog):
    for round in (1, 2, 3):
        commit(tmp_path, round, "a")
    spoil(tmp_path / "checkpoints/round-00003.safetensors", how)
    assert resumed(tmp_path) == (2, 2.0, {"a": 2})
    assert re.search(r"round-00003\.safetensors.*continuing from round-00002\.safetensors", caplog.text)


def test_all_checkpoints_broken(tmp_path):
    for round in (1, 2, 3):
        commit(tmp_path, round)
    for path in (tmp_path / "checkpoints").iterdir():
        spoil(path, "torn")
    with pytest.raises(CheckpointError, match=r"none of.*round-00003.*round-00002"):
        load_checkpoint(tmp_path / "checkpoints")


@pytest.mark.parametrize("how", ["empty", "torn", "one bit", "text"])
def test_a_broken_client_state_is_an_error_that_names_it(tmp_path, how):
    commit(tmp_path, 1, "a")
    spoil(tmp_path / "clients/a/round-00001.safetensors", how)
    with pytest.raises(CheckpointError, match=r"client a in .*round-00001\.safetensors cannot be read"):
        resumed(tmp_path)


def test_a_lost_client_state_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="client a"):
        ClientStore(tmp_path, {"a": 3}).load("a")


def test_states_of_an_uncommitted_round_do_not_count(tmp_path):
    commit(tmp_path, 1, "a")
    ClientStore(tmp_path / "clients").save("a", ClientState({"own": torch.zeros(2)}, {"seen": 0}), 2)
    assert resumed(tmp_path) == (1, 1.0, {"a": 1})


def test_the_best_checkpoint_is_kept_with_the_states_it_names(tmp_path, caplog):
    """Round 2 is the best until round 5. b trained in rounds 1 and 4 only."""
    for round, best, trained in ((1, 1, "ab"), (2, 2, "a"), (3, 2, "a"), (4, 2, "ab"), (5, 2, "a")):
        store = ClientStore(tmp_path / "clients", (load_checkpoint(tmp_path / "checkpoints") or (0, 0, {}))[2])
        for client in trained:
            store.save(client, ClientState({"own": torch.full((2,), float(round))}, {"seen": round}), round)
        save_checkpoint(tmp_path / "checkpoints", round, server_state(round), store, best=best)

    def there():
        files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors"))
        return [f.replace("round-0000", "").replace(".safetensors", "").replace("clients/", "") for f in files]

    assert there() == ["checkpoints/2", "checkpoints/4", "checkpoints/5", "a/2", "a/4", "a/5", "b/1", "b/4"]
    for name in ("round-00004", "round-00005"):
        spoil(tmp_path / f"checkpoints/{name}.safetensors", "torn")
    assert resumed(tmp_path) == (2, 2.0, {"a": 2, "b": 1})
    assert "continuing from round-00002.safetensors" in caplog.text
    save_checkpoint(tmp_path / "checkpoints", 6, server_state(6), ClientStore(tmp_path / "clients", {"b": 4}), best=6)
    save_checkpoint(tmp_path / "checkpoints", 7, server_state(7), ClientStore(tmp_path / "clients", {"b": 4}), best=6)
    assert there() == ["checkpoints/6", "checkpoints/7", "a/5", "b/4"]


def test_a_round_that_is_done_again_is_kept_in_place_of_the_broken_ones_after_it(tmp_path):
    """It is older than they are, and yet the newest that can be read."""
    for round in (1, 2, 3, 4):
        commit(tmp_path, round, "a")
    (tmp_path / "checkpoints/round-00003.safetensors").rename(tmp_path / "checkpoints/round-00005.safetensors")
    for number in (4, 5):
        spoil(tmp_path / f"checkpoints/round-0000{number}.safetensors", "torn")
    store = ClientStore(tmp_path / "clients")
    for number in (2, 3):
        save_checkpoint(tmp_path / "checkpoints", number, server_state(number), store)
    assert sorted(path.name[9:11] for path in (tmp_path / "checkpoints").iterdir()) == ["02", "03"]
    assert resumed(tmp_path) == (3, 3.0, {})


def test_new_folders_and_files_are_made_to_last(tmp_path, monkeypatch):
    """A file's name is in its folder, a new folder's in the one above: each is synced, or a power cut takes it."""
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: synced.append(Path(f"/proc/self/fd/{n}").resolve()) or real(n))
    write_atomic(tmp_path / "clients/a/file", b"x")
    assert {tmp_path, tmp_path / "clients", tmp_path / "clients/a"} < set(synced)
    synced.clear()
    write_atomic(tmp_path / "clients/a/file", b"y")
    assert synced[1:] == [tmp_path / "clients/a"]
    for _ in range(2):
        synced.clear()
        append_json(tmp_path / "lines.jsonl", {})
    assert synced == [tmp_path / "lines.jsonl"]


def test_a_flipped_bit_or_a_cut_anywhere_is_found(tmp_path, caplog):
    """Each 64th byte, and a hundred lengths: the checkpoint before it is taken, with a warning that names both."""
    folder = tmp_path / "checkpoints"
    for round in (1, 2):
        state = Payload({"params": {"w": torch.full((1000,), float(round))}}, {"method": f"after {round}"})
        save_checkpoint(folder, round, state, ClientStore(tmp_path / "clients"), {"experiment": "x" * 200})
    newest = folder / "round-00002.safetensors"
    whole = newest.read_bytes()
    spoilt = [whole[: len(whole) * n // 100] for n in range(100)]
    for place in range(0, len(whole), 64):
        spoilt.append(whole[:place] + bytes([whole[place] ^ (1 << place // 64 % 8)]) + whole[place + 1 :])
    for blob in spoilt:
        newest.write_bytes(blob)
        caplog.clear()
        assert load_checkpoint(folder).round == 1
        assert re.search(r"round-00002\.safetensors.*continuing from round-00001\.safetensors", caplog.text)


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("checkpoint-*.safetensors")), ids=lambda path: path.stem)
def test_checkpoints_of_earlier_versions_are_read(tmp_path, path):
    """One of each format that was ever written: 0 is 1 before it had a number."""
    (tmp_path / "round-00003.safetensors").write_bytes(path.read_bytes())
    found = load_checkpoint(tmp_path)
    assert found.round == 3 and found.versions == {"a": 3, "b": 1} and found.server.scalars == {"stage": 2}
    assert found.server.group("params")["w"].tolist() == [1.0, 2.0, 3.0]
    assert found.begun == ({} if path.stem == "checkpoint-0" else {"model": "m"})


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("consilium.engine.checkpoint.FORMAT", 3)
    commit(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"round-00001\.safetensors has format 3, this version reads 2"):
        load_checkpoint(tmp_path / "checkpoints")


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    append_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match=r"log\.jsonl cannot be written \(9 bytes: No space left on device\)"):
        append_json(path, {"a": 2})
    assert path.read_text() == '{"a": 1}\n'


def test_write_atomic_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "deep/down/file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CheckpointError, match=r"down/file cannot be written \(3 bytes: disk full\); what was"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_append_json_refuses_what_json_cannot_say(tmp_path):
    append_json(tmp_path / "log.jsonl", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        append_json(tmp_path / "log.jsonl", {"a": float("nan")})
    assert (tmp_path / "log.jsonl").read_text() == '{"a": 1}\n'


WRITER = """
    import os, signal, sys, torch
    from pathlib import Path
    from test_checkpoint import commit
    folder, fatal, calls = Path(sys.argv[1]), 0, 0

    def deadly(real):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    os.fsync, os.unlink, os.replace = deadly(os.fsync), deadly(os.unlink), deadly(os.replace)
    Path.replace, Path.unlink = deadly(Path.replace), deadly(Path.unlink)
    for start in range(1, 1000):
        if os.fork() == 0:
            fatal = start
            for round in (1, 2, 3, 4):
                commit(folder / str(start), round, "a", *(["b"] if round % 2 else []))
            os._exit(3)
        if os.wait()[1] != signal.SIGKILL:
            break
    print(start)
"""


def test_killed_at_every_write_of_four_rounds_all_parts_of_one_round_are_found(tmp_path):
    """The same four rounds once for every n, killed at the n-th fsync, rename or removal."""
    code = textwrap.dedent(WRITER)
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    kills = int(done.stdout)
    assert kills > 40
    expected = {1: {"a": 1, "b": 1}, 2: {"a": 2, "b": 1}, 3: {"a": 3, "b": 3}, 4: {"a": 4, "b": 3}}
    reached = set()
    for n in range(1, kills):
        found = load_checkpoint(tmp_path / str(n) / "checkpoints")
        if found is not None:
            round, value, states = resumed(tmp_path / str(n))
            assert value == round and states == expected[round]
            reached.add(round)
    assert reached == {1, 2, 3, 4}
