# SPDX-License-Identifier: MPL-2.0
"""What becomes the container's root: the image itself, or a private root laid over the image.

A private root is an overlay: its upper directory takes what the task changes. With user namespaces the lower
directories are id-mapped mounts of the image, so no file is copied and none gets another owner. An image of any
size serves any number of tasks at once, and each starts as fast as without an overlay (measured on 252 and 257,
Linux 6.1 to 6.18). nspawn itself copies the image: to disk for `--ephemeral`, except on btrfs, and to memory for
`--volatile=overlay` with user namespaces.

Private roots are mounted in a mount namespace of the task's shim and nspawn alone. The host never sees a mount,
and no kill -9 can leave one behind. A task's image and its range of ids are locked in systemd-nspawn's own way.
The shim and nspawn hold the locks, so a lock ends with them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nspawn.cdi import Hook
from nspawn.checks import IdRange
from nspawn.common import SETTINGS_ROOT, ConfigError, DriverError, TransientError, check_shortage, quote
from nspawn.files import read_text
from nspawn.host import OVERLAY_IDMAP, Host, Mounts
from nspawn.images import BUSY, Image, explain_linked_usr, open_directory
from nspawn.job import JobOptions
from nspawn.linux import (
    MNT_DETACH,
    MOUNT_ATTR_NOSUID,
    MS_NODEV,
    attach_layer,
    attach_tree,
    call_libc,
    clone_tree,
    mount_filesystem,
    move_tree,
    open_in_root,
    set_attributes,
    take_lock,
)
from nspawn.permissions import Permission, Size
from nspawn.process import open_user_namespace
from nspawn.quota import explain_no_quotas
from nspawn.view import View


def check_mount_points(root: Path, files: Sequence[str]) -> None:
    """Refuse an image that lacks a mount point and that no task may write to."""
    for path in ("/alloc", "/local", "/secrets", *files):
        folder, name = os.path.split(path)
        try:
            with open_directory(root, folder) as fd:
                os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            check_shortage(error)
            rule = f"the image has no {path} to mount on, and the operator lets no task write to it"
            raise ConfigError("read_only", True, rule, "make it in the image") from None


@dataclass(frozen=True)
class PrivateRoot:
    """The task's own overlay over its image."""

    layers: tuple[str, ...]  # the image's directories, topmost first
    upper_dir: str  # the host's directory for what the task changes; "": in memory
    users: IdRange | None  # None: no user namespace
    is_mapped: bool  # the layers are id-mapped to the users; otherwise files keep the ids they have
    is_usr_mounted: bool = False  # nspawn binds its /usr, by path
    size: int = 0  # bytes that the task may write, 0: any number on disk, and a tenth of the machine's memory
    hooks: tuple[Hook, ...] = ()  # to be run before nspawn


# The name in the task's directory, where no task can see it. In `ephemeral_dir` it follows the machine's name.
UPPER_NAME = ".nspawn-root"
UPPER_FILESYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "tmpfs"})


@dataclass(frozen=True)
class RootPlan:
    """How one container gets its root."""

    private: PrivateRoot | None  # None: nspawn makes the root
    copying: str = ""  # a sentence about the copy that nspawn makes of the image


def plan_upper_dir(task_dir: str, ephemeral_dir: str, machine: str) -> str:
    """Return the directory for what a task changes."""
    return f"{ephemeral_dir}/{machine}{UPPER_NAME}" if ephemeral_dir else f"{task_dir}/{UPPER_NAME}"


def plan_root(
    image: Image, options: JobOptions, host: Host, mounts: Mounts, place: str, most: Size | None = None
) -> RootPlan:
    """Return how the container gets its root. `place`: the directory for what it changes; `most`: the operator's
    limit. Raises ConfigError."""
    found = choose_root(image, options, host, mounts, place)
    if found.private:
        return replace(found, private=limit_root(found.private, options, mounts, most))
    if options.root_size:
        rule = "needs a private root"
        remedy = 'set ephemeral = true, or volatile = "overlay"'
        if options.ephemeral or options.is_volatile:
            rule = "is not possible, because systemd-nspawn copies the image"
            remedy = found.copying or "use an image that is a directory"
        raise ConfigError("root_size", options.root_size, rule, remedy)
    return found


