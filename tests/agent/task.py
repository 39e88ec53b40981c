# SPDX-License-Identifier: MPL-2.0
"""One task: what the driver is told of it, and the calls of a task runner in its order."""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc

from nomad_pb import driver_pb2
from tests.agent.allocation import Allocation, TaskCgroup
from tests.agent.errors import ConfigError, call, driver_error
from tests.agent.hcl import interpolate
from tests.agent.plugin import Plugin
from tests.agent.session import ExecSession
from tests.agent.spec import decode_config, to_msgpack
from tests.agent.streams import HANG, Logmon
from tests.agent.values import MIB, ExitResult, Port, Resources, Template, exit_result, set_duration

_NODE_ID = str(uuid.uuid4())


class Task:
    """One task: the calls of a task runner in its order.

    start() may be called again after destroy(): a restart, with a new id in the same allocation.
    """

    def __init__(
        self,
        plugin: Plugin,
        allocation: Allocation,
        name: str,
        config: str | Mapping[str, Any],
        *,
        env: Mapping[str, str] | None = None,
        user: str = "",
        resources: Resources | None = None,
        kill_timeout: float = 5,
        kill_signal: str = "",
        network: driver_pb2.NetworkIsolationSpec | None = None,
        dns: driver_pb2.DNSConfig | None = None,
        mounts: Sequence[driver_pb2.Mount] = (),
        devices: Sequence[driver_pb2.Device] = (),
        templates: Sequence[Template] = (),
        meta: Mapping[str, str] | None = None,
        job: str = "example",
        group: str = "group",
        logs_disabled: bool = False,
        on_output: Callable[[str, bytes], None] = lambda stream, data: None,
    ) -> None:
        self.plugin, self.allocation, self.name, self.driver_config = plugin, allocation, name, config
        self.user_env, self.user, self.meta = dict(env or {}), user, dict(meta or {})
        self.resources = resources or Resources()
        self.kill_timeout, self.kill_signal = kill_timeout, kill_signal
        self.network, self.dns, self.mounts, self.devices = network, dns, list(mounts), list(devices)
        self.templates, self.job, self.group, self.logs_disabled = list(templates), job, group, logs_disabled
        self.dir = allocation.add_task(name)
        self.logmon = Logmon(allocation.logs, name, on_output)
        self.cgroup = TaskCgroup(allocation.id, name, bool(self.resources.cores))
        self.id = ""
        self.handle: driver_pb2.TaskHandle | None = None
        self.network_override: driver_pb2.NetworkOverride | None = None

    # --- what the driver gets ---

    @property
    def env(self) -> dict[str, str]:
        """The task's environment; contains nothing of the host's, as for all image drivers."""
        resources = self.resources
        env = {
            "NOMAD_ALLOC_DIR": "/alloc",
            "NOMAD_TASK_DIR": "/local",
            "NOMAD_SECRETS_DIR": "/secrets",
            "NOMAD_MEMORY_LIMIT": str(resources.memory),
            "NOMAD_CPU_LIMIT": str(resources.cpu),
            # The client really sends a space for none: the kernel's notation of an empty set.
            "NOMAD_CPU_CORES": ",".join(map(str, resources.cores)) or " ",
            "NOMAD_ALLOC_ID": self.allocation.id,
            "NOMAD_SHORT_ALLOC_ID": self.allocation.id[:8],
            "NOMAD_ALLOC_NAME": f"{self.job}.{self.group}[0]",
            "NOMAD_ALLOC_INDEX": "0",
            "NOMAD_TASK_NAME": self.name,
            "NOMAD_GROUP_NAME": self.group,
            "NOMAD_JOB_ID": self.job,
            "NOMAD_JOB_NAME": self.job,
            "NOMAD_DC": "dc1",
            "NOMAD_REGION": "global",
            "NOMAD_NAMESPACE": "default",
            "NOMAD_PARENT_CGROUP": "nomad.slice",
        }
        if resources.memory_max > 0:
            env["NOMAD_MEMORY_MAX_LIMIT"] = str(resources.memory_max)
        for key, value in self.meta.items():
            env[f"NOMAD_META_{key}"] = env[f"NOMAD_META_{key.upper()}"] = value
        for label, port in resources.ports.items():
            env |= _port_env(re.sub(r"\W", "_", label), port)
        known = {**_node_variables(self.meta), **env}
        return env | {key: interpolate(value, known, strict=False) for key, value in self.user_env.items()}

    @property
    def variables(self) -> dict[str, str]:
        """What ${...} in the driver config can refer to."""
        return {**_node_variables(self.meta), **self.env}

    def task_config(self) -> driver_pb2.TaskConfig:
        """TaskConfig for the next StartTask; raises ConfigError as the client's "Failed Validation" event."""
        logs = {name: "/dev/null" if self.logs_disabled else str(path) for name, path in self.logmon.paths.items()}
        config = driver_pb2.TaskConfig(
            id=self.id,
            name=self.name,
            msgpack_driver_config=to_msgpack(
                decode_config(self.plugin.task_schema, self.driver_config, self.variables)
            ),
            env=self.env,
            resources=self._resources(),
            mounts=self.mounts,
            devices=self.devices,
            user=self.user,
            alloc_dir=str(self.allocation.dir),
            stdout_path=logs["stdout"],
            stderr_path=logs["stderr"],
            task_group_name=self.group,
            job_name=self.job,
            job_id=self.job,
            alloc_id=self.allocation.id,
            namespace="default",
            node_name=socket.gethostname(),
            node_id=_NODE_ID,
        )
        if self.network:
            config.network_isolation_spec.CopyFrom(self.network)
        if self.dns:
            config.dns.CopyFrom(self.dns)
        return config

    def _resources(self) -> driver_pb2.Resources:
        wanted = self.resources
        ports = [
            driver_pb2.PortMapping(label=label, value=port.value, to=port.to, host_ip=port.host_ip)
            for label, port in wanted.ports.items()
        ]
        result = driver_pb2.Resources(ports=ports)
        result.allocated_resources.cpu.cpu_shares = wanted.cpu
        result.allocated_resources.memory.memory_mb = wanted.memory
        result.allocated_resources.memory.memory_max_mb = wanted.memory_max
        linux = result.linux_resources
        linux.cpu_shares = wanted.cpu
        linux.memory_limit_bytes = max(wanted.memory, wanted.memory_max) * MIB
        linux.cpuset_cpus = ",".join(map(str, wanted.cores))
        linux.PercentTicks = wanted.cpu / (1000.0 * (os.cpu_count() or 1))
        linux.cpuset_cgroup = str(self.cgroup.path)
        return result

    # --- calls ---

    def prestart(self) -> None:
        """The hooks before StartTask: directories, log collector, cgroup, templates."""
        self.allocation.add_task(self.name)
        if not self.logs_disabled:
            self.logmon.restart()
        self.cgroup.create()
        for template in self.templates:
            self._render(template)

    def _render(self, template: Template) -> None:
        env = self.env
        text = re.sub(r'\{\{-?\s*env\s+"([^"]+)"\s*-?\}\}', lambda match: env.get(match[1], ""), template.data)
        if "{{" in text:
            raise ConfigError([f'template {template.destination}: the stand-in knows only {{{{ env "NAME" }}}}'])
        path = self.dir / interpolate(template.destination, {**env, "NOMAD_TASK_DIR": "local"}).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(template.perms)

    def start(self, timeout: float | None = 120) -> driver_pb2.TaskHandle:
        self.id = f"{self.allocation.id}/{self.name}/{os.urandom(4).hex()}"
        self.prestart()
        request = driver_pb2.StartTaskRequest(task=self.task_config())
        response = call(self.plugin.driver.StartTask, request, timeout)
        handle = response.handle
        for ok, fault in (
            (handle.version != 0, "has version 0"),
            (handle.HasField("config"), "has no config: an agent would start a second copy after its restart"),
            (handle.config.id == self.id, f"has config.id {handle.config.id!r} instead of {self.id!r}"),
            (handle.state == driver_pb2.RUNNING, "is not in state RUNNING"),
        ):
            if not ok:
                self.plugin.violations.append(f"the handle of StartTask {fault}")
        if response.driver_error_msg or response.result:
            self.plugin.violations.append("StartTask set result or driver_error_msg, which no client reads")
        self.handle = handle
        self.network_override = response.network_override if response.HasField("network_override") else None
        return handle

    def wait(self, timeout: float | None = HANG) -> ExitResult:
        """WaitTask; raises TimeoutError when the task still runs after `timeout` seconds."""
        response = call(self.plugin.driver.WaitTask, driver_pb2.WaitTaskRequest(task_id=self.id), timeout)
        if not response.HasField("result"):
            self.plugin.violations.append("WaitTask answered without a result: clients before 1.11.3 panic")
        return exit_result(response.result, response.err)

    def stop(self, timeout: float | None = None, kill_signal: str | None = None) -> None:
        """StopTask with the job's kill_timeout and kill_signal unless given; WaitTask tells how it ended."""
        request = driver_pb2.StopTaskRequest(
            task_id=self.id, signal=self.kill_signal if kill_signal is None else kill_signal
        )
        set_duration(request.timeout, self.kill_timeout if timeout is None else timeout)
        call(self.plugin.driver.StopTask, request)

    def signal(self, name: str) -> None:
        call(self.plugin.driver.SignalTask, driver_pb2.SignalTaskRequest(task_id=self.id, signal=name), HANG)

    def inspect(self) -> driver_pb2.InspectTaskResponse:
        response = call(self.plugin.driver.InspectTask, driver_pb2.InspectTaskRequest(task_id=self.id), HANG)
        for field in ("started_at", "completed_at", "result"):
            if not response.task.HasField(field):
                self.plugin.violations.append(f"InspectTask answered without {field}")
        return response

    def stats(self, interval: float = 1) -> Iterator[driver_pb2.TaskStats]:
        """TaskStats, one message an interval; close the iterator (or leave the loop) to end the call."""
        request = driver_pb2.TaskStatsRequest(task_id=self.id)
        set_duration(request.collection_interval, interval)
        stream: Any = self.plugin.driver.TaskStats(request)
        try:
            for response in stream:
                stats = response.stats
                if not stats.HasField("timestamp") or not stats.HasField("agg_resource_usage"):
                    self.plugin.violations.append("TaskStats without timestamp or usage: an agent panics")
                yield stats
        except grpc.RpcError as error:
            raise driver_error(error) from error
        finally:
            stream.cancel()

    def destroy(self, force: bool = True) -> None:
        """DestroyTask. An agent discards its error; here it is raised."""
        call(self.plugin.driver.DestroyTask, driver_pb2.DestroyTaskRequest(task_id=self.id, force=force))

    def recover(self, plugin: Plugin, *, agent_restart: bool = True) -> None:
        """RecoverTask on `plugin`, which from then on is this task's plugin.

        agent_restart: the handle comes from the client's state, where the driver config is lost, and the log
        collector is restarted afterwards. Otherwise the plugin crashed under a living agent: the handle is whole
        and nobody restarts the log collector.
        """
        assert self.handle, "only a started task can be recovered"
        handle = driver_pb2.TaskHandle()
        handle.CopyFrom(self.handle)
        if agent_restart:
            handle.config.ClearField("msgpack_driver_config")
        self.plugin = plugin
        call(plugin.driver.RecoverTask, driver_pb2.RecoverTaskRequest(handle=handle), HANG)
        if agent_restart and not self.logs_disabled:
            self.logmon.restart()

    def exec(self, command: Sequence[str], timeout: float = HANG) -> tuple[bytes, ExitResult]:
        """ExecTask, as for script checks: output and result."""
        request = driver_pb2.ExecTaskRequest(task_id=self.id, command=command)
        set_duration(request.timeout, timeout)
        response = call(self.plugin.driver.ExecTask, request, timeout + HANG)
        if not response.HasField("result"):
            self.plugin.violations.append("ExecTask answered without a result: an agent panics")
        return response.stdout, exit_result(response.result)

    def exec_streaming(self, command: Sequence[str], tty: bool = False) -> ExecSession:
        return ExecSession(self.plugin, self.id, command, tty)

    @property
    def events(self) -> list[driver_pb2.DriverTaskEvent]:
        """Driver events of this task, routed as the client does: by allocation and task name."""
        return [
            event
            for event in list(self.plugin.events)
            if event.alloc_id == self.allocation.id and event.task_name == self.name
        ]

    def close(self) -> None:
        """The end of the task runner: destroy what is left, stop logmon, remove the task's cgroup."""
        try:
            if self.id and not self.plugin.exited():
                self.destroy()
        finally:
            self.logmon.stop(2 if self.handle else 0)  # without a start nobody writes, so nothing ends
            if fault := self.cgroup.remove():
                self.plugin.violations.append(fault)

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _node_variables(meta: Mapping[str, str]) -> dict[str, str]:
    kernel = os.uname()
    variables = {
        "node.unique.id": _NODE_ID,
        "node.unique.name": socket.gethostname(),
        "node.datacenter": "dc1",
        "node.region": "global",
        "node.class": "",
        "attr.kernel.name": kernel.sysname.lower(),
        "attr.kernel.version": kernel.release,
        "attr.cpu.arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(kernel.machine, kernel.machine),
        "attr.unique.hostname": socket.gethostname(),
    }
    return variables | {f"meta.{key}": value for key, value in meta.items()}


def _port_env(label: str, port: Port) -> dict[str, str]:
    inside, host = str(port.to or port.value), str(port.value)
    return {
        f"NOMAD_IP_{label}": port.host_ip,
        f"NOMAD_PORT_{label}": inside,
        f"NOMAD_ADDR_{label}": f"{port.host_ip}:{host}",
        f"NOMAD_HOST_IP_{label}": port.host_ip,
        f"NOMAD_HOST_PORT_{label}": host,
        f"NOMAD_HOST_ADDR_{label}": f"{port.host_ip}:{host}",
        f"NOMAD_ALLOC_PORT_{label}": inside,
    }
