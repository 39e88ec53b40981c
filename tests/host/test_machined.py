# SPDX-License-Identifier: MPL-2.0
"""Tasks and systemd-machined: shown when it is there, and never harmed by it.

Needs systemd as PID 1: runs in the hosts of tests/host/test_hosts.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nspawn.process import ProcessId
from tests.agent import Task, launch_like_agent
from tests.containers import Tasks, eventually, leader, output
from tests.hosts import needs_systemd

pytestmark = [needs_systemd]

FOREVER = "echo ready; while :; do sleep 0.2; done"


def tool(*argv: str, check: bool = True) -> str:
    environ = {**os.environ, "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, env=environ, check=False, timeout=60
    )
    assert not check or done.returncode == 0, f"{argv}: {done.stdout!r} {done.stderr!r}"
    return done.stdout.decode(errors="replace")


def machine(task: Task) -> str:
    return f"{task.name}-{task.allocation.id}"


def is_listed(task: Task) -> bool:
    return any(line.split()[0] == machine(task) for line in tool("machinectl", "list", "--no-legend").splitlines())


def is_running(task: Task) -> bool:
    return ProcessId.of(leader(task)) is not None


@pytest.fixture
def without_machined() -> Iterator[None]:
    tool("systemctl", "mask", "--runtime", "systemd-machined.service", check=False)
    tool("systemctl", "stop", "systemd-machined.service", check=False)
    yield
    tool("systemctl", "unmask", "--runtime", "systemd-machined.service")
    tool("systemctl", "daemon-reload")


def test_booted_task_is_a_machine(tasks: Tasks) -> None:
    task = tasks.boot(kill_timeout=30)
    eventually(lambda: is_listed(task))
    name = machine(task)
    inside = ("systemctl", f"--machine={name}", "is-system-running")
    eventually(lambda: tool(*inside, check=False).strip() in ("running", "degraded"), 60, 0.2)
    tool("machinectl", "shell", name, "/bin/sh", "-c", "echo inside >/run/said")
    said = Path(f"/proc/{leader(task)}/root/run/said")
    eventually(lambda: said.exists() and said.read_text() == "inside\n")
    assert "systemd" in tool("journalctl", f"--machine={name}", "--lines=50")
    with contextlib.suppress(subprocess.TimeoutExpired):
        login = ["timeout", "5", "machinectl", "login", name]
        assert b"login" in subprocess.run(login, stdin=subprocess.DEVNULL, capture_output=True, timeout=20).stdout
    status = tool("machinectl", "status", name)
    assert task.allocation.id.replace("-", "") in status and f"{leader(task)} (systemd)" in status
    task.stop()
    assert task.wait().successful
    eventually(lambda: not is_listed(task))


def test_command_is_a_machine_until_it_ends(tasks: Tasks) -> None:
    task = tasks.start(FOREVER)
    eventually(lambda: is_listed(task))
    task.stop(timeout=0)
    task.wait()
    eventually(lambda: not is_listed(task))
    task.destroy()


def test_short_tasks_leave_no_machine(tasks: Tasks) -> None:
    for _ in range(20):
        tasks.run("true")[0].destroy()
    eventually(lambda: not tool("machinectl", "list", "--no-legend").split("listed")[0].strip())


@pytest.mark.parametrize("verb", ["restart", "stop", "daemon-reload"])
def test_machined_comes_and_goes(tasks: Tasks, driver_file: Path, verb: str) -> None:
    """The task runs on, and the next look at the host, at the latest 30 s later, brings the machine back."""
    task = tasks.start(FOREVER)
    eventually(lambda: is_listed(task))
    tool("systemctl", *([verb] if verb == "daemon-reload" else [verb, "systemd-machined.service"]))
    time.sleep(0.5)
    assert is_running(task)
    with launch_like_agent(driver_file) as second:
        task.recover(second)
        eventually(lambda: is_listed(task), 60, 0.2)
        task.stop(timeout=0)
        task.wait()
        task.destroy()
        eventually(lambda: not is_listed(task))
    task.plugin = tasks.plugin


def test_machined_is_masked(tasks: Tasks, without_machined: None) -> None:
    task, result = tasks.run("echo here")
    assert result.successful and output(task) == "here\n"
    assert not [event.message for event in task.events if "machined" in event.message]


def test_start_does_not_wait_for_machined(tasks: Tasks) -> None:
    """Stopped, it answers nobody."""
    tool("machinectl", "list")
    pid = int(tool("systemctl", "show", "--property=MainPID", "--value", "systemd-machined.service"))
    os.kill(pid, signal.SIGSTOP)
    try:
        first = tasks.start(FOREVER)
        started = time.monotonic()
        task, result = tasks.run("echo here")
        took = time.monotonic() - started
        assert result.successful and output(task) == "here\n"
        assert took < 4, "a call to machined ends after 5 s at the earliest"
        task.destroy()
        first.stop(timeout=0)
        assert first.wait(4).exit_code == 137
        first.destroy()
    finally:
        os.kill(pid, signal.SIGCONT)


def test_terminating_a_machine_leaves_the_task_to_nomad(tasks: Tasks) -> None:
    """machinectl poweroff asks the payload; terminate only takes the machine off the list, or ends the task."""
    task = tasks.boot(kill_timeout=30)
    eventually(lambda: is_listed(task))
    inside = ("systemctl", f"--machine={machine(task)}", "is-system-running")
    eventually(lambda: tool(*inside, check=False).strip() in ("running", "degraded"), 60, 0.2)
    tool("machinectl", "poweroff", machine(task))
    assert task.wait().exit_code == 0