def limit_root(root: PrivateRoot, options: JobOptions, mounts: Mounts, most: Size | None) -> PrivateRoot:
    """Return a private root with its limit. Raises ConfigError if there can be none."""
    if not root.upper_dir:
        return replace(root, size=options.root_size.bytes) if options.root_size else root
    size = options.root_size or most
    if not size:
        return root
    if not root.users:
        rule = "needs user namespaces: without one, root in the container can evade the limit"
        raise ConfigError("root_size", size, rule, 'set user_namespacing = true, or volatile = "overlay"')
    if not mounts.have_project_quotas(root.upper_dir):
        place = os.path.dirname(root.upper_dir)
        raise ConfigError("root_size", size, *explain_no_quotas(place, mounts.filesystem(place)))
    return replace(root, size=size.bytes)


def choose_root(image: Image, options: JobOptions, host: Host, mounts: Mounts, place: str) -> RootPlan:
    """As plan_root, without a limit."""
    # nspawn 252: "Failed to set up ID mapped mounts: Device or resource busy". 257 and 262 work.
    is_old = options.volatile in ("yes", "state") and options.user_namespacing and host.systemd < 257
    is_asked = options.ephemeral or options.volatile == "overlay" or (options.is_volatile and image.is_protected)
    if not (is_asked or is_old or image.layers):
        return RootPlan(None)
    is_mapped = options.has_other_users and options.private_users_ownership != "off"
    layers = tuple(map(str, image.layers or (image.path,)))
    is_usr_mounted = options.volatile == "yes"
    place = "" if options.is_volatile else place
    root = PrivateRoot(layers, place, options.private_users, is_mapped, is_usr_mounted)
    obstacle = find_obstacle(image, root, options, host, mounts)
    if not obstacle:
        return RootPlan(root)
    if image.layers:
        raise ConfigError("image", str(image.path), f"cannot be used on this machine: {obstacle}")
    if image.is_shared and image.is_directory and options.volatile in ("yes", "state"):
        rule = f"needs the permission {Permission.IMAGE_WRITE.value}, because {obstacle}"
        raise ConfigError("volatile", options.volatile, rule, "set it to overlay")
    if is_old:
        rule = f"needs systemd 257 or newer together with user namespaces, because {obstacle}"
        raise ConfigError("volatile", options.volatile, rule, "set user_namespacing = false")
    return RootPlan(None, explain_copy(options, image, mounts, obstacle))


def find_obstacle(image: Image, root: PrivateRoot, options: JobOptions, host: Host, mounts: Mounts) -> str:
    """Return why there can be no private root, "" if there can be one."""
    if not image.is_directory:
        return "the image is no directory"
    if options.private_users_ownership == "foreign":
        return "private_users_ownership = foreign is a way of its own"
    if root.is_mapped and host.kernel < OVERLAY_IDMAP:
        version = ".".join(map(str, host.kernel))
        return f"Linux {version} has no id-mapped overlays (5.19 has), which user namespaces need"
    for layer in root.layers if root.is_mapped else ():
        if not mounts.have_idmap(layer):
            return f"{layer} is on {mounts.filesystem(layer)}, which cannot be id-mapped for a user namespace"
    if root.upper_dir and mounts.filesystem(root.upper_dir) not in UPPER_FILESYSTEMS:
        return f"{root.upper_dir} is on {mounts.filesystem(root.upper_dir)}, which cannot hold what a task changes"
    return ""


def explain_copy(options: JobOptions, image: Image, mounts: Mounts, obstacle: str) -> str:
    """Return a sentence about the copy that nspawn makes of the image; "" without one, and always on btrfs."""
    if not obstacle or mounts.filesystem(str(image.path)) == "btrfs":  # nspawn makes a snapshot
        return ""
    if options.ephemeral:
        return f"ephemeral: systemd-nspawn makes a full copy of the image first, because {obstacle}."
    if options.user_namespacing and image.is_directory:
        return f"volatile: systemd-nspawn copies the whole image into memory first, because {obstacle}."
    return ""


