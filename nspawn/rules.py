# SPDX-License-Identifier: MPL-2.0
"""A job's options as a whole: defaults that depend on others or on the operator, rules about two, permissions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from nspawn.addresses import LINK_OPTIONS, check_fixed, needs_host_end, show
from nspawn.checks import IdRange
from nspawn.common import ConfigError, name_entry, quote
from nspawn.host import Host
from nspawn.job import GroupNetwork, JobOptions, TaskConfig
from nspawn.network import NetworkMode
from nspawn.options import Option, decode_options, is_set
from nspawn.permissions import Permission, PluginOptions, Size, check_permission
from nspawn.sysctl import is_of_network


def decode_job(
    rows: Sequence[Option], raw: Mapping[str, object], config: PluginOptions, *, is_in_group: bool = False
) -> JobOptions:
    """Return a job's options, with the defaults that depend on others or on the operator. Raises ConfigError."""
    values = decode_options(rows, raw)
    if values["user_namespacing"] is None:
        values["user_namespacing"] = config.user_namespacing
    if values["private_users"] == IdRange("no"):
        values["user_namespacing"] = False
    # Not nspawn's -U: it silently runs without a user namespace if it cannot make one.
    for name, default in (("private_users", IdRange("pick")), ("private_users_ownership", "auto")):
        values[name] = (values[name] or default) if values["user_namespacing"] else None
    values["pids_limit"] = choose_pids_limit(values["pids_limit"], config.pids_limit)
    check_root_size(values["root_size"], config.root_size)
    if values["network_veth"] is None:
        values["network_veth"] = not any(values[name] for name in OWN_NETWORK)
    options = JobOptions(**values)
    if not is_in_group:
        return options
    check_group_options(options)
    # Nomad makes its network and maps its ports; jobs of the Go driver have network_veth = true.
    return replace(options, network_veth=False, ports=())


def check_plugin(config: PluginOptions) -> None:
    """Raise ConfigError for options of the plugin's block that exclude each other."""
    if config.image_store_max and not config.image_gc:
        rule = "means nothing with image_gc = false, which keeps all images"
        raise ConfigError("image_store_max", config.image_store_max, rule, "leave one of the two out")


def choose_pids_limit(wanted: int | None, allowed: int) -> int:
    """Return how many processes a task may have, 0: any number. Raises ConfigError if it wants too many."""
    if wanted and allowed and wanted > allowed:
        rule = f"the operator of this client allows a task {allowed} processes"
        raise ConfigError("pids_limit", wanted, rule, "ask for fewer")
    return wanted or allowed


def check_root_size(wanted: Size | None, allowed: Size | None) -> None:
    if wanted and allowed and wanted.bytes > allowed.bytes:
        rule = f"the operator of this client allows a task's root {allowed.text}"
        raise ConfigError("root_size", wanted, rule, "ask for less")


# The options beside network_veth that give a container its own network.
OWN_NETWORK = (
    "private_network",
    "network_zone",
    "network_bridge",
    "network_veth_extra",
    "network_macvlan",
    "network_ipvlan",
    "network_interface",
)


def check_group_options(options: JobOptions) -> None:
    """Refuse a second network or a second mapping of ports beside those of the group."""
    for name in ("port_map", *OWN_NETWORK, *LINK_OPTIONS):
        if value := getattr(options, name):
            remedy = "leave it out, or the group's network block"
            if name == "port_map":
                remedy = "write `to = PORT` into the port's block of the group's network"
            raise ConfigError(name, show(value), "cannot be combined with the network of the group", remedy)


def check_link(options: JobOptions) -> None:
    """Refuse fixed addresses without an interface that could have them. Raises ConfigError."""
    mode = NetworkMode.of(GroupNetwork(), options)
    for name in LINK_OPTIONS:
        if not (value := getattr(options, name)) or mode.has_address:
            continue
        rule = "needs a network of the container's own"
        if mode is NetworkMode.NONE:
            rule = "needs an interface, and this network has none but loopback and extra links"
        raise ConfigError(name, show(value), rule, "use network_veth = true, network_zone or network_bridge")
    check_fixed(options)


