# SPDX-License-Identifier: MPL-2.0
"""What only tests of fetching share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fetching import Fetcher


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    """Fetches images as the plugin does, into a store of its own."""
    return Fetcher(tmp_path / "store")