def cover_nosuid(path: str) -> None:
    """Mount a path over itself as nosuid, in this thread's mount namespace. The mounts below it and later binds of
    it are nosuid, too. Does nothing if it is missing. Raises OSError."""
    try:
        tree = clone_tree(path, with_below=True)
    except FileNotFoundError:  # nspawn will say so
        return
    try:
        set_attributes(tree, MOUNT_ATTR_NOSUID, with_below=True)
        attach_tree(tree, path)
    finally:
        os.close(tree)


def mount_root(root: PrivateRoot, base: int, directory: Path) -> None:
    """Mount a private root at `directory`/root, in this thread's mount namespace. `base`: the host's id for its id
    0. Changes this thread's working directory. Raises OSError, HostError or ConfigError."""
    for name in ("lower", "upper", "root"):
        (directory / name).mkdir(mode=0o700)
    os.chdir(directory)  # of this thread only. Relative names keep the options below the kernel's 4 KiB
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
    if root.upper_dir:
        attach_layer(root.upper_dir, "upper", None)
    else:
        mount_filesystem(
            "tmpfs", "upper", options=f"mode=0700,size={root.size or '10%'},nr_inodes=1m"
        )  # as nspawn's
    make_upper(lower[0])
    # "volatile": the changes are thrown away, so they need no sync to disk. With "redirect_dir" tasks can rename
    # directories of the image. Without "metacopy" no upper file can show the data of another lower file. Both use
    # attributes that only root of the host can write.
    options = f"lowerdir={':'.join(lower)},upperdir=upper/upper,workdir=upper/work"
    options += ",redirect_dir=on,metacopy=off,index=off,volatile"
    mount_filesystem("overlay", "root", MS_NODEV, options)  # nspawn mounts disk images nodev, too
    for path in (*lower, "upper"):  # the overlay keeps its own
        call_libc("umount2", path.encode(), MNT_DETACH)
    if root.is_usr_mounted:
        fix_usr("root/usr")


def fix_usr(path: str) -> None:
    """Mount a root's /usr over itself: the path leads there even if somebody swaps /usr in the image. Raises
    ConfigError if it is a symbolic link."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        raise explain_linked_usr() from None
    try:
        tree = clone_tree(fd)
        try:
            move_tree(tree, fd)
        finally:
            os.close(tree)
    finally:
        os.close(fd)


def make_upper(lower: str) -> None:
    """Make the overlay's work and upper directories, the latter with the mode and owner of the image's root."""
    os.mkdir("upper/work", mode=0o700)
    os.mkdir("upper/upper", mode=0o700)
    found = os.stat(lower)  # id-mapped: the owner is the container's
    os.chown("upper/upper", found.st_uid, found.st_gid)
    os.chmod("upper/upper", stat.S_IMODE(found.st_mode))


LOCK_PATIENCE = 0.5  # seconds: remove_locks takes a lock for a moment, to find out whether anybody holds it


def lock_image(image: Image) -> int | None:
    """Keep other containers from writing to an image, as nspawn does for `--read-only`. Return the descriptor that
    holds the lock, None for layers and the host's root. May block for LOCK_PATIENCE. Raises OSError, or
    TransientError if another container may write."""
    if image.layers or image.path == Path("/"):
        return None
    found = image.opened.stat()
    path = SETTINGS_ROOT / f"locks/inode-{found.st_dev}:{found.st_ino}"
    deadline = time.monotonic() + LOCK_PATIENCE
    while (fd := take_lock(path, fcntl.F_RDLCK)) is None:
        if time.monotonic() > deadline:
            raise TransientError(BUSY.format(image.path))
        time.sleep(0.01)
    return fd


UID_LOCKS = Path("/run/systemd/nspawn-uid")
ACCOUNTS = Path("/etc")  # of passwd, group, subuid and subgid
FIRST_SLOT, LAST_SLOT = 0x8, 0x6FFF  # systemd's ids for containers, in units of 65536


def pick_users(machine: str) -> tuple[int, int]:
    """Return the first id of a free range of 65536, and the descriptor of its lock. The lock keeps other tasks and
    nspawn's own picks out. read_taken_slots finds other uses. Raises TransientError or OSError."""
    taken = read_taken_slots()
    first = int.from_bytes(hashlib.sha256(machine.encode()).digest()[:4], "big")  # usually the same for a name
    count = LAST_SLOT - FIRST_SLOT + 1
    for number in range(count):
        slot = FIRST_SLOT + (first + number) % count
        if slot in taken:
            continue
        fd = take_lock(UID_LOCKS / str(slot << 16), fcntl.F_WRLCK)
        if fd is not None:
            return slot << 16, fd
    raise TransientError("no range of 65536 user ids is free on this machine")


