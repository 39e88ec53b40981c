# SPDX-License-Identifier: MPL-2.0
"""What all tests share: the built file, the image, a running plugin.

`sh build.sh test` builds the file and makes the image; without them the tests that need them fail and say so,
they are never silently skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.agent import Plugin, launch_like_agent
from tests.built import find_changed
from tests.containers import Tasks, make_small_image
from tests.servers import (
    FileServer,
    Liar,
    pack_tree,
)

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped counts as failed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by directory: tests/unit is for anybody, all others are for root."""
    for item in items:
        if ROOT / "tests/unit" not in item.path.parents:
            item.add_marker("root")


def pytest_runtest_setup(item: pytest.Item) -> None:
    assert os.geteuid() == 0 or not item.get_closest_marker("root"), "this test needs root"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.config.getoption("--no-skips") and report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped where it should run: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def driver_file() -> Path:
    """The built plugin file, which must be made of the sources beside it. $NSPAWN_TEST_DRIVER names any other."""
    if named := os.environ.get("NSPAWN_TEST_DRIVER"):
        assert Path(named).is_file(), f"NSPAWN_TEST_DRIVER = {named}: there is no such file"
        return Path(named)
    path = ROOT / "nomad-driver-nspawn"
    assert path.is_file(), f"{path} is not there: run `sh build.sh` first, or `sh build.sh test` for everything"
    changed = find_changed(path, ROOT)
    assert not changed, (
        f"{path} is made of other sources, so run `sh build.sh` first; changed: {', '.join(changed)}"
    )
    return path


@pytest.fixture(scope="session")
def image() -> Path:
    """A directory with a small Debian that has systemd in it."""
    path = Path(os.environ.get("NSPAWN_TEST_IMAGE", "/var/cache/nomad-driver-nspawn-tests/debian-bookworm"))
    assert shutil.which("systemd-nspawn"), "systemd-nspawn is missing: install systemd-container"
    assert (path / "usr").is_dir(), f"{path} is not there: `sh build.sh test` makes it"
    return path


@pytest.fixture(scope="session")
def archive(image: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tar archive of a small system: a shell and a few programs."""
    tree = tmp_path_factory.mktemp("small") / "tree"
    make_small_image(image, tree, ["dash", "cat", "sleep", "ls", "touch", "id", "getent", "echo"])
    return pack_tree(tree)


@pytest.fixture
def plugin(driver_file: Path) -> Iterator[Plugin]:
    """A plugin as a running agent has it; at the end it is stopped, and must not have broken any rule."""
    with launch_like_agent(driver_file) as running:
        yield running
    assert not running.violations


@pytest.fixture(scope="module")
def shared(driver_file: Path) -> Iterator[Plugin]:
    """The same for all tests of a module, which leave it as it is. Jobs may use every option."""
    with launch_like_agent(driver_file, 'allow = ["all"]') as running:
        yield running
        assert not running.exited()
    assert not running.violations


@pytest.fixture
def tasks(shared: Plugin, image: Path) -> Iterator[Tasks]:
    """Makes tasks; at the end nothing may be left of them."""
    with Tasks(shared, image) as made:
        yield made
    violations, shared.violations = shared.violations, []
    assert not violations


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def liar() -> Iterator[Liar]:
    with Liar() as running:
        yield running
