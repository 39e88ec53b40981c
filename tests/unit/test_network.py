# SPDX-License-Identifier: MPL-2.0
"""Network: what is planned, read and said of it. No container is started; test_reach.py does."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nspawn.addresses import plan_inside, plan_outside
from nspawn.common import ConfigError, HostError
from nspawn.images import Image, enables_unit, read_in_image
from nspawn.job import Dns, GroupNetwork, Port, state_directory
from nspawn.network import (
    NAME_FILES,
    NETWORKD_FILE,
    NetworkInputs,
    NetworkMode,
    can_mount_file,
    check_namespace,
    explain_no_address,
    find_port_maps,
    is_address_expected,
    parse_addresses,
    plan_name_files,
    plan_network,
    read_resolv_conf,
    render_resolv_conf,
)
from nspawn.roots import make_mount_file
from tests.options import read_options
from tests.unit.test_plan import ALLOC, AUTO, BOOT, BUNDLE, HEAD, TASK, USERS, VOLUMES, command, plan

GROUP = GroupNetwork(namespace=f"/var/run/netns/{ALLOC}")


# -- the plan ------------------------------------------------------------------------------------------------


def test_group_is_entered_before_the_shim_and_nspawn_knows_no_network() -> None:
    found = plan({}, task=replace(TASK, network=GROUP))
    assert found.argv == (
        *HEAD,
        *BOOT[:-1],
        "--resolv-conf=off",
        *VOLUMES,
        RESOLV_CONF_MOUNT,
        HOSTS_MOUNT,
        AUTO[0],
        BUNDLE,
    )
    assert found.network.entry[:3] == ("nsenter", f"--net={GROUP.namespace}", "--")
    assert plan({}).network.entry == ()


def test_group_keeps_user_namespaces() -> None:
    assert set(USERS) <= set(plan({}, task=replace(TASK, network=GROUP)).argv)


def test_group_without_user_namespaces_is_left_as_it_is() -> None:
    found = plan({"user_namespacing": False}, task=replace(TASK, network=GROUP))
    assert found.network.entry == ("nsenter", f"--net={GROUP.namespace}", "--")


def test_dhcp_client_in_a_group_is_told() -> None:
    words = command("/bin/sh", "-c", "dhclient && nginx")
    (note,) = plan(words, task=replace(TASK, network=GROUP)).notes
    assert "The command calls dhclient, which fails here" in note
    assert plan(words).notes == plan(command("nginx"), task=replace(TASK, network=GROUP)).notes == ()


def test_group_maps_ports_itself() -> None:
    network = replace(GROUP, ports={"http": Port(20080, 80)})
    argv = plan({"ports": ["http"]}, task=replace(TASK, network=network)).argv
    assert not [word for word in argv if word.startswith("--port")]


def test_variables_tell_the_port_inside() -> None:
    ports = {"http-alt": Port(20080), "db": Port(20432, 5432)}
    found = plan_network(
        GroupNetwork(ports=ports), read_options(port_map=[{"http-alt": 80}]), NetworkInputs(), "m"
    )
    assert found.environ == {"NOMAD_PORT_http_alt": "80", "NOMAD_ALLOC_PORT_http_alt": "80"}
    task = replace(TASK, network=GroupNetwork(ports=ports), env={"NOMAD_PORT_http_alt": "20080"})
    bundle = plan({"port_map": [{"http-alt": 80}]}, task=task).bundle
    assert '"NOMAD_PORT_http_alt=80"' in bundle and '=20080"' not in bundle


@pytest.mark.parametrize(
    ("host_ip", "told"), [("127.0.0.1", True), ("::1", True), ("192.0.2.2", False), ("", False)]
)
def test_port_on_loopback_is_told(host_ip: str, told: bool) -> None:
    network = GroupNetwork(ports={"http": Port(20080, host_ip=host_ip)})
    notes = plan({"port_map": [{"http": 80}]}, task=replace(TASK, network=network)).notes
    assert [host_ip in note and "'http'" in note for note in notes] == [True] * told


# -- names ---------------------------------------------------------------------------------------------------

HOST_RESOLV_CONF = (
    "# made by hand\nnameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch example.com\noptions edns0\n"
)
LOCALHOST = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
STATE_DIR = state_directory(TASK.id)
RESOLV_CONF_MOUNT = f"--bind-ro={STATE_DIR}/etc/resolv.conf:/etc/resolv.conf"
HOSTS_MOUNT = f"--bind-ro={STATE_DIR}/etc/hosts:/etc/hosts"


@pytest.mark.parametrize(
    ("dns", "text"),
    [
        (Dns(), HOST_RESOLV_CONF.partition("\n")[2]),
        (
            Dns(servers=("10.0.0.1",)),
            "nameserver 10.0.0.1\nsearch example.com\noptions edns0\n",
        ),
        (
            Dns(("10.0.0.1", "fd00::1"), ("a.example", "b.example"), ("ndots:2", "timeout:1")),
            "nameserver 10.0.0.1\nnameserver fd00::1\nsearch a.example b.example\noptions ndots:2 timeout:1\n",
        ),
        (
            Dns(searches=("a.example",)),
            "nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch a.example\noptions edns0\n",
        ),
    ],
)
def test_resolv_conf(dns: Dns, text: str) -> None:
    assert render_resolv_conf(HOST_RESOLV_CONF, dns) == text


def test_last_search_line_counts() -> None:
    assert render_resolv_conf("search a b\nsearch c\nnameserver\n;nameserver 1.1.1.1", Dns()) == "search c\n"


def test_name_server_of_the_hosts_loopback_is_looked_behind(tmp_path: Path) -> None:
    stub, uplink, absent = tmp_path / "stub", tmp_path / "uplink", tmp_path / "absent"
    stub.write_text("nameserver 127.0.0.53\noptions edns0 trust-ad\n")
    uplink.write_text("nameserver 192.0.2.53\n")
    assert read_resolv_conf([str(absent), str(stub), str(uplink)]) == uplink.read_text()
    assert read_resolv_conf([str(stub), str(absent)]) == stub.read_text()
    assert read_resolv_conf([str(uplink), str(stub)]) == uplink.read_text()
    assert read_resolv_conf([str(absent)]) == ""


def test_unreachable_name_server_is_told() -> None:
    found = plan({}, task=replace(TASK, network=GROUP), names=NetworkInputs(resolv_conf="nameserver 127.0.0.53\n"))
    assert [note for note in found.notes if "127.0.0.53" in note and "dns block" in note]


@pytest.mark.parametrize(
    ("image", "addresses", "extra", "text"),
    [
        ("", (), [], f"{LOCALHOST}127.0.1.1 web\n"),
        ("127.0.0.1 localhost\n", ("10.0.0.2", "fd00::2"), [], "127.0.0.1 localhost\n10.0.0.2 web\nfd00::2 web\n"),
        (
            "# localhost\n10.0.0.9 web\n10.0.0.1 db",
            ("10.0.0.2",),
            [],
            f"{LOCALHOST}# localhost\n10.0.0.1 db\n10.0.0.2 web\n",
        ),
        (
            "127.0.0.1 localhost\n10.0.0.1 db # web\n",
            ("10.0.0.2",),
            ["db:fd00::5", "cache.example:10.0.0.6"],
            "127.0.0.1 localhost\n10.0.0.2 web\nfd00::5 db\n10.0.0.6 cache.example\n",
        ),
    ],
)
def test_hosts(image: str, addresses: tuple[str, ...], extra: list[str], text: str) -> None:
    names = NetworkInputs(hosts=image, addresses=addresses)
    files = plan_name_files(GROUP, read_options(extra_hosts=extra), names, "web")
    assert files["/etc/hosts"] == text


@pytest.mark.parametrize(
    ("options", "network", "mounts", "argument"),
    [
        ({}, GROUP, [RESOLV_CONF_MOUNT, HOSTS_MOUNT], "--resolv-conf=off"),
        ({"resolv_conf": "auto"}, GROUP, [RESOLV_CONF_MOUNT, HOSTS_MOUNT], "--resolv-conf=off"),
        ({"resolv_conf": "copy-host"}, GROUP, [HOSTS_MOUNT], "--resolv-conf=copy-host"),
        ({"resolv_conf": "off"}, GROUP, [HOSTS_MOUNT], "--resolv-conf=off"),
        ({}, GroupNetwork(), [], "--resolv-conf=auto"),
        ({}, GroupNetwork(dns=Dns(("10.0.0.1",))), [RESOLV_CONF_MOUNT], "--resolv-conf=off"),
        (
            {"resolv_conf": "copy-host", "network_veth": False},
            GroupNetwork(dns=Dns(("10.0.0.1",))),
            [RESOLV_CONF_MOUNT],
            "--resolv-conf=off",
        ),
        ({"bind": [{"/srv/etc": "/etc/"}]}, GROUP, [], "--resolv-conf=auto"),
        ({"extra_hosts": ["db:192.0.2.7"]}, GroupNetwork(), [HOSTS_MOUNT], "--resolv-conf=auto"),
        (
            {"bind_read_only": [{"/srv/hosts": "/etc/hosts:noidmap"}]},
            GROUP,
            [RESOLV_CONF_MOUNT],
            "--resolv-conf=off",
        ),
    ],
)
def test_name_files(options: dict[str, Any], network: GroupNetwork, mounts: list[str], argument: str) -> None:
    argv = plan(options, task=replace(TASK, network=network)).argv
    assert [word for word in argv if word.startswith(f"--bind-ro={STATE_DIR}/etc/")] == mounts
    assert [word for word in argv if word.startswith("--resolv-conf")] == [argument]


def test_name_files_an_image_has_no_place_for() -> None:
    """Nobody asked for them, so that is no reason not to start; a dns block is one."""
    names = NetworkInputs(missing=frozenset(NAME_FILES))
    assert plan({"read_only": True}, task=replace(TASK, network=GROUP), names=names).network.files == {}
    network = replace(GROUP, dns=Dns(("10.0.0.1",)))
    files = plan({"read_only": True}, task=replace(TASK, network=network), names=names).network.files
    assert list(files) == ["/etc/resolv.conf"]
    files = plan({"read_only": True, "extra_hosts": ["db:192.0.2.7"]}, names=names).network.files
    assert list(files) == ["/etc/hosts"]


@pytest.mark.parametrize(
    "item", ["db", "db:", ":192.0.2.7", "db:192.0.2", "d b:192.0.2.7", "db:1.2.3.4\nx", "a\nb:1.2.3.4"]
)
def test_extra_host_is_a_name_and_an_address(item: str) -> None:
    with pytest.raises(ConfigError, match="must be NAME:ADDRESS"):
        read_options(extra_hosts=[item])


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("500ms", 0.5), ("1.5s", 1.5), ("2m", 120), ("1h", 3600), ("", 0), (None, 0)]
)
def test_address_timeout(text: str | None, seconds: float) -> None:
    assert plan({"address_timeout": text}).network.address_timeout == pytest.approx(seconds)


def test_start_waits_for_an_address_that_is_expected() -> None:
    names = NetworkInputs(expects_address=True)
    assert plan({}, names=names).network.address_timeout == 10
    for text, seconds in (("0s", 0), ("1m", 60)):
        assert plan({"address_timeout": text}, names=names).network.address_timeout == seconds


UNIT = "systemd-networkd.service"


def test_address_is_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, running = Image(tmp_path, is_directory=True), tmp_path / "running"
    monkeypatch.setattr("nspawn.network.NETWORKD_IS_ACTIVE", str(running))

    def is_expected(image: Image = image, group: GroupNetwork = TASK.network, **options: object) -> bool:
        return is_address_expected(group, read_options(**options), image)

    wants = tmp_path / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    running.symlink_to("nowhere")
    assert not is_expected(), "the image has no networkd enabled"
    (wants / UNIT).symlink_to(f"/lib/systemd/system/{UNIT}")
    assert is_expected()
    assert is_expected(network_zone="web", network_veth=False)
    assert not is_expected(group=GROUP)
    assert not is_expected(boot=False, command=["/bin/true"])
    assert not is_expected(network_veth=False)
    assert not is_expected(volatile="yes")
    assert not is_expected(replace(image, is_directory=False))
    (tmp_path / "etc/systemd/system" / UNIT).symlink_to("/dev/null")
    assert not is_expected(), "it is masked"
    (tmp_path / "etc/systemd/system" / UNIT).unlink()
    running.unlink()
    assert not is_expected(), "nobody on the host gives out addresses"
    assert is_expected(network_bridge="br0", network_veth=False), "somebody on the bridge does"


def test_unit_of_an_image_of_layers(tmp_path: Path) -> None:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for layer in (upper, lower):
        (layer / "usr/lib/systemd/system/multi-user.target.wants").mkdir(parents=True)
    image = Image(tmp_path, is_directory=True, layers=(upper, lower))
    wants = f"usr/lib/systemd/system/multi-user.target.wants/{UNIT}"
    assert not enables_unit(image, "", UNIT)
    (lower / wants).symlink_to(f"../{UNIT}")
    assert enables_unit(image, "", UNIT)
    (upper / wants).mkdir()  # anything but a link hides it
    assert not enables_unit(image, "", UNIT)


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (["dhclient", "-v"], "dhclient"),
        (["/sbin/dhcpcd"], "dhcpcd"),
        (["/bin/bash", "-c", "dhclient && nginx && tail -f /dev/null"], "dhclient"),
        (["sh", "-c", "set -e; /sbin/udhcpc -i eth0\nexec web"], "udhcpc"),
        (["sh", "-c", "echo no-dhclient; cat dhclient.conf"], ""),
        (["/bin/web", "dhclient"], ""),
    ],
)
def test_dhcp_client_in_a_group(command: list[str], program: str) -> None:
    """Its interface belongs to Nomad."""
    options = {"boot": False, "command": command}
    notes = plan(options, task=replace(TASK, network=GROUP)).notes
    told = [note for note in notes if "has its address already" in note]
    assert len(told) == bool(program) and program in "".join(told)
    assert not any("has its address" in note for note in plan(options).notes)


@pytest.mark.parametrize("text", ["5", "s", "-1s", "1 s", "1d", "5s\n", "٣s"])
def test_address_timeout_is_a_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a duration"):
        read_options(address_timeout=text)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, NetworkMode.VETH),
        ({"network_veth": False}, NetworkMode.HOST),
        ({"private_network": True}, NetworkMode.NONE),
        ({"network_zone": "web"}, NetworkMode.VETH),
        ({"network_bridge": "br0"}, NetworkMode.BRIDGE),
        ({"network_macvlan": ["eth0"]}, NetworkMode.INTERFACE),
        ({"network_macvlan": ["eth0"], "network_veth": True}, NetworkMode.INTERFACE),
        ({"network_ipvlan": ["eth0"]}, NetworkMode.INTERFACE),
        ({"network_interface": ["eth1"]}, NetworkMode.INTERFACE),
        ({"network_veth_extra": ["ve-db:db0"]}, NetworkMode.NONE),
    ],
)
def test_mode(options: dict[str, Any], mode: NetworkMode) -> None:
    assert plan(options).network.mode is mode


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("port_map", [{"http": 80}]),
        ("private_network", True),
        ("network_zone", "web"),
        ("network_bridge", "br0"),
        ("network_veth_extra", ["ve-db:db0"]),
        ("network_macvlan", ["eth0"]),
        ("network_ipvlan", ["eth0"]),
        ("network_interface", ["eth1"]),
        ("network_address", ["10.0.0.7/24"]),
        ("network_gateway", ["10.0.0.1"]),
        ("network_mac", "02:00:00:00:00:07"),
    ],
)
def test_second_network_beside_the_groups_is_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{option} = .* cannot be combined with the network of the group; "):
        plan({option: value}, task=replace(TASK, network=GROUP))


def test_ignored_policy_is_told() -> None:
    task = replace(TASK, network=GroupNetwork(dns=Dns(("10.0.0.1",))))
    assert "copy-host" in " ".join(plan({"resolv_conf": "copy-host"}, task=task).notes)
    assert plan({"resolv_conf": "off"}, task=task).notes == ()


def test_image_is_read_without_following_links(tmp_path: Path) -> None:
    """A container that may write to its image can make any link in it; root must not follow."""
    image = Image(tmp_path / "image", is_directory=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/hosts").write_text("secret")
    (image.path / "etc").mkdir(parents=True)
    hosts = image.path / "etc/hosts"
    hosts.write_text("10.0.0.1 db\n")
    assert read_in_image(image, "/etc/hosts") == "10.0.0.1 db\n"
    hosts.unlink()
    hosts.symlink_to(tmp_path / "outside/hosts")
    assert read_in_image(image, "/etc/hosts") == ""
    hosts.unlink()
    os.mkfifo(hosts)
    assert read_in_image(image, "/etc/hosts") == ""
    hosts.unlink()
    hosts.parent.rmdir()
    hosts.parent.symlink_to(tmp_path / "outside")
    assert read_in_image(image, "/etc/hosts") == ""
    with pytest.raises(ConfigError, match=r"/etc/resolv\.conf"):
        make_mount_file(image.path, "/etc/resolv.conf")
    assert os.listdir(tmp_path / "outside") == ["hosts"]
    assert read_in_image(replace(image, is_directory=False), "/etc/hosts") == ""


def test_place_for_a_file(tmp_path: Path) -> None:
    image = Image(tmp_path, is_directory=True)
    read_only = read_options(read_only=True)
    assert not can_mount_file(image, read_only, "/etc/hosts")
    assert can_mount_file(image, read_options(), "/etc/hosts"), "nspawn makes it"
    (tmp_path / "etc").mkdir()
    assert can_mount_file(image, read_only, "/etc/hosts")
    make_mount_file(image.path, "/etc/hosts")
    make_mount_file(image.path, "/etc/hosts")
    assert (tmp_path / "etc/hosts").read_text() == ""
    (tmp_path / "inner/etc").mkdir(parents=True)
    pivot = read_options(read_only=True, pivot_root="/inner:/old")
    assert can_mount_file(image, pivot, "/etc/hosts")
    assert not can_mount_file(replace(image, is_directory=False), read_only, "/etc/hosts")
    layers = replace(image, path=tmp_path / "inner", layers=(tmp_path / "inner", tmp_path))
    assert can_mount_file(layers, read_only, "/srv/file"), "in the private root"
    with pytest.raises(ConfigError):
        make_mount_file(tmp_path, "/srv/file")
    make_mount_file(tmp_path, "/srv/file", is_private=True)
    assert (tmp_path / "srv/file").read_text() == ""


FIB_TRIE = """\
Local:
  +-- 0.0.0.0/0 3 0 5
     |-- 10.0.0.2
        /32 host LOCAL
     +-- 127.0.0.0/8 2 0 2
           |-- 127.0.0.1
              /32 host LOCAL
        |-- 127.255.255.255
           /32 link BROADCAST
     |-- 169.254.7.9
        /32 host LOCAL
     |-- 10.0.0.2
        /32 host LOCAL
