# SPDX-License-Identifier: MPL-2.0
"""What a task may use of the machine, and what it is told when memory runs short.

The pure half runs anywhere. The other needs a machine whose controllers are those of cgroup v2: a virtual one, see
tests/host/test_hosts.py. There each limit is read back from the kernel's file and seen to act.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import re
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from nspawn.cgroup import find_disk, find_io_limits, plan_cpu_weight, plan_limits, read_counters
from nspawn.checks import IoLimit, parse_size
from nspawn.common import ConfigError
from nspawn.job import Mode, Resources
from nspawn.outcome import Ending, ExitRecord, ExitResult, OomReport, explain_exit
from nspawn.rules import choose_pids_limit
from tests import agent
from tests.agent import HANG, Allocation, Task, launch_like_agent
from tests.containers import Tasks, eventually, kill, leader, output, shim
from tests.hosts import needs_cgroup2
from tests.options import read_options

MIB = 1 << 20
NO_LIMITS = {"memory_swap_max": None, "cpu_hard_limit": False, "pids_limit": 0, "io_weight": None}


# -- what Nomad grants, as control files ---------------------------------------------------------------------


def limits(resources: Resources, cpus: int = 4, **options: Any) -> dict[str, str]:
    return plan_limits(resources, dataclasses.replace(read_options(), **{**NO_LIMITS, **options}), cpus)


@pytest.mark.parametrize(
    ("memory", "most", "hard", "low"),
    [
        (64, 0, 64 * MIB, 0),
        (64, 128, 128 * MIB, 64 * MIB),
        (64, 32, 64 * MIB, 64 * MIB),  # no agent sends it
        (64, None, "max", 64 * MIB),
    ],
)
def test_memory(memory: int, most: int | None, hard: object, low: int) -> None:
    found = limits(Resources(memory * MIB, most and most * MIB))
    assert found == {"memory.max": str(hard), "memory.low": str(low), "memory.swap.max": "0"}


def test_swap() -> None:
    for said, meant in (
        (None, "0"),
        (parse_size("", "512M"), str(512 * MIB)),
        (parse_size("", "infinity"), "max"),
    ):
        assert limits(Resources(MIB), memory_swap_max=said)["memory.swap.max"] == meant


@pytest.mark.parametrize(("mhz", "weight"), [(1, 1), (2, 1), (1024, 100), (262144, 10000), (10**9, 10000)])
def test_cpu_weight(mhz: int, weight: int) -> None:
    assert limits(Resources(cpu=mhz)) == {"cpu.weight": str(weight)}


def test_cpu_weight_grows_with_the_share() -> None:
    weights = [plan_cpu_weight(Resources(cpu=mhz)) for mhz in range(1, 300_000, 97)]
    assert weights == sorted(weights)


def test_cpu_weight_on_a_machine_with_more_mhz_than_shares() -> None:
    half = plan_cpu_weight(Resources(cpu=500_000, cpu_fraction=0.5))
    assert half == plan_cpu_weight(Resources(cpu=131_072)) < 10000


def test_cpu_quota() -> None:
    assert "cpu.max" not in limits(Resources(cpu=500, cpu_fraction=0.125))
    assert limits(Resources(cpu=500, cpu_fraction=0.125), cpu_hard_limit=True)["cpu.max"] == "50000 100000"
    assert limits(Resources(cpu=1, cpu_fraction=1e-6), cpu_hard_limit=True)["cpu.max"] == "1000 100000"


def test_other_limits() -> None:
    found = limits(Resources(cores="1,3"), pids_limit=50, io_weight=200)
    assert found == {"cpuset.cpus": "1,3", "pids.max": "50", "io.weight": "200"}
    assert limits(Resources()) == {}


def test_io_limits() -> None:
    disk = find_disk(None, "/var/tmp")
    rates = IoLimit(read_bps=MIB, write_iops=5)
    assert find_io_limits([rates], "/var/tmp") == (f"{disk} rbps={MIB} wbps=max riops=max wiops=5",)
    assert plan_limits(Resources(), read_options(), 1, ["8:0 rbps=1", "8:16 rbps=2"])["io.max"] == (
        "8:0 rbps=1\n8:16 rbps=2"
    )
    for device, directory, sentence in (
        ("/dev/null", "", 'io_max.device = "/dev/null": is no block device of this machine'),
        ("/dev/nix", "", 'io_max.device = "/dev/nix": cannot be used: No such file or directory'),
        (None, "/proc", "io_max.device = null: is needed: /proc is on no single disk"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            find_disk(device, directory)


def change_part(disk: str, operation: int) -> None:
    """Add (1) or remove (2) the first part of a disk by BLKPG, as `partx` does: not every Debian has that."""
    part = ctypes.create_string_buffer(struct.pack("qqi132x", MIB, MIB, 1))
    with open(disk, "rb") as file:
        fcntl.ioctl(file, 0x1269, struct.pack("iiiP", operation, 0, len(part), ctypes.addressof(part)))


def test_a_part_stands_for_its_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(8 * MIB))
    attach = ["losetup", "--find", "--show", str(tmp_path / "disk")]
    disk = subprocess.run(attach, capture_output=True, check=True, timeout=HANG).stdout.decode().strip()
    try:
        change_part(disk, 1)
        number = find_disk(disk, "")
        assert number.split(":")[0] == "7", "that of loop devices"
        eventually(lambda: Path(f"{disk}p1").exists())
        assert find_disk(f"{disk}p1", "") == number
        with pytest.raises(ConfigError, match="is on a disk that has a limit already; write one block for each"):
            find_io_limits([IoLimit(disk, 1), IoLimit(f"{disk}p1", 1)], "")
        change_part(disk, 2)
    finally:
        subprocess.run(["losetup", "--detach", disk], check=True, timeout=HANG)


def test_pids_are_the_operators() -> None:
    assert choose_pids_limit(None, 100) == 100
    assert choose_pids_limit(50, 100) == 50
    assert choose_pids_limit(50, 0) == 50
    assert choose_pids_limit(None, 0) == 0
    with pytest.raises(ConfigError) as caught:
        choose_pids_limit(200, 100)
    assert str(caught.value) == (
        "pids_limit = 200: the operator of this client allows a task 100 processes; ask for fewer"
    )


# -- how a lack of memory is told ----------------------------------------------------------------------------

OWN = OomReport(1, True, 64 * MIB, 64 * MIB)
SENTENCE = "the task used all the memory it may (limit 64 MiB, peak 64 MiB)"


def explain(
    code: int, signal: int = 0, mode: Mode = Mode.COMMAND, *, by_us: bool = False, **changes: Any
) -> ExitResult:
    record = ExitRecord(code, False, 0.0, dataclasses.replace(OWN, **changes))
    lines = ["Container x1 terminated by signal KILL."] if signal else []
    return explain_exit(Ending(mode, 0.0, record, lines=lines, sent=9 if by_us else 0))


@pytest.mark.parametrize(("code", "signal", "mode"), [
    (137, 9, Mode.COMMAND),
    (137, 0, Mode.COMMAND),  # a shell tells it of its child
    (137, 0, Mode.BOOT),
    (255, 0, Mode.PROCESS_TWO),  # all that nspawn's stub tells of a signal
])  # fmt: skip
def test_killed_for_lack_of_memory(code: int, signal: int, mode: Mode) -> None:
    assert explain(code, signal, mode) == ExitResult(137, 9, f"OOM killed: {SENTENCE}", oom_killed=True)


def test_other_ends() -> None:
    assert explain(137, 9, kills=0) == ExitResult(137, 9)
    assert explain(137, 9, by_us=True) == ExitResult(137, 9)
    assert explain(0) == ExitResult(0), "an error would make a success a failure"
    assert explain(1) == ExitResult(1, 0, f"the kernel had killed 1 of its processes: {SENTENCE}")
    assert explain(255) == ExitResult(255, 0, f"the kernel had killed 1 of its processes: {SENTENCE}")


def test_machine_without_memory() -> None:
    assert explain(137, is_own=False, peak=0, limit=0).error == "OOM killed: the machine had no more memory"


# -- on a machine with cgroup v2 -----------------------------------------------------------------------------


def read(task: Task, name: str) -> str:
    return (task.cgroup.path / name).read_text().strip()


FOREVER = "echo ready; exec sleep 600"


@needs_cgroup2
def test_limits_are_in_the_kernels_files(tasks: Tasks) -> None:
    resources = agent.Resources(cpu=500, memory=64, memory_max=96, cores=(1,))
    options = {"cpu_hard_limit": True, "pids_limit": 50, "io_weight": 200, "memory_swap_max": "32M"}
    task = tasks.start(FOREVER, resources=resources, options=options)
    task.logmon.wait_for("ready")
    assert read(task, "memory.max") == str(96 * MIB)
    assert read(task, "memory.low") == str(64 * MIB)
    assert read(task, "memory.high") == "max"
    swap = task.cgroup.path / "memory.swap.max"
    assert not swap.exists() or swap.read_text().strip() == str(32 * MIB)
    assert int(read(task, "cpu.weight")) == plan_cpu_weight(Resources(cpu=500))
    assert read(task, "cpu.max") == "50000 100000"  # 500 of 1000 MHz on each of the stand-in's cores
    assert read(task, "cpuset.cpus.effective") == "1"
    assert read(task, "pids.max") == "50"
    assert read(task, "io.weight").split()[:2] == ["default", "200"]
    # Of all processes none is outside, and the payload can have limits of its own.
    inside = Path(f"/proc/{leader(task)}/cgroup").read_text()
    assert f"{task.cgroup.path.name}/payload" in inside
    assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(read(task, "payload/cgroup.controllers").split())


@needs_cgroup2
def test_writing_is_held_to_its_rate(tasks: Tasks) -> None:
    """The disk is that of the task's directory."""
    script = "exec dd if=/dev/zero of=/local/file bs=64K count=48 oflag=direct"
    began = time.monotonic()
    task = tasks.start(script, allocation=Allocation("/var/tmp"), io_max=[{"write_bps": "1 MiB"}])
    assert f"{find_disk(None, '/var/tmp')} rbps=max wbps={MIB} riops=max wiops=max" in read(task, "io.max")
    assert task.wait(HANG).successful
    assert time.monotonic() - began > 2, "three MiB take three seconds"


