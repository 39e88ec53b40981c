# SPDX-License-Identifier: MPL-2.0
"""An orderly stop of booted containers whose init is no systemd."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from tests.agent import HANG, Task
from tests.containers import Tasks
from tests.hosts import CACHE, lock, remove_image, remove_unused, run

pytestmark = pytest.mark.root

RUNIT = {"init": "/lib/runit/runit-init", "poweroff": "/lib/runit/shutdown", "halt": "/lib/runit/shutdown"}
BUSYBOX = {"init": "../bin/busybox", "poweroff": "../bin/busybox"}
# What is in /sbin of each system: names and what they link to, "" for nothing.
SYSTEMS: dict[str, dict[str, str]] = {
    "sysvinit": {},  # it runs OpenRC
    "openrc": {"init": "openrc-init"},
    "runit": RUNIT,
    "busybox": BUSYBOX,
    "busybox-alone": {**BUSYBOX, "poweroff": ""},
    "deaf": {"init": "deaf"},
}
DEAF = "#!/bin/sh\nwhile :; do sleep 0.1; done\n"  # PID 1 gets no signal that it has no handler for
RECIPE = 1  # count it up when `make_systems` makes something else


@pytest.fixture(scope="module")
def systems() -> Path:
    """A directory with a tree for each system, made when it is missing: half a minute. They share their files."""
    key = hashlib.sha256(repr((SYSTEMS, DEAF, RECIPE)).encode()).hexdigest()[:12]
    made = CACHE / f"inits-{key}"
    with lock("inits"):
        if not made.is_dir():
            remove_unused("inits")
            part = CACHE / f".part-{made.name}"
            remove_image(part)
            make_systems(part)
            part.rename(made)
        os.utime(made)
    return made


def make_systems(folder: Path) -> None:
    docs = "--dpkgopt=path-exclude=/usr/share/{doc,locale,man}/*"
    packages = "--include=sysvinit-core,openrc,runit,busybox-static"
    tree = folder / "sysvinit"
    folder.mkdir()
    run(["mmdebstrap", "--quiet", "--variant=minbase", docs, packages, "bookworm", tree], timeout=900)
    (tree / "etc/machine-id").write_text("")
    (tree / "usr/sbin/deaf").write_text(DEAF)
    (tree / "usr/sbin/deaf").chmod(0o755)
    for name, links in SYSTEMS.items():
        if links:
            shutil.copytree(tree, folder / name, symlinks=True, copy_function=os.link, ignore=ignore_devices)
        for link, target in links.items():
            place = folder / name / "usr/sbin" / link
            place.unlink()
            if target:
                place.symlink_to(target.replace("../bin", "/usr/bin"))
        if name.startswith("busybox"):
            (folder / name / "etc/inittab").unlink()
            (folder / name / "etc/inittab").write_text("::sysinit:/bin/echo up\n")


def ignore_devices(folder: str, names: list[str]) -> list[str]:
    return names if folder.endswith("/dev") else []


def boot(tasks: Tasks, tree: Path) -> Task:
    return tasks.boot(image=str(tree), volatile=None, ephemeral=True, network_veth=None, private_network=True,
                      user_namespacing=True)  # fmt: skip


def events(task: Task) -> str:
    return "\n".join(event.message for event in task.events)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "deaf"])
def test_stop_is_orderly(tasks: Tasks, systems: Path, name: str) -> None:
    """Also of a system that has just begun to boot."""
    task = boot(tasks, systems / name)
    task.stop(timeout=HANG)
    result = task.wait()
    assert (result.exit_code, result.signal, result.err) == (0, 0, ""), events(task)
    assert "kill_timeout" not in events(task)


def test_event_tells_how_a_deaf_init_was_asked(tasks: Tasks, systems: Path) -> None:
    task = boot(tasks, systems / "deaf")
    task.stop(timeout=2)
    assert task.wait().signal == 9
    assert "within its kill_timeout of 2 s after `poweroff` inside" in events(task)


def test_own_kill_signal_is_sent_as_it_is(tasks: Tasks, systems: Path) -> None:
    """busybox takes SIGTERM for reboot, but that of a job means its end; SIGUSR1 is halt."""
    task = boot(tasks, systems / "busybox")
    task.logmon.wait_for(b"up")
    task.stop(timeout=HANG, kill_signal="SIGUSR1")
    assert task.wait().exit_code == 0
