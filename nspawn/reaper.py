# SPDX-License-Identifier: MPL-2.0
"""The reaper: ends what is left of tasks that nobody will ask for any more.

It must never end a task that an agent may still take up, be it this agent or another one on the same machine. So
a task counts as nobody's only if no plugin with an agent holds it, if the kernel agrees with what its state says,
and if one of these is true:

- Its allocation's directory was removed. The kernel must say so, of what is mounted in the container as /alloc.
  The path alone may be missing because a disk is not mounted, or because it is in another mount namespace.
- It is of this agent, and this agent has not taken it up for `reap_after`. It is of this agent if its allocation's
  directory is beside one that this agent has named. Tasks of another agent stay as long as they like: that agent
  may be down for maintenance.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from nspawn.common import HostError, log
from nspawn.host import FINGERPRINT_PERIOD
from nspawn.process import run_in_thread
from nspawn.running import check_leader, check_shim, find_states, is_held, read_mark
from nspawn.state import State, read_container_pids


@dataclass(frozen=True)
class Reaping:
    """The operator's settings."""

    after: float  # seconds
    is_dry_run: bool


@dataclass(frozen=True)
class AgentTasks:
    """What this plugin knows of tasks: those of its agent."""

    tasks: frozenset[str]  # the ids of those it has, and of those it starts or ends just now
    cgroups: frozenset[str]  # of the tasks it has
    alloc_dirs: frozenset[str]  # where its agent has allocations


@dataclass(frozen=True)
class Stray:
    """A task that no agent has."""

    state: State
    is_gone: bool  # its allocation's directory was removed


def find_strays(own: AgentTasks) -> list[Stray]:
    """Return the tasks that no agent has and that may be ended if that stays so. Raises OSError."""
    strays = []
    for state in find_states():
        if state.task_id in own.tasks or state.cgroup in own.cgroups or is_held(state.cgroup):
            continue
        is_gone = is_allocation_gone(state)
        if (is_gone or os.path.dirname(state.alloc_dir) in own.alloc_dirs) and is_certain(state):
            strays.append(Stray(state, is_gone))
    return strays


def is_certain(state: State) -> bool:
    """Whether the kernel agrees with a state: its cgroup is no other task's, and its processes are where they have
    to be. Raises OSError."""
    mark = read_mark(state.cgroup)
    if mark and mark.task_id != state.task_id:
        return False
    is_alive = state.shim.is_alive or bool(state.leader and state.leader.is_alive)
    if not mark and not is_alive and read_container_pids(state.cgroup):
        return False
    try:
        check_shim(state)
        if state.leader:
            check_leader(state.leader, state, has_other_users=False)
    except HostError:
        return False
    return True


MAX_MOUNTS = 1 << 20  # bytes of mountinfo: a container can make many mounts, but /alloc is one of the first


def is_allocation_gone(state: State) -> bool:
    """Whether the kernel says that an allocation's directory was removed. Raises OSError."""
    if not (state.alloc_dir and state.leader and state.leader.is_alive):
        return False
    try:
        os.lstat(state.alloc_dir)
        return False
    except FileNotFoundError:
        pass
    try:
        with open(f"/proc/{state.leader.pid}/mountinfo", "rb") as file:
            text = os.fsdecode(file.read(MAX_MOUNTS))
    except (FileNotFoundError, ProcessLookupError):
        return False
    return is_mounted_removed(text, os.path.basename(state.alloc_dir)) and state.leader.is_alive


def is_mounted_removed(mountinfo: str, alloc_id: str) -> bool:
    """Whether what is mounted as /alloc is the directory of this allocation, and removed."""
    fields = [line.split(" ") for line in mountinfo.split("\n")]
    roots = [field[3] for field in fields if len(field) > 4 and field[4] == "/alloc"]
    return bool(roots) and all(root.endswith(f"/{alloc_id}/alloc//deleted") for root in roots)


class Reaper:
    """Looks for strays as long as the plugin has an agent. Says what it is going to end one look ahead."""

    def __init__(self, settings: Callable[[], Reaping], own: Callable[[], AgentTasks],
                 end: Callable[[State], Awaitable[None]]) -> None:  # fmt: skip
        self.settings, self.own, self.end = settings, own, end
        self.since: Mapping[str, float] = {}  # when a stray was first seen
        self.said: set[str] = set()

    async def run(self) -> None:
        settings = self.settings()
        while settings.after:
            try:
                await self.look(settings)
            except OSError as error:
                log.warn("this machine keeps the reaper from looking", error=error.strerror)
            await asyncio.sleep(min(FINGERPRINT_PERIOD, max(settings.after / 2, 0.1)))

    async def look(self, settings: Reaping) -> None:
        """Look once. Raises OSError."""
        own, now = self.own(), time.monotonic()
        strays = {stray.state.task_id: stray for stray in await run_in_thread(lambda: find_strays(own))}
        self.since = {task_id: self.since.get(task_id, now) for task_id in strays}
        self.said &= strays.keys()
        due = [stray for task_id, stray in strays.items()
               if stray.is_gone or now - self.since[task_id] >= settings.after]  # fmt: skip
        for stray in due:
            task_id = stray.state.task_id
            if task_id not in self.said:
                self.said.add(task_id)
                self.say(stray, settings)
            elif not settings.is_dry_run and task_id not in self.own().tasks:
                log.warn("ending a task that is nobody's", task=task_id)
                await self.end(stray.state)

    def say(self, stray: Stray, settings: Reaping) -> None:
        state = stray.state
        why = "its allocation's directory was removed"
        if not stray.is_gone:
            why = f"no agent has taken it up for {settings.after:g} s"
        then = "reap_dry_run keeps it" if settings.is_dry_run else "it is ended soon"
        log.warn(
            f"a task is nobody's: {why}; {then}", task=state.task_id, cgroup=state.cgroup, machine=state.machine
        )
