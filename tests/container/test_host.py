# SPDX-License-Identifier: MPL-2.0
"""What only root's kernel shows: cgroups too deep for a path, directories of other owners, mounts left behind."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from nspawn.cgroup import read_cgroup_pids, read_roots, remove_cgroup
from nspawn.host import is_open_to_others
from tests.agent import Allocation, DriverError, launch_like_agent
from tests.containers import Tasks, output

LONG = "x" * 255


def test_cgroups_nested_deeply_are_removed() -> None:
    """With a path that is longer than the kernel takes, and more of them than Python's stack holds."""
    root = Path(read_roots()[""])
    cgroup = root / f"deep-{os.getpid()}"
    cgroup.mkdir()
    here = os.open(cgroup, os.O_RDONLY)
    try:
        for name in [*["a"] * 1200, *[LONG] * 20]:
            os.mkdir(name, dir_fd=here)
            below = os.open(name, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        sleeper = subprocess.Popen(["sleep", "60"])
        file = os.open("cgroup.procs", os.O_WRONLY, dir_fd=here)
        os.write(file, str(sleeper.pid).encode())
        os.close(file)
        assert read_cgroup_pids(str(cgroup)) == [sleeper.pid]
        with pytest.raises(OSError, match="busy"):  # what has processes is left
            remove_cgroup(str(cgroup))
        sleeper.kill()
        sleeper.wait()
    finally:
        os.close(here)
        remove_cgroup(str(cgroup))
    assert not cgroup.exists()


@pytest.mark.parametrize(
    ("mode", "owner", "is_open"),
    [
        (0o755, (0, 0), True),
        (0o711, (0, 0), True),
        (0o700, (0, 0), False),
        (0o750, (0, 0), False),
        (0o750, (0, 1), True),
        (0o700, (1, 0), True),
    ],
)
def test_directories_that_others_can_get_to(mode: int, owner: tuple[int, int], is_open: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        inside = Path(place, "alloc")
        inside.mkdir()
        os.chown(place, *owner)
        os.chmod(place, mode)
        assert is_open_to_others(str(inside)) is is_open
    assert not is_open_to_others(str(inside)), "nothing is there"


def test_allocation_reports_mounts(tmp_path: Path) -> None:
    allocation = Allocation(tmp_path)
    left = allocation.add_task("web") / "local" / "left behind"
    left.mkdir()
    os.system(f"mount -t tmpfs tmpfs '{left}'")
    allocation.close()
    assert len(allocation.violations) == 1 and f"{left} is still mounted" in allocation.violations[0]
    assert not list(tmp_path.iterdir())


# A /dev as container managers make it; where it is a link, somebody has made it for programs that insist on it.
CONTAINER_DEV = """#!/bin/sh
exec unshare --mount sh -ec '
    mount -t tmpfs -o mode=755 none /mnt
    for name in null zero full random urandom tty; do : >/mnt/$name; mount --bind /dev/$name /mnt/$name; done
    mkdir /mnt/pts /mnt/shm
    mount --bind /dev/pts /mnt/pts
    ln -s /proc/self/fd /mnt/fd
    ln -s pts/ptmx /mnt/ptmx
    {extra}
    mount --move /mnt /dev
    exec "{driver}"'
"""


@pytest.mark.parametrize("extra", ["", "ln -s null /mnt/kmsg"], ids=["none", "link"])
def test_host_without_kernel_messages(driver_file: Path, image: Path, tmp_path: Path, extra: str) -> None:
    """As in a container. nspawn's messages are not the task's, and say why a start fails."""
    wrapper = tmp_path / driver_file.name
    wrapper.write_text(CONTAINER_DEV.format(driver=driver_file, extra=extra))
    wrapper.chmod(0o755)
    with launch_like_agent(wrapper) as plugin, Tasks(plugin, image) as tasks:
        task = tasks.make(["/bin/true"], network_bridge="no-such-br")
        with pytest.raises(DriverError, match=r"could not start the container: .*no-such-br"):
            task.start()
        task, result = tasks.run("echo >/dev/null; stat -c %F /dev/null; ls /dev")
        assert result.successful
        kind, *names = output(task).splitlines()
        assert kind == "character special file" and {"null", "pts", "urandom"} <= {*names}
        assert task.logmon.stderr == b""
    assert not plugin.violations
