# SPDX-License-Identifier: MPL-2.0
"""Where a container's network comes from, and what is in its /etc/resolv.conf and /etc/hosts.

The namespace of a group (bridge, none, cni) is Nomad's. The shim and nspawn are started in it, and nspawn gets no
network option. --network-namespace-path would do the same, but before 262 not with user namespaces
(systemd#36363). Disk images still need it: to mount them, nspawn must be in the host's network, where it hears
from udev. Nomad and CNI decide what goes through a group's namespace (ports, Consul Connect). All other networks
are options of nspawn. The driver makes no firewall rules; nspawn makes its own for --port.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nspawn.addresses import FixedLink, plan_fixed_link, render_networkd
from nspawn.common import ConfigError, HostError, check_shortage, shorten
from nspawn.files import read_text
from nspawn.images import Image, enables_unit, open_directory, read_in_image
from nspawn.job import Dns, GroupNetwork, JobOptions, Port
from nspawn.linux import CLONE_NEWNET, call_libc
from nspawn.mounts import Mount


@dataclass(frozen=True)
class NetworkInputs:
    """What a container's /etc/resolv.conf and /etc/hosts are made from, and more of its image: see read_names."""

    resolv_conf: str = ""  # the host's
    hosts: str = ""  # the image's
    addresses: tuple[str, ...] = ()  # those of the group's namespace
    missing: frozenset[str] = frozenset()  # files of NAME_FILES that cannot be mounted in the image
    expects_address: bool = False  # see is_address_expected
    has_networkd: bool = False  # a container with fixed addresses runs systemd-networkd


NAME_FILES = ("/etc/resolv.conf", "/etc/hosts")
NETWORKD_FILE = "/etc/systemd/network/00-nomad.network"  # comes before the image's own files


# Starts the shim in the group's namespace. Root in a user namespace has no rights over a network namespace made
# outside: without these settings it could neither listen on ports below 1024 nor ping. Docker sets the same two.
# They end with the network namespace.
ENTER_NAMESPACE = r"""
exec 4>&2 2>/dev/null
echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start
echo "0 2147483647" >/proc/sys/net/ipv4/ping_group_range
exec "$@" 2>&4 4>&-
"""


class NetworkMode(enum.Enum):
    """Where the container's network comes from."""

    HOST = "host"
    NONE = "none"  # only loopback, and the links of network_veth_extra
    GROUP = "group"
    VETH = "veth"  # a link to the host, which gives it an address
    BRIDGE = "bridge"  # a link to a bridge that somebody else manages
    INTERFACE = "interface"  # an interface of the host, or one on top of it

    @classmethod
    def of(cls, group: GroupNetwork, options: JobOptions) -> NetworkMode:
        if group.namespace:
            return cls.GROUP
        for mode, names in MODE_OPTIONS.items():
            if any(getattr(options, name) for name in names):
                return mode
        return cls.HOST

    @property
    def has_address(self) -> bool:
        """Whether the container should get an address of its own after its start."""
        return self in (NetworkMode.VETH, NetworkMode.BRIDGE, NetworkMode.INTERFACE)

    @property
    def is_outside(self) -> bool:
        """Whether other machines can reach the container's own address."""
        return self in (NetworkMode.BRIDGE, NetworkMode.INTERFACE)


# The first that is set counts. Addresses in a LAN come before those that only this host can reach.
MODE_OPTIONS = {
    NetworkMode.BRIDGE: ("network_bridge",),
    NetworkMode.INTERFACE: ("network_macvlan", "network_ipvlan", "network_interface"),
    NetworkMode.VETH: ("network_zone", "network_veth"),
    NetworkMode.NONE: ("private_network", "network_veth_extra"),
}


