# SPDX-License-Identifier: MPL-2.0
"""Nomad task driver that runs tasks as systemd-nspawn containers: a booted OS, or one command.

The module reads top to bottom as words, facts, plan, act, serve; a section uses only what stands above it.

    Errors       what can go wrong, and how Nomad is told
    Log          hclog lines on stderr
    Processes    starting and watching processes
    Devices      which device nodes the processes of a cgroup may open
    Host         facts about this machine
    Options      what an option is, and how it is decoded
    Checks       what a value must be
    Table        all options; schema, nspawn's arguments and the reference come from it
    Rules        what concerns two options, and what the operator has to allow
    Image        an image's name to a place on disk
    Account      who a command runs as
    Sources      what of the host a job names, judged by what the operator allows
    Network      a task's network, ports and names: nspawn's arguments, and what has to be looked up for them
    Root         whether the container's root is the image, or one of its own over it
    Cgroup       where a task's processes live, and what they use
    Job          what Nomad says of a task
    Environment  how variables and user reach the payload
    Plan         all of that to everything needed to start a task; pure
    Outcome      what nspawn's messages and exit codes mean
    Mounting     private roots: ranges of users, locks, mounts
    Store        fetched images on disk
    Fetches      the processes that bring images into the store
    Keeper       the small process that outlives the plugin
    State        what is known of a started task, on disk and in Nomad's handle; its events
    Machined     telling systemd-machined
    Removal      nothing of a task is left
    Task         recover, wait, signal, stop, destroy
    Start        from a plan to a running task
    Entry        the program that enters a container
    Exec         a further command in a running container, confined as its payload is
    Wire         the protocol's messages and errors
    Services     the gRPC services Nomad calls
    Server       the plugin as a process, and the handshake
    Main         the plugin by default; `check`, `--version`, `--help` for people

Above Mounting nothing is changed on the machine but a task's cgroup; effects are below. "Measured" in a comment
means: on a real systemd-nspawn, of the versions named.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import enum
import errno
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import logging
import marshal
import math
import os
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import grpc
    import grpc.aio

    from nomad_pb import (
        base_pb2,
        base_pb2_grpc,
        driver_pb2,
        driver_pb2_grpc,
        grpc_plugin_pb2,
        grpc_plugin_pb2_grpc,
        hcl_spec_pb2,
        health_pb2,
        health_pb2_grpc,
        recoverable_error_pb2,
        rpc_status_pb2,
    )

__version__ = "0.1.0"  # read by Nomad as a hashicorp/go-version: `.dev1` and `.post1` would stop the agent

PLUGIN_NAME = "nspawn"  # what a job writes as `driver`
FILE_NAME = "nomad-driver-nspawn"  # what the agent's `plugin` block is looked up by
STATE_ROOT = Path("/run/nomad-driver-nspawn")  # root only, gone at reboot, as the containers are
SETTINGS_ROOT = Path("/run/systemd/nspawn")
MACHINES_ROOT = Path("/var/lib/machines")
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

T = TypeVar("T")


# =====================================================================================================
# Errors
#
# One tree. The text of each is what a person reads in the task's events, so it is whole sentences without
# any class name. `recoverable` decides whether Nomad tries again under the job's restart policy: without
# the flag every failed start is final.
# =====================================================================================================


class DriverError(Exception):
    """Something a person must be told; str() is the sentence."""

    recoverable = False

    def __init__(self, text: str) -> None:
        super().__init__(render_line(text))


class ConfigError(DriverError):
    """The job or the plugin block asks for what cannot be.

    `rule` says what is allowed, `remedy` what to do about it.
    """

    def __init__(self, option: str, value: object, rule: str, remedy: str = "") -> None:
        self.option, self.value, self.rule, self.remedy = option, value, rule, remedy
        text = f"{cut(option)} = {cut(render_value(value))}: {rule}"
        super().__init__(f"{text}; {remedy}" if remedy else text)

    def within(self, block: str) -> ConfigError:
        """Return the error as one of an option inside a block."""
        return ConfigError(f"{block}.{self.option}", self.value, self.rule, self.remedy)


def render_value(value: object) -> str:
    """Return a value of a job as JSON, or as near to it as it comes."""
    try:
        return json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):
        return f"(a {type(value).__name__})"  # very deep, or with keys that are no strings, as msgpack may have


def render_line(text: str) -> str:
    """Return a sentence with all that is not printable escaped: a job, an image or a registry could otherwise add
    lines of its own to events and logs, or control a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )


def cut(text: str, length: int = 200) -> str:
    """Shorten what a job says, for a sentence."""
    return text if len(text) <= length else text[:length] + "…"


class HostError(DriverError):
    """This machine cannot do it, whatever the job says."""


class TransientError(DriverError):
    """It may work when tried again."""

    recoverable = True


class TaskNotFound(DriverError):
    """Nothing is known of the task. Nomad's client cannot match this error, it only shows it."""

    def __init__(
        self, task_id: str, why: str = "is not known to this plugin, and nothing of it is left on this machine"
    ) -> None:
        super().__init__(f"task {cut(task_id)} {why}")


class Unsupported(DriverError):
    """The call is part of the protocol, but not of this driver."""


# =====================================================================================================
# Log
#
# One JSON object a line, as go-plugin reads it: @message, @level and @timestamp must be strings (anything
# else panics the agent), the time with exactly six digits, levels known to hclog. A closed stderr (the agent
# died) is no reason to die too.
# =====================================================================================================

LEVELS = ("trace", "debug", "info", "warn", "error")
MAX_LINE = 48 << 10  # go-plugin cuts lines at 64 KiB, and Nomad 0.10 stops reading the log there


def render_log(level: str, message: str, values: Mapping[str, object], now: datetime.datetime) -> bytes:
    """Return one line of hclog JSON."""
    assert level in LEVELS
    entry: dict[str, str] = {
        "@level": level,
        "@message": message,
        "@timestamp": now.isoformat(timespec="microseconds"),
        "@module": PLUGIN_NAME,
    }
    for key, value in values.items():
        entry[key.lstrip("@") or "value"] = value if isinstance(value, str) else repr(value)
    for keep in (MAX_LINE, 2000, 100):  # characters of a text; one can be twelve bytes of JSON
        line = json.dumps({key[:50]: text[:keep] for key, text in list(entry.items())[:20]})
        if len(line) < MAX_LINE:
            break
    return line.encode() + b"\n"


class Log:
    """Writes lines; `bind` gives every line of the child the same values."""

    def __init__(self, **values: object) -> None:
        self.values = values

    def bind(self, **values: object) -> Log:
        return Log(**{**self.values, **values})

    def write(self, level: str, message: str, **values: object) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        with contextlib.suppress(OSError, ValueError):
            os.write(2, render_log(level, message, {**self.values, **values}, now))

    def debug(self, message: str, **values: object) -> None:
        self.write("debug", message, **values)

    def info(self, message: str, **values: object) -> None:
        self.write("info", message, **values)

    def warn(self, message: str, **values: object) -> None:
        self.write("warn", message, **values)

    def error(self, message: str, **values: object) -> None:
        self.write("error", message, **values)


log = Log()


class LibraryLog(logging.Handler):
    """Turns what libraries log (asyncio, grpc) into lines of ours, at debug: it is about their insides."""

    def emit(self, record: logging.LogRecord) -> None:
        log.debug(record.getMessage(), logger=record.name, trace=record.exc_text or repr(record.exc_info))


# =====================================================================================================
# Processes
#
# The one place that starts processes and threads: explicit environment, explicit stdio, own session. A child must
# never hold the plugin's stdin, stdout or stderr: the agent waits for their end and would hang with it. Ends are
# told by pidfds: asyncio's own way costs a thread per child on Python 3.10 and 3.11. No preexec_fn, user= or
# group=: they fork, and forked children of a process that runs gRPC crash (grpc#41768).
# =====================================================================================================


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


async def run_apart(work: Callable[[], T]) -> T:
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


def read_text(path: Path) -> str:
    """Return what a file holds, "" when it cannot be read. Line ends stay as they are: names that a job or a
    container has chosen may hold a carriage return."""
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def write_file(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file that is either whole or not there, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    temporary.rename(path)


def remove_tree(path: Path) -> None:
    """Remove a file, or a directory and all that is in it. Never follows a link below `path.parent`, never enters
    another mount. What cannot be removed is logged, and all else goes. Blocks for as long as it takes: call it in
    the event loop only for what no job has made."""
    remover = TreeRemover()
    try:
        remover.run(path)
    except OSError as error:
        remover.errors.append(error)
    finally:
        remover.close()
    if remover.errors:
        shown = "; ".join(map(str, remover.errors[:5]))
        log.warn("cannot remove all of a tree", path=str(path), errors=len(remover.errors), first=shown)


@dataclass
class TreeLevel:
    """A directory that is being emptied."""

    name: str  # in the directory above it
    above: tuple[int, int]  # device and inode of that directory
    pending: list[str] = field(default_factory=list)  # directories in it that are emptied next
    stuck: set[str] = field(default_factory=set)  # what cannot be removed


class TreeRemover:
    """Empties directories of any depth, with two descriptors and no recursion: shutil.rmtree needs a descriptor
    and a frame of Python a level (until 3.13), and paths end at 4,096 bytes. It goes down by names and up by "..",
    which must be the directory that it came from."""

    BATCH = 1000  # names kept at a time: a directory may hold millions

    def __init__(self) -> None:
        self.here = -1
        self.errors: list[OSError] = []

    def run(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.here = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            levels = [TreeLevel("", (0, 0), [path.name])]
            while levels[0].pending or levels[1:]:
                level = levels[-1]
                if level.pending:
                    levels += self.enter(level.pending.pop(), level)
                elif len(levels) > 1 and not self.empty(level):
                    levels.pop()
                    self.leave(level, levels[-1])

    def close(self) -> None:
        if self.here >= 0:
            os.close(self.here)

    def enter(self, name: str, level: TreeLevel) -> list[TreeLevel]:
        """Go into a directory and return its level; anything else is removed."""
        try:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.here)
        except NotADirectoryError:
            self.remove(os.unlink, name, level)
            return []
        except FileNotFoundError:
            return []
        except OSError as error:
            self.errors.append(error)
            level.stuck.add(name)
            return []
        if is_other_mount(inner, self.here):
            os.close(inner)
            self.errors.append(OSError(errno.EXDEV, "another file system is mounted there", name))
            level.stuck.add(name)
            return []
        outer, self.here = self.here, inner
        above = os.fstat(outer)
        os.close(outer)
        return [TreeLevel(name, (above.st_dev, above.st_ino))]

    def empty(self, level: TreeLevel) -> list[str]:
        """Remove the files of a directory, and note some of the directories in it: none when it is done."""
        with os.scandir(self.here) as entries:
            for entry in entries:
                if entry.name in level.stuck:
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    self.remove(os.unlink, entry.name, level)
                else:
                    level.pending.append(entry.name)
                    if len(level.pending) == self.BATCH:
                        break
        return level.pending

    def leave(self, level: TreeLevel, above: TreeLevel) -> None:
        """Go up, and remove the directory that has been left."""
        outer = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.here)
        os.close(self.here)
        self.here = outer
        found = os.fstat(outer)
        if (found.st_dev, found.st_ino) != level.above:
            raise OSError(errno.ESTALE, "was moved while it was being removed", level.name)
        if level.stuck:
            above.stuck.add(level.name)
        else:
            self.remove(os.rmdir, level.name, above)

    def remove(self, how: Callable[..., None], name: str, level: TreeLevel) -> None:
        try:
            try:
                how(name, dir_fd=self.here)
            except PermissionError:  # root may do all, but for what `chattr` has set
                unseal(self.here, name)
                how(name, dir_fd=self.here)
        except FileNotFoundError:
            return
        except OSError as error:
            self.errors.append(error)
            level.stuck.add(name)


def is_other_mount(inner: int, outer: int) -> bool:
    """Tell whether something is mounted on a directory. A subvolume of btrfs has a device of its own, too, but is
    no mount."""
    if os.fstat(inner).st_dev == os.fstat(outer).st_dev:
        return False
    texts = (read_text(Path(f"/proc/self/fdinfo/{fd}")) for fd in (inner, outer))
    first, second = (re.findall(r"^mnt_id:.*", text, re.MULTILINE) for text in texts)
    return first != second


FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_SEALS = 0x10 | 0x20  # immutable, append-only


def unseal(directory: int, name: str) -> None:
    """Take off what keeps even root from removing a file: a container without a user namespace may set it."""
    with contextlib.suppress(OSError):
        clear_seals(directory)
        kind = os.lstat(name, dir_fd=directory).st_mode
        if stat.S_ISREG(kind) or stat.S_ISDIR(kind):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
            try:
                clear_seals(fd)
            finally:
                os.close(fd)


def clear_seals(fd: int) -> None:
    flags = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
    number = struct.unpack("=Q", flags)[0]
    if number & FS_SEALS:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=Q", number & ~FS_SEALS))


@functools.lru_cache(maxsize=1)
def load_libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def call_libc(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library that Python does not have; raise OSError when it says -1."""
    import ctypes

    result = int(getattr(load_libc(), name)(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


OPENAT2 = 437  # system call: the same number on all machines
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 0x2, 0x4, 0x10
RENAMES = 100  # how often somebody may rename directories on the way while a ".." is followed


def open_in_root(root: int, path: str, flags: int, *, follow: bool = True, mode: int = 0) -> int:
    """Open a path as a process with this root directory would; the kernel never leaves it, and follows 40 links at
    most. Without `follow`, no link at all. Raises OSError."""
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | (0 if follow else RESOLVE_NO_SYMLINKS)
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(RENAMES):
        with contextlib.suppress(BlockingIOError):
            return call_libc("syscall", OPENAT2, root, os.fsencode(path), how, len(how))
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


# =====================================================================================================
# Devices
#
# Which device nodes the processes of a cgroup may open or make, whoever has made them and wherever they lie: what
# systemd calls DevicePolicy=closed. The kernel asks a small BPF program, which is attached to the cgroup and ends
# with it; the hierarchies of hybrid hosts take one, too (measured, Linux 6.18). Rules above the cgroup still hold.
# =====================================================================================================


@dataclass(frozen=True)
class Device:
    """A device node of the host for a container."""

    host_path: str
    task_path: str
    permissions: str = "rwm"  # to read, to write, to make with mknod(2)


@dataclass(frozen=True)
class DeviceRule:
    """Allows device nodes."""

    is_block: bool
    major: int
    minor: int | None  # None: any
    permissions: str

    @classmethod
    def of(cls, mode: int, number: int, permissions: str) -> DeviceRule:
        """Return the rule for a node, by what stat(2) says of it."""
        return cls(stat.S_ISBLK(mode), os.major(number), os.minor(number), permissions)


# What systemd-nspawn puts into /dev, as its own machines may use it.
USUAL_DEVICES = (
    *(DeviceRule(False, 1, minor, "rwm") for minor in (3, 5, 7, 8, 9)),  # null, zero, full, random, urandom
    *(DeviceRule(False, 5, minor, "rwm") for minor in (0, 2)),  # tty, ptmx
    *(DeviceRule(False, 10, minor, "rwm") for minor in (200, 229)),  # net/tun, fuse
    DeviceRule(False, 136, None, "rw"),  # pts/*
)

BPF_BITS = {"m": 1, "r": 2, "w": 4}  # BPF_DEVCG_ACC_*
R_RESULT, R_CONTEXT, R_KIND, R_ACCESS, R_MAJOR, R_NUMBER = range(6)  # registers


def add_up(rules: Sequence[DeviceRule]) -> dict[tuple[bool, int, int | None], int]:
    """Return what may be done with each device, those of any minor last."""
    bits: dict[tuple[bool, int, int | None], int] = {}
    for rule in sorted(rules, key=lambda rule: rule.minor is not None):
        key, any_minor = (rule.is_block, rule.major, rule.minor), (rule.is_block, rule.major, None)
        bits[key] = bits.get(key, bits.get(any_minor, 0)) | sum(BPF_BITS[letter] for letter in rule.permissions)
    return dict(reversed(bits.items()))


def render_policy(rules: Sequence[DeviceRule]) -> bytes:
    """Return the BPF program that allows what the rules for a device add up to, and nothing else."""

    def step(code: int, target: int = 0, source: int = 0, skip: int = 0, number: int = 0) -> bytes:
        return struct.pack("=BBhI", code, target | source << 4, skip, number & 0xFFFFFFFF)

    load, copy, put, leave, skip, unless, unless_32 = 0x61, 0xBF, 0xB7, 0x95, 0x05, 0x55, 0x56  # since Linux 5.1
    mask, mask_by, add_by, invert, left, right = 0x57, 0x5F, 0x4F, 0xA7, 0x67, 0x77
    # The context is a struct bpf_cgroup_dev_ctx: kind and access in one number, major, minor.
    start = [step(load, R_KIND, R_CONTEXT, 0), step(copy, R_ACCESS, R_KIND)]
    start += [step(mask, R_KIND, number=0xFFFF), step(right, R_ACCESS, number=16)]
    start += [step(load, R_MAJOR, R_CONTEXT, 4), step(load, R_NUMBER, R_CONTEXT, 8)]
    start += [step(copy, R_RESULT, R_MAJOR), step(left, R_RESULT, number=20), step(add_by, R_NUMBER, R_RESULT)]
    # The first row that is about the device tells what is allowed; then the rest is skipped. Rows that exit by
    # themselves would take the kernel's verifier a hundred times as long.
    rows: list[bytes | None] = [step(put, R_RESULT)]
    devices = add_up(rules)
    for kind, is_block in ((1, True), (2, False)):
        same = [(key, bits) for key, bits in devices.items() if key[0] is is_block]
        rows.append(step(unless, R_KIND, skip=3 * len(same), number=kind))
        for (_, major, minor), bits in same:
            place, number = (R_MAJOR, major) if minor is None else (R_NUMBER, major << 20 | minor)
            rows += [step(unless_32, place, skip=2, number=number), step(put, R_RESULT, number=bits), None]
    found = [row or step(skip, skip=len(rows) - at - 1) for at, row in enumerate(rows)]
    # Allowed is what asks for nothing else.
    end = [step(invert, R_RESULT, number=-1), step(mask_by, R_RESULT, R_ACCESS), step(unless, R_RESULT, skip=2)]
    end += [step(put, R_RESULT, number=1), step(leave), step(put, R_RESULT), step(leave)]
    return b"".join([*start, *found, *end])


BPF_CALL = {"x86_64": 321, "aarch64": 280}  # the number of bpf(2)
BPF_PROG_LOAD, BPF_PROG_ATTACH, BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI = 5, 8, 15, 6, 2


def call_bpf(command: int, attributes: bytes) -> int:
    number = BPF_CALL.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return call_libc("syscall", number, command, attributes, len(attributes))


def load_policy(rules: Sequence[DeviceRule]) -> int:
    """Return a descriptor of the program for the rules. Raises OSError where the kernel takes none."""
    import ctypes

    program, license = render_policy(rules), ctypes.create_string_buffer(b"MPL-2.0")
    steps = ctypes.create_string_buffer(program, len(program))
    places = ctypes.addressof(steps), ctypes.addressof(license)
    return call_bpf(
        BPF_PROG_LOAD, struct.pack("=IIQQ", BPF_PROG_TYPE_CGROUP_DEVICE, len(program) // 8, *places) + bytes(24)
    )


def restrict_devices(cgroup: str, rules: Sequence[DeviceRule]) -> None:
    """Let processes in a cgroup open what the rules allow, and nothing else. Raises OSError."""
    program = load_policy(rules)
    try:
        folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Others, such as a booted systemd for its services, may add programs of their own below.
            call_bpf(BPF_PROG_ATTACH, struct.pack("=IIII", folder, program, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI))
        finally:
            os.close(folder)
    finally:
        os.close(program)


@functools.lru_cache(maxsize=1)
def can_restrict_devices() -> bool:
    """Whether the kernel takes such programs from this process."""
    try:
        os.close(load_policy(USUAL_DEVICES))
    except OSError:
        return False
    return True


# =====================================================================================================
# Host
#
# Facts about this machine, read and never changed. What is missing becomes one sentence a thing in the
# fingerprint's health description.
# =====================================================================================================


class CgroupMode(enum.Enum):
    """How the kernel's control groups are mounted."""

    V2 = "v2"
    HYBRID = "hybrid"  # v1 controllers, and a v2 hierarchy without controllers beside them
    V1 = "v1"

    @property
    def root(self) -> Path | None:
        """The mount point of the v2 hierarchy."""
        paths = {CgroupMode.V2: Path("/sys/fs/cgroup"), CgroupMode.HYBRID: Path("/sys/fs/cgroup/unified")}
        return paths.get(self)


CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")


@dataclass(frozen=True)
class Host:
    """What the machine offers."""

    systemd: int  # major version of systemd-nspawn, 0 when it is not installed
    kernel: tuple[int, int]
    cgroups: CgroupMode
    problems: tuple[str, ...]
    cpus: int = 1
    controllers: frozenset[str] = frozenset()  # of the v2 hierarchy
    has_device_policy: bool = True  # whether tasks can be kept from devices that are not theirs
    is_filtered: bool = False  # whether this process has seccomp filters itself: then it sees those of no other
    open_places: tuple[str, ...] = ()  # directories that tasks write to and other users of the host can get to

    @property
    def is_healthy(self) -> bool:
        return not self.problems

    @property
    def sentence(self) -> str:
        """The health description."""
        return " ".join(self.problems or ("Healthy", *self.shortcomings))

    @property
    def limits(self) -> tuple[str, ...]:
        """The controllers that limit what a task may use."""
        return tuple(controller for controller in CONTROLLERS if controller in self.controllers)

    @property
    def shortcomings(self) -> Iterator[str]:
        """What tasks have to do without, a sentence a thing."""
        missing = [controller for controller in CONTROLLERS if controller not in self.controllers]
        if missing and self.cgroups is CgroupMode.V2:
            yield f"(tasks run without limits of {', '.join(missing)}: the cgroup v2 controllers are missing)"
        elif missing:
            yield "(tasks run without resource limits: they need cgroup v2)"
        if not self.has_device_policy:
            yield "(tasks run without a device policy: it needs a cgroup v2 hierarchy, and bpf(2))"
        if self.is_filtered:
            yield "(no commands can be run in tasks: the agent has a seccomp filter, as of SystemCallFilter=)"
        yield from map(explain_open_place, self.open_places)


def explain_open_place(place: str) -> str:
    """A container's root is the host's root on files there, and may make them set-user-id; inside that has no
    effect, on the host it has."""
    return (
        f"(other users of this machine can get to {place}: a set-user-id file that a task makes there makes them "
        f"root; run chmod 0700 {place})"
    )


def is_open_to_others(path: str) -> bool:
    """Whether users other than root can get to a directory: every one on the way lets somebody pass. False for one
    that is not there."""
    place = Path(path).absolute()
    try:
        found = [os.stat(directory) for directory in (place, *place.parents)]
    except OSError:
        return False
    return all(
        info.st_mode & stat.S_IXOTH or (info.st_mode & stat.S_IXGRP and info.st_gid) or info.st_uid
        for info in found
    )


TOOLS = {
    "systemd-nspawn": "systemd-container",
    "choom": "util-linux",
    "unshare": "util-linux",
    "mount": "util-linux",
    "sed": "sed",
    "rm": "coreutils",
    "sh": "dash",
}

MINIMUM_SYSTEMD = 249


def read_cgroup_mode(root: Path = Path("/sys/fs/cgroup")) -> CgroupMode:
    if (root / "cgroup.controllers").exists():
        return CgroupMode.V2
    return CgroupMode.HYBRID if (root / "unified/cgroup.procs").exists() else CgroupMode.V1


@functools.lru_cache(maxsize=4)
def read_nspawn_version(path: str, modified: float) -> int:
    """Return nspawn's major version; asked again only when the file has changed."""
    match = re.match(r"systemd (\d+)", run([path, "--version"], timeout=10))
    return int(match[1]) if match else 0


def find_problems(systemd: int) -> Iterator[str]:
    """Yield a sentence for each thing without which no task can run."""
    if os.geteuid() != 0:
        yield "The Nomad client must run as root to start containers."
    for tool, package in TOOLS.items():
        if not shutil.which(tool, path=SAFE_PATH):
            yield f"{tool} is not installed: install the package {package}."
    if 0 < systemd < MINIMUM_SYSTEMD:
        yield f"systemd-nspawn is version {systemd}; {MINIMUM_SYSTEMD} or newer is needed."
    try:
        have_id = bool(Path("/etc/machine-id").read_text().strip())
    except OSError:
        have_id = False
    if not have_id:  # nspawn: "Failed to retrieve machine ID", always fatal
        yield "/etc/machine-id is missing or empty: run systemd-machine-id-setup."


@functools.lru_cache(maxsize=1)
def read_boot_id() -> str:
    """Return what tells this run of the kernel from all others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


UNIT_PATHS = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


def have_machined() -> bool:
    """Whether systemd-machined can be called: the call starts it, unless it is masked."""
    if not all(map(os.path.exists, ("/run/systemd/system", "/run/dbus/system_bus_socket"))):
        return False
    found = [path for folder in UNIT_PATHS if os.path.lexists(path := f"{folder}/systemd-machined.service")]
    return (
        bool(found) and os.path.realpath(found[0]) != "/dev/null" and bool(shutil.which("busctl", path=SAFE_PATH))
    )


def read_host() -> Host:
    nspawn = shutil.which("systemd-nspawn", path=SAFE_PATH)
    systemd = read_nspawn_version(nspawn, os.stat(nspawn).st_mtime) if nspawn else 0
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return Host(
        systemd=systemd,
        kernel=(int(release[1]), int(release[2])) if release else (0, 0),
        cgroups=(mode := read_cgroup_mode()),
        problems=tuple(find_problems(systemd)),
        cpus=os.cpu_count() or 1,
        controllers=frozenset(read_text(mode.root / "cgroup.controllers").split()) if mode.root else frozenset(),
        has_device_policy=mode.root is not None and can_restrict_devices(),
        is_filtered=read_status(os.getpid()).get("Seccomp") not in (None, "0"),
    )


# Kernels from which a file system can be the source of an id-mapped mount. What is not listed (overlay, nfs,
# fuse, 9p, ...) cannot; overlay answers "Invalid argument" on every kernel measured up to 7.2.
IDMAP_SINCE = {
    "ext4": (5, 12),
    "xfs": (5, 12),
    "vfat": (5, 12),
    "btrfs": (5, 15),
    "ntfs3": (5, 15),
    "f2fs": (5, 18),
    "erofs": (5, 19),
    "squashfs": (6, 2),
    "tmpfs": (6, 3),
}


@dataclass(frozen=True)
class Mounts:
    """The mounts of this process, to ask which file system a path is on."""

    # mount point and file system, in mountinfo's order: later ones cover earlier ones
    points: tuple[tuple[str, str], ...]

    def filesystem(self, path: str) -> str:
        best = ("", "")
        for point, kind in self.points:
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best[0]):
                best = (point, kind)
        return best[1]

    def have_idmap(self, path: str, kernel: tuple[int, int]) -> bool:
        since = IDMAP_SINCE.get(self.filesystem(path))
        return since is not None and kernel >= since


def parse_mountinfo(text: str) -> Mounts:
    points = []
    for line in filter(None, text.split("\n")):  # not splitlines: a path may hold what else ends a line
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), left.split(" ")[4])
        points.append((point, right.split(" ")[0]))
    return Mounts(tuple(points))


def read_mounts() -> Mounts:
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape"))


# =====================================================================================================
# Options
#
# What an option is. The schema Nomad checks jobs against, decoding, validation, nspawn's arguments and the
# reference all come from the rows of the Table. Every value arrives as the agent's msgpack has it: every key of
# the schema present, nil where the job says nothing.
# =====================================================================================================

Values = Mapping[str, Any]


class Kind(enum.Enum):
    """The type of an option, by its name in Nomad's hclspec.

    The types are the Go driver's: a map is a list of maps, so that both `x { a = "b" }` and
    `x = { "/a" = "/b" }` arrive. An attribute of type map(string) would accept neither.
    """

    BOOL = "bool"
    NUMBER = "number"
    STRING = "string"
    STRINGS = "list(string)"
    STRING_MAP = "list(map(string))"
    NUMBER_MAP = "list(map(number))"
    BLOCK = "block"
    BLOCKS = "list(block)"

    @property
    def is_block(self) -> bool:
        return self in (Kind.BLOCK, Kind.BLOCKS)

    def decode(self, name: str, value: object) -> object:
        """Return the value as the plan uses it; raise ConfigError on anything that is not of this type."""
        decoders: dict[Kind, Callable[[str, object], object]] = {
            Kind.BOOL: decode_bool,
            Kind.NUMBER: decode_number,
            Kind.STRING: decode_string,
            Kind.STRINGS: decode_strings,
            Kind.STRING_MAP: functools.partial(decode_map, decode=decode_string),
            Kind.NUMBER_MAP: functools.partial(decode_map, decode=decode_number),
        }
        return decoders[self](name, value)


def decode_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(name, value, "must be true or false")
    return value


def decode_string(name: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(name, value, "must be a string")
    if "\0" in value:
        raise ConfigError(name, value, "must not hold a NUL character")
    return value


def decode_number(name: str, value: object) -> int:
    """Numbers that a float cannot hold exactly arrive as strings."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if float(value) == int(float(value)):
                return int(float(value))
    raise ConfigError(name, value, "must be a whole number")


def decode_strings(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(name, value, "must be a list of strings")
    return tuple(decode_string(name, item) for item in value)


def decode_map(name: str, value: object, decode: Callable[[str, object], object]) -> dict[str, object]:
    """Fold a list of maps from left to right: of two equal keys the later one wins, as in the Go driver."""
    maps = value if isinstance(value, (list, tuple)) else [value]
    folded: dict[str, object] = {}
    for item in maps:
        if not isinstance(item, Mapping):
            raise ConfigError(name, value, "must be a map")
        for key, entry in item.items():
            folded[decode_string(name, key)] = decode(f"{name}.{key}", entry)
    return folded


class Gate(enum.Enum):
    """A permission: something the operator of a client allows jobs, or does not.

    The value is a word of the plugin's `allow`; the last two have options of their own.
    """

    HOST_NETWORK = "host_network"
    HOST_USERS = "host_users"
    DISK_IMAGES = "disk_images"
    IMAGE_WRITE = "image_write"
    DEVICE_BINDS = "device_binds"
    PIVOT_ROOT = "pivot_root"
    DEVICES = "devices"
    SYSTEM_CALLS = "system_calls"
    HOST_INTERFACES = "host_interfaces"
    HOST_ACCOUNTS = "host_accounts"
    HOST_CREDENTIALS = "host_credentials"
    HOST_OVERLAYS = "host_overlays"
    AMBIENT_CAPABILITIES = "ambient_capabilities"
    SELINUX_LABELS = "selinux_labels"
    LINK_JOURNAL = "link_journal"
    PRIORITY = "priority"
    CAPABILITIES = "allow_caps"
    PATHS = "allow_paths"

    @property
    def is_word(self) -> bool:
        return self not in (Gate.CAPABILITIES, Gate.PATHS)

    @property
    def reference(self) -> str:
        return f"`allow`: {self.value}" if self.is_word else f"`{self.value}`"


@dataclass(frozen=True)
class Permission:
    """What a gate is about, for people."""

    meaning: str  # what a job can do with it
    is_default: bool = False  # whether an empty plugin block allows it: jobs of the Go driver use it
    gives_host: bool = False  # whether a job that has it can become root of the host


PERMISSIONS: Mapping[Gate, Permission] = {
    Gate.HOST_NETWORK: Permission(
        "use the host's network, with its loopback interface and what listens there, and join its bridges",
        is_default=True,
    ),
    Gate.HOST_USERS: Permission(
        "run as the host's root, without a user namespace, or with a range of users of its choice",
        is_default=True,
        gives_host=True,
    ),
    Gate.DISK_IMAGES: Permission(
        "let the host's kernel mount a file system of the job's making, which no kernel is safe from",
        is_default=True,
    ),
    Gate.IMAGE_WRITE: Permission(
        "write to images that other tasks run from, and change the owners of their files", is_default=True
    ),
    Gate.DEVICE_BINDS: Permission(
        "mount device nodes of the host, such as its disks, by `bind`", is_default=True, gives_host=True
    ),
    # systemd-nspawn follows links of the image to it on the host (measured on 252).
    Gate.PIVOT_ROOT: Permission(
        "make a directory of the host that holds a system its root, by a link in its image",
        is_default=True,
        gives_host=True,
    ),
    Gate.DEVICES: Permission("use any device of the host, such as its disks, by `devices`", gives_host=True),
    Gate.SYSTEM_CALLS: Permission("make system calls that nspawn forbids: more of the kernel to attack"),
    Gate.HOST_INTERFACES: Permission(
        "take interfaces away from the host, make others on it, and be a machine of its own in the host's LAN"
    ),
    Gate.HOST_ACCOUNTS: Permission(
        "write to the home directories of the host's users, and so act as them", gives_host=True
    ),
    Gate.HOST_CREDENTIALS: Permission("read any file of the host below `allow_paths`, as root"),
    Gate.HOST_OVERLAYS: Permission("read any directory of the host below `allow_paths`"),
    Gate.AMBIENT_CAPABILITIES: Permission(
        "give a command of an ordinary user the capabilities that `allow_caps` allows"
    ),
    Gate.SELINUX_LABELS: Permission("choose the SELinux labels of its processes and files"),
    Gate.LINK_JOURNAL: Permission("keep its journal among the host's own, in `/var/log/journal`"),
    Gate.PRIORITY: Permission("run before all other processes of the host, by the limits rtprio and nice"),
    Gate.CAPABILITIES: Permission(
        "have these capabilities: in a user namespace over its own things only, with host_users over the host",
        is_default=True,
    ),
    Gate.PATHS: Permission(
        "read and write what is below these directories of the host as root: by default all there is",
        is_default=True,
        gives_host=True,
    ),
}


Check = Callable[[str, Any], Any]
Render = Callable[[str, Any], list[str]]


@dataclass(frozen=True)
class Option:
    """One option of a task or of the plugin.

    `check` raises ConfigError, or returns the value as it is used from there on. `choices` maps what is allowed
    to the systemd version each needs, 0 for any. `argument` is nspawn's option; `render` makes its arguments
    where one word a value will not do.
    """

    name: str
    kind: Kind
    doc: str
    example: str = ""  # a value, as a job has it in HCL
    default: Any = None  # what an unset option is; None: unset
    required: bool = False
    aliases: tuple[str, ...] = ()
    check: Check | None = None
    choices: Mapping[str, int] = field(default_factory=dict)
    since: int = 0  # the systemd version it needs, 0 for any supported one
    gate: Gate | None = None
    opens: Callable[[Any], bool] = bool  # whether a value alone needs the gate, where that is one of `allow`
    argument: str = ""  # "": the plan uses the value by itself
    render: Render | None = None
    fields: tuple[Option, ...] = ()  # of a BLOCK or BLOCKS

    def decode(self, value: object) -> Any:
        if value is None or value == "":  # HCL cannot say "unset" in an expression: "" means the same
            if self.required:
                raise ConfigError(self.name, value, "is required" if value is None else "must not be empty")
            return self.default
        if self.kind is Kind.BLOCK:
            return self.decode_block(value)
        decoded = self.decode_blocks(value) if self.kind is Kind.BLOCKS else self.kind.decode(self.name, value)
        if self.choices and decoded not in self.choices:
            raise ConfigError(self.name, decoded, f"must be one of {', '.join(self.choices)}")
        return self.check(self.name, decoded) if self.check and decoded not in ((), {}) else decoded

    def decode_block(self, value: object) -> Any:
        if not isinstance(value, Mapping):
            raise ConfigError(self.name, value, "must be a block")
        try:
            return decode_options(self.fields, value)
        except ConfigError as error:
            raise error.within(self.name) from None

    def decode_blocks(self, value: object) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(self.name, value, "must be blocks")
        return tuple(map(self.decode_block, value))

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def needed_systemd(self, value: object) -> int:
        """Return the systemd version that this value of the option needs."""
        return max(self.since, self.choices.get(value, 0) if isinstance(value, str) else 0)

    def argv(self, value: Any) -> list[str]:
        """Return nspawn's arguments, each one word, so that no value can become an argument of its own."""
        if not self.argument or not is_said(value):
            return []
        if self.render:
            return self.render(self.argument, value)
        if self.kind is Kind.BOOL:
            return [self.argument]
        items = value if self.kind is Kind.STRINGS else (value,)
        return [f"{self.argument}={item}" for item in items]


def is_judged_apart(value: object) -> bool:
    """Stands for `opens` where it takes more than the value to tell whether the gate is needed."""
    return False


def is_said(value: object) -> bool:
    """Whether a value is more than an option left alone; a 0 is."""
    return value is not None and value is not False and value not in ("", (), {})


def decode_options(options: Sequence[Option], raw: Mapping[str, object]) -> dict[str, Any]:
    """Return every option's value; raise ConfigError for what is unknown, missing or wrong."""
    names = [name for option in options for name in option.names]
    for key in raw:
        if key not in names:
            raise ConfigError(str(key), raw[key], "no such option", f"the options are {', '.join(names)}")
    return {option.name: decode_named(option, raw) for option in options}


def decode_named(option: Option, raw: Mapping[str, object]) -> Any:
    """Return what is said under any of an option's names; what is wrong is said of the name the job uses."""
    said = [name for name in option.names if raw.get(name) is not None]
    if len(said) > 1:
        raise ConfigError(said[1], raw[said[1]], f"is another name of {option.name}", "set one of the two")
    if not said:
        return option.decode(None)
    return (option if said[0] == option.name else replace(option, name=said[0])).decode(raw[said[0]])


# =====================================================================================================
# Checks
#
# What a row's `check` and `render` can be. A check raises ConfigError, or returns the value, in one spelling where
# there are several.
# =====================================================================================================


def is_container_path(name: str, value: str) -> str:
    if not value.startswith("/"):
        raise ConfigError(name, value, "must be an absolute path inside the container")
    if ".." in value.split("/"):
        raise ConfigError(name, value, 'must not contain ".."')
    return value


def are_container_paths(name: str, value: Sequence[str]) -> Sequence[str]:
    return tuple(is_container_path(name, path) for path in value)


def is_pivot_root(name: str, value: str) -> str:
    if value.count(":") > 1:
        raise ConfigError(name, value, "must be PATH or PATH:PATH")
    for part in value.split(":"):
        is_container_path(name, part)
    return value


def matches(pattern: str, rule: str) -> Check:
    """Make a check of a string, or of each string in a list."""

    def check(name: str, value: Any) -> Any:
        for item in (value,) if isinstance(value, str) else value:
            if not re.fullmatch(pattern, item):
                raise ConfigError(name, item, rule)
        return value

    return check


def is_between(low: int, high: int, what: str = "a whole number") -> Check:
    def check(name: str, value: int) -> int:
        if not low <= value <= high:
            raise ConfigError(name, value, f"must be {what} from {low} to {high}")
        return value

    return check


BIND_OPTIONS = ("rbind", "norbind", "idmap", "noidmap", "rootidmap", "owneridmap")


def parse_bind(target: str) -> tuple[str, str]:
    """Split `/path:options` as nspawn has it; a colon that no options follow belongs to the path."""
    path, colon, options = target.rpartition(":")
    if colon and all(option in BIND_OPTIONS for option in options.split(",")):
        return path, options
    return target, ""


def are_binds(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    for source, target in value.items():
        is_source(f"{name}.{source}", source, shown=target)
        is_container_path(f"{name}.{source}", parse_bind(target)[0])
    return value


OWN_DIRECTORIES = ("alloc", "local", "secrets")  # of a task, as it names them itself


def is_source(name: str, path: str, shown: object) -> None:
    """Check where something comes from: a path of the host, or one in the task's own directories."""
    own = path.split("/")[0] in OWN_DIRECTORIES
    if not (path.startswith("/") or own):
        rule = "the source must be an absolute path of the host, or one that begins with alloc, local or secrets"
        raise ConfigError(name, shown, rule)
    if own and ".." in path.split("/"):
        raise ConfigError(name, shown, 'the source must not contain ".."')


def split_fields(text: str) -> list[str]:
    """Split at colons, as nspawn does: a backslash makes the next character an ordinary one."""
    return [
        re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL)
        for part in re.findall(r"(?:^|:)((?:\\.|[^:\\])*)", text, re.DOTALL)
    ]


def are_overlays(name: str, value: Sequence[str]) -> Sequence[str]:
    """The directory that takes the changes must be a temporary one: systemd-nspawn opens it and its work directory
    by path, when somebody who can write there may have exchanged them."""
    for item in value:
        *sources, target = split_fields(item)
        if len(sources) < 2 or not all(sources[:-1]):
            form = "LOWER::TARGET" if name == "overlay" else "LOWER:LOWER:TARGET with the topmost last"
            raise ConfigError(name, item, f"must be {form}")
        if sources[-1] and name == "overlay":
            rule = "the field before the target must be empty: changes are kept in memory"
            raise ConfigError(name, item, rule, "use bind for a directory that keeps changes")
        for source in filter(None, sources):
            if not source.startswith("+/"):
                is_source(name, source, shown=item)
        is_container_path(name, target)
    return value


def is_of_image(overlays: Sequence[str]) -> bool:
    """Whether an overlay names a directory of the image: a link there leads systemd-nspawn to one of the host."""
    return any(source.startswith("+/") for item in overlays for source in split_fields(item)[:-1])


# systemd-nspawn takes all that mount(8) knows: "bind" and "remount" would act on file systems of the host.
TMPFS_OPTION = (
    r"(size|nr_blocks|nr_inodes|mode|uid|gid|huge)=[\w%.-]+|ro|rw|nodev"
    r"|(no)?(exec|suid|atime|diratime|swap)|(rel|strict)atime|lazytime"
)


def are_tmpfs(name: str, value: Sequence[str]) -> Sequence[str]:
    for item in value:
        path, colon, options = item.partition(":")
        if colon and not all(re.fullmatch(TMPFS_OPTION, option, re.ASCII) for option in options.split(",")):
            rule = "must be PATH or PATH:OPTIONS, with options of tmpfs, as in /run/cache:size=100M,mode=755"
            raise ConfigError(name, item, rule)
        is_container_path(name, path)
    return value


def are_ports(name: str, value: Mapping[str, int]) -> Mapping[str, int]:
    for label, port in value.items():
        is_between(1, 65535, "a port")(f"{name}.{label}", port)
    return value


def is_duration(name: str, value: str) -> float:
    """Return the seconds of a duration as Nomad's jobs have it: `500ms`, `2s`, `1m`."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h)", value, re.ASCII)
    if not match:
        raise ConfigError(name, value, "must be a duration such as 500ms, 5s or 1m")
    return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def are_extra_hosts(name: str, value: Sequence[str]) -> Sequence[str]:
    for item in value:
        host, _, address = item.partition(":")
        if not (re.fullmatch(HOSTNAME, host) and is_address(address)):
            raise ConfigError(name, item, "must be NAME:ADDRESS, as in db:192.0.2.7 or db:2001:db8::7")
    return value


def is_address(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            socket.inet_pton(family, text)
            return True
    return False


def are_variables(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    for key in value:
        if not VARIABLE.fullmatch(key):
            raise ConfigError(
                name,
                key,
                "the name of a variable is letters, digits and underscores, and no digit comes first",
            )
    return value


VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # nspawn refuses others: "Cannot assign environment variable"
# What systemd refuses in a text beside the NUL: surrogates and the code points that are never characters.
NEVER_CHARACTERS = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
NO_TEXT = re.compile(f"[\\0\ud800-\udfff\ufdd0-\ufdef{NEVER_CHARACTERS}]")

CAPABILITIES = tuple(
    """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
    SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
    AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
    PERFMON BPF CHECKPOINT_RESTORE
    """.split()  # noqa: SIM905 # a list of words reads better
)


def are_capabilities(name: str, value: Sequence[str]) -> Sequence[str]:
    """Return capabilities as CAP_NET_ADMIN, from that, docker's net_admin, or lists with commas."""
    found = []
    for item in (part.strip() for text in value for part in text.split(",")):
        plain = item.upper().removeprefix("CAP_")
        if item.lower() != "all" and plain not in CAPABILITIES:
            raise ConfigError(name, item, "is no capability", "use a name such as CAP_NET_ADMIN, or all")
        found.append("all" if item.lower() == "all" else f"CAP_{plain}")
    return tuple(found)


def are_single_capabilities(name: str, value: Sequence[str]) -> Sequence[str]:
    found = are_capabilities(name, value)
    if "all" in found:
        raise ConfigError(name, "all", "must be a list of single capabilities")
    return found


RLIMITS = ("AS", "CORE", "CPU", "DATA", "FSIZE", "LOCKS", "MEMLOCK", "MSGQUEUE", "NICE", "NOFILE", "NPROC", "RSS",
           "RTPRIO", "RTTIME", "SIGPENDING", "STACK")  # fmt: skip


def are_rlimits(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    """Return limits by their full names, from RLIMIT_NOFILE or docker's nofile."""
    found = {}
    for key, limit in value.items():
        plain = key.upper().removeprefix("RLIMIT_")
        if plain not in RLIMITS:
            known = ", ".join(limit.lower() for limit in RLIMITS)
            raise ConfigError(f"{name}.{key}", limit, "is no resource limit", f"the limits are {known}")
        if not re.fullmatch(r"(\d{1,19}|infinity)(:(\d{1,19}|infinity))?", limit):
            raise ConfigError(f"{name}.{key}", limit, "must be LIMIT or SOFT:HARD, each a number or infinity")
        soft, _, hard = limit.partition(":")
        if hard and float(soft.replace("infinity", "inf")) > float(hard.replace("infinity", "inf")):
            raise ConfigError(f"{name}.{key}", limit, "the soft limit must not be above the hard one")
        found[f"RLIMIT_{plain}"] = limit
    return found


CREDENTIAL = re.compile(r"(?!\.{1,2}$)[!-.0-9;-~]{1,255}", re.ASCII)  # printable, without "/" and ":"


def are_credentials(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    for key in value:
        if not CREDENTIAL.fullmatch(key):
            raise ConfigError(name, key, 'the name of a credential is printable ASCII without "/" and ":"')
    return value


def are_credential_files(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    for key, path in are_credentials(name, value).items():
        is_source(f"{name}.{key}", path, shown=path)
    return value


def is_range(name: str, value: str) -> str:
    """no, yes, pick, identity, BASE or BASE:COUNT, as in nspawn's --private-users=."""
    if re.fullmatch(r"no|yes|pick|identity", value):
        return value
    rule = "must be pick, identity, no, or BASE or BASE:COUNT with numbers of users"
    match = re.fullmatch(r"(\d{1,10})(?::(\d{1,10}))?", value)
    if not match:
        raise ConfigError(name, value, rule)
    base, count = int(match[1]), int(match[2] or 65536)
    if not (count and base + count < 1 << 32):
        raise ConfigError(name, value, "the range must not be empty and must end below 4294967295")
    return value


def is_image_address(name: str, value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+\S*|(docker://)?(?!.*://)[\w.:@/\[\]-]+", value, re.ASCII):
        raise ConfigError(
            name, value, "must be an http:// or https:// address, or the name of an image in a registry"
        )
    return value


def is_checksum(name: str, value: str) -> str:
    algorithm, colon, digits = value.rpartition(":")
    lengths = {"sha256": 64, "sha512": 128, "sha384": 96}
    if len(digits) != lengths.get(algorithm if colon else "sha256") or not re.fullmatch("[0-9a-fA-F]+", digits):
        raise ConfigError(name, value, 'must be "sha256:" and 64 hexadecimal digits, or so for sha384 and sha512')
    return value


def is_platform(name: str, value: str) -> str:
    if not re.fullmatch(r"linux/[a-z0-9_]+(/[a-z0-9.]+)?", value):
        raise ConfigError(name, value, "must be linux/ARCHITECTURE or linux/ARCHITECTURE/VARIANT")
    return value


def is_helper(name: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", value):
        raise ConfigError(name, value, "must be the end of a program's name, after docker-credential-")
    return value


def is_positive(name: str, value: int) -> int:
    if value <= 0:
        raise ConfigError(name, value, "must be a number above 0")
    return value


def is_host_directory(name: str, value: str) -> str:
    if not value.startswith("/") or ".." in value.split("/"):
        raise ConfigError(name, value, 'must be an absolute path of the host without ".."')
    return value


def are_host_directories(name: str, value: Sequence[str]) -> Sequence[str]:
    return tuple(is_host_directory(name, path) for path in value)


def are_gates(name: str, value: Sequence[str]) -> Sequence[str]:
    """Return the permissions that are allowed, with what `default` stands for."""
    known = [gate.value for gate in Gate if gate.is_word] + ["default", "all"]
    found: list[str] = []
    for word in value:
        if word not in known:
            raise ConfigError(name, word, f"must be one of {', '.join(known)}")
        found += DEFAULT_GATES if word == "default" else (word,)
    return tuple(dict.fromkeys(found))


DEFAULT_GATES = tuple(
    gate.value for gate, permission in PERMISSIONS.items() if gate.is_word and permission.is_default
)


is_interface = matches(r"(?!\.{1,2}$)[!-.0-9;-~]{1,15}", "must be the name of a network interface")
are_interfaces = matches(
    r"(?!\.{1,2}(:|$))[!-.0-9;-~]{1,15}(:(?!\.{1,2}$)[!-.0-9;-~]{1,15})?",
    "must be the name of an interface of the host, or HOST:CONTAINER, each of up to 15 characters",
)
is_printable = matches(r"[ -~]+", "must be printable ASCII")
ACCOUNT = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"
HOSTNAME = r"(?=.{1,64}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
USER = re.compile(r"(?!-)[^\s:/,\x00-\x1f\x7f]{1,256}")


def is_user(name: str, value: str) -> str:
    if not USER.fullmatch(value):
        raise ConfigError(name, value, "must be the name or the number of a user inside the container")
    return value


MAX_PIDS = 4 << 20  # the kernel's
SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def is_size(name: str, value: str) -> str:
    """Return a size in bytes, or "max", as the kernel's control files have it."""
    if value == "infinity":
        return "max"
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)", value, re.ASCII)
    if not match:
        raise ConfigError(name, value, "must be a size such as 512M or 2G, or infinity")
    return str(int(match[1]) * SIZES[match[2]])


# Renderers, for what is more than one word a value.


def escape_field(text: str) -> str:
    """Escape for nspawn's colon-separated fields."""
    return text.replace("\\", "\\\\").replace(":", "\\:")


def pairs(argument: str, value: Mapping[str, str]) -> list[str]:
    return [f"{argument}={key}={item}" for key, item in value.items()]


def tmpfs(argument: str, value: Sequence[str]) -> list[str]:
    return [f"{argument}={item}" for item in (text.replace("\\", "\\\\") for text in value)]


def glued(argument: str, value: str) -> list[str]:
    return [f"{argument}{value}"]


def ambient(argument: str, value: Sequence[str]) -> list[str]:
    """nspawn wants them among the container's capabilities, too."""
    return [f"{name}={item}" for item in value for name in ("--capability", argument)]


def joined(argument: str, value: Sequence[str]) -> list[str]:
    return [f"{argument}={' '.join(value)}"]


RESOLV_CONF = ("auto", "off", "delete") + tuple(
    f"{how}-{what}" for how in ("copy", "replace", "bind") for what in ("host", "static", "uplink", "stub")
)


def any_of(*choices: str, **since: int) -> dict[str, int]:
    """Return choices for a row; those that need a systemd version come with it."""
    return {**dict.fromkeys(choices, 0), **since}


# =====================================================================================================
# Table
#
# The rows: a task's options by groups, the plugin's, and what of systemd-nspawn jobs do not have. The reference in
# the README is made from them.
# =====================================================================================================

IMAGE_OPTIONS: tuple[Option, ...] = (
    Option("image", Kind.STRING,
           "The container's file system: the path of a directory, of a disk image or block device, or the name "
           "of an image in `image_dir`. A relative path is looked up in the task's directory first.",
           '"debian"', required=True),
    Option("image_download", Kind.BLOCK,
           "Where the image comes from when `image_dir` has none of this name: it is fetched once, into the "
           "driver's own store.",
           '{ url = "https://example.com/debian.tar.xz" }', fields=(
               Option("url", Kind.STRING,
                      "The address: http or https, or an image in a registry as `HOST/NAME:TAG`.",
                      '"https://example.com/debian.tar.xz"', required=True, check=is_image_address),
               Option("type", Kind.STRING,
                      "What is there: an archive of a directory, a disk image, or an image in a registry.",
                      '"raw"', default="tar", choices=any_of("tar", "raw", "docker")),
               Option("verify", Kind.STRING,
                      "What the file is checked against: `URL.sha256` or `SHA256SUMS` beside it, and for "
                      "`signature` the keys of systemd's import keyring. Registries have digests for that.",
                      '"checksum"', default="no", choices=any_of("no", "checksum", "signature")),
               Option("checksum", Kind.STRING, "The checksum the file must have.",
                      '"sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"',
                      check=is_checksum),
               Option("platform", Kind.STRING,
                      "Which of a registry's images of one name; this machine's when unset.", '"linux/arm64"',
                      check=is_platform),
               Option("force", Kind.BOOL, "Ask at every start whether there is something newer.", "true",
                      default=False),
           )),
    Option("auth", Kind.BLOCK,
           "Credentials for where the image is fetched from.",
           '{ username = "ci" }', fields=(
               Option("username", Kind.STRING, "The user's name.", '"ci"'),
               Option("password", Kind.STRING, "The password or token; best from a variable.", '"s3cret"'),
           )),
    Option("ephemeral", Kind.BOOL,
           "Run on a root of the task's own over the image: changes are kept in the task's directory and thrown "
           "away at the end. Any number of tasks can share the image, and nothing of it is copied.",
           "true", default=False, argument="--ephemeral"),
    Option("read_only", Kind.BOOL, "Mount the image read-only.", "true", default=False, argument="--read-only"),
    Option("volatile", Kind.STRING,
           "Keep changes in memory only: `yes` for all but `/usr`, `state` for `/var`, `overlay` for everything. "
           "`overlay` is `ephemeral` in memory.",
           '"overlay"', choices=any_of("no", "yes", "state", "overlay"), argument="--volatile"),
    Option("pivot_root", Kind.STRING,
           "Make this directory of the image the root: `PATH`, or `PATH:PATH` to say where the old root goes.",
           '"/sysroot"', check=is_pivot_root, gate=Gate.PIVOT_ROOT, argument="--pivot-root"),
    Option("image_policy", Kind.STRING,
           "Which partitions a disk image must and may have, and how they must be protected.",
           '"root=verity+signed:swap=absent"', since=254, check=is_printable, argument="--image-policy"),
    Option("root_hash", Kind.STRING,
           "The dm-verity root hash, in hexadecimal, that a disk image must have.",
           '"2d8c7f1f2b6a4f0e9c3d5b7a8e9f0a1b2d8c7f1f2b6a4f0e9c3d5b7a8e9f0a1b"',
           check=matches(r"([0-9a-fA-F]{2}){16,64}", "must be a hash in hexadecimal digits"),
           argument="--root-hash"),
    Option("root_hash_sig", Kind.STRING,
           "The PKCS#7 signature of `root_hash`, as `base64:...`.",
           '"base64:MIIC"', check=matches(r"base64:[A-Za-z0-9+/=]+", "must be base64: and the signature in it"),
           argument="--root-hash-sig"),
)  # fmt: skip

PROGRAM_OPTIONS: tuple[Option, ...] = (
    Option("boot", Kind.BOOL,
           "Boot the image's init as PID 1; `command` then holds arguments for it.",
           "false", default=True, argument="--boot"),
    Option("command", Kind.STRINGS,
           "The program and its arguments; required unless `boot` is true.",
           '["/bin/sleep", "60"]', default=()),
    Option("process_two", Kind.BOOL,
           "Run the command as PID 2 under a small init that reaps processes and keeps the usual meaning of "
           "signals.",
           "true", default=False, aliases=("init",), argument="--as-pid2"),
    Option("user", Kind.STRING,
           "The user inside the container that runs the command; the task's own `user` when unset.",
           '"www-data"', check=is_user, argument="-u", render=glued),  # --user= means another thing since 261
    Option("working_directory", Kind.STRING,
           "The directory inside the container in which the command starts.",
           '"/srv"', aliases=("work_dir",), check=is_container_path, argument="--chdir"),
    Option("environment", Kind.STRING_MAP,
           "Variables for the command or init; those that Nomad sets win.",
           '{ GREETING = "hello" }', default={}, check=are_variables),
    Option("console", Kind.STRING,
           "How stdin, stdout and stderr are set up: `pipe` for commands and `read-only` for booted systems when "
           "unset.",
           '"pipe"', choices=any_of("interactive", "read-only", "passive", "pipe", "autopipe"),
           argument="--console"),
    Option("notify_ready", Kind.BOOL,
           "Take the task for started only when its PID 1 says so (`sd_notify`): a booted systemd does, once it "
           "has reached its default target.",
           "true", default=False, argument="--notify-ready=yes"),
    Option("suppress_sync", Kind.BOOL,
           "Let fsync() and its like do nothing: faster, and not for data that must outlive a power failure.",
           "true", default=False, since=250, argument="--suppress-sync=yes"),
    Option("personality", Kind.STRING,
           "The architecture that uname() reports, to run 32-bit systems on 64-bit hosts.",
           '"x86"', choices=any_of("x86", "x86-64", "arm", "arm64", "ppc", "ppc64", "ppc64-le", "s390", "s390x"),
           argument="--personality"),
    Option("set_credential", Kind.STRING_MAP,
           "Credentials for systemd and its services inside, by name. The values stand on no command line.",
           '{ "db.password" = "secret" }', default={}, check=are_credentials),
    Option("load_credential", Kind.STRING_MAP,
           "Credentials out of files: by name, a path of the host or one in the task's directories.",
           '{ "db.password" = "secrets/password" }', default={}, check=are_credential_files,
           gate=Gate.HOST_CREDENTIALS, opens=is_judged_apart),
)  # fmt: skip

USER_OPTIONS: tuple[Option, ...] = (
    Option("user_namespacing", Kind.BOOL,
           "Map the container's users to a range of their own on the host. The operator chooses what it is when "
           "unset.",
           "false", gate=Gate.HOST_USERS, opens=lambda value: not value),
    Option("private_users", Kind.STRING,
           "Which range: `pick` finds a free one, `identity` and `BASE:COUNT` name one, `no` is the same as "
           "`user_namespacing = false`. Counts only with user namespaces.",
           '"pick"', check=is_range, gate=Gate.HOST_USERS, opens=lambda value: value not in (None, "yes", "pick"),
           argument="--private-users"),
    Option("private_users_ownership", Kind.STRING,
           "How the image's files come to belong to that range: `map` shows them so, `chown` changes them for "
           "good, `auto` maps where that is possible.",
           '"map"', choices=any_of("off", "chown", "map", "auto", foreign=258),
           argument="--private-users-ownership"),
    Option("private_users_delegate", Kind.NUMBER,
           "How many further ranges of 65536 users the container gets for containers of its own.",
           "1", since=260, check=is_between(1, 1024), argument="--private-users-delegate"),
    Option("bind_user", Kind.STRINGS,
           "Users of the host to bring into the container, with their home directories.",
           '["alice"]', default=(), check=matches(ACCOUNT, "must be the name of a user of the host"),
           gate=Gate.HOST_ACCOUNTS, argument="--bind-user"),
    Option("bind_user_shell", Kind.STRING,
           "The shell of those users inside: a path, or true for their own one.",
           '"/bin/bash"', since=258, check=matches(r"true|false|/[!-~]+", "must be a path, true or false"),
           argument="--bind-user-shell"),
    Option("bind_user_group", Kind.STRINGS,
           "Further groups of those users inside.",
           '["video"]', default=(), since=259, check=matches(ACCOUNT, "must be the name of a group"),
           argument="--bind-user-group"),
)  # fmt: skip

NETWORK_OPTIONS: tuple[Option, ...] = (
    Option("network_veth", Kind.BOOL,
           "Give the container a network of its own with a virtual link to the host; false: the host's network. "
           "True when unset, unless another option of this table makes its network.",
           "false", gate=Gate.HOST_NETWORK, opens=is_judged_apart,  # see check_gates
           argument="--network-veth"),
    Option("network_zone", Kind.STRING,
           "Join the virtual link to a bridge of this name, which all containers of the zone share and which is "
           "there as long as one of them runs.",
           '"web"',
           check=matches(r"[A-Za-z0-9_.-]{1,12}", "must be 1 to 12 letters, digits, dots, dashes or underscores"),
           argument="--network-zone"),
    Option("network_bridge", Kind.STRING,
           "Join the virtual link to this bridge of the host.",
           '"br0"', check=is_interface, gate=Gate.HOST_NETWORK, argument="--network-bridge"),
    Option("network_veth_extra", Kind.STRINGS,
           "Further virtual links to the host: `HOST`, or `HOST:CONTAINER` with the names of both ends.",
           '["ve-db:db0"]', default=(), check=are_interfaces, gate=Gate.HOST_INTERFACES,
           argument="--network-veth-extra"),
    Option("network_macvlan", Kind.STRINGS,
           "Interfaces of the host on each of which the container gets an address of its own in the LAN.",
           '["eth0"]', default=(), check=are_interfaces, gate=Gate.HOST_INTERFACES, argument="--network-macvlan"),
    Option("network_ipvlan", Kind.STRINGS,
           "The same with the hardware address of the host's interface.",
           '["eth0"]', default=(), check=are_interfaces, gate=Gate.HOST_INTERFACES, argument="--network-ipvlan"),
    Option("network_interface", Kind.STRINGS,
           "Interfaces of the host that move into the container while it runs.",
           '["eth1"]', default=(), check=are_interfaces, gate=Gate.HOST_INTERFACES,
           argument="--network-interface"),
    Option("private_network", Kind.BOOL,
           "Give the container a network of its own with nothing in it but the loopback interface, and what other "
           "options of this table add.",
           "true", default=False, argument="--private-network"),
    Option("ports", Kind.STRINGS,
           "Labels of ports in the group's network block: the host's port leads to the label's `to`, or to the "
           "same number.",
           '["http"]', default=()),
    Option("port_map", Kind.NUMBER_MAP,
           "Port labels to ports inside the container, for TCP and UDP.",
           "{ http = 8080 }", default={}, check=are_ports),
    Option("hostname", Kind.STRING,
           "The name of the host inside; the machine's name when unset.",
           '"web1"', check=matches(HOSTNAME, "must be a host name of up to 64 letters, digits, dashes and dots"),
           argument="--hostname"),
    Option("extra_hosts", Kind.STRINGS,
           "Lines for `/etc/hosts`, beside the image's own: `NAME:ADDRESS`.",
           '["db:192.0.2.7"]', default=(), check=are_extra_hosts),
    Option("address_timeout", Kind.STRING,
           "How long the start waits for the container's address; `0s` when unset. Only services with "
           '`address_mode = "driver"` need it: Nomad cannot be told later.',
           '"10s"', check=is_duration),
    Option("resolv_conf", Kind.STRING,
           "How `/etc/resolv.conf` inside the container is made.",
           '"copy-host"', choices=any_of(*RESOLV_CONF), argument="--resolv-conf"),
)  # fmt: skip

FILE_OPTIONS: tuple[Option, ...] = (
    Option("bind", Kind.STRING_MAP,
           "Directories and files to mount, writable. The source is a path of the host, or one that begins with "
           "`alloc`, `local` or `secrets` in the task's own directories; options may follow the target after a "
           "colon: `norbind`, `idmap`, `rootidmap`, `owneridmap` (systemd 256).",
           '{ "/srv/data" = "/data", "local/etc" = "/etc/app:idmap" }', default={}, check=are_binds,
           gate=Gate.PATHS),
    Option("bind_read_only", Kind.STRING_MAP,
           "The same, read-only.",
           '{ "/etc/ssl/certs" = "/etc/ssl/certs" }', default={}, check=are_binds, gate=Gate.PATHS),
    Option("tmpfs", Kind.STRINGS,
           "Directories to mount an empty file system in memory on: `PATH` or `PATH:OPTIONS`.",
           '["/run/cache:size=100M"]', default=(), check=are_tmpfs, argument="--tmpfs", render=tmpfs),
    Option("overlay", Kind.STRINGS,
           "Directories whose changes are kept in memory until the task ends: `LOWER::TARGET`, or "
           "`LOWER:LOWER::TARGET` with the topmost last. A `+` in front of a path takes it from the image.",
           '["+/etc::/etc"]', default=(), check=are_overlays, gate=Gate.HOST_OVERLAYS,
           opens=is_of_image),
    Option("overlay_read_only", Kind.STRINGS,
           "Directories to lay over one another, read-only: `LOWER:LOWER:TARGET` with the topmost last.",
           '["+/usr:/srv/addon/usr:/usr"]', default=(), check=are_overlays, gate=Gate.HOST_OVERLAYS,
           opens=is_of_image),
    Option("inaccessible", Kind.STRINGS,
           "Files and directories of the image to hide.",
           '["/usr/bin/ssh"]', default=(), check=are_container_paths, argument="--inaccessible"),
    Option("devices", Kind.BLOCKS,
           "Devices of the host that the container may use, a block each. All others it cannot open, whatever "
           "nodes its image holds.",
           '{ host_path = "/dev/kvm" }', default=(), gate=Gate.DEVICES, fields=(
               Option("host_path", Kind.STRING, "The device node on the host; symbolic links are followed.",
                      '"/dev/ttyUSB0"', required=True, check=is_host_directory),
               Option("container_path", Kind.STRING, "Where it is inside; in the same place when unset.",
                      '"/dev/modem"', check=is_container_path),
               Option("cgroup_permissions", Kind.STRING,
                      "What may be done with it: `r` to read, `w` to write, `m` to make further nodes of it, for "
                      "which it takes `CAP_MKNOD`, too.",
                      '"r"', default="rwm",
                      check=matches(r"(?!.*(.).*\1)[rwm]{1,3}", "must be one or more of the letters r, w and m")),
           )),
)  # fmt: skip

SECURITY_OPTIONS: tuple[Option, ...] = (
    Option("capability", Kind.STRINGS,
           "Capabilities the container gets beside the default ones; `all` for all there are. Without user "
           "namespaces `CAP_MKNOD` is no default one.",
           '["CAP_NET_ADMIN"]', default=(), aliases=("cap_add",), check=are_capabilities, gate=Gate.CAPABILITIES,
           argument="--capability"),
    Option("drop_capability", Kind.STRINGS,
           "Capabilities it shall not have.",
           '["CAP_NET_RAW", "CAP_SYS_PTRACE"]', default=(), aliases=("cap_drop",), check=are_capabilities,
           argument="--drop-capability"),
    Option("ambient_capability", Kind.STRINGS,
           "Capabilities the command has although its user is not root.",
           '["CAP_NET_BIND_SERVICE"]', default=(), check=are_single_capabilities, gate=Gate.AMBIENT_CAPABILITIES,
           argument="--ambient-capability", render=ambient),
    Option("no_new_privileges", Kind.BOOL,
           "Let no program inside get more rights than who starts it: setuid programs lose their effect.",
           "true", default=False, argument="--no-new-privileges=yes"),
    Option("system_call_filter", Kind.STRINGS,
           "System calls and groups of them to allow beside the default ones, or with a `~` in front to forbid.",
           '["~@mount", "~bpf"]', default=(),
           check=matches(r"~?@?[a-z0-9_-]+", "must be a system call or a group as @mount, or ~ and one of them"),
           gate=Gate.SYSTEM_CALLS, opens=lambda value: any(not item.startswith("~") for item in value),
           argument="--system-call-filter"),
    Option("restrict_address_families", Kind.STRINGS,
           "The only families of sockets the container may use, or with a `~` in front of the first the only ones "
           "it may not.",
           '["AF_UNIX", "AF_INET", "AF_INET6"]', default=(), since=261,
           check=matches(r"~?AF_[A-Z0-9_]+|none", "must be an address family such as AF_INET"),
           argument="--restrict-address-families", render=joined),
    Option("selinux_context", Kind.STRING,
           "The SELinux label of the container's processes.",
           '"system_u:system_r:svirt_lxc_net_t:s0"', check=is_printable, gate=Gate.SELINUX_LABELS,
           argument="--selinux-context"),
    Option("selinux_apifs_context", Kind.STRING,
           "The SELinux label of the files in its API file systems.",
           '"system_u:object_r:svirt_sandbox_file_t:s0"', check=is_printable, gate=Gate.SELINUX_LABELS,
           argument="--selinux-apifs-context"),
)  # fmt: skip

RESOURCE_OPTIONS: tuple[Option, ...] = (
    Option("rlimit", Kind.STRING_MAP,
           "Limits of the container's processes: `LIMIT`, or `SOFT:HARD`.",
           '{ nofile = "4096:8192" }', default={}, aliases=("ulimit",), check=are_rlimits, gate=Gate.PRIORITY,
           opens=lambda value: not {"RLIMIT_RTPRIO", "RLIMIT_NICE"}.isdisjoint(value), argument="--rlimit",
           render=pairs),
    Option("oom_score_adjust", Kind.NUMBER,
           "How much sooner than others the kernel ends the container's processes when the host is out of memory: "
           "0 to 1000.",
           "500", aliases=("oom_score_adj",), check=is_between(0, 1000)),
    Option("cpu_affinity", Kind.STRING,
           "The only CPUs its processes run on, as in `0-3,5`.",
           '"0-1"',
           check=matches(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", "must be CPUs and ranges, as in 0-3,5"),
           argument="--cpu-affinity"),
    Option("cpu_hard_limit", Kind.BOOL,
           "Never more CPU than the job's `cpu`, even when the machine is idle.", "true", default=False),
    Option("pids_limit", Kind.NUMBER,
           "How many processes and threads it may have, at most the plugin's `pids_limit`, which is also the "
           "default.",
           "200", check=is_between(1, MAX_PIDS)),
    Option("memory_swap_max", Kind.STRING,
           "How much swap it may use beside its memory: a size such as `512M`, or `infinity`; none when unset.",
           '"512M"', check=is_size),
    Option("io_weight", Kind.NUMBER,
           "Its share of disk time beside other tasks, 1 to 10000; 100 is usual.",
           "200", check=is_between(1, 10000)),
)  # fmt: skip

INTEGRATION_OPTIONS: tuple[Option, ...] = (
    Option("timezone", Kind.STRING,
           "How `/etc/localtime` inside the container is made.",
           '"off"', choices=any_of("off", "copy", "bind", "symlink", "delete", "auto"), argument="--timezone"),
    Option("link_journal", Kind.STRING,
           "Show the container's journal on the host, as `/var/log/journal/ALLOCATION` until the task is "
           "destroyed: its files are kept there (`host`), or linked from there (`guest`). The image must have no "
           "machine id of its own. `try-` goes without where it cannot be; `auto` is `no`.",
           '"try-guest"', choices=any_of("no", "host", "try-host", "guest", "try-guest", "auto"),
           gate=Gate.LINK_JOURNAL, opens=lambda value: value not in (None, "no", "auto")),
)  # fmt: skip

TASK_GROUPS: Mapping[str, tuple[Option, ...]] = {
    "Image": IMAGE_OPTIONS,
    "Program": PROGRAM_OPTIONS,
    "Users": USER_OPTIONS,
    "Network": NETWORK_OPTIONS,
    "Files": FILE_OPTIONS,
    "Security": SECURITY_OPTIONS,
    "Resources": RESOURCE_OPTIONS,
    "Integration": INTEGRATION_OPTIONS,
}
TASK_OPTIONS: tuple[Option, ...] = tuple(itertools.chain(*TASK_GROUPS.values()))

PLUGIN_OPTIONS: tuple[Option, ...] = (
    Option("enabled", Kind.BOOL, "Whether the driver offers itself to jobs at all.", "false", default=True),
    Option("volumes", Kind.BOOL,
           "Whether tasks may mount anything of the host: Nomad's volumes (`volume_mount`), and what `bind`, "
           "`bind_read_only`, `overlay`, `load_credential` and a path in `image` name. Their own directories they "
           "always may.",
           "false", default=True),
    Option("allow_paths", Kind.STRINGS,
           "The only directories of the host that jobs may name in those options, with all that is below them; "
           "links are followed first. Nomad's volumes and `image_dir` need not be among them.",
           '["/srv", "/etc/ssl/certs"]', default=("/",), check=are_host_directories),
    Option("allow_caps", Kind.STRINGS,
           "The only capabilities jobs may ask for; `all` for any.",
           '["CAP_NET_ADMIN"]', default=("all",), check=are_capabilities),
    Option("allow", Kind.STRINGS,
           "What else jobs may do that opens the host, see [Permissions](#permissions). `default` stands for what "
           "an empty plugin block allows, to add to it; `all` for everything.",
           '["default", "devices"]', default=DEFAULT_GATES, check=are_gates),
    Option("user_namespacing", Kind.BOOL,
           "Whether containers have user namespaces when their job does not say.", "false", default=True),
    Option("pids_limit", Kind.NUMBER,
           "How many processes and threads a task may have; 0 for any number.",
           "4096", default=16384, check=is_between(0, MAX_PIDS)),
    Option("image_dir", Kind.STRING,
           "The directory of images that jobs name without a path.",
           '"/srv/images"', default=str(MACHINES_ROOT), check=is_host_directory),
    Option("ephemeral_dir", Kind.STRING,
           "The directory for what tasks with `ephemeral` change; their own in the allocation when unset, for "
           "which `ephemeral_disk` reserves room.",
           '"/srv/scratch"', check=is_host_directory),
    Option("image_gc", Kind.BOOL, "Whether fetched images that no task uses are removed.", "false", default=True),
    Option("image_gc_delay", Kind.STRING, "How long a fetched image is kept after its last use; a day when unset.",
           '"30m"', check=is_duration),
    Option("image_size_limit", Kind.NUMBER, "How many megabytes a fetched image may have, unpacked.", "20000",
           default=65536, check=is_positive),
    Option("image_stall_timeout", Kind.STRING,
           "After how long without any data a download counts as broken, a minute when unset. There is no limit "
           "on the whole.",
           '"30s"', check=is_duration),
    Option("insecure_registries", Kind.STRINGS, "Registries that are asked by plain http.",
           '["registry.local:5000"]', default=()),
    Option("auth", Kind.BLOCK,
           "Credentials for registries, for jobs that bring none.",
           '{ config = "/root/.docker/config.json" }', fields=(
               Option("config", Kind.STRING, "A file of docker's, with `auths`, `credHelpers` or `credsStore`.",
                      '"/root/.docker/config.json"', check=is_host_directory),
               Option("helper", Kind.STRING, "The helper to ask, without its prefix `docker-credential-`.",
                      '"ecr-login"', check=is_helper),
           )),
    Option("disable_log_collection", Kind.BOOL,
           "Whether Nomad shall not collect what tasks write (Nomad 1.6 and later).", "true", default=False),
)  # fmt: skip

# Options of nspawn that jobs do not have, each with the reason.
NOT_OFFERED: Mapping[str, str] = {
    "--quiet": "always set; its messages are in the task's events",
    "--settings": "settings files are never read: those beside an image come with the image",
    "--cleanup": "the driver cleans up itself",
    "--directory": "`image`",
    "--image": "`image`",
    "--template": "`ephemeral` gives each task its own root without a copy",
    "--mstack": "`image_download` brings images of several layers",
    "--oci-bundle": "the driver's own, for environment and user; images in this form come from a registry",
    "--verity-data": "put the hash partition into the disk image",
    "--setenv": "`environment`, and Nomad's `env` block",
    "--kill-signal": "Nomad's `kill_signal`, sent to the payload itself",
    "--machine": "made of the names of task and allocation",
    "--uuid": "the allocation's id",
    "--slice": "the task lives in the cgroup Nomad made for it",
    "--property": "the same; limits come from Nomad's `resources`",
    "--register": "the driver registers the machine where systemd-machined runs",
    "--keep-unit": "always set, for the same reason",
    "-U": "`user_namespacing`",
    "--network-namespace-path": "Nomad's `network` block makes the group's namespace",
    "--port": "`ports` and `port_map`",
    "--forward-journal": "root of the host would write to a path of the job's choice; use `link_journal`",
    "--forward-journal-max-use": "as `--forward-journal`",
    "--forward-journal-keep-free": "as `--forward-journal`",
    "--forward-journal-max-file-size": "as `--forward-journal`",
    "--forward-journal-max-files": "as `--forward-journal`",
    "-j": "`link_journal`",
    "--pipe": "`console`",
    "--background": "there is no terminal",
    "--no-pager": "there is no pager",
    "--no-ask-password": "nobody could be asked",
    "--system": "the driver runs as root",
    "--user": "the driver runs as root; the user inside is `user`",
    "--help": "`nomad-driver-nspawn options`",
    "--version": "the attribute `driver.nspawn.systemd` of the node",
}


def render_reference() -> str:
    """Return the manual of all options in Markdown; the README holds what this gives."""
    parts = []
    for title, options in TASK_GROUPS.items():
        parts.append(f"#### {title}\n\n{render_table(options)}")
    parts.append(f"#### In the plugin's block\n\n{render_table(PLUGIN_OPTIONS)}")
    parts.append(f"#### Permissions\n\n{render_gates()}")
    rows = [f"| `{name}` | {reason} |\n" for name, reason in NOT_OFFERED.items()]
    parts.append(
        "#### Options of systemd-nspawn that jobs do not have\n\n| option | why |\n|---|---|\n" + "".join(rows)
    )
    return "\n".join(parts)


def render_gates() -> str:
    """Return a table of what operators may allow. "The host": whether a job can become root of the host by it."""
    lines = ["| permission | with an empty block | the host | with it a job can |", "|---|---|---|---|"]
    for gate, permission in PERMISSIONS.items():
        usual = "yes" if permission.is_default else "no"
        lines.append(
            f"| {gate.reference} | {usual} | {'yes' if permission.gives_host else ''} | {permission.meaning} |"
        )
    return "\n".join(lines) + "\n"


def render_table(options: Sequence[Option]) -> str:
    lines = ["| option | type | default | meaning | example |", "|---|---|---|---|---|"]
    for option in options:
        lines.append(render_row(option, ""))
        lines += [render_row(inner, f"{option.name}.") for inner in option.fields]
    return "\n".join(lines) + "\n"


def render_row(option: Option, prefix: str) -> str:
    default = "required" if option.required else ""
    if option.default is not None and option.default not in ((), {}):
        default = json.dumps(option.default)
    notes = [option.doc]
    if option.choices:
        notes.append(f"One of {', '.join(f'`{choice}`' for choice in option.choices)}.")
    for version in sorted({option.since, *option.choices.values()} - {0}):
        which = [choice for choice, since in option.choices.items() if since == version]
        notes.append(f"{'`' + '`, `'.join(which) + '` needs' if which else 'Needs'} systemd {version}.")
    if option.aliases:
        notes.append(f"Also called {', '.join(f'`{alias}`' for alias in option.aliases)}.")
    if option.gate:
        notes.append(f"The operator decides: {option.gate.reference}.")
    equals = " " if option.kind.is_block else " = "
    cells = (f"`{prefix}{option.name}`", option.kind.value, default, " ".join(notes))
    return f"| {' | '.join(cells)} | `{option.name}{equals}{option.example}` |"


# =====================================================================================================
# Rules
#
# What concerns more than one option: what unset ones become, what cannot be combined, and what the operator has to
# allow, because it opens the host.
# =====================================================================================================


def settle_values(values: Values, config: Values, *, is_in_group: bool = False) -> dict[str, Any]:
    """Return a task's options with what depends on other options, or on the operator, filled in."""
    values = dict(values)
    if values["user_namespacing"] is None:
        values["user_namespacing"] = config["user_namespacing"]
    if values["private_users"] == "no":
        values["user_namespacing"] = False
    # Not -U: it silently does without a user namespace where it cannot have one.
    users = ("pick", "auto") if values["user_namespacing"] else (None, None)
    for name, usual in zip(("private_users", "private_users_ownership"), users, strict=True):
        values[name] = usual and (values[name] or usual)
    values["pids_limit"] = settle_pids(values["pids_limit"], config["pids_limit"])
    if values["network_veth"] is None:
        values["network_veth"] = not any(values[name] for name in OWN_NETWORK)
    if is_in_group:  # its network is Nomad's, with the ports; the Go driver's jobs leave network_veth at true
        check_group_options(values)
        values |= {"network_veth": False, "ports": ()}
    return values


def settle_pids(wanted: int | None, allowed: int) -> int:
    """Return how many processes a task may have, 0 for any number."""
    if wanted and allowed and wanted > allowed:
        rule = f"the operator of this client allows a task {allowed} processes"
        raise ConfigError("pids_limit", wanted, rule, "ask for fewer")
    return wanted or allowed


# What gives a container a network of its own, beside network_veth.
OWN_NETWORK = (
    "private_network",
    "network_zone",
    "network_bridge",
    "network_veth_extra",
    "network_macvlan",
    "network_ipvlan",
    "network_interface",
)


def check_group_options(values: Values) -> None:
    """Refuse what would be a second network, or a second mapping of ports, beside the group's."""
    for name in ("port_map", *OWN_NETWORK):
        if values[name]:
            remedy = "leave it out, or the group's network block"
            if name == "port_map":
                remedy = "write `to = PORT` into the port's block of the group's network"
            raise ConfigError(name, values[name], "cannot be combined with the network of the group", remedy)


def have_own_network(values: Values) -> bool:
    return values["network_veth"] or any(values[name] for name in OWN_NETWORK)


def have_link(values: Values) -> bool:
    """Whether the container has the link that nspawn can forward ports through."""
    return bool(values["network_veth"] or values["network_zone"] or values["network_bridge"])


@dataclass(frozen=True)
class Rule:
    """What two options, or an option and the host, may not be together."""

    option: str
    is_broken: Callable[[Values, Host], bool]
    rule: str
    remedy: str = ""


def together(option: str, others: Sequence[str], remedy: str) -> tuple[Rule, ...]:
    """Make rules that an option excludes others."""

    def rule(other: str) -> Rule:
        def is_broken(value: Values, host: Host) -> bool:
            return bool(value[option] and value[other])

        return Rule(option, is_broken, f"cannot be combined with {other}", remedy)

    return tuple(map(rule, others))


def needs(option: str, other: str) -> Rule:
    """Make the rule that an option is nothing without another one."""
    return Rule(
        option,
        lambda value, host: bool(value[option]) and not value[other],
        f"needs {other}",
        f"set {other}, too",
    )


def needs_link(option: str) -> Rule:
    return Rule(
        option,
        lambda value, host: bool(value[option]) and not have_link(value),
        "needs a network of the container's own",
        "leave network_veth at true, or listen on the host's port itself",
    )


RULES: tuple[Rule, ...] = (
    *together("process_two", ("boot",), "set boot = false to run a command, or leave process_two out"),
    Rule(
        "command",
        lambda value, host: not value["boot"] and not value["command"],
        "is required when boot is false",
        'name the program and its arguments, as in command = ["/bin/sleep", "60"]',
    ),
    *together("user", ("boot",), "set boot = false: an init must run as root"),
    *together("ambient_capability", ("boot",), "set boot = false: an init has its capabilities by itself"),
    # The payload is PID 2 and can never say READY (measured on 252, 257 and 262).
    *together("notify_ready", ("process_two",), "leave process_two out: only PID 1 can say that it is ready"),
    needs_link("ports"),
    needs_link("port_map"),
    *together("network_zone", ("network_bridge",), "a link can be joined to one bridge only"),
    Rule(
        "volatile",
        lambda value, host: value["volatile"] not in (None, "no") and value["ephemeral"],
        "cannot be combined with ephemeral",
        "either one already throws all changes away",
    ),
    Rule(
        "private_users_ownership",
        lambda value, host: (
            value["private_users_ownership"] == "chown"
            and (value["read_only"] or value["volatile"] not in (None, "no"))
        ),
        "cannot be combined with read_only or volatile",
        "leave it out: the image's files are then mapped",
    ),
    Rule(
        "bind_user",
        lambda value, host: bool(value["bind_user"]) and not value["user_namespacing"],
        "needs user namespaces",
        "set user_namespacing = true",
    ),
    needs("bind_user_shell", "bind_user"),
    needs("bind_user_group", "bind_user"),
    needs("root_hash_sig", "root_hash"),
    needs("private_users_delegate", "user_namespacing"),
    Rule(
        "load_credential",
        lambda value, host: bool(value["load_credential"].keys() & value["set_credential"].keys()),
        "names a credential that set_credential sets, too",
        "give it one of the two ways",
    ),
    Rule(
        "devices",
        lambda value, host: have_one_path(value),
        "has something else at the same path in the container",
        "give each device a container_path of its own, which no bind has",
    ),
)


def name_devices(values: Values) -> Iterator[Device]:
    for block in values["devices"]:
        path = block["host_path"]
        yield Device(path, block["container_path"] or path, block["cgroup_permissions"])


def have_one_path(values: Values) -> bool:
    """Whether two devices, or one and a bind, are to be at the same path in the container."""
    devices = [os.path.normpath(device.task_path.lstrip("/")) for device in name_devices(values)]
    binds = [
        os.path.normpath(parse_bind(text)[0].lstrip("/"))
        for name in ("bind", "bind_read_only")
        for text in values[name].values()
    ]
    return len({*devices, *binds}) < len(devices) + len({*binds})


def check_rules(values: Values, host: Host) -> None:
    for option in TASK_OPTIONS:
        value = values[option.name]
        needed = option.needed_systemd(value)
        if needed > host.systemd and is_said(value):
            rule = f"needs systemd {needed} or newer, and this host has {host.systemd}"
            raise ConfigError(option.name, value, rule, "leave it out, or constrain the job to newer hosts")
    for broken in RULES:
        if broken.is_broken(values, host):
            raise ConfigError(broken.option, values[broken.option], broken.rule, broken.remedy)


def check_gates(values: Values, config: Values, *, is_in_group: bool = False) -> None:
    """Refuse what the operator does not allow. Paths are judged when they have been opened, see Sources. The
    network of a group is not the host's."""
    for option in TASK_OPTIONS:
        if option.gate and option.gate.is_word and option.opens(values[option.name]):
            check_gate(option.name, values[option.name], option.gate, config)
    if not is_in_group and not have_own_network(values):
        check_gate("network_veth", values["network_veth"], Gate.HOST_NETWORK, config)
    for name in ("capability", "ambient_capability"):
        for capability in values[name]:
            if capability not in config["allow_caps"] and "all" not in config["allow_caps"]:
                rule = "the operator of this client does not allow this capability"
                allowed = ", ".join(config["allow_caps"]) or "none"
                raise ConfigError(name, capability, rule, f"its plugin block has allow_caps = {allowed}")


def is_allowed(gate: Gate, config: Values) -> bool:
    return not {gate.value, "all"}.isdisjoint(config["allow"])


def check_gate(name: str, value: object, gate: Gate, config: Values) -> None:
    if not is_allowed(gate, config):
        rule = f"the operator of this client does not allow {gate.value}"
        raise ConfigError(name, value, rule, f'it takes "{gate.value}" in allow in its plugin block')


# =====================================================================================================
# Image
#
# From what a job names to something nspawn can run, or to the source it has to be brought from. Only looks.
# =====================================================================================================


@dataclass(frozen=True)
class ImageConfig:
    """What an image's maker says of how its command is run: the configuration of an OCI image."""

    env: tuple[str, ...] = ()  # NAME=VALUE
    command: tuple[str, ...] = ()  # Entrypoint, then Cmd
    user: str = ""
    working_directory: str = ""
    stop_signal: str = ""


@dataclass(frozen=True)
class Image:
    path: Path  # what the job names: a directory, a disk image or a device
    is_directory: bool
    layers: tuple[Path, ...] = ()  # directories, topmost first, where `path` is not the only one
    key: str = ""  # of an image in the store, which nothing may ever write to
    label: str = ""  # for people, where the path says nothing
    config: ImageConfig = ImageConfig()
    fd: int = -1  # the image itself, open; -1 for one of the store, which is root's alone
    is_fixed: bool = False  # only the operator can put another in its place
    is_shared: bool = False  # other tasks run from it, and the operator lets none write to it

    @property
    def is_protected(self) -> bool:
        return self.is_shared or bool(self.key)

    @property
    def opened(self) -> Path:
        """Its path for this process: what has been opened, whatever is at its place by now."""
        return self.path if self.fd < 0 else Path(f"/proc/self/fd/{self.fd}")

    @property
    def directories(self) -> tuple[Path, ...]:
        return self.layers or (self.opened,)

    @property
    def argv(self) -> list[str]:
        return [f"--directory={self.path}" if self.is_directory else f"--image={self.path}"]


def find_image(name: str, task_dir: Path | None, values: Values, image_dir: Path = MACHINES_ROOT) -> Image:
    """Return the image a job names.

    A name without a slash is one in `image_dir`; a relative path is looked up in the task's directory (where
    artifacts land), then in the plugin's, as the Go driver did.
    """
    path = find_image_path(name, task_dir, image_dir)
    check_tree(path, name, values)
    return Image(path, path.is_dir())


def explain_linked_usr() -> ConfigError:
    """systemd-nspawn would follow such a link on the host (measured on 252)."""
    return ConfigError("volatile", "yes", "needs an image whose /usr is no symbolic link", 'use "overlay"')


def check_tree(path: Path, name: str, values: Values) -> None:
    """Refuse what nspawn cannot run."""
    mode = path.stat().st_mode
    if path == Path("/") and not (values["ephemeral"] or values["volatile"] in ("yes", "state")):
        raise ConfigError("image", name, "is the host's own root", "set ephemeral, or volatile to yes or state")
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ConfigError("image", name, "must be a directory, a disk image or a block device")
    if stat.S_ISDIR(mode) and not any((root / "usr").is_dir() for root in (path, find_root(path, values))):
        raise ConfigError("image", name, "has no /usr directory, so it is no operating system tree")
    if values["volatile"] == "yes" and (path / "usr").is_symlink():
        raise explain_linked_usr()


def find_root(path: Path, values: Values) -> Path:
    """Return the directory of an image that becomes the container's root."""
    return path / (values["pivot_root"] or "").split(":")[0].lstrip("/")


def find_image_path(name: str, task_dir: Path | None, image_dir: Path) -> Path:
    candidates = list(image_places(name, task_dir, image_dir))
    for candidate in candidates:
        found = Path(os.path.realpath(candidate))
        if not os.path.exists(found):  # unlike Path.exists it takes a name that is too long for one of nothing
            continue
        if found.suffix == ".v" and found.is_dir():
            found = Path(os.path.realpath(find_version(found) or no_version(name, found)))
        inside = task_dir if task_dir and candidate.is_relative_to(task_dir) else Path("/")
        if not found.is_relative_to(os.path.realpath(inside)):
            raise ConfigError("image", name, "leads out of the task's directory")
        return found
    rule = f"not found (looked for {', '.join(cut(str(place)) for place in candidates)})"
    raise ConfigError("image", name, rule, f"give the path of an image, or the name of one in {image_dir}")


def image_places(name: str, task_dir: Path | None, image_dir: Path) -> Iterator[Path]:
    if name.startswith("/"):
        yield Path(name)
        return
    if is_image_name(name):
        yield from (image_dir / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES)
    if task_dir:
        yield task_dir / name
    yield Path(sys.argv[0]).resolve().parent / name
    yield Path.cwd() / name


IMAGE_SUFFIXES = ("", ".raw", ".v", ".raw.v")


def is_image_name(name: str) -> bool:
    return "/" not in name and name not in (".", "..")


def place_in_image(values: Values, path: str) -> str:
    """Return where a path of the container is in the image."""
    return (values["pivot_root"] or "").split(":")[0] + path


@contextlib.contextmanager
def open_directory(root: Path, path: str) -> Iterator[int]:
    """Yield a directory of an image, opened without following symbolic links: a container that may write to the
    image can make any, and root would follow them. `root` must be out of reach of all tasks. Raises OSError."""
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = open_in_root(top, path, os.O_PATH | os.O_DIRECTORY, follow=False)
    finally:
        os.close(top)
    try:
        yield fd
    finally:
        os.close(fd)


MAX_TEXT = 256 << 10  # bytes of an image's /etc/hosts, passwd or group


def read_in_image(image: Image, values: Values, path: str) -> str:
    """Return the beginning of a file of an image, "" when it is not there or is a symbolic link."""
    folder, name = os.path.split(place_in_image(values, path))
    for directory in image.directories if image.is_directory else ():
        try:
            with open_directory(directory, folder) as fd:
                os.stat(name, dir_fd=fd, follow_symlinks=False)
                return read_head(name, MAX_TEXT, fd).decode(errors="replace")
        except FileNotFoundError:  # the layers below may have it
            continue
        except OSError:
            break
    return ""


@dataclass(frozen=True)
class Origin:
    """Where an image comes from that is not simply there: an address, a registry, or an archive to unpack."""

    type: str  # tar, raw, docker, archive
    place: str  # a URL, a reference, or a path
    name: str  # for people, without credentials
    identity: tuple[str, ...] = ()  # what else makes it another image
    verify: str = "no"
    checksum: str = ""
    platform: str = ""
    username: str = ""
    password: str = ""
    force: bool = False  # ask the place even when the image is in the store, and fail when it does not answer
    refresh: bool = False  # ask, and take what is there when it does not answer

    @property
    def key(self) -> str:
        """The image's name in the store. Credentials are part of it: what one job may fetch is not for all."""
        parts = (self.type, self.place, *self.identity, self.verify, self.checksum, self.platform, self.username)
        secret = hashlib.sha256(self.password.encode()).hexdigest()
        return hashlib.sha256(json.dumps([*parts, secret]).encode()).hexdigest()[:40]


DOCKER = "docker://"


def plan_origin(values: Values, image_dir: Path) -> Origin | None:
    """Return where an image is to be fetched from; None when it is on this machine."""
    name, block, auth = values["image"], values["image_download"], values["auth"] or {}
    if name.startswith(DOCKER):
        if block:
            rule = "says a second time where the image comes from"
            raise ConfigError(
                "image_download", redact(block["url"]), rule, f"set image to a name without {DOCKER}"
            )
        block = {"type": "docker", "url": name, "verify": None, "force": False, "checksum": None, "platform": None}
    elif "://" in name:
        rule = f"must be a path, the name of an image, or an address that begins with {DOCKER}"
        raise ConfigError("image", redact(name), rule, "give other addresses in image_download { url = ... }")
    elif not block or (not block["force"] and is_image_name(name) and have_image(image_dir, name)):
        return None
    check_download(block)
    is_docker = block["type"] == "docker"
    place = block["url"].removeprefix(DOCKER)
    is_latest = place.endswith(":latest") or not re.search(r"[:@][^/]*$", place)
    return Origin(
        type=block["type"],
        place=place,
        name=DOCKER + place if is_docker else redact(place),
        verify="no" if is_docker else block["verify"],
        checksum=block["checksum"] or "",
        platform=block["platform"] or "",
        force=block["force"],
        refresh=is_docker and is_latest,
        username=auth.get("username") or "",
        password=auth.get("password") or "",
    )


def have_image(image_dir: Path, name: str) -> bool:
    return any((image_dir / f"{name}{suffix}").exists() for suffix in IMAGE_SUFFIXES)


def check_download(block: Values) -> None:
    is_docker = block["type"] == "docker"
    if block["url"].startswith(("http://", "https://")) == is_docker:
        rule = "must be HOST/NAME:TAG for an image in a registry" if is_docker else "must be an http(s) address"
        raise ConfigError("image_download.url", redact(block["url"]), rule, "or set type to what is there")
    for option in ("checksum",) if is_docker else ("platform",):
        if block[option]:
            rule = f'has no meaning with type = "{block["type"]}"'
            remedy = "name the image by its digest, NAME@sha256:..." if is_docker else "leave it out"
            raise ConfigError(f"image_download.{option}", block[option], rule, remedy)


def redact(url: str) -> str:
    """Return an address without what may be a secret in it."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return url.partition("://")[0] + "://…"


def read_head(path: Path | str, size: int, folder: int | None = None) -> bytes:
    """Return how a file begins, b"" where there is none. A pipe or a device that a task has put in its place is
    not opened: the plugin would wait for it with all its tasks."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            return read_opened(fd, size)
        finally:
            os.close(fd)
    return b""


def read_opened(fd: int, size: int) -> bytes:
    """Return how the regular file begins that a descriptor, of O_PATH, is of; b"" for what else there is."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return b""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        return file.read(size)


ARCHIVES = (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh")  # how compressed files begin


def find_archive(image: Image) -> Origin | None:
    """Return the source for an image that is a tar archive, None for all others."""
    head = b"" if image.is_directory else read_opened(image.fd, 512)
    if not (head[257:262] == b"ustar" or head.startswith(ARCHIVES)):
        return None
    status = os.fstat(image.fd)  # another file of this name is another image
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return Origin("archive", str(image.path), str(image.path), tuple(map(str, stamp)))


MAX_VERSIONS = 10_000  # entries of a directory that are looked at: a task may fill its own


def find_version(path: Path) -> Path | None:
    """Return the newest of the versions of an image that a directory NAME.v holds, as systemd.v(7) has it: entries
    NAME_VERSION or, for NAME.raw.v, NAME_VERSION.raw; after the version may come _ARCHITECTURE and +TRIES."""
    name = path.name.removesuffix(".v")
    suffix = ".raw" if name.endswith(".raw") else ""
    pattern = (
        re.escape(name.removesuffix(suffix)) + r"_(?P<version>[^+]+?)(?P<tries>\+\d+(-\d+)?)?" + re.escape(suffix)
    )
    found = []
    for entry in map(Path, itertools.islice(os.scandir(path), MAX_VERSIONS)):
        match = re.fullmatch(pattern, entry.name)
        if match and entry.is_dir() != bool(suffix):
            version, _, architecture = match["version"].rpartition("_")
            if not version or architecture not in FOREIGN | {*ARCHITECTURES.values()}:
                version, architecture = match["version"], ""
            if architecture in ("", ARCHITECTURES.get(os.uname().machine)):
                has_tries = not re.match(r"\+0+(-|$)", match["tries"] or "")
                found.append((has_tries, version, entry))
    rank = functools.cmp_to_key(compare_versions)
    return max(found, key=lambda entry: (entry[0], rank(entry[1])))[2] if found else None


def no_version(name: str, path: Path) -> Path:
    form = path.name.removesuffix(".v").removesuffix(".raw") + "_VERSION"
    raise ConfigError(
        "image", name, f"{path} holds no version of it", f"name its entries {form}, as systemd.v(7) says"
    )


ARCHITECTURES = {  # of uname to systemd's names
    "x86_64": "x86-64", "aarch64": "arm64", "i686": "x86", "armv7l": "arm", "riscv64": "riscv64", "s390x": "s390x",
    "ppc64le": "ppc64-le", "loongarch64": "loongarch64",
}  # fmt: skip


FOREIGN = frozenset((
    "alpha", "arc", "arc-be", "arm-be", "arm64-be", "cris", "hppa", "ia64", "m68k", "mips", "mips-le", "mips64",
    "mips64-le", "nios2", "ppc", "ppc-le", "ppc64", "riscv32", "s390", "sh", "sh64", "sparc", "sparc64", "tilegx",
))  # fmt: skip


def compare_versions(left: str, right: str) -> int:
    """Compare as the UAPI group's version format specification says; negative when `left` is the older one."""
    a, b = (deque(re.findall(r"\d+|[A-Za-z]+|[-~^.]", version)) for version in (left, right))
    while True:
        first, second = (queue[0] if queue else "" for queue in (a, b))
        if "~" in (first, second) and first != second:
            return -1 if first == "~" else 1
        if not first or not second:
            return bool(first) - bool(second)
        for separator in "-^.":
            if separator in (first, second) and first != second:
                return -1 if first == separator else 1
        if first.isdigit() != second.isdigit():  # a number is newer than letters
            return 1 if first.isdigit() else -1
        if first.isdigit() and int(first) != int(second):
            return int(first) - int(second)
        if not first.isdigit() and first != second:
            return -1 if first < second else 1
        a.popleft()
        b.popleft()


def make_mount_points(root: Path) -> None:
    """Make the directories a task finds its own ones at: nspawn makes what is missing in a writable image, but
    mounts a read-only one before it comes to that."""
    for name in ("alloc", "local", "secrets"):
        try:
            (root / name).mkdir(mode=0o755)
        except FileExistsError:
            continue
        except OSError as error:
            rule = f"the image has no /{name} to mount on, and none can be made in it ({error.strerror})"
            raise ConfigError("read_only", True, rule, "make the directory in the image") from None


def make_mount_file(root: Path, path: str) -> None:
    """Make an empty file to mount on in an image that is to be read-only."""
    folder, name = os.path.split(path)
    try:
        with open_directory(root, folder) as fd:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=fd))
    except FileExistsError:
        return
    except OSError as error:
        rule = f"the image has no {path} to mount on, and none can be made in it ({error.strerror})"
        raise ConfigError("read_only", True, rule, "make the file in the image") from None


def check_mount_points(root: Path, files: Sequence[str]) -> None:
    """Refuse an image that lacks something to mount on, where nothing may be made in it."""
    for path in ("/alloc", "/local", "/secrets", *files):
        folder, name = os.path.split(path)
        try:
            with open_directory(root, folder) as fd:
                os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError:
            rule = f"the image has no {path} to mount on, and the operator lets no task write to it"
            raise ConfigError("read_only", True, rule, "make it in the image") from None


# What says that there is no such file, not that something is wrong with this machine.
IS_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class View:
    """A container's root and what is to be mounted in it, to look files up before there is a container. Only for a
    thread: what an image or a task has made decides how long a look takes."""

    image: Path
    mounts: Mapping[str, str] = field(default_factory=dict)  # targets in the container to sources on the host
    pivot: str = "/"  # the directory of the image that becomes the root

    def open(self, path: str, links: int = 8) -> int | None:
        """Return the file, of O_PATH; None when it is not there. Follows `links` from the root into mounts. Raises
        OSError when it cannot be known."""
        path = "/" + "/".join(part for part in path.split("/") if part not in ("", "."))
        is_plain = ".." not in path.split("/")
        place = max((point for point in self.mounts if is_plain and is_below(path, point)), key=len, default="")
        root = os.open(self.mounts[place], os.O_PATH | os.O_CLOEXEC) if place else self.open_root()
        if place == path:
            return root
        try:
            return open_in_root(root, path[len(place) :], os.O_PATH, follow=not place)
        except OSError as error:
            if error.errno not in IS_MISSING or (place and error.errno == errno.ELOOP):
                raise
            if self.mounts and not is_plain:
                raise OSError(errno.ESTALE, "may be in a mount") from None
            leads = self.find_mount(root, path) if self.mounts and links and not place else ""
        finally:
            os.close(root)
        return self.open(leads, links - 1) if leads else None

    def open_root(self) -> int:
        top = os.open(self.image, os.O_PATH | os.O_CLOEXEC)
        try:
            return open_in_root(top, self.pivot, os.O_PATH)
        finally:
            os.close(top)

    def find_mount(self, root: int, path: str) -> str:
        """Return where a path leads to of which the root has nothing: into a mount, perhaps; "" for nowhere."""
        parts = path.strip("/").split("/")
        for length in range(min(len(parts), MAX_PARTS) - 1, -1, -1):
            with contextlib.suppress(OSError):
                parent = open_in_root(root, "/".join(parts[:length]) or "/", os.O_PATH | os.O_DIRECTORY)
                try:
                    leads = self.follow(root, parent, parts[length])
                finally:
                    os.close(parent)
                leads = os.path.normpath("/".join([leads, *parts[length + 1 :]]))
                return leads if leads != path else ""
        return ""

    def follow(self, root: int, parent: int, name: str) -> str:
        """Return the path in the container of a file of an open directory, or what it is a link to."""
        top, here = (os.readlink(f"/proc/self/fd/{fd}") for fd in (root, parent))
        here = f"/{here.removeprefix(top).lstrip('/')}"
        if not any(is_below(here, point) for point in self.mounts):
            with contextlib.suppress(OSError):  # no link
                name = os.readlink(name, dir_fd=parent)
        return os.path.join(here, name)


MAX_PARTS = 64  # of a path


def is_below(path: str, directory: str) -> bool:
    """Whether a path is a directory or in it; both without symbolic links and dots."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


MAX_PLACES = 64  # of a PATH


def explain_command(command: str, search: str, view: View) -> str:
    """Say why a program cannot be executed, "" when it looks as if it could."""
    if "/" in command and not command.startswith("/"):
        return ""  # relative to the working directory
    places = [command] if "/" in command else [f"{place}/{command}" for place in search.split(":")]
    kinds = set()
    try:
        for place in places[:MAX_PLACES]:
            if (fd := view.open(place)) is not None:
                try:
                    kinds.add(explain_program(fd))
                finally:
                    os.close(fd)
    except OSError:
        return ""  # not known
    if not kinds:
        where = "in the container" if "/" in command else f"in the container's PATH ({search})"
        return f'command: there is no "{command}" {where}'
    return "" if "" in kinds else f'command: "{command}" in the container is {min(kinds)}'


def explain_program(fd: int) -> str:
    """Say what is wrong with a program, "" when nothing is."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) and mode & 0o111):
        return "not an executable file"
    return f"for another machine than this {os.uname().machine}" if is_foreign(fd) else ""


ELF_MACHINES = {"x86_64": (62, 3), "aarch64": (183, 40)}  # e_machine of what a kernel runs, 32-bit programs too
BINFMT_MISC = Path("/proc/sys/fs/binfmt_misc")


def is_foreign(fd: int) -> bool:
    """Tell whether a program is for another architecture, and nothing (binfmt_misc) emulates that here."""
    header, native = read_opened(fd, 20), ELF_MACHINES.get(os.uname().machine)
    if not native or len(header) < 20 or not header.startswith(b"\x7fELF"):
        return False
    machine = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return machine not in native and not list(BINFMT_MISC.glob("qemu-*"))


# =====================================================================================================
# Account
#
# Who a command runs as: USER or, in a registry's image, USER:GROUP, each a name or a number, as docker has it. The
# driver looks them up in the image's own files and tells nspawn numbers. By itself nspawn runs the image's
# `getent`, which many images do not have (distroless, scratch) or only in a form that it cannot use (Alpine).
# =====================================================================================================


@dataclass(frozen=True)
class Account:
    """A user of a container."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]  # further ones
    home: str

    @property
    def variables(self) -> dict[str, str]:
        """What nspawn sets for a user by name, and does not for one by number."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}


def find_account(image: Image, values: Values, volumes: Iterable[str] = ()) -> Account | None:
    """Return the user for the command. None: nspawn has to look it up in the container. That is so for a disk
    image, where the job mounts files over the image's, and for a name that is not in /etc/passwd, because systemd
    knows further ones (`bind_user`). `volumes` are the targets of Nomad's mounts."""
    wanted = values["user"]
    if not wanted or values["boot"] or not image.is_directory:
        return None
    if not image.key and hides_accounts(values, volumes):
        return None
    name, _, group = wanted.partition(":")
    name = is_user("user", name or "root")
    groups = read_entries(image, values, "/etc/group")
    gid = find_group(wanted, group, groups)
    if name in ("root", "0"):
        return Account("root", 0, gid or 0, (), "/root")
    for entry in read_entries(image, values, "/etc/passwd"):
        if len(entry) > 5 and name in (entry[0], entry[2]) and is_id(entry[2]) and is_id(entry[3]):
            return parse_account(entry, gid, groups)
    if is_number(wanted, name):
        return Account(name, int(name), gid or 0, (), "/")
    if not image.key:
        return None
    raise ConfigError("user", wanted, "the image's /etc/passwd has no such user", "give the user's number")


def hides_accounts(values: Values, volumes: Iterable[str]) -> bool:
    """Tell whether something is mounted over the image's passwd or group."""
    binds = [parse_bind(text)[0] for name in ("bind", "bind_read_only") for text in values[name].values()]
    overlays = [split_fields(item)[-1] for name in ("overlay", "overlay_read_only") for item in values[name]]
    targets = {os.path.normpath(f"/{target}").lstrip("/") for target in (*binds, *overlays, *volumes)}
    return not targets.isdisjoint(("", "etc", "etc/passwd", "etc/group"))


def read_entries(image: Image, values: Values, path: str) -> list[list[str]]:
    """Return the fields of an image's passwd or group, line by line."""
    text = read_in_image(image, values, path)
    if len(text.encode()) >= MAX_TEXT:
        text = text.rpartition("\n")[0]  # the last line may have been cut in the middle of a number
    return [line.split(":") for line in text.split("\n")]


def parse_account(entry: Sequence[str], gid: int | None, groups: Sequence[Sequence[str]]) -> Account:
    """Return the user of a line of passwd. A group that was asked for takes the place of all others."""
    name, uid, home = entry[0] if USER.fullmatch(entry[0]) else entry[2], int(entry[2]), entry[5]
    if not home.startswith("/") or NO_TEXT.search(home):
        home = "/"
    if gid is not None:
        return Account(name, uid, gid, (), home)
    members = [group for group in groups if len(group) > 3 and is_id(group[2]) and name in group[3].split(",")]
    return Account(name, uid, int(entry[3]), tuple(int(group[2]) for group in members), home)


def find_group(wanted: str, group: str, groups: Sequence[Sequence[str]]) -> int | None:
    """Return the number of a group, None where none is asked for."""
    if not group:
        return None
    numbers = [int(entry[2]) for entry in groups if len(entry) > 2 and entry[0] == group and is_id(entry[2])]
    if not numbers and not is_number(wanted, group):
        raise ConfigError("user", wanted, f"the image has no group {cut(group)}", "give the group's number")
    return numbers[0] if numbers else int(group)


def is_number(wanted: str, text: str) -> bool:
    """Tell whether a name is a number. Raises ConfigError for one that no user has."""
    if text.isascii() and text.isdigit() and not is_id(text):
        raise ConfigError("user", wanted, "numbers of users go up to 999999999, and 65535 is none", "give another")
    return is_id(text)


def is_id(text: str) -> bool:
    """Tell whether a text is the number of a user or group. 65535 is none for systemd: it is -1 in 16 bits."""
    return bool(re.fullmatch(r"\d{1,9}", text, re.ASCII)) and int(text) != 0xFFFF


# =====================================================================================================
# Sources
#
# What of the host a job names (to mount, to read a credential from), found out once and judged by what the
# operator allows. Whoever may write to a directory on the way can exchange a part of it at any moment: so a
# source is opened, what has been opened is judged, and that is mounted or read, wherever its path leads by then.
# =====================================================================================================


@dataclass(frozen=True)
class Source:
    """An open file or directory of the host."""

    path: str  # where it was when it was opened, without symbolic links
    mode: int
    fd: int = -1
    number: int = 0  # of a device node

    @property
    def is_node(self) -> bool:
        return stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_device(self) -> bool:
        return self.is_node or is_below(self.path, "/dev")


def name_sources(values: Values) -> Iterator[tuple[str, str]]:
    """Yield option and source for everything of the host that a job names beside its image."""
    for option in ("bind", "bind_read_only"):
        yield from ((option, source) for source in values[option])
    for option in ("overlay", "overlay_read_only"):
        for item in values[option]:
            yield from ((option, source) for source in split_fields(item)[:-1] if source.startswith("/") or
                        source.split("/")[0] in OWN_DIRECTORIES)  # fmt: skip
    yield from (("load_credential", source) for source in values["load_credential"].values())


def open_source(option: str, name: str, path: str) -> Source:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(option, name, f"cannot be used: {os.strerror(error.errno or 0)}") from None
    found = os.fstat(fd)
    return Source(os.readlink(f"/proc/self/fd/{fd}"), found.st_mode, fd, found.st_rdev)


LEADS_OUT = "leads out of the task's directories"


@contextlib.contextmanager
def open_directories(alloc_dir: str, names: Iterable[str]) -> Iterator[dict[str, Source]]:
    """Yield directories of an allocation, open, by their paths. There is no symbolic link on the way: other tasks
    of the allocation can put them there. What is above the allocation's directory is the operator's."""
    found: dict[str, Source] = {}
    with contextlib.ExitStack() as stack:
        try:
            root = os.open(alloc_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"{alloc_dir} cannot be opened: {error.strerror}; the task is not started") from None
        stack.callback(os.close, root)
        for name in names:
            path = f"{alloc_dir}/{name}"
            try:
                fd = open_in_root(root, name, os.O_PATH | os.O_DIRECTORY, follow=False)
            except OSError as error:
                is_link = error.errno == errno.ELOOP
                why = (
                    "is a symbolic link instead of a directory" if is_link else f"cannot be used: {error.strerror}"
                )
                raise HostError(f"{path} {why}; the task is not started") from None
            stack.callback(os.close, fd)
            found[path] = Source(os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_mode, fd)
        yield found


@contextlib.contextmanager
def open_volumes(paths: Iterable[str]) -> Iterator[dict[str, Source]]:
    """Yield what Nomad asks to be mounted, open, by its path."""
    with contextlib.ExitStack() as stack:
        found = {}
        for path in paths:
            found[path] = open_source("volume_mount", path, path)
            stack.callback(os.close, found[path].fd)
        yield found


def check_source(option: str, name: str, source: Source, own: Mapping[str, Source], config: Values) -> None:
    """Refuse a source the operator does not allow."""
    if "alloc" in own and (source.path == own["alloc"].path or is_below(source.path, f"{own['alloc'].path}/logs")):
        rule = "holds the log pipes of all tasks of the allocation"
        raise ConfigError(option, name, rule, "use a directory below alloc, or /alloc, which is there anyway")
    if not is_own(source.path, own):
        if name.split("/")[0] in own:
            raise ConfigError(option, name, LEADS_OUT)
        check_outside(option, name, source.path, config)
        folder = os.path.realpath(config["image_dir"])
        if option == "bind" and (is_below(source.path, folder) or is_below(folder, source.path)):
            check_gate(option, name, Gate.IMAGE_WRITE, config)  # images could be written to through it
    if source.is_device and not is_allowed(Gate.DEVICES, config):
        check_gate(option, name, Gate.DEVICE_BINDS, config)


def check_outside(option: str, name: str, path: str, config: Values) -> None:
    """Refuse a path of the host that the operator does not allow this option."""
    gate = next(row.gate for row in TASK_OPTIONS if row.name == option)
    if gate and gate.is_word:
        check_gate(option, name, gate, config)
    check_host_path(option, name, path, config)


def check_host_path(option: str, name: str, path: str, config: Values) -> None:
    """Refuse a path that is not below what the operator allows. `path` is without symbolic links; where there is
    nothing to be opened it is the name the job says, so that a refusal does not tell what is there."""
    if not config["volumes"]:
        rule = "the operator of this client does not let tasks mount anything of the host (volumes = false)"
        raise ConfigError(option, name, rule, "use the task's own directories, alloc, local and secrets")
    allowed = config["allow_paths"]
    places = [*allowed, *map(os.path.realpath, allowed)]
    if not any(is_below(path, place) for place in places):
        is_led = any(is_below(os.path.normpath(name), place) for place in places)
        leads = f" (it is {cut(path)})" if is_led else ""
        rule = f"the operator of this client does not allow this path{leads}"
        raise ConfigError(option, name, rule, f"allowed is what is below {', '.join(allowed) or 'nothing'}")


@contextlib.contextmanager
def open_sources(values: Values, own: Mapping[str, Source], config: Values) -> Iterator[dict[str, Source]]:
    """Yield what a job names, open, by its name. `own`: a task's directories, by its names for them."""
    found: dict[str, Source] = {}
    with contextlib.ExitStack() as stack:
        for option, name in name_sources(values):
            first, *rest = name.split("/")
            path = "/".join([f"/proc/self/fd/{own[first].fd}", *rest]) if first in own else name
            try:
                source = open_source(option, name, path)
            except ConfigError:
                if first not in own:
                    check_outside(option, name, os.path.normpath(name), config)
                elif not is_own(os.path.realpath(path), own):
                    raise ConfigError(option, name, LEADS_OUT) from None
                raise
            stack.callback(os.close, source.fd)
            check_source(option, name, source, own, config)
            found[name] = source
        yield found


@contextlib.contextmanager
def open_devices(devices: Iterable[Device]) -> Iterator[dict[Device, Source]]:
    """Yield device nodes, open: the job's, and those of device plugins, which are the operator's."""
    found: dict[Device, Source] = {}
    with contextlib.ExitStack() as stack:
        for device in devices:
            source = open_source("devices.host_path", device.host_path, device.host_path)
            stack.callback(os.close, source.fd)
            if not source.is_node:
                remedy = "name each node in a directory by itself, and other files in bind"
                raise ConfigError("devices.host_path", device.host_path, "must be a device node", remedy)
            found[device] = source
        yield found


MAX_NODES = 1024  # in a directory


def read_rules(source: Source, permissions: str) -> Iterator[DeviceRule]:
    """Yield a rule for a node, or for each in a directory of /dev."""
    if source.is_node:
        yield DeviceRule.of(source.mode, source.number, permissions)
    if not (source.is_directory and source.is_device):
        return
    files = (f"{place}/{name}" for place, _, names in os.walk(f"/proc/self/fd/{source.fd}/") for name in names)
    for path in itertools.islice(files, MAX_NODES):
        with contextlib.suppress(OSError):  # gone
            found = os.lstat(path)
            if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
                yield DeviceRule.of(found.st_mode, found.st_rdev, permissions)


MAX_CREDENTIALS = 1 << 20  # bytes of all together, systemd's own limit


def read_credentials(values: Values, sources: Mapping[str, Source]) -> dict[str, bytes]:
    """Return what each credential holds."""
    found = {key: value.encode() for key, value in values["set_credential"].items()}
    for key, name in values["load_credential"].items():
        found[key] = read_source(f"load_credential.{key}", name, sources[name])
    if sum(map(len, found.values())) > MAX_CREDENTIALS:
        raise ConfigError("load_credential", sorted(found), "credentials may have 1 MiB together")
    return found


def read_source(option: str, name: str, source: Source) -> bytes:
    """Return what a source holds."""
    if not stat.S_ISREG(source.mode):
        raise ConfigError(option, name, "must be a file")
    try:
        with open(f"/proc/self/fd/{source.fd}", "rb") as file:
            return file.read(MAX_CREDENTIALS + 1)
    except OSError as error:
        raise ConfigError(option, name, f"cannot be read: {error.strerror}") from None


def is_own(path: str, own: Mapping[str, Source]) -> bool:
    return any(is_below(path, source.path) for source in own.values())


@contextlib.contextmanager
def open_image(image: Image, name: str, own: Mapping[str, Source], config: Values) -> Iterator[Image]:
    """Yield an image that has been found, open and judged. It must still be what was found: whoever may write to a
    directory on the way, or to an image that others lie in, can exchange it at any moment."""
    try:
        fd = os.open(image.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError("image", name, f"cannot be used: {os.strerror(error.errno or 0)}") from None
    try:
        found = Source(os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_mode, fd)
        if found.path != str(image.path) or found.is_directory is not image.is_directory:
            rule = f"somebody put {cut(found.path)} in place of {cut(str(image.path))} during the start"
            raise ConfigError("image", name, rule, "start the task again")
        opened = replace(image, fd=fd, is_fixed=is_fixed(found.path, own, config))
        check_image(opened, name, own, config)
        may_write = is_own(found.path, own) or {Gate.IMAGE_WRITE.value, "all"} & set(config["allow"])
        yield replace(opened, is_shared=not may_write)
    finally:
        os.close(fd)


def check_image_name(name: str, own: Mapping[str, Source], config: Values) -> None:
    """Refuse a path that cannot be used as an image as one that could be, if the operator does not allow it."""
    path = os.path.normpath(name)
    places = [*(source.path for source in own.values()), config["image_dir"]]
    if os.path.isabs(path) and not any(is_below(path, place) for place in places):
        check_host_path("image", name, path, config)


def is_fixed(path: str, own: Mapping[str, Source], config: Values) -> bool:
    """Whether tasks cannot exchange an image: it lies in image_dir itself, or jobs may do all of that anyway."""
    is_free = config["volumes"] and "/" in config["allow_paths"]
    return not is_own(path, own) and (is_free or os.path.dirname(path) == os.path.realpath(config["image_dir"]))


def check_image(image: Image, name: str, own: Mapping[str, Source], config: Values) -> None:
    """Refuse an image the operator does not allow: what is not his own is a path of the host as any other. Below
    image_dir are images of his, and in those what tasks have written: directories, but no file systems."""
    path, folder = str(image.path), os.path.realpath(config["image_dir"])
    places = [os.path.realpath(f"{folder}/{name}{suffix}") for suffix in IMAGE_SUFFIXES]
    if os.path.dirname(path) == folder or (is_image_name(name) and {path, os.path.dirname(path)} & {*places}):
        return
    if not is_own(path, own) and not is_below(path, folder):
        check_host_path("image", name, path, config)
    if not image.is_directory and not find_archive(image):
        check_gate("image", name, Gate.DISK_IMAGES, config)


def check_image_write(image: Image, values: Values, config: Values) -> None:
    """Refuse what would change an image that no task may write to, and that a private root does not prevent."""
    if not image.is_shared:
        return
    if values["private_users_ownership"] == "chown":
        check_gate("private_users_ownership", "chown", Gate.IMAGE_WRITE, config)
    if not image.is_directory and not (values["read_only"] or values["ephemeral"]):
        rule = (
            f"is written to by the task, and the operator of this client does not allow {Gate.IMAGE_WRITE.value}"
        )
        raise ConfigError("image", values["image"], rule, "set read_only or ephemeral")


# =====================================================================================================
# Network
#
# Where a container's network comes from, and what it finds in /etc/resolv.conf and /etc/hosts. The namespace of a
# group (bridge, none, cni) is Nomad's: keeper and nspawn enter it, and nspawn is told of no network at all.
# --network-namespace-path would do the same only without user namespaces, or on 262 and later (systemd#36363).
# Disk images need it: nspawn mounts them in the host's network only, where it hears from udev.
# What goes through a group's namespace (ports, Consul Connect) is Nomad's and CNI's business. All other networks
# are nspawn's options. No rule of the host's firewall is ever the driver's: nspawn keeps its own for --port.
# =====================================================================================================


@dataclass(frozen=True)
class Port:
    """A port of the group's or the task's network block."""

    host: int
    to: int = 0  # the one inside; 0: the same
    host_ip: str = ""

    @property
    def inside(self) -> int:
        return self.to or self.host


@dataclass(frozen=True)
class Dns:
    """The group's dns block. What it leaves out is the host's, as with Nomad's own drivers."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.servers or self.searches or self.options)


@dataclass(frozen=True)
class GroupNetwork:
    """What Nomad says of a task's network."""

    namespace: str = ""  # a path; "" in host mode
    ports: Mapping[str, Port] = field(default_factory=dict)  # by label
    dns: Dns = Dns()


@dataclass(frozen=True)
class Names:
    """What a container's /etc/resolv.conf and /etc/hosts are made from, see read_names."""

    resolv_conf: str = ""  # the host's
    hosts: str = ""  # the image's
    addresses: tuple[str, ...] = ()  # of the group's namespace
    missing: frozenset[str] = frozenset()  # files of NAME_FILES that cannot be mounted in the image


NAME_FILES = ("/etc/resolv.conf", "/etc/hosts")


# Run inside the group's namespace, before the keeper. Root of a user namespace has no rights over a network
# namespace made outside of it: without these it could neither listen on ports below 1024 nor ping. Docker sets
# the same two; they go with the namespace.
ENTER_NAMESPACE = r"""
exec 4>&2 2>/dev/null
echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start
echo "0 2147483647" >/proc/sys/net/ipv4/ping_group_range
exec "$@" 2>&4 4>&-
"""


class NetworkMode(enum.Enum):
    """Where the container's network comes from."""

    HOST = "host"
    NONE = "none"  # a namespace with nothing but loopback in it
    GROUP = "group"
    VETH = "veth"  # a link to the host, which gives out addresses on it
    BRIDGE = "bridge"  # on a network that somebody else looks after
    INTERFACE = "interface"  # the same, without a link to the host

    @classmethod
    def of(cls, group: GroupNetwork, values: Values) -> NetworkMode:
        if group.namespace:
            return cls.GROUP
        for mode, names in MODE_OPTIONS.items():
            if any(values[name] for name in names):
                return mode
        return cls.HOST

    @property
    def has_address(self) -> bool:
        """Whether the container is to get an address of its own after it has started."""
        return self in (NetworkMode.VETH, NetworkMode.BRIDGE, NetworkMode.INTERFACE)

    @property
    def is_outside(self) -> bool:
        """Whether other machines can reach the container's own address."""
        return self in (NetworkMode.BRIDGE, NetworkMode.INTERFACE)


# The first that is set counts: addresses of a LAN before those that are for this host alone.
MODE_OPTIONS = {
    NetworkMode.BRIDGE: ("network_bridge",),
    NetworkMode.INTERFACE: ("network_macvlan", "network_ipvlan", "network_interface"),
    NetworkMode.VETH: ("network_zone", "network_veth"),
    NetworkMode.NONE: ("private_network", "network_veth_extra"),
}


@dataclass(frozen=True)
class NetworkPlan:
    """How one container gets its network."""

    mode: NetworkMode = NetworkMode.HOST
    zone: str = ""
    address_timeout: float = 0.0  # seconds
    ports: Mapping[str, Port] = field(default_factory=dict)  # those that nspawn maps, by label
    values: Mapping[str, Any] = field(default_factory=dict)  # options as they are to be rendered
    entry: tuple[str, ...] = ()  # what starts the keeper in another network namespace
    argv: tuple[str, ...] = ()  # of nspawn
    environ: Mapping[str, str] = field(default_factory=dict)  # for the payload
    files: Mapping[str, str] = field(default_factory=dict)  # paths inside to texts, to be mounted read-only
    mount_files: tuple[str, ...] = ()  # to be made in a read-only image, to mount on
    notes: tuple[str, ...] = ()  # sentences for the task's events

    def render_files(self, directory: Path) -> list[str]:
        """Return nspawn's arguments for the files, which lie in the task's state directory."""
        return [f"--bind-ro={directory}{path}:{path}" for path in self.files]


def plan_network(
    group: GroupNetwork, values: Values, names: Names, machine: str, *, is_disk: bool = False
) -> NetworkPlan:
    """Return the network of a task."""
    files = plan_name_files(group, values, names, machine)
    network = NetworkPlan(
        mode=NetworkMode.of(group, values),
        address_timeout=values["address_timeout"] or 0.0,
        zone=values["network_zone"] or "",
        values={"resolv_conf": "off"} if "/etc/resolv.conf" in files else {},
        files=files,
        mount_files=tuple(place_in_image(values, path) for path in files if is_read_only(values)),
        notes=tuple(explain_dns(group, values, files)),
    )
    if group.namespace and is_disk:  # without user namespaces: see check_image_rules
        return replace(network, argv=(f"--network-namespace-path={group.namespace}",))
    if group.namespace:
        set_up = ("sh", "-c", ENTER_NAMESPACE, "sh") if values["user_namespacing"] else ()
        entry = ("nsenter", f"--net={group.namespace}", "--", *set_up)
        return replace(network, entry=entry)
    ports = {label: find_port(group, "ports", label, label) for label in values["ports"]}
    for label, to in values["port_map"].items():
        ports[label] = replace(find_port(group, f"port_map.{label}", label, to), to=to)
    return replace(
        network,
        ports=ports,
        argv=tuple(argument for port in ports.values() for argument in render_port(port)),
        environ=plan_port_environ(ports),
        notes=(*network.notes, *(note for label, port in ports.items() for note in explain_port(label, port))),
    )


def find_port(group: GroupNetwork, option: str, label: str, shown: object) -> Port:
    port = group.ports.get(label)
    if port is None:
        rule = "no port of this label in the group's or task's network block"
        known = f"the labels are {', '.join(group.ports) or 'none'}"
        raise ConfigError(option, shown, rule, known)
    return port


def render_port(port: Port) -> list[str]:
    return [f"--port={protocol}:{port.host}:{port.inside}" for protocol in ("tcp", "udp")]


def plan_port_environ(ports: Mapping[str, Port]) -> dict[str, str]:
    """Return the variables that tell the port inside. Nomad does not know of port_map; it knows of `to`."""
    names = {label: re.sub(r"[^A-Za-z0-9_]", "_", label) for label in ports}
    kinds = ("NOMAD_PORT", "NOMAD_ALLOC_PORT")
    return {f"{kind}_{names[label]}": str(port.inside) for label, port in ports.items() for kind in kinds}


def explain_port(label: str, port: Port) -> Iterator[str]:
    """Say where nspawn's mapping differs from what Nomad shows: it is for all addresses of the host but loopback
    ones (measured on 252, 257 and 262)."""
    if port.host_ip.startswith("127.") or port.host_ip == "::1":
        yield (
            f"The port {label!r} cannot be reached at {port.host_ip}:{port.host}: systemd-nspawn maps ports at "
            "the host's other addresses only. Bridge mode has no such limit."
        )


NO_ADDRESS = "The container has no address after {limit:g} s: "


def explain_no_address(mode: NetworkMode, is_booted: bool, have_networkd: bool) -> str:
    """Say what may be missing when a container gets no address."""
    if mode is NetworkMode.VETH and not have_networkd:
        return (
            "systemd-networkd, which gives out addresses on the host's end of its link, does not run on this host "
            "(systemctl enable --now systemd-networkd); or use bridge mode, or network_veth = false."
        )
    if not is_booted:
        return "a command has no DHCP client beside it; use bridge mode, network_veth = false, or boot = true."
    if mode is NetworkMode.VETH:
        return "is a DHCP client, such as systemd-networkd, enabled in the image?"
    return "is a DHCP client enabled in the image, and does a DHCP server answer on that network?"


NETWORKD_IS_ACTIVE = "/run/systemd/units/invocation:systemd-networkd.service"  # systemd's link, to nowhere


def have_networkd() -> bool:
    """Whether systemd-networkd runs. Where only its socket does, the first link of a container starts it."""
    return os.path.lexists(NETWORKD_IS_ACTIVE)


# Elements of nspawn's map in nftables, `6 . 8080 : 10.0.0.2 . 80`, and its rules where it uses iptables: before
# 259, on kernels without nftables.
NAT_ELEMENT = re.compile(r"\S+ \. (\d+) : [0-9a-f.:]+ \. (\d+)")
NAT_RULE = re.compile(r"-A ((?:PREROUTING|OUTPUT) .*--dport (\d+) .*-j DNAT --to-destination \S+:(\d+))")


def find_port_maps(text: str, pattern: re.Pattern[str], ports: Sequence[tuple[int, int]]) -> list[str]:
    """Return the elements or rules that map one of `ports`, pairs of a port of the host and one inside."""
    found = [(match[0], match.groups()[-2:]) for match in pattern.finditer(text)]
    return [whole for whole, (host, inside) in found if (int(host), int(inside)) in ports]


def plan_name_files(group: GroupNetwork, values: Values, names: Names, machine: str) -> dict[str, str]:
    """Return the texts of /etc/resolv.conf and /etc/hosts where they are the driver's to make: in a group's
    network, which the image cannot know, and for a dns block. What the job mounts there itself stays."""
    policy = values["resolv_conf"]
    files = {}
    if not group.dns.is_empty or (group.namespace and policy in (None, "auto")):
        files["/etc/resolv.conf"] = render_resolv_conf(names.resolv_conf, group.dns)
    if group.namespace or values["extra_hosts"]:
        own = names.addresses or ("127.0.1.1",)
        lines = [f"{address} {values['hostname'] or machine}" for address in own]
        for item in values["extra_hosts"]:
            host, _, address = item.partition(":")
            lines.append(f"{address} {host}")
        files["/etc/hosts"] = render_hosts(names.hosts, lines)
    targets = (*values["bind"].values(), *values["bind_read_only"].values())
    mounted = {parse_bind(target)[0].rstrip("/") for target in targets}
    asked = {"/etc/resolv.conf": not group.dns.is_empty, "/etc/hosts": bool(values["extra_hosts"])}
    return {
        path: text
        for path, text in files.items()
        if not mounted & {path, "/etc", ""} and (asked[path] or path not in names.missing)
    }


def render_resolv_conf(host: str, dns: Dns) -> str:
    """Return a resolv.conf of the group's dns block, and of the host's lines for what the block leaves out."""
    given = {"nameserver": dns.servers, "search": dns.searches, "options": dns.options}
    lines = []
    for name, values in given.items():
        words = values or tuple(find_resolv_conf(host, name))
        if name == "nameserver":
            lines += [f"nameserver {server}" for server in words]
        elif words:
            lines.append(f"{name} {' '.join(words)}")
    return "".join(f"{line}\n" for line in lines)


def find_resolv_conf(text: str, name: str) -> list[str]:
    """Return the words of all lines of a resolv.conf that begin with `name`; of several search lines the last
    counts, as for the resolver."""
    found = [line.split()[1:] for line in text.split("\n") if line.split()[:1] == [name]]
    return found[-1] if name == "search" and found else [word for words in found for word in words]


def render_hosts(image: str, own: Sequence[str]) -> str:
    """Return the lines of the image's file but those for names in `own`, and the lines `own`."""
    names = {name for line in own for name in line.split()[1:]}
    lines = [line for line in filter(None, image.split("\n")) if not names & set(line.split("#")[0].split()[1:])]
    if not any("localhost" in line.split("#")[0].split()[1:] for line in lines):
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback", *lines]
    return "".join(f"{line}\n" for line in (*lines, *own))


def explain_dns(group: GroupNetwork, values: Values, files: Mapping[str, str]) -> Iterator[str]:
    """Say what of a resolv.conf may surprise."""
    policy, text = values["resolv_conf"], files.get("/etc/resolv.conf")
    if text is None:
        return
    if policy not in (None, "auto", "off"):
        yield f"/etc/resolv.conf comes from the group's dns block; resolv_conf = {json.dumps(policy)} is ignored."
    servers = find_resolv_conf(text, "nameserver")
    if group.namespace and servers and all(server.startswith(("127.", "::1")) for server in servers):
        yield (
            f"The host's name server {servers[0]} cannot be reached from the group's network: name one in the "
            "group's dns block."
        )


RESOLV_CONF_PATHS = (
    "/etc/resolv.conf",
    "/run/systemd/resolve/resolv.conf",
    "/run/NetworkManager/no-stub-resolv.conf",
)


def read_resolv_conf(paths: Sequence[str] = RESOLV_CONF_PATHS) -> str:
    """Return the host's resolv.conf. A name server on its loopback (systemd-resolved) is of use to the host alone:
    then the file that names the servers behind it."""
    texts = [text for path in paths if (text := read_text(Path(path)))]
    for text in texts:
        servers = find_resolv_conf(text, "nameserver")
        if servers and not all(server.startswith(("127.", "::1")) for server in servers):
            return text
    return texts[0] if texts else ""


def parse_addresses(fib_trie: str, if_inet6: str) -> tuple[str, ...]:
    """Return the addresses of a network namespace that others can reach, IPv4 first, from files of /proc/net."""
    found = re.findall(r"\|-- ([\d.]+)\n\s+/32 host LOCAL", fib_trie)
    for line in filter(None, if_inet6.split("\n")):
        # The name of the interface comes last, and may hold what else Python takes for blanks and line ends.
        digits, _, _, scope, flags = line.split(" ")[:5]
        if scope == "00" and not int(flags, 16) & IFA_F_TENTATIVE:
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return tuple(dict.fromkeys(address for address in found if not address.startswith(("127.", "169.254."))))


IFA_F_TENTATIVE = 0x40  # being checked for duplicates; cannot be used yet


def read_addresses(pid: int) -> tuple[str, ...]:
    """Return the addresses of a process's network namespace."""
    return parse_addresses(*(read_text(Path(f"/proc/{pid}/net/{name}")) for name in ("fib_trie", "if_inet6")))


def read_group_addresses(namespace: str) -> tuple[str, ...]:
    """Return the addresses of a group's namespace. /proc/net is that of the process which reads it."""
    command = ["nsenter", f"--net={namespace}", "--", "cat", "/proc/net/fib_trie", "/proc/net/if_inet6"]
    text = run(command, timeout=10)
    inet6 = [line for line in text.split("\n") if re.match(r"[0-9a-f]{32} ", line)]
    return parse_addresses(text, "\n".join(inet6))


def read_names(group: GroupNetwork, image: Image, values: Values) -> Names:
    """Read what the container's name files depend on; nothing where they are not the driver's to make."""
    if not group.namespace and group.dns.is_empty and not values["extra_hosts"]:
        return Names()
    return Names(
        resolv_conf=read_resolv_conf(),
        hosts=read_in_image(image, values, "/etc/hosts"),
        addresses=read_group_addresses(group.namespace) if group.namespace else (),
        missing=frozenset(path for path in NAME_FILES if not can_mount_file(image, values, path)),
    )


def is_read_only(values: Values) -> bool:
    """Whether nspawn cannot make mount points, because the image is mounted read-only before it comes to that."""
    return bool(values["read_only"]) or values["volatile"] == "state"


def can_mount_file(image: Image, values: Values, path: str) -> bool:
    """Whether nspawn will find a file to mount on, or can make one, or make_mount_points can."""
    if not is_read_only(values):
        return True
    if not image.is_directory:
        return False  # nobody has looked into it
    folder, name = os.path.split(place_in_image(values, path))
    with contextlib.suppress(OSError), open_directory(image.opened, folder) as fd:
        try:
            os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return os.fstatvfs(fd).f_flag & os.ST_RDONLY == 0
        return True
    return False


def check_interfaces(values: Values) -> None:
    """Refuse interfaces that the host does not have: of network_interface nspawn 257 and 262 say nothing."""
    for option in MODE_OPTIONS[NetworkMode.INTERFACE]:
        for item in values[option]:
            name = item.partition(":")[0]
            try:
                socket.if_nametoindex(name)
            except OSError:
                rule = "the host has no interface of this name"
                raise ConfigError(option, name, rule, "`ip link` on the host lists them") from None


NS_GET_NSTYPE = 0xB703  # ioctl: which kind of namespace a file is
CLONE_NEWNET = 0x40000000


def check_namespace(path: str) -> None:
    """Raise HostError unless there is a network namespace at `path`."""
    try:
        with open(path, "rb") as file:
            kind = fcntl.ioctl(file, NS_GET_NSTYPE)
    except OSError as error:
        gone = "is not there" if error.errno == errno.ENOENT else "is no network namespace"
        raise HostError(
            f"the network namespace of the group, {cut(path)}, {gone}; the task is not started"
        ) from None
    if kind != CLONE_NEWNET:
        raise HostError(f"{cut(path)} is a namespace, but not of a network; the task is not started")


# =====================================================================================================
# Root
#
# What becomes the container's root: the image itself, or a private root, of the task's own over the image, copy on
# write: an overlay whose upper directory takes what the task changes. With user namespaces the lower directories
# are id-mapped mounts of the image, so that no file is copied or given another owner: an image of any size serves
# any number of tasks at once, each started as fast as without (measured on 252 and 257, Linux 6.1 to 6.18). nspawn
# itself copies the image for `--ephemeral`, and for `--volatile=overlay` into memory, to change the owners.
# =====================================================================================================


@dataclass(frozen=True)
class Users:
    """A range of the host's ids for the users of a container."""

    base: int | None = None  # None: picked when the task starts
    count: int = 0x10000


@dataclass(frozen=True)
class PrivateRoot:
    """A root of the task's own."""

    layers: tuple[str, ...]  # directories of the image, topmost first
    place: str  # directory on the host for what the task changes; "" keeps it in memory
    users: Users | None  # None: without a user namespace
    is_mapped: bool  # the image's files are shown with the users' ids; else they have them already
    is_usr_mounted: bool = False  # systemd-nspawn takes its /usr from it, by path


# In the task's directory, which is out of reach of all tasks: they see what is in it. In `ephemeral_dir` it is the
# end of the name of a machine's directory.
PLACE_NAME = ".nspawn-root"
UPPER_FILESYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "tmpfs"})
OVERLAY_IDMAP = (5, 19)  # the first kernel whose overlay takes id-mapped layers


@dataclass(frozen=True)
class RootPlan:
    """How one container gets its root."""

    private: PrivateRoot | None  # None: nspawn's own way
    values: Mapping[str, Any] = field(default_factory=dict)  # options as they are to be rendered
    argv: tuple[str, ...] = ()  # of nspawn; a private root's are known when it is made
    copying: str = ""  # a sentence about the copy nspawn makes of the image


def plan_place(task_dir: str, ephemeral_dir: str, machine: str) -> str:
    """Return the directory for what a task changes."""
    return f"{ephemeral_dir}/{machine}{PLACE_NAME}" if ephemeral_dir else f"{task_dir}/{PLACE_NAME}"


def plan_root(image: Image, values: Values, host: Host, mounts: Mounts, place: str) -> RootPlan:
    """Return how the container gets its root. `place`: directory for what it changes."""
    is_volatile = values["volatile"] not in (None, "no")
    # "Failed to set up ID mapped mounts: Device or resource busy"; measured on 252, works on 257 and 262.
    is_old = values["volatile"] in ("yes", "state") and values["user_namespacing"] and host.systemd < 257
    is_asked = values["ephemeral"] or values["volatile"] == "overlay" or (is_volatile and image.is_protected)
    if not (is_asked or is_old or image.layers):
        return RootPlan(None, argv=tuple(image.argv))
    users = plan_users(values)
    is_mapped = users is not None and users.base != 0 and values["private_users_ownership"] != "off"
    layers = tuple(map(str, image.layers or (image.path,)))
    root = PrivateRoot(layers, "" if is_volatile else place, users, is_mapped, values["volatile"] == "yes")
    obstacle = find_obstacle(image, root, values, host, mounts)
    if not obstacle:
        done = {"ephemeral": False, "private_users": None, "private_users_ownership": None}
        return RootPlan(root, {**done, "volatile": None} if values["volatile"] == "overlay" else done)
    if image.layers:
        raise ConfigError("image", str(image.path), f"cannot be used on this machine: {obstacle}")
    if image.is_shared and image.is_directory and values["volatile"] in ("yes", "state"):
        rule = f"cannot be had without {Gate.IMAGE_WRITE.value}, because {obstacle}"
        raise ConfigError("volatile", values["volatile"], rule, "set it to overlay")
    if is_old:
        rule = f"needs systemd 257 or newer together with user namespaces, because {obstacle}"
        raise ConfigError("volatile", values["volatile"], rule, "set user_namespacing = false")
    return RootPlan(None, argv=tuple(image.argv), copying=explain_copy(values, image, mounts, obstacle))


def plan_users(values: Values) -> Users | None:
    if not values["user_namespacing"]:
        return None
    if values["private_users"] == "identity":
        return Users(0)
    base, _, count = values["private_users"].partition(":")
    return Users(int(base), int(count or Users.count)) if base.isdigit() else Users()


def find_obstacle(image: Image, root: PrivateRoot, values: Values, host: Host, mounts: Mounts) -> str:
    """Say why there can be no private root, "" when there can be one."""
    if not image.is_directory:
        return "the image is no directory"
    for option, own in (("private_users", "yes"), ("private_users_ownership", "foreign")):
        if values[option] == own:
            return f"{option} = {own} is a way of its own"
    if root.is_mapped and host.kernel < OVERLAY_IDMAP:
        version = ".".join(map(str, host.kernel))
        return f"Linux {version} has no id-mapped overlays (5.19 has), which user namespaces need"
    for layer in root.layers if root.is_mapped else ():
        if not mounts.have_idmap(layer, host.kernel):
            return f"{layer} is on {mounts.filesystem(layer)}, which cannot be id-mapped for a user namespace"
    if root.place and mounts.filesystem(root.place) not in UPPER_FILESYSTEMS:
        return f"{root.place} is on {mounts.filesystem(root.place)}, which cannot hold what a task changes"
    return ""


def explain_copy(values: Values, image: Image, mounts: Mounts, obstacle: str) -> str:
    """Say for the task's events what takes its time, "" when nothing does."""
    if not obstacle or mounts.filesystem(str(image.path)) == "btrfs":  # nspawn makes a snapshot there
        return ""
    if values["ephemeral"]:
        return f"ephemeral: systemd-nspawn makes a full copy of the image first, because {obstacle}."
    if values["user_namespacing"] and image.is_directory:
        return f"volatile: systemd-nspawn copies the whole image into memory first, because {obstacle}."
    return ""


# =====================================================================================================
# Cgroup
#
# Where a task's processes live: <task>/keeper, and <task>/supervisor and <task>/payload, which nspawn makes
# itself with --keep-unit. <task> is the cgroup Nomad made, else one of the same shape, never the agent's own:
# its processes would end with the agent's service. On hosts with v1 controllers the v2 hierarchy beside them
# serves to find and kill; the numbers then come from the processes.
# =====================================================================================================


def plan_cgroup(mode: CgroupMode, given: str, alloc_id: str, task_name: str) -> str:
    """Return the path of the task's cgroup, "" where there is no v2 hierarchy.

    `given` is what Nomad sends since 1.3; with v1 controllers it names a cpuset, which is not for us.
    """
    if mode.root is None:
        return ""
    given = os.path.normpath(given)
    if given.startswith(f"{mode.root}/"):
        return given
    name = urllib.parse.quote(f"{alloc_id}.{task_name}", safe="")
    if len(name) > 200:
        name = f"{name[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return f"{mode.root}/nomad.slice/share.slice/{name}.scope"


@dataclass(frozen=True)
class Resources:
    """What Nomad grants a task."""

    memory: int = 0  # bytes that are reserved for it, 0: unknown
    memory_max: int | None = 0  # bytes it may use when the machine has them; 0: as many as reserved, None: any
    cpu: int = 0  # MHz, which are its weight among the others
    cpu_fraction: float = 0.0  # of all the machine's MHz
    cores: str = ""  # those reserved for it, as in 0,2-3


MIN_SHARES, MAX_SHARES = 2, 1 << 18  # of a v1 cgroup: what Nomad's numbers and the formula below stand on
CPU_PERIOD = 100_000  # microseconds


def plan_cpu_weight(resources: Resources) -> int:
    """Return the weight for a number of MHz, by the formula that Nomad's own drivers use (opencontainers/cgroups):
    1024 shares weigh the usual 100, and the ends meet at 1 and 10000."""
    shares = float(resources.cpu)
    if resources.cpu_fraction and shares / resources.cpu_fraction >= MAX_SHARES:
        shares = resources.cpu_fraction * MAX_SHARES  # the machine as a whole has more than fits
    bits = math.log2(min(max(shares, MIN_SHARES), MAX_SHARES))
    return min(max(math.ceil(10 ** ((bits * bits + 125 * bits) / 612 - 7 / 34)), 1), 10000)


def plan_limits(resources: Resources, values: Values, cpus: int) -> dict[str, str]:
    """Return the contents of the task's control files: names as in `memory.max`.

    What is above the reservation is given back first when memory gets short (memory.low). There is no memory.high:
    it would slow down every task that uses what it may, on an idle machine, too.
    """
    limits: dict[str, str] = {}
    if resources.memory:
        most = resources.memory_max
        limits["memory.max"] = "max" if most is None else str(max(resources.memory, most))
        limits["memory.low"] = str(resources.memory) if most != 0 else "0"
        limits["memory.swap.max"] = values["memory_swap_max"] or "0"
    if resources.cpu:
        limits["cpu.weight"] = str(plan_cpu_weight(resources))
    if values["cpu_hard_limit"] and resources.cpu_fraction:
        quota = max(round(resources.cpu_fraction * cpus * CPU_PERIOD), 1000)  # the kernel's least
        limits["cpu.max"] = f"{quota} {CPU_PERIOD}"
    if resources.cores:
        limits["cpuset.cpus"] = resources.cores
    if values["pids_limit"]:
        limits["pids.max"] = str(values["pids_limit"])
    if values["io_weight"]:
        limits["io.weight"] = str(values["io_weight"])
    return limits


# What a container may nest and make: more than systemd and other containers inside need, and little enough for
# whoever walks through it. The kernel counts from the task's cgroup on, where nobody inside can change it.
CGROUP_BOUNDS = {"cgroup.max.depth": "64", "cgroup.max.descendants": "10000"}


def make_cgroup(cgroup: str, limits: Mapping[str, str]) -> list[str]:
    """Make a task's cgroup with its limits; return the controllers that cannot be had there.

    All controllers are switched on, so that a booted system can set limits of its own. Raises HostError when a
    limit cannot be set although its controller is there.
    """
    place = Path(cgroup)
    (place / "keeper").mkdir(parents=True, exist_ok=True)
    ancestors = [parent for parent in reversed(place.parents) if (parent / "cgroup.subtree_control").exists()]
    for parent in ancestors:
        enabled = read_text(parent / "cgroup.subtree_control").split()
        for controller in read_text(parent / "cgroup.controllers").split():
            if controller in CONTROLLERS and controller not in enabled:
                with contextlib.suppress(OSError):
                    write_control(parent / "cgroup.subtree_control", f"+{controller}")
    have = read_text(place / "cgroup.controllers").split()
    for name, value in {**CGROUP_BOUNDS, **limits}.items():
        if name.split(".")[0] in ("cgroup", *have) and not (
            name == "memory.swap.max" and not (place / name).exists()
        ):
            try:
                write_control(place / name, value)
            except OSError as error:
                raise HostError(
                    f"the limit {name} = {value} cannot be set in {cgroup}: {error.strerror}"
                ) from None
    return sorted({name.split(".")[0] for name in limits} - set(have))


def write_control(path: Path, value: str) -> None:
    """Write a control file; unlike Path.write_text it makes none."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def open_cgroup(path: str, parent: int | None = None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def walk_cgroup(cgroup: str) -> Iterator[tuple[int, str]]:
    """Yield all cgroups below one, each after those below it, as its parent's descriptor and its name.

    A container may nest them deeply, up to paths that are longer than the kernel takes: nothing here is recursive,
    and there is one descriptor at a time. What is not there any more is left out.
    """
    try:
        here = open_cgroup(cgroup)
    except FileNotFoundError:
        return
    names: list[str] = []
    waiting = [list_cgroups(here)]
    try:
        while waiting:
            if waiting[-1]:
                name = waiting[-1].pop()
                try:
                    below = open_cgroup(name, here)
                except FileNotFoundError:
                    continue
                waiting.append(list_cgroups(below))
                names.append(name)
            elif names:  # back: the parent of a removed cgroup is still its parent
                waiting.pop()
                below = open_cgroup("..", here)
                yield below, names.pop()
            else:
                return
            os.close(here)
            here = below
    finally:
        os.close(here)


def list_cgroups(directory: int) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def read_cgroup_pids(cgroup: str) -> list[int]:
    """Return all processes in a cgroup and below it, [] for the cgroup "". Takes as long as the container has made
    cgroups and processes: for `run_apart`."""
    if not cgroup:
        return []
    places = (f"/proc/self/fd/{parent}/{name}" for parent, name in walk_cgroup(cgroup))
    return [pid for place in itertools.chain([cgroup], places) for pid in read_members(place)]


def read_members(cgroup: str) -> list[int]:
    """Return the processes in a cgroup itself. Raises OSError when the host cannot tell."""
    try:
        return [int(pid) for pid in Path(cgroup, "cgroup.procs").read_bytes().split()]
    except OSError as error:
        # Removed; being removed; threads without processes, which are listed further up.
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return []
        raise


def read_cgroup_processes(cgroup: str) -> list[ProcessId]:
    """As read_cgroup_pids, with identities."""
    return [found for pid in read_cgroup_pids(cgroup) if (found := ProcessId.of(pid))]


def read_counters(path: str) -> dict[str, int]:
    """Read a file of lines `name number`, {} when it is not there."""
    return parse_counters(read_text(Path(path)))


def parse_counters(text: str) -> dict[str, int]:
    lines = (line.partition(" ") for line in text.split("\n"))
    return {name: int(number) for name, _, number in lines if number.isdigit()}


def read_number(path: str) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return 0


@dataclass(frozen=True)
class Usage:
    """A task's use of the machine at one moment: CPU in seconds since its start, memory in bytes."""

    at: float  # time.monotonic()
    user: float
    system: float
    rss: int
    usage: int
    cache: int = 0
    swap: int = 0
    peak: int = 0
    throttled_periods: int = 0
    throttled_time: int = 0  # nanoseconds
    is_cgroup: bool = False  # memory is the cgroup's own number


def read_cgroup_usage(cgroup: str) -> Usage | None:
    """Return the cgroup's numbers, None where it has no memory controller."""
    memory = read_counters(f"{cgroup}/memory.stat")
    if not memory:
        return None
    cpu = read_counters(f"{cgroup}/cpu.stat")
    return Usage(
        at=time.monotonic(),
        user=cpu.get("user_usec", 0) / 1e6,
        system=cpu.get("system_usec", 0) / 1e6,
        rss=memory.get("anon", 0),
        cache=memory.get("file", 0),
        usage=read_number(f"{cgroup}/memory.current"),
        swap=read_number(f"{cgroup}/memory.swap.current"),
        peak=read_number(f"{cgroup}/memory.peak"),
        throttled_periods=cpu.get("nr_throttled", 0),
        throttled_time=cpu.get("throttled_usec", 0) * 1000,
        is_cgroup=True,
    )


CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


def read_process_usage(pids: Sequence[int]) -> Usage:
    """Add up the processes: the time of ended children counts once their parent has waited for them."""
    user = system = rss = usage = 0
    for pid in pids:
        fields = read_stat(pid)
        if fields is None:
            continue
        user += int(fields[11]) + int(fields[13])
        system += int(fields[12]) + int(fields[14])
        with contextlib.suppress(OSError):
            pages = Path(f"/proc/{pid}/statm").read_text().split()
            usage += int(pages[1]) * PAGE_SIZE
            rss += (int(pages[1]) - int(pages[2])) * PAGE_SIZE
    return Usage(time.monotonic(), user / CLOCK_TICKS, system / CLOCK_TICKS, rss, usage)


def read_descendants(pid: int) -> list[int]:
    """Return a process and all below it, for hosts without a v2 hierarchy."""
    found = [pid]
    for known in found:
        found += read_children(known)
    return found


def kill_cgroup(cgroup: str) -> bool:
    """Kill every process in a cgroup and below; False where the kernel (before 5.14) cannot."""
    if not cgroup:
        return False
    try:
        Path(cgroup, "cgroup.kill").write_text("1")
    except OSError:
        return False
    return True


SYSTEMD_HIERARCHY = "/sys/fs/cgroup/systemd"


def find_mirrors(cgroup: str) -> list[str]:
    """Return a cgroup and, on hybrid hosts, its mirror in systemd's v1 hierarchy: nspawn keeps both in step."""
    hybrid, other = f"{CgroupMode.HYBRID.root}/", SYSTEMD_HIERARCHY
    is_mirrored = cgroup.startswith(hybrid) and os.path.isdir(other)
    return [cgroup, *([f"{other}/{cgroup[len(hybrid) :]}"] if is_mirrored else [])]


def remove_cgroup(cgroup: str) -> None:
    """Remove a cgroup and all below it, and its mirror; leave what has processes."""
    for root in find_mirrors(cgroup):
        for parent, name in walk_cgroup(root):
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=parent)
        with contextlib.suppress(OSError):
            os.rmdir(root)


def parse_cgroups(text: bytes) -> dict[str, str]:
    """Return a process's cgroups by their controllers, from /proc/PID/cgroup: "" is the v2 hierarchy. Lines end at
    nothing but \\n, the one thing that the kernel allows in no name."""
    lines = (line.split(b":", 2) for line in text.split(b"\n"))
    return {os.fsdecode(line[1]): os.fsdecode(line[2]) for line in lines if len(line) == 3}


def read_cgroups(pid: int) -> dict[str, str]:
    """Return parse_cgroups of a process, {} when it is gone."""
    try:
        return parse_cgroups(Path(f"/proc/{pid}/cgroup").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return {}


def find_cgroups(pid: int, cgroup: str) -> list[str]:
    """Return where below a cgroup, and below its mirror, a process is; [] when it is elsewhere. A booted systemd
    has moved from payload/ to init.scope: a cgroup with others below it may have no processes."""
    roots = {"": str(read_cgroup_mode().root), "name=systemd": SYSTEMD_HIERARCHY}
    paths = read_cgroups(pid)
    found = []
    for place, (controllers, root) in zip(find_mirrors(cgroup) if cgroup else (), roots.items(), strict=False):
        path = f"{root}{paths.get(controllers, '')}"
        if is_below(path, place) and ".." not in path.split("/"):  # the kernel's word for what it does not show
            found.append(path)
        elif not controllers:
            return []
    return found


# =====================================================================================================
# Job
#
# What Nomad says of a task, free of protobuf, and the names and signals that come from it. Pure, as everything up
# to Outcome: no I/O, no clock, no randomness.
# =====================================================================================================


@dataclass(frozen=True)
class Mount:
    """A volume Nomad asks for (host volume, CSI, device plugin)."""

    source: str
    target: str
    read_only: bool
    propagation: str = ""


@dataclass(frozen=True)
class TaskConfig:
    """What Nomad says of a task, free of protobuf."""

    id: str  # <allocation>/<task>/<8 hex digits>, new for every start
    name: str
    alloc_id: str
    alloc_dir: str  # of the allocation, on the host
    options: Mapping[str, object]  # the job's `config` block
    user: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    stdout_path: str = "/dev/null"
    stderr_path: str = "/dev/null"
    cgroup: str = ""
    resources: Resources = Resources()
    network: GroupNetwork = GroupNetwork()
    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()  # of device plugins

    @property
    def shared_dir(self) -> str:
        return f"{self.alloc_dir}/alloc"

    @property
    def task_dir(self) -> str:
        return f"{self.alloc_dir}/{self.name}"

    @property
    def log_dir(self) -> str:
        return f"{self.shared_dir}/logs"

    @property
    def own_directories(self) -> dict[str, str]:
        """The directories a task may name without a gate, by their names."""
        paths = (self.shared_dir, f"{self.task_dir}/local", f"{self.task_dir}/secrets")
        return dict(zip(OWN_DIRECTORIES, paths, strict=True)) if self.alloc_dir else {}

    @property
    def directory_names(self) -> tuple[str, ...]:
        """The task's directories, as below the allocation's; those above others first."""
        own = (f"{self.name}{end}" for end in ("", "/local", "/secrets"))
        return ("alloc", "alloc/logs", *own) if self.alloc_dir else ()


class Mode(enum.Enum):
    """What the container's PID 1 is. It decides who gets a signal, and what one means."""

    BOOT = "boot"
    COMMAND = "command"  # the command itself: a signal it has no handler for is ignored
    PROCESS_TWO = "process_two"  # nspawn's stub; the command is PID 2

    @classmethod
    def of(cls, values: Values) -> Mode:
        if values["boot"]:
            return cls.BOOT
        return cls.PROCESS_TWO if values["process_two"] else cls.COMMAND

    @property
    def console(self) -> str:
        # A booted systemd writes nothing to its console in pipe mode (measured on 252 and 257); a pty would
        # merge a command's stdout and stderr and end its lines with CR LF.
        return "read-only" if self is Mode.BOOT else "pipe"

    @property
    def environ(self) -> dict[str, str]:
        return {"TERM": "dumb"} if self is Mode.BOOT else {}  # no colours and no cursor movement in the logs

    def stop_signal(self, name: str) -> int:
        """Return the signal that asks the payload to end. `name` is the job's kill_signal, "" when unset.

        For systemd SIGTERM means "re-exec" and SIGINT "reboot"; who writes one of them as kill_signal means
        "end", which is SIGRTMIN+4 (poweroff). Others are sent as they are.
        """
        number = parse_signal(name) if name else signal.SIGTERM
        if self is Mode.BOOT and number in (signal.SIGTERM, signal.SIGINT):
            return signal.SIGRTMIN + 4
        return number


def parse_signal(name: str) -> int:
    """Return the number of SIGTERM, TERM, 15 or SIGRTMIN+4."""
    match = re.fullmatch(r"(?:SIG)?(RTMIN|RTMAX)([+-]\d{1,2})|(?:SIG)?([A-Z][A-Z0-9]*)|(\d{1,3})", name.upper())
    if match:
        base, offset, plain, digits = match.groups()
        known = signal.Signals.__members__.get(f"SIG{base or plain}")
        number = int(digits) if digits else int(known or 0) + int(offset or 0)
        if 0 < number < signal.NSIG:
            return number
    raise ConfigError("signal", name, "is no signal", "use a name such as SIGTERM, SIGHUP or SIGRTMIN+4")


def render_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}" if number > signal.SIGRTMIN else str(number)


def plan_machine(task_name: str, alloc_id: str) -> str:
    """Return the machine's name, <task>-<allocation>, in nspawn's alphabet and 64 characters.

    What differs from the task's name ends in 64 bits of a digest, and so does a name that looks like one of these:
    no two tasks of an allocation have one name.
    """
    alloc = re.sub(r"[^A-Za-z0-9-]+", "-", alloc_id)[:36].strip("-") or "alloc"
    room = 64 - len(alloc) - 1
    name = re.sub(r"[^A-Za-z0-9-]+", "-", task_name).strip("-")
    if name != task_name or len(name) > room or re.fullmatch(r"(.*-)?[0-9a-f]{16}", name):
        digest = hashlib.sha256(task_name.encode()).hexdigest()[:16]
        name = f"{name[: room - 17].strip('-')}-{digest}".lstrip("-")
    return f"{name}-{alloc}"


def render_readable(task_id: str) -> str:
    """Return the beginning of an id for a file's name: the allocation's, which has 36 characters, and a bit."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", task_id)[:40]


def state_directory(task_id: str) -> Path:
    """Return where a task's files are: found from the id alone, short enough for a socket's path, and never
    outside the state root whatever the id holds."""
    return STATE_ROOT / f"{render_readable(task_id)}-{hashlib.sha256(task_id.encode()).hexdigest()[:12]}"


# =====================================================================================================
# Environment
#
# How a task's variables and its user reach the payload, and nothing else: in an OCI bundle, a file for root alone.
# nspawn reads it when it starts (252, 257, 262), hands the variables to the payload byte for byte, and has them
# neither in its own environment nor on a command line. With a bundle it reads no settings file (*.nspawn).
# =====================================================================================================

MAX_VARIABLE = 128 << 10  # bytes of a variable with its final NUL: MAX_ARG_STRLEN of the kernel
MAX_ENVIRONMENT = 1536 << 10  # the kernel's limit for arguments and environment together is 2 MiB


def check_environment(variables: Mapping[str, str]) -> None:
    total = 0
    for name, value in variables.items():
        if found := NO_TEXT.search(value):
            rule = f"the value must not hold the character U+{ord(found[0]):04X}: systemd-nspawn takes text only"
            raise ConfigError("env", name, rule, "put the value into a file with a template block")
        size = len(f"{name}={value}".encode(errors="replace")) + 1
        total += size
        if size > MAX_VARIABLE:
            rule = f"a variable may have {MAX_VARIABLE >> 10} KiB, this one has {size >> 10}"
            raise ConfigError("env", name, rule, "put the value into a file with a template block")
    if total > MAX_ENVIRONMENT:
        rule = f"all variables together may have {MAX_ENVIRONMENT >> 10} KiB"
        raise ConfigError("env", f"{total >> 10} KiB", rule, "put large values into files with template blocks")


def select_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that nspawn accepts. Nomad makes others, too: a key of a meta block may hold dots."""
    return {name: value for name, value in variables.items() if VARIABLE.fullmatch(name)}


def explain_variables(variables: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each variable that does not reach the task."""
    for name in sorted(variables):
        if not VARIABLE.fullmatch(name):
            why = "systemd-nspawn accepts letters, digits and underscores only"
            yield f"The variable {name!r} is not passed on: {why}."


def render_bundle(variables: Mapping[str, str], account: Account | None) -> str:
    """Return a bundle's config.json, in ASCII. All else is on the command line: nspawn takes both together. Raises
    ConfigError for what does not fit into a payload's environment."""
    variables = {**(account.variables if account else {}), **variables}
    check_environment(variables)
    process: dict[str, object] = {"env": [f"{name}={value}" for name, value in sorted(variables.items())]}
    if account:
        process["user"] = {"uid": account.uid, "gid": account.gid, "additionalGids": account.groups}
    return json.dumps({"ociVersion": "1.0.0", "process": process})


# =====================================================================================================
# Plan
#
# A task's configuration, the options and the facts go in, and everything needed to start the task comes out, the
# same every time.
# =====================================================================================================


@dataclass(frozen=True)
class Pin:
    """A source and the place, which nobody else can touch, that it is mounted at for nspawn."""

    source: Source
    place: str  # in the task's state directory
    is_node: bool = False  # there shall be a device node like the source, not the source itself


@dataclass(frozen=True)
class Inside:
    """What a further command in the container gets, as the payload has it."""

    user: str = ""  # "": root
    directory: str = "/"
    variables: Mapping[str, str] = field(default_factory=dict)
    account: Account | None = None  # None: to be looked up in the container


def plan_inside(task: TaskConfig, values: Values, variables: Mapping[str, str], account: Account | None) -> Inside:
    """Return the surroundings of the payload; without an account, user and home come from the container's own
    files."""
    given = {
        "PATH": DEFAULT_PATH,
        "LANG": "C.UTF-8",
        "container": "systemd-nspawn",
        **({"container_uuid": task.alloc_id} if UUID.fullmatch(task.alloc_id) else {}),
        **variables,
    }
    user = account.name if account else values["user"] or ""
    return Inside(user, values["working_directory"] or "/", given, account)


@dataclass(frozen=True)
class Plan:
    """Everything needed to start a task."""

    task_id: str
    machine: str
    mode: Mode
    network: NetworkPlan
    argv: tuple[str, ...]  # of systemd-nspawn
    environ: Mapping[str, str]  # of nspawn, beside what it always holds
    bundle: str  # the text of config.json
    cgroup: str
    limits: Mapping[str, str]  # the cgroup's control files
    log_paths: tuple[str, str]  # of stdout and stderr
    image: Image
    private: PrivateRoot | None  # None: the image is the root, in nspawn's own way
    pivot: str  # the directory of the image that becomes the container's root, as `find_root`
    is_read_only: bool  # nspawn cannot make mount points in the image
    command: tuple[str, ...]
    search_path: str  # PATH of the command
    mounts: Mapping[str, str]  # targets in the container to their places in the keeper's namespace
    prefix: tuple[str, ...]  # what nspawn is started by
    pins: tuple[Pin, ...]
    nosuid: tuple[str, ...]  # paths that nspawn binds, in which set-user-id files shall have no effect
    device_rules: tuple[DeviceRule, ...]
    credentials: Mapping[str, bytes]  # by their names
    copying: str  # a sentence about the copy nspawn makes of the image, "" when it makes none
    inside: Inside
    has_other_users: bool  # than the host's
    journal: Journal
    notes: tuple[str, ...]  # sentences for the task's events

    def find_root(self, state_dir: Path) -> Path | None:
        """Return where the container's root is in the keeper's namespace; None when nobody has looked into it."""
        if self.private:
            return state_dir / "root"
        if not self.image.is_directory:
            return None
        pin = self.find_pin(self.image.fd)
        return Path(pin.place) if pin else self.image.opened

    def name_sources(self, line: str) -> str:
        """Return a message of nspawn with the paths that people know."""
        for pin in sorted(self.pins, key=lambda pin: len(pin.place), reverse=True):
            line = line.replace(pin.place, pin.source.path)
        return line

    def find_pin(self, fd: int) -> Pin | None:
        return next((pin for pin in self.pins if fd >= 0 and pin.source.fd == fd), None)

    @property
    def wants_filter(self) -> bool:
        """A booted system's console is a terminal: its lines end with CR LF, twice over."""
        return self.mode is Mode.BOOT and "--console=pipe" not in self.argv


DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # nspawn's own for the payload


JOURNALS = "/var/log/journal"


@dataclass(frozen=True)
class Journal:
    """What shows a container's journal among the host's."""

    place: str = ""  # the task's own, removed at its end; "" without one
    target: str = ""  # what it is a link to; "" for a directory that is mounted in the container
    notes: tuple[str, ...] = ()  # sentences for the task's events

    @property
    def argv(self) -> tuple[str, ...]:
        return (f"--bind={self.place}",) if self.place and not self.target else ()


def plan_journal(task: TaskConfig, values: Values, found: Found, root: RootPlan) -> Journal:
    """Return the journal to show on the host. Its name is the allocation's id, whatever machine id the image has:
    an image could name the journal of the host or of another task."""
    kind = (values["link_journal"] or "no").removeprefix("try-")
    if kind in ("no", "auto"):
        return Journal()
    obstacle = found.journal_obstacle
    if kind == "host" and have_other_users(values):
        obstacle = "in a user namespace the container could not write there"
    if kind == "guest" and (root.private or values["ephemeral"] or not found.image.is_directory):
        obstacle = "the container's files are not in a directory of the host"
    if obstacle and not values["link_journal"].startswith("try-"):
        raise ConfigError("link_journal", values["link_journal"], f"cannot be had: {obstacle}", "leave it out")
    if obstacle:
        return Journal(notes=(f"link_journal has no effect: {obstacle}.",))
    place = name_journal(task.alloc_id)
    return Journal(place, f"{found.image.path}{place}" if kind == "guest" else "")


def name_journal(alloc_id: str) -> str:
    return f"{JOURNALS}/{alloc_id.replace('-', '').lower()}"


@dataclass(frozen=True)
class Found:
    """What was looked up on the host before a task's start is planned."""

    image: Image
    mounts: Mounts
    sources: Mapping[str, Source] = field(default_factory=dict)  # by the names the job has for them
    credentials: Mapping[str, bytes] = field(default_factory=dict)
    names: Names = Names()
    devices: Mapping[Device, Source] = field(default_factory=dict)
    device_rules: tuple[DeviceRule, ...] = ()  # for the devices, and what else of /dev is mounted
    directories: Mapping[str, Source] = field(default_factory=dict)  # the task's and volumes, by their paths
    ephemeral_dir: str = ""  # the operator's, "" for the task's own directory
    account: Account | None = None
    journal_obstacle: str = ""  # why the host cannot show the task's journal, "" when it can


def plan_task(task: TaskConfig, values: Values, host: Host, found: Found) -> Plan:
    """Work out everything that is needed to start a task."""
    check_rules(values, host)
    state, machine = state_directory(task.id), plan_machine(task.name, task.alloc_id)
    root, image_pins = plan_image(task, values, host, found)
    network = plan_network(task.network, values, found.names, machine, is_disk=not found.image.is_directory)
    values = {**values, **network.values, **plan_defaults(task, values, mode := Mode.of(values), found.account)}
    given = {**values["environment"], **task.env, **network.environ}
    variables = select_variables(given)
    directories = plan_pins(found.directories, state, "directories")
    volumes = plan_volumes(task, values, host, found.mounts, directories)
    journal = plan_journal(task, values, found, root)
    pins, devices = plan_pins(found.sources, state), plan_nodes(found.devices, state)
    arguments = [
        *render_options({**values, **root.values}),
        *render_sources(values, host, pins, devices, plan_credentials(found.credentials, state)),
        *network.argv,
        *itertools.chain(*(volume.argv for volume in volumes)),
        *network.render_files(state),
        *render_bundle_options(values, state),
    ]
    return Plan(
        task_id=task.id,
        machine=machine,
        mode=mode,
        network=network,
        argv=plan_argv(task, values, host, (*root.argv, *arguments, *journal.argv)),
        environ=plan_environ(host),
        bundle=render_bundle({**mode.environ, **variables}, found.account),
        cgroup=plan_cgroup(host.cgroups, task.cgroup, task.alloc_id, task.name),
        limits=plan_limits(task.resources, values, host.cpus),
        log_paths=(task.stdout_path, task.stderr_path),
        image=found.image,
        private=root.private,
        pivot=str(find_root(Path("/"), values)),
        is_read_only=is_read_only(values),
        command=values["command"],
        search_path=variables.get("PATH") or DEFAULT_PATH,
        mounts=plan_mount_table(values, volumes, pins),
        prefix=plan_prefix(values),
        pins=(*pins.values(), *directories.values(), *devices.values(), *image_pins),
        nosuid=plan_nosuid(values, volumes, pins),
        device_rules=(*USUAL_DEVICES, *found.device_rules),
        credentials=found.credentials,
        copying=root.copying,
        has_other_users=have_other_users(values),
        inside=plan_inside(task, values, variables, found.account),
        journal=journal,
        notes=(*explain_variables(given), *network.notes, *journal.notes, *explain_limits(values, host)),
    )


def plan_image(task: TaskConfig, values: Values, host: Host, found: Found) -> tuple[RootPlan, list[Pin]]:
    """Return how the container gets its root, and what has to be mounted for that."""
    check_image_rules(values, found.image, task.network)
    place = plan_place(task.task_dir, found.ephemeral_dir, plan_machine(task.name, task.alloc_id))
    root = plan_root(found.image, values, host, found.mounts, place)
    return pin_image(root, values, found, state_directory(task.id))


def explain_limits(values: Values, host: Host) -> Iterator[str]:
    """Yield a sentence for each limit the job itself asks for and this machine does not have."""
    options = {"cpu_hard_limit": "cpu", "memory_swap_max": "memory", "io_weight": "io"}
    for option, controller in options.items():
        if values[option] and controller not in host.controllers:
            why = f"this machine has no cgroup v2 controller {controller}"
            yield f"{option} has no effect: {why}."


def plan_argv(task: TaskConfig, values: Values, host: Host, arguments: Sequence[str]) -> tuple[str, ...]:
    """Return nspawn's command line."""
    # nspawn 261 and later print a note at every start, even with --quiet, unless the families are said.
    is_noisy = host.systemd >= 261 and not values["restrict_address_families"]
    return (
        "systemd-nspawn",
        "--quiet",
        "--keep-unit",
        "--register=no",
        "--link-journal=no",  # nspawn would mount the host's directory that the image's machine id names
        f"--machine={plan_machine(task.name, task.alloc_id)}",
        *([f"--uuid={task.alloc_id}"] if UUID.fullmatch(task.alloc_id) else []),
        *(["--restrict-address-families="] if is_noisy else []),
        *([] if can_make_devices(values) else ["--drop-capability=CAP_MKNOD"]),
        *arguments,
        *(["--", *values["command"]] if values["command"] else []),  # what follows "--" is data
    )


def can_make_devices(values: Values) -> bool:
    """Whether a container may make device nodes. In a user namespace the kernel itself refuses; else it is one
    thing more between a container and the host's disks, and the only one where there is no device policy."""
    return bool(values["user_namespacing"]) or not {"CAP_MKNOD", "all"}.isdisjoint(values["capability"])


def plan_prefix(values: Values) -> tuple[str, ...]:
    """nspawn's own --oom-score-adjust= fails with user namespaces: "Permission denied" (measured on 252)."""
    score = values["oom_score_adjust"]
    return () if score is None else ("choom", "-n", str(score), "--")


def plan_defaults(task: TaskConfig, values: Values, mode: Mode, account: Account | None) -> dict[str, str]:
    """Return the options whose default depends on others."""
    # A booted system's init is root's, whatever the job says.
    user = "" if mode is Mode.BOOT or not task.user else is_user("user", decode_string("user", task.user))
    return {
        "console": values["console"] or mode.console,
        "user": "" if account else values["user"] or user,  # an account is in the bundle
    }


def check_image_rules(values: Values, image: Image, group: GroupNetwork) -> None:
    if group.namespace and values["user_namespacing"] and not image.is_directory:
        rule = "cannot be had by a task with a disk image in a group's network"
        raise ConfigError("user_namespacing", True, rule, "set it to false, or use an image that is a directory")
    for option in ("image_policy", "root_hash"):
        if values[option] and image.is_directory:
            rule = f"is for disk images, and {image.path} is a directory"
            raise ConfigError(option, values[option], rule, "leave it out")


def pin_image(root: RootPlan, values: Values, found: Found, state: Path) -> tuple[RootPlan, list[Pin]]:
    """Have an image that others could exchange mounted at a place they cannot touch, and used from there."""
    image = found.image
    if image.fd < 0:
        return root, []
    if values["ephemeral"] and not root.private and not image.is_fixed:
        rule = "would have systemd-nspawn copy an image that others can exchange meanwhile"
        remedy = "leave it out for an image of the task's own; others can lie in the client's image_dir"
        raise ConfigError("ephemeral", True, rule, remedy)
    # nspawn makes the copy beside the image, and there it looks for what a disk image is verified with.
    if image.is_fixed and not root.private and (values["ephemeral"] or not image.is_directory):
        return root, []
    place, mode = f"{state}/{IMAGE_PLACE}", os.fstat(image.fd).st_mode
    argv = replace(image, path=Path(place)).argv if root.argv else ()
    private = root.private and replace(root.private, layers=(place,))
    return replace(root, argv=tuple(argv), private=private), [Pin(Source(str(image.path), mode, image.fd), place)]


IMAGE_PLACE, DEVICES_PLACE, BUNDLE_PLACE = "image", "devices", "bundle"  # in the state directory


def plan_pins(sources: Mapping[str, Source], state: Path, folder: str = "mounts") -> dict[str, Pin]:
    """Return a place for each source, by the name the job, or Nomad, has for it."""
    return {
        name: Pin(source, f"{state}/{folder}/{number}") for number, (name, source) in enumerate(sources.items())
    }


def plan_nosuid(values: Values, volumes: Sequence[Volume], pins: Mapping[str, Pin]) -> tuple[str, ...]:
    """Return what of the host is mounted so that set-user-id files have no effect: all that is id-mapped. A file
    of the host's root is root's inside then, and one that another task has made would make any user there root."""
    mapped = [volume.source for volume in volumes if volume.have_idmap]
    for option in ("bind", "bind_read_only"):
        for name, text in values[option].items():
            if not {"idmap", "rootidmap", "owneridmap"}.isdisjoint(parse_bind(text)[1].split(",")):
                mapped.append(pins[name].place)
    return tuple(mapped)


def plan_binds(values: Values, pins: Mapping[str, Pin]) -> list[str]:
    arguments = []
    for option, argument in (("bind", "--bind"), ("bind_read_only", "--bind-ro")):
        for name, text in values[option].items():
            target, options = parse_bind(text)
            end = f":{options}" if options else ""
            arguments.append(f"{argument}={pins[name].place}:{escape_field(target)}{end}")
    for option, argument in (("overlay", "--overlay"), ("overlay_read_only", "--overlay-ro")):
        for item in values[option]:
            *lower, target = split_fields(item)
            places = [pins[name].place if name in pins else escape_field(name) for name in lower]
            arguments.append(f"{argument}={':'.join([*places, escape_field(target)])}")
    return arguments


def plan_nodes(devices: Mapping[Device, Source], state: Path) -> dict[Device, Pin]:
    """Return a place for a node of each device."""
    return {
        device: Pin(source, f"{state}/{DEVICES_PLACE}/{number}", is_node=True)
        for number, (device, source) in enumerate(devices.items())
    }


def render_devices(devices: Mapping[Device, Pin], values: Values, host: Host) -> Iterator[str]:
    """Without `idmap`, on older kernels, they are nobody's in a user namespace."""
    end = ":idmap" if have_other_users(values) and host.kernel >= IDMAP_SINCE["tmpfs"] else ""
    for device, pin in devices.items():
        yield f"--bind={pin.place}:{escape_field(device.task_path)}{end}"


def plan_credentials(credentials: Mapping[str, bytes], state: Path) -> dict[str, str]:
    """Return where each credential's file is."""
    return {key: f"{state}/credentials/{number}" for number, key in enumerate(credentials)}


def render_credentials(places: Mapping[str, str]) -> list[str]:
    return [f"--load-credential={escape_field(key)}:{place}" for key, place in places.items()]


def render_sources(
    values: Values, host: Host, pins: Mapping[str, Pin], devices: Mapping[Device, Pin], places: Mapping[str, str]
) -> list[str]:
    """Return nspawn's arguments for what of the host is mounted or read. `places`: where the credentials are."""
    return [*plan_binds(values, pins), *render_devices(devices, values, host), *render_credentials(places)]


def render_bundle_options(values: Values, state: Path) -> Iterator[str]:
    """With a bundle these two would be off where nothing is said of them (252, 257, 262)."""
    for option in ("timezone", "resolv_conf"):
        if not values[option]:
            yield f"--{option.replace('_', '-')}=auto"
    yield f"--oci-bundle={state / BUNDLE_PLACE}"


def plan_environ(host: Host) -> dict[str, str]:
    """Return what is in nspawn's own environment beside what the keeper's always holds."""
    # A v1 hierarchy cannot be delegated to a user namespace: without this nothing boots there (measured).
    return {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"} if host.cgroups is CgroupMode.HYBRID else {}


def apply_image(values: Values, image: Image, user: str) -> dict[str, Any]:
    """Return the options with what the image itself says where the job says nothing. `user` is the task's own.

    An image in the store, or one that no task may write to, serves many: a task gets a root of its own.
    """
    changes: dict[str, Any] = {}
    is_volatile = values["volatile"] not in (None, "no")
    if image.is_protected and not is_volatile and (image.is_directory or not values["read_only"]):
        changes["ephemeral"] = True
    if image.key and is_volatile and values["private_users_ownership"] in ("auto", "chown"):
        changes["private_users_ownership"] = "map"
    config = image.config
    if not values["boot"]:
        known = dict(entry.split("=", 1) for entry in config.env)
        changes["environment"] = {**known, **values["environment"]}
        changes["command"] = values["command"] or config.command
        changes["working_directory"] = values["working_directory"] or config.working_directory or None
        changes["user"] = values["user"] or user or config.user or None
    return {**values, **changes}


def check_init(plan: Plan, view: View) -> None:
    """Refuse to boot what has no init, before nspawn reports a container as up that ends at once."""
    places = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/sbin/init")
    kinds = set()
    try:
        for place in places:
            if (fd := view.open(place)) is not None:
                try:
                    kinds.add(is_foreign(fd))
                finally:
                    os.close(fd)
    except OSError:
        return  # not known: nspawn will find it, or say what it did not find
    if kinds == {True}:
        rule = f"holds a system for another machine than this {os.uname().machine}"
        raise ConfigError("image", str(plan.image.path), rule, "use an image for this architecture")
    if not kinds:
        rule = f"the image has no init ({', '.join(places)})"
        raise ConfigError(
            "boot", True, rule, "set boot = false to run its command, or use an image of a whole system"
        )


UUID = re.compile(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}")


def render_options(values: Values) -> list[str]:
    return [argument for option in TASK_OPTIONS for argument in option.argv(values[option.name])]


@dataclass(frozen=True)
class Volume:
    """A directory bound into the container beside what the job's `bind` says."""

    source: str
    target: str
    read_only: bool
    have_idmap: bool

    @property
    def argv(self) -> list[str]:
        # "idmap" shows the host's ids inside: root and every user of the container can use their files.
        # "rootidmap" would not do: it takes the directory's owner (nobody) for root, so that root's own files
        # cannot be read, and no other user can create any (measured on 252).
        option = ":idmap" if self.have_idmap else ""
        argument = "--bind-ro" if self.read_only else "--bind"
        return [f"{argument}={escape_field(self.source)}:{escape_field(self.target)}{option}"]


def have_other_users(values: Values) -> bool:
    """Whether the container's users are others on the host: the kernel refuses to map ids to themselves."""
    return bool(values["user_namespacing"]) and not re.fullmatch(r"identity|0+(:.*)?", values["private_users"])


def plan_volumes(
    task: TaskConfig, values: Values, host: Host, mounts: Mounts, pins: Mapping[str, Pin]
) -> list[Volume]:
    """Return the task's own directories and the volumes Nomad asks for. `pins`: by their paths."""

    def volume(path: str, target: str, read_only: bool = False) -> Volume:
        have_idmap = have_other_users(values) and mounts.have_idmap(pins[path].source.path, host.kernel)
        return Volume(pins[path].place, target, read_only, have_idmap)

    volumes = []
    if task.alloc_dir:
        volumes = [
            volume(task.shared_dir, "/alloc"),
            # Not id-mapped: the log FIFOs of all tasks are here, root's alone, and shall stay out of reach. Read
            # only because Nomad writes to these names as root (CVE-2026-8052).
            Volume(pins[task.log_dir].place, "/alloc/logs", read_only=True, have_idmap=False),
            volume(f"{task.task_dir}/local", "/local"),
            volume(f"{task.task_dir}/secrets", "/secrets"),
        ]
    for mount in task.mounts:
        is_container_path("volume_mount", mount.target)
        if mount.propagation == "bidirectional":
            rule = "systemd-nspawn cannot pass mounts back to the host"
            raise ConfigError(
                "volume_mount.propagation_mode", mount.propagation, rule, "use private or host-to-task"
            )
        volumes.append(volume(mount.source, mount.target, mount.read_only))
    return volumes


def find_device_rules(
    task: TaskConfig,
    values: Values,
    sources: Mapping[str, Source],
    volumes: Mapping[str, Source],
    devices: Mapping[Device, Source],
) -> Iterator[DeviceRule]:
    """Yield rules for the devices of a task: those it names, and what of /dev it or a volume mounts."""
    for device, source in devices.items():
        yield from read_rules(source, device.permissions)
    for option, permissions in (("bind", "rw"), ("bind_read_only", "r")):
        for name in values[option]:
            yield from read_rules(sources[name], permissions)
    for mount in task.mounts:
        yield from read_rules(volumes[mount.source], "r" if mount.read_only else "rw")


def plan_mount_table(values: Values, volumes: Sequence[Volume], pins: Mapping[str, Pin]) -> dict[str, str]:
    table = {volume.target.rstrip("/"): volume.source for volume in volumes}
    for option in ("bind", "bind_read_only"):
        for name, text in values[option].items():
            table[parse_bind(text)[0].rstrip("/")] = pins[name].place
    return table


# =====================================================================================================
# Outcome
#
# What nspawn says and how it ended, in words for people.
# =====================================================================================================


BUSY = (
    "image: {0} is in use by another container that may write to it; "
    "set ephemeral, read_only or volatile for all tasks that share it"
)

# nspawn's own messages, recognised and said so that they name the option and the remedy; {0} is the match's
# first group. What none of these matches is passed on as it is.
MESSAGES: tuple[tuple[str, str, bool], ...] = (  # pattern, sentence, may work when tried again
    (r"Directory tree (.+) is currently busy", BUSY, True),
    (r"Disk image (.+) is currently busy", "image: {0} is in use by another container that may write to it", True),
    (r"Failed to resolve user (\S+)\.", 'user: there is no user "{0}" in the container: it must be in '
     "its /etc/passwd, and the program getent in its /usr/bin", False),
    (r"(?:setres[ug]id\(\)|Changing privileges) failed: Invalid arg|set auxiliary groups: Invalid arg",
     "user: its number, or a group's, is not in the container's range of user ids; there are 65536 unless "
     "private_users says more", False),
    (r"Failed to change to specified working directory ([^:]+)",
     "working_directory: there is no directory {0} in the container", False),
    (r"Failed to (?:stat|clone) (/[^:]*): No such file", "bind: there is no {0} on the host", False),
    (r"doesn't look like it has an OS tree", "image: this is no operating system tree", False),
    (r"AmbientCapability= setting is not fully covered",
     "ambient_capability: the container cannot have it; for CAP_NET_BIND_SERVICE set private_network or another "
     "network of its own", False),
    (r"Failed to mount .+ \(MS_MOVE", "pivot_root: the old root cannot be moved to where it shall go", False),
    (r"Failed to resolve (\S+): No such file", "inaccessible: there is no {0}", False),
    (r"Unknown or unsupported personality (\S+)\.", "personality: this kernel does not support {0}", False),
    (r"Creating mount point for tmpfs (\S+) failed: Read-only file system",
     'tmpfs: the image has no directory {0} to mount on; make it there, or set volatile = "overlay"', False),
    (r"Failed to resolve user '(\S+)':", 'bind_user: there is no user "{0}" on the host', False),
    (r"Mapping '(root|nobody)' user not supported", "bind_user: {0} cannot be brought in", False),
    (r"Failed to make home directory",
     "user: this user has no home directory in the image, and none can be made in it; make it there", False),
    (r"Failed to (?:get device|resolve interface) \"?([^:\"]+)\"?: No such device",
     "network: there is no interface {0} on the host", False),
    (r"Network interface (\S+) is not initialized yet",
     "network: systemd-udevd, which must run on the host, does not know the interface {0}", True),
    (r"Failed to add new veth interfaces \((\S+?)[:)].*File exists",
     "network_veth_extra: there is an interface {0} on the host already", False),
    (r"setexeccon\(.+\) failed",
     "selinux_context: SELinux is not enabled on the host, or knows no such label", False),
    (r"Failed to create (?:directory )?\S*/var/log/journal/.*Read-only",
     "link_journal: the image is read-only; set volatile or ephemeral", False),
    (r"Failed to set CPU affinity", "cpu_affinity: the host has none of these CPUs", False),
    (r"Failed to mount overlay .+lowerdir=.+No such file", "overlay: a directory to lay over is not there", False),
    (r"Failed to add interface \S+ to bridge (\S+): Operation not supported",
     "network_bridge: the interface {0} of the host is no bridge", False),
    (r"Failed to add interface \S+ to bridge (\S+): ",
     "network_bridge: there is no bridge {0} on the host", False),
    (r"Couldn't identify a suitable partition table or file system",
     "image: this is no disk image systemd-nspawn can read", False),
    (r"--image= requires (?:access to the host's /run/|that systemd-udevd is)",  # before 262, and 262
     "image: disk images need systemd-udevd on the host; use a directory", False),
    (r"Failed to set up ID mapped mounts|ID mapped mounts are apparently not available",
     "user_namespacing: the image's file system cannot be mapped; set user_namespacing = false", False),
    (r"Failed to map ids for bind mount", "user_namespacing: a mounted directory cannot be mapped", False),
    (r"Failed to create mount point (.+): Read-only file system",
     'read_only: the image has no {0} to mount on; make it in the image, or set volatile = "overlay"', False),
    (r"No space left on device", "image: the disk is full", True),
)  # fmt: skip

# Said on every end where /run is no tmpfs; means nothing (measured on 252).
NOISE = re.compile(r"Attempted to remove disk file system under|Child died too early|Short read while reading")


def parse_nspawn_log(text: str) -> list[str]:
    """Return nspawn's messages from the lines it writes for /dev/kmsg: `<27>systemd-nspawn[123]: message`."""
    lines = [re.sub(r"^<\d+>\S*?\[\d+\]: ", "", line).strip() for line in text.split("\n")]
    return [line for line in lines if line and not NOISE.search(line)]


def find_message(lines: Sequence[str]) -> DriverError | None:
    """Return the sentence for the first line that is known, with the line itself."""
    for line in lines:
        for pattern, sentence, is_transient in MESSAGES:
            match = re.search(pattern, line)
            if match:
                text = f"{sentence.format(*match.groups())} (systemd-nspawn: {line})"
                return TransientError(text) if is_transient else DriverError(text)
    return None


def explain_failure(lines: Sequence[str], status: int) -> DriverError:
    """Turn nspawn's last words before the container was up into an error."""
    known = find_message(lines)
    if known or not lines:
        silent = f"systemd-nspawn ended with status {status} before the container was up, and said nothing"
        return known or TransientError(silent)
    return DriverError(f"systemd-nspawn could not start the container: {' '.join(lines[-3:])}")


@dataclass(frozen=True)
class Exit:
    """How a task ended."""

    code: int
    signal: int = 0
    error: str = ""  # a sentence where the code alone would mislead
    at: float = 0.0  # Unix time
    oom_killed: bool = False


MIB = 1 << 20


@dataclass(frozen=True)
class Shortage:
    """A task's lack of memory: what its cgroup has counted, sizes in bytes, 0 for none or unknown."""

    kills: int = 0  # of its processes, by the kernel
    is_own: bool = True  # because of the task's own limit, and not because the machine had no more
    limit: int = 0
    peak: int = 0

    @classmethod
    def of(cls, counters: Mapping[str, int]) -> Shortage:
        """From memory.events and the numbers of memory.max and memory.peak beside them."""
        is_own = counters.get("oom", 0) > 0
        numbers = counters.get("memory.max", 0), counters.get("memory.peak", 0)
        return cls(counters.get("oom_kill", 0), is_own, *numbers)

    @property
    def reason(self) -> str:
        sizes = [
            f"{what} {size / MIB:.0f} MiB" for what, size in (("limit", self.limit), ("peak", self.peak)) if size
        ]
        why = "the task used all the memory it may" if self.is_own else "the machine had no more memory"
        return f"{why} ({', '.join(sizes)})" if sizes else why


@dataclass(frozen=True)
class Record:
    """What the keeper leaves: nspawn's status as sh has it, and whether processes were still there then."""

    status: int
    is_orphaned: bool
    at: float
    shortage: Shortage = Shortage()


def explain_exit(mode: Mode, record: Record, lines: Sequence[str], reason: str, sent: int) -> Exit:
    """Work out how the payload ended, from what nspawn lets through (measured, the same on 252, 257, 262).

    `reason` is why the driver killed it, "" when it did not; `sent` the last signal sent on Nomad's behalf.
    """
    if reason:
        return Exit(128 + signal.SIGKILL, signal.SIGKILL, reason, record.at)
    if record.is_orphaned:
        why = f"systemd-nspawn itself was killed (status {record.status}); the container was ended with it"
        return Exit(128 + signal.SIGKILL, signal.SIGKILL, why, record.at)
    for line in lines:
        match = re.search(r"terminated by signal (\S+)\.", line)
        if match:
            with contextlib.suppress(ConfigError):  # a name that only a newer systemd has
                number = parse_signal(match[1])
                return Exit(128 + number, number, "", record.at)
    if record.status == 255 and mode is Mode.PROCESS_TWO:
        if sent:
            return Exit(128 + sent, sent, "", record.at)
        why = "ended by a signal, or with exit code 255: systemd-nspawn does not tell which with process_two"
        return Exit(255, 0, why, record.at)
    if record.status == 133:
        return Exit(133, 0, "the container asked for a reboot; Nomad's restart policy decides", record.at)
    return Exit(record.status, 0, "", record.at)


def explain_shortage(exit: Exit, mode: Mode, record: Record, is_killed_by_us: bool) -> Exit:
    """Say that a task ended for lack of memory, if it did: by a SIGKILL that nobody else has sent, or by a shell's
    word for that of its child. Of a task that ended in another way it is only said what had happened before."""
    kills = record.shortage.kills
    if not kills or exit.code == 0 or is_killed_by_us:
        return exit
    is_silent = mode is Mode.PROCESS_TWO and exit.code == 255
    if exit.code == 128 + signal.SIGKILL or is_silent:
        code = 128 + signal.SIGKILL
        return Exit(code, signal.SIGKILL, f"OOM killed: {record.shortage.reason}", exit.at, oom_killed=True)
    before = f"the kernel had killed {kills} of its processes: {record.shortage.reason}"
    return replace(exit, error=f"{exit.error}; {before}" if exit.error else before)


# =====================================================================================================
# Mounting
#
# Makes private roots. Everything is mounted in a mount namespace that only the task's keeper and nspawn are in: no
# kill -9, of whatever at whatever moment, can leave a mount behind, and the host never sees one. That takes a
# thread that enters a namespace of its own, mounts, starts the keeper there, and ends: a millisecond, where a
# helper process costs the start of a Python. What is in use while a task runs (its range of ids, its image) is
# locked as systemd-nspawn does it; the keeper and nspawn hold the lock, so that it ends with them.
# =====================================================================================================

CLONE_FS, CLONE_NEWNS = 0x200, 0x20000
MS_NOSUID, MS_NODEV, MS_REC, MS_SLAVE, MNT_DETACH = 0x2, 0x4, 0x4000, 1 << 19, 2
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442  # system calls: the same numbers on all machines
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE, OPEN_TREE_CLONE = -100, 0x1000, 0x8000, 1
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
MOUNT_ATTR_NOSUID, MOUNT_ATTR_IDMAP = 0x2, 0x100000


def mount_filesystem(kind: str, target: str, flags: int = 0, options: str = "") -> None:
    call_libc("mount", kind.encode(), os.fsencode(target), kind.encode(), flags, os.fsencode(options))


def enter_namespace() -> None:
    """Put this thread into a new mount namespace. What the host mounts later shows up in it, not the reverse."""
    call_libc("unshare", CLONE_FS | CLONE_NEWNS)
    mount_filesystem("none", "/", MS_REC | MS_SLAVE)


def clone_source(source: Source) -> int:
    """Return a mount of an open file or directory, with what is mounted below it, that is nowhere yet."""
    flags = OPEN_TREE_CLONE | AT_EMPTY_PATH | AT_RECURSIVE | os.O_CLOEXEC
    try:
        return call_libc("syscall", OPEN_TREE, source.fd, b"", flags)
    except OSError as error:
        raise HostError(f"{cut(source.path)} cannot be mounted: {error.strerror}") from None


def cover_nosuid(path: str) -> None:
    """Mount a file or directory over itself, for this thread's namespace, so that set-user-id files in it have no
    effect, nor in what binds it."""
    flags = OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC
    try:
        tree = call_libc("syscall", OPEN_TREE, AT_FDCWD, os.fsencode(path), flags)
    except FileNotFoundError:  # nspawn will say so
        return
    try:
        attributes = struct.pack("QQQQ", MOUNT_ATTR_NOSUID, 0, 0, 0)
        flags = AT_EMPTY_PATH | AT_RECURSIVE
        call_libc("syscall", MOUNT_SETATTR, tree, b"", flags, attributes, len(attributes))
        attach_tree(tree, path)
    finally:
        os.close(tree)


def attach_tree(tree: int, target: str) -> None:
    call_libc("syscall", MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
    call_libc("mount", None, os.fsencode(target), None, MS_REC | MS_SLAVE, None)


def make_nodes(pins: Sequence[Pin], directory: Path) -> None:
    """Make copies of device nodes, in a file system of this thread's namespace. A container may do to them what it
    likes, and, unlike the host's /dev, the file system can be id-mapped: their owner is the same inside."""
    if not pins:
        return
    mount_filesystem("tmpfs", str(directory), MS_NOSUID, "mode=0700,size=64k,nr_inodes=4k")
    for pin in pins:
        found = os.fstat(pin.source.fd)
        try:
            os.mknod(pin.place, found.st_mode, found.st_rdev)
        except OSError as error:
            why = f"no node can be made: {error.strerror}"
            raise HostError(f"{cut(pin.source.path)} cannot be used in a container: {why}") from None
        os.chown(pin.place, found.st_uid, found.st_gid)
        os.chmod(pin.place, stat.S_IMODE(found.st_mode))


def attach_layer(source: str, target: str, users_fd: int | None) -> None:
    """Mount a directory, with the ids of a user namespace if one is given."""
    tree = call_libc("syscall", OPEN_TREE, AT_FDCWD, os.fsencode(source), OPEN_TREE_CLONE | os.O_CLOEXEC)
    try:
        if users_fd is not None:
            attributes = struct.pack("QQQQ", MOUNT_ATTR_IDMAP, 0, 0, users_fd)
            call_libc("syscall", MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, len(attributes))
        call_libc("syscall", MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def mount_root(root: PrivateRoot, base: int, directory: Path) -> None:
    """Mount a private root at `directory`/root, for this thread's namespace. `base`: where its ids begin on the
    host."""
    for name in ("lower", "upper", "root"):
        (directory / name).mkdir(mode=0o700)
    os.chdir(directory)  # of this thread alone. Relative names keep the options short: the kernel takes 4 KiB
    users_fd = open_user_namespace(base, root.users.count) if root.users and root.is_mapped else None
    lower = []
    try:
        for number, layer in enumerate(root.layers):
            os.mkdir(f"lower/{number}")
            attach_layer(layer, f"lower/{number}", users_fd)
            lower.append(f"lower/{number}")
    finally:
        if users_fd is not None:
            os.close(users_fd)
    if root.place:
        attach_layer(root.place, "upper", None)
    else:
        mount_filesystem("tmpfs", "upper", options="mode=0700,size=10%,nr_inodes=1m")  # as systemd-nspawn's own
    make_upper(lower[0])
    # "volatile": what is thrown away at the end need not reach the disk, and the end need not sync the disk. With
    # "redirect_dir" directories of the image can be renamed; without "metacopy" no upper file shows the data of
    # another lower one. Both rest on attributes that only root of the host can write.
    options = f"lowerdir={':'.join(lower)},upperdir=upper/upper,workdir=upper/work"
    options += ",redirect_dir=on,metacopy=off,index=off,volatile"
    mount_filesystem("overlay", "root", MS_NODEV, options)  # nodev: as systemd-nspawn mounts disk images
    for path in (*lower, "upper"):  # the overlay has its own
        call_libc("umount2", path.encode(), MNT_DETACH)
    if root.is_usr_mounted:
        fix_usr("root/usr")


def fix_usr(path: str) -> None:
    """Mount a root's /usr over itself: whatever others put in its place in the image, the path leads there."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        raise explain_linked_usr() from None
    try:
        tree = call_libc("syscall", OPEN_TREE, fd, b"", OPEN_TREE_CLONE | AT_EMPTY_PATH | os.O_CLOEXEC)
        try:
            flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
            call_libc("syscall", MOVE_MOUNT, tree, b"", fd, b"", flags)
        finally:
            os.close(tree)
    finally:
        os.close(fd)


def make_upper(lower: str) -> None:
    """Make the overlay's upper directory; its mode and owner are those of the container's root."""
    os.mkdir("upper/work", mode=0o700)
    os.mkdir("upper/upper", mode=0o700)
    found = os.stat(lower)  # as the container sees it: with its ids
    os.chown("upper/upper", found.st_uid, found.st_gid)
    os.chmod("upper/upper", stat.S_IMODE(found.st_mode))


LOCK_FORMAT = "hhqqi"  # struct flock


def take_lock(path: Path, kind: int) -> int | None:
    """Lock a file as systemd does; return the descriptor that holds the lock, None when somebody else has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY, 0o600)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(LOCK_FORMAT, kind, os.SEEK_SET, 0, 0, 0))
        except BlockingIOError:
            os.close(fd)
            return None
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # whoever had it before removed the file


def lock_image(image: Image) -> int | None:
    """Keep others from writing to an image, as nspawn does for `--read-only`; return what holds the lock."""
    if image.layers or image.path == Path("/"):
        return None
    found = image.opened.stat()
    fd = take_lock(SETTINGS_ROOT / f"locks/inode-{found.st_dev}:{found.st_ino}", fcntl.F_RDLCK)
    if fd is None:
        raise TransientError(BUSY.format(image.path))
    return fd


UID_LOCKS = Path("/run/systemd/nspawn-uid")
ACCOUNTS = Path("/etc")  # where passwd, group, subuid and subgid are
FIRST_SLOT, LAST_SLOT = 0x8, 0x6FFF  # systemd's ranges for containers, in ranges of 65536 ids


def pick_users(machine: str) -> tuple[int, int]:
    """Return where a range of ids begins that nothing else uses, and the descriptor that holds its lock. Tasks and
    systemd-nspawn's own picks meet at the lock; the rest is what can be seen of others."""
    taken = read_taken_slots()
    first = int.from_bytes(hashlib.sha256(machine.encode()).digest()[:4], "big")  # as a rule the same for a name
    count = LAST_SLOT - FIRST_SLOT
    for number in range(count):
        slot = FIRST_SLOT + (first + number) % count
        if slot in taken:
            continue
        fd = take_lock(UID_LOCKS / str(slot << 16), fcntl.F_WRLCK)
        if fd is not None:
            return slot << 16, fd
    raise TransientError("no range of 65536 user ids is free on this machine")


def read_taken_slots() -> set[int]:
    """Return the ranges that users, groups, subordinate ids or processes of this machine are in."""
    slots = set()
    for name, column in (("passwd", 2), ("group", 2), ("subuid", 1), ("subgid", 1)):
        for line in read_text(ACCOUNTS / name).splitlines():
            values = line.split(":")[column:]
            with contextlib.suppress(ValueError, IndexError):
                first = int(values[0])
                count = int(values[1]) if name.startswith("sub") else 1
                slots |= set(range(first >> 16, ((first + count - 1) >> 16) + 1)[: LAST_SLOT + 1])
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):  # ended
            slots.add(entry.stat().st_uid >> 16)
    return slots


def make_root(plan: Plan, directory: Path, locks: list[int]) -> list[str]:
    """Make a task's private root; return nspawn's arguments for it. Adds to `locks` what must be held as long as
    the task lives."""
    assert plan.private
    if (lock := lock_image(plan.image)) is not None:
        locks.append(lock)
    arguments, base = [f"--directory={directory}/root"], 0
    users = plan.private.users
    if users:
        if users.base is None:
            base, lock = pick_users(plan.machine)
            locks.append(lock)
        else:
            base = users.base
        arguments += [f"--private-users={base}:{users.count}", "--private-users-ownership=off"]
    try:
        mount_root(plan.private, base, directory)
    except OSError as error:
        raise explain_mount(plan, error) from None
    if plan.image.key:
        complete_root(directory / "root")
    return arguments


def complete_root(root: Path) -> None:
    """Make /usr in a root of the task's own: nspawn asks for one, and an image of a registry need not have it."""
    owner = os.stat(root)
    with contextlib.suppress(OSError), open_directory(root, "/") as fd:
        os.mkdir("usr", 0o755, dir_fd=fd)
        os.chown("usr", owner.st_uid, owner.st_gid, dir_fd=fd)


def prepare_root(plan: Plan, root: Path) -> str:
    """Make what a read-only root needs to be mounted on. Return a sentence if the command cannot be executed."""
    if plan.is_read_only and plan.image.is_protected and not plan.private:
        check_mount_points(root, plan.network.mount_files)
    elif plan.is_read_only:
        make_mount_points(root)
        for path in plan.network.mount_files:
            make_mount_file(root, path)
    view = View(root, plan.mounts, plan.pivot)
    if plan.mode is Mode.BOOT:
        check_init(plan, view)
    elif plan.command:
        return explain_command(plan.command[0], plan.search_path, view)
    return ""


def explain_mount(plan: Plan, error: OSError) -> DriverError:
    if error.errno == errno.ENOSPC:
        return TransientError("ephemeral: the disk is full")
    why = "the kernel has no overlay file system" if error.errno == errno.ENODEV else error.strerror
    return HostError(f"ephemeral: no root can be laid over the image {plan.image.path}: {why}")


# =====================================================================================================
# Store
#
# Fetched images, by content, under /var/lib: root's alone, so that no set-uid program in them is in anybody's
# reach. An image is a record that names its layers; a layer is a directory, or the file of a disk image. Nothing
# has a name here before it is whole, and no name in here is a stranger's: all are digests. Locks (flock) end with
# their holders, whoever kills them; a task's use stands in a file that counts as long as the task's state
# directory is there. So nothing needs repair after a crash. Who fetches an image holds its lock alone, and shares
# those of its layers with others, so that nobody waits for another's download; who collects takes what is free.
# =====================================================================================================

STORE_ROOT = Path("/var/lib/nomad-driver-nspawn")

# The same archive makes different trees as an image and as a layer, where some names mean whiteouts.
LAYER_NAME = re.compile(r"(tar|layer)-[0-9a-f]{64}|[0-9a-f]{64}\.raw|skeleton-1")


@dataclass(frozen=True)
class StoredImage:
    """An image in the store. When it was last used is the time of its record's file."""

    key: str
    name: str  # for people, without credentials
    type: str
    layers: tuple[str, ...]  # names in the store, topmost first
    sizes: tuple[int, ...]  # bytes on disk, of each layer
    fetched_at: float  # Unix time
    checked_at: float  # when the place it comes from was last asked for something newer
    digest: str = ""  # of its manifest in a registry
    config: ImageConfig = ImageConfig()

    @classmethod
    def parse(cls, text: str) -> StoredImage:
        """Raise ValueError on what this version cannot read."""
        try:
            values = json.loads(text, object_hook=tuples)
            image = cls(**{**values, "config": ImageConfig(**values["config"])})
            if not image.layers or not all(map(LAYER_NAME.fullmatch, image.layers)):
                raise ValueError("a record without layers")
            return image
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"a damaged record: {error}") from None

    @property
    def size(self) -> int:
        return sum(self.sizes)


def tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


@dataclass(frozen=True)
class Use:
    """A task that uses an image."""

    task_id: str
    key: str
    layers: tuple[str, ...]


class Store:
    """The directory of fetched images. Only short-lived processes change it, see `Fetches`; the plugin reads, and
    notes what its tasks use."""

    def __init__(self, root: Path = STORE_ROOT) -> None:
        self.root = root
        self.images, self.layers, self.parts = root / "images", root / "layers", root / "parts"
        self.work, self.locks, self.in_use = root / "work", root / "locks", root / "uses"
        self.proofs = (
            root / "proofs"
        )  # empty files: that a registry has sent a layer, see `find_proof` of fetch.py
        self.trash = self.work / "trash"

    def prepare(self) -> None:
        for path in (
            self.root,
            self.images,
            self.layers,
            self.parts,
            self.work,
            self.locks,
            self.in_use,
            self.proofs,
        ):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def layer(self, name: str) -> Path:
        return self.layers / name

    def part(self, name: str) -> Path:
        """Return where a download grows. Up to a dot the name is the key of its image: whoever holds that lock may
        write to it."""
        return self.parts / name

    # Locks

    def lock(self, name: str, how: int) -> int:
        """Return a descriptor that holds a lock. Who removes a lock's file holds it alone: one got on a removed
        file counts for nothing. Raises BlockingIOError for LOCK_NB."""
        while True:
            fd = os.open(self.locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, how)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self.locks / name)):
                        return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def try_lock(self, name: str, *, alone: bool = False) -> int | None:
        """Return a descriptor that holds a lock, None when somebody else does."""
        self.prepare()
        with contextlib.suppress(BlockingIOError):
            return self.lock(name, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return None

    # Images

    def read(self, key: str) -> StoredImage | None:
        """Return an image if all of it is there."""
        with contextlib.suppress(OSError, ValueError):
            image = StoredImage.parse((self.images / f"{key}.json").read_text())
            if all(self.layer(name).exists() for name in image.layers):
                return image
        return None

    def read_all(self) -> list[StoredImage]:
        keys = [path.stem for path in self.images.glob("*.json")] if self.images.is_dir() else []
        return [image for key in sorted(keys) if (image := self.read(key))]

    def last_use(self, image: StoredImage) -> float:
        with contextlib.suppress(OSError):
            return (self.images / f"{image.key}.json").stat().st_mtime
        return 0.0

    def touch(self, key: str) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.images / f"{key}.json")

    def write(self, image: StoredImage) -> None:
        write_file(self.images / f"{image.key}.json", json.dumps(asdict(image)))

    def find(self, stored: StoredImage) -> Image:
        """Return what nspawn can run of an image."""
        layers = tuple(self.layer(name) for name in stored.layers)
        is_directory = layers[0].suffix != ".raw"
        return Image(layers[0], is_directory, layers if layers[1:] else (), stored.key, stored.name, stored.config)

    # Uses

    def use(self, name: str, task_id: str, image: Image) -> None:
        """Note that the task with the state directory `name` uses an image, if it is one of the store."""
        if not image.key:
            return
        use = Use(task_id, image.key, tuple(path.name for path in image.layers or (image.path,)))
        write_file(self.in_use / name, json.dumps(asdict(use)))
        self.touch(use.key)

    def release(self, name: str) -> None:
        path = self.in_use / name
        with contextlib.suppress(OSError):
            use = read_use(path)
            path.unlink()
            if use:
                self.touch(use.key)

    def read_uses(self) -> list[Use]:
        uses = []
        for path in sorted(list_directory(self.in_use)):
            use = None if path.name.startswith(".") or not (STATE_ROOT / path.name).is_dir() else read_use(path)
            uses += [use] if use else []
        return uses

    # Collection

    def find_garbage(self, delay: float, is_free: Callable[[str], bool] = lambda key: True) -> list[Path]:
        """Return what can go: images and layers that no task uses, for `delay` seconds now, and half things as
        old. `is_free` tells whether nobody is about to use an image."""
        oldest = time.time() - delay
        uses = self.read_uses()
        keys = {use.key for use in uses}
        kept: list[StoredImage] = []
        records = []
        for path in list_directory(self.images):
            image = self.read(path.stem) if path.suffix == ".json" else None
            if image and (image.key in keys or self.last_use(image) > oldest or not is_free(image.key)):
                kept.append(image)
            elif path.suffix == ".json" or has_aged(path, oldest):
                records.append(path)
        needed = {name for image in kept for name in image.layers} | {name for use in uses for name in use.layers}
        things = [path for folder in (self.layers, self.proofs) for path in list_directory(folder)
                  if find_owner(path) not in needed]  # fmt: skip
        things += [*list_directory(self.parts), *list_directory(self.work)]
        things += [path for path in list_directory(self.in_use) if not (STATE_ROOT / path.name).is_dir()]
        return records + [path for path in things if has_aged(path, oldest)]

    def collect(self, delay: float) -> int:
        """Remove garbage; return how many things that were. What others hold the locks of stays: it is being
        fetched, or a task is being started from it."""
        collecting = self.try_lock("trash", alone=True)
        if collecting is None:  # another process is at it
            return 0
        held: dict[str, int] = {}
        try:
            # In two looks: with the locks held nobody can have come to want what the second one finds.
            for name in sorted({find_owner(path) for path in self.find_garbage(delay)} - {"trash"})[
                :MAX_COLLECTED
            ]:
                fd = self.try_lock(name, alone=True)
                if fd is not None:
                    held[name] = fd
            garbage = [path for path in self.find_garbage(delay, held.__contains__) if find_owner(path) in held]
            self.trash.mkdir(mode=0o700, exist_ok=True)
            for path in garbage:
                with contextlib.suppress(OSError):
                    path.rename(self.trash / os.urandom(8).hex())
            self.remove_locks()
        finally:
            for fd in held.values():
                os.close(fd)
        remove_tree(self.trash)  # may take long: nobody has to wait for it
        os.close(collecting)
        return len(garbage)

    def remove_locks(self) -> None:
        """Remove the files of locks that nobody has held for a day."""
        for path in list_directory(self.locks):
            if has_aged(path, time.time() - 86400):
                fd = self.try_lock(path.name, alone=True)
                if fd is not None:
                    path.unlink()
                    os.close(fd)


MAX_COLLECTED = 500  # locks held at a time, a descriptor each: the rest goes with the next collection


def list_directory(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def has_aged(path: Path, oldest: float) -> bool:
    """Tell whether something has not changed since a time; not if it is gone."""
    with contextlib.suppress(OSError):
        return path.lstat().st_ctime <= oldest
    return False


def find_owner(path: Path) -> str:
    """Return the name of the lock that is held for something in the store. Beside a layer nspawn keeps locks and
    copies, with its name in theirs; an earlier version had names without a kind."""
    layer = re.search(r"((tar|layer)-)?[0-9a-f]{64}(\.raw)?|skeleton-1", path.name)
    if path.parent.name in ("layers", "proofs") and layer:
        return layer[0]
    return path.name.lstrip(".").partition(".")[0] or "trash"


def read_use(path: Path) -> Use | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        values = json.loads(path.read_text())
        return Use(values["task_id"], values["key"], tuple(map(str, values["layers"])))
    return None


# =====================================================================================================
# Fetches
#
# Images come into the store by a process of their own, fetch.py, which ends with the plugin: no download, no
# certificate and no archive takes the plugin's time or stays in its memory. It is one an image, however many tasks
# wait for it. It says how far it is, in lines of JSON; from its silence a stall is known.
# =====================================================================================================

FETCH = "import sys; sys.path.insert(0, sys.argv[1]); import fetch; fetch.main()"
SILENCE_LIMIT = 60.0  # seconds beyond the limit on stalls; each step of the work says something every second
PROGRESS_PERIOD = 15.0  # seconds between two events
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ssl_cert_file", "ssl_cert_dir")


@dataclass(frozen=True)
class FetchSettings:
    """What the operator says of fetching."""

    limit: int  # bytes an image may have
    stall: float  # seconds
    auth_config: str
    auth_helper: str
    insecure: tuple[str, ...]


def plan_fetching(config: Values) -> FetchSettings:
    auth = config["auth"] or {}
    return FetchSettings(
        limit=config["image_size_limit"] << 20,
        stall=max(config["image_stall_timeout"] or 60.0, 1.0),
        auth_config=auth.get("config") or "",
        auth_helper=auth.get("helper") or "",
        insecure=config["insecure_registries"],
    )


class Fetching:
    """One image that is being fetched."""

    def __init__(self, request: Mapping[str, object], silence: float) -> None:
        self.request, self.silence = request, silence
        self.listeners: list[Callable[[str], None]] = []  # of those who wait for it
        self.name = str(request["name"])
        self.last_told = time.monotonic()
        self.task = asyncio.create_task(self.run())

    async def run(self) -> None:
        """Return when the image is in the store. Raises what kept it from it."""
        begun = time.monotonic()
        self.tell(f"Fetching the image {self.name}.")
        async with contextlib.aclosing(talk_to_fetcher(self.request, self.silence)) as lines:
            async for line in lines:
                message = parse_message(line)
                if "kind" in message:
                    kind = FETCH_ERRORS.get(message["kind"], DriverError)
                    raise kind(f"image {self.name}: {message['error']}")
                if "note" in message:
                    self.tell(f"Image {self.name}: {message['note']}.")
                if "what" in message:
                    self.tell_progress(message["what"], message["done"], message["total"])
                if "image" in message:
                    self.tell(f"The image {self.name} is there after {time.monotonic() - begun:.1f} s.")
                    return
        raise TransientError(f"image {self.name}: the process that fetches it has ended without a result")

    def tell(self, text: str) -> None:
        for listener in self.listeners:
            listener(text)

    def tell_progress(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self.last_told < PROGRESS_PERIOD:
            return
        self.last_told = time.monotonic()
        share = f", {done * 100 // total} % of {render_size(total)}" if total else f", {render_size(done)} so far"
        self.tell(f"Fetching the image {self.name}: {what}{share}.")


FETCH_ERRORS: dict[str, type[DriverError]] = {
    "TransientError": TransientError,
    "HostError": HostError,
}


def parse_message(line: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        message = json.loads(line)
        if isinstance(message, dict):
            return message
    log.warn("the process that fetches images says", line=line)
    return {}


async def talk_to_fetcher(request: Mapping[str, object], silence: float) -> AsyncGenerator[str, None]:
    """Start the process, hand it the request, and yield its lines; it is gone when this ends."""
    environ = {name: value for name, value in os.environ.items() if name.lower() in PROXIES}
    environ |= {"PATH": SAFE_PATH, "LANG": "C.UTF-8", "HOME": "/root"}
    argv = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-IS", "-X", "utf8", "-c", FETCH]
    ask = os.memfd_create("request")  # and no pipe: a job's request may be larger than one takes without waiting
    answer_fd, answer = os.pipe2(os.O_CLOEXEC)
    process = NO_PROCESS
    try:
        with open(ask, "wb", closefd=False) as file:
            file.write(json.dumps(request).encode() + b"\n")
        os.lseek(ask, 0, os.SEEK_SET)
        process = start_process(
            [*argv, str(Path(__file__).parent)], environ=environ, stdin=ask, stdout=answer, stderr=answer
        )
        os.close(answer)
        answer = -1
        os.set_blocking(answer_fd, False)
        async for line in read_lines(answer_fd, silence):
            yield line
    finally:
        for fd in (ask, answer_fd, answer):
            if fd >= 0:
                os.close(fd)
        with contextlib.suppress(ProcessLookupError):
            if process.pid:
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def read_lines(fd: int, silence: float) -> AsyncIterator[str]:
    """Yield lines until the end; raise TransientError when none comes for `silence` seconds."""
    rest = b""
    while True:
        try:
            await asyncio.wait_for(wait_readable(fd), silence)
        except asyncio.TimeoutError:
            raise TransientError(f"fetching has stalled: nothing has happened for {silence:g} s") from None
        data = os.read(fd, 65536)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        if not data or len(rest) > MAX_LINE:
            return


class Fetches:
    """The images being fetched, by their keys."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.running: dict[str, Fetching] = {}
        self.collecting: asyncio.Task[None] | None = None

    async def provide(
        self, origin: Origin, settings: FetchSettings, tell: Callable[[str], None]
    ) -> tuple[StoredImage, int]:
        """Return an image of the store, fetched if need be, and a descriptor that keeps it from collection."""
        asked_at, is_fresh = time.time(), False
        for _ in range(3):
            fd = self.store.try_lock(origin.key)
            image = self.store.read(origin.key) if fd is not None else None
            wants_newer = (origin.force or origin.refresh) and not is_fresh
            if fd is not None and image and not (wants_newer and image.checked_at < asked_at):
                self.store.touch(origin.key)
                return image, fd
            if fd is not None:
                os.close(fd)
            await self.fetch(origin, settings, asked_at, tell)
            is_fresh = True
        raise TransientError(f"image {origin.name}: it was removed from the store again and again")

    async def fetch(
        self, origin: Origin, settings: FetchSettings, asked_at: float, tell: Callable[[str], None]
    ) -> None:
        """Wait for the image with all who want it; the last to give up ends the process."""
        key = origin.key
        fetching = self.running.get(key)
        if fetching is None:
            request = self.render_request(origin, settings, asked_at)
            fetching = self.running[key] = Fetching(request, settings.stall + SILENCE_LIMIT)
        else:
            tell(f"Waiting for the image {origin.name}, which another task fetches.")
        fetching.listeners.append(tell)
        try:
            await asyncio.shield(fetching.task)
        finally:
            fetching.listeners.remove(tell)
            if not fetching.listeners:
                fetching.task.cancel()
            if self.running.get(key) is fetching and (fetching.task.done() or not fetching.listeners):
                del self.running[key]

    def render_request(self, origin: Origin, settings: FetchSettings, asked_at: float) -> dict[str, object]:
        return {
            **asdict(origin),
            **asdict(settings),
            "action": "fetch",
            "root": str(self.store.root),
            "key": origin.key,
            "asked_at": asked_at,
        }

    def collect(self, delay: float) -> None:
        """Start to remove what no task has used for `delay` seconds, if there is any such thing."""
        is_busy = self.collecting is not None and not self.collecting.done()
        if not is_busy and self.store.find_garbage(delay):
            self.collecting = asyncio.create_task(self.run_collection(delay))

    async def run_collection(self, delay: float) -> None:
        request = {"action": "collect", "root": str(self.store.root), "delay": delay}
        try:
            async with contextlib.aclosing(talk_to_fetcher(request, 3600)) as lines:
                async for line in lines:
                    if "collected" in (message := parse_message(line)):
                        log.info("images collected", count=message["collected"])
        except DriverError as error:
            log.warn("images cannot be collected", error=str(error))


def render_size(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


# =====================================================================================================
# Keeper
#
# The small process that outlives the plugin: a POSIX shell of under 1 MB that holds both log FIFOs, waits for
# nspawn and leaves the exit record. It and nspawn have a mount namespace of their own, so that whatever nspawn
# mounts is gone when they are gone, even by SIGKILL (on 257 and later a left-over mount under
# /run/systemd/nspawn refuses the next start of that name). There nspawn's messages go to a file of their own
# in place of /dev/kmsg: the payload's stderr stays the payload's, and the plugin can read what went wrong.
# =====================================================================================================

# Arguments: state directory, cgroup ("" for none), "filter" or "", then nspawn and its arguments. It starts when
# a line comes on stdin: if the plugin dies before its pid is on disk, nothing has happened.
KEEPER = r"""
keeper_state=$1 keeper_cgroup=$2 keeper_filter=$3
shift 3
read -r keeper_go || exit 1
exec </dev/null
enter() { [ -z "$keeper_cgroup" ] || echo 0 >"$keeper_cgroup$1/cgroup.procs"; }
keep() {
	(
		enter ""
		# nspawn keeps the changes of overlays in /var/tmp, and leaves them there if it is killed.
		[ ! -d "$keeper_state/tmp" ] || mount --bind "$keeper_state/tmp" /var/tmp || exit 1
		if mount --bind "$keeper_state/nspawn.log" /dev/kmsg; then
			SYSTEMD_LOG_TARGET=kmsg
			export SYSTEMD_LOG_TARGET
		fi
		exec "$@" 2>&3 3>&-
	)
	keeper_status=$? keeper_left=0
	if [ -n "$keeper_cgroup" ]; then
		read -r _ keeper_left <"$keeper_cgroup/payload/cgroup.events"
		[ "$keeper_left" = 0 ] || echo 1 >"$keeper_cgroup/payload/cgroup.kill"
	fi
	{
		echo "$keeper_status $keeper_left"
		while read -r keeper_name; do echo "$keeper_name"; done <"$keeper_cgroup/memory.events"
		for keeper_name in max peak; do
			read -r keeper_value <"$keeper_cgroup/memory.$keeper_name" && echo "memory.$keeper_name $keeper_value"
		done
	} >"$keeper_state/exit.new"
	mv "$keeper_state/exit.new" "$keeper_state/exit"
}
exec 3>&2 2>/dev/null
enter /keeper
if [ -n "$keeper_filter" ]; then
	keep "$@" | sed -u 's/\r//g'
else
	keep "$@"
fi
"""


def open_log(path: str, folder: Source | None = None) -> int:
    """Open one of the task's log FIFOs for its whole life; /dev/null when nobody collects logs.

    Read-write, so that opening never waits for a reader, and a reader that goes away and comes back (logmon,
    with every agent restart) neither ends the payload by SIGPIPE nor loses a line. Never through a symbolic
    link: other tasks of the allocation can write to the directory (CVE-2026-8052), which is `folder`, if given.
    """
    if not path:
        path = "/dev/null"
    name, place = (os.path.basename(path), folder.fd) if folder else (path, None)
    try:
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    except FileNotFoundError:
        return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)  # disable_log_collection: nobody makes the FIFOs
    except OSError as error:
        raise HostError(f"the log path {path} cannot be opened: {error.strerror}") from None
    try:
        if not (stat.S_ISFIFO(os.fstat(found).st_mode) or path == "/dev/null"):
            raise HostError(f"the log path {path} is neither a FIFO nor /dev/null; the task is not started")
        return os.open(f"/proc/self/fd/{found}", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    finally:
        os.close(found)


@contextlib.contextmanager
def open_logs(plan: Plan, directories: Mapping[str, Source]) -> Iterator[list[int]]:
    """Yield stdout and stderr for a task; they close here when the keeper has them, too."""
    with contextlib.ExitStack() as stack:
        logs = []
        for path in plan.log_paths:
            logs.append(open_log(path, directories.get(os.path.dirname(path))))
            stack.callback(os.close, logs[-1])
        yield logs


def start_keeper(plan: Plan, state_dir: Path, stdio: Sequence[int], locks: list[int]) -> tuple[ProcessId, str]:
    """Start the keeper in a mount namespace of its own, where the task's private root is; for `run_apart`. It gets
    the `locks`, which are closed here. The second result is a sentence if the command cannot be executed."""
    with contextlib.ExitStack() as stack:  # the keeper has the locks, its namespace the mounts
        trees = []
        for pin in plan.pins:
            if not pin.is_node:
                trees.append((clone_source(pin.source), pin.place))
                stack.callback(os.close, trees[-1][0])
        enter_namespace()
        make_nodes([pin for pin in plan.pins if pin.is_node], state_dir / DEVICES_PLACE)
        for tree, place in trees:
            attach_tree(tree, place)
        for path in plan.nosuid:
            cover_nosuid(path)
        stack.callback(close_all, locks)
        arguments = make_root(plan, state_dir, locks) if plan.private else []
        root = plan.find_root(state_dir)
        why = prepare_root(plan, root) if root else ""
        return start_shell(plan, state_dir, stdio, arguments, locks), why


def close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def start_shell(
    plan: Plan, state_dir: Path, stdio: Sequence[int], arguments: Sequence[str], locks: Sequence[int]
) -> ProcessId:
    environ = {
        **plan.environ,
        "PATH": SAFE_PATH,
        "LANG": "C.UTF-8",
        "NOTIFY_SOCKET": str(state_dir / "notify"),
    }
    argv = ["sh", "-c", KEEPER, "nomad-nspawn-keeper", str(state_dir), plan.cgroup]
    argv += ["filter" if plan.wants_filter else ""]
    own = plan.argv.index(f"--machine={plan.machine}") + 1
    argv = [*plan.network.entry, *argv, *plan.prefix, *plan.argv[:own], *arguments, *plan.argv[own:]]
    try:
        return start_process(
            argv, environ=environ, stdin=stdio[0], stdout=stdio[1], stderr=stdio[2], pass_fds=locks
        )
    except OSError as error:
        if error.errno == errno.E2BIG:
            rule = "is longer than the kernel takes: 128 KiB an argument, 2 MiB with all options"
            raise ConfigError("command", list(plan.command), rule, "put long texts into files") from None
        raise HostError(f"the container's keeper cannot be started: {error.strerror}") from None


def read_record(state_dir: Path) -> Record | None:
    """Return the exit record, None while the task runs (or when its keeper was killed). Raises OSError when the
    host cannot tell."""
    path = state_dir / "exit"
    try:
        first, _, counters = path.read_text().partition("\n")
        status, _, populated = first.partition(" ")
        return Record(int(status), populated == "1", path.stat().st_mtime, Shortage.of(parse_counters(counters)))
    except (FileNotFoundError, ValueError):
        return None


# =====================================================================================================
# State
#
# What is known of a started task, and its events. What is needed to find a task again stands in its State, which
# is both in the handle Nomad keeps and in the state directory: either one is enough.
# =====================================================================================================

STATE_VERSION = 1


@dataclass(frozen=True)
class State:
    """What is known of a started task, in a form that outlives the plugin."""

    task_id: str
    machine: str
    mode: Mode
    cgroup: str
    boot_id: str
    keeper: ProcessId
    leader: ProcessId | None  # the container's PID 1; None while it is being started
    started_at: float  # Unix time
    image: str  # its path, where nspawn leaves files beside it; else ""
    alloc_dir: str = ""  # of the allocation, on the host
    complaint: str = ""  # why the command cannot be executed, as far as a look at it tells
    place: str = ""  # as `PrivateRoot.place`: removed at the end
    zone: str = ""  # nspawn's bridge vz-<zone>
    ports: tuple[tuple[int, int], ...] = ()  # of the host, and inside: what nspawn maps
    stop_signal: str = ""  # the image's own wish, for jobs without a kill_signal
    users: tuple[tuple[int, int], ...] = ()  # ranges of the host's ids for the container's users: begin and count
    journal: str = ""  # as `Journal.place`, once it has been made: removed at the end

    @property
    def directory(self) -> Path:
        return state_directory(self.task_id)

    def render(self) -> str:
        return json.dumps({**asdict(self), "version": STATE_VERSION, "mode": self.mode.value})

    @classmethod
    def parse(cls, text: str | bytes) -> State:
        """Raise ValueError on what this version cannot read."""
        try:
            values = json.loads(text)
            version = values.pop("version")
            if version == STATE_VERSION:
                leader = values["leader"]
                changes = {
                    "mode": Mode(values["mode"]),
                    "keeper": ProcessId(**values["keeper"]),
                    "leader": ProcessId(**leader) if leader else None,
                    "ports": tuple((host, inside) for host, inside in values.get("ports", ())),
                    "users": tuple((begin, count) for begin, count in values.get("users", ())),
                }
                known = {name.name for name in fields(cls)}  # a later release may have written more
                state = cls(**{name: value for name, value in {**values, **changes}.items() if name in known})
                state.check()
                return state
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError("the task's stored state cannot be read: it is damaged") from None
        rule = f"it is of version {version!r}, this plugin knows version {STATE_VERSION}"
        raise ValueError(f"the task's stored state cannot be read: {rule}")

    def check(self) -> None:
        """Raise ValueError when a field cannot be what `render` has written: what is named here is killed and
        removed."""
        processes = [self.keeper, *([self.leader] if self.leader else [])]
        numbers = [number for process in processes for number in (process.pid, process.started)]
        numbers += [number for pair in (*self.ports, *self.users) for number in pair]
        texts = [getattr(self, name.name) for name in fields(self) if name.type == "str"]
        removed = [path for path in (self.cgroup, self.place, self.journal) if path]
        if not (
            all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
            and all(isinstance(text, str) for text in texts)
            and type(self.started_at) in (int, float)
            and re.fullmatch(r"[A-Za-z0-9-]{1,64}", self.machine)
            and all(path.startswith("/") and ".." not in path.split("/") for path in removed)
            and (not self.cgroup or self.cgroup.startswith("/sys/fs/cgroup/"))
            and self.cgroup != str(CgroupMode.HYBRID.root)
            and (not self.place or self.place.endswith(PLACE_NAME))
            and (not self.journal or re.fullmatch(rf"{JOURNALS}/[^/]+", self.journal))
            and "/" not in self.zone
        ):
            raise ValueError


def read_state(directory: Path) -> State | None:
    """Return what is known of a task, None when there is no such file or it is damaged. Raises OSError when the
    host cannot tell."""
    try:
        return State.parse((directory / "state.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def read_states(alloc_id: str = "") -> Iterator[State]:
    """Yield the tasks that are on this machine, or those of one allocation."""
    prefix = render_readable(alloc_id)[:36]
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(STATE_ROOT)):
            if name.startswith(prefix) and (state := read_state(STATE_ROOT / name)):
                yield state


def split_id(task_id: str) -> tuple[str, str]:
    """Return allocation and task of `<allocation>/<task>/<8 hex digits>`; a task's name may hold slashes."""
    alloc_id, *name = task_id.split("/")
    return alloc_id, "/".join(name[:-1])


def find_alloc_dirs(states: Iterable[State]) -> set[str]:
    """Return the directories that the allocations of these tasks are in: a client has one, its alloc_dir."""
    return {os.path.dirname(state.alloc_dir) for state in states if state.alloc_dir}


def find_journal_obstacle(task: TaskConfig) -> str:
    """Return why the host cannot show a task's journal, "" when it can."""
    place = name_journal(task.alloc_id)
    if not UUID.fullmatch(task.alloc_id):
        return "the allocation's id is no machine id"
    if not os.path.isdir(JOURNALS):
        return f"this machine has no {JOURNALS}"
    machine = plan_machine(task.name, task.alloc_id)
    is_own = any(state.journal == place and state.machine == machine for state in read_states(task.alloc_id))
    return f"there is a {place} already" if os.path.lexists(place) and not is_own else ""


def guess_state(task_id: str) -> State:
    """Return what the id alone tells of a task whose state file cannot be read: enough to kill and remove it."""
    alloc_id, task_name = split_id(task_id)
    shared = plan_cgroup(read_cgroup_mode(), "", alloc_id, task_name)
    reserved = shared.replace("/share.slice/", "/reserve.slice/")
    return State(
        task_id=task_id,
        machine=plan_machine(task_name, alloc_id),
        mode=Mode.COMMAND,
        cgroup=reserved if os.path.isdir(reserved) else shared,
        boot_id=read_boot_id(),
        keeper=NO_PROCESS,
        leader=None,
        started_at=0.0,
        image="",
    )


class Events:
    """Hands what happens to tasks to every TaskEvents stream; keeps a few while no stream is open."""

    def __init__(self) -> None:
        self.streams: set[asyncio.Queue[TaskEvent]] = set()
        self.backlog: deque[TaskEvent] = deque(maxlen=64)

    def emit(self, task: TaskConfig | State, message: str) -> None:
        task_id = task.id if isinstance(task, TaskConfig) else task.task_id
        event = TaskEvent(task_id, render_line(message), time.time())
        if not self.streams:
            self.backlog.append(event)
        for queue in self.streams:
            queue.put_nowait(event)

    @contextlib.contextmanager
    def subscribe(self) -> Iterator[asyncio.Queue[TaskEvent]]:
        queue: asyncio.Queue[TaskEvent] = asyncio.Queue()
        while self.backlog:
            queue.put_nowait(self.backlog.popleft())
        self.streams.add(queue)
        try:
            yield queue
        finally:
            self.streams.discard(queue)


@dataclass(frozen=True)
class TaskEvent:
    task_id: str
    message: str
    at: float  # Unix time


# =====================================================================================================
# Machined
#
# What systemd-machined is told of the machines.
# =====================================================================================================


FINGERPRINT_PERIOD = 30.0  # seconds between two looks at the host
REGISTRY = Path("/run/systemd/machines")  # systemd-machined has a file there for each machine it knows
REGISTER_LIMIT = 5.0  # seconds for a call
SETTLE_LIMIT = 2.0  # seconds that the end of a task waits for calls


class Machined:
    """Tells systemd-machined of the machines, for `machinectl` and `journalctl -M`. Nothing depends on it: calls
    are made in the background, one at a time, and when one fails none is made for a while.

    Before 262 it forgets machines in cgroups that systemd has not made, whenever it or systemd is reloaded and
    when `machinectl status` has asked for their unit (measured on 252 and 257): so they are told again with each
    look at the host. nspawn's own --register=yes would wait for the answer, and fail where machined is masked.
    """

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.registering: tuple[str, ProcessId] = ("", NO_PROCESS)  # a machine, and the call for it
        self.rests_until = 0.0
        self.calls: set[asyncio.Task[None]] = set()

    def tell(self, state: State, *, has_ended: bool) -> None:
        """Register a machine, or take it off the list; returns at once."""
        if has_ended and self.registering[0] == state.machine:
            self.registering[1].send(signal.SIGKILL)  # machined does not answer
        if state.leader and have_machined():
            call = asyncio.create_task(self.update(state, has_ended), name=state.machine)
            self.calls.add(call)
            call.add_done_callback(self.calls.discard)

    async def settle(self, machine: str) -> None:
        """Return when nothing is left to tell of a machine, or machined has been too slow with it."""
        calls = [call for call in self.calls if call.get_name() == machine]
        if calls:
            await asyncio.wait(calls, timeout=SETTLE_LIMIT)

    async def update(self, state: State, has_ended: bool) -> None:
        async with self.turn:
            leader, entry = state.leader, REGISTRY / state.machine
            assert leader
            if entry.exists() is not has_ended or time.monotonic() < self.rests_until:
                return
            if has_ended:
                await self.call("UnregisterMachine", state, "s", state.machine)
            elif leader.is_alive:
                await self.register(state, leader)

    async def register(self, state: State, leader: ProcessId) -> None:
        words = ("nspawn", "container", leader.pid, f"/proc/{leader.pid}/root")
        await self.call("RegisterMachine", state, "sayssus", state.machine, *render_machine_id(state), *words)
        is_listed = (REGISTRY / state.machine).exists()
        if not leader.is_alive:
            if is_listed:
                await self.call("UnregisterMachine", state, "s", state.machine)
        elif not is_listed:
            self.rests_until = time.monotonic() + FINGERPRINT_PERIOD / 2
            log.debug("systemd-machined does not take the machine", machine=state.machine)

    async def call(self, method: str, state: State, *words: object) -> None:
        path = ("org.freedesktop.machine1", "/org/freedesktop/machine1", "org.freedesktop.machine1.Manager")
        argv = ["busctl", "--quiet", f"--timeout={REGISTER_LIMIT:g}", "call", *path, method, *map(str, words)]
        process = start_process(argv, environ={"PATH": SAFE_PATH})
        self.registering = (state.machine if method == "RegisterMachine" else "", process)
        try:
            await asyncio.wait_for(process.wait(), REGISTER_LIMIT + 1)
        except asyncio.TimeoutError:
            process.send(signal.SIGKILL)
            await process.wait()
        finally:
            self.registering = ("", NO_PROCESS)


def render_machine_id(state: State) -> list[object]:
    """Return the allocation's id, or for ids that are none of 16 bytes no id, as D-Bus has it."""
    digits = split_id(state.task_id)[0].replace("-", "")
    number = bytes.fromhex(digits) if UUID.fullmatch(digits) else b""
    return [len(number), *number]


# =====================================================================================================
# Removal
#
# The end of all there is of a task: processes, network, files, locks. Works on what is there, in any state of
# half-startedness.
# =====================================================================================================


def kill_processes(state: State) -> None:
    """Kill all there is of a task. Without cgroup.kill: the keeper's process group, where nspawn is too, and the
    leader, with which the container's process namespace ends."""
    kill_cgroup(state.cgroup)
    if state.keeper.is_alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(state.keeper.pid, signal.SIGKILL)
    if state.leader:
        state.leader.send(signal.SIGKILL)


async def wait_processes(state: State) -> None:
    """Return when no process of a task is left."""
    inside = [state.keeper, state.leader or NO_PROCESS]
    while inside:
        for process in inside:
            await process.wait()
        inside = await run_apart(lambda: read_cgroup_processes(state.cgroup))


async def remove_network(state: State) -> None:
    """Remove what an nspawn that was killed has left of its network; one that ended by itself leaves nothing.

    A link goes with the container's namespace, but only when the kernel comes to it, and not while a process of
    somebody who looks inside is there.
    """
    for link in ("ve", "vb"):
        delete_link(f"{link}-{state.machine}")  # the whole name is an alternative one: the first has room for 15
    if state.zone:
        remove_zone(state.zone)
    if state.ports:
        others = {port for other in read_states() if other.task_id != state.task_id for port in other.ports}
        if ports := [port for port in state.ports if port not in others]:
            await remove_port_maps(ports)


async def remove_port_maps(ports: Sequence[tuple[int, int]]) -> None:
    """Remove what leads from ports of the host to a container that is gone."""
    is_nft = False
    for family in ("ip", "ip6"):
        table = (family, "io.systemd.nat", "map_port_ipport")
        text = await run_tool(["nft", "list", "map", *table])
        is_nft = is_nft or bool(text)
        for element in find_port_maps(text, NAT_ELEMENT, ports):
            log.warn("removing a port that leads nowhere", element=element)
            await run_tool(["nft", "delete", "element", *table, "{", element, "}"])
    if not is_nft:
        for rule in find_port_maps(await run_tool(["iptables", "-t", "nat", "-S"]), NAT_RULE, ports):
            log.warn("removing a port that leads nowhere", rule=rule)
            await run_tool(["iptables", "-t", "nat", "-D", *rule.removeprefix("-A ").split()])


ZONE_LOCK = "/run/systemd/nspawn-network-zone"


def remove_zone(zone: str) -> None:
    """Remove a zone's bridge when nothing is joined to it, under the lock nspawn takes to do so."""
    fd = os.open(ZONE_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, WRITE_LOCK)
        if os.fstat(fd).st_nlink:  # who gives the lock back removes its file
            with contextlib.suppress(FileNotFoundError):
                if not os.listdir(f"/sys/class/net/vz-{zone}/brif"):
                    delete_link(f"vz-{zone}")
            os.unlink(ZONE_LOCK)
    except BlockingIOError:
        log.debug("the bridge of a zone is left to who joins or leaves it just now", zone=zone)
    finally:
        os.close(fd)


NETLINK_ROUTE, RTM_DELLINK, NLM_F_REQUEST, NLM_F_ACK = 0, 17, 1, 4
IFLA_IFNAME, IFLA_ALT_IFNAME = 3, 53


def delete_link(name: str) -> None:
    """Delete a network interface by its name or alternative name, if there is one."""
    kind = IFLA_IFNAME if len(name) < 16 else IFLA_ALT_IFNAME
    text = name.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(text), kind) + text + b"\0" * (-len(text) % 4)
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0) + attribute
    header = struct.pack("=IHHII", 16 + len(body), RTM_DELLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE) as netlink:
        netlink.send(header + body)
        status = -struct.unpack_from("=i", netlink.recv(65536), 16)[0]
    if status not in (0, errno.ENODEV):
        log.warn("cannot remove a network interface", name=name, error=os.strerror(status))


async def remove_leftovers(state: State) -> None:
    """Remove all files of a dead task; works on what is there, in any state of half-startedness."""
    await remove_place(state.place)
    await remove_place(state.journal)
    for place in (f"propagate/{state.machine}", f"unix-export/{state.machine}", f"{state.machine}/unix-export",
                  state.machine):  # fmt: skip
        with contextlib.suppress(OSError):
            (SETTINGS_ROOT / place).rmdir()
    image = Path(state.image) if state.image else None
    await run_apart(lambda: remove_stale_locks(image))  # with them go copies of whole images
    if state.cgroup:
        await run_apart(lambda: remove_cgroup(state.cgroup))
    await remove_place(str(state.directory / "tmp"))  # what nspawn keeps of overlays, when it was killed
    remove_tree(state.directory)
    Store().release(state.directory.name)


async def remove_place(place: str) -> None:
    """Remove what a task has changed of its image, or its journal. In a thread: a task makes trees as large as it
    likes."""
    if place:
        await run_apart(lambda: remove_tree(Path(place)))


WRITE_LOCK = struct.pack(LOCK_FORMAT, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def remove_stale_locks(image: Path | None) -> None:
    """Remove lock files that no process holds: an nspawn that was killed leaves them, for its range of ids and its
    image, and beside an ephemeral copy's the copy. Who makes a lock looks whether its file is still there."""
    places = [UID_LOCKS.glob("*"), (SETTINGS_ROOT / "locks").glob("*")]
    if image:
        name = glob.escape(image.name)
        places += [
            image.parent.glob(f".#{name}.lck"),
            image.parent.glob(f".#.#machine.{name}{'[0-9a-f]' * 16}.lck"),
            image.parent.glob(f".#.#snapshot.{name}{'[0-9a-f]' * 16}.lck"),  # systemd 262
        ]
    for path in itertools.chain(*places):
        with contextlib.suppress(OSError), open_lock(path) as file:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, WRITE_LOCK)  # systemd's kind of lock; BlockingIOError when held
            if path.name.startswith(".#.#"):
                remove_tree(path.with_name(path.name[len(".#") : -len(".lck")]))
            path.unlink()


def open_lock(path: Path) -> IO[bytes]:
    """Open the file of a lock. It may lie in a task's directory, where a task can put a link or a device there."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is no lock", str(path))
        return open(f"/proc/self/fd/{fd}", "r+b")
    finally:
        os.close(fd)


# =====================================================================================================
# Task
#
# One running task. Events of the kernel (pidfds, the notify socket) drive everything; nothing polls, and a running
# task costs the plugin a descriptor.
# =====================================================================================================

ADDRESS_PATIENCE = 30.0  # seconds after which an event says that a container has no address: DHCP takes a few
HOST_PATIENCE = 1.0  # seconds until a task is watched again after an error of the machine
END_LIMIT = 15.0  # seconds for nspawn to clean up after its payload: it removes an ephemeral copy itself


class Task:
    """A started task. Every way to learn of its end leads through `watch`."""

    def __init__(self, state: State, events: Events) -> None:
        self.state = state
        self.events = events
        self.exit: Exit | None = None
        self.ended = asyncio.Event()
        self.sent = 0  # the last signal sent on Nomad's behalf
        self.log = log.bind(task=state.task_id, machine=state.machine)
        self.watcher = asyncio.create_task(self.watch())
        self.teller: asyncio.Task[None] | None = None

    async def watch(self) -> None:
        memory = asyncio.create_task(self.watch_memory())
        try:
            while self.exit is None:
                try:
                    self.exit = await self.wait_end()
                except OSError as error:  # no descriptors, no memory: that says nothing of the task
                    self.log.warn("this machine keeps the task from being watched", error=error.strerror)
                    await asyncio.sleep(HOST_PATIENCE)
        except Exception as error:  # whoever waits for the task must not wait for ever
            self.log.error("the task cannot be watched", error=repr(error))
            self.exit = Exit(1, error=f"the task was lost: {error}", at=time.time())
        finally:
            memory.cancel()
        self.ended.set()
        self.log.info("the task has ended", code=self.exit.code, signal=self.exit.signal, reason=self.exit.error)

    async def wait_end(self) -> Exit:
        """Wait for the end, make sure nothing is left running, and work out how it ended."""
        state = self.state
        await state.keeper.wait()
        record = read_record(state.directory)
        if record is None and state.leader and state.leader.is_alive:
            self.log.warn("the keeper was killed; the container runs on, its exit code will not be known")
            await state.leader.wait()
        if state.leader:
            state.leader.send(signal.SIGKILL)  # if it is still there, nspawn was killed
        await wait_processes(state)  # without a keeper nspawn may still be cleaning up
        lines = read_nspawn_log(state.directory)
        reason = read_text(state.directory / "reason")
        if record is None:
            lost = "the container's keeper was killed, so the exit code is not known"
            return Exit(1, error=reason or lost, at=time.time())
        exit = explain_exit(state.mode, record, lines, reason, self.sent)
        exit = explain_shortage(exit, state.mode, record, bool(reason) or self.sent == signal.SIGKILL)
        if exit.code in (1, 126, 127) and not exit.error and state.mode is not Mode.BOOT:
            known = find_message(lines)  # nspawn enters the directory after it has said READY
            exit = replace(exit, error=str(known) if known else self.explain_command())
        return exit

    async def watch_memory(self) -> None:
        """Tell when the kernel has killed a process of the task for lack of memory and the task runs on.

        The kernel wakes who polls memory.events. The count that was told is kept for the next plugin; of many
        kills the first, second, fourth, eighth is told: Nomad keeps ten events a task.
        """
        told = read_number(f"{self.state.directory}/oom_kills")
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            fd = os.open(f"{self.state.cgroup}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            alarm = stack.enter_context(select.epoll())
            alarm.register(fd, select.EPOLLPRI)
            while True:
                counters = parse_counters(os.pread(fd, 4096, 0).decode())  # also what ends this alarm
                limit = read_number(f"{self.state.cgroup}/memory.max")
                shortage = Shortage.of({**counters, "memory.max": limit})
                if shortage.kills >= max(2 * told, 1) and not await self.wait(0.5):
                    told = shortage.kills
                    write_file(self.state.directory / "oom_kills", str(told))
                    times = f" ({told} times by now)" if told > 1 else ""
                    self.events.emit(self.state, f"OOM: a process was killed{times}: {shortage.reason}.")
                await wait_readable(alarm.fileno())

    def explain_command(self) -> str:
        """Say that the command could not be executed, if that is why it ended.

        nspawn reports the container as up before it executes the command; its line ("execv() failed") is in
        the task's stderr, and so is that of the shell that gets what the kernel takes for no program.
        """
        why = self.state.complaint
        return f"{why} (the system's own message is in the task's stderr)" if why else ""

    def find_payload(self) -> ProcessId | None:
        """Return the process that signals are for: the leader, or under the stub the command it started."""
        leader = self.state.leader
        if leader is None or self.state.mode is not Mode.PROCESS_TWO:
            return leader
        if not is_confined(leader.pid, self.state.mode):  # what looks up its user is a child, too
            return None
        # Later children are orphans the stub has inherited. It is not always 2: to look a user up takes processes.
        children = [(read_inner_pid(process.pid), process) for process in find_children(leader)]
        return min(children, key=lambda child: child[0])[1] if children else None

    async def send(self, number: int) -> None:
        """Send a signal to the payload. The stub forks it a moment after it reports itself as ready."""
        for _ in range(100):
            payload = self.find_payload()
            if payload is not None or self.ended.is_set():
                break
            await asyncio.sleep(0.01)
        if payload and payload.send(number):
            self.sent = number
            self.log.debug("signal sent", signal=render_signal(number), pid=payload.pid)

    async def wait(self, timeout: float | None = None) -> Exit | None:
        """Return how the task ended, None when it has not within `timeout` seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.ended.wait(), timeout)
        return self.exit

    async def stop(self, kill_signal: str, timeout: float) -> None:
        """End the task: its signal, `timeout` seconds, then SIGKILL. Returns when it is dead."""
        number = self.find_stop_signal(kill_signal)
        if timeout > 0 and not self.ended.is_set():
            await self.send(number)
            await self.wait(timeout)
        if self.ended.is_set():
            return
        if timeout > 0:
            reason = (
                f"killed: it did not end within its kill_timeout of {timeout:g} s after {render_signal(number)}"
            )
            self.events.emit(self.state, f"The task was {reason}.")
            with contextlib.suppress(OSError):  # destroyed meanwhile
                write_file(self.state.directory / "reason", reason)
        await self.kill()

    def find_stop_signal(self, name: str) -> int:
        """Return the job's kill_signal; where it is none the usual one: refusing would keep the task running."""
        try:
            return self.state.mode.stop_signal(name or self.state.stop_signal)
        except ConfigError as error:
            self.events.emit(self.state, f"{error}. SIGTERM is sent instead.")
            return self.state.mode.stop_signal("")

    async def kill(self) -> None:
        """Kill the payload, let nspawn clean up, then kill what is left. Raises HostError if all that fails."""
        state = self.state
        self.sent = signal.SIGKILL
        if not kill_cgroup(f"{state.cgroup}/payload" if state.cgroup else "") and state.leader:
            state.leader.send(signal.SIGKILL)
        if state.leader and await self.wait(END_LIMIT):
            return
        self.log.warn("killing systemd-nspawn and the keeper too: they did not end with the payload")
        kill_processes(state)
        if not await self.wait(END_LIMIT):
            raise HostError(f"the container {state.machine} cannot be killed: a process of it hangs in the kernel")

    async def destroy(self) -> None:
        """Leave nothing of the task on this machine."""
        if not self.ended.is_set():
            await self.kill()
        await remove_network(self.state)
        await remove_leftovers(self.state)

    async def find_address(self, limit: float) -> str:
        """Return the container's address as soon as it has one, "" when it has none within `limit` seconds.

        Looks again after growing pauses: what could tell would be a netlink socket in the container's namespace,
        which keeps the namespace, and with it the host's end of its link.
        """
        deadline, pause = time.monotonic() + limit, 0.02
        while self.state.leader and not self.ended.is_set():
            addresses = read_addresses(self.state.leader.pid)
            if addresses and self.state.leader.is_alive:
                return addresses[0]
            if time.monotonic() + pause > deadline:
                break
            await self.wait(pause)
            pause *= 1.5
        return ""

    async def tell_address(self, mode: NetworkMode) -> None:
        """Make an event of the container's address, or of what may be missing."""
        address = await self.find_address(ADDRESS_PATIENCE)
        if address:
            self.events.emit(self.state, f"The container has the address {address}.")
        elif not self.ended.is_set():
            why = explain_no_address(mode, self.state.mode is Mode.BOOT, have_networkd())
            self.events.emit(self.state, NO_ADDRESS.format(limit=ADDRESS_PATIENCE) + why)

    async def find_usage(self) -> Usage:
        """Return what the task uses; where the cgroup has no numbers, its processes take a while to read."""
        return await run_apart(self.read_usage)

    def read_usage(self) -> Usage:
        usage = read_cgroup_usage(self.state.cgroup) if self.state.cgroup else None
        if usage is None:
            leader = self.state.leader.pid if self.state.leader else 0
            pids = (
                read_cgroup_pids(f"{self.state.cgroup}/payload") if self.state.cgroup else read_descendants(leader)
            )
            usage = read_process_usage(pids)
        return usage


def read_nspawn_log(directory: Path) -> list[str]:
    return parse_nspawn_log(read_text(directory / "nspawn.log"))


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


def read_inner_pid(pid: int) -> int:
    """Return a process's number inside its own namespace, 0 when it is gone."""
    return int(read_status(pid).get("NSpid", "0").split()[-1])


# =====================================================================================================
# Start
#
# One start of a task, and all tasks that this plugin process knows.
# =====================================================================================================

START_LIMIT = 300.0  # seconds: an ephemeral copy of a large image, or a chown of it, takes minutes
SLOW_START = 10.0  # seconds after which an event says what is going on


async def make_upper_place(place: Path) -> int:
    """Make the directory for what a task changes; return the lock that tells others that it is in use."""
    # There may be one of a start before a reboot, or anything an artifact has put there.
    await remove_place(str(place))
    if place.name != PLACE_NAME:  # in `ephemeral_dir`: nobody else removes what a crash of the machine has left
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for other in place.parent.glob(f"*{PLACE_NAME}"):
            with contextlib.suppress(OSError):
                fd = lock_directory(other)  # BlockingIOError when it is in use
                # Out of the way first: the same task may start again while this is removed.
                doomed = other.rename(other.with_name(f"{os.urandom(8).hex()}{PLACE_NAME}"))
                os.close(fd)
                await remove_place(str(doomed))
    place.mkdir(mode=0o700)
    return lock_directory(place)


def lock_directory(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


class Start:
    """One start of a task, from the plan to the handle."""

    def __init__(self, plan: Plan, events: Events, task: TaskConfig, logs: Sequence[int]) -> None:
        self.plan = plan
        self.logs = logs
        self.locks: list[int] = []  # for the keeper
        self.events = events
        self.task = task
        self.state = State(
            task_id=plan.task_id,
            machine=plan.machine,
            mode=plan.mode,
            cgroup=plan.cgroup,
            boot_id=read_boot_id(),
            keeper=NO_PROCESS,
            leader=None,
            started_at=time.time(),
            image="" if plan.find_pin(plan.image.fd) else str(plan.image.path),
            alloc_dir=task.alloc_dir,
            place=plan.private.place if plan.private else "",
            zone=plan.network.zone,
            ports=tuple((port.host, port.inside) for port in plan.network.ports.values()),
            stop_signal=plan.image.config.stop_signal,
        )
        self.directory = self.state.directory

    async def run(self) -> Task:
        """Start the container and return when it is up; leave nothing behind when that fails."""
        try:
            await self.prepare()
            await self.tell_copying()
            with contextlib.ExitStack() as stack:
                notify = stack.enter_context(self.listen())
                go, may_go = os.pipe()
                stack.callback(os.close, go)
                stack.callback(os.close, may_go)
                await self.start_keeper(go)
                os.write(may_go, b"go\n")
                leader, users = await self.wait_ready(notify)
                self.save(leader=leader, users=users)
                give_logs(self.logs, users)
        except BaseException:
            await self.abandon()
            raise
        for name in (BUNDLE_PLACE, "credentials"):  # nspawn has read them: the values need not stay on disk
            remove_tree(self.directory / name)
        return Task(self.state, self.events)

    async def start_keeper(self, go: int) -> None:
        stdio = [go, *self.logs]
        started = asyncio.create_task(
            run_apart(lambda: start_keeper(self.plan, self.directory, stdio, self.locks))
        )
        try:
            await asyncio.shield(started)
        finally:  # when the call is cancelled, too: a thread cannot be, and the keeper it starts must be known
            keeper, complaint = await started
            self.save(keeper=keeper, complaint=complaint)

    def save(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        write_file(self.directory / "state.json", self.state.render())

    async def prepare(self) -> None:
        STATE_ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.mkdir(mode=0o700)
        self.save()  # before the first process: whatever dies from here on, the id alone leads to the cgroup
        write_file(self.directory / "inside.json", json.dumps(asdict(self.plan.inside)))
        (self.directory / "nspawn.log").touch(mode=0o600)
        Store().use(self.directory.name, self.plan.task_id, self.plan.image)
        if self.plan.cgroup:
            self.tell_missing(make_cgroup(self.plan.cgroup, self.plan.limits))
            self.restrict_devices()
        if self.plan.journal.place:
            make_journal(self.plan.journal)
            self.save(journal=self.plan.journal.place)
        if self.plan.private and self.plan.private.place:
            self.locks.append(await make_upper_place(Path(self.plan.private.place)))
        for path, text in self.plan.network.files.items():
            file = Path(f"{self.directory}{path}")
            file.parent.mkdir(mode=0o700, exist_ok=True)
            write_file(file, text, 0o644)
        for pin in self.plan.pins:
            make_place(Path(pin.place), pin.source.is_directory)
        for key, place in plan_credentials(self.plan.credentials, self.directory).items():
            write_secret(Path(place), self.plan.credentials[key])
        if any(word.startswith("--inaccessible=") for word in self.plan.argv):
            make_inaccessible()
        if any(word.startswith("--overlay=") for word in self.plan.argv):
            (self.directory / "tmp").mkdir()
        write_secret(self.directory / BUNDLE_PLACE / "config.json", self.plan.bundle.encode())

    @contextlib.contextmanager
    def listen(self) -> Iterator[socket.socket]:
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_UNIX, kind) as notify:
            notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            notify.bind(str(self.directory / "notify"))  # in a directory of root's alone: no one else can send
            try:
                yield notify
            finally:
                (self.directory / "notify").unlink(missing_ok=True)

    async def wait_ready(self, notify: socket.socket) -> tuple[ProcessId, tuple[tuple[int, int], ...]]:
        """Return the leader and its ranges of ids when nspawn says READY; raise what went wrong when it has ended
        instead."""
        ended = asyncio.create_task(self.state.keeper.wait())
        try:
            claim = await asyncio.wait_for(self.read_ready(notify, ended), START_LIMIT)
        except asyncio.TimeoutError:
            raise TransientError(f"the container was not up within {START_LIMIT:g} s") from None
        finally:
            ended.cancel()
        if claim is None:
            record = read_record(self.directory)
            lines = [self.plan.name_sources(line) for line in read_nspawn_log(self.directory)]
            raise explain_failure(lines, record.status if record else -1)
        leader = ProcessId.of(claim.leader)
        if leader is None:  # it has ended already: the exit record tells how
            return NO_PROCESS, ()
        users = read_ranges(leader.pid)
        check_leader(leader, replace(self.state, users=users), self.plan.has_other_users, claim.sender)
        return leader, users

    async def read_ready(self, notify: socket.socket, ended: asyncio.Task[None]) -> Claim | None:
        """Return whom nspawn names as the leader, None when the keeper ended without READY. Messages are read by
        lines: where one datagram ends is nspawn's business."""
        loop = asyncio.get_running_loop()
        wake, claim = asyncio.Event(), None
        loop.add_reader(notify.fileno(), wake.set)
        ended.add_done_callback(lambda _: wake.set())
        slow = loop.call_later(SLOW_START, self.tell_slow)
        try:
            while True:
                is_over = ended.done()  # asked before reading: what nspawn said before its end is not missed
                wake.clear()
                for sender, line in read_notifications(notify):
                    claim = claim or parse_claim(sender, line)
                    if line == b"READY=1" and claim:
                        return claim
                if is_over:
                    return None
                await wake.wait()
        finally:
            slow.cancel()
            loop.remove_reader(notify.fileno())

    def tell_missing(self, controllers: Sequence[str]) -> None:
        """Tell which limits the task does not have although the machine could have them; of others the fingerprint
        speaks."""
        here = [controller for controller in controllers if controller in read_host().controllers]
        if here:
            where = f"{self.plan.cgroup} has no such cgroup controllers"
            self.events.emit(self.task, f"The task runs without its limits of {', '.join(here)}: {where}.")

    def restrict_devices(self) -> None:
        """Keep the payload from devices that are not the task's. nspawn takes the cgroup that is there for it, and
        is in another one itself, where it can make the container's /dev."""
        payload = f"{self.plan.cgroup}/payload"
        try:
            for place in reversed(find_mirrors(payload)):
                Path(place).mkdir(parents=True, exist_ok=True)
            restrict_devices(payload, self.plan.device_rules)
        except OSError as error:
            if can_restrict_devices():  # else the fingerprint speaks of it
                self.events.emit(self.task, f"The task runs without a device policy: {error.strerror}.")

    async def tell_copying(self) -> None:
        if self.plan.copying:
            size = await run_apart(lambda: run(["du", "-sxm", "--", str(self.plan.image.path)], timeout=60))
            self.events.emit(self.task, f"{self.plan.copying} It has {size.split()[0] if size else '?'} MB.")

    def tell_slow(self) -> None:
        what = "copying the image" if self.plan.copying else "setting up the container"
        self.events.emit(self.task, f"Still starting after {SLOW_START:g} s: systemd-nspawn is {what}.")

    async def abandon(self) -> None:
        """Kill and remove what a failed start has left."""
        kill_processes(self.state)
        await wait_processes(self.state)
        await remove_network(self.state)
        await remove_leftovers(self.state)
        close_all(self.locks)


def make_place(path: Path, is_directory: bool) -> None:
    """Make something to mount a source on."""
    path.parent.mkdir(exist_ok=True)
    if is_directory:
        path.mkdir()
    else:
        path.touch()


def make_journal(journal: Journal) -> None:
    try:
        if journal.target:
            os.symlink(journal.target, journal.place)
        else:
            os.mkdir(journal.place, 0o755)
    except OSError as error:
        raise HostError(f"link_journal: {journal.place} cannot be made: {error.strerror}") from None


def make_inaccessible(root: Path = Path("/run/systemd/inaccessible")) -> None:
    """Make what nspawn hides paths with, where no systemd has made it as PID 1."""
    if not root.is_dir():
        (root / "dir").mkdir(mode=0o000, parents=True)
        (root / "reg").touch(mode=0o000)


def write_secret(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(content)


def read_notifications(notify: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that wait in a notify socket, each with its sender, whom the kernel attests."""
    with contextlib.suppress(BlockingIOError):
        while True:
            data, ancillary, _, _ = notify.recvmsg(65536, socket.CMSG_SPACE(CREDENTIALS.size))
            senders = [packed for _, kind, packed in ancillary if kind == socket.SCM_CREDENTIALS]
            sender = CREDENTIALS.unpack(senders[0])[0] if senders else 0
            yield from ((sender, line) for line in split_notification(data))


CREDENTIALS = struct.Struct("iii")  # pid, uid and gid


def split_notification(data: bytes) -> list[bytes]:
    """Return the lines of a datagram, which end at \\n alone: nspawn passes the STATUS of its payload on, with all
    else that Python takes for the end of a line."""
    return data.split(b"\n")


@dataclass(frozen=True)
class Claim:
    """Whom a message names as the container's first process; nothing of it is believed before check_leader."""

    sender: int
    leader: int


def parse_claim(sender: int, line: bytes) -> Claim | None:
    match = re.fullmatch(rb"X_NSPAWN_LEADER_PID=([0-9]{1,9})", line)
    return Claim(sender, int(match[1])) if match else None


def read_ranges(pid: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the host's ids that a process's user namespace maps."""
    lines = read_text(Path(f"/proc/{pid}/uid_map")).split("\n")
    return tuple((int(line.split()[1]), int(line.split()[2])) for line in lines if line)


def check_leader(leader: ProcessId, state: State, has_other_users: bool, nspawn: int = 0) -> None:
    """Raise HostError unless the kernel agrees that a process is the first of a task's container: a child of the
    systemd-nspawn below our keeper, in the payload's cgroup, the first of a process namespace, and one of the
    task's users. `nspawn` is who named it; 0 after a restart of the plugin, when the parent may be gone."""
    why = find_objection(leader, state, has_other_users, nspawn)
    if why and leader.is_alive:  # else what was read may be another's: nothing is done with a dead one
        raise HostError(f"process {leader.pid} is not the first of the container {state.machine}: {why}")


def find_objection(leader: ProcessId, state: State, has_other_users: bool, nspawn: int) -> str:
    """Say why a process cannot be a task's leader, "" when it can."""
    status = read_status(leader.pid)
    if nspawn and (status.get("PPid") != str(nspawn) or not has_ancestor(nspawn, state.keeper)):
        return "it is no child of the task's systemd-nspawn"
    if state.cgroup and not find_cgroups(leader.pid, f"{state.cgroup}/payload"):
        return f"it is not in {state.cgroup}/payload"
    if status.get("NSpid", "").split()[1:] != ["1"]:
        return "it is not the first of a process namespace"
    ids = [int(uid) for uid in status.get("Uid", "").split()]
    ranges = [range(begin, begin + count) for begin, count in state.users]
    if ranges and not all(any(uid in ids for ids in ranges) for uid in ids):
        return "it is no user of the container's"
    if has_other_users and (not ranges or any(0 in ids for ids in ranges)):
        return "it has no user namespace with ids of its own"
    return ""


def has_ancestor(pid: int, ancestor: ProcessId, most: int = 4) -> bool:
    """Whether a process is one or is below it: the keeper's shells are between it and nspawn."""
    for _ in range(most):
        if pid == ancestor.pid:
            return ancestor.is_alive
        pid = int(read_status(pid).get("PPid", "0"))
    return False


def check_keeper(state: State) -> None:
    """Raise HostError when the process of a stored state is not the task's keeper."""
    path = f"{state.cgroup}/keeper"
    if state.cgroup and not find_cgroups(state.keeper.pid, path) and state.keeper.is_alive:
        raise HostError(f"process {state.keeper.pid} is not the keeper of {state.machine}: it is not in {path}")


def give_logs(logs: Sequence[int], users: Sequence[tuple[int, int]]) -> None:
    """Make the container's root the owner of its log FIFOs, so that programs may open /dev/stdout anew."""
    for fd in logs:
        if users and users[0][0] and stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, users[0][0], -1)


class Tasks:
    """The tasks this plugin process knows, and the way back to those that another one started."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.machined = Machined()
        self.known: dict[str, Task] = {}
        self.lost: dict[str, State] = {}  # of an earlier boot, until they are destroyed

    def get(self, task_id: str) -> Task:
        task = self.known.get(task_id)
        if task is None:
            raise TaskNotFound(task_id)
        return task

    async def start(self, plan: Plan, config: TaskConfig, directories: Mapping[str, Source]) -> Task:
        # The logs first: while one writer holds them, Nomad's reader does not take the end of a left-over for the
        # end of the log.
        with open_logs(plan, directories) as logs:
            await self.clear(plan)
            task = await Start(plan, self.events, config, logs).run()
        self.adopt(task)
        return task

    def adopt(self, task: Task) -> None:
        self.known[task.state.task_id] = task
        self.machined.tell(task.state, has_ended=False)
        task.watcher.add_done_callback(lambda _: self.machined.tell(task.state, has_ended=True))

    def remind_machined(self) -> None:
        for task in self.known.values():
            if not task.ended.is_set():
                self.machined.tell(task.state, has_ended=False)

    async def clear(self, plan: Plan) -> None:
        """End and remove an earlier start of the same task: after a crash Nomad repeats StartTask with the same
        id, and it never runs two of one task at once."""
        for state in (*read_states(split_id(plan.task_id)[0]), *self.lost.values()):
            if state.task_id == plan.task_id or state.machine == plan.machine:
                if split_id(state.task_id) != split_id(plan.task_id):
                    rule = f"gives the machine name {plan.machine}, which is that of the task {state.task_id}"
                    raise ConfigError("task", split_id(plan.task_id)[1], rule, "give the task another name")
                log.warn("removing a left-over of an earlier start", task=state.task_id)
                await self.destroy(state.task_id)
        await self.destroy(plan.task_id)

    async def recover(self, task_id: str, driver_state: bytes) -> None:
        """Take up a running or ended task again; TaskNotFound, at once, when it is gone."""
        if task_id in self.known:
            return
        try:
            state = State.parse(driver_state)
        except ValueError as error:
            raise DriverError(str(error)) from None
        if state.task_id == task_id and state.boot_id != read_boot_id():
            self.lost[task_id] = state
            raise TaskNotFound(task_id, "has ended: this machine was restarted since it was started")
        is_running = state.keeper.is_alive or bool(state.leader and state.leader.is_alive)
        if (
            state.task_id != task_id
            or not state.directory.is_dir()
            or not (is_running or read_record(state.directory))
        ):
            raise TaskNotFound(task_id)
        check_keeper(state)
        if state.leader:
            check_leader(state.leader, state, has_other_users=False)  # their ranges are known
        self.adopt(Task(state, self.events))

    async def destroy(self, task_id: str) -> None:
        """Kill and remove a task; from its id alone if need be, and without complaint if there is none."""
        task, lost = self.known.get(task_id), self.lost.pop(task_id, None)
        if task is None:
            directory = state_directory(task_id)
            if not directory.exists():
                if lost:
                    await remove_leftovers(lost)  # on disks; the rest went with the kernel
                return
            task = Task(read_state(directory) or guess_state(task_id), self.events)
        await task.destroy()
        self.known.pop(task_id, None)


# =====================================================================================================
# Entry
#
# A further command in a running container: in the payload's namespaces and cgroup, with its bounding set,
# no_new_privs, seccomp filters and limits, as the task's user. nsenter would give it the host's capabilities, no
# filter and no limit. The helper that enters is Entry, which needs nothing of this module: it is forked for each
# command from a process that is started when the first one comes and ends when none has come for a while. The
# command is the plugin's child, so that nothing of ours stays beside it, and is killed when the plugin ends.
# =====================================================================================================


class Entry:
    """The program that enters a container. Its source is run by a Python without any of this module's imports.

    `serve` forks for each message; that process makes itself what the payload is, forks once more (only a
    fork can enter a process namespace), and the last one executes the command. Everything is given up before
    that fork: a container without a user namespace has the capability to look into any process it sees. What it
    sees for a moment has only the command's rights, no descriptor but those of the command and a socket whose
    words the plugin does not trust, and files of the host only from mounts that are read-only (CVE-2019-5736).
    The working directory and root are the container's since `setns` (CVE-2024-21626).
    """

    CLONE_PARENT = 0x8000
    PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH, PTRACE_GET_FILTER = 0x4206, 0x4207, 17, 0x420C
    PR_PDEATHSIG, PR_DUMPABLE, PR_KEEPCAPS, PR_SECCOMP, PR_CAPBSET_READ, PR_CAPBSET_DROP = 1, 4, 8, 22, 23, 24
    PR_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47
    CAP_SYS_ADMIN = 1 << 21
    TIOCSPTLCK, TIOCGPTPEER = 0x40045431, 0x5441
    WALL = 0x40000000  # __WALL
    PATIENCE = 2  # seconds for others to let go of a process
    MAX_FILE = 16 << 20  # bytes of a container's passwd or group that are read

    def __init__(self) -> None:
        import ctypes

        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self.libc.ptrace.restype = self.libc.syscall.restype = ctypes.c_long
        self.libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
        self.libc.syscall.argtypes = [ctypes.c_long] * 6
        calls = {"x86_64": {"clone": 56, "keyctl": 250}, "aarch64": {"clone": 220, "keyctl": 219}}
        self.calls = calls[os.uname().machine]
        self.obstacle = ""
        for number in range(1, signal.NSIG):
            try:
                signal.signal(number, signal.SIG_DFL)  # Python ignores SIGPIPE, and that would be inherited
            except (OSError, ValueError):  # those of the C library, SIGKILL and SIGSTOP
                continue
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def check(self, result: int, what: str) -> int:
        import ctypes

        if result < 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
        return result

    def prctl(self, option: int, first: int, second: int = 0) -> int:
        return self.check(self.libc.prctl(option, first, second, 0, 0), f"prctl {option}")

    def fork(self) -> int:
        """Fork a sibling: whoever started `serve` becomes the parent, and is told of the end."""
        flags = self.CLONE_PARENT | signal.SIGCHLD
        return self.check(self.libc.syscall(self.calls["clone"], flags, 0, 0, 0, 0), "fork")

    def serve(self) -> None:
        """Take connections from standard input until it ends. What commands are about never gets here: the next
        one's container might read it."""
        server = socket.socket(fileno=0)
        self.obstacle = self.find_obstacle()
        while True:
            _, descriptors = self.receive(server, 1)
            if not descriptors:
                return
            if self.fork() == 0:
                self.control = socket.socket(fileno=descriptors[0])
                self.enter()
            os.close(descriptors[0])

    def receive(self, connection: socket.socket, size: int) -> tuple[bytes, list[int]]:
        data, ancillary, _, _ = connection.recvmsg(size, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
        packed = ancillary[0][2] if ancillary else b""
        return data, [int.from_bytes(packed[at : at + 4], sys.byteorder) for at in range(0, len(packed), 4)]

    def say(self, message: str, descriptors: list[int] | None = None) -> None:
        packed = b"".join(number.to_bytes(4, sys.byteorder) for number in descriptors or [])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)] if packed else []
        try:
            self.control.sendmsg([message.encode(errors="replace")[:2000]], ancillary, socket.MSG_NOSIGNAL)
        except OSError:  # the plugin is gone, or has given the command up
            return

    def enter(self) -> None:
        """Do everything for one command, and never return."""
        status = 1
        try:
            self.say("helper")
            _, (plan_file, process) = self.receive(self.control, 100)
            with open(plan_file, "rb") as file:
                self.plan = marshal.load(file)
            self.prctl(self.PR_DUMPABLE, 0)  # nobody inside may look into what comes from outside
            filters = self.read_filters(self.plan["leader"]) if self.plan["has_seccomp"] else []
            self.check(self.libc.setns(process, self.plan["namespaces"]), "setns")
            self.check(self.libc.syscall(self.calls["keyctl"], 1, 0, 0, 0, 0), "keyctl")  # no keys of the host's
            user = self.find_user(self.plan["user"])
            self.become(user)
            self.open_stdio()
            self.confine(user[0], filters)
            if self.fork():
                os._exit(0)
            status, message = self.execute(user)
            self.say(f"failed {message}")
        except SystemExit as error:
            self.say(f"error {error}")
        except BaseException as error:
            self.say(f"error the command could not be started: {error}")
        os._exit(status)

    def find_obstacle(self) -> str:
        """Say why filters cannot be read on this host, "" when they can. Asked before a container has a say: of a
        process of ours, which has none that its parent does not have."""
        pid = self.check(self.libc.fork(), "fork")
        if pid == 0:
            self.prctl(self.PR_PDEATHSIG, signal.SIGKILL)
            while True:
                signal.pause()
        try:
            self.attach(pid, time.monotonic() + 10)
            self.libc.ptrace(self.PTRACE_GET_FILTER, pid, 0, None)
            reason = self.get_errno()
            return (
                ""
                if reason in (errno.EINVAL, errno.ENOENT)
                else f"PTRACE_SECCOMP_GET_FILTER: {os.strerror(reason)}"
            )
        except OSError as error:
            return f"ptrace: {error.strerror}"
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def get_errno(self) -> int:
        import ctypes

        return ctypes.get_errno()

    def read_filters(self, pid: int) -> list[bytes]:
        """Return the seccomp filters of a process, the oldest first (measured; ptrace(2) says the opposite). Stops
        it for some microseconds. A command has all of them, or there is none: whatever goes wrong is said."""
        import ctypes

        if self.obstacle:
            raise SystemExit(f"the seccomp filters of the payload cannot be read on this host: {self.obstacle}")
        filters: list[bytes] = []
        try:
            self.attach(pid, time.monotonic() + self.PATIENCE)
            while (length := self.libc.ptrace(self.PTRACE_GET_FILTER, pid, len(filters), None)) > 0:
                buffer = ctypes.create_string_buffer(8 * length)
                self.check(self.libc.ptrace(self.PTRACE_GET_FILTER, pid, len(filters), ctypes.addressof(buffer)),
                           "ptrace")  # fmt: skip
                filters.append(buffer.raw)
            if (
                self.get_errno() != errno.ENOENT or not filters
            ):  # ENOENT is what the kernel says after the last one
                raise OSError(self.get_errno(), os.strerror(self.get_errno()))
        except OSError as error:
            raise SystemExit(f"the seccomp filters of the payload cannot be read: {error.strerror}") from None
        finally:
            self.libc.ptrace(self.PTRACE_DETACH, pid, None, None)
        return filters

    def attach(self, pid: int, deadline: float) -> None:
        """Trace a process and wait until it has stopped. There can be one tracer: another command's entry soon
        gives way; one inside might want a command without filters, or that this waits for ever."""
        while self.libc.ptrace(self.PTRACE_SEIZE, pid, None, None) < 0:
            if self.get_errno() != errno.EPERM:
                raise OSError(self.get_errno(), os.strerror(self.get_errno()))
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "another process is tracing the container's first one")
            time.sleep(0.005)
        self.check(self.libc.ptrace(self.PTRACE_INTERRUPT, pid, None, None), "ptrace")
        while os.waitpid(pid, self.WALL | os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, "the container's first process does not stop for it")
            time.sleep(0.0002)

    def find_user(self, name: bytes) -> tuple[int, int, list[int], bytes]:
        """Return ids, further groups and home of a user by the container's own files."""
        if known := self.plan["account"]:
            return known["uid"], known["gid"], known["groups"], known["home"].encode()
        if name in (b"", b"root", b"0"):
            self.plan["user"] = b"root"
            return 0, 0, [], b"/root"
        for line in self.read(b"/etc/passwd").split(b"\n"):
            entry = line.split(b":")
            if len(entry) > 5 and name in (entry[0], entry[2]):
                groups = [line.split(b":") for line in self.read(b"/etc/group").split(b"\n")]
                # A user named by number gets none from nspawn either.
                further = [int(group[2]) for group in groups if len(group) > 3 and name in group[3].split(b",")]
                self.plan["user"] = entry[0]
                return int(entry[2]), int(entry[3]), further, entry[5]
        raise SystemExit(f'user: there is no user "{os.fsdecode(name)}" in the container\'s /etc/passwd')

    def read(self, path: bytes) -> bytes:
        """Read a file of the container, whatever may stand in its place."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                return file.read(self.MAX_FILE) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        except OSError:
            return b""

    def become(self, user: tuple[int, int, list[int], bytes]) -> None:
        """Take the payload's bounding set and the user's ids; what is permitted stays until `confine`."""
        number = 0
        while self.libc.prctl(self.PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
            if not self.plan["bounding"] >> number & 1:
                self.prctl(self.PR_CAPBSET_DROP, number)
            number += 1
        os.umask(0o022)  # nspawn's for its payload; systemd as the first process has taken 0 for itself
        self.libc.personality(self.plan["personality"])
        self.prctl(self.PR_KEEPCAPS, 1)
        os.setgroups(user[2])
        os.setresgid(user[1], user[1], user[1])
        os.setresuid(user[0], user[0], user[0])
        if user[0]:
            # Files are opened as the user. What is inheritable must be said while it is permitted.
            self.set_capabilities(0, self.CAP_SYS_ADMIN | self.plan["ambient"], self.plan["inheritable"])
        try:
            os.chdir(self.plan["directory"])
        except OSError as error:
            where = os.fsdecode(self.plan["directory"])
            raise SystemExit(f"working_directory: {where} in the container: {error.strerror}") from None

    def open_stdio(self) -> None:
        """Make the command's stdin, stdout and stderr, owned by its user, and hand the other ends out."""
        if self.plan["tty"]:
            ours, given = self.open_terminal()
        else:
            pipes = [os.pipe() for _ in range(2 if self.plan["merge"] else 3)]
            pipes += pipes[1:] if self.plan["merge"] else []
            ours = [pipes[0][0], pipes[1][1], pipes[2][1]]
            given = [pipes[0][1], *dict.fromkeys([pipes[1][0], pipes[2][0]])]
        self.say("stdio", given)
        if self.plan["tty"]:
            self.control.recv(100)  # the window has its size
        for number, descriptor in enumerate(ours):
            os.dup2(descriptor, number)
        control = self.control.fileno()
        os.closerange(3, control)
        os.closerange(control + 1, 1024)

    def open_terminal(self) -> tuple[list[int], list[int]]:
        """Open a terminal of the container's own. Nothing is resolved outside, and only a terminal will do."""
        try:
            master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            if os.fstat(master).st_rdev != os.makedev(5, 2):
                raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
            fcntl.ioctl(master, self.TIOCSPTLCK, bytes(4))
            slave = fcntl.ioctl(master, self.TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
        except OSError as error:
            raise SystemExit(f"no terminal can be opened in the container: {error.strerror}") from None
        return [slave] * 3, [master]

    def confine(self, uid: int, filters: list[bytes]) -> None:
        """Take the payload's filters, and its capabilities: after this nothing can be undone."""
        import ctypes

        ambient = self.plan["ambient"]
        rights = ambient if uid else self.plan["bounding"]
        inheritable = self.plan["inheritable"] | ambient  # a user's payload has none, until systemd 262
        needed = rights | self.CAP_SYS_ADMIN  # to install filters
        self.set_capabilities(needed, needed, inheritable)
        if self.plan["no_new_privs"]:
            self.prctl(self.PR_NO_NEW_PRIVS, 1)
        for program in filters:
            buffer = ctypes.create_string_buffer(program, len(program))
            packed = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
            self.prctl(self.PR_SECCOMP, 2, ctypes.addressof(ctypes.create_string_buffer(packed, len(packed))))
        self.set_capabilities(rights, rights, inheritable)
        for number in range(64):
            if ambient >> number & 1:
                self.check(self.libc.prctl(self.PR_CAP_AMBIENT, 2, number, 0, 0), "prctl")

    def set_capabilities(self, *sets: int) -> None:
        """Set the effective, permitted and inheritable ones."""
        words = [value >> shift & 0xFFFFFFFF for shift in (0, 32) for value in sets]
        header = struct.pack("Ii", 0x20080522, 0)
        self.check(self.libc.capset(header, struct.pack("6I", *words)), "capset")

    def execute(self, user: tuple[int, int, list[int], bytes]) -> tuple[int, str]:
        """Execute the command; return the status and words of a shell that cannot."""
        self.say("command")  # first of all: the plugin has to know of its child, whatever fails from here on
        os.setsid()
        if self.plan["tty"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        self.prctl(self.PR_PDEATHSIG, signal.SIGKILL)
        argv, name = self.plan["argv"], self.plan["argv"][0]
        login = self.plan["user"]
        env = {b"HOME": user[3], b"USER": login, b"LOGNAME": login, **self.plan["env"]}
        if self.plan["tty"]:
            env.setdefault(b"TERM", b"xterm")
        shown, search = os.fsdecode(name), env[b"PATH"]
        denied = ""
        for path in [name] if b"/" in name else [os.path.join(place, name) for place in search.split(b":")]:
            try:
                os.execve(path, argv, env)
            except (FileNotFoundError, NotADirectoryError):
                if os.path.lexists(path):
                    denied = f'"{os.fsdecode(path)}" in the container needs an interpreter that is not there'
            except OSError as error:
                denied = f'"{os.fsdecode(path)}" in the container cannot be executed: {error.strerror}'
        if denied:
            return 126, denied
        where = "in the container" if b"/" in name else f"in the container's PATH ({os.fsdecode(search)})"
        return 127, f'there is no "{shown}" {where}'


# =====================================================================================================
# Exec
#
# The plugin's side of a command: the helper, what it is told, and the command's streams and end.
# =====================================================================================================

# The helper's program: Entry, whose functions come compiled, in a file, and find the modules they name here. With
# those in C behind socket and signal it is there 10 ms sooner than with what stands around them.
HELPER = """
import errno, fcntl, marshal, os, stat, struct, sys, termios, time
import _signal as signal
import _socket as socket
with open(int(sys.argv[1]), "rb") as file:
    functions, constants = marshal.load(file)
function = type(lambda: None)
methods = {name: function(code, globals(), name, defaults) for name, (code, defaults) in functions.items()}
type("Entry", (), {**constants, **methods})().serve()
"""
# Arguments: mount points to make read-only, "--", then the command. Nobody else is in this mount namespace.
HELPER_MOUNTS = 'while [ "$1" != -- ]; do mount -o remount,bind,ro "$1" || exit; shift; done; shift; exec "$@"'
HELPER_PATIENCE = 30.0  # seconds without an exec after which the helper ends


def open_entry() -> int:
    """Return a file with Entry's functions and constants, for the same Python."""
    members = vars(Entry).items()
    functions = {name: (thing.__code__, thing.__defaults__) for name, thing in members if callable(thing)}
    constants = {name: thing for name, thing in members if isinstance(thing, int)}
    fd = os.memfd_create("entry")
    os.write(fd, marshal.dumps((functions, constants)))
    os.lseek(fd, 0, os.SEEK_SET)
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
        argv += [sys.executable, "-IS", "-c", HELPER, str(entry)]
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
CHUNK = 64 << 10  # bytes: what a pipe holds
MAX_REST = 256 << 10  # bytes read after the command's end: more than its pipe or terminal may hold by then


class Exec:
    """One command in a running container."""

    def __init__(
        self, helper: Helper, task: Task, command: Sequence[str], *, tty: bool = False, merge: bool = False
    ) -> None:
        """`merge`: stdout and stderr come as one."""
        if not command:
            raise ConfigError("command", list(command), "must name a program")
        if any("\0" in word for word in command):
            raise ConfigError("command", list(command), "must not hold a NUL character")
        self.helper, self.task, self.command, self.tty, self.merge = helper, task, command, tty, merge
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
        leader = self.task.state.leader
        process = leader.open() if leader else None
        if leader is None or process is None or self.task.ended.is_set():
            raise DriverError(f"task {self.task.state.task_id} has ended: nothing can be executed in it")
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
            if await run_apart(lambda: is_confined(leader.pid, self.task.state.mode)):
                with contextlib.suppress(OSError):  # it ends just now: the helper will tell
                    self.namespace = os.readlink(f"/proc/{leader.pid}/ns/pid")
                return
            if not leader.is_alive or self.is_given_up:
                raise DriverError(f"task {self.task.state.task_id} has ended")
            await asyncio.sleep(0.01)
        raise self.explain_silence("the container is still being set up")

    def follow(self, kind: str, text: str, descriptors: Sequence[int]) -> None:
        """Act on a message of the helper."""
        if kind == "stdio":
            self.take_stdio(descriptors)
        else:
            raise DriverError(text)

    def explain_silence(self, why: str = "") -> DriverError:
        if self.task.ended.is_set():
            return DriverError(f"task {self.task.state.task_id} has ended")
        why = why or f"its helper has ended {self.helper.read_errors()}".strip()
        return HostError(f"the command could not be started: {why}")

    async def brief(self, pid: int, leader: int, process: int) -> None:
        """Tell the helper's process what to do; it is in the container's cgroup from here on."""
        assert self.control
        if self.is_given_up:
            raise self.explain_silence()
        cgroup = self.task.state.cgroup
        try:
            status = read_status(leader)
            place_like(pid, leader, f"{cgroup}/payload" if cgroup else "")
            plan = {
                **plan_entry(status, read_inside(self.task.state.directory), self.command),
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
        while any(other.task is self.task for other in self.helper.entering):  # theirs will be known
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
        state = self.task.state
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


# =====================================================================================================
# Wire
#
# The protocol's messages and errors, to what stands above and back. grpc and nomad_pb are imported here and not
# above, so that whatever else starts from this file stays light.
# =====================================================================================================


def load_protocol() -> None:
    """Import gRPC and the protocol's modules as globals of this module."""
    global grpc, attribute_pb2, base_pb2, base_pb2_grpc, driver_pb2, driver_pb2_grpc
    global grpc_plugin_pb2, grpc_plugin_pb2_grpc, hcl_spec_pb2, health_pb2, health_pb2_grpc, recoverable_error_pb2
    global rpc_status_pb2
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # its fork handlers crash children (grpc#41768)
    os.environ["GRPC_VERBOSITY"] = "NONE"  # its C core writes to stderr by itself
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]  # asyncio does without: 12 ms and 4 MB less
    import grpc
    import grpc.aio

    from nomad_pb import (
        base_pb2,
        base_pb2_grpc,
        driver_pb2,
        driver_pb2_grpc,
        grpc_plugin_pb2,
        grpc_plugin_pb2_grpc,
        hcl_spec_pb2,
        health_pb2,
        health_pb2_grpc,
        recoverable_error_pb2,
        rpc_status_pb2,
    )


# UNAVAILABLE and CANCELLED are left out with care: Nomad takes them for the plugin's death and waits 3 s.
STATUS_CODES: tuple[tuple[type[DriverError], str], ...] = (
    (ConfigError, "INVALID_ARGUMENT"),
    (TaskNotFound, "NOT_FOUND"),
    (Unsupported, "UNIMPLEMENTED"),
    (HostError, "FAILED_PRECONDITION"),
    (TransientError, "FAILED_PRECONDITION"),
    (DriverError, "FAILED_PRECONDITION"),
)


async def abort(context: Any, error: DriverError) -> None:
    """End a call with an error as Nomad's client reads it: the text in the status, and whether to try again in
    the first detail of a google.rpc.Status in the trailing metadata."""
    code = next(getattr(grpc.StatusCode, name) for kind, name in STATUS_CODES if isinstance(error, kind))
    text = cut(str(error), 1500)  # some clients refuse metadata of more than 8 KiB, and this goes there twice
    status = rpc_status_pb2.Status(code=code.value[0], message=text)
    detail = status.details.add()
    detail.type_url = "type.googleapis.com/hashicorp.nomad.plugins.shared.structs.RecoverableError"
    detail.value = recoverable_error_pb2.RecoverableError(recoverable=error.recoverable).SerializeToString()
    metadata = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, text, trailing_metadata=metadata)


def as_driver_error(error: Exception) -> DriverError:
    """Pass what is meant for people; of anything else log the trace and say little."""
    if isinstance(error, DriverError):
        return error
    import traceback

    log.error("internal error", trace=traceback.format_exc())
    return DriverError(f"internal error of the driver, see the agent's log: {error}")


def answers(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any, Any], Awaitable[Any]]:
    """Make a coroutine that takes a request into a gRPC handler."""

    @functools.wraps(method)
    async def handler(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request)
        except Exception as error:
            failure = as_driver_error(error)
        await abort(context, failure)

    return handler


def streams(
    method: Callable[[Any, Any], AsyncIterator[Any]],
) -> Callable[[Any, Any, Any], AsyncIterator[Any]]:
    """Make an asynchronous generator that takes a request into a gRPC handler."""

    @functools.wraps(method)
    async def handler(self: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in method(self, request):
                yield response
            return
        except Exception as error:
            failure = as_driver_error(error)
        await abort(context, failure)

    return handler


def render_spec(options: Sequence[Option]) -> hcl_spec_pb2.Spec:
    """Return the options as the schema Nomad checks jobs against.

    Defaults are ours to fill in: what a job does not say arrives as nil.
    """
    spec = hcl_spec_pb2.Spec()
    spec.object.SetInParent()
    for option in options:
        for name in option.names:
            entry = spec.object.attributes[name]
            if option.kind.is_block:
                block = entry.block_value if option.kind is Kind.BLOCK else entry.block_list
                block.name = name
                block.nested.CopyFrom(render_spec(option.fields))
            else:
                entry.Attr.name, entry.Attr.type = name, option.kind.value
                entry.Attr.required = option.required
    return spec


def unpack_options(packed: bytes) -> Mapping[str, object]:
    """Decode a msgpack map of options, {} from nothing."""
    import msgpack

    if not packed:
        return {}
    try:
        raw = msgpack.unpackb(packed, raw=False, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):  # TypeError: a list as a key
        raise DriverError("the configuration cannot be read: it is no msgpack") from None
    if not isinstance(raw, dict):
        raise DriverError("the configuration is no map")
    return raw


def read_task_config(task: driver_pb2.TaskConfig) -> TaskConfig:
    return TaskConfig(
        id=task.id,
        name=task.name,
        alloc_id=task.alloc_id,
        alloc_dir=task.alloc_dir,
        options=unpack_options(task.msgpack_driver_config),
        user=task.user,
        env=dict(task.env),
        stdout_path=task.stdout_path,
        stderr_path=task.stderr_path,
        cgroup=task.resources.linux_resources.cpuset_cgroup,
        resources=read_resources(task.resources),
        network=read_group_network(task),
        mounts=tuple(
            Mount(mount.host_path, mount.task_path, mount.readonly, mount.propagation_mode)
            for mount in task.mounts
        ),
        devices=tuple(
            Device(device.host_path, device.task_path, re.sub("[^rwm]", "", device.cgroup_permissions) or "rwm")
            for device in task.devices
        ),
    )


def read_resources(resources: driver_pb2.Resources) -> Resources:
    """Agents before 1.1 send no memory_max; with -1, for any, some add to it what secrets take."""
    linux, memory = resources.linux_resources, resources.allocated_resources.memory
    most = None if memory.memory_max_mb < 0 else memory.memory_max_mb * MIB
    return Resources(
        memory=memory.memory_mb * MIB or linux.memory_limit_bytes,
        memory_max=most,
        cpu=linux.cpu_shares,
        cpu_fraction=linux.PercentTicks,
        cores=linux.cpuset_cpus,
    )


def read_group_network(task: driver_pb2.TaskConfig) -> GroupNetwork:
    ports = {
        port.label: Port(port.value, host_ip=network.ip)
        for network in task.resources.allocated_resources.networks
        for port in [*network.reserved_ports, *network.dynamic_ports]
    }
    ports |= {port.label: Port(port.value, port.to, port.host_ip) for port in task.resources.ports}
    spec = task.network_isolation_spec
    is_group = spec.mode == driver_pb2.NetworkIsolationSpec.GROUP
    dns = Dns(tuple(task.dns.servers), tuple(task.dns.searches), tuple(task.dns.options))
    return GroupNetwork(spec.path if is_group else "", ports, dns)


# =====================================================================================================
# Services
#
# What Nomad's agent calls, in the order of the proto files, each method thin. One thread: every method is a
# coroutine, and ends when its client goes away.
# =====================================================================================================


class BaseService:
    """hashicorp.nomad.plugins.base.proto.BasePlugin"""

    def __init__(self, driver: DriverService) -> None:
        self.driver = driver

    @answers
    async def PluginInfo(self, request: Any) -> base_pb2.PluginInfoResponse:
        return base_pb2.PluginInfoResponse(
            type=base_pb2.DRIVER,
            plugin_api_versions=["v0.1.0"],
            plugin_version=__version__,
            name=PLUGIN_NAME,
        )

    @answers
    async def ConfigSchema(self, request: Any) -> base_pb2.ConfigSchemaResponse:
        return base_pb2.ConfigSchemaResponse(spec=render_spec(PLUGIN_OPTIONS))

    @answers
    async def SetConfig(self, request: base_pb2.SetConfigRequest) -> base_pb2.SetConfigResponse:
        """Takes the plugin block. The agent calls it in throw-away processes too, while another process may be
        looking after running tasks: so it never touches anything on the machine."""
        self.driver.config = decode_options(PLUGIN_OPTIONS, unpack_options(request.msgpack_config))
        if request.HasField("nomad_config") and request.nomad_config.driver.HasField("Topology"):
            self.driver.core_mhz = read_core_mhz(request.nomad_config.driver.Topology)
        return base_pb2.SetConfigResponse()


def read_core_mhz(topology: base_pb2.ClientTopology) -> float:
    """Return the mean speed of a core, 0 when the topology does not say."""
    if not topology.cores:
        return 0.0
    total = topology.override_total_compute or sum(
        core.base_speed or core.max_speed or core.guess_speed for core in topology.cores
    )
    return total / len(topology.cores)


def read_cpu_mhz() -> float:
    """Return the mean speed of a core as the kernel has it, for agents before 1.7."""
    speeds = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", read_text(Path("/proc/cpuinfo")), re.MULTILINE)
    return sum(map(float, speeds)) / len(speeds) if speeds else 1000.0


COLLECTION_DELAY = 86400.0  # seconds
FIRST_SAMPLE = 0.2  # seconds: the least time over which a use of CPU can be told


class DriverService:
    """hashicorp.nomad.plugins.drivers.proto.Driver"""

    def __init__(self) -> None:
        self.config: dict[str, Any] = decode_options(PLUGIN_OPTIONS, {})
        self.core_mhz = 0.0
        self.alloc_dirs: set[str] = set()
        self.agents = 0  # connected ones, counted by their Fingerprint streams
        self.events = Events()
        self.tasks = Tasks(self.events)
        self.starts: dict[str, asyncio.Task[tuple[Task, NetworkPlan]]] = {}  # under way, by the tasks' ids
        self.helper = Helper()
        self.fetches = Fetches(Store())

    @answers
    async def TaskConfigSchema(self, request: Any) -> driver_pb2.TaskConfigSchemaResponse:
        return driver_pb2.TaskConfigSchemaResponse(spec=render_spec(TASK_OPTIONS))

    @answers
    async def Capabilities(self, request: Any) -> driver_pb2.CapabilitiesResponse:
        capabilities = driver_pb2.DriverCapabilities(
            send_signals=True,
            exec=True,
            fs_isolation=driver_pb2.DriverCapabilities.IMAGE,
            network_isolation_modes=[driver_pb2.NetworkIsolationSpec.HOST, driver_pb2.NetworkIsolationSpec.GROUP],
            mount_configs=driver_pb2.DriverCapabilities.ANY_MOUNTS
            if self.config["volumes"]
            else driver_pb2.DriverCapabilities.NO_MOUNTS,
            disable_log_collection=self.config["disable_log_collection"],
        )
        return driver_pb2.CapabilitiesResponse(capabilities=capabilities)

    @answers
    async def Init(self, request: Any) -> driver_pb2.InitResponse:
        """Called by Nomad 2.0.4 and later before the streams; also after it has found a running plugin again."""
        return driver_pb2.InitResponse()

    @streams
    async def Fingerprint(self, request: Any) -> AsyncIterator[driver_pb2.FingerprintResponse]:
        """Never ends: the agent would open it again at once, without any delay."""
        last = None
        self.agents += 1
        try:
            while True:
                current = self.render_fingerprint(replace(read_host(), open_places=self.find_open_places()))
                if current != last:
                    yield current
                    last = current
                self.tasks.remind_machined()
                await asyncio.sleep(FINGERPRINT_PERIOD)
                # A process may have held one a moment longer than its task was there.
                await run_apart(lambda: remove_stale_locks(None))
                self.collect_images()
        finally:
            self.agents -= 1

    def find_open_places(self) -> tuple[str, ...]:
        """Return where tasks write and other users of this machine can get to, of `image_dir` and the client's
        alloc_dir. The latter is known once there has been a task."""
        self.alloc_dirs |= find_alloc_dirs(task.state for task in self.tasks.known.values())
        return tuple(filter(is_open_to_others, sorted({self.config["image_dir"], *self.alloc_dirs})))

    def render_fingerprint(self, host: Host) -> driver_pb2.FingerprintResponse:
        response = driver_pb2.FingerprintResponse()
        if not self.config["enabled"]:
            response.health_description = "disabled: enabled = false in the plugin's block"
            return response
        healthy = driver_pb2.FingerprintResponse.HEALTHY
        response.health = healthy if host.is_healthy else driver_pb2.FingerprintResponse.UNHEALTHY
        response.health_description = host.sentence
        for name, value in self.find_attributes(host).items():
            kind = {bool: "bool_val", int: "int_val", str: "string_val"}[type(value)]
            setattr(response.attributes[f"driver.{PLUGIN_NAME}{name}"], kind, value)
        return response

    def find_attributes(self, host: Host) -> dict[str, bool | int | str]:
        """Return what jobs can be constrained by, by the ends of the attributes' names."""
        image_dir = os.path.realpath(self.config["image_dir"])
        return {
            "": True,
            ".version": __version__,
            ".systemd": host.systemd,
            ".cgroups": host.cgroups.value,
            ".limits": ",".join(host.limits),
            ".user_namespaces": read_number("/proc/sys/user/max_user_namespaces") > 0,
            ".idmap": host.kernel >= OVERLAY_IDMAP and read_mounts().have_idmap(image_dir, host.kernel),
            ".machined": have_machined(),
            ".networkd": have_networkd(),
            ".volumes": self.config["volumes"],
            ".device_policy": host.has_device_policy,
            ".allow": ",".join(self.config["allow"]),
        }

    @answers
    async def RecoverTask(self, request: driver_pb2.RecoverTaskRequest) -> driver_pb2.RecoverTaskResponse:
        """Answers at once: it is called one by one while the agent starts, and also for tasks long gone."""
        task_id = request.task_id or request.handle.config.id  # the agent leaves task_id empty
        await self.tasks.recover(task_id, request.handle.driver_state)
        return driver_pb2.RecoverTaskResponse()

    @answers
    async def StartTask(self, request: driver_pb2.StartTaskRequest) -> driver_pb2.StartTaskResponse:
        config = read_task_config(request.task)
        if config.id in self.tasks.known and not self.tasks.known[config.id].ended.is_set():
            raise DriverError(f"task {config.id} is running already")
        if not self.config["enabled"]:
            raise HostError("the driver is switched off on this client: its plugin block has enabled = false")
        host = read_host()
        if not host.is_healthy:
            raise HostError(host.sentence)
        if config.mounts and not self.config["volumes"]:
            rule = "volumes are switched off on this client"
            raise ConfigError(
                "volume_mount", config.mounts[0].target, rule, "set volumes = true in the plugin block"
            )
        task, network = await self.run_start(config, host)
        override = await self.find_override(task, network)
        handle = driver_pb2.TaskHandle(
            version=STATE_VERSION,
            config=request.task,
            state=driver_pb2.RUNNING,
            driver_state=task.state.render().encode(),
        )
        return driver_pb2.StartTaskResponse(
            result=driver_pb2.StartTaskResponse.SUCCESS, handle=handle, network_override=override
        )

    async def find_override(self, task: Task, network: NetworkPlan) -> driver_pb2.NetworkOverride | None:
        """Return what services with `address_mode = "driver"` are registered under, None without an address. A
        container on a network of the outside whose ports are not mapped is registered so with "auto", too."""
        if not network.mode.has_address:
            return None
        address = await task.find_address(network.address_timeout)
        task.teller = asyncio.create_task(task.tell_address(network.mode))
        if not address:
            return None
        return driver_pb2.NetworkOverride(
            addr=address,
            port_map={label: port.inside for label, port in network.ports.items()},
            auto_advertise=network.mode.is_outside and not network.ports,
        )

    async def run_start(self, config: TaskConfig, host: Host) -> tuple[Task, NetworkPlan]:
        """Start a task. It ends with the call, and with one that stops or destroys the task or starts it anew."""
        await self.stop_start(config.id)
        start = self.starts[config.id] = asyncio.create_task(self.start_task(config, host))
        try:
            return await start
        except asyncio.CancelledError:
            if self.starts.get(config.id) is start:  # the call itself was cancelled
                raise
            raise DriverError(f"task {config.id} was stopped while it was being started") from None
        finally:
            if self.starts.get(config.id) is start:
                del self.starts[config.id]

    async def stop_start(self, task_id: str) -> None:
        """End a start that is under way, and wait until nothing is left of it: neither a fetch nor a container."""
        start = self.starts.pop(task_id, None)
        if start:
            start.cancel()
            await asyncio.wait([start])

    async def start_task(self, config: TaskConfig, host: Host) -> tuple[Task, NetworkPlan]:
        is_in_group = bool(config.network.namespace)
        values = settle_values(decode_options(TASK_OPTIONS, config.options), self.config, is_in_group=is_in_group)
        check_gates(values, self.config, is_in_group=is_in_group)
        if is_in_group:
            check_namespace(config.network.namespace)
        check_interfaces(values)
        with contextlib.ExitStack() as stack:
            directories = stack.enter_context(open_directories(config.alloc_dir, config.directory_names))
            own = {name: directories[path] for name, path in config.own_directories.items()}
            image = await self.find_image(config, values, own, stack)
            check_image_write(image, values, self.config)
            values = apply_image(values, image, config.user)
            targets = [mount.target for mount in config.mounts]
            account = await run_apart(lambda: find_account(image, values, targets))
            sources = stack.enter_context(open_sources(values, own, self.config))
            volumes = stack.enter_context(open_volumes(mount.source for mount in config.mounts))
            devices = stack.enter_context(open_devices([*name_devices(values), *config.devices]))
            found = Found(
                image=image,
                mounts=read_mounts(),
                sources=sources,
                credentials=read_credentials(values, sources),
                names=read_names(config.network, image, values),
                devices=devices,
                device_rules=tuple(find_device_rules(config, values, sources, volumes, devices)),
                directories={**directories, **volumes},
                ephemeral_dir=self.config["ephemeral_dir"] or "",
                account=account,
                journal_obstacle=find_journal_obstacle(config),
            )
            plan = plan_task(config, values, host, found)
            for note in (f"Starting the container {plan.machine} from {image.label or image.path}.", *plan.notes):
                self.events.emit(config, note)
            return await self.tasks.start(plan, config, directories), plan.network

    async def find_image(
        self, config: TaskConfig, values: Values, own: Mapping[str, Source], stack: contextlib.ExitStack
    ) -> Image:
        """Return the task's image, fetched if need be, and open until the end of `stack`. One of the store is kept
        from collection by the start that asks for it, and from its end on by the task's use."""
        task_dir = Path(config.task_dir) if config.alloc_dir else None
        image_dir = Path(self.config["image_dir"])
        origin = plan_origin(values, image_dir)
        if origin is None:
            try:
                found = find_image(values["image"], task_dir, values, image_dir)
            except ConfigError:
                check_image_name(values["image"], own, self.config)
                raise
            image = stack.enter_context(open_image(found, values["image"], own, self.config))
            origin = find_archive(image)
            if origin is None:
                return image
        if origin.type == "raw":
            check_gate("image_download.type", "raw", Gate.DISK_IMAGES, self.config)
        settings = plan_fetching(self.config)
        stored, kept = await self.fetches.provide(origin, settings, functools.partial(self.events.emit, config))
        start = asyncio.current_task()
        assert start
        start.add_done_callback(lambda _: os.close(kept))
        image = self.fetches.store.find(stored)
        if not image.layers and stored.type != "docker":
            check_tree(image.path, values["image"], values)
        return image

    @answers
    async def WaitTask(self, request: driver_pb2.WaitTaskRequest) -> driver_pb2.WaitTaskResponse:
        exit = await self.tasks.get(request.task_id).wait()
        assert exit is not None
        return driver_pb2.WaitTaskResponse(result=render_result(exit), err=render_line(exit.error))

    @answers
    async def StopTask(self, request: driver_pb2.StopTaskRequest) -> driver_pb2.StopTaskResponse:
        """An unknown task is a stopped one: the agent would repeat the call for minutes."""
        await self.stop_start(request.task_id)
        task = self.tasks.known.get(request.task_id)
        if task:
            await task.stop(request.signal, request.timeout.ToNanoseconds() / 1e9)
        return driver_pb2.StopTaskResponse()

    @answers
    async def DestroyTask(self, request: driver_pb2.DestroyTaskRequest) -> driver_pb2.DestroyTaskResponse:
        await self.stop_start(request.task_id)
        task = self.tasks.known.get(request.task_id)
        if task and not task.ended.is_set() and not request.force:
            raise DriverError(f"task {request.task_id} is still running; stop it first, or destroy it with force")
        await self.tasks.destroy(request.task_id)
        if task:
            await self.tasks.machined.settle(task.state.machine)
        self.collect_images()
        return driver_pb2.DestroyTaskResponse()

    def collect_images(self) -> None:
        if self.config["image_gc"]:
            delay = self.config["image_gc_delay"]
            self.fetches.collect(COLLECTION_DELAY if delay is None else delay)

    @answers
    async def InspectTask(self, request: driver_pb2.InspectTaskRequest) -> driver_pb2.InspectTaskResponse:
        """Both times and the result are always set: Nomad's client panics without them."""
        task = self.tasks.get(request.task_id)
        exit = task.exit or Exit(0)
        status = driver_pb2.TaskStatus(
            id=task.state.task_id,
            name=task.state.machine,
            state=driver_pb2.EXITED if task.exit else driver_pb2.RUNNING,
            result=render_result(exit),
        )
        status.started_at.FromNanoseconds(int(task.state.started_at * 1e9))
        status.completed_at.FromNanoseconds(int(exit.at * 1e9))
        driver = driver_pb2.TaskDriverStatus(attributes={"machine": task.state.machine})
        return driver_pb2.InspectTaskResponse(task=status, driver=driver)

    @streams
    async def TaskStats(self, request: driver_pb2.TaskStatsRequest) -> AsyncIterator[driver_pb2.TaskStatsResponse]:
        task = self.tasks.get(request.task_id)
        interval = max(request.collection_interval.ToNanoseconds() / 1e9, 0.1)
        before = await task.find_usage()
        pause = min(interval, FIRST_SAMPLE)  # Nomad's own drivers send the first one at once
        while not await task.wait(pause):
            now = await task.find_usage()
            yield self.render_stats(task, before, now)
            before, pause = now, interval

    def render_stats(self, task: Task, before: Usage, now: Usage) -> driver_pb2.TaskStatsResponse:
        """Return a sample. TOTAL_TICKS is not among the measured fields: the CLI has a column title for it, but
        no value."""
        elapsed = max(now.at - before.at, 1e-3)
        user = max(now.user - before.user, 0.0) / elapsed * 100
        system = max(now.system - before.system, 0.0) / elapsed * 100
        response = driver_pb2.TaskStatsResponse()
        stats = response.stats
        stats.id = task.state.task_id
        stats.timestamp.GetCurrentTime()
        cpu = stats.agg_resource_usage.cpu
        cpu.user_mode, cpu.system_mode, cpu.percent = user, system, user + system
        cpu.total_ticks = (user + system) / 100 * (self.core_mhz or read_cpu_mhz())
        cpu.throttled_periods, cpu.throttled_time = now.throttled_periods, now.throttled_time
        fields = driver_pb2.CPUUsage
        cpu.measured_fields.extend([fields.SYSTEM_MODE, fields.USER_MODE, fields.PERCENT])
        memory = stats.agg_resource_usage.memory
        memory.rss, memory.usage = now.rss, now.usage
        memory.measured_fields.extend([driver_pb2.MemoryUsage.RSS, driver_pb2.MemoryUsage.USAGE])
        if now.is_cgroup:
            cpu.measured_fields.extend([fields.THROTTLED_PERIODS, fields.THROTTLED_TIME])
            memory.cache, memory.swap, memory.max_usage = now.cache, now.swap, now.peak
            memory.measured_fields.extend(
                [driver_pb2.MemoryUsage.CACHE, driver_pb2.MemoryUsage.SWAP, driver_pb2.MemoryUsage.MAX_USAGE]
            )
        return response

    @streams
    async def TaskEvents(self, request: Any) -> AsyncIterator[driver_pb2.DriverTaskEvent]:
        """Never ends, as Fingerprint."""
        with self.events.subscribe() as queue:
            while True:
                event = await queue.get()
                alloc_id, task_name = split_id(event.task_id)
                response = driver_pb2.DriverTaskEvent(
                    task_id=event.task_id, alloc_id=alloc_id, task_name=task_name, message=event.message
                )
                response.timestamp.FromNanoseconds(int(event.at * 1e9))
                yield response

    @answers
    async def SignalTask(self, request: driver_pb2.SignalTaskRequest) -> driver_pb2.SignalTaskResponse:
        number = parse_signal(request.signal)
        task = self.tasks.get(request.task_id)
        if task.ended.is_set():
            raise DriverError(f"task {request.task_id} has ended, there is nothing to signal")
        await task.send(number)
        return driver_pb2.SignalTaskResponse()

    @answers
    async def ExecTask(self, request: driver_pb2.ExecTaskRequest) -> driver_pb2.ExecTaskResponse:
        """For script checks: they read stdout only, so that stderr goes there too, and want the end of it."""
        run = Exec(self.helper, self.tasks.get(request.task_id), request.command, merge=True)
        timeout = request.timeout.ToNanoseconds() / 1e9
        output, status = bytearray(), -int(signal.SIGKILL)

        async def collect() -> int:
            await run.start()
            await run.end_stdin()
            async for data in run.read("stdout"):
                output.extend(data)
                del output[:-MAX_CHECK_OUTPUT]
            return await run.wait()

        try:
            status = await asyncio.wait_for(collect(), timeout if timeout > 0 else None)
        except asyncio.TimeoutError:
            if run.pid:
                await run.kill()
            run.error = f"killed: it did not end within its timeout of {timeout:g} s"
        finally:
            run.close()
        if run.error:
            output.extend(f"{run.error}\n".encode())
        return driver_pb2.ExecTaskResponse(stdout=bytes(output[-MAX_CHECK_OUTPUT:]), result=render_code(status))

    async def ExecTaskStreaming(self, requests: AsyncIterator[Any], context: Any) -> None:
        try:
            first = await anext(aiter(requests), None)
            if first is None or not first.HasField("setup"):
                raise DriverError("the first message of an exec must be its setup")
            setup, task = first.setup, self.tasks.get(first.setup.task_id)
            await stream_exec(Exec(self.helper, task, setup.command, tty=setup.tty), requests, context)
            return
        except Exception as error:
            failure = as_driver_error(error)
        # A client that finds "closed" in an error takes it for its own end, and shows nothing at all.
        await abort(context, DriverError(re.sub("(?i)closed", "clos-ed", str(failure))))

    @answers
    async def CreateNetwork(self, request: Any) -> driver_pb2.CreateNetworkResponse:
        raise Unsupported("the nspawn driver makes no networks for groups: Nomad does")

    @answers
    async def DestroyNetwork(self, request: Any) -> driver_pb2.DestroyNetworkResponse:
        raise Unsupported("the nspawn driver makes no networks for groups: Nomad does")

    @answers
    async def Shutdown(self, request: Any) -> driver_pb2.ShutdownResponse:
        """Called by Nomad 2.0.4 and later before the controller's Shutdown; tasks are not concerned."""
        return driver_pb2.ShutdownResponse()


def render_result(exit: Exit) -> driver_pb2.ExitResult:
    return driver_pb2.ExitResult(exit_code=exit.code, signal=exit.signal, oom_killed=exit.oom_killed)


MAX_CHECK_OUTPUT = 4096  # bytes of a check's output that Nomad keeps


def render_code(status: int) -> driver_pb2.ExitResult:
    """Return a command's end; `status` is minus the signal's number where one has ended it."""
    return driver_pb2.ExitResult(exit_code=status if status >= 0 else 128 - status, signal=max(-status, 0))


async def stream_exec(run: Exec, requests: AsyncIterator[Any], context: Any) -> None:
    """Pass everything between a client and a command. The client never ends its side: the command does."""
    response = driver_pb2.ExecTaskStreamingResponse
    writing = asyncio.Lock()  # one message at a time; while the client takes none, nothing is read either

    async def send(name: str, data: bytes) -> None:
        operation = driver_pb2.ExecTaskStreamingIOOperation(data=data)
        async with writing:
            is_error = name == "stderr"
            await context.write(response(stderr=operation) if is_error else response(stdout=operation))

    async def pass_output(name: str) -> None:
        async for data in run.read(name):
            await send(name, data)

    helpers = [asyncio.create_task(pass_input(run, requests))]
    try:
        await run.start()
        helpers += [asyncio.create_task(pass_output(name)) for name in run.outputs]
        await asyncio.gather(*helpers[1:])
        status = await run.wait()
        if run.error:
            name, end = ("stdout", "\r\n") if run.tty else ("stderr", "\n")
            await send(name, f"{run.error}{end}".encode())
        await context.write(response(exited=True, result=render_code(status)))
    finally:
        await settle(helpers)
        run.close()


async def pass_input(run: Exec, requests: AsyncIterator[Any]) -> None:
    async for request in requests:  # an empty one is a heartbeat
        if request.HasField("tty_size"):
            run.resize(request.tty_size.height, request.tty_size.width)
        if request.HasField("stdin"):
            await run.started.wait()
            await run.write(request.stdin.data)
            if request.stdin.close:
                await run.end_stdin()


class HealthService:
    """grpc.health.v1.Health, for the service "plugin"."""

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", "plugin"):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        await asyncio.Event().wait()


class PluginService:
    """go-plugin's own services: controller, broker and stdio."""

    def __init__(self, stop: asyncio.Event) -> None:
        self.stop = stop

    async def Shutdown(self, request: Any, context: Any) -> grpc_plugin_pb2.Empty:
        """The agent gives the process two seconds from here."""
        self.stop.set()
        return grpc_plugin_pb2.Empty()

    async def StartStream(self, requests: AsyncIterator[Any], context: Any) -> None:
        """The broker: opened by every client, used by none of Nomad's."""
        async for _ in requests:
            pass

    async def StreamStdio(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Nomad throws away what comes here; it only has to stay open."""
        await asyncio.Event().wait()
        yield


# =====================================================================================================
# Server
#
# The plugin as a process: its socket, its handshake, its end.
# =====================================================================================================


def register(server: Any, driver: DriverService, stop: asyncio.Event) -> None:
    plugin: Any = PluginService(stop)
    services: list[tuple[Any, Any]] = [
        (base_pb2_grpc.add_BasePluginServicer_to_server, BaseService(driver)),
        (driver_pb2_grpc.add_DriverServicer_to_server, driver),
        (health_pb2_grpc.add_HealthServicer_to_server, HealthService()),
        (grpc_plugin_pb2_grpc.add_GRPCControllerServicer_to_server, plugin),
        (grpc_plugin_pb2_grpc.add_GRPCBrokerServicer_to_server, plugin),
        (grpc_plugin_pb2_grpc.add_GRPCStdioServicer_to_server, plugin),
    ]
    for add, service in services:
        add(service, server)
    server.add_generic_rpc_handlers(render_old_services(plugin))


def render_old_services(plugin: Any) -> list[grpc.GenericRpcHandler]:
    """Return controller and broker under the names that Nomad 0.10.0 and 0.10.1 call them by. The messages are the
    same on the wire."""
    empty, connection = grpc_plugin_pb2.Empty, grpc_plugin_pb2.ConnInfo
    methods: dict[str, dict[str, Any]] = {
        "proto.GRPCController": {
            "Shutdown": grpc.unary_unary_rpc_method_handler(
                plugin.Shutdown, empty.FromString, empty.SerializeToString
            )
        },
        "proto.GRPCBroker": {
            "StartStream": grpc.stream_stream_rpc_method_handler(
                plugin.StartStream, connection.FromString, connection.SerializeToString
            )
        },
    }
    return [grpc.method_handlers_generic_handler(name, handlers) for name, handlers in methods.items()]


MAX_SOCKET_PATH = 107  # bytes in a sockaddr_un, without the final NUL


def make_socket_directory() -> Path:
    """Make a directory of this process's own for its socket; remove those that dead processes have left.

    Not in /tmp if it can be helped: tidying there would cut a reattaching agent off.
    """
    name = f"plugin-{os.getpid()}-{os.urandom(4).hex()}"
    for base in (os.environ.get("PLUGIN_UNIX_SOCKET_DIR"), STATE_ROOT, os.environ.get("TMPDIR"), "/tmp"):
        if not base or len(f"{base}/{name}/s".encode()) > MAX_SOCKET_PATH:
            continue
        with contextlib.suppress(OSError):
            if Path(base) == STATE_ROOT:
                STATE_ROOT.mkdir(mode=0o700, exist_ok=True)
                remove_dead_sockets()
            path = Path(base, name)
            path.mkdir(mode=0o700)
            return path
    raise HostError("no directory for the plugin's socket: tried PLUGIN_UNIX_SOCKET_DIR, /run, TMPDIR and /tmp")


def remove_dead_sockets() -> None:
    for path in STATE_ROOT.glob("plugin-*-*"):
        if not Path("/proc", path.name.split("-")[1]).exists():
            remove_tree(path)


async def serve() -> None:
    """Be a plugin until the agent says Shutdown, or SIGTERM comes."""
    logging.getLogger().addHandler(LibraryLog())
    driver, stop = DriverService(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    for ignored in (signal.SIGINT, signal.SIGHUP):  # meant for the agent; tasks are ended by calls only
        loop.add_signal_handler(ignored, lambda: None)  # SIG_IGN would be passed on to children
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.http2.max_ping_strikes", 0),
        ]
    )
    register(server, driver, stop)
    directory = make_socket_directory()
    address = f"{directory}/s"
    try:
        server.add_insecure_port(f"unix:{address}")
        os.chmod(address, 0o600)
        await server.start()
        write_handshake(address)
        watcher = asyncio.create_task(watch_agent(driver, stop))
        await stop.wait()
        watcher.cancel()
        await server.stop(0.2)  # seconds for answers under way, the one to Shutdown among them
        if driver.starts:  # their calls are cancelled by now: they remove what they have made
            await asyncio.wait(driver.starts.values(), timeout=1.5)
    finally:
        remove_tree(directory)


def write_handshake(address: str) -> None:
    """Print go-plugin's line, and nothing to stdout ever after: the agent stops reading at a long line."""
    os.write(1, f"1|2|unix|{address}|grpc|\n".encode())
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


ORPHAN_PERIOD = 300.0  # seconds


async def watch_agent(driver: DriverService, stop: asyncio.Event) -> None:
    """End the plugin some minutes after its agent has died, unless tasks run or another agent has found it.

    With tasks it stays for the next agent to reattach: some agents (before 1.9.2) kill the process number they
    remember, whatever process that is by then.
    """
    with contextlib.suppress(OSError):  # stderr may be a terminal or a file
        if not stat.S_ISFIFO(os.fstat(2).st_mode):
            return
    await wait_readable(2)  # a pipe's writing end becomes "readable" when its reader is gone
    while True:
        await asyncio.sleep(ORPHAN_PERIOD)
        if not driver.agents and all(task.ended.is_set() for task in driver.tasks.known.values()):
            stop.set()


# =====================================================================================================
# Main
#
# The agent starts the file without arguments and with a cookie in the environment: then it is a plugin.
# Everything else is for people.
# =====================================================================================================

COOKIE = ("NOMAD_PLUGIN_MAGIC_COOKIE", "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255")

USAGE = f"""\
{FILE_NAME} {__version__}: runs Nomad tasks as systemd-nspawn containers

This file is a plugin: the Nomad agent starts it. Put it into the agent's plugin_dir and add to the agent's
configuration:

    plugin "{FILE_NAME}" {{
      config {{ }}
    }}

For a quick try: nomad agent -dev -plugin-dir=DIRECTORY -config=FILE

usage: {FILE_NAME} [check | images | options | --version | --help]

    check      tell whether tasks can run on this machine, what is missing, and what jobs may do to it
    images     list the images that were fetched: their sizes and ages, and the tasks that use them
    options    print the reference of all options, in Markdown
"""


STRICT_BLOCK = f"""\
plugin "{FILE_NAME}" {{
  config {{
    allow       = []    # nothing that opens the host
    allow_caps  = []    # no capabilities beside the usual ones
    allow_paths = []    # no path of the host
    volumes     = false # nor Nomad's volumes
  }}
}}
"""
USUAL_ALLOC_DIRS = ("/opt/nomad/data/alloc", "/var/lib/nomad/alloc")  # of HashiCorp's package, and of Debian's


def render_permissions() -> str:
    """Return what jobs may do to this host, a line a permission, for people."""
    lines = ["What jobs may do to this host with an empty plugin block (!: who may has the host):"]
    for gate, permission in PERMISSIONS.items():
        mark = "!" if permission.gives_host else " "
        answer = "yes" if permission.is_default else "no"
        lines.append(f"  {answer:<3} {mark} {gate.value:<20} {permission.meaning}")
    lines += ["To allow none of it, and then add what is needed:", "", STRICT_BLOCK]
    return "\n".join(lines)


def check_host() -> int:
    """Print what the fingerprint would say, and what jobs may do; 0 when tasks can run here."""
    host = read_host()
    print(f"systemd-nspawn {host.systemd or 'not found'}, Linux {host.kernel[0]}.{host.kernel[1]}, "
          f"cgroups {host.cgroups.value}")  # fmt: skip
    for problem in host.problems:
        print(f"missing: {problem}")
    if host.cgroups is not CgroupMode.V2:
        print("note: without cgroup v2 tasks run without resource limits.")
    for place in sorted({str(MACHINES_ROOT), *USUAL_ALLOC_DIRS, *find_alloc_dirs(read_states())}):
        if is_open_to_others(place):
            print(f"note: {explain_open_place(place).strip('()')}.")
    print("tasks cannot run here" if host.problems else "tasks can run here")
    print(f"\n{render_permissions()}", end="")
    return 1 if host.problems else 0


def render_images(store: Store, now: float) -> str:
    """Return a table of what is in the store, for people."""
    uses = store.read_uses()
    rows = [("IMAGE", "TYPE", "SIZE", "FETCHED", "LAST USE", "USED BY")]
    for image in store.read_all():
        tasks = [use.task_id.rpartition("/")[0] for use in uses if use.key == image.key]
        ages = (render_age(now - image.fetched_at), "now" if tasks else render_age(now - store.last_use(image)))
        rows.append((image.name, image.type, render_size(image.size), *ages, ", ".join(tasks) or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    layers = {
        name: size for image in store.read_all() for name, size in zip(image.layers, image.sizes, strict=True)
    }
    lines.append(
        f"{len(rows) - 1} images in {store.root}, {render_size(sum(layers.values()))}; layers may be shared"
    )
    return "\n".join(lines) + "\n"


def render_age(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{int(seconds / size)} {name} ago"
    return f"{max(int(seconds), 0)} seconds ago"


def run_plugin() -> int:
    """Be a plugin until the process ends; return an exit status only when it cannot be one."""
    import gc

    gc.disable()  # nothing of what is imported from here on is garbage: 10 ms
    load_protocol()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for later in (gc.collect, gc.freeze, gc.enable):
            loop.call_later(1, later)
        await serve()
        # What is left are gRPC's threads, whose end nobody needs to wait for, and calls of its own, which it would
        # write about to stderr if asyncio cancelled them.
        os._exit(0)

    try:
        asyncio.run(main())
    except DriverError as error:
        return fail(str(error))
    raise AssertionError


def fail(text: str) -> int:
    """Say why there will be no plugin where the agent looks: it shows the first line of stdout."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"[ERROR] {FILE_NAME}: {text}\n")
        sys.stdout.write(f"{FILE_NAME}: {text}\n")
        sys.stdout.flush()
    return 1


def main() -> None:
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"{FILE_NAME} {__version__}")
    elif arguments == ["--help"]:
        print(USAGE, end="")
    elif arguments == ["options"]:
        print(render_reference(), end="")
    elif arguments == ["images"]:
        print(render_images(Store(), time.time()), end="")
    elif arguments == ["check"]:
        sys.exit(check_host())
    elif os.environ.get(COOKIE[0]) == COOKIE[1]:
        sys.exit(run_plugin())
    else:
        sys.stderr.write(USAGE)
        sys.exit(1)


if __name__ == "__main__":
    main()
