# SPDX-License-Identifier: MPL-2.0
"""How the plugin process begins and ends: handshake, command line, signals, shutdown, an agent that dies.

Each test starts the built file with an environment of its own and looks at it from outside: pipes, /proc, the
socket, and the client's side of the wire.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import driver
from nomad_pb import base_pb2, driver_pb2, grpc_plugin_pb2
from nspawn.options import render_reference
from nspawn.permissions import PERMISSIONS
from tests.agent import HANG, PLUGIN_ENV, Allocation, DriverError, Plugin, Task, call, launch_like_agent
from tests.containers import eventually, on_overlay

COOKIE_NAME = "NOMAD_PLUGIN_MAGIC_COOKIE"
HANDSHAKE = re.compile(rb"1\|2\|unix\|(/[^|\n]+)\|grpc\|\n")
STATE_ROOT = Path("/run/nomad-driver-nspawn")
SHUTDOWN_LIMIT = 2.0  # seconds an agent waits for the process after Shutdown, then it sends SIGKILL


# === Helpers =================================================================================================


class Started:
    """The file started with exactly this environment. `stdout`: all that has come so far."""

    def __init__(self, command: list[str], env: Mapping[str, str], stdin: int = subprocess.DEVNULL) -> None:
        self.errors = os.memfd_create("stderr")
        self.process = subprocess.Popen(command, env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=self.errors)
        assert self.process.stdout
        self.pipe = self.process.stdout.fileno()
        self.pid = self.process.pid
        self.stdout = b""

    def read(self, timeout: float) -> bool:
        """Take what stdout has; False at its end or when nothing comes in time."""
        if not select.select([self.pipe], [], [], timeout)[0]:
            return False
        data = os.read(self.pipe, 65536)
        self.stdout += data
        return bool(data)

    def handshake(self) -> Path:
        """The path of the socket in the first line."""
        while b"\n" not in self.stdout and self.read(HANG):
            pass
        match = HANDSHAKE.fullmatch(self.stdout)
        assert match, f"{self.stdout!r}\n{self.stderr}"
        return Path(os.fsdecode(match[1]))

    @property
    def stderr(self) -> str:
        return os.pread(self.errors, 1 << 20, 0).decode(errors="replace")

    def end(self, number: int = signal.SIGTERM, timeout: float = SHUTDOWN_LIMIT) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)


@contextlib.contextmanager
def started(
    file: Path, *args: str, stdin: int = subprocess.DEVNULL, env: Mapping[str, str | None] | None = None
) -> Iterator[Started]:
    """The file as a plugin; a variable of None is taken out of the environment."""
    wanted = {**os.environ, **PLUGIN_ENV, **(env or {})}
    environ = {key: value for key, value in wanted.items() if value is not None}
    run = Started([str(file), *args], environ, stdin)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait(HANG)
        assert run.process.stdout
        run.process.stdout.close()
        os.close(run.errors)


def run_for_people(file: Path, *args: str, **env: str | None) -> subprocess.CompletedProcess[str]:
    """The file as a person runs it: without the cookie, unless `env` says so."""
    environ = {**os.environ, COOKIE_NAME: None, **env}
    return subprocess.run(
        [file, *args],
        env={key: value for key, value in environ.items() if value is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(HANG)
    client.connect(str(path))
    return client


def long_lived(file: Path) -> Plugin:
    """The third launch of an agent's start alone: config set, streams open."""
    plugin = Plugin(file)
    try:
        plugin.set_config()
        plugin.open_streams()
        plugin.wait_for(lambda: plugin.fingerprint)
    except BaseException:
        plugin.kill_hard()
        raise
    return plugin


def make_task(
    plugin: Plugin, allocation: Allocation, image: Path, script: str, name: str = "task", **options: object
) -> Task:
    """A task that runs a shell script and leaves the image as it is."""
    config = {
        "image": str(image),
        "boot": False,
        "command": ["/bin/sh", "-c", script],
        "volatile": "overlay",
        "user_namespacing": False,
        "network_veth": False,
        **options,
    }
    return Task(plugin, allocation, name, config)


@contextlib.contextmanager
def outliving(file: Path, plugin: Plugin, image: Path, script: str, **options: object) -> Iterator[Task]:
    """A task for tests that end its plugin: a plugin of its own destroys it, however the test ends."""
    with Allocation() as allocation:
        task = make_task(plugin, allocation, image, script, "task", **options)
        try:
            yield task
        finally:
            plugin.kill_hard()
            with long_lived(file) as other:
                task.plugin = other
                task.close()
        assert not other.violations


