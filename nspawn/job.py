# SPDX-License-Identifier: MPL-2.0
"""What Nomad and a job say about a task, without protobuf, and the names and signals that follow from it. Pure."""

from __future__ import annotations

import enum
import hashlib
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nspawn.checks import OWN_DIRECTORIES, Address, IdRange, Interface, IoLimit
from nspawn.common import STATE_ROOT, ConfigError
from nspawn.mounts import Device, Mount, Overlay
from nspawn.permissions import Size

UUID = re.compile(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}")
MIB = 1 << 20


@dataclass(frozen=True)
class Port:
    """A port of a network block of the group or the task."""

    host: int
    to: int = 0  # the port inside the container, 0: the same
    host_ip: str = ""
    is_of_task: bool = False  # of the task's own network block, which Nomad deprecates

    @property
    def inside(self) -> int:
        return self.to or self.host


@dataclass(frozen=True)
class Dns:
    """The group's dns block. The host's settings replace what it leaves out, as with Nomad's own drivers."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.servers or self.searches or self.options)


@dataclass(frozen=True)
class GroupNetwork:
    """What Nomad says about a task's network."""

    namespace: str = ""  # its path, "" in host mode
    ports: Mapping[str, Port] = field(default_factory=dict)  # by label
    dns: Dns = Dns()


@dataclass(frozen=True)
class Resources:
    """What Nomad grants a task."""

    memory: int = 0  # reserved bytes, 0: unknown
    memory_max: int | None = 0  # bytes it may use if the machine has them, 0: the reserved ones, None: any number
    cpu: int = 0  # MHz; they decide its share among the tasks
    cpu_fraction: float = 0.0  # these MHz as a part of the machine's
    cores: str = ""  # reserved cores, as in 0,2-3


@dataclass(frozen=True)
class TaskConfig:
    """What Nomad says about a task."""

    id: str  # <allocation>/<task>/<8 hex digits>, new for each start
    name: str
    alloc_id: str
    alloc_dir: str  # the allocation's directory on the host
    options: Mapping[str, object]  # the job's `config` block
    job: str = ""  # its id
    group: str = ""
    namespace: str = ""  # Nomad's, that of the job
    user: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    stdout_path: str = "/dev/null"
    stderr_path: str = "/dev/null"
    cgroup: str = ""
    resources: Resources = Resources()
    network: GroupNetwork = GroupNetwork()
    mounts: tuple[Mount, ...] = ()  # host volumes, CSI volumes and what device plugins ask for
    devices: tuple[Device, ...] = ()  # from device plugins

    @property
    def shared_dir(self) -> str:
        return f"{self.alloc_dir}/alloc"

    @property
    def task_dir(self) -> str:
        return f"{self.alloc_dir}/{self.name}"

    @property
    def log_dir(self) -> str:
        return f"{self.shared_dir}/logs"

    @property
    def own_directories(self) -> dict[str, str]:
        """The paths of the directories that a task may use without a permission, by their names in its job."""
        paths = (self.shared_dir, f"{self.task_dir}/local", f"{self.task_dir}/secrets")
        return dict(zip(OWN_DIRECTORIES, paths, strict=True)) if self.alloc_dir else {}

    @property
    def directory_mounts(self) -> tuple[Mount, ...]:
        """Where the task's directories are in the container. Its logs are read-only because Nomad writes to their
        names as root (CVE-2026-8052)."""
        own = (Mount(f"{self.task_dir}/{name}", f"/{name}") for name in ("local", "secrets"))
        logs = Mount(self.log_dir, "/alloc/logs", read_only=True)
        return (Mount(self.shared_dir, "/alloc"), logs, *own) if self.alloc_dir else ()

    @property
    def directory_names(self) -> tuple[str, ...]:
        """The task's directories, relative to alloc_dir. Parents come first."""
        own = (f"{self.name}{end}" for end in ("", "/local", "/secrets"))
        return ("alloc", "alloc/logs", *own) if self.alloc_dir else ()


