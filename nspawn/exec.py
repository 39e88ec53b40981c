# SPDX-License-Identifier: MPL-2.0
"""One command in a running container: its streams and its end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import marshal
import os
import signal
import socket
import struct
import termios
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from nspawn.accounts import Account
from nspawn.bundle import ExecContext
from nspawn.cgroup import (
    find_own_cgroups,
    kill_cgroup,
    read_cgroup_pids,
    read_cgroup_processes,
    read_descendants,
    write_control,
)
from nspawn.common import (
    ConfigError,
    DriverError,
    HostError,
    check_shortage,
    is_shortage,
    quote,
    render_line,
    tuples,
)
from nspawn.entries import LEAF, ExecServer, plan_entry, receive_fds, send_fds
from nspawn.files import find_tool, read_text
from nspawn.job import Mode
from nspawn.process import (
    DESCRIPTORS,
    NO_PROCESS,
    ProcessId,
    find_children,
    read_stat,
    run_in_thread,
    wait_readable,
    wait_writable,
)
from nspawn.state import State

EXEC_DESCRIPTORS = 12  # that the start of a command has open at a time; afterwards it has up to six


def leave_cgroup(entry: int) -> None:
    """Move an entry back to the plugin's cgroup once its command runs: the task's limits are not for it."""
    for place in find_own_cgroups():
        with contextlib.suppress(OSError):
            write_control(Path(place, "cgroup.procs"), str(entry))


def find_session(root: int, pids: Sequence[int]) -> list[ProcessId]:
    """Return the processes of `pids` that are `root`, in the session it leads, or descendants of these."""
    stats = {pid: fields for pid in pids if (fields := read_stat(pid)) and fields[0] not in ("Z", "X")}
    found = {pid for pid, fields in stats.items() if root in (pid, int(fields[3]))}
    while more := {pid for pid, fields in stats.items() if int(fields[1]) in found} - found:
        found |= more
    return [ProcessId(pid, int(stats[pid][19])) for pid in sorted(found)]


def is_confined(leader: int, mode: Mode) -> bool:
    """Whether nspawn has finished with a container's first process: it has executed the payload, or become the
    stub, which is nspawn's own program under another name. May block."""
    if mode is Mode.PROCESS_TWO:
        return read_text(Path(f"/proc/{leader}/comm")).startswith("(sd-stubinit")
    nspawn = find_tool("systemd-nspawn")
    try:
        return not nspawn or not os.path.samefile(f"/proc/{leader}/exe", nspawn)
    except OSError:  # it has ended
        return False


CHUNK = 64 << 10  # bytes: what a pipe usually holds
MAX_REST = 256 << 10  # bytes read after the command's end: more than its pipe or terminal usually holds then


