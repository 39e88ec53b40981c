# SPDX-License-Identifier: MPL-2.0
"""Facts about this machine. They are read and never changed.

For each thing that is missing there is a sentence in the fingerprint's health description.
"""

from __future__ import annotations

import enum
import functools
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nspawn.common import HostError, is_below
from nspawn.devices import can_restrict_devices
from nspawn.files import find_tool, read_text
from nspawn.linux import can_map_ids
from nspawn.process import open_user_namespace, read_status, run
from nspawn.quota import have_project_quotas

FINGERPRINT_PERIOD = 30.0  # seconds


class CgroupMode(enum.Enum):
    """How the kernel's control groups are mounted."""

    V2 = "v2"
    HYBRID = "hybrid"  # v1 controllers, and a v2 hierarchy without controllers

    @property
    def root(self) -> Path:
        """The mount point of the v2 hierarchy."""
        return Path("/sys/fs/cgroup" if self is CgroupMode.V2 else "/sys/fs/cgroup/unified")


CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")


@dataclass(frozen=True)
class Host:
    """What this machine offers."""

    systemd: int  # major version of systemd-nspawn, 0 if it is not installed
    kernel: tuple[int, int]
    cgroups: CgroupMode | None  # None: there is no v2 hierarchy
    problems: tuple[str, ...]
    cpus: int = 1
    controllers: frozenset[str] = frozenset()  # of the v2 hierarchy
    has_device_policy: bool = True  # tasks can be kept from devices that are not theirs
    has_selinux: bool = False
    is_filtered: bool = False  # this process has a seccomp filter itself, so the kernel hides those of others
    open_directories: tuple[str, ...] = ()  # where tasks write and other users of the host can go

    @property
    def is_healthy(self) -> bool:
        return not self.problems

    @property
    def health_description(self) -> str:
        """The health description."""
        return " ".join(self.problems or ("Healthy", *self.shortcomings))

    @property
    def limits(self) -> tuple[str, ...]:
        """The controllers that can limit tasks here."""
        return tuple(controller for controller in CONTROLLERS if controller in self.controllers)

    @property
    def shortcomings(self) -> Iterator[str]:
        """Yield a sentence for each thing that tasks have to do without."""
        missing = [controller for controller in CONTROLLERS if controller not in self.controllers]
        if missing and self.cgroups is CgroupMode.V2:
            yield f"(tasks run without limits of {', '.join(missing)}: the cgroup v2 controllers are missing)"
        elif missing:
            yield "(tasks run without resource limits: they need cgroup v2)"
        if not self.has_device_policy:
            yield "(tasks run without a device policy: it needs a cgroup v2 hierarchy, and bpf(2))"
        if self.is_filtered:
            yield "(no commands can be run in tasks: the agent has a seccomp filter, as of SystemCallFilter=)"
        yield from map(explain_open_directory, self.open_directories)


def explain_open_directory(place: str) -> str:
    """For files there, root in a container counts as root of the host, and may make them set-user-id. The
    container ignores that bit; the host does not."""
    return (
        f"(other users of this machine can get to {place}: a set-user-id file that a task makes there makes them "
        f"root; run chmod 0700 {place})"
    )


def is_open_to_others(path: str) -> bool:
    """Whether users other than root can reach a directory: it and all its parents let somebody through. False if
    it does not exist."""
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
    "sed": "sed",
    "sleep": "coreutils",
    "rm": "coreutils",
    "sh": "dash",
}

MINIMUM_SYSTEMD = 252
MINIMUM_KERNEL = (5, 12)  # the first one with id-mapped mounts
OVERLAY_IDMAP = (5, 19)  # the first one whose overlay takes id-mapped layers
FIRST_CONTAINER_ID = 0x80000  # of the ids that systemd keeps for containers


NO_CGROUPS = (
    "There is no cgroup v2 hierarchy on this machine: boot it with systemd.unified_cgroup_hierarchy=1, or run "
    "mount -t cgroup2 none /sys/fs/cgroup/unified."
)


def read_cgroup_mode(root: Path = Path("/sys/fs/cgroup")) -> CgroupMode | None:
    if (root / "cgroup.controllers").exists():
        return CgroupMode.V2
    return CgroupMode.HYBRID if (root / "unified/cgroup.procs").exists() else None


@functools.lru_cache(maxsize=4)
def read_nspawn_version(path: str, modified: float) -> int:
    """Return nspawn's major version, 0 if it does not say one. `modified` is there for the cache."""
    match = re.match(r"systemd (\d+)", run([path, "--version"], timeout=10))
    return int(match[1]) if match else 0


