# SPDX-License-Identifier: MPL-2.0
"""Tasks that nobody has: how they are found without their files, taken up, listed, stopped and reaped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nomad_pb import driver_pb2
from nspawn.job import state_directory
from tests.agent import HANG, Allocation, DriverError, Plugin, Task, launch_like_agent
from tests.containers import Tasks, eventually, is_alive, leader, nspawn, shim
from tests.leftovers import leftovers, processes

pytestmark = pytest.mark.root

FOREVER = "while :; do sleep 0.05; done"
POLITE = f"trap 'exit 9' TERM; echo ready; {FOREVER}"
SOON = 'reap_after = "1s"'


class Plugins:
    """Starts plugins, each as that of an agent of its own."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.made: list[Plugin] = []

    def launch(self, config: str = "") -> Plugin:
        self.made.append(launch_like_agent(self.file, config))
        return self.made[-1]

    def close(self) -> None:
        for plugin in self.made:
            if not plugin.exited():
                plugin.kill()
                assert not plugin.violations


@pytest.fixture
def plugins(driver_file: Path) -> Iterator[Plugins]:
    made = Plugins(driver_file)
    yield made
    made.close()


@pytest.fixture
def tasks(plugins: Plugins, image: Path) -> Iterator[Tasks]:
    """Tasks of a plugin that tests may kill."""
    made = Tasks(plugins.launch(), image)
    yield made
    if made.plugin.exited():
        made.plugin = plugins.launch()
    made.close()


def crash(plugin: Plugin) -> None:
    os.kill(plugin.pid, signal.SIGKILL)
    plugin.kill_hard()


def forget(task: Task) -> None:
    """Remove a task's state directory, as somebody who empties /run does."""
    shutil.rmtree(state_directory(task.id))


def start_polite(tasks: Tasks, **settings: Any) -> Task:
    task = tasks.start(POLITE, **settings)
    task.logmon.wait_for("ready\n")
    return task


def said(plugin: Plugin, text: str, task: Task) -> bool:
    return any(text in line and task.id in line for line in plugin.raw_log)


# -- a task without its files --------------------------------------------------------------------------------


def test_task_without_its_state_directory_is_taken_up(tasks: Tasks, plugins: Plugins) -> None:
    task = start_polite(tasks)
    crash(tasks.plugin)
    forget(task)
    tasks.plugin = plugins.launch()
    task.recover(tasks.plugin)
    assert task.inspect().task.state == driver_pb2.RUNNING
    with pytest.raises(DriverError, match="was removed"):
        task.exec(["true"])
    task.stop(timeout=HANG)
    assert task.wait().exit_code == 9
    task.destroy()
    assert leftovers(task.allocation.id) == []


@pytest.mark.parametrize("is_stopped", [True, False])
def test_kill_of_a_task_without_its_state_directory(tasks: Tasks, plugins: Plugins, is_stopped: bool) -> None:
    """nspawn has said that it was a signal, but its message went with the directory."""
    task = start_polite(tasks)
    crash(tasks.plugin)
    forget(task)
    tasks.plugin = plugins.launch()
    task.recover(tasks.plugin)
    if is_stopped:
        task.stop(timeout=0)
    else:
        os.kill(leader(task), signal.SIGKILL)
    result = task.wait()
    assert (result.exit_code, result.signal) == ((137, 9) if is_stopped else (1, 0))
    assert is_stopped or "or by a signal" in result.err


def test_state_directory_of_a_known_task_is_made_anew(tasks: Tasks) -> None:
    task = start_polite(tasks)
    forget(task)
    stream: Any = tasks.plugin.driver.Fingerprint(driver_pb2.FingerprintRequest())  # the next look at the host
    next(stream)
    stream.cancel()
    eventually(lambda: said(tasks.plugin, "made anew", task))
    task.stop(timeout=HANG)
    assert task.wait().exit_code == 9


def test_id_alone_finds_the_cgroup(tasks: Tasks, plugins: Plugins) -> None:
    """Neither a state directory nor a handle that can be read."""
    task = start_polite(tasks)
    crash(tasks.plugin)
    forget(task)
    tasks.plugin = plugins.launch()
    assert task.handle
    task.handle.driver_state = b"{ damaged"
    with pytest.raises(DriverError, match="damaged"):
        task.recover(tasks.plugin)
    task.destroy()
    assert leftovers(task.allocation.id) == []


def test_next_start_ends_what_runs_of_the_last(tasks: Tasks, plugins: Plugins) -> None:
    old = start_polite(tasks)
    payload = leader(old)
    crash(tasks.plugin)
    forget(old)
    tasks.plugin = plugins.launch()
    old.logmon.stop(0)  # a task has one log collector: it would take the new one's lines
    new = start_polite(tasks, allocation=old.allocation)
    assert not is_alive(payload)
    assert is_alive(leader(new))


# -- the reaper ----------------------------------------------------------------------------------------------


