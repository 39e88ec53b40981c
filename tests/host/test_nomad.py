# SPDX-License-Identifier: MPL-2.0
"""The built file under a real agent, the judge of all. Needs `nomad` on PATH; says so where there is none."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import termios
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.agent import AgentError, NomadAgent
from tests.container.test_examples import JOBS
from tests.container.test_reach import SERVER
from tests.containers import escape, eventually, make_small_image
from tests.hosts import make_nginx_image
from tests.leftovers import leftovers
from tests.servers import FileServer, ImageParts, Registry, pack_tree

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
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


# -- the examples --------------------------------------------------------------------------------------------

# What each says when it runs, and the task that says it. That of nginx says it to who asks on its port.
SERVICES = {
    "address.hcl": ("client", "hello from 10.73.0.1"),
    "debian.hcl": ("debian", "Reached target multi-user.target"),
    "docker.hcl": ("web", "from a registry"),
    "nginx/nginx.hcl": ("nginx", ""),
    "shared.hcl": ("writer", ""),
    "system.hcl": ("watch", "log files: "),
    "writable.hcl": ("pet", "20"),  # the year of its start
    "unit.hcl": ("clock", "The time by unit.unit[0]: "),
    "zone.hcl": ("right", "Reached target multi-user.target"),
}
BATCHES = {"hello.hcl": ("hello", "line 5\n"), "download.hcl": ("download", "A root of my own\n")}


@pytest.fixture
def examples(image: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder of the examples, with their images beside them; what they fetch comes from servers here."""
    shutil.copytree(ROOT / "example", tmp_path / "example")
    images = tmp_path / "example/images"
    images.mkdir()
    make_small_image(image, images / "pet", ("dash", "date", "cat", "sleep"))
    (images / "debian").symlink_to(image)
    (images / "nginx").symlink_to(make_nginx_image())
    make_small_image(image, tmp_path / "small", ("dash", "ls", "touch", "sleep"))
    archive = pack_tree(tmp_path / "small")
    serve = ["/bin/sh", "-c", "echo from a registry; exec sleep 1d"]
    with FileServer() as files, Registry(tmp_path / "registry") as registry:
        files.files["/debian.tar.xz"] = archive
        registry.push("library/nginx", ImageParts.make([archive], Entrypoint=serve), "1.27")
        for path in (tmp_path / "example").rglob("*.hcl"):
            path.write_text(path.read_text().replace("http://127.0.0.1:8000", files.url))
        config = tmp_path / "example/config.hcl"
        mirrors = f'registry_mirrors = {{ "docker.io" = ["{registry.host}"] }}'
        config.write_text(config.read_text().replace("  config {\n", f"  config {{\n    {mirrors}\n"))
        yield tmp_path / "example"


def write_agent_config(path: Path, images: Path, more: str = "") -> Path:
    text = (images.parent / "config.hcl").read_text()
    path.write_text(text.replace("  config {\n", f'  config {{\n    image_dir = "{images}"\n') + more)
    return path


def wait_for_log(agent: NomadAgent, alloc: str, task: str, text: str) -> None:
    def said() -> bool:
        with contextlib.suppress(AgentError):  # the task has not started yet, though another of its group has
            return text in agent.logs(alloc, task)
        return False

    eventually(said, 60, 0.5)


def greet_http(agent: NomadAgent, alloc: str) -> str:
    """What its web server says, as soon as it listens."""
    port = agent.allocation(alloc)["AllocatedResources"]["Shared"]["Ports"][0]

    def ask() -> str:
        address = f"http://{port['HostIP']}:{port['Value']}/"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10) as answer:
            return str(answer.read().decode())
        return ""

    return eventually(ask)


def read_starts(agent: NomadAgent, running: Mapping[str, str]) -> dict[str, str]:
    """When each container's PID 1 was started, by the names of the examples: another one has another time."""
    script = "read stat </proc/1/stat; set -- ${stat##*)}; echo ${20}"  # there is sh in every image here
    with contextlib.suppress(AgentError):
        return {name: agent.exec(alloc, SERVICES[name][0], "sh", "-c", script) for name, alloc in running.items()}
    return {}


def test_examples_are_valid(agent: NomadAgent) -> None:
    """Also those that nothing here can run."""
    for path in JOBS:
        agent.run("job", "validate", str(path))


