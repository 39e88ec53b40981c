# SPDX-License-Identifier: MPL-2.0
"""Random rounds, see tests/chaos: nothing is lost and nothing is left, whatever happens to a task and its host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

ROUNDS = 100


def test_random_rounds(driver_file: Path, image: Path) -> None:
    """A failed round shows its seed: `sh build.sh chaos --seed S` runs it again."""
    command = [sys.executable, "-m", "tests.chaos", str(ROUNDS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout
