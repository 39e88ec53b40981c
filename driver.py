# SPDX-License-Identifier: MPL-2.0
"""Nomad task driver that runs tasks as systemd-nspawn containers: a booted OS, or one command.

This file is the plugin. What it knows of containers and of the machine is in nspawn/, one module per subject. The
modules import each other downwards only, and none imports this file.

    Schema      the options of tasks and of the plugin's block, and the schema Nomad checks them against
    Supervisor  starting the shim, and a task's life: start, recover, wait, signal, stop, destroy
    Services    the gRPC services Nomad calls
    Handshake   the plugin as a process; what people ask of the file is in nspawn/commands.py

"Measured" in a comment means: on a real systemd-nspawn, in the versions named.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import itertools
import logging
import math
import os
import re
import select
import signal
import socket
import stat
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgpack

from nomad_pb import (
    base_pb2,
    base_pb2_grpc,
    driver_pb2,
    driver_pb2_grpc,
    grpc_plugin_pb2,
    grpc_plugin_pb2_grpc,
    hcl_spec_pb2,
    health_pb2,
    health_pb2_grpc,
    recoverable_error_pb2,
    rpc_status_pb2,
)
from nspawn.accounts import find_account
from nspawn.addresses import check_ip, set_addresses
from nspawn.cdi import add_groups, apply_devices
from nspawn.cgroup import (
    Usage,
    find_io_limits,
    find_mirrors,
    freeze_cgroup,
    is_frozen,
    kill_cgroup,
    make_cgroup,
    parse_counters,
    read_number,
    read_usage,
    wait_members,
)
from nspawn.checks import (
    ACCOUNT,
    HOSTNAME,
    MAX_PIDS,
    RESOLV_CONF,
    IoLimit,
    any_of,
    check_checksum,
    check_container_path,
    check_container_paths,
    check_credential_files,
    check_credentials,
    check_helper,
    check_host_directories,
    check_host_directory,
    check_image_address,
    check_interface_name,
    check_interface_names,
    check_io_limits,
    check_labels,
    check_mac,
    check_pattern,
    check_pivot_root,
    check_platform,
    check_ports,
    check_positive,
    check_printable,
    check_program,
    check_range,
    check_registries,
    check_user,
    check_variables,
    is_chosen,
    parse_capabilities,
    parse_duration,
    parse_extra_hosts,
    parse_gateways,
    parse_id_range,
    parse_interfaces,
    parse_least_size,
    parse_mirrors,
    parse_permissions,
    parse_rate,
    parse_rlimits,
    parse_signers,
    parse_single_capabilities,
    parse_size,
    render_ambient,
    render_joined,
    render_pairs,
    render_short_option,
    render_tmpfs,
)
from nspawn.common import (
    MACHINES_ROOT,
    PLUGIN_NAME,
    SAFE_PATH,
    STATE_ROOT,
    ConfigError,
    DriverError,
    HostError,
    LibraryLog,
    TaskNotFound,
    TransientError,
    Unsupported,
    check_shortage,
    explain_host,
    log,
    quote,
    render_line,
    shorten,
)
from nspawn.devices import can_restrict_devices, restrict_devices
from nspawn.entries import ExecServer
from nspawn.exec import Exec, is_confined
from nspawn.fetches import Fetches, plan_fetching, plan_retention
from nspawn.files import close_all, remove_tree, write_file
from nspawn.health import HealthWatch
from nspawn.host import (
    FINGERPRINT_PERIOD,
    Host,
    can_share_images,
    have_machined,
    is_open_to_others,
    read_boot_id,
    read_cpu_mhz,
    read_host,
    read_mounts,
)
from nspawn.images import (
    Image,
    apply_image,
    check_image_patterns,
    check_preload,
    check_tree,
    choose_image_dir,
    find_archive,
    find_image,
    plan_origin,
)
from nspawn.inits import (
    AGAIN,
    AGAIN_LATER,
    HALT,
    POWER_OFF,
    plan_request,
    plan_unit_request,
    run_inside,
    wait_init,
)
from nspawn.job import (
    MIB,
    Dns,
    GroupNetwork,
    ImageDownload,
    JobOptions,
    Login,
    Mode,
    Port,
    Resources,
    TaskConfig,
    parse_signal,
    render_signal,
    state_directory,
)
from nspawn.logs import chown_logs, find_holders, hold_for_a_moment, hold_until_read, open_logs, open_pipes
from nspawn.machined import Machined
from nspawn.mounts import (
    BIND_OPTIONS,
    Device,
    Mount,
    MountBlock,
    check_device,
    check_devices,
    check_mount_source,
    check_mount_type,
    check_tmpfs,
    has_image_source,
    parse_binds,
    parse_mounts,
    parse_overlays,
)
from nspawn.network import (
    LATE_ADDRESS,
    NO_ADDRESS,
    NetworkMode,
    NetworkPlan,
    check_interfaces,
    check_namespace,
    explain_no_address,
    have_networkd,
    read_addresses,
    read_names,
)
from nspawn.notify import listen, wait_claim
from nspawn.options import (
    Kind,
    Option,
    decode_options,
    never,
)
from nspawn.outcome import (
    ExitResult,
    OomReport,
    explain_failure,
)
from nspawn.permissions import (
    DEFAULT_PERMISSIONS,
    Permission,
    PluginOptions,
    RegistryAuth,
    check_permission,
)
from nspawn.plan import BUNDLE_PLACE, HostInputs, Plan, plan_task
from nspawn.process import (
    DESCRIPTORS,
    NO_PROCESS,
    SPARE,
    Handling,
    ProcessId,
    cancel_and_wait,
    find_children,
    finish,
    read_handling,
    read_inner_pid,
    reap_children,
    run,
    run_in_thread,
    start_process,
    wait_readable,
)
from nspawn.quota import forbid_attributes
from nspawn.reaper import AgentTasks, Reaper, Reaping
from nspawn.record import add_note, find_exit, read_messages, read_record, reserve_room
from nspawn.rules import (
    check_own_settings,
    check_permissions,
    check_plugin,
    check_rules,
    check_targets,
    decode_job,
)
from nspawn.running import (
    check_leader,
    check_shim,
    find_marked,
    find_nspawn,
    hold_cgroup,
    is_held,
    read_mark,
    read_ranges,
    restore_directory,
    write_mark,
)
from nspawn.setup import make_files, make_journal, make_mounts, make_upper_dir
from nspawn.sources import (
    Source,
    check_image_name,
    check_image_write,
    check_verity,
    expand_classes,
    find_device_rules,
    open_devices,
    open_directories,
    open_image,
    open_sources,
    open_volumes,
    read_credentials,
)
from nspawn.state import (
    STATE_VERSION,
    Events,
    State,
    find_address_owner,
    find_alloc_dirs,
    find_journal_obstacle,
    find_locks,
    kill_processes,
    read_state,
    read_states,
    remove_leftovers,
    split_id,
    state_from_id,
    wait_container,
    wait_processes,
)
from nspawn.store import Store
from nspawn.sysctl import check_sysctls, write_sysctls
from nspawn.unit import check_unit, chown_unit_pipes, plan_signal

__version__ = "0.1.0"  # read by Nomad as a hashicorp/go-version: `.dev1` and `.post1` would stop the agent
FILE_NAME = "nomad-driver-nspawn"  # what the agent's `plugin` block is looked up by


# =====================================================================================================
# Schema
#
# The rows: a task's options by groups, and the plugin's. The schema, decoding, nspawn's arguments and the
# reference in docs/options.md are made from them.
# =====================================================================================================

IMAGE_OPTIONS: tuple[Option, ...] = (
    Option("image", Kind.STRING,
           "The container's file system: the path of a directory, a disk image, a block device or a tar archive, "
           "the name of an image in `image_dir`, or `docker://HOST/NAME:TAG`. A name is looked up in `image_dir` "
           "first. A relative path is looked up in the task's directory, then in the plugin's, then in the "
           "agent's working directory. `alloc/...` is in the directory that all tasks of the allocation share.",
           '"debian"', required=True),
    Option("image_download", Kind.BLOCK,
           "Where to fetch the image from if `image_dir` has none of this name. It is fetched once, into the "
           "driver's own store.",
           '{ url = "https://example.com/debian.tar.xz" }', into=ImageDownload, fields=(
               Option("url", Kind.STRING,
                      "The address: http or https, or `HOST/NAME:TAG` for an image in a registry.",
                      '"https://example.com/debian.tar.xz"', required=True, check=check_image_address),
               Option("type", Kind.STRING,
                      "What the address holds: a tar archive of a directory, a disk image, or an image in a "
                      "registry.",
                      '"raw"', default="tar", choices=any_of("tar", "raw", "docker")),
               Option("verify", Kind.STRING,
                      "How to verify the file: `checksum` checks it against `URL.sha256` or `SHA256SUMS` beside "
                      "it, `signature` also checks the signature with the keys of systemd's import keyring. "
                      "Images of registries are always checked against their digests.",
                      '"checksum"', default="no", choices=any_of("no", "checksum", "signature")),
               Option("checksum", Kind.STRING, "The checksum that the file must have.",
                      '"sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"',
                      check=check_checksum),
               Option("platform", Kind.STRING,
                      "The platform to pick from a multi-platform image; this machine's by default.",
                      '"linux/arm64"',
                      check=check_platform),
               Option("force", Kind.BOOL,
                      "Ask at every start whether there is a newer image, also if `image_dir` has one of this "
                      "name.",
                      "true",
                      default=False),
           )),
    Option("auth", Kind.BLOCK,
           "Credentials for the server or registry of the image.",
           '{ username = "ci" }', into=Login, fields=(
               Option("username", Kind.STRING, "The user's name.", '"ci"'),
               Option("password", Kind.STRING,
                      "The password or token. Better take it from a variable.", '"s3cret"'),
           )),
    Option("ephemeral", Kind.BOOL,
           "Give the task a private root over the image. What the task changes is kept in its directory and "
           "deleted when it ends. Any number of tasks can share the image, and nothing is copied.",
           "true", default=False, argument="--ephemeral"),
    Option("read_only", Kind.BOOL, "Mount the image read-only.", "true", default=False, argument="--read-only"),
    Option("volatile", Kind.STRING,
           "Keep changes in memory only. `yes`: only `/usr` is taken from the image. `state`: the image is "
           "read-only, with an empty `/var`. `overlay`: the whole image, as with `ephemeral` but in memory.",
           '"overlay"', choices=any_of("no", "yes", "state", "overlay"), argument="--volatile"),
    Option("root_size", Kind.STRING,
           "How much the task may write to its private root: a size such as `512M` or `2 GiB`. A root on disk "
           "needs user namespaces, and a client whose file system has project quotas. The plugin's `root_size` "
           "is the maximum, and for roots on disk the default. See [images](images.md#a-limit-for-the-root).",
           '"2 GiB"', check=parse_least_size),
    Option("pivot_root", Kind.STRING,
           "The directory of the image that becomes the root: `PATH`, or `PATH:PATH` with the place for the old "
           "root.",
           '"/sysroot"', check=check_pivot_root, permission=Permission.PIVOT_ROOT, argument="--pivot-root"),
    Option("image_policy", Kind.STRING,
           "Which partitions a disk image must and may have, and how they must be protected.",
           '"root=verity+signed:swap=absent"', since=254, check=check_printable, argument="--image-policy"),
    Option("root_hash", Kind.STRING,
           "The dm-verity root hash, in hexadecimal, that a disk image must have.",
           '"2d8c7f1f2b6a4f0e9c3d5b7a8e9f0a1b2d8c7f1f2b6a4f0e9c3d5b7a8e9f0a1b"',
           check=check_pattern(r"([0-9a-fA-F]{2}){16,64}", "must be a hash in hexadecimal digits"),
           argument="--root-hash"),
    Option("root_hash_sig", Kind.STRING,
           "The PKCS#7 signature of `root_hash`, as `base64:...`.",
           '"base64:MIIC"',
           check=check_pattern(r"base64:[A-Za-z0-9+/=]+", "must be base64: and the signature in it"),
           argument="--root-hash-sig"),
)  # fmt: skip

PROGRAM_OPTIONS: tuple[Option, ...] = (
    Option("boot", Kind.BOOL,
           "Boot the image's init as PID 1; `command` then holds arguments for it.",
           "false", default=True, argument="--boot"),
    Option("unit", Kind.STRING,
           "The service of the booted system that is the task. Its stdout and stderr are the task's, and the task "
           "ends when the service ends, with its exit code; `Restart=` in it counts first. See "
           "[jobs](jobs.md#a-unit-as-the-task).",
           '"app.service"', check=check_unit),
    Option("journal", Kind.BOOL,
           "Write the journal of the booted system to the task's stdout, each line with the name of its unit, "
           "instead of what is on its console. See [jobs](jobs.md#the-journal-as-the-log).",
           "true", default=False),
    Option("command", Kind.STRINGS,
           "The program and its arguments. It replaces the image's Entrypoint and Cmd, or follows `entrypoint`. "
           "Required if `boot` is false and neither another option nor the image names a program. See "
           "[images](images.md#what-is-run).",
           '["/bin/sleep", "60"]', default=()),
    Option("entrypoint", Kind.STRINGS,
           "A program and arguments that replace the image's Entrypoint and Cmd. `command` and `args` follow it.",
           '["/entrypoint.sh", "--verbose"]', default=(), check=check_program),
    Option("args", Kind.STRINGS,
           "Further arguments: for `command` or `entrypoint`, and without these for the image's Entrypoint, in "
           "place of its Cmd. If the container boots, they are arguments for its init.",
           '["--listen", "8080"]', default=()),
    Option("process_two", Kind.BOOL,
           "Run the command as PID 2 under a small init that reaps processes. Signals then have their usual "
           "effect on the command.",
           "true", default=False, aliases=("init",), argument="--as-pid2"),
    Option("user", Kind.STRING,
           "The user inside the container that runs the command. By default the task's own `user`.",
           '"www-data"', check=check_user, argument="-u",
           render=render_short_option),  # --user= means another thing since 261
    Option("working_directory", Kind.STRING,
           "The directory inside the container in which the command starts. It is made if it is missing.",
           '"/srv"', aliases=("work_dir",), check=check_container_path, argument="--chdir"),
    Option("environment", Kind.STRING_MAP,
           "Variables for the command or init. If Nomad sets a variable too, Nomad's value is used.",
           '{ GREETING = "hello" }', default={}, check=check_variables),
    Option("console", Kind.STRING,
           "How stdin, stdout and stderr are set up. By default `pipe` for commands and `read-only` for booted "
           "systems.",
           '"pipe"', choices=any_of("interactive", "read-only", "passive", "pipe", "autopipe"),
           argument="--console"),
    Option("notify_ready", Kind.BOOL,
           "The task counts as started only when its PID 1 reports that it is ready (`sd_notify`). A booted "
           "systemd does so when it has reached its default target.",
           "true", default=False, argument="--notify-ready=yes"),
    Option("suppress_sync", Kind.BOOL,
           "Make fsync() and similar calls do nothing. This is faster, but data may be lost in a power failure.",
           "true", default=False, since=250, argument="--suppress-sync=yes"),
    Option("personality", Kind.STRING,
           "The architecture that uname() reports: for 32-bit systems on 64-bit hosts.",
           '"x86"', choices=any_of("x86", "x86-64", "arm", "arm64", "ppc", "ppc64", "ppc64-le", "s390", "s390x"),
           argument="--personality"),
    Option("set_credential", Kind.STRING_MAP,
           "Credentials for systemd and its services inside, by name. The values never appear on a command line.",
           '{ "db.password" = "secret" }', default={}, check=check_credentials),
    Option("load_credential", Kind.STRING_MAP,
           "Credentials from files: names and paths, on the host or in the task's directories.",
           '{ "db.password" = "secrets/password" }', default={}, check=check_credential_files,
           permission=Permission.HOST_CREDENTIALS, needs_permission=never),
)  # fmt: skip

USER_OPTIONS: tuple[Option, ...] = (
    Option("user_namespacing", Kind.BOOL,
           "Map the container's users to a range of ids of their own on the host. The plugin's option of the same "
           "name sets the default.",
           "false", permission=Permission.HOST_USERS, needs_permission=lambda value: not value),
    Option("private_users", Kind.STRING,
           "The range of ids: `pick` finds a free one, `identity` and `BASE:COUNT` name one, and `no` is the "
           "same as `user_namespacing = false`. It has no effect without user namespaces.",
           '"pick"', check=parse_id_range, permission=Permission.HOST_USERS,
           needs_permission=is_chosen, argument="--private-users"),
    Option("private_users_ownership", Kind.STRING,
           "How the image's files get owners in that range: `map` shows them so in the container, `chown` changes "
           "the image permanently, and `auto` maps where that is possible.",
           '"map"', choices=any_of("off", "chown", "map", "auto", foreign=258),
           argument="--private-users-ownership"),
    Option("private_users_delegate", Kind.NUMBER,
           "How many more ranges of 65536 ids the container gets, for containers inside it.",
           "1", since=260, check=check_range(1, 1024), argument="--private-users-delegate"),
    Option("bind_user", Kind.STRINGS,
           "Users of the host to bring into the container, with their home directories.",
           '["alice"]', default=(), check=check_pattern(ACCOUNT, "must be the name of a user of the host"),
           permission=Permission.HOST_ACCOUNTS, argument="--bind-user"),
    Option("bind_user_shell", Kind.STRING,
           "The shell of these users inside: a path, or `true` for the shell they have on the host.",
           '"/bin/bash"', since=258, check=check_pattern(r"true|false|/[!-~]+", "must be a path, true or false"),
           argument="--bind-user-shell"),
    Option("bind_user_group", Kind.STRINGS,
           "Additional groups of these users inside.",
           '["video"]', default=(), since=259, check=check_pattern(ACCOUNT, "must be the name of a group"),
           argument="--bind-user-group"),
)  # fmt: skip

NETWORK_OPTIONS: tuple[Option, ...] = (
    Option("network_veth", Kind.BOOL,
           "Give the container a network of its own with a virtual link to the host. With `false` it uses the "
           "host's network, unless another option of this table gives it one. The default is `true` if no other "
           "does.",
           "false", permission=Permission.HOST_NETWORK, needs_permission=never,  # see check_permissions
           argument="--network-veth"),
    Option("network_zone", Kind.STRING,
           "Connect the virtual link to the bridge of this zone. All containers of the zone share it, and it "
           "exists as long as one of them runs.",
           '"web"',
           check=check_pattern(r"[A-Za-z0-9_.-]{1,12}",
                               "must be 1 to 12 letters, digits, dots, dashes or underscores"),
           argument="--network-zone"),
    Option("network_bridge", Kind.STRING,
           "Connect the virtual link to this bridge of the host.",
           '"br0"', check=check_interface_name, permission=Permission.HOST_NETWORK, argument="--network-bridge"),
    Option("network_veth_extra", Kind.STRINGS,
           "Additional virtual links to the host: `HOST`, or `HOST:CONTAINER` with the names of both ends.",
           '["ve-db:db0"]', default=(), check=check_interface_names, permission=Permission.HOST_INTERFACES,
           argument="--network-veth-extra"),
    Option("network_macvlan", Kind.STRINGS,
           "Interfaces of the host. On each the container gets an interface with its own MAC address.",
           '["eth0"]', default=(), check=check_interface_names, permission=Permission.HOST_INTERFACES,
           argument="--network-macvlan"),
    Option("network_ipvlan", Kind.STRINGS,
           "As `network_macvlan`, but sharing the MAC address of the host's interface.",
           '["eth0"]', default=(), check=check_interface_names, permission=Permission.HOST_INTERFACES,
           argument="--network-ipvlan"),
    Option("network_interface", Kind.STRINGS,
           "Interfaces of the host to move into the container while it runs.",
           '["eth1"]', default=(), check=check_interface_names, permission=Permission.HOST_INTERFACES,
           argument="--network-interface"),
    Option("network_address", Kind.STRINGS,
           "Fixed addresses of the container, each with the length of its network's prefix. It has them before "
           "its command or init starts, and needs no DHCP client. The permission is needed for the link to the "
           "host only, not in a zone. See [network](network.md#fixed-addresses).",
           '["10.0.0.7/24", "fd00::7/64"]', default=(), check=parse_interfaces,
           permission=Permission.HOST_INTERFACES, needs_permission=never),  # see check_permissions
    Option("network_gateway", Kind.STRINGS,
           "The default gateways, at most one for IPv4 and one for IPv6, in the networks of `network_address`. On "
           "the link to the host one is required: the host's end gets these addresses.",
           '["10.0.0.1"]', default=(), check=parse_gateways),
    Option("network_mac", Kind.STRING,
           "The MAC address of the interface that `network_address` is for, or that asks for an address by DHCP. "
           "By default it is made from the container's name, so a restart of the task does not change it.",
           '"02:00:00:00:00:07"', check=check_mac),
    Option("private_network", Kind.BOOL,
           "Give the container a network of its own. It holds only the loopback interface and what other options "
           "of this table add.",
           "true", default=False, argument="--private-network"),
    Option("ports", Kind.STRINGS,
           "Labels of ports in the group's network block. The host's port is forwarded to the label's `to`, or to "
           "the same number.",
           '["http"]', default=()),
    Option("port_map", Kind.NUMBER_MAP,
           "Labels of ports, and the ports inside the container that they are forwarded to, for TCP and UDP. "
           "Ports of the task's own network block that it does not name are forwarded to the same number.",
           "{ http = 8080 }", default={}, check=check_ports),
    Option("hostname", Kind.STRING,
           "The host name inside the container. By default the machine's name.",
           '"web1"',
           check=check_pattern(HOSTNAME, "must be a host name of up to 64 letters, digits, dashes and dots"),
           argument="--hostname"),
    Option("extra_hosts", Kind.STRINGS,
           "Lines to add to the image's `/etc/hosts`: `NAME:ADDRESS`.",
           '["db:192.0.2.7"]', default=(), check=parse_extra_hosts),
    Option("address_timeout", Kind.STRING,
           "How long the start waits for the container's address. By default `10s` if the container boots, its "
           "image enables systemd-networkd, and its link leads to a bridge, or the host runs systemd-networkd. "
           'Otherwise `0s`. Only services with `address_mode = "driver"` need it: Nomad takes the address only '
           "when the task starts.",
           '"10s"', check=parse_duration),
    Option("resolv_conf", Kind.STRING,
           "How `/etc/resolv.conf` inside the container is made.",
           '"copy-host"', choices=any_of(*RESOLV_CONF), argument="--resolv-conf"),
)  # fmt: skip

FILE_OPTIONS: tuple[Option, ...] = (
    Option("bind", Kind.STRING_MAP,
           "Directories and files to mount writable. The source is a path of the host, or a path in the task's "
           "own directories that begins with `alloc`, `local` or `secrets`. Options may follow the target after "
           "a colon: `norbind`, `idmap`, `rootidmap`, `owneridmap` (systemd 256).",
           '{ "/srv/data" = "/data", "local/etc" = "/etc/app:idmap" }', default=(), check=parse_binds,
           permission=Permission.PATHS),
    Option("bind_read_only", Kind.STRING_MAP,
           "As `bind`, but read-only.",
           '{ "/etc/ssl/certs" = "/etc/ssl/certs" }', default=(), check=parse_binds, permission=Permission.PATHS),
    Option("mount", Kind.BLOCKS,
           "As `bind`, with a block for each mount, so that one source can have several targets.",
           '{\n  source    = "/srv/data"\n  target    = "/data"\n  read_only = true\n}', default=(),
           check=parse_mounts,
           permission=Permission.PATHS, into=MountBlock, fields=(
               Option("type", Kind.STRING,
                      "`bind`, as docker's jobs say it. Its other types have options of their own here: `tmpfs`, "
                      "and Nomad's `volume_mount`.",
                      '"bind"', check=check_mount_type),
               Option("source", Kind.STRING,
                      "A path of the host, or one in the task's own directories, as in `bind`.",
                      '"local/site"', required=True, check=check_mount_source),
               Option("target", Kind.STRING, "The path in the container.", '"/srv/www"', required=True,
                      check=check_container_path),
               Option("read_only", Kind.BOOL, "Mount it read-only.", "true", default=False,
                      aliases=("readonly",)),
               Option("options", Kind.STRINGS, "Options as in `bind`.", '["idmap"]', default=(),
                      check=check_pattern("|".join(BIND_OPTIONS), f"must be one of {', '.join(BIND_OPTIONS)}")),
           )),
    Option("tmpfs", Kind.STRINGS,
           "Directories on which to mount an empty file system in memory: `PATH` or `PATH:OPTIONS`.",
           '["/run/cache:size=100M"]', default=(), check=check_tmpfs, argument="--tmpfs", render=render_tmpfs),
    Option("overlay", Kind.STRINGS,
           "Directories to mount as a writable overlay: `LOWER::TARGET`, or `LOWER:LOWER::TARGET` with the "
           "topmost last. Changes are kept in memory until the task ends. A path with `+` before it is one of "
           "the image.",
           '["+/etc::/etc"]', default=(), check=parse_overlays, permission=Permission.HOST_OVERLAYS,
           needs_permission=has_image_source),
    Option("overlay_read_only", Kind.STRINGS,
           "Directories to mount as a read-only overlay: `LOWER:LOWER:TARGET` with the topmost last.",
           '["+/usr:/srv/addon/usr:/usr"]', default=(), check=parse_overlays, permission=Permission.HOST_OVERLAYS,
           needs_permission=has_image_source),
    Option("inaccessible", Kind.STRINGS,
           "Files and directories of the image to hide.",
           '["/usr/bin/ssh"]', default=(), check=check_container_paths, argument="--inaccessible"),
    Option("devices", Kind.BLOCKS,
           "Devices of the host that the container may use, one block each. It cannot open any other device, "
           "whatever nodes its image holds.",
           '{ host_path = "/dev/kvm" }', default=(), permission=Permission.DEVICES, check=check_devices,
           into=Device, fields=(
               Option("host_path", Kind.STRING,
                      "A device node of the host, whose symbolic links are followed; or a device of the host's "
                      "files of CDI, as in `nvidia.com/gpu=0`; or a class of devices in the host's "
                      "`/proc/devices`, with `char-` or `block-` before it, as in `char-ttyUSB`. See "
                      "[jobs](jobs.md#devices).",
                      '"/dev/ttyUSB0"', required=True, check=check_device),
               Option("container_path", Kind.STRING, "The path in the container. By default the same path.",
                      '"/dev/modem"', check=check_container_path),
               Option("cgroup_permissions", Kind.STRING,
                      "What the container may do with it: `r` to read, `w` to write, `m` to make more nodes of "
                      "it, which needs `CAP_MKNOD` too.",
                      '"r"', default="rwm",
                      check=check_pattern(r"(?!.*(.).*\1)[rwm]{1,3}",
                                          "must be one or more of the letters r, w and m")),
           )),
)  # fmt: skip

SECURITY_OPTIONS: tuple[Option, ...] = (
    Option("capability", Kind.STRINGS,
           "Capabilities the container gets in addition to the default ones, or `all`. Without user namespaces "
           "`CAP_MKNOD` is not among the defaults.",
           '["CAP_NET_ADMIN"]', default=(), aliases=("cap_add",), check=parse_capabilities,
           permission=Permission.CAPABILITIES,
           argument="--capability"),
    Option("drop_capability", Kind.STRINGS,
           "Capabilities to take away from the container.",
           '["CAP_NET_RAW", "CAP_SYS_PTRACE"]', default=(), aliases=("cap_drop",), check=parse_capabilities,
           argument="--drop-capability"),
    Option("ambient_capability", Kind.STRINGS,
           "Capabilities that the command keeps although its user is not root.",
           '["CAP_NET_BIND_SERVICE"]', default=(), check=parse_single_capabilities,
           permission=Permission.AMBIENT_CAPABILITIES,
           argument="--ambient-capability", render=render_ambient),
    Option("no_new_privileges", Kind.BOOL,
           "Let no program inside get more rights than the process that started it. Set-user-id programs then "
           "have no effect.",
           "true", default=False, argument="--no-new-privileges=yes"),
    Option("system_call_filter", Kind.STRINGS,
           "System calls and groups of them to allow in addition to the default ones, or to forbid, with `~` "
           "before each.",
           '["~@mount", "~bpf"]', default=(),
           check=check_pattern(r"~?@?[a-z0-9_-]+",
                               "must be a system call or a group as @mount, or ~ and one of them"),
           permission=Permission.SYSTEM_CALLS,
           needs_permission=lambda value: any(not item.startswith("~") for item in value),
           argument="--system-call-filter"),
    Option("restrict_address_families", Kind.STRINGS,
           "The only address families of sockets the container may use, or, with `~` before the first, the only "
           "ones it may not use.",
           '["AF_UNIX", "AF_INET", "AF_INET6"]', default=(), since=261,
           check=check_pattern(r"~?AF_[A-Z0-9_]+|none", "must be an address family such as AF_INET"),
           argument="--restrict-address-families", render=render_joined),
    Option("selinux_context", Kind.STRING,
           "The SELinux label of the container's processes. It needs a host with SELinux.",
           '"system_u:system_r:svirt_lxc_net_t:s0"', check=check_printable, permission=Permission.SELINUX_LABELS,
           argument="--selinux-context"),
    Option("selinux_apifs_context", Kind.STRING,
           "The SELinux label of the files in the container's API file systems, such as `/proc`. It needs a host "
           "with SELinux.",
           '"system_u:object_r:svirt_sandbox_file_t:s0"', check=check_printable,
           permission=Permission.SELINUX_LABELS,
           argument="--selinux-apifs-context"),
)  # fmt: skip

RESOURCE_OPTIONS: tuple[Option, ...] = (
    Option("sysctl", Kind.STRING_MAP,
           "Settings of the kernel that the container has for itself: `net.*`, if its network is not the host's, "
           "and those of its ipc namespace (`kernel.sem`, `kernel.shm*`, `kernel.msg*`, `fs.mqueue.*`). In a "
           "group `net.*` counts for all its tasks. See [network](network.md#settings-of-the-kernel).",
           '{ "net.core.somaxconn" = "1024" }', default={}, check=check_sysctls),
    Option("rlimit", Kind.STRING_MAP,
           "Limits of the container's processes: `LIMIT`, or `SOFT:HARD`.",
           '{ nofile = "4096:8192" }', default={}, aliases=("ulimit",), check=parse_rlimits,
           permission=Permission.PRIORITY,
           needs_permission=lambda value: not {"RLIMIT_RTPRIO", "RLIMIT_NICE"}.isdisjoint(value),
           argument="--rlimit",
           render=render_pairs),
    Option("oom_score_adjust", Kind.NUMBER,
           "How likely the kernel is to kill the container's processes first when the host runs out of memory: 0 "
           "to 1000.",
           "500", aliases=("oom_score_adj",), check=check_range(0, 1000)),
    Option("cpu_affinity", Kind.STRING,
           "The CPUs that the container's processes may run on, such as `0-3,5`.",
           '"0-1"',
           check=check_pattern(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*",
                               "must be CPUs and ranges, as in 0-3,5"),
           argument="--cpu-affinity"),
    Option("cpu_hard_limit", Kind.BOOL,
           "Limit the task to the job's `cpu`, even when the machine is idle.", "true", default=False),
    Option("pids_limit", Kind.NUMBER,
           "How many processes and threads the task may have. The plugin's `pids_limit` is the maximum and the "
           "default.",
           "200", check=check_range(1, MAX_PIDS)),
    Option("memory_swap_max", Kind.STRING,
           "How much swap the task may use beside its memory: a size such as `512M`, or `infinity`. The default "
           "is none.",
           '"512M"', check=parse_size),
    Option("io_weight", Kind.NUMBER,
           "The task's share of disk time compared to other tasks: 1 to 10000. 100 is usual.",
           "200", check=check_range(1, 10000)),
    Option("io_max", Kind.BLOCKS,
           "What the task may read from and write to a disk in a second, one block for each disk. It needs cgroup "
           "v2, see [limits](operations.md#limits).",
           '{ write_bps = "10M" }', default=(), into=IoLimit, check=check_io_limits, fields=(
               Option("device", Kind.STRING,
                      "The disk, as the host names it. A part of a disk stands for the whole one. By default it "
                      "is the disk of the task's directory.",
                      '"/dev/sda"',
                      check=check_pattern(r"/dev/(?!.*\.\.)[!-~]+",
                                          "must be a device node of the host, such as /dev/sda")),
               Option("read_bps", Kind.STRING, "Bytes to read.", '"50M"', check=parse_rate),
               Option("write_bps", Kind.STRING, "Bytes to write.", '"10 MiB"', check=parse_rate),
               Option("read_iops", Kind.NUMBER, "Read operations.", "1000", check=check_positive),
               Option("write_iops", Kind.NUMBER, "Write operations.", "500", check=check_positive),
           )),
)  # fmt: skip

INTEGRATION_OPTIONS: tuple[Option, ...] = (
    Option("timezone", Kind.STRING,
           "How `/etc/localtime` inside the container is made.",
           '"off"', choices=any_of("off", "copy", "bind", "symlink", "delete", "auto"), argument="--timezone"),
    Option("link_journal", Kind.STRING,
           "Show the container's journal on the host, as `/var/log/journal/ALLOCATION`, until the task is "
           "destroyed. With `host` its files are kept there, with `guest` they are linked from there. The image "
           "must have no machine id of its own. `try-` starts the task without it where it is not possible. "
           "`auto` means `no`.",
           '"try-guest"', choices=any_of("no", "host", "try-host", "guest", "try-guest", "auto"),
           permission=Permission.LINK_JOURNAL, needs_permission=lambda value: value not in (None, "no", "auto")),
    Option("labels", Kind.STRING_MAP,
           "Names and values of the job's choice, for people and programs on the client: "
           "`nomad-driver-nspawn tasks` shows them.",
           '{ team = "web" }', default={}, check=check_labels),
)  # fmt: skip

TASK_GROUPS: Mapping[str, tuple[Option, ...]] = {
    "Images": IMAGE_OPTIONS,
    "Program": PROGRAM_OPTIONS,
    "Users": USER_OPTIONS,
    "Network": NETWORK_OPTIONS,
    "Files": FILE_OPTIONS,
    "Security": SECURITY_OPTIONS,
    "Resources": RESOURCE_OPTIONS,
    "Integration": INTEGRATION_OPTIONS,
}
TASK_OPTIONS: tuple[Option, ...] = tuple(itertools.chain(*TASK_GROUPS.values()))

PLUGIN_OPTIONS: tuple[Option, ...] = (
    Option("enabled", Kind.BOOL, "Whether jobs can use the driver on this client.", "false", default=True),
    Option("volumes", Kind.BOOL,
           "Whether tasks may mount paths of the host: Nomad's volumes (`volume_mount`), and what `bind`, "
           "`bind_read_only`, `mount`, `overlay`, `overlay_read_only`, `load_credential` and a path in `image` "
           "name. Tasks may always mount their own directories.",
           "false", default=True),
    Option("allow_paths", Kind.STRINGS,
           "The only directories of the host that jobs may name in these options, with everything below them. "
           "Links are followed first. Nomad's volumes and `image_dir` need not be among them.",
           '["/srv", "/etc/ssl/certs"]', default=("/",), check=check_host_directories),
    Option("allow_caps", Kind.STRINGS,
           "The only capabilities that jobs may ask for. `all` allows any.",
           '["CAP_NET_ADMIN"]', default=("all",), check=parse_capabilities),
    Option("allow", Kind.STRINGS,
           "The permissions of jobs to use what opens the host, see Permissions. `default` stands "
           "for what an empty plugin block allows, and `all` for everything.",
           '["default", "devices"]', default=DEFAULT_PERMISSIONS, check=parse_permissions),
    Option("user_namespacing", Kind.BOOL,
           "Whether containers have user namespaces if their job does not say.", "false", default=True),
    Option("pids_limit", Kind.NUMBER,
           "How many processes and threads a task may have. 0 means any number.",
           "4096", default=16384, check=check_range(0, MAX_PIDS)),
    Option("image_dir", Kind.STRING,
           "The directory of the images that jobs name without a path. Unless it is set, the other directories of "
           "systemd-machined are looked at, too: /etc/machines, /run/machines, /usr/local/lib/machines, "
           "/usr/lib/machines.",
           '"/srv/images"', default=str(MACHINES_ROOT), refuses_empty=True, check=check_host_directory),
    Option("ephemeral_dir", Kind.STRING,
           "The directory for what tasks with `ephemeral` change. By default it is kept in the task's directory, "
           "for which `ephemeral_disk` reserves space.",
           '"/srv/scratch"', check=check_host_directory),
    Option("root_size", Kind.STRING,
           "How much a task may write to its private root: the maximum, and for roots on disk the default. If it "
           "is not set, roots on disk have no limit. Those in memory have a tenth of the machine's memory unless "
           "the job says otherwise.",
           '"10 GiB"', check=parse_least_size),
    Option("image_gc", Kind.BOOL, "Whether fetched images that no task uses are removed.", "false", default=True),
    Option("image_gc_delay", Kind.STRING, "How long a fetched image is kept after its last use. By default a day.",
           '"30m"', check=parse_duration),
    Option("image_store_max", Kind.STRING,
           "How much all fetched images may take on the disk, unpacked. Beyond that those that no task uses are "
           "removed before their delay is over, the least recently used first. A fetch is never refused for it.",
           '"20 GiB"', check=parse_least_size),
    Option("image_keep", Kind.STRINGS,
           "Fetched images that are never removed, by their names as `nomad-driver-nspawn images` shows them. `*` "
           "stands for anything, slashes as well.",
           '["docker://ghcr.io/team/*"]', default=(), check=check_image_patterns),
    Option("preload", Kind.STRINGS,
           "Images to fetch when the agent starts, one after another, in the background: `docker://...`, or the "
           "address of a tar archive. They are not removed while they are listed. See "
           "[images](images.md#how-long-images-are-kept).",
           '["docker://ghcr.io/team/app:1.2"]', default=(), check=check_preload),
    Option("image_size_limit", Kind.NUMBER,
           "How many megabytes a fetched image may have when it is unpacked.", "20000",
           default=65536, check=check_positive),
    Option("image_stall_timeout", Kind.STRING,
           "How long a download may receive no data before it counts as broken. By default a minute. There is no "
           "limit for the whole download.",
           '"30s"', check=parse_duration),
    Option("insecure_registries", Kind.STRINGS, "Registries and mirrors to ask by plain http.",
           '["registry.local:5000"]', default=(), check=check_registries),
    Option("require_signature", Kind.STRING_MAP,
           "Images that must be signed: files of public keys by registry, `HOST[:PORT]`, or by the beginning of a "
           "repository's name, `HOST[:PORT]/PREFIX`. `*` stands for all registries. The longest that fits counts. "
           "The tool `cosign` verifies the signature. See [images](images.md#signatures).",
           '{ "registry.local:5000/team" = "/etc/nomad.d/team.pub" }', default={}, check=parse_signers),
    Option("registry_mirrors", Kind.STRINGS_MAP,
           "Mirrors of registries, `HOST[:PORT]` or `HOST[:PORT]/PREFIX`. They are asked in this order, and then "
           "the registry itself. `*` stands for all registries that are not named. See "
           "[images](images.md#mirrors).",
           '{ "docker.io" = ["mirror.local:5000"] }', default={}, check=parse_mirrors),
    Option("auth", Kind.BLOCK,
           "Credentials for registries, for jobs that give none.",
           '{ config = "/root/.docker/config.json" }', into=RegistryAuth, fields=(
               Option("config", Kind.STRING,
                      "Docker's configuration file, with `auths`, `credHelpers` or `credsStore`.",
                      '"/root/.docker/config.json"', check=check_host_directory),
               Option("helper", Kind.STRING,
                      "The credential helper to ask, without its prefix `docker-credential-`.",
                      '"ecr-login"', check=check_helper),
           )),
    Option("reap_after", Kind.STRING,
           "How long a task of this agent runs on if the agent does not take it up. Then it is ended and removed. "
           "By default 15 minutes; `0` means for ever. A task whose allocation's directory was removed is ended "
           "at once. Tasks of other agents are left alone.",
           '"1h"', check=parse_duration),
    Option("reap_dry_run", Kind.BOOL,
           "Only say in the agent's log which tasks would be ended by `reap_after`.", "true", default=False),
    Option("disable_log_collection", Kind.BOOL,
           "Do not let Nomad collect the tasks' output (Nomad 1.6 and later).", "true", default=False),
)  # fmt: skip


def render_spec(options: Sequence[Option]) -> hcl_spec_pb2.Spec:
    """Return the options as the schema Nomad checks jobs against.

    Defaults are ours to fill in: what a job does not say arrives as nil.
    """
    spec = hcl_spec_pb2.Spec()
    spec.object.SetInParent()
    for option in options:
        for name in option.names:
            entry = spec.object.attributes[name]
            if option.kind.is_block:
                block = entry.block_value if option.kind is Kind.BLOCK else entry.block_list
                block.name = name
                block.nested.CopyFrom(render_spec(option.fields))
            else:
                entry.Attr.name, entry.Attr.type = name, option.kind.value
                entry.Attr.required = option.required
    return spec


# =====================================================================================================
# Supervisor
#
# The shim (nspawn/shim.sh) is the small process that outlives the plugin: it holds both log FIFOs, waits for
# nspawn and leaves the exit record (nspawn/record.py), and a process that holds the FIFOs (nspawn/logs.py). It
# shares a mount namespace with nspawn, so nspawn's mounts disappear with them, even after SIGKILL (on 257 and
# later, a left-over mount under /run/systemd/nspawn blocks the next start of that name). nspawn's messages go to a
# file mounted over its /dev/kmsg: so stderr is the payload's alone, and the plugin can read what went wrong. A
# thread enters the namespace, mounts and starts the shim in about a millisecond; a helper process would have to
# start a Python first. The kernel's events (pidfds, the notify socket, memory.events) drive the plugin; it polls
# only for an address, for a payload that is not there yet, and for the reader of what an ended task has left in
# its log FIFOs. A running task costs it up to four descriptors.
# =====================================================================================================


SHIM = (Path(__file__).parent / "nspawn/shim.sh").read_text()


def start_shim(plan: Plan, state_dir: Path, stdio: Sequence[int], locks: list[int]) -> ProcessId:
    """Start the shim in a mount namespace of its own, which holds the task's private root. Blocks, and leaves its
    thread in that namespace: for `run_in_thread`. The shim inherits `locks`; our copies are closed. Raises
    DriverError or OSError."""
    try:
        arguments, environ = make_mounts(plan, state_dir, locks)
        if plan.private and plan.private.upper_dir and plan.private.size:
            forbid_attributes()
        return start_shell(plan, state_dir, stdio, arguments, locks, environ)
    finally:
        close_all(locks)


def start_shell(
    plan: Plan,
    state_dir: Path,
    stdio: Sequence[int],
    arguments: Sequence[str],
    locks: Sequence[int],
    environ: Mapping[str, str],
) -> ProcessId:
    environ = {
        **plan.environ,
        **environ,
        "PATH": SAFE_PATH,
        "LANG": "C.UTF-8",
        "NOTIFY_SOCKET": str(state_dir / "notify"),
    }
    argv = ["sh", "-c", SHIM, "nomad-nspawn-shim", str(state_dir), plan.cgroup]
    argv += ["filter" if plan.options.is_terminal else ""]
    argv = [*plan.network.entry, *argv, *plan.program, *arguments, *plan.argv]
    try:
        return start_process(
            argv, environ=environ, stdin=stdio[0], stdout=stdio[1], stderr=stdio[2], pass_fds=locks
        )
    except OSError as error:
        if error.errno == errno.E2BIG:
            rule = "is longer than the kernel takes: 128 KiB an argument, 2 MiB with all options"
            raise ConfigError("command", plan.options.command, rule, "put long texts into files") from None
        check_shortage(error)
        raise HostError(f"the container's shim cannot be started: {error.strerror}") from None


ADDRESS_PATIENCE = 30.0  # seconds after which an event says that a container has no address: DHCP takes a few
HOST_PATIENCE = 1.0  # seconds until a task is watched again after an error of the machine
END_LIMIT = 15.0  # seconds for nspawn to clean up after its payload: it removes an ephemeral copy itself


class Task:
    """A started task. Only `watch` finds out how it ended; everything else waits for `ended`."""

    def __init__(self, state: State, events: Events) -> None:
        self.state = state
        self.events = events
        self.exit: ExitResult | None = None
        self.ended = asyncio.Event()
        self.trouble: OSError | None = None  # what keeps this machine from watching the task
        self.troubled = asyncio.Event()
        self.log = log.bind(task=state.task_id, machine=state.machine)
        self.watcher = asyncio.create_task(self.watch())
        self.announcing: asyncio.Task[None] | None = None
        self.holding: asyncio.Task[None] | None = None  # of the log pipes, after the end
        self.held: int | None = None  # see hold_cgroup

    def hold(self) -> None:
        if self.held is None:
            self.held = hold_cgroup(self.state.cgroup)
            if self.held is not None and DESCRIPTORS.is_among_last(self.held):  # ending tasks is more important
                self.release()

    def release(self) -> None:
        if self.held is not None:
            os.close(self.held)
            self.held = None

    async def watch(self) -> None:
        memory = asyncio.create_task(self.watch_memory())
        try:
            while self.exit is None:
                try:
                    self.exit = await self.wait_end()
                except OSError as error:  # no descriptors, no memory: this says nothing about the task
                    if self.trouble is None:
                        self.log.warn("this machine keeps the task from being watched", error=error.strerror)
                    self.trouble = error
                    self.troubled.set()
                    await asyncio.sleep(HOST_PATIENCE)
        except Exception as error:  # callers that wait for the task must not wait for ever
            self.log.error("the task cannot be watched", error=repr(error))
            self.exit = ExitResult(1, error=f"the task was lost: {error}", at=time.time())
        finally:
            memory.cancel()
        self.ended.set()
        self.holding = asyncio.create_task(hold_until_read(self.state.cgroup))
        self.log.info("the task has ended", code=self.exit.code, signal=self.exit.signal, reason=self.exit.error)

    def watch_health(self, exec_server: ExecServer) -> None:
        """Emit an event when the health of a booted system changes."""

        def tell(sentence: str) -> None:
            self.events.emit(self.state, sentence)

        watch = asyncio.create_task(HealthWatch(exec_server, self.state, self.ended, tell).run())
        self.watcher.add_done_callback(lambda _: watch.cancel())

    async def wait_end(self) -> ExitResult:
        """Wait for the end and until nothing is left running, then work out how it ended. Raises OSError."""
        state = self.state
        await state.shim.wait()
        nspawn = find_nspawn(state)
        if nspawn.is_alive:
            self.log.warn("the shim was killed; the container runs on, its exit code may not be known")
            await nspawn.wait()
        if state.leader and state.leader.is_alive:  # then nspawn was killed
            self.note(is_orphaned=True)
            state.leader.send(signal.SIGKILL)
        await wait_container(state)  # if the shim was killed, nspawn may still be cleaning up
        return find_exit(state.directory, state.mode, state.machine)

    def note(self, **notes: Any) -> None:
        """Write down what is about to be done to the task. What the host cannot write changes at most the words
        of the result."""
        try:
            add_note(self.state.directory, **notes)
        except OSError as error:
            self.log.warn("this machine keeps a note from being written", error=error.strerror, **notes)

    async def watch_memory(self) -> None:
        """Emit an event when the kernel first OOM-kills a process of the task and the task runs on. It comes once:
        the exit result has the total. It never comes if there were kills before this plugin took the task up.

        memory.events wakes its pollers.
        """
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            fd = os.open(f"{self.state.cgroup}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            alarm = stack.enter_context(select.epoll())
            if DESCRIPTORS.is_among_last(alarm.fileno()):  # ending tasks is more important
                return
            alarm.register(fd, select.EPOLLPRI)
            before = self.read_oom_report(fd).kills
            while not before:
                oom = self.read_oom_report(fd)
                if oom.kills and not await self.wait(0.5):
                    self.events.emit(self.state, f"OOM: a process was killed: {oom.reason}.")
                    break
                await wait_readable(alarm.fileno())

    def read_oom_report(self, events: int) -> OomReport:
        """Return what an open memory.events counts. Reading it also resets the poll."""
        limit = read_number(f"{self.state.cgroup}/memory.max")
        return OomReport.of({**parse_counters(os.pread(events, 4096, 0).decode()), "memory.max": limit})

    def find_payload(self) -> ProcessId | None:
        """Return the process that signals are for: the leader, or under the stub the command it started. None
        before it has started and after its end."""
        leader = self.state.leader
        if leader is None or self.state.mode is not Mode.PROCESS_TWO:
            return leader
        if not is_confined(leader.pid, self.state.mode):  # so far, a child may be nspawn's getent
            return None
        # Later children are orphans that the stub inherited. The pid is not always 2: nspawn may have run getent.
        children = [(read_inner_pid(process.pid), process) for process in find_children(leader)]
        return min(children, key=lambda child: child[0])[1] if children else None

    async def send(self, number: int, *, is_stop: bool = False) -> None:
        """Send a signal to the payload. Waits for it up to a second, because the stub forks it just after READY;
        then sends nothing. It is noted only if it may end the payload. With `is_stop`, a handler may do that too:
        many programs clean up and then end by the same signal."""
        for _ in range(100):
            payload = self.find_payload()
            if payload is not None or self.ended.is_set():
                break
            await asyncio.sleep(0.01)
        if payload is None or self.ended.is_set():
            return
        handling = read_handling(payload.pid, number)
        if handling is Handling.DEADLY or (is_stop and handling is Handling.HANDLED):
            self.note(sent=number)
        if payload.send(number):
            self.log.debug("signal sent", signal=render_signal(number), pid=payload.pid)

    async def wait(self, timeout: float | None = None) -> ExitResult | None:
        """Return how the task ended, None if it still runs after `timeout` seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.ended.wait(), timeout)
        return self.exit

    def pause(self, is_paused: bool) -> None:
        """Freeze the payload as a whole, or let it go on: SIGSTOP would stop one process of a booted system."""
        freeze_cgroup(f"{self.state.cgroup}/payload", is_paused)
        what = "The task is paused. SIGCONT lets it go on." if is_paused else "The task goes on."
        self.events.emit(self.state, what)

    def check_running(self) -> None:
        """Raise DriverError if the task is paused: a command in it would not run either."""
        if is_frozen(f"{self.state.cgroup}/payload"):
            raise TransientError("the task is paused; `nomad alloc signal -s SIGCONT` lets it go on")

    async def stop(self, kill_signal: str, timeout: float, exec_server: ExecServer) -> None:
        """End the task: its signal, `timeout` seconds, then SIGKILL; 0 means SIGKILL at once. Returns when it is
        dead; raises HostError if it cannot be killed. `exec_server` starts a command if an init needs one."""
        way = ""
        if timeout > 0 and not self.ended.is_set():
            freeze_cgroup(f"{self.state.cgroup}/payload", is_frozen=False)  # a paused task hears no signal
            way = await self.ask(self.find_stop_signal(kill_signal), timeout, exec_server)
        if self.ended.is_set():
            return
        reason = ""
        if way:
            reason = f"killed: it did not end within its kill_timeout of {timeout:g} s after {way}"
            self.events.emit(self.state, f"The task was {reason}.")
        await self.kill(reason)

    async def ask(self, number: int, timeout: float, exec_server: ExecServer) -> str:
        """Ask the task to end, and wait until it has ended or the time is up. Return how it was asked."""
        if not self.state.unit and (self.state.mode is not Mode.BOOT or number not in (HALT, POWER_OFF)):
            await self.send(number, is_stop=True)
            await self.wait(timeout)
            return render_signal(number)
        ways: list[str] = []
        asking = asyncio.create_task(self.ask_init(number, exec_server, ways))
        try:
            await self.wait(timeout)
        finally:
            await cancel_and_wait([asking])
        return " and ".join(ways) or "nothing: its init was not ready for a request"

    async def ask_init(self, number: int, exec_server: ExecServer, ways: list[str]) -> None:
        """Ask a booted container to shut down, in the way that its init understands. Adds to `ways` what was sent
        to it."""
        leader = self.state.leader
        if leader is None:
            return
        init, unit = await wait_init(leader.pid, self.ended), self.state.unit
        request = plan_unit_request(unit, number) if unit else plan_request(init, number)
        if not request.command:
            ways.append(render_signal(number))
            await self.send(number)
            return
        name = f"`{' '.join(request.command)}` inside"
        ways.append(name)
        while not self.ended.is_set():
            why = await run_inside(exec_server, self.state, self.ended, request.command)
            ways[0] = f"{name} ({why})" if why else name
            if why and request.number and len(ways) == 1:
                ways.append(render_signal(request.number))
                await self.send(request.number)
            if unit and not why:  # a program may take a second signal for more than the first
                break
            await self.wait(AGAIN if why else AGAIN_LATER)

    def find_stop_signal(self, name: str) -> int:
        """Return the signal of this name, or of the image if it is "". For an unknown name, return the default
        signal: a refusal would keep the task running."""
        mode = Mode.COMMAND if self.state.unit else self.state.mode  # a unit gets SIGTERM as a command does
        try:
            return mode.stop_signal(name or self.state.stop_signal)
        except ConfigError as error:
            number = mode.stop_signal("")
            self.events.emit(self.state, f"{error}. {render_signal(number)} is sent instead.")
            return number

    async def wait_killed(self) -> bool:
        """Return whether a killed task ends within END_LIMIT seconds. Raises TransientError if this machine keeps
        the plugin from seeing that."""
        self.troubled.clear()
        waits = [asyncio.create_task(event.wait()) for event in (self.ended, self.troubled)]
        try:
            await asyncio.wait(waits, timeout=END_LIMIT, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(waits)
        if self.trouble and self.troubled.is_set() and not self.ended.is_set():
            raise TransientError(f"the task was killed, but its end cannot be seen: {explain_host(self.trouble)}")
        return self.ended.is_set()

    async def kill(self, reason: str = "") -> None:
        """Kill the payload, let nspawn clean up, then kill what is left. Raises HostError if the task survives,
        TransientError or OSError if the host lacks what this takes."""
        state = self.state
        self.note(sent=signal.SIGKILL, reason=reason)
        if not kill_cgroup(f"{state.cgroup}/payload") and state.leader:
            state.leader.send(signal.SIGKILL)
        if state.leader and await self.wait_killed():
            return
        self.log.warn("killing systemd-nspawn and the shim too: they did not end with the payload")
        self.state = await finish(kill_processes(state))
        if not await self.wait_killed():
            raise HostError(f"the container {state.machine} cannot be killed: a process of it hangs in the kernel")

    async def destroy(self) -> None:
        """Kill the task if it runs, and remove all of it from this machine. Raises HostError if it survives."""
        if not self.ended.is_set():
            await self.kill()
        self.release_logs()
        self.state = await kill_processes(self.state)
        await wait_processes(self.state)
        await remove_leftovers(self.state)

    def release_logs(self) -> None:
        """Let somebody read what is still in the log pipes, but do not wait for it: an agent that has restarted
        destroys an ended task as soon as it has started its log collector."""
        if self.holding:
            self.holding.cancel()
        with contextlib.suppress(OSError):
            pipes = open_pipes(find_holders(self.state.cgroup))
            self.holding = asyncio.create_task(hold_for_a_moment(pipes))

    async def find_address(self, limit: float) -> str:
        """Return the container's address as soon as it has one, "" if it has none within `limit` seconds or ends.

        Polls with growing pauses. Only a netlink socket in the container's network namespace could report it, and
        that would keep the namespace alive, with the host's end of its link.
        """
        deadline, pause = time.monotonic() + limit, 0.02
        while self.state.leader and not self.ended.is_set():
            with contextlib.suppress(OSError):  # the machine cannot tell now
                addresses = read_addresses(self.state.leader.pid)
                if addresses and self.state.leader.is_alive:
                    return addresses[0]
            if time.monotonic() + pause > deadline:
                break
            await self.wait(pause)
            pause *= 1.5
        return ""

    async def emit_address(self, mode: NetworkMode, late: str) -> None:
        """Emit an event with the container's address, or with what may be missing, and a sentence `late`."""
        address = await self.find_address(ADDRESS_PATIENCE)
        if address:
            self.events.emit(self.state, f"The container has the address {address}.{late}")
        elif not self.ended.is_set():
            why = explain_no_address(mode, self.state.mode is Mode.BOOT, have_networkd())
            self.events.emit(self.state, NO_ADDRESS.format(limit=ADDRESS_PATIENCE) + why + late)

    async def find_usage(self) -> Usage:
        """Return what the task uses. In a thread: without numbers in the cgroup, every process must be read."""
        return await run_in_thread(lambda: read_usage(self.state.cgroup))


async def stop_task(state: State, timeout: float) -> str:
    """End a task for a person, and return how it ended. A plugin that has it removes what is left of it. Raises
    HostError if the task survives."""
    task, has_agent = Task(state, Events()), is_held(state.cgroup)
    await task.stop("", timeout, ExecServer())
    exit = await task.wait()
    assert exit
    if not has_agent:
        await task.destroy()
    code = f"exit code {exit.code}"
    return f"{code}, {exit.error}" if exit.error else code


START_LIMIT = 300.0  # seconds: an ephemeral copy of a large image, or a chown of it, takes minutes
SLOW_START = 10.0  # seconds after which an event says what is going on


class TaskStarter:
    """One start of a task, from the plan to the handle."""

    def __init__(self, plan: Plan, events: Events, task: TaskConfig, logs: Sequence[int]) -> None:
        self.plan = plan
        self.logs = logs
        self.locks: list[int] = []  # for the shim
        self.events = events
        self.task = task
        self.is_left = False  # something of a failed start
        self.state = State(
            task_id=plan.task_id,
            machine=plan.machine,
            mode=plan.options.mode,
            cgroup=plan.cgroup,
            boot_id=read_boot_id(),
            shim=NO_PROCESS,
            leader=None,
            started_at=time.time(),
            image="" if plan.find_staged(plan.image.fd) else str(plan.image.path),
            alloc_dir=task.alloc_dir,
            upper_dir=plan.private.upper_dir if plan.private else "",
            link=plan.network.link,
            zone=plan.network.zone,
            ports=tuple((port.host, port.inside) for port in plan.network.ports.values()),
            addresses=plan.network.fixed.pairs if plan.network.fixed else (),
            stop_signal="" if plan.options.unit else plan.image.config.stop_signal,  # that is for the init
            unit=plan.options.unit or "",
            job=task.job,
            group=task.group,
            namespace=task.namespace,
            labels=tuple(plan.options.labels.items()),
        )
        self.directory = self.state.directory

    async def run(self) -> Task:
        """Start the container and return when it is up. If that fails, leave nothing behind."""
        try:
            await self.prepare()
            await self.emit_copying()
            with contextlib.ExitStack() as stack:
                notify = stack.enter_context(listen(self.directory / "notify"))
                go, may_go = os.pipe()
                stack.callback(os.close, go)
                stack.callback(os.close, may_go)
                await finish(self.start_shim(go))  # a cancel does not stop its thread, and the shim must be known
                os.write(may_go, b"go\n")
                if self.needs_hold:
                    await self.furnish_payload()
                leader, users = await self.wait_ready(notify)
                locks = {*self.state.locks, *find_locks(self.state.shim, self.state.image)}
                self.save(leader=leader, users=users, locks=tuple(sorted(locks)))
                chown_logs(self.logs, users)
                if self.plan.options.adds_units:
                    chown_unit_pipes(self.directory, users)
        except BaseException:
            await finish(self.abandon())
            raise
        for name in (BUNDLE_PLACE, "credentials"):  # nspawn has read them: the values need not stay on disk
            remove_tree(self.directory / name)
        return Task(self.state, self.events)

    async def start_shim(self, go: int) -> None:
        stdio = [go, *self.logs]
        shim = await run_in_thread(lambda: start_shim(self.plan, self.directory, stdio, self.locks), is_own=True)
        self.save(shim=shim)

    def save(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        write_file(self.directory / "state.json", self.state.render())
        write_mark(self.state)

    async def prepare(self) -> None:
        STATE_ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.mkdir(mode=0o700)
        self.check_addresses()
        self.save()  # before the first process: if we die from here on, the task id alone leads to the cgroup
        reserve_room(self.directory)
        Store().use(self.directory.name, self.plan.task_id, self.plan.image)
        self.emit_missing_limits(make_cgroup(self.plan.cgroup, self.plan.limits))
        write_mark(self.state)
        self.restrict_devices()
        self.hold_payload()
        if self.plan.journal.path:
            make_journal(self.plan.journal)
            self.save(journal=self.plan.journal.path)
        if self.plan.private and self.plan.private.upper_dir:
            self.locks.append(await make_upper_dir(Path(self.plan.private.upper_dir), self.plan.private.size))
        make_files(self.plan, self.directory)

    def check_addresses(self) -> None:
        """Refuse an address that another task here has. Raises TransientError: that one may be about to end."""
        if found := find_address_owner(self.state):
            address, owner = found
            raise TransientError(
                f"network_address: {address} is the address of the task {quote(owner.task_id)} on this client; "
                "give this one another, or keep the two apart by a constraint"
            )

    async def wait_ready(self, notify: socket.socket) -> tuple[ProcessId, tuple[tuple[int, int], ...]]:
        """Wait until nspawn says READY; return the leader and its ranges of ids, or NO_PROCESS and () if it has
        ended by then. Raises DriverError if nspawn fails or takes too long, or if the leader is refused."""
        ended = asyncio.create_task(self.state.shim.wait())
        slow = asyncio.get_running_loop().call_later(SLOW_START, self.emit_slow_start)
        try:
            claim = await asyncio.wait_for(wait_claim(notify, ended), START_LIMIT)
        except asyncio.TimeoutError:
            raise TransientError(f"the container was not up within {START_LIMIT:g} s") from None
        finally:
            slow.cancel()
            ended.cancel()
        if claim is None:
            record = read_record(self.directory)
            lines = [self.plan.name_sources(line) for line in read_messages(self.directory)]
            raise explain_failure(lines, record.status if record else -1)
        leader = ProcessId.of(claim.leader)
        if leader is None:
            return NO_PROCESS, ()
        users = read_ranges(leader.pid)
        check_leader(leader, replace(self.state, users=users), self.plan.options.has_other_users, claim.sender)
        return leader, users

    def emit_missing_limits(self, controllers: Sequence[str]) -> None:
        """Emit an event about limits that the machine has but this cgroup lacks. The fingerprint reports those
        that the machine lacks. Raises HostError for io_max."""
        if "io" in controllers and self.plan.options.io_max:
            raise HostError(f"io_max: the cgroup {self.plan.cgroup} has no controller io")
        here = [controller for controller in controllers if controller in read_host().controllers]
        if here:
            where = f"{self.plan.cgroup} has no such cgroup controllers"
            self.events.emit(self.task, f"The task runs without its limits of {', '.join(here)}: {where}.")

    def restrict_devices(self) -> None:
        """Keep the payload from devices that are not the task's. nspawn puts the payload into the existing cgroup
        and stays in another one itself, where it can make the container's /dev."""
        payload = f"{self.plan.cgroup}/payload"
        try:
            for place in reversed(find_mirrors(payload)):
                Path(place).mkdir(parents=True, exist_ok=True)
            restrict_devices(payload, self.plan.device_rules)
        except OSError as error:
            if can_restrict_devices():  # else the fingerprint reports it
                self.events.emit(self.task, f"The task runs without a device policy: {error.strerror}.")

    @property
    def needs_hold(self) -> bool:
        """Whether the namespaces that nspawn makes need something before the payload starts."""
        return bool(self.plan.options.sysctl or self.plan.network.fixed)

    def hold_payload(self) -> None:
        """Let the payload's first process stop as soon as nspawn has moved it into its cgroup."""
        if self.needs_hold:
            payload = Path(self.plan.cgroup, "payload")
            payload.mkdir(exist_ok=True)
            freeze_cgroup(str(payload), is_frozen=True)

    async def furnish_payload(self) -> None:
        """Wait for the payload's first process, give its namespaces the job's settings and addresses, and let it
        go on. Does nothing if nspawn ends before. Raises DriverError or OSError."""
        settings, network = self.plan.options.sysctl, self.plan.network
        payload = f"{self.plan.cgroup}/payload"
        ended = asyncio.create_task(self.state.shim.wait())
        try:
            pids = await asyncio.wait_for(wait_members(payload, ended), START_LIMIT)
        except asyncio.TimeoutError:
            raise TransientError(f"the container was not up within {START_LIMIT:g} s") from None
        finally:
            ended.cancel()
        if settings and pids and (users := read_ranges(pids[0])):
            await run_in_thread(lambda: write_sysctls(settings, pids[0], users[0][0]), is_own=True)
        if pids and (fixed := network.fixed):
            await finish(run_in_thread(lambda: set_addresses(payload, fixed, network.link)))
        freeze_cgroup(payload, is_frozen=False)

    async def emit_copying(self) -> None:
        if self.plan.copying:
            size = await run_in_thread(lambda: run(["du", "-sxm", "--", str(self.plan.image.path)], timeout=60))
            self.events.emit(self.task, f"{self.plan.copying} It has {size.split()[0] if size else '?'} MB.")

    def emit_slow_start(self) -> None:
        what = "copying the image" if self.plan.copying else "setting up the container"
        self.events.emit(self.task, f"Still starting after {SLOW_START:g} s: systemd-nspawn is {what}.")

    async def abandon(self) -> None:
        """Kill and remove what a failed start has left. `is_left` tells if the host does not allow it now."""
        self.is_left = True
        try:
            self.state = await kill_processes(self.state)
            await wait_processes(self.state)
            await remove_leftovers(self.state)
            self.is_left = False
        except (OSError, DriverError) as error:  # the caller gets the error of the start itself
            log.warn(
                "a failed start is not removed yet", task=self.state.task_id, error=str(as_driver_error(error))
            )
        finally:
            close_all(self.locks)


class Tasks:
    """The tasks that this plugin process has started or recovered."""

    def __init__(self, events: Events, exec_server: ExecServer) -> None:
        self.events = events
        self.exec_server = exec_server
        self.machined = Machined()
        self.known: dict[str, Task] = {}
        self.lost: dict[str, State] = {}  # tasks of an earlier boot, until they are destroyed
        self.reaped: dict[str, asyncio.Task[None]] = {}  # strays that are being ended
        self.alloc_dirs: set[str] = set()  # where the agent has allocations, as far as it has said so
        self.doomed: set[str] = set()  # tasks whose removal this machine has not let finish yet
        self.finishing: asyncio.Task[None] | None = None

    def get(self, task_id: str) -> Task:
        task = self.known.get(task_id)
        if task is None:
            raise TaskNotFound(task_id)
        return task

    async def start(self, plan: Plan, config: TaskConfig, directories: Mapping[str, Source]) -> Task:
        # The logs first: Nomad's reader stops when the last writer closes, and `clear` may end a writer.
        with open_logs(plan, directories) as logs:
            await self.clear(plan)
            start = TaskStarter(plan, self.events, config, logs)
            try:
                task = await start.run()
            except BaseException:
                if start.is_left:
                    self.known[plan.task_id] = Task(start.state, self.events)
                    self.doomed.add(plan.task_id)
                raise
        self.adopt(task)
        return task

    def adopt(self, task: Task) -> None:
        self.known[task.state.task_id] = task
        self.alloc_dirs |= find_alloc_dirs([task.state])
        task.hold()
        self.machined.register(task.state)
        task.watcher.add_done_callback(lambda _: self.machined.unregister(task.state))
        if task.state.mode is Mode.BOOT:
            task.watch_health(self.exec_server)

    def hold(self) -> None:
        """Show other plugins that this one has its tasks, now that it has an agent."""
        for task in self.known.values():
            task.hold()

    def release(self) -> None:
        for task in self.known.values():
            task.release()

    def restore_directories(self) -> None:
        for task in self.known.values():
            if not task.ended.is_set():
                restore_directory(task.state)

    def reregister_tasks(self) -> None:
        self.machined.reregister([task.state for task in self.known.values() if not task.ended.is_set()])

    async def clear(self, plan: Plan) -> None:
        """Kill and remove an earlier start of the same task: after a crash Nomad repeats StartTask with the same
        id, and it never runs a task twice at once. Raises ConfigError if another task has the machine name."""
        marked = read_mark(plan.cgroup)
        for state in (*read_states(split_id(plan.task_id)[0]), *([marked] if marked else []), *self.lost.values()):
            if state.task_id == plan.task_id or state.machine == plan.machine:
                if split_id(state.task_id) != split_id(plan.task_id):
                    rule = f"gives the machine name {plan.machine}, which is that of the task {state.task_id}"
                    raise ConfigError("task", split_id(plan.task_id)[1], rule, "give the task another name")
                log.warn("removing a left-over of an earlier start", task=state.task_id)
                await self.destroy(state.task_id)
        await self.destroy(plan.task_id)

    async def recover(self, task_id: str, driver_state: bytes) -> None:
        """Take up a running or ended task again, without waiting. Raises TaskNotFound if it is gone, DriverError
        if its state is damaged or names processes that are not the task's."""
        if task_id in self.known:
            return
        if task_id in self.reaped:
            raise TaskNotFound(task_id, "is being ended: no agent had taken it up")
        try:
            state = State.parse(driver_state)
        except ValueError as error:
            raise DriverError(str(error)) from None
        if state.task_id == task_id and state.boot_id != read_boot_id():
            self.lost[task_id] = state
            raise TaskNotFound(task_id, "has ended: this machine was restarted since it was started")
        mark = read_mark(state.cgroup)
        is_other = state.task_id != task_id or bool(mark and mark.task_id != task_id)
        if is_other or not (mark or state.directory.is_dir()):
            raise TaskNotFound(task_id)
        self.alloc_dirs |= find_alloc_dirs([state])
        is_running = state.shim.is_alive or bool(state.leader and state.leader.is_alive)
        if not (is_running or state.directory.is_dir()):
            raise TaskNotFound(task_id)
        check_shim(state)
        if state.leader:
            check_leader(state.leader, state, has_other_users=False)  # the state has the ranges of ids
        if is_running:
            restore_directory(state)
        self.adopt(Task(state, self.events))

    async def reap(self, state: State) -> None:
        """End and remove a task that no agent has. The caller's end does not stop that."""

        async def end() -> None:
            try:
                await Task(state, self.events).destroy()
            except (DriverError, OSError) as error:
                log.warn("a task that is nobody's cannot be ended", task=state.task_id, error=str(error))
            del self.reaped[state.task_id]

        self.reaped[state.task_id] = asyncio.create_task(end())
        await asyncio.shield(self.reaped[state.task_id])

    async def destroy(self, task_id: str) -> None:
        """Kill and remove a task: the id is enough, and may be unknown. Raises DriverError or OSError if something
        of it is left; each fingerprint tries it again."""
        if task_id in self.reaped:
            await asyncio.wait([self.reaped[task_id]])
        task, lost = self.known.get(task_id), self.lost.get(task_id)
        try:
            if task is None:
                directory = state_directory(task_id)
                state = read_state(directory) or await run_in_thread(lambda: find_marked(task_id))
                if state or os.path.lexists(directory):
                    task = Task(state or state_from_id(task_id), self.events)
                elif lost:
                    await remove_leftovers(lost)  # from the disks; the reboot removed the rest
            if task:
                await task.destroy()
        except (OSError, DriverError) as error:
            if task_id not in self.doomed:
                log.warn("a task is not removed yet", task=task_id, error=str(as_driver_error(error)))
            if task:
                self.known[task_id] = task
            self.doomed.add(task_id)
            raise
        if task:
            task.release()
        self.known.pop(task_id, None)
        self.lost.pop(task_id, None)
        self.doomed.discard(task_id)

    def finish_removals(self) -> None:
        """Try again, in the background, to remove what could not be removed."""
        if self.doomed and (self.finishing is None or self.finishing.done()):
            self.finishing = asyncio.create_task(self.remove_doomed())

    async def remove_doomed(self) -> None:
        for task_id in [*self.doomed]:
            with contextlib.suppress(OSError, DriverError):  # was said
                await self.destroy(task_id)
                log.info("a task is removed now", task=task_id)


# =====================================================================================================
# Services
#
# What Nomad's agent calls, in thin methods, in the order of a task's life. Before them comes the conversion of the
# protocol's messages and errors. One thread: every method is a coroutine, cancelled when its client goes away.
# =====================================================================================================

# Never UNAVAILABLE or CANCELLED: Nomad takes them for the plugin's death and waits 3 s.
STATUS_CODES: tuple[tuple[type[DriverError], str], ...] = (
    (ConfigError, "INVALID_ARGUMENT"),
    (TaskNotFound, "NOT_FOUND"),
    (Unsupported, "UNIMPLEMENTED"),
    (HostError, "FAILED_PRECONDITION"),
    (TransientError, "FAILED_PRECONDITION"),
    (DriverError, "FAILED_PRECONDITION"),
)


async def abort(context: Any, error: DriverError) -> None:
    """End a call with an error, as Nomad's client reads it: the text is in the status. Whether to try again is in
    the trailing metadata, in the first detail of a google.rpc.Status."""
    code = next(getattr(grpc.StatusCode, name) for kind, name in STATUS_CODES if isinstance(error, kind))
    text = shorten(str(error), 1500)  # it goes into the metadata twice, and some clients refuse more than 8 KiB
    status = rpc_status_pb2.Status(code=code.value[0], message=text)
    detail = status.details.add()
    detail.type_url = "type.googleapis.com/hashicorp.nomad.plugins.shared.structs.RecoverableError"
    detail.value = recoverable_error_pb2.RecoverableError(recoverable=error.recoverable).SerializeToString()
    metadata = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, text, trailing_metadata=metadata)


def as_driver_error(error: Exception) -> DriverError:
    """Return a DriverError as it is, and a sentence about the machine for an OSError. Any other error is a bug:
    log the trace and return a short DriverError."""
    if isinstance(error, DriverError):
        return error
    if isinstance(error, MemoryError):
        error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if isinstance(error, OSError):
        failure = explain_host(error)
        if not failure.recoverable:  # a sentence for people alone would not tell where it comes from
            log.error("this machine does not let the plugin do its work", trace=traceback.format_exc())
        return failure
    log.error("internal error", trace=traceback.format_exc())
    return DriverError(f"internal error of the driver, see the agent's log: {error}")


def unary(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any, Any], Awaitable[Any]]:
    """Turn a coroutine function, which takes the request alone, into a gRPC handler."""

    @functools.wraps(method)
    async def handler(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request)
        except Exception as error:
            failure = as_driver_error(error)
        await abort(context, failure)

    return handler