def in_background(method: Callable[[], Any]) -> threading.Thread:
    """Run a call that is going to fail when the plugin ends."""

    def run() -> None:
        with contextlib.suppress(Exception):
            method()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def end_by_shutdown(plugin: Plugin) -> None:
    plugin.kill(driver_shutdown=True)


def end_by_sigterm(plugin: Plugin) -> None:
    plugin.closing = True
    os.kill(plugin.pid, signal.SIGTERM)
    assert plugin.exited(SHUTDOWN_LIMIT)
    plugin.kill_hard()


def end_by_sigkill(plugin: Plugin) -> None:
    plugin.kill_hard()  # waits for the end of both pipes, too


def socket_directory(plugin: Plugin) -> Path:
    return Path(plugin.address.removeprefix("unix:")).parent


# === Handshake ===============================================================================================


def test_handshake_is_the_only_line_ever_on_stdout(driver_file: Path) -> None:
    with started(driver_file) as run:
        path = run.handshake()
        plugin = Plugin.reattach(f"unix:{path}", run.pid)
        plugin.set_config()
        plugin.open_streams()
        plugin.wait_for(lambda: plugin.fingerprint)
        plugin.detach()
        assert run.end() == 0
        while run.read(5):
            pass
        assert HANDSHAKE.fullmatch(run.stdout)


def test_handshake_address_fits_into_a_socket_address(driver_file: Path) -> None:
    with started(driver_file) as run:
        path = run.handshake()
        assert len(os.fsencode(path)) <= 107


def test_listener_accepts_as_soon_as_the_line_is_there(driver_file: Path) -> None:
    for _ in range(3):
        with started(driver_file) as run, connect(run.handshake()) as client:
            client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            assert client.recv(9)[3] == 4  # a SETTINGS frame: an HTTP/2 server is there, not only a backlog


def test_stdin_and_stdout_are_given_up_after_the_handshake(driver_file: Path) -> None:
    with started(driver_file) as run:
        run.handshake()
        assert not run.read(5)  # end of file: whatever is printed later cannot fill the agent's pipe
        eventually(lambda: {os.readlink(f"/proc/{run.pid}/fd/{fd}") for fd in (0, 1)} == {"/dev/null"})


def test_stdin_of_the_agent_is_not_read(driver_file: Path) -> None:
    theirs, ours = os.pipe()
    try:
        os.write(ours, b"typed at the agent's terminal")
        with started(driver_file, stdin=theirs) as run:
            run.handshake()
            os.set_blocking(theirs, False)
            assert os.read(theirs, 100) == b"typed at the agent's terminal"
    finally:
        os.close(theirs)
        os.close(ours)


def test_socket_is_alone_in_a_directory_of_its_own(driver_file: Path) -> None:
    with started(driver_file) as run:
        path = run.handshake()
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert path.parent.stat().st_uid == os.geteuid()
        assert list(path.parent.iterdir()) == [path]


def test_socket_is_not_where_tidying_of_temporary_files_finds_it(driver_file: Path, tmp_path: Path) -> None:
    with started(driver_file, env={"TMPDIR": str(tmp_path)}) as run:
        assert run.handshake().is_relative_to("/run")
        assert list(tmp_path.iterdir()) == []


def test_socket_directory_of_the_host_is_used(driver_file: Path, tmp_path: Path) -> None:
    with started(driver_file, env={"PLUGIN_UNIX_SOCKET_DIR": str(tmp_path)}) as run:
        path = run.handshake()
        assert path.is_relative_to(tmp_path)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        connect(path).close()
        assert run.end() == 0
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["PLUGIN_UNIX_SOCKET_DIR", "TMPDIR"])
def test_overlong_directory_does_not_stop_the_plugin(driver_file: Path, tmp_path: Path, variable: str) -> None:
    overlong = tmp_path / ("long" * 30)
    overlong.mkdir()
    with started(driver_file, env={variable: str(overlong)}) as run:
        connect(run.handshake()).close()