class Mode(enum.Enum):
    """What the container's PID 1 is. This decides which process gets a signal, and what the signal means."""

    BOOT = "boot"
    COMMAND = "command"  # the command itself: the kernel drops signals for which it has no handler
    PROCESS_TWO = "process_two"  # a stub of nspawn; the command is PID 2

    @property
    def console(self) -> str:
        # In pipe mode a booted systemd writes nothing to its console (measured on 252 and 257). A command gets no
        # pty, because that would merge its stdout and stderr and end its lines with CR LF.
        return "read-only" if self is Mode.BOOT else "pipe"

    @property
    def environ(self) -> dict[str, str]:
        return {"TERM": "dumb"} if self is Mode.BOOT else {}  # no colours and no cursor movement in the logs

    def stop_signal(self, name: str) -> int:
        """Return the signal that asks the payload to end. `name` is the job's kill_signal, "" if it has none.

        systemd takes SIGTERM for "re-exec" and SIGINT for "reboot". A job with one of these as kill_signal means
        "end", so a booted system gets SIGRTMIN+4 (poweroff) instead. Raises ConfigError for an unknown name.
        """
        number = parse_signal(name) if name else signal.SIGTERM
        if self is Mode.BOOT and number in (signal.SIGTERM, signal.SIGINT):
            return signal.SIGRTMIN + 4
        return number


@dataclass(frozen=True)
class ImageDownload:
    """Where to fetch an image from."""

    url: str
    type: str = "tar"
    verify: str = "no"
    checksum: str | None = None
    platform: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Login:
    """Credentials for the server of an image."""

    username: str | None = None
    password: str | None = None


@dataclass(frozen=True)
class JobOptions:
    """A job's `config` block, with what its values mean and with all defaults. None: the job does not say.

    The fields are the rows of driver.py; a test holds the two against each other. `decode_job` makes it.
    """

    image: str
    image_download: ImageDownload | None
    auth: Login | None
    ephemeral: bool
    read_only: bool
    volatile: str | None
    root_size: Size | None
    pivot_root: str | None
    image_policy: str | None
    root_hash: str | None
    root_hash_sig: str | None

    boot: bool
    unit: str | None
    journal: bool
    command: tuple[str, ...]  # after `apply_image` all of the command line
    entrypoint: tuple[str, ...]
    args: tuple[str, ...]
    process_two: bool
    user: str | None
    working_directory: str | None
    environment: Mapping[str, str]
    console: str | None
    notify_ready: bool
    suppress_sync: bool
    personality: str | None
    set_credential: Mapping[str, str]
    load_credential: Mapping[str, str]

    user_namespacing: bool
    private_users: IdRange | None  # None: no user namespace
    private_users_ownership: str | None
    private_users_delegate: int | None
    bind_user: tuple[str, ...]
    bind_user_shell: str | None
    bind_user_group: tuple[str, ...]

    network_veth: bool
    network_zone: str | None
    network_bridge: str | None
    network_veth_extra: tuple[str, ...]
    network_macvlan: tuple[str, ...]
    network_ipvlan: tuple[str, ...]
    network_interface: tuple[str, ...]
    network_address: tuple[Interface, ...]
    network_gateway: tuple[Address, ...]
    network_mac: str | None
    private_network: bool
    ports: tuple[str, ...]
    port_map: Mapping[str, int]
    hostname: str | None
    extra_hosts: tuple[str, ...]  # lines of a hosts file
    address_timeout: float | None  # seconds
    resolv_conf: str | None

    bind: tuple[Mount, ...]
    bind_read_only: tuple[Mount, ...]
    mount: tuple[Mount, ...]
    tmpfs: tuple[str, ...]
    overlay: tuple[Overlay, ...]
    overlay_read_only: tuple[Overlay, ...]
    inaccessible: tuple[str, ...]
    devices: tuple[Device, ...]

    capability: tuple[str, ...]
    drop_capability: tuple[str, ...]
    ambient_capability: tuple[str, ...]
    no_new_privileges: bool
    system_call_filter: tuple[str, ...]
    restrict_address_families: tuple[str, ...]
    selinux_context: str | None
    selinux_apifs_context: str | None

    sysctl: Mapping[str, str]
    rlimit: Mapping[str, str]
    oom_score_adjust: int | None
    cpu_affinity: str | None
    cpu_hard_limit: bool
    pids_limit: int  # 0: any number
    memory_swap_max: str | None  # bytes, or "max", as the kernel wants it
    io_weight: int | None
    io_max: tuple[IoLimit, ...]

    timezone: str | None
    link_journal: str | None
    labels: Mapping[str, str]

    @property
    def mode(self) -> Mode:
        if self.boot:
            return Mode.BOOT
        return Mode.PROCESS_TWO if self.process_two else Mode.COMMAND

    @property
    def is_terminal(self) -> bool:
        """Whether the output comes from a terminal, which puts a CR before each LF."""
        return self.boot and self.console != "pipe"

    @property
    def adds_units(self) -> bool:
        """Whether the container's systemd gets units of the driver, which write to the task's logs."""
        return self.journal or self.unit is not None

    @property
    def directory(self) -> str:
        """The command's working directory, which has to be there before it starts."""
        return "/" if self.boot else self.working_directory or "/"

    @property
    def binds(self) -> tuple[Mount, ...]:
        return (*self.bind, *self.bind_read_only, *self.mount)

    @property
    def overlays(self) -> tuple[Overlay, ...]:
        return (*self.overlay, *self.overlay_read_only)

    @property
    def is_volatile(self) -> bool:
        return self.volatile not in (None, "no")

    @property
    def has_read_only_root(self) -> bool:
        """Whether nspawn cannot make mount points, because it mounts the image read-only first."""
        return self.read_only or self.volatile == "state"

    @property
    def has_other_users(self) -> bool:
        """Whether its users have other ids on the host. The kernel refuses to map ids to themselves."""
        return self.private_users is not None and self.private_users.base != 0

    @property
    def root(self) -> str:
        """The directory of the image that becomes the container's root, without a slash at its end or "" for it
        all."""
        return (self.pivot_root or "").partition(":")[0]


