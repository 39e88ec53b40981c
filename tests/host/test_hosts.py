# SPDX-License-Identifier: MPL-2.0
"""Parts of these tests on other hosts than this machine: see tests/hosts.py.

A row says which tests run on which kind of host; they are ordinary test files, and run on this machine too where
it has what they need. What fails in a host is this file's failure, with all its output.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import (
    ARCHITECTURE,
    BUILT,
    CONTAINER_IMAGE,
    LIBRARY_ROOT,
    SYSTEMD,
    Container,
    Host,
    Machine,
    make_snapshot,
    make_tree,
    open_host,
)

pytestmark = [pytest.mark.timeout(1800)]  # the first run makes the images


@dataclasses.dataclass(frozen=True)
class Part:
    """Tests for a kind of host."""

    kind: str  # container or machine
    files: str  # names in tests/, without test_ and .py
    only: str = ""  # as pytest's -k
    suites: tuple[str, ...] = tuple(SYSTEMD)
    timeout: float = 600

    @property
    def arguments(self) -> list[str]:
        """What pytest is started with."""
        paths = [f"tests/{name.replace('/', '/test_')}.py" for name in self.files.split()]
        return [*paths, *(["-k", self.only] if self.only else [])]


# What depends on systemd, or on what Python makes of archives, addresses and certificates; no packages.
IMAGES = "task or roots or user or harm or archive_may or stack or whiteout or tls or auth or taken_up"

# One row: everything takes ten times as long there, also each start of pytest and of a file's first plugin.
IN_MACHINES = "container/effects container/roots container/cgroup container/devices container/quota"
NEEDS_MACHINE = (
    "udev or of_ipc or test_cgroup or test_devices and (ephemeral or dead and not CAP)"
    " or test_roots and (changes or booted or looks or layers or volatile)"
    " or test_quota and (ext4 or xfs)"
)
NEWER = ("trixie", "sid")  # than 252
# The whole life of tasks on other systemds than this machine's; what systemd and its daemons have to do with them;
# and in a machine of its own only what a container does not have.
PARTS = (
    Part("container", "container/task", suites=NEWER),
    Part("container", "container/recover container/logs", suites=NEWER),
    Part("container", "container/exec", suites=NEWER),
    Part("container", "container/unit container/journal container/health", suites=NEWER),
    Part("container", "host/machined"),
    *([Part("container", "host/nomad", "not bridge")] if shutil.which("nomad") else []),
    Part("container", "container/effects", "not udev and not of_ipc", suites=NEWER),
    Part("container", "container/devices"),
    Part("container", "container/roots", "not file_system", suites=NEWER),
    Part("machine", IN_MACHINES, NEEDS_MACHINE, timeout=1200),
    Part("container", "container/reach"),
    Part("container", "container/store container/fetch container/oci", IMAGES, suites=NEWER),
)


def rows(kind: str) -> list[object]:
    return [
        pytest.param(suite, part, id=f"{suite}-{part.files}")
        for suite in SYSTEMD
        for part in PARTS
        if part.kind == kind and suite in part.suites
    ]


def check_host(host: Host, suite: str) -> None:
    """A host is what it says it is."""
    assert host.check("systemctl is-system-running").strip() == "running", host.check("systemctl --failed")
    version = host.check("systemctl --version").split()[1]
    assert SYSTEMD[suite] in (0, int(version.partition(".")[0]))
    if isinstance(host, Machine):
        controllers = host.check("cat /sys/fs/cgroup/cgroup.controllers").split()
        assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(controllers)
    assert "tasks can run here" in host.check("/checkout/nomad-driver-nspawn check", 120)


class Hosts:
    """Keeps one host at a time: the rows are sorted by release."""

    def __init__(self, kind: str) -> None:
        self.kind, self.suite = kind, ""
        self.opened: object = None

    def get(self, suite: str) -> Host:
        if suite != self.suite:
            self.close()
            self.context = open_host(self.kind, suite)
            self.host = self.context.__enter__()
            self.suite = suite
            check_host(self.host, suite)
        return self.host

    def close(self) -> None:
        if self.suite:
            self.suite = ""
            self.context.__exit__(None, None, None)


def want_image(suite: str, kind: str) -> None:
    """Make what is missing. Sid is what it is today: when it cannot be made, that is no fault of this checkout."""
    try:
        if kind == "machine":
            make_snapshot(suite)
        else:
            make_tree(suite)
    except Exception as error:
        if suite != "sid":
            raise
        pytest.skip(f"Debian sid cannot be made into a host today, so the newest systemd was NOT tested: {error}")


@pytest.fixture(scope="module")
def containers() -> Iterator[Hosts]:
    hosts = Hosts("container")
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def machines() -> Iterator[Hosts]:
    if ARCHITECTURE != "amd64":
        pytest.skip(f"virtual machines are made for x86_64 only, so nothing is tested in one on {ARCHITECTURE}")
    hosts = Hosts("machine")
    yield hosts
    hosts.close()


def run_part(host: Host, part: Part) -> None:
    """Run tests in a host. Few that fail there get a second try, alone: a host shares two cores with all that
    runs beside it, and what it is late with is no fault of the driver's. What needed a second try is printed."""
    result = host.pytest(*part.arguments, "--timeout=300", timeout=part.timeout)
    print(result.output)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::[^\s\[]+(?:\[.*?\])?)(?: - |$)", result.output, re.MULTILINE)
    if result.code == 1 and 0 < len(failed) <= SECOND_TRIES:
        print(f"once more, in {host}: {failed}")
        result = host.pytest(*failed, "--timeout=300", timeout=part.timeout)
        print(result.output)
    assert result.code == 0, f"in {host}: {'it took too long' if result.code is None else result.code}"


