# SPDX-License-Identifier: MPL-2.0
"""A started plugin and the one connection to it, as go-plugin's client holds it."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2

from nomad_pb import (
    base_pb2,
    base_pb2_grpc,
    driver_pb2,
    driver_pb2_grpc,
    grpc_plugin_pb2,
    grpc_plugin_pb2_grpc,
    hcl_spec_pb2,
    health_pb2_grpc,
)
from tests.agent.errors import AgentError, DriverError, PluginError, call, driver_error
from tests.agent.log import LogEntry, parse_log_line
from tests.agent.spec import decode_config, to_msgpack
from tests.agent.streams import HANG, FdReader, Lines

MAX_INT32 = 2**31 - 1
MAGIC_COOKIE = "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255"
PLUGIN_ENV = {
    "NOMAD_PLUGIN_MAGIC_COOKIE": MAGIC_COOKIE,
    "PLUGIN_MIN_PORT": "10000",
    "PLUGIN_MAX_PORT": "25000",
    "PLUGIN_PROTOCOL_VERSIONS": "2",
}
API_VERSION = "v0.1.0"
EXIT_TIME: float = 2  # seconds that an agent waits after Shutdown


class Plugin:
    """A started plugin and the one connection to it, as go-plugin's client holds it.

    `base`, `driver`, `controller`, `health`: stubs. `log`: entries of its stderr. `violations`: sentences about
    what an agent would not stand. `fingerprint`: the latest response; `events`: all DriverTaskEvents so far.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        start_timeout: float = HANG,
    ) -> None:
        self._prepare()
        self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [str(Path(path).absolute()), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**(os.environ if env is None else env), **PLUGIN_ENV},
            cwd=cwd,
        )
        self.pid = self.process.pid
        self._started = time.monotonic()
        lines: queue.Queue[str] = queue.Queue()
        assert self.process.stdout and self.process.stderr
        self._stdout_lines, self._stderr_lines = Lines(lines.put), Lines(self._on_log_line)
        self._readers += [
            FdReader(os.dup(self.process.stdout.fileno()), self._stdout_lines),
            FdReader(os.dup(self.process.stderr.fileno()), self._stderr_lines),
        ]
        self.process.stdout.close()
        self.process.stderr.close()
        try:
            self.address = self._handshake(lines, start_timeout)
            self.start_seconds = time.monotonic() - self._started
            self._connect(self.address)
        except BaseException:
            self.kill_hard()
            raise

    def _prepare(self) -> None:
        self.log: list[LogEntry] = []
        self.raw_log: list[str] = []
        self.violations: list[str] = []
        self.fingerprint: driver_pb2.FingerprintResponse | None = None
        self.fingerprints: list[driver_pb2.FingerprintResponse] = []
        self.events: list[driver_pb2.DriverTaskEvent] = []
        self.on_event: Callable[[driver_pb2.DriverTaskEvent], None] = lambda event: None
        self.on_log: Callable[[LogEntry], None] = lambda entry: None
        self.closing = False
        self.start_seconds = 0.0
        self._readers: list[FdReader] = []
        self._changed = threading.Condition()
        self._streams: list[Any] = []
        self._broker_end = threading.Event()
        self._schema: hcl_spec_pb2.Spec | None = None

    @classmethod
    def reattach(cls, address: str, pid: int) -> Plugin:
        """Connect to a plugin that outlived its agent: PluginInfo only, no SetConfig, and no log to read."""
        plugin = cls.__new__(cls)
        plugin._prepare()
        plugin.process, plugin.pid, plugin.address = None, pid, address
        plugin._connect(address)
        call(plugin.base.PluginInfo, base_pb2.PluginInfoRequest(), 10)
        return plugin

    # --- start ---

    def _on_log_line(self, line: str) -> None:
        entry, faults = parse_log_line(line)
        self.raw_log.append(line)
        self.log.append(entry)
        self.violations += faults
        self.on_log(entry)

    def _handshake(self, lines: queue.Queue[str], timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = self._readers[0].ended()
            with contextlib.suppress(queue.Empty):
                return self._parse_handshake(lines.get(timeout=0.02))
            if ended:
                assert self.process
                code = self.process.wait(5)
                raise PluginError(self._explain(f"the plugin ended with code {code} before its handshake"))
        raise PluginError(self._explain(f"no handshake within {timeout:g} s"))

    def _parse_handshake(self, line: str) -> str:
        fields = line.split("|")
        if len(fields) < 4:
            raise PluginError(self._explain(f"the first line on stdout is no handshake: {line!r}"))
        fault = None
        if fields[0] != "1" or fields[1] != "2":
            fault = "core version must be 1 and protocol version 2"
        elif fields[2] not in ("unix", "tcp") or not fields[3]:
            fault = "network must be unix or tcp, with an address"
        elif len(fields) < 5 or fields[4] != "grpc":
            fault = "the protocol must be grpc"
        elif len(fields) > 6 or (len(fields) == 6 and fields[5]):
            fault = "fields 6 and 7 (certificate, multiplexing) must be empty: the agent offers neither"
        if fault:
            raise PluginError(self._explain(f"bad handshake {line!r}: {fault}"))
        return f"unix:{fields[3]}" if fields[2] == "unix" else fields[3]

    def _explain(self, problem: str) -> str:
        self._readers[1].ended(0.5)
        text = "\n".join([*self.raw_log, self._stderr_lines.rest]).strip()
        return f"{problem}\nstdout: {self._stdout_lines.rest!r}\nstderr:\n{textwrap.indent(text, '  ')}"

    def _connect(self, address: str) -> None:
        options = [
            ("grpc.default_authority", "unused"),
            ("grpc.max_send_message_length", MAX_INT32),
            ("grpc.max_receive_message_length", MAX_INT32),
            ("grpc.enable_http_proxy", 0),
            # Without it a second client in this process would share the first one's connection.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self.channel = grpc.insecure_channel(address, options=options)
        grpc.channel_ready_future(self.channel).result(HANG)
        self.base = base_pb2_grpc.BasePluginStub(self.channel)
        self.driver = driver_pb2_grpc.DriverStub(self.channel)
        self.controller = grpc_plugin_pb2_grpc.GRPCControllerStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        broker = grpc_plugin_pb2_grpc.GRPCBrokerStub(self.channel)
        stdio = grpc_plugin_pb2_grpc.GRPCStdioStub(self.channel)
        self._follow("broker", broker.StartStream(self._silence()), lambda message: None)
        self._follow("stdio", stdio.StreamStdio(empty_pb2.Empty()), lambda message: None)

    def _silence(self) -> Iterator[grpc_plugin_pb2.ConnInfo]:
        """Nothing, until the end; gRPC asks for it in a thread Python waits for, so that counts as one."""
        while not self._broker_end.wait(1) and threading.main_thread().is_alive():
            pass
        yield from ()

    # --- streams ---

    def _follow(self, name: str, stream: Any, on_message: Callable[[Any], None]) -> None:
        """Consume a stream that has to stay open as long as the connection does."""

        def run() -> None:
            reason = "it returned"
            try:
                for message in stream:
                    with self._changed:
                        on_message(message)
                        self._changed.notify_all()
            except grpc.RpcError as error:
                failure = driver_error(error)
                reason = f"{failure.code}: {failure.text}"
            if not self.closing and not self.exited(1):
                self.violations.append(f"the {name} stream ended ({reason}): an agent re-opens it in a busy loop")
            with self._changed:
                self._changed.notify_all()

        self._streams.append(stream)
        threading.Thread(target=run, name=f"plugin {self.pid} {name}", daemon=True).start()

    def open_streams(self) -> None:
        """What the driver manager does after SetConfig: Init (2.0.4 and later), Fingerprint and TaskEvents."""
        try:
            call(self.driver.Init, driver_pb2.InitRequest(), HANG)
        except DriverError as error:
            if error.code != "UNIMPLEMENTED":
                raise
        self._follow("Fingerprint", self.driver.Fingerprint(driver_pb2.FingerprintRequest()), self._on_fingerprint)
        self._follow("TaskEvents", self.driver.TaskEvents(driver_pb2.TaskEventsRequest()), self._on_task_event)

    def _on_fingerprint(self, response: driver_pb2.FingerprintResponse) -> None:
        self.fingerprint = response
        self.fingerprints.append(response)
        if response.err:
            self.violations.append(f"Fingerprint answered with err: {response.err}")

    def _on_task_event(self, event: driver_pb2.DriverTaskEvent) -> None:
        self.events.append(event)
        if not event.HasField("timestamp"):
            self.violations.append(f"task event without a timestamp, shown as 1970: {event.message}")
        self.on_event(event)

    def wait_for(self, condition: Callable[[], Any], timeout: float = HANG) -> Any:
        """Wait until `condition` is true; it is looked at again after every streamed message."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not (result := condition()):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"not true within {timeout:g} s")
                self._changed.wait(min(left, 0.1))
        return result

    # --- calls ---

    @property
    def task_schema(self) -> hcl_spec_pb2.Spec:
        if self._schema is None:
            response = call(self.driver.TaskConfigSchema, driver_pb2.TaskConfigSchemaRequest(), HANG)
            self._schema = response.spec
        return self._schema

    def set_config(self, config: Mapping[str, Any] | str | None = None, nomad: bool = True) -> None:
        """SetConfig with the agent's `config {}` block (HCL or JSON form). `nomad`: with nomad_config."""
        schema = call(self.base.ConfigSchema, base_pb2.ConfigSchemaRequest(), HANG)
        request = base_pb2.SetConfigRequest(plugin_api_version=API_VERSION)
        if schema.HasField("spec"):
            request.msgpack_config = to_msgpack(decode_config(schema.spec, config or {}))
        elif config:
            raise AgentError("the plugin has no config schema, but a config was given: an agent would not start")
        if nomad:
            request.nomad_config.CopyFrom(nomad_config())
        call(self.base.SetConfig, request, HANG)

    # --- end ---

    def exited(self, timeout: float = 0) -> bool:
        """Whether the process is gone; waits up to `timeout` seconds for it."""
        deadline = time.monotonic() + timeout
        while not self._gone():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        return True

    def _gone(self) -> bool:
        if self.process:
            return self.process.poll() is not None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # ours when a test reattaches within one process
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def kill(self, *, driver_shutdown: bool = False, eof_timeout: float = HANG) -> None:
        """End the plugin as an agent does: Shutdown, 2 s to exit, SIGKILL, then EOF on both pipes.

        driver_shutdown: call Driver.Shutdown first, as Nomad 2.0.4 and later do for the long-lived process.
        """
        self.closing = True
        with contextlib.suppress(AgentError, TimeoutError):
            if driver_shutdown:
                call(self.driver.Shutdown, driver_pb2.ShutdownRequest(), 2)
        self._broker_end.set()
        with contextlib.suppress(AgentError):
            try:
                call(self.controller.Shutdown, grpc_plugin_pb2.Empty(), 10)
            except TimeoutError:
                self.violations.append("GRPCController.Shutdown did not answer: an agent would hang at its exit")
        self.channel.close()
        if not self.exited(EXIT_TIME):
            self.violations.append(f"the plugin failed to exit within {EXIT_TIME} s of Shutdown")
        self._end(eof_timeout)

    def kill_hard(self, eof_timeout: float = HANG) -> None:
        """SIGKILL, as a crash of the plugin."""
        self.closing = True
        self._end(eof_timeout)
        self._broker_end.set()
        if hasattr(self, "channel"):
            self.channel.close()

    def _end(self, eof_timeout: float) -> None:
        if not self._gone():
            os.kill(self.pid, signal.SIGKILL)
        self.exited(HANG)
        deadline = time.monotonic() + eof_timeout
        for reader in self._readers:
            if not reader.ended(max(0, deadline - time.monotonic())):
                self.violations.append("a child holds the plugin's stdout or stderr: an agent would wait for it")
            reader.close()
        self._readers = []

    def detach(self) -> tuple[str, int]:
        """What is left when the agent dies by SIGKILL: pipes and connection break, the plugin goes on.

        Returns the address and pid for reattach().
        """
        self.closing = True
        for reader in self._readers:
            reader.close()
        self._readers = []
        self._broker_end.set()
        self.channel.close()
        return self.address, self.pid

    def __enter__(self) -> Plugin:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.closing:
            self.kill()


_TRIED: set[tuple[object, ...]] = set()


def _try_like_agent(
    path: str | Path,
    plugin_config: Mapping[str, Any] | str | None,
    args: Sequence[str],
    env: Mapping[str, str] | None,
) -> list[str]:
    """The first two launches, of which nothing stays: what is it, and does the config fit? Returns violations."""
    with Plugin(path, args=args, env=env) as probe:
        info = call(probe.base.PluginInfo, base_pb2.PluginInfoRequest(), HANG)
        if info.type != base_pb2.DRIVER or API_VERSION not in info.plugin_api_versions or not info.name:
            raise PluginError(f"an agent would not load this plugin: {info}")
        has_schema = call(probe.base.ConfigSchema, base_pb2.ConfigSchemaRequest(), HANG).HasField("spec")
    if not has_schema:
        return probe.violations
    with Plugin(path, args=args, env=env) as validator:
        validator.set_config(plugin_config, nomad=False)
        validator.set_config(plugin_config, nomad=False)
    return probe.violations + validator.violations


def launch_like_agent(
    path: str | Path,
    plugin_config: Mapping[str, Any] | str | None = None,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Plugin:
    """The three launches of an agent's start; returns the long-lived third with its streams open.

    A start that has gone well before in this process is the third launch alone.
    Raises PluginError, ConfigError or DriverError where an agent would refuse to start.
    """
    start = (str(path), os.stat(path).st_mtime_ns, str(plugin_config), str(args), str(env))
    violations = [] if start in _TRIED else _try_like_agent(path, plugin_config, args, env)
    if not violations:
        _TRIED.add(start)
    plugin = Plugin(path, args=args, env=env)
    plugin.violations += violations
    try:
        plugin.set_config(plugin_config)
        plugin.open_streams()
        plugin.wait_for(lambda: plugin.fingerprint or plugin.exited())
    except BaseException:
        plugin.kill_hard()
        raise
    return plugin


def nomad_config() -> base_pb2.NomadConfig:
    """The agent's own facts for SetConfig, with this machine's cores."""
    driver = base_pb2.NomadDriverConfig(ClientMaxPort=14512, ClientMinPort=14000)
    driver.Topology.node_ids.append(0)
    speeds = re.findall(r"^cpu MHz\s*:\s*(\d+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    for core in range(os.cpu_count() or 1):
        speed = int(speeds[core]) if core < len(speeds) else 1000
        driver.Topology.cores.add(core_id=core, guess_speed=speed)
    return base_pb2.NomadConfig(driver=driver)