def streaming(
    method: Callable[[Any, Any], AsyncIterator[Any]],
) -> Callable[[Any, Any, Any], AsyncIterator[Any]]:
    """Turn an asynchronous generator, which takes the request alone, into a gRPC handler."""

    @functools.wraps(method)
    async def handler(self: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in method(self, request):
                yield response
            return
        except Exception as error:
            failure = as_driver_error(error)
        await abort(context, failure)

    return handler


def unpack_options(packed: bytes) -> Mapping[str, object]:
    """Decode a msgpack map of options; {} if there are no bytes. Raises DriverError."""
    if not packed:
        return {}
    try:
        # Bytes that are no UTF-8 become surrogates: the option's decoder refuses them, and can name the option.
        raw = msgpack.unpackb(packed, raw=False, strict_map_key=False, unicode_errors="surrogateescape")
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):  # TypeError: a list as a key
        raise DriverError("the configuration cannot be read: it is no msgpack") from None
    if not isinstance(raw, dict):
        raise DriverError("the configuration is no map")
    return raw


def check_task(task: driver_pb2.TaskConfig) -> None:
    """Refuse what Nomad never sends: the rest of the driver need not expect it. Raises DriverError."""
    linux, network = task.resources.linux_resources, task.network_isolation_spec
    texts = [task.id, task.name, task.alloc_id, task.alloc_dir, task.user, task.stdout_path, task.stderr_path]
    texts += [linux.cpuset_cgroup, linux.cpuset_cpus, network.path]
    texts += [text for mount in task.mounts for text in (mount.host_path, mount.task_path)]
    texts += [text for device in task.devices for text in (device.host_path, device.task_path)]
    for text in texts:
        if "\0" in text:
            raise DriverError(f"the task cannot be started: {quote(text)} holds a NUL character")
    if {".", ".."} & {*task.name.split("/")}:
        raise DriverError(f"the task cannot be started: {quote(task.name)} is no name for it; give it another")
    if not task.alloc_dir:
        raise DriverError("the task cannot be started: it has no directory (alloc_dir)")
    if not math.isfinite(linux.PercentTicks):
        raise DriverError(f"the task cannot be started: its share of the CPU is no number ({linux.PercentTicks})")


