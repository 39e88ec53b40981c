# SPDX-License-Identifier: MPL-2.0
"""Registering containers with systemd-machined."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

from nspawn.common import log
from nspawn.host import have_machined
from nspawn.job import UUID
from nspawn.process import ProcessId, run_tool
from nspawn.state import State, split_id

REGISTRY = Path("/run/systemd/machines")  # systemd-machined has a file there for each machine it knows
CALL_LIMIT = 5  # seconds for a call
SETTLE_LIMIT = 2.0  # seconds that the removal of a task waits for its calls


class Machined:
    """Registers containers with systemd-machined, for `machinectl` and `journalctl -M`. It does so in the
    background, and nothing depends on it.

    Before 262 machined forgets machines in cgroups that systemd did not make, whenever it or systemd is reloaded
    and when `machinectl status` has asked for their unit (measured on 252 and 257). So each fingerprint registers
    them again. nspawn's own --register=yes would wait for the answer, and fail if machined is masked.
    """

    def __init__(self) -> None:
        self.calls: set[asyncio.Task[None]] = set()  # asyncio itself keeps no references
        self.of_machine: dict[str, list[asyncio.Task[None]]] = {}  # calls for it, until they are flushed
        self.reregistering: asyncio.Task[None] | None = None

    def register(self, state: State) -> None:
        self.of_machine[state.machine] = [self.start(register(state))]

    def unregister(self, state: State) -> None:
        self.of_machine.setdefault(state.machine, []).append(self.start(unregister(state)))

    def reregister(self, states: Iterable[State]) -> None:
        """Register what machined has forgotten, unless the last `remind` still does so."""
        if not self.reregistering or self.reregistering.done():
            self.reregistering = self.start(register(*states))

    async def flush(self, machine: str) -> None:
        """Wait until the calls for a machine have ended, at most SETTLE_LIMIT seconds."""
        if calls := self.of_machine.pop(machine, None):
            await asyncio.wait(calls, timeout=SETTLE_LIMIT)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        call = asyncio.create_task(work)
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        return call


async def register(*states: State) -> None:
    """Register the machines that run and are not on the list."""
    for state in states if have_machined() else ():
        if state.leader and state.leader.is_alive and not is_listed(state):
            await register_leader(state, state.leader)


async def register_leader(state: State, leader: ProcessId) -> None:
    words = ("nspawn", "container", leader.pid, f"/proc/{leader.pid}/root")
    await call("RegisterMachine", "sayssus", state.machine, *render_machine_id(state), *words)
    if not leader.is_alive:
        await unregister(state)
    elif not is_listed(state):
        log.debug("systemd-machined does not take the machine", machine=state.machine)


def is_listed(state: State) -> bool:
    return (REGISTRY / state.machine).exists()


async def unregister(state: State) -> None:
    if is_listed(state):
        await call("UnregisterMachine", "s", state.machine)


async def call(method: str, *words: object) -> None:
    manager = ("org.freedesktop.machine1", "/org/freedesktop/machine1", "org.freedesktop.machine1.Manager")
    with contextlib.suppress(OSError):  # the next fingerprint tries again
        await run_tool(
            ["busctl", "--quiet", f"--timeout={CALL_LIMIT}", "call", *manager, method, *map(str, words)]
        )


def render_machine_id(state: State) -> list[object]:
    """Return the allocation's id as a D-Bus array of bytes, which is empty for ids that are no UUIDs."""
    digits = split_id(state.task_id)[0].replace("-", "")
    number = bytes.fromhex(digits) if UUID.fullmatch(digits) else b""
    return [len(number), *number]
