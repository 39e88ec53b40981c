# SPDX-License-Identifier: MPL-2.0
"""One round: a task from its start to its destruction, what happens to it meanwhile, and the checks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import duration_pb2

from nomad_pb import driver_pb2
from tests.agent import Allocation, DriverError, ExitResult, Resources, Task, call
from tests.chaos.plan import KILLED, ORPHANED, SCRIPT, TRAPPED, UNIT, UNKNOWN, End, Plan
from tests.chaos.worker import FILLER, IMAGE, Worker
from tests.containers import escape, leader, read_stat, shim, zombies
from tests.leftovers import NSPAWN, STATE, leftovers

HANG = 60.0  # seconds after which a call counts as one that is never answered


@dataclasses.dataclass
class Report:
    """What became of a round. Each fault is its kind and what was seen."""

    seed: int
    plan: str = ""
    done: list[str] = dataclasses.field(default_factory=list)
    faults: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class Round:
    def __init__(self, worker: Worker, plan: Plan) -> None:
        self.worker, self.plan = worker, plan
        self.random = random.Random(f"{plan.seed} actions")
        self.report = Report(plan.seed, str(plan))
        self.allocation = Allocation()
        self.has_allocation = True  # until the round removes its directory
        self.ends: list[End] = []  # how the task may end
        self.is_harmed = False  # something has been done to it after which an exec may fail
        self.has_state = True  # until the round removes the state directory
        self.may_be_lost = False  # something after which no new plugin can know it
        self.may_lose_lines = False  # nobody holds what nobody reads
        self.is_gone = False  # no plugin knows it any more
        self.runs = 0  # starts of the task
        self.processes: dict[str, int] = {}  # descriptors, so that nothing else is ever killed
        self.paused: list[int] = []  # of these
        self.reliefs: list[Callable[[], None]] = []  # what ends the shortages
        self.waiting: list[Any] = []  # calls of WaitTask without an answer
        self.other_calls: list[Any] = []  # held, because a call that nobody holds is cancelled
        self.results: list[ExitResult] = []
        image = str(IMAGE if plan.is_booted else worker.image)
        config = {**plan.config, "image": image, "command": [escape(word) for word in plan.config["command"]]}
        resources = Resources(cpu=500, memory=128) if plan.has_resources else Resources()
        self.task = Task(worker.plugin, self.allocation, "task", config, resources=resources)
        (self.task.dir / "local/script").write_text(SCRIPT)

    def run(self) -> Report:
        try:
            self.start()
            for name in self.plan.actions:
                if not self.is_gone:
                    time.sleep(self.random.choice([0, 0.02, 0.1, 0.3]))
                    self.act(name)
            self.finish()
        except Exception:
            self.fault("harness", traceback.format_exc())
        finally:
            self.close()
        return self.report

    def act(self, name: str) -> None:
        self.report.done.append(name)
        paused = list(self.paused)
        ACTIONS[name].run(self)
        self.resume(paused)
        if self.reliefs and self.random.random() < 0.4:
            self.relieve()

    def fault(self, kind: str, text: str) -> None:
        self.report.faults.append((kind, text))

    # --- calls ---

    def ask(self, method: str, *, may_refuse: bool = False, **fields: Any) -> Any:
        """Call the driver; None if it refuses. It must answer in time. It may refuse only where the round has
        given it a reason, and with a sentence."""
        request = getattr(driver_pb2, f"{method}Request")(**fields)
        is_patient = method == "WaitTask" and self.reliefs  # the host may keep the task from being watched
        try:
            return call(getattr(self.task.plugin.driver, method), request, 5 if is_patient else HANG)
        except TimeoutError as error:
            if not is_patient:
                self.fault("hang", f"{method}: {error}")
        except DriverError as error:
            if "internal error" in error.text or error.code in ("UNKNOWN", "INTERNAL"):
                self.fault("internal error", f"{method}: {error.text}")
            elif error.code == "UNAVAILABLE" or not (may_refuse or self.reliefs):
                self.fault("refused", f"{method}: {error.code} {error.text}")
        return None

    def call_beside(self, method: str, **fields: Any) -> Any:
        """Call the driver without waiting for the answer."""
        request = getattr(driver_pb2, f"{method}Request")(**fields)
        return getattr(self.task.plugin.driver, method).future(request)

    def ask_result(self) -> None:
        if answer := self.ask("WaitTask", task_id=self.task.id):
            self.note_result(answer)

    def note_result(self, answer: driver_pb2.WaitTaskResponse) -> None:
        found = answer.result
        self.results.append(ExitResult(found.exit_code, found.signal, found.oom_killed, answer.err))

    # --- start ---

    def start(self) -> None:
        if self.plan.start == "short" and self.plan.shortage:
            self.act(self.plan.shortage)
        if self.plan.start == "cancelled":
            self.report.done.append("cancelled")
            self.prepare()
            self.name_run(0)  # its lines may get lost
            start = self.call_beside("StartTask", task=self.task.task_config())
            time.sleep(self.random.uniform(0, 0.3))
            start.cancel()
            if self.random.random() < 0.7:
                self.ask("DestroyTask", task_id=self.task.id, force=True)
                self.check_leftovers("a cancelled start and DestroyTask")
        self.prepare()
        if not self.start_task():
            self.ask("DestroyTask", task_id=self.task.id, force=True)
            self.relieve()
            self.ask("DestroyTask", task_id=self.task.id, force=True)
            self.check_leftovers("a refused start and DestroyTask")
            self.prepare()
            self.is_gone = not self.start_task()

    def prepare(self) -> None:
        self.task.id = f"{self.allocation.id}/task/{self.random.getrandbits(32):08x}"

    def name_run(self, run: int) -> None:
        """Have the script write a number into each of its lines."""
        self.task.user_env["RUN"] = str(run)
        words = " ".join(f"'{word}'" for word in self.plan.arguments)
        (self.task.dir / "local/unit").write_text(UNIT.format(arguments=words, run=run))

    def start_task(self, *, may_refuse: bool = False) -> bool:
        self.name_run(self.runs + 1)
        self.task.prestart()
        answer = self.ask("StartTask", task=self.task.task_config(), may_refuse=may_refuse)
        if answer is None:
            return False
        self.runs += 1
        self.task.handle = answer.handle
        self.ends, self.is_harmed, self.results = list(self.plan.own_ends), False, []
        self.forget_processes()
        with contextlib.suppress(OSError, TypeError):  # a short task may be over
            self.processes["shim"] = os.pidfd_open(shim(self.task))
            self.processes["leader"] = os.pidfd_open(leader(self.task))
            parent = read_stat(leader(self.task))[1]  # its children look the same for a moment
            self.processes["nspawn"] = os.pidfd_open(int(parent))
        self.waiting = [self.call_beside("WaitTask", task_id=self.task.id)]
        return True

    def start_twice(self) -> None:
        """Under the same id. The driver refuses it while the task runs, and otherwise starts it anew."""
        if not self.has_allocation or self.plan.is_booted:
            return
        if not self.start_task(may_refuse=True):
            try:
                request = driver_pb2.InspectTaskRequest(task_id=self.task.id)
                call(self.task.plugin.driver.InspectTask, request, HANG)
            except DriverError as error:  # it had ended, and was removed for a start that failed
                self.is_gone = error.code == "NOT_FOUND"

    def forget_processes(self) -> None:
        for fd in self.processes.values():
            os.close(fd)
        self.processes, self.paused = {}, []

    # --- what happens to the processes ---

    def kill(self, *processes: str) -> None:
        self.is_harmed = True
        for process in processes:
            if process in self.processes:
                # nspawn removes its link last of all. If it is killed then, sh tells no signal from an exit code.
                late = [End(128 + signal.SIGKILL)] if self.plan.network_veth else []
                ends = {"shim": [UNKNOWN], "nspawn": [ORPHANED, UNKNOWN, *late], "leader": [KILLED]}
                self.ends += ends[process]
                self.may_be_lost |= process == "shim"
                self.may_lose_lines |= process == "shim" and not self.task.logmon.running("stdout")
                self.may_lose_lines |= self.plan.is_booted  # nspawn passes its console on
                send(self.processes[process], signal.SIGKILL)

    def pause(self, process: str) -> None:
        """Until the next action is over. The plugin has to answer then: for a moment."""
        if process == "plugin":
            send(self.worker.pidfd, signal.SIGSTOP)
            time.sleep(self.random.uniform(0.05, 0.5))
            send(self.worker.pidfd, signal.SIGCONT)
        elif process in self.processes:
            send(self.processes[process], signal.SIGSTOP)
            self.paused.append(self.processes[process])

    def resume(self, paused: Sequence[int]) -> None:
        for fd in set(paused) & set(self.paused):
            send(fd, signal.SIGCONT)
            self.paused.remove(fd)

    def restart(self, *, hard: bool) -> None:
        """Another plugin takes the task up. If it does not know the task, an agent has it destroyed."""
        for text in self.worker.stop(hard=hard):
            self.fault("violation", text)
        time.sleep(self.random.choice([0, 0.1, 0.4]))
        is_new_agent = self.random.random() < 0.5
        if is_new_agent:
            self.close_reader()
        self.task.plugin = self.worker.launch()
        handle = driver_pb2.TaskHandle()
        assert self.task.handle
        handle.CopyFrom(self.task.handle)
        if is_new_agent:
            handle.config.ClearField("msgpack_driver_config")
        may_refuse = self.may_be_lost or not (self.has_state or self.is_running())
        answer = self.ask("RecoverTask", handle=handle, may_refuse=may_refuse)
        if answer is None and self.reliefs:
            self.relieve()
            answer = self.ask("RecoverTask", handle=handle, may_refuse=may_refuse)
        if is_new_agent:
            self.open_reader()
        self.is_gone = answer is None
        if not self.is_gone:
            self.waiting.append(self.call_beside("WaitTask", task_id=self.task.id))

    # --- what else happens ---

    def is_running(self) -> bool:
        fd = self.processes.get("leader")
        return fd is not None and not select.select([fd], [], [], 0)[0]

    def close_reader(self) -> None:
        self.task.logmon.stop(0)
        self.may_lose_lines |= self.may_be_lost  # the shim was killed

    def open_reader(self) -> None:
        if self.has_allocation:
            self.task.logmon.restart()

    def stop(self, timeout: float | None = None, *, waits: bool = True) -> None:
        """StopTask, with a timeout that fits the script."""
        self.resume(list(self.paused))
        self.open_reader()  # or a full pipe would keep the script from seeing the signal
        self.wait_traps()
        seconds = self.plan.stop_timeout(self.has_allocation) if timeout is None else timeout
        self.is_harmed = True
        self.ends += self.plan.stop_ends(seconds)
        duration = duration_pb2.Duration()
        duration.FromNanoseconds(round(seconds * 1e9))
        fields: dict[str, Any] = {"task_id": self.task.id, "timeout": duration}
        if waits:
            self.ask("StopTask", **fields)
        else:
            self.other_calls.append(self.call_beside("StopTask", **fields))

    def wait_traps(self) -> None:
        """Until the script has set its traps: then it says something."""
        if self.has_allocation:
            with contextlib.suppress(TimeoutError):
                self.task.logmon.wait_for(f"out {self.runs} ", timeout=3)

    def stop_and_crash(self) -> None:
        self.stop(waits=False)
        time.sleep(self.random.choice([0, 0.01, 0.05, 0.2]))
        self.restart(hard=True)

    def signal(self) -> None:
        name = "SIGKILL" if self.plan.is_booted or self.random.random() < 0.2 else "SIGUSR1"
        if name == "SIGKILL":
            self.is_harmed = True
            self.ends.append(KILLED)
        elif self.task.logmon.running("stdout"):
            self.wait_traps()
        else:
            self.ends.append(End(138, 10))
        self.ask("SignalTask", task_id=self.task.id, signal=name, may_refuse=True)

    def exec(self) -> None:
        may_fail = self.is_harmed or not self.plan.is_endless
        command = ["/bin/sh", "-c", "echo $((6*7)); exit 7"]
        timeout = duration_pb2.Duration(seconds=30)
        answer = self.ask("ExecTask", task_id=self.task.id, command=command, timeout=timeout, may_refuse=may_fail)
        found = (answer.result.exit_code, answer.stdout) if answer else None
        if found and found != (7, b"42\n") and not (may_fail or self.reliefs):
            self.fault("exec", f"{answer.result} {answer.stdout!r} {answer.stderr!r}")

    def cancel_exec(self) -> None:
        session = self.task.exec_streaming(["/bin/sh", "-c", "sleep 100 & sleep 100"])
        time.sleep(self.random.uniform(0, 0.2))
        session.cancel()

    def remove_allocation(self) -> None:
        """As an agent's garbage collection that comes too early. Nobody reads the logs from then on."""
        self.close_reader()
        self.has_allocation = False
        self.ends.append(End(2))  # the shell has not read its script yet
        for _ in range(3):  # the task may write there right now
            with contextlib.suppress(OSError):
                self.allocation.close()
                shutil.rmtree(self.allocation.root)

    def remove_state(self) -> None:
        for entry in STATE.iterdir():
            if entry.is_dir():
                subprocess.run(["rm", "-rf", "--one-file-system", str(entry)], check=False, timeout=30)
        self.ends += [UNKNOWN, End(1, 0, "exit code 1, or by a signal")]
        self.has_state, self.is_harmed = False, True

    # --- shortages ---

    def relieve(self) -> None:
        while self.reliefs:
            self.reliefs.pop()()

    def fill(self, place: Path) -> None:
        filler = place / FILLER
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            self.reliefs.append(lambda: filler.unlink(missing_ok=True))
            while True:
                file.write(bytes(4096))

    def make_read_only(self, place: Path) -> None:
        def remount(mode: str) -> bool:
            command = ["mount", "-o", f"remount,{mode}", str(place)]
            return subprocess.run(command, stderr=subprocess.DEVNULL, check=False, timeout=30).returncode == 0

        def relieve() -> None:
            if not remount("rw"):
                self.fault("harness", f"{place} stays read-only")

        if remount("ro"):  # not while somebody writes there
            self.reliefs.append(relieve)

    def take_descriptors(self) -> None:
        pid = self.worker.plugin.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        wanted = self.worker.count_descriptors() + self.random.choice([-3, 0, 2, 5, 10])
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (wanted, hard))

        def relieve() -> None:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

        self.reliefs.append(relieve)

    # --- the end ---

    def finish(self) -> None:
        self.resume(list(self.paused))
        if not self.plan.is_short_to_the_end:
            self.relieve()
        if not self.is_gone and self.plan.finish != "destroys":
            self.end()
            self.check_result()
            if self.plan.asks_another:
                self.restart(hard=True)
                if not self.is_gone:
                    self.ask_result()
                    self.check_result()
            self.check_logs()
        self.destroy()

    def end(self) -> None:
        """Have the task end, and ask for its result."""
        if self.plan.is_endless or not self.plan.fits_pipe or not self.plan.reads_late:
            self.open_reader()
        if self.plan.finish == "kills":
            self.stop(0)
        elif self.plan.finish == "stops" or self.plan.is_endless or not self.has_allocation:
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
        """It must be one of those that are true, and the same from every plugin."""
        for waiting in self.waiting:
            with contextlib.suppress(Exception):  # its plugin was killed
                self.note_result(waiting.result(timeout=HANG))
        self.waiting = []
        if len(set(self.results)) > 1:
            self.fault("results differ", "; ".join(map(str, dict.fromkeys(self.results))))
        for result in self.results[-1:]:
            if not any(end.fits(result) for end in self.ends):
                self.fault("lost code", f"{result}, but it can only be {' or '.join(map(str, set(self.ends)))}")

    def check_logs(self) -> None:
        deadline = time.monotonic() + 5
        while (faults := list(self.find_log_faults())) and time.monotonic() < deadline:
            time.sleep(0.02)  # the reader may be at it
        self.report.faults += faults

    def find_log_faults(self) -> Iterator[tuple[str, str]]:
        """Each line of the last start must come once and in order, as far as the task says that it has written it.
        If it has ended by itself, it must have said so."""
        if not self.has_allocation or self.may_lose_lines:
            return
        file = self.allocation.dir / "alloc/written"
        run, _, number = (file.read_text().strip() if file.exists() else "").partition(" ")
        written = int(number) if run == str(self.runs) else 0
        own = {TRAPPED} | (set(self.plan.own_ends) - set(self.plan.stop_ends(0.1)))
        is_own = any(end.fits(result) for end in own for result in self.results[-1:])
        for stream, tag in (("stdout", "out"), ("stderr", "err")):
            on = "stdout" if self.plan.is_booted else stream  # a console is one
            text = getattr(self.task.logmon, on).decode(errors="replace")
            numbers = [int(found) for found in re.findall(rf"\b{tag} {self.runs} (\d+) ", text)]
            last = [int(found) for found in re.findall(rf"\b{tag} {self.runs} end (\d+)", text)]
            count = max([written, *last, *(number + 1 for number in numbers)])
            if missing := set(range(count)) - set(numbers):
                yield "lost lines", f"{stream}: {len(missing)} of {count}, from {min(missing)} on"
            if is_own and not last:  # two, if the signal comes while it ends
                yield "lost lines", f"{stream}: the last one, after {text[-200:]!r}"
            if len(numbers) > len(set(numbers)):
                yield "doubled lines", f"{stream}: {len(numbers) - len(set(numbers))}"
            if numbers != sorted(numbers):
                yield "disorder", stream

    def destroy(self) -> None:
        fields: dict[str, Any] = {"task_id": self.task.id, "force": True}
        if self.plan.destroys in ("twice at once", "cancelled first"):
            other = self.call_beside("DestroyTask", **fields)
            if self.plan.destroys == "cancelled first":
                time.sleep(self.random.uniform(0, 0.1))
                other.cancel()
            self.other_calls.append(other)
        answer = self.ask("DestroyTask", **fields)
        if self.reliefs or self.plan.destroys == "twice":
            self.relieve()
            answer = self.ask("DestroyTask", **fields)
        if answer is None:
            return
        self.check_leftovers("DestroyTask")
        with contextlib.suppress(DriverError):
            request = driver_pb2.WaitTaskRequest(task_id=self.task.id)
            call(self.task.plugin.driver.WaitTask, request, HANG)
            self.fault("leftover", "WaitTask knows a task that was destroyed")

    def check_leftovers(self, after: str) -> None:
        deadline = time.monotonic() + 8  # the plugin holds logs that nobody has read for 5 s
        while (left := self.find_leftovers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            self.fault("leftover", f"after {after}: {'; '.join(left[:6])}")

    def find_leftovers(self) -> list[str]:
        left = leftovers(self.allocation.id)
        left += [f"file {path}" for path in self.worker.find_files() if self.allocation.id not in str(path)]
        left += [f"zombie {pid}" for pid in zombies(self.worker.plugin.pid)]
        count, before = self.worker.count_descriptors(), self.worker.descriptors  # a first exec takes some
        left += [f"{count} descriptors of the plugin instead of {before}"] if count > before + 6 else []
        if self.has_allocation:
            left += [f"file {path}" for path in self.task.dir.glob(".nspawn*")]
        return left

    def close(self) -> None:
        """Leave nothing to the next round."""
        self.resume(list(self.paused))
        self.relieve()
        self.close_reader()
        self.forget_processes()
        plugin = self.worker.plugin
        self.report.faults += [("violation", text) for text in plugin.violations]
        errors = [entry for entry in plugin.log if entry.level == "error"]
        self.report.faults += [("error log", f"{entry.message} {entry.fields}") for entry in errors]
        plugin.violations.clear()
        plugin.log.clear()
        if self.report.faults:
            self.worker.clear(self.allocation.id)
        with contextlib.suppress(OSError):
            self.allocation.close()
        for text in self.allocation.violations:
            self.fault("leftover", text)


def send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)