def parse_task_config(task: driver_pb2.TaskConfig) -> TaskConfig:
    """Raises DriverError."""
    check_task(task)
    return TaskConfig(
        id=task.id,
        name=task.name,
        alloc_id=task.alloc_id,
        alloc_dir=task.alloc_dir,
        job=task.job_id or task.job_name,
        group=task.task_group_name,
        namespace=task.namespace,
        options=unpack_options(task.msgpack_driver_config),
        user=task.user,
        env=dict(task.env),
        stdout_path=task.stdout_path,
        stderr_path=task.stderr_path,
        cgroup=task.resources.linux_resources.cpuset_cgroup,
        resources=parse_resources(task.resources),
        network=parse_group_network(task),
        mounts=tuple(
            Mount(
                mount.host_path,
                mount.task_path,
                mount.readonly,
                propagation=mount.propagation_mode or "private",
                selinux_label=mount.selinux_label,
            )
            for mount in task.mounts
        ),
        devices=tuple(
            Device(device.host_path, device.task_path, re.sub("[^rwm]", "", device.cgroup_permissions) or "rwm")
            for device in task.devices
        ),
    )


def parse_resources(resources: driver_pb2.Resources) -> Resources:
    """Agents before 1.1 send no memory_max. -1 means no limit; some agents add the size of the secrets to it."""
    linux, memory = resources.linux_resources, resources.allocated_resources.memory
    most = None if memory.memory_max_mb < 0 else memory.memory_max_mb * MIB
    return Resources(
        memory=memory.memory_mb * MIB or linux.memory_limit_bytes,
        memory_max=most,
        cpu=linux.cpu_shares,
        cpu_fraction=linux.PercentTicks,
        cores=linux.cpuset_cpus,
    )


