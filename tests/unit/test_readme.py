# SPDX-License-Identifier: MPL-2.0
"""The manual says what the code does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import driver
from nspawn.common import PLUGIN_NAME
from tests.agent import parse_job

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_readme_holds_the_reference_byte_for_byte(driver_file: Path) -> None:
    printed = subprocess.run(
        [driver_file, "options"], capture_output=True, check=True, text=True, timeout=60
    ).stdout
    assert f"-->\n\n{printed}\n<!--" in README, "the README's reference is old: run `sh build.sh reference`"


def test_readme_and_example_agree_on_the_plugin_block() -> None:
    for text in (README, (ROOT / "example/config.hcl").read_text()):
        assert f'plugin "{driver.FILE_NAME}" {{' in text


def test_readme_names_files_that_exist() -> None:
    for name in re.findall(r"\b(?:example|tests)/[\w./-]+", README):
        assert (ROOT / name).exists(), name


def test_every_option_has_a_sentence() -> None:
    for option in (*driver.TASK_OPTIONS, *driver.PLUGIN_OPTIONS):
        assert option.doc.endswith("."), option.name


def test_example_jobs_use_this_driver() -> None:
    jobs = sorted((ROOT / "example").rglob("*.hcl"))
    assert len(jobs) >= 4
    for path in jobs:
        if path.name not in ("config.hcl", "hardened.hcl"):
            parse_job(path)
            assert f'driver = "{PLUGIN_NAME}"' in path.read_text()