SECOND_TRIES = 2  # tests of a row


@pytest.mark.parametrize("suite, part", rows("container"))
def test_in_container(driver_file: Path, containers: Hosts, suite: str, part: Part) -> None:
    want_image(suite, "container")
    run_part(containers.get(suite), part)


@pytest.mark.parametrize("suite, part", rows("machine"))
def test_in_machine(driver_file: Path, machines: Hosts, suite: str, part: Part) -> None:
    want_image(suite, "machine")
    run_part(machines.get(suite), part)


@pytest.mark.parametrize("suite", SYSTEMD)
def test_tasks_of_a_host_that_reboots(driver_file: Path, suite: str) -> None:
    want_image(suite, "container")
    unit = "systemd-run --quiet --pipe --wait --collect -pKillMode=process -pWorkingDirectory=/checkout"
    host = Container(suite)
    with host:
        for half in ("before", "after"):
            arguments = f"Path('{BUILT}'), Path('{CONTAINER_IMAGE}')"
            code = f"from tests.container.test_recover import *; {half}_reboot({arguments})"
            host.check(f'{unit} -EPYTHONPATH={LIBRARY_ROOT} -EPYTHONDONTWRITEBYTECODE=1 python3 -c "{code}"', 120)
            if half == "before":
                assert "task-" in host.check("machinectl list")
                host.reboot()


# -- the hosts themselves ------------------------------------------------------------------------------------


def test_output_and_exit_code_come_back(containers: Hosts) -> None:
    host = containers.get("bookworm")
    result = host.sh("echo out; echo err >&2; exit 7")
    assert (result.code, result.output) == (7, "out\nerr\n")
    assert host.sh("sleep 60", timeout=0.5).code is None


def test_a_failing_and_a_skipped_test_in_a_host_are_failures(containers: Hosts) -> None:
    host = containers.get("bookworm")
    for body in ("assert False", "import pytest; pytest.skip('no')"):
        host.check(f"echo 'def test_it():\n    {body}' > /tmp/test_made_up.py")
        assert host.pytest("-c/dev/null", "-p", "tests.conftest", "/tmp/test_made_up.py", timeout=60).code == 1
    host.check("echo 'def test_it(): pass' > /tmp/test_made_up.py")
    assert host.pytest("-c/dev/null", "-p", "tests.conftest", "/tmp/test_made_up.py", timeout=60).code == 0


def test_images_are_not_changed_by_hosts(containers: Hosts) -> None:
    """Everything a host writes is gone with it."""
    tree = make_tree("bookworm")
    containers.get("bookworm").check("touch /usr/changed /etc/changed /root/changed")
    assert not any((tree / place / "changed").exists() for place in ("usr", "etc", "root"))
