# SPDX-License-Identifier: MPL-2.0
"""Log: every line is one that go-plugin takes for a log entry; anything else panics the agent or is lost."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nspawn.common import LEVELS, Log, render_log

TOP = Path(__file__).resolve().parents[2]
NOW = datetime.datetime(2026, 11, 23, 20, 8, 1, 42, datetime.timezone.utc)
LIMIT = 64 << 10  # go-plugin's read buffer
FIXED = {"@level", "@message", "@timestamp", "@module"}
# RFC 3339 with six digits, as go-plugin's time layout "2006-01-02T15:04:05.000000Z07:00" wants it
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")

texts = st.text(st.characters(exclude_categories=()))  # lone surrogates, too: they come from file names
values = st.one_of(texts, st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), st.lists(texts))


def parse(line: bytes) -> dict[str, str]:
    """Read a line as go-plugin does, and refuse what would hurt the agent."""
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert len(line) < LIMIT
    entry = json.loads(line)
    assert isinstance(entry, dict)
    assert all(isinstance(value, str) for value in entry.values())
    assert entry["@level"] in ("trace", "debug", "info", "warn", "error")
    assert TIMESTAMP.fullmatch(entry["@timestamp"])
    return entry


def test_line() -> None:
    line = render_log("info", "the task has ended", {"task": "a/web/0", "code": 3}, NOW)
    assert line == (
        b'{"@level": "info", "@message": "the task has ended", "@timestamp": "2026-11-23T20:08:01.000042+00:00", '
        b'"@module": "nspawn", "task": "a/web/0", "code": "3"}\n'
    )


@pytest.mark.parametrize("microsecond", [0, 1, 500_000, 999_999])
@pytest.mark.parametrize("hours", [0, 2, -9.5])
def test_timestamp_has_six_digits_and_an_offset(microsecond: int, hours: float) -> None:
    zone = datetime.timezone(datetime.timedelta(hours=hours))
    now = NOW.replace(microsecond=microsecond, tzinfo=zone)
    text = parse(render_log("info", "x", {}, now))["@timestamp"]
    assert datetime.datetime.fromisoformat(text) == now


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level: str) -> None:
    assert parse(render_log(level, "x", {}, NOW))["@level"] == level


@pytest.mark.parametrize("level", ["warning", "critical", "INFO", ""])
def test_other_levels_are_refused(level: str) -> None:
    with pytest.raises(AssertionError):
        render_log(level, "x", {}, NOW)


@given(st.sampled_from(LEVELS), texts, st.dictionaries(texts, values, max_size=8))
@example("info", "x", {"@message": "y", "@level": None, "@timestamp": 1, "@module": [], "@": 2, "": 3})
@example("info", "x", {"@@level": "y", "level": "z"})
def test_any_line_is_acceptable(level: str, message: str, logged: dict[str, object]) -> None:
    entry = parse(render_log(level, message, logged, NOW))
    assert entry["@level"] == level
    assert entry["@message"] == message
    assert entry["@module"] == "nspawn"
    assert {key for key in entry if key.startswith("@")} == FIXED


@pytest.mark.parametrize("character", ["a", '"', "\n", "\0", "ä", "\udc80", "\u2028", "😀"])
@pytest.mark.parametrize("count", [0, 1, 7, 150])
def test_long_lines_are_cut(character: str, count: int) -> None:
    """A character outside the basic plane is two escapes of six bytes in JSON."""
    long = character * 100_000
    logged = {f"value_{number}": long for number in range(count)}
    entry = parse(render_log("error", long, logged, NOW))
    assert entry["@message"].startswith(character)
    assert entry["@level"] == "error"
    assert set(entry) >= FIXED


@pytest.mark.parametrize("count", [200, 1000, 20_000])
def test_many_values_leave_level_and_time_whole(count: int) -> None:
    parse(render_log("error", "m" * 100_000, {f"v{number}": "x" * 9 for number in range(count)}, NOW))


def test_long_key() -> None:
    parse(render_log("error", "x", {"k" * 100_000: "v"}, NOW))


def test_short_values_stay_whole_beside_a_long_one() -> None:
    entry = parse(render_log("error", "internal error", {"trace": "x" * 100_000, "task": "a/web/0"}, NOW))
    assert (entry["@message"], entry["task"]) == ("internal error", "a/web/0")
    assert len(entry["trace"]) > 500


def test_bind_adds_values_and_leaves_the_parent_alone() -> None:
    parent = Log(task="a")
    child = parent.bind(machine="m", task="b")
    assert (parent.values, child.values) == ({"task": "a"}, {"task": "b", "machine": "m"})


@pytest.mark.parametrize("level", ["debug", "info", "warn", "error"])
def test_methods_write_one_line_to_stderr(level: str, capfd: pytest.CaptureFixture[str]) -> None:
    getattr(Log(task="a").bind(machine="m"), level)("hello", task="b")
    out, err = capfd.readouterr()
    entry = parse(err.encode())
    assert out == ""
    assert (entry["@level"], entry["@message"], entry["task"], entry["machine"]) == (level, "hello", "b", "m")


def run_logger(stderr: int) -> subprocess.CompletedProcess[str]:
    script = "from nspawn.common import log\nfor n in range(3): log.info('x' * 10000)\nprint('alive', flush=True)"
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=30,
        check=False,
    )


def test_closed_pipe_is_no_reason_to_die() -> None:
    """That is how stderr looks when the agent was killed: the plugin has to live on for the next one."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_logger(writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_open_pipe_gets_every_line() -> None:
    done = run_logger(subprocess.PIPE)
    assert done.returncode == 0
    assert [len(parse(f"{line}\n".encode())["@message"]) for line in done.stderr.splitlines()] == [10_000] * 3
