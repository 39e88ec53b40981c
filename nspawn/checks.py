# SPDX-License-Identifier: MPL-2.0
"""What a value of an option must be: the functions for its `check` and `render`, and the types they make.

A `check_` raises ConfigError or returns its value; a `parse_` returns another value or another spelling of it.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface
from typing import Any

from nspawn.common import ConfigError, name_entry
from nspawn.options import Check
from nspawn.permissions import DEFAULT_PERMISSIONS, Permission, Size


def check_container_path(name: str, value: str) -> str:
    if not value.startswith("/"):
        raise ConfigError(name, value, "must be an absolute path inside the container")
    if ".." in value.split("/"):
        raise ConfigError(name, value, 'must not contain ".."')
    return value


def check_container_paths(name: str, value: Sequence[str]) -> Sequence[str]:
    return tuple(check_container_path(name, path) for path in value)


def check_program(name: str, value: Sequence[str]) -> Sequence[str]:
    """Refuse an empty program: in docker, it makes the image's Entrypoint empty."""
    if value and not value[0]:
        remedy = "leave it out and set command: it replaces the image's Entrypoint"
        raise ConfigError(name, value, "the program must not be empty", remedy)
    return value


def check_pivot_root(name: str, value: str) -> str:
    if value.count(":") > 1:
        raise ConfigError(name, value, "must be PATH or PATH:PATH")
    for part in value.split(":"):
        check_container_path(name, part)
    return value


def check_pattern(pattern: str, rule: str) -> Check:
    """Make a check for a string, or for each string of a list."""

    def check(name: str, value: Any) -> Any:
        for item in (value,) if isinstance(value, str) else value:
            if not re.fullmatch(pattern, item):
                raise ConfigError(name, item, rule)
        return value

    return check


def check_range(low: int, high: int, what: str = "a whole number") -> Check:
    def check(name: str, value: int) -> int:
        if not low <= value <= high:
            raise ConfigError(name, value, f"must be {what} from {low} to {high}")
        return value

    return check


OWN_DIRECTORIES = ("alloc", "local", "secrets")  # the names of a task's own directories in its job


def check_source(name: str, path: str, shown: object) -> None:
    """Accept an absolute path of the host, or one in the task's own directories."""
    own = path.split("/")[0] in OWN_DIRECTORIES
    if not (path.startswith("/") or own):
        rule = "the source must be an absolute path of the host, or one that begins with alloc, local or secrets"
        raise ConfigError(name, shown, rule)
    if own and ".." in path.split("/"):
        raise ConfigError(name, shown, 'the source must not contain ".."')


MAX_LABELS = 4096  # characters; they are in the task's state


def check_labels(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    for key in value:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?", key):
            rule = (
                "the name of a label must be letters and digits, with dots, dashes, slashes or underscores between"
            )
            raise ConfigError(name, key, rule)
    if (total := sum(len(key) + len(text) for key, text in value.items())) > MAX_LABELS:
        rule = f"all labels together may have {MAX_LABELS} characters, and these have {total}"
        raise ConfigError(name, value, rule, "shorten them, or leave some out")
    return value


def check_ports(name: str, value: Mapping[str, int]) -> Mapping[str, int]:
    for label, port in value.items():
        check_range(1, 65535, "a port")(name_entry(name, label), port)
    return value


def parse_duration(name: str, value: str) -> float:
    """Return the seconds of a duration such as `500ms`, `2s`, `1m` or `0`, as Nomad's jobs write it."""
    if value == "0":
        return 0.0
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h)", value, re.ASCII)
    if not match:
        raise ConfigError(name, value, "must be a duration such as 500ms, 5s or 1m")
    return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def parse_extra_hosts(name: str, value: Sequence[str]) -> tuple[str, ...]:
    """Return lines of a hosts file."""
    lines = []
    for item in value:
        host, _, address = item.partition(":")
        if address.startswith("[") and address.endswith("]") and ":" in address:  # as docker and podman take it
            address = address[1:-1]
        if not (re.fullmatch(HOSTNAME, host) and is_address(address)):
            raise ConfigError(name, item, "must be NAME:ADDRESS, as in db:192.0.2.7 or db:2001:db8::7")
        lines.append(f"{address} {host}")
    return tuple(lines)


