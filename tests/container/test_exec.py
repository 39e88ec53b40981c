# SPDX-License-Identifier: MPL-2.0
"""Commands in running containers: streams and terminals as Nomad's clients want them, and no way out.

The first part holds the cases of Nomad's own conformance tests for drivers (plugins/drivers/testutils), driven
over the wire as `nomad alloc exec` does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import driver
from nomad_pb import driver_pb2
from nspawn.cgroup import PAGE_SIZE, find_cgroups, read_cgroup_pids
from nspawn.common import STATE_ROOT
from nspawn.entries import LEAF, ExecServer, find_namespaces
from nspawn.exec import is_confined
from nspawn.files import read_text
from nspawn.job import Mode, state_directory
from nspawn.process import parse_status, read_children, read_inner_pid, read_stat
from tests.agent import HANG, DriverError, ExecSession, Plugin, Task, launch_like_agent
from tests.containers import Tasks, driver_state, eventually, is_alive, kill, leader, zombies

FOREVER = "while :; do sleep 0.05; done"
KINDS: dict[str, dict[str, Any]] = {
    "command": {},
    "command, no user namespace": {"user_namespacing": False},
    "process_two": {"process_two": True},
    "process_two, no user namespace": {"process_two": True, "user_namespacing": False},
    "booted": {"boot": True, "volatile": "overlay", "user_namespacing": False, "read_only": None},
    "booted, user namespace": {"boot": True, "ephemeral": True, "read_only": None},
    "a user's command": {"user": "daemon"},
    "a user's process_two": {"user": "daemon", "process_two": True, "user_namespacing": False},
}
TTY = pytest.mark.parametrize("tty", [False, True], ids=["pipes", "terminal"])


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def kind(request: pytest.FixtureRequest, shared: Plugin, image: Path) -> Iterator[Task]:
    """A running task of each kind of container."""
    with Tasks(shared, image) as made:
        options = KINDS[request.param]
        task = made.start(() if options.get("boot") else FOREVER, env={"FROM_NOMAD": "yes"}, **options)
        if options.get("boot"):  # its systemd makes the cgroups first of all
            eventually(lambda: "/init.scope" in str(cgroups_of(leader(task), task)))
        yield task
    violations, shared.violations = shared.violations, []
    assert not violations


@pytest.fixture(scope="module")
def task(shared: Plugin, image: Path) -> Iterator[Task]:
    """A running task that tests leave as it is."""
    with Tasks(shared, image) as made:
        yield made.start(FOREVER)
    violations, shared.violations = shared.violations, []
    assert not violations


def cgroups_of(pid: int, task: Task) -> list[str]:
    return find_cgroups(pid, str(driver_state(task)["cgroup"]))


def stream(task: Task, script: str, tty: bool = False) -> ExecSession:
    return task.exec_streaming(["/bin/sh", "-c", script], tty)


def run(task: Task, script: str, tty: bool = False) -> tuple[int, str, str]:
    session = stream(task, script, tty)
    result = session.wait()
    return result.exit_code, session.stdout.decode(), session.stderr.decode()


def shown(task: Task, script: str) -> str:
    """What a script prints; it must end with 0 and say nothing on stderr."""
    code, stdout, stderr = run(task, script)
    assert (code, stderr) == (0, ""), stdout
    return stdout


# -- Nomad's conformance cases -------------------------------------------------------------------------------


def test_streams_are_apart(task: Task) -> None:
    session = stream(task, "echo hello stdout; echo hello stderr >&2; exit 43")
    assert session.wait().exit_code == 43
    assert (session.stdout, session.stderr) == (b"hello stdout\n", b"hello stderr\n")


def test_output_arrives_as_it_is_written(task: Task) -> None:
    session = stream(task, "for i in 1 2 3; do echo $i; read -r go; done; exit 0")
    for number in (b"1", b"2", b"3"):
        session.wait_for(number + b"\n")
        session.send(b"go\n")
    assert session.wait().exit_code == 0
    assert session.stdout == b"1\n2\n3\n"


def test_pipes_are_no_terminal(task: Task) -> None:
    code, stdout, stderr = run(task, "stty size")
    assert (code, stdout) == (1, "")
    assert "Inappropriate ioctl for device" in stderr


def test_stdin_and_its_end(task: Task) -> None:
    session = stream(task, "head -n1")
    session.send(b"hello\n")
    session.close_stdin()
    assert session.wait().exit_code == 0
    assert session.stdout == b"hello\n"


def test_end_of_stdin_is_told(task: Task) -> None:
    session = stream(task, "cat; echo end")
    session.send(b"one\n")
    session.send(b"two")
    session.close_stdin()
    assert session.wait().exit_code == 0
    assert session.stdout == b"one\ntwoend\n"


def test_terminal_merges_and_has_its_line_ends(task: Task) -> None:
    session = stream(task, "echo hello stdout; echo hello stderr >&2; exit 43", tty=True)
    assert session.wait().exit_code == 43
    assert (session.stdout, session.stderr) == (b"hello stdout\r\nhello stderr\r\n", b"")


def test_terminal_arrives_as_it_is_written(task: Task) -> None:
    session = stream(task, "for i in 1 2 3; do echo $i; sleep 0.1; done", tty=True)
    session.wait_for(b"1\r\n")
    assert session.wait().exit_code == 0
    assert session.stdout == b"1\r\n2\r\n3\r\n"


def test_size_before_and_around_the_start(task: Task) -> None:
    session = stream(task, "sleep 1; stty size", tty=True)
    session.resize(50, 40)
    session.resize(100, 100)
    assert session.wait().exit_code == 0
    assert session.stdout == b"100 100\r\n"


def test_terminal_echoes_and_needs_no_end_of_stdin(task: Task) -> None:
    session = stream(task, "head -n1", tty=True)
    session.send(b"hello\n")
    assert session.wait().exit_code == 0
    assert session.stdout == b"hello\r\nhello\r\n"


@TTY
def test_children_that_hold_the_output_do_not_delay_the_end(task: Task, tty: bool) -> None:
    """Only the command itself is waited for; what comes later from others is not."""
    mark = str(uuid.uuid4())
    session = stream(task, f"(trap '' HUP; sleep 3; echo {mark}; sleep 3) & echo start; exit 5", tty)
    assert session.wait().exit_code == 5
    assert session.stdout.splitlines() == [b"start"]


def test_mount_and_process_namespaces_are_the_tasks(task: Task) -> None:
    path = shown(task, "mktemp").strip()
    assert shown(task, f"echo text > {path}; cat {path}") == "text\n"
    assert not Path(path).exists()
    assert shown(task, f"cat {path}; rm {path}") == "text\n"
    assert FOREVER in shown(task, "cat /proc/1/cmdline").replace("\0", " ")


def test_cgroup_is_the_tasks(task: Task) -> None:
    """What the host sees of the command: limits, stats, device policy and the kill of the task cover it."""
    session = stream(task, "echo here; read -r end")
    session.wait_for(b"here\n")
    scope = rf".*/{task.allocation.id}\.task\.scope/payload(/{LEAF}\d+)?"
    inside = [pid for pid in read_cgroup_pids(cgroups_of(leader(task), task)[0]) if pid != leader(task)]
    assert [pid for pid in inside if b"read -r end" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert all(re.fullmatch(scope, path) for pid in inside for path in cgroups_of(pid, task))
    session.send(b"\n")
    session.wait()


# -- the payload's own confinement ---------------------------------------------------------------------------

# What differs between any two processes, or is a program's own business.
OF_THE_PROCESS = re.compile(
    r"Name|Umask|State|N?S?(Tgid|Pid|pid|pgid|sid|tgid)|Ngid|PPid|TracerPid|FDSize|Vm\w+|Rss\w+|HugetlbPages|Threads|SigQ"
    r"|S(hd|ig)Pnd|Sig(Blk|Ign|Cgt)|\w*voluntary_ctxt_switches|untag_mask|x86_Thread_features\w*|Kthread"
)


def confinement(text: str) -> dict[str, str]:
    status = parse_status(text.encode())
    return {name: value for name, value in status.items() if not OF_THE_PROCESS.fullmatch(name)}


def payload(task: Task) -> int:
    """The number of the payload inside: under the stub its first child."""
    assert isinstance(task.driver_config, dict)
    if not task.driver_config.get("process_two"):
        return 1
    eventually(lambda: is_confined(leader(task), Mode.PROCESS_TWO))
    return min(map(read_inner_pid, eventually(lambda: read_children(leader(task)), HANG)))


def entry_of(pid: int) -> int:
    return int((read_stat(pid) or [])[1])


def test_entry_is_outside_and_the_command_ends_with_it(task: Task) -> None:
    """What waits for the command uses nothing of the task's limits, and is no process of the container."""
    session = stream(task, "echo here; read -r end")
    session.wait_for(b"here")
    entry = entry_of(child_of(task, b"read -r end"))
    eventually(lambda: not cgroups_of(entry, task))
    assert read_inner_pid(entry) == entry
    kill(entry)
    assert session.wait().signal == signal.SIGKILL
    eventually(lambda: "read -r end" not in shown(task, "cat /proc/[0-9]*/cmdline | tr -d '\\0'; :"))


