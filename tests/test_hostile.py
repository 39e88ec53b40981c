# SPDX-License-Identifier: MPL-2.0
"""Attacks of people who may submit jobs, of what runs in a container, of images and of registries.

Each is as short as it can be, and runs under the strictest plugin block. A race is repeated: RACES says how often
here, `NSPAWN_TEST_RACES=1000` for as often as one wants. Nothing in here may ever succeed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import driver
from tests.agent import Allocation, DriverError, Plugin, launch_like_agent
from tests.containers import Tasks, make_small_image, output

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


PROGRAMS = ["dash", "cat", "ls", "touch", "chmod", "mkdir", "sleep"]


@pytest.fixture
def images(driver_file: Path, image: Path, tmp_path: Path) -> Iterator[Tasks]:
    """Tasks under the strictest block, and the operator's image_dir with one image in it, `small`."""
    small = tmp_path / "images/small"
    make_small_image(image, small, PROGRAMS)
    with launch_like_agent(driver_file, f'{STRICT}image_dir = "{small.parent}"\n') as plugin:
        with Tasks(plugin, small) as made:
            yield made
        assert not plugin.exited()
        assert not plugin.violations


def exchange(path: Path, other: Path) -> None:
    driver.call_libc("renameat2", driver.AT_FDCWD, os.fsencode(path), driver.AT_FDCWD, os.fsencode(other), 2)


@contextlib.contextmanager
def exchanging(path: Path, other: Path) -> Iterator[None]:
    """Exchange two names, over and over, as whoever may write to their directories can."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(0.0005):
            exchange(path, other)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def try_to_print(tasks: Tasks, script: str, one: Path, other: Path, **settings: Any) -> str:
    """What a script prints, "" when its task is refused, or fails; two names are exchanged during its start."""
    wait = "while ! [ -e /secrets/go ]; do sleep 0.01; done;"
    task = tasks.make(f"{wait} {script}", private_network=True, **settings)
    task.prestart()  # the agent's own part
    (task.dir / "secrets/go").unlink(missing_ok=True)
    try:
        with exchanging(one, other), unittest.mock.patch.object(task, "prestart"):
            task.start()
        if one.is_symlink():
            exchange(one, other)
        (task.dir / "secrets/go").touch()
        task.wait(60)
        return output(task)
    except DriverError:
        return ""
    finally:
        if one.is_symlink():
            exchange(one, other)
        task.close()


@pytest.mark.parametrize("options", [{"read_only": True}, {"ephemeral": True}, {"volatile": "overlay"}])
def test_image_is_exchanged_with_the_hosts_root(
    images: Tasks, image: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Whoever may write to an image can exchange what is in it, also while a start looks at it."""
    inner = images.image / "srv/x"
    make_small_image(image, inner, PROGRAMS)
    (inner / "marker").touch()
    link = images.image / "srv/link"
    link.symlink_to("/")
    for _ in range(RACES // 3 + 1):
        seen = try_to_print(images, "cat /marker && echo own; ls /", inner, link, image=str(inner), **options)
        assert not seen or seen.startswith("own\n"), seen


def test_file_system_put_into_a_shared_image(images: Tasks) -> None:
    """A job may write a disk image into an image, and name it: the kernel would read its file system."""
    (images.image / "srv").mkdir()
    (images.image / "srv/e.raw").write_bytes(bytes(1 << 20))
    with pytest.raises(DriverError, match=r'allow = \["disk_images"\]'):
        images.start("true", image=str(images.image / "srv/e.raw"), private_network=True, read_only=True)


@pytest.mark.parametrize("name", ["alloc/logs", "alloc", "task/local"])
def test_directory_of_a_task_is_exchanged_with_one_of_the_host(images: Tasks, tmp_path: Path, name: str) -> None:
    """Another task of the allocation, or of another driver, may be able to."""
    secret = tmp_path / "secret"
    (secret / "of-the-host/logs").mkdir(parents=True)
    script = "for i in /alloc /alloc/logs /local; do ls $i; done"
    with Allocation() as allocation:
        link = allocation.dir / "link"
        link.symlink_to(secret)
        for _ in range(RACES // 3 + 1):
            seen = try_to_print(images, script, allocation.dir / name, link, allocation=allocation)
            assert "of-the-host" not in seen
        link.unlink()


def fingerprint(root: Path) -> list[tuple[str, int, int, int, int]]:
    """What would differ if anybody had written to an image."""
    found = []
    for folder, names, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in (*names, *files))):
            status = os.lstat(path)
            found.append((path, status.st_uid, status.st_gid, status.st_mode, status.st_ctime_ns))
    return sorted(found)


WRITE = "touch /written /usr/written /etc/passwd; mkdir /etc/new; chmod 700 /usr; echo x >/etc/group; echo done"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"read_only": None},
        {"read_only": True, "extra_hosts": ["a:10.0.0.1"]},
        {"ephemeral": True},
        {"volatile": "yes"},
        {"volatile": "state"},
        {"volatile": "overlay"},
        {"private_users_ownership": "auto", "read_only": None},
        {"tmpfs": ["/new-place"], "read_only": None},
        {"bind": [{"local": "/another-place"}], "read_only": None},
    ],
    ids=str,
)
def test_no_task_changes_an_image_that_others_run_from(images: Tasks, options: dict[str, Any]) -> None:
    before = fingerprint(images.image)
    task, _ = images.run(WRITE, private_network=True, **options)
    assert output(task) == "done\n"
    assert fingerprint(images.image) == before


@pytest.mark.parametrize(
    "options", [{"private_users_ownership": "chown", "read_only": None}, {"bind": [{"IMAGES": "/mnt"}]}], ids=str
)
def test_writing_to_images_takes_a_permission(
    driver_file: Path, image: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Also where jobs may mount what the images lie in."""
    small = tmp_path / "images/small"
    make_small_image(image, small, PROGRAMS)
    before = fingerprint(small)
    if "bind" in options:
        options = {"bind": [{str(small.parent): "/mnt"}]}
    block = f'allow = []\nallow_paths = ["{tmp_path}"]\nimage_dir = "{small.parent}"\n'
    refused = pytest.raises(DriverError, match=r'allow = \["image_write"\]')
    with launch_like_agent(driver_file, block) as plugin, Tasks(plugin, small) as tasks, refused:
        tasks.start("true", private_network=True, **options)
    assert fingerprint(small) == before


def test_image_with_endless_links_for_its_init(images: Tasks) -> None:
    (images.image / "usr/lib/systemd").mkdir(parents=True, exist_ok=True)
    deep = images.image / "/".join(["d" * 10] * 100)
    deep.mkdir(parents=True)
    for number in range(60):
        (images.image / f"l{number}").symlink_to("/".join(["d" * 10] * 100 + [".."] * 100 + [f"l{number + 1}"]))
    (images.image / "usr/lib/systemd/systemd").symlink_to("/l0")
    with pytest.raises(DriverError, match="the image has no init"):
        images.start([], boot=True, private_network=True, read_only=True)


def test_pipe_for_what_the_driver_reads(images: Tasks) -> None:
    """To open one would be to wait for ever, with all tasks."""
    hosts = images.image / "etc/hosts"
    hosts.unlink(missing_ok=True)
    os.mkfifo(hosts)
    task, _ = images.run("echo done", private_network=True, extra_hosts=["a:10.0.0.1"])
    assert output(task) == "done\n"


# -- registries, archives and addresses ----------------------------------------------------------------------


# -- options, permissions and names --------------------------------------------------------------------------


# -- environment and users -----------------------------------------------------------------------------------
