# SPDX-License-Identifier: MPL-2.0
"""Limits of what a directory may hold, by project quotas of ext4 and xfs.

A directory gets a project id of its own, which all that is made below it inherits. The directory itself is what
holds the id: an id in which the kernel counts no file is free, whatever limit a crash has left with it. So nothing
is written down that a crash could make wrong, and several plugins may share a file system.

An overlay writes without CAP_SYS_RESOURCE, which ext4 lets exceed a quota. In a user namespace nobody can change a
file's project. But for a file of the image, the overlay compares with the project that it has there, and then sets
the asked one as the host's root (seen with Linux 6.1). So a limited task cannot set attributes of files at all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from nspawn.common import HostError, TransientError, check_shortage
from nspawn.files import FS_IOC_SETFLAGS, read_text
from nspawn.linux import PRJQUOTA, call_libc, quotactl_fd

# A dense range of ids: xfs never frees its record of an id. docker, Kubernetes and systemd take others.
FIRST_PROJECT, PROJECTS = 0x6E730000, 1 << 16

FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
ATTRIBUTES = struct.Struct("=IIIII8x")  # struct fsxattr: flags, extent size, extents, project, CoW extent size
PROJINHERIT = 0x200

Q_XGETQUOTA, Q_XSETQLIM, Q_XGETQSTAT = (ord("X") << 8 | number for number in (3, 4, 5))
ENFORCED = 1 << 5  # of projects, in the flags of struct fs_quota_stat
# struct fs_disk_quota: version, what, fields, id; hard and soft limits of blocks, and of inodes; blocks and inodes
QUOTA = struct.Struct("=bbHIQQQQQQ56x")
PROJECT_QUOTA, HARD_LIMITS = 2, 1 << 3 | 1 << 1
BLOCK = 512


def is_enforced(fd: int) -> bool:
    """Whether the kernel enforces project quotas on the file system of an open file. Raises TransientError."""
    status = bytearray(256)
    try:
        quotactl_fd(fd, Q_XGETQSTAT, PRJQUOTA, 0, status)
    except OSError as error:
        check_shortage(error)
        return False  # Linux before 5.14, or a file system without quotas
    return bool(struct.unpack_from("=H", status, 2)[0] & ENFORCED)


def have_project_quotas(path: str) -> bool:
    """Whether directories can be limited at a path, which need not be there yet. Raises OSError or
    TransientError."""
    place = Path(path)
    place = next(parent for parent in (place, *place.parents) if parent.is_dir())
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return is_enforced(fd)
    finally:
        os.close(fd)


REMEDIES = {
    "ext4": "run tune2fs -O quota,project on the unmounted file system, and mount it with the option prjquota",
    "xfs": "mount it with the option prjquota",
}
OTHER_REMEDY = "use ext4 or xfs, mounted with the option prjquota"


def explain_no_quotas(place: str, kind: str) -> tuple[str, str]:
    """Return why directories cannot be limited at a path, and what to do about it. `kind`: of its file system."""
    return (
        f"needs project quotas (and Linux 5.14), and {place} is on {kind or 'a file system'} without them",
        REMEDIES.get(kind, OTHER_REMEDY),
    )


def count_inodes(fd: int, project: int) -> int:
    """Return how many files and directories a project has on the file system of an open file. Raises OSError."""
    answer = bytearray(QUOTA.size)
    try:
        quotactl_fd(fd, Q_XGETQUOTA, PRJQUOTA, project, answer)
    except FileNotFoundError:  # xfs has no record of it
        return 0
    return int(QUOTA.unpack(answer)[-1])


def write_limits(fd: int, project: int, size: int, inodes: int) -> None:
    """Set a project's limits, 0 for none. Raises OSError."""
    limits = QUOTA.pack(1, PROJECT_QUOTA, HARD_LIMITS, project, size // BLOCK, 0, inodes, 0, 0, 0)
    quotactl_fd(fd, Q_XSETQLIM, PRJQUOTA, project, bytearray(limits))


def read_project(fd: int) -> int:
    """Return the project of an open directory, 0 for none. Raises OSError."""
    return int(ATTRIBUTES.unpack(read_attributes(fd))[3])


def read_attributes(fd: int) -> bytearray:
    attributes = bytearray(ATTRIBUTES.size)
    fcntl.ioctl(fd, FS_IOC_FSGETXATTR, attributes)
    return attributes


def write_project(fd: int, project: int) -> None:
    """Put an open directory, and what will be made in it, into a project. Raises OSError."""
    flags, extent, extents, _, cow = ATTRIBUTES.unpack(read_attributes(fd))
    fcntl.ioctl(fd, FS_IOC_FSSETXATTR, ATTRIBUTES.pack(flags | PROJINHERIT, extent, extents, project, cow))


def limit_directory(fd: int, path: str, size: int) -> None:
    """Limit what an open and empty directory may hold. Raises DriverError or OSError."""
    if project := read_project(fd):
        rule = f"{path} is in the project {project} already, which has quotas of its own"
        raise HostError(f"root_size: {rule}; set the plugin's ephemeral_dir to a directory outside of it")
    write_limits(fd, take_project(fd), size, plan_inodes(os.fstatvfs(fd), size))


def plan_inodes(found: os.statvfs_result, size: int) -> int:
    """Return how many files a limited directory may hold: as large a part of the file system's as of its space."""
    return max(size * found.f_files // (found.f_blocks * found.f_frsize), 64)


def take_project(fd: int) -> int:
    """Put an open and empty directory into a free project. If two take the same one at once, each sees the other's
    directory in it, and goes on. Raises TransientError or OSError."""
    named = read_named_projects()
    project = FIRST_PROJECT
    while project < FIRST_PROJECT + PROJECTS:
        if project not in named and not count_inodes(fd, project):
            write_project(fd, project)
            if count_inodes(fd, project) == 1:
                return project
            project += random.randrange(16)
        project += 1
    raise TransientError("root_size: no project id is free on the file system of the task's root")


def read_named_projects() -> set[int]:
    """Return the project ids that the operator has given names or directories."""
    texts = (read_text(Path("/etc", name)) for name in ("projid", "projects"))
    return {int(number) for text in texts for number in re.findall(r"\b\d{1,10}\b", text, re.ASCII)}


def release_directory(path: str) -> None:
    """Remove the limit of a directory, before the directory is removed: afterwards another may have its project.
    Does nothing for a directory without one, and ignores errors: the next one with the project sets its own."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        project = read_project(fd)
        if FIRST_PROJECT <= project < FIRST_PROJECT + PROJECTS:
            write_limits(fd, project, 0, 0)
    except OSError:
        return
    finally:
        os.close(fd)


X32 = 0x40000000  # in the numbers of a second set of x86_64's system calls
# By the machine's name and the kernel's number of an architecture: the system calls ioctl and file_setattr.
SYSTEM_CALLS: Mapping[str, Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "x86_64": {0xC000003E: ((16, X32 | 514), (469, X32 | 469)), 0x40000003: ((54,), (469,))},
    "aarch64": {0xC00000B7: ((29,), (469,)), 0x40000028: ((54,), (469,))},
}
REQUESTS = (FS_IOC_FSSETXATTR, FS_IOC_SETFLAGS, 0x40046602)  # the last one is FS_IOC_SETFLAGS with 32 bits
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # instructions of classic BPF
CALL, ARCHITECTURE, REQUEST = 0, 4, 24  # offsets in struct seccomp_data; the last of the second argument
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EOPNOTSUPP
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2


def render_filter(machine: str) -> bytes:
    """Return a seccomp filter under which no file has attributes to set, as on file systems without them."""
    program = [(LOAD, 0, 0, ARCHITECTURE)]
    for architecture, (ioctls, setattrs) in SYSTEM_CALLS[machine].items():
        requests = [(EQUAL, len(REQUESTS) - number, 0, value) for number, value in enumerate(REQUESTS)]
        judging = [(LOAD, 0, 0, REQUEST), *requests, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
        calls = [(value, len(judging) - 1) for value in setattrs] + [(value, 0) for value in ioctls]
        jumps = [(EQUAL, len(calls) - number + skip, 0, value) for number, (value, skip) in enumerate(calls)]
        block = [(LOAD, 0, 0, CALL), *jumps, (RETURN, 0, 0, ALLOW), *judging]
        program += [(EQUAL, 0, len(block), architecture), *block]
    program.append((RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def forbid_attributes() -> None:
    """Keep this thread, and what it starts, from setting attributes of files. Raises HostError or OSError."""
    import ctypes

    machine = os.uname().machine
    if machine not in SYSTEM_CALLS:
        raise HostError(f"root_size: the driver cannot keep tasks from evading it on {machine}")
    program = render_filter(machine)
    instructions = ctypes.create_string_buffer(program, len(program))
    packed = struct.pack("HP", len(program) // 8, ctypes.addressof(instructions))
    call_libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, packed)
