# SPDX-License-Identifier: MPL-2.0
"""Starting and watching processes and threads, and what /proc says of them.

Every process gets an explicit environment, explicit stdio and a session of its own. A child must never hold the
plugin's stdin, stdout or stderr: the agent waits for their end and would hang. Pidfds tell of ends: asyncio's own
way costs a thread per child on Python 3.10 and 3.11. No preexec_fn, user= or group=: they fork, and forked
children of a process that runs gRPC crash (grpc#41768).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nspawn.common import SAFE_PATH, HostError
from nspawn.files import read_text

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one of the same number."""

    pid: int
    started: int  # clock ticks after boot: field 22 of /proc/PID/stat

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """Return the identity of a live process, None when there is none or it is a zombie."""
        fields = read_stat(pid)
        return None if fields is None or fields[0] in ("Z", "X") else cls(pid, int(fields[19]))

    @classmethod
    def of_child(cls, pid: int) -> ProcessId:
        """Return the identity of a child that nobody has waited for, be it a zombie."""
        fields = read_stat(pid)
        return cls(pid, int(fields[19])) if fields else NO_PROCESS

    @property
    def is_alive(self) -> bool:
        return ProcessId.of(self.pid) == self

    def open(self) -> int | None:
        """Return a pidfd, None when the process is gone. Raises OSError when the host has no descriptor for it."""
        if self.pid <= 0:
            return None
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        try:
            is_alive = self.is_alive
        except OSError:
            os.close(fd)
            raise
        if is_alive:
            return fd
        os.close(fd)
        return None

    def send(self, number: int) -> bool:
        """Send a signal to this very process; False when it is gone."""
        fd = self.open()
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    async def wait(self) -> None:
        """Return when the process has ended; reaps it when it is a child of ours."""
        fd = self.open()
        if fd is not None:
            try:
                await wait_readable(fd)
            finally:
                os.close(fd)
        fields = read_stat(self.pid)
        if fields and int(fields[19]) == self.started:  # a zombie: no other process can have its number yet
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)


NO_PROCESS = ProcessId(0, 0)


def read_stat(pid: int | str) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state (field 3) on, None when there is no such process. Raises
    OSError when the host cannot tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return parse_stat(text)


def parse_stat(text: bytes) -> list[str]:
    """Return the fields behind the name in parentheses, which may hold anything."""
    return [field.decode("ascii") for field in text[text.rindex(b") ") + 2 :].split()]


def read_children(pid: int) -> list[int]:
    """Return the children of a process's main thread. Their numbers may be others' by now: see find_children."""
    return [int(child) for child in read_text(Path(f"/proc/{pid}/task/{pid}/children")).split()]


def find_children(parent: ProcessId) -> list[ProcessId]:
    """Return the live children of a process, none that only has got the number of one."""
    found = []
    for pid in read_children(parent.pid):
        fields = read_stat(pid)
        if fields and fields[0] not in ("Z", "X") and int(fields[1]) == parent.pid:
            found.append(ProcessId(pid, int(fields[19])))
    return found if parent.is_alive else []


def parse_status(text: bytes) -> dict[str, str]:
    """Return the lines of /proc/PID/status by their names. A process chooses its own name: the kernel escapes \\n
    there, and nothing else that Python takes for the end of a line."""
    lines = (line.partition(b":") for line in text.split(b"\n"))
    return {
        name.decode(errors="replace"): value.strip(b" \t").decode(errors="replace") for name, _, value in lines
    }


def read_status(pid: int) -> dict[str, str]:
    """Return parse_status of a process, {} when it is gone."""
    try:
        return parse_status(Path(f"/proc/{pid}/status").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return {}


async def wait_readable(fd: int) -> None:
    """Return when `fd` has something to read, or has ended. One waiter a descriptor."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


async def wait_writable(fd: int) -> None:
    """Return when `fd` takes more, or its reader is gone. One waiter a descriptor."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(fd)


def start_process(
    argv: Sequence[str],
    *,
    environ: Mapping[str, str],
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
) -> ProcessId:
    """Start a process in a session of its own; ProcessId.wait reaps it."""
    process = subprocess.Popen(
        argv,
        env=dict(environ),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        cwd="/",
        start_new_session=True,
    )
    process.returncode = 0  # keeps subprocess from reaping it, too
    return ProcessId.of_child(process.pid)


def run(argv: Sequence[str], *, timeout: float) -> str:
    """Run a short tool and return what it prints, "" when it fails or is missing. Blocks: for start-up only."""
    try:
        done = subprocess.run(
            argv,
            env={"PATH": SAFE_PATH, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


async def run_in_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, from a new thread: it may leave its thread in another namespace."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(action: Callable[[], None]) -> None:
        if not done.cancelled():  # nobody waits any more
            action()

    def run() -> None:
        try:
            action = functools.partial(done.set_result, work())
        except BaseException as error:
            action = functools.partial(done.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the plugin has ended
            loop.call_soon_threadsafe(finish, action)

    threading.Thread(target=run, daemon=True).start()
    return await done


def open_user_namespace(base: int, count: int) -> int:
    """Return a user namespace that maps `count` ids from 0 on to those from `base` on. It takes a process to make
    one, and none to keep it. Blocks for some milliseconds."""
    pipe, environ = subprocess.PIPE, {"PATH": SAFE_PATH}
    argv = ["unshare", "--user", "cat"]
    with subprocess.Popen(argv, env=environ, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"\n")
            process.stdin.flush()
        if not process.stdout.read(1):  # with the answer of cat the namespace is there
            raise HostError("the kernel makes no user namespace: see the sysctl user.max_user_namespaces")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text(f"0 {base} {count}")
        return os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


async def run_tool(argv: Sequence[str]) -> str:
    """Run a short tool without blocking and return what it prints, "" when it is missing."""
    environ = {"PATH": SAFE_PATH, "LANG": "C.UTF-8"}
    with open(os.memfd_create(argv[0]), "w+b") as output:
        with contextlib.suppress(OSError):
            await start_process(argv, environ=environ, stdout=output.fileno()).wait()
        output.seek(0)
        return output.read().decode(errors="replace")


def read_inner_pid(pid: int) -> int:
    """Return a process's number inside its own namespace, 0 when it is gone."""
    return int(read_status(pid).get("NSpid", "0").split()[-1])
