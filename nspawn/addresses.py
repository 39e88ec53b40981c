# SPDX-License-Identifier: MPL-2.0
"""Fixed addresses: which interface of a container gets them, and how it has them before its payload runs.

nspawn makes the interfaces and then starts the payload at once. So the payload is held, as for sysctl: its cgroup
is frozen when nspawn moves the container's first process there, which is after all interfaces are made (measured
on 252, 257 and 262). The process goes on when the host's `ip` has set the addresses.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv6Interface

from nspawn.cgroup import read_members
from nspawn.checks import Address, Interface
from nspawn.common import ConfigError, HostError, shorten
from nspawn.files import find_tool
from nspawn.job import JobOptions
from nspawn.process import run_program


@dataclass(frozen=True)
class FixedLink:
    """An interface of a container with what a job fixes of it."""

    interface: str  # its name in the container
    network: str = ""  # the host's interface that it leads to, "" for a link to the host itself
    is_zone: bool = False  # that is the bridge of a zone
    addresses: tuple[Interface, ...] = ()
    gateways: tuple[Address, ...] = ()
    mac: str = ""

    @property
    def address(self) -> str:
        """What services are registered under, "" if only the MAC address is fixed."""
        return str(self.addresses[0].ip) if self.addresses else ""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """What no two tasks of a host may share: a network, and an address in it."""
        return tuple((self.network, str(address.ip)) for address in self.addresses)


LINK_OPTIONS = ("network_address", "network_gateway", "network_mac")


def show(value: object) -> object:
    """Return how a sentence shows a value of LINK_OPTIONS."""
    return [str(item) for item in value] if isinstance(value, tuple) else value


def find_link(options: JobOptions) -> FixedLink:
    """Return the interface that gets a job's addresses, without them. If there are several, it is the one that
    NetworkMode is about, and the first of a list."""
    if options.network_bridge:
        return FixedLink("host0", options.network_bridge)
    lists = (("mv-", options.network_macvlan), ("iv-", options.network_ipvlan), ("", options.network_interface))
    for prefix, items in lists:
        for item in items:
            host, _, inside = item.partition(":")
            return FixedLink(inside or f"{prefix}{host}", host)
    if options.network_zone:
        return FixedLink("host0", f"vz-{options.network_zone}", is_zone=True)
    return FixedLink("host0")


def plan_fixed_link(options: JobOptions) -> FixedLink | None:
    """Return what a job fixes, None if it fixes nothing."""
    if not (options.network_address or options.network_mac):
        return None
    return replace(
        find_link(options),
        addresses=options.network_address,
        gateways=options.network_gateway,
        mac=options.network_mac or "",
    )


def needs_host_end(options: JobOptions) -> bool:
    """Whether the driver gives an address to the host's end of a container's link, too."""
    return bool(options.network_address) and not find_link(options).network


def check_fixed(options: JobOptions) -> None:
    """Refuse fixed addresses that cannot work. Raises ConfigError."""
    if options.network_mac:
        check_mac_place(options)
    for gateway in options.network_gateway:
        if not any(is_gateway(gateway, address) for address in options.network_address):
            rule = "must be another address in the network of network_address"
            raise ConfigError("network_gateway", str(gateway), rule, 'as 10.0.0.1 is for "10.0.0.7/24"')
    versions = [gateway.version for gateway in options.network_gateway]
    if len(set(versions)) < len(versions):
        shown = show(options.network_gateway)
        raise ConfigError("network_gateway", shown, "names two gateways of one kind", "name one of each")
    for address in options.network_address if needs_host_end(options) else ():
        if not any(is_gateway(gateway, address) for gateway in options.network_gateway):
            rule = "needs an address in the same network for the host's end of the link"
            raise ConfigError("network_address", str(address), rule, "name it in network_gateway")


def check_mac_place(options: JobOptions) -> None:
    if options.network_bridge or options.network_macvlan:
        return
    if options.network_ipvlan or options.network_interface:
        rule = "is for interfaces that are made for the container, with a MAC address of their own"
        raise ConfigError("network_mac", options.network_mac, rule, "use network_macvlan or network_bridge")


def is_gateway(gateway: Address, address: Interface) -> bool:
    return gateway in address.network and gateway != address.ip


def check_ip(options: JobOptions) -> None:
    """Raise HostError if the host cannot fix what a job fixes."""
    if plan_fixed_link(options) and not find_tool("ip"):
        raise HostError("network_address and network_mac need `ip` on the client: install the package iproute2")


def plan_inside(link: FixedLink) -> Iterator[tuple[str, ...]]:
    """Yield arguments of `ip`, for the container's network."""
    if link.mac:
        yield "link", "set", "dev", link.interface, "address", link.mac
    for address in link.addresses:
        # networkd 252 would set an address without a broadcast address again and again.
        broadcast = ("broadcast", "+") if address.version == 4 and address.network.num_addresses > 2 else ()
        yield "address", "add", str(address), *broadcast, "dev", link.interface, *no_check(address)
    if link.addresses:
        yield "link", "set", "dev", link.interface, "up"
    for gateway in link.gateways:
        route = ("default", "via", str(gateway), "dev", link.interface, "proto", "static")  # as networkd's own
        yield f"-{gateway.version}", "route", "add", *route