@needs_cgroup2
def test_defaults(tasks: Tasks) -> None:
    task = tasks.start(FOREVER, resources=agent.Resources(memory=64, memory_max=-1))
    assert read(task, "memory.max") == "max"
    assert read(task, "memory.low") == str(64 * MIB)
    assert read(task, "cpu.max").split()[0] == "max"
    assert read(task, "pids.max") == "16384"
    task = tasks.start(FOREVER, resources=agent.Resources(memory=64))
    assert read(task, "memory.max") == str(64 * MIB)
    swap = task.cgroup.path / "memory.swap.max"
    assert not swap.exists() or swap.read_text().strip() == "0"


@needs_cgroup2
def test_cgroup_of_its_own_for_agents_that_make_none(tasks: Tasks) -> None:
    task = tasks.make(FOREVER, resources=agent.Resources(memory=64))
    task.cgroup.path = Path("/nowhere")
    task.cgroup.create = lambda: None  # type: ignore[method-assign]  # as an agent before 1.3: it makes none
    task.start()
    own = Path(f"/sys/fs/cgroup/nomad.slice/share.slice/{task.allocation.id}.task.scope")
    assert (own / "memory.max").read_text().strip() == str(64 * MIB)
    task.destroy()
    assert not own.exists()


@needs_cgroup2
def test_fork_bomb_is_stopped(tasks: Tasks) -> None:
    script = "i=0; while [ $i -lt 60 ]; do sleep 600 & i=$((i+1)); done"
    task = tasks.start(script, options={"pids_limit": 30})
    result = task.wait()
    assert not result.successful
    assert "ork" in task.logmon.stderr.decode()  # "Cannot fork"


