# SPDX-License-Identifier: MPL-2.0
"""Hooks of CDI devices: programs of the host that prepare a container's root for a device.

NVIDIA's make the links of its libraries and a new cache of ldconfig, for example. They run before systemd-nspawn,
as hooks of createContainer do: with the root and what is mounted in it for the device. The program is the
operator's, but the root holds what an image put there. So it runs as the container's root if that is another user
than the host's, in a mount namespace that ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from nspawn.cdi import Hook
from nspawn.common import SAFE_PATH, STATE_ROOT, ConfigError, HostError, check_shortage, quote, shorten
from nspawn.linux import (
    CLONE_NEWNS,
    MOUNT_ATTR_RDONLY,
    MS_NODEV,
    MS_NOSUID,
    attach_tree,
    call_libc,
    clone_tree,
    enter_namespace,
    mount_filesystem,
    move_tree,
    open_in_root,
    set_attributes,
)
from nspawn.mounts import Mount
from nspawn.process import open_user_namespace, run_program
from nspawn.roots import make_directories, make_mount_file

BUNDLE = STATE_ROOT  # the OCI bundle, in the hooks' own mount namespace: everybody must get through to it there


@contextlib.contextmanager
def own_namespace() -> Iterator[None]:
    """Have a mount namespace for a while, in this thread. Raises OSError."""
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_namespace()
        try:
            yield
        finally:
            call_libc("setns", before, CLONE_NEWNS)
    finally:
        os.close(before)


def run_hooks(
    hooks: Sequence[Hook],
    mounts: Sequence[Mount],
    root: Path,
    machine: str,
    cgroup: str,
    ids: tuple[int, int] | None,
) -> None:
    """Run hooks on a machine's private root, in a cgroup of the task, whose limits and end are theirs. `mounts`:
    what is mounted in the root for the devices. `ids`: the host's id of the container's root and the number of its
    ids, None without a user namespace. Blocks. Raises DriverError or OSError."""
    with contextlib.ExitStack() as stack:
        tree = clone_tree(str(root), with_below=True)
        stack.callback(os.close, tree)
        trees = [(clone_tree(mount.source, with_below=True), mount) for mount in mounts]
        for source, _ in trees:
            stack.callback(os.close, source)
        users_fd = open_user_namespace(*ids) if ids else None
        if users_fd is not None:
            stack.callback(os.close, users_fd)
        stack.enter_context(own_namespace())
        mount_filesystem("tmpfs", str(BUNDLE), MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
        (BUNDLE / "rootfs").mkdir()
        (BUNDLE / "config.json").write_text(json.dumps({"ociVersion": "1.0.2", "root": {"path": "rootfs"}}))
        attach_tree(tree, str(BUNDLE / "rootfs"), is_private=True)
        for source, mount in trees:
            try:
                attach_in_root(source, BUNDLE / "rootfs", mount)
            except (OSError, ConfigError) as error:
                why = error.rule if isinstance(error, ConfigError) else error.strerror
                if isinstance(error, OSError):
                    check_shortage(error)
                raise HostError(f"devices: {mount.target} cannot be mounted in the image: {why}") from None
        for hook in hooks:
            run_hook(hook, machine, cgroup, users_fd)


def attach_in_root(tree: int, root: Path, mount: Mount) -> None:
    """Mount a detached tree at a path of a root. Makes what it is mounted on. Links lead to nowhere else. Raises
    ConfigError or OSError."""
    if mount.read_only:
        set_attributes(tree, MOUNT_ATTR_RDONLY, with_below=True)
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.path.isdir(f"/proc/self/fd/{tree}"):
            make_directories(top, mount.target)
        else:
            make_mount_file(root, mount.target, is_private=True)
        place = open_in_root(top, mount.target, os.O_PATH)
        try:
            move_tree(tree, place)
        finally:
            os.close(place)
    finally:
        os.close(top)


def plan_hook(hook: Hook, cgroup: str, users_fd: int | None) -> list[str]:
    """Return the command that runs a hook in a cgroup, and as root of a user namespace if one is given."""
    argv = [
        "sh",
        "-c",
        'echo 0 >"$0/cgroup.procs" && exec "$@"',
        cgroup,
        "timeout",
        "--signal=KILL",
        str(hook.limit),
    ]
    if users_fd is not None:
        argv += ["nsenter", f"--user=/proc/self/fd/{users_fd}", "unshare", "--mount", "--propagation=private"]
        # Mounts from a namespace of other users are locked: without one of its own, no pivot_root(2) works.
        argv += ["sh", "-c", 'mount --rbind "$0" "$0" && exec "$@"', str(BUNDLE / "rootfs")]
    variables = {"PATH": SAFE_PATH, **hook.env}
    return [*argv, "env", "-i", *(f"{name}={value}" for name, value in variables.items()), hook.path, *hook.args]


def run_hook(hook: Hook, machine: str, cgroup: str, users_fd: int | None) -> None:
    """Run a hook. Blocks. Raises HostError or OSError."""
    state = {"ociVersion": "1.0.2", "id": machine, "status": "creating", "bundle": str(BUNDLE)}
    argv, fds = plan_hook(hook, cgroup, users_fd), [] if users_fd is None else [users_fd]
    try:
        status, words = run_program(argv, json.dumps(state).encode(), pass_fds=fds)
    except OSError as error:
        check_shortage(error)
        raise HostError(f"devices: the hook {quote(hook.path)} cannot be run: {error.strerror}") from None
    if status:
        is_killed = status in (-signal.SIGKILL, 128 + signal.SIGKILL)
        how = f"was killed after {hook.limit} s" if is_killed else f"failed with the exit code {status}"
        said = f": {shorten(' | '.join(words.splitlines()), 500)}" if words else ""
        raise HostError(f"devices: the hook {quote(hook.path)} of {hook.device} {how}{said}")