def test_examples_live_and_drain(driver_file: Path, examples: Path, tmp_path: Path) -> None:
    """All at once: run, logs, exec, signal, a plugin that is killed, an agent that starts anew, restart, stop, and
    a node that is drained; nothing is left of any."""
    config = write_agent_config(tmp_path / "config.hcl", examples / "images")
    if "NSPAWN_TEST_HOST" in os.environ:
        subprocess.run(["systemctl", "start", "systemd-networkd"], check=True, timeout=60)
    with NomadAgent(driver_file, config, dev=False) as agent:
        agent.wait_ready()
        for name, (task, text) in BATCHES.items():
            alloc = agent.run_job(examples / name)
            agent.wait_status(alloc, "complete")
            assert text in agent.logs(alloc, task)

        alloc = agent.run_job(examples / "nightly.hcl")
        agent.wait_status(alloc, "failed")
        assert any("Exit Code: 7" in event for event in agent.task_events(alloc, "nightly"))

        running = {name: agent.run_job(examples / name) for name in SERVICES}
        for name, (task, text) in SERVICES.items():
            agent.wait_status(running[name], "running", timeout=120)
            wait_for_log(agent, running[name], task, text)
            assert agent.exec(running[name], task, "sh", "-c", "echo $NOMAD_TASK_NAME") == f"{task}\n"
        assert "10.73.0.1:8000" in agent.run("service", "info", "address")
        nginx = {"nginx/nginx.hcl": running["nginx/nginx.hcl"]}
        (nginx_alloc,) = nginx.values()
        agent.signal(nginx_alloc, "nginx", "SIGHUP")
        assert greet_http(agent, nginx_alloc) == "Hello from nginx.nginx[0]\n"

        before = read_starts(agent, running)
        agent.kill_plugin()
        assert eventually(lambda: read_starts(agent, running), 60, 1) == before
        agent.stop()
        agent.start()
        agent.wait_ready()
        assert eventually(lambda: read_starts(agent, running), 60, 1) == before

        started = read_starts(agent, nginx)
        agent.restart(nginx_alloc)
        eventually(lambda: read_starts(agent, nginx) not in ({}, started), 60, 1)
        assert greet_http(agent, nginx_alloc) == "Hello from nginx.nginx[0]\n"
        agent.stop_job("debian")
        agent.wait_status(running["debian.hcl"], "complete")
        agent.drain()
        for alloc in json.loads(agent.run("alloc", "status", "-json")):
            assert alloc["ClientStatus"] == ("failed" if alloc["JobID"] == "nightly" else "complete")
            eventually(lambda alloc=alloc: not leftovers(alloc["ID"]))  # type: ignore[misc]


# As jobs for the Go driver are written: maps as blocks, nothing that it did not know, and ports of the task's own.
GO_JOB = """
job "go-style" {
  datacenters = ["dc1"]
  type        = "service"
  group "linux" {
    count = 1
    task "system" {
      driver = "nspawn"
      config {
        image       = "IMAGE"
        resolv_conf = "copy-host"
        volatile    = "overlay"
        user        = "root"
        environment = { SYSTEMD_UNIT_PATH = "${NOMAD_TASK_DIR}/systemd:" }
      }
      template {
        data        = "[Service]\\nStandardOutput=journal+console\\nExecStart=/bin/echo a unit of a template\\n"
        destination = "local/systemd/told.service"
      }
      template {
        data        = "[Unit]\\nWants=told.service\\n"
        destination = "local/systemd/multi-user.target.d/wants.conf"
      }
    }
    task "command" {
      driver = "nspawn"
      config {
        image = "IMAGE"
        image_download {
          url   = "URL"
          type  = "tar"
          force = true
        }
        boot        = false
        process_two = true
        command     = ["/bin/sh", "-c", "echo $FOO $NOMAD_PORT_http $(ls /etc-of-host/passwd); exec sleep 1d"]
        capability  = ["CAP_NET_ADMIN"]
        ephemeral   = true
        bind           = { "/srv" = "/srv-of-host" }
        bind_read_only = { "/etc" = "/etc-of-host" }
        environment {
          FOO = "bar"
        }
        network_zone = "ZONE"
        port_map {
          http = 80
        }
      }
      resources {
        network {
          port "http" {}
          port "admin" {}
        }
      }
    }
    task "host" {
      driver = "nspawn"
      config {
        image            = "IMAGE"
        read_only        = true
        boot             = false
        command          = ["/bin/sh", "-c", "cat /proc/self/uid_map; exec sleep 1d"]
        network_veth     = false
        user_namespacing = false
        private_users    = "pick"
        console          = "pipe"
      }
    }
  }
}
"""


