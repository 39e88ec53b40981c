# SPDX-License-Identifier: MPL-2.0
"""Random rounds against the built plugin: `sh build.sh chaos 1000`, or `sh build.sh chaos --seed S` for one again.

A round starts a task, does to it, to its processes and to the host what accidents do, and ends it. Then it checks
that the result is true and the same from every plugin, that no line of both logs is lost or comes twice, and that
nothing is left. All of a round is drawn from its seed; only the moments at which things happen are the machine's.

Rounds run in worker processes, each with a mount namespace of its own: there the directories that the driver and
nspawn keep below /run are small file systems, which a round can fill and in which every file left is found.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nomad_pb import driver_pb2  # noqa: E402 # found by the line above
from tests.agent import (  # noqa: E402 # the same
    Allocation,
    DriverError,
    ExitResult,
    Plugin,
    Resources,
    Task,
    call,
    launch_like_agent,
)
from tests.containers import escape, leader, make_small_image, nspawn, shim, zombies  # noqa: E402 # the same
from tests.leftovers import NSPAWN, STATE, leftovers, processes  # noqa: E402 # the same

T = TypeVar("T")
DRIVER = Path(os.environ.get("NSPAWN_TEST_DRIVER", ROOT / "nomad-driver-nspawn"))
IMAGE = Path(os.environ.get("NSPAWN_TEST_IMAGE", "/var/cache/nomad-driver-nspawn-tests/debian-bookworm"))
USERS = Path("/run/systemd/nspawn-uid")
HANG = 60.0  # seconds after which a call counts as one that never answers
ROUND_LIMIT = 300.0  # seconds after which a whole round does

# === What a round is =========================================================================================

# $1: lines to print, $2: lines between pauses, $3: seconds of a pause, $4: what to do with SIGTERM, $5: the end
SCRIPT = r"""
finish() { echo "out $RUN end $i"; echo "err $RUN end $i" >&2; mark; eval "$1"; }
mark() { { echo "$RUN $i" >/alloc/seen; } 2>/dev/null; }
case $4 in exits) trap 'finish "exit 43"' TERM ;; ignores) trap '' TERM ;; esac
trap 'echo "got USR1"' USR1
i=0
while [ $i -lt $1 ]; do
	echo "out $RUN $i ................................"; echo "err $RUN $i ................................" >&2
	i=$((i + 1))
	[ $((i % $2)) != 0 ] || { mark; sleep $3; }
done
finish "$5"
"""
UNIT = """[Unit]
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
SuccessAction=exit
FailureAction=exit
[Service]
ExecStart=/bin/sh /local/script {arguments}
Environment=RUN={run}
TimeoutStopSec=1
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
"""
ENDLESS = 10**9


@dataclasses.dataclass(frozen=True)
class End:
    """One way in which the task of a round may truly end; `error` is a pattern."""

    code: int
    signal: int = 0
    error: str = ""

    def fits(self, result: ExitResult) -> bool:
        error = re.search(self.error, result.err) if self.error else not result.err
        return (result.exit_code, result.signal) == (self.code, self.signal) and bool(error)


KILLED = End(137, 9)
TIMED_OUT = End(137, 9, "kill_timeout")
ORPHANED = End(137, 9, "systemd-nspawn itself was killed|systemd-nspawn were killed")
UNKNOWN = End(1, 0, "exit code is not known")
DRAWN: dict[str, Sequence[Any]] = {
    "kind": ["command"] * 8 + ["process_two"] * 8 + ["booted"],
    "root": ["read_only", "volatile", "ephemeral"],
    "user_namespacing": [True, False],
    "network_veth": [True, False, False],
    "resources": [True, False],
    "lines": [0, 3, 100, 1000, ENDLESS, ENDLESS],
    "burst": [1, 20, 100],
    "rest": [0.01, 0.05],
    "code": [0, 0, 1, 2, 42, 120],
    "by_signal": [False, False, False, True],
    "on_term": ["exits", "ignores", "default"],
    "start": ["well"] * 8 + ["cancelled", "short"],
    "finish": ["waits", "waits", "stops", "stops", "kills", "destroys"],
    "is_short_to_the_end": [True, False, False],
    "reads_late": [True, False, False],
    "asks_another": [True, False, False],
    "destroys": ["once", "twice", "twice at once", "cancelled first"],
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A round as drawn from its seed; the fields are those of DRAWN, and what is done meanwhile, in order."""

    seed: int
    drawn: Mapping[str, Any]
    actions: Sequence[str]

    @classmethod
    def draw(cls, seed: int, without: Sequence[str]) -> Plan:
        chance = random.Random(seed)
        drawn = {name: chance.choice(values) for name, values in DRAWN.items()}
        if drawn["kind"] != "process_two":
            drawn["by_signal"] = False  # PID 1 cannot kill itself, and systemd says what it exits with
        names = list(ACTIONS)
        actions = chance.choices(names, [ACTIONS[name][0] for name in names], k=chance.choice([0, 1, 2, 3, 4, 6]))
        if drawn["start"] in without:
            drawn["start"] = "well"
        return cls(seed, drawn, [name for name in actions if name not in without])

    def __str__(self) -> str:
        return f"{dict(self.drawn)}, {' '.join(self.actions) or 'no action'}"


