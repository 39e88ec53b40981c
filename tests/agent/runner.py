# SPDX-License-Identifier: MPL-2.0
"""Runs jobs on one plugin and shows what happens."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence

from nomad_pb import driver_pb2
from tests.agent.allocation import Allocation
from tests.agent.errors import AgentError
from tests.agent.job import Group, Job, TaskSpec
from tests.agent.log import LogEntry
from tests.agent.plugin import Plugin
from tests.agent.streams import Lines
from tests.agent.task import Task
from tests.agent.values import MIB

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\r")
_COLOURS = {
    "say": "1;36",
    "stdout": "32",
    "stderr": "33",
    "event": "35",
    "stats": "34",
    "plugin": "90",
    "bad": "1;31",
}


class Console:
    """Prints whole lines from several threads; coloured only on a terminal."""

    def __init__(self) -> None:
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._lock = threading.Lock()

    def paint(self, text: str, style: str) -> str:
        return f"\x1b[{_COLOURS[style]}m{text}\x1b[0m" if self.colour else text

    def print(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """What the agent does now."""
        self.print(self.paint(f"==> {text}", "say"))

    def line(self, source: str, style: str, text: str) -> None:
        shown = _CONTROL.sub("", text) if not self.colour else text.replace("\r", "")
        self.print(f"    {self.paint(f'{source:<8}', style)} {shown}")


class Runner:
    """Runs jobs on one plugin and shows what happens. Tasks are not restarted: one run shows one life."""

    def __init__(self, plugin: Plugin, console: Console, stats_interval: float = 5) -> None:
        self.plugin, self.console, self.stats_interval = plugin, console, stats_interval
        self.violations: list[str] = []
        plugin.on_event = self._on_event
        plugin.on_log = self._on_log

    def _on_event(self, event: driver_pb2.DriverTaskEvent) -> None:
        details = "".join(f" {key}={value}" for key, value in sorted(event.annotations.items()))
        self.console.line("event", "event", f"{event.task_name}: {event.message}{details}")

    def _on_log(self, entry: LogEntry) -> None:
        if entry.level in ("info", "warn", "error"):
            details = "".join(f" {key}={value}" for key, value in entry.fields.items())
            self.console.line("plugin", "plugin", f"{entry.level}: {entry.message}{details}")

    def run(self, job: Job, limit: float | None = None, until: str | None = None, linger: float = 0) -> bool:
        """Run a job until its tasks end, `limit` seconds have passed, or `linger` after `until` was printed.

        Returns whether all tasks succeeded; a task that was stopped for one of these reasons counts as such.
        """
        good = True
        for group in job.groups:
            if group.network_mode != "host":
                raise AgentError(f"group {group.name}: the stand-in makes no {group.network_mode} networks")
            self.console.say(f'Job "{job.name}" ({job.type}), group "{group.name}"')
            with Allocation() as allocation:
                with contextlib.ExitStack() as stack:
                    runs = [
                        stack.enter_context(_TaskRun(self, allocation, job, group, spec)) for spec in group.tasks
                    ]
                    self._wait(runs, limit, until, linger)
                good = all(run.good for run in runs) and good
        return good

    def _wait(self, runs: Sequence[_TaskRun], limit: float | None, until: str | None, linger: float) -> None:
        deadline = None if limit is None else time.monotonic() + limit
        shown = False
        try:
            for run in runs:
                run.start()
            while not all(run.ended.is_set() for run in runs):
                if until and not shown and all(run.printed(until) for run in runs):
                    shown = True
                    deadline = min(deadline or math.inf, time.monotonic() + linger)
                if deadline and time.monotonic() >= deadline:
                    break
                time.sleep(0.05)
        except KeyboardInterrupt:
            self.console.say("Interrupted: stopping the tasks in order; press Ctrl-C again to kill them")
        try:
            for run in runs:
                run.stop()
        except KeyboardInterrupt:
            for run in runs:
                run.stop(0)


class _TaskRun:
    """One task of a running job: its output, statistics and end on the console."""

    def __init__(self, runner: Runner, allocation: Allocation, job: Job, group: Group, spec: TaskSpec) -> None:
        self._runner, self._console, self._spec = runner, runner.console, spec
        self._lines = {name: Lines(self._printer(name)) for name in ("stdout", "stderr")}
        if spec.driver != "nspawn":
            raise AgentError(f'task {spec.name}: driver "{spec.driver}" is not this plugin\'s')
        self.task = Task(
            runner.plugin,
            allocation,
            spec.name,
            spec.config,
            env=spec.env,
            user=spec.user,
            resources=spec.resources,
            kill_timeout=spec.kill_timeout,
            kill_signal=spec.kill_signal,
            templates=spec.templates,
            meta=spec.meta,
            job=job.name,
            group=group.name,
            logs_disabled=spec.logs_disabled,
            on_output=lambda stream, data: self._lines[stream](data),
        )
        self.ended = threading.Event()
        self.good = False
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def _printer(self, stream: str) -> Callable[[str], None]:
        return lambda line: self._console.line(stream, stream, line)

    def printed(self, pattern: str) -> bool:
        return re.search(pattern, self.task.logmon.stdout.decode(errors="replace")) is not None

    def start(self) -> None:
        self._console.say(f'Task "{self._spec.name}"')
        for key, value in self._spec.config.items():
            text = json.dumps(value)
            self._console.line("config", "plugin", f"{key} = {text if len(text) < 90 else text[:87] + '...'}")
        began = time.monotonic()
        try:
            self.task.start()
        except AgentError as error:
            self._console.line("failed", "bad", str(error))
            self.ended.set()
            return
        self._console.say(f"Started after {1000 * (time.monotonic() - began):.0f} ms, as {self.task.id}")
        for target in (self._watch, self._show_stats):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()

    def _watch(self) -> None:
        try:
            result = self.task.wait(None)
        except AgentError as error:
            self._console.line("failed", "bad", f"WaitTask: {error}")
        else:
            self.good = result.successful or self._stopped
            self.task.logmon.wait_eof()
            for name, lines in self._lines.items():
                if lines.rest:
                    self._printer(name)(lines.rest)
            oom = " (out of memory)" if result.oom_killed else ""
            self._console.say(f'Task "{self._spec.name}" ended. {result}{oom}')
        finally:
            self.ended.set()

    def _show_stats(self) -> None:
        with contextlib.suppress(AgentError):
            for number, stats in enumerate(self.task.stats(self._runner.stats_interval)):
                usage = stats.agg_resource_usage
                if number and not self.ended.is_set():  # the first one has nothing to compare its CPU time with
                    memory = usage.memory.usage or usage.memory.rss
                    self._console.line(
                        "stats", "stats", f"{usage.cpu.percent:.1f} % of a core, {memory / MIB:.1f} MiB of memory"
                    )

    def stop(self, timeout: float | None = None) -> None:
        if self.ended.is_set():
            return
        self._stopped = True
        wanted = self._spec.kill_signal or "the driver's default signal"
        limit = self._spec.kill_timeout if timeout is None else timeout
        self._console.say(f'Stopping task "{self._spec.name}" with {wanted}; SIGKILL after {limit:g} s')
        self.task.stop(timeout)
        self.ended.wait(30)

    def __enter__(self) -> _TaskRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop(0)
        self.task.close()
