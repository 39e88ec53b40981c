# SPDX-License-Identifier: MPL-2.0
"""What tells how a task ended, on disk: whole, cut, damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nspawn.job import MIB, Mode
from nspawn.outcome import ExitResult, OomReport
from nspawn.record import ROOM, Notes, add_note, find_exit, read_notes, read_record, reserve_room

RECORD = "1 0\nlow 0\nmax 7\noom 1\noom_kill 2\nmemory.max 67108864\nmemory.peak 66000000\nend\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    reserve_room(tmp_path)
    return tmp_path


def overwrite(directory: Path, text: str) -> None:
    """As the shim does."""
    with (directory / "exit").open("r+") as file:
        file.write(text)


def test_record(directory: Path) -> None:
    overwrite(directory, RECORD)
    record = read_record(directory)
    assert record and (record.status, record.is_orphaned) == (1, False)
    assert record.oom == OomReport(2, True, 64 * MIB, 66000000)


@pytest.mark.parametrize(
    ("text", "status", "is_orphaned"),
    [("1 0\noom 0\noom_kill 0\nmemory.max max\nend\n", 1, False), ("3 1\nend\n", 3, True)],
    ids=["without a limit", "without a memory controller"],
)
def test_short_record(directory: Path, text: str, status: int, is_orphaned: bool) -> None:
    overwrite(directory, text)
    record = read_record(directory)
    assert record and (record.status, record.is_orphaned) == (status, is_orphaned)
    assert record.oom == OomReport(0, False)


@pytest.mark.parametrize("length", range(len(RECORD)))
def test_cut_record_is_none(directory: Path, length: int) -> None:
    """The shim was killed while it wrote."""
    overwrite(directory, RECORD[:length])
    assert (read_record(directory) is None) == (length < len(RECORD) - 1)


def test_blocks_are_there_before_and_are_overwritten_in_place(directory: Path) -> None:
    before = {path.name: (path.stat().st_ino, path.stat().st_size) for path in directory.iterdir()}
    assert {size for _, size in before.values()} == {ROOM}
    add_note(directory, sent=15)
    overwrite(directory, RECORD)
    assert {path.name: (path.stat().st_ino, path.stat().st_size) for path in directory.iterdir()} == before


def test_notes_add_up(directory: Path) -> None:
    assert read_notes(directory) == Notes()
    add_note(directory, sent=15)
    add_note(directory, sent=9, reason="killed: it took “too” long")
    add_note(directory, is_orphaned=True)
    assert read_notes(directory) == Notes(9, "killed: it took “too” long", True)


def test_no_signal_ends_what_sigkill_has_ended(directory: Path) -> None:
    """StopTask may come while the task dies of the one before."""
    add_note(directory, sent=9)
    add_note(directory, sent=15)
    overwrite(directory, "255 0\nend\n")
    found = find_exit(directory, Mode.PROCESS_TWO, "task-x")
    assert (found.code, found.signal) == (137, 9)


def test_note_after_the_end_changes_nothing(directory: Path) -> None:
    add_note(directory, sent=15)
    overwrite(directory, "255 0\nend\n")
    before = find_exit(directory, Mode.PROCESS_TWO, "task-x")
    add_note(directory, sent=9, reason="killed: it took too long")
    assert find_exit(directory, Mode.PROCESS_TWO, "task-x") == before
    assert (before.code, before.signal) == (143, 15)


def test_note_on_a_destroyed_task(tmp_path: Path) -> None:
    add_note(tmp_path / "gone", sent=15)
    assert not (tmp_path / "gone").exists()


def test_noted_kill_of_a_task_that_ended_by_itself(directory: Path) -> None:
    """It was faster, or the plugin crashed between note and kill."""
    add_note(directory, sent=9, reason="killed: it took too long")
    overwrite(directory, "4 0\nend\n")
    found = find_exit(directory, Mode.COMMAND, "task-x")
    assert (found.code, found.signal, found.error) == (4, 0, "")


def test_noted_kill_that_took_the_shim_along(directory: Path) -> None:
    add_note(directory, sent=9, reason="killed: it took too long")
    found = find_exit(directory, Mode.COMMAND, "task-x")
    assert found == ExitResult(137, 9, "killed: it took too long", found.at)


@given(st.binary(max_size=200))
def test_damaged_notes_are_none(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.mktemp("notes")
    (directory / "notes").write_bytes(content)
    assert 0 <= read_notes(directory).sent <= 64