@dataclass(frozen=True)
class NetworkPlan:
    """How one container gets its network."""

    mode: NetworkMode = NetworkMode.HOST
    zone: str = ""
    link: str = ""  # the host's end; over 15 characters it is an alternative name
    address_timeout: float = 0.0  # seconds
    fixed: FixedLink | None = None
    ports: Mapping[str, Port] = field(default_factory=dict)  # those that nspawn maps, by label
    entry: tuple[str, ...] = ()  # starts the shim in another network namespace
    argv: tuple[str, ...] = ()  # further arguments of nspawn
    environ: Mapping[str, str] = field(default_factory=dict)  # for the payload
    files: Mapping[str, str] = field(default_factory=dict)  # texts by their paths inside, mounted read-only
    mount_files: tuple[str, ...] = ()  # mount points to make for them in a read-only image
    notes: tuple[str, ...] = ()  # sentences for the task's events

    def plan_mounts(self, directory: Path) -> tuple[Mount, ...]:
        """Return the mounts of `files`. `directory` is the task's state directory."""
        return tuple(Mount(f"{directory}{path}", path, read_only=True) for path in self.files)


SHORT_NAME = 11  # characters of a name of over 15 that nspawn keeps; a hash of four follows


def plan_link(options: JobOptions, machine: str) -> str:
    """Return nspawn's name for the host's end of its link, "" if it makes none beside network_veth_extra."""
    if options.network_bridge or options.network_zone:
        return f"vb-{machine}"
    return f"ve-{machine}" if options.network_veth else ""


def plan_network(
    group: GroupNetwork, options: JobOptions, names: NetworkInputs, machine: str, *, is_disk: bool = False
) -> NetworkPlan:
    """Return how a task gets its network. Raises ConfigError."""
    default = ADDRESS_TIMEOUT if names.expects_address else 0.0
    files, fixed = plan_name_files(group, options, names, machine), plan_fixed_link(options)
    if fixed and names.has_networkd and not {mount.target for mount in options.binds} & {NETWORKD_FILE, "/etc"}:
        files[NETWORKD_FILE] = render_networkd(fixed)
    network = NetworkPlan(
        mode=NetworkMode.of(group, options),
        address_timeout=default if options.address_timeout is None else options.address_timeout,
        fixed=fixed,
        zone=options.network_zone or "",
        link=plan_link(options, machine),
        files=files,
        mount_files=tuple(options.root + path for path in files if options.has_read_only_root),
        notes=(*explain_dns(group, options, files), *explain_dhcp(group, options)),
    )
    if group.namespace and is_disk:  # never with user namespaces: see check_image_rules
        return replace(network, argv=(f"--network-namespace-path={group.namespace}",))
    if group.namespace:
        set_up = ("sh", "-c", ENTER_NAMESPACE, "sh") if options.user_namespacing else ()
        entry = ("nsenter", f"--net={group.namespace}", "--", *set_up)
        return replace(network, entry=entry)
    ports = {label: find_port(group, "ports", label, label) for label in options.ports}
    if options.port_map:  # as Docker's driver did it: the others have the same number inside
        ports |= {label: port for label, port in group.ports.items() if port.is_of_task}
    for label, to in options.port_map.items():
        ports[label] = replace(find_port(group, f"port_map.{label}", label, to), to=to)
    return replace(
        network,
        ports=ports,
        argv=tuple(argument for port in ports.values() for argument in render_port(port)),
        environ=plan_port_environ(ports),
        notes=(*network.notes, *(note for label, port in ports.items() for note in explain_port(label, port))),
    )


ADDRESS_TIMEOUT = 10.0  # seconds, if a job sets none: DHCP takes three to five of them in a system that boots


def is_address_expected(group: GroupNetwork, options: JobOptions, image: Image) -> bool:
    """Whether a container will ask for an address while it boots, and somebody may give it one. May block."""
    mode = NetworkMode.of(group, options)
    is_served = mode is NetworkMode.BRIDGE or (mode is NetworkMode.VETH and have_networkd())
    return is_served and starts_networkd(options, image)


def starts_networkd(options: JobOptions, image: Image) -> bool:
    """Whether a container will run systemd-networkd. False for a disk image. May block."""
    if not options.boot or options.volatile == "yes":  # that hides the image's /etc
        return False
    return enables_unit(image, options.root, "systemd-networkd.service")


def find_port(group: GroupNetwork, option: str, label: str, shown: object) -> Port:
    port = group.ports.get(label)
    if port is None:
        rule = "no port of this label in the group's or task's network block"
        known = f"the labels are {', '.join(group.ports) or 'none'}"
        raise ConfigError(option, shown, rule, known)
    return port


