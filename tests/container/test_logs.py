# SPDX-License-Identifier: MPL-2.0
"""A task's output on its way to Nomad: every byte, each stream by itself, and nobody else's."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.agent import HANG, MIB, DriverError
from tests.containers import Tasks, eventually, is_alive, leader, output
from tests.leftovers import leftovers

FIFOS = {"stdout": ".task.stdout.fifo", "stderr": ".task.stderr.fifo"}
MODES = [{}, {"process_two": True}, {"user_namespacing": False}]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- every byte ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=["command", "process_two", "no namespaces"])
def test_both_streams_are_byte_exact(tasks: Tasks, mode: dict[str, Any]) -> None:
    """All byte values, at once through both, with what a terminal would change."""
    data = {"out": os.urandom(MIB) + b"\r\n\0\x1b[31m\x04", "err": os.urandom(MIB) + b"\n\r"}
    task = tasks.make("cat /local/out & cat /local/err >&2; wait", **mode)
    for name, content in data.items():
        (task.dir / "local" / name).write_bytes(content)
    task.start()
    assert task.wait().successful
    task.logmon.wait_eof()
    assert digest(task.logmon.stdout) == digest(data["out"])
    assert digest(task.logmon.stderr) == digest(data["err"])


def test_a_task_that_says_nothing_writes_nothing(tasks: Tasks) -> None:
    """Not a word of nspawn's own."""
    task, _ = tasks.run("true")
    task.logmon.wait_eof()
    assert (task.logmon.stdout, task.logmon.stderr) == (b"", b"")


def test_last_words_are_complete(tasks: Tasks) -> None:
    """The agent stops reading about two seconds after WaitTask has answered."""
    for code in range(5):
        task, result = tasks.run(f"head -c {MIB} /dev/zero; echo last words >&2; exit {code}")
        assert result.exit_code == code
        task.logmon.wait_eof(2)
        assert len(task.logmon.stdout) == MIB
        assert task.logmon.stderr == b"last words\n"


def test_streams_end_with_the_task(tasks: Tasks) -> None:
    """A writer that stays would keep the agent's log collector, and the next start of the task, waiting."""
    task = tasks.start("while :; do echo x; sleep 0.1; done")
    task.logmon.wait_for("x\n")
    task.stop(timeout=0)
    task.logmon.wait_eof(1)


def test_background_processes_do_not_keep_the_streams_open(tasks: Tasks) -> None:
    task, result = tasks.run("setsid sleep 600 & sleep 0.1; exit 3")
    assert result.exit_code == 3
    task.logmon.wait_eof(1)


def test_programs_may_open_their_streams_by_name(tasks: Tasks) -> None:
    """As nginx and many others do; for the container's root, whom the log FIFOs belong to."""
    script = "sleep 0.3; echo out > /dev/stdout; echo err > /dev/stderr; echo again >> /proc/self/fd/1"
    for namespaces in (True, False):
        task, result = tasks.run(script, user_namespacing=namespaces)
        assert result.successful, task.logmon.stderr
        assert output(task) == "out\nagain\n"
        assert task.logmon.stderr == b"err\n"


# -- readers that come and go --------------------------------------------------------------------------------


def test_nothing_is_lost_while_nobody_reads(tasks: Tasks) -> None:
    """The log collector goes away and comes back with every restart of the agent."""
    script = 'i=0; while [ $i -lt 40000 ]; do echo "line $i of many"; i=$((i+1)); done; sleep 1'
    task = tasks.start(script)
    task.logmon.wait_for("line 100 ")
    for pause in (0.2, 0.5):
        task.logmon.stop(0)
        time.sleep(pause)
        task.logmon.restart()
        time.sleep(0.1)
    assert task.wait().successful
    task.logmon.wait_eof()
    lines = task.logmon.stdout.decode().splitlines()
    # A reader that is closed takes what it has read; what the agent's reader loses then is not the driver's.
    assert lines == [f"line {number} of many" for number in range(40000)]


def test_task_survives_without_any_reader(tasks: Tasks) -> None:
    """It waits when the pipe is full, and neither fails nor ends by SIGPIPE."""
    task = tasks.start(f"echo ready; sleep 0.3; head -c {MIB} /dev/zero && exit 5")
    task.logmon.wait_for("ready\n")
    task.logmon.stop(0)
    time.sleep(1)
    assert is_alive(leader(task))
    task.logmon.restart()
    assert task.wait().exit_code == 5
    task.logmon.wait_eof()
    assert len(task.logmon.stdout) == MIB + len("ready\n")


def test_a_full_pipe_does_not_keep_a_task_from_being_stopped(tasks: Tasks) -> None:
    task = tasks.start("echo ready; cat /dev/zero")
    task.logmon.wait_for("ready\n")
    task.logmon.stop(0)
    time.sleep(0.5)
    task.stop(timeout=0)
    assert task.wait().signal == 9


