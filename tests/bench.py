# SPDX-License-Identifier: MPL-2.0
"""Figures, not tests: what the built plugin costs beside systemd-nspawn itself. `sudo sh build.sh bench`

Every figure is a median; where two things are compared they are measured in turn, and the ratio is the median
of the ratios pair by pair, because machines are noisy. Nothing here passes or fails.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A script has its own folder on sys.path, not the one above it: so the import comes after the line that adds it.
from tests import hosts  # noqa: E402 # found by the line above
from tests.agent import Allocation, Plugin, Task, launch_like_agent  # noqa: E402 # the same
from tests.containers import cpu_seconds  # noqa: E402 # the same

DRIVER = Path(os.environ.get("NSPAWN_TEST_DRIVER", ROOT / "nomad-driver-nspawn"))
IMAGE = Path(os.environ.get("NSPAWN_TEST_IMAGE", "/var/cache/nomad-driver-nspawn-tests/debian-bookworm"))
COUNT = 50
CONFIG: dict[str, Any] = {"image": str(IMAGE), "boot": False, "read_only": True, "network_veth": False}


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def row(what: str, figure: str, goal: str = "") -> None:
    print(f"  {what:<58} {figure:>14}   {goal}", flush=True)


def title(text: str) -> None:
    print(f"\n{text}", flush=True)


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@contextlib.contextmanager
def tasks(plugin: Plugin, count: int, command: Sequence[str], **config: object) -> Iterator[list[Task]]:
    """Yield tasks that are not started yet; destroys them and their directories at the end."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            allocation = stack.enter_context(Allocation())
            task = Task(plugin, allocation, "bench", {**CONFIG, "command": list(command), **config})
            made.append(stack.enter_context(task))
        yield made


# --- one start against nspawn itself ---


def bare_argv(command: Sequence[str], ready: bool = False) -> list[str]:
    return [
        "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=pipe", "--settings=no",
        "--private-users=pick", "--private-users-ownership=auto", "--read-only", f"--machine=bench-{uuid.uuid4()}",
        f"--directory={IMAGE}", "--", *command,
    ]  # fmt: skip


def bare_run() -> float:
    return timed(lambda: subprocess.run(bare_argv(["/bin/true"]), check=True, capture_output=True, timeout=60))


def bare_ready() -> float:
    """Return the time to READY=1 of nspawn alone."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(f"{folder}/n")
        notify.settimeout(60)
        began = time.perf_counter()
        process = subprocess.Popen(
            bare_argv(["/bin/sleep", "0.01"]),
            env={**os.environ, "NOTIFY_SOCKET": f"{folder}/n"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while b"READY=1" not in notify.recv(65536):
            pass
        took = time.perf_counter() - began
        process.wait(60)
    return took


def driver_start(plugin: Plugin, finish: bool) -> float:
    """Return the time of StartTask, or of StartTask and WaitTask together."""
    with tasks(plugin, 1, ["/bin/true"] if finish else ["/bin/sleep", "0.01"]) as [task]:
        began = time.perf_counter()
        task.start()
        took = time.perf_counter() - began
        task.wait(60)
        return time.perf_counter() - began if finish else took


def compare(what: str, ours: Callable[[], float], bare: Callable[[], float], goal: str) -> None:
    pairs = [(ours(), bare()) for _ in range(16)][1:]
    row(f"{what}: the driver", ms(statistics.median(pair[0] for pair in pairs)))
    row(f"{what}: systemd-nspawn alone", ms(statistics.median(pair[1] for pair in pairs)))
    row(f"{what}: ratio", f"{statistics.median(a / b for a, b in pairs):.2f}", goal)


# --- the plugin's own start ---


def handshake(env: dict[str, str]) -> float:
    plugin = Plugin(DRIVER, env={**os.environ, **env})
    took = plugin.start_seconds
    plugin.kill()
    return took


def bench_plugin_start() -> None:
    warm = statistics.median(handshake({}) for _ in range(9))
    cold = []
    for _ in range(3):
        with tempfile.TemporaryDirectory(dir="/var/tmp") as cache:
            cold.append(handshake({"SHIV_ROOT": cache}))
    python = statistics.median(
        timed(lambda: subprocess.run(["/usr/bin/python3", "-IS", "-c", "import asyncio"], check=True))
        for _ in range(9)
    )
    row("exec to handshake, warm cache", ms(warm))
    row("exec to handshake, cold cache (unpacks itself)", ms(statistics.median(cold)))
    row('for comparison: python3 -IS -c "import asyncio"', ms(python))


# --- memory and CPU ---


def memory(pid: int, name: str) -> int:
    """Return a process's Rss or Pss in KiB."""
    with contextlib.suppress(OSError):
        match = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(match[1]) if match else 0
    return 0


