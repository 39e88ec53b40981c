# SPDX-License-Identifier: MPL-2.0
"""Attacks of people who may submit jobs, of what runs in a container, of images and of registries.

Each is as short as it can be, and runs under the strictest plugin block. A race is repeated: RACES says how often
here, `NSPAWN_TEST_RACES=1000` for as often as one wants. Nothing in here may ever succeed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent import Plugin, launch_like_agent
from tests.containers import Tasks

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
