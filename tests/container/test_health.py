# SPDX-License-Identifier: MPL-2.0
"""Events about the health of a booted system."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent import Task, Template
from tests.containers import Tasks, eventually

pytestmark = pytest.mark.root

RUNNING, AGAIN = "The system inside is running.", "The system inside is running again."


def start(tasks: Tasks, *, script: str = "exec sleep infinity", **options: Any) -> Task:
    """Start a system with an app.service, which is a shell script."""
    templates = [
        Template(destination="local/units/app.service", data=f"[Service]\nExecStart=/bin/sh -c '{script}'"),
        Template(destination="local/units/multi-user.target.d/app.conf", data="[Unit]\nWants=app.service"),
    ]
    defaults = {"environment": [{"SYSTEMD_UNIT_PATH": "/local/units:"}], "templates": templates}
    return tasks.boot(**(defaults | {"user_namespacing": True, "private_network": True} | options))


def told(task: Task) -> list[str]:
    return [event.message for event in task.events if "system inside" in event.message]


@pytest.mark.parametrize("user_namespacing", [True, False])
def test_each_change_is_told_once(tasks: Tasks, user_namespacing: bool) -> None:
    task = start(tasks, user_namespacing=user_namespacing)
    eventually(lambda: told(task) == [RUNNING])
    task.exec(["systemctl", "kill", "--signal=KILL", "app"])
    eventually(lambda: told(task)[1:] == ["The system inside is degraded. Failed units: app.service."])
    task.exec(["systemctl", "reset-failed"])
    eventually(lambda: told(task)[2:] == [AGAIN])