def test_confinement_is_the_payloads(kind: Task) -> None:
    """Line by line, but for what is a process's own."""
    number = payload(kind)
    expected, got = (confinement(shown(kind, f"cat /proc/{pid}/status")) for pid in (number, "self"))
    assert {"Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp"} <= set(got)
    assert got == expected
    assert int(got["Seccomp_filters"]) >= 2
    print("\n".join(f"{name:<34} {value}" for name, value in got.items()))


@pytest.mark.parametrize("mode", [{}, {"process_two": True}, {"boot": True, "volatile": "overlay"}], ids=str)
def test_command_at_once_after_the_start_is_confined_too(tasks: Tasks, mode: dict[str, Any]) -> None:
    """nspawn says that the container is up before it has confined its first process."""
    for _ in range(5):
        options = {
            "user": None if mode.get("boot") else "daemon",
            "user_namespacing": False,
            "read_only": None,
            **mode,
        }
        if not mode.get("boot"):
            options["read_only"] = True
        task = tasks.start(
            () if mode.get("boot") else FOREVER, **{k: v for k, v in options.items() if v is not None}
        )
        ours = confinement(shown(task, "cat /proc/self/status"))
        assert ours == confinement(shown(task, f"cat /proc/{payload(task)}/status"))
        assert ours["CapBnd"] == "00000000f4ecafff" and ours["Seccomp"] == "2"
        task.destroy()


def test_umask_is_the_usual_one(kind: Task) -> None:
    """A booted systemd has 0 for itself."""
    assert shown(kind, "umask") == "0022\n"