def cgroup_pids(task: Task, leaf: str) -> list[int]:
    name = f"{task.allocation.id}.{task.name}.scope/{leaf}/cgroup.procs"
    found = [*Path("/sys/fs/cgroup").glob(f"nomad.slice/*/{name}")]
    found += Path("/sys/fs/cgroup").glob(f"unified/nomad.slice/*/{name}")
    return [int(pid) for path in found for pid in path.read_text().split()]


def bench_many(plugin: Plugin) -> None:
    row("plugin RSS, idle", f"{memory(plugin.pid, 'Rss') / 1024:.1f} MB")
    idle = memory(plugin.pid, "Rss")
    with tasks(plugin, COUNT, ["/bin/sleep", "1000"]) as running:
        for task in running:
            task.start()
        busy = memory(plugin.pid, "Rss")
        row(f"plugin RSS, {COUNT} tasks running", f"{busy / 1024:.1f} MB")
        shims = [sum(memory(pid, "Pss") for pid in cgroup_pids(task, "shim")) for task in running]
        nspawns = [sum(memory(pid, "Pss") for pid in cgroup_pids(task, "supervisor")) for task in running]
        ours = statistics.median(shims) + (busy - idle) / COUNT
        row("per task beside nspawn: PSS of the shim", f"{statistics.median(shims):.0f} KB")
        row("per task beside nspawn: with the plugin's share", f"{ours:.0f} KB", "goal: under 1024 KB")
        row("for comparison: PSS of systemd-nspawn itself", f"{statistics.median(nspawns):.0f} KB")
        bench_stats(plugin, running)


def bench_stats(plugin: Plugin, running: Sequence[Task]) -> None:
    seconds, counted = 10.0, [0]

    def follow(task: Task) -> None:
        for _ in task.stats(1.0):
            counted[0] += 1
            if time.monotonic() > end:
                return

    end = time.monotonic() + 2 + seconds
    threads = [threading.Thread(target=follow, args=(task,)) for task in running]
    for thread in threads:
        thread.start()
    time.sleep(2)
    before, samples = cpu_seconds(plugin.pid), counted[0]
    time.sleep(seconds)
    used, samples = cpu_seconds(plugin.pid) - before, counted[0] - samples
    for thread in threads:
        thread.join()
    row(f"CPU of {len(running)} stats streams at 1 s ({samples / seconds:.0f} samples/s)",
        f"{used / seconds * 100:.1f} %", "goal: under 5 % of a core")  # fmt: skip


# --- ends, and many at once ---


def exit_latency(plugin: Plugin) -> float:
    """Return the time from the end of the container's PID 1 to the answer of WaitTask."""
    with tasks(plugin, 1, ["/bin/sleep", "0.3"]) as [task]:
        task.start()
        [leader] = cgroup_pids(task, "payload")
        fd = os.pidfd_open(leader)
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(lambda: (select.select([fd], [], []), time.perf_counter())[1])
            task.wait(60)
            answered = time.perf_counter()
        os.close(fd)
    return answered - ended.result()


def bench_fleet(plugin: Plugin) -> None:
    with tasks(plugin, COUNT, ["/bin/sleep", "1000"], process_two=True) as fleet:
        began = time.perf_counter()
        for task in fleet:
            task.start()
        started = time.perf_counter()
        for task in fleet:
            task.stop()
            task.wait(60)
        row(f"{COUNT} starts in a row, each", ms((started - began) / COUNT))
        row(f"{COUNT} stops in a row, each", ms((time.perf_counter() - started) / COUNT))
    with (
        tasks(plugin, COUNT, ["/bin/sleep", "1000"], process_two=True) as fleet,
        ThreadPoolExecutor(COUNT) as pool,
    ):
        row(f"{COUNT} starts at once, all", ms(timed(lambda: list(pool.map(lambda task: task.start(), fleet)))))

        def end(task: Task) -> None:
            task.stop()
            task.wait(60)
            task.destroy()

        row(f"{COUNT} stops and destroys at once, all", ms(timed(lambda: list(pool.map(end, fleet)))))


