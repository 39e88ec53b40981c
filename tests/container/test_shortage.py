# SPDX-License-Identifier: MPL-2.0
"""A plugin on a machine that lacks something: every call is answered, nothing hangs, nothing is left at the end.

The plugin runs in a mount namespace of its own, with small file systems in the places where it writes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from nomad_pb import base_pb2, driver_pb2
from tests.agent import HANG, DriverError, Plugin, Task, call, launch_like_agent
from tests.containers import Tasks, cpu_seconds, eventually, shim, zombies

pytestmark = pytest.mark.root

STATE, SETTINGS, STORE = "/run/nomad-driver-nspawn", "/run/systemd/nspawn", "/var/lib/nomad-driver-nspawn"
SLEEP = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.2; done"


class Machine:
    """The machine as one plugin sees it."""

    def __init__(self, plugin: Plugin, folder: Path) -> None:
        self.plugin, self.folder = plugin, folder
        self.root = Path(f"/proc/{plugin.pid}/root")

    def run(self, *argv: str) -> None:
        subprocess.run(["nsenter", f"--mount=/proc/{self.plugin.pid}/ns/mnt", "--", *argv], check=True, timeout=30)

    @contextlib.contextmanager
    def limit(self, number: int, value: int) -> Iterator[None]:
        before = resource.prlimit(self.plugin.pid, number)
        resource.prlimit(self.plugin.pid, number, (value, before[1]))
        try:
            yield
        finally:
            resource.prlimit(self.plugin.pid, number, before)

    def descriptors(self, free: int = 0) -> AbstractContextManager[None]:
        used = {int(fd) for fd in os.listdir(f"/proc/{self.plugin.pid}/fd")}
        lowest = min(fd for fd in range(len(used) + 1) if fd not in used)
        return self.limit(resource.RLIMIT_NOFILE, lowest + free)

    def memory(self) -> AbstractContextManager[None]:
        return self.limit(resource.RLIMIT_AS, 1)

    @contextlib.contextmanager
    def processes(self) -> Iterator[None]:
        root = next((path for path in map(Path, PIDS) if (path / "cgroup.procs").exists()), None)
        if root is None:
            pytest.skip("this machine has no pids controller for a test")
        before = root / Path(f"/proc/{self.plugin.pid}/cgroup").read_text().split(":pids:")[1].split("\n")[0][1:]
        cgroup = root / f"shortage-{self.plugin.pid}"
        cgroup.mkdir()
        (cgroup / "cgroup.procs").write_text(str(self.plugin.pid))
        (cgroup / "pids.max").write_text((cgroup / "pids.current").read_text())
        try:
            yield
        finally:
            (cgroup / "pids.max").write_text("max")
            for pid in (cgroup / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    (before / "cgroup.procs").write_text(pid)
            eventually(lambda: not (cgroup / "cgroup.procs").read_text())
            cgroup.rmdir()

    @contextlib.contextmanager
    def full(self, *places: str) -> Iterator[None]:
        fillers = [self.root / place[1:] / "filler" for place in places]
        for filler in fillers:
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
        try:
            yield
        finally:
            for filler in fillers:
                filler.unlink()

    @contextlib.contextmanager
    def read_only(self, *places: str) -> Iterator[None]:
        for place in places:
            self.run("mount", "-o", "remount,bind,ro", place)
        try:
            yield
        finally:
            for place in places:
                self.run("mount", "-o", "remount,bind,rw", place)

    @contextlib.contextmanager
    def without(self, *tools: str) -> Iterator[None]:
        for tool in tools:
            self.run("mount", "--bind", "/dev/null", tool)
        try:
            yield
        finally:
            for tool in tools:
                self.run("umount", tool)


PIDS = ("/sys/fs/cgroup/pids",)


@pytest.fixture
def machine(driver_file: Path, tmp_path: Path) -> Iterator[Machine]:
    script = tmp_path / driver_file.name
    mounts = " && ".join(
        f"mkdir -p {place} && mount -t tmpfs -o size=1m,mode=700 tmpfs {place}"
        for place in (STATE, SETTINGS, STORE)
    )
    script.write_text(
        f"#!/bin/sh\nexec unshare --mount --propagation slave sh -c '{mounts} && exec {driver_file}'\n"
    )
    script.chmod(0o755)
    environ = {**os.environ, "PLUGIN_UNIX_SOCKET_DIR": str(tmp_path)}
    with launch_like_agent(script, 'allow = ["all"]', env=environ) as plugin:
        yield Machine(plugin, tmp_path)
    assert not plugin.violations


def start(task: Task) -> None:
    with contextlib.suppress(TimeoutError):
        task.start(timeout=HANG)


def wait(task: Task) -> None:
    with contextlib.suppress(TimeoutError):  # it runs
        task.wait(0.3)


def look_at_host(plugin: Plugin) -> str:
    stream = plugin.driver.Fingerprint(driver_pb2.FingerprintRequest(), timeout=HANG)
    try:
        return str(next(stream).health_description)
    finally:
        stream.cancel()


def ask(method: Callable[[], object]) -> DriverError | None:
    """Return the error of a call. No call may hang."""
    try:
        method()
    except DriverError as error:
        assert "internal error" not in error.text
        return error
    return None


def ask_all(running: Task, other: Task) -> dict[str, DriverError | None]:
    plugin = running.plugin
    calls: dict[str, Callable[[], object]] = {
        "StartTask": lambda: start(other),
        "InspectTask": running.inspect,
        "TaskStats": lambda: next(running.stats(0.2)),
        "SignalTask": lambda: running.signal("SIGWINCH"),
        "ExecTask": lambda: running.exec(["/bin/true"], timeout=HANG),
        "ExecTaskStreaming": lambda: running.exec_streaming(["/bin/true"]).wait(HANG),
        "WaitTask": lambda: wait(running),
        "Fingerprint": lambda: look_at_host(plugin),
        "SetConfig": lambda: plugin.set_config('allow = ["all"]'),
        "PluginInfo": lambda: call(plugin.base.PluginInfo, base_pb2.PluginInfoRequest(), HANG),
        "DestroyTask of none": lambda: call(
            plugin.driver.DestroyTask, driver_pb2.DestroyTaskRequest(task_id="a/b/c", force=True), HANG
        ),
        "StopTask": lambda: running.stop(timeout=0),
        "DestroyTask": running.destroy,
    }
    return {name: ask(method) for name, method in calls.items()}


SHORTAGES: dict[str, Callable[[Machine], AbstractContextManager[None]]] = {
    "descriptors": lambda machine: machine.descriptors(),
    "processes": lambda machine: machine.processes(),
    "memory": lambda machine: machine.memory(),
    "full /run": lambda machine: machine.full(STATE, SETTINGS),
    "read-only /run": lambda machine: machine.read_only(STATE, SETTINGS),
    "full /var": lambda machine: machine.full(STORE),
    "read-only /var": lambda machine: machine.read_only(STORE),
    "tools": lambda machine: machine.without("/usr/bin/systemd-nspawn", "/usr/bin/unshare"),
}


# What must be refused, and what the sentence says. All else may work or be refused.
REFUSED: dict[str, tuple[set[str], str]] = {
    "descriptors": ({"StartTask", "TaskStats", "ExecTask", "ExecTaskStreaming", "DestroyTask"}, "LimitNOFILE="),
    "processes": ({"StartTask", "ExecTask", "ExecTaskStreaming"}, "no further process or thread"),
    "memory": ({"StartTask"}, "too little free memory|no further process or thread"),
    "full /run": ({"StartTask"}, f"no space is left on the disk .{STATE}"),
    "read-only /run": ({"StartTask", "DestroyTask"}, f"the file system is read-only .{STATE}"),
    "full /var": ({"StartTask"}, f"the disk under {STORE} is full|no space is left on the disk .{STORE}"),
    "read-only /var": ({"StartTask"}, f"the file system is read-only .{STORE}"),
    "tools": ({"StartTask"}, "systemd-nspawn is not installed: install the package systemd-container"),
}


# A task whose start has something to do at each step.
DEMANDING: dict[str, Any] = {
    "volatile": "overlay",
    "root_size": "64M",
    "network_veth": True,
    "network_address": ["198.51.100.2/24"],
    "network_gateway": ["198.51.100.1"],
    "sysctl": [{"net.core.somaxconn": "99"}],
    "labels": [{"a": "b"}],
}


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_every_call_is_answered(machine: Machine, image: Path, archive: bytes, shortage: str) -> None:
    packed = machine.folder / "small.tar"
    packed.write_bytes(archive)
    names, words = REFUSED[shortage]
    with Tasks(machine.plugin, image) as tasks:
        running = tasks.start(SLEEP)
        running.logmon.wait_for("ready\n")
        other = tasks.make("true", **DEMANDING, image=str(packed if "/var" in shortage else image))
        with SHORTAGES[shortage](machine):
            answers = ask_all(running, other)
        for task in (running, other):
            task.destroy()
        assert os.listdir(machine.root / STATE[1:]) == []
        assert zombies(machine.plugin.pid) == []
    errors = {name: error for name, error in answers.items() if error}
    assert names <= errors.keys()
    for error in errors.values():
        assert re.search(words, error.text)
        assert error.recoverable is (shortage != "tools")


def test_removal_is_finished_by_the_next_look_at_the_host(machine: Machine, image: Path) -> None:
    with Tasks(machine.plugin, image) as tasks:
        task = tasks.start(SLEEP)
        with machine.read_only(STATE):
            for _ in range(2):
                with pytest.raises(DriverError, match=r"not all of the task .* can be removed"):
                    task.destroy()
        said = [entry for entry in machine.plugin.log if entry.message == "a task is not removed yet"]
        assert len(said) == 1
        look_at_host(machine.plugin)
        eventually(lambda: os.listdir(machine.root / STATE[1:]) == [])


def limited(driver_file: Path, folder: Path, limits: str) -> Plugin:
    """Start a plugin with limits of open files, SOFT:HARD."""
    script = folder / driver_file.name
    script.write_text(f"#!/bin/sh\nexec prlimit --nofile={limits} {driver_file}\n")
    script.chmod(0o755)
    return launch_like_agent(script)


def test_containers_have_the_limit_that_the_plugin_was_started_with(
    driver_file: Path, image: Path, tmp_path: Path
) -> None:
    with limited(driver_file, tmp_path, "150:3000") as plugin, Tasks(plugin, image) as tasks:
        assert resource.prlimit(plugin.pid, resource.RLIMIT_NOFILE) == (3000, 3000)
        task = tasks.start(SLEEP)
        assert resource.prlimit(shim(task), resource.RLIMIT_NOFILE) == (150, 3000)


def test_more_tasks_than_descriptors(driver_file: Path, image: Path, tmp_path: Path) -> None:
    """Their ends are seen all the same, nothing spins, and they can be destroyed."""
    with launch_like_agent(driver_file) as first, Tasks(first, image) as tasks:
        made = [tasks.start("sleep 1000") for _ in range(12)]
        made.append(tasks.start("until [ -e /local/go ]; do sleep 0.1; done; exit 23"))
        first.kill_hard()
        with limited(driver_file, tmp_path, "34:34") as plugin:
            tasks.plugin = plugin
            for task in made:
                task.recover(plugin)
            before = cpu_seconds(plugin.pid)
            Path(made[-1].allocation.dir, "task/local/go").touch()
            assert made[-1].wait(HANG).exit_code == 23
            time.sleep(1)
            assert cpu_seconds(plugin.pid) - before < 0.7
            with pytest.raises(DriverError, match=r"the task cannot be started: .* LimitNOFILE=") as caught:
                tasks.start("true")
            assert caught.value.recoverable
            for task in made:
                task.destroy()
            tasks.close()


def test_more_commands_than_descriptors(driver_file: Path, image: Path, tmp_path: Path) -> None:
    with limited(driver_file, tmp_path, "80:80") as plugin, Tasks(plugin, image) as tasks:
        task = tasks.start(SLEEP)
        commands = [task.exec_streaming(["/bin/sleep", "0.5"]) for _ in range(30)]
        results = [ask(functools.partial(command.wait, HANG)) for command in commands]
        assert None in results, "some have run"
        refused = [error for error in results if error]
        assert refused
        assert all(error.recoverable and "LimitNOFILE=" in error.text for error in refused)
        eventually(lambda: task.exec(["/bin/true"])[1].exit_code == 0)
        assert zombies(plugin.pid) == []
        task.stop(timeout=5)
        assert task.wait().exit_code == 5
