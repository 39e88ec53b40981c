# SPDX-License-Identifier: MPL-2.0
"""Attacks of people who may submit jobs, of what runs in a container, of images and of registries.

Each is as short as it can be, and runs under the strictest plugin block. A race is repeated: RACES says how often
here, `NSPAWN_TEST_RACES=1000` for as often as one wants. Nothing in here may ever succeed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent import DriverError, Plugin, launch_like_agent
from tests.containers import Tasks, eventually, leader, make_small_image, output

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


# -- exec ----------------------------------------------------------------------------------------------------


# -- images and directories ----------------------------------------------------------------------------------


# -- registries, archives and addresses ----------------------------------------------------------------------


# -- options, permissions and names --------------------------------------------------------------------------


# -- environment and users -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Path:
    """An image_dir with one small image."""
    folder = tmp_path_factory.mktemp("machines")
    make_small_image(image, folder / "small", ["dash", "cat", "id", "ls", "sleep"])
    return folder


@pytest.fixture(scope="module")
def strict_machines(driver_file: Path, machines: Path) -> Iterator[Plugin]:
    with launch_like_agent(driver_file, f'{STRICT}image_dir = "{machines}"\n') as running:
        yield running
    assert not running.violations


@pytest.fixture
def guests(strict_machines: Plugin) -> Iterator[Tasks]:
    with Tasks(strict_machines, Path("small")) as made:
        yield made


APART: dict[str, Any] = {"network_veth": None, "private_network": True}  # the host's network is not for them

# What acts on the loader, libc, systemd, sh, Python and the tools that run as root of the host around a container.
STEERING = """
    LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT SYSTEMD_LOG_LEVEL SYSTEMD_NSPAWN_LOCK SYSTEMD_SECCOMP LISTEN_FDS
    NOTIFY_SOCKET GCONV_PATH GLIBC_TUNABLES LOCPATH TZ HOSTALIASES XTABLES_LIBDIR OPENSSL_CONF PATH HOME TMPDIR
    LIBMOUNT_FSTAB BASH_ENV ENV IFS PS4 SHELLOPTS PYTHONPATH PYTHONSTARTUP keeper_state NOTHING_SPECIAL
""".split()  # noqa: SIM905 # a list of words reads better


@contextlib.contextmanager
def watch_host(secret: str) -> Iterator[list[str]]:
    """Look for a text in all that /proc shows of processes, but those of containers; yield where it was."""
    seen: list[str] = []
    over = threading.Event()
    own = os.readlink("/proc/self/ns/pid")

    def look() -> None:
        while not over.is_set():
            for entry in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    if secret.encode() in text and os.readlink(entry / "ns/pid") == own:
                        seen.append(text.decode(errors="replace"))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


@pytest.mark.parametrize("end", ["", "\n"], ids=["plain", "lines"])
def test_no_value_reaches_a_process_of_root(guests: Tasks, end: str) -> None:
    """Command lines and, with the right name, variables act on root's processes; others can read command lines."""
    secret = f"hunter{uuid.uuid4().hex}"
    variables = {name: f"/{secret}{end}" for name in STEERING}
    with watch_host(secret) as seen:
        for _ in range(max(RACES // 10, 1)):
            task = guests.start(["/bin/sleep", "600"], env=variables, process_two=True, **APART)
            given = f"LD_PRELOAD=/{secret}{end}\0".encode()
            eventually(lambda: given in task.exec(["/bin/cat", "/proc/2/environ"])[0])  # noqa: B023 # at once
            assert secret.encode() not in Path(f"/proc/{leader(task)}/environ").read_bytes(), "nspawn's stub"
            task.destroy()
    assert not seen


def test_names_of_variables_make_no_others(guests: Tasks) -> None:
    names = (
        "A\nLD_PRELOAD",
        "A=LD_PRELOAD",
        "A\0B",
        "",
        " ",
        "LD_PRELOAD ",
        "\nLD_PRELOAD",
        "A\r\n[Exec]\r\nUser",
    )
    variables = dict.fromkeys(names, "/evil") | {"GOOD": "x"}
    task, result = guests.run(["cat", "/proc/self/environ"], env=variables, **APART)
    assert result.successful
    assert "/evil" not in output(task) and "GOOD=x\0" in output(task)


@pytest.mark.parametrize("kind", ["fifo", "link out", "device", "huge", "odd lines", "directory"])
def test_image_with_a_passwd_that_misleads(guests: Tasks, machines: Path, tmp_path: Path, kind: str) -> None:
    """What is not a line of a file in the image is no user; a number is one all the same."""
    name = f"passwd-{kind}"
    shutil.copytree(machines / "small", machines / name, symlinks=True)
    passwd, root = machines / name / "etc/passwd", "victim:x:0:0::/:\n"
    passwd.unlink(missing_ok=True)
    (tmp_path / "outside").write_text(root)
    if kind == "fifo":
        os.mkfifo(passwd)
    elif kind == "link out":
        passwd.symlink_to(tmp_path / "outside")
    elif kind == "device":
        os.mknod(passwd, 0o20666, os.makedev(1, 5))  # zero
    elif kind == "huge":
        passwd.write_text("first:x:7:8::/:\n")
        os.truncate(passwd, 1 << 30)
    elif kind == "odd lines":
        odd = ("victim", "victim:x:", "victim:x:-1:0::/:", "victim:x:0x0:0::/:", "victim:x:4294967296:0::/:",
               "victim:x:65535:65535::/:", f"a\x0b{root}", f"a\x85{root}", f"\u2028{root}")  # fmt: skip
        passwd.write_text("\n".join(odd))
    else:
        passwd.mkdir()
    options = {"image": name, "volatile": "overlay", **APART}

    def ids(user: str) -> list[str]:
        task, _ = guests.run(["cat", "/proc/self/status"], **options, user=user)
        return re.findall(r"^[UG]id:\t(\d+)", output(task), re.MULTILINE)

    assert ids("1234") == ["1234", "0"]
    with contextlib.suppress(DriverError):  # systemd 257 and later fail when the container is up
        assert ids("victim") == []
    if kind == "huge":
        assert ids("first") == ["7", "8"]


@pytest.mark.parametrize(
    "user", ["a\nb", "root\n", "a:b", "0:0", "-x", "a b", "../x", "65535", "065535", "4294967295", "4294967296"]
)
def test_user_that_is_none(guests: Tasks, user: str) -> None:
    """systemd takes some numbers for "none", which for a payload would be root."""
    for given in ({"user": user}, {"options": {"user": user}}):
        with pytest.raises(DriverError, match="user = "):
            guests.start(["id"], **given, **APART)


def test_settings_files_are_not_read(guests: Tasks, machines: Path) -> None:
    """One beside the image comes with it; others are for machines that somebody starts by hand."""
    script = "echo ${FROM_FILE:-none}; id -u; ls -A /mnt"
    task = guests.make(script, **APART)
    names = (f"task-{task.allocation.id}", "small")
    folders = (machines, Path("/run/systemd/nspawn"), Path("/etc/systemd/nspawn"))
    files = [folder / f"{name}.nspawn" for folder in folders for name in names]
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("[Exec]\nEnvironment=FROM_FILE=1\nUser=daemon\n[Files]\nBind=/etc:/mnt\n")
        task.start()
        assert task.wait(60).successful
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    assert output(task) == "none\n0\n"
