# SPDX-License-Identifier: MPL-2.0
"""What a task is given, and how it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from google.protobuf import duration_pb2

from nomad_pb import driver_pb2

MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Port:
    """A port of the group network: the host's, and the one inside (0: the same)."""

    value: int
    to: int = 0
    host_ip: str = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Resources:
    """cpu in MHz, memory in MiB (memory_max -1: unlimited, 0: none), cores: ids reserved for the task."""

    cpu: int = 100
    memory: int = 300
    memory_max: int = 0
    cores: tuple[int, ...] = ()
    ports: Mapping[str, Port] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ExitResult:
    """The end of a task as WaitTask or an exec reports it."""

    exit_code: int
    signal: int = 0
    oom_killed: bool = False
    err: str = ""

    @property
    def successful(self) -> bool:
        return not (self.exit_code or self.signal or self.err)

    def __str__(self) -> str:
        text = f"Exit Code: {self.exit_code}"
        text += f", Signal: {self.signal}" if self.signal else ""
        return text + (f', Exit Message: "{self.err}"' if self.err else "")


@dataclasses.dataclass(frozen=True)
class Template:
    """A template block; `data` may use {{ env "NAME" }}, `destination` is relative to the task directory."""

    data: str
    destination: str
    perms: int = 0o644


def exit_result(result: driver_pb2.ExitResult, err: str = "") -> ExitResult:
    return ExitResult(result.exit_code, result.signal, result.oom_killed, err)


def set_duration(target: duration_pb2.Duration, seconds: float) -> None:
    target.FromNanoseconds(round(seconds * 1e9))