@dataclasses.dataclass
class Report:
    """What became of a round. Each fault is its kind and what was seen."""

    seed: int
    done: list[str]
    faults: list[tuple[str, str]]
    plan: str = ""
    seconds: float = 0.0


# === A round =================================================================================================


class Round:
    """One task from its start to its destruction."""

    def __init__(self, worker: Worker, plan: Plan) -> None:
        self.worker, self.plan, self.drawn = worker, plan, plan.drawn
        self.random = random.Random(f"{plan.seed} actions")
        self.report = Report(plan.seed, [], [], str(plan))
        self.allocation = Allocation()
        self.has_allocation = True  # until the round removes its directory
        self.runs = 0  # starts of the task
        self.ends: list[End] = []
        self.is_harmed = False  # something has been done to it after which an exec may fail
        self.may_be_gone = False  # something after which no plugin can know it
        self.is_gone = False
        self.pidfds: dict[str, int] = {}
        self.paused: list[int] = []
        self.reliefs: list[Callable[[], None]] = []
        self.waiting: list[Any] = []
        self.results: list[ExitResult] = []
        self.task = self.make()

    def make(self) -> Task:
        drawn = self.drawn
        config: dict[str, Any] = {"boot": drawn["kind"] == "booted"}
        config |= {name: drawn[name] for name in ("user_namespacing", "network_veth")}
        if drawn["kind"] == "booted":
            bind = {"local/unit": "/etc/systemd/system/count.service"}
            config |= {"image": str(IMAGE), "command": ["systemd.unit=count.service"], "bind_read_only": [bind]}
            config |= {"volatile": "overlay", "user_namespacing": False}
        else:
            command = ["/bin/sh", "/local/script", *self.arguments]
            config |= {"image": str(self.worker.image), "command": [escape(word) for word in command]}
            config |= {"process_two": drawn["kind"] == "process_two"}
            config |= {"volatile": "overlay"} if drawn["root"] == "volatile" else {drawn["root"]: True}
            if drawn["root"] == "volatile":
                config["user_namespacing"] = False
        resources = Resources(cpu=500, memory=128) if drawn["resources"] else Resources()
        task = Task(self.worker.plugin, self.allocation, "task", config, resources=resources)
        (task.dir / "local/script").write_text(SCRIPT)
        return task

    @property
    def arguments(self) -> list[str]:
        drawn = self.drawn
        end = "kill -KILL $$" if drawn["by_signal"] else f"exit {drawn['code']}"
        burst = max(drawn["burst"], drawn["lines"] // 20 if drawn["lines"] < ENDLESS else 1)
        return [str(drawn["lines"]), str(burst), str(drawn["rest"]), drawn["on_term"], end]

    def run(self) -> Report:
        began = time.monotonic()
        try:
            self.start()
            for name in self.plan.actions:
                if not self.is_gone:
                    time.sleep(self.random.choice([0, 0.02, 0.1, 0.3]))
                    self.act(name)
            self.finish()
        except Exception:
            self.fault("harness", traceback.format_exc())
        self.resume(list(self.paused))
        self.relieve()
        self.close()
        self.report.seconds = time.monotonic() - began
        return self.report

    def act(self, name: str) -> None:
        self.report.done.append(name)
        before = list(self.paused)
        ACTIONS[name][1](self)
        self.resume(before)
        if self.reliefs and self.random.random() < 0.4:
            self.relieve()

    def fault(self, kind: str, text: str) -> None:
        self.report.faults.append((kind, text))

    # --- calls ---

    def ask(self, method: str, *, may_refuse: bool = False, **fields: Any) -> Any:
        """Call the driver; None if it refuses. It has to answer in time, in a sentence, and may refuse only where
        the round has given it a reason."""
        request = getattr(driver_pb2, f"{method}Request")(**fields)
        try:
            return call(getattr(self.task.plugin.driver, method), request, HANG)
        except TimeoutError as error:
            self.fault("hang", f"{method}: {error}")
        except DriverError as error:
            if "internal error" in error.text or error.code in ("UNKNOWN", "INTERNAL"):
                self.fault("internal error", f"{method}: {error.text}")
            elif error.code == "UNAVAILABLE" or not (may_refuse or self.reliefs):
                self.fault("refused", f"{method}: {error.code} {error.text}")
        return None

    def ask_result(self) -> None:
        """Ask how the task ended; every answer must be the same."""
        response = self.ask("WaitTask", task_id=self.task.id)
        if response:
            self.note_result(response)

    def note_result(self, response: Any) -> None:
        found = response.result
        self.results.append(ExitResult(found.exit_code, found.signal, found.oom_killed, response.err))

    def wait_beside(self) -> None:
        """As an agent does from the start on."""
        request = driver_pb2.WaitTaskRequest(task_id=self.task.id)
        self.waiting.append(self.task.plugin.driver.WaitTask.future(request))

    # --- start ---

    def start(self) -> None:
        if self.drawn["start"] == "short":
            self.act(self.random.choice(SHORTAGES))
        if self.drawn["start"] == "cancelled":
            self.report.done.append("cancelled")
            self.prepare()
            request = driver_pb2.StartTaskRequest(task=self.task.task_config())
            future: Any = self.task.plugin.driver.StartTask.future(request)
            time.sleep(self.random.uniform(0, 0.3))
            future.cancel()
            if self.random.random() < 0.7:
                self.ask("DestroyTask", task_id=self.task.id, force=True)
                self.check_leftovers("a cancelled start and DestroyTask")
        if not self.start_once():
            self.ask("DestroyTask", task_id=self.task.id, force=True)
            self.relieve()
            self.ask("DestroyTask", task_id=self.task.id, force=True)
            self.check_leftovers("a refused start and DestroyTask")
            self.is_gone = not self.start_once()

    def prepare(self) -> None:
        self.task.id = f"{self.allocation.id}/task/{self.random.getrandbits(32):08x}"
        self.task.prestart()

    def start_once(self, *, again: bool = False) -> bool:
        """Start the task; `again`: although it runs, which the driver refuses or answers with a new start."""
        if not again:
            self.prepare()
        else:
            self.task.prestart()
        run = self.runs + 1
        self.task.user_env["RUN"] = str(run)
        words = " ".join(f"'{word}'" for word in self.arguments)
        (self.task.dir / "local/unit").write_text(UNIT.format(arguments=words, run=run))
        response = self.ask("StartTask", task=self.task.task_config(), may_refuse=again)
        if response is None:
            self.is_gone = again and not self.knows_task()  # it had ended, and was removed for a start that failed
            return False
        self.runs, self.task.handle = run, response.handle
        self.is_harmed, self.waiting, self.results = False, [], []
        self.ends = [self.own_end] if self.drawn["lines"] != ENDLESS else []
        self.find_processes()
        self.wait_beside()
        return True

    def knows_task(self) -> bool:
        try:
            call(self.task.plugin.driver.InspectTask, driver_pb2.InspectTaskRequest(task_id=self.task.id), HANG)
        except DriverError as error:
            return error.code != "NOT_FOUND"
        return True

    @property
    def own_end(self) -> End:
        if self.drawn["by_signal"]:
            return End(255, 0, "ended by a signal")
        return End(self.drawn["code"])

    def find_processes(self) -> None:
        """Hold them by descriptors, so that nothing else is ever killed."""
        self.forget_processes()
        for name, find in {"shim": shim, "nspawn": nspawn, "leader": leader}.items():
            with contextlib.suppress(AssertionError, OSError, TypeError):  # a short task may be over
                if (pid := find(self.task)) > 1:
                    self.pidfds[name] = os.pidfd_open(pid)

    def forget_processes(self) -> None:
        for fd in self.pidfds.values():
            os.close(fd)
        self.pidfds = {}
        self.paused = []

    # --- what happens to it ---

    def send(self, process: str, number: int) -> None:
        fd = self.worker.pidfd if process == "plugin" else self.pidfds.get(process)
        with contextlib.suppress(ProcessLookupError):
            if fd is not None:
                signal.pidfd_send_signal(fd, number)

    def kill(self, process: str) -> None:
        self.is_harmed = True
        if process not in self.pidfds:
            return
        self.ends += {"shim": [UNKNOWN], "nspawn": [ORPHANED, UNKNOWN], "leader": [KILLED]}[process]
        self.may_be_gone |= process == "shim"
        self.send(process, signal.SIGKILL)

    def pause(self, process: str) -> None:
        """Until the next action is over; the plugin, which has to answer then, only for a moment."""
        self.send(process, signal.SIGSTOP)
        if process == "plugin":
            time.sleep(self.random.uniform(0.05, 0.5))
            self.send(process, signal.SIGCONT)
        elif process in self.pidfds:
            self.paused.append(self.pidfds[process])

    def resume(self, paused: Sequence[int]) -> None:
        for fd in paused:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(fd, signal.SIGCONT)
        self.paused = [fd for fd in self.paused if fd not in paused]

    def crash(self) -> None:
        self.worker.stop(hard=True)
        time.sleep(self.random.choice([0, 0.1, 0.4]))
        self.recover()

    def restart(self) -> None:
        self.worker.stop(hard=False)
        self.recover()

    def recover(self) -> None:
        """A new plugin takes the task over. What it does not know, an agent has it destroyed."""
        agent_restart = self.random.random() < 0.5
        if agent_restart:
            self.close_reader()
        self.task.plugin = self.worker.launch(self.fault)
        handle = driver_pb2.TaskHandle()
        assert self.task.handle
        handle.CopyFrom(self.task.handle)
        if agent_restart:
            handle.config.ClearField("msgpack_driver_config")
        response = self.ask("RecoverTask", handle=handle, may_refuse=self.may_be_gone)
        self.open_reader()
        if response is None and self.reliefs:
            self.relieve()
            response = self.ask("RecoverTask", handle=handle, may_refuse=self.may_be_gone)
        if response is None:
            self.is_gone = True
        else:
            self.wait_beside()

    def close_reader(self) -> None:
        self.task.logmon.stop(0)

    def open_reader(self) -> None:
        if self.has_allocation:
            self.task.logmon.restart()

    def stop(self, timeout: float = -1, *, wait: bool = True) -> None:
        """StopTask, with a timeout that fits the script. `wait`: for its answer."""
        if timeout < 0:
            is_slow = self.drawn["kind"] == "booted" or self.drawn["on_term"] == "exits"
            timeout = 20.0 if is_slow and self.has_allocation else 0.3
        self.resume(list(self.paused))
        self.open_reader()  # or a full pipe would keep the script from seeing the signal
        self.wait_traps()
        self.is_harmed = True
        self.ends += self.find_stop_ends(timeout)
        fields: dict[str, Any] = {"task_id": self.task.id}
        request = driver_pb2.StopTaskRequest(**fields)
        request.timeout.FromNanoseconds(round(timeout * 1e9))
        if wait:
            self.ask("StopTask", timeout=request.timeout, **fields)
        else:
            self.task.plugin.driver.StopTask.future(request)

    def wait_traps(self) -> None:
        """Until the script has set its traps: it then says something."""
        if self.has_allocation and self.runs:
            with contextlib.suppress(TimeoutError):
                self.task.logmon.wait_for(f"out {self.runs} ", timeout=3)

    def find_stop_ends(self, timeout: float) -> list[End]:
        if timeout == 0:
            return [KILLED]
        ends = [] if timeout > 10 else [TIMED_OUT]
        if self.drawn["kind"] == "booted":
            return [*ends, End(0)]
        if self.drawn["on_term"] == "exits":
            return [*ends, End(43)]
        if self.drawn["on_term"] == "default" and self.drawn["kind"] == "process_two":
            return [*ends, End(143, 15)]
        return ends

    def stop_and_crash(self) -> None:
        self.stop(wait=False)
        time.sleep(self.random.choice([0, 0.01, 0.05, 0.2]))
        self.crash()

    def signal(self) -> None:
        name = "SIGKILL" if self.random.random() < 0.2 or self.drawn["kind"] == "booted" else "SIGUSR1"
        if name == "SIGKILL":
            self.is_harmed = True
            self.ends.append(KILLED)
        self.ask("SignalTask", task_id=self.task.id, signal=name, may_refuse=True)

    def exec(self) -> None:
        request = driver_pb2.ExecTaskRequest(
            task_id=self.task.id, command=["/bin/sh", "-c", "echo $((6*7)); exit 7"]
        )
        request.timeout.FromSeconds(30)
        answer = self.ask("ExecTask", task_id=self.task.id, command=request.command, timeout=request.timeout,
                          may_refuse=self.is_harmed or self.drawn["lines"] != ENDLESS)  # fmt: skip
        if answer and answer.result.exit_code == 7 and answer.stdout != b"42\n":
            self.fault("exec", f"its output is {answer.stdout!r}")
        elif answer and answer.result.exit_code != 7 and not self.is_harmed and self.drawn["lines"] == ENDLESS:
            self.fault("exec", f"{answer.result} {answer.stdout!r} {answer.stderr!r}")

    def cancel_exec(self) -> None:
        session = self.task.exec_streaming(["/bin/sh", "-c", "sleep 100 & sleep 100"])
        time.sleep(self.random.uniform(0, 0.2))
        session.cancel()

    def start_twice(self) -> None:
        if self.has_allocation and self.drawn["kind"] != "booted":  # its unit would change while systemd reads it
            self.start_once(again=True)

    def remove_allocation(self) -> None:
        """As an agent's garbage collection, too early. Nobody reads the logs from then on."""
        self.close_reader()
        self.has_allocation = False
        for _ in range(3):  # the task may write there right now
            with contextlib.suppress(OSError):
                self.allocation.close()
                shutil.rmtree(self.allocation.root)

    def remove_state(self) -> None:
        for entry in STATE.iterdir():
            if entry.is_dir():
                subprocess.run(["rm", "-rf", "--one-file-system", str(entry)], check=False, timeout=30)
        self.may_be_gone = True
        self.ends.append(UNKNOWN)

    # --- shortages ---

    def relieve(self) -> None:
        while self.reliefs:
            self.reliefs.pop()()

    def fill(self, place: Path) -> None:
        filler = place / "chaos"
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            self.reliefs.append(lambda: filler.unlink(missing_ok=True))
            while True:
                file.write(bytes(4096))

    def make_read_only(self, place: Path) -> None:
        def remount(mode: str) -> None:
            subprocess.run(
                ["mount", "-o", f"remount,{mode}", str(place)], check=True, timeout=30, stderr=subprocess.DEVNULL
            )

        with contextlib.suppress(subprocess.CalledProcessError):  # busy: somebody writes there right now
            remount("ro")
            self.reliefs.append(lambda: remount("rw"))

    def take_descriptors(self) -> None:
        pid = self.worker.plugin.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        wanted = len(os.listdir(f"/proc/{pid}/fd")) + self.random.choice([-3, 0, 2, 5, 10])
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (wanted, hard))

        def relieve() -> None:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

        self.reliefs.append(relieve)

    # --- the end ---

    def finish(self) -> None:
        self.resume(list(self.paused))
        if not self.drawn["is_short_to_the_end"]:
            self.relieve()
        if self.is_gone:
            self.destroy()
            return
        if self.drawn["finish"] != "destroys":
            self.end()
            self.check_result()
            if self.drawn["asks_another"]:
                self.crash()
                if not self.is_gone:
                    self.ask_result()
                    self.check_result()
            self.check_logs()
        self.destroy()

    def end(self) -> None:
        """Have the task end, and ask for its result."""
        finish, is_over = self.drawn["finish"], self.drawn["lines"] != ENDLESS
        fits_pipe = self.drawn["lines"] < 1000
        if not (is_over and fits_pipe and self.drawn["reads_late"]):
            self.open_reader()
        if finish == "kills":
            self.stop(0)
        elif finish == "stops" or not is_over or not (self.has_allocation or fits_pipe):
            self.stop()
        self.ask_result()
        if not self.results:  # it could not be stopped, for lack of something
            self.relieve()
            self.stop()
            self.ask_result()
        self.relieve()
        self.ask_result()
        self.open_reader()

    def check_result(self) -> None:
        for future in self.waiting:
            with contextlib.suppress(Exception):  # that plugin was killed
                self.note_result(future.result(timeout=HANG))
        self.waiting = []
        if len(set(self.results)) > 1:
            self.fault("results differ", ", ".join(map(str, dict.fromkeys(self.results))))
        if self.results and not any(end.fits(self.results[-1]) for end in self.ends):
            self.fault("lost code", f"{self.results[-1]}, but it can only be {self.ends}")

    def check_logs(self) -> None:
        """Every line of the last start must come once and in order, as far as the task says that it wrote it."""
        deadline = time.monotonic() + 5
        while (faults := list(self.find_log_faults())) and time.monotonic() < deadline:
            time.sleep(0.02)  # the reader may be at it
        self.report.faults += faults

    def find_log_faults(self) -> Iterator[tuple[str, str]]:
        if not self.has_allocation:
            return
        run, _, number = (read_text(self.allocation.dir / "alloc/seen").strip() or "0 0").partition(" ")
        seen = int(number) if int(run) == self.runs else 0
        own = [End(43)] if self.drawn["lines"] == ENDLESS else [End(43), self.own_end]
        is_own = any(end.fits(result) for end in own for result in self.results[-1:])
        for stream, tag in (("stdout", "out"), ("stderr", "err")):
            is_booted = self.drawn["kind"] == "booted"  # on its console both are one
            text = getattr(self.task.logmon, "stdout" if is_booted else stream).decode(errors="replace")
            numbers = [int(word) for word in re.findall(rf"\b{tag} {self.runs} (\d+) ", text)]
            last = [int(word) for word in re.findall(rf"\b{tag} {self.runs} end (\d+)", text)]
            wanted = max([seen, *last])
            missing = set(range(max([wanted, *(number + 1 for number in numbers)]))) - set(numbers)
            if missing or (is_own and len(last) != 1):
                shown = f"{len(numbers)} lines of {wanted} and {len(last)} last ones"
                yield (
                    "lost lines",
                    f"{stream}: {shown}; {len(missing)} missing from {min(missing, default=wanted)}",
                )
            if len(numbers) > len(set(numbers)):
                yield "doubled lines", f"{stream}: {len(numbers) - len(set(numbers))}"
            if numbers != sorted(numbers):
                yield "disorder", stream

    def destroy(self) -> None:
        fields: dict[str, Any] = {"task_id": self.task.id, "force": True}
        other: Any = None
        if self.drawn["destroys"] in ("twice at once", "cancelled first"):
            other = self.task.plugin.driver.DestroyTask.future(driver_pb2.DestroyTaskRequest(**fields))
        if self.drawn["destroys"] == "cancelled first":
            time.sleep(self.random.uniform(0, 0.1))
            other.cancel()
        answer = self.ask("DestroyTask", **fields)
        if self.reliefs or self.drawn["destroys"] == "twice":
            self.relieve()
            answer = self.ask("DestroyTask", **fields)
        del other  # what was asked for is cancelled when nobody holds it
        if answer is not None:
            self.check_leftovers("DestroyTask")
            with contextlib.suppress(DriverError, TimeoutError):
                request = driver_pb2.WaitTaskRequest(task_id=self.task.id)
                call(self.task.plugin.driver.WaitTask, request, 10)
                self.fault("leftover", "WaitTask knows a task that was destroyed")

    def check_leftovers(self, after: str) -> None:
        left = self.find_leftovers()
        deadline = time.monotonic() + 2
        while left and time.monotonic() < deadline:  # the kernel takes its time with interfaces
            time.sleep(0.05)
            left = self.find_leftovers()
        if left:
            self.fault("leftover", f"after {after}: {'; '.join(left[:6])}")

    def find_leftovers(self) -> list[str]:
        left = leftovers(self.allocation.id)
        left += [f"file {path}" for path in self.worker.find_files() if self.allocation.id not in str(path)]
        left += [f"zombie {pid}" for pid in zombies(self.worker.plugin.pid)]
        if self.has_allocation:
            left += [f"file {path}" for path in self.task.dir.glob(".nspawn*")]
        return left

    def close(self) -> None:
        """Leave nothing to the next round."""
        with contextlib.suppress(Exception):
            self.task.logmon.stop(0)
        self.forget_processes()
        plugin = self.worker.plugin
        for text in plugin.violations:
            self.fault("violation", text)
        plugin.violations = []
        for entry in plugin.log:
            if entry.level == "error" or "Traceback" in entry.message:
                self.fault("error log", f"{entry.message} {entry.fields}")
        plugin.log.clear()
        if self.report.faults:
            self.worker.clear(self.allocation.id, self.fault)
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.allocation.close()
        for text in self.allocation.violations:
            self.fault("leftover", text)


