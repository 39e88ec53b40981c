# SPDX-License-Identifier: MPL-2.0
"""Starting and watching processes and threads, and what /proc says about them.

Every process gets an explicit environment and explicit stdio. A child must never hold the plugin's stdin, stdout
or stderr: the agent waits until these are closed, and would hang. The end of a process is seen by its pidfd,
because asyncio needs a thread per child for that on Python 3.10 and 3.11. preexec_fn, user= and group= are
forbidden: they make subprocess fork, and forked children of a process that runs gRPC crash (grpc#41768).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from nspawn.common import SAFE_PATH, HostError
from nspawn.files import read_text

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessId:
    """A process, told apart from later ones with the same pid by its start time."""

    pid: int
    started: int  # clock ticks since boot: field 22 of /proc/PID/stat

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """Return the identity of a live process, None if there is none or it is a zombie. Raises OSError."""
        fields = read_stat(pid)
        return None if fields is None or fields[0] in ("Z", "X") else cls(pid, int(fields[19]))

    @classmethod
    def of_child(cls, pid: int) -> ProcessId:
        """Return the identity of a child that was not waited for yet; it may be a zombie."""
        fields = read_stat(pid)
        return cls(pid, int(fields[19])) if fields else NO_PROCESS

    @property
    def is_alive(self) -> bool:
        return ProcessId.of(self.pid) == self

    def open(self) -> int | None:
        """Return a pidfd, None if the process is gone. Raises OSError."""
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
        """Send a signal to exactly this process; return False if it is gone. Raises OSError."""
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
        """Wait until the process has ended, and reap it if it is our child. Raises OSError."""
        fd = self.open()
        if fd is not None:
            try:
                await wait_readable(fd)
            finally:
                os.close(fd)
        fields = read_stat(self.pid)
        if fields and int(fields[19]) == self.started:  # a zombie: its pid is still taken
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)


NO_PROCESS = ProcessId(0, 0)


def read_stat(pid: int | str) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state (field 3) on, None if there is no such process. Raises
    OSError if the file cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return parse_stat(text)


def parse_stat(text: bytes) -> list[str]:
    """Return the fields after the process name. It is in parentheses and may contain anything."""
    return [field.decode("ascii") for field in text[text.rindex(b") ") + 2 :].split()]


def read_children(pid: int) -> list[int]:
    """Return the pids of the children of a process's main thread. They may be reused by now: see find_children."""
    return [int(child) for child in read_text(Path(f"/proc/{pid}/task/{pid}/children")).split()]


def find_children(parent: ProcessId) -> list[ProcessId]:
    """Return the live children of a process. A later process that only reuses the pid of one is left out."""
    found = []
    for pid in read_children(parent.pid):
        fields = read_stat(pid)
        if fields and fields[0] not in ("Z", "X") and int(fields[1]) == parent.pid:
            found.append(ProcessId(pid, int(fields[19])))
    return found if parent.is_alive else []


def parse_status(text: bytes) -> dict[str, str]:
    """Return the values of /proc/PID/status by their names. A process chooses its own name: the kernel escapes \\n
    in it, but not the other characters at which splitlines() splits."""
    lines = (line.partition(b":") for line in text.split(b"\n"))
    return {
        name.decode(errors="replace"): value.strip(b" \t").decode(errors="replace") for name, _, value in lines
    }


def read_status(pid: int) -> dict[str, str]:
    """Return what parse_status makes of a process, {} if the process is gone. Raises OSError."""
    try:
        return parse_status(Path(f"/proc/{pid}/status").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return {}


class Handling(Enum):
    """What a signal does to a process."""

    NOTHING = "nothing"
    HANDLED = "handled"
    DEADLY = "deadly"


HARMLESS = {
    signal.SIGCHLD, signal.SIGCONT, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGURG,
    signal.SIGWINCH,
}  # fmt: skip # by default they end no process


def read_handling(pid: int, number: int) -> Handling:
    """Return what a signal would do to a process now, DEADLY if the process is gone. Raises OSError."""
    status = read_status(pid)
    for field, handling in (("SigIgn", Handling.NOTHING), ("SigCgt", Handling.HANDLED)):
        if int(status.get(field, "0"), 16) >> (number - 1) & 1:
            return handling
    return Handling.NOTHING if number in HARMLESS else Handling.DEADLY


async def wait_readable(fd: int) -> None:
    """Wait until `fd` can be read or has ended. Only one task may wait for a descriptor at a time."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


async def wait_writable(fd: int) -> None:
    """Wait until `fd` can be written or its reader is gone. Only one task may wait for a descriptor at a time."""
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
    """Start a process in its own session; ProcessId.wait reaps it. Raises OSError."""
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
    process.returncode = 0  # otherwise subprocess would reap it
    return ProcessId.of_child(process.pid)


def run(argv: Sequence[str], *, timeout: float) -> str:
    """Run a tool and return its output, "" if it is missing or takes longer than `timeout` seconds. It blocks."""
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
    """Run `work` in a new thread and return its result. It may leave that thread in another namespace."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(action: Callable[[], None]) -> None:
        if not done.cancelled():  # the caller was cancelled
            action()

    def run() -> None:
        try:
            action = functools.partial(done.set_result, work())
        except BaseException as error:
            action = functools.partial(done.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the plugin ends
            loop.call_soon_threadsafe(finish, action)

    threading.Thread(target=run, daemon=True).start()
    return await done


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Wait for `work` to its end, however often the caller is cancelled meanwhile. Raises CancelledError then, and
    only then."""
    task, is_cancelled = asyncio.create_task(work), False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        task.exception()  # else asyncio complains that nobody has asked for it
        raise asyncio.CancelledError
    return task.result()


def open_user_namespace(base: int, count: int) -> int:
    """Return a descriptor of a user namespace that maps the ids 0 to `count` to those from `base` on. Making one
    takes a process; the descriptor keeps it. Blocks for some milliseconds. Raises HostError or OSError."""
    pipe, environ = subprocess.PIPE, {"PATH": SAFE_PATH}
    argv = ["unshare", "--user", "cat"]
    with subprocess.Popen(argv, env=environ, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"\n")
            process.stdin.flush()
        if not process.stdout.read(1):  # cat answers only after unshare has made the namespace
            raise HostError("the kernel makes no user namespace: check the sysctl user.max_user_namespaces")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text(f"0 {base} {count}")
        return os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


async def run_tool(argv: Sequence[str]) -> str:
    """Run a tool without blocking and return its output, "" if it cannot be started."""
    environ = {"PATH": SAFE_PATH, "LANG": "C.UTF-8"}
    with open(os.memfd_create(argv[0]), "w+b") as output:
        with contextlib.suppress(OSError):
            await start_process(argv, environ=environ, stdout=output.fileno()).wait()
        output.seek(0)
        return output.read().decode(errors="replace")


def read_inner_pid(pid: int) -> int:
    """Return the pid of a process in its own namespace, 0 if the process is gone. Raises OSError."""
    return int(read_status(pid).get("NSpid", "0").split()[-1])
