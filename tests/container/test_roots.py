# SPDX-License-Identifier: MPL-2.0
"""Private roots: which task gets one, what it is like inside, and that nothing of it is ever left.

`ephemeral` here means the driver's own overlay; where systemd-nspawn copies the image instead is in test_task.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nomad_pb import driver_pb2
from nspawn.checks import IdRange
from nspawn.common import ConfigError, TransientError
from nspawn.host import CgroupMode, Host, Mounts
from nspawn.images import Image
from nspawn.linux import enter_namespace, take_lock
from nspawn.roots import UID_LOCKS, PrivateRoot, RootPlan, mount_root, pick_users, plan_root
from tests.agent import HANG, Allocation, DriverError, Task, call, launch_like_agent
from tests.containers import (
    Tasks,
    eventually,
    is_alive,
    kill,
    leader,
    make_small_image,
    nspawn,
    on_overlay,
    output,
    shim,
)
from tests.leftovers import leftovers, mounts, processes, snapshots
from tests.options import read_options

# -- which root a task gets; no container is started ---------------------------------------------------------

HOST = Host(systemd=252, kernel=(6, 1), cgroups=CgroupMode.V2, problems=())
IMAGE = Image(Path("/images/debian"), is_directory=True)
RAW = Image(Path("/images/debian.raw"), is_directory=False)
LAYERED = Image(Path("/store/app"), is_directory=True, layers=(Path("/store/b"), Path("/store/a")))
EXT4 = Mounts((("/", "ext4"),))
PLACE = "/alloc/web/.nspawn-root"


def plan(
    options: Mapping[str, object], image: Image = IMAGE, host: Host = HOST, mounts: Mounts = EXT4
) -> RootPlan:
    return plan_root(image, read_options(**options), host, mounts, PLACE)


def on(**places: str) -> Mounts:
    """Mounts of which overlay and nfs cannot be id-mapped."""
    plain = Mounts((("/", "ext4"), *((f"/{place}", kind) for place, kind in places.items())))
    return replace(plain, have_idmap=lambda path: plain.filesystem(path) not in ("overlay", "nfs", "nfs4"))


@pytest.mark.parametrize("options", [{}, {"read_only": True}, {"volatile": "no"}, {"user_namespacing": False}])
def test_the_image_is_the_root_unless_asked(options: dict[str, object]) -> None:
    found = plan(options)
    assert found.private is None
    assert found.copying == ""


PRIVATE: list[tuple[dict[str, object], str, IdRange | None, bool]] = [
    ({"ephemeral": True}, PLACE, IdRange(), True),
    ({"ephemeral": True, "read_only": True}, PLACE, IdRange(), True),
    ({"ephemeral": True, "volatile": "no"}, PLACE, IdRange(), True),
    ({"ephemeral": True, "user_namespacing": False}, PLACE, None, False),
    ({"ephemeral": True, "private_users": "no"}, PLACE, None, False),
    ({"ephemeral": True, "private_users": "pick"}, PLACE, IdRange(), True),
    ({"ephemeral": True, "private_users": "131072"}, PLACE, IdRange("131072", 131072), True),
    ({"ephemeral": True, "private_users": "131072:1000"}, PLACE, IdRange("131072:1000", 131072, 1000), True),
    ({"ephemeral": True, "private_users": "identity"}, PLACE, IdRange("identity", 0), False),
    (
        {"ephemeral": True, "private_users": "131072", "private_users_ownership": "off"},
        PLACE,
        IdRange("131072", 131072),
        False,
    ),
    ({"ephemeral": True, "private_users_ownership": "chown"}, PLACE, IdRange(), True),
    ({"volatile": "overlay"}, "", IdRange(), True),
    ({"volatile": "overlay", "user_namespacing": False}, "", None, False),
    ({"volatile": "yes"}, "", IdRange(), True),
    ({"volatile": "state"}, "", IdRange(), True),
]


@pytest.mark.parametrize(("options", "place", "users", "is_mapped"), PRIVATE)
def test_private_root(options: dict[str, object], place: str, users: IdRange | None, is_mapped: bool) -> None:
    found = plan(options)
    is_usr_mounted = options.get("volatile") == "yes"
    assert found.private == PrivateRoot(("/images/debian",), place, users, is_mapped, is_usr_mounted)


@pytest.mark.parametrize("volatile", ["yes", "state"])
def test_new_systemd_can_do_volatile_itself(volatile: str) -> None:
    assert plan({"volatile": volatile}, host=replace(HOST, systemd=257)).private is None
    assert plan({"volatile": volatile, "user_namespacing": False}).private is None


def test_layers_always_are_below_a_private_root() -> None:
    assert plan({}, LAYERED).private == PrivateRoot(("/store/b", "/store/a"), PLACE, IdRange(), True)
    with pytest.raises(ConfigError) as caught:
        plan({}, LAYERED, mounts=on(store="nfs4"))
    assert str(caught.value) == (
        'image = "/store/app": cannot be used on this machine: '
        "/store/b is on nfs4, which cannot be id-mapped for a user namespace"
    )


OBSTACLES: list[tuple[dict[str, object], Image, Host, Mounts, str]] = [
    ({}, RAW, HOST, EXT4, "the image is no directory"),
    ({"user_namespacing": False}, RAW, HOST, EXT4, "the image is no directory"),
    (
        {},
        IMAGE,
        replace(HOST, kernel=(5, 18)),
        EXT4,
        "Linux 5.18 has no id-mapped overlays (5.19 has), which user namespaces need",
    ),
    (
        {},
        IMAGE,
        HOST,
        on(images="overlay"),
        "/images/debian is on overlay, which cannot be id-mapped for a user namespace",
    ),
    ({}, IMAGE, HOST, on(alloc="nfs"), f"{PLACE} is on nfs, which cannot hold what a task changes"),
    (
        {"user_namespacing": False},
        IMAGE,
        HOST,
        on(alloc="overlay"),
        f"{PLACE} is on overlay, which cannot hold what a task changes",
    ),
]


@pytest.mark.parametrize(("options", "image", "host", "mounts", "why"), OBSTACLES)
def test_nspawn_copies_where_nothing_else_works(
    options: dict[str, object], image: Image, host: Host, mounts: Mounts, why: str
) -> None:
    found = plan({"ephemeral": True, **options}, image, host, mounts)
    assert found.private is None
    assert found.copying == f"ephemeral: systemd-nspawn makes a full copy of the image first, because {why}."


@pytest.mark.parametrize(
    ("options", "host", "mounts"),
    [
        ({"user_namespacing": False}, replace(HOST, kernel=(5, 12)), EXT4),
        ({"user_namespacing": False}, HOST, on(images="overlay")),
        ({"private_users": "identity"}, HOST, on(images="nfs")),
        ({}, HOST, on(images="tmpfs", alloc="tmpfs")),
        ({}, HOST, on(images="btrfs", alloc="xfs")),
    ],
)
def test_no_obstacle(options: dict[str, object], host: Host, mounts: Mounts) -> None:
    assert plan({"ephemeral": True, **options}, IMAGE, host, mounts).private


def test_a_snapshot_is_not_called_a_copy() -> None:
    mounts = on(images="btrfs", alloc="overlay")
    assert plan({"ephemeral": True}, mounts=mounts).copying == ""


def test_obstacles_of_volatile() -> None:
    mounts = on(images="overlay")
    assert plan({"volatile": "overlay"}, mounts=on(alloc="overlay")).private, "nothing is kept there"
    found = plan({"volatile": "overlay"}, mounts=mounts)
    assert found.private is None
    assert found.copying.startswith(
        "volatile: systemd-nspawn copies the whole image into memory first, because /im"
    )
    with pytest.raises(ConfigError) as caught:
        plan({"volatile": "state"}, mounts=mounts)
    assert str(caught.value) == (
        'volatile = "state": needs systemd 257 or newer together with user namespaces, because /images/debian is '
        "on overlay, which cannot be id-mapped for a user namespace; set user_namespacing = false"
    )


# -- ranges of ids -------------------------------------------------------------------------------------------


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories in place of systemd's locks and of /etc."""
    monkeypatch.setattr("nspawn.roots.UID_LOCKS", tmp_path / "locks")
    monkeypatch.setattr("nspawn.roots.ACCOUNTS", tmp_path)
    return tmp_path / "locks"