@needs_cgroup2
def test_spinner_is_held_to_its_quota(tasks: Tasks) -> None:
    resources = agent.Resources(cpu=200, memory=64)  # of the stand-in's 1000 MHz a core: a fifth of one
    task = tasks.start("echo ready; while :; do :; done", resources=resources, options={"cpu_hard_limit": True})
    task.logmon.wait_for("ready")
    before, start = cpu_seconds(task), time.monotonic()
    time.sleep(5)
    used = (cpu_seconds(task) - before) / (time.monotonic() - start)
    assert 0.02 < used < 0.3
    eventually(lambda: read_counters(str(task.cgroup.path / "cpu.stat"))["nr_throttled"])  # a busy host gives less
    stats = task.stats(1)
    sample = next(stats)
    assert sample.agg_resource_usage.cpu.throttled_periods > 0
    assert sample.agg_resource_usage.cpu.percent < 40


def cpu_seconds(task: Task) -> float:
    return read_counters(str(task.cgroup.path / "cpu.stat"))["usage_usec"] / 1e6


@needs_cgroup2
@pytest.mark.parametrize("mode", ["command", "child", "process_two"])
def test_hog_is_killed_and_the_result_says_why(tasks: Tasks, mode: str) -> None:
    script = {"command": "exec tail /dev/zero", "child": "tail /dev/zero", "process_two": "exec tail /dev/zero"}[
        mode
    ]
    task = tasks.start(script, process_two=mode == "process_two", resources=agent.Resources(memory=64))
    result = task.wait()
    assert (result.exit_code, result.signal, result.oom_killed) == (137, 9, True)
    assert result.err.startswith("OOM killed: the task used all the memory it may (limit 64 MiB")


