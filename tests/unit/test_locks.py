# SPDX-License-Identifier: MPL-2.0
"""A lock of an image that somebody looks at is not one that somebody holds."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from nspawn import roots
from nspawn.common import TransientError
from nspawn.images import Image
from nspawn.linux import take_lock


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
