# SPDX-License-Identifier: MPL-2.0
"""A further command in a running container: its entry (see enter.py), its streams and its end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import termios
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from nspawn.cgroup import (
    find_cgroups,
    find_own_cgroups,
    read_cgroup_pids,
    read_descendants,
    write_control,
)
from nspawn.common import SAFE_PATH, ConfigError, DriverError, HostError, render_line, tuples
from nspawn.files import read_text
from nspawn.host import Mounts, read_mounts
from nspawn.images import Account
from nspawn.job import Mode
from nspawn.linux import enter_namespace, make_read_only
from nspawn.plan import DEFAULT_PATH, Inside
from nspawn.process import (
    NO_PROCESS,
    ProcessId,
    find_children,
    read_children,
    read_stat,
    read_status,
    run_in_thread,
    start_process,
    wait_readable,
    wait_writable,
)
from nspawn.state import State

T = TypeVar("T")

# Read when the plugin starts: the directory with the plugin's code may have been removed when it is needed.
ENTER = Path(__file__).with_name("enter.py").read_bytes()
HELPER_PATIENCE = 30.0  # seconds without a command after which the helper ends


def find_mounts_of_python(mounts: Mounts, maps: str) -> list[str]:
    """Return the mount points above the interpreter and its libraries; `maps` is /proc/self/maps."""
    files = {line[line.index("/") :] for line in maps.splitlines() if "/" in line}
    needed = {os.path.realpath(path) for path in (*files, sys.executable, os.__file__)}
    points = {point for point, _ in mounts.points}
    return sorted(points & {str(parent) for path in needed for parent in Path(path).parents})


def start_helper(requests: socket.socket, errors: int) -> ProcessId:
    """Start the program that enters. A container may see for a moment what it was started from: that is read-only
    in a mount namespace of the helper's own, where this leaves its thread."""
    enter_namespace()
    for point in find_mounts_of_python(read_mounts(), read_text(Path("/proc/self/maps"))):
        make_read_only(point)
    with open(os.memfd_create("enter"), "wb", buffering=0) as program:
        program.write(ENTER)
        return start_process(
            [sys.executable, "-IS", f"/proc/self/fd/{program.fileno()}", "nomad-nspawn-enter"],  # a name for ps
            environ={"PATH": SAFE_PATH, "LANG": "C.UTF-8"},
            stdin=requests.fileno(),
            stdout=errors,
            stderr=errors,
            pass_fds=[program.fileno()],
        )


class Helper:
    """The process that forks an entry for each command; started when it is needed, ended when it has been idle."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.process = NO_PROCESS
        self.errors = -1  # what it writes to stderr
        self.timer: asyncio.TimerHandle | None = None
        self.starting: asyncio.Task[socket.socket] | None = None
        self.background: set[asyncio.Task[Any]] = set()

    def run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something that no end of a call interrupts."""
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # somebody may have gone away
        return task

    async def connect(self) -> socket.socket:
        """Return a connection to a new entry, which ends when it is closed before the plan is sent."""
        self.rest()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                await self.request(theirs.fileno())
            except ConnectionError:  # it was killed
                self.close()
                await self.request(theirs.fileno())
        return ours

    async def request(self, connection: int) -> None:
        if self.starting is None:
            self.starting = self.run(self.start())
        requests = await asyncio.shield(self.starting)
        await send_fds(requests, b"+", [connection])

    async def start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.errors = os.memfd_create("errors")
        try:
            with theirs:
                self.process = await run_in_thread(lambda: start_helper(theirs, self.errors))
        except BaseException:
            self.close()
            raise
        self.run(self.process.wait())
        self.socket = ours
        return ours

    def rest(self) -> None:
        """Have the process there for a while from now on, and longer while commands run: they end with it."""
        if self.timer:
            self.timer.cancel()
        self.timer = asyncio.get_running_loop().call_later(HELPER_PATIENCE, self.end)

    def end(self) -> None:
        if read_children(self.process.pid):
            self.rest()
        else:
            self.close()

    def close(self) -> None:
        if self.socket:
            self.socket.close()
        if self.errors >= 0:
            os.close(self.errors)
        self.starting, self.socket, self.errors = None, None, -1

    def find_entry(self, pid: int) -> ProcessId | None:
        """Return a child of the process; None when it has ended."""
        fields = read_stat(pid)
        return ProcessId.of(pid) if fields and int(fields[1]) == self.process.pid else None

    def read_errors(self) -> str:
        return os.pread(self.errors, 1000, 0).decode(errors="replace").strip() if self.errors >= 0 else ""


