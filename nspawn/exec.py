# SPDX-License-Identifier: MPL-2.0
"""One command in a running container: its entry (see enter.py), its streams and its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import importlib.util
import json
import marshal
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
from importlib.abc import InspectLoader
from pathlib import Path
from typing import Any, TypeVar

from nspawn.cgroup import (
    find_cgroups,
    find_own_cgroups,
    kill_cgroup,
    read_cgroup_pids,
    read_cgroup_processes,
    read_descendants,
    write_control,
)
from nspawn.common import (
    SAFE_PATH,
    ConfigError,
    DriverError,
    HostError,
    check_shortage,
    is_shortage,
    quote,
    render_line,
    tuples,
)
from nspawn.files import read_text
from nspawn.host import Mounts, read_mounts
from nspawn.images import Account
from nspawn.job import Mode
from nspawn.linux import enter_namespace, make_read_only
from nspawn.plan import ExecContext
from nspawn.process import (
    DESCRIPTORS,
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


def read_program() -> bytes:
    """Return enter.py as a compiled file, which a Python of the same version runs at once."""
    spec = importlib.util.find_spec("nspawn.enter")
    assert spec and isinstance(spec.loader, InspectLoader)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(spec.loader.get_code(spec.name))


# Read when the plugin starts: later the directory with the plugin's code may have been removed.
ENTER = read_program()
EXEC_DESCRIPTORS = 12  # that the start of a command has open at a time; afterwards it has up to six
IDLE_LIMIT = 30.0  # seconds without a command after which the helper ends


def find_mounts_of_python(mounts: Mounts, maps: str) -> list[str]:
    """Return the mount points that hold the interpreter and its libraries; `maps` is /proc/self/maps."""
    files = {line[line.index("/") :] for line in maps.splitlines() if "/" in line}
    needed = {os.path.realpath(path) for path in (*files, sys.executable, os.__file__)}
    points = {point for point, _ in mounts.points}
    return sorted(points & {str(parent) for path in needed for parent in Path(path).parents})


def start_exec_server(requests: socket.socket, errors: int) -> ProcessId:
    """Start enter.py. For a moment a container may see the files that run it. So they are read-only in a new mount
    namespace, where the calling thread stays: for `run_in_thread`. Raises OSError."""
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


class ExecServer:
    """The server that forks an entry for each command. It starts with the first command and ends when idle."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.process = NO_PROCESS
        self.errors = -1  # a memfd with what it writes to stdout and stderr
        self.timer: asyncio.TimerHandle | None = None
        self.starting: asyncio.Task[socket.socket] | None = None
        self.background: set[asyncio.Task[Any]] = set()
        self.leaves: list[str] = []  # cgroups of ended commands that had processes when last looked at

    def run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something in the background, where the end of a call does not cancel it."""
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # the caller may have gone away
        return task

    async def connect(self) -> socket.socket:
        """Return a connection to a new entry. If it is closed before the plan is sent, the entry ends. Raises
        OSError."""
        self.rest()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                await self.request(theirs.fileno())
            except ConnectionError:  # the server was killed
                self.close()
                await self.request(theirs.fileno())
        return ours

    async def request(self, connection: int) -> None:
        if self.starting is None:
            self.starting = self.run(self.start())
        starting = self.starting
        try:
            requests = await asyncio.shield(starting)
        except Exception:
            if self.starting is starting:  # the next command tries again
                self.starting = None
            raise
        await send_fds(requests, b"+", [connection])

    async def start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                self.errors = os.memfd_create("errors")
                self.process = await run_in_thread(lambda: start_exec_server(theirs, self.errors), is_own=True)
        except BaseException:
            ours.close()
            self.close()
            raise
        self.socket = ours
        return ours

    def rest(self) -> None:
        """Keep the server for IDLE_LIMIT seconds, and longer while commands run: they would end with it."""
        if self.timer:
            self.timer.cancel()
        self.timer = asyncio.get_running_loop().call_later(IDLE_LIMIT, self.end)

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

    async def remove_leaf(self, leaf: str) -> None:
        """Remove the cgroup of a command that has ended, and some that could not be removed before. DestroyTask
        removes what is left then."""
        left, self.leaves = [leaf, *self.leaves[:MAX_LEAVES]], self.leaves[MAX_LEAVES:]
        for pause in (0.02, 0.1, 0.5, 0):  # what was killed takes a moment to go
            left = await run_in_thread(functools.partial(remove_leaves, left))
            if not left:
                return
            await asyncio.sleep(pause)
        self.leaves += left

    def find_entry(self, pid: int) -> ProcessId | None:
        """Return a child of the server, None if it has ended. Raises OSError."""
        fields = read_stat(pid)
        return ProcessId.of(pid) if fields and int(fields[1]) == self.process.pid else None

    def read_errors(self) -> str:
        return os.pread(self.errors, 1000, 0).decode(errors="replace").strip() if self.errors >= 0 else ""


MAX_LEAVES = 100  # that are tried again at the end of each command


async def send_fds(connection: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    while True:
        try:
            socket.send_fds(connection, [data], descriptors)
            return
        except BlockingIOError:
            await wait_writable(connection.fileno())


async def receive_fds(connection: socket.socket, count: int = 0) -> tuple[bytes, list[int]]:
    """Wait for a message. Return it with its descriptors, at most `count`; b"" is the end. Raises OSError."""
    await wait_readable(connection.fileno())
    try:
        data, descriptors, flags, _ = socket.recv_fds(connection, 100, count, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return b"", []
    if flags & socket.MSG_CTRUNC:  # the kernel gives no error for this
        for fd in descriptors:
            os.close(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return data, descriptors


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
    """Return the flags of the namespaces in which a process is and this one is not. Raises OSError."""

    def differs(name: str) -> bool:
        return os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")

    return sum(flag for name, flag in NAMESPACES.items() if differs(name))


def parse_limits(text: str) -> list[tuple[int, int]]:
    """Return the soft and hard limits from /proc/PID/limits, in the order of their numbers. prlimit(2) would need
    CAP_SYS_RESOURCE."""
    columns = [(line[26:46].strip(), line[47:67].strip()) for line in text.rstrip("\n").split("\n")[1:]]
    values = [[resource.RLIM_INFINITY if limit == "unlimited" else int(limit) for limit in row] for row in columns]
    return [(soft, hard) for soft, hard in values]


def plan_entry(leader: int, cgroup: str, inside: ExecContext, command: Sequence[str]) -> dict[str, Any]:
    """Return the attributes of the container's first process and of the task that an entry takes over. Raises
    HostError if that process is not in the task's cgroup, where a command must run to have its limits. If the
    process has ended, raises HostError, OSError, KeyError or ValueError."""
    status = read_status(leader)
    cgroups = find_cgroups(leader, f"{cgroup}/payload")
    if cgroup and not cgroups:
        raise HostError(f"the container's first process is not in {cgroup}/payload, where a command has to be")
    return {
        "leader": leader,
        "cgroups": cgroups,
        "leaf": LEAF,
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


LEAF = "nomad-exec-"  # and the pid of the entry: the name of a command's own cgroup


def remove_leaves(leaves: Sequence[str]) -> list[str]:
    """Remove the cgroups of commands; return those that still have processes, which a command has left on purpose.
    Blocks."""
    left = []
    for leaf in leaves:
        try:
            os.rmdir(leaf)
        except FileNotFoundError:
            continue
        except OSError:
            left.append(leaf)
    return left


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
    nspawn = shutil.which("systemd-nspawn", path=SAFE_PATH)
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
        inside: ExecContext | None = None,
    ) -> None:
        """`merge`: stdout and stderr are one stream. `inside`: what the command gets, by default what is the
        task's. Raises ConfigError for a bad command."""
        if not command:
            raise ConfigError("command", list(command), "must name a program")
        if any("\0" in word for word in command):
            raise ConfigError("command", list(command), "must not hold a NUL character")
        self.server, self.state, self.ended = server, state, ended  # of the task
        self.command, self.tty, self.merge, self.inside = command, tty, merge, inside
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
                file.write(marshal.dumps({**plan, "tty": self.tty, "merge": self.merge}))
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