def parse_group_network(task: driver_pb2.TaskConfig) -> GroupNetwork:
    ports = {
        port.label: Port(port.value, host_ip=network.ip, is_of_task=True)
        for network in task.resources.allocated_resources.networks
        for port in [*network.reserved_ports, *network.dynamic_ports]
    }
    ports |= {port.label: Port(port.value, port.to, port.host_ip) for port in task.resources.ports}
    spec = task.network_isolation_spec
    is_group = spec.mode == driver_pb2.NetworkIsolationSpec.GROUP
    dns = Dns(tuple(task.dns.servers), tuple(task.dns.searches), tuple(task.dns.options))
    return GroupNetwork(spec.path if is_group else "", ports, dns)


class BaseService:
    """hashicorp.nomad.plugins.base.proto.BasePlugin"""

    def __init__(self, driver: DriverService) -> None:
        self.driver = driver

    @unary
    async def PluginInfo(self, request: Any) -> base_pb2.PluginInfoResponse:
        return base_pb2.PluginInfoResponse(
            type=base_pb2.DRIVER,
            plugin_api_versions=["v0.1.0"],
            plugin_version=__version__,
            name=PLUGIN_NAME,
        )

    @unary
    async def ConfigSchema(self, request: Any) -> base_pb2.ConfigSchemaResponse:
        return base_pb2.ConfigSchemaResponse(spec=render_spec(PLUGIN_OPTIONS))

    @unary
    async def SetConfig(self, request: base_pb2.SetConfigRequest) -> base_pb2.SetConfigResponse:
        """Takes the plugin block. It changes nothing on the machine: the agent also calls it in short-lived
        processes, while another process looks after running tasks."""
        config = PluginOptions(**decode_options(PLUGIN_OPTIONS, unpack_options(request.msgpack_config)))
        check_plugin(config)
        self.driver.config = config
        if request.HasField("nomad_config") and request.nomad_config.driver.HasField("Topology"):
            self.driver.core_mhz = parse_core_mhz(request.nomad_config.driver.Topology)
        return base_pb2.SetConfigResponse()


