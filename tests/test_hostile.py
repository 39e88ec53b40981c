# SPDX-License-Identifier: MPL-2.0
"""Attacks of people who may submit jobs, of what runs in a container, of images and of registries.

Each is as short as it can be, and runs under the strictest plugin block. A race is repeated: RACES says how often
here, `NSPAWN_TEST_RACES=1000` for as often as one wants. Nothing in here may ever succeed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import driver
from tests.agent import Allocation, DriverError, Plugin, Task, launch_like_agent
from tests.containers import Tasks, driver_state, leader, zombies

pytestmark = pytest.mark.root

STRICT = "volumes = false\nallow = []\nallow_caps = []\nallow_paths = []\n"
RACES = int(os.environ.get("NSPAWN_TEST_RACES", "20"))


@pytest.fixture(scope="module")
def strict(driver_file: Path) -> Iterator[Plugin]:
    """A plugin that allows jobs nothing of what an operator can forbid."""
    with launch_like_agent(driver_file, STRICT) as running:
        yield running
        assert not running.exited()
    assert not running.violations


@pytest.fixture
def hostile(strict: Plugin, image: Path) -> Iterator[Tasks]:
    """Makes tasks of somebody who means harm; at the end nothing may be left of them."""
    with Tasks(strict, image) as made:
        yield made


# -- what a container says of its processes and cgroups ------------------------------------------------------


@pytest.fixture(scope="module")
def caged(driver_file: Path, image: Path) -> Iterator[Plugin]:
    """As `strict`, with the image where jobs may name it."""
    with launch_like_agent(driver_file, f'{STRICT}image_dir = "{image.parent}"\n') as running:
        yield running
        assert not running.exited()
    assert not running.violations


@pytest.fixture
def prisoners(caged: Plugin, image: Path) -> Iterator[Tasks]:
    with Tasks(caged, image) as made:
        yield made


def imprison(tasks: Tasks, program: str, *arguments: object, **options: Any) -> Task:
    """Start a container whose first process is a Perl program. It may use SEIZE and the like."""
    usual = {"image": tasks.image.name, "network_veth": None, "private_network": True}
    command = ["perl", "-MSocket", "-e", PTRACE + program, *map(str, arguments)]
    return tasks.start(command, **(usual | options))


PTRACE = (
    "my $ptrace = `uname -m` =~ /x86_64/ ? 101 : 117; $| = 1;"
    "sub ptrace { return syscall($ptrace, $_[0], $_[1], 0, 0) }"
    "my ($SEIZE, $INTERRUPT, $DETACH) = (0x4206, 0x4207, 17);"
)
# What str.splitlines takes for the end of a line.
LINE_ENDS = ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r"]


@pytest.mark.parametrize("is_ready", [False, True], ids=["before READY", "with READY"])
def test_no_process_of_the_host_is_taken_for_the_first_one(prisoners: Tasks, is_ready: bool) -> None:
    """systemd-nspawn passes the status text of its payload on, with whatever the driver might take for a line."""
    program = """
        socket(my $notify, AF_UNIX, SOCK_DGRAM, 0);
        my $to = pack_sockaddr_un("/run/host/notify");
        send($notify, $_, 0, $to) for @ARGV, "READY=1";
        sleep 1 while 1;
    """
    with subprocess.Popen(["sleep", "600"]) as victim:
        try:
            claims = [f"X_NSPAWN_LEADER_PID={victim.pid}", *(["READY=1"] if is_ready else [])]
            texts = ["".join(f"{end}{claim}" for claim in claims) for end in LINE_ENDS]
            task = imprison(prisoners, program, *(f"STATUS=hello{text}" for text in texts), notify_ready=True)
            assert leader(task) != victim.pid
            assert task.exec(["cat", "/proc/1/comm"])[0] == b"perl\n"
            task.stop(timeout=0.1)
            task.destroy()
            assert victim.poll() is None
        finally:
            victim.kill()


@pytest.mark.parametrize("role", ["leader", "keeper"])
def test_no_stored_state_names_a_process_of_the_host(prisoners: Tasks, driver_file: Path, role: str) -> None:
    task = imprison(prisoners, "sleep 1 while 1")
    assert task.handle
    with subprocess.Popen(["sleep", "600"]) as victim, launch_like_agent(driver_file) as second:
        try:
            genuine = task.handle.driver_state
            forged = {**driver_state(task), role: dataclasses.asdict(driver.ProcessId.of_child(victim.pid))}
            task.handle.driver_state = json.dumps(forged).encode()
            with pytest.raises(DriverError, match=f"process {victim.pid} is not the (first|keeper) of"):
                task.recover(second)
            task.handle.driver_state = genuine
            task.recover(second)
            task.destroy()  # as an agent does where a task cannot be recovered
            assert victim.poll() is None
        finally:
            victim.kill()


@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
def test_no_name_of_a_cgroup_leads_a_command_out(prisoners: Tasks, end: str) -> None:
    program = """
        my $place = "/sys/fs/cgroup"; mkdir "$place/a";
        for (split m{/}, $ARGV[0]) { $place .= "/$_"; mkdir $place }
        open(my $procs, ">", "$place/cgroup.procs"); print $procs "1"; close $procs or die $!;
        print "moved\\n"; sleep 1 while 1;
    """
    root = driver.read_cgroup_mode().root
    assert root
    target = root / f"target-{os.getpid()}"
    target.mkdir()
    try:
        task = imprison(prisoners, program, f"a{end}0::/{target.name}")
        task.logmon.wait_for("moved\n")
        session = task.exec_streaming(["sh", "-c", "echo here; read -r end"])
        session.wait_for(b"here\n")
        assert (target / "cgroup.procs").read_text() == ""
        found = driver.read_cgroup_pids(f"{driver_state(task)['cgroup']}/payload")
        assert len(found) == 2
        session.send(b"\n")
        assert session.wait().exit_code == 0
    finally:
        task.destroy()
        target.rmdir()


def test_nested_cgroups_are_removed(prisoners: Tasks) -> None:
    program = """
        for my $root (glob("/sys/fs/cgroup /sys/fs/cgroup/*")) {
            chdir $root or next;
            for (1..1200) { mkdir "a" or last; chdir "a" or last }
        }
        print "made\\n"; sleep 1 while 1;
    """
    task = imprison(prisoners, program)
    task.logmon.wait_for("made\n")
    assert next(task.stats(0.1)).agg_resource_usage.memory.usage > 0
    assert task.exec(["true"])[1].successful
    task.stop(timeout=0)
    assert task.wait(30).signal == signal.SIGKILL
    task.destroy()  # `prisoners` looks for what is left


def test_deep_directories_of_a_killed_nspawn_are_removed(prisoners: Tasks) -> None:
    """It keeps in the state directory what a task has changed of an overlay."""
    task = imprison(prisoners, "sleep 1 while 1")
    task.stop(timeout=0)
    here = os.open(driver.state_directory(task.id), os.O_RDONLY)
    for name in ["tmp"] + ["a"] * 1200:
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    task.destroy()
    assert not driver.state_directory(task.id).exists()


# -- exec ----------------------------------------------------------------------------------------------------


def test_no_command_runs_with_fewer_filters_than_its_payload(prisoners: Tasks) -> None:
    """There can be one tracer of a process: those inside try to be it while the filters are read."""
    program = """
        for (1..3) {
            next if fork;
            while (1) {
                next if ptrace($SEIZE, 1) < 0;
                ptrace($INTERRUPT, 1); waitpid(1, 0x40000000); ptrace($DETACH, 1);
            }
        }
        print "racing\\n"; sleep 1 while 1;
    """
    task = imprison(prisoners, program)
    task.logmon.wait_for("racing\n")
    status = driver.read_status(leader(task))
    wanted = f"{status['Seccomp']} {status['Seccomp_filters']}\n"
    script = "grep -E '^Seccomp(_filters)?:' /proc/self/status | tr -dc '0-9\\n' | xargs"
    refused = 0
    for _ in range(RACES):
        got, result = task.exec(["sh", "-c", script], timeout=30)
        if result.successful:
            assert got.decode() == wanted
        else:
            assert b"seccomp filters" in got
            refused += 1
    print(f"{refused} of {RACES} were refused")


def test_a_traced_command_stops_nobody_else(prisoners: Tasks) -> None:
    """A process inside traces all others and never waits for them: what ends stays a zombie of its own."""
    program = """
        my %traced = ($$ => 1);
        if (fork == 0) {
            $traced{$$} = 1;
            print "tracing\\n";
            while (1) { for (glob("/proc/[0-9]*")) { my ($pid) = /(\\d+)/;
                $traced{$pid} = 1 if !$traced{$pid} and ptrace($SEIZE, $pid + 0) == 0 and print "traced\\n" } }
        }
        sleep 1 while 1;
    """
    task = imprison(prisoners, program)
    task.logmon.wait_for("tracing\n")
    session = task.exec_streaming(["sleep", "1"])
    task.logmon.wait_for("traced\n")
    with pytest.raises(DriverError, match="has ended, but a process in the container traces it"):
        session.wait(30)
    other = imprison(prisoners, "sleep 1 while 1")
    assert other.exec(["true"])[1].successful
    task.stop(timeout=0)
    task.destroy()
    assert zombies(task.plugin.pid) == []


# -- images and directories ----------------------------------------------------------------------------------


# -- registries, archives and addresses ----------------------------------------------------------------------


# -- options, permissions and names --------------------------------------------------------------------------


def test_no_name_takes_the_machine_of_another_task(prisoners: Tasks) -> None:
    """These two had one name with 24 bits of a digest: the second start removed the first task."""
    allocation = Allocation()
    first, second = (
        imprison(prisoners, "sleep 1 while 1", name=name, allocation=allocation)
        for name in ("a_!!_!b", "a.~!...b")
    )
    assert driver_state(first)["machine"] != driver_state(second)["machine"]
    assert first.exec(["true"])[1].successful and second.exec(["true"])[1].successful


def test_start_removes_no_task_of_another_name(prisoners: Tasks) -> None:
    first = imprison(prisoners, "sleep 1 while 1", name="first")
    path = driver.state_directory(first.id) / "state.json"
    machine = driver.plan_machine("second", first.allocation.id)
    path.write_text(json.dumps({**driver_state(first), "machine": machine}))
    with pytest.raises(DriverError, match=f"the machine name {machine}, which is that of the task {first.id}"):
        imprison(prisoners, "sleep 1 while 1", name="second", allocation=first.allocation)
    assert first.exec(["true"])[1].successful


# -- environment and users -----------------------------------------------------------------------------------