def test_jobs_of_the_go_driver(agent: NomadAgent, image: Path, tmp_path: Path) -> None:
    make_small_image(image, tmp_path / "small", ("dash", "ls", "sleep"))
    job = tmp_path / "j.hcl"
    with FileServer() as files:
        files.files["/image.tar.xz"] = pack_tree(tmp_path / "small")
        text = GO_JOB.replace("URL", f"{files.url}/image.tar.xz").replace("ZONE", f"z{os.getpid()}")
        job.write_text(text.replace("IMAGE", str(image)))
        alloc = agent.run_job(job)
        wait_for_log(agent, alloc, "command", "bar 80 /etc-of-host/passwd\n")
    wait_for_log(agent, alloc, "system", "a unit of a template")
    wait_for_log(agent, alloc, "host", "4294967295\n")
    agent.stop_job("go-style")
    agent.wait_status(alloc, "complete")


DOCKER_JOB = """
job "docker-style" {
  group "g" {
    task "command" {
      driver = "nspawn"
      config {
        image           = "IMAGE"
        boot            = false
        private_network = true
        volatile        = "overlay"
        entrypoint      = ["/bin/sh", "-c"]
        args            = ["grep root: /a/passwd; ls /b/passwd; cat /proc/sys/net/core/somaxconn; sleep 1d"]
        sysctl          = { "net.core.somaxconn" = "1234" }
        labels {
          team = "web"
        }
        mount {
          type     = "bind"
          source   = "/etc"
          target   = "/a"
          readonly = true
        }
        mount {
          source    = "/etc"
          target    = "/b"
          read_only = true
        }
      }
    }
  }
}
"""


def test_job_in_dockers_words(agent: NomadAgent, image: Path, tmp_path: Path) -> None:
    job = tmp_path / "j.hcl"
    job.write_text(DOCKER_JOB.replace("IMAGE", str(image)))
    alloc = agent.run_job(job)
    wait_for_log(agent, alloc, "command", "root:x:0:0:root:/root:/bin/bash\n/b/passwd\n1234\n")
    agent.stop_job("docker-style")
    agent.wait_status(alloc, "complete")


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
# Of this run alone: beside another bridge with the same name or addresses its containers cannot be reached.
BRIDGE = f"nspawn{os.getpid()}"
BRIDGE_SUBNET = f"10.{64 + os.getpid() // 250 % 64}.{os.getpid() % 250}.0/24"


@pytest.fixture
def bridge_agent(driver_file: Path, examples: Path, tmp_path: Path) -> Iterator[NomadAgent]:
    """An agent that makes networks for groups."""
    if not CNI_PLUGINS:
        pytest.skip("no CNI plugins in /usr/lib/cni or /opt/cni/bin: bridge mode was not run under a real agent")
    options = {"cni_path": CNI_PLUGINS, "bridge_network_name": BRIDGE, "bridge_network_subnet": BRIDGE_SUBNET}
    client = "client {\n" + "".join(f'  {name} = "{value}"\n' for name, value in options.items()) + "}\n"
    config = write_agent_config(tmp_path / "config.hcl", examples / "images", client)
    try:
        with NomadAgent(driver_file, config) as running:
            running.wait_ready()
            yield running
    finally:
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, timeout=30)


def greet(address: str, port: int) -> str:
    with socket.create_connection((address, port), 10) as connection:
        return connection.makefile().read()


def test_bridge_example(bridge_agent: NomadAgent, examples: Path) -> None:
    alloc = bridge_agent.run_job(examples / "nginx/bridge.hcl")
    bridge_agent.wait_status(alloc, "running")
    assert greet_http(bridge_agent, alloc) == "Hello from bridge.nginx[0]\n"


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