def pick(machine: str = "web-1") -> tuple[int, int]:
    base, fd = pick_users(machine)
    assert base % 65536 == 0
    assert 0x80000 <= base <= 0x6FFF0000, "systemd's ranges for containers"
    return base, fd


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock as systemd-nspawn takes it."""
    with open(path, "r+b") as file:
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except BlockingIOError:
            return True
    return False


def test_ranges_differ_while_they_are_held(locks: Path) -> None:
    first, fd = pick()
    assert is_locked(locks / str(first))
    second, other = pick()
    assert second != first
    os.close(fd)
    assert not is_locked(locks / str(first))
    again, fd = pick()
    assert again == first, "a task that starts again gets its range again"
    for held in (fd, other):
        os.close(held)


def test_a_lock_that_was_removed_counts_no_more(locks: Path) -> None:
    """Whoever removes stale locks may do so between the opening and the locking of the file."""
    base, fd = pick()
    (locks / str(base)).unlink()
    assert take_lock(locks / str(base), fcntl.F_WRLCK) is not None
    os.close(fd)


@pytest.mark.parametrize("name", ["subuid", "subgid", "passwd", "group"])
def test_ranges_of_accounts_are_left_alone(locks: Path, name: str) -> None:
    base, fd = pick()
    os.close(fd)
    line = (
        f"alice:{base - 65536}:131072" if name.startswith("sub") else f"alice:x:{base + 7}:{base + 7}::/:/bin/sh"
    )
    (locks.parent / name).write_text(f"# a comment\n+::::::\nroot:x:0:0\n{line}\nbroken:y:z\n\n")
    other, fd = pick()
    os.close(fd)
    assert other != base


def test_huge_subordinate_range(locks: Path) -> None:
    (locks.parent / "subuid").write_text("alice:0:4294967295\n")
    with pytest.raises(TransientError, match="no range of 65536 user ids is free"):
        pick_users("web-1")


def test_last_range_is_tried(locks: Path) -> None:
    (locks.parent / "subuid").write_text(f"alice:0:{0x6FFF0000}\n")
    base, fd = pick()
    os.close(fd)
    assert base == 0x6FFF0000


def test_ranges_of_processes_are_left_alone(locks: Path) -> None:
    base, fd = pick()
    os.close(fd)
    process = subprocess.Popen(["setpriv", f"--reuid={base + 33}", "--clear-groups", "sleep", "60"])
    try:
        eventually(lambda: os.stat(f"/proc/{process.pid}").st_uid == base + 33)
        other, fd = pick()
        os.close(fd)
        assert other != base
    finally:
        process.kill()
        process.wait()


# -- containers ----------------------------------------------------------------------------------------------

FOREVER = "while :; do sleep 0.05; done"
PROGRAMS = (
    "dash",
    "cat",
    "id",
    "ls",
    "sleep",
    "touch",
    "true",
    "rm",
    "mkdir",
    "mv",
    "stat",
    "ln",
    "chmod",
    "mknod",
    "cp",
)
USERS = pytest.mark.parametrize("namespaces", [True, False], ids=["users", "no users"])


@pytest.fixture
def small(image: Path, tmp_path: Path) -> Path:
    """An image of a few MB of the test's own."""
    make_small_image(image, tmp_path / "images/small", PROGRAMS)
    return tmp_path / "images/small"


