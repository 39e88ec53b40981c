# SPDX-License-Identifier: MPL-2.0
"""The state of a started task, which outlives the plugin; its events; the removal of all that is left of it.

A task's State is both in the handle that Nomad keeps and in a file of the state directory, and has all that is
needed to find the task again. Removal works on what is there, even if the start was interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import stat
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from nspawn.cgroup import kill_cgroup, plan_cgroup, read_cgroup_pids, read_members, remove_cgroup
from nspawn.common import (
    SETTINGS_ROOT,
    STATE_ROOT,
    HostError,
    TransientError,
    explain_host,
    is_shortage,
    log,
    quote,
    render_line,
)
from nspawn.files import empty_tree, remove_tree
from nspawn.host import CgroupMode, read_boot_id, read_cgroup_mode
from nspawn.job import UUID, Mode, TaskConfig, plan_machine, render_id_prefix, state_directory
from nspawn.linux import WRITE_LOCK, delete_link, is_locked
from nspawn.logs import find_holders
from nspawn.network import SHORT_NAME, find_port_maps
from nspawn.plan import JOURNALS, name_journal
from nspawn.process import NO_PROCESS, ProcessId, find_children, read_stat, read_status, run_in_thread, run_tool
from nspawn.quota import release_directory
from nspawn.roots import UID_LOCKS, UPPER_NAME
from nspawn.store import Store

STATE_VERSION = 1


FOREIGN = (  # its handles are msgpack with these fields: TaskConfig, MachineName, StartedAt
    "the task was started by the Go driver, and its tasks cannot be taken up: Nomad starts it anew. Drain a "
    "client before its driver is exchanged. If the old container still runs, `machinectl terminate` ends it"
)


@dataclass(frozen=True)
class State:
    """What is known about a started task, in a form that outlives the plugin."""

    task_id: str
    machine: str
    mode: Mode
    cgroup: str
    boot_id: str
    shim: ProcessId
    leader: ProcessId | None  # the container's PID 1; None while it is being started
    started_at: float  # Unix time
    image: str  # its path if nspawn leaves files beside it, else ""
    alloc_dir: str = ""  # the allocation's directory on the host
    upper_dir: str = ""  # `PrivateRoot.upper_dir`, removed with the task
    link: str = ""  # the host's end of nspawn's link to the container
    zone: str = ""  # nspawn's bridge vz-<zone>
    ports: tuple[tuple[int, int], ...] = ()  # that nspawn maps: the host's port and the one inside
    addresses: tuple[tuple[str, str], ...] = ()  # fixed ones: see FixedLink.pairs
    stop_signal: str = ""  # from the image, for jobs without a kill_signal
    unit: str = ""  # the unit that is the task, if one is
    users: tuple[tuple[int, int], ...] = ()  # ranges of the host's ids for the container's users: begin and count
    journal: str = ""  # `Journal.path` once it was made, removed with the task
    locks: tuple[str, ...] = ()  # nspawn's lock files beside the image, removed with the task
    job: str = ""  # its id; this and what follows is for people
    group: str = ""
    namespace: str = ""
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def directory(self) -> Path:
        return state_directory(self.task_id)

    def render(self) -> str:
        return json.dumps({**asdict(self), "version": STATE_VERSION, "mode": self.mode.value})

    @classmethod
    def parse(cls, text: str | bytes) -> State:
        """Read a state. Raises ValueError if this version cannot."""
        if isinstance(text, bytes) and b"MachineName" in text and not text.startswith(b"{"):
            raise ValueError(FOREIGN)
        try:
            values = json.loads(text)
            version = values.pop("version")
            if version == STATE_VERSION:
                leader = values["leader"]
                changes = {
                    "mode": Mode(values["mode"]),
                    "shim": ProcessId(**values["shim"]),
                    "leader": ProcessId(**leader) if leader else None,
                    "ports": tuple((host, inside) for host, inside in values.get("ports", ())),
                    "addresses": tuple((network, address) for network, address in values.get("addresses", ())),
                    "users": tuple((begin, count) for begin, count in values.get("users", ())),
                    # Earlier builds noted more of nspawn's locks, which are found without a note now.
                    "locks": tuple(path for path in values.get("locks", ()) if is_own_lock(path, values["image"])),
                    "labels": tuple((name, text) for name, text in values.get("labels", ())),
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
        """Raise ValueError for a field that `render` cannot have written: what the fields name is killed and
        removed."""
        processes = [self.shim, *([self.leader] if self.leader else [])]
        numbers = [number for process in processes for number in (process.pid, process.started)]
        numbers += [number for pair in (*self.ports, *self.users) for number in pair]
        texts = [getattr(self, name.name) for name in fields(self) if name.type == "str"]
        texts += [text for label in self.labels for text in label]
        texts += [text for pair in self.addresses for text in pair]
        removed = [path for path in (self.cgroup, self.upper_dir, self.journal, *self.locks) if path]
        if not (
            all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
            and all(isinstance(text, str) for text in texts)
            and type(self.started_at) in (int, float)
            and re.fullmatch(r"[A-Za-z0-9-]{1,64}", self.machine)
            and all(path.startswith("/") and ".." not in path.split("/") for path in removed)
            and self.cgroup.startswith("/sys/fs/cgroup/")
            and self.cgroup != str(CgroupMode.HYBRID.root)
            and (not self.upper_dir or self.upper_dir.endswith(UPPER_NAME))
            and (not self.journal or re.fullmatch(rf"{JOURNALS}/[^/]+", self.journal))
            and self.link in ("", f"ve-{self.machine}", f"vb-{self.machine}")
            and "/" not in self.zone
        ):
            raise ValueError


def is_own_lock(path: str, image: str) -> bool:
    """Whether a path may be nspawn's lock file for a task's image, or for its copy of the image. The copy is
    beside the image, or in it if the image is a mount point."""
    folder, name = os.path.split(image)
    beside, inside = re.escape(folder.rstrip("/")), re.escape(image.rstrip("/"))
    copy, random = r"\.#(machine|snapshot)\.", r"[0-9a-f]{16}"  # "snapshot" of systemd 262
    places = [
        rf"{beside}/\.#{re.escape(name)}\.lck",
        rf"{beside}/\.#{copy}{re.escape(name)}{random}\.lck",
        rf"{inside}/\.#{copy}{random}\.lck",
    ]
    return bool(image) and any(re.fullmatch(place, path) for place in places)


def read_state(directory: Path) -> State | None:
    """Return a task's stored state, None if there is none or this version cannot read it. Raises OSError if the
    host cannot tell."""
    try:
        return State.parse((directory / "state.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def read_states(alloc_id: str = "") -> Iterator[State]:
    """Yield the readable states on this machine, or those whose ids begin like `alloc_id`. Raises OSError."""
    prefix = render_id_prefix(alloc_id)[:36]
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(STATE_ROOT)):
            if name.startswith(prefix) and (state := read_state(STATE_ROOT / name)):
                yield state


def find_address_owner(state: State) -> tuple[str, State] | None:
    """Return a fixed address of a task that is to start and the other task on this machine that has it. Raises
    OSError."""
    for other in read_states() if state.addresses else ():
        shared = [address for network, address in state.addresses if (network, address) in other.addresses]
        is_there = other.shim == NO_PROCESS or other.shim.is_alive or bool(other.leader and other.leader.is_alive)
        if shared and is_there and other.task_id != state.task_id:
            return shared[0], other
    return None


def split_id(task_id: str) -> tuple[str, str]:
    """Return allocation and task of `<allocation>/<task>/<8 hex digits>`; a task's name may contain slashes."""
    alloc_id, *name = task_id.split("/")
    return alloc_id, "/".join(name[:-1])


