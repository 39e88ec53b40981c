# SPDX-License-Identifier: MPL-2.0
"""Functions of the C library and system calls that Python does not have."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import struct
from pathlib import Path
from typing import Any


@functools.lru_cache(maxsize=1)
def load_libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def call_libc(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library that returns an int. Raises OSError if that is negative."""
    import ctypes

    result = int(getattr(load_libc(), name)(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


OPENAT2 = 437  # system call: the same number on all machines
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 0x1, 0x2, 0x4, 0x10
TRIES = 100  # openat2 fails with EAGAIN if any directory is renamed while it follows a ".."


def openat2(directory: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """Call openat2(2). Raises OSError."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return call_libc("syscall", OPENAT2, directory, os.fsencode(path), how, len(how))


def open_in_root(root: int, path: str, flags: int, *, follow: bool = True, mode: int = 0) -> int:
    """Open a path as a process with this root directory would. The kernel never leaves that directory. It follows
    at most 40 links, and none without `follow`. Raises OSError."""
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | (0 if follow else RESOLVE_NO_SYMLINKS)
    for _ in range(TRIES):
        with contextlib.suppress(BlockingIOError):
            return openat2(root, path, flags, resolve, mode)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


CLONE_NEWNET, CLONE_NEWIPC = 0x40000000, 0x08000000
CLONE_FS, CLONE_NEWNS = 0x200, 0x20000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE, MNT_DETACH = (
    0x2,
    0x4,
    0x1000,
    0x4000,
    1 << 18,
    1 << 19,
    2,
)
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442  # system calls: the same numbers on all machines
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE, OPEN_TREE_CLONE = -100, 0x1000, 0x8000, 1
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_IDMAP = 0x1, 0x2, 0x100000


def mount_filesystem(kind: str, target: str, flags: int = 0, options: str = "") -> None:
    """Call mount(2) with `kind` as both type and source. Raises OSError."""
    call_libc("mount", kind.encode(), os.fsencode(target), kind.encode(), flags, os.fsencode(options))


def bind_mount(source: str, target: str) -> None:
    """Mount a file or directory in another place, too, in this thread's namespace. Raises OSError."""
    call_libc("mount", os.fsencode(source), os.fsencode(target), None, MS_BIND, None)


def enter_namespace() -> None:
    """Put this thread into a new mount namespace. Later mounts of the host appear in it, but not the reverse."""
    call_libc("unshare", CLONE_FS | CLONE_NEWNS)
    mount_filesystem("none", "/", MS_REC | MS_SLAVE)


def find_place(place: int | str) -> tuple[int, bytes]:
    """Return the first arguments of the kernel's calls with `at` for an open file or a path."""
    return (place, b"") if isinstance(place, int) else (AT_FDCWD, os.fsencode(place))


def clone_tree(place: int | str, *, with_below: bool = False) -> int:
    """Return a detached bind mount of an open file or a path, perhaps with what is mounted below it. Raises
    OSError."""
    flags = OPEN_TREE_CLONE | AT_EMPTY_PATH | os.O_CLOEXEC | (AT_RECURSIVE if with_below else 0)
    return call_libc("syscall", OPEN_TREE, *find_place(place), flags)


def move_tree(tree: int, place: int | str) -> None:
    """Mount a detached tree, given by its descriptor, at an open file or a path. Raises OSError."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    call_libc("syscall", MOVE_MOUNT, tree, b"", *find_place(place), flags)


def set_attributes(place: int | str, attributes: int, *, with_below: bool = False, users_fd: int = 0) -> None:
    """Add attributes to the mount of an open file or at a path, perhaps to those below it, too. `users_fd`: the
    user namespace for MOUNT_ATTR_IDMAP. Raises OSError."""
    changes = struct.pack("QQQQ", attributes, 0, 0, users_fd)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if with_below else 0)
    call_libc("syscall", MOUNT_SETATTR, *find_place(place), flags, changes, len(changes))


def attach_tree(tree: int, target: str, *, is_private: bool = False) -> None:
    """Mount a detached tree, given by its descriptor. Its mounts become slaves of those it was cloned from: what
    is mounted or unmounted there later, is here too. Not so if `is_private`."""
    move_tree(tree, target)
    kind = MS_PRIVATE if is_private else MS_SLAVE
    call_libc("mount", None, os.fsencode(target), None, MS_REC | kind, None)


def attach_layer(source: str, target: str, users_fd: int | None) -> None:
    """Bind-mount a directory, id-mapped by a user namespace if one is given."""
    tree = clone_tree(source)
    try:
        if users_fd is not None:
            set_attributes(tree, MOUNT_ATTR_IDMAP, users_fd=users_fd)
        move_tree(tree, target)
    finally:
        os.close(tree)


def can_map_ids(path: str, users_fd: int) -> bool:
    """Whether the mount at a path can be id-mapped by a user namespace, tried on a copy of the mount that nobody
    sees. False if there is nothing at the path. Raises OSError."""
    try:
        tree = clone_tree(path)
    except FileNotFoundError:
        return False
    try:
        set_attributes(tree, MOUNT_ATTR_IDMAP, users_fd=users_fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EPERM):  # the file system cannot; it is mapped already
            return False
        raise
    finally:
        os.close(tree)
    return True


SETRESUID = {"x86_64": 117, "aarch64": 147}  # the system call's number


def set_thread_user(uid: int) -> None:
    """Set the effective user of this thread; the C library's function sets that of all threads. Raises OSError."""
    call_libc("syscall", SETRESUID[os.uname().machine], -1, uid, -1)


QUOTACTL_FD, PRJQUOTA = 443, 2  # the system call has the same number on all machines


def quotactl_fd(fd: int, command: int, kind: int, number: int, buffer: bytearray) -> None:
    """Call quotactl_fd(2), which Linux has since 5.14: for the file system of an open file, and for the user,
    group or project of this number. It reads or fills the buffer. Raises OSError."""
    import ctypes

    address: Any = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    call_libc("syscall", QUOTACTL_FD, fd, command << 8 | kind, number, address)


RTM_DELLINK, NLM_F_REQUEST, NLM_F_ACK, IFLA_ALT_IFNAME = 17, 1, 4, 53


def delete_link(name: str) -> None:
    """Delete a network interface by its name or an alternative one; does nothing if there is none. The kernel may
    let the caller wait for others who change interfaces. Raises OSError."""
    text = name.encode() + b"\0"
    link = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)
    link += struct.pack("=HH", 4 + len(text), IFLA_ALT_IFNAME) + text + bytes(-len(text) % 4)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink:
        netlink.send(struct.pack("=IHHII", 16 + len(link), RTM_DELLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + link)
        number = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
        if number not in (0, errno.ENODEV):
            raise OSError(number, os.strerror(number), name)


LOCK_FORMAT = "hhqqi"  # struct flock
WRITE_LOCK = struct.pack(LOCK_FORMAT, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def is_locked(fd: int) -> bool:
    """Whether somebody else holds a lock on an open file. Raises OSError."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, WRITE_LOCK)
    return bool(struct.unpack(LOCK_FORMAT, found)[0] != fcntl.F_UNLCK)


def take_lock(path: Path, kind: int) -> int | None:
    """Lock a file as systemd does: F_RDLCK to share, F_WRLCK to exclude. Return the descriptor that holds the
    lock, None if somebody else has it. Raises OSError."""
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
        os.close(fd)  # the previous holder removed the file: a lock on it is void
