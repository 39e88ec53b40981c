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


def explain_exit(mode: Mode, record: Record, lines: Sequence[str], reason: str, sent: int) -> Exit:
    """Work out how the payload ended, from what nspawn lets through (measured, the same on 252, 257, 262).

    `reason` is why the driver killed it, "" when it did not; `sent` the last signal sent on Nomad's behalf.
    """
    if reason:
        return Exit(128 + signal.SIGKILL, signal.SIGKILL, reason, record.at)
    if record.is_orphaned:
        why = f"systemd-nspawn itself was killed (status {record.status}); the container was ended with it"
        return Exit(128 + signal.SIGKILL, signal.SIGKILL, why, record.at)
    for line in lines:
        match = re.search(r"terminated by signal (\S+)\.", line)
        if match:
            with contextlib.suppress(ConfigError):  # a name that only a newer systemd has
                number = parse_signal(match[1])
                return Exit(128 + number, number, "", record.at)
    if record.status == 255 and mode is Mode.PROCESS_TWO:
        if sent:
            return Exit(128 + sent, sent, "", record.at)
        why = "ended by a signal, or with exit code 255: systemd-nspawn does not tell which with process_two"
        return Exit(255, 0, why, record.at)
    if record.status == 133:
        return Exit(133, 0, "the container asked for a reboot; Nomad's restart policy decides", record.at)
    return Exit(record.status, 0, "", record.at)


def explain_shortage(exit: Exit, mode: Mode, record: Record, is_killed_by_us: bool) -> Exit:
    """Say that a task ended for lack of memory, if it did: by a SIGKILL that nobody else has sent, or by a shell's
    word for that of its child. Of a task that ended in another way it is only said what had happened before."""
    kills = record.shortage.kills
    if not kills or exit.code == 0 or is_killed_by_us:
        return exit
    is_silent = mode is Mode.PROCESS_TWO and exit.code == 255
    if exit.code == 128 + signal.SIGKILL or is_silent:
        code = 128 + signal.SIGKILL
        return Exit(code, signal.SIGKILL, f"OOM killed: {record.shortage.reason}", exit.at, oom_killed=True)
    before = f"the kernel had killed {kills} of its processes: {record.shortage.reason}"
    return replace(exit, error=f"{exit.error}; {before}" if exit.error else before)