def test_directory_that_only_just_is_too_long_does_not_stop_the_plugin(driver_file: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as short:
        for length in range(80, 108, 3):
            directory = Path(short, "d" * (length - len(short) - 1))
            directory.mkdir()
            with started(driver_file, env={"PLUGIN_UNIX_SOCKET_DIR": str(directory)}) as run:
                connect(run.handshake()).close()


@pytest.mark.parametrize("value", ["", "/nonexistent/directory", "/dev/null", "/proc"])
def test_unusable_socket_directory_does_not_stop_the_plugin(driver_file: Path, value: str) -> None:
    with started(driver_file, env={"PLUGIN_UNIX_SOCKET_DIR": value}) as run:
        connect(run.handshake()).close()


@pytest.mark.parametrize("is_overlong", [False, True])
def test_plugin_of_an_unprivileged_agent_starts_and_says_what_it_needs(
    driver_file: Path, is_overlong: bool
) -> None:
    with tempfile.TemporaryDirectory(prefix="nobody-", dir="/tmp") as name:
        home = Path(name)
        file, tmp = home / driver_file.name, home / ("tmp" * (40 if is_overlong else 1))
        shutil.copy2(driver_file, file)
        tmp.mkdir()
        for path in (home, tmp):
            os.chown(path, 65534, 65534)
        env = {"HOME": str(home), "TMPDIR": str(tmp), "SHIV_ROOT": None, "XDG_CACHE_HOME": None}
        nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"]
        with started(Path("setpriv"), *nobody, str(file), env=env) as run:
            path = run.handshake()
            assert path.parent.parent == (Path("/tmp") if is_overlong else tmp)
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            plugin = Plugin.reattach(f"unix:{path}", run.pid)
            plugin.set_config()
            plugin.open_streams()
            fingerprint = plugin.wait_for(lambda: plugin.fingerprint)
            assert fingerprint.health == driver_pb2.FingerprintResponse.UNHEALTHY
            assert "must run as root" in fingerprint.health_description
            plugin.kill()
            assert not plugin.violations
            assert not path.parent.exists()


@pytest.mark.parametrize("versions", ["1", "3,4", "1,2,3", "", "two", None])
def test_any_list_of_protocol_versions_is_answered_with_two(driver_file: Path, versions: str | None) -> None:
    with started(driver_file, env={"PLUGIN_PROTOCOL_VERSIONS": versions}) as run:
        run.handshake()


@pytest.mark.parametrize("cookie", [None, "", "wrong", PLUGIN_ENV[COOKIE_NAME].upper()])
def test_without_the_cookie_a_person_is_told_what_the_file_is(driver_file: Path, cookie: str | None) -> None:
    result = run_for_people(driver_file, **{COOKIE_NAME: cookie})
    assert result.returncode == 1
    assert result.stdout == ""
    assert "1|2|" not in result.stderr
    for word in ("plugin", "Nomad agent", "plugin_dir", 'plugin "nomad-driver-nspawn"', "check", "--help"):
        assert word in result.stderr


def test_socket_directories_of_dead_plugins_are_removed_but_not_of_live_ones(driver_file: Path) -> None:
    with started(driver_file) as live, started(driver_file) as dead:
        kept, stale = live.handshake().parent, dead.handshake().parent
        dead.end(signal.SIGKILL)
        assert stale.is_dir()  # nobody was left to remove it
        with started(driver_file) as other:
            other.handshake()
            assert not stale.exists()
            connect(kept / "s").close()


# === Command line ============================================================================================


def test_version_is_one_that_an_agent_can_parse(driver_file: Path) -> None:
    result = run_for_people(driver_file, "--version")
    assert (result.returncode, result.stderr) == (0, "")
    match = re.fullmatch(
        r"nomad-driver-nspawn (\d+\.\d+\.\d+(-\w+)?)( \([0-9a-f]{12}(-dirty)?\))?\n", result.stdout
    )
    assert match, result.stdout
    with Plugin(driver_file) as plugin:
        info = call(plugin.base.PluginInfo, base_pb2.PluginInfoRequest(), HANG)
    assert match[1] == info.plugin_version
    assert (info.name, info.type) == ("nspawn", base_pb2.DRIVER)
    assert list(info.plugin_api_versions) == ["v0.1.0"]


COMMANDS = ("check", "images", "pull", "options", "version", "help")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], ["help", "pull"], ["pull", "-h"]])
def test_help_goes_to_stdout_and_fits_a_terminal(driver_file: Path, arguments: list[str]) -> None:
    result = run_for_people(driver_file, *arguments, COLUMNS=None)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: nomad-driver-nspawn " in result.stdout
    for word in ("docker://", "--auth-config") if "pull" in arguments else (*COMMANDS, "--version", "--help"):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 80


