# SPDX-License-Identifier: MPL-2.0
"""What a start makes on the host before nspawn runs: files and directories, then mounts that only nspawn sees.

The mounts are in the mount namespace of the shim and nspawn, and end with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from dataclasses import asdict
from pathlib import Path

from nspawn.common import DriverError, HostError, check_shortage
from nspawn.files import write_file, write_new_file
from nspawn.hooks import run_hooks
from nspawn.linux import (
    MNT_DETACH,
    MS_BIND,
    MS_NOSUID,
    MS_REC,
    attach_tree,
    bind_mount,
    call_libc,
    enter_namespace,
    mount_filesystem,
)
from nspawn.plan import BUNDLE_PLACE, DEVICES_PLACE, Journal, Plan, check_init, check_journal
from nspawn.quota import limit_directory
from nspawn.record import MESSAGES
from nspawn.roots import (
    UPPER_NAME,
    check_mount_points,
    complete_root,
    cover_nosuid,
    lock_image,
    make_mount_file,
    make_mount_points,
    make_working_directory,
    mount_root,
    pick_users,
)
from nspawn.sources import clone_source, make_nodes
from nspawn.state import remove_upper_dir
from nspawn.unit import make_unit
from nspawn.view import View, explain_command


async def make_upper_dir(place: Path, size: int) -> int:
    """Make the directory for what a task changes, with a limit unless `size` is 0; return the lock that marks it
    as in use. Raises DriverError or OSError."""
    # A start before a reboot may have left one, or an artifact may have put anything there.
    await remove_upper_dir(str(place))
    if place.name != UPPER_NAME:  # in `ephemeral_dir`: nobody else removes what a crash of the machine left there
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for other in place.parent.glob(f"*{UPPER_NAME}"):
            with contextlib.suppress(OSError):
                fd = lock_directory(other)  # BlockingIOError when it is in use
                # Rename it first: the same task may start again while this is being removed.
                doomed = other.rename(other.with_name(f"{os.urandom(8).hex()}{UPPER_NAME}"))
                os.close(fd)
                await remove_upper_dir(str(doomed))
    place.mkdir(mode=0o700)
    lock = lock_directory(place)
    try:
        if size:
            limit_directory(lock, str(place), size)
    except BaseException:
        os.close(lock)
        raise
    return lock


def lock_directory(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def make_files(plan: Plan, directory: Path) -> None:
    """Fill a task's state directory with what nspawn, its payload and exec need. Raises OSError."""
    write_file(directory / "inside.json", json.dumps(asdict(plan.inside)))
    if plan.options.is_terminal:
        os.mkfifo(directory / "console", 0o600)
    if plan.options.adds_units:
        make_unit(directory, plan.options.unit)
    for path, text in plan.network.files.items():
        file = Path(f"{directory}{path}")
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(file, text, 0o644)
    for staged in plan.staged_sources:
        make_place(Path(staged.path), staged.source.is_directory)
    for place, content in plan.credentials.items():
        write_secret(Path(place), content)
    if plan.options.inaccessible:
        make_inaccessible()
    if plan.options.overlay:
        (directory / "tmp").mkdir()
    write_secret(directory / BUNDLE_PLACE / "config.json", plan.bundle.encode())


def make_place(path: Path, is_directory: bool) -> None:
    """Make the directory or file to mount a source on. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    if is_directory:
        path.mkdir()
    else:
        path.touch()


def make_journal(journal: Journal) -> None:
    try:
        if journal.target:
            os.symlink(journal.target, journal.path)
        else:
            os.mkdir(journal.path, 0o755)
    except OSError as error:
        check_shortage(error)
        raise HostError(f"link_journal: {journal.path} cannot be made: {error.strerror}") from None


def make_inaccessible(root: Path = Path("/run/systemd/inaccessible")) -> None:
    """Make the nodes that nspawn mounts over hidden paths, where no systemd is PID 1 to make them."""
    if not root.is_dir():
        (root / "dir").mkdir(mode=0o000, parents=True)
        (root / "reg").touch(mode=0o000)


def write_secret(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_new_file(path, content)


def make_mounts(plan: Plan, directory: Path, locks: list[int]) -> tuple[list[str], dict[str, str]]:
    """Move this thread into a mount namespace of its own, and mount there what nspawn needs. Return further
    arguments and variables for nspawn. Adds to `locks` the descriptors of the locks to hold as long as the task
    lives. Blocks. Raises DriverError or OSError."""
    with contextlib.ExitStack() as stack:
        trees = []
        for staged in plan.staged_sources:
            if not staged.is_node:
                trees.append((clone_source(staged.source), staged))
                stack.callback(os.close, trees[-1][0])
        enter_namespace()
        make_nodes([staged for staged in plan.staged_sources if staged.is_node], directory / DEVICES_PLACE)
        for tree, staged in trees:
            attach_tree(tree, staged.path, is_private=staged.is_private)
    for path in plan.nosuid:
        cover_nosuid(path)
    environ = cover_places(plan, directory)
    arguments = make_root(plan, directory, locks) if plan.private else []
    root = plan.find_root(directory)
    if root:
        prepare_root(plan, root)
    return arguments, environ


def cover_places(plan: Plan, directory: Path) -> dict[str, str]:
    """Mount what nspawn must have in other places, in this thread's namespace. Return variables for it."""
    if plan.options.overlay:  # nspawn keeps their changes in /var/tmp, and leaves them there if it is killed
        bind_mount(f"{directory}/tmp", "/var/tmp")
    try:
        if not have_kernel_messages():
            if not plan.image.is_directory:  # nspawn waits for a new loop device in the host's own /dev
                return {}
            cover_devices()
        bind_mount(str(directory / MESSAGES), KERNEL_MESSAGES)
    except OSError:  # the messages go to the task's stderr
        return {}
    return {"SYSTEMD_LOG_TARGET": "kmsg"}


