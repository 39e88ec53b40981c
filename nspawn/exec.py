# SPDX-License-Identifier: MPL-2.0
"""A further command in a running container: the process that enters, its request, its streams and its end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
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
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from nspawn.cgroup import find_cgroups, read_cgroup_pids, read_descendants, write_control
from nspawn.common import SAFE_PATH, ConfigError, DriverError, HostError, log, render_line, tuples
from nspawn.files import read_text
from nspawn.host import Mounts, read_mounts
from nspawn.images import Account
from nspawn.job import Mode
from nspawn.plan import DEFAULT_PATH, Inside
from nspawn.process import (
    ProcessId,
    read_children,
    read_inner_pid,
    read_stat,
    read_status,
    run_apart,
    start_process,
    wait_readable,
    wait_writable,
)
from nspawn.state import State

T = TypeVar("T")

# Read when the plugin starts: the directory with the plugin's code may have been removed when it is needed.
ENTER = Path(__file__).with_name("enter.py").read_bytes()
# Arguments: mount points to make read-only, "--", then the command. Nobody else is in this mount namespace.
HELPER_MOUNTS = 'while [ "$1" != -- ]; do mount -o remount,bind,ro "$1" || exit; shift; done; shift; exec "$@"'
HELPER_PATIENCE = 30.0  # seconds without an exec after which the helper ends


def open_entry() -> int:
    """Return a file with the program that enters."""
    fd = os.memfd_create("enter")
    os.write(fd, ENTER)
    return fd


def find_mounts_of_python(mounts: Mounts, maps: str) -> list[str]:
    """Return the mount points above the interpreter and its libraries; `maps` is /proc/self/maps."""
    files = {line[line.index("/") :] for line in maps.splitlines() if "/" in line}
    needed = {os.path.realpath(path) for path in (*files, sys.executable, os.__file__)}
    points = {point for point, _ in mounts.points}
    return sorted(points & {str(parent) for path in needed for parent in Path(path).parents})


class Helper:
    """The process that forks for each command; started when it is needed, ended when it has been idle."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.errors = -1  # what it writes to stderr
        self.timer: asyncio.TimerHandle | None = None
        self.background: set[asyncio.Task[Any]] = set()
        self.entering: list[Exec] = []
        self.commands: set[int] = set()  # the children that are waited for

    def run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something that no end of a call interrupts."""
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # somebody may have gone away
        return task

    def wake(self) -> None:
        """Have the process there, for a while from now on."""
        if self.timer:
            self.timer.cancel()
        self.timer = asyncio.get_running_loop().call_later(HELPER_PATIENCE, self.close)
        if self.socket is None:
            self.start()

    async def connect(self) -> socket.socket:
        """Return a connection to a new process that enters one container."""
        self.wake()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with theirs:
            try:
                await send_fds(self.socket, b"+", [theirs.fileno()])
            except ConnectionError:  # it was killed
                self.close()
                self.start()
                await send_fds(self.socket, b"+", [theirs.fileno()])
        return ours

    def start(self) -> None:
        points = find_mounts_of_python(read_mounts(), read_text(Path("/proc/self/maps")))
        argv = ["unshare", "--mount", "--propagation=slave", "--", "sh", "-c", HELPER_MOUNTS, "sh", *points, "--"]
        entry = open_entry()
        argv += [sys.executable, "-IS", f"/proc/self/fd/{entry}", "nomad-nspawn-enter"]  # a name for ps
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.errors = os.memfd_create("errors")
        environ = {"PATH": SAFE_PATH, "LANG": "C.UTF-8"}
        with theirs:
            process = start_process(
                argv,
                environ=environ,
                stdin=theirs.fileno(),
                stdout=self.errors,
                stderr=self.errors,
                pass_fds=[entry],
            )
        os.close(entry)
        self.run(process.wait())

    def read_errors(self) -> str:
        return os.pread(self.errors, 1000, 0).decode(errors="replace").strip() if self.errors >= 0 else ""

    def close(self) -> None:
        if self.socket:
            self.socket.close()
            os.close(self.errors)
        self.socket, self.errors = None, -1


async def send_fds(connection: socket.socket | None, data: bytes, descriptors: Sequence[int]) -> None:
    assert connection
    while True:
        try:
            socket.send_fds(connection, [data], descriptors)
            return
        except BlockingIOError:
            await wait_writable(connection.fileno())


async def receive_message(connection: socket.socket) -> tuple[bytes, list[int], int]:
    """Return a message, the descriptors in it and the sender's pid, which the kernel attests; b"" is the end."""
    size = socket.CMSG_SPACE(12) + socket.CMSG_SPACE(12)
    while True:
        try:
            data, ancillary, _, _ = connection.recvmsg(4096, size, socket.MSG_CMSG_CLOEXEC)
            break
        except BlockingIOError:
            await wait_readable(connection.fileno())
        except ConnectionError:
            return b"", [], 0
    descriptors: list[int] = []
    sender = 0
    for _, kind, packed in ancillary:
        numbers = struct.unpack(f"{len(packed) // 4}i", packed[: len(packed) // 4 * 4])
        if kind == socket.SCM_RIGHTS:
            descriptors = list(numbers)
        elif kind == socket.SCM_CREDENTIALS:
            sender = numbers[0]
    return data, descriptors, sender


NAMESPACES = {
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "mnt": 0x00020000,
}


def plan_entry(status: Mapping[str, str], inside: Inside, command: Sequence[str]) -> dict[str, Any]:
    """Return what Entry makes of itself: what the container's first process is, and the task's surroundings."""

    def encode(text: str) -> bytes:
        return text.encode(errors="surrogateescape")

    return {
        "bounding": int(status["CapBnd"], 16),
        "inheritable": int(status["CapInh"], 16),
        "ambient": int(status["CapAmb"], 16),
        "no_new_privs": status["NoNewPrivs"] == "1",
        "has_seccomp": status["Seccomp"] == "2",
        "user": encode(inside.user),
        "account": asdict(inside.account) if inside.account else None,
        "directory": encode(inside.directory),
        "env": {encode(name): encode(value) for name, value in inside.variables.items()},
        "argv": [encode(word) for word in command],
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


def place_like(pid: int, leader: int, cgroup: str) -> None:
    """Give a process the cgroups and the limits of the container's first one. Raises HostError when that one is
    not in `cgroup`: the command would run without the task's limits."""
    places = find_cgroups(leader, cgroup)
    if cgroup and not places:
        raise HostError(f"the container's first process is not in {cgroup}, where a command has to be")
    for place in places:
        write_control(Path(place, "cgroup.procs"), str(pid))
    for number, limits in enumerate(parse_limits(read_text(Path(f"/proc/{leader}/limits")))):
        resource.prlimit(pid, number, limits)
    Path(f"/proc/{pid}/oom_score_adj").write_text(read_text(Path(f"/proc/{leader}/oom_score_adj")))


def find_session(root: int, pids: Sequence[int]) -> list[ProcessId]:
    """Return those processes that descend from `root` or are in the session it leads."""
    stats = {pid: fields for pid in pids if (fields := read_stat(pid)) and fields[0] not in ("Z", "X")}
    found = {pid for pid, fields in stats.items() if root in (pid, int(fields[3]))}
    while more := {pid for pid, fields in stats.items() if int(fields[1]) in found} - found:
        found |= more
    return [ProcessId(pid, int(stats[pid][19])) for pid in sorted(found)]


def is_zombie(pid: int) -> bool:
    fields = read_stat(pid)
    return fields is not None and fields[0] == "Z"


TRACER_PATIENCE = 2.0  # seconds that a tracer has to take notice of the end of a command
TRACED = "the command has ended, but a process in the container traces it and does not say so"


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
        self.control: socket.socket | None = None
        self.entering: ProcessId | None = None
        self.pid = 0  # of the command
        self.stdin = -1
        self.outputs: dict[str, int] = {}
        self.size = (24, 80)
        self.is_given_up = False
        self.namespace = ""  # of the container's processes
        self.started = asyncio.Event()
        self.over = asyncio.Event()
        self.waits: set[asyncio.Event] = set()
        self.status = 0
        self.error = ""  # why the command could not be executed

    async def start(self) -> None:
        """Return when the command is there; raise DriverError when it cannot be."""
        await asyncio.shield(self.helper.run(self.enter()))

    async def enter(self) -> None:
        """Follow the helper until the command is there. No end of the call interrupts it: a process of which this
        does not hear would stay as a zombie."""
        leader = self.state.leader
        process = leader.open() if leader else None
        if leader is None or process is None or self.ended.is_set():
            raise DriverError(f"task {self.state.task_id} has ended: nothing can be executed in it")
        self.helper.entering.append(self)
        try:
            self.helper.wake()  # while nspawn is at work
            await self.wait_confined(leader)
            self.control = await self.helper.connect()
            while not self.pid:
                message, descriptors, sender = await receive_message(self.control)
                kind, _, text = message.decode(errors="replace").partition(" ")
                if kind == "helper" and self.entering is None:
                    self.reap_helper(sender)
                    await self.brief(sender, leader.pid, process)
                elif kind == "command":
                    self.watch(sender)
                elif self.entering is None or sender != self.entering.pid:
                    raise self.explain_silence()  # its end; or words from inside, whoever may have sent them
                else:
                    self.follow(kind, text, descriptors)
        except BaseException:
            if self.control:
                self.control.close()
            self.helper.run(self.reap_lost())
            raise
        finally:
            self.helper.entering.remove(self)
            os.close(process)
            if self.is_given_up:
                self.close()

    async def wait_confined(self, leader: ProcessId) -> None:
        """Return when the container's first process is no more nspawn on its way to be confined: nspawn says READY
        before that (257 and later well before), and a command would get rights that the payload never has."""
        for _ in range(1000):
            # Its program may lie on a file system of the container's own, which need not answer.
            if await run_apart(lambda: is_confined(leader.pid, self.state.mode)):
                with contextlib.suppress(OSError):  # it ends just now: the helper will tell
                    self.namespace = os.readlink(f"/proc/{leader.pid}/ns/pid")
                return
            if not leader.is_alive or self.is_given_up:
                raise DriverError(f"task {self.state.task_id} has ended")
            await asyncio.sleep(0.01)
        raise self.explain_silence("the container is still being set up")

    def follow(self, kind: str, text: str, descriptors: Sequence[int]) -> None:
        """Act on a message of the helper."""
        if kind == "stdio":
            self.take_stdio(descriptors)
        else:
            raise DriverError(text)

    def explain_silence(self, why: str = "") -> DriverError:
        if self.ended.is_set():
            return DriverError(f"task {self.state.task_id} has ended")
        why = why or f"its helper has ended {self.helper.read_errors()}".strip()
        return HostError(f"the command could not be started: {why}")

    async def brief(self, pid: int, leader: int, process: int) -> None:
        """Tell the helper's process what to do; it is in the container's cgroup from here on."""
        assert self.control
        if self.is_given_up:
            raise self.explain_silence()
        cgroup = self.state.cgroup
        try:
            status = read_status(leader)
            place_like(pid, leader, f"{cgroup}/payload" if cgroup else "")
            plan = {
                **plan_entry(status, read_inside(self.state.directory), self.command),
                "leader": leader,
                "namespaces": find_namespaces(leader),
                "personality": int(read_text(Path(f"/proc/{leader}/personality")), 16),
                "tty": self.tty,
                "merge": self.merge,
            }
        except (OSError, KeyError, ValueError) as error:  # the task's end, most likely
            raise self.explain_silence(str(error)) from None
        with open(os.memfd_create("plan"), "w+b") as file:
            marshal.dump(plan, file)
            file.seek(0)
            await send_fds(self.control, b"plan", [file.fileno(), process])

    def reap_helper(self, pid: int) -> None:
        self.entering = ProcessId.of_child(pid)
        self.helper.run(self.entering.wait())

    def take_stdio(self, descriptors: Sequence[int]) -> None:
        assert self.control
        for fd in descriptors:
            os.set_blocking(fd, False)
        self.stdin = descriptors[0]
        self.outputs = dict(zip(("stdout", "stderr"), descriptors[1:] or descriptors, strict=False))
        if self.tty:
            self.resize(*self.size)
            self.control.send(b"go")

    def resize(self, height: int, width: int) -> None:
        """Set the terminal's size; before there is one, the size it will have."""
        self.size = (height, width)
        if self.tty and self.stdin >= 0:
            packed = struct.pack("HHHH", *(min(max(number, 0), 0xFFFF) for number in self.size), 0, 0)
            with contextlib.suppress(OSError):
                fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, packed)

    def watch(self, pid: int) -> None:
        """Have the command reaped at its end, whatever becomes of this call: until then the container's process
        namespace could not end."""
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            raise self.explain_silence() from None
        if read_inner_pid(pid) == pid:  # a child, but none in a container
            raise self.explain_silence()
        self.pid = pid
        self.helper.commands.add(pid)
        self.helper.run(self.reap(pid))
        self.started.set()

    async def reap(self, pid: int) -> None:
        """Wait for the command. Its end is told to a tracer first, which may be inside and never take notice: that
        must not keep the plugin waiting."""
        pause, waited = 0.001, 0.0
        try:
            process = os.pidfd_open(pid)
            try:
                await wait_readable(process)
            finally:
                os.close(process)
        except OSError as error:
            log.warn("the end of a command is noticed later than usual", error=error.strerror)
        try:
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
                if waited > TRACER_PATIENCE and is_zombie(pid) and not self.over.is_set():
                    self.error = TRACED
                    self.tell_over()
                await asyncio.sleep(pause)
                waited, pause = waited + pause, min(2 * pause, 1.0)
            self.status = os.waitstatus_to_exitcode(ended[1])
        finally:
            self.helper.commands.discard(pid)
            self.tell_over()

    def tell_over(self) -> None:
        for event in (self.over, *self.waits):
            event.set()

    async def reap_lost(self) -> None:
        """Reap a command that was killed with its task before it could say a word."""
        while any(other.state is self.state for other in self.helper.entering):  # theirs will be known
            await asyncio.sleep(0.05)
        for pid in read_children(os.getpid()):
            with contextlib.suppress(OSError):
                if pid not in self.helper.commands and os.readlink(f"/proc/{pid}/ns/pid") == self.namespace:
                    self.helper.commands.add(pid)
                    self.helper.run(self.reap(pid))

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
        if self.error:
            raise DriverError(self.error)
        assert self.control
        with contextlib.suppress(OSError):
            self.error = render_line(self.control.recv(4096).decode(errors="replace").partition(" ")[2])
        return self.status

    def close(self) -> None:
        """Give up what there is of the command: nothing at all when it has ended by itself. While it is being
        started this is done again when it is there."""
        self.is_given_up = True
        if self.entering:
            self.entering.send(signal.SIGKILL)
        for fd in {self.stdin, *self.outputs.values()} - {-1}:
            os.close(fd)
        self.stdin, self.outputs = -1, {}
        if self.pid and self.control:
            self.control.close()
        if self.pid and not self.over.is_set():
            self.helper.run(self.kill())

    async def kill(self) -> None:
        """End the command and all it has started: a hang-up, and soon after SIGKILL."""
        await run_apart(lambda: self.send(signal.SIGHUP))  # a container may have any number of processes
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.over.wait(), HANG_UP)
        for _ in range(10):  # what was just being forked is found the next time
            if not await run_apart(lambda: self.send(signal.SIGKILL)):
                break
            await asyncio.sleep(0.01)

    def send(self, number: int) -> bool:
        """Send a signal to all there is of the command; False when there is nothing."""
        state = self.state
        leader = state.leader.pid if state.leader else 0
        found = read_cgroup_pids(f"{state.cgroup}/payload") if state.cgroup else read_descendants(leader)
        if not self.over.is_set():
            found += read_descendants(self.pid)
        return any([process.send(number) for process in find_session(self.pid, found)])


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
