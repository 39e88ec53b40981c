# SPDX-License-Identifier: MPL-2.0
"""The directories of an allocation and the cgroup of a task, as the client makes them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from tests.agent.errors import AgentError
from tests.leftovers import leftovers

_NOBODY = 65534


class Allocation:
    """The directories of one allocation on the host, as the client lays them out for image isolation.

    `violations`: what a driver left below them. As a context manager it raises AgentError for these and all other
    that is left of the allocation on this machine.
    """

    def __init__(self, parent: str | Path | None = None) -> None:
        self.id = str(uuid.uuid4())
        self.root = Path(tempfile.mkdtemp(prefix="nomad-allocs-", dir=parent))
        self.root.chmod(0o711)
        self.dir = self.root / self.id
        self.violations: list[str] = []
        self._mounts: list[Path] = []
        self.closed = False
        self.dir.mkdir(0o755)
        for name in ("alloc", "alloc/logs", "alloc/tmp", "alloc/data"):
            self._make(self.dir / name)
        self.logs = self.dir / "alloc" / "logs"

    @staticmethod
    def _make(path: Path, mode: int = 0o777) -> None:
        path.mkdir(exist_ok=True)
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, _NOBODY, -1)

    def add_task(self, name: str) -> Path:
        """Make a task's directories; idempotent, as the task-dir hook at each start."""
        task = self.dir / name
        for path in (task, task / "local", task / "secrets", task / "private"):
            self._make(path)
        self._make(task / "tmp", 0o1777)
        for path in (task / "secrets", task / "private"):
            self._mount_tmpfs(path)
        return task

    def _mount_tmpfs(self, path: Path) -> None:
        if os.geteuid() != 0 or path in self._mounts:
            return
        command = ["mount", "-t", "tmpfs", "-o", "size=1m,noexec", "tmpfs", str(path)]
        subprocess.run(command, check=True, timeout=30)
        self._mounts.append(path)
        self._make(path)
        (path / ".nomad-mount").touch()

    def mounts_below(self) -> list[Path]:
        """Mount points below the allocation other than its own tmpfs."""
        return [path for path in mount_points(self.dir) if path not in self._mounts]

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for path in sorted(self.mounts_below(), reverse=True):
            self.violations.append(f"{path} is still mounted: an agent would delete what is behind it")
            subprocess.run(["umount", "--lazy", str(path)], check=False, timeout=30)
        for path in self._mounts:
            subprocess.run(["umount", str(path)], check=False, timeout=30)
        self._mounts = []
        if not mount_points(self.dir):  # never delete through a mount
            shutil.rmtree(self.root)

    def __enter__(self) -> Allocation:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self.close()
        left = [*self.violations, *leftovers(self.id)]
        if left and kind is None:
            raise AgentError("\n".join(left))


def mount_points(below: Path) -> list[Path]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        name = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        if Path(name).is_relative_to(below):
            found.append(Path(name))
    return found


class TaskCgroup:
    """The cgroup which Nomad 1.7 and later make for a task; on cgroup v1 only its path is told."""

    def __init__(self, alloc_id: str, task: str, reserved: bool) -> None:
        mount, part = Path("/sys/fs/cgroup"), "reserve" if reserved else "share"
        self.unified = (mount / "cgroup.controllers").exists()
        self.slice = mount / "nomad.slice" / f"{part}.slice"
        v1 = mount / "cpuset" / "nomad" / (f"reserve/{alloc_id}.{task}" if reserved else "share")
        self.path = self.slice / f"{alloc_id}.{task}.scope" if self.unified else v1
        self._made = False

    def create(self) -> None:
        if not self.unified or os.geteuid() != 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._made = True
        for parent in (Path("/sys/fs/cgroup"), self.slice.parent, self.slice):
            for controller in (parent / "cgroup.controllers").read_text().split():
                with contextlib.suppress(OSError):  # not every controller can be had in every host
                    (parent / "cgroup.subtree_control").write_text(f"+{controller}")

    def remove(self) -> str | None:
        """Kill what is in it and remove it, as the client does; a sentence if the driver left cgroups in it."""
        if not self._made or not self.path.exists():
            return None
        left = [path.name for path in self.path.iterdir() if path.is_dir()]
        with contextlib.suppress(OSError):
            (self.path / "cgroup.kill").write_text("1")
        for path in sorted(self.path.rglob("*/"), reverse=True):
            _remove_cgroup(path)
        _remove_cgroup(self.path)
        if not left:
            return None
        return f"the task's cgroup still held {', '.join(sorted(left))}: an agent could not remove it"


def _remove_cgroup(path: Path) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            return
        time.sleep(0.01)  # killed processes leave a cgroup a moment after the kill
