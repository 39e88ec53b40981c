# SPDX-License-Identifier: MPL-2.0
"""What a task is for its user: exit codes, signals, errors, environment, users, mounts, clean-up.

The built file runs real containers here, driven as an agent drives it. After every test nothing of its tasks may
be left on the machine: the fixture `tasks` looks.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nomad_pb import driver_pb2
from tests.agent import HANG, Allocation, DriverError, Task, Template, call, launch_like_agent
from tests.containers import (
    Tasks,
    cpu_seconds,
    driver_state,
    escape,
    eventually,
    is_alive,
    kill,
    leader,
    make_small_image,
    nspawn,
    on_overlay,
    output,
    zombies,
)
from tests.leftovers import (
    STATE,
    UID_CLAIMS,
    free_locks,
    interface_indexes,
    is_held,
    leftovers,
    peer,
    processes,
    snapshots,
)

BOOTED = "Reached target multi-user.target"
FOREVER = "while :; do sleep 0.05; done"
MODES = [pytest.param({}, id="command"), pytest.param({"process_two": True}, id="process_two")]
Options = dict[str, Any]


@pytest.fixture(scope="module")
def small(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An image of a few MB that tests may write to, without a machine id and without Nomad's directories."""
    parent = tmp_path_factory.mktemp("images")
    make_small_image(image, parent / "inner", ("dash", "cat", "id", "ls", "sleep", "touch", "true"))
    yield parent / "inner"
    shutil.rmtree(parent)


@pytest.fixture
def copied(small: Path, tmp_path: Path) -> Iterator[Path]:
    """The small image where nspawn has to copy it for `ephemeral`."""
    with on_overlay(small, tmp_path / "copied") as path:
        yield path


# -- exit codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_exit_code_is_the_commands(tasks: Tasks, mode: Options) -> None:
    for code in (0, 1, 2, 7, 42, 126, 127, 128, 129, 132, 134, 137, 143, 200, 254, 255):
        task, result = tasks.run(f"echo to stdout; echo to stderr >&2; exit {code}", **mode)
        assert (result.exit_code, result.signal) == (code, 0)
        assert output(task) == "to stdout\n"
        assert task.logmon.stderr == b"to stderr\n"
        assert bool(result.err) == (code == 255 and bool(mode)), "only 255 under process_two needs explaining"


@pytest.mark.parametrize("mode", MODES)
def test_exit_code_133_is_a_failure(tasks: Tasks, mode: Options) -> None:
    """nspawn keeps 133 for "reboot" and turns a command's own into 1."""
    _, result = tasks.run("exit 133", **mode)
    assert result.exit_code == 1
    assert not result.successful


def test_exit_code_255_of_process_two_says_what_it_may_mean(tasks: Tasks) -> None:
    _, result = tasks.run("exit 255", process_two=True)
    assert result.exit_code == 255
    assert "signal" in result.err and "255" in result.err


def test_task_of_a_few_milliseconds_is_reported(tasks: Tasks) -> None:
    _, result = tasks.run(["/bin/true"])
    assert result.successful


def test_killed_by_a_signal_inside(tasks: Tasks) -> None:
    _, result = tasks.run("kill -9 $$; sleep 60", process_two=True)
    assert not result.successful
    assert result.exit_code == 255
    assert "signal" in result.err


def test_leader_killed_from_the_host(tasks: Tasks) -> None:
    task = tasks.start(["/bin/sleep", "60"])
    kill(leader(task))
    result = task.wait()
    assert (result.exit_code, result.signal) == (137, 9)


# -- stop and signals ----------------------------------------------------------------------------------------


def trapping(*names: str) -> str:
    """A script that tells of each signal and ends at the last one with code 5."""
    *others, last = names
    traps = [f"trap 'echo got {name}' {name}" for name in others] + [f"trap 'echo got {last}; exit 5' {last}"]
    return "; ".join([*traps, "echo ready", FOREVER])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kill_signal", ["", "SIGTERM", "SIGINT", "SIGUSR1"])
def test_stop_sends_the_kill_signal(tasks: Tasks, mode: Options, kill_signal: str) -> None:
    name = (kill_signal or "SIGTERM").removeprefix("SIG")
    task = tasks.start(trapping(name), kill_signal=kill_signal, kill_timeout=HANG, **mode)
    task.logmon.wait_for("ready\n")
    task.stop()
    result = task.wait()
    assert (result.exit_code, result.signal) == (5, 0), "stopped by the signal, not by the timeout"
    assert output(task) == f"ready\ngot {name}\n"


def test_process_two_without_a_handler_ends_by_the_kill_signal(tasks: Tasks) -> None:
    task = tasks.start(["/bin/sleep", "60"], process_two=True, kill_timeout=HANG)
    task.stop(kill_signal="SIGINT")
    result = task.wait()
    assert (result.exit_code, result.signal) == (130, 2)


@pytest.mark.parametrize("mode", MODES)
def test_stop_kills_after_the_timeout_and_says_so(tasks: Tasks, mode: Options) -> None:
    task = tasks.start(f"trap 'echo no' TERM; echo ready; {FOREVER}", **mode)
    task.logmon.wait_for("ready\n")
    began = time.monotonic()
    task.stop(timeout=1)
    assert time.monotonic() - began >= 1
    result = task.wait()
    assert (result.exit_code, result.signal) == (137, 9)
    assert "kill_timeout" in result.err and "1 s" in result.err and "SIGTERM" in result.err
    task.plugin.wait_for(lambda: any("kill_timeout" in event.message for event in task.events))
    assert b"no\n" in task.logmon.stdout


@pytest.mark.parametrize("mode", [*MODES, pytest.param({"boot": True}, id="boot")])
def test_stop_with_timeout_0_kills_at_once(tasks: Tasks, mode: Options) -> None:
    task = tasks.boot() if mode.get("boot") else tasks.start(trapping("TERM"), **mode)
    task.stop(timeout=0)
    result = task.wait()
    assert (result.exit_code, result.signal) == (137, 9)
    assert b"got" not in task.logmon.stdout


def test_stop_of_an_ended_task_is_no_error(tasks: Tasks) -> None:
    task, result = tasks.run("exit 3")
    task.stop(timeout=600)
    assert task.wait() == result
    task.destroy()
    task.stop(timeout=600)


def test_stop_while_others_wait(tasks: Tasks) -> None:
    """As an agent does: its WaitTask is under way, and a second StopTask may come on top."""
    task = tasks.start(trapping("TERM"))
    task.logmon.wait_for("ready\n")
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(task.wait) for _ in range(2)]
        for stopping in [pool.submit(task.stop, timeout=HANG) for _ in range(2)]:
            stopping.result(HANG)
        assert {pending.result(HANG).exit_code for pending in waiting} == {5}


def test_stop_answers_when_the_container_is_gone(tasks: Tasks) -> None:
    task = tasks.start(FOREVER)
    pids = [leader(task), nspawn(task)]
    task.stop(timeout=0)
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("mode", MODES)
def test_signals_reach_the_payload_and_spare_nspawn(tasks: Tasks, mode: Options) -> None:
    task = tasks.start(trapping("HUP", "USR1", "USR2"), **mode)
    task.logmon.wait_for("ready\n")
    outer = nspawn(task)
    for name in ("SIGHUP", "SIGUSR1"):
        task.signal(name)
        task.logmon.wait_for(f"got {name[3:]}\n")
    assert is_alive(outer)
    task.signal("SIGUSR2")
    assert task.wait().exit_code == 5


def test_signal_without_a_handler_is_ignored_by_a_command(tasks: Tasks) -> None:
    """The command is PID 1 of its namespace: nothing but SIGKILL has a default action there."""
    task = tasks.start(["/bin/sleep", "60"])
    for name in ("SIGHUP", "SIGUSR1", "SIGQUIT", "SIGTERM"):
        task.signal(name)
    with pytest.raises(TimeoutError):
        task.wait(0.5)