def test_options_are_plain_text_or_markdown(driver_file: Path) -> None:
    plain = run_for_people(driver_file, "options").stdout
    assert "\nboot (bool)\n    Boot the image's init as PID 1" in plain
    assert "`" not in plain and "|" not in plain and max(map(len, plain.splitlines())) < 120
    reference = render_reference(driver.TASK_GROUPS, driver.PLUGIN_OPTIONS)
    assert run_for_people(driver_file, "options", "--markdown").stdout == reference


def test_one_option(driver_file: Path) -> None:
    said = run_for_people(driver_file, "options", "auth.username").stdout
    assert said.startswith("In a job:\n\nauth.username (string)\n    The user's name.\n")
    both = run_for_people(driver_file, "options", "user_namespacing").stdout
    assert "In a job:\n\nuser_namespacing (bool)\n" in both and "In the plugin's block:\n" in both
    wrong = run_for_people(driver_file, "options", "capabilty")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert 'there is no option "capabilty"; did you mean' in wrong.stderr and "capability" in wrong.stderr


def test_reader_that_goes_away_gets_no_trace(driver_file: Path) -> None:
    for command in ("options", "check", "--version"):
        script = f'"$0" {command} | head -1; "$0" {command} | :'
        done = subprocess.run(
            ["sh", "-c", script, driver_file], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.parametrize("command", [["images"], ["pull", "docker://registry.example/a:1"]])
def test_what_needs_root_says_so(driver_file: Path, command: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="nobody-", dir="/tmp") as home:
        file = Path(home, driver_file.name)
        shutil.copy2(driver_file, file)
        os.chown(home, 65534, 65534)
        nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", str(file)]
        variables = {"HOME": home, "SHIV_ROOT": None, "XDG_CACHE_HOME": None}
        result = run_for_people(Path("setpriv"), *nobody, *command, **variables)
    assert result.returncode == 1 and result.stdout == ""
    assert "needs root" in result.stderr and "sudo" in result.stderr and result.stderr.count("\n") == 1


def test_check_says_whether_tasks_can_run(driver_file: Path, image: Path) -> None:
    result = run_for_people(driver_file, "check")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.match(
        r"systemd-nspawn \d+, Linux \d+\.\d+, cgroups (v1|v2|hybrid), Python 3\.\d+\.\d+\n", result.stdout
    )
    assert "\nok:      the plugin starts and answers.\n" in result.stdout
    assert "\ntasks can run here\n" in result.stdout


def test_check_says_what_single_features_lack(driver_file: Path, tmp_path: Path) -> None:
    hidden = "for tool in nft gpg zstd; do mount --bind /dev/null $(readlink -f $(command -v $tool)); done"
    script = f'{hidden}; exec "$1" check --image-dir /proc --alloc-dir "$2"'
    result = run_for_people(
        Path("/usr/bin/unshare"), "--mount", "sh", "-ec", script, "sh", str(driver_file), str(tmp_path)
    )
    said = " ".join(result.stdout.split())
    assert result.returncode == 0, result
    for package in ("nftables", "gnupg", "zstd"):
        assert f"install the package {package}." in said
    assert "note: /proc is on proc, which cannot be id-mapped" in said
    assert f"ok: {tmp_path} is on " in said
    assert "fs.inotify.max_user_instances is " in said
    assert "systemd-networkd" in said and "systemd-machined" in said


def test_check_says_what_jobs_may_do(driver_file: Path) -> None:
    said = run_for_people(driver_file, "check").stdout
    for permission, info in PERMISSIONS.items():
        answer, mark = "yes" if info.is_default else "no ", "!" if info.gives_host else " "
        assert f"\n  {answer} {mark} {permission.value} " in said
    assert said.endswith((Path(__file__).parents[2] / "example/hardened.hcl").read_text().partition("\n\n")[2])


def test_check_says_what_is_missing(driver_file: Path, tmp_path: Path) -> None:
    empty = tmp_path / "machine-id"
    empty.touch()
    script = 'mount --bind "$1" /etc/machine-id && exec "$2" check'
    result = run_for_people(
        Path("/usr/bin/unshare"), "--mount", "sh", "-c", script, "sh", str(empty), str(driver_file)
    )
    assert (result.returncode, result.stderr) == (1, "")
    lines = " ".join(result.stdout.split())
    assert "missing: /etc/machine-id is missing or empty: run systemd-machine-id-setup." in lines
    assert "\ntasks cannot run here\n" in result.stdout


@pytest.mark.parametrize("arguments", [["chek"], ["--verbose"], ["check", "now"], ["--versio"]])
def test_unknown_arguments_of_a_person_are_named(driver_file: Path, arguments: list[str]) -> None:
    result = run_for_people(driver_file, *arguments)
    assert result.returncode == 2
    assert arguments[-1] in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert "usage: nomad-driver-nspawn" in result.stderr
    assert "Traceback" not in result.stderr


def test_arguments_in_the_plugin_block_do_not_stop_the_plugin(driver_file: Path) -> None:
    with started(driver_file, "--verbose") as run:
        connect(run.handshake()).close()


# === Signals and ends ========================================================================================


def test_signals_meant_for_the_agent_are_ignored(driver_file: Path) -> None:
    with long_lived(driver_file) as plugin:
        for number in [signal.SIGINT, signal.SIGHUP] * 3:
            os.kill(plugin.pid, number)
            time.sleep(0.05)
        assert not plugin.exited(0.3)
        call(plugin.base.PluginInfo, base_pb2.PluginInfoRequest(), HANG)
    assert not plugin.violations


def test_sigterm_ends_the_plugin_cleanly(driver_file: Path) -> None:
    with long_lived(driver_file) as plugin:
        directory = socket_directory(plugin)
        plugin.closing = True
        os.kill(plugin.pid, signal.SIGTERM)
        assert plugin.exited(SHUTDOWN_LIMIT)
        assert plugin.process and plugin.process.returncode == 0
        assert not directory.exists()
        plugin.kill_hard()
    assert not plugin.violations


def test_shutdown_ends_an_idle_plugin_at_once(driver_file: Path) -> None:
    with long_lived(driver_file) as plugin:
        directory = socket_directory(plugin)
        plugin.kill()
        assert plugin.process and plugin.process.returncode == 0
        assert not directory.exists()
    assert not plugin.violations


def test_shutdown_is_answered_before_the_process_ends(driver_file: Path) -> None:
    plugin = long_lived(driver_file)
    plugin.closing = True
    call(plugin.controller.Shutdown, grpc_plugin_pb2.Empty(), HANG)  # no error
    assert plugin.exited(SHUTDOWN_LIMIT)
    plugin.kill_hard()
    assert not plugin.violations


@pytest.mark.parametrize("is_asked", [True, False], ids=["shutdown", "sigterm"])
def test_end_with_open_streams_leaves_no_traces_in_the_log(driver_file: Path, is_asked: bool) -> None:
    for _ in range(4):
        plugin = long_lived(driver_file)
        streams: list[Any] = [plugin.driver.TaskEvents(driver_pb2.TaskEventsRequest()) for _ in range(20)]
        call(plugin.base.PluginInfo, base_pb2.PluginInfoRequest(), HANG)
        if is_asked:
            plugin.kill()
        else:
            end_by_sigterm(plugin)
        assert plugin.raw_log == []
        assert all(stream.code() for stream in streams)


def test_driver_shutdown_alone_does_not_end_the_plugin(driver_file: Path) -> None:
    with long_lived(driver_file) as plugin:
        call(plugin.driver.Shutdown, driver_pb2.ShutdownRequest(), HANG)
        assert not plugin.exited(1)
        call(plugin.base.PluginInfo, base_pb2.PluginInfoRequest(), HANG)
        plugin.kill(driver_shutdown=True)
    assert not plugin.violations


def test_shutdown_is_as_fast_with_calls_blocked_in_it(driver_file: Path, image: Path) -> None:
    plugin = long_lived(driver_file)
    with outliving(driver_file, plugin, image, "exec sleep 60") as task:
        task.start()
        calls = [in_background(task.wait) for _ in range(10)]
        calls += [in_background(lambda: list(task.stats(0.2))) for _ in range(5)]
        calls += [in_background(lambda: list(plugin.driver.TaskEvents(driver_pb2.TaskEventsRequest())))]
        time.sleep(0.5)
        plugin.kill(driver_shutdown=True)
        for thread in calls:
            thread.join(HANG)
            assert not thread.is_alive()
    assert not plugin.violations


def test_shutdown_during_a_start_leaves_nothing_of_the_task(driver_file: Path, tmp_path: Path) -> None:
    """No agent will ever ask for this task again: it got no handle."""
    image = tmp_path / "images/image"
    (image / "usr/bin").mkdir(parents=True)
    (image / "usr/bin/sh").touch(0o755)  # without it the start would be refused before the copy
    for number in range(200):  # takes systemd-nspawn a while to copy
        (image / f"usr/big{number}").write_bytes(os.urandom(1 << 20))
    plugin = long_lived(driver_file)
    options = {"volatile": "no", "ephemeral": True, "user_namespacing": True}
    with (
        on_overlay(image, tmp_path / "copied") as slow,
        outliving(driver_file, plugin, slow, "true", **options) as task,
    ):
        start = in_background(task.start)
        eventually(lambda: list(slow.parent.glob(".#machine.*")))
        end_by_shutdown(plugin)
        start.join(HANG)
        assert not list(STATE_ROOT.glob(f"{task.allocation.id}*"))
        assert [path.name for path in slow.parent.iterdir()] == ["image"]
    assert not plugin.violations


@pytest.mark.parametrize("end", [end_by_shutdown, end_by_sigterm, end_by_sigkill])
def test_container_outlives_the_plugin(driver_file: Path, image: Path, end: Callable[[Plugin], None]) -> None:
    script = "trap 'echo told; exit 7' TERM; echo up; while :; do sleep 0.1; done"
    first = long_lived(driver_file)
    with outliving(driver_file, first, image, script) as task:
        task.start()
        task.logmon.wait_for("up")
        end(first)
        assert not first.violations
        assert task.logmon.running("stdout") and task.logmon.running("stderr")
        with long_lived(driver_file) as second:
            task.recover(second)
            with pytest.raises(TimeoutError):  # it runs on
                task.wait(0.3)
        with long_lived(driver_file) as third:
            task.recover(third)
            task.stop()
            result = task.wait()
            task.destroy()
        assert (result.exit_code, result.signal, result.err) == (7, 0, "")
        assert b"told" in task.logmon.stdout
    assert not second.violations + third.violations


def test_dead_agent_leaves_a_plugin_that_the_next_one_can_use(driver_file: Path, image: Path) -> None:
    plugin = long_lived(driver_file)
    script = "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done"
    with outliving(driver_file, plugin, image, script) as task:
        task.start()
        short = make_task(plugin, task.allocation, image, "sleep 0.5; exit 4", name="short")
        short.start()
        task.logmon.wait_for("up")
        address, pid = plugin.detach()
        time.sleep(1)  # meanwhile a task ends, and a line about it goes to a pipe that nobody reads
        again = Plugin.reattach(address, pid)
        again.open_streams()
        again.wait_for(lambda: again.fingerprint)
        task.recover(again)
        short.recover(again)
        assert short.wait().exit_code == 4
        with pytest.raises(TimeoutError):
            task.wait(0.3)
        short.close()
        task.stop()
        assert task.wait().exit_code == 5
        task.destroy()
        again.kill()
        assert not Path(address.removeprefix("unix:")).parent.exists()
    assert not plugin.violations + again.violations


def test_plugin_writes_to_pipes_without_a_reader_and_lives(driver_file: Path) -> None:
    address, pid = Plugin(driver_file).detach()
    plugin = Plugin.reattach(address, pid)
    try:
        for _ in range(5):
            with pytest.raises(DriverError):
                call(plugin.base.SetConfig, base_pb2.SetConfigRequest(msgpack_config=b"\xc1"), HANG)
            call(plugin.driver.DestroyTask, driver_pb2.DestroyTaskRequest(task_id="a/b/c", force=True), HANG)
        assert not plugin.exited(0.2)
        plugin.kill()
        assert not plugin.violations
    finally:
        plugin.kill_hard()


# === Launch order ============================================================================================


def test_three_launches_of_an_agents_start_break_no_rule(driver_file: Path) -> None:
    with launch_like_agent(driver_file) as plugin:
        assert plugin.fingerprint
        assert plugin.fingerprint.health_description
    assert not plugin.violations


def test_launches_leave_tasks_of_another_plugin_process_alone(driver_file: Path, image: Path) -> None:
    plugin = long_lived(driver_file)
    with outliving(driver_file, plugin, image, "exec sleep 60") as task:
        task.start()
        with launch_like_agent(driver_file, {"enabled": False}) as other:
            pass
        with pytest.raises(TimeoutError):
            task.wait(0.3)
        assert task.inspect().task.state == driver_pb2.RUNNING
    assert not plugin.violations + other.violations
