# SPDX-License-Identifier: MPL-2.0
"""Fifty tasks at once, each with its own way to go; afterwards the machine and the plugin are as before.

NSPAWN_TEST_SEED repeats a run: the seed is part of what a failure prints.
"""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nomad_pb import driver_pb2
from tests.agent import HANG, ExitResult, Plugin, Task, launch_like_agent
from tests.containers import Tasks, kill, leader, make_small_image, nspawn, shim, zombies
from tests.leftovers import leftovers

TASKS = 50
AT_ONCE = 16  # calls; a client has one a task, but no machine has so many processors
SCRIPT = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.2; done"
FATES = ("stopped", "killed", "left to end", "nspawn", "shim", "leader", "destroyed")
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"process_two": True},
    {"network_veth": True},
    {"volatile": "overlay", "user_namespacing": False},
    {"volatile": "overlay", "user_namespacing": False, "process_two": True, "network_veth": True},
    {"boot": True, "volatile": "overlay", "user_namespacing": False},
)


@pytest.fixture
def seed() -> int:
    value = int(os.environ.get("NSPAWN_TEST_SEED") or time.time_ns())
    print(f"NSPAWN_TEST_SEED={value}")
    return value


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    descriptors: int
    threads: int
    memory: int  # bytes

    @classmethod
    def of(cls, pid: int) -> Footprint:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        threads = len(os.listdir(f"/proc/{pid}/task"))
        return cls(len(os.listdir(f"/proc/{pid}/fd")), threads, pages * os.sysconf("SC_PAGE_SIZE"))


def plan(chance: random.Random) -> list[tuple[dict[str, Any], str]]:
    """Kinds and fates of all tasks: few boot, and every fate is there."""
    fates = [FATES[number % len(FATES)] for number in range(TASKS)]
    kinds = [KINDS[number % (len(KINDS) - 1)] for number in range(TASKS - 4)] + [KINDS[-1]] * 4
    chance.shuffle(fates)
    chance.shuffle(kinds)
    return list(zip(kinds, fates, strict=True))


def make(tasks: Tasks, kind: dict[str, Any], fate: str) -> Task:
    if kind.get("boot"):
        return tasks.make([], **kind)
    return tasks.make("sleep 3; exit 42" if fate == "left to end" else SCRIPT, **kind)


def meet(task: Task, fate: str) -> None:
    """Bring a task to its end. It may have ended already."""
    if fate == "stopped":
        task.stop(timeout=HANG)
    elif fate == "killed":
        task.stop(timeout=0)
    elif fate == "destroyed":
        task.destroy()
    elif fate == "nspawn":
        kill(nspawn(task))
    elif fate == "leader":
        kill(leader(task))
    elif fate == "shim":
        kill(shim(task))
        task.stop(timeout=0)


def check(kind: dict[str, Any], fate: str, result: ExitResult) -> None:
    if fate == "left to end" and not kind.get("boot"):
        assert (result.exit_code, result.signal) == (42, 0)
    elif fate == "stopped":
        assert result.exit_code == (0 if kind.get("boot") else 5)
    elif fate in ("killed", "leader"):
        assert (result.exit_code, result.signal) == (137, 9)
    elif fate == "nspawn":
        assert not result.successful and result.err
    elif fate == "shim":  # a shell of it may still have left the exit record
        assert not result.successful and (result.err or result.signal == 9)


def live(tasks: Tasks, chance: random.Random, restart: Any = None) -> None:
    """Start all tasks, end each in its way and in random order, destroy them."""
    chosen = [(make(tasks, kind, fate), kind, fate) for kind, fate in plan(chance)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda item: item[0].start(), chosen))
        for task, kind, _ in chosen:
            if not kind.get("boot") and task.driver_config["command"][-1] == SCRIPT:  # type: ignore[index]
                task.logmon.wait_for("ready\n")
        if restart:
            restart()
        chance.shuffle(chosen)
        list(pool.map(lambda item: meet(item[0], item[2]), chosen))
        for task, kind, fate in chosen:
            if fate == "left to end" and kind.get("boot"):
                task.stop(timeout=HANG)
            if fate != "destroyed":
                check(kind, fate, task.wait())
        list(pool.map(lambda item: item[0].destroy(), chosen))
    left = [line for task, _, _ in chosen for line in leftovers(task.allocation.id)]
    assert not left, "left behind:\n" + "\n".join(left)