# Everything that can happen to a task, and how often.
ACTIONS: dict[str, tuple[int, Callable[[Round], None]]] = {
    "kill_plugin": (8, Round.crash),
    "restart_plugin": (2, Round.restart),
    "kill_shim": (1, lambda round: round.kill("shim")),
    "kill_nspawn": (1, lambda round: round.kill("nspawn")),
    "kill_leader": (1, lambda round: round.kill("leader")),
    "pause_plugin": (2, lambda round: round.pause("plugin")),
    "pause_shim": (2, lambda round: round.pause("shim")),
    "pause_nspawn": (2, lambda round: round.pause("nspawn")),
    "pause_leader": (2, lambda round: round.pause("leader")),
    "close_reader": (4, Round.close_reader),
    "open_reader": (4, Round.open_reader),
    "stop": (1, Round.stop),
    "stop_and_crash": (2, Round.stop_and_crash),
    "signal": (3, Round.signal),
    "exec": (3, Round.exec),
    "cancel_exec": (2, Round.cancel_exec),
    "start_twice": (2, Round.start_twice),
    "remove_allocation": (1, Round.remove_allocation),
    "remove_state": (1, Round.remove_state),
    "fill_state": (2, lambda round: round.fill(STATE)),
    "fill_nspawn": (2, lambda round: round.fill(NSPAWN)),
    "lock_state": (2, lambda round: round.make_read_only(STATE)),
    "lock_nspawn": (2, lambda round: round.make_read_only(NSPAWN)),
    "few_descriptors": (3, Round.take_descriptors),
}
SHORTAGES = ["fill_state", "fill_nspawn", "lock_state", "lock_nspawn", "few_descriptors"]

