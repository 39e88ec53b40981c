# SPDX-License-Identifier: MPL-2.0
"""A unit of a booted system as the task."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent import HANG, DriverError, Task, Template
from tests.containers import Tasks

pytestmark = pytest.mark.root

TRAPS = "trap 'echo term; exit 3' TERM; trap 'echo usr1' USR1; trap 'echo int; exit 5' INT; echo ready"
FOREVER = "while :; do sleep 0.05; done"


def start(tasks: Tasks, script: str, *settings: str, **options: Any) -> Task:
    """Start a system whose app.service is a shell script."""
    lines = ["[Service]", *settings, f"ExecStart=/bin/sh -c '{script.replace(chr(39), chr(34))}'"]
    return start_unit(tasks, "\n".join(lines), **options)


def start_unit(tasks: Tasks, text: str, **options: Any) -> Task:
    templates = [Template(destination="local/units/app.service", data=text)]
    defaults = {
        "unit": "app.service",
        "environment": [{"SYSTEMD_UNIT_PATH": "/local/units:"}],
        "templates": templates,
    }
    return tasks.boot(**(defaults | {"user_namespacing": True, "private_network": True} | options))


def end(task: Task) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr."""
    code = task.wait().exit_code
    task.logmon.wait_eof()
    return code, task.logmon.stdout.decode(), task.logmon.stderr.decode()


@pytest.mark.parametrize("settings", [["Type=oneshot"], []])
@pytest.mark.parametrize("code", [0, 7])
def test_exit_code_and_output(tasks: Tasks, code: int, settings: list[str]) -> None:
    task = start(tasks, f"echo out; echo err >&2; exit {code}", *settings)
    assert end(task) == (code, "out\n", "err\n")


def test_without_user_namespaces(tasks: Tasks) -> None:
    task = start(tasks, "echo out; echo err >&2; exit 7", user_namespacing=False)
    assert end(task) == (7, "out\n", "err\n")


def test_ended_by_a_signal(tasks: Tasks) -> None:
    code, _, errors = end(start(tasks, "kill -USR1 $$$$; sleep 60"))
    assert (code, errors) == (128 + 10, "app.service: failed: its Result is signal\n")


def test_much_output_is_complete(tasks: Tasks) -> None:
    code, lines, _ = end(start(tasks, "seq 100000"))
    assert code == 0
    assert lines == "".join(f"{number}\n" for number in range(1, 100001))


def test_restart_counts_first(tasks: Tasks) -> None:
    script = "echo try; [ -e /run/tried ] || { touch /run/tried; exit 3; }"
    task = start(tasks, script, "Restart=on-failure", "RestartSec=0")
    assert end(task) == (0, "try\ntry\n", "")


def test_restarts_have_their_limit(tasks: Tasks) -> None:
    code, lines, _ = end(start(tasks, "echo try; exit 3", "Restart=on-failure", "RestartSec=0"))
    assert (code, lines) == (3, 5 * "try\n")


@pytest.mark.parametrize(
    ("kill_signal", "code", "word"), [("", 3, "term"), ("SIGTERM", 3, "term"), ("SIGINT", 5, "int")]
)
def test_stop_reaches_the_unit(tasks: Tasks, kill_signal: str, code: int, word: str) -> None:
    """It is not restarted, and the system shuts down in order."""
    task = start(tasks, f"{TRAPS}; {FOREVER}", "Restart=always", "RestartSec=0")
    task.logmon.wait_for("ready\n")
    task.stop(timeout=HANG, kill_signal=kill_signal)
    assert end(task)[:2] == (code, f"ready\n{word}\n")


def test_signal_reaches_the_main_process(tasks: Tasks) -> None:
    task = start(tasks, f"{TRAPS}; {FOREVER}")
    task.logmon.wait_for("ready\n")
    task.signal("SIGUSR1")
    task.logmon.wait_for("usr1\n")


def test_stop_that_takes_too_long(tasks: Tasks) -> None:
    task = start(tasks, f"trap '' TERM; echo ready; {FOREVER}")
    task.logmon.wait_for("ready\n")
    task.stop(timeout=1)
    assert task.wait().signal == 9
    assert any("kill_timeout of 1 s after `systemctl stop" in event.message for event in task.events)


def test_missing_unit(tasks: Tasks) -> None:
    task = start(tasks, "true", unit="nope.service")
    assert end(task) == (1, "", "nope.service: cannot be started: its LoadState is not-found\n")


def test_condition_that_is_not_met(tasks: Tasks) -> None:
    task = start_unit(tasks, "[Unit]\nConditionPathExists=/nope\n[Service]\nExecStart=/bin/true")
    code, _, errors = end(task)
    assert code == 1
    assert "app.service: was not started: a condition" in errors


def test_unit_fails_before_its_program(tasks: Tasks) -> None:
    code, _, errors = end(start(tasks, "true", "ExecStartPre=/bin/false"))
    assert (code, errors) == (1, "app.service: failed: its Result is exit-code\n")


@pytest.mark.parametrize("name", ["app", "../app.service", "app.socket", "a@.service", "nomad-unit.service"])
def test_name_is_refused(tasks: Tasks, name: str) -> None:
    with pytest.raises(DriverError, match="unit"):
        start(tasks, "true", unit=name)


def test_unit_needs_boot(tasks: Tasks) -> None:
    with pytest.raises(DriverError, match="needs boot"):
        tasks.start("true", unit="app.service")