def parse_core_mhz(topology: base_pb2.ClientTopology) -> float:
    """Return the mean speed of a core in MHz, 0 if the topology does not say."""
    if not topology.cores:
        return 0.0
    total = topology.override_total_compute or sum(
        core.base_speed or core.max_speed or core.guess_speed for core in topology.cores
    )
    return total / len(topology.cores)


START_DESCRIPTORS = 32  # that a start has open at a time; afterwards a task has three
REAP_AFTER = 900.0  # seconds
FIRST_SAMPLE = 0.2  # seconds for the first measurement of CPU use


@dataclass
class PendingStart:
    """A StartTask under way."""

    work: asyncio.Task[tuple[Task, NetworkPlan]]
    is_stopped: bool = False  # by another call


class DriverService:
    """hashicorp.nomad.plugins.drivers.proto.Driver"""

    def __init__(self) -> None:
        self.config = PluginOptions(**decode_options(PLUGIN_OPTIONS, {}))
        self.core_mhz = 0.0
        self.agents = 0  # connected ones, counted by their Fingerprint streams
        self.events = Events()
        self.exec_server = ExecServer()
        self.tasks = Tasks(self.events, self.exec_server)
        self.starts: dict[str, PendingStart] = {}  # by the tasks' ids
        self.fetches = Fetches(Store())
        self.reaper = Reaper(self.find_reaping, self.find_agent_tasks, self.tasks.reap)

    @unary
    async def TaskConfigSchema(self, request: Any) -> driver_pb2.TaskConfigSchemaResponse:
        return driver_pb2.TaskConfigSchemaResponse(spec=render_spec(TASK_OPTIONS))

    @unary
    async def Capabilities(self, request: Any) -> driver_pb2.CapabilitiesResponse:
        capabilities = driver_pb2.DriverCapabilities(
            send_signals=True,
            exec=True,
            fs_isolation=driver_pb2.DriverCapabilities.IMAGE,
            network_isolation_modes=[driver_pb2.NetworkIsolationSpec.HOST, driver_pb2.NetworkIsolationSpec.GROUP],
            mount_configs=driver_pb2.DriverCapabilities.ANY_MOUNTS
            if self.config.volumes
            else driver_pb2.DriverCapabilities.NO_MOUNTS,
            disable_log_collection=self.config.disable_log_collection,
        )
        return driver_pb2.CapabilitiesResponse(capabilities=capabilities)

    @unary
    async def Init(self, request: Any) -> driver_pb2.InitResponse:
        """Called by Nomad 2.0.4 and later before the streams, also after it has reattached to a running plugin."""
        return driver_pb2.InitResponse()

    @streaming
    async def Fingerprint(self, request: Any) -> AsyncIterator[driver_pb2.FingerprintResponse]:
        """Never ends: the agent would reopen it at once, without any delay."""
        last = None
        self.agents += 1
        self.tasks.hold()
        reaping = asyncio.create_task(self.reaper.run())
        preloading = asyncio.create_task(self.fetches.preload(self.config))
        try:
            while True:
                current = self.look_at_host(last)
                self.tasks.reregister_tasks()
                self.tasks.finish_removals()
                if current != last:
                    yield current
                    last = current
                await asyncio.sleep(FINGERPRINT_PERIOD)
                self.collect_images()
        finally:
            self.agents -= 1
            reaping.cancel()
            preloading.cancel()
            if not self.agents:
                self.tasks.release()

    def find_reaping(self) -> Reaping:
        after = self.config.reap_after
        return Reaping(REAP_AFTER if after is None else after, self.config.reap_dry_run)

    def find_agent_tasks(self) -> AgentTasks:
        known = self.tasks.known
        return AgentTasks(
            tasks=frozenset({*known, *self.starts, *self.tasks.reaped}),
            cgroups=frozenset(task.state.cgroup for task in known.values()),
            alloc_dirs=frozenset(self.tasks.alloc_dirs),
        )

    def look_at_host(self, last: driver_pb2.FingerprintResponse | None) -> driver_pb2.FingerprintResponse:
        """Return the fingerprint. If the machine lacks what looking takes, it is the last one, but unhealthy."""
        try:
            self.tasks.restore_directories()
            return self.render_fingerprint(replace(read_host(), open_directories=self.find_open_directories()))
        except (OSError, MemoryError) as error:
            response = driver_pb2.FingerprintResponse()
            response.CopyFrom(last or response)
            response.health = driver_pb2.FingerprintResponse.UNHEALTHY
            response.health_description = str(as_driver_error(error))
            return response

    def find_open_directories(self) -> tuple[str, ...]:
        """Return which of `image_dir` and the client's alloc_dir other users of this machine can reach: tasks may
        write to both. The alloc_dir is known once there has been a task."""
        return tuple(filter(is_open_to_others, sorted({self.config.image_dir, *self.tasks.alloc_dirs})))

    def render_fingerprint(self, host: Host) -> driver_pb2.FingerprintResponse:
        response = driver_pb2.FingerprintResponse()
        if not self.config.enabled:
            response.health_description = "disabled: enabled = false in the plugin's block"
            return response
        healthy = driver_pb2.FingerprintResponse.HEALTHY
        response.health = healthy if host.is_healthy else driver_pb2.FingerprintResponse.UNHEALTHY
        response.health_description = host.health_description
        for name, value in self.find_attributes(host).items():
            kind = {bool: "bool_val", int: "int_val", str: "string_val"}[type(value)]
            setattr(response.attributes[f"driver.{PLUGIN_NAME}{name}"], kind, value)
        return response

    def find_attributes(self, host: Host) -> dict[str, bool | int | str]:
        """Return the attributes for job constraints, by what follows `driver.nspawn` in their names."""
        image_dir = os.path.realpath(self.config.image_dir)
        return {
            "": True,
            ".version": str(host.systemd),  # as the Go driver has it, whose jobs have constraints on it
            ".driver_version": __version__,
            ".cgroups": host.cgroups.value if host.cgroups else "v1",
            ".limits": ",".join(host.limits),
            ".user_namespaces": read_number("/proc/sys/user/max_user_namespaces") > 0,
            ".idmap": can_share_images(image_dir, host.kernel),
            ".machined": have_machined(),
            ".networkd": have_networkd(),
            ".volumes": self.config.volumes,
            ".device_policy": host.has_device_policy,
            ".allow": ",".join(self.config.allow),
        }

    @unary
    async def RecoverTask(self, request: driver_pb2.RecoverTaskRequest) -> driver_pb2.RecoverTaskResponse:
        """Answers at once: a starting agent calls it for one task after the other, even for tasks long gone."""
        task_id = request.task_id or request.handle.config.id  # the agent leaves task_id empty
        await self.tasks.recover(task_id, request.handle.driver_state)
        return driver_pb2.RecoverTaskResponse()

    @unary
    async def StartTask(self, request: driver_pb2.StartTaskRequest) -> driver_pb2.StartTaskResponse:
        if not self.config.enabled:
            raise HostError("the driver is switched off on this client: its plugin block has enabled = false")
        config = parse_task_config(request.task)
        if config.id in self.tasks.known and not self.tasks.known[config.id].ended.is_set():
            raise DriverError(f"task {quote(config.id)} is running already")
        host = read_host()
        if not host.is_healthy:
            raise HostError(host.health_description)
        if config.mounts and not self.config.volumes:
            rule = "volumes are switched off on this client"
            raise ConfigError(
                "volume_mount", config.mounts[0].target, rule, "set volumes = true in the plugin block"
            )
        task, network = await self.run_start(config, host)
        override = await self.find_override(task, network)
        handle = driver_pb2.TaskHandle(
            version=STATE_VERSION,
            config=request.task,
            state=driver_pb2.RUNNING,
            driver_state=task.state.render().encode(),
        )
        return driver_pb2.StartTaskResponse(
            result=driver_pb2.StartTaskResponse.SUCCESS, handle=handle, network_override=override
        )

    async def find_override(self, task: Task, network: NetworkPlan) -> driver_pb2.NetworkOverride | None:
        """Return what `address_mode = "driver"` registers services under, None without an address. Waits for one
        up to `address_timeout`. On an outside network without mapped ports, "auto" uses it too."""
        if not network.mode.has_address:
            return None
        fixed = network.fixed.address if network.fixed else ""
        address = fixed or await task.find_address(network.address_timeout)
        late = "" if address else LATE_ADDRESS.format(limit=network.address_timeout)
        task.announcing = asyncio.create_task(task.emit_address(network.mode, late))
        if not address:
            return None
        return driver_pb2.NetworkOverride(
            addr=address,
            port_map={label: port.inside for label, port in network.ports.items()},
            auto_advertise=network.mode.is_outside and not network.ports,
        )

    async def run_start(self, config: TaskConfig, host: Host) -> tuple[Task, NetworkPlan]:
        """Start a task. It is cancelled with the call, and by another call that stops, destroys or starts the same
        task: then this raises DriverError."""
        while others := [other for other in self.starts if split_id(other) == split_id(config.id)]:
            await self.stop_start(others[0])  # else it would clear up what the new start makes
        start = self.starts[config.id] = PendingStart(asyncio.create_task(self.start_task(config, host)))
        try:
            return await start.work
        except asyncio.CancelledError:
            if not start.is_stopped:  # the call itself was cancelled
                raise
            raise DriverError(f"task {quote(config.id)} was stopped while it was being started") from None
        finally:
            if self.starts.get(config.id) is start:
                del self.starts[config.id]

    async def stop_start(self, task_id: str) -> None:
        """Cancel a start under way, and wait until its container is gone. Its fetch ends soon after, unless
        another task waits for the image."""
        start = self.starts.get(task_id)
        if start:
            start.is_stopped = True
            start.work.cancel()
            await asyncio.wait([start.work])
            if self.starts.get(task_id) is start:
                del self.starts[task_id]

    async def start_task(self, config: TaskConfig, host: Host) -> tuple[Task, NetworkPlan]:
        DESCRIPTORS.check(START_DESCRIPTORS, "the task cannot be started")
        is_in_group = bool(config.network.namespace)
        options = decode_job(TASK_OPTIONS, config.options, self.config, is_in_group=is_in_group)
        check_permissions(TASK_OPTIONS, options, self.config, is_in_group=is_in_group)
        config, options, edits = apply_devices(config, options)
        options, class_rules = expand_classes(options)
        check_rules(TASK_OPTIONS, options, host, has_image=False)  # before an image is fetched for nothing
        check_targets(config, options)
        check_own_settings(options, is_in_group=is_in_group)
        if is_in_group:
            check_namespace(config.network.namespace)
        check_interfaces(options)
        check_ip(options)
        with contextlib.ExitStack() as stack:
            directories = stack.enter_context(open_directories(config.alloc_dir, config.directory_names))
            own = {name: directories[path] for name, path in config.own_directories.items()}
            image = await self.find_image(config, options, own, stack)
            options = apply_image(options, image, config.user)
            account = await run_in_thread(lambda: find_account(image, options, config.mounts))
            account = add_groups(account, options, edits.groups)
            sources = stack.enter_context(open_sources(TASK_OPTIONS, options, own, self.config))
            volumes = stack.enter_context(open_volumes(config.mounts))
            devices = stack.enter_context(open_devices([*options.devices, *config.devices]))
            found = HostInputs(
                image=image,
                mounts=read_mounts(),
                sources=sources,
                credentials=read_credentials(options, sources),
                devices=devices,
                device_rules=(*class_rules, *find_device_rules(config, options, sources, volumes, devices)),
                directories={**directories, **volumes},
                names=await run_in_thread(lambda: read_names(config.network, image, options), is_own=True),
                ephemeral_dir=self.config.ephemeral_dir or "",
                root_size=self.config.root_size,
                io_limits=find_io_limits(options.io_max, config.task_dir if config.alloc_dir else ""),
                account=account,
                hooks=edits.hooks,
                journal_obstacle=find_journal_obstacle(config),
            )
            plan = plan_task(TASK_OPTIONS, config, options, host, found)
            for note in (f"Starting the container {plan.machine} from {image.label or image.path}.", *plan.notes):
                self.events.emit(config, note)
            with DESCRIPTORS.reserve(START_DESCRIPTORS, "the task cannot be started"):
                return await self.tasks.start(plan, config, directories), plan.network

    async def find_image(
        self, config: TaskConfig, options: JobOptions, own: Mapping[str, Source], stack: contextlib.ExitStack
    ) -> Image:
        """Return the task's image; fetch it if needed. An image of the host stays open until the end of `stack`. A
        stored one is kept from collection: by a lock until the start ends, then by the task's use of it."""
        task_dir = Path(config.task_dir) if config.alloc_dir else None
        image_dir = choose_image_dir(options.image, self.config.image_dir)
        origin = plan_origin(options, image_dir)
        if origin is None:
            try:
                found = find_image(options, task_dir, image_dir)
            except ConfigError:
                check_image_name(options.image, own, self.config)
                raise
            image = stack.enter_context(open_image(found, options.image, own, self.config))
            origin = find_archive(image)
            if origin is None:
                check_image_write(image, options, self.config)
                check_verity(image, options)
                return image
        if origin.type == "raw":
            check_permission("image_download.type", "raw", Permission.DISK_IMAGES, self.config)
        settings = plan_fetching(self.config)
        stored, kept = await self.fetches.provide(origin, settings, functools.partial(self.events.emit, config))
        start = asyncio.current_task()
        assert start
        start.add_done_callback(lambda _: os.close(kept))
        image = self.fetches.store.find(stored)
        if not image.layers and stored.type != "docker":
            check_tree(image.path, options)
        return image

    @unary
    async def WaitTask(self, request: driver_pb2.WaitTaskRequest) -> driver_pb2.WaitTaskResponse:
        exit = await self.tasks.get(request.task_id).wait()
        assert exit is not None
        return driver_pb2.WaitTaskResponse(result=render_result(exit), err=render_line(exit.error))

    @unary
    async def StopTask(self, request: driver_pb2.StopTaskRequest) -> driver_pb2.StopTaskResponse:
        """An unknown task counts as stopped: on an error, the agent would repeat the call for minutes."""
        await self.stop_start(request.task_id)
        task = self.tasks.known.get(request.task_id)
        if task:
            await task.stop(request.signal, request.timeout.ToNanoseconds() / 1e9, self.exec_server)
        return driver_pb2.StopTaskResponse()

    @unary
    async def DestroyTask(self, request: driver_pb2.DestroyTaskRequest) -> driver_pb2.DestroyTaskResponse:
        await self.stop_start(request.task_id)
        task = self.tasks.known.get(request.task_id)
        if task and not task.ended.is_set() and not request.force:
            raise DriverError(
                f"task {quote(request.task_id)} is still running; stop it first, or destroy it with force"
            )
        await self.tasks.destroy(request.task_id)
        if task:
            await self.tasks.machined.flush(task.state.machine)
        self.collect_images()
        return driver_pb2.DestroyTaskResponse()

    def collect_images(self) -> None:
        self.fetches.collect(plan_retention(self.config))

    @unary
    async def InspectTask(self, request: driver_pb2.InspectTaskRequest) -> driver_pb2.InspectTaskResponse:
        """Both times and the result are always set: Nomad's client panics without them."""
        task = self.tasks.get(request.task_id)
        exit = task.exit or ExitResult(0)
        status = driver_pb2.TaskStatus(
            id=task.state.task_id,
            name=task.state.machine,
            state=driver_pb2.EXITED if task.exit else driver_pb2.RUNNING,
            result=render_result(exit),
        )
        status.started_at.FromNanoseconds(int(task.state.started_at * 1e9))
        status.completed_at.FromNanoseconds(int(exit.at * 1e9))
        driver = driver_pb2.TaskDriverStatus(attributes={"machine": task.state.machine})
        return driver_pb2.InspectTaskResponse(task=status, driver=driver)

    @streaming
    async def TaskStats(self, request: driver_pb2.TaskStatsRequest) -> AsyncIterator[driver_pb2.TaskStatsResponse]:
        task = self.tasks.get(request.task_id)
        interval = max(request.collection_interval.ToNanoseconds() / 1e9, 0.1)
        before = await task.find_usage()
        pause = min(interval, FIRST_SAMPLE)  # Nomad's own drivers send the first one at once
        while not await task.wait(pause):
            now = await task.find_usage()
            yield self.render_stats(task, before, now)
            before, pause = now, interval

    def render_stats(self, task: Task, before: Usage, now: Usage) -> driver_pb2.TaskStatsResponse:
        """Return a sample. TOTAL_TICKS is not among the measured fields: the CLI would print a column title for
        it, but no value."""
        elapsed = max(now.at - before.at, 1e-3)
        user = max(now.user - before.user, 0.0) / elapsed * 100
        system = max(now.system - before.system, 0.0) / elapsed * 100
        response = driver_pb2.TaskStatsResponse()
        stats = response.stats
        stats.id = task.state.task_id
        stats.timestamp.GetCurrentTime()
        cpu = stats.agg_resource_usage.cpu
        cpu.user_mode, cpu.system_mode, cpu.percent = user, system, user + system
        cpu.total_ticks = (user + system) / 100 * (self.core_mhz or read_cpu_mhz())
        cpu.throttled_periods, cpu.throttled_time = now.throttled_periods, now.throttled_time
        fields = driver_pb2.CPUUsage
        cpu.measured_fields.extend([fields.SYSTEM_MODE, fields.USER_MODE, fields.PERCENT])
        memory = stats.agg_resource_usage.memory
        memory.rss, memory.usage = now.rss, now.usage
        memory.measured_fields.extend([driver_pb2.MemoryUsage.RSS, driver_pb2.MemoryUsage.USAGE])
        if now.is_cgroup:
            cpu.measured_fields.extend([fields.THROTTLED_PERIODS, fields.THROTTLED_TIME])
            memory.cache, memory.swap, memory.max_usage = now.cache, now.swap, now.peak
            memory.measured_fields.extend(
                [driver_pb2.MemoryUsage.CACHE, driver_pb2.MemoryUsage.SWAP, driver_pb2.MemoryUsage.MAX_USAGE]
            )
        return response

    @streaming
    async def TaskEvents(self, request: Any) -> AsyncIterator[driver_pb2.DriverTaskEvent]:
        """Never ends, as Fingerprint."""
        with self.events.subscribe() as queue:
            while True:
                event = await queue.get()
                alloc_id, task_name = split_id(event.task_id)
                response = driver_pb2.DriverTaskEvent(
                    task_id=event.task_id, alloc_id=alloc_id, task_name=task_name, message=event.message
                )
                response.timestamp.FromNanoseconds(int(event.at * 1e9))
                yield response

    @unary
    async def SignalTask(self, request: driver_pb2.SignalTaskRequest) -> driver_pb2.SignalTaskResponse:
        number = parse_signal(request.signal)
        task = self.tasks.get(request.task_id)
        if task.ended.is_set():
            raise DriverError(f"task {quote(request.task_id)} has ended, there is nothing to signal")
        if number in (signal.SIGSTOP, signal.SIGCONT):
            task.pause(number == signal.SIGSTOP)
        elif unit := task.state.unit:
            task.check_running()
            if why := await run_inside(self.exec_server, task.state, task.ended, plan_signal(unit, number)):
                raise DriverError(f"the signal did not reach the main process of {unit}: {why}")
        else:
            await task.send(number)
        return driver_pb2.SignalTaskResponse()

    @unary
    async def ExecTask(self, request: driver_pb2.ExecTaskRequest) -> driver_pb2.ExecTaskResponse:
        """For script checks. They read stdout only, so stderr goes there too; only the end of it is kept."""
        task = self.tasks.get(request.task_id)
        task.check_running()
        run = Exec(self.exec_server, task.state, task.ended, request.command, merge=True)
        timeout = request.timeout.ToNanoseconds() / 1e9
        output, status = bytearray(), -int(signal.SIGKILL)

        async def collect() -> int:
            await run.start()
            await run.end_stdin()
            async for data in run.read("stdout"):
                output.extend(data)
                del output[:-MAX_CHECK_OUTPUT]
            return await run.wait()

        try:
            status = await asyncio.wait_for(collect(), timeout if timeout > 0 else None)
        except asyncio.TimeoutError:
            await run.kill()
            run.error = f"killed: it did not end within its timeout of {timeout:g} s"
        finally:
            run.close()
        if run.error:
            output.extend(f"{run.error}\n".encode())
        return driver_pb2.ExecTaskResponse(stdout=bytes(output[-MAX_CHECK_OUTPUT:]), result=render_code(status))

    async def ExecTaskStreaming(self, requests: AsyncIterator[Any], context: Any) -> None:
        try:
            first = await anext(aiter(requests), None)
            if first is None or not first.HasField("setup"):
                raise DriverError("the first message of an exec must be its setup")
            setup, task = first.setup, self.tasks.get(first.setup.task_id)
            task.check_running()
            run = Exec(self.exec_server, task.state, task.ended, setup.command, tty=setup.tty)
            await stream_exec(run, requests, context)
            return
        except Exception as error:
            failure = as_driver_error(error)
        # A client that finds "closed" in an error takes the error for its own end and shows nothing.
        kind = TransientError if failure.recoverable else DriverError
        await abort(context, kind(re.sub("(?i)closed", "clos-ed", str(failure))))

    @unary
    async def CreateNetwork(self, request: Any) -> driver_pb2.CreateNetworkResponse:
        raise Unsupported("the nspawn driver makes no networks for groups: Nomad does")

    @unary
    async def DestroyNetwork(self, request: Any) -> driver_pb2.DestroyNetworkResponse:
        raise Unsupported("the nspawn driver makes no networks for groups: Nomad does")

    @unary
    async def Shutdown(self, request: Any) -> driver_pb2.ShutdownResponse:
        """Called by Nomad 2.0.4 and later before the controller's Shutdown; tasks run on."""
        return driver_pb2.ShutdownResponse()


