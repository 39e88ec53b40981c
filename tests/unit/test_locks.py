# SPDX-License-Identifier: MPL-2.0
"""The lock files of images and of ranges of ids: who holds one, and what is removed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nspawn import roots, state
from nspawn.common import TransientError
from nspawn.images import Image
from nspawn.linux import take_lock
from nspawn.process import ProcessId


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    monkeypatch.setattr(roots, "SETTINGS_ROOT", tmp_path / "run")
    (tmp_path / "image").mkdir()
    return Image(tmp_path / "image", True)


def hold(image: Image) -> int:
    """The lock as a container that may write to the image has it, and for a moment who removes its file."""
    found = image.path.stat()
    fd = take_lock(image.path.parent / f"run/locks/inode-{found.st_dev}:{found.st_ino}", fcntl.F_WRLCK)
    assert fd is not None
    return fd


def test_lock_held_for_a_moment_refuses_no_start(image: Image) -> None:
    """An ended task's locks are removed while the next task of the image starts."""
    threading.Timer(0.05, os.close, [hold(image)]).start()
    fd = roots.lock_image(image)
    assert fd is not None
    os.close(fd)


def test_image_that_another_container_may_write_to_is_busy(image: Image) -> None:
    held = hold(image)
    with pytest.raises(TransientError, match="in use by another container"):
        roots.lock_image(image)
    os.close(held)


# -- removal -------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Of images and of ranges of ids."""
    monkeypatch.setattr(state, "SETTINGS_ROOT", tmp_path)
    monkeypatch.setattr(state, "UID_LOCKS", tmp_path / "uid")
    return tmp_path / "locks", tmp_path / "uid"


@pytest.mark.parametrize("kind", [fcntl.F_RDLCK, fcntl.F_WRLCK])
def test_locks_that_nobody_holds_are_removed(places: tuple[Path, Path], kind: int) -> None:
    """Whosever they were: a plugin that is killed while it takes one can tell nobody."""
    images, ids = places
    left = [images / "inode-5:6", images / "block-7:0", ids / "524288"]
    kept = [images / "inode-5:7", ids / "589824"]
    for fd in [take_lock(path, kind) for path in left]:
        assert fd is not None
        os.close(fd)
    held = [take_lock(path, kind) for path in kept]
    others = [images / "notes", ids / "524288.txt"]
    for path in others:
        path.touch()
    (ids / "655360").symlink_to(others[0])
    os.mkfifo(ids / "720896")
    state.remove_locks(())
    assert {*images.iterdir(), *ids.iterdir()} == {*kept, *others, ids / "655360", ids / "720896"}
    for fd in held:
        assert fd is not None
        os.close(fd)
    state.remove_locks(())
    assert not any(path.exists() for path in kept), "the next look finds what was held at the last"


def test_lock_of_another_file_with_the_name_stays(places: tuple[Path, Path]) -> None:
    """While it is opened, somebody removes it and somebody else takes it anew."""
    path = places[1] / "524288"
    path.parent.mkdir()
    path.touch()
    lease, taken = os.open(path, os.O_RDONLY), []

    def exchange(*_: object) -> None:
        """Comes when it is opened for writing, which the lease holds up."""
        path.unlink()
        taken.append(take_lock(path, fcntl.F_WRLCK))
        fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    before = signal.signal(signal.SIGIO, exchange)
    try:
        fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        state.remove_locks([str(path)])
    finally:
        signal.signal(signal.SIGIO, before)
        os.close(lease)
    assert taken and path.exists()
    os.close(taken[0] or -1)


@pytest.fixture
def restless(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Holds a lock's file and opens and closes another all the time, as nspawn does when it starts."""
    script = f"exec 7<>{tmp_path}/.#image.lck; echo; while :; do exec 8<{tmp_path}; exec 8<&-; done"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        yield process
        process.kill()


def test_lock_of_a_process_that_closes_other_files(restless: subprocess.Popen[bytes], tmp_path: Path) -> None:
    found = ProcessId.of(restless.pid)
    assert found
    seen = {state.find_locks(found, f"{tmp_path}/image") for _ in range(2000)}
    assert seen == {(f"{tmp_path}/.#image.lck",)}
