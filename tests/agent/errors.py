# SPDX-License-Identifier: MPL-2.0
"""Errors as an agent sees them, and the one way to make a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc

from nomad_pb import recoverable_error_pb2, rpc_status_pb2

T = TypeVar("T")


class AgentError(Exception):
    """Something the stand-in itself could not do, or that would end a real agent."""


class PluginError(AgentError):
    """The plugin could not be started, or its handshake is not one."""


class ConfigError(AgentError):
    """A driver or plugin config that does not fit its schema; `problems` holds one sentence for each fault."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("failed to parse config:\n" + "\n".join(f" * {line}" for line in self.problems))


class DriverError(AgentError):
    """A gRPC error of the driver, as Nomad's client reads it. `recoverable` is None without that detail."""

    def __init__(self, text: str, recoverable: bool | None = None, code: str = "UNKNOWN") -> None:
        self.text, self.recoverable, self.code = text, recoverable, code
        super().__init__(text)


def driver_error(error: grpc.RpcError) -> DriverError:
    """Read status and details as the client does: only details[0] counts, and only a RecoverableError there."""
    call: Any = error
    code, text = call.code(), call.details() or ""
    for key, value in call.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        status = rpc_status_pb2.Status.FromString(value)
        if status.code != code.value[0]:  # grpc-go 1.59 and later report this instead of the real error
            text = f"status details say code {status.code}, the call {code.value[0]}"
            return DriverError(text, None, "INTERNAL")
        flag = recoverable_error_pb2.RecoverableError()
        if status.details and status.details[0].Unpack(flag):
            return DriverError(text, flag.recoverable, code.name)
    return DriverError(text, None, code.name)


def call(method: Callable[..., T], request: Any, timeout: float | None = None) -> T:
    """One unary call; a gRPC error becomes a DriverError, a passed deadline a TimeoutError."""
    try:
        return method(request, timeout=timeout)
    except grpc.RpcError as error:
        failure = driver_error(error)
        if failure.code == "DEADLINE_EXCEEDED":
            raise TimeoutError(f"no answer within {timeout} s") from error
        raise failure from error
    except ValueError as error:  # grpc's word for a channel that is no more
        raise DriverError("plugin is shut down", None, "UNAVAILABLE") from error