def render_result(exit: ExitResult) -> driver_pb2.ExitResult:
    return driver_pb2.ExitResult(exit_code=exit.code, signal=exit.signal, oom_killed=exit.oom_killed)


MAX_CHECK_OUTPUT = 4096  # bytes of a check's output that Nomad keeps


def render_code(status: int) -> driver_pb2.ExitResult:
    """Return how a command ended. `status`: its exit code, or minus the number of the signal that ended it."""
    return driver_pb2.ExitResult(exit_code=status if status >= 0 else 128 - status, signal=max(-status, 0))


async def stream_exec(run: Exec, requests: AsyncIterator[Any], context: Any) -> None:
    """Pass everything between a client and a command, until the command ends: the client never ends its side."""
    response = driver_pb2.ExecTaskStreamingResponse
    writing = asyncio.Lock()  # one message at a time; while the client takes none, no output is read

    async def send(name: str, data: bytes) -> None:
        operation = driver_pb2.ExecTaskStreamingIOOperation(data=data)
        async with writing:
            is_error = name == "stderr"
            await context.write(response(stderr=operation) if is_error else response(stdout=operation))

    async def pass_output(name: str) -> None:
        async for data in run.read(name):
            await send(name, data)

    copying = [asyncio.create_task(pass_input(run, requests))]
    try:
        await run.start()
        copying += [asyncio.create_task(pass_output(name)) for name in run.outputs]
        await asyncio.gather(*copying[1:])
        status = await run.wait()
        if run.error:
            name, end = ("stdout", "\r\n") if run.tty else ("stderr", "\n")
            await send(name, f"{run.error}{end}".encode())
        await context.write(response(exited=True, result=render_code(status)))
    finally:
        await cancel_and_wait(copying)
        run.close()