@dataclasses.dataclass(frozen=True)
class Action:
    """Something that can happen to a task."""

    weight: int  # how often
    run: Callable[[Round], None]


ACTIONS: Mapping[str, Action] = {
    "kill_plugin": Action(8, lambda round: round.restart(hard=True)),
    "restart_plugin": Action(2, lambda round: round.restart(hard=False)),
    "kill_shim": Action(1, lambda round: round.kill("shim")),
    "kill_nspawn": Action(1, lambda round: round.kill("nspawn")),
    "kill_shim_and_nspawn": Action(1, lambda round: round.kill("shim", "nspawn")),
    "kill_leader": Action(1, lambda round: round.kill("leader")),
    "pause_plugin": Action(2, lambda round: round.pause("plugin")),
    "pause_shim": Action(2, lambda round: round.pause("shim")),
    "pause_nspawn": Action(2, lambda round: round.pause("nspawn")),
    "pause_leader": Action(2, lambda round: round.pause("leader")),
    "close_reader": Action(4, Round.close_reader),
    "open_reader": Action(4, Round.open_reader),
    "stop": Action(1, Round.stop),
    "stop_and_crash": Action(2, Round.stop_and_crash),
    "signal": Action(3, Round.signal),
    "exec": Action(3, Round.exec),
    "cancel_exec": Action(2, Round.cancel_exec),
    "start_twice": Action(2, Round.start_twice),
    "remove_allocation": Action(1, Round.remove_allocation),
    "remove_state": Action(1, Round.remove_state),
    "fill_state": Action(2, lambda round: round.fill(STATE)),
    "fill_nspawn": Action(2, lambda round: round.fill(NSPAWN)),
    "lock_state": Action(2, lambda round: round.make_read_only(STATE)),
    "lock_nspawn": Action(2, lambda round: round.make_read_only(NSPAWN)),
    "few_descriptors": Action(3, Round.take_descriptors),
}
WEIGHTS = {name: action.weight for name, action in ACTIONS.items()}


def run_round(worker: Worker, seed: int, without: Sequence[str]) -> Report:
    return Round(worker, Plan.draw(seed, WEIGHTS, without)).run()