def fingerprint(tree: Path) -> list[tuple[str, ...]]:
    """What can be seen of a tree: names, kinds, owners, sizes, times of change."""
    found = []
    for folder, folders, files in os.walk(tree):
        for name in ("", *folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            facts = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_size,
                status.st_mtime_ns,
                status.st_ino,
            )
            found.append((path, *map(str, facts)))
    return sorted(set(found))


def place(task: Task) -> Path:
    return task.allocation.dir / task.name / ".nspawn-root"


def base(task: Task) -> int:
    """Where the users of a running container begin on the host."""
    return int(Path(f"/proc/{leader(task)}/uid_map").read_text().split()[1])


def mounts_anywhere(alloc_id: str) -> list[str]:
    """Mounts of an allocation in any process's namespace, but for the agent's own on task directories."""
    found = []
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):
            found += [
                line for line in path.read_text().splitlines() if alloc_id in line and "/private" not in line
            ]
    return [line for line in found if "/secrets" not in line]


@USERS
def test_changes_are_the_tasks_own(tasks: Tasks, small: Path, namespaces: bool) -> None:
    before = fingerprint(small)
    script = (
        "touch /mark && mkdir /etc/own && rm /etc/group && echo done; ls -d /mark /etc/own /etc/group; sleep 60"
    )
    both = [tasks.start(script, image=str(small), ephemeral=True, user_namespacing=namespaces) for _ in range(2)]
    for task in both:
        task.logmon.wait_for("/etc/own\n")
        assert b"done\n" in task.logmon.stdout, "the other's mark is not there"
        assert (place(task) / "upper/mark").stat().st_uid == (base(task) if namespaces else 0)
        assert not any(mounts(task.allocation.id)), "nothing is mounted where the host can see it"
        assert stat.S_IMODE(place(task).stat().st_mode) == 0o700
    if namespaces:
        assert base(both[0]) != base(both[1])
    for task in both:
        task.stop(timeout=0)
        task.destroy()
        assert not place(task).exists()
        eventually(lambda task=task: not mounts_anywhere(task.allocation.id))  # type: ignore[misc]
    assert fingerprint(small) == before


@USERS
def test_root_looks_as_it_should(tasks: Tasks, namespaces: bool) -> None:
    script = (
        "id -u; stat -c '%u %g %a' / /etc /usr/bin/passwd /root; cat /proc/self/uid_map; grep -c . /etc/passwd"
    )
    task, result = tasks.run(script, ephemeral=True, user_namespacing=namespaces)
    lines = output(task).splitlines()
    assert result.successful, task.logmon.stderr
    assert lines[:5] == ["0", "0 0 755", "0 0 755", "0 0 4755", "0 0 700"]
    inside, outside, count = map(int, lines[5].split())
    assert (inside, count) == ((0, 65536) if namespaces else (0, 4294967295))
    assert (outside >= 0x80000) is namespaces


