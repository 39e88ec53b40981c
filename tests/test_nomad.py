# SPDX-License-Identifier: MPL-2.0
"""The built file under a real agent, the judge of all. Needs `nomad` on PATH; says so where there is none."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent import ROOT, NomadAgent
from tests.containers import escape
from tests.test_reach import SERVER

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
    events = "\n".join(agent.task_events(alloc, "task")).replace("\\", "")  # 257 finds it out after its start:
    # then it stands in the quotes of "Exit Message"
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


# -- commands in a running container -------------------------------------------------------------------------

FOREVER = "while :; do sleep 0.1; done"


def test_exec_passes_streams_and_codes(agent: NomadAgent, image: Path, tmp_path: Path) -> None:
    alloc = agent.run_job(write_job(tmp_path / "j.hcl", image, FOREVER, "exec"))
    agent.wait_status(alloc, "running")
    assert agent.exec(alloc, "task", "sh", "-c", "echo $NOMAD_TASK_NAME; id -un") == "task\nroot\n"
    assert agent.exec(alloc, "task", "cat", stdin=b"typed\n") == "typed\n"
    for command, code in (
        (("sh", "-c", "exit 42"), 42),
        (("no-such-program",), 127),
        (("sh", "-c", "kill $$"), 143),
    ):
        done = subprocess.run(
            [agent.nomad, "alloc", "exec", "-t=false", "-task", "task", alloc, *command],
            env={**os.environ, "NOMAD_ADDR": agent.url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == code
        assert (b'there is no "no-such-program"' in done.stderr) == (code == 127)
    agent.stop_job("exec")
    agent.wait_status(alloc, "complete", "failed")


class Terminal:
    """A program at a terminal, and somebody who types."""

    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        self.fd, theirs = os.openpty()
        self.resize(30, 100)
        self.process = subprocess.Popen(
            command, env=environ, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        self.theirs = theirs  # kept: what the program has written at its end can still be read
        self.seen = b""

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def expect(self, text: bytes, timeout: float = 30) -> None:
        """Wait for a text after the one that was waited for last."""
        deadline = time.monotonic() + timeout
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} not in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536)
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        os.close(self.fd)
        os.close(self.theirs)


@pytest.mark.parametrize("options", ["", "process_two = true"], ids=["command", "process_two"])
def test_interactive_shell(agent: NomadAgent, image: Path, tmp_path: Path, options: str) -> None:
    """`nomad alloc exec -t` as a person uses it: prompt, job control, Ctrl-C and Ctrl-Z, a window that changes."""
    name = f"shell-{len(options)}"
    alloc = agent.run_job(write_job(tmp_path / "j.hcl", image, FOREVER, name, more=options))
    agent.wait_status(alloc, "running")
    command = [agent.nomad, "alloc", "exec", "-i", "-t", "-task", "task", alloc, "/bin/bash", "--norc"]
    terminal = Terminal(command, {**os.environ, "NOMAD_ADDR": agent.url})
    try:
        terminal.expect(b"# ")
        terminal.type(b"PS1='ready> '; tty; stty size\r")
        terminal.expect(b"/dev/pts/")
        terminal.expect(b"30 100")
        terminal.expect(b"ready> ")
        terminal.type(b"sleep 1000\r")
        time.sleep(1)
        terminal.type(b"\x1a")
        terminal.expect(b"Stopped")
        terminal.type(b"jobs -l | wc -l; fg\r")
        terminal.expect(b"sleep 1000\r\n")
        time.sleep(1)
        terminal.type(b"\x03")
        terminal.expect(b"ready> ")
        terminal.type(b"echo code $?\r")
        terminal.expect(b"code 130")
        terminal.resize(40, 120)
        os.kill(terminal.process.pid, signal.SIGWINCH)  # the terminal has no session of its own here
        time.sleep(1)
        terminal.type(b"stty size\r")
        terminal.expect(b"40 120")
        terminal.type(b"exit 9\r")
        assert terminal.process.wait(30) == 9
    finally:
        terminal.close()
    agent.stop_job(name)


# -- the network of a group ----------------------------------------------------------------------------------

CNI_PLUGINS = next((path for path in ("/usr/lib/cni", "/opt/cni/bin") if os.path.exists(f"{path}/bridge")), "")
BRIDGE = "nspawn-test"


@pytest.fixture
def bridge_agent(driver_file: Path, tmp_path: Path) -> Iterator[NomadAgent]:
    """An agent that makes networks for groups."""
    if not CNI_PLUGINS:
        pytest.skip("no CNI plugins in /usr/lib/cni or /opt/cni/bin: bridge mode was not run under a real agent")
    config = tmp_path / "config.hcl"
    client = f'client {{\n  cni_path = "{CNI_PLUGINS}"\n  bridge_network_name = "{BRIDGE}"\n}}\n'
    config.write_text((ROOT / "example/config.hcl").read_text() + client)
    try:
        with NomadAgent(driver_file, config) as running:
            running.wait_ready()
            yield running
    finally:
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, timeout=30)


def greet(address: str, port: int) -> str:
    with socket.create_connection((address, port), 10) as connection:
        return connection.makefile().read()


def test_bridge_mode_with_user_namespaces(bridge_agent: NomadAgent, image: Path, tmp_path: Path) -> None:
    """A port below 1024, and below it a user namespace; reached from the host by way of CNI's mapping."""
    job = tmp_path / "j.hcl"
    job.write_text(f"""
job "bridge" {{
  datacenters = ["dc1"]
  group "group" {{
    network {{
      mode = "bridge"
      port "http" {{
        to = 80
      }}
      dns {{
        servers = ["192.0.2.1"]
      }}
    }}
    task "task" {{
      driver = "nspawn"
      config {{
        image     = "{image}"
        boot      = false
        read_only = true
        command   = ["/bin/sh", "-c", <<-EOT
          cat /proc/self/uid_map /etc/resolv.conf
          getent hosts $(hostname)
          exec /usr/bin/perl -e '{escape(SERVER)}' $NOMAD_PORT_http
          EOT
        ]
      }}
    }}
  }}
}}
""")
    alloc = bridge_agent.run_job(job)
    bridge_agent.wait_status(alloc, "running")
    state = bridge_agent.allocation(alloc)
    address = state["NetworkStatus"]["Address"]
    port = state["AllocatedResources"]["Shared"]["Ports"][0]
    deadline = time.monotonic() + 30
    while "listening" not in bridge_agent.logs(alloc, "task"):
        assert time.monotonic() < deadline, bridge_agent.logs(alloc, "task", stderr=True)
        time.sleep(0.1)
    users, servers, own, _ = bridge_agent.logs(alloc, "task").splitlines()
    assert users.split()[1] != "0"
    assert servers == "nameserver 192.0.2.1"
    assert own.split()[0] == address
    assert greet(address, 80) == greet(port["HostIP"], port["Value"]) == "hello from \n"
    bridge_agent.stop_job("bridge")
    bridge_agent.wait_status(alloc, "complete")
    deadline = time.monotonic() + 10
    while Path("/var/run/netns", alloc).exists():
        assert time.monotonic() < deadline, "the namespace of the group is still there"
        time.sleep(0.1)
