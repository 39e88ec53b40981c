# SPDX-License-Identifier: MPL-2.0
"""Paths of the host that a job names: opened once, checked, then read or mounted from the descriptor.

Whoever can write to a directory on the way can swap a part of the path at any moment. So the checks apply to what
was opened, and exactly that is read or mounted.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nspawn.common import ConfigError, HostError, check_shortage, is_below, name_entry, quote
from nspawn.devices import DeviceRule, find_nodes, parse_majors
from nspawn.host import is_on_shared_mount
from nspawn.images import IMAGE_SUFFIXES, Image, choose_image_dir, find_archive, image_directories, is_image_name
from nspawn.job import JobOptions, TaskConfig
from nspawn.linux import (
    MS_NOSUID,
    clone_tree,
    mount_filesystem,
    open_in_root,
)
from nspawn.mounts import CdiNode, Device, Mount
from nspawn.options import Option
from nspawn.permissions import Permission, PluginOptions, check_permission


@dataclass(frozen=True)
class Source:
    """An open file or directory of the host."""

    path: str  # when it was opened, without symbolic links
    mode: int  # st_mode
    fd: int = -1
    number: int = 0  # st_rdev of a device node
    uid: int = 0
    gid: int = 0

    @property
    def is_node(self) -> bool:
        return stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_device(self) -> bool:
        return self.is_node or is_below(self.path, "/dev")


@dataclass(frozen=True)
class NamedSource:
    """A path of the host in a job."""

    option: str
    name: str
    is_writable: bool = False


def name_sources(options: JobOptions) -> Iterator[NamedSource]:
    """Yield all paths of the host that a job names, except its image and devices."""
    for option in ("bind", "bind_read_only", "mount"):
        for mount in getattr(options, option):
            yield NamedSource(option, mount.source, not mount.read_only)
    for option in ("overlay", "overlay_read_only"):
        for overlay in getattr(options, option):
            yield from (NamedSource(option, name) for name in overlay.sources)
    yield from (NamedSource("load_credential", name) for name in options.load_credential.values())


def open_source(option: str, name: str, path: str) -> Source:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        check_shortage(error)
        raise ConfigError(option, name, f"cannot be used: {os.strerror(error.errno or 0)}") from None
    found = os.fstat(fd)
    return Source(os.readlink(f"/proc/self/fd/{fd}"), found.st_mode, fd, found.st_rdev, found.st_uid, found.st_gid)


LEADS_OUT = "leads out of the task's directories"


@contextlib.contextmanager
def open_directories(alloc_dir: str, names: Iterable[str]) -> Iterator[dict[str, Source]]:
    """Open directories of an allocation and yield them by path. Below `alloc_dir` symbolic links are refused, as
    other tasks of the allocation can make them. The way to it is the operator's. Raises HostError."""
    found: dict[str, Source] = {}
    with contextlib.ExitStack() as stack:
        try:
            root = os.open(alloc_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            check_shortage(error)
            raise HostError(f"{alloc_dir} cannot be opened: {error.strerror}; the task is not started") from None
        stack.callback(os.close, root)
        for name in names:
            path = f"{alloc_dir}/{name}"
            try:
                fd = open_in_root(root, name, os.O_PATH | os.O_DIRECTORY, follow=False)
            except OSError as error:
                check_shortage(error)
                is_link = error.errno == errno.ELOOP
                why = (
                    "is a symbolic link instead of a directory" if is_link else f"cannot be used: {error.strerror}"
                )
                raise HostError(f"{path} {why}; the task is not started") from None
            stack.callback(os.close, fd)
            found[path] = Source(os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_mode, fd)
        yield found


@contextlib.contextmanager
def open_volumes(mounts: Iterable[Mount]) -> Iterator[dict[str, Source]]:
    """Open what Nomad wants mounted and yield it by path. Raises ConfigError."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Source] = {}
        for mount in mounts:
            if mount.source not in found:
                found[mount.source] = open_source(mount.option, mount.source, mount.source)
                stack.callback(os.close, found[mount.source].fd)
            if mount.shows_later_mounts and not is_on_shared_mount(found[mount.source].fd):
                rule = (
                    f"{mount.source} is on a private mount of the host, so no later mount can appear in the task"
                )
                remedy = "run mount --make-shared on it, as systemd does for all at boot, or use private"
                raise ConfigError("volume_mount.propagation_mode", mount.propagation, rule, remedy)
        yield found


def check_source(
    rows: Sequence[Option],
    named: NamedSource,
    source: Source,
    own: Mapping[str, Source],
    config: PluginOptions,
) -> None:
    """Refuse a source that the operator does not allow, or that holds the log pipes."""
    option, name = named.option, named.name
    if "alloc" in own and (source.path == own["alloc"].path or is_below(source.path, f"{own['alloc'].path}/logs")):
        rule = "holds the log pipes of all tasks of the allocation"
        raise ConfigError(option, name, rule, "use a directory below alloc, or /alloc, which is there anyway")
    if not is_own(source.path, own):
        if name.split("/")[0] in own:
            raise ConfigError(option, name, LEADS_OUT)
        check_outside(rows, option, name, source.path, config)
        folder = os.path.realpath(config.image_dir)
        if named.is_writable and (is_below(source.path, folder) or is_below(folder, source.path)):
            check_permission(option, name, Permission.IMAGE_WRITE, config)  # it could write to images
    if source.is_device and not config.allows(Permission.DEVICES):
        check_permission(option, name, Permission.DEVICE_BINDS, config)


def check_outside(rows: Sequence[Option], option: str, name: str, path: str, config: PluginOptions) -> None:
    """Refuse a path outside the task's directories that the operator does not allow for this option."""
    permission = next(row.permission for row in rows if row.name == option)
    if permission and permission.is_word:
        check_permission(option, name, permission, config)
    check_host_path(option, name, path, config)


def check_host_path(option: str, name: str, path: str, config: PluginOptions) -> None:
    """Refuse a path that is not below what the operator allows. `path` has no symbolic links. But if it could not
    be opened, it is the job's own name for it, so that the error does not reveal what exists."""
    if not config.volumes:
        rule = "the operator of this client does not let tasks mount anything of the host (volumes = false)"
        raise ConfigError(option, name, rule, "use the task's own directories, alloc, local and secrets")
    allowed = config.allow_paths
    places = [*allowed, *map(os.path.realpath, allowed)]
    if not any(is_below(path, place) for place in places):
        is_led = any(is_below(os.path.normpath(name), place) for place in places)
        leads = f" (it is {quote(path)})" if is_led else ""
        rule = f"the operator of this client does not allow this path{leads}"
        raise ConfigError(
            option, name, rule, f"allowed is what is below {', '.join(map(quote, allowed)) or 'nothing'}"
        )


@contextlib.contextmanager
def open_sources(
    rows: Sequence[Option], options: JobOptions, own: Mapping[str, Source], config: PluginOptions
) -> Iterator[dict[str, Source]]:
    """Open and check the paths that a job names, and yield them by these names. `own`: the task's directories, by
    the job's names for them. Raises ConfigError."""
    found: dict[str, Source] = {}
    with contextlib.ExitStack() as stack:
        for named in name_sources(options):
            if named.name not in found:  # a second look could find another file, which this option may not have
                found[named.name] = open_named(rows, named, own, config)
                stack.callback(os.close, found[named.name].fd)
            check_source(rows, named, found[named.name], own, config)
        yield found


def open_named(
    rows: Sequence[Option], named: NamedSource, own: Mapping[str, Source], config: PluginOptions
) -> Source:
    first, *rest = named.name.split("/")
    path = "/".join([f"/proc/self/fd/{own[first].fd}", *rest]) if first in own else named.name
    try:
        return open_source(named.option, named.name, path)
    except ConfigError:
        if first not in own:
            check_outside(rows, named.option, named.name, os.path.normpath(named.name), config)
        elif not is_own(os.path.realpath(path), own):
            raise ConfigError(named.option, named.name, LEADS_OUT) from None
        raise


@contextlib.contextmanager
def open_devices(devices: Iterable[Device]) -> Iterator[dict[Device, Source]]:
    """Open device nodes and yield them: those of the job and those of device plugins, which the operator runs."""
    found: dict[Device, Source] = {}
    with contextlib.ExitStack() as stack:
        for device in devices:
            source = open_source("devices.host_path", device.host_path, device.host_path)
            stack.callback(os.close, source.fd)
            if not source.is_node:
                remedy = "name each node in a directory by itself, and other files in bind"
                raise ConfigError("devices.host_path", device.host_path, "must be a device node", remedy)
            found[device] = own_node(source, device) if isinstance(device, CdiNode) else source
        yield found


def own_node(source: Source, node: CdiNode) -> Source:
    """Return a device node with the owner and mode that it has in the container."""
    mode = source.mode if node.mode < 0 else stat.S_IFMT(source.mode) | stat.S_IMODE(node.mode)
    uid, gid = source.uid if node.uid < 0 else node.uid, source.gid if node.gid < 0 else node.gid
    return replace(source, mode=mode, uid=uid, gid=gid)


def expand_classes(options: JobOptions) -> tuple[JobOptions, list[DeviceRule]]:
    """Return the options with the nodes that there are now instead of classes, and rules for all nodes that a
    class will ever have. Raises ConfigError, HostError or OSError."""
    rules: list[DeviceRule] = []
    nodes = {device.target: device for device in options.devices if not device.is_class}
    for device in options.devices:
        if device.is_class:
            found = find_class_rules(device)
            rules += found
            for path in itertools.chain(*(find_nodes(rule.is_block, rule.major) for rule in found)):
                nodes.setdefault(path, Device(path, cgroup_permissions=device.cgroup_permissions))
    if len(nodes) > MAX_NODES:
        raise HostError(f"devices are more than {MAX_NODES} nodes on this host; name smaller classes")
    return replace(options, devices=tuple(nodes.values())), rules


def find_class_rules(device: Device) -> list[DeviceRule]:
    """Return a rule for each major of a class. Raises ConfigError if it has none."""
    kind, _, pattern = device.host_path.partition("-")
    majors = parse_majors(Path("/proc/devices").read_text(), kind == "block", pattern)
    if not majors:
        rule = f"/proc/devices of this host has no class {pattern} of {kind} devices"
        remedy = "load the module that makes it when the host boots, by /etc/modules-load.d"
        raise ConfigError("devices.host_path", device.host_path, rule, remedy)
    return [DeviceRule(kind == "block", major, None, device.cgroup_permissions) for major in dict.fromkeys(majors)]


MAX_NODES = 1024  # of a task; files to look at in a directory


def read_rules(source: Source, permissions: str) -> Iterator[DeviceRule]:
    """Yield a rule for a node, or for each node below a directory of /dev; nothing for other sources."""
    if source.is_node:
        yield DeviceRule.of(source.mode, source.number, permissions)
    if not (source.is_directory and source.is_device):
        return
    files = (f"{place}/{name}" for place, _, names in os.walk(f"/proc/self/fd/{source.fd}/") for name in names)
    for number, path in enumerate(files):
        if number == MAX_NODES:
            rule = f"has more than {MAX_NODES} files, and each node among them needs a rule of its own"
            raise HostError(f"{quote(source.path)} cannot be used in a container: it {rule}; mount a smaller part")
        with contextlib.suppress(OSError):  # gone
            found = os.lstat(path)
            if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
                yield DeviceRule.of(found.st_mode, found.st_rdev, permissions)


def find_device_rules(
    task: TaskConfig,
    options: JobOptions,
    sources: Mapping[str, Source],
    volumes: Mapping[str, Source],
    devices: Mapping[Device, Source],
) -> Iterator[DeviceRule]:
    """Yield rules for the devices of a task: those it names, and the nodes in its binds and in Nomad's mounts."""
    for device, source in devices.items():
        yield from read_rules(source, device.cgroup_permissions)
    opened = [(mount, sources[mount.source]) for mount in options.binds]
    opened += [(mount, volumes[mount.source]) for mount in task.mounts]
    for mount, source in opened:
        yield from read_rules(source, "r" if mount.read_only else "rw")


MAX_CREDENTIALS = 1 << 20  # bytes of all credentials together: systemd's limit


def read_credentials(options: JobOptions, sources: Mapping[str, Source]) -> dict[str, bytes]:
    """Return the content of each credential. Raises ConfigError."""
    found = {key: value.encode() for key, value in options.set_credential.items()}
    for key, name in options.load_credential.items():
        found[key] = read_source(name_entry("load_credential", key), name, sources[name])
    if sum(map(len, found.values())) > MAX_CREDENTIALS:
        raise ConfigError("load_credential", sorted(found), "credentials may have 1 MiB together")
    return found


def read_source(option: str, name: str, source: Source) -> bytes:
    """Return the content of a file, cut one byte after MAX_CREDENTIALS. Raises ConfigError."""
    if not stat.S_ISREG(source.mode):
        raise ConfigError(option, name, "must be a file")
    try:
        with open(f"/proc/self/fd/{source.fd}", "rb") as file:
            return file.read(MAX_CREDENTIALS + 1)
    except OSError as error:
        check_shortage(error)
        raise ConfigError(option, name, f"cannot be read: {error.strerror}") from None


def is_own(path: str, own: Mapping[str, Source]) -> bool:
    return any(is_below(path, source.path) for source in own.values())


@contextlib.contextmanager
def open_image(image: Image, name: str, own: Mapping[str, Source], config: PluginOptions) -> Iterator[Image]:
    """Open an image that was found, check it, and yield it. It must still be what was found: tasks that can write
    to a directory on the way, or to an image that contains this one, can swap it. Raises ConfigError."""
    try:
        fd = os.open(image.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        check_shortage(error)
        raise ConfigError("image", name, f"cannot be used: {os.strerror(error.errno or 0)}") from None
    try:
        found = Source(os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_mode, fd)
        if found.path != str(image.path) or found.is_directory is not image.is_directory:
            rule = f"somebody put {quote(found.path)} in place of {quote(str(image.path))} during the start"
            raise ConfigError("image", name, rule, "start the task again")
        opened = replace(image, fd=fd, is_fixed=is_fixed(found.path, own, config))
        check_image(opened, name, own, config)
        may_write = is_own(found.path, own) or config.allows(Permission.IMAGE_WRITE)
        yield replace(opened, is_shared=not may_write)
    finally:
        os.close(fd)


def check_image_name(name: str, own: Mapping[str, Source], config: PluginOptions) -> None:
    """Refuse a path that is not allowed even if no image was found: a job must not learn what exists there."""
    path = os.path.normpath(name)
    places = [*(source.path for source in own.values()), config.image_dir]
    if os.path.isabs(path) and not any(is_below(path, place) for place in places):
        check_host_path("image", name, path, config)


def is_fixed(path: str, own: Mapping[str, Source], config: PluginOptions) -> bool:
    """Whether tasks cannot swap an image: it is directly in image_dir. Also true if jobs may mount all of the host
    anyway. False in the task's own directories."""
    is_free = config.volumes and "/" in config.allow_paths
    places = map(os.path.realpath, image_directories(config.image_dir))
    return not is_own(path, own) and (is_free or os.path.dirname(path) in places)


def check_image(image: Image, name: str, own: Mapping[str, Source], config: PluginOptions) -> None:
    """Refuse an image that the operator does not allow. What image_dir itself holds or links to is allowed.
    Elsewhere a disk image needs a permission, as a task may have made it. Outside the task's own directories and
    image_dir, the path must be allowed, too."""
    path, folder = str(image.path), os.path.realpath(choose_image_dir(name, config.image_dir))
    places = [os.path.realpath(f"{folder}/{name}{suffix}") for suffix in IMAGE_SUFFIXES]
    if os.path.dirname(path) == folder or (is_image_name(name) and {path, os.path.dirname(path)} & {*places}):
        return
    if not is_own(path, own) and not is_below(path, folder):
        check_host_path("image", name, path, config)
    if not image.is_directory and not find_archive(image):
        check_permission("image", name, Permission.DISK_IMAGES, config)


VERITY_FILES = (".roothash", ".roothash.p7s", ".usrhash", ".usrhash.p7s", ".verity")


def check_verity(image: Image, options: JobOptions) -> None:
    """Refuse a disk image with files that verify it, if it is used by another name: nspawn would not find them."""
    if image.is_directory or image.fd < 0 or image.is_fixed:
        return
    given = {".roothash": options.root_hash, ".roothash.p7s": options.root_hash_sig}
    for end in VERITY_FILES:
        path = f"{str(image.path).removesuffix('.raw')}{end}"
        if os.path.lexists(path) and not given.get(end):
            rule = f"is verified by {quote(path)}, but whoever can exchange the image can exchange that file"
            remedy = (
                "give root_hash in the job, or use an image that lies in the client's image_dir with its files"
            )
            raise ConfigError("image", options.image, rule, remedy)


def check_image_write(image: Image, options: JobOptions, config: PluginOptions) -> None:
    """Refuse what would change a shared image, where no private root prevents it."""
    if not image.is_shared:
        return
    if options.private_users_ownership == "chown":
        check_permission("private_users_ownership", "chown", Permission.IMAGE_WRITE, config)
    if not image.is_directory and not (options.read_only or options.ephemeral):
        rule = (
            "is written to by the task, and the operator of this client does not allow "
            f"{Permission.IMAGE_WRITE.value}"
        )
        raise ConfigError("image", options.image, rule, "set read_only or ephemeral")


@dataclass(frozen=True)
class StagedSource:
    """A source and the path, out of reach of tasks, where it is mounted for nspawn."""

    source: Source
    path: str  # in the task's state directory
    is_node: bool = False  # instead of a mount, there is a new device node like the source
    is_private: bool = False  # later mounts of the host do not appear in it


def clone_source(source: Source) -> int:
    """Return a detached bind mount of an open file or directory, with the mounts below it. Raises HostError."""
    try:
        return clone_tree(source.fd, with_below=True)
    except OSError as error:
        check_shortage(error)
        raise HostError(f"{quote(source.path)} cannot be mounted: {error.strerror}") from None


def make_nodes(staged_sources: Sequence[StagedSource], directory: Path) -> None:
    """Make copies of device nodes in a tmpfs, in this thread's mount namespace. A container may change them, and a
    tmpfs, unlike the host's /dev, can be id-mapped: the owner is the same inside. Raises OSError or HostError."""
    if not staged_sources:
        return
    mount_filesystem("tmpfs", str(directory), MS_NOSUID, "mode=0700,size=64k,nr_inodes=4k")
    for staged in staged_sources:
        source = staged.source
        try:
            os.mknod(staged.path, source.mode, source.number)
        except OSError as error:
            check_shortage(error)
            why = f"no node can be made: {error.strerror}"
            raise HostError(f"{quote(source.path)} cannot be used in a container: {why}") from None
        os.chown(staged.path, source.uid, source.gid)
        os.chmod(staged.path, stat.S_IMODE(source.mode))
