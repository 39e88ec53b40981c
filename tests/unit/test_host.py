# SPDX-License-Identifier: MPL-2.0
"""Host: facts about a machine, from the files of other machines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import driver
from nspawn.cgroup import Usage, parse_cgroups, read_cgroup_pids, read_cgroup_usage, read_number
from nspawn.diagnosis import judge_tools
from nspawn.host import (
    CONTROLLERS,
    TOOLS,
    CgroupMode,
    Host,
    Mounts,
    find_problems,
    parse_mountinfo,
    read_cgroup_mode,
    read_host,
    read_mounts,
    read_nspawn_version,
)
from nspawn.network import parse_addresses
from nspawn.process import ProcessId, parse_stat, parse_status, read_stat, run_in_thread

# -- cgroups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "mode"),
    [
        (["cgroup.controllers", "cgroup.procs"], CgroupMode.V2),
        (["unified/cgroup.procs", "unified/cgroup.controllers", "cpu/tasks", "systemd/tasks"], CgroupMode.HYBRID),
        (["cpu/tasks", "memory/tasks"], None),
        (["unified/other"], None),
        ([], None),
    ],
)
def test_cgroup_mode(tmp_path: Path, files: list[str], mode: CgroupMode) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert read_cgroup_mode(tmp_path) is mode


def test_cgroup_mode_without_cgroups(tmp_path: Path) -> None:
    assert read_cgroup_mode(tmp_path / "nothing") is None


def test_place_of_the_second_hierarchy() -> None:
    assert {mode: str(mode.root) for mode in CgroupMode} == {
        CgroupMode.V2: "/sys/fs/cgroup",
        CgroupMode.HYBRID: "/sys/fs/cgroup/unified",
    }


# What a fake cgroup holds, as of kernel 6.1.
CPU_STAT = "usage_usec 3500000\nuser_usec 2000000\nsystem_usec 1500000\nnr_throttled 4\nthrottled_usec 7\n"
MEMORY_STAT = "anon 1000\nfile 2000\nkernel 300\n"


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    path = tmp_path / "a.web.scope"
    (path / "payload/init.scope").mkdir(parents=True)
    (path / "shim").mkdir()
    files = {
        "cpu.stat": CPU_STAT,
        "memory.stat": MEMORY_STAT,
        "memory.current": "4096\n",
        "memory.swap.current": "5\n",
        "memory.peak": "8192\n",
        "cgroup.procs": "",
        "shim/cgroup.procs": "1\n2\n",
        "payload/init.scope/cgroup.procs": "4194304\n",
    }
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_cgroup_usage(cgroup: Path) -> None:
    usage = read_cgroup_usage(str(cgroup))
    assert usage is not None
    assert usage == Usage(
        at=usage.at,
        user=2.0,
        system=1.5,
        rss=1000,
        usage=4096,
        cache=2000,
        swap=5,
        peak=8192,
        throttled_periods=4,
        throttled_time=7000,
        is_cgroup=True,
    )


def test_cgroup_usage_of_older_kernels(cgroup: Path) -> None:
    """memory.peak came with 5.19; without swap accounting there is no memory.swap.current."""
    (cgroup / "memory.peak").unlink()
    (cgroup / "memory.swap.current").unlink()
    usage = read_cgroup_usage(str(cgroup))
    assert usage is not None
    assert (usage.usage, usage.peak, usage.swap) == (4096, 0, 0)


def test_cgroup_usage_without_memory_controller(cgroup: Path) -> None:
    (cgroup / "memory.stat").unlink()
    assert read_cgroup_usage(str(cgroup)) is None


def test_cgroup_usage_of_nothing(tmp_path: Path) -> None:
    assert read_cgroup_usage(str(tmp_path / "gone")) is None


def test_cgroup_pids(cgroup: Path) -> None:
    assert sorted(read_cgroup_pids(str(cgroup))) == [1, 2, 4194304]
    assert read_cgroup_pids(str(cgroup / "gone")) == []


@pytest.mark.parametrize(("text", "number"), [("12\n", 12), ("max\n", 0), ("", 0)])
def test_number_of_a_cgroup_file(tmp_path: Path, text: str, number: int) -> None:
    (tmp_path / "x").write_text(text)
    assert read_number(str(tmp_path / "x")) == number
    assert read_number(str(tmp_path / "gone")) == 0


# -- what processes say of themselves ------------------------------------------------------------------------

odd = st.binary(max_size=15).map(lambda name: name.replace(b"\0", b"").replace(b"\n", b""))


@given(odd)
@example(b") R 1 1 (")
@example(b"a\rSeccomp:\t0")
@example(b"\x85\xe2\x80\xa8\x0b\xff")
def test_any_name_of_a_process(name: bytes) -> None:
    """It may hold whatever Python takes for the end of a line; the kernel writes \\n in another way."""
    numbers = [str(number).encode() for number in range(1, 50)]
    assert parse_stat(b"7 (" + name + b") S " + b" ".join(numbers) + b"\n") == [
        "S",
        *(number.decode() for number in numbers),
    ]
    status = parse_status(b"Name:\t" + name + b"\nSeccomp:\t2\nUid:\t5\t5\t5\t5\n")
    assert status.keys() - {""} == {"Name", "Seccomp", "Uid"}
    assert (status["Seccomp"], status["Uid"]) == ("2", "5\t5\t5\t5")


@given(odd)
@example(b"a\r0::")
@example(b"a\x0b0::")
@example("a\u20280::".encode())
@example(b"\x850:name=systemd:")
def test_any_name_of_a_cgroup(name: bytes) -> None:
    text = b"9:name=systemd:/t/payload\n8:cpu,cpuacct:/\n0::/t/payload/" + name + b"/x\n"
    assert parse_cgroups(text) == {
        "name=systemd": "/t/payload",
        "cpu,cpuacct": "/",
        "": f"/t/payload/{os.fsdecode(name)}/x",
    }


@given(odd.filter(lambda name: b" " not in name))
@example("\u2028\u3000\x1c\x85".encode())
def test_any_name_of_an_interface(name: bytes) -> None:
    """The kernel refuses blanks as C knows them."""
    line = b"20010db8000000000000000000000001 02 40 00 80 " + name.rjust(8) + b"\n"
    assert parse_addresses("", (line * 2).decode(errors="replace")) == ("2001:db8::1",)


@given(st.binary(max_size=200))
@example(b"0::")
@example(b"::\n:\n")
def test_any_text_of_the_kernel_is_read_or_refused(text: bytes) -> None:
    parse_status(text)
    parse_cgroups(text)
    with contextlib.suppress(ValueError):
        parse_stat(text)


# -- mounts --------------------------------------------------------------------------------------------------

MOUNTINFO = r"""
22 27 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
27 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
98 27 0:40 / /srv/a\040b\011c\012d\134e\043f rw,relatime - xfs /dev/vdb\0401 rw
99 27 0:41 / /mnt/nfs rw,relatime shared:1 master:2 propagate_from:3 - nfs4 host:/export rw,vers=4.2
100 27 0:42 /sub /var/nomad rw - btrfs /dev/vdc rw,subvol=/sub
101 100 0:43 / /var/nomad/alloc/secrets rw,noexec - tmpfs tmpfs rw,size=1024k
102 27 0:44 / /ünïcödé rw - fuse.sshfs host: rw
""".lstrip("\n")


def test_mountinfo() -> None:
    assert parse_mountinfo(MOUNTINFO).points == (
        ("/sys", "sysfs"),
        ("/", "ext4"),
        ("/srv/a b\tc\nd\\e#f", "xfs"),
        ("/mnt/nfs", "nfs4"),
        ("/var/nomad", "btrfs"),
        ("/var/nomad/alloc/secrets", "tmpfs"),
        ("/ünïcödé", "fuse.sshfs"),
    )


def test_mountinfo_of_nothing() -> None:
    assert parse_mountinfo("") == Mounts(())


@pytest.mark.parametrize("character", ["\v", "\f", "\r", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\udc85"])
def test_mountinfo_has_lines_that_end_with_a_line_feed_only(character: str) -> None:
    """The kernel writes other separators as they are. Nomad mounts a tmpfs below a directory with the task's
    name: one such name, of any driver's job, must not keep all others from starting."""
    name = f"/alloc/we{character}b/secrets"
    text = f"100 27 0:42 / {name} rw - tmpfs tmpfs rw\n101 27 0:43 / /x rw - xfs /dev/x rw\n"
    assert parse_mountinfo(text).points == ((name, "tmpfs"), ("/x", "xfs"))


