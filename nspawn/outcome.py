# SPDX-License-Identifier: MPL-2.0
"""What nspawn's messages and exit codes mean, in words for people."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nspawn.common import ConfigError, DriverError, TransientError
from nspawn.images import BUSY
from nspawn.job import MIB, Mode, parse_signal

# Messages of nspawn that mislead, or whose cause may go away, with sentences that name the option and the remedy.
# {0} is the match's first group. Other messages are passed on unchanged.
SENTENCES: tuple[tuple[str, str, bool], ...] = (  # pattern, sentence, whether a retry may help
    (r"Directory tree (.+) is currently busy", BUSY, True),
    (r"Disk image (.+) is currently busy", "image: {0} is in use by another container that may write to it", True),
    (r"Failed to resolve user (\S+)\.", 'user: there is no user "{0}" in the container: it must be in '
     "its /etc/passwd, and the program getent in its /usr/bin", False),
    (r"(?:setres[ug]id\(\)|Changing privileges) failed: Invalid arg|set auxiliary groups: Invalid arg",
     "user: its number, or a group's, is not in the container's range of user ids; there are 65536 unless "
     "private_users says more", False),
    (r"Failed to change to specified working directory ([^:]+)",  # comes after READY
     "working_directory: there is no directory {0} in the container", False),
    (r"AmbientCapability= setting is not fully covered",
     "ambient_capability: the container cannot have it; for CAP_NET_BIND_SERVICE set private_network or another "
     "network of its own", False),
    (r"Network interface (\S+) is not initialized yet",
     "network: systemd-udevd, which must run on the host, does not know the interface {0}", True),
    (r"--image= requires (?:access to the host's /run/|that systemd-udevd is)",  # before 262, and 262
     "image: disk images need systemd-udevd on the host; use a directory", False),
    (r"Failed to set up ID mapped mounts|ID mapped mounts are apparently not available",
     "user_namespacing: the image's file system cannot be mapped; set user_namespacing = false", False),
    (r"Failed to create mount point (.+): Read-only file system",
     'read_only: the image has no {0} to mount on; make it in the image, or set volatile = "overlay"', False),
    (r"No space left on device", "image: the disk is full", True),
)  # fmt: skip

# Lines that name no cause. The first comes at every end if /run is not a tmpfs (measured on 252), the others come
# when nspawn's child has failed.
NOISE = re.compile(r"Attempted to remove disk file system under|Child died too early|Short read while reading")


def parse_nspawn_log(text: str) -> list[str]:
    """Return nspawn's messages from the lines it writes for /dev/kmsg: `<27>systemd-nspawn[123]: message`."""
    lines = [re.sub(r"^<\d+>\S*?\[\d+\]: ", "", line).strip() for line in text.split("\n")]
    return [line for line in lines if line and not NOISE.search(line)]


def find_message(lines: Sequence[str]) -> DriverError | None:
    """Return the error for the first line that SENTENCES knows, None if it knows none."""
    for line in lines:
        for pattern, sentence, is_transient in SENTENCES:
            match = re.search(pattern, line)
            if match:
                text = f"{sentence.format(*match.groups())} (systemd-nspawn: {line})"
                return TransientError(text) if is_transient else DriverError(text)
    return None


def explain_failure(lines: Sequence[str], status: int) -> DriverError:
    """Return the error for an nspawn that ended before the container was up."""
    known = find_message(lines)
    if known or not lines:
        silent = (
            f"systemd-nspawn ended with status {status} before the container was up, and said nothing here; the "
            "task's stderr may have its words"
        )
        return known or TransientError(silent)
    return DriverError(f"systemd-nspawn could not start the container: {' '.join(lines[-3:])}")


@dataclass(frozen=True)
class ExitResult:
    """How a task ended."""

    code: int
    signal: int = 0
    error: str = ""  # a sentence if the code alone would mislead
    at: float = 0.0  # Unix time
    oom_killed: bool = False


@dataclass(frozen=True)
class OomReport:
    """A task's lack of memory, as its cgroup has counted it. Sizes are in bytes; 0 is none or unknown."""

    kills: int = 0  # how many of its processes the kernel has killed
    is_own: bool = True  # it reached its own limit; otherwise the machine had no more memory
    limit: int = 0
    peak: int = 0

    @classmethod
    def of(cls, counters: Mapping[str, int]) -> OomReport:
        """Make one from the counters of memory.events, with memory.max and memory.peak added to them."""
        is_own = counters.get("oom", 0) > 0
        numbers = counters.get("memory.max", 0), counters.get("memory.peak", 0)
        return cls(counters.get("oom_kill", 0), is_own, *numbers)

    @property
    def reason(self) -> str:
        sizes = [
            f"{what} {size / MIB:.0f} MiB" for what, size in (("limit", self.limit), ("peak", self.peak)) if size
        ]
        why = "the task used all the memory it may" if self.is_own else "the machine had no more memory"
        return f"{why} ({', '.join(sizes)})" if sizes else why


