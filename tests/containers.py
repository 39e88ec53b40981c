# SPDX-License-Identifier: MPL-2.0
"""Tasks for tests, and the processes around their containers as the host sees them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc

from nomad_pb import driver_pb2
from tests.agent import HANG, AgentError, Allocation, ExitResult, Plugin, Task, driver_error
from tests.leftovers import leftovers, processes

T = TypeVar("T")


class Tasks:
    """Makes tasks, each in an allocation of its own, and checks at the end that nothing is left of them."""

    def __init__(self, plugin: Plugin, image: Path) -> None:
        self.plugin, self.image = plugin, image
        self.made: list[Task] = []

    def make(self, command: str | Sequence[str] = (), /, *, name: str = "task", **settings: Any) -> Task:
        """A task that is not started yet. `command`: a shell script, or the words of a command.

        Of `settings`, the arguments of Task go there, all others and `options` into the driver config. The image
        is shared by all tests, so nothing writes to it unless asked.
        """
        arguments = {key: settings.pop(key) for key in TASK_ARGUMENTS & settings.keys()}
        settings |= settings.pop("options", {})
        config: dict[str, Any] = {
            "image": str(self.image),
            "boot": False,
            "network_veth": False,
            "command": words(command),
        }
        if not settings.get("boot") and not settings.keys() & {"volatile", "ephemeral"}:
            config["read_only"] = True
        config |= settings
        allocation = arguments.pop("allocation", None) or Allocation()
        plugin = arguments.pop("plugin", None) or self.plugin
        driver_config = {key: value for key, value in config.items() if value is not None}
        task = Task(plugin, allocation, name, driver_config, **arguments)
        self.made.append(task)
        return task

    def start(self, command: str | Sequence[str] = (), /, **settings: Any) -> Task:
        task = self.make(command, **settings)
        task.start()
        return task

    def run(self, command: str | Sequence[str] = (), /, **settings: Any) -> tuple[Task, ExitResult]:
        """Run a task to its end."""
        task = self.start(command, **settings)
        return task, task.wait()

    def boot(self, *arguments: str, **settings: Any) -> Task:
        """Start a booted task; its changes are kept in memory."""
        defaults = {"boot": True, "volatile": "overlay", "user_namespacing": False}
        return self.start(arguments, **(defaults | settings))

    def close(self) -> None:
        """Destroy all tasks. Raises AssertionError with what is left of them."""
        left: list[str] = []
        for task in self.made:
            if task.plugin.exited():
                task.plugin = self.plugin
            task.logmon.stop(0)
            try:
                task.close()
            except AgentError as error:
                left.append(f"DestroyTask: {error}")
        for task in self.made:
            task.allocation.close()
            left += [*task.allocation.violations, *leftovers(task.allocation.id)]
            for pid, _ in processes(task.allocation.id):
                kill(pid)  # a failed test must not disturb the next
        self.made = []
        assert not left, "left behind:\n" + "\n".join(left)

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


TASK_ARGUMENTS = {
    "plugin", "allocation", "env", "user", "resources", "kill_timeout", "kill_signal", "network", "dns", "mounts",
    "devices", "templates", "meta", "job", "group", "logs_disabled", "on_output",
}  # fmt: skip


def words(command: str | Sequence[str]) -> list[str]:
    """A command as the driver config has it; what HCL would take for a reference is escaped."""
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    return [escape(word) for word in argv]


def escape(text: str) -> str:
    """Keep `${` and `%{` from being evaluated."""
    return text.replace("${", "$${").replace("%{", "%%{")


def output(task: Task) -> str:
    """All that a finished task has written to stdout."""
    task.logmon.wait_eof()
    return task.logmon.stdout.decode()


def nspawn(task: Task) -> int:
    """The pid of the task's systemd-nspawn. Until the payload has been executed its children look the same."""
    found = {
        pid
        for pid, command in processes(task.allocation.id)
        if command.startswith("systemd-nspawn ") and f"--machine={task.name}-" in command
    }
    for pid in found:
        with contextlib.suppress(OSError):
            if int(read_stat(pid)[1]) not in found:
                return pid
    raise AssertionError(f"no systemd-nspawn of task {task.name}: {list(processes(task.allocation.id))}")


def driver_state(task: Task) -> Mapping[str, Any]:
    assert task.handle
    state = json.loads(task.handle.driver_state)
    assert isinstance(state, dict)
    return state