# --- one image, many private roots ---

ROOTS = 20


@contextlib.contextmanager
def bare_container(how: str) -> Iterator[None]:
    """A container of nspawn's own, from READY=1 on."""
    argv = [how if word == "--read-only" else word for word in bare_argv(["/bin/sleep", "1000"])]
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(f"{folder}/n")
        notify.settimeout(600)
        environ = {**os.environ, "NOTIFY_SOCKET": f"{folder}/n"}
        null = subprocess.DEVNULL
        process = subprocess.Popen(argv, env=environ, stdin=null, stdout=null, stderr=null)
        try:
            while b"READY=1" not in notify.recv(65536):
                pass
            yield
        finally:
            process.terminate()  # nspawn kills its payload and removes its copy
            process.wait(600)


def disk_usage(paths: Sequence[Path]) -> int:
    """Return what files and directories take on the disk, in bytes."""
    if not paths:
        return 0
    shown = subprocess.run(["du", "-sck", "--", *map(str, paths)], capture_output=True, check=True, timeout=600)
    return int(shown.stdout.split()[-2]) << 10


def bare_many(how: str) -> tuple[float, int]:
    """Return the time until nspawn has started all containers at once, and what their copies take on the disk."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(ROOTS) as pool:
        containers = [bare_container(how) for _ in range(ROOTS)]
        took = timed(lambda: list(pool.map(lambda container: container.__enter__(), containers)))
        for container in containers:
            stack.push(container.__exit__)
        copies = [path for path in IMAGE.parent.glob(f".#*{IMAGE.name}*") if path.is_dir()]
        return took, disk_usage(copies)


def driver_many(plugin: Plugin, **config: object) -> tuple[float, int]:
    """The same for tasks of the driver."""
    with tasks(plugin, ROOTS, ["/bin/sleep", "1000"], **config) as fleet, ThreadPoolExecutor(ROOTS) as pool:
        took = timed(lambda: list(pool.map(lambda task: task.start(), fleet)))
        places = [path for task in fleet for path in task.allocation.dir.glob("*/.nspawn-root")]
        written = disk_usage(places)
        list(pool.map(lambda task: task.destroy(), fleet))
        return took, written


def bench_roots(plugin: Plugin) -> None:
    private = {"read_only": False, "ephemeral": True}
    rounds = [(driver_many(plugin, **private), driver_many(plugin), bare_many("--read-only")) for _ in range(6)][
        1:
    ]
    copied = bare_many("--ephemeral")
    ours, shared, bare = ([one[column] for one in rounds] for column in range(3))
    row(f"{ROOTS} at once, each with a root of its own: all running", ms(statistics.median(t for t, _ in ours)))
    row("the same tasks with the image read-only", ms(statistics.median(t for t, _ in shared)))
    row("systemd-nspawn alone, the image read-only", ms(statistics.median(t for t, _ in bare)))
    row("systemd-nspawn --ephemeral", ms(copied[0]))
    ratio = statistics.median(a[0] / b[0] for a, b in zip(ours, bare, strict=True))
    row("ratio to systemd-nspawn alone", f"{ratio:.2f}", "goal: under 1.5")
    row("ratio to systemd-nspawn --ephemeral", f"{statistics.median(t for t, _ in ours) / copied[0]:.3f}")
    each = statistics.median(size for _, size in ours) / ROOTS
    row("on the disk for each root", f"{each / 1024:.0f} KB", "goal: under 1024 KB")
    row("on the disk for each copy of systemd-nspawn --ephemeral", f"{copied[1] / ROOTS / 1024:.0f} KB")


# --- with and without systemd-machined: in hosts that have it ---


@contextlib.contextmanager
def without_machined() -> Iterator[None]:
    def systemctl(*words: str, check: bool = True) -> None:
        subprocess.run(
            ["systemctl", *words, "systemd-machined"], check=check, timeout=60, stderr=subprocess.DEVNULL
        )

    systemctl("mask", "--runtime")
    systemctl("stop")
    try:
        yield
    finally:
        systemctl("unmask", "--runtime")
        systemctl("reset-failed", check=False)  # it would count as started too often; systemd may not know of it
        systemctl("start")


def bench_machined() -> None:
    """Run in such a host."""
    with launch_like_agent(DRIVER) as plugin:
        for what, finish in (("to READY", False), ("to the exit code of /bin/true", True)):
            took: tuple[list[float], list[float]] = [], []
            for _ in range(10):
                took[0].extend(driver_start(plugin, finish) for _ in range(5))
                with without_machined():
                    took[1].extend(driver_start(plugin, finish) for _ in range(5))
            known, unknown = map(statistics.median, took)
            row(f"{what}: with machined", ms(known))
            row(f"{what}: machined masked", ms(unknown))
            row(f"{what}: difference", ms(known - unknown), "goal: under 50 ms")


def bench_machined_on_hosts() -> None:
    for suite in hosts.SYSTEMD:
        title(f"systemd-machined, on a host in a container: {suite}, 50 starts each, in turn")
        environ = f"PYTHONPATH={hosts.LIBRARY_ROOT} NSPAWN_TEST_IMAGE={IMAGE}"
        with hosts.open_host("container", suite) as host:
            print(host.check(f"{environ} python3 /checkout/tests/bench.py machined", 600), end="", flush=True)


# --- commands in a running container ---


def exec_once(task: Task) -> None:
    task.exec_streaming(["/bin/true"]).wait()


def bench_exec(plugin: Plugin) -> None:
    with tasks(plugin, 1, ["/bin/sleep", "1000"]) as [task]:
        task.start()
        [leader] = cgroup_pids(task, "payload")
        nsenter = ["nsenter", "--all", f"--target={leader}", "/bin/true"]
        row("the first one", ms(timed(lambda: exec_once(task))), "goal: under 40 ms")
        pairs = [
            (timed(lambda: exec_once(task)), timed(lambda: subprocess.run(nsenter, check=True, timeout=60)))
            for _ in range(COUNT)
        ]
        row(
            "start to exit code: the driver", ms(statistics.median(pair[0] for pair in pairs)), "goal: under 40 ms"
        )
        row("start to exit code: bare nsenter", ms(statistics.median(pair[1] for pair in pairs)))
        ratio = statistics.median(ours / bare for ours, bare in pairs)
        row("start to exit code: ratio", f"{ratio:.2f}", "goal: under 3")
        row(f"{COUNT} in a row, each", ms(timed(lambda: list(map(exec_once, [task] * COUNT))) / COUNT))
        with ThreadPoolExecutor(COUNT) as pool:
            row(f"{COUNT} at once, all", ms(timed(lambda: list(pool.map(exec_once, [task] * COUNT)))))
        size = 200 << 20
        session = task.exec_streaming(["/usr/bin/head", "-c", str(size), "/dev/zero"])
        row("throughput of stdout", f"{(size >> 20) / timed(lambda: session.wait(300)):.0f} MB/s")
        idle = memory(plugin.pid, "Rss")
        row("plugin RSS afterwards", f"{idle / 1024:.1f} MB")
        helpers = [pid for pid in read_children(plugin.pid) if b"nspawn-enter" in read_cmdline(pid)]
        private = sum(memory(pid, "Pss") for pid in helpers)
        row("PSS of the helper, until it has been idle for 30 s", f"{private / 1024:.1f} MB")


def read_children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def read_cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def main() -> None:
    if sys.argv[1:] == ["machined"]:
        return bench_machined()
    systemd = subprocess.getoutput("systemd-nspawn --version").split(" (")[0]
    print(f"{DRIVER.name} on {os.cpu_count()} cores, {systemd}, Linux {os.uname().release}; medians")
    title("Start of the plugin")
    bench_plugin_start()
    with launch_like_agent(DRIVER) as plugin:
        title("Start of a task: a command in a read-only Debian with user namespaces, 15 pairs")
        compare("to READY", lambda: driver_start(plugin, False), bare_ready, "goal: under 1.3")
        compare("to the exit code of /bin/true", lambda: driver_start(plugin, True), bare_run, "goal: under 1.3")
        latency = statistics.median(exit_latency(plugin) for _ in range(9))
        row("end of the payload to the answer of WaitTask", ms(latency), "goal: under 20 ms")
        title(f"Commands in a running container, {COUNT} pairs")
        bench_exec(plugin)
        title("Memory and CPU")
        bench_many(plugin)
        title("Many tasks")
        bench_fleet(plugin)
        title(f"{ROOTS} tasks from one image with user namespaces, 5 rounds")
        bench_roots(plugin)
    bench_machined_on_hosts()


if __name__ == "__main__":
    main()
