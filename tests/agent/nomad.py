# SPDX-License-Identifier: MPL-2.0
"""A real Nomad agent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.agent.allocation import mount_points
from tests.agent.errors import AgentError
from tests.agent.job import free_port, parse_job

T = TypeVar("T")
# Asking the clouds' metadata services takes seconds where they do not answer, and may fail the agent; nothing a
# test starts shall talk to other machines.
NO_FINGERPRINTS = "env_aws,env_azure,env_digitalocean,env_gce,consul,vault"


class NomadAgent:
    """A real `nomad agent` with this plugin, in a temporary directory and on ports of its own.

    dev: `-dev`, which forgets its state at the end; otherwise server and client with a data directory, for
    tests that stop() and start() again.
    """

    def __init__(
        self, plugin: str | Path, config: str | Path, *, dev: bool = True, nomad: str | None = None
    ) -> None:
        found = nomad or shutil.which("nomad")
        if not found:
            raise AgentError("there is no `nomad` on PATH")
        self.nomad, self.config, self.dev = found, Path(config).absolute(), dev
        self.root = Path(tempfile.mkdtemp(prefix="nomad-agent-"))
        self.root.chmod(0o711)
        self.log_path = self.root / "agent.log"
        plugins = self.root / "plugins"
        plugins.mkdir()
        shutil.copy2(plugin, plugins)
        self.plugin = plugins / Path(plugin).name
        self.http = free_port()
        (self.root / "local.hcl").write_text(
            f"ports {{\n  http = {self.http}\n  rpc = {free_port()}\n  serf = {free_port()}\n}}\n"
            'advertise {\n  http = "127.0.0.1"\n  rpc = "127.0.0.1"\n  serf = "127.0.0.1"\n}\n'
            "disable_update_check = true\n"
            f'client {{\n  options = {{ "fingerprint.denylist" = "{NO_FINGERPRINTS}" }}\n}}\n'
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    # --- life ---

    def start(self) -> None:
        command = [self.nomad, "agent", f"-plugin-dir={self.plugin.parent}", f"-config={self.config}"]
        command += [f"-config={self.root / 'local.hcl'}"]
        if self.dev:
            command.append("-dev")
        else:
            command += ["-server", "-client", "-bootstrap-expect=1", "-bind=127.0.0.1"]
            command.append(f"-data-dir={self.root / 'data'}")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                env={**os.environ, "TMPDIR": str(self.root)},
                start_new_session=True,  # our Ctrl-C must not reach the agent: it would take the tasks down first
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_ready(self, driver: str = "nspawn", timeout: float = 60) -> dict[str, Any]:
        """Wait until the node is ready and `driver` healthy; returns the node."""

        def ready() -> dict[str, Any] | None:
            if self.process and self.process.poll() is not None:
                last = "\n".join(self.log.splitlines()[-10:])
                raise AgentError(f"nomad ended with code {self.process.returncode}:\n{last}")
            with contextlib.suppress(AgentError, ValueError):
                node: dict[str, Any] = json.loads(self.run("node", "status", "-self", "-json"))
                state = (node.get("Drivers") or {}).get(driver) or {}
                return node if node["Status"] == "ready" and state.get("Healthy") else None
            return None

        return self._poll(ready, f"the node was not ready with a healthy driver {driver}", timeout)

    def stop(self) -> None:
        """SIGINT, as Ctrl-C: with -dev its tasks end first."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AgentError(
                    f"nomad did not end within 60 s; the end of its log:\n{self.log[-2000:]}"
                ) from None

    def kill(self) -> None:
        """SIGKILL of the agent alone, as a crash."""
        if self.process:
            self.process.kill()
            self.process.wait(10)

    def plugin_pid(self) -> int:
        """The long-lived plugin process: a child of the agent that runs the plugin file."""
        assert self.process
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.process.pid and str(self.plugin).encode() in (entry / "cmdline").read_bytes():
                    return int(entry.name)
        raise AgentError("the agent has no plugin process")

    def kill_plugin(self) -> int:
        pid = self.plugin_pid()
        os.kill(pid, signal.SIGKILL)
        return pid

    def close(self) -> None:
        try:
            if not self.dev and self.process and self.process.poll() is None:
                self.drain()  # it would leave its tasks to the next start
            self.stop()
        finally:
            self._kill_orphans()
            for path in sorted(mount_points(self.root), reverse=True):
                subprocess.run(["umount", str(path)], check=False, timeout=30)
            if not mount_points(self.root):
                shutil.rmtree(self.root, ignore_errors=True)

    def _kill_orphans(self) -> None:
        """An agent that was killed leaves its log collectors behind; they work in its directory."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(self.root):
                    os.kill(int(entry.name), signal.SIGKILL)

    def __enter__(self) -> NomadAgent:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- commands ---

    def run(self, *args: str, stdin: bytes | None = None, check: bool = True, timeout: float = 120) -> str:
        """Output of a `nomad` command; raises AgentError with what it printed."""
        result = subprocess.run(
            [self.nomad, *args],
            input=stdin or b"",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NOMAD_ADDR": self.url},
            timeout=timeout,
        )
        output = result.stdout.decode(errors="replace")
        if check and result.returncode != 0:
            raise AgentError(f"nomad {' '.join(args)}: {output.strip()}")
        return output

    def run_job(self, path: str | Path, timeout: float = 60) -> str:
        """Submit a job file; returns the id of its newest allocation once that is placed."""
        name = parse_job(path).name
        before = {alloc["ID"] for alloc in self.allocations(name)}
        self.run("job", "run", "-detach", str(path))

        def placed() -> str | None:
            return next((alloc["ID"] for alloc in self.allocations(name) if alloc["ID"] not in before), None)

        return self._poll(placed, f"no allocation for job {name}", timeout)

    def allocations(self, job: str) -> list[dict[str, Any]]:
        """By the API: the command `nomad job allocs` came after 1.0."""
        address = f"{self.url}/v1/job/{job}/allocations"
        with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(address, timeout=10) as answer:
            return list(json.load(answer) or [])
        return []

    def allocation(self, alloc: str) -> dict[str, Any]:
        return dict(json.loads(self.run("alloc", "status", "-json", alloc)))

    def wait_status(self, alloc: str, *wanted: str, timeout: float = 60) -> dict[str, Any]:
        """Wait for a client status (running, complete, failed); returns the allocation."""

        def reached() -> dict[str, Any] | None:
            state = self.allocation(alloc)
            return state if state["ClientStatus"] in wanted else None

        try:
            return self._poll(reached, f"allocation {alloc[:8]} did not become {' or '.join(wanted)}", timeout)
        except AgentError as error:
            tasks = self.allocation(alloc).get("TaskStates") or {}
            events = [f"{task}: {event}" for task in tasks for event in self.task_events(alloc, task)]
            raise AgentError("\n".join([str(error), *events])) from None

    def task_events(self, alloc: str, task: str) -> list[str]:
        states = self.allocation(alloc).get("TaskStates") or {}
        return [
            f"{event['Type']}: {event['DisplayMessage']}" for event in states.get(task, {}).get("Events") or []
        ]

    def logs(self, alloc: str, task: str, stderr: bool = False) -> str:
        return self.run("alloc", "logs", *(["-stderr"] if stderr else []), alloc, task)

    def exec(self, alloc: str, task: str, *command: str, stdin: bytes | None = None) -> str:
        return self.run("alloc", "exec", "-t=false", "-task", task, alloc, *command, stdin=stdin)

    def signal(self, alloc: str, task: str, name: str) -> None:
        self.run("alloc", "signal", "-s", name, alloc, task)

    def restart(self, alloc: str) -> None:
        self.run("alloc", "restart", alloc)

    def stop_job(self, job: str) -> None:
        """Stop without waiting: following the deployment would make the command fail, because it is cancelled."""
        self.run("job", "stop", "-detach", job)

    def drain(self, timeout: float = 180) -> None:
        """Take everything off the node, system jobs too; returns when nothing runs there."""
        self.run("node", "drain", "-enable", "-self", "-yes", "-deadline=5s", timeout=timeout)

    @staticmethod
    def _poll(condition: Callable[[], T | None], failure: str, timeout: float) -> T:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (result := condition()) is not None:
                return result
            time.sleep(0.1)
        raise AgentError(f"{failure} within {timeout:g} s")
