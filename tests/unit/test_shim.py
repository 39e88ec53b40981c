# SPDX-License-Identifier: MPL-2.0
"""The shim, without a container: in every shell that a host may have as sh."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nspawn.process import read_stat
from nspawn.record import read_record, reserve_room
from tests.agent import HANG
from tests.containers import eventually

SHIM = (Path(__file__).parents[2] / "nspawn/shim.sh").read_text()
SHELLS = {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "sh"]}
FOUND = {name: argv for name, argv in SHELLS.items() if shutil.which(argv[0])}


class Shim:
    """One whose nspawn is a shell script. `out` and `err` are its log pipes, which nobody reads."""

    def __init__(self, shell: list[str], directory: Path, script: str, how: str) -> None:
        self.directory = directory
        reserve_room(directory)
        os.mkfifo(directory / "console")
        pipes = []
        for name in ("out", "err"):
            os.mkfifo(directory / name)
            pipes.append(os.open(directory / name, os.O_RDWR))
        argv = [*shell, "-c", SHIM, "shim", str(directory), "", how, "sh", "-c", script]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=pipes[0], stderr=pipes[1], start_new_session=True
        )
        for pipe in pipes:
            os.close(pipe)

    def go(self) -> int:
        assert self.process.stdin
        self.process.stdin.write(b"go\n")
        self.process.stdin.close()
        return self.process.wait(HANG)

    def read(self, name: str) -> bytes:
        """What is in a pipe after the shim's end. Waits for the first bytes."""
        fd = os.open(self.directory / name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert select.select([fd], [], [], HANG)[0], f"nothing is in {name}"
            return os.read(fd, 1 << 16)
        finally:
            os.close(fd)

    def list_files(self) -> list[str]:
        """What the shim has open."""
        found = []
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed by now
                found.append(os.readlink(entry))
        return found

    def find_others(self) -> list[str]:
        """The commands of its session that still run."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            fields = read_stat(entry.name)
            if fields and fields[0] != "Z" and int(fields[3]) == self.process.pid:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended by now
                    found.append((entry / "comm").read_text().strip())
        return found


@pytest.fixture(params=list(FOUND.values()), ids=list(FOUND))
def shell(request: pytest.FixtureRequest) -> list[str]:
    found: list[str] = request.param
    return found


@pytest.fixture
def shims(tmp_path: Path) -> Iterator[list[Shim]]:
    made: list[Shim] = []
    yield made
    for shim in made:
        try:
            os.killpg(shim.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.parametrize("how", ["", "filter"])
def test_code_and_last_words_outlive_the_shim(
    shell: list[str], shims: list[Shim], tmp_path: Path, how: str
) -> None:
    if how and shell[0] == "busybox":
        pytest.skip("its own sed, which it prefers, has no -u; hosts have that of GNU")
    shim = Shim(shell, tmp_path, "printf 'out\\r\\n'; echo err >&2; exit 42", how)
    shims.append(shim)
    assert read_record(tmp_path) is None
    shim.go()
    record = read_record(tmp_path)
    assert record and (record.status, record.is_orphaned) == (42, False)
    wanted = b"out\n" if how else b"out\r\n"
    assert (shim.read("out"), shim.read("err")) == (wanted, b"err\n")


def test_nothing_has_happened_if_nobody_says_go(shell: list[str], shims: list[Shim], tmp_path: Path) -> None:
    shim = Shim(shell, tmp_path, f"touch {tmp_path}/started", "filter")
    shims.append(shim)
    assert shim.process.stdin
    shim.process.stdin.close()
    assert shim.process.wait(HANG) == -signal.SIGKILL
    assert read_record(tmp_path) is None
    eventually(lambda: not shim.find_others())  # the filter sees the end of what it reads
    assert not (tmp_path / "started").exists()


def test_nspawn_gets_nothing_of_the_shims(shell: list[str], shims: list[Shim], tmp_path: Path) -> None:
    shim = Shim(shell, tmp_path, f"ls -l /proc/self/fd >{tmp_path}/descriptors", "")
    shims.append(shim)
    shim.go()
    names = [line.split()[8] for line in (tmp_path / "descriptors").read_text().splitlines()[1:]]
    assert names == ["0", "1", "2", "3"]  # 3 is what ls itself reads


def test_record_whose_path_leads_nowhere(shell: list[str], shims: list[Shim], tmp_path: Path) -> None:
    """As on a file system that has become read-only: the record goes to the file that was there at the start."""
    shim = Shim(shell, tmp_path, "exit 42", "")
    shims.append(shim)
    kept = tmp_path / "kept"
    kept.mkdir()
    eventually(lambda: str(tmp_path / "exit") in shim.list_files())
    (tmp_path / "exit").rename(kept / "exit")
    (tmp_path / "exit").mkdir()
    shim.go()
    record = read_record(kept)
    assert record and record.status == 42


def test_record_of_a_directory_that_was_made_anew(shell: list[str], shims: list[Shim], tmp_path: Path) -> None:
    shim = Shim(shell, tmp_path, "exit 42", "")
    shims.append(shim)
    eventually(lambda: str(tmp_path / "exit") in shim.list_files())
    for name in ("exit", "notes", "nspawn.log"):
        (tmp_path / name).unlink()
    reserve_room(tmp_path)
    shim.go()
    record = read_record(tmp_path)
    assert record and record.status == 42