def find_alloc_dirs(states: Iterable[State]) -> set[str]:
    """Return the directories that hold the allocations of these tasks: a client has one, its alloc_dir."""
    return {os.path.dirname(state.alloc_dir) for state in states if state.alloc_dir}


def find_journal_obstacle(task: TaskConfig) -> str:
    """Return why the host cannot show a task's journal, "" if it can."""
    place = name_journal(task.alloc_id)
    if not UUID.fullmatch(task.alloc_id):
        return "the allocation's id is no machine id"
    if not os.path.isdir(JOURNALS):
        return f"this machine has no {JOURNALS}"
    machine = plan_machine(task.name, task.alloc_id)
    is_own = any(state.journal == place and state.machine == machine for state in read_states(task.alloc_id))
    return f"there is a {place} already" if os.path.lexists(place) and not is_own else ""


def state_from_id(task_id: str) -> State:
    """Return what follows from an id alone, for a task whose state cannot be read: enough to kill its cgroup (from
    Linux 5.14 on) and to remove that and the state directory. What it has elsewhere stays."""
    alloc_id, task_name = split_id(task_id)
    shared = plan_cgroup(read_cgroup_mode(), "", alloc_id, task_name)
    reserved = shared.replace("/share.slice/", "/reserve.slice/")
    return State(
        task_id=task_id,
        machine=plan_machine(task_name, alloc_id),
        mode=Mode.COMMAND,
        cgroup=reserved if os.path.isdir(reserved) else shared,
        boot_id=read_boot_id(),
        shim=NO_PROCESS,
        leader=None,
        started_at=0.0,
        image="",
    )


class Events:
    """Passes events of tasks to all TaskEvents streams. While no stream is open, it keeps the last 64."""

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