def find_problems(systemd: int, kernel: tuple[int, int]) -> Iterator[str]:
    """Yield a sentence for each problem that keeps all tasks from running."""
    if os.geteuid() != 0:
        yield "The Nomad client must run as root to start containers."
    for tool, package in TOOLS.items():
        if not find_tool(tool):
            yield f"{tool} is not installed: install the package {package}."
    if not read_cgroup_mode():
        yield NO_CGROUPS
    if 0 < systemd < MINIMUM_SYSTEMD:
        yield f"systemd-nspawn is version {systemd}; {MINIMUM_SYSTEMD} or newer is needed."
    if kernel < MINIMUM_KERNEL:
        found, least = (".".join(map(str, version)) for version in (kernel, MINIMUM_KERNEL))
        yield f"The kernel is Linux {found}; {least} or newer is needed."
    try:
        have_id = bool(Path("/etc/machine-id").read_text().strip())
    except FileNotFoundError:
        have_id = False
    if not have_id:  # nspawn: "Failed to retrieve machine ID", always fatal
        yield "/etc/machine-id is missing or empty: run systemd-machine-id-setup."


@functools.lru_cache(maxsize=1)
def read_boot_id() -> str:
    """Return an id that is new after each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


UNIT_PATHS = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


def have_machined() -> bool:
    """Whether busctl can call systemd-machined. The call starts it, unless it is masked."""
    if not all(map(os.path.exists, ("/run/systemd/system", "/run/dbus/system_bus_socket"))):
        return False
    found = [path for folder in UNIT_PATHS if os.path.lexists(path := f"{folder}/systemd-machined.service")]
    return bool(found) and os.path.realpath(found[0]) != "/dev/null" and bool(find_tool("busctl"))


def read_host() -> Host:
    nspawn = find_tool("systemd-nspawn")
    systemd = read_nspawn_version(nspawn, os.stat(nspawn).st_mtime) if nspawn else 0
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    kernel = (int(release[1]), int(release[2])) if release else (0, 0)
    return Host(
        systemd=systemd,
        kernel=kernel,
        cgroups=(mode := read_cgroup_mode()),
        problems=tuple(find_problems(systemd, kernel)),
        cpus=os.cpu_count() or 1,
        controllers=frozenset(read_text(mode.root / "cgroup.controllers").split()) if mode else frozenset(),
        has_device_policy=mode is not None and can_restrict_devices(),
        has_selinux=os.path.exists("/sys/fs/selinux/enforce"),
        is_filtered=read_status(os.getpid()).get("Seccomp") not in (None, "0"),
    )


@dataclass(frozen=True)
class Mounts:
    """The mounts of this process."""

    # mount point and file system type; later mounts cover earlier ones
    points: tuple[tuple[str, str], ...]
    have_idmap: Callable[[str], bool] = lambda path: True  # whether what is at a path can be id-mapped
    have_project_quotas: Callable[[str], bool] = lambda path: True  # whether a directory there can be limited

    def filesystem(self, path: str) -> str:
        """Return the type of the file system that a path is on, "" if none is known."""
        best = ("", "")
        for point, kind in self.points:
            if is_below(path, point) and len(point) >= len(best[0]):
                best = (point, kind)
        return best[1]


def parse_mountinfo(text: str) -> Mounts:
    points = []
    for line in filter(None, text.split("\n")):  # not splitlines: a path may contain other line ends
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), left.split(" ")[4])
        points.append((point, right.split(" ")[0]))
    return Mounts(tuple(points))


def is_on_shared_mount(fd: int) -> bool:
    """Whether later mounts below an open file can appear in other mount namespaces. Raises OSError."""
    number = re.search(r"^mnt_id:\s*(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n"):
        if number and line.startswith(f"{number[1]} ".encode()):
            return not {b"shared", b"master"}.isdisjoint(field.split(b":")[0] for field in line.split(b" ")[6:8])
    return False


def read_mounts() -> Mounts:
    text = Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape")
    return Mounts(parse_mountinfo(text).points, have_idmap, have_project_quotas)


@functools.lru_cache(maxsize=1)
def open_other_users() -> int:
    """Return a descriptor, kept from now on, of a user namespace to try id maps with."""
    return open_user_namespace(FIRST_CONTAINER_ID, 0x10000)


def have_idmap(path: str) -> bool:
    """Whether the kernel can id-map what is mounted at a path. The kernel is asked, as no table can say it: file
    systems learn it with new kernels, and ZFS is none of the kernel's. Raises HostError or OSError."""
    return can_map_ids(path, open_other_users())


def can_share_images(image_dir: str, kernel: tuple[int, int]) -> bool:
    """Whether tasks with user namespaces can have private roots over the images in a directory."""
    try:
        return kernel >= OVERLAY_IDMAP and have_idmap(image_dir)
    except (HostError, OSError):  # no user namespaces
        return False


def read_cpu_mhz() -> float:
    """Return the kernel's mean speed of a core in MHz, 1000 if it has none; for agents before 1.7."""
    speeds = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", read_text(Path("/proc/cpuinfo")), re.MULTILINE)
    return sum(map(float, speeds)) / len(speeds) if speeds else 1000.0