def has_own_network(options: JobOptions) -> bool:
    return options.network_veth or any(getattr(options, name) for name in OWN_NETWORK)


def has_link(options: JobOptions) -> bool:
    """Whether the container has a link through which nspawn can forward ports."""
    return bool(options.network_veth or options.network_zone or options.network_bridge)


@dataclass(frozen=True)
class Rule:
    """A combination of an option with another one that is refused."""

    option: str
    is_broken: Callable[[JobOptions], bool]
    rule: str
    remedy: str = ""
    needs_image: bool = False  # the image may set the option


def excludes(option: str, others: Sequence[str], remedy: str) -> tuple[Rule, ...]:
    """Return rules by which an option cannot be combined with others."""

    def rule(other: str) -> Rule:
        def is_broken(job: JobOptions) -> bool:
            return bool(getattr(job, option) and getattr(job, other))

        return Rule(option, is_broken, f"cannot be combined with {other}", remedy)

    return tuple(map(rule, others))


def needs(option: str, other: str) -> Rule:
    """Return the rule that an option needs another one."""
    return Rule(
        option,
        lambda job: bool(getattr(job, option)) and not getattr(job, other),
        f"needs {other}",
        f"set {other}, too",
    )


def needs_link(option: str) -> Rule:
    """Return the rule that an option needs a link to forward ports through."""
    return Rule(
        option,
        lambda job: bool(getattr(job, option)) and not has_link(job),
        "needs a network of the container's own",
        "leave network_veth at true, or listen on the host's port itself",
    )


RULES: tuple[Rule, ...] = (
    needs("unit", "boot"),
    needs("journal", "boot"),
    *excludes("journal", ("unit",), "leave it out: the output of the unit is the task's log"),
    *excludes("entrypoint", ("boot",), "set boot = false, or leave it out: a booted system runs the image's init"),
    *excludes("process_two", ("boot",), "set boot = false to run a command, or leave process_two out"),
    Rule(
        "command",
        lambda job: not job.boot and not job.command,
        "is required when boot is false",
        'name the program and its arguments, as in command = ["/bin/sleep", "60"]',
        needs_image=True,
    ),
    Rule(
        "user",
        lambda job: job.boot and job.user not in (None, "root", "0"),
        "cannot be combined with boot",
        "set boot = false: an init must run as root",
    ),
    *excludes("ambient_capability", ("boot",), "set boot = false: an init has its capabilities by itself"),
    # As PID 2 the payload can never say READY (measured on 252, 257 and 262).
    *excludes("notify_ready", ("process_two",), "leave process_two out: only PID 1 can say that it is ready"),
    needs_link("ports"),
    needs_link("port_map"),
    *excludes("network_zone", ("network_bridge",), "a link can be joined to one bridge only"),
    Rule(
        "volatile",
        lambda job: job.is_volatile and job.ephemeral,
        "cannot be combined with ephemeral",
        "either one already throws all changes away",
    ),
    Rule(
        "root_size",
        lambda job: bool(job.root_size) and job.volatile in ("yes", "state"),
        "cannot be combined with volatile = yes or state",
        "set volatile to overlay, or leave it out and set ephemeral = true",
    ),
    Rule(
        "private_users_ownership",
        lambda job: job.private_users_ownership == "chown" and (job.read_only or job.is_volatile),
        "cannot be combined with read_only or volatile",
        "leave it out: the image's files are then mapped",
    ),
    Rule(
        "bind_user",
        lambda job: bool(job.bind_user) and not job.user_namespacing,
        "needs user namespaces",
        "set user_namespacing = true",
    ),
    needs("bind_user_shell", "bind_user"),
    needs("bind_user_group", "bind_user"),
    needs("root_hash_sig", "root_hash"),
    needs("private_users_delegate", "user_namespacing"),
    Rule(
        "load_credential",
        lambda job: bool(job.load_credential.keys() & job.set_credential.keys()),
        "names a credential that set_credential sets, too",
        "give it one of the two ways",
    ),
)