def leader(task: Task) -> int:
    """The pid of the container's PID 1."""
    return int(driver_state(task)["leader"]["pid"])


def shim(task: Task) -> int:
    """The pid of the process that waits for nspawn."""
    return int(driver_state(task)["shim"]["pid"])


def read_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return read_stat(pid)[0] not in "ZX"
    return False


def zombies(pid: int) -> list[int]:
    """Children that have ended and that nobody has waited for."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in map(int, children):
        with contextlib.suppress(OSError):  # one that is gone was waited for
            found += [child] if read_stat(child)[0] == "Z" else []
    return found


def cpu_seconds(pid: int) -> float:
    """What a process has used."""
    fields = read_stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def eventually(condition: Callable[[], T], timeout: float = HANG, pause: float = 0.02) -> T:
    """What `condition` returns as soon as that is true."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not true within {timeout:g} s"
        time.sleep(pause)
    return result


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def on_overlay(image: Path, folder: Path) -> Iterator[Path]:
    """An image on a file system that cannot be id-mapped: nspawn has to copy it for `ephemeral`, beside it."""
    for name in ("upper", "work", "images"):
        (folder / name).mkdir(parents=True)
    layers = f"lowerdir={image.parent},upperdir={folder}/upper,workdir={folder}/work"
    images = folder / "images"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", str(images)], check=True, timeout=30)
    try:
        yield images / image.name
    finally:
        eventually(lambda: subprocess.run(["umount", str(images)], check=False, timeout=30).returncode == 0)


def make_client(driver_file: Path, program: Path, mounts: Mapping[Path, str]) -> Path:
    """A program that is the plugin on a client of its own: there, these directories stand over others."""
    binds = [shlex.join(["mount", "--bind", str(source), target]) for source, target in mounts.items()]
    script = "; ".join([*binds, f'exec {shlex.quote(str(driver_file))} "$@"'])
    inside = f'unshare --mount --propagation=slave sh -ec {shlex.quote(script)} sh "$@"'
    program.write_text(f"#!/bin/sh\nexec {inside}\n")
    program.chmod(0o755)
    return program


def make_small_image(image: Path, target: Path, programs: Sequence[str]) -> None:
    """Copy a few programs of an image, without their machine id: a tree nspawn starts from, of a few MB."""
    files = {f"/usr/bin/{program}" for program in programs}
    for program in sorted(files):
        shown = subprocess.run(
            ["chroot", str(image), "ldd", program], stdout=subprocess.PIPE, check=True, timeout=30
        )
        files |= {word for word in shown.stdout.decode().split() if word.startswith("/")}
    for name in ("usr/bin", "usr/lib", "usr/lib64"):
        (target / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if (image / name).is_symlink():
            (target / name).symlink_to(os.readlink(image / name))
    files |= {"/usr/lib/os-release", "/etc/passwd", "/etc/group"}
    # Inside the image: followed from here, its absolute links would lead to the host's libraries.
    names = [file.lstrip("/") for file in files]
    packed = subprocess.run(
        ["chroot", str(image), "tar", "--dereference", "-cf", "-", *names],
        stdout=subprocess.PIPE, check=True, timeout=60,
    ).stdout  # fmt: skip
    unpack = ["tar", "-C", str(target), "--keep-directory-symlink", "-xf", "-"]
    subprocess.run(unpack, input=packed, check=True, timeout=60)
    (target / "usr/bin/sh").symlink_to("dash")
    for name in ("dev", "etc", "mnt", "proc", "run", "sys", "tmp", "var"):
        (target / name).mkdir(exist_ok=True)
    (target / "etc/machine-id").write_text("")


class Starting:
    """A StartTask that has not been answered yet."""

    def __init__(self, task: Task) -> None:
        self.task = task
        task.id = f"{task.allocation.id}/{task.name}/00000000"
        task.prestart()
        self.call: Any = task.plugin.driver.StartTask.future(driver_pb2.StartTaskRequest(task=task.task_config()))

    def end(self, way: str) -> None:
        {"cancel": self.call.cancel, "stop": self.task.stop, "destroy": self.task.destroy}[way]()

    def join(self) -> BaseException | None:
        """Return what the call has failed with, if it has."""
        try:
            error = self.call.exception(timeout=HANG)
        except grpc.FutureCancelledError as cancelled:
            return cancelled
        return driver_error(error) if isinstance(error, grpc.RpcError) else error