def is_address(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            socket.inet_pton(family, text)
            return True
    return False


Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface  # an address with the length of its network's prefix


def parse_interfaces(name: str, value: Sequence[str]) -> tuple[Interface, ...]:
    """Return addresses that an interface can have and others can reach."""
    found: list[Interface] = []
    for item in value:
        interface = None
        if re.fullmatch(r"[0-9A-Fa-f.:]+/\d{1,3}", item, re.ASCII):
            with contextlib.suppress(ValueError):
                interface = ip_interface(item)
        if interface is None:
            rule = "must be an address with the length of its network's prefix, as in 10.0.0.7/24 or fd00::7/64"
            raise ConfigError(name, item, rule)
        check_usable(name, item, interface.ip)
        network = interface.network
        ends = [network.network_address]
        if interface.version == 4:
            ends.append(network.broadcast_address)
        if network.num_addresses > 2 and interface.ip in ends:
            rule = "is the address of the network, or its broadcast address"
            raise ConfigError(name, item, rule, "use one between the two")
        if interface.ip in (other.ip for other in found):
            raise ConfigError(name, item, "names an address that is there already", "name it once")
        found.append(interface)
    return tuple(found)


def parse_gateways(name: str, value: Sequence[str]) -> tuple[Address, ...]:
    found: list[Address] = []
    for item in value:
        if not is_address(item):
            raise ConfigError(name, item, "must be an address, as in 10.0.0.1 or fd00::1")
        found.append(ip_address(item))
        check_usable(name, item, found[-1])
    return tuple(found)


def check_usable(name: str, item: str, address: Address) -> None:
    kinds = ("multicast", "loopback", "unspecified", "link_local", "reserved")
    if kind := next((kind for kind in kinds if getattr(address, f"is_{kind}")), ""):
        rule = f"must be an address by which others can reach it, and this one is {kind.replace('_', '-')}"
        raise ConfigError(name, item, rule)


def check_mac(name: str, value: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", value):
        raise ConfigError(name, value, "must be a MAC address, as in 02:00:00:00:00:07")
    if int(value[:2], 16) & 1 or not int(value.replace(":", ""), 16):
        rule = "is no address of one interface: it is all zero, or the first byte is odd, as for groups"
        raise ConfigError(name, value, rule)
    return value.lower()


def check_variables(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    for key in value:
        if not VARIABLE.fullmatch(key):
            rule = "variable names have letters, digits and underscores, and do not start with a digit"
            raise ConfigError(name, key, rule)
    return value


VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # nspawn refuses others: "Cannot assign environment variable"
# systemd refuses these in text: NUL, surrogates, and code points that are never characters.
NEVER_CHARACTERS = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
NO_TEXT = re.compile(f"[\\0\ud800-\udfff\ufdd0-\ufdef{NEVER_CHARACTERS}]")

CAPABILITIES = tuple(
    """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
    SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
    AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
    PERFMON BPF CHECKPOINT_RESTORE
    """.split()  # noqa: SIM905 # a list of words reads better
)


def parse_capabilities(name: str, value: Sequence[str]) -> Sequence[str]:
    """Return names such as CAP_NET_ADMIN. Also takes docker's net_admin, and several with commas in one string."""
    found = []
    for item in (part.strip() for text in value for part in text.split(",")):
        plain = item.upper().removeprefix("CAP_")
        if item.lower() != "all" and plain not in CAPABILITIES:
            raise ConfigError(name, item, "is not a capability", "use a name such as CAP_NET_ADMIN, or all")
        found.append("all" if item.lower() == "all" else f"CAP_{plain}")
    return tuple(found)


def parse_single_capabilities(name: str, value: Sequence[str]) -> Sequence[str]:
    found = parse_capabilities(name, value)
    if "all" in found:
        raise ConfigError(name, "all", "must be a list of single capabilities")
    return found


RLIMITS = ("AS", "CORE", "CPU", "DATA", "FSIZE", "LOCKS", "MEMLOCK", "MSGQUEUE", "NICE", "NOFILE", "NPROC", "RSS",
           "RTPRIO", "RTTIME", "SIGPENDING", "STACK")  # fmt: skip


def parse_rlimits(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    """Return limits by names such as RLIMIT_NOFILE. Also takes docker's nofile."""
    found = {}
    for key, limit in value.items():
        option = name_entry(name, key)
        plain = key.upper().removeprefix("RLIMIT_")
        if plain not in RLIMITS:
            known = ", ".join(limit.lower() for limit in RLIMITS)
            raise ConfigError(option, limit, "is not a resource limit", f"the limits are {known}")
        if not re.fullmatch(r"(\d{1,19}|infinity)(:(\d{1,19}|infinity))?", limit):
            raise ConfigError(option, limit, "must be LIMIT or SOFT:HARD, each a number or infinity")
        soft, _, hard = limit.partition(":")
        if hard and float(soft.replace("infinity", "inf")) > float(hard.replace("infinity", "inf")):
            raise ConfigError(option, limit, "the soft limit must not be above the hard one")
        found[f"RLIMIT_{plain}"] = limit
    return found


CREDENTIAL = re.compile(r"(?!\.{1,2}$)[!-.0-9;-~]{1,255}", re.ASCII)  # printable ASCII without "/" and ":"


def check_credentials(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    for key in value:
        if not CREDENTIAL.fullmatch(key):
            raise ConfigError(name, key, 'the name of a credential is printable ASCII without "/" and ":"')
    return value


def check_credential_files(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    for key, path in check_credentials(name, value).items():
        check_source(name_entry(name, key), path, shown=path)
    return value


@dataclass(frozen=True)
class IdRange:
    """The ids of the host that the users of a container have: no, yes, pick, identity, BASE or BASE:COUNT."""

    text: str = "pick"  # as in a job, and in nspawn's --private-users=
    base: int | None = None  # root's; None: known when the task starts
    count: int = 0x10000

    def __str__(self) -> str:
        return self.text


def is_chosen(users: IdRange | None) -> bool:
    """Whether a job or its image says which ids of the host it gets. They may be those of the host's users."""
    return users is not None and (users.base is not None or users.text == "yes")


def parse_id_range(name: str, value: str) -> IdRange:
    if re.fullmatch(r"no|yes|pick|identity", value):
        return IdRange(value, 0 if value == "identity" else None)
    rule = "must be no, yes, pick, identity, or user ids as BASE or BASE:COUNT"
    match = re.fullmatch(r"(\d{1,10})(?::(\d{1,10}))?", value)
    if not match:
        raise ConfigError(name, value, rule)
    base, count = int(match[1]), int(match[2] or 65536)
    if not (count and base + count < 1 << 32):
        raise ConfigError(name, value, "the range must not be empty and must end below 4294967295")
    return IdRange(value, base, count)


def check_image_address(name: str, value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+\S*|(docker://)?(?!.*://)[\w.:@/\[\]-]+", value, re.ASCII):
        raise ConfigError(
            name, value, "must be an http:// or https:// address, or the name of an image in a registry"
        )
    return value


def check_checksum(name: str, value: str) -> str:
    algorithm, colon, digits = value.rpartition(":")
    lengths = {"sha256": 64, "sha512": 128, "sha384": 96}
    if len(digits) != lengths.get(algorithm if colon else "sha256") or not re.fullmatch("[0-9a-fA-F]+", digits):
        raise ConfigError(name, value, "must be ALGORITHM:HEX, for sha256, sha384 or sha512")
    return value


def check_platform(name: str, value: str) -> str:
    if not re.fullmatch(r"linux/[a-z0-9_]+(/[a-z0-9.]+)?", value):
        raise ConfigError(name, value, "must be linux/ARCHITECTURE or linux/ARCHITECTURE/VARIANT")
    return value


def name_registry(host: str) -> str:
    """Return the one name of a registry that the operator and jobs may call differently."""
    name = re.sub(r"\.?(:0*443)?$", "", host.lower())
    return "docker.io" if name in ("index.docker.io", "registry-1.docker.io") else name


REGISTRY = r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(:\d{1,5})?"
PREFIX = r"(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"  # of repositories


def check_registries(name: str, value: Sequence[str]) -> Sequence[str]:
    for item in value:
        if not re.fullmatch(REGISTRY, item):
            raise ConfigError(name, item, "must be HOST or HOST:PORT, without http:// and without a path")
    return value


def parse_signers(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    """Return the files of public keys by what they are for, with the one name of each registry."""
    signers = {}
    for place, path in value.items():
        if place != "*" and not re.fullmatch(REGISTRY + PREFIX, place):
            raise ConfigError(name, place, "must be HOST[:PORT] or HOST[:PORT]/PREFIX, without http://")
        host, slash, prefix = place.partition("/")
        signers[f"{name_registry(host)}{slash}{prefix}"] = check_host_directory(name_entry(name, place), path)
    return signers


def parse_mirrors(name: str, value: Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
    """Return the mirrors by the one name of their registry."""
    for registry, mirrors in value.items():
        if registry != "*":
            check_registries(name, [registry])
        for mirror in mirrors:
            if not re.fullmatch(REGISTRY + PREFIX, mirror):
                rule = "must be HOST[:PORT] or HOST[:PORT]/PREFIX, without http://"
                raise ConfigError(name_entry(name, registry), mirror, rule)
    return {name_registry(registry): mirrors for registry, mirrors in value.items()}


def check_helper(name: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", value):
        raise ConfigError(name, value, "must be what follows docker-credential- in the name of the program")
    return value


def check_positive(name: str, value: int) -> int:
    if value <= 0:
        raise ConfigError(name, value, "must be a number above 0")
    return value


def check_host_directory(name: str, value: str) -> str:
    if not value.startswith("/") or ".." in value.split("/"):
        raise ConfigError(name, value, 'must be an absolute path of the host without ".."')
    return value


def check_host_directories(name: str, value: Sequence[str]) -> Sequence[str]:
    return tuple(check_host_directory(name, path) for path in value)


def parse_permissions(name: str, value: Sequence[str]) -> Sequence[str]:
    """Return the words of `allow`, with `default` replaced by what it stands for."""
    known = [permission.value for permission in Permission if permission.is_word] + ["default", "all"]
    found: list[str] = []
    for word in value:
        if word not in known:
            raise ConfigError(name, word, f"must be one of {', '.join(known)}")
        found += DEFAULT_PERMISSIONS if word == "default" else (word,)
    return tuple(dict.fromkeys(found))


check_interface_name = check_pattern(r"(?!\.{1,2}$)[!-.0-9;-~]{1,15}", "must be the name of a network interface")
check_interface_names = check_pattern(
    r"(?!\.{1,2}(:|$))[!-.0-9;-~]{1,15}(:(?!\.{1,2}$)[!-.0-9;-~]{1,15})?",
    "must be the name of an interface of the host, or HOST:CONTAINER, each of up to 15 characters",
)
check_printable = check_pattern(r"[ -~]+", "must be printable ASCII")
ACCOUNT = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"
HOSTNAME = r"(?=.{1,64}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
USER = re.compile(r"(?!-)[^\s:/,\x00-\x1f\x7f]{1,256}")


def check_user(name: str, value: str) -> str:
    if not USER.fullmatch(value):
        raise ConfigError(name, value, "must be the name or the number of a user inside the container")
    return value


MAX_PIDS = 4 << 20  # the kernel's limit
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def find_size(value: str) -> int | None:
    """Return the bytes of a size such as `512M`, `2G` or `2 GiB`, None if it is none."""
    match = re.fullmatch(r"(\d{1,15})(?: ?([KMGT])(?:iB)?)?", value, re.ASCII)
    return int(match[1]) * UNITS[match[2] or ""] if match else None


def parse_size(name: str, value: str) -> str:
    """Return the size in bytes or "max", as the kernel's control files want it."""
    size = find_size(value)
    if size is None and value != "infinity":
        raise ConfigError(name, value, "must be a size such as 512M or 2G, or infinity")
    return "max" if size is None else str(size)


def parse_rate(name: str, value: str) -> int:
    """Return the bytes of a size that is not 0."""
    size = find_size(value)
    if not size:
        raise ConfigError(name, value, "must be a size above 0, such as 512K or 10M")
    return size


@dataclass(frozen=True)
class IoLimit:
    """What a task may read from and write to a disk in a second."""

    device: str | None = None  # the node of the disk or of a part of it; None: the disk of the task's directory
    read_bps: int | None = None  # bytes
    write_bps: int | None = None
    read_iops: int | None = None  # operations
    write_iops: int | None = None

    def render(self, disk: str) -> str:
        """Return a line for io.max. `disk`: MAJOR:MINOR."""
        rates = {"rbps": self.read_bps, "wbps": self.write_bps, "riops": self.read_iops, "wiops": self.write_iops}
        return " ".join([disk, *(f"{name}={rate or 'max'}" for name, rate in rates.items())])


def check_io_limits(name: str, value: Sequence[IoLimit]) -> Sequence[IoLimit]:
    for limit in value:
        if limit == IoLimit(limit.device):
            rule = "must have one of read_bps, write_bps, read_iops and write_iops"
            raise ConfigError(name, {"device": limit.device}, rule, 'write it as in write_bps = "10M"')
    return value


def parse_least_size(name: str, value: str) -> Size:
    """Return a size of at least a mebibyte."""
    size = find_size(value)
    if size is None or size < UNITS["M"]:
        raise ConfigError(name, value, "must be a size such as 512M or 2G, and at least 1M")
    return Size(value, size)


# Renderers.


def escape_field(text: str) -> str:
    """Escape a text for nspawn's colon-separated fields."""
    return text.replace("\\", "\\\\").replace(":", "\\:")


def render_pairs(argument: str, value: Mapping[str, str]) -> list[str]:
    return [f"{argument}={key}={item}" for key, item in value.items()]


def render_tmpfs(argument: str, value: Sequence[str]) -> list[str]:
    return [f"{argument}={item}" for item in (text.replace("\\", "\\\\") for text in value)]


def render_short_option(argument: str, value: str) -> list[str]:
    return [f"{argument}{value}"]


def render_ambient(argument: str, value: Sequence[str]) -> list[str]:
    """nspawn wants ambient capabilities among those of the container, too."""
    return [f"{name}={item}" for item in value for name in ("--capability", argument)]


def render_joined(argument: str, value: Sequence[str]) -> list[str]:
    return [f"{argument}={' '.join(value)}"]


RESOLV_CONF = ("auto", "off", "delete") + tuple(
    f"{how}-{what}" for how in ("copy", "replace", "bind") for what in ("host", "static", "uplink", "stub")
)


def any_of(*choices: str, **since: int) -> dict[str, int]:
    """Return the `choices` of an option. Keywords are those that need a systemd version, with that version."""
    return {**dict.fromkeys(choices, 0), **since}