def test_namespaces_cgroup_and_limits_are_the_payloads(kind: Task) -> None:
    payload_pid = payload(kind)
    for what in ("cgroup", "limits", "oom_score_adj", "personality"):
        texts = [shown(kind, f"cat /proc/{pid}/{what}") for pid in (payload_pid, "self")]
        assert texts[0] == re.sub(rf"/{LEAF}\d+$", "", texts[1], flags=re.M).replace(":\n", ":/\n"), what
    session = stream(kind, "echo here; read -r end")
    session.wait_for(b"here")
    inside = child_of(kind, b"read -r end")
    assert find_namespaces(inside) == find_namespaces(leader(kind)) != 0
    for name in os.listdir(f"/proc/{inside}/ns"):
        assert os.readlink(f"/proc/{inside}/ns/{name}") == os.readlink(f"/proc/{leader(kind)}/ns/{name}"), name
    assert filters(inside) == filters(leader(kind)) != []
    session.close_stdin()
    session.wait()


def child_of(task: Task, text: bytes) -> int:
    """The pid on the host of a command in the container, by a part of its command line."""
    [root] = cgroups_of(leader(task), task)[-1:]
    scope = root[: root.index("/payload")]

    def found() -> list[int]:
        pids = read_cgroup_pids(f"{scope}/payload")
        return [pid for pid in pids if text in read_text(Path(f"/proc/{pid}/cmdline")).encode()]

    return eventually(found)[0]


def filters(pid: int) -> list[str]:
    """A process's seccomp filters as hexadecimal."""
    program = f"from nspawn.enter import Entry\nfor found in Entry().read_filters({pid}): print(found.hex())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        check=True,
        timeout=30,
        cwd=Path(driver.__file__).parent,
    )
    return done.stdout.decode().split()


def test_environment_is_the_payloads(kind: Task) -> None:
    """All that Nomad and the job give; nspawn's own variables for its payload are not for others."""
    theirs = set(shown(kind, f"cat /proc/{payload(kind)}/environ").split("\0")) - {""}
    ours = set(shown(kind, "cat /proc/self/environ").split("\0"))
    missing = {
        line for line in theirs - ours if not re.match(r"NOTIFY_SOCKET=|container_host_|TERM=dumb$|PWD=", line)
    }
    assert missing == set()
    assert "FROM_NOMAD=yes" in ours and "NOMAD_TASK_NAME=task" in ours and "container=systemd-nspawn" in ours


def test_environment_keeps_every_byte(tasks: Tasks) -> None:
    values = {"QUOTES": "'\"`$X \\n %h", "LINES": "a\nb\r\n", "UTF": "ä€𝄞", "EMPTY": "", "BLANKS": "  x  "}
    task = tasks.start(FOREVER, env=values, environment=[{"FROM_JOB": "yes"}])
    ours = shown(task, "cat /proc/self/environ").split("\0")
    assert {f"{name}={value}" for name, value in {**values, "FROM_JOB": "yes"}.items()} <= set(ours)


def test_working_directory_is_the_tasks(tasks: Tasks, task: Task) -> None:
    assert shown(task, "pwd") == "/\n"
    assert shown(tasks.start(FOREVER, working_directory="/usr/lib"), "pwd") == "/usr/lib\n"


PASSWD = "root:x:0:0:root:/root:/bin/sh\nwebuser:x:4321:4322:Web:/tmp:/bin/sh\n"
GROUP = "root:x:0:\nwebuser:x:4322:\nfurther:x:99:other,webuser\nmore:x:1234:webuser\nnone:x:5:root\n"


@pytest.fixture
def users(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "passwd").write_text(PASSWD)
    (tmp_path / "group").write_text(GROUP)
    tmp_path.chmod(0o755)
    return {str(tmp_path / "passwd"): "/etc/passwd", str(tmp_path / "group"): "/etc/group"}


@pytest.mark.parametrize("user_namespacing", [True, False])
def test_user_is_looked_up_inside(tasks: Tasks, users: dict[str, str], user_namespacing: bool) -> None:
    """The host has no such user."""
    options: dict[str, Any] = {"bind_read_only": [users], "user_namespacing": user_namespacing}
    task = tasks.start(FOREVER, user="webuser", working_directory="/tmp", **options)
    expected, got = (confinement(shown(task, f"cat /proc/{pid}/status")) for pid in ("1", "self"))
    assert got == expected
    assert got["Uid"].split() == ["4321"] * 4 and got["Gid"].split() == ["4322"] * 4
    assert got["Groups"].split() == ["99", "1234"]
    assert shown(task, "echo $HOME $USER $LOGNAME") == "/tmp webuser webuser\n"
    code, stdout, _ = run(task, "tty; stat -c '%u %a' $(tty); stat -Lc %u /dev/stdout", tty=True)
    assert code == 0
    assert re.fullmatch(r"/dev/pts/0\r\n4321 6[02]0\r\n4321\r\n", stdout)  # 600 since 257


@TTY
def test_outputs_can_be_opened_anew(kind: Task, tty: bool) -> None:
    """As programs do that log to /dev/stdout."""
    code, stdout, stderr = run(kind, "echo out > /dev/stdout; echo err > /dev/stderr", tty)
    assert (code, stdout + stderr) == (0, "out\r\nerr\r\n" if tty else "out\nerr\n")


