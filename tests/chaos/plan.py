# SPDX-License-Identifier: MPL-2.0
"""What a round is: its task, what is done to it, and the ways in which it may truly end."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any

from tests.agent import ExitResult

ENDLESS = 10**9
# Arguments: lines to print, lines between two pauses, seconds of a pause, what to do with SIGTERM, how to end. The
# script notes the lines that it has written.
SCRIPT = r"""
note() { echo "$RUN $i" >/alloc/written; }
finish() { echo "out $RUN end $i"; echo "err $RUN end $i" >&2; note; $1; }
case $4 in exits) trap 'finish "exit 43"' TERM ;; ignores) trap '' TERM ;; esac
trap 'echo "got USR1"' USR1
end=$5 i=0
[ "$end" != kill ] || end="kill -KILL $$"
while [ $i -lt $1 ]; do
	echo "out $RUN $i ................................"; echo "err $RUN $i ................................" >&2
	i=$((i + 1))
	[ $((i % $2)) != 0 ] || { note; sleep $3; }
done
finish "$end"
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


@dataclasses.dataclass(frozen=True)
class End:
    """One way in which a task may end. `error` is a pattern."""

    code: int
    signal: int = 0
    error: str = "^$"

    def fits(self, result: ExitResult) -> bool:
        is_same = (result.exit_code, result.signal) == (self.code, self.signal)
        return is_same and bool(re.search(self.error, result.err))


TRAPPED = End(43)
KILLED = End(137, 9)
TIMED_OUT = End(137, 9, "kill_timeout")
ORPHANED = End(137, 9, "systemd-nspawn (itself was|were) killed")
UNKNOWN = End(1, 0, "exit code is not known")

CHOICES: dict[str, Sequence[Any]] = {
    "kind": ["command"] * 8 + ["process_two"] * 8 + ["booted"],
    "root": ["read_only", "volatile", "ephemeral"],
    "user_namespacing": [True, False],
    "network_veth": [True, False, False],
    "has_resources": [True, False],
    "lines": [0, 3, 100, 1000, ENDLESS, ENDLESS],
    "burst": [1, 20, 100],
    "code": [0, 0, 1, 2, 42, 120],
    "kills_itself": [True, False, False, False],
    "on_term": ["exits", "ignores", "default"],
    "start": ["well"] * 8 + ["cancelled", "short"],
    "finish": ["waits", "waits", "stops", "stops", "kills", "destroys"],
    "is_short_to_the_end": [True, False, False],
    "reads_late": [True, False, False],
    "asks_another": [True, False, False],
    "destroys": ["once", "twice", "twice at once", "cancelled first"],
}

SHORTAGES = ("fill_state", "fill_nspawn", "lock_state", "lock_nspawn", "few_descriptors")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A round as drawn from its seed. Its words are those of CHOICES and of the actions."""

    seed: int
    actions: tuple[str, ...]  # what happens to the task while it runs
    kind: str
    root: str
    user_namespacing: bool
    network_veth: bool
    has_resources: bool
    lines: int
    burst: int
    code: int
    kills_itself: bool
    on_term: str
    start: str
    shortage: str  # when the start is short of something
    finish: str
    is_short_to_the_end: bool
    reads_late: bool  # the log collector comes back only after the task's end
    asks_another: bool  # for the result: another plugin
    destroys: str

    @classmethod
    def draw(cls, seed: int, weights: dict[str, int], without: Sequence[str] = ()) -> Plan:
        """`without`: what is left out. The rest of the round is the same."""
        chance = random.Random(seed)
        drawn = {name: chance.choice(values) for name, values in CHOICES.items()}
        actions = chance.choices(list(weights), list(weights.values()), k=chance.choice([0, 1, 2, 3, 4, 6]))
        if drawn["kind"] != "process_two":
            drawn["kills_itself"] = False  # PID 1 cannot kill itself
        shortage = chance.choice([name for name in SHORTAGES if name not in without] or [""])
        for name in ("start", "destroys"):
            drawn[name] = CHOICES[name][0] if drawn[name] in without else drawn[name]
        names = tuple(name for name in actions if name not in without)
        return cls(seed=seed, actions=names, shortage=shortage, **drawn)

    @property
    def is_endless(self) -> bool:
        return self.lines == ENDLESS

    @property
    def is_booted(self) -> bool:
        return self.kind == "booted"

    @property
    def fits_pipe(self) -> bool:
        """Whether all that the task says can wait for a reader."""
        return self.lines < 1000

    @property
    def arguments(self) -> list[str]:
        """What the script gets: one that ends by itself takes a second at most."""
        burst = self.burst if self.is_endless else max(self.burst, self.lines // 20)
        end = "kill" if self.kills_itself else f"exit {self.code}"
        return [str(self.lines), str(burst), "0.03", self.on_term, end]

    @property
    def config(self) -> dict[str, Any]:
        """The task's driver config but for its image."""
        config: dict[str, Any] = {"boot": self.is_booted, "network_veth": self.network_veth}
        if self.is_booted:
            bind = {"local/unit": "/etc/systemd/system/chaos.service"}
            config |= {"command": ["systemd.unit=chaos.service"], "bind_read_only": [bind], "volatile": "overlay"}
        else:
            config |= {"command": ["/bin/sh", "/local/script", *self.arguments]}
            config |= {"volatile": "overlay"} if self.root == "volatile" else {self.root: True}
            config |= {"process_two": self.kind == "process_two"}
        return config | {"user_namespacing": self.user_namespacing and "volatile" not in config}

    @property
    def own_ends(self) -> list[End]:
        """How the task ends if nobody ends it."""
        if self.is_endless:
            return []
        return [End(255, 0, "ended by a signal")] if self.kills_itself else [End(self.code)]

    def stop_timeout(self, has_reader: bool) -> float:
        """Seconds in which a task that heeds the signal has certainly ended, unless a full pipe holds it up."""
        return 20.0 if (self.is_booted or self.on_term == "exits") and has_reader else 0.3

    def stop_ends(self, timeout: float) -> list[End]:
        """How StopTask may end the task."""
        if timeout == 0:
            return [KILLED]
        ends = [] if timeout > 10 else [TIMED_OUT]
        if self.is_booted:
            return [*ends, End(0)]
        if self.on_term == "exits":  # or it was about to kill itself, which nspawn does not tell apart
            return [*ends, TRAPPED, *([End(143, 15)] if self.kills_itself else [])]
        is_default = self.on_term == "default" and self.kind == "process_two"  # PID 1 ignores the signal
        return [*ends, End(143, 15)] if is_default else ends