# === Workers =================================================================================================


def read_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


class Worker:
    """One process that runs rounds in a mount namespace of its own, one after the other."""

    def __init__(self, without: Sequence[str]) -> None:
        self.without = without
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.image = self.folder / "images/small"
        for place in (STATE, NSPAWN, USERS):
            place.mkdir(parents=True, exist_ok=True)
            options = "size=4m,mode=0700" if place == STATE else "size=1m,mode=0755"
            command = ["mount", "-t", "tmpfs", "-o", options, "chaos", str(place)]
            subprocess.run(command, check=True, timeout=30)
        make_small_image(IMAGE, self.image, ["dash", "sleep"])
        self.pidfd = -1
        self.launch()

    def launch(self, fault: Callable[[str, str], None] | None = None) -> Plugin:
        self.plugin = launch_like_agent(DRIVER, 'allow = ["all"]')
        self.pidfd = os.pidfd_open(self.plugin.pid)
        return self.plugin

    def stop(self, *, hard: bool) -> None:
        if hard:
            os.kill(self.plugin.pid, signal.SIGKILL)
            self.plugin.kill_hard()
        else:
            self.plugin.kill()
        os.close(self.pidfd)

    def find_files(self) -> Iterator[Path]:
        """What is in the directories of driver and nspawn."""
        for place in (STATE, NSPAWN, USERS):
            for path in place.rglob("*"):
                is_socket = f"{STATE}/plugin-" in str(path)  # a crash leaves it until a plugin starts
                if path.name != "chaos" and not is_socket and (path.parent == STATE or not path.is_dir()):
                    yield path

    def clear(self, alloc_id: str, fault: Callable[[str, str], None]) -> None:
        """Remove all that a failed round has left, with the plugin that may know of it."""
        self.stop(hard=True)
        for pid, _ in processes(alloc_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        for path in self.find_files():
            subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=False, timeout=30)
        for line in leftovers(alloc_id):
            kind, _, name = line.partition(" ")
            if kind == "cgroup":
                subprocess.run(["find", name, "-depth", "-type", "d", "-delete"], check=False, timeout=30)
            elif kind == "interface":
                subprocess.run(["ip", "link", "delete", name], check=False, timeout=30)
        for path in self.image.parent.iterdir():
            if path != self.image:
                subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=False, timeout=30)
        self.launch()

    def run(self, seed: int) -> Report:
        return Round(self, Plan.draw(seed, self.without)).run()

    def close(self) -> None:
        self.plugin.kill_hard()
        shutil.rmtree(self.folder)