def test_signal_ends_process_two(tasks: Tasks) -> None:
    task = tasks.start(["/bin/sleep", "60"], process_two=True)
    task.signal("SIGHUP")
    result = task.wait()
    assert (result.exit_code, result.signal) == (129, 1)


@pytest.mark.parametrize("trap", ["''", "'echo got it'"])
def test_signal_that_a_command_survives_is_not_what_ended_it(tasks: Tasks, trap: str) -> None:
    """nspawn does not tell by which signal a command ended under the stub."""
    script = f"trap {trap} HUP; echo ready; until [ -e /local/go ]; do sleep 0.05; done; kill -KILL $$"
    task = tasks.start(script, process_two=True)
    task.logmon.wait_for("ready\n")
    task.signal("SIGHUP")
    (task.dir / "local/go").touch()
    result = task.wait()
    assert (result.exit_code, result.signal) == (255, 0)
    assert "ended by a signal" in result.err


@pytest.mark.parametrize("name", ["SIGNONSENSE", "", "SIG", "0", "999", "SIGRTMIN+99"])
def test_unknown_signal_is_refused_with_a_sentence(tasks: Tasks, name: str) -> None:
    task = tasks.start(FOREVER)
    with pytest.raises(DriverError) as caught:
        task.signal(name)
    assert f'"{name}"' in caught.value.text and "SIGTERM" in caught.value.text
    assert is_alive(leader(task))


def test_unknown_kill_signal_gives_way_to_the_usual_one(tasks: Tasks) -> None:
    """Refusing would keep the task running: an agent repeats a failed StopTask for minutes."""
    task = tasks.start(trapping("TERM"))
    task.logmon.wait_for("ready\n")
    task.stop(timeout=HANG, kill_signal="SIGNONSENSE")
    assert task.wait().exit_code == 5
    task.plugin.wait_for(lambda: any('"SIGNONSENSE"' in event.message for event in task.events))


@pytest.mark.parametrize("boot", [False, True], ids=["command", "booted"])
def test_paused_task(tasks: Tasks, boot: bool) -> None:
    """As a whole, with what it has started; and it can be stopped as ever."""
    script = "trap 'exit 3' TERM; while :; do sleep 0.05; done & while :; do sleep 0.1; done"
    task = tasks.boot(volatile=None, read_only=True) if boot else tasks.start(script)
    if boot:
        task.logmon.wait_for(BOOTED)
    events = Path(driver_state(task)["cgroup"], "payload/cgroup.events")
    task.signal("SIGSTOP")
    eventually(lambda: "frozen 1" in events.read_text())
    with pytest.raises(DriverError, match=r"is paused.*SIGCONT"):
        task.exec(["true"])
    task.signal("SIGCONT")
    eventually(lambda: "frozen 0" in events.read_text())
    assert task.exec(["true"])[1].successful
    task.signal("SIGSTOP")
    task.stop(30)
    assert task.wait().exit_code == (0 if boot else 3)
    said = [event.message for event in task.events]
    assert "The task is paused. SIGCONT lets it go on." in said and "The task goes on." in said


def test_signal_to_an_ended_or_unknown_task_is_an_error(tasks: Tasks) -> None:
    task, _ = tasks.run("true")
    with pytest.raises(DriverError, match="ended"):
        task.signal("SIGHUP")
    task.destroy()
    with pytest.raises(DriverError, match="not known"):
        task.signal("SIGHUP")


# -- booted systems ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "none"])
def test_booted_system_runs_and_shuts_down_in_order(tasks: Tasks, namespaces: bool) -> None:
    mode: Options = {"volatile": None, "read_only": True} if namespaces else {"volatile": "overlay"}
    task = tasks.boot(user_namespacing=namespaces, kill_timeout=HANG, **mode)
    task.logmon.wait_for(BOOTED)
    task.stop()
    assert task.wait().successful
    assert "Reached target poweroff.target" in output(task)


@pytest.mark.parametrize("kill_signal", ["SIGTERM", "SIGINT", "SIGRTMIN+4"])
def test_booted_system_ends_in_order_by_its_kill_signal(tasks: Tasks, tmp_path: Path, kill_signal: str) -> None:
    """For systemd itself SIGTERM would mean "re-exec" and SIGINT "reboot"."""
    task = boot_unit(tasks, tmp_path, "ExecStart=/bin/sleep 600", kill_signal=kill_signal, kill_timeout=HANG)
    task.stop()
    result = task.wait()
    assert result.successful, result
    assert b"Reached target poweroff.target" in task.logmon.stdout


def test_signals_reach_a_booted_systemd(tasks: Tasks, tmp_path: Path) -> None:
    task = boot_unit(tasks, tmp_path, "ExecStart=/bin/sleep 600")
    outer = nspawn(task)
    for name in ("SIGHUP", "SIGUSR1"):
        task.signal(name)
    task.signal("SIGRTMIN+4")  # poweroff
    task.logmon.wait_for("poweroff.target")
    assert task.wait().successful
    assert not is_alive(outer)


def test_booted_system_that_ignores_the_signal_is_killed(tasks: Tasks, tmp_path: Path) -> None:
    unit = "ExecStart=/bin/sh -c 'trap \"\" TERM; sleep 600'\nKillMode=none\nTimeoutStopSec=600"
    task = boot_unit(tasks, tmp_path, f"{unit}\nExecStop=/bin/sleep 600")
    task.stop(timeout=1)
    result = task.wait()
    assert (result.exit_code, result.signal) == (137, 9)
    assert "kill_timeout" in result.err


def test_reboot_inside_is_told_as_such(tasks: Tasks, tmp_path: Path) -> None:
    task = boot_unit(tasks, tmp_path, "ExecStart=/bin/systemctl reboot", started="reboot.target")
    result = task.wait()
    assert result.exit_code == 133
    assert "reboot" in result.err
    assert not result.successful, "so that Nomad's restart policy starts it again"


def test_command_of_a_booted_system_is_for_its_init(tasks: Tasks) -> None:
    task = tasks.boot("systemd.unit=reboot.target")
    assert task.wait().exit_code == 133


def boot_unit(tasks: Tasks, tmp_path: Path, service: str, started: str = "", **settings: Any) -> Task:
    """Boot a system that does nothing but run one service, and wait until that is up."""
    unit = tmp_path / "payload.service"
    unit.write_text(f"[Unit]\nAfter=sysinit.target\nWants=sysinit.target\n[Service]\n{service}\n")
    where = {str(unit): "/etc/systemd/system/payload.service"}
    task = tasks.boot("systemd.unit=payload.service", bind_read_only=[where], **settings)
    task.logmon.wait_for(started or "Started payload.service")
    return task


# -- errors --------------------------------------------------------------------------------------------------


def failure(task: Task) -> tuple[str, str]:
    """Start a task that cannot work: what the user is told, and what nspawn said."""
    try:
        task.start()
    except DriverError as error:
        text = error.text
    else:
        result = task.wait()
        assert result.exit_code != 0 and result.err, f"failed without a reason: {result}"
        text = result.err
    task.logmon.stop(0.5)
    return text, text + task.logmon.stderr.decode()


def refused(task: Task) -> str:
    """Start a task whose start is refused for good: what the user is told."""
    with pytest.raises(DriverError) as caught:
        task.start()
    assert caught.value.recoverable is False
    return caught.value.text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("command", ["/no/such/program", "no-such-program", "/etc/passwd", "/etc"])
def test_command_that_cannot_be_executed(tasks: Tasks, mode: Options, command: str) -> None:
    text = refused(tasks.make([command], **mode))
    assert text.startswith("command: ") and f'"{command}"' in text


def test_script_without_its_interpreter(tasks: Tasks) -> None:
    task = tasks.make(["/local/tool"], templates=[Template("#!/no/such/shell\n", "local/tool", perms=0o755)])
    assert "interpreter /no/such/shell," in refused(task)