# -- booted systems ------------------------------------------------------------------------------------------


def test_console_of_a_booted_system_is_plain_text(tasks: Tasks) -> None:
    task = tasks.boot(kill_timeout=HANG)
    task.logmon.wait_for("Reached target multi-user.target")
    task.stop()
    assert task.wait().successful
    text = task.logmon.stdout + task.logmon.stderr
    task.logmon.wait_eof(2)
    assert b"Reached target poweroff.target" in task.logmon.stdout
    assert b"\r" not in text, "no carriage returns"
    assert b"\x1b" not in text, "no colours and no cursor movement"
    assert b"\n\n\n\n" not in text


def test_console_of_a_booted_system_comes_at_once(tasks: Tasks) -> None:
    """Line by line while it runs, not in blocks of some KB."""
    task = tasks.boot("systemd.unit=rescue.target")
    task.logmon.wait_for("Welcome to")
    task.logmon.wait_for("Reached target")
    assert is_alive(leader(task))


# -- no logs, and wrong ones ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["command", "boot"])
def test_logs_can_be_disabled(tasks: Tasks, kind: str) -> None:
    """`logs { disabled = true }`: both paths are /dev/null."""
    if kind == "boot":
        task = tasks.boot(logs_disabled=True)
        time.sleep(0.5)
        assert is_alive(leader(task))
    else:
        task, result = tasks.run("echo nobody reads; echo this >&2; exit 4", logs_disabled=True)
        assert result.exit_code == 4
    assert not list(task.allocation.logs.iterdir())
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


def test_missing_fifos_are_no_error(tasks: Tasks) -> None:
    """With disable_log_collection the paths name FIFOs that nobody makes."""
    task = tasks.make("echo nobody reads; exit 4")
    task.logmon.restart = lambda: None  # type: ignore[method-assign]  # no reader, as Nomad then has none
    task.start()
    assert task.wait().exit_code == 4
    assert not list(task.allocation.logs.iterdir()), "and none are made"


@pytest.mark.parametrize("stream", FIFOS)
@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "file", "directory", "socket"])
def test_log_path_that_is_no_fifo_is_refused(tasks: Tasks, tmp_path: Path, stream: str, kind: str) -> None:
    """Another task of the allocation may have put it there, to have root write to it (CVE-2026-8052)."""
    victim = tmp_path / "victim"
    task = tasks.make("echo overwritten; echo overwritten >&2; sleep 5")
    start = task.logmon.start

    def replace_fifo() -> None:
        start()
        path = task.allocation.logs / FIFOS[stream]
        path.unlink()
        if kind == "symlink":
            victim.write_text("precious")
            path.symlink_to(victim)
        elif kind == "dangling symlink":
            path.symlink_to(victim)
        elif kind == "file":
            path.write_text("")
        elif kind == "directory":
            path.mkdir()
        else:
            os.mknod(path, 0o140600)

    task.logmon.start = replace_fifo  # type: ignore[method-assign]  # between the FIFOs and StartTask
    with pytest.raises(DriverError) as caught:
        task.start()
    assert FIFOS[stream] in caught.value.text, "the sentence names the path"
    assert not victim.exists() or victim.read_text() == "precious"
    assert leftovers(task.allocation.id) == []


@pytest.mark.parametrize("level", ["logs", "alloc"])
def test_logs_directory_that_is_a_symlink_is_refused(tasks: Tasks, tmp_path: Path, level: str) -> None:
    task = tasks.make("echo redirected; sleep 5")
    folder = task.allocation.logs if level == "logs" else task.allocation.logs.parent
    start = task.logmon.start

    def redirect() -> None:
        start()
        folder.rename(tmp_path / level)
        folder.symlink_to(tmp_path / level)

    task.logmon.start = redirect  # type: ignore[method-assign]  # between the FIFOs and StartTask
    with pytest.raises(DriverError, match="symbolic link") as caught:
        task.start()
    assert str(folder) in caught.value.text
    assert leftovers(task.allocation.id) == []
    folder.unlink()
    (tmp_path / level).rename(folder)


def test_both_streams_have_their_own_fate(tasks: Tasks) -> None:
    """A reader of stderr that is gone does not hold up stdout."""
    task = tasks.start("i=0; while [ $i -lt 100 ]; do echo $i; echo $i >&2; i=$((i+1)); done; sleep 60")
    eventually(lambda: task.logmon.stdout.count(b"\n") == 100)
    task.logmon.stop(0)
    task.stop(timeout=0)
    assert task.logmon.stderr.count(b"\n") == 100