@dataclass(frozen=True)
class ExitRecord:
    """The exit record that the shim leaves."""

    status: int  # of nspawn, as sh reports it
    is_orphaned: (
        bool  # something was in the payload's cgroup when nspawn was gone: the payload, or an exec's entry
    )
    at: float  # Unix time
    oom: OomReport = OomReport()


@dataclass(frozen=True)
class Ending:
    """What is known about a task when none of its processes is left."""

    mode: Mode
    at: float  # Unix time
    record: ExitRecord | None  # None: the shim was killed before it could leave one
    is_orphaned: bool = False  # the payload was there when nspawn was gone
    lines: Sequence[str] = ()  # nspawn's messages
    reason: str = ""  # why the driver killed it, if it noted that
    sent: int = 0  # the last signal sent on Nomad's behalf
    is_cut_short: bool = False  # nspawn has left what it removes last
    has_lost_lines: bool = False  # nspawn's messages were removed with the state directory


def explain_exit(end: Ending) -> ExitResult:
    """Return how a task ended. The first of these that fits decides:

    1. There is no record, because the shim was killed, perhaps with nspawn: the exit code is not known. If the
       driver has noted why it kills the task, that is the reason.
    2. The driver noted why it kills the task, and SIGKILL has ended it. A task that was faster, or whose kill a
       crash of the plugin prevented, has a result of its own.
    3. The kernel killed processes for lack of memory, and Nomad sent no SIGKILL. Exit code 137, or 255 with
       process_two, is then an OOM kill. With any other failure, the error only mentions the processes.
    4. nspawn itself was killed.
    5. nspawn's status and messages tell it: see explain_status.
    6. If the exit code may mean that the command was not executed, the error says why, if that is known.
    """
    exit = explain_status(end, end.record) if end.record else explain_lost_shim(end)
    if end.reason and (end.record is None or exit.signal == signal.SIGKILL):
        return ExitResult(128 + signal.SIGKILL, signal.SIGKILL, end.reason, end.at)
    if end.record is None:
        return exit
    oom = end.record.oom
    if oom.kills and exit.code and end.sent != signal.SIGKILL:
        is_silent = end.mode is Mode.PROCESS_TWO and exit.code == 255
        if exit.code == 128 + signal.SIGKILL or is_silent:
            why = f"OOM killed: {oom.reason}"
            return ExitResult(128 + signal.SIGKILL, signal.SIGKILL, why, end.at, oom_killed=True)
        before = f"the kernel had killed {oom.kills} of its processes: {oom.reason}"
        return replace(exit, error=f"{exit.error}; {before}" if exit.error else before)
    if exit.code in (1, 126, 127) and not exit.error and end.mode is not Mode.BOOT:
        # nspawn says that the container is up before it enters the directory and executes the command.
        known = find_message(end.lines)
        return replace(exit, error=str(known)) if known else exit
    return exit


def explain_lost_shim(end: Ending) -> ExitResult:
    if end.is_orphaned:
        why = "the container's shim and systemd-nspawn were killed; the container was ended with them"
        return ExitResult(128 + signal.SIGKILL, signal.SIGKILL, why, end.at)
    return ExitResult(1, 0, "the container's shim was killed, so the exit code is not known", end.at)


def explain_status(end: Ending, record: ExitRecord) -> ExitResult:
    """Return how the payload ended, as far as nspawn tells (measured: the same on 252, 257 and 262). A kill of
    nspawn in its last milliseconds, when it has removed all but its link, is told as the exit code 137: sh reports
    both alike."""
    is_killed = record.status > 128 and end.is_cut_short  # else status is an exit code
    if is_killed and record.is_orphaned:
        why = f"systemd-nspawn itself was killed (status {record.status}); the container was ended with it"
        return ExitResult(128 + signal.SIGKILL, signal.SIGKILL, why, end.at)
    for line in end.lines:
        match = re.search(r"terminated by signal (\S+)\.", line)
        if match:
            with contextlib.suppress(ConfigError):  # a name that parse_signal does not know
                number = parse_signal(match[1])
                return ExitResult(128 + number, number, "", end.at)
    if is_killed:
        why = f"systemd-nspawn itself was killed (status {record.status}) when the container had ended"
        return ExitResult(128 + signal.SIGKILL, signal.SIGKILL, f"{why}: its exit code is not known", end.at)
    if record.status == 255 and end.mode is Mode.PROCESS_TWO:
        if end.sent:
            return ExitResult(128 + end.sent, end.sent, "", end.at)
        why = "ended by a signal, or with exit code 255: systemd-nspawn does not tell which with process_two"
        return ExitResult(255, 0, why, end.at)
    if record.status == 1 and end.has_lost_lines:  # a message would tell a signal from an exit code
        if end.sent == signal.SIGKILL:
            return ExitResult(128 + signal.SIGKILL, signal.SIGKILL, "", end.at)
        why = (
            "ended with exit code 1, or by a signal: systemd-nspawn's message was removed with the state directory"
        )
        return ExitResult(1, 0, why, end.at)
    if record.status == 133:
        return ExitResult(133, 0, "the container asked for a reboot; Nomad's restart policy decides", end.at)
    return ExitResult(record.status, 0, "", end.at)