def render_port(port: Port) -> list[str]:
    return [f"--port={protocol}:{port.host}:{port.inside}" for protocol in ("tcp", "udp")]


def plan_port_environ(ports: Mapping[str, Port]) -> dict[str, str]:
    """Return the variables for the ports inside. Nomad's own follow `to`, but not port_map."""
    names = {label: re.sub(r"[^A-Za-z0-9_]", "_", label) for label in ports}
    kinds = ("NOMAD_PORT", "NOMAD_ALLOC_PORT")
    return {f"{kind}_{names[label]}": str(port.inside) for label, port in ports.items() for kind in kinds}


def explain_port(label: str, port: Port) -> Iterator[str]:
    """Warn about a port on a loopback address: nspawn maps ports at the host's other addresses only (measured on
    252, 257 and 262)."""
    if port.host_ip.startswith("127.") or port.host_ip == "::1":
        yield (
            f"The port {label!r} cannot be reached at {port.host_ip}:{port.host}: systemd-nspawn maps ports at "
            "the host's other addresses only. Bridge mode has no such limit."
        )


NO_ADDRESS = "The container has no address after {limit:g} s: "
LATE_ADDRESS = (
    ' A service with address_mode = "driver" is registered only if the address is there within address_timeout, '
    "here {limit:g} s."
)


def explain_no_address(mode: NetworkMode, is_booted: bool, have_networkd: bool) -> str:
    """Say why a container may have no address."""
    if mode is NetworkMode.VETH and not have_networkd:
        return (
            "systemd-networkd, which gives out addresses on the host's end of its link, does not run on this host "
            "(systemctl enable --now systemd-networkd); or use bridge mode, network_address or "
            "network_veth = false."
        )
    if not is_booted:
        return (
            "a command has no DHCP client beside it; use bridge mode, network_address, network_veth = false "
            "or boot = true."
        )
    if mode is NetworkMode.VETH:
        return "is a DHCP client, such as systemd-networkd, enabled in the image?"
    return "is a DHCP client enabled in the image, and does a DHCP server answer on that network?"


NETWORKD_IS_ACTIVE = "/run/systemd/units/invocation:systemd-networkd.service"  # a symbolic link to nowhere


def have_networkd() -> bool:
    """Whether systemd-networkd runs. If only its socket is active, the first link of a container starts it."""
    return os.path.lexists(NETWORKD_IS_ACTIVE)


NAT_ELEMENT = re.compile(r"\S+ \. (\d+) : [0-9a-f.:]+ \. (\d+)")  # of nspawn's map: `6 . 8080 : 10.0.0.2 . 80`


def find_port_maps(text: str, ports: Sequence[tuple[int, int]]) -> list[str]:
    """Return the elements for `ports` in nspawn's nftables map. `ports` are pairs: on the host, and inside."""
    return [match[0] for match in NAT_ELEMENT.finditer(text) if (int(match[1]), int(match[2])) in ports]


def plan_name_files(
    group: GroupNetwork, options: JobOptions, names: NetworkInputs, machine: str
) -> dict[str, str]:
    """Return the name files that the driver has to make: /etc/resolv.conf for a dns block, /etc/hosts for
    extra_hosts, and both for a group's network (the first only if resolv_conf is unset or auto). Leaves out what
    the job's binds cover, and what cannot be mounted, unless dns or extra_hosts asks for it."""
    policy = options.resolv_conf
    files = {}
    if not group.dns.is_empty or (group.namespace and policy in (None, "auto")):
        files["/etc/resolv.conf"] = render_resolv_conf(names.resolv_conf, group.dns)
    if group.namespace or options.extra_hosts:
        own = names.addresses or ("127.0.1.1",)
        lines = [f"{address} {options.hostname or machine}" for address in own]
        files["/etc/hosts"] = render_hosts(names.hosts, [*lines, *options.extra_hosts])
    mounted = {mount.target.rstrip("/") for mount in options.binds}
    asked = {"/etc/resolv.conf": not group.dns.is_empty, "/etc/hosts": bool(options.extra_hosts)}
    return {
        path: text
        for path, text in files.items()
        if not mounted & {path, "/etc", ""} and (asked[path] or path not in names.missing)
    }


