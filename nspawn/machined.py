# SPDX-License-Identifier: MPL-2.0
"""Registering containers with systemd-machined."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

from nspawn.common import SAFE_PATH, log
from nspawn.host import FINGERPRINT_PERIOD, have_machined
from nspawn.job import UUID
from nspawn.process import NO_PROCESS, ProcessId, start_process
from nspawn.state import State, split_id

REGISTRY = Path("/run/systemd/machines")  # systemd-machined has a file there for each machine it knows
REGISTER_LIMIT = 5.0  # seconds for a call
SETTLE_LIMIT = 2.0  # seconds that the end of a task waits for calls


class Machined:
    """Tells systemd-machined of the machines, for `machinectl` and `journalctl -M`. Nothing depends on it: calls
    are made in the background, one at a time, and when one fails none is made for a while.

    Before 262 it forgets machines in cgroups that systemd has not made, whenever it or systemd is reloaded and
    when `machinectl status` has asked for their unit (measured on 252 and 257): so they are told again with each
    look at the host. nspawn's own --register=yes would wait for the answer, and fail where machined is masked.
    """

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.registering: tuple[str, ProcessId] = ("", NO_PROCESS)  # a machine, and the call for it
        self.rests_until = 0.0
        self.calls: set[asyncio.Task[None]] = set()

    def tell(self, state: State, *, has_ended: bool) -> None:
        """Register a machine, or take it off the list; returns at once."""
        if has_ended and self.registering[0] == state.machine:
            self.registering[1].send(signal.SIGKILL)  # machined does not answer
        if state.leader and have_machined():
            call = asyncio.create_task(self.update(state, has_ended), name=state.machine)
            self.calls.add(call)
            call.add_done_callback(self.calls.discard)

    async def settle(self, machine: str) -> None:
        """Return when nothing is left to tell of a machine, or machined has been too slow with it."""
        calls = [call for call in self.calls if call.get_name() == machine]
        if calls:
            await asyncio.wait(calls, timeout=SETTLE_LIMIT)

    async def update(self, state: State, has_ended: bool) -> None:
        async with self.turn:
            leader, entry = state.leader, REGISTRY / state.machine
            assert leader
            if entry.exists() is not has_ended or time.monotonic() < self.rests_until:
                return
            if has_ended:
                await self.call("UnregisterMachine", state, "s", state.machine)
            elif leader.is_alive:
                await self.register(state, leader)

    async def register(self, state: State, leader: ProcessId) -> None:
        words = ("nspawn", "container", leader.pid, f"/proc/{leader.pid}/root")
        await self.call("RegisterMachine", state, "sayssus", state.machine, *render_machine_id(state), *words)
        is_listed = (REGISTRY / state.machine).exists()
        if not leader.is_alive:
            if is_listed:
                await self.call("UnregisterMachine", state, "s", state.machine)
        elif not is_listed:
            self.rests_until = time.monotonic() + FINGERPRINT_PERIOD / 2
            log.debug("systemd-machined does not take the machine", machine=state.machine)

    async def call(self, method: str, state: State, *words: object) -> None:
        path = ("org.freedesktop.machine1", "/org/freedesktop/machine1", "org.freedesktop.machine1.Manager")
        argv = ["busctl", "--quiet", f"--timeout={REGISTER_LIMIT:g}", "call", *path, method, *map(str, words)]
        process = start_process(argv, environ={"PATH": SAFE_PATH})
        self.registering = (state.machine if method == "RegisterMachine" else "", process)
        try:
            await asyncio.wait_for(process.wait(), REGISTER_LIMIT + 1)
        except asyncio.TimeoutError:
            process.send(signal.SIGKILL)
            await process.wait()
        finally:
            self.registering = ("", NO_PROCESS)


def render_machine_id(state: State) -> list[object]:
    """Return the allocation's id, or for ids that are none of 16 bytes no id, as D-Bus has it."""
    digits = split_id(state.task_id)[0].replace("-", "")
    number = bytes.fromhex(digits) if UUID.fullmatch(digits) else b""
    return [len(number), *number]