async def kill_processes(state: State) -> State:
    """Kill all processes of a task; do not wait for their end. Return the state with the locks that nspawn held,
    which may have begun to copy its image after the state was written. Raises OSError.

    Kernels without cgroup.kill need the last two: the shim's process group, where nspawn is, and the leader, whose
    end kills its pid namespace.
    """
    state = await add_locks(state)
    if not kill_cgroup(state.cgroup):
        for holder in find_holders(state.cgroup):
            holder.send(signal.SIGKILL)
    if state.shim.is_alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(state.shim.pid, signal.SIGKILL)
    if state.leader:
        state.leader.send(signal.SIGKILL)
    return state


async def wait_processes(state: State) -> None:
    """Wait until no process of a task is left. Raises OSError."""
    await state.shim.wait()
    await wait_container(state)
    await wait_cgroup(lambda: [holder.pid for holder in find_holders(state.cgroup)])


async def wait_container(state: State) -> None:
    """Wait until no process of a task is left but the shim and what it leaves. Raises OSError."""
    if state.leader:
        await state.leader.wait()
    await wait_cgroup(lambda: read_container_pids(state.cgroup))


def read_container_pids(cgroup: str) -> list[int]:
    """Return the pids in a task's cgroup but for those in its leaf `shim`. Raises OSError."""
    inside = (pid for leaf in ("supervisor", "payload") for pid in read_cgroup_pids(f"{cgroup}/{leaf}"))
    return [*read_members(cgroup), *inside]


async def wait_cgroup(find_pids: Callable[[], list[int]]) -> None:
    """Wait until a cgroup lists no processes. That those listed have ended is not enough: one may have started
    another since the list was made. Raises OSError."""
    while pids := await run_in_thread(find_pids):
        processes = [found for pid in pids if (found := ProcessId.of(pid))]
        for process in processes:
            await process.wait()
        if not processes:  # ended just now, or threads that go on without the first one
            await asyncio.sleep(0.01)


async def remove_network(state: State) -> None:
    """Remove what a killed nspawn has left of its network; an nspawn that ended by itself leaves nothing.

    The kernel removes a link with the container's namespace, but asynchronously, and not while a process from
    outside is in the namespace. Raises OSError.
    """
    if state.link:
        await run_in_thread(lambda: delete_link(state.link))
        if state.leader is None:
            await wait_short_link(state.link)
    if state.zone and is_empty_bridge(f"vz-{state.zone}"):
        await run_in_thread(lambda: delete_link(f"vz-{state.zone}"))
    if state.ports:
        others = {port for other in read_states() if other.task_id != state.task_id for port in other.ports}
        if ports := [port for port in state.ports if port not in others]:
            await remove_port_maps(ports)


LINK_LIMIT = 5.0  # seconds


async def wait_short_link(link: str) -> None:
    """Wait for the kernel to remove a link that nspawn had made when it was killed, without its long name yet.
    Otherwise the next start of the task fails. Only the start of its short name is known: it may be another
    container's, so it is not deleted, and the wait has a limit. Raises OSError."""
    begin, deadline = link[:SHORT_NAME], time.monotonic() + LINK_LIMIT
    while any(name.startswith(begin) for _, name in socket.if_nameindex()) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


def is_empty_bridge(name: str) -> bool:
    """Whether there is a bridge of this name without any interface."""
    try:
        return not os.listdir(f"/sys/class/net/{name}/brif")
    except FileNotFoundError:
        return False


async def remove_port_maps(ports: Sequence[tuple[int, int]]) -> None:
    """Remove nspawn's NAT entries for the ports of a container that is gone."""
    for family in ("ip", "ip6"):
        table = (family, "io.systemd.nat", "map_port_ipport")
        for element in find_port_maps(await run_tool(["nft", "list", "map", *table]), ports):
            log.warn("removing a port that leads nowhere", element=element)
            await run_tool(["nft", "delete", "element", *table, "{", element, "}"])


async def remove_leftovers(state: State) -> None:
    """Remove all that a dead task has left, even if its start was interrupted. An error of one step does not keep
    the others from being done. The state directory goes last: as long as it is there, the task's id alone leads to
    the rest. Raises DriverError if something is left; repeat it later."""
    steps: list[Callable[[], Awaitable[None]]] = [
        lambda: remove_network(state),
        lambda: remove_upper_dir(state.upper_dir),
        lambda: remove_in_thread(state.journal),
        lambda: run_in_thread(lambda: remove_mount_points(state.machine)),
        lambda: run_in_thread(lambda: remove_locks(state.locks)),  # and nspawn's copy of the image
        lambda: run_in_thread(lambda: remove_cgroup(state.cgroup)),
        lambda: remove_in_thread(str(state.directory / "tmp")),  # what a killed nspawn leaves of overlays
    ]
    errors = []
    for step in steps:
        try:
            await step()
        except OSError as error:
            errors.append(error)
    if not errors:
        try:
            await remove_in_thread(str(state.directory))
            Store().release(state.directory.name)
            return
        except OSError as error:
            errors.append(error)
    what = "; ".join({str(explain_host(error)): None for error in errors})
    kind = TransientError if any(map(is_shortage, errors)) else HostError
    raise kind(f"not all of the task {quote(state.task_id)} can be removed: {what}")