def read_taken_slots() -> set[int]:
    """Return the slots (ranges of 65536 ids) with users, groups, subordinate ids or processes of this machine."""
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


def complete_root(root: Path) -> None:
    """Make /usr in a private root: nspawn needs it, and an OCI image may lack it. Errors are ignored."""
    owner = os.stat(root)
    with contextlib.suppress(OSError), open_directory(root, "/") as fd:
        os.mkdir("usr", 0o755, dir_fd=fd)
        os.chown("usr", owner.st_uid, owner.st_gid, dir_fd=fd)


def make_mount_points(root: Path) -> None:
    """Make the mount points of the task's own directories in an image that will be read-only. nspawn would do so
    too late: it has mounted the image by then. Raises ConfigError."""
    for name in ("alloc", "local", "secrets"):
        try:
            (root / name).mkdir(mode=0o755)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno != errno.EROFS:  # that of the image
                check_shortage(error)
            rule = f"the image has no /{name} to mount on, and none can be made in it ({error.strerror})"
            raise ConfigError("read_only", True, rule, "make the directory in the image") from None


WRITABLE_MOUNTS = ("/alloc", "/local", "/secrets")  # the task's own directories


def make_working_directory(view: View, path: str, obstacle: str) -> None:
    """Make a command's working directory if the container has none, as docker does: for root, with mode 755.
    `obstacle` says why none can be made in the container's root, "" if one can. Raises DriverError."""
    try:
        found = view.open(path)
        if found is None and view.have_links():
            return
    except OSError:
        return  # not known: nspawn finds it, or says that there is none
    if found is not None:
        is_directory = stat.S_ISDIR(os.fstat(found).st_mode)
        os.close(found)
        if not is_directory:
            raise DriverError(f"working_directory: {quote(path)} in the container is not a directory")
        return
    place = view.find_place(path)
    if place and place not in WRITABLE_MOUNTS:
        obstacle = f"{quote(place)} is mounted from elsewhere"
    if place not in WRITABLE_MOUNTS and obstacle:
        raise DriverError(explain_directory(path, obstacle))
    root = os.open(view.mounts[place], os.O_PATH | os.O_CLOEXEC) if place else view.open_root()
    try:
        make_directories(root, path[len(place) :])
    except OSError as error:
        if error.errno != errno.EROFS:
            check_shortage(error)
        raise DriverError(explain_directory(path, str(error.strerror))) from None
    finally:
        os.close(root)


def explain_directory(path: str, obstacle: str) -> str:
    where = f"there is no directory {quote(path)} in the container, and none can be made"
    return f"working_directory: {where}: {obstacle}"


def make_directories(root: int, path: str) -> None:
    """Make a directory below an open one, and its parents, for the root's owner. Links lead nowhere else. Raises
    OSError."""
    owner, made, here = os.fstat(root), "", os.dup(root)
    try:
        for part in filter(None, path.split("/")):
            made += f"/{part}"
            try:
                below = open_in_root(root, made, os.O_PATH | os.O_DIRECTORY)
            except FileNotFoundError:
                os.mkdir(part, 0o755, dir_fd=here)
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                below = os.open(part, flags, dir_fd=here)  # others may write there: never a link of theirs
                os.fchown(below, owner.st_uid, owner.st_gid)
            os.close(here)
            here = below
    finally:
        os.close(here)


def make_mount_file(root: Path, path: str, *, is_private: bool = False) -> None:
    """Make an empty file to mount on in an image that will be read-only, if there is none. In a private root,
    which is the task's own, make its directory, too. Raises ConfigError."""
    folder, name = os.path.split(path)
    try:
        if is_private:
            with open_directory(root, "/") as top:
                make_directories(top, folder)
        with open_directory(root, folder) as fd:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=fd))
    except FileExistsError:
        return
    except OSError as error:
        if error.errno != errno.EROFS:
            check_shortage(error)
        rule = f"the image has no {path} to mount on, and none can be made in it ({error.strerror})"
        raise ConfigError("read_only", True, rule, "make the file in the image") from None