@pytest.mark.parametrize(
    ("path", "filesystem"),
    [
        ("/", "ext4"),
        ("/etc", "ext4"),
        ("/sysx", "ext4"),
        ("/sys", "sysfs"),
        ("/sys/fs", "sysfs"),
        ("/srv/a b\tc\nd\\e#f/g", "xfs"),
        ("/mnt/nfs/x", "nfs4"),
        ("/mnt/nfsx", "ext4"),
        ("/var/nomad/alloc", "btrfs"),
        ("/var/nomad/alloc/secrets", "tmpfs"),
        ("/var/nomad/alloc/secrets/x", "tmpfs"),
    ],
)
def test_filesystem_of_a_path(path: str, filesystem: str) -> None:
    assert parse_mountinfo(MOUNTINFO).filesystem(path) == filesystem


def test_later_mounts_cover_earlier_ones() -> None:
    mounts = Mounts((("/a", "xfs"), ("/", "rootfs"), ("/a", "tmpfs"), ("/", "overlay")))
    assert mounts.filesystem("/a/b") == "tmpfs"
    assert mounts.filesystem("/b") == "overlay"


def test_filesystem_without_mounts() -> None:
    assert Mounts(()).filesystem("/a") == ""


def test_mounts_of_this_machine() -> None:
    mounts = read_mounts()
    assert mounts.filesystem("/proc/self") == "proc"
    assert mounts.filesystem("/") != ""


