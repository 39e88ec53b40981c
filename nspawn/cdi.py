# SPDX-License-Identifier: MPL-2.0
"""CDI, the Container Device Interface: devices by the names that files of their vendors give them.

A file says what a container needs to use a device: nodes, mounts, variables, groups. The files are the operator's,
and trusted. A job names devices in them, and the rest is done as for a device plugin of Nomad's. The format is
SPEC.md of github.com/cncf-tags/container-device-interface.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from nspawn.accounts import Account
from nspawn.common import ConfigError, check_shortage, quote
from nspawn.job import JobOptions, TaskConfig
from nspawn.mounts import CdiNode, Mount

T = TypeVar("T")

DIRECTORIES = ("/etc/cdi", "/var/run/cdi")  # what a device is in the later one counts
VERSION = (1, 1)  # of the format, the newest that is known here
KIND = re.compile(r"[A-Za-z0-9][\w.-]{0,252}/[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", re.ASCII)
HOOK_LIMIT = 60  # seconds for a hook whose file says none
MAX_SHOWN = 20  # names of devices in a sentence


@dataclass(frozen=True)
class Hook:
    """A program of the host that prepares the container's root."""

    path: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    limit: int = HOOK_LIMIT  # seconds
    device: str = ""  # for which it is run


@dataclass(frozen=True)
class Edits:
    """What a container gets for devices."""

    env: Mapping[str, str] = field(default_factory=dict)
    nodes: tuple[CdiNode, ...] = ()
    mounts: tuple[Mount, ...] = ()
    groups: tuple[int, ...] = ()
    hooks: tuple[Hook, ...] = ()

    def then(self, other: Edits) -> Edits:
        """Return both. The other's count where they are about the same variable or path."""
        nodes = {node.target: node for node in (*self.nodes, *other.nodes)}
        mounts = {os.path.normpath(mount.target): mount for mount in (*self.mounts, *other.mounts)}
        groups = tuple(dict.fromkeys((*self.groups, *other.groups)))
        hooks = (*self.hooks, *other.hooks)
        return Edits({**self.env, **other.env}, tuple(nodes.values()), tuple(mounts.values()), groups, hooks)


@dataclass(frozen=True)
class Spec:
    """A file of devices."""

    path: str
    kind: str  # such as nvidia.com/gpu
    edits: Mapping[str, Any]  # for each of its devices, not checked yet
    devices: Mapping[str, Mapping[str, Any]]  # by name: what is for this one alone

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path)

    @property
    def names(self) -> list[str]:
        return [f"{self.kind}={name}" for name in self.devices]


@dataclass(frozen=True)
class Catalog:
    """The devices of this host."""

    specs: tuple[Spec, ...]
    problems: tuple[str, ...]  # a sentence for each file that cannot be used, without a full stop


def read_catalog(folders: Sequence[str] = DIRECTORIES) -> Catalog:
    """Raises OSError or TransientError if the host lacks what that takes."""
    specs, problems = [], []
    for folder in folders:
        for path in list_files(folder):
            if path.suffix in (".yaml", ".yml"):
                remedy = f"nvidia-ctk cdi generate --format=json --output={path.with_suffix('.json')}"
                problems.append(f"{path} is YAML, and this driver reads JSON: write it as JSON, as by {remedy}")
            if path.suffix != ".json":
                continue
            try:
                specs.append(parse_spec(str(path), path.read_text()))
            except OSError as error:
                check_shortage(error)
                problems.append(f"{path} cannot be read: {error.strerror}")
            except (ValueError, RecursionError) as error:
                problems.append(f"{path} is not a valid file of CDI: {error}")
    return Catalog(tuple(specs), tuple(problems))


def list_files(folder: str) -> list[Path]:
    """Return the files of a directory, sorted; [] if there is none. Raises OSError."""
    try:
        return sorted(Path(folder, name) for name in os.listdir(folder))
    except FileNotFoundError:
        return []


def parse_spec(path: str, text: str) -> Spec:
    """Raises ValueError."""
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise ValueError("it must be an object")
    version = re.fullmatch(r"v?(\d{1,4})\.(\d{1,4})\.\d{1,4}", take(raw, "cdiVersion", str, ""))
    if not version:
        raise ValueError("cdiVersion must be a version such as 0.6.0")
    if (int(version[1]), int(version[2])) > VERSION:
        raise ValueError(f"its cdiVersion {version[0]} is newer than {VERSION[0]}.{VERSION[1]}")
    kind = take(raw, "kind", str, "")
    if not KIND.fullmatch(kind):
        raise ValueError("kind must be VENDOR/CLASS, as in nvidia.com/gpu")
    devices = {}
    for device in take_objects(raw, "devices"):
        check_keys(device, {"name", "annotations", "containerEdits"})
        devices[take(device, "name", str, "")] = take(device, "containerEdits", dict, {})
    return Spec(path, kind, take(raw, "containerEdits", dict, {}), devices)


NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def take(raw: Mapping[str, Any], key: str, kind: type[T], default: T) -> T:
    """Return a value of an object. Raises ValueError if it is of another type."""
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key} must be {NAMES[kind]}")
    return value


def take_objects(raw: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    values = take(raw, key, list, [])
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{key} must be objects")
    return values


def take_texts(raw: Mapping[str, Any], key: str) -> list[str]:
    values = take(raw, key, list, [])
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key} must be texts")
    return values


def take_variables(raw: Mapping[str, Any]) -> dict[str, str]:
    return {name: value for name, _, value in (text.partition("=") for text in take_texts(raw, "env"))}


def check_keys(raw: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse what would be ignored. Raises ValueError."""
    for key in {*raw} - {*known}:
        raise ValueError(f"{key} is not supported by this driver")


def take_path(raw: Mapping[str, Any], key: str, default: str = "") -> str:
    path = take(raw, key, str, default)
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise ValueError(f'{key} must be an absolute path without ".."')
    return path


def parse_edits(raw: Mapping[str, Any]) -> Edits:
    """Return edits of a file. Looks at the device nodes and files that they name. Raises ValueError or OSError."""
    check_keys(raw, {"env", "deviceNodes", "mounts", "hooks", "additionalGids", "additionalGIDs"})
    groups = [*take(raw, "additionalGids", list, []), *take(raw, "additionalGIDs", list, [])]
    if not all(type(group) is int and 0 <= group < 1 << 32 for group in groups):
        raise ValueError("additionalGids must be numbers of groups")
    return Edits(
        env=take_variables(raw),
        nodes=tuple(map(parse_node, take_objects(raw, "deviceNodes"))),
        mounts=tuple(map(parse_mount, take_objects(raw, "mounts"))),
        groups=tuple(filter(None, groups)),
        hooks=tuple(map(parse_hook, take_objects(raw, "hooks"))),
    )


def parse_hook(raw: Mapping[str, Any]) -> Hook:
    """Raises ValueError, or OSError if there is no such program."""
    check_keys(raw, ("hookName", "path", "args", "env", "timeout"))
    path, name = take_path(raw, "path"), take(raw, "hookName", str, "")
    if name != "createContainer":
        raise ValueError(
            f"its hook {path} is for {quote(name)}, and this driver runs those for createContainer only"
        )
    if (limit := take(raw, "timeout", int, HOOK_LIMIT)) <= 0:
        raise ValueError("timeout must be a number of seconds above 0")
    os.stat(path)
    return Hook(path, tuple(take_texts(raw, "args")[1:]), take_variables(raw), limit)


NODE_KEYS = ("path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid")


def parse_node(raw: Mapping[str, Any]) -> CdiNode:
    """Raises ValueError if the host's node is another one than that of the file, OSError if there is none."""
    check_keys(raw, NODE_KEYS)
    path = take_path(raw, "path")
    host_path = take_path(raw, "hostPath", path)
    found = os.stat(host_path)
    kind = "c" if stat.S_ISCHR(found.st_mode) else "b" if stat.S_ISBLK(found.st_mode) else ""
    if not kind:
        raise ValueError(f"{host_path} is no device node")
    major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
    have = f"{kind} {major}:{minor}"
    said = take(raw, "type", str, "").replace("u", "c") or kind
    said += f" {take(raw, 'major', int, major)}:{take(raw, 'minor', int, minor)}"
    if said != have:
        raise ValueError(f"{host_path} should be {said}, and is {have} on this host; write the file anew")
    permissions = take(raw, "permissions", str, "") or "rwm"
    if permissions != "none" and not re.fullmatch("[rwm]{1,3}", permissions):
        raise ValueError("permissions must be letters of rwm, or none")
    mode, uid, gid = (take(raw, key, int, -1) for key in ("fileMode", "uid", "gid"))
    return CdiNode(host_path, path, permissions.replace("none", ""), mode, uid, gid)


MOUNT_KEYS = ("hostPath", "containerPath", "type", "options")
# The device policy sees to nodev. A bind always has what is mounted below it.
MOUNT_OPTIONS = {"ro", "rw", "bind", "rbind", "private", "rprivate", "nosuid", "suid", "nodev", "dev", "exec"}


def parse_mount(raw: Mapping[str, Any]) -> Mount:
    """Raises ValueError, or OSError if there is nothing to mount."""
    check_keys(raw, MOUNT_KEYS)
    source, target = take_path(raw, "hostPath"), take_path(raw, "containerPath")
    options = take_texts(raw, "options")
    if (kind := take(raw, "type", str, "")) not in ("", "none", "bind"):
        raise ValueError(f"a mount of the type {quote(kind)} is not supported by this driver")
    for option in {*options} - MOUNT_OPTIONS:
        raise ValueError(f"the option {quote(option)} of a mount is not supported by this driver")
    os.stat(source)
    return Mount(source, target, "ro" in options, propagation="private", option="devices",
                 is_nosuid="nosuid" in options)  # fmt: skip


def find_device(catalog: Catalog, name: str) -> Spec:
    """Return the file that a device is in. Raises ConfigError."""
    kind, _, device = name.partition("=")
    found = [spec for spec in catalog.specs if spec.kind == kind and device in spec.devices]
    if not found:
        known = dict.fromkeys(name for spec in catalog.specs for name in spec.names)
        more = f" and {len(known) - MAX_SHOWN} more" if len(known) > MAX_SHOWN else ""
        shown = f"they have {', '.join([*known][:MAX_SHOWN])}{more}" if known else "they have none"
        rule = f"no file of CDI on this host ({', '.join(DIRECTORIES)}) has this device; {shown}"
        raise ConfigError("devices.host_path", name, rule, "; ".join(catalog.problems))
    best = [spec for spec in found if spec.folder == found[-1].folder]
    if best[1:]:
        rule = f"is in {best[0].path} and in {best[1].path}, and none of them counts more"
        raise ConfigError("devices.host_path", name, rule, "remove one of the files")
    return best[0]


def find_edits(names: Iterable[str], catalog: Catalog) -> Edits:
    """Return what a container gets for devices. Raises ConfigError."""
    edits, used = Edits(), set()
    for name in names:
        spec = find_device(catalog, name)
        parts = [] if spec.path in used else [spec.edits]
        used.add(spec.path)
        for raw in (*parts, spec.devices[name.partition("=")[2]]):
            try:
                found = parse_edits(raw)
                edits = edits.then(replace(found, hooks=tuple(replace(hook, device=name) for hook in found.hooks)))
            except OSError as error:
                check_shortage(error)
                rule = f"{spec.path} names {quote(str(error.filename))}: {error.strerror}"
                raise ConfigError("devices.host_path", name, rule, "write the file anew for this host") from None
            except ValueError as error:
                raise ConfigError("devices.host_path", name, f"{spec.path}: {error}") from None
    return edits


def apply_devices(task: TaskConfig, options: JobOptions) -> tuple[TaskConfig, JobOptions, Edits]:
    """Return a task and its options with what its devices of CDI mean, as if a device plugin had asked for it.
    Raises ConfigError or OSError."""
    names = [device.host_path for device in options.devices if device.is_cdi]
    if not names:
        return task, options, Edits()
    edits = find_edits(names, read_catalog())
    given = replace(
        task,
        env={**task.env, **edits.env},
        mounts=(*task.mounts, *edits.mounts),
        devices=(*task.devices, *edits.nodes),
    )
    return given, replace(options, devices=tuple(d for d in options.devices if not d.is_cdi)), edits


def add_groups(account: Account | None, options: JobOptions, groups: Sequence[int]) -> Account | None:
    """Return the command's user with more groups. A booted system gives its services groups itself. Raises
    ConfigError."""
    if not groups or options.boot:
        return account
    if account:
        return replace(account, groups=tuple(dict.fromkeys((*account.groups, *groups))))
    if options.user:
        rule = "cannot have the groups of a CDI device, as systemd-nspawn looks this user up itself"
        raise ConfigError("user", options.user, rule, "use an image that is a directory, or no user")
    return Account("root", 0, 0, tuple(groups), "/root")


def describe_catalog(catalog: Catalog) -> Iterator[str]:
    """Yield a line for each file."""
    for spec in catalog.specs:
        more = f" and {len(spec.names) - MAX_SHOWN} more" if len(spec.names) > MAX_SHOWN else ""
        yield f"{spec.path} has the devices {', '.join(spec.names[:MAX_SHOWN])}{more}"
