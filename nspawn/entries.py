# SPDX-License-Identifier: MPL-2.0
"""The entries of commands into containers: the server that forks them (enter.py), and what each takes over."""

from __future__ import annotations

import asyncio
import errno
import functools
import importlib.util
import marshal
import os
import resource
import socket
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from nspawn.bundle import ExecContext
from nspawn.cgroup import find_cgroups
from nspawn.common import SAFE_PATH, HostError, quote
from nspawn.files import read_text
from nspawn.host import Mounts, read_mounts
from nspawn.linux import MOUNT_ATTR_RDONLY, enter_namespace, set_attributes
from nspawn.process import (
    NO_PROCESS,
    ProcessId,
    read_children,
    read_stat,
    read_status,
    run_in_thread,
    start_process,
    wait_readable,
    wait_writable,
)

T = TypeVar("T")


def read_program() -> bytes:
    """Return enter.py as a compiled file, which a Python of the same version runs at once."""
    spec = importlib.util.find_spec("nspawn.enter")
    assert spec
    loader: Any = spec.loader  # importlib.abc has a type for it, and takes half a megabyte
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(loader.get_code(spec.name))


# Read when the plugin starts: later the directory with the plugin's code may have been removed.
ENTER = read_program()


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
        set_attributes(point, MOUNT_ATTR_RDONLY)
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
    check_label(leader)
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


def check_label(leader: int) -> None:
    """Refuse to enter a container whose processes have another SELinux label than this one: a command would get
    this one's rights. Raises HostError or OSError."""
    if not os.path.exists("/sys/fs/selinux/enforce"):
        return
    label, own = (Path(f"/proc/{pid}/attr/current").read_bytes() for pid in (leader, "self"))
    if label != own:
        shown = label.decode(errors="replace").rstrip("\n\0")
        raise HostError(f"the container has the SELinux label {quote(shown)}, and a command would not get it")


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
