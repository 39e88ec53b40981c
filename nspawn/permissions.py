# SPDX-License-Identifier: MPL-2.0
"""What the operator of a client sets in the plugin's block, and the permissions that it gives to jobs."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from nspawn.common import ConfigError


class Permission(enum.Enum):
    """Something that the operator of a client allows jobs or not.

    The value is a word of the plugin's `allow`, or for the last two the name of their own option.
    """

    HOST_NETWORK = "host_network"
    HOST_USERS = "host_users"
    DISK_IMAGES = "disk_images"
    IMAGE_WRITE = "image_write"
    DEVICE_BINDS = "device_binds"
    PIVOT_ROOT = "pivot_root"
    DEVICES = "devices"
    SYSTEM_CALLS = "system_calls"
    HOST_INTERFACES = "host_interfaces"
    HOST_ACCOUNTS = "host_accounts"
    HOST_CREDENTIALS = "host_credentials"
    HOST_OVERLAYS = "host_overlays"
    AMBIENT_CAPABILITIES = "ambient_capabilities"
    SELINUX_LABELS = "selinux_labels"
    LINK_JOURNAL = "link_journal"
    PRIORITY = "priority"
    CAPABILITIES = "allow_caps"
    PATHS = "allow_paths"

    @property
    def is_word(self) -> bool:
        return self not in (Permission.CAPABILITIES, Permission.PATHS)

    @property
    def reference(self) -> str:
        return f"`allow`: {self.value}" if self.is_word else f"`{self.value}`"


@dataclass(frozen=True)
class PermissionInfo:
    """What there is to know about a permission."""

    meaning: str  # what a job can do with it
    is_default: bool = False  # an empty plugin block allows it, because jobs of the Go driver use it
    gives_host: bool = False  # a job that has it can become root of the host


PERMISSIONS: Mapping[Permission, PermissionInfo] = {
    Permission.HOST_NETWORK: PermissionInfo(
        "use the host's network, with its loopback interface and what listens there, and join its bridges",
        is_default=True,
    ),
    Permission.HOST_USERS: PermissionInfo(
        "run as the host's root, without a user namespace, or with a range of users of its choice",
        is_default=True,
        gives_host=True,
    ),
    Permission.DISK_IMAGES: PermissionInfo(
        "let the host's kernel mount a file system of the job's making, which no kernel is safe from",
        is_default=True,
    ),
    Permission.IMAGE_WRITE: PermissionInfo(
        "write to images that other tasks run from, and change the owners of their files", is_default=True
    ),
    Permission.DEVICE_BINDS: PermissionInfo(
        "mount device nodes of the host, such as its disks, by `bind`", is_default=True, gives_host=True
    ),
    # systemd-nspawn resolves links on the way to it as paths of the host (measured on 252).
    Permission.PIVOT_ROOT: PermissionInfo(
        "make a directory of the host that holds a system its root, by a link in its image",
        is_default=True,
        gives_host=True,
    ),
    Permission.DEVICES: PermissionInfo(
        "use any device of the host, such as its disks, by `devices`", gives_host=True
    ),
    Permission.SYSTEM_CALLS: PermissionInfo("make system calls that nspawn forbids: more of the kernel to attack"),
    Permission.HOST_INTERFACES: PermissionInfo(
        "take interfaces away from the host, make others on it, be a machine of its own in the host's LAN, and "
        "get what the host sends to an address of its choice"
    ),
    Permission.HOST_ACCOUNTS: PermissionInfo(
        "write to the home directories of the host's users, and so act as them", gives_host=True
    ),
    Permission.HOST_CREDENTIALS: PermissionInfo("read any file of the host below `allow_paths`, as root"),
    Permission.HOST_OVERLAYS: PermissionInfo("read any directory of the host below `allow_paths`"),
    Permission.AMBIENT_CAPABILITIES: PermissionInfo(
        "give a command of an ordinary user the capabilities that `allow_caps` allows"
    ),
    Permission.SELINUX_LABELS: PermissionInfo("choose the SELinux labels of its processes and files"),
    Permission.LINK_JOURNAL: PermissionInfo("keep its journal among the host's own, in `/var/log/journal`"),
    Permission.PRIORITY: PermissionInfo(
        "run before all other processes of the host, by the limits rtprio and nice"
    ),
    Permission.CAPABILITIES: PermissionInfo(
        "have these capabilities: in a user namespace over its own things only, with host_users over the host",
        is_default=True,
    ),
    Permission.PATHS: PermissionInfo(
        "read and write what is below these directories of the host as root: by default all there is",
        is_default=True,
        gives_host=True,
    ),
}


DEFAULT_PERMISSIONS = tuple(
    permission.value for permission, info in PERMISSIONS.items() if permission.is_word and info.is_default
)


@dataclass(frozen=True)
class RegistryAuth:
    """Where credentials for registries are."""

    config: str | None = None  # the path of docker's configuration file
    helper: str | None = None  # what follows docker-credential- in the name of a program


@dataclass(frozen=True)
class Size:
    """A number of bytes, as a job or an operator writes it."""

    text: str
    bytes: int


@dataclass(frozen=True)
class PluginOptions:
    """The plugin's block. The fields are the rows of driver.py; a test holds the two against each other."""

    enabled: bool
    volumes: bool
    allow_paths: tuple[str, ...]
    allow_caps: tuple[str, ...]
    allow: tuple[str, ...]  # names of permissions, or all
    user_namespacing: bool
    pids_limit: int  # 0: any number
    image_dir: str
    ephemeral_dir: str | None
    root_size: Size | None
    image_gc: bool
    image_gc_delay: float | None  # seconds
    image_store_max: Size | None
    image_keep: tuple[str, ...]  # names of images, with * for anything
    preload: tuple[str, ...]  # references of images
    image_size_limit: int  # megabytes
    image_stall_timeout: float | None  # seconds
    insecure_registries: tuple[str, ...]
    require_signature: Mapping[str, str]  # files of public keys, by HOST[:PORT][/PREFIX] or *
    registry_mirrors: Mapping[str, tuple[str, ...]]  # by the registry's name, or *; HOST[:PORT][/PREFIX]
    auth: RegistryAuth | None
    reap_after: float | None  # seconds, 0: never
    reap_dry_run: bool
    disable_log_collection: bool

    def allows(self, permission: Permission) -> bool:
        return not {permission.value, "all"}.isdisjoint(self.allow)


def check_permission(name: str, value: object, permission: Permission, config: PluginOptions) -> None:
    """Raise ConfigError about the option `name` if the operator does not give the permission."""
    if not config.allows(permission):
        rule = f"the operator of this client does not allow {permission.value}"
        raise ConfigError(name, value, rule, f'its plugin block needs "{permission.value}" in allow')


def render_permission_table() -> str:
    """Return the manual's table of permissions. "The host": whether a job can become root of the host with it."""
    lines = ["| permission | with an empty block | the host | with it a job can |", "|---|---|---|---|"]
    for permission, info in PERMISSIONS.items():
        usual = "yes" if info.is_default else "no"
        lines.append(f"| {permission.reference} | {usual} | {'yes' if info.gives_host else ''} | {info.meaning} |")
    return "\n".join(lines) + "\n"