# -- no way out ----------------------------------------------------------------------------------------------


@TTY
def test_nothing_of_the_host_is_left_to_a_command(kind: Task, tty: bool) -> None:
    """Descriptors, root, working directory, executable, keyring: all are the container's."""
    session = kind.exec_streaming(["/bin/ls", "-l", "/proc/self/fd"], tty)
    code = session.wait().exit_code
    links = dict(re.findall(r" (\d+) -> (\S+)", session.stdout.decode()))
    assert code == 0 and set(links) == {"0", "1", "2", "3"}
    assert re.fullmatch(r"/proc/\d+/fd", links.pop("3")), "the directory ls reads"
    assert all(re.match(r"/dev/pts/\d+$" if tty else r"pipe:", link) for link in links.values()), links
    assert shown(kind, "readlink /proc/self/root /proc/self/cwd") == "/\n/\n"
    assert shown(kind, "readlink /proc/self/exe").strip() in ("/usr/bin/readlink", "/bin/readlink")
    host = str(STATE_ROOT).encode()
    session = stream(kind, "cat /proc/self/maps /proc/self/environ /proc/self/cmdline /proc/self/mountinfo")
    session.wait()
    assert host not in session.stdout and sys.executable.encode() not in session.stdout


SPY = r"""
# Looks at every process that appears, and tries to write to its executable and libraries: opens them only.
trap '' HUP
while :; do
    for p in /proc/[0-9]*; do
        exe=$(/bin/readlink $p/exe) 2>/dev/null || continue
        case $exe in
        */python*)
            echo "saw $exe"
            { : >>$p/exe; } 2>&1 && echo "WROTE $exe"
            for m in $p/map_files/*; do
                case $(/bin/readlink $m) in */libc*) { : >>$m; } 2>&1 && echo "WROTE $m";; esac
            done
            { : >>$p/mem; } 2>/dev/null && echo "opened the memory"
            [ $( /bin/ls $p/fd/ 2>/dev/null | /usr/bin/wc -l) -gt 4 ] && echo "MORE DESCRIPTORS"
            /bin/ls -l $p/fd/ 2>/dev/null | /bin/grep -q socket: && echo "A SOCKET"
        esac
    done 2>/dev/null
done
"""


@pytest.mark.parametrize("user_namespacing", [True, False])
def test_files_of_the_host_cannot_be_changed_through_the_helper(tasks: Tasks, user_namespacing: bool) -> None:
    """CVE-2019-5736: root inside opens the executable of what enters, or its libraries, to write to the host's.
    A very long PATH keeps the process for a while at the last step before the command."""
    env = {"PATH": ":".join(["/n"] * 40000)}
    task = tasks.start(["/bin/bash", "-c", SPY], env=env, user_namespacing=user_namespacing)
    for _ in range(3 if user_namespacing else 20):  # without, the first is nearly always seen
        assert task.exec_streaming(["no-such-program"]).wait().exit_code == 127
        if b"Read-only file system" in task.logmon.stdout:
            break
    stdout = task.logmon.stdout.decode()
    assert "WROTE" not in stdout and "MORE DESCRIPTORS" not in stdout
    assert "A SOCKET" not in stdout, "SO_PEERPIDFD would lead to the process at its other end"
    if user_namespacing:
        assert "saw" not in stdout and "opened" not in stdout, (
            "nothing can be seen of a process that is not dumpable"
        )
    else:
        assert "saw" in stdout, "the process is not protected from being seen: the test has tried nothing"
        assert re.search(r"map_files/\S+: Read-only file system", stdout), stdout


def test_traced_container_gets_no_command_without_filters(task: Task) -> None:
    """Its first process can have one tracer: one inside could keep the filters from being read."""
    program = "import ctypes, time; libc = ctypes.CDLL(None); libc.ptrace.restype = ctypes.c_long\n"
    program += f"assert libc.ptrace(0x4206, {leader(task)}, None, None) == 0; print(flush=True); time.sleep(1000)"
    tracer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert tracer.stdout and tracer.stdout.readline()
        with pytest.raises(DriverError, match="is tracing the container"):
            run(task, "true")
    finally:
        tracer.kill()
        tracer.communicate()
    assert run(task, "echo again")[1] == "again\n"


FILTERED = """\
#!{python}
import ctypes, os, struct, sys
program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))  # allows everything
packed = ctypes.create_string_buffer(struct.pack("HP", 1, ctypes.addressof(program)))
assert ctypes.CDLL(None).prctl(22, 2, packed, 0, 0) == 0
os.execv("{file}", ["{file}", *sys.argv[1:]])
"""


def test_kernel_that_does_not_give_filters(driver_file: Path, image: Path, tmp_path: Path) -> None:
    """As for a plugin that is itself under a filter: a command would have fewer than its payload."""
    wrapper = tmp_path / driver_file.name
    wrapper.write_text(FILTERED.format(python=sys.executable, file=driver_file))
    wrapper.chmod(0o755)
    with launch_like_agent(wrapper) as plugin, Tasks(plugin, image) as tasks:
        assert "no commands can be run in tasks" in plugin.fingerprints[-1].health_description
        task = tasks.start(FOREVER)
        for tty in (False, True):
            with pytest.raises(DriverError, match=r"cannot be read on this host: .*denied"):
                run(task, "true", tty)


