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

# Those of nspawn's messages that mislead, or that may be right when tried again, said so that they name the option
# and the remedy; {0} is the match's first group. All others are passed on as they are.
MESSAGES: tuple[tuple[str, str, bool], ...] = (  # pattern, sentence, may work when tried again
    (r"Directory tree (.+) is currently busy", BUSY, True),
    (r"Disk image (.+) is currently busy", "image: {0} is in use by another container that may write to it", True),
    (r"Failed to resolve user (\S+)\.", 'user: there is no user "{0}" in the container: it must be in '
     "its /etc/passwd, and the program getent in its /usr/bin", False),
    (r"(?:setres[ug]id\(\)|Changing privileges) failed: Invalid arg|set auxiliary groups: Invalid arg",
     "user: its number, or a group's, is not in the container's range of user ids; there are 65536 unless "
     "private_users says more", False),
    (r"Failed to change to specified working directory ([^:]+)",  # after it has said READY
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

# Said on every end where /run is no tmpfs; means nothing (measured on 252).
NOISE = re.compile(r"Attempted to remove disk file system under|Child died too early|Short read while reading")


def parse_nspawn_log(text: str) -> list[str]:
    """Return nspawn's messages from the lines it writes for /dev/kmsg: `<27>systemd-nspawn[123]: message`."""
    lines = [re.sub(r"^<\d+>\S*?\[\d+\]: ", "", line).strip() for line in text.split("\n")]
    return [line for line in lines if line and not NOISE.search(line)]


def find_message(lines: Sequence[str]) -> DriverError | None:
    """Return the sentence for the first line that is known, with the line itself."""
    for line in lines:
        for pattern, sentence, is_transient in MESSAGES:
            match = re.search(pattern, line)
            if match:
                text = f"{sentence.format(*match.groups())} (systemd-nspawn: {line})"
                return TransientError(text) if is_transient else DriverError(text)
    return None


def explain_failure(lines: Sequence[str], status: int) -> DriverError:
    """Turn nspawn's last words before the container was up into an error."""
    known = find_message(lines)
    if known or not lines:
        silent = f"systemd-nspawn ended with status {status} before the container was up, and said nothing"
        return known or TransientError(silent)
    return DriverError(f"systemd-nspawn could not start the container: {' '.join(lines[-3:])}")


@dataclass(frozen=True)
class Exit:
    """How a task ended."""

    code: int
    signal: int = 0
    error: str = ""  # a sentence where the code alone would mislead
    at: float = 0.0  # Unix time
    oom_killed: bool = False


@dataclass(frozen=True)
class Shortage:
    """A task's lack of memory: what its cgroup has counted, sizes in bytes, 0 for none or unknown."""

    kills: int = 0  # of its processes, by the kernel
    is_own: bool = True  # because of the task's own limit, and not because the machine had no more
    limit: int = 0
    peak: int = 0

    @classmethod
    def of(cls, counters: Mapping[str, int]) -> Shortage:
        """From memory.events and the numbers of memory.max and memory.peak beside them."""
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
class Record:
    """What the keeper leaves: nspawn's status as sh has it, and whether processes were still there then."""

    status: int
    is_orphaned: bool
    at: float
    shortage: Shortage = Shortage()


@dataclass(frozen=True)
class Ending:
    """What is known of a task when none of its processes is left."""

    mode: Mode
    at: float  # Unix time
    record: Record | None  # None: the shim was killed before it could leave one
    is_orphaned: bool = False  # the payload was there when nspawn was gone
    lines: Sequence[str] = ()  # nspawn's messages
    reason: str = ""  # why the driver has killed it
    sent: int = 0  # the last signal sent on Nomad's behalf
    complaint: str = ""  # why the command cannot be executed, as far as a look at it tells


def explain_exit(end: Ending) -> Exit:
    """Work out how a task ended. The first that fits:

    1. The driver killed it, and has said why.
    2. The shim was killed, and perhaps nspawn: nothing tells the exit code.
    3. The kernel killed it for lack of memory: a SIGKILL that nobody else has sent, or a shell's word for that of
       its child. Of a task that failed in another way it is said that processes of it had been killed.
    4. nspawn was killed.
    5. nspawn has let through how it ended: see explain_status.
    6. An exit code that may come from a command that was not executed: why it was not, if that is known.
    """
    if end.reason:
        return Exit(128 + signal.SIGKILL, signal.SIGKILL, end.reason, end.at)
    if end.record is None:
        return explain_lost_shim(end)
    exit = explain_status(end, end.record)
    shortage = end.record.shortage
    if shortage.kills and exit.code and end.sent != signal.SIGKILL:
        is_silent = end.mode is Mode.PROCESS_TWO and exit.code == 255
        if exit.code == 128 + signal.SIGKILL or is_silent:
            why = f"OOM killed: {shortage.reason}"
            return Exit(128 + signal.SIGKILL, signal.SIGKILL, why, end.at, oom_killed=True)
        before = f"the kernel had killed {shortage.kills} of its processes: {shortage.reason}"
        return replace(exit, error=f"{exit.error}; {before}" if exit.error else before)
    if exit.code in (1, 126, 127) and not exit.error and end.mode is not Mode.BOOT:
        return replace(exit, error=explain_command(end))
    return exit


def explain_lost_shim(end: Ending) -> Exit:
    if end.is_orphaned:
        why = "the container's keeper and systemd-nspawn were killed; the container was ended with them"
        return Exit(128 + signal.SIGKILL, signal.SIGKILL, why, end.at)
    return Exit(1, 0, "the container's keeper was killed, so the exit code is not known", end.at)


def explain_status(end: Ending, record: Record) -> Exit:
    """Return what nspawn lets through of its payload's end (measured, the same on 252, 257, 262)."""
    if record.is_orphaned:
        why = f"systemd-nspawn itself was killed (status {record.status}); the container was ended with it"
        return Exit(128 + signal.SIGKILL, signal.SIGKILL, why, end.at)
    for line in end.lines:
        match = re.search(r"terminated by signal (\S+)\.", line)
        if match:
            with contextlib.suppress(ConfigError):  # a name that only a newer systemd has
                number = parse_signal(match[1])
                return Exit(128 + number, number, "", end.at)
    if record.status == 255 and end.mode is Mode.PROCESS_TWO:
        if end.sent:
            return Exit(128 + end.sent, end.sent, "", end.at)
        why = "ended by a signal, or with exit code 255: systemd-nspawn does not tell which with process_two"
        return Exit(255, 0, why, end.at)
    if record.status == 133:
        return Exit(133, 0, "the container asked for a reboot; Nomad's restart policy decides", end.at)
    return Exit(record.status, 0, "", end.at)


def explain_command(end: Ending) -> str:
    """Say that the command could not be executed, if that is why it ended.

    nspawn reports the container as up before it enters the directory and executes the command; its line ("execv()
    failed") is in the task's stderr, and so is that of the shell that gets what the kernel takes for no program.
    """
    if known := find_message(end.lines):
        return str(known)
    return f"{end.complaint} (the system's own message is in the task's stderr)" if end.complaint else ""