@needs_cgroup2
def test_killed_while_the_plugin_was_down(driver_file: Path, image: Path) -> None:
    """The shim has written it down."""
    with contextlib.ExitStack() as stack:
        plugin = launch_like_agent(driver_file)
        successor = stack.enter_context(launch_like_agent(driver_file))
        tasks = stack.enter_context(Tasks(successor, image))
        script = "while [ ! -e /local/go ]; do sleep 0.1; done; exec tail /dev/zero"
        task = tasks.start(script, plugin=plugin, resources=agent.Resources(memory=64))
        plugin.kill_hard()
        (task.dir / "local/go").touch()
        eventually(lambda: not Path(f"/proc/{shim(task)}").exists())
        task.recover(successor)
        result = task.wait()
        assert result.oom_killed and "limit 64 MiB" in result.err


@needs_cgroup2
def test_child_killed_while_the_task_runs_on(tasks: Tasks, driver_file: Path) -> None:
    script = "tail /dev/zero & wait; echo survived; exec sleep 600"
    task = tasks.start(script, resources=agent.Resources(memory=64))
    task.logmon.wait_for("survived")
    told = "OOM: a process was killed: the task used all the memory it may (limit 64 MiB)."
    eventually(lambda: [event.message for event in task.events].count(told) == 1)
    task.stop(timeout=0)
    result = task.wait()
    assert (result.exit_code, result.oom_killed) == (137, False), "it was stopped, and not for lack of memory"


@needs_cgroup2
@pytest.mark.parametrize("how", ["signal", "timeout", "from outside"])
def test_killed_for_other_reasons(tasks: Tasks, how: str) -> None:
    task = tasks.start(
        "trap '' TERM; echo ready; while :; do sleep 0.1; done", resources=agent.Resources(memory=64)
    )
    task.logmon.wait_for("ready")
    if how == "signal":
        task.signal("SIGKILL")
    elif how == "timeout":
        task.stop(timeout=0.5)
    else:
        kill(leader(task))
    result = task.wait()
    assert (result.exit_code, result.signal, result.oom_killed) == (137, 9, False)
    assert ("kill_timeout" in result.err) == (how == "timeout")


@needs_cgroup2
def test_booted_system_sets_limits_of_its_own(tasks: Tasks) -> None:
    unit = "[Service]\nMemoryMax=20M\nExecStart=/bin/sleep 600\n"
    task = tasks.boot(resources=agent.Resources(memory=256), env={}, kill_timeout=HANG)
    root = Path(f"/proc/{leader(task)}/root")
    eventually(lambda: (root / "run/systemd/private").exists())
    (root / "run/systemd/system/limited.service").write_text(unit)
    found: Any = []

    def limited() -> bool:
        found[:] = task.cgroup.path.glob("payload/system.slice/limited.service/memory.max")
        return bool(found)

    enter = ["nsenter", f"--target={leader(task)}", "--all", "systemctl"]
    eventually(lambda: run_quietly([*enter, "is-active", "basic.target"]), HANG, pause=1)
    assert run_quietly([*enter, "start", "limited.service"])
    eventually(limited)
    assert found[0].read_text().strip() == str(20 * MIB)


def run_quietly(argv: list[str]) -> bool:
    return subprocess.run(argv, capture_output=True, check=False, timeout=HANG).returncode == 0


@needs_cgroup2
def test_stats_are_the_cgroups_and_right_after_recovery(tasks: Tasks, driver_file: Path) -> None:
    script = "head -c 20M /dev/zero >/local/file; echo ready; while :; do :; done"
    task = tasks.start(script, resources=agent.Resources(cpu=100, memory=128))
    task.logmon.wait_for("ready")
    with launch_like_agent(driver_file) as second:
        task.recover(second)
        stats = task.stats(1)
        samples = [next(stats).agg_resource_usage for _ in range(2)]
        for usage in samples:
            assert 20 < usage.cpu.percent < 150
            assert usage.cpu.percent == pytest.approx(usage.cpu.user_mode + usage.cpu.system_mode)
            assert usage.memory.cache > 15 * MIB
            assert 0 < usage.memory.rss < usage.memory.usage < 128 * MIB
        kill(leader(task))
        rest = [usage.agg_resource_usage.cpu.percent for usage in stats]
        assert all(percent < 250 for percent in rest), "the last sample is as true as the others"
        task.wait()
        task.destroy()
    task.plugin = tasks.plugin


@needs_cgroup2
def test_ten_mebibytes_are_enough_to_start(tasks: Tasks) -> None:
    """The least that Nomad grants."""
    task, result = tasks.run("echo here", resources=agent.Resources(memory=10))
    assert result.successful, str(result)
    assert output(task) == "here\n"
