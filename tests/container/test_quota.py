# SPDX-License-Identifier: MPL-2.0
"""`root_size`: what a task may write to its private root, on disk and in memory."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from nspawn.common import ConfigError
from nspawn.diagnosis import judge_quotas
from nspawn.host import CgroupMode, Host, Mounts, read_mounts
from nspawn.images import Image
from nspawn.linux import PRJQUOTA, quotactl_fd
from nspawn.permissions import Size
from nspawn.quota import (
    ALLOW,
    ARCHITECTURE,
    CALL,
    EQUAL,
    FIRST_PROJECT,
    LOAD,
    REFUSE,
    REQUEST,
    REQUESTS,
    RETURN,
    SYSTEM_CALLS,
    count_inodes,
    release_directory,
    render_filter,
    take_project,
    write_limits,
    write_project,
)
from nspawn.roots import plan_root
from tests.agent import HANG, Allocation, DriverError
from tests.containers import Tasks, eventually, output
from tests.options import CONFIG, read_options

MIB = 1 << 20

# -- which tasks get a limit; no container is started --------------------------------------------------------

HOST = Host(systemd=252, kernel=(6, 1), cgroups=CgroupMode.V2, problems=())
IMAGE = Image(Path("/images/debian"), is_directory=True)
LAYERED = Image(Path("/store/app"), is_directory=True, layers=(Path("/store/a"),))
EXT4 = Mounts((("/", "ext4"),))
PLAIN = replace(EXT4, have_project_quotas=lambda path: False)
OPERATORS = Size("1G", 1 << 30)


def find_size(
    options: Mapping[str, object], most: Size | None = None, image: Image = IMAGE, mounts: Mounts = EXT4
) -> int | None:
    found = plan_root(image, read_options(**options), HOST, mounts, "/alloc/web/.nspawn-root", most)
    return found.private.size if found.private else None


def test_limit_is_the_jobs_or_the_operators() -> None:
    ephemeral = {"ephemeral": True}
    assert find_size(ephemeral) == 0
    assert find_size(ephemeral, OPERATORS) == 1 << 30
    assert find_size({**ephemeral, "root_size": "512 MiB"}, OPERATORS) == 512 * MIB
    assert find_size({"root_size": "512M"}, OPERATORS, LAYERED) == 512 * MIB
    assert find_size({}, OPERATORS) is None, "a task that writes to its image has no limit"


def test_operators_limit_is_the_maximum() -> None:
    config = replace(CONFIG, root_size=OPERATORS)
    assert read_options(config, root_size="1024M").root_size == Size("1024M", 1 << 30)
    with pytest.raises(ConfigError) as caught:
        read_options(config, root_size="2G")
    assert str(caught.value) == (
        'root_size = "2G": the operator of this client allows a task\'s root 1G; ask for less'
    )


def test_memory_has_the_jobs_limit_only() -> None:
    assert find_size({"volatile": "overlay"}, OPERATORS, mounts=PLAIN) == 0
    job = {"volatile": "overlay", "root_size": "8M", "user_namespacing": False}
    assert find_size(job, OPERATORS, mounts=PLAIN) == 8 * MIB


def refusal(options: Mapping[str, object], most: Size | None = None, mounts: Mounts = EXT4) -> str:
    with pytest.raises(ConfigError) as caught:
        find_size(options, most, mounts=mounts)
    return str(caught.value)


def test_refusals() -> None:
    assert refusal({"root_size": "1G"}) == (
        'root_size = "1G": needs a private root; set ephemeral = true, or volatile = "overlay"'
    )
    rule = "needs user namespaces: without one, root in the container can evade the limit"
    remedy = 'set user_namespacing = true, or volatile = "overlay"'
    assert refusal({"ephemeral": True, "user_namespacing": False}, OPERATORS) == (
        f'root_size = "1G": {rule}; {remedy}'
    )
    job = {"ephemeral": True, "root_size": "1G"}
    copied = "is not possible, because systemd-nspawn copies the image"
    assert copied in refusal(job, mounts=replace(EXT4, have_idmap=lambda path: False))
    lack = "needs project quotas (and Linux 5.14), and /alloc/web is on ext4 without them"
    assert refusal(job, mounts=PLAIN) == (
        f'root_size = "1G": {lack}; run tune2fs -O quota,project on the unmounted file system, and mount it with '
        "the option prjquota"
    )
    xfs = replace(PLAIN, points=(("/", "xfs"),))
    assert refusal(job, mounts=xfs).endswith("is on xfs without them; mount it with the option prjquota")
    btrfs = replace(PLAIN, points=(("/", "btrfs"),))
    assert refusal(job, mounts=btrfs).endswith("use ext4 or xfs, mounted with the option prjquota")


def run_filter(program: bytes, call: int, architecture: int, request: int) -> int:
    """What a seccomp filter says to a system call."""
    instructions = [struct.unpack_from("=HBBI", program, place) for place in range(0, len(program), 8)]
    values, loaded, place = {CALL: call, ARCHITECTURE: architecture, REQUEST: request}, 0, 0
    while True:
        code, then, otherwise, number = instructions[place]
        if code == RETURN:
            return int(number)
        if code == LOAD:
            loaded = values[number]
        else:
            assert code == EQUAL
            place += then if loaded == number else otherwise
        place += 1


@pytest.mark.parametrize("machine", SYSTEM_CALLS)
def test_attributes_are_forbidden_by_every_call(machine: str) -> None:
    program, terminal = render_filter(machine), 0x5401
    for architecture, (ioctls, setattrs) in SYSTEM_CALLS[machine].items():
        for call in ioctls:
            assert {run_filter(program, call, architecture, request) for request in REQUESTS} == {REFUSE}
            assert run_filter(program, call, architecture, terminal) == ALLOW
        assert {run_filter(program, call, architecture, 0) for call in setattrs} == {REFUSE}
        assert run_filter(program, 1, architecture, REQUESTS[0]) == ALLOW
    assert run_filter(program, 1, 7, 0) == REFUSE, "no architecture of this machine"


# -- in memory, and where the disk cannot --------------------------------------------------------------------


def test_memory_is_limited(tasks: Tasks) -> None:
    task, result = tasks.run(
        "df --block-size=1 --output=size / | tail -1; head -c 9M /dev/zero >/big || echo full; stat -c %s /big",
        volatile="overlay",
        root_size="8 MiB",
    )
    size, full, written = output(task).split()
    assert (int(size), full) == (8 * MIB, "full"), str(result)
    assert 7 * MIB < int(written) <= 8 * MIB


def test_host_without_quotas_says_what_to_do(tasks: Tasks) -> None:
    task = tasks.make("true", ephemeral=True, root_size="1 GiB")
    with pytest.raises(DriverError, match=r'root_size = "1 GiB": needs project quotas .* on \w+ without them; .*'):
        task.start()


# -- on disk -------------------------------------------------------------------------------------------------


def make_filesystem(kind: str, folder: Path) -> Path:
    """Mount a file system with project quotas."""
    disk, point = folder / "disk", folder / "quotas"
    point.mkdir()
    disk.touch()
    os.truncate(disk, 320 * MIB)  # xfs needs 300
    features = ["-O", "quota,project"] if kind == "ext4" else []
    subprocess.run([f"mkfs.{kind}", "-q", *features, disk], check=True, timeout=HANG)
    mount = ["mount", "-o", "loop,prjquota", str(disk), str(point)]
    if subprocess.run(mount, capture_output=True, check=False, timeout=HANG).returncode:
        pytest.skip("this kernel has no project quotas: runs in virtual machines, see test_hosts.py")
    return point


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    point = make_filesystem(request.param, tmp_path)
    try:
        yield point
    finally:
        # The kernel takes the mounts of an ended container apart a moment later.
        eventually(lambda: subprocess.run(["umount", str(point)], check=False, timeout=HANG).returncode == 0, HANG)


def read_limit(place: Path, project: int) -> int:
    """The bytes that a project may have, 0 for no limit."""
    fd, answer = os.open(place, os.O_RDONLY), bytearray(112)
    try:
        quotactl_fd(fd, ord("X") << 8 | 3, PRJQUOTA, project, answer)
    except FileNotFoundError:
        return 0
    finally:
        os.close(fd)
    return int(struct.unpack_from("=Q", answer, 8)[0]) * 512


# Files and directories of the image are in no project, so there the overlay lets that be set for its copy of them.
FILL = """
fill() { dd if=/dev/zero of=$1 bs=64K 2>>/tmp/why; }
chattr -p 0 /etc/passwd && echo escaped
chattr -P /srv && echo escaped
chattr -p 0 /opt && echo escaped
for place in /big /etc/passwd /srv/more /opt/more; do fill $place; done
chattr -p 0 /big && echo escaped
chattr -P / && echo escaped
i=0; while true 2>/dev/null >/var/$i; do i=$((i+1)); done
stat -c %s /big; df --block-size=1 --output=size / | tail -1
echo ready; exec sleep 600
"""


def test_task_fills_its_own_root_and_no_neighbours(disk: Path, tasks: Tasks) -> None:
    full = tasks.start(FILL, allocation=Allocation(disk), ephemeral=True, root_size="2 MiB")
    full.logmon.wait_for("ready")
    lines = full.logmon.stdout.decode().split()
    root = full.dir / ".nspawn-root"
    assert sum(os.lstat(path).st_blocks * 512 for path in root.rglob("*")) <= 2 * MIB
    assert "escaped" not in lines
    assert full.exec(["sh", "-c", "chattr -P /home || echo refused"])[0].endswith(b"refused\n")
    assert MIB < int(lines[0]) <= 2 * MIB
    assert int(lines[1]) == 2 * MIB, "df shows the limit"

    script = "head -c 4M /dev/zero >/big && echo fits; exec sleep 600"
    neighbour = tasks.start(script, allocation=Allocation(disk), ephemeral=True, root_size="8M")
    neighbour.logmon.wait_for("fits")
    assert [read_limit(disk, FIRST_PROJECT + number) for number in range(3)] == [2 * MIB, 8 * MIB, 0]
    for task in (full, neighbour):
        task.stop(timeout=0)
        task.destroy()
    assert not root.exists()
    assert [read_limit(disk, FIRST_PROJECT + number) for number in range(3)] == [0, 0, 0]


def test_projects_of_others_are_left_alone(disk: Path) -> None:
    """An id with a file in it is taken. One with only a limit is what a crash has left."""
    ready = f"ok: {disk} has project quotas, so root_size can limit what tasks write to their roots."
    assert str(judge_quotas(str(disk), read_mounts())) == ready
    others, first, second = (disk / name for name in ("others", "first", "second"))
    for folder in (others, first, second):
        folder.mkdir()
    fds = [os.open(folder, os.O_RDONLY) for folder in (others, first, second)]
    try:
        write_project(fds[0], FIRST_PROJECT)
        write_limits(fds[0], FIRST_PROJECT, 5 * MIB, 0)
        write_limits(fds[0], FIRST_PROJECT + 1, 5 * MIB, 0)
        assert take_project(fds[1]) == FIRST_PROJECT + 1
        assert take_project(fds[2]) == FIRST_PROJECT + 2
        write_limits(fds[1], FIRST_PROJECT + 1, 4 * MIB, 0)
        assert read_limit(disk, FIRST_PROJECT + 1) == 4 * MIB
        release_directory(str(first))
        assert [read_limit(disk, FIRST_PROJECT + number) for number in range(2)] == [5 * MIB, 0]
        first.rmdir()
        assert count_inodes(fds[0], FIRST_PROJECT) == 1
    finally:
        for fd in fds:
            os.close(fd)
