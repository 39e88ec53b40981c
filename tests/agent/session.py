# SPDX-License-Identifier: MPL-2.0
"""One `nomad alloc exec`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

import grpc

from nomad_pb import driver_pb2
from tests.agent.errors import AgentError, DriverError, driver_error
from tests.agent.plugin import Plugin
from tests.agent.streams import HANG
from tests.agent.values import ExitResult, exit_result


class ExecSession:
    """One `nomad alloc exec`. The client never half-closes: messages tell the end of stdin and of the process."""

    def __init__(self, plugin: Plugin, task_id: str, command: Sequence[str], tty: bool) -> None:
        self._plugin = plugin
        self._requests: queue.Queue[driver_pb2.ExecTaskStreamingRequest | None] = queue.Queue()
        setup = driver_pb2.ExecTaskStreamingRequest.Setup(task_id=task_id, command=command, tty=tty)
        self._requests.put(driver_pb2.ExecTaskStreamingRequest(setup=setup))
        self._stream: Any = plugin.driver.ExecTaskStreaming(iter(self._requests.get, None))
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self.ended: list[str] = []  # the outputs whose end was told
        self.reading = threading.Event()  # cleared: the client takes nothing, as a slow one
        self.reading.set()
        self._changed = threading.Condition()
        self._result: ExitResult | None = None
        self._error: DriverError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def stdout(self) -> bytes:
        return bytes(self._output["stdout"])

    @property
    def stderr(self) -> bytes:
        return bytes(self._output["stderr"])

    def _run(self) -> None:
        try:
            for response in self._stream:
                self.reading.wait()
                with self._changed:
                    self._on_response(response)
                    self._changed.notify_all()
        except grpc.RpcError as error:
            self._error = driver_error(error)
        finally:
            self._requests.put(None)
            with self._changed:
                self._changed.notify_all()

    def _on_response(self, response: driver_pb2.ExecTaskStreamingResponse) -> None:
        if self._result:
            self._plugin.violations.append("an exec stream went on after its exited message")
        if response.exited:
            if response.HasField("stdout") or response.HasField("stderr"):
                self._plugin.violations.append("an exec message carries both output and the exit: clients drop it")
            if not response.HasField("result"):
                self._plugin.violations.append("the exited message of an exec has no result")
            self._result = exit_result(response.result)
        for name, operation in (("stdout", response.stdout), ("stderr", response.stderr)):
            if operation.data and name in self.ended:
                self._plugin.violations.append(f"an exec's {name} went on after its end")
            self._output[name] += operation.data
            self.ended += [name] if operation.close else []

    def send(self, data: bytes) -> None:
        operation = driver_pb2.ExecTaskStreamingIOOperation(data=data)
        self._requests.put(driver_pb2.ExecTaskStreamingRequest(stdin=operation))

    def close_stdin(self) -> None:
        operation = driver_pb2.ExecTaskStreamingIOOperation(close=True)
        self._requests.put(driver_pb2.ExecTaskStreamingRequest(stdin=operation))

    def resize(self, height: int, width: int) -> None:
        size = driver_pb2.ExecTaskStreamingRequest.TerminalSize(height=height, width=width)
        self._requests.put(driver_pb2.ExecTaskStreamingRequest(tty_size=size))

    def heartbeat(self) -> None:
        self._requests.put(driver_pb2.ExecTaskStreamingRequest())

    def wait_for(self, text: bytes, stream: str = "stdout", timeout: float = HANG) -> bytes:
        with self._changed:
            if not self._changed.wait_for(lambda: text in self._output[stream], timeout):
                raise TimeoutError(f"{text!r} not in {stream} within {timeout:g} s: {self._shown()}")
            return bytes(self._output[stream])

    def _shown(self) -> str:
        return ", ".join(f"{name} {bytes(data[-2000:])!r}" for name, data in self._output.items())

    def wait(self, timeout: float = HANG) -> ExitResult:
        """The result, after the stream has ended with OK; a DriverError or TimeoutError otherwise."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the exec stream did not end within {timeout:g} s: {self._shown()}")
        if self._error:
            raise self._error
        if not self._result:
            raise AgentError("the exec stream ended without an exited message")
        return self._result

    def cancel(self) -> None:
        """The user went away."""
        self._stream.cancel()
