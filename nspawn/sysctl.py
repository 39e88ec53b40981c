# SPDX-License-Identifier: MPL-2.0
"""Settings of the kernel that belong to a container's own network and ipc namespaces: below /proc/sys.

systemd-nspawn reads those of an OCI bundle, and does nothing with them (measured on 252, 257 and 262). So the
driver writes them. nspawn moves the container's first process into the payload's cgroup when its namespaces are
made, and executes the payload later. That cgroup is frozen meanwhile.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping

from nspawn.common import ConfigError, HostError, check_shortage, name_entry
from nspawn.linux import CLONE_NEWIPC, CLONE_NEWNET, call_libc, set_thread_user

NAME = re.compile(r"(?!\.{1,2}(/|$))[!-.0-~]+(/(?!\.{1,2}(/|$))[!-.0-~]+)+")
OF_IPC = re.compile(r"fs/mqueue/.+|kernel/(msg(max|mnb|mni)|sem|shm(all|max|mni|_rmid_forced))")
OWN = (
    "net.*, fs.mqueue.*, kernel.sem, kernel.msgmax, kernel.msgmnb, kernel.msgmni, kernel.shmall, kernel.shmmax, "
    "kernel.shmmni, kernel.shm_rmid_forced"
)


def find_path(name: str) -> str:
    """Return a setting's path in /proc/sys. As with sysctl(8), a name with slashes may hold dots."""
    return name if "/" in name else name.replace(".", "/")


def is_of_network(name: str) -> bool:
    return find_path(name).startswith("net/")


def check_sysctls(option: str, value: Mapping[str, str]) -> Mapping[str, str]:
    for name, text in value.items():
        path = find_path(name)
        if not NAME.fullmatch(path):
            raise ConfigError(option, name, "must be the name of a setting, as in net.core.somaxconn")
        if not (is_of_network(name) or OF_IPC.fullmatch(path)):
            rule = "is a setting of the whole host"
            raise ConfigError(option, name, rule, f"those of a container are {OWN}")
        if not re.fullmatch(r"[ -~\t]{1,1000}", text):
            raise ConfigError(name_entry(option, name), text, "must be one line of printable ASCII")
    return value


def write_sysctls(settings: Mapping[str, str], pid: int, root: int) -> None:
    """Write settings of the namespaces that a container's first process is in. `root`: the user that is root
    inside. Leaves its thread in these namespaces. Raises ConfigError for a setting that the kernel refuses,
    HostError if the namespaces are the host's, or OSError."""
    for kind, flag in (("net", CLONE_NEWNET), ("ipc", CLONE_NEWIPC)):
        if any(is_of_network(name) is (kind == "net") for name in settings):
            try:
                namespace = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # it has ended: its nspawn will say why
                return
            try:
                if os.path.samestat(os.fstat(namespace), os.stat(f"/proc/self/ns/{kind}")):
                    raise HostError(f"sysctl: the container has no {kind} namespace of its own")
                call_libc("setns", namespace, flag)
            finally:
                os.close(namespace)
    for name, text in settings.items():
        try:
            write_setting(find_path(name), text, root)
        except OSError as error:
            check_shortage(error)
            raise explain_refusal(name, text, error) from None


def write_setting(path: str, text: str, root: int) -> None:
    """Write a setting of this thread's namespaces. Raises OSError."""
    try:
        write_once(path, text)
    except PermissionError:  # an ipc namespace's own root may, the host's may not (measured on 6.18, not on 6.1)
        if not root:
            raise
        set_thread_user(root)
        try:
            write_once(path, text)
        finally:
            set_thread_user(0)


def write_once(path: str, text: str) -> None:
    fd = os.open(f"/proc/sys/{path}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def explain_refusal(name: str, text: str, error: OSError) -> ConfigError:
    if isinstance(error, FileNotFoundError):
        rule, remedy = (
            "the kernel has no such setting in this container",
            "look for it in the container's /proc/sys",
        )
    elif isinstance(error, PermissionError):
        rule, remedy = "the kernel lets nobody change it for one container", "the operator can set it on the host"
    else:
        known = error.errno == errno.EINVAL
        rule, remedy = "the kernel refuses this value" + ("" if known else f": {error.strerror}"), ""
    return ConfigError(name_entry("sysctl", name), text, rule, remedy)