def check_targets(task: TaskConfig, options: JobOptions) -> None:
    """Refuse two mounts on one path of the container: nspawn makes both, and the task sees only one. Raises
    ConfigError."""
    given = [
        *(("", "the task's own directory", mount.target) for mount in task.directory_mounts),
        *(("bind", mount.source, mount.target) for mount in options.bind),
        *(("bind_read_only", mount.source, mount.target) for mount in options.bind_read_only),
        *(("mount", mount.source, mount.target) for mount in options.mount),
        *(("overlay", overlay.text, overlay.target) for overlay in options.overlay),
        *(("overlay_read_only", overlay.text, overlay.target) for overlay in options.overlay_read_only),
        *((mount.option, mount.source, mount.target) for mount in task.mounts),
        *(("devices", device.host_path, device.target) for device in (*options.devices, *task.devices)),
    ]
    taken: dict[str, str] = {}
    for option, source, target in given:
        path = os.path.normpath(f"/{target.lstrip('/')}")
        if path in taken:
            rule = f"is for the path {quote(path)} in the container, as is {taken[path]}"
            raise ConfigError(option, source, rule, "give each a path of its own")
        taken[path] = f"{option} {quote(source)}" if option else source


def check_own_settings(options: JobOptions, *, is_in_group: bool = False) -> None:
    """Refuse settings of the network if that is the host's. Raises ConfigError."""
    for name, value in options.sysctl.items():
        if is_of_network(name) and not (is_in_group or has_own_network(options)):
            rule = "is a setting of the network, and this task uses the host's"
            raise ConfigError(name_entry("sysctl", name), value, rule, "give the task a network of its own")


def check_rules(rows: Sequence[Option], options: JobOptions, host: Host, *, has_image: bool = True) -> None:
    """Raise ConfigError for an option that this host is too old for, or that breaks a rule. Without the image,
    rules that it may satisfy are left out."""
    for option in rows:
        value = getattr(options, option.name)
        needed = option.needed_systemd(value)
        if needed > host.systemd and is_set(value):
            rule = f"needs systemd {needed} or newer, and this host has {host.systemd}"
            raise ConfigError(option.name, value, rule, "leave it out, or constrain the job to newer hosts")
    for name in ("selinux_context", "selinux_apifs_context"):
        if (value := getattr(options, name)) and not host.has_selinux:
            raise ConfigError(name, value, "needs SELinux, which is off on this host", "leave it out")
    if options.io_max and "io" not in host.controllers:
        rule = "needs the cgroup v2 controller io, which this machine does not have"
        remedy = "constrain the job to clients whose attribute driver.nspawn.limits has io"
        given = [{key: value for key, value in vars(limit).items() if value} for limit in options.io_max]
        raise ConfigError("io_max", given, rule, remedy)
    for broken in RULES:
        if (has_image or not broken.needs_image) and broken.is_broken(options):
            raise ConfigError(broken.option, getattr(options, broken.option), broken.rule, broken.remedy)
    check_link(options)


def check_permissions(
    rows: Sequence[Option], options: JobOptions, config: PluginOptions, *, is_in_group: bool = False
) -> None:
    """Refuse options that need a permission which the operator does not give. Paths are not checked here, but when
    they have been opened: see sources.py. A task in a group's network does not use the host's."""
    for option in rows:
        value = getattr(options, option.name)
        if option.permission and option.permission.is_word and option.needs_permission(value):
            check_permission(option.name, value, option.permission, config)
    if not is_in_group and not has_own_network(options):
        check_permission("network_veth", options.network_veth, Permission.HOST_NETWORK, config)
    if needs_host_end(options):  # the host sends what is for this address to the container
        check_permission("network_address", show(options.network_address), Permission.HOST_INTERFACES, config)
    for name in ("capability", "ambient_capability"):
        refused = [item for item in dict.fromkeys(getattr(options, name)) if item not in config.allow_caps]
        if refused and "all" not in config.allow_caps:
            what = "these capabilities" if refused[1:] else "this capability"
            rule = f"the operator of this client does not allow {what}"
            allowed = ", ".join(config.allow_caps) or "none"
            shown = refused if refused[1:] else refused[0]
            raise ConfigError(name, shown, rule, f"its plugin block has allow_caps = {allowed}")