def test_command_found_by_the_tasks_own_path(tasks: Tasks) -> None:
    _, result = tasks.run(["mount"], env={"PATH": "/usr/bin"})
    assert result.successful
    assert "/usr/games" in refused(tasks.make(["mount"], env={"PATH": "/usr/games"}))


def test_command_in_a_mount_of_the_containers_own(tasks: Tasks) -> None:
    """Nobody can look into it before the start."""
    _, result = tasks.run(["/proc/self/exe", "--version"], env={"PATH": "/nowhere"})
    assert result.exit_code != 127 or not result.err


@pytest.mark.parametrize("wanted", ["/no/such/image", "no-such-image", "../..", "/dev/null", "/"])
def test_image_that_cannot_be_used(tasks: Tasks, wanted: str) -> None:
    text, _ = failure(tasks.make("true", image=wanted))
    assert text.startswith("image = ") and f'"{wanted}"' in text


def test_image_that_is_no_disk_image(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "file.raw").write_bytes(os.urandom(65536))
    text, everything = failure(tasks.make("true", image=str(tmp_path / "file.raw")))
    assert text.startswith("image")
    assert "systemd-nspawn" in everything


def test_file_that_verifies_a_disk_image(driver_file: Path, tasks: Tasks, tmp_path: Path) -> None:
    """nspawn looks for it beside the image, but gets the image from a descriptor by another name, so that no task
    can exchange it meanwhile."""
    (tmp_path / "file.raw").write_bytes(bytes(65536))
    with launch_like_agent(driver_file, f'allow = ["all"]\nallow_paths = ["{tmp_path}"]') as plugin:
        for name in ("file.roothash", "file.verity"):
            (tmp_path / name).write_text("00")
            task = tasks.make("true", image=str(tmp_path / "file.raw"), plugin=plugin)
            assert str(tmp_path / name) in refused(task)
            (tmp_path / name).unlink()
        assert "verified" not in failure(tasks.make("true", image=str(tmp_path / "file.raw"), plugin=plugin))[0]
        tasks.close()


def test_image_without_an_operating_system(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    text, _ = failure(tasks.make("true", image=str(tmp_path)))
    assert text.startswith("image = ") and str(tmp_path) in text and "/usr" in text


def test_unknown_user(tasks: Tasks) -> None:
    text, everything = failure(tasks.make("true", user="nobody-of-this-name"))
    assert "user" in text and "nobody-of-this-name" in text
    assert "Failed to resolve user" in everything


def test_missing_working_directory_is_made(tasks: Tasks, small: Path) -> None:
    owned = "drwxr-xr-x [0-9]+ 0 0 "
    for options in ({}, {"ephemeral": True}, {"user": "daemon", "volatile": "overlay"}):
        path = f"/no/such{len(options)}/directory"
        arguments = {"image": str(small), "read_only": None, "working_directory": path, **options}
        task, result = tasks.run("pwd; ls -dln . ..", **arguments)
        assert re.fullmatch(f"{path}\n{owned}.* \\.\n{owned}.* \\.\\.\n", output(task)), result
    assert (small / "no/such0/directory").is_dir()
    assert sorted(os.listdir(small / "no")) == ["such0"], "other tasks keep it to themselves"
    shutil.rmtree(small / "no")


@pytest.mark.parametrize("path", ["/alloc/a/b", "/local/a", "/secrets/a"])
def test_missing_working_directory_in_the_tasks_own(tasks: Tasks, path: str) -> None:
    task, result = tasks.run("touch x; pwd", working_directory=path)
    assert output(task) == f"{path}\n", result


def test_working_directory_that_cannot_be_made(tasks: Tasks, small: Path, tmp_path: Path) -> None:
    text = refused(tasks.make("true", working_directory="/no/such/directory"))
    assert text.startswith("working_directory") and "/no/such/directory" in text and "read-only" in text
    assert "is not a directory" in refused(tasks.make("true", working_directory="/etc/passwd"))
    task = tasks.make("true", bind=[{str(tmp_path): "/mnt"}], working_directory="/mnt/sub")
    assert "/mnt is mounted from elsewhere" in refused(task)
    (small / "escape").symlink_to("../../../../../../../..")
    outside = f"/escape{tmp_path}/made"
    tasks.run("pwd", image=str(small), read_only=None, working_directory=outside)
    assert not (tmp_path / "made").exists(), "a link in the image leads nowhere else"
    (small / "escape").unlink()
    shutil.rmtree(small / tmp_path.parts[1] / tmp_path.parts[2], ignore_errors=True)


def test_missing_working_directory_in_memory_of_the_container(tasks: Tasks) -> None:
    text, everything = failure(tasks.make("true", working_directory="/run/no/such"))
    assert text.startswith("working_directory") and "/run/no/such" in text
    assert "No such file or directory" in everything


@pytest.mark.parametrize("option", ["bind", "bind_read_only"])
def test_missing_source_of_a_bind(tasks: Tasks, option: str) -> None:
    text, everything = failure(tasks.make("true", options={option: [{"/no/such/source": "/mnt"}]}))
    assert text.startswith("bind") and "/no/such/source" in text
    assert "No such file or directory" in everything


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"working_directory": "relative"}, "working_directory"),
        ({"bind": [{"relative": "/mnt"}]}, "bind"),
        ({"bind": [{"/etc": "mnt"}]}, "bind"),
        ({"bind": [{"/etc": "/mnt/../../etc"}]}, "bind"),
        ({"volatile": "sometimes"}, "volatile"),
        ({"console": "loud"}, "console"),
        ({"resolv_conf": "magic"}, "resolv_conf"),
        ({"environment": [{"A-B": "x"}]}, "environment"),
        ({"boot": True, "process_two": True}, "process_two"),
        ({"command": []}, "command"),
        ({"image": ""}, "image"),
    ],
)
def test_wrong_option_is_named(tasks: Tasks, options: Options, told: str) -> None:
    task = tasks.make("true", **options)
    with pytest.raises(DriverError) as caught:
        task.start()
    assert caught.value.text.startswith(told)
    assert caught.value.recoverable is False


def test_second_writer_of_an_image_is_refused_but_may_try_again(tasks: Tasks, small: Path) -> None:
    first = tasks.start(FOREVER, image=str(small), read_only=False)
    second = tasks.make("true", image=str(small), read_only=False)
    with pytest.raises(DriverError) as caught:
        second.start()
    assert caught.value.text.startswith("image") and str(small) in caught.value.text
    assert "busy" in caught.value.text, "nspawn's own line is quoted"
    assert caught.value.recoverable is True
    first.stop(timeout=0)
    second.start()
    assert second.wait().successful


@pytest.mark.parametrize("mode", MODES)
def test_killed_nspawn_ends_the_task(tasks: Tasks, mode: Options) -> None:
    task = tasks.start(f"sleep 600 & echo ready; {FOREVER}", **mode)
    task.logmon.wait_for("ready\n")
    payload = [pid for pid, command in processes(task.allocation.id) if "sleep 600" in command]
    kill(nspawn(task))
    result = task.wait()
    assert not result.successful
    assert "systemd-nspawn" in result.err and "killed" in result.err
    assert payload and not any(map(is_alive, payload))


def test_failed_starts_leave_nothing_behind(tasks: Tasks) -> None:
    for options in ({"user": "nobody-of-this-name"}, {"bind": [{"/no/such/source": "/mnt"}]}, {"image": "/no"}):
        task = tasks.make("true", **options)
        with contextlib.suppress(DriverError):
            task.start()
            continue
        assert leftovers(task.allocation.id) == []


# -- environment ---------------------------------------------------------------------------------------------