def render_resolv_conf(host: str, dns: Dns) -> str:
    """Return a resolv.conf with the group's dns block. What the block leaves out is the host's."""
    given = {"nameserver": dns.servers, "search": dns.searches, "options": dns.options}
    lines = []
    for name, values in given.items():
        words = values or tuple(find_resolv_conf(host, name))
        if name == "nameserver":
            lines += [f"nameserver {server}" for server in words]
        elif words:
            lines.append(f"{name} {' '.join(words)}")
    return "".join(f"{line}\n" for line in lines)


def find_resolv_conf(text: str, name: str) -> list[str]:
    """Return the words after `name` in all lines of a resolv.conf that begin with it. Of several search lines the
    last counts, as for the resolver."""
    found = [line.split()[1:] for line in text.split("\n") if line.split()[:1] == [name]]
    return found[-1] if name == "search" and found else [word for words in found for word in words]


def render_hosts(image: str, own: Sequence[str]) -> str:
    """Return the image's hosts file, with the lines `own` in place of its lines for their names, and localhost."""
    names = {name for line in own for name in line.split()[1:]}
    lines = [line for line in filter(None, image.split("\n")) if not names & set(line.split("#")[0].split()[1:])]
    if not any("localhost" in line.split("#")[0].split()[1:] for line in lines):
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback", *lines]
    return "".join(f"{line}\n" for line in (*lines, *own))


def explain_dns(group: GroupNetwork, options: JobOptions, files: Mapping[str, str]) -> Iterator[str]:
    """Warn if the driver's resolv.conf overrides an option, or names only servers out of reach."""
    policy, text = options.resolv_conf, files.get("/etc/resolv.conf")
    if text is None:
        return
    if policy not in (None, "auto", "off"):
        yield f"/etc/resolv.conf comes from the group's dns block; resolv_conf = {json.dumps(policy)} is ignored."
    servers = find_resolv_conf(text, "nameserver")
    if group.namespace and servers and all(server.startswith(("127.", "::1")) for server in servers):
        yield (
            f"The host's name server {servers[0]} cannot be reached from the group's network: name one in the "
            "group's dns block."
        )


DHCP_CLIENT = re.compile(r"(?:^|[\s;&|(/])(dhclient|udhcpc|dhcpcd)(?=$|[\s;&|)])")
SHELLS = ("sh", "ash", "bash", "dash")


def explain_dhcp(group: GroupNetwork, options: JobOptions) -> Iterator[str]:
    """Warn about a DHCP client in the group's network: it may not change the interface, and often says nothing."""
    may_change = not options.user_namespacing and not {"CAP_NET_ADMIN", "all"}.isdisjoint(options.capability)
    if not group.namespace or options.boot or not options.command or may_change:
        return
    program, *arguments = options.command
    texts = [program, *(arguments if os.path.basename(program) in SHELLS else [])]
    found = next((match for text in texts if (match := DHCP_CLIENT.search(text))), None)
    if found:
        yield (
            f"The command calls {found[1]}, which fails here: the group's network has its address already, and "
            f"root inside cannot change it. Leave {found[1]} out."
        )


RESOLV_CONF_PATHS = (
    "/etc/resolv.conf",
    "/run/systemd/resolve/resolv.conf",
    "/run/NetworkManager/no-stub-resolv.conf",
)


def read_resolv_conf(paths: Sequence[str] = RESOLV_CONF_PATHS) -> str:
    """Return the host's resolv.conf, "" without one. Only the host can use name servers on its loopback interface
    (systemd-resolved): then return the file with the servers behind them, if there is one."""
    texts = [text for path in paths if (text := read_text(Path(path)))]
    for text in texts:
        servers = find_resolv_conf(text, "nameserver")
        if servers and not all(server.startswith(("127.", "::1")) for server in servers):
            return text
    return texts[0] if texts else ""