KERNEL_MESSAGES = "/dev/kmsg"


def have_kernel_messages() -> bool:
    """Whether /dev/kmsg is there to mount on. In a container it often is missing, or a link to another device."""
    try:
        return not stat.S_ISLNK(os.lstat(KERNEL_MESSAGES).st_mode)
    except FileNotFoundError:
        return False


def cover_devices() -> None:
    """Mount a tmpfs over /dev, in this thread's mount namespace, with all that is there and an empty file kmsg.
    Devices that the host gets later do not appear in it. Raises OSError."""
    folder = os.path.dirname(KERNEL_MESSAGES)
    old = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mount_filesystem("tmpfs", folder, MS_NOSUID, "mode=0755")
        try:
            for name in {*os.listdir(old)} - {os.path.basename(KERNEL_MESSAGES)}:
                copy_device(old, name, f"{folder}/{name}")
            os.mknod(KERNEL_MESSAGES, 0o600)
        except OSError:
            call_libc("umount2", os.fsencode(folder), MNT_DETACH)
            raise
    finally:
        os.close(old)


def copy_device(folder: int, name: str, target: str) -> None:
    """Show a link, device or directory of an open directory, with all that is mounted there, in another place."""
    mode = os.lstat(name, dir_fd=folder).st_mode
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(name, dir_fd=folder), target)
        return
    make = os.mkdir if stat.S_ISDIR(mode) else os.mknod
    make(target, 0o755)
    source = f"/proc/self/fd/{folder}/{name}"
    call_libc("mount", os.fsencode(source), os.fsencode(target), None, MS_BIND | MS_REC, None)


def make_root(plan: Plan, directory: Path, locks: list[int]) -> list[str]:
    """Make a task's private root; return nspawn's arguments for it. Adds to `locks` the descriptors of the locks
    to hold as long as the task lives. Raises DriverError."""
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
    if plan.private.hooks:
        mounts = [mount for mount in plan.mounts if mount.option == "devices"]
        ids = (base, users.count) if users else None
        cgroup = f"{plan.cgroup}/shim"
        run_hooks(plan.private.hooks, mounts, directory / "root", plan.machine, cgroup, ids)
    return arguments


def prepare_root(plan: Plan, root: Path) -> None:
    """Make what the container's root needs: the command's directory, and mount points if it is read-only. Raises
    DriverError if that is not possible, if the command cannot be executed, or if there is no init to boot."""
    is_read_only = plan.options.has_read_only_root
    if is_read_only and plan.image.is_protected and not plan.private:
        check_mount_points(root, plan.network.mount_files)
    elif is_read_only:
        make_mount_points(root)
        for path in plan.network.mount_files:
            make_mount_file(root, path, is_private=bool(plan.private))
    view = View(root, plan.mount_table, plan.options.root or "/")
    if plan.options.boot:
        check_init(plan, view)
        if plan.options.journal:
            check_journal(plan, view)
        return
    directory = plan.options.directory
    if (
        why := explain_command(plan.options.command[0], plan.search_path, view, directory)
        if plan.options.command
        else ""
    ):
        raise DriverError(why)
    make_working_directory(view, directory, plan.explain_fixed_root())


def explain_mount(plan: Plan, error: OSError) -> DriverError:
    check_shortage(error)
    why = "the kernel has no overlay file system" if error.errno == errno.ENODEV else error.strerror
    return HostError(f"ephemeral: no root can be laid over the image {plan.image.path}: {why}")