NASTY = {
    "QUOTES": "both ' and \" and '\"'\"' and `",
    "BACKSLASH": "in\\the middle \\n and at the end\\",
    "DOLLAR": "$HOME $$ $(id) \\$",
    "PERCENT": "%h %% %n 100%",
    "COMMENT": "# no ; comment # here",
    "BLANKS": "  leading, two  inside, trailing  ",
    "TAB": "\ta\tb\t",
    "UNICODE": "Grüße, 世界 🚀",
    "EMPTY": "",
    "EQUALS": "=a=b=",
    "BRACKETS": "[Exec]",
    "CONTROL": "\x01\x02\x1b[31m\x7f",
    "LONG": "0123456789" * 10240,
    "_UNDER_score1": "x",
    "NEWLINE": "one\ntwo\n\n",
    "RETURN": "a\rb\r\n",
    "INJECTION": "x\n[Exec]\nUser=nobody\nEnvironment=A=B",
    "LARGEST": "\x01" * ((128 << 10) - len("LARGEST") - 2),
}


def environment(task: Task) -> dict[bytes, bytes]:
    """The environment a `cat /proc/self/environ` has printed."""
    task.logmon.wait_eof()
    pairs = [item.split(b"=", 1) for item in task.logmon.stdout.split(b"\0") if item]
    assert len({name for name, _ in pairs}) == len(pairs), "no variable is there twice"
    return {name: value for name, value in pairs}


def as_job(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: escape(value) for name, value in variables.items()}


@pytest.mark.parametrize("through", ["env", "environment"])
def test_every_byte_of_the_environment_arrives(tasks: Tasks, through: str) -> None:
    given: Options = {"env": as_job(NASTY)} if through == "env" else {"environment": [as_job(NASTY)]}
    task, result = tasks.run(["/bin/cat", "/proc/self/environ"], **given)
    assert result.successful
    found = environment(task)
    for name, value in NASTY.items():
        assert found.get(name.encode()) == value.encode(), name


def test_booted_system_gets_the_environment(tasks: Tasks, tmp_path: Path) -> None:
    task = boot_unit(tasks, tmp_path, "ExecStart=/bin/sleep 600", env=as_job(NASTY))
    found = dict(
        item.split(b"=", 1) for item in Path(f"/proc/{leader(task)}/environ").read_bytes().split(b"\0") if item
    )
    for name, value in NASTY.items():
        assert found.get(name.encode()) == value.encode(), name


STEERING = {
    "GCONV_PATH": "/no/such/gconv",
    "SYSTEMD_LOG_LEVEL": "debug",
    "SYSTEMD_NSPAWN_LOCK": "0",
    "SYSTEMD_SECCOMP": "0",
    "NOTIFY_SOCKET": "/no/such/socket",
    "PATH": "/no/such/path:/usr/bin:/bin",
    "LC_ALL": "xx_XX",
    "HOME": "/no/such/home",
    "PYTHONPATH": "/no/such/python",
    "ENV": "/no/such/profile",
    "PS4": "$(touch /run/oops)",
    "TMPDIR": "/no/such/tmp",
}


@pytest.fixture(scope="module")
def spy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library which leaves a file beside itself in each process that loads it; without a compiler a wrong path
    must do, which the loader would complain about."""
    library = tmp_path_factory.mktemp("spy") / "spy.so"
    if shutil.which("cc"):
        source = library.with_suffix(".c")
        source.write_text(
            "#include <fcntl.h>\n#include <unistd.h>\n"
            "__attribute__((constructor)) static void spy(void) {"
            f' close(open("{library}.loaded", O_CREAT | O_WRONLY, 0600)); }}\n'
            "unsigned la_version(unsigned v) { return v; }\n"
        )
        compiled = ["cc", "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(compiled, check=True, timeout=60)
    return library


@pytest.mark.parametrize("through", ["env", "environment"])
def test_environment_steers_no_process_of_the_host(tasks: Tasks, spy: Path, through: str) -> None:
    variables = {**STEERING, "LD_PRELOAD": str(spy), "LD_AUDIT": str(spy), "LINES": "a\nb"}
    given: Options = {"env": as_job(variables)} if through == "env" else {"environment": [as_job(variables)]}
    task = tasks.start(["/bin/sleep", "60"], **given)
    inside = set(container_pids(task))
    outer = [pid for pid, _ in processes(task.allocation.id) if pid not in inside]
    assert nspawn(task) in outer
    for pid in outer:
        found, maps = b"", ""
        with contextlib.suppress(OSError):  # helpers of nspawn end
            found, maps = Path(f"/proc/{pid}/environ").read_bytes(), Path(f"/proc/{pid}/maps").read_text()
        for name, value in variables.items():
            assert f"{name}={value}\0".encode() not in found, f"{name} is in the environment of {pid}"
        assert "spy" not in maps
    assert not Path(f"{spy}.loaded").exists()
    assert not Path("/run/oops").exists()
    # Before it is executed the process is a copy of nspawn, with nspawn's environment and arguments.
    eventually(lambda: Path(f"/proc/{leader(task)}/cmdline").read_text().startswith("/bin/sleep"))
    inner = Path(f"/proc/{leader(task)}/environ").read_bytes()
    for name in ("LD_PRELOAD", "GCONV_PATH", "SYSTEMD_LOG_LEVEL", "PATH", "LC_ALL"):
        assert f"{name}={variables[name]}\0".encode() in inner, f"{name} reaches the payload all the same"


def container_pids(task: Task) -> Iterator[int]:
    """The processes in the container's process namespace."""
    namespace = os.readlink(f"/proc/{leader(task)}/ns/pid")
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "ns/pid") == namespace:
                yield int(entry.name)