def test_the_roots_own_mode_and_owner_are_the_images(tasks: Tasks, small: Path) -> None:
    small.chmod(0o751)
    os.chown(small, 7, 8)
    task, _ = tasks.run("stat -c '%u %g %a' /", image=str(small), ephemeral=True)
    assert output(task) == "7 8 751\n"


@USERS
def test_booted_system(tasks: Tasks, namespaces: bool) -> None:
    task = tasks.boot(volatile=None, ephemeral=True, user_namespacing=namespaces, kill_timeout=HANG)
    task.logmon.wait_for("Reached target multi-user.target")
    found = Path(f"/proc/{leader(task)}/root/etc/machine-id").read_text().strip()
    assert found == task.allocation.id.replace("-", ""), "as it can write to its root, unlike to the image"
    if namespaces:
        assert Path(f"/proc/{leader(task)}/root").stat().st_uid == base(task) != 0
    task.stop()
    assert task.wait().successful
    assert "Reached target poweroff.target" in output(task)


@USERS
def test_files_of_the_image_can_be_changed_in_every_way(tasks: Tasks, small: Path, namespaces: bool) -> None:
    """Whiteouts, opaque directories, renamed directories, links, set-user-id files, attributes."""
    (small / "opt/dir/sub").mkdir(parents=True)
    for name in ("opt/dir/a", "opt/dir/sub/b", "opt/one", "opt/setuid", "opt/attribute"):
        (small / name).write_text("from the image\n")
    (small / "opt/setuid").chmod(0o4755)
    os.chown(small / "opt/one", 33, 34)
    os.setxattr(small / "opt/attribute", "user.color", b"green")
    capability = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
    os.setxattr(small / "opt/attribute", "security.capability", capability)
    script = """
        set -e; cd /opt
        rm -r dir/sub; mkdir dir/sub; ls dir/sub
        mv dir renamed; cat renamed/a; ls -d dir || echo no dir
        ln one two; echo more >> one; cat two; stat -c '%u %g %h' two
        stat -c %a setuid; touch setuid; stat -c %a setuid
        mv attribute moved; touch moved
        rm one two; ls -a /opt
        mknod /dev/null2 c 1 3 || echo no device
    """
    task, result = tasks.run(script, image=str(small), ephemeral=True, user_namespacing=namespaces)
    assert output(task).splitlines()[:9] == [
        "from the image",
        "no dir",
        "from the image",
        "more",
        "33 34 2",
        "4755",
        "4755",
        ".",
        "..",
    ], task.logmon.stderr
    assert output(task).splitlines()[9:12] == ["moved", "renamed", "setuid"]
    assert output(task).splitlines()[12:] == ["no device"], "no capability to make any, with or without"
    moved = place(task) / "upper/opt/moved"
    assert os.getxattr(moved, "user.color") == b"green"
    assert "security.capability" in os.listxattr(moved)
    assert (small / "opt/dir/sub/b").read_text() == "from the image\n"
    assert result.exit_code == 0


