# SPDX-License-Identifier: MPL-2.0
"""Makes a Plan out of a task's configuration and what was found on the host: everything needed to start the task.

A task's variables, and its user if it has an Account, reach the payload in an OCI bundle that only root can read.
nspawn reads it when it starts (252, 257, 262) and gives the variables to the payload byte for byte. They are not
in nspawn's environment and on no command line. With a bundle nspawn reads no settings file (*.nspawn).
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nspawn.cgroup import plan_cgroup, plan_limits
from nspawn.checks import (
    NO_TEXT,
    VARIABLE,
    check_container_path,
    check_user,
    escape_field,
    parse_bind,
    split_fields,
)
from nspawn.common import ConfigError
from nspawn.devices import USUAL_DEVICES, DeviceRule
from nspawn.host import CgroupMode, Host, Mounts
from nspawn.images import Account, Image, View, find_root, is_foreign
from nspawn.job import UUID, Device, GroupNetwork, Mode, TaskConfig, plan_machine, state_directory
from nspawn.network import Names, NetworkPlan, is_read_only, plan_network
from nspawn.options import Option, Values, decode_string
from nspawn.roots import PrivateRoot, RootPlan, plan_place, plan_root
from nspawn.rules import check_rules
from nspawn.sources import Pin, Source, read_rules

MAX_VARIABLE = 128 << 10  # bytes of NAME=VALUE and its final NUL: the kernel's MAX_ARG_STRLEN
MAX_ENVIRONMENT = 1536 << 10  # bytes; the kernel takes 2 MiB of arguments and environment together


def check_environment(variables: Mapping[str, str]) -> None:
    total = 0
    for name, value in variables.items():
        if found := NO_TEXT.search(value):
            rule = f"the value must not hold the character U+{ord(found[0]):04X}: systemd-nspawn takes text only"
            raise ConfigError("env", name, rule, "put the value into a file with a template block")
        size = len(f"{name}={value}".encode(errors="replace")) + 1
        total += size
        if size > MAX_VARIABLE:
            rule = f"a variable may have {MAX_VARIABLE >> 10} KiB, this one has {size >> 10}"
            raise ConfigError("env", name, rule, "put the value into a file with a template block")
    if total > MAX_ENVIRONMENT:
        rule = f"all variables together may have {MAX_ENVIRONMENT >> 10} KiB"
        raise ConfigError("env", f"{total >> 10} KiB", rule, "put large values into files with template blocks")


def select_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables whose names nspawn accepts. A key of a meta block, for example, may contain dots."""
    return {name: value for name, value in variables.items() if VARIABLE.fullmatch(name)}