def test_bundle_is_for_root_alone_and_gone_after_the_start(tasks: Tasks) -> None:
    task = tasks.make(["/bin/sleep", "60"], env={"PASSWORD": "hunter2"})
    places = f"{task.allocation.id}*/bundle"
    state = Path("/run/nomad-driver-nspawn")
    modes: set[tuple[int, ...]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for place in state.glob(places):
                with contextlib.suppress(OSError):
                    modes.add(tuple(stat.S_IMODE(path.stat().st_mode) for path in (place / "config.json", place)))

    watcher = threading.Thread(target=look)
    watcher.start()
    task.start()
    over.set()
    watcher.join()
    assert modes == {(0o600, 0o700)}
    assert not list(state.glob(places)) and list(state.glob(f"{task.allocation.id}*"))


def test_nomads_variables_win(tasks: Tasks) -> None:
    wrong = {"NOMAD_ALLOC_ID": "wrong", "NOMAD_TASK_DIR": "wrong", "MINE": "option", "ONLY": "option"}
    task, _ = tasks.run(["/bin/cat", "/proc/self/environ"], environment=[wrong], env={"MINE": "env"})
    found = environment(task)
    assert found[b"NOMAD_ALLOC_ID"] == task.allocation.id.encode()
    assert found[b"NOMAD_TASK_DIR"] == b"/local"
    assert (found[b"MINE"], found[b"ONLY"]) == (b"env", b"option")


def test_names_nspawn_refuses_are_dropped_with_an_event(tasks: Tasks) -> None:
    bad = {"A.B": "1", "A-B": "2", "1BAD": "3", "GRÜN": "4"}
    variables = {**bad, "GOOD": "5"}
    task, result = tasks.run(["/bin/cat", "/proc/self/environ"], env=as_job(variables))
    assert result.successful
    found = environment(task)
    assert found[b"GOOD"] == b"5"
    assert not found.keys() & {name.encode() for name in bad}
    messages = [event.message for event in task.events]
    for name in bad:
        assert any(f"'{name}'" in message for message in messages)


def test_largest_environment_arrives(tasks: Tasks) -> None:
    variables = {f"LARGE_{number}": "\x01" * (102_394 - number) for number in range(15)}
    task, result = tasks.run(["/bin/cat", "/proc/self/environ"], env=variables, user="daemon")
    assert result.successful
    found = environment(task)
    assert all(found[name.encode()] == value.encode() for name, value in variables.items())


def test_environment_that_is_too_large_is_refused(tasks: Tasks) -> None:
    task = tasks.make("true", env={"LARGE": "x" * (140 << 10)})
    with pytest.raises(DriverError, match=r"LARGE.*KiB.*template"):
        task.start()
    task = tasks.make("true", env={f"LARGE_{number}": "x" * (100 << 10) for number in range(17)})
    with pytest.raises(DriverError, match=r"env.*KiB.*template"):
        task.start()


# -- users and user namespaces -------------------------------------------------------------------------------


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_user(tasks: Tasks, namespaces: bool, mode: Options) -> None:
    """The option, which wins, and the task's own user; root without both."""
    for option, own, wanted in (
        ("", "", "root"),
        ("daemon", "", "daemon"),
        ("", "daemon", "daemon"),
        ("bin", "daemon", "bin"),
    ):
        task, result = tasks.run("id -un", user=own, options={"user": option}, user_namespacing=namespaces, **mode)
        assert result.successful
        assert output(task) == f"{wanted}\n"


@pytest.mark.parametrize("read_only", [True, False], ids=["read-only", "writable"])
@pytest.mark.parametrize("mode", MODES)
def test_user_without_getent_and_home(
    tasks: Tasks, small: Path, tmp_path: Path, read_only: bool, mode: Options
) -> None:
    """By name and by number, with further groups, in a minimal image; exec takes the same. nspawn sees to none of
    it: for its -u a home that is missing in a read-only image was an end."""
    tree = tmp_path / "tree"
    shutil.copytree(small, tree, symlinks=True)
    (tree / "usr/bin/getent").unlink(missing_ok=True)
    (tree / "etc/passwd").write_text("root:x:0:0::/root:\nweb:x:4321:4322::/no/such/home:\n")
    (tree / "etc/group").write_text("one:x:99:web\ntwo:x:1234:x,web\n")
    script = 'id -u; id -g; id -G; echo "$HOME $USER $LOGNAME"'
    for user, expected in {
        "web": "4321\n4322\n4322 99 1234\n/no/such/home web web\n",
        "4321": "4321\n4322\n4322 99 1234\n/no/such/home web web\n",
        "1000": "1000\n0\n0\n/ 1000 1000\n",
        "root": "0\n0\n0\n/root root root\n",
    }.items():
        task = tasks.start(f"{script}; exec sleep 60", image=str(tree), user=user, read_only=read_only, **mode)
        task.logmon.wait_for(expected.splitlines()[-1])
        assert task.logmon.stdout.decode() == expected
        assert task.exec(["sh", "-c", script])[0].decode() == expected
        task.destroy()


def test_user_outside_the_range_of_ids(tasks: Tasks) -> None:
    text, _ = failure(tasks.make("true", user="70000"))
    assert text.startswith("user: ") and "65536" in text


def test_tasks_user_is_not_for_a_booted_system(tasks: Tasks, tmp_path: Path) -> None:
    task = boot_unit(tasks, tmp_path, "ExecStart=/bin/sleep 600", user="daemon")
    assert is_alive(leader(task))


def test_user_namespace(tasks: Tasks) -> None:
    task = tasks.start(["/bin/sleep", "60"])
    inside, outside, count = Path(f"/proc/{leader(task)}/uid_map").read_text().split()
    assert (inside, count) == ("0", "65536") and int(outside) >= 65536
    task = tasks.start(["/bin/sleep", "60"], user_namespacing=False)
    assert Path(f"/proc/{leader(task)}/uid_map").read_text().split()[:2] == ["0", "0"]


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "none"])
def test_nomads_directories_are_usable(tasks: Tasks, namespaces: bool) -> None:
    """Root and an unprivileged user write to all three; the host sees the same numbers."""
    allocation = Allocation()
    script = "for d in /local /secrets /alloc /alloc/data; do echo mine > $d/$(id -un) || exit 3; done; "
    script += "umask 077; "
    script += "echo secret > /secrets/$(id -un).secret; cat /secrets/$(id -un).secret"
    for name, user in (("first", "root"), ("second", "daemon")):
        task, result = tasks.run(script, name=name, user=user, allocation=allocation, user_namespacing=namespaces)
        assert result.successful, task.logmon.stderr
        assert output(task) == "secret\n"
        uid = {"root": 0, "daemon": 1}[user]
        for path in (
            task.dir / "local",
            task.dir / "secrets",
            allocation.dir / "alloc",
            allocation.dir / "alloc/data",
        ):
            assert (path / user).read_text() == "mine\n"
            assert (path / user).stat().st_uid == uid


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "none"])
def test_container_root_reads_what_nomad_puts_into_secrets(tasks: Tasks, namespaces: bool) -> None:
    templates = [Template("token", "secrets/token", 0o600), Template("config", "local/config", 0o600)]
    script = "cat /secrets/token /local/config && echo more >> /secrets/token"
    task, result = tasks.run(script, templates=templates, user_namespacing=namespaces)
    assert result.successful, task.logmon.stderr
    assert output(task) == "tokenconfig"
    assert (task.dir / "secrets/token").read_text() == "tokenmore\n"


def test_private_directory_of_the_agent_is_not_visible(tasks: Tasks) -> None:
    task = tasks.make("find / -xdev -name 'agents-own*' -not -path '/proc/*'; ls -A /private 2>/dev/null")
    (task.dir / "private/agents-own").touch()
    task.start()
    task.wait()
    assert output(task) == ""


def test_logs_directory_is_not_writable_inside(tasks: Tasks) -> None:
    script = "touch /alloc/logs/new; rm /alloc/logs/.task.stdout.fifo; mv /alloc/logs /alloc/other; "
    script += "ls -A /alloc/logs | sort"
    for namespaces in (True, False):
        task, _ = tasks.run(script, user_namespacing=namespaces)
        names = output(task).split()
        assert ".task.stdout.fifo" in names and "new" not in names
        assert (task.allocation.logs / ".task.stdout.fifo").is_fifo()


@pytest.mark.parametrize("user", ["root", "daemon"])
def test_log_fifos_of_another_task_are_out_of_reach(tasks: Tasks, user: str) -> None:
    allocation = Allocation()
    other = tasks.start("echo mine; sleep 60", name="other", allocation=allocation)
    other.logmon.wait_for("mine\n")
    script = "(echo forged > /alloc/logs/.other.stdout.fifo) && echo written; "
    script += "timeout 1 cat /alloc/logs/.other.stderr.fifo && echo read; true"
    task, _ = tasks.run(script, allocation=allocation, user=user)
    assert output(task) == ""
    assert task.logmon.stderr.count(b"Permission denied") + task.logmon.stderr.count(b"cannot create") >= 2
    other.stop(timeout=0)
    assert output(other) == "mine\n"


# -- the image -----------------------------------------------------------------------------------------------

WRITE = "touch /changed && echo written || echo refused; touch /etc/changed /var/changed 2>/dev/null; true"


def test_read_only_image(tasks: Tasks, image: Path) -> None:
    task, _ = tasks.run(WRITE, read_only=True)
    assert output(task) == "refused\n"
    assert b"Read-only file system" in task.logmon.stderr
    assert not (image / "changed").exists()


def test_changes_of_volatile_overlay_are_thrown_away(tasks: Tasks, image: Path) -> None:
    task, _ = tasks.run(WRITE, volatile="overlay", user_namespacing=False)
    assert output(task) == "written\n"
    assert not (image / "changed").exists() and not (image / "etc/changed").exists()


def test_writable_image_keeps_changes(tasks: Tasks, small: Path) -> None:
    task, _ = tasks.run(WRITE, image=str(small), read_only=False)
    assert output(task) == "written\n"
    assert (small / "changed").stat().st_uid == 0, "mapped back: the image stays usable without namespaces"
    (small / "changed").unlink()


