# SPDX-License-Identifier: MPL-2.0
"""A task's log pipes: they are opened for its whole life, and held after its end until what is in them was read.

The kernel drops what is in a pipe with the last process that has it open, and Nomad's collector may be away: while
the agent restarts, or starts to read only when the task has ended. So the shim leaves a process that holds both
pipes. The plugin ends it when they are empty. When the task is destroyed before that, the plugin holds them itself
for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import stat
import termios
from collections.abc import Iterator, Mapping, Sequence

from nspawn.cgroup import read_cgroup_processes
from nspawn.common import HostError, check_shortage
from nspawn.plan import Plan
from nspawn.process import ProcessId
from nspawn.sources import Source

FIRST_PAUSE, LAST_PAUSE = 0.002, 1.0  # seconds between two looks at pipes that are not empty
LAST_CHANCE = 5.0  # seconds that the plugin holds the pipes of a destroyed task


def find_holders(cgroup: str) -> list[ProcessId]:
    """Return what an ended shim has left: the holder, and until it has written everything the console's filter.
    Raises OSError."""
    return read_cgroup_processes(f"{cgroup}/shim")


def open_pipes(holders: Sequence[ProcessId]) -> list[int]:
    """Open the pipes that processes have as stdout and stderr. What is in them stays there. Raises OSError."""
    with contextlib.ExitStack() as stack:
        found = []
        for path in (f"/proc/{holder.pid}/fd/{number}" for holder in holders for number in (1, 2)):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if stat.S_ISFIFO(os.stat(path).st_mode):
                    found.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
                    stack.callback(os.close, found[-1])
        stack.pop_all()
        return found


def is_unread(pipe: int) -> bool:
    return any(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))  # an int


def have_unread(holders: Sequence[ProcessId]) -> bool:
    """Whether an ended task's pipes hold something that nobody has read. Raises OSError."""
    if len(holders) > 1:
        return True  # the filter has not written everything yet
    pipes = open_pipes(holders)
    try:
        return any(is_unread(pipe) for pipe in pipes)
    finally:
        for pipe in pipes:
            os.close(pipe)


async def hold_until_read(cgroup: str) -> None:
    """Wait until an ended task's pipes are empty, then let their reader see the end. Most are empty at once.

    The holders are found once: a later start of the task has the same cgroup, perhaps under another plugin."""
    pause, holders = FIRST_PAUSE, None
    while True:
        with contextlib.suppress(OSError):  # the host cannot tell: look again later
            holders = find_holders(cgroup) if holders is None else [one for one in holders if one.is_alive]
            if not have_unread(holders):
                for holder in holders:
                    holder.send(signal.SIGKILL)
                return
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, LAST_PAUSE)


async def hold_for_a_moment(pipes: Sequence[int]) -> None:
    """Hold pipes until they are empty, at most for LAST_CHANCE; close them."""
    loop = asyncio.get_running_loop()
    end = loop.time() + LAST_CHANCE
    try:
        while any(is_unread(pipe) for pipe in pipes) and loop.time() < end:
            await asyncio.sleep(0.05)
    finally:
        for pipe in pipes:
            os.close(pipe)


def open_log(path: str, folder: Source | None = None) -> int:
    """Open one of the task's log FIFOs for its whole life; /dev/null when nobody collects logs. Raises HostError.

    It is opened read-write: then opening never waits for a reader, and when the reader goes away and comes back
    (logmon, with every agent restart), the payload gets no SIGPIPE and no line is lost. A symbolic link is never
    followed: other tasks of the allocation can write to the directory (CVE-2026-8052). That is `folder`, if given.
    """
    if not path:
        path = "/dev/null"
    name, place = (os.path.basename(path), folder.fd) if folder else (path, None)
    try:
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    except FileNotFoundError:
        return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)  # disable_log_collection: nobody makes the FIFOs
    except OSError as error:
        check_shortage(error)
        raise HostError(f"the log path {path} cannot be opened: {error.strerror}") from None
    try:
        if not (stat.S_ISFIFO(os.fstat(found).st_mode) or path == "/dev/null"):
            raise HostError(f"the log path {path} is neither a FIFO nor /dev/null; the task is not started")
        return os.open(f"/proc/self/fd/{found}", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    finally:
        os.close(found)


@contextlib.contextmanager
def open_logs(plan: Plan, directories: Mapping[str, Source]) -> Iterator[list[int]]:
    """Yield stdout and stderr for a task; close them at the end, when the shim has its own copies."""
    with contextlib.ExitStack() as stack:
        logs = []
        for path in plan.log_paths:
            logs.append(open_log(path, directories.get(os.path.dirname(path))))
            stack.callback(os.close, logs[-1])
        yield logs


def chown_logs(logs: Sequence[int], users: Sequence[tuple[int, int]]) -> None:
    """Make the container's root the owner of its log FIFOs, so that programs can reopen /dev/stdout."""
    for fd in logs:
        if users and users[0][0] and stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, users[0][0], -1)