async def send_fds(connection: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    while True:
        try:
            socket.send_fds(connection, [data], descriptors)
            return
        except BlockingIOError:
            await wait_writable(connection.fileno())


async def receive_fds(connection: socket.socket, count: int = 0) -> tuple[bytes, list[int]]:
    """Return a message and up to `count` descriptors in it; b"" is the end."""
    await wait_readable(connection.fileno())
    try:
        return socket.recv_fds(connection, 100, count, socket.MSG_CMSG_CLOEXEC)[:2]
    except ConnectionError:
        return b"", []


NAMESPACES = {
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "mnt": 0x00020000,
}


def find_namespaces(pid: int) -> int:
    """Return the flags of the namespaces in which a process is and this one is not."""

    def differs(name: str) -> bool:
        return os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")

    return sum(flag for name, flag in NAMESPACES.items() if differs(name))


def parse_limits(text: str) -> list[tuple[int, int]]:
    """Return the soft and hard limits in /proc/PID/limits, which are in the order of their numbers. To ask the
    kernel for them would need CAP_SYS_RESOURCE."""
    columns = [(line[26:46].strip(), line[47:67].strip()) for line in text.rstrip("\n").split("\n")[1:]]
    values = [[resource.RLIM_INFINITY if limit == "unlimited" else int(limit) for limit in row] for row in columns]
    return [(soft, hard) for soft, hard in values]


def plan_entry(leader: int, cgroup: str, inside: Inside, command: Sequence[str]) -> dict[str, Any]:
    """Return what an entry makes of itself: what the container's first process is, and the task's surroundings.
    Raises HostError when that process is not in the task's cgroup, for a command would run without its limits.
    Raises OSError, KeyError or ValueError when that process has ended."""
    status = read_status(leader)
    cgroups = find_cgroups(leader, f"{cgroup}/payload" if cgroup else "")
    if cgroup and not cgroups:
        raise HostError(f"the container's first process is not in {cgroup}/payload, where a command has to be")
    return {
        "leader": leader,
        "cgroups": cgroups,
        "limits": parse_limits(read_text(Path(f"/proc/{leader}/limits"))),
        "oom_score_adj": Path(f"/proc/{leader}/oom_score_adj").read_text(),
        "namespaces": find_namespaces(leader),
        "personality": int(read_text(Path(f"/proc/{leader}/personality")), 16),
        "bounding": int(status["CapBnd"], 16),
        "inheritable": int(status["CapInh"], 16),
        "ambient": int(status["CapAmb"], 16),
        "no_new_privs": status["NoNewPrivs"] == "1",
        "has_seccomp": status["Seccomp"] == "2",
        "user": inside.user,
        "account": asdict(inside.account) if inside.account else None,
        "directory": inside.directory,
        "env": dict(inside.variables),
        "argv": list(command),
    }


def leave_cgroup(entry: int) -> None:
    """Take an entry back to the plugin's cgroup once its command is there: the task's limits are not for it."""
    for place in find_own_cgroups():
        with contextlib.suppress(OSError):
            write_control(Path(place, "cgroup.procs"), str(entry))


def find_session(root: int, pids: Sequence[int]) -> list[ProcessId]:
    """Return those processes that descend from `root` or are in the session it leads."""
    stats = {pid: fields for pid in pids if (fields := read_stat(pid)) and fields[0] not in ("Z", "X")}
    found = {pid for pid, fields in stats.items() if root in (pid, int(fields[3]))}
    while more := {pid for pid, fields in stats.items() if int(fields[1]) in found} - found:
        found |= more
    return [ProcessId(pid, int(stats[pid][19])) for pid in sorted(found)]


def is_confined(leader: int, mode: Mode) -> bool:
    """Tell whether nspawn has done with a container's first process: it has executed the payload, or become the
    stub, which is nspawn's own program under another name."""
    if mode is Mode.PROCESS_TWO:
        return read_text(Path(f"/proc/{leader}/comm")).startswith("(sd-stubinit")
    nspawn = shutil.which("systemd-nspawn", path=SAFE_PATH)
    try:
        return not nspawn or not os.path.samefile(f"/proc/{leader}/exe", nspawn)
    except OSError:  # it has ended
        return False


CHUNK = 64 << 10  # bytes: what a pipe holds
MAX_REST = 256 << 10  # bytes read after the command's end: more than its pipe or terminal may hold by then


class Exec:
    """One command in a running container."""

    def __init__(
        self,
        helper: Helper,
        state: State,
        ended: asyncio.Event,
        command: Sequence[str],
        *,
        tty: bool = False,
        merge: bool = False,
    ) -> None:
        """`merge`: stdout and stderr come as one."""
        if not command:
            raise ConfigError("command", list(command), "must name a program")
        if any("\0" in word for word in command):
            raise ConfigError("command", list(command), "must not hold a NUL character")
        self.helper, self.state, self.ended = helper, state, ended  # of the task
        self.command, self.tty, self.merge = command, tty, merge
        self.report = -1  # the pipe of `reported`
        self.reported = b""
        self.entry: ProcessId | None = None  # the parent of the command
        self.stdin = -1
        self.outputs: dict[str, int] = {}
        self.size = (24, 80)
        self.started = asyncio.Event()
        self.over = asyncio.Event()
        self.waits: set[asyncio.Event] = set()
        self.status = -int(signal.SIGKILL)  # as long as the entry has not said anything else
        self.error = ""  # why the command could not be executed
        self.failure = ""  # why there was no command, or nobody knows how it ended

    async def start(self) -> None:
        """Return when the command is there; raise DriverError when it cannot be."""
        leader = self.state.leader
        process = leader.open() if leader else None
        if leader is None or process is None or self.ended.is_set():
            raise DriverError(f"task {self.state.task_id} has ended: nothing can be executed in it")
        try:
            await self.wait_confined(leader)
            with await self.helper.connect() as control:
                await self.enter(control, leader.pid, process)
        finally:
            os.close(process)
        await self.wait_output(self.report)
        if not self.read_report().startswith(b"+"):
            raise self.explain_silence()
        self.started.set()
        if self.entry and self.state.cgroup:
            self.helper.run(run_in_thread(functools.partial(leave_cgroup, self.entry.pid)))

    async def enter(self, control: socket.socket, leader: int, process: int) -> None:
        """Have the entry enter and begin the command. From the plan on `close` knows it and can end it."""
        number, _ = await receive_fds(control)
        entry = self.helper.find_entry(int(number)) if number.isdigit() else None
        pidfd = entry.open() if entry else None
        if pidfd is None:
            raise self.explain_silence(number.decode())
        self.entry = entry
        self.helper.run(self.follow(pidfd))
        try:
            plan = plan_entry(leader, self.state.cgroup, read_inside(self.state.directory), self.command)
        except (OSError, KeyError, ValueError) as error:  # the task's end, most likely
            raise self.explain_silence(str(error)) from None
        self.report, report = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with open(os.memfd_create("plan"), "w+b", buffering=0) as file:
                file.write(json.dumps({**plan, "tty": self.tty, "merge": self.merge}).encode())
                file.seek(0)
                await send_fds(control, b"+", [file.fileno(), process, report])
        finally:
            os.close(report)
        _, descriptors = await receive_fds(control, 3)
        if descriptors:
            self.take_stdio(descriptors)
            with contextlib.suppress(ConnectionError):  # its end is told soon
                control.send(b"+")

    async def wait_confined(self, leader: ProcessId) -> None:
        """Return when the container's first process is no more nspawn on its way to be confined: nspawn says READY
        before that (257 and later well before), and a command would get rights that the payload never has."""
        for _ in range(1000):
            # Its program may lie on a file system of the container's own, which need not answer.
            if await run_in_thread(lambda: is_confined(leader.pid, self.state.mode)):
                return
            if not leader.is_alive:
                raise DriverError(f"task {self.state.task_id} has ended")
            await asyncio.sleep(0.01)
        raise self.explain_silence("the container is still being set up")

    def explain_silence(self, why: str = "") -> DriverError:
        """Say why there is no command: in the entry's words, if it has left any."""
        self.take_end()
        if self.failure:
            return DriverError(self.failure)
        if self.ended.is_set():
            return DriverError(f"task {self.state.task_id} has ended")
        why = why or f"its helper has ended {self.helper.read_errors()}".strip()
        return HostError(f"the command could not be started: {why}")

    def take_stdio(self, descriptors: Sequence[int]) -> None:
        """Take the other ends of the command's streams."""
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
        """Wait for the entry, which nobody in the container can hold up, and tell its end."""
        try:
            await wait_readable(pidfd)
        finally:
            os.close(pidfd)
            for event in (self.over, *self.waits):
                event.set()

    def read_report(self) -> bytes:
        """Return what the entry has reported by now: "+" when the command is there, and how it ended as JSON."""
        with contextlib.suppress(OSError):
            self.reported += os.read(self.report, 1 << 16)
        return self.reported

    def take_end(self) -> None:
        """Note the end that the entry has reported: without one the command counts as killed."""
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # others may have written into the pipe
            end = json.loads(self.read_report().lstrip(b"+"))
            self.status, self.error = int(end.get("status", self.status)), render_line(end.get("words", ""))
            self.failure = end.get("error", "")

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """Yield what the command writes until it has ended, whoever else holds its pipe or terminal."""
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
            except OSError:  # EIO: nobody has the terminal any more
                return
            if not data:
                return
            yield data
            rest -= len(data) if is_over else 0

    async def wait_output(self, fd: int) -> None:
        """Return when there is something to read, or the command has ended."""
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
        """Write to the command's stdin; what nobody reads any more is thrown away."""
        view = memoryview(data)
        while view and self.stdin >= 0:
            try:
                view = view[os.write(self.stdin, view) :]
            except BlockingIOError:
                await wait_writable(self.stdin)
            except OSError:
                return

    async def end_stdin(self) -> None:
        """Close stdin; at a terminal, type what means the end."""
        if self.tty:
            await self.write(b"\x04")
        elif self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    async def wait(self) -> int:
        """Return the exit code, or minus the signal's number, after the command's end."""
        await self.over.wait()
        self.take_end()
        if self.failure:
            raise DriverError(self.failure)
        return self.status

    def close(self) -> None:
        """Give up what there is of the command: nothing at all when it has ended by itself."""
        if self.entry and not self.over.is_set():
            self.helper.run(self.kill())
        for fd in {self.report, self.stdin, *self.outputs.values()} - {-1}:
            os.close(fd)
        self.report, self.stdin, self.outputs = -1, -1, {}

    async def kill(self) -> None:
        """End the command and all it has started: a hang-up, and soon after SIGKILL."""
        if self.entry is None:
            return
        command = next(iter(find_children(self.entry)), NO_PROCESS)
        if command.pid:
            await run_in_thread(
                lambda: self.send(command.pid, signal.SIGHUP)
            )  # a container may have many processes
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.over.wait(), HANG_UP)
            for _ in range(10):  # what was just being forked is found the next time
                if not await run_in_thread(lambda: self.send(command.pid, signal.SIGKILL)):
                    break
                await asyncio.sleep(0.01)
        self.entry.send(signal.SIGKILL)

    def send(self, root: int, number: int) -> bool:
        """Send a signal to all there is of a command; False when there is nothing."""
        state = self.state
        leader = state.leader.pid if state.leader else 0
        found = read_cgroup_pids(f"{state.cgroup}/payload") if state.cgroup else read_descendants(leader)
        if not self.over.is_set():
            found += read_descendants(root)
        return any([process.send(number) for process in find_session(root, found)])


HANG_UP = 0.3  # seconds from SIGHUP to SIGKILL


async def settle(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have taken notice."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def read_inside(directory: Path) -> Inside:
    """Return the surroundings of a task's commands, which stand in its state directory, root's alone: Nomad's
    handle does not hold the job's own variables after a restart of the agent, and the payload can change what
    /proc shows of its own."""
    try:
        values = json.loads((directory / "inside.json").read_text(), object_hook=tuples)
        account = values.pop("account", None)
        return Inside(**values, account=Account(**account) if account else None)
    except (OSError, ValueError, TypeError):
        return Inside(variables={"PATH": DEFAULT_PATH})