def test_read_only_image_without_nomads_directories(tasks: Tasks, small: Path) -> None:
    """Few images have /alloc, /local and /secrets."""
    for name in ("alloc", "local", "secrets"):
        with contextlib.suppress(FileNotFoundError):
            (small / name).rmdir()
    task, result = tasks.run("echo x > /local/x && echo works", image=str(small), read_only=True)
    assert result.successful, result
    assert output(task) == "works\n"


@pytest.mark.parametrize("how", ["ends", "stopped", "nspawn killed", "plugin knows no more"])
def test_copy_for_ephemeral_is_removed(tasks: Tasks, copied: Path, driver_file: Path, how: str) -> None:
    task = tasks.start(f"{WRITE}; {FOREVER if how != 'ends' else 'sleep 0.5'}", image=str(copied), ephemeral=True)
    task.logmon.wait_for("written\n")
    assert snapshots(copied)
    if how == "stopped":
        task.stop(timeout=0)
    elif how == "nspawn killed":
        kill(nspawn(task))
    elif how == "plugin knows no more":
        with launch_like_agent(driver_file) as second:
            call(second.driver.DestroyTask, driver_pb2.DestroyTaskRequest(task_id=task.id, force=True))
    task.wait()
    task.destroy()
    left = snapshots(copied)
    remove(left)
    assert left == []
    assert not (copied / "changed").exists()


def test_ephemeral_tasks_spare_each_others_copies_and_ids(tasks: Tasks, copied: Path) -> None:
    first, *others = [tasks.start(FOREVER, image=str(copied), ephemeral=True) for _ in range(3)]
    copies = snapshots(copied)
    left_over = copied.parent / f".#machine.{copied.name}{'0' * 16}"  # of others
    left_over.mkdir()
    left_over.with_name(f".#{left_over.name}.lck").touch()
    claims = [UID_CLAIMS / Path(f"/proc/{leader(task)}/uid_map").read_text().split()[1] for task in others]
    kill(nspawn(first))
    first.wait()
    first.destroy()
    assert len(snapshots(copied)) == len(copies) * 2 // 3 + 2, "those of others stay"
    for task, claim in zip(others, claims, strict=True):
        assert Path(f"/proc/{leader(task)}/root/usr/bin/sleep").exists()
        assert claim.exists()
        task.stop(timeout=0)
        task.destroy()
    assert snapshots(copied) == [left_over.with_name(f".#{left_over.name}.lck"), left_over]


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_copy_of_an_interrupted_ephemeral_start_is_removed(tasks: Tasks, copied: Path, driver_file: Path) -> None:
    """The plugin is killed while nspawn still copies the image."""
    with (copied / "large").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2 << 30)
    task = tasks.make(FOREVER, image=str(copied), ephemeral=True)
    task.id = f"{task.allocation.id}/task/{os.urandom(4).hex()}"
    task.prestart()
    doomed = launch_like_agent(driver_file)
    pending: Any = doomed.driver.StartTask.future(driver_pb2.StartTaskRequest(task=task.task_config()))
    try:
        eventually(lambda: snapshots(copied), pause=0.001)
        os.kill(doomed.pid, signal.SIGKILL)
        doomed.kill_hard()
        pending.cancel()
        task.destroy()
        assert snapshots(copied) == []
        assert leftovers(task.allocation.id) == []
    finally:
        (copied / "large").unlink()
        remove(snapshots(copied))


def test_pivot_root(tasks: Tasks, small: Path) -> None:
    task, result = tasks.run(
        "ls -d /usr/bin/touch /inner 2>&1", image=str(small.parent), pivot_root="/inner", user_namespacing=False,
        read_only=False,
    )  # fmt: skip
    assert "/usr/bin/touch\n" in output(task), result
    assert "/inner\n" not in output(task)


def test_working_directory(tasks: Tasks) -> None:
    task, _ = tasks.run(["/bin/pwd"], working_directory="/usr/share")
    assert output(task) == "/usr/share\n"