def explain_variables(variables: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each variable that does not reach the task."""
    for name in sorted(variables):
        if not VARIABLE.fullmatch(name):
            why = "systemd-nspawn accepts letters, digits and underscores only"
            yield f"The variable {name!r} is not passed on: {why}."


def render_bundle(variables: Mapping[str, str], account: Account | None) -> str:
    """Return the bundle's config.json, in ASCII; nspawn's command line has the rest. Raises ConfigError for
    variables that are too large or no text."""
    variables = {**(account.variables if account else {}), **variables}
    check_environment(variables)
    process: dict[str, object] = {"env": [f"{name}={value}" for name, value in sorted(variables.items())]}
    if account:
        process["user"] = {"uid": account.uid, "gid": account.gid, "additionalGids": account.groups}
    return json.dumps({"ociVersion": "1.0.0", "process": process})


DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # nspawn's default for the payload


@dataclass(frozen=True)
class Inside:
    """What a command gets that exec runs in the container: the task's user, directory and variables."""

    user: str = ""  # "": root
    directory: str = "/"
    variables: Mapping[str, str] = field(default_factory=dict)
    account: Account | None = None  # None: enter.py looks the user up in the container


def plan_inside(task: TaskConfig, values: Values, variables: Mapping[str, str], account: Account | None) -> Inside:
    """Return what exec gives to commands. Without an account, enter.py looks the user up in the container."""
    given = {
        "PATH": DEFAULT_PATH,
        "LANG": "C.UTF-8",
        "container": "systemd-nspawn",
        **({"container_uuid": task.alloc_id} if UUID.fullmatch(task.alloc_id) else {}),
        **variables,
    }
    user = account.name if account else values["user"] or ""
    return Inside(user, values["working_directory"] or "/", given, account)


@dataclass(frozen=True)
class Needs:
    """What a start has to prepare for some options. It is never read back out of nspawn's arguments, which also
    hold the words of the job's command."""

    mount_points: bool  # nspawn cannot make them in the image
    inaccessible: bool  # what nspawn hides paths with
    overlays: bool  # a directory for what they change
    filter: bool  # a booted system's console is a terminal, which puts a CR before each LF
    directory: str  # the command's working directory
    is_copied: bool  # nspawn runs a copy of the image, unless there is a private root

    @classmethod
    def of(cls, values: Values, mode: Mode) -> Needs:
        return cls(
            mount_points=is_read_only(values),
            inaccessible=bool(values["inaccessible"]),
            overlays=bool(values["overlay"]),
            filter=mode is Mode.BOOT and values["console"] != "pipe",
            directory="/" if mode is Mode.BOOT else values["working_directory"] or "/",
            is_copied=values["ephemeral"] or values["volatile"] not in (None, "no"),
        )


@dataclass(frozen=True)
class Plan:
    """Everything needed to start a task."""

    task_id: str
    machine: str
    mode: Mode
    network: NetworkPlan
    argv: tuple[str, ...]  # of systemd-nspawn; a private root adds its own
    environ: Mapping[str, str]  # variables for nspawn beside the usual ones
    bundle: str  # the text of config.json
    cgroup: str
    limits: Mapping[str, str]  # contents of the cgroup's control files, by name
    log_paths: tuple[str, str]  # of stdout and stderr
    image: Image
    private: PrivateRoot | None  # None: nspawn makes the root from the image
    pivot: str  # the directory of the image that becomes the container's root
    needs: Needs
    command: tuple[str, ...]
    search_path: str  # the command's PATH
    mounts: Mapping[str, str]  # of binds and volumes: targets to sources in the shim's mount namespace
    prefix: tuple[str, ...]  # the command that starts nspawn, () for none
    pins: tuple[Pin, ...]
    nosuid: tuple[str, ...]  # paths that nspawn binds and that must be mounted nosuid
    device_rules: tuple[DeviceRule, ...]
    credentials: Mapping[str, bytes]  # by their names
    copying: str  # a sentence about nspawn's copy of the image, "" if it makes none
    inside: Inside
    has_other_users: bool  # its users have other ids on the host
    journal: Journal
    notes: tuple[str, ...]  # sentences for the task's events

    def find_root(self, state_dir: Path) -> Path | None:
        """Return the image's directory or the private root, as the shim's namespace has it; None for a disk."""
        if self.private:
            return state_dir / "root"
        if not self.image.is_directory:
            return None
        pin = self.find_pin(self.image.fd)
        return Path(pin.place) if pin else self.image.opened

    def explain_fixed_root(self) -> str:
        """Return why no directory can be made in the container's root before the start, "" if one can."""
        if self.private:
            return ""
        if self.image.is_protected:
            return "the operator lets no task write to the image"
        if self.needs.mount_points:
            return "the image is read-only for this task"
        return "systemd-nspawn runs a copy of the image" if self.needs.is_copied else ""

    def name_sources(self, line: str) -> str:
        """Return a message of nspawn with the host's paths instead of those in the state directory."""
        for pin in sorted(self.pins, key=lambda pin: len(pin.place), reverse=True):
            line = line.replace(pin.place, pin.source.path)
        return line

    def find_pin(self, fd: int) -> Pin | None:
        return next((pin for pin in self.pins if fd >= 0 and pin.source.fd == fd), None)


JOURNALS = "/var/log/journal"


@dataclass(frozen=True)
class Journal:
    """How the host shows a container's journal."""

    place: str = ""  # a path in JOURNALS, removed with the task; "" for no journal
    target: str = ""  # what `place` is a link to; "" if it is a directory that is mounted in the container
    notes: tuple[str, ...] = ()  # sentences for the task's events

    @property
    def argv(self) -> tuple[str, ...]:
        return (f"--bind={self.place}",) if self.place and not self.target else ()


def plan_journal(task: TaskConfig, values: Values, found: HostInputs, root: RootPlan) -> Journal:
    """Return the journal to show on the host. It is named by the allocation's id: the image's machine id could be
    that of the host or another task. Raises ConfigError."""
    kind = (values["link_journal"] or "no").removeprefix("try-")
    if kind in ("no", "auto"):
        return Journal()
    obstacle = found.journal_obstacle
    if kind == "host" and have_other_users(values):
        obstacle = "in a user namespace the container could not write there"
    if kind == "guest" and (root.private or values["ephemeral"] or not found.image.is_directory):
        obstacle = "the container's files are not in a directory of the host"
    if obstacle and not values["link_journal"].startswith("try-"):
        raise ConfigError("link_journal", values["link_journal"], f"cannot be had: {obstacle}", "leave it out")
    if obstacle:
        return Journal(notes=(f"link_journal has no effect: {obstacle}.",))
    place = name_journal(task.alloc_id)
    return Journal(place, f"{found.image.path}{place}" if kind == "guest" else "")


def name_journal(alloc_id: str) -> str:
    return f"{JOURNALS}/{alloc_id.replace('-', '').lower()}"


@dataclass(frozen=True)
class HostInputs:
    """What was found on the host before a start is planned."""

    image: Image
    mounts: Mounts
    sources: Mapping[str, Source] = field(default_factory=dict)  # by the job's names for them
    credentials: Mapping[str, bytes] = field(default_factory=dict)
    names: Names = Names()
    devices: Mapping[Device, Source] = field(default_factory=dict)
    device_rules: tuple[DeviceRule, ...] = ()  # for the devices, and for nodes in binds and volumes
    directories: Mapping[str, Source] = field(default_factory=dict)  # of the task, and volumes, by path
    ephemeral_dir: str = ""  # the operator's, "" for the task's directory
    account: Account | None = None
    journal_obstacle: str = ""  # why the host cannot show the task's journal, "" if it can


def plan_task(rows: Sequence[Option], task: TaskConfig, values: Values, host: Host, found: HostInputs) -> Plan:
    """Plan the start of a task. Raises ConfigError."""
    check_rules(rows, values, host)
    state, machine = state_directory(task.id), plan_machine(task.name, task.alloc_id)
    root, image_pins = plan_image(task, values, host, found)
    network = plan_network(task.network, values, found.names, machine, is_disk=not found.image.is_directory)
    values = {**values, **network.values, **plan_defaults(task, values, mode := Mode.of(values), found.account)}
    given = {**values["environment"], **task.env, **network.environ}
    variables = select_variables(given)
    directories = plan_pins(found.directories, state, "directories")
    volumes = plan_volumes(task, values, found.mounts, directories)
    journal = plan_journal(task, values, found, root)
    pins, devices = plan_pins(found.sources, state), plan_nodes(found.devices, state)
    arguments = [
        *render_options(rows, {**values, **root.values}),
        *render_sources(values, found.mounts, pins, devices, plan_credentials(found.credentials, state)),
        *network.argv,
        *itertools.chain(*(volume.argv for volume in volumes)),
        *network.render_files(state),
        *render_bundle_options(values, state),
    ]
    return Plan(
        task_id=task.id,
        machine=machine,
        mode=mode,
        network=network,
        argv=plan_argv(task, values, host, (*root.argv, *arguments, *journal.argv)),
        environ=plan_environ(host),
        bundle=render_bundle({**mode.environ, **variables}, found.account),
        cgroup=plan_cgroup(host.cgroups, task.cgroup, task.alloc_id, task.name),
        limits=plan_limits(task.resources, values, host.cpus),
        log_paths=(task.stdout_path, task.stderr_path),
        image=found.image,
        private=root.private,
        pivot=str(find_root(Path("/"), values)),
        needs=Needs.of(values, mode),
        command=values["command"],
        search_path=variables.get("PATH") or DEFAULT_PATH,
        mounts=plan_mount_table(values, volumes, pins),
        prefix=plan_prefix(values),
        pins=(*pins.values(), *directories.values(), *devices.values(), *image_pins),
        nosuid=plan_nosuid(values, volumes, pins),
        device_rules=(*USUAL_DEVICES, *found.device_rules),
        credentials=found.credentials,
        copying=root.copying,
        has_other_users=have_other_users(values),
        inside=plan_inside(task, values, variables, found.account),
        journal=journal,
        notes=(*explain_variables(given), *network.notes, *journal.notes, *find_gaps(task, values, host, found)),
    )


def plan_image(task: TaskConfig, values: Values, host: Host, found: HostInputs) -> tuple[RootPlan, list[Pin]]:
    """Return how the container gets its root, and what must be mounted for it. Raises ConfigError."""
    check_image_rules(values, found.image, task.network)
    place = plan_place(task.task_dir, found.ephemeral_dir, plan_machine(task.name, task.alloc_id))
    root = plan_root(found.image, values, host, found.mounts, place)
    return pin_image(root, values, found, state_directory(task.id))


def find_gaps(task: TaskConfig, values: Values, host: Host, found: HostInputs) -> Iterator[str]:
    """Yield a sentence for each thing that the task cannot have as it should on this machine."""
    yield from explain_limits(values, host)
    yield from explain_volumes(task, values, found.mounts)


def explain_limits(values: Values, host: Host) -> Iterator[str]:
    """Yield a sentence for each limit that the job's options ask for and this machine does not have."""
    options = {"cpu_hard_limit": "cpu", "memory_swap_max": "memory", "io_weight": "io"}
    for option, controller in options.items():
        if values[option] and controller not in host.controllers:
            why = f"this machine has no cgroup v2 controller {controller}"
            yield f"{option} has no effect: {why}."


def plan_argv(task: TaskConfig, values: Values, host: Host, arguments: Sequence[str]) -> tuple[str, ...]:
    """Return nspawn's command line."""
    # nspawn 261 and later print a note at every start, even with --quiet, unless this option is given.
    is_noisy = host.systemd >= 261 and not values["restrict_address_families"]
    return (
        "systemd-nspawn",
        "--quiet",
        "--keep-unit",
        "--register=no",
        "--link-journal=no",  # "auto" mounts the host's journal of the image's machine id
        f"--machine={plan_machine(task.name, task.alloc_id)}",
        *([f"--uuid={task.alloc_id}"] if UUID.fullmatch(task.alloc_id) else []),
        *(["--restrict-address-families="] if is_noisy else []),
        *([] if can_make_devices(values) else ["--drop-capability=CAP_MKNOD"]),
        *arguments,
        *(["--", *values["command"]] if values["command"] else []),  # what follows "--" is data
    )


def can_make_devices(values: Values) -> bool:
    """Whether a container keeps CAP_MKNOD. In a user namespace the kernel makes no nodes anyway. Elsewhere its
    lack helps to protect the host's disks; without a device policy, nothing else does."""
    return bool(values["user_namespacing"]) or not {"CAP_MKNOD", "all"}.isdisjoint(values["capability"])


def plan_prefix(values: Values) -> tuple[str, ...]:
    """Return the command that starts nspawn. nspawn's own --oom-score-adjust= fails with user namespaces:
    "Permission denied" (measured on 252)."""
    score = values["oom_score_adjust"]
    return () if score is None else ("choom", "-n", str(score), "--")


def plan_defaults(task: TaskConfig, values: Values, mode: Mode, account: Account | None) -> dict[str, str]:
    """Return the options whose defaults depend on others. Raises ConfigError."""
    # An init must run as root, so the task's `user` does not count for a booted system.
    user = "" if mode is Mode.BOOT or not task.user else check_user("user", decode_string("user", task.user))
    return {
        "console": values["console"] or mode.console,
        "user": "" if account else values["user"] or user,  # an account is in the bundle
    }


def check_image_rules(values: Values, image: Image, group: GroupNetwork) -> None:
    if group.namespace and values["user_namespacing"] and not image.is_directory:
        rule = "cannot be had by a task with a disk image in a group's network"
        raise ConfigError("user_namespacing", True, rule, "set it to false, or use an image that is a directory")
    for option in ("image_policy", "root_hash"):
        if values[option] and image.is_directory:
            rule = f"is for disk images, and {image.path} is a directory"
            raise ConfigError(option, values[option], rule, "leave it out")


def pin_image(root: RootPlan, values: Values, found: HostInputs, state: Path) -> tuple[RootPlan, list[Pin]]:
    """Let an image that needs it be used from a mount in the state directory, where nobody can exchange it. Return
    the changed root plan, and the pin if there is one. Raises ConfigError."""
    image = found.image
    if image.fd < 0:
        return root, []
    if values["ephemeral"] and not root.private and not image.is_fixed:
        rule = "would have systemd-nspawn copy an image that others can exchange meanwhile"
        remedy = "leave it out for an image of the task's own; others can lie in the client's image_dir"
        raise ConfigError("ephemeral", True, rule, remedy)
    # nspawn puts its copy beside the image, and looks there for the files that verify a disk image.
    if image.is_fixed and not root.private and (values["ephemeral"] or not image.is_directory):
        return root, []
    place, mode = f"{state}/{IMAGE_PLACE}", os.fstat(image.fd).st_mode
    argv = replace(image, path=Path(place)).argv if root.argv else ()
    private = root.private and replace(root.private, layers=(place,))
    return replace(root, argv=tuple(argv), private=private), [Pin(Source(str(image.path), mode, image.fd), place)]


IMAGE_PLACE, DEVICES_PLACE, BUNDLE_PLACE = "image", "devices", "bundle"  # in the state directory


def plan_pins(sources: Mapping[str, Source], state: Path, folder: str = "mounts") -> dict[str, Pin]:
    """Return a pin for each source, under the key of the source."""
    return {
        name: Pin(source, f"{state}/{folder}/{number}") for number, (name, source) in enumerate(sources.items())
    }


def plan_nosuid(values: Values, volumes: Sequence[Volume], pins: Mapping[str, Pin]) -> tuple[str, ...]:
    """Return the paths of id-mapped volumes and binds. Files of the host's root there belong to root inside, too:
    without nosuid, a set-user-id file that another task made would make any user inside root."""
    mapped = [volume.source for volume in volumes if volume.have_idmap]
    for option in ("bind", "bind_read_only"):
        for name, text in values[option].items():
            if not {"idmap", "rootidmap", "owneridmap"}.isdisjoint(parse_bind(text)[1].split(",")):
                mapped.append(pins[name].place)
    return tuple(mapped)


def plan_binds(values: Values, pins: Mapping[str, Pin]) -> list[str]:
    arguments = []
    for option, argument in (("bind", "--bind"), ("bind_read_only", "--bind-ro")):
        for name, text in values[option].items():
            target, options = parse_bind(text)
            end = f":{options}" if options else ""
            arguments.append(f"{argument}={pins[name].place}:{escape_field(target)}{end}")
    for option, argument in (("overlay", "--overlay"), ("overlay_read_only", "--overlay-ro")):
        for item in values[option]:
            *lower, target = split_fields(item)
            places = [pins[name].place if name in pins else escape_field(name) for name in lower]
            arguments.append(f"{argument}={':'.join([*places, escape_field(target)])}")
    return arguments


def plan_nodes(devices: Mapping[Device, Source], state: Path) -> dict[Device, Pin]:
    """Return a pin for each device, for a copy of its node."""
    return {
        device: Pin(source, f"{state}/{DEVICES_PLACE}/{number}", is_node=True)
        for number, (device, source) in enumerate(devices.items())
    }


def render_devices(devices: Mapping[Device, Pin], values: Values, mounts: Mounts) -> Iterator[str]:
    """Yield the binds. Without `idmap`, before Linux 6.3, the nodes belong to `nobody` in a user namespace."""
    end = ":idmap" if have_other_users(values) and mounts.have_idmap("/run") else ""
    for device, pin in devices.items():
        yield f"--bind={pin.place}:{escape_field(device.task_path)}{end}"


def plan_credentials(credentials: Mapping[str, bytes], state: Path) -> dict[str, str]:
    """Return the path of each credential's file."""
    return {key: f"{state}/credentials/{number}" for number, key in enumerate(credentials)}


def render_credentials(places: Mapping[str, str]) -> list[str]:
    return [f"--load-credential={escape_field(key)}:{place}" for key, place in places.items()]


def render_sources(
    values: Values,
    mounts: Mounts,
    pins: Mapping[str, Pin],
    devices: Mapping[Device, Pin],
    places: Mapping[str, str],
) -> list[str]:
    """Return nspawn's arguments for binds, overlays, devices and credentials, which are at `places`."""
    return [*plan_binds(values, pins), *render_devices(devices, values, mounts), *render_credentials(places)]


def render_bundle_options(values: Values, state: Path) -> Iterator[str]:
    """Yield --oci-bundle, and two options that a bundle turns off unless they are given (252, 257, 262)."""
    for option in ("timezone", "resolv_conf"):
        if not values[option]:
            yield f"--{option.replace('_', '-')}=auto"
    yield f"--oci-bundle={state / BUNDLE_PLACE}"


def plan_environ(host: Host) -> dict[str, str]:
    """Return the variables for nspawn beside the usual ones."""
    # A v1 hierarchy cannot be delegated to a user namespace: without this nothing boots in one (measured).
    return {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"} if host.cgroups is CgroupMode.HYBRID else {}


def apply_image(values: Values, image: Image, user: str) -> dict[str, Any]:
    """Return the options; for a command, the image sets those that the job leaves out. `user` is Nomad's.

    An image that no task may write to becomes `ephemeral`, unless it is `volatile` or a `read_only` disk image.
    """
    changes: dict[str, Any] = {}
    is_volatile = values["volatile"] not in (None, "no")
    if image.is_protected and not is_volatile and (image.is_directory or not values["read_only"]):
        changes["ephemeral"] = True
    if image.key and is_volatile and values["private_users_ownership"] in ("auto", "chown"):
        changes["private_users_ownership"] = "map"
    config = image.config
    if not values["boot"]:
        known = dict(entry.split("=", 1) for entry in config.env)
        changes["environment"] = {**known, **values["environment"]}
        changes["command"] = values["command"] or config.command
        changes["working_directory"] = values["working_directory"] or config.working_directory or None
        changes["user"] = values["user"] or user or config.user or None
    return {**values, **changes}


def check_init(plan: Plan, view: View) -> None:
    """Raise ConfigError if there is no init: nspawn would report a container as up that ends at once. Blocks."""
    places = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/sbin/init")
    kinds = set()
    try:
        for place in places:
            if (fd := view.open(place)) is not None:
                try:
                    kinds.add(is_foreign(fd))
                finally:
                    os.close(fd)
    except OSError:
        return  # not known: nspawn will find it, or say what is missing
    if kinds == {True}:
        rule = f"holds a system for another machine than this {os.uname().machine}"
        raise ConfigError("image", str(plan.image.path), rule, "use an image for this architecture")
    if not kinds:
        rule = f"the image has no init ({', '.join(places)})"
        raise ConfigError(
            "boot", True, rule, "set boot = false to run its command, or use an image of a whole system"
        )


def render_options(rows: Sequence[Option], values: Values) -> list[str]:
    return [argument for option in rows for argument in option.argv(values[option.name])]


@dataclass(frozen=True)
class Volume:
    """A directory of the task, or a mount that Nomad asks for, to be bound into the container."""

    source: str
    target: str
    read_only: bool
    have_idmap: bool

    @property
    def argv(self) -> list[str]:
        # "idmap" shows the host's ids inside, so root and all users of the container can use their files.
        # "rootidmap" maps the directory's owner (nobody) to root: then root cannot read its own files, and no
        # other user can create any (measured on 252).
        option = ":idmap" if self.have_idmap else ""
        argument = "--bind-ro" if self.read_only else "--bind"
        return [f"{argument}={escape_field(self.source)}:{escape_field(self.target)}{option}"]


def have_other_users(values: Values) -> bool:
    """Whether the container's users have other ids on the host: the kernel refuses to map ids to themselves."""
    return bool(values["user_namespacing"]) and not re.fullmatch(r"identity|0+(:.*)?", values["private_users"])


def plan_volumes(task: TaskConfig, values: Values, mounts: Mounts, pins: Mapping[str, Pin]) -> list[Volume]:
    """Return volumes for the task's directories and for Nomad's mounts. `pins` are by path. Raises ConfigError."""

    def volume(path: str, target: str, read_only: bool = False) -> Volume:
        have_idmap = have_other_users(values) and mounts.have_idmap(pins[path].source.path)
        return Volume(pins[path].place, target, read_only, have_idmap)

    volumes = []
    if task.alloc_dir:
        volumes = [
            volume(task.shared_dir, "/alloc"),
            # Not id-mapped: root inside could open log FIFOs of other tasks that belong to the host's root.
            # Read-only because Nomad writes to these names as root (CVE-2026-8052).
            Volume(pins[task.log_dir].place, "/alloc/logs", read_only=True, have_idmap=False),
            volume(f"{task.task_dir}/local", "/local"),
            volume(f"{task.task_dir}/secrets", "/secrets"),
        ]
    for mount in task.mounts:
        check_container_path("volume_mount", mount.target)
        if mount.propagation == "bidirectional":
            rule = "systemd-nspawn cannot pass mounts back to the host"
            raise ConfigError(
                "volume_mount.propagation_mode", mount.propagation, rule, "use private or host-to-task"
            )
        volumes.append(volume(mount.source, mount.target, mount.read_only))
    return volumes


def explain_volumes(task: TaskConfig, values: Values, mounts: Mounts) -> Iterator[str]:
    """Yield a sentence for each place of the task whose files the users of the container cannot own."""
    if not have_other_users(values):
        return
    places = {"/alloc": task.shared_dir} if task.alloc_dir else {}
    places |= {mount.target: mount.source for mount in task.mounts}
    for target, source in places.items():
        if not mounts.have_idmap(source):
            kind = mounts.filesystem(source) or "a file system"
            yield (
                f"{target} is on {kind}, which cannot be id-mapped on this machine: its files seem to belong to "
                "nobody, and the container can write only where everybody may; set "
                "user_namespacing = false, or use a file system that can be id-mapped, such as ext4 or xfs."
            )


def find_device_rules(
    task: TaskConfig,
    values: Values,
    sources: Mapping[str, Source],
    volumes: Mapping[str, Source],
    devices: Mapping[Device, Source],
) -> Iterator[DeviceRule]:
    """Yield rules for the devices of a task: those it names, and the nodes in its binds and in Nomad's mounts."""
    for device, source in devices.items():
        yield from read_rules(source, device.permissions)
    for option, permissions in (("bind", "rw"), ("bind_read_only", "r")):
        for name in values[option]:
            yield from read_rules(sources[name], permissions)
    for mount in task.mounts:
        yield from read_rules(volumes[mount.source], "r" if mount.read_only else "rw")


# What nspawn mounts over the image's own directories.
OWN_MOUNTS = ("/dev", "/proc", "/run", "/sys", "/tmp")


def plan_mount_table(values: Values, volumes: Sequence[Volume], pins: Mapping[str, Pin]) -> dict[str, str]:
    """Return the container's mounts for a View: targets to sources, "" for what nobody can look into."""
    hidden = [*OWN_MOUNTS, *(["/var"] if values["volatile"] == "state" else []), *values["inaccessible"]]
    hidden += [split_fields(item)[-1] for name in ("overlay", "overlay_read_only") for item in values[name]]
    hidden += [item.partition(":")[0] for item in values["tmpfs"]]
    table = {os.path.normpath(path): "" for path in hidden}
    table |= {volume.target.rstrip("/"): volume.source for volume in volumes}
    for option in ("bind", "bind_read_only"):
        for name, text in values[option].items():
            table[parse_bind(text)[0].rstrip("/")] = pins[name].place
    return table
