"""Log records of a server and a site: one escaped line with time and level, also in a file and in other processes."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from consilium import logs
from consilium.errors import ConfigError

log = logging.getLogger("consilium.test")
LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture(autouse=True)
def _restored():
    with logs.to_screen(lambda text: None):
        yield


def test_a_record_is_one_escaped_line_with_time_and_level(capsys, tmp_path):
    logs.start("info", tmp_path / "logs/site.log")
    log.debug("not shown")
    log.warning("%s is refused: %s", "north", "a\x1b[31m red\nname")
    out = capsys.readouterr().out
    assert re.fullmatch(LINE + r"warning north is refused: a\?\[31m red name\n", out)
    assert (tmp_path / "logs/site.log").read_text() == out


def test_a_traceback_follows_its_record(capsys):
    logs.start()
    try:
        raise ValueError("a\x1b[31m\nb")
    except ValueError:
        log.error("failed", exc_info=True)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(LINE + "error   failed", lines[0]) and lines[1].startswith("Traceback")
    assert lines[-2:] == ["ValueError: a?[31m", "b"]


def test_the_file_rotates_and_is_not_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "SIZE", 100)
    monkeypatch.setattr(logs, "COPIES", 2)
    logs.start("info", tmp_path / "site.log")
    for number in range(6):
        log.info("record %d %s", number, "x" * 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site.log", "site.log.1", "site.log.2"]
    assert "record 5" in (tmp_path / "site.log").read_text()
    opened = [str(path.resolve()) for path in Path("/proc/self/fd").iterdir()]
    assert not any("site.log" in path for path in opened)


def test_a_log_file_is_never_written_through_a_link(tmp_path, capsys):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "site.log").symlink_to(tmp_path / "other")
    logs.start("info", tmp_path / "site.log")
    log.info("a record")
    assert (tmp_path / "other").read_text() == "kept" and "a record" in capsys.readouterr().out


def test_another_process_repeats_it(tmp_path):
    logs.start("info", tmp_path / "site.log")
    code = (
        "import logging; from consilium.logs import start_from_environment as begin; begin(); "
        "logging.getLogger('consilium.x').info('round 1'); logging.getLogger('flwr').info('internals')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(LINE + "info    round 1\n", out)
    assert (tmp_path / "site.log").read_text() == out


@pytest.mark.parametrize(("level", "shown"), [("info", "WARNING"), ("error", "WARNING"), ("debug", "DEBUG")])
def test_flowers_own_messages_are_for_debug(level, shown):
    logs.start(level)
    assert logs.flower_level() == shown


def test_another_level_is_refused():
    with pytest.raises(ConfigError, match="--log-level is 'loud'; allowed are debug, info, warning, error"):
        logs.start("loud")


def test_commands_of_one_machine_show_warnings_alone_and_leave_nothing(capsys):
    handlers, lines = logging.getLogger("consilium").handlers[:], []
    with logs.to_screen(lines.append):
        log.info("not shown")
        log.warning("round-3 cannot be\nread")
    assert lines == ["warning: round-3 cannot be read"]
    assert logging.getLogger("consilium").handlers == handlers