def serve(without: Sequence[str]) -> None:
    """A worker: seeds come on stdin, a line each, reports go to stdout."""
    worker = Worker(without)
    try:
        for line in sys.stdin:
            print(json.dumps(dataclasses.asdict(worker.run(int(line)))), flush=True)
    finally:
        worker.close()


def drive(seeds: Iterator[int], without: Sequence[str], on_report: Callable[[Report], None]) -> None:
    """Have one worker run rounds as long as there are seeds; one that hangs is replaced."""
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, __file__, "--worker", *without]
    process: subprocess.Popen[str] | None = None
    for seed in seeds:
        if process is None:
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin and process.stdout
        process.stdin.write(f"{seed}\n")
        process.stdin.flush()
        alarm = threading.Timer(ROUND_LIMIT, process.kill)
        alarm.start()
        line = process.stdout.readline()
        alarm.cancel()
        if line:
            on_report(Report(**json.loads(line)))
        else:
            on_report(Report(seed, [], [("hang", f"no end within {ROUND_LIMIT:g} s, or the worker died")]))
            process.kill()
            process.wait()
            process = None
    if process and process.stdin:
        process.stdin.close()
        process.wait(60)


def run_rounds(
    seeds: Sequence[int], workers: int, without: Sequence[str], out: Callable[[str], None]
) -> list[Report]:
    reports: list[Report] = []
    lock = threading.Lock()
    left = iter(seeds)

    def draw() -> Iterator[int]:
        while True:
            with lock:
                seed = next(left, None)
            if seed is None:
                return
            yield seed

    def on_report(report: Report) -> None:
        with lock:
            reports.append(report)
            if os.environ.get("CHAOS_TIMES"):
                print(f"{report.seconds:6.2f} {report.seed} {report.plan}")
            if report.faults:
                out(f"seed {report.seed}: {report.plan}; done: {' '.join(report.done)}")
                for kind, text in report.faults:
                    out(f"    {kind}: {text}")

    threads = [threading.Thread(target=drive, args=(draw(), without, on_report)) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reports


def render_summary(reports: Sequence[Report]) -> str:
    done = Counter(name for report in reports for name in report.done)
    failed = Counter(name for report in reports if report.faults for name in set(report.done))
    faults = Counter(kind for report in reports for kind, _ in report.faults)
    lines = [
        f"  {name:<20} {count:>6} times, in {failed[name]} failed rounds" for name, count in sorted(done.items())
    ]
    lines.append(f"{len(reports)} rounds, {sum(bool(report.faults) for report in reports)} failed")
    lines += [f"  {kind:<20} {count:>6}" for kind, count in faults.most_common()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="build.sh chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rounds", nargs="?", type=int, default=100)
    parser.add_argument("first", nargs="?", type=int, help="the first round's seed; the others follow")
    parser.add_argument("--seed", type=int, help="run this round alone")
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument("--without", default="", help=f"kinds to leave out, with commas: {', '.join(ACTIONS)}")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        serve(options.worker)
        return 0
    first = options.first if options.first is not None else random.SystemRandom().randrange(10**9)
    seeds = [options.seed] if options.seed is not None else list(range(first, first + options.rounds))
    print(f"seeds {seeds[0]} to {seeds[-1]}", flush=True)
    began = time.monotonic()
    reports = run_rounds(seeds, min(options.workers, len(seeds)), options.without.split(","),
                         lambda line: print(line, flush=True))  # fmt: skip
    print(f"{render_summary(reports)}\n{time.monotonic() - began:.0f} s")
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    sys.exit(main())
