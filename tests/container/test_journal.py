# SPDX-License-Identifier: MPL-2.0
"""The journal of a booted system as the task's log."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.agent import DriverError, Task, Template
from tests.containers import Tasks

pytestmark = pytest.mark.root

PATIENCE = 60.0  # seconds


def start(tasks: Tasks, script: str, *settings: str, **options: Any) -> Task:
    """Start a system that forwards its journal and has an app.service, which is a shell script."""
    lines = ["[Service]", *settings, f"ExecStart=/bin/sh -c '{script}'"]
    templates = [
        Template(destination="local/units/app.service", data="\n".join(lines)),
        Template(destination="local/units/multi-user.target.d/app.conf", data="[Unit]\nWants=app.service"),
    ]
    defaults = {"journal": True, "environment": [{"SYSTEMD_UNIT_PATH": "/local/units:"}], "templates": templates}
    return tasks.boot(**(defaults | {"user_namespacing": True, "private_network": True} | options))


def end(task: Task) -> str:
    """Return stdout."""
    assert task.wait(PATIENCE).exit_code == 0
    task.logmon.wait_eof()
    assert task.logmon.stderr.decode() == ""
    return task.logmon.stdout.decode()


@pytest.mark.parametrize("user_namespacing", [True, False])
def test_the_whole_journal_with_names_of_units(tasks: Tasks, user_namespacing: bool) -> None:
    """From the first lines of the boot to those of the shutdown, each once."""
    script = 'trap "echo last; exit" TERM; echo first; while :; do sleep 0.05; done'
    task = start(tasks, script, user_namespacing=user_namespacing)
    task.logmon.wait_for("first\n")
    task.stop(timeout=PATIENCE)
    lines = end(task).splitlines()
    for text in (
        r"systemd-journald.service\[\d+\]: Journal started",
        r"app.service\[\d+\]: first",
        r"app.service\[\d+\]: last",
        r"init.scope\[1\]: Shutting down\.",
        r"systemd-journald.service\[\d+\]: Journal stopped",
    ):
        assert len([line for line in lines if re.fullmatch(f"... ....-..-.. ..:..:.. UTC {text}", line)]) == 1, (
            text
        )
    assert not [line for line in lines if "OK" in line], "from the console"


def test_much_is_complete_at_the_end(tasks: Tasks) -> None:
    task = start(tasks, "seq 20000; exec systemctl poweroff --force", "LogRateLimitIntervalSec=0")
    numbers = [int(found) for found in re.findall(r"app.service\[\d+\]: (\d+)$", end(task), re.MULTILINE)]
    assert numbers == [*range(1, 20001)]


def test_forwarding_that_is_killed_begins_again(tasks: Tasks) -> None:
    task = start(tasks, "systemctl kill -s KILL nomad-journal; sleep 1; echo second")
    task.logmon.wait_for("second\n")
    assert task.logmon.stdout.count(b"Journal started") == 1
    task.logmon.wait_for("journal: journalctl has ended and is started again; lines may be missing\n", "stderr")


def test_image_without_journalctl(tasks: Tasks, tmp_path: Path) -> None:
    for name in ("sbin", "usr"):
        (tmp_path / name).mkdir()
    shutil.copy("/bin/true", tmp_path / "sbin/init")
    with pytest.raises(DriverError, match="journal = true: the image has no journalctl"):
        start(tasks, "true", image=str(tmp_path))