async def pass_input(run: Exec, requests: AsyncIterator[Any]) -> None:
    async for request in requests:  # an empty one is a heartbeat
        if request.HasField("tty_size"):
            run.resize(request.tty_size.height, request.tty_size.width)
        if request.HasField("stdin"):
            await run.started.wait()
            await run.write(request.stdin.data)
            if request.stdin.close:
                await run.end_stdin()


class HealthService:
    """grpc.health.v1.Health, for the service "plugin"."""

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", "plugin"):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        await asyncio.Event().wait()


class PluginService:
    """go-plugin's own services: controller, broker and stdio."""

    def __init__(self, stop: asyncio.Event) -> None:
        self.stop = stop

    async def Shutdown(self, request: Any, context: Any) -> grpc_plugin_pb2.Empty:
        """The agent gives the process two seconds from here."""
        self.stop.set()
        return grpc_plugin_pb2.Empty()

    async def StartStream(self, requests: AsyncIterator[Any], context: Any) -> None:
        """The broker: every client opens it, but Nomad's never use it."""
        async for _ in requests:
            pass

    async def StreamStdio(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Nomad drops what comes here, but the stream must stay open."""
        await asyncio.Event().wait()
        yield


# =====================================================================================================
# Handshake
#
# The agent starts the file without arguments and with a cookie in the environment. Then it is a plugin: it opens a
# socket, prints its handshake, and serves until it is told to end. Everything else is for people.
# =====================================================================================================


def register(server: Any, driver: DriverService, stop: asyncio.Event) -> None:
    plugin: Any = PluginService(stop)
    services: list[tuple[Any, Any]] = [
        (base_pb2_grpc.add_BasePluginServicer_to_server, BaseService(driver)),
        (driver_pb2_grpc.add_DriverServicer_to_server, driver),
        (health_pb2_grpc.add_HealthServicer_to_server, HealthService()),
        (grpc_plugin_pb2_grpc.add_GRPCControllerServicer_to_server, plugin),
        (grpc_plugin_pb2_grpc.add_GRPCBrokerServicer_to_server, plugin),
        (grpc_plugin_pb2_grpc.add_GRPCStdioServicer_to_server, plugin),
    ]
    for add, service in services:
        add(service, server)
    server.add_generic_rpc_handlers(render_old_services(plugin))


def render_old_services(plugin: Any) -> list[grpc.GenericRpcHandler]:
    """Return controller and broker under the names that Nomad 0.10.0 and 0.10.1 use. The messages are the same on
    the wire."""
    empty, connection = grpc_plugin_pb2.Empty, grpc_plugin_pb2.ConnInfo
    methods: dict[str, dict[str, Any]] = {
        "proto.GRPCController": {
            "Shutdown": grpc.unary_unary_rpc_method_handler(
                plugin.Shutdown, empty.FromString, empty.SerializeToString
            )
        },
        "proto.GRPCBroker": {
            "StartStream": grpc.stream_stream_rpc_method_handler(
                plugin.StartStream, connection.FromString, connection.SerializeToString
            )
        },
    }
    return [grpc.method_handlers_generic_handler(name, handlers) for name, handlers in methods.items()]


MAX_SOCKET_PATH = 107  # bytes in a sockaddr_un, without the final NUL


def make_socket_directory() -> Path:
    """Make this process's own directory for its socket. In STATE_ROOT, first remove those of dead processes.

    /tmp is the last choice: a cleaner there would cut off a reattaching agent. Raises HostError.
    """
    name = f"plugin-{os.getpid()}-{os.urandom(4).hex()}"
    for base in (os.environ.get("PLUGIN_UNIX_SOCKET_DIR"), STATE_ROOT, os.environ.get("TMPDIR"), "/tmp"):
        if not base or len(f"{base}/{name}/s".encode()) > MAX_SOCKET_PATH:
            continue
        with contextlib.suppress(OSError):
            if Path(base) == STATE_ROOT:
                STATE_ROOT.mkdir(mode=0o700, exist_ok=True)
                remove_dead_sockets()
            path = Path(base, name)
            path.mkdir(mode=0o700)
            return path
    raise HostError("no directory for the plugin's socket: tried PLUGIN_UNIX_SOCKET_DIR, /run, TMPDIR and /tmp")


def remove_dead_sockets() -> None:
    for path in STATE_ROOT.glob("plugin-*-*"):
        if not Path("/proc", path.name.split("-")[1]).exists():
            remove_tree(path)


@contextlib.asynccontextmanager
async def serving(driver: DriverService, stop: asyncio.Event) -> AsyncIterator[tuple[Any, str]]:
    """Yield a gRPC server that answers, and the path of its socket; at the end remove that. Raises DriverError or
    OSError."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.http2.max_ping_strikes", 0),
        ]
    )
    register(server, driver, stop)
    directory = make_socket_directory()
    address = f"{directory}/s"
    try:
        try:
            server.add_insecure_port(f"unix:{address}")
        except RuntimeError:  # gRPC does not say what is wrong
            raise HostError(f"the plugin cannot listen at {address}: is this a place for sockets?") from None
        os.chmod(address, 0o600)
        await server.start()
        yield server, address
    finally:
        remove_tree(directory)


