# SPDX-License-Identifier: MPL-2.0
"""What there is of an allocation on this machine: nothing may be left of it once its tasks are destroyed.

Everything is found from the allocation's id, the way an operator would look, and not from what the driver says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

STATE = Path("/run/nomad-driver-nspawn")
NSPAWN = Path("/run/systemd/nspawn")
UID_CLAIMS = Path("/run/systemd/nspawn-uid")
CGROUPS = Path("/sys/fs/cgroup")


def leftovers(alloc_id: str) -> list[str]:
    """One line for each process, mount, cgroup, file and interface of the allocation."""
    return [
        *(f"process {pid}: {command}" for pid, command in processes(alloc_id)),
        *(f"mount {point}" for point in mounts(alloc_id)),
        *(f"cgroup {path}" for path in cgroups(alloc_id)),
        *(f"file {path}" for path in files(alloc_id)),
        *(f"interface {name}" for name in interfaces(alloc_id)),
    ]


def processes(alloc_id: str) -> Iterator[tuple[int, str]]:
    """Processes that have the id on their command line, in their environment or in their cgroup's name."""
    wanted = alloc_id.encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if not command:  # a zombie, or a kernel thread
                continue
            if any(wanted in text for text in (command, (entry / "environ").read_bytes())) or (
                wanted in (entry / "cgroup").read_bytes()
            ):
                yield int(entry.name), command.replace(b"\0", b" ").decode(errors="replace")[:200]


def mounts(alloc_id: str) -> Iterator[str]:
    """Mount points of the allocation but for the two that the agent itself makes for each task."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split(" ")[4]
        if alloc_id in line and not (f"/{alloc_id}/" in point and point.endswith(("/secrets", "/private"))):
            yield point


def cgroups(alloc_id: str) -> Iterator[str]:
    """Cgroups of the allocation but for the one that the agent makes for each task where there is only v2."""
    for hierarchy in (CGROUPS, CGROUPS / "unified", CGROUPS / "systemd"):
        for path in find(hierarchy / "nomad.slice", alloc_id, "-type", "d"):
            is_agents = hierarchy == CGROUPS and alloc_id in os.path.basename(path)
            if not is_agents:
                yield path


def files(alloc_id: str) -> Iterator[str]:
    for root in (STATE, NSPAWN):
        yield from find(root, alloc_id)


def find(root: Path, alloc_id: str, *conditions: str) -> list[str]:
    """Paths below a directory that have the id in them. What a test has left may be of any depth."""
    command = ["find", str(root), *conditions, "-path", f"*{alloc_id}*", "-print0"]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False, timeout=60)
    return [path[:300] for path in found.stdout.decode(errors="replace").split("\0") if path]


def interfaces(alloc_id: str) -> Iterator[str]:
    """nspawn's own names are hashes; the alternative ones hold the whole name of the machine."""
    tool = shutil.which("ip")
    if not tool:
        return
    shown = subprocess.run([tool, "-json", "link"], stdout=subprocess.PIPE, check=True, timeout=60)
    for link in json.loads(shown.stdout or b"[]"):
        names = [link["ifname"], *link.get("altnames", [])]
        if any(alloc_id in name for name in names):
            yield str(link["ifname"])


def is_held(lock: Path) -> bool:
    """Whether somebody holds a lock file of nspawn's; another container's may come and go while we look.

    systemd takes them with open-file-description locks, which flock() does not see.
    """
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with lock.open("r+") as file:
            found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted)
    except FileNotFoundError:
        return True
    return bool(struct.unpack("hhqqi4x", found)[0] != fcntl.F_UNLCK)


def free_locks() -> list[Path]:
    """Lock files of images and of ranges of ids that nobody holds, on the whole machine. Another suite may be just
    about to remove one: look again."""
    found = [path for place in (UID_CLAIMS, NSPAWN / "locks") if place.is_dir() for path in place.iterdir()]
    return [path for path in found if not is_held(path)]


def snapshots(image: Path) -> list[Path]:
    """Copies that nspawn has made of an image for `ephemeral`."""
    return sorted(image.parent.glob(f".#*{image.name}*"))


def peer(pid: int) -> int:
    """The index on the host of the other end of a container's host0."""
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-json", "link", "show", "host0"]
    shown = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60)
    return int(json.loads(shown.stdout)[0]["link_index"])


def interface_indexes() -> set[int]:
    return {int(path.read_text()) for path in Path("/sys/class/net").glob("*/ifindex")}