@pytest.mark.parametrize(
    "name", ["plain", "with space", "co:lon", "back\\slash", "ünï", "quote'\"", "%h$x,comma", "a\\:b"]
)
def test_binds_with_odd_names(tasks: Tasks, tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    source.mkdir()
    (source / "file").write_text("found")
    source.chmod(0o777)
    target = f"/tmp/{name}"
    script = 'cat "$1/file"; touch "$1/new" && echo written'
    for option, wanted in (("bind_read_only", "found"), ("bind", "foundwritten\n")):
        task, _ = tasks.run(
            ["/bin/sh", "-c", script, "sh", target],
            user_namespacing=False,
            options={option: [{escape(str(source)): escape(target)}]},
        )
        assert output(task) == wanted, task.logmon.stderr
    assert (source / "new").exists()


def test_volume_mounts(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "rw").mkdir()
    (tmp_path / "ro").mkdir()
    mounts = [
        driver_pb2.Mount(task_path="/tmp/rw", host_path=str(tmp_path / "rw"), propagation_mode="private"),
        driver_pb2.Mount(task_path="/tmp/ro", host_path=str(tmp_path / "ro"), readonly=True),
    ]
    for namespaces in (True, False):
        script = "umask 077; echo kept > /tmp/rw/file && cat /tmp/rw/file; touch /tmp/ro/file || echo refused"
        task, _ = tasks.run(script, mounts=mounts, user_namespacing=namespaces)
        assert output(task) == "kept\nrefused\n"
        assert (tmp_path / "rw/file").stat().st_uid == 0
        (tmp_path / "rw/file").unlink()


def test_bidirectional_propagation_is_refused(tasks: Tasks, tmp_path: Path) -> None:
    mount = driver_pb2.Mount(task_path="/mnt", host_path=str(tmp_path), propagation_mode="bidirectional")
    with pytest.raises(DriverError, match=r"propagation_mode.*bidirectional"):
        tasks.make("true", mounts=[mount]).start()


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A mount of the host whose later mounts can appear in other namespaces, with a directory to mount on."""
    place = tmp_path / "shared"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    subprocess.run(["mount", "--make-shared", place], check=True)
    (place / "disk").mkdir()
    yield place
    subprocess.run(["umount", "-R", place], check=True)


@pytest.mark.parametrize("namespaces", [True, False], ids=["user namespace", "host users"])
def test_later_mounts_of_the_host(tasks: Tasks, volume: Path, namespaces: bool) -> None:
    """They appear in a volume that asks for them, and in no other."""
    mounts = [
        driver_pb2.Mount(task_path=f"/tmp/{mode}", host_path=str(volume), propagation_mode=mode)
        for mode in ("private", "host-to-task", "")
    ]
    mounts[-1].task_path = "/tmp/unsaid"
    task = tasks.start("sleep 60", mounts=mounts, user_namespacing=namespaces)
    subprocess.run(["mount", "-t", "tmpfs", "none", volume / "disk"], check=True)
    (volume / "disk/file").write_text("late")
    text, _ = task.exec(["/bin/sh", "-c", "cd /tmp; cat */disk/file; ls */disk"])
    assert text.decode().split() == ["latehost-to-task/disk:", "file", "private/disk:", "unsaid/disk:"]
    subprocess.run(["umount", volume / "disk"], check=True)
    text, _ = task.exec(["/bin/ls", "/tmp/host-to-task/disk"])
    assert text == b""


def test_later_mounts_that_cannot_appear_are_refused(tasks: Tasks, volume: Path) -> None:
    option = '^volume_mount.propagation_mode = "host-to-task": '
    subprocess.run(["mount", "--make-private", volume], check=True)
    mount = driver_pb2.Mount(task_path="/mnt", host_path=str(volume), propagation_mode="host-to-task")
    with pytest.raises(DriverError, match=f"{option}{volume} is on a private mount.*mount --make-shared"):
        tasks.start("true", mounts=[mount])
    subprocess.run(["mount", "--make-shared", volume], check=True)
    mount.readonly = True
    with pytest.raises(DriverError, match=f"{option}cannot be combined with read_only in a user namespace"):
        tasks.start("true", mounts=[mount])
    _, result = tasks.run("true", mounts=[mount], user_namespacing=False)
    assert result.successful


def test_volumes_can_be_switched_off(driver_file: Path, image: Path, tmp_path: Path) -> None:
    mount = driver_pb2.Mount(task_path="/mnt", host_path=str(tmp_path))
    config = f'volumes = false\nimage_dir = "{image.parent}"'
    with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image) as tasks:
        with pytest.raises(DriverError, match=r"volume_mount.*switched off.*volumes = true"):
            tasks.make("true", mounts=[mount]).start()
        _, result = tasks.run("true")
        assert result.successful


# -- network and names ---------------------------------------------------------------------------------------


def test_own_network(tasks: Tasks) -> None:
    task, _ = tasks.run("tail -n +3 /proc/net/dev | cut -d: -f1", network_veth=True)
    assert set(output(task).split()) == {"host0", "lo"}


def test_hosts_network(tasks: Tasks) -> None:
    task, _ = tasks.run(["/bin/readlink", "/proc/self/ns/net"])
    assert output(task).strip() == os.readlink("/proc/self/ns/net")


def test_resolv_conf(tasks: Tasks) -> None:
    host = Path("/etc/resolv.conf").read_text()
    script = "cat /etc/resolv.conf"
    task, _ = tasks.run(script, resolv_conf="bind-host", user_namespacing=False, volatile="overlay")
    assert output(task) == host
    task, _ = tasks.run(script, resolv_conf="copy-host", user_namespacing=False, volatile="overlay")
    assert output(task) == host
    task, result = tasks.run(f"{script} || echo none", resolv_conf="off", user_namespacing=False)
    assert result.successful
    path = tasks.image / "etc/resolv.conf"
    assert output(task) == (path.read_text() if path.is_file() and not path.is_symlink() else "none\n")


@pytest.mark.parametrize("name", ["web", "web_1", "a b", "ümlaut", "x" * 60, "-dash-"])
def test_machine_and_host_name(tasks: Tasks, name: str) -> None:
    task = tasks.start("cat /proc/sys/kernel/hostname; sleep 60", name=name)
    hostname = task.logmon.wait_for("\n").decode().strip()
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}[A-Za-z0-9]", hostname)
    assert hostname.endswith(f"-{task.allocation.id}")
    assert task.inspect().task.name == hostname
    if name == "web":
        assert hostname == f"web-{task.allocation.id}"


def test_tasks_with_similar_names_run_side_by_side(tasks: Tasks) -> None:
    allocation = Allocation()
    names = ("web_1", "web.1", "web-1")
    running = [tasks.start(FOREVER, name=name, allocation=allocation) for name in names]
    assert len({task.inspect().task.name for task in running}) == len(names)
    for task in running:
        assert is_alive(leader(task))
        task.stop(timeout=0)


def test_machine_id_is_the_allocations(tasks: Tasks, small: Path, tmp_path: Path) -> None:
    image = str(small)
    task, _ = tasks.run("echo $container_uuid", image=image, volatile="overlay", user_namespacing=False)
    assert output(task).strip() == task.allocation.id
    whole = tmp_path / "whole"
    links = ["cp", "-al", f"{tasks.image}/.", str(whole)]  # only possible within one file system
    if subprocess.run(links, stderr=subprocess.DEVNULL, timeout=120).returncode:
        subprocess.run(["cp", "-a", f"{tasks.image}/.", str(whole)], check=True, timeout=120)
    (whole / "etc/machine-id").unlink()
    (whole / "etc/machine-id").touch()
    task = boot_unit(tasks, tmp_path, "ExecStart=/bin/sleep 600", image=str(whole))
    booted = Path(f"/proc/{leader(task)}/root/etc/machine-id")
    assert eventually(booted.read_text).strip() == task.allocation.id.replace("-", "")
    task.stop(timeout=0)
    task.destroy()
    shutil.rmtree(whole)


# -- commands are data ---------------------------------------------------------------------------------------


def test_words_that_look_like_options_are_data(tasks: Tasks) -> None:
    for command in (["/bin/echo", "--bind=/:/host"], ["/bin/echo", "-D/"], ["/bin/echo", "--", "--boot"]):
        task, result = tasks.run(command)
        assert result.successful
        assert output(task) == " ".join(command[1:]) + "\n"
    text = refused(tasks.make(["--bind=/:/host", "/bin/true"]))
    assert text == 'command: there is no "--bind=/:/host" in the container'


@pytest.mark.parametrize("mode", MODES)
def test_command_line_of_three_options(tasks: Tasks, mode: Options) -> None:
    task, _ = tasks.run(["/bin/echo", "c"], entrypoint=["/usr/bin/env", "--"], args=["a b", "--boot"], **mode)
    assert output(task) == "c a b --boot\n"


def test_arguments_of_init_that_look_like_options_are_data(tasks: Tasks) -> None:
    task = tasks.boot("--bind=/:/host", args=["--unit=rescue.target"])
    # It is empty for a moment while the kernel executes the init.
    arguments = eventually(Path(f"/proc/{leader(task)}/cmdline").read_text).split("\0")
    assert arguments[-3:-1] == ["--bind=/:/host", "--unit=rescue.target"]
    assert not Path(f"/proc/{leader(task)}/root/host").exists()


# -- wait, inspect, stats ------------------------------------------------------------------------------------


def test_many_wait_at_once_and_afterwards(tasks: Tasks) -> None:
    task = tasks.start("read -r line; sleep 0.5; exit 9")
    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(lambda _: task.wait(), range(20)))
    assert {result.exit_code for result in results} == {9}
    assert task.wait().exit_code == 9
    task.destroy()
    with pytest.raises(DriverError, match="not known"):
        task.wait()


def test_inspect(tasks: Tasks) -> None:
    before = time.time()
    task = tasks.start("sleep 0.3; exit 4")
    status = task.inspect().task
    assert status.id == task.id and status.state == driver_pb2.RUNNING
    assert before - 1 <= status.started_at.ToNanoseconds() / 1e9 <= time.time()
    task.wait()
    status = task.inspect().task
    assert status.state == driver_pb2.EXITED and status.result.exit_code == 4
    assert status.started_at.ToNanoseconds() < status.completed_at.ToNanoseconds() <= time.time() * 1e9


def test_stats_of_a_busy_task(tasks: Tasks) -> None:
    """100 is one core; on a machine that is busy itself the task gets less, and the stats say so."""
    task = tasks.start("while :; do :; done")
    stats = task.stats(1)
    next(stats)
    before, began = cpu_seconds(leader(task)), time.monotonic()
    usages = [next(stats).agg_resource_usage.cpu for _ in range(2)]
    got = (cpu_seconds(leader(task)) - before) / (time.monotonic() - began) * 100
    stats.close()  # type: ignore[attr-defined]
    told = sum(usage.percent for usage in usages) / len(usages)
    assert min(60, got - 25) <= told <= 140
    assert all(abs(usage.user_mode + usage.system_mode - usage.percent) < 1 for usage in usages)
    assert all(usage.total_ticks > 0 for usage in usages)


def test_first_stats_come_before_the_interval_has_passed(tasks: Tasks) -> None:
    """As Nomad's own drivers do it: `nomad alloc status -stats` has something to show at once."""
    task = tasks.start("sleep 60")
    stats = task.stats(3600)
    assert next(stats).agg_resource_usage.memory.usage > 0
    stats.close()  # type: ignore[attr-defined]


def test_stats_of_a_task_with_memory(tasks: Tasks) -> None:
    """tail keeps a line of 100 MB and cannot get rid of it."""
    task = tasks.start("head -c 100000000 /dev/zero | tail | sleep 60")

    def seen() -> int:
        for stats in task.stats(0.2):
            return int(stats.agg_resource_usage.memory.rss)
        return 0

    rss = eventually(lambda: size if (size := seen()) > 90e6 else 0)
    assert rss < 250e6


def test_stats_end_with_the_task(tasks: Tasks) -> None:
    task = tasks.start("sleep 0.5")
    samples = list(task.stats(0.1))
    assert 1 <= len(samples) < 50
    assert list(task.stats(0.1)) == []
    task.destroy()
    with pytest.raises(DriverError, match="not known"):
        list(task.stats(0.1))


# -- destroy and start again ---------------------------------------------------------------------------------


def test_destroy_of_a_running_task_needs_force(tasks: Tasks) -> None:
    task = tasks.start(FOREVER)
    with pytest.raises(DriverError, match="running"):
        task.destroy(force=False)
    assert is_alive(leader(task))
    task.stop(timeout=0)
    task.destroy(force=False)


@pytest.mark.parametrize("kind", ["command", "veth", "boot"])
def test_destroy_from_the_id_alone(tasks: Tasks, driver_file: Path, kind: str) -> None:
    """As after a failed recovery: a plugin that has never heard of the task removes all of it."""
    if kind == "boot":
        task = tasks.boot(network_veth=True)
        task.logmon.wait_for("Reached target")
    else:
        task = tasks.start(FOREVER, network_veth=kind == "veth")
    assert leftovers(task.allocation.id)
    link = peer(leader(task)) if kind != "command" else 0
    assert not link or link in interface_indexes()
    with launch_like_agent(driver_file) as second:
        call(second.driver.DestroyTask, driver_pb2.DestroyTaskRequest(task_id=task.id, force=True), HANG)
    assert leftovers(task.allocation.id) == []
    assert link not in interface_indexes()
    assert not task.wait().successful, "the first plugin notices"


def test_destroy_of_an_unknown_task_is_no_error(tasks: Tasks) -> None:
    task = tasks.make("true")
    task.id = f"{task.allocation.id}/task/00000000"
    task.destroy()
    task.destroy(force=False)


def test_destroy_twice_at_once(tasks: Tasks) -> None:
    task = tasks.start(FOREVER)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: task.destroy(), range(4)))
    assert leftovers(task.allocation.id) == []


