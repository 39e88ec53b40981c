# SPDX-License-Identifier: MPL-2.0
"""What a job puts into a container: binds, overlays, tmpfs and devices, with their types.

See checks.py for what `check_` and `parse_` mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nspawn.checks import check_container_path, check_host_directory, check_source, escape_field
from nspawn.common import ConfigError, name_entry

BIND_OPTIONS = ("rbind", "norbind", "idmap", "noidmap", "rootidmap", "owneridmap")
MAPPINGS = frozenset({"idmap", "rootidmap", "owneridmap"})


@dataclass(frozen=True)
class Mount:
    """Something of the host that is mounted in a container: of a bind, a volume or the task's own directories."""

    source: str  # what the job, Nomad or the host calls it
    target: str  # the path in the container
    read_only: bool = False
    options: tuple[str, ...] = ()  # of BIND_OPTIONS
    propagation: str = ""  # of a volume, as Nomad says it
    selinux_label: str = ""  # the same
    option: str = "volume_mount"  # that is to blame for an error of a volume: or devices, for those of CDI
    is_nosuid: bool = False

    @property
    def shows_later_mounts(self) -> bool:
        """Whether what the host mounts below the source later shall appear in the container."""
        return self.propagation == "host-to-task"

    @property
    def is_mapped(self) -> bool:
        """Whether ids of the container's users are shown instead of the host's."""
        return not MAPPINGS.isdisjoint(self.options)

    @property
    def argv(self) -> str:
        options = f":{','.join(self.options)}" if self.options else ""
        fields = f"{escape_field(self.source)}:{escape_field(self.target)}{options}"
        return f"--bind{'-ro' if self.read_only else ''}={fields}"


def parse_bind(target: str) -> tuple[str, tuple[str, ...]]:
    """Split nspawn's `/path:options`. If no options follow a colon, it is part of the path."""
    path, colon, text = target.rpartition(":")
    options = tuple(text.split(","))
    return (path, options) if colon and all(option in BIND_OPTIONS for option in options) else (target, ())


def parse_binds(name: str, value: Mapping[str, str]) -> tuple[Mount, ...]:
    mounts = []
    for source, text in value.items():
        check_source(name_entry(name, source), source, shown=text)
        target, options = parse_bind(text)
        check_container_path(name_entry(name, source), target)
        mounts.append(Mount(source, target, name == "bind_read_only", options))
    return tuple(mounts)


@dataclass(frozen=True)
class MountBlock:
    """A `mount` block of a job."""

    type: str | None
    source: str
    target: str
    read_only: bool
    options: tuple[str, ...]


def parse_mounts(name: str, value: Sequence[MountBlock]) -> tuple[Mount, ...]:
    return tuple(Mount(block.source, block.target, block.read_only, block.options) for block in value)


def check_mount_type(name: str, value: str) -> str:
    remedies = {
        "tmpfs": 'write tmpfs = ["/run/cache:size=100M"] in place of this block',
        "volume": "use a volume of Nomad's with a volume_mount block, or a directory of the host",
    }
    if value != "bind":
        raise ConfigError(name, value, "must be bind", remedies.get(value, ""))
    return value


def check_mount_source(name: str, value: str) -> str:
    check_source(name, value, shown=value)
    return value


def split_fields(text: str) -> list[str]:
    """Split at colons as nspawn does: a backslash escapes the next character."""
    return [
        re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL)
        for part in re.findall(r"(?:^|:)((?:\\.|[^:\\])*)", text, re.DOTALL)
    ]


@dataclass(frozen=True)
class Overlay:
    """An overlay of directories in a container."""

    text: str  # as the job has it
    lower: tuple[str, ...]  # of the host, or of the image with "+" before; the last may be "": changes in memory
    target: str
    read_only: bool

    @property
    def sources(self) -> tuple[str, ...]:
        """The directories of the host."""
        return tuple(place for place in self.lower if place and not place.startswith("+/"))

    def render(self, places: Mapping[str, str]) -> str:
        """Return nspawn's argument. `places`: the paths at which it finds the sources."""
        lower = [places[name] if name in places else escape_field(name) for name in self.lower]
        return f"--overlay{'-ro' if self.read_only else ''}={':'.join([*lower, escape_field(self.target)])}"


