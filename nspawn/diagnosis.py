# SPDX-License-Identifier: MPL-2.0
"""What `check` says of this machine: all that the fingerprint says, and what single features need.

It is for people, and looks at more than the plugin does at its start and every half minute.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nspawn.cdi import Catalog, describe_catalog, read_catalog
from nspawn.cgroup import read_number
from nspawn.common import HostError
from nspawn.files import find_tool
from nspawn.host import (
    OVERLAY_IDMAP,
    Host,
    Mounts,
    explain_open_directory,
    have_machined,
    is_open_to_others,
    read_mounts,
)
from nspawn.network import have_networkd
from nspawn.quota import explain_no_quotas
from nspawn.setup import have_kernel_messages
from nspawn.state import find_alloc_dirs, read_states


class Verdict(enum.Enum):
    OK = "ok"
    NOTE = "note"  # tasks run, but lack something
    MISSING = "missing"  # no task can run


@dataclass(frozen=True)
class Finding:
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.verdict.value}: {self.text}"


def note(text: str) -> Finding:
    return Finding(Verdict.NOTE, text)


def judge(is_good: bool, good: str, bad: str) -> Finding:
    return Finding(Verdict.OK, good) if is_good else note(bad)


USUAL_ALLOC_DIRS = ("/opt/nomad/data/alloc", "/var/lib/nomad/alloc")  # of HashiCorp's package, and of Debian's
MANY_INSTANCES = 1024


def diagnose(host: Host, image_dir: str, alloc_dirs: Sequence[str]) -> Iterator[Finding]:
    """Yield what is good and bad about this machine. Without `alloc_dirs`, look at the usual ones and at those of
    tasks that run."""
    for problem in host.problems:
        yield Finding(Verdict.MISSING, problem)
    yield from judge_limits(host)
    yield from judge_directories(host, image_dir, alloc_dirs or find_usual_alloc_dirs())
    yield from judge_services()
    yield from judge_tools(frozenset(tool for tool in TOOLS_BY_USE if find_tool(tool)))
    yield from judge_devices(read_catalog())
    yield judge_watches(read_number("/proc/sys/fs/inotify/max_user_instances"))
    if not have_kernel_messages():
        yield Finding(
            Verdict.OK, "there is no /dev/kmsg, as in containers: each task's systemd-nspawn gets its own."
        )


def judge_limits(host: Host) -> Iterator[Finding]:
    if host.limits:
        yield Finding(Verdict.OK, f"tasks can be limited in {', '.join(host.limits)}.")
    if host.has_device_policy:
        yield Finding(Verdict.OK, "tasks can be kept from devices that are not theirs.")
    for text in host.shortcomings:
        yield note(f"{text[1:-1]}.")
    yield judge(
        read_number("/proc/sys/user/max_user_namespaces") > 0,
        "containers can have user namespaces.",
        "there are no user namespaces, so each job needs user_namespacing = false: set the sysctl "
        "user.max_user_namespaces.",
    )


def find_usual_alloc_dirs() -> list[str]:
    known = find_alloc_dirs(read_states()) if os.geteuid() == 0 else set()  # only root can read the states
    return sorted({*USUAL_ALLOC_DIRS, *known})


def judge_directories(host: Host, image_dir: str, alloc_dirs: Sequence[str]) -> Iterator[Finding]:
    """Yield what tasks with user namespaces can do with the files in a client's directories."""
    mounts = read_mounts()
    if host.kernel < OVERLAY_IDMAP:
        yield note("tasks with user namespaces cannot share an image: that takes Linux 5.19 or newer.")
    for place in dict.fromkeys(map(os.path.realpath, (image_dir, *alloc_dirs))):
        if not os.path.isdir(place):
            continue
        yield from judge_mapping(place, mounts)
        if place != os.path.realpath(image_dir):
            yield judge_quotas(place, mounts)
        if is_open_to_others(place):
            yield note(f"{explain_open_directory(place)[1:-1]}.")


def judge_mapping(place: str, mounts: Mounts) -> Iterator[Finding]:
    kind = mounts.filesystem(place) or "a file system"
    try:
        can_map = mounts.have_idmap(place)
    except (HostError, OSError):  # no user namespaces, or not root: that is said elsewhere
        return
    yield judge(
        can_map,
        f"{place} is on {kind}, which can be id-mapped.",
        f"{place} is on {kind}, which cannot be id-mapped: in containers with user namespaces its files belong to "
        "nobody, and its images cannot be shared. Use ext4, xfs or btrfs, or user_namespacing = false in jobs.",
    )


def judge_quotas(place: str, mounts: Mounts) -> Finding:
    why, remedy = explain_no_quotas(place, mounts.filesystem(place))
    return judge(
        mounts.have_project_quotas(place),
        f"{place} has project quotas, so root_size can limit what tasks write to their roots.",
        f"root_size cannot limit roots on disk: it {why}. To have it, {remedy}.",
    )


def judge_services() -> Iterator[Finding]:
    yield judge(
        have_networkd(),
        "systemd-networkd runs, and gives addresses to containers on their own link.",
        "systemd-networkd does not run, so containers get no address on their own link: run systemctl enable "
        "--now systemd-networkd, or use bridge mode, network_address or network_veth = false in jobs.",
    )
    yield judge(
        have_machined(),
        "systemd-machined can be called, so machinectl shows tasks.",
        "systemd-machined cannot be called, so machinectl shows no tasks: it takes a running systemd, and dbus.",
    )


TOOLS_BY_USE = {  # tool to its package ("": Debian 12 has none) and to what lacks without it
    "nft": ("nftables", "ports that a killed systemd-nspawn has mapped stay mapped (ports, port_map)"),
    "ip": ("iproute2", "containers can have no fixed addresses (network_address, network_mac)"),
    "gpg": ("gnupg", 'signatures of images cannot be verified (verify = "signature")'),
    "cosign": ("", "images that have to be signed are refused (require_signature in the plugin's block)"),
    "zstd": ("zstd", "images compressed with zstd cannot be unpacked"),
}


def judge_tools(installed: frozenset[str]) -> Iterator[Finding]:
    for tool, (package, lack) in TOOLS_BY_USE.items():
        remedy = f"install the package {package}" if package else "put it into a directory such as /usr/local/bin"
        yield judge(tool in installed, f"{tool} is installed.", f"{tool} is not installed, so {lack}: {remedy}.")
    yield judge(
        os.path.exists("/run/udev/control"),
        "disk images can be used: systemd-udevd runs.",
        "disk images cannot be used: systemd-udevd does not run. Directories and registries' images can.",
    )


def judge_devices(catalog: Catalog) -> Iterator[Finding]:
    for text in describe_catalog(catalog):
        yield Finding(Verdict.OK, f"{text}.")
    yield from (note(f"{text}.") for text in catalog.problems)


def judge_watches(limit: int) -> Finding:
    return judge(
        limit >= MANY_INSTANCES,
        f"fs.inotify.max_user_instances is {limit}.",
        f"fs.inotify.max_user_instances is {limit}, too few for many booted systems, as each uses a few: set the "
        f"sysctl to {MANY_INSTANCES} or more.",
    )
