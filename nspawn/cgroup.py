# SPDX-License-Identifier: MPL-2.0
"""Where a task's processes live, what they may use and what they use.

The shim is in <task>/shim, nspawn (with --keep-unit) in <task>/supervisor, the container in <task>/payload.
<task> is the cgroup that Nomad made, or one of the same shape. It is never the agent's own: the task would end
with the agent's service. On hybrid hosts the v2 hierarchy has no controllers: it only serves to find and kill
processes, and their usage is added up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import itertools
import math
import os
import select
import stat
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nspawn.checks import IoLimit
from nspawn.common import ConfigError, HostError, check_shortage, is_below, is_shortage
from nspawn.files import read_text
from nspawn.host import CONTROLLERS, NO_CGROUPS, CgroupMode, read_cgroup_mode
from nspawn.job import JobOptions, Resources
from nspawn.process import ProcessId, cancel_and_wait, read_children, read_stat, wait_readable


def plan_cgroup(mode: CgroupMode | None, given: str, alloc_id: str, task_name: str) -> str:
    """Return the path of the task's cgroup. Raises HostError if the host has no v2 hierarchy.

    `given` is the path that Nomad sends since 1.3. With v1 controllers it names a cpuset, and is not used.
    """
    if mode is None:
        raise HostError(NO_CGROUPS)
    given = os.path.normpath(given)
    if given.startswith(f"{mode.root}/"):
        return given
    name = urllib.parse.quote(f"{alloc_id}.{task_name}", safe="")
    if len(name) > 200:
        name = f"{name[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return f"{mode.root}/nomad.slice/share.slice/{name}.scope"


MIN_SHARES, MAX_SHARES = 2, 1 << 18  # the limits of cgroup v1, which the formula below assumes
CPU_PERIOD = 100_000  # microseconds


def plan_cpu_weight(resources: Resources) -> int:
    """Return the cpu.weight for a number of MHz, by the formula of Nomad's own drivers (opencontainers/cgroups):
    1024 shares become the default weight 100, and the limits become 1 and 10000."""
    shares = float(resources.cpu)
    if resources.cpu_fraction and shares / resources.cpu_fraction >= MAX_SHARES:
        shares = resources.cpu_fraction * MAX_SHARES  # the whole machine has more MHz than that
    bits = math.log2(min(max(shares, MIN_SHARES), MAX_SHARES))
    return min(max(math.ceil(10 ** ((bits * bits + 125 * bits) / 612 - 7 / 34)), 1), 10000)


def find_io_limits(limits: Sequence[IoLimit], directory: str) -> tuple[str, ...]:
    """Return the lines for io.max. `directory`: that of the task, "" if it has none. Raises ConfigError."""
    found: dict[str, str] = {}
    for limit in limits:
        disk = find_disk(limit.device, directory)
        if disk in found:
            rule = "is on a disk that has a limit already"
            raise ConfigError("io_max.device", limit.device or directory, rule, "write one block for each disk")
        found[disk] = limit.render(disk)
    return tuple(found.values())


def find_disk(device: str | None, directory: str) -> str:
    """Return MAJOR:MINOR of a disk, by a node of it or of a part of it, or else by a directory on it. The kernel
    has no limits for parts. Raises ConfigError."""
    number, remedy = 0, 'name the disk, as in device = "/dev/sda"'
    try:
        if device and not stat.S_ISBLK(os.stat(device).st_mode):
            raise ConfigError("io_max.device", device, "is no block device of this machine", remedy)
        if device or directory:
            number = os.stat(device).st_rdev if device else os.stat(directory).st_dev
    except OSError as error:
        check_shortage(error)
        raise ConfigError(
            "io_max.device", device or directory, f"cannot be used: {error.strerror}", remedy
        ) from None
    place = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if os.path.exists(f"{place}/partition"):
        place = os.path.dirname(place)
    disk = read_text(Path(place, "dev")).strip()
    if not disk:
        rule = (
            "is no disk of this machine"
            if device
            else f"is needed: {directory or 'the task'} is on no single disk"
        )
        raise ConfigError("io_max.device", device, rule, remedy)
    return disk


def plan_limits(
    resources: Resources, options: JobOptions, cpus: int, io_limits: Sequence[str] = ()
) -> dict[str, str]:
    """Return the contents of the task's control files by name, as in `memory.max`.

    If memory_max is set, memory.low lets the kernel reclaim first what is above the reservation. There is no
    memory.high: even on an idle machine it would slow down a task that uses all it may.
    """
    limits: dict[str, str] = {}
    if resources.memory:
        most = resources.memory_max
        limits["memory.max"] = "max" if most is None else str(max(resources.memory, most))
        limits["memory.low"] = str(resources.memory) if most != 0 else "0"
        limits["memory.swap.max"] = options.memory_swap_max or "0"
    if resources.cpu:
        limits["cpu.weight"] = str(plan_cpu_weight(resources))
    if options.cpu_hard_limit and resources.cpu_fraction:
        quota = max(round(resources.cpu_fraction * cpus * CPU_PERIOD), 1000)  # the kernel's minimum
        limits["cpu.max"] = f"{quota} {CPU_PERIOD}"
    if resources.cores:
        limits["cpuset.cpus"] = resources.cores
    if options.pids_limit:
        limits["pids.max"] = str(options.pids_limit)
    if options.io_weight:
        limits["io.weight"] = str(options.io_weight)
    if io_limits:
        limits["io.max"] = "\n".join(io_limits)
    return limits


# Limits on the cgroups that a container makes. systemd and nested containers need fewer, and the driver's walks
# through them stay short. Nobody inside can change the limits: they are in the task's own cgroup.
CGROUP_BOUNDS = {"cgroup.max.depth": "64", "cgroup.max.descendants": "10000"}


def make_cgroup(cgroup: str, limits: Mapping[str, str]) -> list[str]:
    """Make a task's cgroup with its limits, and return the controllers that the limits need but the cgroup lacks.

    All of CONTROLLERS are enabled if possible, so that a booted system can set limits of its own. Raises HostError
    if a limit cannot be set although its controller is there, and OSError if the cgroup cannot be made.
    """
    place = Path(cgroup)
    (place / "shim").mkdir(parents=True, exist_ok=True)
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
                for line in value.split("\n"):  # io.max takes one disk at a time
                    write_control(place / name, line)
            except OSError as error:
                check_shortage(error)
                raise HostError(
                    f"the limit {name} = {value} cannot be set in {cgroup}: {error.strerror}"
                ) from None
    return sorted({name.split(".")[0] for name in limits} - set(have))


def write_control(path: Path, value: str) -> None:
    """Write a control file. Unlike Path.write_text, this creates none. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def open_cgroup(path: str, parent: int | None = None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def walk_cgroup(cgroup: str) -> Iterator[tuple[int, str]]:
    """Yield all cgroups below one, children first, as the parent's descriptor and the name.

    The descriptor is valid until the next step. A container may nest cgroups until their paths are too long for
    the kernel, so this is not recursive and keeps at most three descriptors. Skips what is gone. Raises OSError.
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
            elif names:  # ".." works even if the cgroup was removed
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
    """Return the pids in a cgroup and below it. Slow if the container has many cgroups or
    processes: use `run_in_thread`. Raises OSError."""
    places = (f"/proc/self/fd/{parent}/{name}" for parent, name in walk_cgroup(cgroup))
    return [pid for place in itertools.chain([cgroup], places) for pid in read_members(place)]


def read_members(cgroup: str) -> list[int]:
    """Return the pids in a cgroup, without those below it; [] if it is gone. Raises OSError."""
    try:
        return [int(pid) for pid in Path(cgroup, "cgroup.procs").read_bytes().split()]
    except OSError as error:
        # Removed; being removed; threaded: then a parent lists the processes.
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return []
        raise


def read_cgroup_processes(cgroup: str) -> list[ProcessId]:
    """As read_cgroup_pids, but with identities and without zombies."""
    return [found for pid in read_cgroup_pids(cgroup) if (found := ProcessId.of(pid))]


def read_counters(path: str) -> dict[str, int]:
    """Return the numbers of a file of lines `name number`, {} if it cannot be read."""
    return parse_counters(read_text(Path(path)))


def parse_counters(text: str) -> dict[str, int]:
    lines = (line.partition(" ") for line in text.split("\n"))
    return {name: int(number) for name, _, number in lines if number.isdigit()}


def read_number(path: str) -> int:
    try:
        return int(read_text(Path(path)))
    except ValueError:
        return 0


@dataclass(frozen=True)
class Usage:
    """What a task uses: CPU in seconds since its start, memory in bytes."""

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
    is_cgroup: bool = False  # counted by the cgroup, not added up from processes


def read_cgroup_usage(cgroup: str) -> Usage | None:
    """Return the cgroup's own counts, None if it has no memory controller or is gone."""
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


def read_usage(cgroup: str) -> Usage:
    """Return what a task uses. Without numbers in its cgroup, every process of it is read. Raises OSError."""
    return read_cgroup_usage(cgroup) or read_process_usage(read_cgroup_pids(f"{cgroup}/payload"))


CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


def read_process_usage(pids: Sequence[int]) -> Usage:
    """Add up the processes. A child that ended counts once its parent has waited for it. Raises OSError."""
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
    """Return a process and its descendants, for hosts without a v2 hierarchy. Misses what a thread that is not the
    main one has started."""
    found = [pid]
    for known in found:
        found += read_children(known)
    return found


def kill_cgroup(cgroup: str) -> bool:
    """Kill all processes in a cgroup and below it. False if it is gone, or if the kernel is older than 5.14.
    Raises OSError if the host cannot do it now."""
    try:
        write_control(Path(cgroup, "cgroup.kill"), "1")
    except OSError as error:
        if is_shortage(error):
            raise
        return False
    return True


async def wait_members(cgroup: str, ended: asyncio.Task[None]) -> list[int]:
    """Wait until a process is in a cgroup; return its members, [] if `ended` is done before. Raises OSError."""
    with contextlib.ExitStack() as stack:
        events = os.open(f"{cgroup}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, events)
        alarm = stack.enter_context(select.epoll())
        alarm.register(events, select.EPOLLPRI)
        while True:
            os.pread(events, 4096, 0)  # from here on a change wakes the pollers
            if (pids := read_members(cgroup)) or ended.done():
                return pids
            changed = asyncio.create_task(wait_readable(alarm.fileno()))
            await asyncio.wait([changed, ended], return_when=asyncio.FIRST_COMPLETED)
            await cancel_and_wait([changed])


def freeze_cgroup(cgroup: str, is_frozen: bool) -> None:
    """Freeze or thaw all processes in a cgroup and below it. A container cannot thaw what is frozen above it. Does
    nothing if the cgroup is gone. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        write_control(Path(cgroup, "cgroup.freeze"), str(int(is_frozen)))


def is_frozen(cgroup: str) -> bool:
    """Whether somebody has asked to freeze a cgroup. Raises OSError."""
    return read_number(f"{cgroup}/cgroup.freeze") == 1


SYSTEMD_HIERARCHY = "/sys/fs/cgroup/systemd"


def find_mirrors(cgroup: str) -> list[str]:
    """Return a cgroup and, on hybrid hosts, its mirror in systemd's v1 hierarchy. nspawn keeps the two in step."""
    hybrid, other = f"{CgroupMode.HYBRID.root}/", SYSTEMD_HIERARCHY
    is_mirrored = cgroup.startswith(hybrid) and os.path.isdir(other)
    return [cgroup, *([f"{other}/{cgroup[len(hybrid) :]}"] if is_mirrored else [])]


def remove_cgroup(cgroup: str) -> None:
    """Remove a cgroup, if one is named, with all below it, and its mirror. May be slow. Raises OSError if one
    stays, such as one with processes."""
    for root in find_mirrors(cgroup) if cgroup else ():
        for parent, name in walk_cgroup(root):
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=parent)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(root)


def parse_cgroups(text: bytes) -> dict[str, str]:
    """Return the cgroups in the text of /proc/PID/cgroup by controllers, "" for the v2 hierarchy. Only \\n ends a
    line: it is the one line end that the kernel does not allow in names."""
    lines = (line.split(b":", 2) for line in text.split(b"\n"))
    return {os.fsdecode(line[1]): os.fsdecode(line[2]) for line in lines if len(line) == 3}


def read_cgroups(pid: int) -> dict[str, str]:
    """Return what parse_cgroups makes of a process, {} if the process is gone. Raises OSError."""
    try:
        return parse_cgroups(Path(f"/proc/{pid}/cgroup").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return {}


def find_own_cgroups() -> list[str]:
    """Return this process's cgroup in the v2 hierarchy, and the one in systemd's v1 hierarchy if it has one."""
    paths = read_cgroups(os.getpid())
    return [f"{root}{paths[controllers]}" for controllers, root in read_roots().items() if controllers in paths]


def read_roots() -> dict[str, str]:
    """Return the mount points of the v2 hierarchy and of systemd's v1 one, by their names in /proc/PID/cgroup.
    Raises HostError."""
    mode = read_cgroup_mode()
    if mode is None:
        raise HostError(NO_CGROUPS)
    return {"": str(mode.root), "name=systemd": SYSTEMD_HIERARCHY}


def find_cgroups(pid: int, cgroup: str) -> list[str]:
    """Return the cgroups of a process at or below a cgroup and its mirror; [] if it is elsewhere or gone. A booted
    systemd is below payload/, in init.scope: cgroups with others below them may have no processes."""
    paths = read_cgroups(pid)
    found = []
    for place, (controllers, root) in zip(find_mirrors(cgroup), read_roots().items(), strict=False):
        path = f"{root}{paths.get(controllers, '')}"
        if is_below(path, place) and ".." not in path.split("/"):  # "..": outside our cgroup namespace
            found.append(path)
        elif not controllers:
            return []
    return found