# -- what is missing -----------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that holds every tool, as the only one searched; and a machine with an identity, run by root."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        (path / tool).write_text("#!/bin/sh\n")
        (path / tool).chmod(0o755)
    monkeypatch.setattr("nspawn.files.SAFE_PATH", str(path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return path


def problems(systemd: int = 252, kernel: tuple[int, int] = (5, 12)) -> list[str]:
    """The problems of this machine, but for its identity, which is not what these tests are about."""
    return [text for text in find_problems(systemd, kernel) if "machine-id" not in text]


def test_old_kernel(tools: Path) -> None:
    """Volumes of a task with user namespaces are id-mapped mounts."""
    assert problems(kernel=(5, 11)) == ["The kernel is Linux 5.11; 5.12 or newer is needed."]


@pytest.mark.parametrize("systemd", [252, 257, 262])
def test_no_problems(tools: Path, systemd: int) -> None:
    assert problems(systemd) == []


@pytest.mark.parametrize("systemd", [1, 239, 249, 251])
def test_old_systemd(tools: Path, systemd: int) -> None:
    assert problems(systemd) == [f"systemd-nspawn is version {systemd}; 252 or newer is needed."]


@pytest.mark.parametrize(("tool", "package"), TOOLS.items())
def test_missing_tool(tools: Path, tool: str, package: str) -> None:
    (tools / tool).unlink()
    assert problems() == [f"{tool} is not installed: install the package {package}."]


def test_tool_that_cannot_be_executed(tools: Path) -> None:
    (tools / "systemd-nspawn").chmod(0o644)
    assert problems(0) == ["systemd-nspawn is not installed: install the package systemd-container."]


def test_shim_starts_only_tools_that_are_checked() -> None:
    """A missing one would be found out by the first task."""
    for tool in ("sed", "sleep"):
        assert f"{tool} " in driver.SHIM
        assert tool in TOOLS


def test_not_root(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert problems() == ["The Nomad client must run as root to start containers."]


def test_several_problems_are_several_sentences(tools: Path) -> None:
    (tools / "sed").unlink()
    host = Host(249, (6, 1), CgroupMode.V2, tuple(problems(249)))
    assert not host.is_healthy
    assert host.health_description == (
        "sed is not installed: install the package sed. systemd-nspawn is version 249; 252 or newer is needed."
    )


def test_healthy() -> None:
    host = Host(252, (6, 1), CgroupMode.V2, (), controllers=frozenset(CONTROLLERS))
    assert host.is_healthy
    assert host.health_description == "Healthy"
    assert host.limits == CONTROLLERS
    less = "Healthy (tasks run without a device policy: it needs a cgroup v2 hierarchy, and bpf(2))"
    assert replace(host, has_device_policy=False).health_description == less


@pytest.mark.parametrize(
    ("mode", "controllers", "sentence"),
    [
        (CgroupMode.HYBRID, "hugetlb", "Healthy (tasks run without resource limits: they need cgroup v2)"),
        (
            CgroupMode.V2,
            "cpu memory pids rdma",
            "Healthy (tasks run without limits of cpuset, io: the cgroup v2 controllers are missing)",
        ),
    ],
)
def test_healthy_but_without_limits(mode: CgroupMode, controllers: str, sentence: str) -> None:
    host = Host(252, (6, 1), mode, (), controllers=frozenset(controllers.split()))
    assert host.is_healthy
    assert host.health_description == sentence


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("echo 'systemd 252 (252.39-1~deb12u1)'; echo '+PAM +AUDIT'", 252),
        ("echo 'systemd 257.13 (257.13-1)'", 257),
        ("echo 'systemd 262~rc1'", 262),
        ("echo 'nspawn 1'", 0),
        ("exit 1", 0),
        ("printf '\\377\\n'", 0),
    ],
)
def test_nspawn_version(tmp_path: Path, script: str, version: int) -> None:
    tool = tmp_path / "systemd-nspawn"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    assert read_nspawn_version(str(tool), tool.stat().st_mtime) == version


def test_nspawn_version_without_nspawn(tmp_path: Path) -> None:
    assert read_nspawn_version(str(tmp_path / "nothing"), 0.0) == 0


def test_nspawn_version_is_asked_again_after_an_upgrade(tmp_path: Path) -> None:
    tool = tmp_path / "systemd-nspawn"
    for number, version in enumerate((252, 257)):
        tool.write_text(f"#!/bin/sh\necho systemd {version}\necho >>{tmp_path}/asked\n")
        tool.chmod(0o755)
        for _ in range(3):
            assert read_nspawn_version(str(tool), float(number)) == version
    assert len((tmp_path / "asked").read_text()) == 2


def test_this_host() -> None:
    host = read_host()
    assert host.kernel >= (3, 0)
    assert host.cgroups is read_cgroup_mode()
    assert all(problem.endswith(".") for problem in host.problems)


# -- processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["plain", "a b) c", ") S 1 (", "new\nline", "é" * 8, b"\xff\xfe".decode("latin-1")]
)
def test_process_of_any_name(tmp_path: Path, name: str) -> None:
    """The kernel cuts names at 15 bytes, also in the middle of a character: that is no UTF-8 any more."""
    program = tmp_path / name
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        try:
            fields = read_stat(process.pid)
            found = ProcessId.of(process.pid)
            assert fields is not None
            assert int(fields[1]) == os.getpid()
            assert found is not None and found.is_alive
            assert found.started == int(fields[19])
        finally:
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert ProcessId.of(process.pid) is None  # a zombie is no live process
    assert read_stat(process.pid) is None
    assert not found.is_alive