def remove_mount_points(machine: str) -> None:
    """Remove the directories that nspawn leaves in /run/systemd/nspawn. Raises OSError."""
    for place in (f"propagate/{machine}", f"unix-export/{machine}", f"{machine}/unix-export", machine):
        try:
            (SETTINGS_ROOT / place).rmdir()
        except OSError as error:  # one that is not empty is in use
            if is_shortage(error) and (SETTINGS_ROOT / place).is_dir():
                raise


async def remove_upper_dir(place: str) -> None:
    """Remove what a task has changed, if a directory is named, and its limit. Raises OSError if something of it
    stays."""
    if place:
        await run_in_thread(lambda: release_directory(place))
        await remove_in_thread(place)


async def remove_in_thread(place: str) -> None:
    """Remove a tree, if one is named, in a thread: a task can make its trees as large as it likes. Raises OSError
    if something of it stays."""
    if place and (errors := await run_in_thread(lambda: empty_tree(Path(place)))):
        raise OSError(errors[0].errno, errors[0].strerror, place)


def find_outer_processes(shim: ProcessId) -> list[ProcessId]:
    """Return a task's shim, the shells below it and nspawn, without what is in the container's pid namespace.
    Raises OSError."""
    found, level = [], [shim]
    for _ in range(3):
        level = [process for process in level if len(read_status(process.pid).get("NSpid", "").split()) == 1]
        found += level
        level = [child for process in level for child in find_children(process)]
    return found


def find_locks(shim: ProcessId, image: str) -> tuple[str, ...]:
    """Return the lock files for a task's image that its shim, the shells below it and nspawn have open. Raises
    OSError."""
    found = set()
    for place in (f"/proc/{process.pid}/fd" for process in find_outer_processes(shim)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended
            for fd in os.listdir(place):
                with contextlib.suppress(FileNotFoundError):  # closed by now
                    found.add(os.readlink(f"{place}/{fd}"))
    return tuple(sorted(path for path in found if is_own_lock(path, image)))


async def add_locks(state: State) -> State:
    """Stop the shim and nspawn, and return a state with the locks that they hold. Stopped, they take no others
    until they are killed. If the host cannot tell the locks, they stay."""
    with contextlib.suppress(OSError):
        if state.shim.is_alive:
            os.killpg(state.shim.pid, signal.SIGSTOP)
        for _ in range(100):
            states = [read_stat(process.pid) for process in find_outer_processes(state.shim)]
            if all(fields is None or fields[0] in "TZX" for fields in states):
                break
            await asyncio.sleep(0.005)
        return replace(state, locks=tuple(sorted({*state.locks, *find_locks(state.shim, state.image)})))
    return state


def remove_locks(locks: Iterable[str]) -> None:
    """Remove a task's lock files, and all of systemd's for images and ranges of ids that nobody holds: a killed
    nspawn leaves them, and so does a plugin that is killed while it starts a task. With the lock of an image's
    copy goes the copy. Raises OSError if the host lacks what it takes."""
    errors = []
    for path in (*map(Path, locks), *list_locks()):
        try:
            remove_lock(path)
        except OSError as error:
            errors += [error] if is_shortage(error) else []
    if errors:
        raise errors[0]


def list_locks() -> list[Path]:
    """Return systemd's lock files for images and for ranges of ids. Raises OSError."""
    found = []
    for place, names in ((SETTINGS_ROOT / "locks", "(inode|block)-[0-9]+:[0-9]+"), (UID_LOCKS, "[0-9]+")):
        with contextlib.suppress(FileNotFoundError):
            found += [place / name for name in os.listdir(place) if re.fullmatch(names, name)]
    return found


def remove_lock(path: Path) -> None:
    """Remove a lock file unless somebody holds it. Whoever takes a lock checks afterwards that its file still
    exists, and so does this. Does nothing to a link or a device, which a task could put beside an image. Raises
    OSError."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            if is_locked(file.fileno()):  # that much can be seen on a read-only file system, too
                return
        with open(f"/proc/self/fd/{fd}", "r+b") as file, contextlib.suppress(BlockingIOError):
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, WRITE_LOCK)  # systemd's kind of lock
            if os.path.samestat(os.fstat(fd), os.lstat(path)):  # else another file has this name by now
                if path.name.startswith(".#.#"):
                    remove_tree(path.with_name(path.name[len(".#") : -len(".lck")]))
                path.unlink()
    finally:
        os.close(fd)