def test_terminal_that_is_none_is_refused(tasks: Tasks, tmp_path: Path) -> None:
    """The container can put anything in the place of its terminals."""
    (tmp_path / "ptmx").write_text("a file")
    task = tasks.start(FOREVER, bind_read_only=[{str(tmp_path): "/dev/pts"}])
    with pytest.raises(DriverError, match="no terminal can be opened in the container"):
        run(task, "true", tty=True)
    assert run(task, "echo pipes work")[1] == "pipes work\n"


# -- terminals -----------------------------------------------------------------------------------------------


def test_terminal_is_the_containers_own(kind: Task) -> None:
    code, stdout, _ = run(kind, "tty; test -c $(tty) && echo is there; ps 2>&1 | head -1; stty size", tty=True)
    assert code == 0
    lines = stdout.split("\r\n")
    assert re.fullmatch(r"/dev/pts/\d+", lines[0]) and lines[1] == "is there"


def test_resize_is_told(task: Task) -> None:
    session = stream(task, "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done", tty=True)
    session.wait_for(b"ready")
    session.resize(33, 44)
    session.wait_for(b"33 44\r\n")
    session.resize(2, 1000)
    session.wait_for(b"2 1000\r\n")
    session.send(b"\x03")
    assert session.wait().exit_code == 130


def test_interactive_shell_with_job_control(kind: Task) -> None:
    session = kind.exec_streaming(["/bin/bash", "--norc", "-i"], tty=True)
    session.resize(24, 200)
    session.send(b"PS1='ready> '\n")
    session.wait_for(b"ready> ")
    session.send(b"sleep 1000\n")
    eventually(lambda: in_foreground(kind, b"sleep\x001000"))
    session.send(b"\x1a")  # Ctrl-Z
    session.wait_for(b"Stopped")
    session.send(b"jobs; bg; fg\n")
    session.wait_for(b"sleep 1000 &")
    eventually(lambda: in_foreground(kind, b"sleep\x001000"))
    session.send(b"\x03")  # Ctrl-C
    session.send(b"echo code $?\n")
    session.wait_for(b"code 130")
    session.send(b"exit 7\n")
    assert session.wait().exit_code == 7
    assert b"no job control" not in session.stdout and b"cannot set terminal" not in session.stdout


def in_foreground(task: Task, name: bytes) -> bool:
    """Whether a program of this name is what the keys of its terminal are for."""
    fields = read_stat(child_of(task, name))
    return bool(fields and fields[2] == fields[5])  # its process group, and the terminal's


def test_full_screen_program(task: Task) -> None:
    """One that switches to raw mode and the other screen, and reads single keys."""
    script = (
        r"stty raw -echo; printf '\033[?1049h\033[2J'; k=$(head -c1); printf '\033[?1049l'; stty sane; echo key $k"
    )
    session = stream(task, script, tty=True)
    session.wait_for(b"\x1b[2J")
    session.send(b"q")
    assert session.wait().exit_code == 0
    assert session.stdout == b"\x1b[?1049h\x1b[2J\x1b[?1049lkey q\r\n"


def test_end_of_stdin_at_a_terminal_is_typed(task: Task) -> None:
    """`nomad alloc exec -i=false -t` ends stdin at once: programs that read it end, others run on."""
    session = stream(task, "cat; echo after", tty=True)
    session.close_stdin()
    assert session.wait().exit_code == 0
    assert b"after" in session.stdout


def test_terminal_of_a_dead_session_is_free_again(task: Task) -> None:
    for _ in range(3):
        assert run(task, "tty", tty=True)[1] == "/dev/pts/0\r\n"


# -- exit codes and errors -----------------------------------------------------------------------------------


@TTY
@pytest.mark.parametrize("code", [0, 1, 42, 126, 127, 128, 130, 255])
def test_exit_codes(task: Task, code: int, tty: bool) -> None:
    session = stream(task, f"exit {code}", tty)
    result = session.wait()
    assert (result.exit_code, result.signal) == (code, 0)
    assert session.stdout == session.stderr == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE])
def test_killed_by_a_signal(task: Task, number: signal.Signals) -> None:
    result = stream(task, f"kill -{int(number)} $$").wait()
    assert (result.exit_code, result.signal) == (128 + number, number)


@TTY
def test_what_cannot_be_executed_is_said(kind: Task, tty: bool) -> None:
    def words(*command: str) -> tuple[int, str]:
        session = kind.exec_streaming(command, tty)
        code = session.wait().exit_code
        assert not tty or not session.stderr
        return code, (session.stdout + session.stderr).decode()

    code, text = words("no-such-program", "x")
    assert code == 127 and 'there is no "no-such-program" in the container\'s PATH (/usr/local/sbin:' in text
    code, text = words("/no/such/program")
    assert code == 127 and text.strip() == 'there is no "/no/such/program" in the container'
    code, text = words("/etc/passwd")
    assert code == 126 and text.strip() == '"/etc/passwd" in the container cannot be executed: Permission denied'
    code, text = words("/etc")
    assert code == 126 and "Permission denied" in text


