# SPDX-License-Identifier: MPL-2.0
"""Job files and agent config files, as much of them as the stand-in can run."""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.agent.errors import AgentError
from tests.agent.hcl import parse_hcl
from tests.agent.spec import convert
from tests.agent.values import Port, Resources, Template


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task block of a job file; `config` is in the JSON form that decode_config() takes."""

    name: str
    driver: str
    config: Mapping[str, Any]
    env: Mapping[str, str]
    user: str
    resources: Resources
    templates: tuple[Template, ...]
    kill_timeout: float
    kill_signal: str
    meta: Mapping[str, str]
    logs_disabled: bool


@dataclasses.dataclass(frozen=True)
class Group:
    name: str
    tasks: tuple[TaskSpec, ...]
    network_mode: str = "host"


@dataclasses.dataclass(frozen=True)
class Job:
    """As much of a job file as the stand-in can run. `type`: service, batch, system or sysbatch."""

    name: str
    type: str
    groups: tuple[Group, ...]


def parse_job(path: str | Path) -> Job:
    """Read a job file. Raises ConfigError for what is not HCL and AgentError for what the stand-in cannot run."""
    body = parse_hcl(Path(path).read_text())
    jobs = _labelled(body, "job")
    if len(jobs) != 1:
        raise AgentError(f"{path}: a job file holds exactly one job block, this one has {len(jobs)}")
    name, job = jobs[0]
    meta = _plain(_one(job, "meta"))
    groups = tuple(_parse_group(label, group, meta) for label, group in _labelled(job, "group"))
    return Job(str(job.get("name", name)), str(job.get("type", "service")), groups)


def _parse_group(name: str, body: Mapping[str, Any], meta: Mapping[str, str]) -> Group:
    network = _one(body, "network")
    ports = {label: _parse_port(port) for label, port in _labelled(network, "port")}
    meta = {**meta, **_plain(_one(body, "meta"))}
    tasks = tuple(_parse_task(label, task, ports, meta) for label, task in _labelled(body, "task"))
    return Group(name, tasks, str(network.get("mode", "host")))


def _parse_port(body: Mapping[str, Any]) -> Port:
    return Port(int(body.get("static", 0)) or free_port(), int(body.get("to", 0)))


def _parse_task(
    name: str, body: Mapping[str, Any], ports: Mapping[str, Port], meta: Mapping[str, str]
) -> TaskSpec:
    wanted = _one(body, "resources")
    cores = tuple(range(int(wanted.get("cores", 0))))
    return TaskSpec(
        name=name,
        driver=str(body.get("driver", "")),
        config=_one(body, "config"),
        env=_plain(_one(body, "env")),
        user=str(body.get("user", "")),
        resources=Resources(
            cpu=int(wanted.get("cpu", 100)),
            memory=int(wanted.get("memory", 300)),
            memory_max=int(wanted.get("memory_max", 0)),
            cores=cores,
            ports=ports,
        ),
        templates=tuple(_parse_template(item) for item in body.get("template", [])),
        kill_timeout=parse_duration(body.get("kill_timeout", "5s")),
        kill_signal=str(body.get("kill_signal", "")),
        meta={**meta, **_plain(_one(body, "meta"))},
        logs_disabled=bool(_one(body, "logs").get("disabled", False)),
    )


def _parse_template(body: Mapping[str, Any]) -> Template:
    if "data" not in body or "destination" not in body:
        raise AgentError("the stand-in knows templates with data and destination only")
    return Template(str(body["data"]), str(body["destination"]), int(str(body.get("perms", "644")), 8))


def _one(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The only block `name`, or an empty one."""
    found = body.get(name) or [{}]
    return dict(found[0])


def _labelled(body: Mapping[str, Any], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(label, inner[0]) for item in body.get(name, []) for label, inner in item.items()]


def _plain(body: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(convert(value, "string")) for key, value in body.items()}


def parse_duration(text: str | int) -> float:
    """Seconds of a Go duration such as "1m30s"; a bare number is nanoseconds, as in Nomad."""
    if isinstance(text, int):
        return text / 1e9
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    if not re.match(r"(\d+(\.\d+)?(h|ms|us|ns|m|s))+\Z", text):
        raise AgentError(f'"{text}" is not a duration such as "30s" or "1m30s"')
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|ms|us|ns|m|s)", text)
    return sum(float(number) * units[unit] for number, unit in parts)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plugin_config(path: str | Path, plugin: str) -> Mapping[str, Any] | None:
    """The config block for `plugin` in an agent's config file.

    Raises AgentError when the file does not name the plugin: Nomad 1.10 and later then skip it.
    """
    for name, body in _labelled(parse_hcl(Path(path).read_text()), "plugin"):
        if name == plugin:
            return _one(body, "config")
    raise AgentError(f'{path} has no block plugin "{plugin}": Nomad 1.10 and later would skip the file')