def try_plugin() -> str:
    """Be a plugin for a moment, and ask it as an agent does. Return why that is not possible, "" if it is."""

    async def main() -> None:
        async with serving(DriverService(), asyncio.Event()) as (server, address):
            async with grpc.aio.insecure_channel(f"unix:{address}") as channel:
                stub: Any = base_pb2_grpc.BasePluginStub(channel)
                await stub.PluginInfo(base_pb2.PluginInfoRequest(), timeout=TRY_LIMIT)
            await server.stop(0)

    try:
        asyncio.run(main())
    except grpc.RpcError as error:
        return f"the plugin does not answer: {error}"
    except Exception as error:
        return str(as_driver_error(error))
    return ""


TRY_LIMIT = 20.0  # seconds for an answer of the plugin that `check` starts


async def serve() -> None:
    """Be a plugin until the agent calls Shutdown, SIGTERM comes, or the agent has been dead for long enough."""
    logging.getLogger().addHandler(LibraryLog())
    # A thread that has no memory to begin says so in lines that are no JSON. A function of ours would need some.
    sys.unraisablehook = bool
    driver, stop = DriverService(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGCHLD, reap_children)
    with contextlib.suppress(OSError):
        SPARE.start()
    for ignored in (signal.SIGINT, signal.SIGHUP):  # meant for the agent; only calls end tasks
        loop.add_signal_handler(ignored, lambda: None)  # children would inherit SIG_IGN
    async with serving(driver, stop) as (server, address):
        write_handshake(address)
        watcher = asyncio.create_task(watch_agent(driver, stop))
        await stop.wait()
        watcher.cancel()
        await server.stop(0.2)  # seconds for the last answers, such as the one to Shutdown
        if driver.starts:  # their calls are cancelled by now: let them remove what they made
            await asyncio.wait([start.work for start in driver.starts.values()], timeout=1.5)


def write_handshake(address: str) -> None:
    """Print go-plugin's line, then point stdin and stdout at /dev/null: the agent stops reading at a long line."""
    os.write(1, f"1|2|unix|{address}|grpc|\n".encode())
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


ORPHAN_PERIOD = 300.0  # seconds


async def watch_agent(driver: DriverService, stop: asyncio.Event) -> None:
    """End the plugin some minutes after its agent died, unless tasks run or another agent has found it.

    With tasks it stays, so that the next agent can reattach: otherwise an agent before 1.9.2 kills the pid it
    remembers, whatever process that is by then.
    """
    with contextlib.suppress(OSError):  # stderr may be a terminal or a file: it does not show the agent's death
        if not stat.S_ISFIFO(os.fstat(2).st_mode):
            return
    await wait_readable(2)  # the writing end of a pipe becomes "readable" when its reader is gone
    while True:
        await asyncio.sleep(ORPHAN_PERIOD)
        if not driver.agents and all(task.ended.is_set() for task in driver.tasks.known.values()):
            stop.set()


COOKIE = ("NOMAD_PLUGIN_MAGIC_COOKIE", "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255")


def run_plugin() -> int:
    """Be a plugin until the process ends. Returns only if it cannot be one: its exit status."""

    async def main() -> None:
        DESCRIPTORS.raise_limit()
        loop = asyncio.get_running_loop()
        for later in (gc.collect, gc.freeze, gc.enable):
            loop.call_later(1, later)
        await serve()
        # Nobody needs to wait for gRPC's threads, and gRPC complains on stderr when asyncio cancels its calls.
        os._exit(0)

    try:
        asyncio.run(main())
    except Exception as error:
        return fail(render_line(str(as_driver_error(error))))
    raise AssertionError


def fail(text: str) -> int:
    """Tell the agent why there is no plugin: it shows the first line of stdout. Return the exit status."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"[ERROR] {FILE_NAME}: {text}\n")
        sys.stdout.write(f"{FILE_NAME}: {text}\n")
        sys.stdout.flush()
    return 1


def main() -> None:
    if os.environ.get(COOKIE[0]) == COOKIE[1]:
        sys.exit(run_plugin())
    from nspawn.commands import Program, run_command  # only now: the plugin starts without argparse

    program = Program(FILE_NAME, __version__, TASK_GROUPS, PLUGIN_OPTIONS, stop_task, try_plugin)
    sys.exit(run_command(program, sys.argv[1:]))


if __name__ == "__main__":
    main()
