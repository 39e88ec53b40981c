# SPDX-License-Identifier: MPL-2.0
"""Starting and watching processes and threads, and what /proc says about them.

Every process gets an explicit environment and explicit stdio. A child must never hold the plugin's stdin, stdout
or stderr: the agent waits until these are closed, and would hang. The end of a process is seen by its pidfd,
because asyncio needs a thread per child for that on Python 3.10 and 3.11. A child is reaped when the plugin gets
SIGCHLD, so none stays a zombie because nobody waits for it any more. preexec_fn, user= and group= are
forbidden: they make subprocess fork, and forked children of a process that runs gRPC crash (grpc#41768).
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import errno
import os
import queue
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Generic, TypeVar

from nspawn.common import SAFE_PATH, HostError, TransientError, is_shortage
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
        except OSError as error:
            # Older kernels (6.1, 6.12) say EINVAL while the number is still that of a session, as the shim's is
            # that of the process which holds its log pipes.
            if error.errno in (errno.ESRCH, errno.EINVAL):
                return None
            raise
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
        """Wait until the process has ended. This takes a descriptor; when the plugin has few left it looks from
        time to time instead, so that there are some for ending tasks. Raises OSError."""
        pause = 0.02
        while True:
            try:
                fd = self.open()
            except OSError as error:
                if not is_shortage(error):
                    raise
                fd = -1
            if fd is None:
                break
            if fd >= 0:
                try:
                    if not DESCRIPTORS.is_among_last(fd):
                        await wait_readable(fd)
                        break
                finally:
                    os.close(fd)
            reap_children()
            if not self.exists:
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)
        reap_children()

    @property
    def exists(self) -> bool:
        """Whether there is a process with this pid, perhaps a later one. Takes no descriptor."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


NO_PROCESS = ProcessId(0, 0)


class Descriptors:
    """How many files the plugin can have open. It raises its own soft limit; its children get the one back that it
    was started with. The last ones are kept for ending tasks."""

    LAST = 12

    def __init__(self) -> None:
        self.reserved = 0  # by starts and commands under way
        self.inherited: tuple[int, int] | None = None

    def raise_limit(self) -> None:
        self.inherited = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def give_back_limit(self, child: int) -> None:
        if self.inherited:
            with contextlib.suppress(OSError):  # ended, or another user by now
                resource.prlimit(child, resource.RLIMIT_NOFILE, self.inherited)

    def is_among_last(self, fd: int) -> bool:
        """Whether an open descriptor is one of those kept for ending tasks: the kernel gives the lowest one."""
        return fd >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - self.LAST

    def count_free(self) -> int:
        try:
            used = len(os.listdir("/proc/self/fd")) - 1  # without the one that lists them
        except OSError:
            return 0
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - used - self.reserved

    def check(self, number: int, what: str) -> None:
        """Refuse what needs more descriptors than there are, before it has begun. Raises TransientError."""
        free = self.count_free()
        if free < number + self.LAST:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise TransientError(
                f"{what}: the plugin may open {limit} files and has {max(free, 0)} left, which is too few; raise "
                "LimitNOFILE= of the Nomad agent's unit"
            )

    @contextlib.contextmanager
    def reserve(self, number: int, what: str) -> Iterator[None]:
        """As `check`, and keep them for this. What is open of them counts twice, to be on the safe side."""
        self.check(number, what)
        self.reserved += number
        try:
            yield
        finally:
            self.reserved -= number


DESCRIPTORS = Descriptors()
CHILDREN: dict[int, ProcessId] = {}  # started by start_process, and not reaped yet


def reap_children() -> None:
    """Reap the children that have ended. Needs no descriptor."""
    for pid in [*CHILDREN]:
        try:
            is_reaped = os.waitpid(pid, os.WNOHANG)[0] != 0
        except ChildProcessError:
            is_reaped = True
        if is_reaped:
            CHILDREN.pop(pid, None)


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
    """Start a process in its own session. Raises OSError; then there is none."""
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
    DESCRIPTORS.give_back_limit(process.pid)
    CHILDREN[process.pid] = NO_PROCESS
    try:
        started = CHILDREN[process.pid] = ProcessId.of_child(process.pid)
    except OSError:  # nobody could tell it from a later process
        os.kill(process.pid, signal.SIGKILL)
        raise
    finally:
        reap_children()  # it may have ended before it was among them
    return started


