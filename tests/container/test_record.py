# SPDX-License-Identifier: MPL-2.0
"""How a task ended is told rightly when /run is full, and alike by every plugin."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nspawn.common import STATE_ROOT
from tests.agent import HANG, AgentError, DriverError, Plugin, Task, launch_like_agent
from tests.containers import Tasks, driver_state, eventually, is_alive, kill, leader, nspawn

pytestmark = pytest.mark.root

RACES = int(os.environ.get("NSPAWN_TEST_RACES", "4"))
FOREVER = "while :; do sleep 0.05; done"


def test_exit_code_that_nspawn_took_along_is_not_made_up(tasks: Tasks) -> None:
    """nspawn's own end by SIGKILL looks to the shim as a payload's exit code of 137."""
    task = tasks.start("until [ -e /local/go ]; do sleep 0.05; done; exit 3")
    outer = nspawn(task)
    os.kill(outer, signal.SIGSTOP)
    (task.dir / "local/go").touch()
    eventually(lambda: not is_alive(leader(task)))
    kill(outer)
    result = task.wait()
    assert (result.exit_code, result.signal) == (137, 9)
    assert "exit code is not known" in result.err


def test_process_from_outside_costs_no_exit_code(tasks: Tasks) -> None:
    """The entry of an exec is in the payload's cgroup for a moment, and the container may end just then."""
    task = tasks.start("until [ -e /local/go ]; do sleep 0.05; done; exit 3")
    with subprocess.Popen(["sleep", "60"]) as entry:
        Path(str(driver_state(task)["cgroup"]), "payload/cgroup.procs").write_text(str(entry.pid))
        (task.dir / "local/go").touch()
        result = task.wait()
        assert (result.exit_code, result.signal, result.err) == (3, 0, "")
        assert entry.wait(HANG) == -signal.SIGKILL


# -- a full /run ---------------------------------------------------------------------------------------------


class SmallRun:
    """A mount namespace whose directory for states is a small file system. Plugins of `driver` live in it."""

    def __init__(self, folder: Path, driver: Path) -> None:
        script = (
            f"mkdir -p {STATE_ROOT} && mount -t tmpfs -o size=1m,mode=700 tmpfs {STATE_ROOT} && echo && exec cat"
        )
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout and self.process.stdout.read(1)
        self.filler = Path(f"/proc/{self.process.pid}/root{STATE_ROOT}/filler")
        self.driver = folder / driver.name
        self.driver.write_text(f'#!/bin/sh\nexec nsenter --mount --target={self.process.pid} {driver} "$@"\n')
        self.driver.chmod(0o755)
        self.environ = {**os.environ, "PLUGIN_UNIX_SOCKET_DIR": str(folder)}

    def launch(self) -> Plugin:
        return launch_like_agent(self.driver, env=self.environ)

    def fill(self) -> None:
        full = pytest.raises(OSError, match=os.strerror(errno.ENOSPC))
        with self.filler.open("wb", buffering=0) as file, full:
            while True:
                file.write(bytes(4096))

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture
def small_run(tmp_path: Path, driver_file: Path) -> Iterator[SmallRun]:
    made = SmallRun(tmp_path, driver_file)
    yield made
    made.close()


def test_results_on_a_full_disk(small_run: SmallRun, image: Path) -> None:
    """The disk fills up while the tasks run. The next plugin says the same."""
    with contextlib.ExitStack() as stack:
        first, second = small_run.launch(), small_run.launch()
        stack.callback(second.kill)
        tasks = stack.enter_context(Tasks(second, image))
        ready = "echo ready; while :; do sleep 0.02; done"
        code = tasks.start("until [ -e /local/go ]; do sleep 0.02; done; exit 42", plugin=first)
        stopped = tasks.start(f"trap 'exit 7' TERM; {ready}", plugin=first)
        by_signal = tasks.start(ready, plugin=first, process_two=True)
        killed = tasks.start(f"trap '' TERM; {ready}", plugin=first)
        for task in (stopped, by_signal, killed):
            task.logmon.wait_for("ready\n")
        small_run.fill()
        (code.dir / "local/go").touch()
        for task in (stopped, by_signal):
            task.stop(timeout=HANG)
        killed.stop(timeout=0.1)
        results = [task.wait() for task in tasks.made]
        assert [(result.exit_code, result.signal) for result in results] == [(42, 0), (7, 0), (143, 15), (137, 9)]
        assert ["kill_timeout" in result.err for result in results] == [False, False, False, True]
        first.kill_hard()
        for task in tasks.made:
            task.recover(second)
        assert [task.wait() for task in tasks.made] == results
        for task in tasks.made:
            task.destroy()
        assert not list(small_run.filler.parent.glob("*-*-*"))


def test_start_on_a_full_disk_is_refused(small_run: SmallRun, image: Path) -> None:
    with small_run.launch() as plugin, Tasks(plugin, image) as tasks:
        small_run.fill()
        with pytest.raises(DriverError, match=f"no space is left on the disk.*{STATE_ROOT}") as caught:
            tasks.start("true")
        assert caught.value.recoverable
        assert not list(small_run.filler.parent.glob("*-*-*"))
        small_run.filler.unlink()
        assert tasks.run("true")[1].successful


# -- a plugin that is killed while it stops a task -----------------------------------------------------------


def stop_and_crash(task: Task, seconds: float, delay: float) -> list[object]:
    """Stop a task, and kill its plugin soon after that. Return the result that it had told by then, if any."""
    told: list[object] = []

    def stop() -> None:
        with contextlib.suppress(AgentError):
            task.stop(timeout=seconds)

    def wait() -> None:
        with contextlib.suppress(AgentError):
            told.append(task.wait())

    threads = [threading.Thread(target=target) for target in (wait, stop)]
    for thread in threads:
        thread.start()
    time.sleep(delay)
    os.kill(task.plugin.pid, signal.SIGKILL)
    task.plugin.kill_hard()
    for thread in threads:
        thread.join(HANG)
    return told


@pytest.mark.parametrize(
    ("script", "seconds", "expected"),
    [(FOREVER, HANG, (143, 15, "")), (f"trap '' TERM; echo ready; {FOREVER}", 0.02, (137, 9, "kill_timeout"))],
    ids=["signal", "timeout"],
)
def test_crash_while_a_task_is_stopped(
    driver_file: Path, image: Path, script: str, seconds: float, expected: tuple[int, int, str]
) -> None:
    """The plugin is killed at any point of StopTask. Its successor says what it said or would have said."""
    seed = int(os.environ.get("NSPAWN_TEST_SEED") or time.time_ns())
    chance = random.Random(seed)
    print(f"NSPAWN_TEST_SEED={seed}")
    plugin = launch_like_agent(driver_file)
    for _ in range(RACES):
        successor = launch_like_agent(driver_file)
        with Tasks(successor, image) as tasks:
            task = tasks.start(script, plugin=plugin, process_two=True)
            if seconds < 1:
                task.logmon.wait_for("ready\n")
            told = stop_and_crash(task, seconds, chance.uniform(0, 0.06))
            task.recover(successor, agent_restart=False)
            task.stop(timeout=seconds)  # an agent repeats the call
            result = task.wait()
            assert (result.exit_code, result.signal) == expected[:2]
            assert expected[2] in result.err
            assert all(earlier == result for earlier in told)
        plugin = successor
    plugin.kill()