"""
IF_INET6 = """\
00000000000000000000000000000001 01 80 10 80       lo
fd000000000000000000000000000002 02 40 00 80     eth0
fd000000000000000000000000000003 02 40 00 40     eth0
fe8000000000000000fc00fffe000001 02 40 20 80     eth0
"""


def test_addresses() -> None:
    assert parse_addresses(FIB_TRIE, IF_INET6) == ("10.0.0.2", "fd00::2")
    assert parse_addresses("", "") == ()


def test_check_namespace() -> None:
    check_namespace("/proc/self/ns/net")
    with pytest.raises(HostError):
        check_namespace("/etc")


# -- what is told of addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "booted", "networkd", "words"),
    [
        (NetworkMode.VETH, True, False, "systemctl enable --now systemd-networkd"),
        (NetworkMode.VETH, False, False, "systemctl enable --now systemd-networkd"),
        (NetworkMode.VETH, True, True, "DHCP client"),
        (NetworkMode.VETH, False, True, "a command has no DHCP client"),
        (NetworkMode.BRIDGE, True, False, "a DHCP server answer on that network"),
        (NetworkMode.INTERFACE, False, False, "a command has no DHCP client"),
    ],
)
def test_missing_address_is_explained(mode: NetworkMode, booted: bool, networkd: bool, words: str) -> None:
    assert words in explain_no_address(mode, booted, networkd)


NFT = """\
table ip io.systemd.nat {
    map map_port_ipport {
        type inet_proto . inet_service : ipv4_addr . inet_service
        elements = { 6 . 8080 : 192.168.233.150 . 80, tcp . 8081 : 192.168.233.150 . 80,
                 17 . 8080 : 192.168.233.150 . 80, 6 . 8080 : 192.168.233.151 . 81 }
    }
}
"""


def test_port_maps_are_found() -> None:
    assert find_port_maps(NFT, [(8080, 80)]) == [
        "6 . 8080 : 192.168.233.150 . 80",
        "17 . 8080 : 192.168.233.150 . 80",
    ]
    assert find_port_maps(NFT, [(8080, 82)]) == []


# -- fixed addresses -----------------------------------------------------------------------------------------

FOUR, BOTH, MAC = ["10.0.0.7/24"], ["10.0.0.7/24", "fd00::7/64"], "02:00:00:00:00:07"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network_veth": False}, 'network_address = ["10.0.0.7/24"]: needs a network of the container\'s own; '),
        (
            {"private_network": True},
            'network_address = ["10.0.0.7/24"]: needs an interface, and this network has ',
        ),
        (
            {},
            'network_address = "10.0.0.7/24": needs an address in the same network for the host\'s end of',
        ),
        (
            {"network_gateway": ["10.0.1.1"]},
            'network_gateway = "10.0.1.1": must be another address in the network',
        ),
        (
            {"network_gateway": ["10.0.0.7"]},
            'network_gateway = "10.0.0.7": must be another address in the network',
        ),
        (
            {"network_gateway": ["fd00::1"]},
            'network_gateway = "fd00::1": must be another address in the network of',
        ),
        (
            {"network_address": BOTH, "network_gateway": ["10.0.0.1"]},
            'network_address = "fd00::7/64": needs an address in the same network for the host\'s end of the link',
        ),
        (
            {"network_zone": "web", "network_gateway": ["10.0.0.1", "10.0.0.2"]},
            'network_gateway = ["10.0.0.1", "10.0.0.2"]: names two gateways of one kind; ',
        ),
        (
            {"network_ipvlan": ["eth0"], "network_mac": MAC},
            f'network_mac = "{MAC}": is for interfaces that are made',
        ),
        (
            {"network_interface": ["eth0"], "network_mac": MAC},
            f'network_mac = "{MAC}": is for interfaces that are',
        ),
    ],
)
def test_fixed_address_that_cannot_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan({"network_address": FOUR, **options})
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("options", "interface", "network"),
    [
        ({}, "host0", ""),
        ({"network_zone": "web"}, "host0", "vz-web"),
        ({"network_bridge": "br0", "network_macvlan": ["eth0"]}, "host0", "br0"),
        ({"network_macvlan": ["eth0", "eth1"], "network_veth": True}, "mv-eth0", "eth0"),
        ({"network_macvlan": ["eth0:lan"]}, "lan", "eth0"),
        ({"network_ipvlan": ["eth0"]}, "iv-eth0", "eth0"),
        ({"network_interface": ["eth1"]}, "eth1", "eth1"),
    ],
)
def test_interface_that_gets_the_address(options: dict[str, Any], interface: str, network: str) -> None:
    fixed = plan({"network_address": FOUR, "network_gateway": ["10.0.0.1"], **options}).network.fixed
    assert fixed and (fixed.interface, fixed.network, fixed.address) == (interface, network, "10.0.0.7")
    assert fixed.pairs == ((network, "10.0.0.7"),)


def test_what_ip_does_for_a_fixed_address() -> None:
    options = {"network_address": BOTH, "network_gateway": ["10.0.0.1", "fd00::1"], "network_mac": MAC}
    fixed = plan(options).network.fixed
    assert fixed and [" ".join(words) for words in plan_inside(fixed)] == [
        f"link set dev host0 address {MAC}",
        "address add 10.0.0.7/24 broadcast + dev host0",
        "address add fd00::7/64 dev host0 nodad",
        "link set dev host0 up",
        "-4 route add default via 10.0.0.1 dev host0 proto static",
        "-6 route add default via fd00::1 dev host0 proto static",
    ]
    assert [" ".join(words) for words in plan_outside(fixed, "ve-x")] == [
        "link set dev ve-x up",
        "address add 10.0.0.1 peer 10.0.0.7 dev ve-x",
        "address add fd00::1 peer fd00::7 dev ve-x nodad",
    ]
    only_mac = plan({"network_mac": MAC}).network.fixed
    assert only_mac and list(plan_inside(only_mac)) == [("link", "set", "dev", "host0", "address", MAC)]
    assert list(plan_outside(only_mac, "ve-x")) == []


def test_networkd_of_the_image_is_told_the_address() -> None:
    options = {"network_address": BOTH, "network_gateway": ["10.0.0.1"], "network_zone": "web"}
    found = plan(options, names=NetworkInputs(has_networkd=True))
    head, addresses = "[Match]\nName=host0\n\n[Network]\n", "Address=10.0.0.7/24\nAddress=fd00::7/64\n"
    assert found.network.files == {NETWORKD_FILE: f"{head}{addresses}Gateway=10.0.0.1\n"}
    assert any(word.endswith(f"{NETWORKD_FILE}:{NETWORKD_FILE}") for word in found.argv)
    assert plan(options).network.files == {}