def test_script_without_its_interpreter(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/no/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    tmp_path.chmod(0o755)
    task = tasks.start(FOREVER, bind_read_only=[{str(tmp_path): "/mnt"}])
    session = task.exec_streaming(["/mnt/script"])
    assert session.wait().exit_code == 126
    assert session.stderr == b'"/mnt/script" in the container needs an interpreter that is not there\n'


def test_program_is_looked_up_in_the_tasks_path(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "hello").write_text("#!/bin/sh\necho hello $1\n")
    (tmp_path / "hello").chmod(0o755)
    tmp_path.chmod(0o755)
    task = tasks.start(FOREVER, bind_read_only=[{str(tmp_path): "/mnt"}], env={"PATH": "/nowhere:/mnt:/bin"})
    session = task.exec_streaming(["hello", "you"])
    assert session.wait().exit_code == 0 and session.stdout == b"hello you\n"


@pytest.mark.parametrize("how", ["streaming", "task"])
@pytest.mark.parametrize("command", [[], ["true", "nul\0"]], ids=["empty", "NUL"])
def test_bad_commands_are_refused(task: Task, how: str, command: list[str]) -> None:
    with pytest.raises(DriverError, match="command = "):
        task.exec(command) if how == "task" else task.exec_streaming(command).wait()


def test_errors_never_say_the_word_that_hides_them(tasks: Tasks, shared: Plugin) -> None:
    """Nomad's client takes an error with "closed" in it for the end of its own connection, and shows nothing."""
    with pytest.raises(DriverError) as caught:
        ExecSession(shared, "alloc/closed-door/00000000", ["true"], False).wait()
    assert "not known" in str(caught.value) and "closed" not in str(caught.value)


def test_ended_task_is_said(tasks: Tasks) -> None:
    task, _ = tasks.run("true")
    for tty in (False, True):
        with pytest.raises(DriverError, match="has ended"):
            stream(task, "true", tty).wait()
    with pytest.raises(DriverError, match="has ended"):
        task.exec(["true"])


def test_user_that_has_gone_is_said(tasks: Tasks, users: dict[str, str], tmp_path: Path) -> None:
    task = tasks.start(FOREVER, user="webuser", bind_read_only=[users], working_directory="/")
    assert shown(task, "id -un") == "webuser\n"
    (tmp_path / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    with pytest.raises(DriverError, match='user: there is no user "webuser" in the container\'s /etc/passwd'):
        stream(task, "true").wait()


def test_first_message_must_be_the_setup(task: Task, shared: Plugin) -> None:
    answers = shared.driver.ExecTaskStreaming(iter([driver_pb2.ExecTaskStreamingRequest()]))
    with pytest.raises(Exception, match="setup"):
        list(answers)


# -- much, many, and ends in the middle ----------------------------------------------------------------------


def test_heartbeats_are_ignored(task: Task) -> None:
    session = stream(task, "read -r line; echo $line")
    for _ in range(5):
        session.heartbeat()
    session.send(b"text\n")
    assert session.wait().exit_code == 0 and session.stdout == b"text\n"


BIG = 100 << 20


def test_big_output_arrives_whole(task: Task) -> None:
    session = stream(task, f"yes 0123456789 | head -c {BIG}; echo end >&2")
    assert session.wait(300).exit_code == 0
    assert session.stdout == (b"0123456789\n" * (BIG // 11 + 1))[:BIG]
    assert session.stderr == b"end\n"


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_SIZE


def test_slow_client_holds_the_command_up(task: Task, shared: Plugin) -> None:
    """While it takes nothing, the plugin reads nothing, and so keeps nothing."""
    run(task, "true")
    before = memory(shared.pid)
    session = stream(task, f"head -c {BIG} /dev/zero; echo done >&2")
    session.reading.clear()
    time.sleep(2)
    assert memory(shared.pid) - before < 20 << 20
    assert b"done" not in session.stderr
    session.reading.set()
    assert session.wait(300).exit_code == 0
    assert len(session.stdout) == BIG
    assert memory(shared.pid) - before < 30 << 20


def test_big_input_arrives_whole(task: Task, shared: Plugin) -> None:
    before = memory(shared.pid)
    session = stream(task, "sleep 1; cksum")
    block = os.urandom(1 << 20)
    for _ in range(50):
        session.send(block)
    session.close_stdin()
    assert session.wait(300).exit_code == 0
    expected = subprocess.run(["cksum"], input=block * 50, stdout=subprocess.PIPE, check=True, timeout=60)
    assert session.stdout == expected.stdout
    assert memory(shared.pid) - before < 30 << 20


def test_input_nobody_reads_is_thrown_away(task: Task) -> None:
    session = stream(task, "exec <&-; sleep 0.5; exit 3")
    for _ in range(20):
        session.send(b"x" * 100_000)
    session.close_stdin()
    assert session.wait().exit_code == 3


def test_fifty_at_once(task: Task) -> None:
    def one(number: int) -> tuple[int, bytes]:
        session = stream(task, f"read -r line; echo $line {number}; exit {number}", tty=number % 2 == 1)
        session.send(b"got\n")
        return session.wait(120).exit_code, session.stdout

    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(one, range(50)))
    for number, (code, stdout) in enumerate(results):
        assert code == number
        assert stdout.splitlines()[-1] == f"got {number}".encode()


def marked(mark: str) -> list[int]:
    """Processes of the host that have a mark on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@TTY
def test_client_that_goes_away_takes_everything_with_it(task: Task, tty: bool) -> None:
    """The command, what it has started in the background, and what ignores the hang-up."""
    mark = str(uuid.uuid4())
    one = f"sh -c 'sleep 1000; : {mark}'"
    script = f"trap '' HUP TERM; {one} & (setsid {one}; :) & echo up; wait; : {mark}"
    session = stream(task, script, tty)
    session.wait_for(b"up")
    eventually(lambda: len(marked(mark)) >= 3)
    session.cancel()
    eventually(lambda: not marked(mark))


@pytest.mark.parametrize("forbidden", [False, True])
def test_client_that_goes_away_takes_daemons_with_it(tasks: Tasks, forbidden: bool) -> None:
    """They have left its session and its descendants. Only a cgroup of the command's own tells whose they are; a
    container that allows no further cgroups still gets commands, but no such end of them."""
    task = tasks.start(FOREVER)
    if forbidden:
        (payload_cgroup(task) / "cgroup.max.descendants").write_text("0")
    mark = str(uuid.uuid4())
    session = stream(task, f"{daemon(mark)}; echo up; read -r end")
    session.wait_for(b"up")
    session.cancel()
    if forbidden:
        time.sleep(0.5)
        for pid in marked(mark):
            kill(pid)
    eventually(lambda: not marked(mark))
    eventually(lambda: not leaves(task))


def daemon(mark: str) -> str:
    """A shell command that starts something in another session and with PID 1 as its parent."""
    return f"setsid sh -c '(while :; do sleep 0.05; done; : {mark}) >/dev/null 2>&1 </dev/null & exit'"


def payload_cgroup(task: Task) -> Path:
    return Path(driver_state(task)["cgroup"], "payload")


def leaves(task: Task) -> list[Path]:
    """The cgroups of commands."""
    return list(payload_cgroup(task).glob(f"**/{LEAF}*"))


def test_daemon_of_a_command_that_ended_in_order_stays(kind: Task) -> None:
    """Its cgroup goes after its end, and no other command's end touches it."""
    mark = str(uuid.uuid4())
    eventually(lambda: not leaves(kind))
    assert run(kind, daemon(mark))[0] == 0
    session = stream(kind, "echo up; read -r end")
    session.wait_for(b"up")
    assert len(leaves(kind)) == 2
    session.cancel()
    eventually(lambda: len(leaves(kind)) == 1)
    for pid in marked(mark):
        kill(pid)
    eventually(lambda: not marked(mark))
    run(kind, "true")
    eventually(lambda: not leaves(kind))


def test_editor_gets_a_hang_up_first(task: Task) -> None:
    """A program may save its work when its client is gone."""
    path = f"/tmp/{uuid.uuid4()}"
    session = stream(
        task, f"trap 'echo saved > {path}; exit' HUP; echo up; while :; do sleep 0.01; done", tty=True
    )
    session.wait_for(b"up")
    session.cancel()
    assert eventually(lambda: run(task, f"cat {path}")[1]) == "saved\n"


@TTY
def test_task_that_ends_in_the_middle(tasks: Tasks, tty: bool) -> None:
    task = tasks.start(FOREVER)
    session = stream(task, "echo up; trap '' TERM HUP; while :; do sleep 0.05; done", tty)
    session.wait_for(b"up")
    task.stop(timeout=0)
    result = session.wait()
    assert (result.exit_code, result.signal) == (137, 9)
    assert task.wait().signal == 9


def test_destroy_does_not_wait_for_a_client_that_takes_nothing(tasks: Tasks) -> None:
    task = tasks.start(FOREVER)
    session = stream(task, "yes")
    session.wait_for(b"y\n")
    session.reading.clear()
    time.sleep(0.5)
    done = threading.Event()

    def destroy() -> None:
        task.destroy()
        done.set()

    threading.Thread(target=destroy, daemon=True).start()
    assert done.wait(HANG)
    session.reading.set()
    session.wait()


def test_client_that_goes_away_at_any_moment(task: Task, shared: Plugin) -> None:
    """No process is left, and later commands work."""
    mark = str(uuid.uuid4())
    for number in range(30):
        session = stream(task, f"sleep 1000; : {mark}", tty=number % 2 == 1)
        time.sleep(number / 1000)
        session.cancel()
    assert run(task, "echo fine")[1] == "fine\n"
    eventually(lambda: not marked(mark))
    eventually(lambda: not zombies(shared.pid))


def test_nothing_is_left_of_many(task: Task, shared: Plugin) -> None:
    """Neither descriptors nor processes."""
    run(task, "true")

    def count() -> tuple[int, int]:
        return len(os.listdir(f"/proc/{shared.pid}/fd")), len(read_children(shared.pid))

    time.sleep(0.5)
    before = count()
    for number in range(20):
        run(task, "echo x", tty=number % 2 == 0)
        task.exec(["true"])
        with pytest.raises(DriverError):
            task.exec([])
    eventually(lambda: count() <= before)


# -- for script checks ---------------------------------------------------------------------------------------


def test_check_gets_both_streams_in_order_and_the_code(kind: Task) -> None:
    stdout, result = kind.exec(["/bin/sh", "-c", "echo one; echo two >&2; echo three; exit 2"])
    assert (stdout, result.exit_code, result.signal) == (b"one\ntwo\nthree\n", 2, 0)


def test_check_gets_the_end_of_much(task: Task) -> None:
    stdout, result = task.exec(["/bin/sh", "-c", "yes 0123456789 | head -c 1000000; echo the end >&2"], timeout=60)
    assert result.exit_code == 0
    assert len(stdout) == 4096 and stdout.endswith(b"0\nthe end\n" if False else b"the end\n")


def test_check_has_an_empty_stdin_and_no_device_of_the_host(task: Task) -> None:
    stdout, result = task.exec(["/bin/sh", "-c", "cat; readlink /proc/self/fd/0"])
    assert result.exit_code == 0 and stdout.startswith(b"pipe:")


def test_check_that_hangs_is_killed_with_all_it_started(kind: Task) -> None:
    mark = str(uuid.uuid4())
    script = f"trap '' TERM HUP; sh -c 'sleep 1000; : {mark}' & echo before; sh -c 'sleep 1000; : {mark}'"
    stdout, result = kind.exec(["/bin/sh", "-c", script], timeout=1)
    assert marked(mark) == []
    assert (result.exit_code, result.signal) == (137, 9)
    assert stdout.startswith(b"before\n") and b"did not end within its timeout of 1 s" in stdout


def test_check_with_a_background_child_ends(task: Task) -> None:
    stdout, result = task.exec(["/bin/sh", "-c", "sleep 3 & echo done; exit 1"], timeout=60)
    assert (stdout, result.exit_code) == (b"done\n", 1)


def test_check_that_cannot_be_executed(task: Task) -> None:
    stdout, result = task.exec(["no-such-check"])
    assert result.exit_code == 127 and b'there is no "no-such-check"' in stdout


# -- recovery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_restart", [False, True], ids=["plugin crash", "agent restart"])
def test_after_recovery(driver_file: Path, image: Path, agent_restart: bool) -> None:
    """The environment is there too; what ran when the plugin was killed is gone, and the task is not."""
    mark = str(uuid.uuid4())
    with launch_like_agent(driver_file) as second, Tasks(second, image) as tasks:
        first = launch_like_agent(driver_file)
        task = tasks.start(FOREVER, plugin=first, env={"TOKEN": "a secret"}, environment=[{"JOB": "own"}],
                           user="daemon", working_directory="/usr")  # fmt: skip
        session = stream(task, f"trap '' HUP; echo up; while :; do sleep 0.05; done; : {mark}")
        session.wait_for(b"up")
        os.kill(first.pid, signal.SIGKILL)
        first.kill_hard()
        task.recover(second, agent_restart=agent_restart)
        eventually(lambda: not marked(mark))
        assert shown(task, "echo $TOKEN $JOB; id -un; pwd") == "a secret own\ndaemon\n/usr\n"
        assert task.exec(["sh", "-c", "exit 3"])[1].exit_code == 3
        assert not second.violations


def test_surroundings_on_disk_are_roots_alone_and_go_with_the_task(tasks: Tasks) -> None:
    task = tasks.start(FOREVER, env={"TOKEN": "a secret"})
    path = state_directory(task.id) / "inside.json"
    assert "a secret" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    task.destroy()
    assert not path.parent.exists()


@pytest.mark.parametrize("text", [None, "", "[]", '{"users": 1}'])
def test_no_command_runs_as_somebody_else_than_the_task(tasks: Tasks, text: str | None) -> None:
    """Without its surroundings nobody knows the task's user: such a command ran as root."""
    task = tasks.start(FOREVER, user="daemon")
    path = state_directory(task.id) / "inside.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(DriverError, match="the command could not be started"):
        task.exec(["id", "-un"])


def test_helper_ends_with_the_plugin_and_comes_back_when_killed(driver_file: Path, image: Path) -> None:
    with launch_like_agent(driver_file) as plugin, Tasks(plugin, image) as tasks:
        task = tasks.start(FOREVER)
        assert helpers(plugin.pid) == [], "none before it is needed"
        run(task, "true")
        [first] = helpers(plugin.pid)
        kill(first)
        eventually(lambda: not is_alive(first))
        assert run(task, "echo again")[1] == "again\n"
        [second] = helpers(plugin.pid)
        task.destroy()
    eventually(lambda: not is_alive(second))


def helpers(pid: int) -> list[int]:
    """The processes of a plugin that wait for commands."""
    return [c for c in read_children(pid) if "nspawn-enter" in read_text(Path(f"/proc/{c}/cmdline"))]


def test_idle_helper_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nspawn.entries.IDLE_LIMIT", 1.0)

    async def scenario() -> None:
        helper = ExecServer()
        connection = await helper.connect()
        while not (found := helpers(os.getpid())):  # a thread started it: its children show when it has ended
            await asyncio.sleep(0.01)
        [process] = found
        await asyncio.sleep(2)
        assert is_alive(process), "it has an entry, and would take it along"
        connection.close()
        while is_alive(process):
            await asyncio.sleep(0.05)
        assert helper.socket is None

    asyncio.run(asyncio.wait_for(scenario(), HANG))


def test_commands_leave_a_shutdown_its_time(tasks: Tasks) -> None:
    """systemd-shutdown of 252 kills at once what is left when somebody traces it."""
    slow = "trap 'sleep 1; echo whole >&3; exit' TERM; exec 3>/local/end; while :; do sleep 0.05; done"
    run = ["systemd-run", "--property=KillMode=none", "--unit=slow", "sh", "-c", slow]
    task, end = tasks.boot(private_network=True), Path("local/end")
    eventually(lambda: task.exec(run)[1].successful)
    eventually((task.dir / end).exists)
    task.exec(["systemctl", "poweroff", "--no-block"])
    with contextlib.suppress(DriverError):
        while True:
            task.exec(["true"])
    task.wait()
    assert (task.dir / end).read_text() == "whole\n"
