# SPDX-License-Identifier: MPL-2.0
"""What only tests of fetching share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nspawn.store import STORE_ROOT, Store
from tests.fetching import Fetcher


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    """Fetches images as the plugin does, into a store of its own."""
    return Fetcher(tmp_path / "store")


@pytest.fixture
def store() -> Iterator[Store]:
    """A store of the test's own, on the disk of the real one."""
    disk = STORE_ROOT if STORE_ROOT.is_mount() else STORE_ROOT.parent
    with tempfile.TemporaryDirectory(prefix=f"{STORE_ROOT.name}-", dir=disk) as root:
        yield Store(Path(root))