def parse_addresses(fib_trie: str, if_inet6: str) -> tuple[str, ...]:
    """Return the addresses that others can reach, IPv4 first, from the texts of two files of /proc/net."""
    found = re.findall(r"\|-- ([\d.]+)\n\s+/32 host LOCAL", fib_trie)
    for line in filter(None, if_inet6.split("\n")):
        # The interface's name comes last. It may contain other characters that Python takes for blanks.
        digits, _, _, scope, flags = line.split(" ")[:5]
        if scope == "00" and not int(flags, 16) & IFA_F_TENTATIVE:
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return tuple(dict.fromkeys(address for address in found if not address.startswith(("127.", "169.254."))))


IFA_F_TENTATIVE = 0x40  # being checked for duplicates, not usable yet


def read_addresses(pid: int) -> tuple[str, ...]:
    """Return the addresses of a process's network namespace, () if the process is gone."""
    return parse_addresses(*(read_text(Path(f"/proc/{pid}/net/{name}")) for name in ("fib_trie", "if_inet6")))


def read_group_addresses(namespace: str) -> tuple[str, ...]:
    """Return the addresses of a group's namespace. Leaves its thread there, see read_names. Raises OSError."""
    with open(namespace, "rb") as file:
        call_libc("setns", file.fileno(), CLONE_NEWNET)
    return parse_addresses(
        *(read_text(Path(f"/proc/thread-self/net/{name}")) for name in ("fib_trie", "if_inet6"))
    )


def read_names(group: GroupNetwork, image: Image, options: JobOptions) -> NetworkInputs:
    """Read what the container's name files are made from, if the driver makes any. Leaves its thread in the
    group's network: for `run_in_thread`. Raises OSError."""
    if options.network_address:
        inputs = NetworkInputs(has_networkd=starts_networkd(options, image))
    else:
        inputs = NetworkInputs(expects_address=is_address_expected(group, options, image))
    if not group.namespace and group.dns.is_empty and not options.extra_hosts:
        return inputs
    return replace(
        inputs,
        resolv_conf=read_resolv_conf(),
        hosts=read_in_image(image, f"{options.root}/etc/hosts"),
        addresses=read_group_addresses(group.namespace) if group.namespace else (),
        missing=frozenset(path for path in NAME_FILES if not can_mount_file(image, options, path)),
    )


def can_mount_file(image: Image, options: JobOptions, path: str) -> bool:
    """Whether there is a file to mount on, or nspawn or make_mount_file can make one. Looks only into a read-only
    image. An image of several layers always gets a private root, where one can be made."""
    if not options.has_read_only_root or image.layers:
        return True
    if not image.is_directory:
        return False  # not mounted yet, so not known
    folder, name = os.path.split(options.root + path)
    with contextlib.suppress(OSError), open_directory(image.opened, folder) as fd:
        try:
            os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return os.fstatvfs(fd).f_flag & os.ST_RDONLY == 0
        return True
    return False


def check_interfaces(options: JobOptions) -> None:
    """Refuse interfaces that the host does not have: for network_interface nspawn 257 and 262 do not tell."""
    for option in MODE_OPTIONS[NetworkMode.INTERFACE]:
        for item in getattr(options, option):
            name = item.partition(":")[0]
            try:
                socket.if_nametoindex(name)
            except OSError as error:
                check_shortage(error)
                rule = "the host has no interface of this name"
                raise ConfigError(option, name, rule, "`ip link` on the host lists them") from None


NS_GET_NSTYPE = 0xB703  # ioctl: return the kind of a namespace


def check_namespace(path: str) -> None:
    """Raise HostError unless there is a network namespace at `path`."""
    try:
        with open(path, "rb") as file:
            kind = fcntl.ioctl(file, NS_GET_NSTYPE)
    except OSError as error:
        check_shortage(error)
        gone = "is not there" if error.errno == errno.ENOENT else "is no network namespace"
        raise HostError(
            f"the network namespace of the group, {shorten(path)}, {gone}; the task is not started"
        ) from None
    if kind != CLONE_NEWNET:
        raise HostError(f"{shorten(path)} is a namespace, but not of a network; the task is not started")