def parse_overlays(name: str, value: Sequence[str]) -> tuple[Overlay, ...]:
    """Refuse a directory for changes: systemd-nspawn would open it and its work directory by path, and whoever can
    write there could swap them before. Changes go to memory."""
    overlays = []
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
                check_source(name, source, shown=item)
        check_container_path(name, target)
        overlays.append(Overlay(item, tuple(sources), target, name == "overlay_read_only"))
    return tuple(overlays)


def has_image_source(overlays: Iterable[Overlay]) -> bool:
    """Whether an overlay has a source in the image. If that is a link, nspawn follows it on the host."""
    return any(place.startswith("+/") for overlay in overlays for place in overlay.lower)


CDI_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*=[A-Za-z0-9]([\w.:-]*[A-Za-z0-9])?", re.ASCII)
CLASS = re.compile(r"(char|block)-([^/\s][^\s]{0,99})")  # as systemd's DeviceAllow= has it


@dataclass(frozen=True)
class Device:
    """A device for a container: one of the job's `devices`, or of a device plugin."""

    host_path: str  # of a node; in a job also the name of a class, or of a device of CDI
    container_path: str | None = None  # None: the same
    cgroup_permissions: str = "rwm"  # r to read, w to write, m to make it with mknod(2)

    @property
    def target(self) -> str:
        return self.container_path or self.host_path

    @property
    def is_class(self) -> bool:
        return bool(CLASS.fullmatch(self.host_path))

    @property
    def is_cdi(self) -> bool:
        return bool(CDI_NAME.fullmatch(self.host_path))


@dataclass(frozen=True)
class CdiNode(Device):
    """A device node that a file of CDI asks for. -1: as the host's node has it."""

    mode: int = -1  # without the type
    uid: int = -1  # in the container
    gid: int = -1


def check_devices(name: str, value: Sequence[Device]) -> Sequence[Device]:
    for device in value:
        if device.container_path and (device.is_class or device.is_cdi):
            what = "a class" if device.is_class else "a device of CDI"
            rule = f"is for a single node, and {device.host_path} is {what}"
            raise ConfigError(f"{name}.container_path", device.container_path, rule, "leave it out")
        if device.is_cdi and device.cgroup_permissions != "rwm":
            rule = f"cannot be chosen: the file of CDI says it for {device.host_path}"
            raise ConfigError(f"{name}.cgroup_permissions", device.cgroup_permissions, rule, "leave it out")
    return value


def check_device(name: str, value: str) -> str:
    if not (CLASS.fullmatch(value) or CDI_NAME.fullmatch(value)):
        if not value.startswith("/"):
            rule = "must be a node as /dev/kvm, a class as char-ttyUSB, or a device of CDI as nvidia.com/gpu=0"
            raise ConfigError(name, value, rule)
        check_host_directory(name, value)
    return value


# Not all options of mount(8): systemd-nspawn would take "bind" and "remount", which act on the host's mounts.
TMPFS_OPTION = (
    r"(size|nr_blocks|nr_inodes|mode|uid|gid|huge)=[\w%.-]+|ro|rw|nodev"
    r"|(no)?(exec|suid|atime|diratime|swap)|(rel|strict)atime|lazytime"
)


def check_tmpfs(name: str, value: Sequence[str]) -> Sequence[str]:
    for item in value:
        path, colon, options = item.partition(":")
        if colon and not all(re.fullmatch(TMPFS_OPTION, option, re.ASCII) for option in options.split(",")):
            rule = "must be PATH or PATH:OPTIONS, with options of tmpfs, as in /run/cache:size=100M,mode=755"
            raise ConfigError(name, item, rule)
        check_container_path(name, path)
    return value