def test_restart_in_the_same_allocation(tasks: Tasks) -> None:
    task = tasks.make("echo started; exit 1")
    for count in range(1, 4):
        task.start()
        assert task.wait().exit_code == 1
        task.destroy()
        task.logmon.wait_eof()
        assert task.logmon.stdout == b"started\n" * count


def test_start_of_a_running_task_is_refused(tasks: Tasks) -> None:
    task = tasks.start(FOREVER)
    with pytest.raises(DriverError, match="running already"):
        call(task.plugin.driver.StartTask, driver_pb2.StartTaskRequest(task=task.task_config()), HANG)
    assert is_alive(leader(task))


@pytest.mark.parametrize("attempt", range(10))
def test_start_repeated_after_a_crash_in_the_middle(tasks: Tasks, driver_file: Path, attempt: int) -> None:
    """A plugin that dies while it starts a task is started again, and StartTask repeated with the same id. Its
    payload may be frozen at that moment, for `sysctl`."""
    task = tasks.make(["/bin/sleep", "60"], private_network=True, sysctl=[{"net.core.somaxconn": "1"}])
    task.id = f"{task.allocation.id}/task/{os.urandom(4).hex()}"
    task.prestart()
    request = driver_pb2.StartTaskRequest(task=task.task_config())
    doomed = launch_like_agent(driver_file)
    pending: Any = doomed.driver.StartTask.future(request)
    if attempt % 2:  # as soon as anything of it is there
        eventually(lambda: list(STATE.glob(f"{task.allocation.id}*")), pause=0)
        time.sleep(random.uniform(0, 0.01))
    else:
        time.sleep(random.uniform(0, 0.15))
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.kill_hard()
    pending.cancel()
    call(task.plugin.driver.StartTask, request, HANG)
    time.sleep(0.3)
    running = [pid for pid, command in processes(task.allocation.id) if command == "/bin/sleep 60 "]
    assert len(running) == 1, "not doubled, and running"
    task.stop(timeout=0)
    assert (task.wait().exit_code, task.wait().signal) == (137, 9)
    task.destroy()
    eventually(lambda: not free_locks())


def give_up_start(task: Task, delay: float) -> None:
    """Call StartTask, and cancel the call."""
    task.id = f"{task.allocation.id}/task/{os.urandom(4).hex()}"
    task.prestart()
    pending: Any = task.plugin.driver.StartTask.future(driver_pb2.StartTaskRequest(task=task.task_config()))
    time.sleep(delay)
    pending.cancel()


@pytest.mark.parametrize("attempt", range(12))
def test_start_that_the_agent_gives_up(tasks: Tasks, attempt: int) -> None:
    """The agent dies during StartTask and its successor, which has no handle, starts the task under a new id."""
    task = tasks.make(["/bin/sleep", "60"], ephemeral=True)
    give_up_start(task, attempt * 0.01)
    task.start()
    eventually(lambda: "/bin/sleep 60 " in dict(processes(task.allocation.id)).values())
    running = [pid for pid, command in processes(task.allocation.id) if command == "/bin/sleep 60 "]
    assert running == [leader(task)]


@pytest.mark.parametrize("attempt", range(12))
def test_start_that_is_given_up_and_destroyed_leaves_no_lock(tasks: Tasks, attempt: int) -> None:
    """DestroyTask comes while what the start has made is being removed."""
    task = tasks.make(["/bin/sleep", "60"], ephemeral=True)
    give_up_start(task, attempt * 0.01)
    task.destroy()
    assert leftovers(task.allocation.id) == []
    eventually(lambda: not free_locks())


def test_forgotten_start_gives_way_to_a_new_one(tasks: Tasks, driver_file: Path) -> None:
    """Nomad never wants two of one task of an allocation."""
    task = tasks.start(FOREVER)
    forgotten = leader(task)
    with launch_like_agent(driver_file) as second:
        task.plugin = second
        task.start()
        assert not is_alive(forgotten)
        assert is_alive(leader(task))
        task.stop(timeout=0)
        task.destroy()
        task.plugin = tasks.plugin
    assert leftovers(task.allocation.id) == []


def test_claim_on_user_ids_is_given_back(tasks: Tasks) -> None:
    for end in (nspawn, leader):
        task = tasks.start(FOREVER)
        claim = UID_CLAIMS / Path(f"/proc/{leader(task)}/uid_map").read_text().split()[1]
        assert is_held(claim)
        kill(end(task))
        task.wait()
        task.destroy()
        assert not claim.exists()


def test_plugin_leaves_no_zombies(tasks: Tasks) -> None:
    for _ in range(5):
        task, _ = tasks.run("true")
        task.destroy()
    assert zombies(tasks.plugin.pid) == []


def test_events_are_the_tasks_own(tasks: Tasks) -> None:
    """Nomad shows an event with the task whose allocation and name it carries."""
    task = tasks.start(f"trap '' TERM; echo ready; {FOREVER}", name="stubborn")
    task.logmon.wait_for("ready")
    task.stop(timeout=0.2)
    (event,) = task.plugin.wait_for(lambda: [event for event in task.events if "kill_timeout" in event.message])
    assert (event.task_id, event.task_name, event.alloc_id) == (task.id, "stubborn", task.allocation.id)
    assert abs(event.timestamp.ToNanoseconds() / 1e9 - time.time()) < 60
    assert signal.Signals(task.wait().signal) is signal.SIGKILL


def test_signal_reaches_a_users_command_under_the_stub(tasks: Tasks) -> None:
    """It is not process 2 there: to look its user up takes processes."""
    task = tasks.start(trapping("USR1", "TERM"), process_two=True, user="daemon")
    task.logmon.wait_for("ready")
    task.signal("SIGUSR1")
    task.logmon.wait_for("USR1")
    task.stop(timeout=HANG)
    assert task.wait().exit_code == 5