def run(argv: Sequence[str], *, timeout: float) -> str:
    """Run a tool and return its output, "" if it is missing or takes longer than `timeout` seconds. It blocks.
    Raises OSError if the host cannot start it now."""
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
    except subprocess.TimeoutExpired:
        return ""
    except OSError as error:
        if is_shortage(error):
            raise
        return ""
    return done.stdout.decode(errors="replace")


def run_program(argv: Sequence[str], given: bytes, *, pass_fds: Sequence[int] = ()) -> tuple[int, str]:
    """Run a program and return its exit status, as subprocess has it, and the start of its stderr. `given`: its
    stdin. Blocks until the program ends, even if it leaves processes behind. Raises OSError."""
    with open(os.memfd_create("stdin"), "w+b") as stdin, open(os.memfd_create("stderr"), "w+b") as stderr:
        stdin.write(given)
        stdin.seek(0)
        process = subprocess.Popen(
            argv,
            env={"PATH": SAFE_PATH},
            cwd="/",
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=pass_fds,
            start_new_session=True,
        )
        status = process.wait()
        stderr.seek(0)
        return status, stderr.read(4096).decode(errors="replace").strip()


class SpareThread:
    """A thread that waits for work. It is started with the plugin, for the time when no thread can be started:
    then the removal of a task still works. It does one thing after the other."""

    def __init__(self) -> None:
        self.work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.is_there = False

    def start(self) -> None:
        """Raises OSError."""
        start_thread(self.run)
        self.is_there = True

    def run(self) -> None:
        while True:
            with contextlib.suppress(MemoryError):  # ThreadCall.check puts it here again
                self.work.get()()


SPARE = SpareThread()


def start_thread(work: Callable[[], None]) -> None:
    """Start a thread. threading.Thread would wait for its first step, which never comes when there is no memory
    for it. Raises OSError."""
    try:
        _thread.start_new_thread(work, ())
    except RuntimeError:  # "can't start new thread"
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None


class ThreadCall(Generic[T]):
    """Work for a thread, done once: by the first that takes it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[T] = self.loop.create_future()
        self.turns = [None]

    def take(self) -> bool:
        try:
            self.turns.pop()  # is atomic
        except IndexError:
            return False
        return True

    def run(self) -> None:
        """Take it and do it, in a thread."""
        if not self.take():
            return
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = self.work()
        except BaseException as error:
            failure = error
        while True:
            try:
                self.loop.call_soon_threadsafe(self.finish, result, failure)
                return
            except MemoryError:  # somebody waits for it
                time.sleep(0.1)
            except RuntimeError:  # the loop is closed: the plugin ends
                return

    def finish(self, result: Any, failure: BaseException | None) -> None:
        if self.done.cancelled():  # the caller was cancelled
            return
        if failure:
            self.done.set_exception(failure)
        else:
            self.done.set_result(result)

    def check(self, is_own: bool) -> None:
        """See that it has begun. The kernel can start a thread for which Python then has no memory. Nobody is
        told: the thread just ends."""
        if not self.turns:
            return
        if SPARE.is_there and not is_own:
            SPARE.work.put(self.run)
        elif self.take():
            self.finish(None, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))


# Seconds for a thread to begin: if another one can do its work, and if none can. A call is answered within one.
THREAD_PATIENCE = (0.1, 0.8)


async def run_in_thread(work: Callable[[], T], *, is_own: bool = False) -> T:
    """Run `work` in a new thread and return its result, or in the spare one if no thread can be started. `is_own`:
    only in a new one, because `work` leaves it in another namespace. Raises OSError, and what `work` raises."""
    call = ThreadCall(work)
    try:
        start_thread(call.run)
    except OSError:
        if is_own or not SPARE.is_there:
            raise
        SPARE.work.put(call.run)
    check = call.loop.call_later(THREAD_PATIENCE[is_own], call.check, is_own)
    try:
        return await call.done
    finally:
        check.cancel()


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
    """Run a tool without blocking and return its output, "" if it is missing. Raises OSError."""
    environ = {"PATH": SAFE_PATH, "LANG": "C.UTF-8"}
    with open(os.memfd_create(argv[0]), "w+b") as output:
        with contextlib.suppress(FileNotFoundError):
            await start_process(argv, environ=environ, stdout=output.fileno()).wait()
        output.seek(0)
        return output.read().decode(errors="replace")


def read_inner_pid(pid: int) -> int:
    """Return the pid of a process in its own namespace, 0 if the process is gone. Raises OSError."""
    return int(read_status(pid).get("NSpid", "0").split()[-1])


async def cancel_and_wait(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
