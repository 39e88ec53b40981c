# SPDX-License-Identifier: MPL-2.0
"""How a booted container is asked to shut down.

systemd has a signal for it. For other inits it is a command inside: their signals differ (SIGTERM means reboot to
busybox), some are asked through a pipe or a file, and they drop what they do not know. The program of PID 1 and
the signals that it handles only choose between ways that end the container itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass

from nspawn.bundle import DEFAULT_PATH, ExecContext
from nspawn.common import DriverError
from nspawn.entries import ExecServer
from nspawn.exec import Exec
from nspawn.job import render_signal
from nspawn.process import read_status, run_in_thread
from nspawn.state import State
from nspawn.unit import plan_stop

HALT, POWER_OFF = signal.SIGRTMIN + 3, signal.SIGRTMIN + 4  # to systemd
SYSTEMD = "systemd"


@dataclass(frozen=True)
class Init:
    """PID 1 of a container."""

    name: str = ""  # of its program, as the container has it
    caught: int = 0  # a bit for each signal that it handles
    blocked: int = 0  # the same for those that it keeps back, perhaps to read them from a descriptor

    @property
    def is_ready(self) -> bool:
        """Whether it has come so far that it takes the signal to power off, or is no systemd."""
        if self.name == SYSTEMD:
            return bool((self.caught | self.blocked) >> (POWER_OFF - 1) & 1)
        return self.name not in ("", "systemd-nspawn")

    def handles(self, number: int) -> bool:
        return bool(self.caught >> (number - 1) & 1)


def read_init(pid: int) -> Init:
    """Look at a container's first process. May block."""
    try:
        name = os.path.basename(os.readlink(f"/proc/{pid}/exe")).removesuffix(" (deleted)")
        status = read_status(pid)
        return Init(name, int(status["SigCgt"], 16), int(status["SigBlk"], 16))
    except (OSError, KeyError, ValueError):  # it has ended
        return Init()


@dataclass(frozen=True)
class Request:
    """How an init is asked to power the container off."""

    command: tuple[str, ...]  # run inside; () if the signal is all
    number: int  # the signal; with a command, the one that follows if that fails. 0 for none


def plan_request(init: Init, number: int) -> Request:
    """Return how an init is asked. `number` is the signal for a systemd."""
    if init.name == SYSTEMD or init.handles(number):
        return Request((), number)
    if init.name == "busybox":  # it waits for its signals, so it has no handlers
        return Request(("poweroff",), signal.SIGUSR2)
    known = next((one for one in (signal.SIGPWR, signal.SIGTERM) if init.handles(one)), 0)
    if init.name == "openrc-init":  # its poweroff may be sysvinit's
        return Request(("openrc-shutdown", "--poweroff", "now"), known)
    return Request(("poweroff",), known)


def plan_unit_request(unit: str, number: int) -> Request:
    """Return how a unit that is the task is asked to end. The system shuts down after it. If the unit cannot be
    asked, the system is."""
    return Request(plan_stop(unit, number), POWER_OFF)


# Seconds to the next request, after one that failed and after others: one that has just begun to boot drops them.
AGAIN, AGAIN_LATER = 1.0, 5.0
READY_LIMIT = 5.0  # seconds for an init to come so far that it can be asked
ROOT = ExecContext(variables={"PATH": DEFAULT_PATH, "LANG": "C.UTF-8", "TERM": "dumb"})


async def wait_init(pid: int, ended: asyncio.Event) -> Init:
    """Return the init, if possible when it can be asked: nspawn says READY long before that."""
    deadline = asyncio.get_running_loop().time() + READY_LIMIT
    while not (init := await run_in_thread(lambda: read_init(pid))).is_ready:
        if ended.is_set() or asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.02)
    return init


async def run_inside(server: ExecServer, state: State, ended: asyncio.Event, command: tuple[str, ...]) -> str:
    """Run a command as the container's root. Return "" if it succeeded, else why not."""
    run = Exec(server, state, ended, command, merge=True, inside=ROOT)
    try:
        await run.start()
        await run.end_stdin()
        async for _ in run.read("stdout"):
            pass
        status = await run.wait()
    except (DriverError, OSError) as error:
        return str(error)
    finally:
        run.close()
    how = f"its exit code was {status}" if status >= 0 else f"it was ended by {render_signal(-status)}"
    return run.error or (how if status else "")