def parse_signal(name: str) -> int:
    """Return the number of a signal such as SIGTERM, TERM, 15 or SIGRTMIN+4. Raises ConfigError."""
    match = re.fullmatch(r"(?:SIG)?(RTMIN|RTMAX)([+-]\d{1,2})|(?:SIG)?([A-Z][A-Z0-9]*)|(\d{1,3})", name.upper())
    if match:
        base, offset, plain, digits = match.groups()
        known = signal.Signals.__members__.get(f"SIG{base or plain}")
        number = int(digits) if digits else int(known or 0) + int(offset or 0)
        if 0 < number < signal.NSIG:
            return number
    raise ConfigError("signal", name, "is not a signal", "use a name such as SIGTERM, SIGHUP or SIGRTMIN+4")


def render_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}" if number > signal.SIGRTMIN else str(number)


def plan_machine(task_name: str, alloc_id: str) -> str:
    """Return the machine's name, <task>-<allocation>, in nspawn's alphabet and at most 64 characters.

    If the task's name must be changed for that, 64 bits of its digest follow. They also follow a name that looks
    like such a result, so that two tasks of an allocation never get the same name.
    """
    alloc = re.sub(r"[^A-Za-z0-9-]+", "-", alloc_id)[:36].strip("-") or "alloc"
    room = 64 - len(alloc) - 1
    name = re.sub(r"[^A-Za-z0-9-]+", "-", task_name).strip("-")
    if name != task_name or len(name) > room or re.fullmatch(r"(.*-)?[0-9a-f]{16}", name):
        digest = hashlib.sha256(task_name.encode()).hexdigest()[:16]
        name = f"{name[: room - 17].strip('-')}-{digest}".lstrip("-")
    return f"{name}-{alloc}"


def render_id_prefix(task_id: str) -> str:
    """Return the start of an id for a file name: the 36 characters of the allocation and some of the task."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", task_id)[:40]


def state_directory(task_id: str) -> Path:
    """Return the directory for a task's files. It follows from the id alone, is short enough for the path of a
    socket, and is below the state root, no matter what the id contains."""
    return STATE_ROOT / f"{render_id_prefix(task_id)}-{hashlib.sha256(task_id.encode()).hexdigest()[:12]}"