def test_only_own_tasks_that_nobody_has_are_reaped(tasks: Tasks, plugins: Plugins) -> None:
    """Not those of another agent, be it alive or down, and not those that were taken up."""
    ours, theirs = Allocation(), Allocation()
    lost, ended = (
        start_polite(tasks, allocation=ours, name="lost"),
        tasks.start("true", allocation=ours, name="end"),
    )
    taken, foreign = start_polite(tasks, allocation=ours, name="taken"), start_polite(tasks, allocation=theirs)
    other = plugins.launch()
    held = start_polite(tasks, allocation=ours, name="held", plugin=other)
    payload, ended_place = leader(lost), state_directory(ended.id)
    forget(lost)
    crash(tasks.plugin)
    tasks.plugin = plugins.launch(SOON)
    taken.recover(tasks.plugin)
    eventually(lambda: not is_alive(payload))
    eventually(lambda: not ended_place.exists())
    for task in (lost, ended):
        warnings = [line for line in tasks.plugin.raw_log if task.id in line and '"warn"' in line]
        assert "nobody's: no agent has taken it up for 1 s" in warnings[0] and "ending" in warnings[1]
    eventually(lambda: not list(processes(f"{ours.id}.lost")))
    for task in (taken, foreign, held):
        assert is_alive(leader(task)), task.name
    assert not said(tasks.plugin, "nobody", foreign)
    held.stop(timeout=HANG)
    foreign.recover(tasks.plugin)
    foreign.stop(timeout=HANG)
    assert held.wait().exit_code == foreign.wait().exit_code == 9


def test_dry_run_only_says_so(tasks: Tasks, plugins: Plugins) -> None:
    task, allocation = start_polite(tasks), None
    crash(tasks.plugin)
    tasks.plugin = plugins.launch(f"{SOON}\nreap_dry_run = true")
    allocation = task.allocation
    tasks.start("true", allocation=allocation, name="other")  # makes the directory the agent's own
    eventually(lambda: said(tasks.plugin, "reap_dry_run", task))
    time.sleep(1.5)  # three more looks
    assert is_alive(leader(task))
    assert sum(task.id in line for line in tasks.plugin.raw_log) == 1


def test_task_whose_allocation_was_removed_is_reaped(tasks: Tasks, plugins: Plugins) -> None:
    """Whosever it was. A directory that only moved away, as behind another mount, does not count."""
    gone, moved = start_polite(tasks), start_polite(tasks)
    payload, place = leader(gone), moved.allocation.dir
    crash(tasks.plugin)
    gone.logmon.stop(0)
    gone.allocation.close()
    place.rename(place.with_name("elsewhere"))
    try:
        tasks.plugin = plugins.launch(SOON)
        eventually(lambda: not is_alive(payload))
        eventually(lambda: leftovers(gone.allocation.id) == [])
        assert said(tasks.plugin, "its allocation's directory was removed", gone)
        assert is_alive(leader(moved))
    finally:
        place.with_name("elsewhere").rename(place)


def test_zero_reaps_nothing(tasks: Tasks, plugins: Plugins) -> None:
    task = start_polite(tasks)
    crash(tasks.plugin)
    task.logmon.stop(0)
    task.allocation.close()
    tasks.plugin = plugins.launch('reap_after = "0"')
    time.sleep(1)
    assert is_alive(leader(task))


# -- the command line ----------------------------------------------------------------------------------------


def ask(driver_file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv: Sequence[str] = [str(driver_file), "tasks", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def find(driver_file: Path, task: Task) -> dict[str, Any]:
    listed = json.loads(ask(driver_file, "--json").stdout)
    return next((facts for facts in listed if facts["id"] == task.id), {})


def test_tasks_are_listed(driver_file: Path, tasks: Tasks) -> None:
    task = start_polite(tasks, job="shop", group="front", labels=[{"team": "web", "a/b": "c\n\x1b[2J"}])
    facts = find(driver_file, task)
    assert (facts["job"], facts["group"], facts["namespace"]) == ("shop", "front", "default")
    assert facts["labels"] == {"team": "web", "a/b": "c\n\x1b[2J"}
    assert (facts["task"], facts["allocation"]) == (task.name, task.allocation.id)
    assert (facts["shim"], facts["nspawn"], facts["leader"]) == (shim(task), nspawn(task), leader(task))
    assert facts["has_agent"] and abs(facts["started"] - time.time()) < 60
    assert f"/{task.allocation.id}.{task.name}.scope" in facts["cgroup"]
    text = ask(driver_file).stdout
    assert f"{task.id}\n    task {task.name}, started " in text and "; an agent has it\n" in text
    assert "    job:       shop, group front, namespace default\n" in text
    assert '    labels:    a/b="c\\n\\u001b[2J", team=web\n' in text
    crash(tasks.plugin)
    forget(task)
    facts = find(driver_file, task)
    assert facts["leader"] == leader(task) and not facts["has_agent"]
    assert facts["job"] == "shop" and facts["labels"]["team"] == "web"


def test_stop_of_a_task_that_no_agent_has(driver_file: Path, tasks: Tasks) -> None:
    task = start_polite(tasks)
    crash(tasks.plugin)
    done = ask(driver_file, "--stop", task.allocation.id)
    assert done.returncode == 0 and done.stdout == f"{task.id} has ended: exit code 9.\n", done
    assert leftovers(task.allocation.id) == []
    again = ask(driver_file, "--stop", task.allocation.id)
    assert again.returncode == 1 and f"no task has an id that begins with {task.allocation.id}" in again.stderr


def test_stop_of_a_task_that_an_agent_has(driver_file: Path, tasks: Tasks) -> None:
    """It is killed after its time, and the plugin sees that it has ended."""
    task = tasks.start(f"trap '' TERM; echo ready; {FOREVER}")
    task.logmon.wait_for("ready\n")
    done = ask(driver_file, "--stop", task.id, "--timeout", "300ms")
    assert done.returncode == 0 and "killed" in done.stdout, done
    assert task.wait().exit_code == 137