def plan_outside(link: FixedLink, host_end: str) -> Iterator[tuple[str, ...]]:
    """Yield arguments of `ip`, for the host's network. Nobody else may set up the host's end of a link, or the
    bridge of a zone: without systemd-networkd they stay down."""
    if not link.addresses:
        return
    if link.is_zone:
        yield "link", "set", "dev", link.network, "up"
    if link.network:
        return
    yield "link", "set", "dev", host_end, "up"
    for address in link.addresses:
        for gateway in link.gateways:
            if is_gateway(gateway, address):  # a route to this container alone: others may have the same gateway
                ends = (str(gateway), "peer", str(address.ip))
                yield "address", "add", *ends, "dev", host_end, *no_check(address)


def no_check(address: Interface) -> tuple[str, ...]:
    """Return what makes an IPv6 address usable at once, and not after a second."""
    return ("nodad",) if isinstance(address, IPv6Interface) else ()


def render_networkd(link: FixedLink) -> str:
    """Return a file for systemd-networkd in the container. Without one it asks for an address by DHCP, and 257 and
    262 remove the addresses that they find."""
    lines = ["[Match]", f"Name={link.interface}", "", "[Network]"]
    lines += [f"Address={address}" for address in link.addresses]
    lines += [f"Gateway={gateway}" for gateway in link.gateways]
    return "".join(f"{line}\n" for line in lines)


def set_addresses(payload: str, link: FixedLink, host_end: str) -> None:
    """Set the addresses of a container whose payload is held. Blocks. Raises HostError or OSError."""
    namespace = open_network(payload)
    try:
        for words in plan_inside(link):
            run_ip(["nsenter", f"--net=/proc/self/fd/{namespace}", "--", "ip", *words], namespace)
    finally:
        os.close(namespace)
    for words in plan_outside(link, host_end):
        run_ip(["ip", *words])


def open_network(payload: str) -> int:
    """Return a descriptor of the network namespace of a held payload, never of the host's. Raises HostError."""
    for pid in read_members(payload):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            is_hosts = os.path.samestat(os.stat(fd), os.stat("/proc/self/ns/net"))
            if not is_hosts and pid in read_members(payload):  # else the number may be another process's by now
                return fd
            os.close(fd)
    raise HostError("network_address: the container's network cannot be found")


def run_ip(argv: Sequence[str], namespace: int | None = None) -> None:
    status, said = run_program(argv, b"", pass_fds=() if namespace is None else (namespace,))
    if status:
        command = shorten(" ".join(argv[argv.index("ip") :]))
        raise HostError(f"network_address or network_mac cannot be set: `{command}` says: {shorten(said)}")
