# SPDX-License-Identifier: MPL-2.0
"""The built file under a real agent, the judge of all. Needs `nomad` on PATH; says so where there is none."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent import ROOT, NomadAgent

pytestmark = [
    pytest.mark.root,
    pytest.mark.nomad,
    pytest.mark.skipif(not shutil.which("nomad"), reason="no `nomad` on PATH: nothing was run under a real agent"),
]


@pytest.fixture(scope="module")
def agent(driver_file: Path) -> Iterator[NomadAgent]:
    """An agent that keeps its state, so that it can be stopped and started again."""
    with NomadAgent(driver_file, ROOT / "example/config.hcl", dev=False) as running:
        running.wait_ready()
        yield running


def write_job(path: Path, image: Path, script: str, name: str, more: str = "", task: str = "") -> Path:
    path.write_text(f"""
job "{name}" {{
  type        = "batch"
  datacenters = ["dc1"]
  group "group" {{
    restart {{
      attempts = 0
      mode     = "fail"
    }}
    reschedule {{
      attempts  = 0
      unlimited = false
    }}
    task "task" {{
      driver = "nspawn"
      config {{
        image     = "{image}"
        boot      = false
        read_only = true
        command   = ["/bin/sh", "-c", <<-EOT
          {script}
          EOT
        ]
        {more}
      }}
      {task}
    }}
  }}
}}
""")
    return path


COUNT_TO_60 = "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo line $i; sleep 0.1; done; exit 3"
LINES = "".join(f"line {number}\n" for number in range(1, 61))


def test_command_runs_and_ends(agent: NomadAgent, image: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "j.hcl", image, "echo out $NOMAD_TASK_NAME; echo err >&2; exit 7", "ends")
    alloc = agent.run_job(job)
    agent.wait_status(alloc, "failed")
    assert any("Exit Code: 7" in event for event in agent.task_events(alloc, "task"))
    assert agent.logs(alloc, "task") == "out task\n"
    assert agent.logs(alloc, "task", stderr=True) == "err\n"


def test_plugin_killed_under_a_running_task(agent: NomadAgent, image: Path, tmp_path: Path) -> None:
    alloc = agent.run_job(write_job(tmp_path / "j.hcl", image, COUNT_TO_60, "plugin-killed"))
    agent.wait_status(alloc, "running")
    time.sleep(1)
    agent.kill_plugin()
    agent.wait_status(alloc, "failed")
    assert agent.logs(alloc, "task") == LINES
    assert any("Exit Code: 3" in event for event in agent.task_events(alloc, "task"))


@pytest.mark.parametrize("crash", [False, True])
def test_agent_restarted_under_a_running_task(agent: NomadAgent, image: Path, tmp_path: Path, crash: bool) -> None:
    job = write_job(tmp_path / "j.hcl", image, COUNT_TO_60, f"agent-restarted-{crash}".lower())
    alloc = agent.run_job(job)
    agent.wait_status(alloc, "running")
    time.sleep(1)
    if crash:
        agent.kill()
    else:
        agent.stop()
    agent.start()
    agent.wait_ready()
    agent.wait_status(alloc, "failed")
    assert agent.logs(alloc, "task") == LINES
    assert any("Exit Code: 3" in event for event in agent.task_events(alloc, "task"))


def test_signal_and_stop_reach_the_command(agent: NomadAgent, image: Path, tmp_path: Path) -> None:
    script = "trap 'echo got hup' HUP; trap 'echo got int; exit 5' INT; while :; do sleep 0.1; done"
    task = 'kill_signal = "SIGINT"\nkill_timeout = "5s"'
    alloc = agent.run_job(write_job(tmp_path / "j.hcl", image, script, "signals", task=task))
    agent.wait_status(alloc, "running")
    time.sleep(0.5)
    agent.signal(alloc, "task", "SIGHUP")
    time.sleep(0.5)
    agent.stop_job("signals")
    agent.wait_status(alloc, "complete", "failed")
    assert agent.logs(alloc, "task") == "got hup\ngot int\n"
    assert any("Exit Code: 5" in event for event in agent.task_events(alloc, "task"))


def test_what_is_wrong_is_said_in_the_events(agent: NomadAgent, image: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "j.hcl", image, "true", "wrong", more='user = "nobody-by-this-name"')
    alloc = agent.run_job(job)
    agent.wait_status(alloc, "failed")
    events = "\n".join(agent.task_events(alloc, "task"))
    assert 'user: there is no user "nobody-by-this-name" in the container' in events


def test_booted_system(agent: NomadAgent, image: Path, tmp_path: Path) -> None:
    job = tmp_path / "j.hcl"
    job.write_text(f"""
job "booted" {{
  datacenters = ["dc1"]
  group "group" {{
    task "task" {{
      driver       = "nspawn"
      kill_timeout = "20s"
      config {{
        image    = "{image}"
        volatile = "overlay"
      }}
    }}
  }}
}}
""")
    alloc = agent.run_job(job)
    agent.wait_status(alloc, "running")
    deadline = time.monotonic() + 60
    while "Reached target multi-user.target" not in agent.logs(alloc, "task"):
        assert time.monotonic() < deadline, agent.logs(alloc, "task")
        time.sleep(0.5)
    agent.stop_job("booted")
    agent.wait_status(alloc, "complete")
    assert "Powering off." in agent.logs(alloc, "task")
    assert any("Exit Code: 0" in event for event in agent.task_events(alloc, "task"))