class Exec:
    """One command in a running container."""

    def __init__(
        self,
        server: ExecServer,
        state: State,
        ended: asyncio.Event,
        command: Sequence[str],
        *,
        tty: bool = False,
        merge: bool = False,
        connects: bool = False,
        inside: ExecContext | None = None,
    ) -> None:
        """`merge`: stdout and stderr are one stream. `connects`: instead of a program, `command` names a socket
        inside, and `stdin` becomes a connection to it. `inside`: what the command gets, by default what is the
        task's. Raises ConfigError for a bad command."""
        if not command:
            raise ConfigError("command", list(command), "must name a program")
        if any("\0" in word for word in command):
            raise ConfigError("command", list(command), "must not hold a NUL character")
        self.server, self.state, self.ended = server, state, ended  # of the task
        self.command, self.tty, self.merge, self.connects, self.inside = command, tty, merge, connects, inside
        self.report = -1  # the pipe from which `reported` is read
        self.reported = b""
        self.entry: ProcessId | None = None  # the parent of the command
        self.leaf = ""  # the command's own cgroup, "" before the entry may make it
        self.stdin = -1
        self.outputs: dict[str, int] = {}
        self.size = (24, 80)
        self.started = asyncio.Event()
        self.over = asyncio.Event()
        self.waits: set[asyncio.Event] = set()
        self.status = -int(signal.SIGKILL)  # unless the entry reports another one
        self.error = ""  # why the command could not be executed
        self.failure = ""  # why no command was started, or why its end is not known

    async def start(self) -> None:
        """Return when the command has been forked. Raises DriverError or OSError."""
        with DESCRIPTORS.reserve(EXEC_DESCRIPTORS, "the command cannot be started"):
            leader = self.state.leader
            process = leader.open() if leader else None
            if leader is None or process is None or self.ended.is_set():
                raise DriverError(f"task {quote(self.state.task_id)} has ended: nothing can be executed in it")
            try:
                await self.wait_confined(leader)
                with await self.server.connect() as control:
                    await self.enter(control, leader.pid, process)
            finally:
                os.close(process)
        await self.wait_output(self.report)
        if not self.read_report().startswith(b"+"):
            raise self.explain_failed_start()
        self.started.set()
        if self.entry:
            self.server.run(run_in_thread(functools.partial(leave_cgroup, self.entry.pid)))

    async def enter(self, control: socket.socket, leader: int, process: int) -> None:
        """Let the entry enter and start the command. `close` knows it before it gets its plan."""
        number, _ = await receive_fds(control)
        entry = self.server.find_entry(int(number)) if number.isdigit() else None
        pidfd = entry.open() if entry else None
        if pidfd is None:
            raise self.explain_failed_start(number.decode())
        self.entry = entry
        self.server.run(self.follow(pidfd))
        try:
            inside = self.inside or read_exec_context(self.state.directory)
            plan = plan_entry(leader, self.state.cgroup, inside, self.command)
        except (HostError, OSError, KeyError, ValueError) as error:  # most likely the task has ended
            if isinstance(error, OSError):
                check_shortage(error)
            raise self.explain_failed_start(str(error)) from None
        if plan["cgroups"]:
            self.leaf = f"{plan['cgroups'][0]}/{LEAF}{number.decode()}"
        self.report, report = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with open(os.memfd_create("plan"), "w+b", buffering=0) as file:
                streams = {"tty": self.tty, "merge": self.merge, "connects": self.connects}
                file.write(marshal.dumps({**plan, **streams}))
                file.seek(0)
                await send_fds(control, b"+", [file.fileno(), process, report])
        finally:
            os.close(report)
        _, descriptors = await receive_fds(control, 3)
        if descriptors:
            self.receive_stdio(descriptors)
            with contextlib.suppress(ConnectionError):  # the entry has ended: `start` finds out
                control.send(b"+")

    async def wait_confined(self, leader: ProcessId) -> None:
        """Wait until nspawn has confined the container's first process. It says READY before that (257 and later
        well before), and a command would get rights that the payload never has. Raises DriverError."""
        for _ in range(1000):
            # Its program may be on a file system of the container's own, which need not answer.
            if await run_in_thread(lambda: is_confined(leader.pid, self.state.mode)):
                return
            if not leader.is_alive:
                raise DriverError(f"task {quote(self.state.task_id)} has ended")
            await asyncio.sleep(0.01)
        raise self.explain_failed_start("the container is still being set up")

    def explain_failed_start(self, why: str = "") -> DriverError:
        """Return the error for a command that was not started, in the entry's words if it has left any."""
        self.take_end()
        if self.failure:
            return DriverError(self.failure)
        if self.ended.is_set():
            return DriverError(f"task {quote(self.state.task_id)} has ended")
        why = why or f"its helper has ended {self.server.read_errors()}".strip()
        return HostError(f"the command could not be started: {why}")

    def receive_stdio(self, descriptors: Sequence[int]) -> None:
        """Take our ends of the command's streams."""
        for fd in descriptors:
            os.set_blocking(fd, False)
        self.stdin = descriptors[0]
        self.outputs = dict(zip(("stdout", "stderr"), descriptors[1:] or descriptors, strict=False))
        self.resize(*self.size)

    def resize(self, height: int, width: int) -> None:
        """Set the terminal's size; before there is one, the size it will have."""
        self.size = (height, width)
        if self.tty and self.stdin >= 0:
            packed = struct.pack("HHHH", *(min(max(number, 0), 0xFFFF) for number in self.size), 0, 0)
            with contextlib.suppress(OSError):
                fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, packed)

    async def follow(self, pidfd: int) -> None:
        """Wait for the end of the entry, which nobody in the container can delay, and set `over`."""
        try:
            await wait_readable(pidfd)
        finally:
            os.close(pidfd)
            for event in (self.over, *self.waits):
                event.set()

    def read_report(self) -> bytes:
        """Return what the entry has reported so far: "+" when it has forked the command, then the end: its
        status and a shell's words, or "!" and why there is none."""
        with contextlib.suppress(OSError):
            self.reported += os.read(self.report, 1 << 16)
        return self.reported

    def take_end(self) -> None:
        """Note the end that the entry has reported. Without one, the command counts as killed."""
        with contextlib.suppress(ValueError):  # there is none, or others may have written into the pipe
            status, _, words = self.read_report().lstrip(b"+").decode(errors="replace").partition(" ")
            if status == "!":
                self.failure = words
            else:
                self.status, self.error = int(status), render_line(words)

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """Yield what the command writes until it ends, even if others still hold its pipe or terminal."""
        fd, rest = self.outputs[name], MAX_REST
        while rest > 0:
            is_over = self.over.is_set()  # asked before reading: nothing written before the end is missed
            try:
                data = os.read(fd, CHUNK)
            except BlockingIOError:
                if is_over:
                    return
                await self.wait_output(fd)
                continue
            except OSError:  # EIO: nobody has the terminal open any more
                return
            if not data:
                return
            yield data
            rest -= len(data) if is_over else 0

    async def wait_output(self, fd: int) -> None:
        """Wait until there is something to read or the command has ended."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        if self.over.is_set():
            return
        loop.add_reader(fd, ready.set)
        self.waits.add(ready)
        try:
            await ready.wait()
        finally:
            self.waits.discard(ready)
            loop.remove_reader(fd)

    async def write(self, data: bytes) -> None:
        """Write to the command's stdin. Drops the data if nobody can read it any more."""
        view = memoryview(data)
        while view and self.stdin >= 0:
            try:
                view = view[os.write(self.stdin, view) :]
            except BlockingIOError:
                await wait_writable(self.stdin)
            except OSError:
                return

    async def end_stdin(self) -> None:
        """Close stdin; at a terminal, type Ctrl-D."""
        if self.tty:
            await self.write(b"\x04")
        elif self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    async def wait(self) -> int:
        """Wait for the end. Return the exit code, or minus the signal's number. Raises DriverError if unknown."""
        await self.over.wait()
        self.take_end()
        if self.failure:
            raise DriverError(self.failure)
        return self.status

    def close(self) -> None:
        """Close the streams. If the command has not ended, kill it in the background."""
        if self.entry and not self.over.is_set():
            self.server.run(self.kill())
        elif self.leaf:
            self.server.run(self.server.remove_leaf(self.leaf))
        for fd in {self.report, self.stdin, *self.outputs.values()} - {-1}:
            os.close(fd)
        self.report, self.stdin, self.outputs = -1, -1, {}

    async def kill(self) -> None:
        """End the command and all that it has started: SIGHUP for its session and their descendants, and soon
        after SIGKILL for all in its cgroup. Tries it until the host has what that takes."""
        while True:
            try:
                await self.try_to_kill()
                return
            except OSError as error:
                if not is_shortage(error) or self.over.is_set():
                    raise
                await asyncio.sleep(HANG_UP)

    async def try_to_kill(self) -> None:
        if self.entry is None:
            return
        command = next(iter(find_children(self.entry)), NO_PROCESS)
        if command.pid:
            # In a thread: a container may have many processes.
            await run_in_thread(lambda: self.send(command.pid, signal.SIGHUP))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.over.wait(), HANG_UP)
        for _ in range(10):  # finds what was forked meanwhile
            if not await run_in_thread(lambda: self.send_kill(command.pid)):
                break
            await asyncio.sleep(0.01)
        self.entry.send(signal.SIGKILL)
        if self.leaf:
            await self.server.remove_leaf(self.leaf)

    def send_kill(self, root: int) -> bool:
        """Kill the command, its session, their descendants, and all in its cgroup. Return False if there are none,
        or if the kernel has done it. Blocks."""
        found = [] if kill_cgroup(self.leaf) else read_cgroup_processes(self.leaf)
        is_found = any([process.send(signal.SIGKILL) for process in found])
        return (self.send(root, signal.SIGKILL) if root else False) or is_found

    def send(self, root: int, number: int) -> bool:
        """Signal the command, its session and their descendants. Return False if there are none. Blocks."""
        state = self.state
        found = read_cgroup_pids(f"{state.cgroup}/payload")
        if not self.over.is_set():
            found += read_descendants(root)
        return any([process.send(number) for process in find_session(root, found)])


HANG_UP = 0.3  # seconds from SIGHUP to SIGKILL


def read_exec_context(directory: Path) -> ExecContext:
    """Return what commands of a task get, from the state directory, which only root can read. Nomad's handle lacks
    the job's variables after a restart of the agent, and the payload can change what /proc shows of its own.
    Raises HostError, OSError or ValueError: without this nobody knows which user a command may run as."""
    try:
        values = json.loads((directory / "inside.json").read_text(), object_hook=tuples)
    except FileNotFoundError:
        raise HostError(f"what it needs was removed from {directory}; restart the task") from None
    try:
        account = values.pop("account", None)
        return ExecContext(**values, account=Account(**account) if account else None)
    except (AttributeError, TypeError):
        raise ValueError(f"{directory}/inside.json is damaged") from None