def test_device_nodes_of_an_image_are_dead(tasks: Tasks, small: Path) -> None:
    """As nspawn has it for disk images; even one of a device that the container may open elsewhere."""
    os.mknod(small / "opt-null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (small / "opt-null").chmod(0o666)
    script = "(echo x > /opt-null) 2>/dev/null && echo opened || echo refused; echo y > /dev/null && echo real"
    task, _ = tasks.run(script, image=str(small), ephemeral=True, user_namespacing=False)
    assert output(task) == "refused\nreal\n"


@USERS
def test_read_only_and_ephemeral(tasks: Tasks, small: Path, namespaces: bool) -> None:
    """The image need not have Nomad's directories, and does not get them."""
    script = "touch /x || echo refused; echo y > /local/y && cat /local/y; ls -d /alloc /secrets"
    options: dict[str, Any] = {"image": str(small), "ephemeral": True, "read_only": True}
    before = fingerprint(small)
    task, _ = tasks.run(script, user_namespacing=namespaces, **options)
    assert output(task) == "refused\ny\n/alloc\n/secrets\n"
    assert fingerprint(small) == before


@USERS
@pytest.mark.parametrize(
    ("volatile", "expected"),
    [("overlay", "root etc var usr"), ("yes", "root etc var"), ("state", "var")],
)
def test_volatile(tasks: Tasks, image: Path, volatile: str, expected: str, namespaces: bool) -> None:
    """With user namespaces on systemd before 257, too; nothing is copied, and nothing is written to a disk."""
    script = "for d in root etc var usr; do touch /$d/x 2>/dev/null && echo $d; done; id -u; echo z > /local/z"
    script = script.replace("/root/x", "/x")
    task, result = tasks.run(script, volatile=volatile, user_namespacing=namespaces)
    assert result.successful, task.logmon.stderr
    assert " ".join(output(task).split()) == f"{expected} 0"
    assert not place(task).exists()
    assert not (image / "x").exists() and not (image / "var/x").exists()


def test_what_is_in_memory_ends_with_the_task(tasks: Tasks, small: Path) -> None:
    task = tasks.start(f"cat /dev/zero > /big & {FOREVER}", image=str(small), volatile="overlay")
    big = Path(f"/proc/{leader(task)}/root/big")
    eventually(lambda: big.exists() and big.stat().st_size > 8 << 20)
    task.stop(timeout=0)
    task.destroy()
    eventually(lambda: not mounts_anywhere(task.allocation.id))


def test_volumes_in_a_private_root(tasks: Tasks, tmp_path: Path) -> None:
    """They are id-mapped for the range the root has."""
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data/old").write_text("old\n")
    (tmp_path / "data/old").chmod(0o600)
    script = "cat /data/old; echo new > /data/new; chown 33 /data/new; echo b > /bound/b && echo bound"
    mount = driver_pb2.Mount(task_path="/data", host_path=str(tmp_path / "data"))
    task, result = tasks.run(script, ephemeral=True, mounts=[mount], bind=[{f"{tmp_path}/data": "/bound:idmap"}])
    assert output(task) == "old\nbound\n", (result, task.logmon.stderr)
    assert (tmp_path / "data/new").stat().st_uid == 33
    assert (tmp_path / "data/b").stat().st_uid == 0


def test_a_container_cannot_write_what_the_overlay_goes_by(tasks: Tasks, small: Path) -> None:
    """Else it could make the overlay show it other files of the layers, under other rights."""
    task = tasks.start(FOREVER, image=str(small), ephemeral=True, user_namespacing=False)
    inside = Path(f"/proc/{leader(task)}/root/etc")
    with contextlib.suppress(OSError):  # newer kernels (6.7) store it under another name
        os.setxattr(inside, "trusted.overlay.redirect", b"/usr")
    assert "trusted.overlay.redirect" not in os.listxattr(place(task) / "upper/etc")


def test_pivot_root_in_a_private_root(tasks: Tasks, small: Path) -> None:
    options: dict[str, Any] = {"image": str(small.parent), "pivot_root": "/small", "ephemeral": True}
    task, result = tasks.run("touch /x && ls -d /usr/bin/touch /x", **options)
    assert output(task) == "/usr/bin/touch\n/x\n", (result, task.logmon.stderr)
    assert not (small / "x").exists()


def test_missing_command_in_a_private_root(tasks: Tasks, small: Path) -> None:
    """The merged root is in a namespace that only the thread of the start sees."""
    with pytest.raises(DriverError, match='there is no "/nope" in the container'):
        tasks.start(["/nope"], image=str(small), ephemeral=True)


def test_root_of_the_host_as_an_image(tasks: Tasks) -> None:
    """What it writes is thrown away, and its own changes are not below themselves."""
    mark = f"/{os.urandom(8).hex()}"
    task, result = tasks.run(
        f"touch {mark} && ls {mark}", image="/", ephemeral=True, user_namespacing=False, resolv_conf="off"
    )
    assert output(task) == f"{mark}\n", (result, task.logmon.stderr)
    assert not Path(mark).exists()


# -- the image's lock ----------------------------------------------------------------------------------------

SENTENCE = r"image: \S+ is in use by another container that may write to it; set ephemeral, read_only or volatile "


@pytest.mark.parametrize("sharing", [{"ephemeral": True}, {"read_only": True}, {"volatile": "overlay"}], ids=str)
def test_one_writer_or_many_readers(tasks: Tasks, small: Path, sharing: dict[str, Any]) -> None:
    writing: dict[str, Any] = {"read_only": False}
    for first, second in ((sharing, writing), (writing, sharing), (writing, writing)):
        task = tasks.start(FOREVER, image=str(small), **first)
        with pytest.raises(DriverError, match=SENTENCE) as caught:
            tasks.start(FOREVER, image=str(small), **second)
        assert caught.value.recoverable
        task.stop(timeout=0)
        task.destroy()
    for options in (sharing, {"ephemeral": True}, {"volatile": "overlay"}, {"read_only": True}):
        tasks.start(FOREVER, image=str(small), **options)


@pytest.mark.parametrize("victim", [shim, nspawn])
def test_locks_are_held_as_long_as_the_container_lives(
    tasks: Tasks, small: Path, victim: Callable[[Task], int]
) -> None:
    task = tasks.start(FOREVER, image=str(small), ephemeral=True)
    lock = UID_LOCKS / str(base(task))
    assert is_locked(lock)
    status = small.stat()
    image_lock = Path(f"/run/systemd/nspawn/locks/inode-{status.st_dev}:{status.st_ino}")
    assert is_locked(image_lock)
    held = leader(task)
    kill(victim(task))
    if victim is shim:  # the container runs on
        assert is_locked(lock) and is_locked(image_lock) and is_alive(held)
    task.stop(timeout=0)
    task.destroy()
    assert not lock.exists() and not image_lock.exists()


def test_no_descriptor_of_the_driver_gets_into_the_container(tasks: Tasks, small: Path) -> None:
    task, _ = tasks.run("ls /proc/self/fd", image=str(small), ephemeral=True)
    assert output(task).split() == ["0", "1", "2", "3"], "3 is the directory that ls reads"


# -- jobs and images that mean harm --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "directory", "file", "fifo"])
def test_what_an_artifact_puts_in_the_place_of_the_root(
    tasks: Tasks, small: Path, tmp_path: Path, kind: str
) -> None:
    victim = tmp_path / "victim"
    (victim / "upper").mkdir(parents=True)
    (victim / "upper/precious").touch()
    task = tasks.make("ls -d /precious /usr; touch /x", image=str(small), ephemeral=True)
    task.prestart()
    if kind == "link":
        place(task).symlink_to(victim)
    elif kind == "directory":
        shutil.copytree(victim, place(task))
    elif kind == "file":
        place(task).touch()
    else:
        os.mkfifo(place(task))
    task.start()
    assert task.wait().successful
    assert output(task) == "/usr\n"
    task.destroy()
    assert [path.name for path in (victim / "upper").iterdir()] == ["precious"]
    assert not os.path.lexists(place(task))


def test_links_of_an_image_do_not_lead_out(tasks: Tasks, small: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("alloc", "local", "secrets"):
        (small / name).symlink_to(victim)
    shutil.rmtree(small / "etc")
    (small / "etc").symlink_to(victim)
    several: tuple[dict[str, Any], ...] = ({}, {"read_only": True}, {"user_namespacing": False})
    for options in several:
        task = tasks.make("true", image=str(small), ephemeral=True, **options)
        with contextlib.suppress(DriverError):
            task.start()
            task.wait()
        task.close()
        assert list(victim.iterdir()) == []


def test_trees_that_are_hard_to_remove(tasks: Tasks, image: Path) -> None:
    """Deeper than recursion goes, longer than a path may be, without any permission, immutable if that can be."""
    script = """
        some=; for i in $(seq 200); do some=${some}dddddddddddddddd/; done
        cd /; for i in $(seq 15); do mkdir -p $some && cd -P $some || exit; done
        mkdir /closed; touch /closed/x; chmod 0 /closed
        touch /immutable; chattr +i /immutable; ln -s / /etc/all; echo made
        touch "/$(printf 'new\\nline')" /-rf
    """
    task, _ = tasks.run(script, ephemeral=True, user_namespacing=False)
    assert "made" in output(task), task.logmon.stderr
    task.destroy()
    assert not place(task).exists()
    assert (image / "usr").exists()


def test_many_files_do_not_hold_up_the_plugin(tasks: Tasks) -> None:
    script = "mkdir /many; cd /many; i=0; while [ $i -lt 20000 ]; do : > $i; i=$((i+1)); done; echo made"
    task, _ = tasks.run(script, ephemeral=True)
    assert output(task) == "made\n"
    other, _ = tasks.run("true")
    worst = 0.0
    done = threading.Thread(target=task.destroy)
    done.start()
    while done.is_alive():
        began = time.monotonic()
        other.inspect()
        worst = max(worst, time.monotonic() - began)
    done.join()
    assert worst < 5
    assert not place(task).exists()


# -- nothing is left, whatever happens -----------------------------------------------------------------------


def test_directory_that_the_agent_has_removed(tasks: Tasks, small: Path) -> None:
    task = tasks.start(FOREVER, image=str(small), ephemeral=True)
    task.stop(timeout=0)
    shutil.rmtree(place(task))
    task.destroy()
    assert leftovers(task.allocation.id) == []


def test_recovered_task_keeps_its_root(driver_file: Path, small: Path) -> None:
    first = launch_like_agent(driver_file)
    with launch_like_agent(driver_file) as second, Tasks(second, small) as tasks:
        script = "echo kept > /mark; echo ready; while ! cat /go 2>/dev/null; do sleep 0.05; done; cat /mark"
        task = tasks.make(f"{script}; {FOREVER}", ephemeral=True, plugin=first)
        task.start()
        task.logmon.wait_for("ready\n")
        was = base(task)
        os.kill(first.pid, signal.SIGKILL)
        first.kill_hard()
        task.recover(second)
        other = tasks.start(FOREVER, ephemeral=True)
        assert base(task) == was != base(other)
        Path(f"/proc/{leader(task)}/root/go").write_text("go\n")
        task.logmon.wait_for("kept\n")
        task.stop(timeout=0)
        task.wait()
        task.destroy()
        assert not place(task).exists()
    assert not second.violations


def test_repeated_start_of_one_task(tasks: Tasks, small: Path) -> None:
    """Nomad restarts a task in its directory: nothing of the run before is in the new root."""
    for _ in range(3):
        task = tasks.start("ls /mark 2>/dev/null; touch /mark; sleep 60", image=str(small), ephemeral=True)
        allocation = task.allocation
        task.stop(timeout=0)
        assert output(task) == ""
        left = place(task)
        left.mkdir(exist_ok=True)
        (left / "upper").mkdir(exist_ok=True)
        (left / "upper/mark").touch()  # as after a crash of the machine
        again = tasks.make(
            "ls /mark 2>/dev/null; echo over", image=str(small), ephemeral=True, allocation=allocation
        )
        again.start()
        assert again.wait().successful
        assert output(again) == "over\n"
        again.destroy()  # both have one cgroup


def wait_clean(task: Task, image: Path) -> None:
    """What a killed plugin has just forked may be there when DestroyTask looks; later it is gone."""

    def left() -> list[object]:
        return [
            *leftovers(task.allocation.id),
            *mounts_anywhere(task.allocation.id),
            *filter(os.path.lexists, [place(task)]),
            *snapshots(image),
        ]

    with contextlib.suppress(AssertionError):
        eventually(lambda: not left(), timeout=40)
    assert left() == []


@pytest.mark.parametrize("whom", ["plugin", "shim", "nspawn", "both"])
def test_kill_at_any_moment(driver_file: Path, small: Path, whom: str) -> None:
    """SIGKILL at random moments of a start; then the agent's DestroyTask, from another plugin."""
    seed = int(os.environ.get("NSPAWN_TEST_SEED") or time.time_ns())
    print(f"NSPAWN_TEST_SEED={seed}")
    chance = random.Random(seed)
    before = fingerprint(small)
    with launch_like_agent(driver_file) as cleaner, Tasks(cleaner, small) as tasks:
        for _ in range(14):
            doomed = launch_like_agent(driver_file)
            task = tasks.make(FOREVER, ephemeral=True)
            task.id = f"{task.allocation.id}/task/{os.urandom(4).hex()}"
            task.prestart()
            start: Any = doomed.driver.StartTask.future(driver_pb2.StartTaskRequest(task=task.task_config()))
            time.sleep(chance.random() * 0.15)
            for pid, command in list(processes(task.allocation.id)):
                if (whom == "shim" and "nspawn-shim" in command) or (
                    whom in ("nspawn", "both") and command.startswith("systemd-nspawn")
                ):
                    kill(pid)
            if whom in ("shim", "nspawn"):
                time.sleep(chance.random() * 0.1)
            os.kill(doomed.pid, signal.SIGKILL)
            doomed.kill_hard()
            start.cancel()
            call(cleaner.driver.DestroyTask, driver_pb2.DestroyTaskRequest(task_id=task.id, force=True), HANG)
            wait_clean(task, small)
        task, result = tasks.run("echo works", ephemeral=True)
        assert output(task) == "works\n", result
    assert fingerprint(small) == before


def test_failed_start_leaves_nothing(tasks: Tasks, small: Path, image: Path) -> None:
    for options in (
        {"user": "nobody-such"},
        {"working_directory": "/nope"},
        {"bind_read_only": [{"/etc": "/proc"}]},
    ):
        task = tasks.make("true", image=str(small), ephemeral=True, **options)
        with contextlib.suppress(DriverError):
            task.start()
            task.wait()
        task.close()
        wait_clean(task, small)


# -- file systems --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filesystems(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Makes file systems with a small image on each."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind in made:
            return made[kind]
        folder = tmp_path_factory.mktemp(kind)
        if kind == "tmpfs":
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True, timeout=30)
        elif kind != "host":
            disk = tmp_path_factory.mktemp("disks") / kind
            with open(disk, "wb") as file:
                file.truncate(512 << 20)
            subprocess.run([f"mkfs.{kind}", "-q", str(disk)], check=True, timeout=60)
            subprocess.run(["mount", "-o", "loop", str(disk), str(folder)], check=True, timeout=30)
        made[kind] = folder
        make_small_image(image, folder / "images/small", PROGRAMS)
        return folder

    yield make
    for kind, folder in made.items():
        if kind != "host":
            eventually(lambda folder=folder: not subprocess.run(["umount", str(folder)], check=False).returncode)  # type: ignore[misc]


KINDS = ("ext4", "btrfs", "xfs", "tmpfs", "host")


@USERS
@pytest.mark.parametrize("where", KINDS)
def test_every_usual_file_system(
    tasks: Tasks, filesystems: Callable[[str], Path], where: str, namespaces: bool
) -> None:
    """Image and allocation on it, and the allocation elsewhere."""
    folder = filesystems(where)
    image = folder / "images/small"
    before = fingerprint(image)
    for parent in (folder, None):
        task = tasks.make(
            "touch /x && rm -r /usr/lib/os-release && mv /mnt /mnt2 && ls -d /x /mnt2",
            image=str(image),
            ephemeral=True,
            user_namespacing=namespaces,
            allocation=Allocation(parent),
        )
        task.start()
        assert task.wait().successful, task.logmon.stderr
        assert output(task) == "/mnt2\n/x\n"
        assert not any("full copy" in event.message for event in tasks.plugin.events if event.task_id == task.id)
        task.close()
    assert fingerprint(image) == before
    assert snapshots(image) == []


def test_event_about_a_copy(tasks: Tasks, small: Path, tmp_path: Path) -> None:
    with on_overlay(small, tmp_path / "copied") as copied:
        task, result = tasks.run("touch /x && echo written", image=str(copied), ephemeral=True)
        assert output(task) == "written\n", result
        [message] = [
            event.message for event in tasks.plugin.events if event.task_id == task.id and "full" in event.message
        ]
        why = f"because {copied} is on overlay, which cannot be id-mapped for a user namespace. "
        assert re.fullmatch(
            re.escape(f"ephemeral: systemd-nspawn makes a full copy of the image first, {why}")
            + r"It has \d+ MB\.",
            message,
        )
        task.destroy()
        assert snapshots(copied) == []


def test_event_about_a_volume_whose_files_nobody_owns(tasks: Tasks, small: Path, tmp_path: Path) -> None:
    with on_overlay(small, tmp_path / "copied") as volume:
        mounts = [driver_pb2.Mount(task_path="/data", host_path=str(volume))]
        task, result = tasks.run(
            "ls -ld /data | grep -o nobody; touch /data/x || echo refused", mounts=mounts, ephemeral=True
        )
        assert output(task) == "nobody\nrefused\n", result
        said = [event.message for event in tasks.plugin.events if event.task_id == task.id]
        [message] = [text for text in said if "/data" in text]
        assert "/data is on overlay, which cannot be id-mapped on this machine" in message
        assert "user_namespacing = false" in message
        assert not any("/alloc" in text for text in said)
        task.destroy()


def test_operators_own_directory_for_changes(driver_file: Path, small: Path, tmp_path: Path) -> None:
    """It takes allocations whose directories cannot hold changes; what a crash of the machine has left there goes
    with the next start, and nothing else does."""
    scratch = tmp_path / "scratch"
    stale, others = scratch / "old-task.nspawn-root", scratch / "precious"
    (stale / "upper").mkdir(parents=True)
    others.mkdir()
    plugin = launch_like_agent(driver_file, {"ephemeral_dir": str(scratch)})
    with Tasks(plugin, small) as tasks:
        both = [tasks.start(f"touch /x; echo x; {FOREVER}", ephemeral=True) for _ in range(2)]
        for task in both:
            task.logmon.wait_for("x\n")
            assert not place(task).exists()
        found = sorted(path.name for path in scratch.iterdir())
        assert found == sorted(["precious", *(f"task-{task.allocation.id}.nspawn-root" for task in both)])
        assert all((path / "upper/x").exists() for path in scratch.glob("*.nspawn-root"))
        kill(shim(both[0]))
        third = tasks.start(FOREVER, ephemeral=True)
        assert (scratch / f"task-{both[0].allocation.id}.nspawn-root/upper/x").exists(), "in use by its container"
        for task in (*both, third):
            task.stop(timeout=0)
            task.destroy()
        assert [path.name for path in scratch.iterdir()] == ["precious"]
    plugin.kill()
    assert not plugin.violations


# -- layers --------------------------------------------------------------------------------------------------


def in_thread(work: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            enter_namespace()
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def test_many_layers(tmp_path: Path) -> None:
    """As images of a registry have them; the topmost wins, and whiteouts hide what is below."""
    layers: list[str] = []
    for number in range(120):
        layer = tmp_path / f"layer,with:colon{number}"
        (layer / "etc").mkdir(parents=True)
        (layer / f"only{number}").touch()
        (layer / "etc/all").write_text(str(number))
        layers.insert(0, str(layer))
    os.mknod(Path(layers[0], "only7"), stat.S_IFCHR, 0)
    os.chown(layers[0], 5, 6)
    state, changes = tmp_path / "state", tmp_path / "changes,too:"
    state.mkdir()
    changes.mkdir()

    def look() -> None:
        mount_root(PrivateRoot(tuple(layers), str(changes), IdRange(), is_mapped=True), 1 << 20, state)
        merged = state / "root"
        assert (merged / "etc/all").read_text() == "119"
        assert {path.name for path in merged.iterdir()} == {f"only{n}" for n in range(120) if n != 7} | {"etc"}
        assert (merged / "only3").stat().st_uid == 1 << 20
        assert (merged.stat().st_uid, merged.stat().st_gid) == ((1 << 20) + 5, (1 << 20) + 6)
        (merged / "only3").unlink()
        (merged / "etc/all").write_text("changed")

    in_thread(look)
    assert not list((state / "root").iterdir()), "mounted for the thread alone"
    assert (changes / "upper/etc/all").read_text() == "changed"
    assert Path(layers[0], "etc/all").read_text() == "119"