def test_process_identity_is_more_than_its_number() -> None:
    this = ProcessId.of(os.getpid())
    assert this is not None and this.is_alive
    assert not ProcessId(this.pid, this.started + 1).is_alive
    assert not ProcessId(this.pid, this.started + 1).send(0)
    assert this.send(0)


def test_work_in_a_thread_may_be_given_up() -> None:
    """A start is cancelled while its image is looked at: the thread ends later, and nobody waits for it."""
    complaints: list[object] = []

    async def scenario() -> None:
        loop, go = asyncio.get_running_loop(), threading.Event()
        threads: list[Path] = []

        def work() -> None:
            threads.append(Path(f"/proc/self/task/{threading.get_native_id()}"))
            go.wait()

        loop.set_exception_handler(lambda _, context: complaints.append(context))
        waiting = asyncio.create_task(run_in_thread(work))
        while not threads:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        go.set()
        while threads[0].exists():
            await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert not complaints


# -- who can get to directories ------------------------------------------------------------------------------


def test_health_says_what_others_can_get_to() -> None:
    host = Host(252, (6, 1), CgroupMode.V2, (), controllers=frozenset(CONTROLLERS), open_directories=("/a",))
    assert host.is_healthy
    assert host.health_description == (
        "Healthy (other users of this machine can get to /a: a set-user-id file that a task makes there makes "
        "them root; run chmod 0700 /a)"
    )


def test_check_says_where_missing_tools_come_from() -> None:
    found = {finding.text.split()[0]: finding.text for finding in judge_tools(frozenset({"gpg"}))}
    assert found["gpg"] == "gpg is installed."
    assert found["ip"].endswith("(network_address, network_mac): install the package iproute2.")
    assert found["cosign"].endswith("put it into a directory such as /usr/local/bin."), (
        "Debian 12 has no such package"
    )


def test_process_whose_number_is_still_a_sessions() -> None:
    """As a shim's, when only the holder of the log pipes is left. Older kernels have another error for it."""
    command = ["setsid", "sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout
        member = int(leader.stdout.readline())
        leader.wait(30)
    try:
        assert os.getsid(member) == leader.pid
        assert ProcessId(leader.pid, 1).open() is None
    finally:
        os.kill(member, signal.SIGKILL)
