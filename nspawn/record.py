# SPDX-License-Identifier: MPL-2.0
"""The facts on disk that tell how a task ended, so that every plugin says the same of it at any moment.

They are three files of the task's state directory: the exit record of the shim, the notes of the plugins, and
nspawn's messages. They get their blocks before the task starts and are overwritten in place: what happens to a
running task can be written down when /run is full, too. (File systems that copy on write cannot promise that; the
usual tmpfs does.)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nspawn.cgroup import parse_counters
from nspawn.common import SETTINGS_ROOT
from nspawn.files import read_text
from nspawn.job import Mode
from nspawn.outcome import Ending, ExitRecord, ExitResult, OomReport, explain_exit, parse_nspawn_log

RECORD, NOTES, MESSAGES = "exit", "notes", "nspawn.log"  # the shim and nspawn know the first and the last, too
ROOM = 4096  # bytes for each file
END = "\nend\n"  # the last line of a finished record; without it the shim still runs, or was killed


@dataclass(frozen=True)
class Notes:
    """What plugins did to a task. It is noted before it is done."""

    sent: int = 0  # the last signal sent on Nomad's behalf
    reason: str = ""  # why the task is killed, if its own exit code would not tell
    is_orphaned: bool = False  # the payload was there when shim and nspawn were gone
    is_restored: bool = False  # the directory was removed and made anew: nspawn's messages are lost


def reserve_room(directory: Path) -> None:
    """Make the files, filled with line ends. Raises OSError."""
    for name in (RECORD, NOTES, MESSAGES):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        overwrite(directory / name, "", flags)


def overwrite(path: Path, text: str, flags: int = os.O_WRONLY | os.O_CLOEXEC) -> None:
    """Fill a file's room with a text and line ends, in one step. Raises OSError with the file's name."""
    fd = os.open(path, flags, 0o600)
    try:
        if os.pwrite(fd, text.encode().ljust(ROOM, b"\n"), 0) < ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(fd)


def read_record(directory: Path) -> ExitRecord | None:
    """Return the exit record, None if it is not there or not finished: the task runs, or its shim was killed.
    Raises OSError when the host cannot tell."""
    path = directory / RECORD
    try:
        body, end, _ = path.read_text().partition(END)
        if not end:
            return None
        first, _, counters = body.partition("\n")
        status, _, populated = first.partition(" ")
        return ExitRecord(
            int(status), populated == "1", path.stat().st_mtime, OomReport.of(parse_counters(counters))
        )
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def read_notes(directory: Path) -> Notes:
    """Return the notes, none if there are none or they are damaged. Raises OSError when the host cannot tell."""
    try:
        values = json.loads((directory / NOTES).read_bytes())
        flags = bool(values["is_orphaned"]), bool(values.get("is_restored"))
        notes = Notes(int(values["sent"]), str(values["reason"]), *flags)
        return notes if 0 <= notes.sent <= 64 else Notes()
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ):
        return Notes()


def add_note(
    directory: Path, *, sent: int = 0, reason: str = "", is_orphaned: bool = False, is_restored: bool = False
) -> None:
    """Add to the notes, unless there is an exit record: what is done to a task after its end changes no result.
    Does nothing if the task was destroyed. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if read_record(directory):
            return
        notes = read_notes(directory)
        notes = replace(
            notes,
            sent=notes.sent if notes.sent == signal.SIGKILL else sent or notes.sent,  # nothing comes after that
            reason=reason or notes.reason,
            is_orphaned=is_orphaned or notes.is_orphaned,
            is_restored=is_restored or notes.is_restored,
        )
        overwrite(directory / NOTES, json.dumps(asdict(notes)))


def read_messages(directory: Path) -> list[str]:
    """Return nspawn's messages so far."""
    return parse_nspawn_log(read_text(directory / MESSAGES))


def find_exit(directory: Path, mode: Mode, machine: str) -> ExitResult:
    """Return how a task ended of which no process is left, from what is on disk alone.
    Does not yield to the event loop: nothing can be noted meanwhile. Raises OSError when the host cannot tell."""
    record, notes = read_record(directory), read_notes(directory)
    return explain_exit(
        Ending(
            mode=mode,
            at=record.at if record else time.time(),
            record=record,
            is_orphaned=notes.is_orphaned,
            lines=read_messages(directory),
            has_lost_lines=notes.is_restored,
            reason=notes.reason,
            sent=notes.sent,
            is_cut_short=(SETTINGS_ROOT / "propagate" / machine).is_dir(),  # nspawn removes it last
        )
    )