def test_fifty_tasks_leave_nothing(driver_file: Path, image: Path, seed: int) -> None:
    with launch_like_agent(driver_file) as plugin, Tasks(plugin, image) as tasks:
        for _ in range(3):  # what a plugin needs once
            task, _ = tasks.run("true")
            task.destroy()
        tasks.close()
        time.sleep(1.5)
        before = Footprint.of(plugin.pid)
        live(tasks, random.Random(seed))
        tasks.close()
        time.sleep(0.5)
        after = Footprint.of(plugin.pid)
        assert after.descriptors <= before.descriptors + 2
        assert after.threads <= before.threads + 4
        assert after.memory <= before.memory + (16 << 20)
        assert zombies(plugin.pid) == []
    assert not plugin.violations


def test_fifty_tasks_survive_a_crash_of_the_plugin(driver_file: Path, image: Path, seed: int) -> None:
    plugins: list[Plugin] = [launch_like_agent(driver_file)]
    tasks = Tasks(plugins[0], image)

    def restart() -> None:
        os.kill(plugins[0].pid, signal.SIGKILL)
        plugins[0].kill_hard()
        plugins.append(launch_like_agent(driver_file))
        tasks.plugin = plugins[-1]
        for task in tasks.made:
            task.recover(tasks.plugin)

    try:
        live(tasks, random.Random(seed), restart)
    finally:
        if tasks.plugin.exited():
            tasks.plugin = launch_like_agent(driver_file)
            plugins.append(tasks.plugin)
        tasks.close()
        plugins[-1].kill()
    assert not plugins[-1].violations


ROUNDS = int(os.environ.get("NSPAWN_TEST_ROUNDS") or 12)
ROOTS: tuple[dict[str, Any], ...] = (
    {"read_only": None},
    {"ephemeral": True},
    {"volatile": "overlay", "user_namespacing": False},
)


def locks(image: Path) -> set[Path]:
    """What nspawn and the driver leave of a start: locks, and copies of the image."""
    found = {*image.parent.glob(".#*"), *image.glob(".#*")}
    info = image.stat()
    place = Path(f"/run/systemd/nspawn/locks/inode-{info.st_dev}:{info.st_ino}")
    return found | {path for path in (place,) if path.exists()}


def test_cancelled_starts_leave_nothing(driver_file: Path, image: Path, tmp_path: Path, seed: int) -> None:
    """An agent that gives up a start destroys the task at once, which cancels the start's own cleaning up. The
    image is free afterwards. NSPAWN_TEST_ROUNDS makes more of it."""
    chance, small = random.Random(seed), tmp_path / "images/small"
    make_small_image(image, small, ["dash", "sleep"])
    with launch_like_agent(driver_file) as plugin, Tasks(plugin, small) as tasks:
        for number in range(ROUNDS):
            task = tasks.make(["/bin/sleep", "60"], **ROOTS[number % len(ROOTS)])
            task.id = f"{task.allocation.id}/{task.name}/{number:08x}"
            task.prestart()
            request = driver_pb2.StartTaskRequest(task=task.task_config())
            start: Any = plugin.driver.StartTask.future(request)
            time.sleep(chance.uniform(0, 0.3))
            start.cancel()
            time.sleep(chance.uniform(0, 0.02))
            task.destroy()
            assert leftovers(task.allocation.id) == [], number
            assert locks(small) == set(), number
        task, result = tasks.run(["/bin/sleep", "0"], read_only=None)
        assert result.successful
    assert not plugin.violations
