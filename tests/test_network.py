# SPDX-License-Identifier: MPL-2.0
"""Network: where a container's network comes from, what can be reached, and that nothing is left of it.

The namespaces of groups are made here by hand, as Nomad and CNI make them: with `ip netns`, a veth pair and
addresses.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import driver
from driver import Dns, GroupNetwork, HostError, Image, Names, NetworkMode, Port
from nomad_pb import driver_pb2
from tests.agent import Allocation, DriverError, Plugin, Resources, Task, free_port, launch_like_agent
from tests.agent import Port as GivenPort
from tests.containers import Tasks, eventually, is_alive, keeper, kill, leader, make_small_image, nspawn, output
from tests.leftovers import leftovers, peer, processes
from tests.test_plan import ALLOC, BOOT, HEAD, TASK, USERS, VOLUMES, decode, plan

PATIENCE = 10.0
FOREVER = "while :; do sleep 0.05; done"
GROUP = GroupNetwork(namespace=f"/var/run/netns/{ALLOC}")
numbers = itertools.count(os.getpid() % 60 * 1000)


def values(**options: Any) -> dict[str, Any]:
    return decode(options)


# -- the plan ------------------------------------------------------------------------------------------------


def test_group_is_entered_before_the_keeper_and_nspawn_knows_no_network() -> None:
    found = plan({}, task=replace(TASK, network=GROUP))
    assert found.argv == (*HEAD, *BOOT[:-1], "--resolv-conf=off", *VOLUMES, RESOLV_CONF_MOUNT, HOSTS_MOUNT)
    assert found.network.entry[:3] == ("nsenter", f"--net={GROUP.namespace}", "--")
    assert plan({}).network.entry == ()


def test_group_keeps_user_namespaces() -> None:
    assert set(USERS) <= set(plan({}, task=replace(TASK, network=GROUP)).argv)


def test_group_without_user_namespaces_is_left_as_it_is() -> None:
    found = plan({"user_namespacing": False}, task=replace(TASK, network=GROUP))
    assert found.network.entry == ("nsenter", f"--net={GROUP.namespace}", "--")


def test_group_maps_ports_itself() -> None:
    network = replace(GROUP, ports={"http": Port(20080, 80)})
    argv = plan({"ports": ["http"]}, task=replace(TASK, network=network)).argv
    assert not [word for word in argv if word.startswith("--port")]


def test_variables_tell_the_port_inside() -> None:
    ports = {"http-alt": Port(20080), "db": Port(20432, 5432)}
    found = driver.plan_network(GroupNetwork(ports=ports), values(port_map=[{"http-alt": 80}]), Names(), "m")
    assert found.environ == {"NOMAD_PORT_http_alt": "80", "NOMAD_ALLOC_PORT_http_alt": "80"}
    task = replace(TASK, network=GroupNetwork(ports=ports), env={"NOMAD_PORT_http_alt": "20080"})
    settings = plan({"port_map": [{"http-alt": 80}]}, task=task).settings
    assert settings and "NOMAD_PORT_http_alt=80'" in settings and "=20080'" not in settings


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
STATE_DIR = driver.state_directory(TASK.id)
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
    assert driver.render_resolv_conf(HOST_RESOLV_CONF, dns) == text


def test_last_search_line_counts() -> None:
    assert (
        driver.render_resolv_conf("search a b\nsearch c\nnameserver\n;nameserver 1.1.1.1", Dns()) == "search c\n"
    )


def test_name_server_of_the_hosts_loopback_is_looked_behind(tmp_path: Path) -> None:
    stub, uplink, absent = tmp_path / "stub", tmp_path / "uplink", tmp_path / "absent"
    stub.write_text("nameserver 127.0.0.53\noptions edns0 trust-ad\n")
    uplink.write_text("nameserver 192.0.2.53\n")
    assert driver.read_resolv_conf([str(absent), str(stub), str(uplink)]) == uplink.read_text()
    assert driver.read_resolv_conf([str(stub), str(absent)]) == stub.read_text()
    assert driver.read_resolv_conf([str(uplink), str(stub)]) == uplink.read_text()
    assert driver.read_resolv_conf([str(absent)]) == ""


def test_unreachable_name_server_is_told() -> None:
    found = plan({}, task=replace(TASK, network=GROUP), names=Names(resolv_conf="nameserver 127.0.0.53\n"))
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
    names = Names(hosts=image, addresses=addresses)
    files = driver.plan_name_files(GROUP, values(extra_hosts=extra), names, "web")
    assert files["/etc/hosts"] == text


@pytest.mark.parametrize(
    ("options", "network", "mounts", "argument"),
    [
        ({}, GROUP, [RESOLV_CONF_MOUNT, HOSTS_MOUNT], "--resolv-conf=off"),
        ({"resolv_conf": "auto"}, GROUP, [RESOLV_CONF_MOUNT, HOSTS_MOUNT], "--resolv-conf=off"),
        ({"resolv_conf": "copy-host"}, GROUP, [HOSTS_MOUNT], "--resolv-conf=copy-host"),
        ({"resolv_conf": "off"}, GROUP, [HOSTS_MOUNT], "--resolv-conf=off"),
        ({}, GroupNetwork(), [], None),
        ({}, GroupNetwork(dns=Dns(("10.0.0.1",))), [RESOLV_CONF_MOUNT], "--resolv-conf=off"),
        (
            {"resolv_conf": "copy-host", "network_veth": False},
            GroupNetwork(dns=Dns(("10.0.0.1",))),
            [RESOLV_CONF_MOUNT],
            "--resolv-conf=off",
        ),
        ({"bind": [{"/srv/etc": "/etc/"}]}, GROUP, [], None),
        ({"extra_hosts": ["db:192.0.2.7"]}, GroupNetwork(), [HOSTS_MOUNT], None),
        (
            {"bind_read_only": [{"/srv/hosts": "/etc/hosts:noidmap"}]},
            GROUP,
            [RESOLV_CONF_MOUNT],
            "--resolv-conf=off",
        ),
    ],
)
def test_name_files(
    options: dict[str, Any], network: GroupNetwork, mounts: list[str], argument: str | None
) -> None:
    argv = plan(options, task=replace(TASK, network=network)).argv
    assert [word for word in argv if word.startswith(f"--bind-ro={STATE_DIR}/etc/")] == mounts
    assert [word for word in argv if word.startswith("--resolv-conf")] == ([argument] if argument else [])


def test_name_files_an_image_has_no_place_for() -> None:
    """Nobody asked for them, so that is no reason not to start; a dns block is one."""
    names = Names(missing=frozenset(driver.NAME_FILES))
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
    with pytest.raises(driver.ConfigError, match="must be NAME:ADDRESS"):
        values(extra_hosts=[item])


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("500ms", 0.5), ("1.5s", 1.5), ("2m", 120), ("1h", 3600), ("", 0), (None, 0)]
)
def test_address_timeout(text: str | None, seconds: float) -> None:
    assert plan({"address_timeout": text}).network.address_timeout == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5", "s", "-1s", "1 s", "1d", "5s\n", "٣s"])
def test_address_timeout_is_a_duration(text: str) -> None:
    with pytest.raises(driver.ConfigError, match="must be a duration"):
        values(address_timeout=text)


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
    ],
)
def test_second_network_beside_the_groups_is_refused(option: str, value: object) -> None:
    with pytest.raises(
        driver.ConfigError, match=f"{option} = .* cannot be combined with the network of the group; "
    ):
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
    assert driver.read_in_image(image, values(), "/etc/hosts") == "10.0.0.1 db\n"
    hosts.unlink()
    hosts.symlink_to(tmp_path / "outside/hosts")
    assert driver.read_in_image(image, values(), "/etc/hosts") == ""
    hosts.unlink()
    os.mkfifo(hosts)
    assert driver.read_in_image(image, values(), "/etc/hosts") == ""
    hosts.unlink()
    hosts.parent.rmdir()
    hosts.parent.symlink_to(tmp_path / "outside")
    assert driver.read_in_image(image, values(), "/etc/hosts") == ""
    with pytest.raises(driver.ConfigError, match=r"/etc/resolv\.conf"):
        driver.make_mount_file(image, "/etc/resolv.conf")
    assert os.listdir(tmp_path / "outside") == ["hosts"]
    assert driver.read_in_image(replace(image, is_directory=False), values(), "/etc/hosts") == ""


def test_place_for_a_file(tmp_path: Path) -> None:
    image = Image(tmp_path, is_directory=True)
    read_only = values(read_only=True)
    assert not driver.can_mount_file(image, read_only, "/etc/hosts")
    assert driver.can_mount_file(image, values(), "/etc/hosts"), "nspawn makes it"
    (tmp_path / "etc").mkdir()
    assert driver.can_mount_file(image, read_only, "/etc/hosts")
    driver.make_mount_file(image, "/etc/hosts")
    driver.make_mount_file(image, "/etc/hosts")
    assert (tmp_path / "etc/hosts").read_text() == ""
    (tmp_path / "inner/etc").mkdir(parents=True)
    pivot = values(read_only=True, pivot_root="/inner:/old")
    assert driver.place_in_image(pivot, "/etc/hosts") == "/inner/etc/hosts"
    assert driver.can_mount_file(image, pivot, "/etc/hosts")
    assert not driver.can_mount_file(replace(image, is_directory=False), read_only, "/etc/hosts")


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
    assert driver.parse_addresses(FIB_TRIE, IF_INET6) == ("10.0.0.2", "fd00::2")
    assert driver.parse_addresses("", "") == ()


# -- the namespace -------------------------------------------------------------------------------------------


@dataclass
class Group:
    """A group's network namespace with a veth pair to the host, as the bridge plugin of CNI leaves it."""

    name: str
    address: str  # inside
    gateway: str  # on the host
    link: str  # the host's end

    @property
    def path(self) -> str:
        return f"/var/run/netns/{self.name}"

    @property
    def spec(self) -> driver_pb2.NetworkIsolationSpec:
        return driver_pb2.NetworkIsolationSpec(mode=driver_pb2.NetworkIsolationSpec.GROUP, path=self.path)


def ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=30).stdout.decode()


def links() -> dict[str, int]:
    """The host's interfaces and their numbers. Not from /sys, which may be another network namespace's."""
    return {link["ifname"]: link["ifindex"] for link in json.loads(ip("-json", "link"))}


@contextlib.contextmanager
def make_group() -> Iterator[Group]:
    """Make a group's network; at the end remove it as Nomad does, and see that nothing has kept it."""
    number = next(numbers) * 4 % 65536
    subnet = f"198.18.{number // 256}"
    group = Group(f"grp{number}", f"{subnet}.{number % 256 + 2}", f"{subnet}.{number % 256 + 1}", f"vg{number}")
    ip("netns", "add", group.name)
    try:
        ip("-n", group.name, "link", "set", "lo", "up")
        ip("link", "add", group.link, "type", "veth", "peer", "name", "eth0", "netns", group.name)
        ip("addr", "add", f"{group.gateway}/30", "dev", group.link)
        ip("link", "set", group.link, "up")
        ip("-n", group.name, "addr", "add", f"{group.address}/30", "dev", "eth0")
        ip("-n", group.name, "link", "set", "eth0", "up")
        ip("-n", group.name, "route", "add", "default", "via", group.gateway)
        yield group
    finally:
        ip("netns", "del", group.name)
        with contextlib.suppress(AssertionError):
            eventually(lambda: group.link not in links(), 5)
        kept = group.link in links()
        if kept:
            ip("link", "del", group.link)
        assert not kept, "something still holds the group's namespace"


SERVER = """
use IO::Socket::INET;
$| = 1;
$server = IO::Socket::INET->new(LocalPort => $ARGV[0], Listen => 5, ReuseAddr => 1) or die "cannot listen: $!";
print "listening\\n";
while ($client = $server->accept) { print $client "hello from $ARGV[1]\\n"; close $client }
"""


def serve(port: int, name: str = "task") -> list[str]:
    """A command that answers every connection with a greeting."""
    return ["/usr/bin/perl", "-e", SERVER, str(port), name]


def read_port(address: str, port: int) -> str:
    with socket.create_connection((address, port), PATIENCE) as connection:
        return connection.makefile().read()


@pytest.fixture(scope="module")
def shared(driver_file: Path) -> Iterator[Plugin]:
    with launch_like_agent(driver_file) as plugin:
        yield plugin


@pytest.fixture
def group() -> Iterator[Group]:
    with make_group() as made:
        yield made


@pytest.fixture
def small(image: Path, tmp_path: Path) -> Path:
    """An image of a few MB that has neither /etc/resolv.conf nor /etc/hosts."""
    make_small_image(image, tmp_path / "small", ("dash", "cat"))
    return tmp_path / "small"


@pytest.fixture
def tasks(shared: Plugin, image: Path) -> Iterator[Tasks]:
    with Tasks(shared, image) as made:
        yield made
    violations, shared.violations = shared.violations, []
    assert not violations


USER_NAMESPACES = pytest.mark.parametrize("user_namespacing", [True, False])


@pytest.mark.root
@USER_NAMESPACES
@pytest.mark.parametrize("port", [8080, 80])
def test_task_in_a_group_serves_a_port(group: Group, tasks: Tasks, user_namespacing: bool, port: int) -> None:
    """Below 1024 too, though root of a user namespace has no rights over the group's network namespace."""
    task = tasks.start(serve(port), network=group.spec, network_veth=True, user_namespacing=user_namespacing)
    task.logmon.wait_for("listening\n")
    inside = Path(f"/proc/{leader(task)}/uid_map").read_text().split()
    assert (inside[1] != "0") is user_namespacing
    assert read_port(group.address, port) == "hello from task\n"


@pytest.mark.root
def test_namespace_is_the_groups(group: Group, tasks: Tasks) -> None:
    task = tasks.start("ls /sys/class/net; tail -n +3 /proc/net/dev | cut -d: -f1; echo ready; sleep 60",
                       network=group.spec)  # fmt: skip
    task.logmon.wait_for("ready\n")
    assert output_so_far(task).split() == ["eth0", "lo", "lo", "eth0", "ready"]
    assert os.stat(f"/proc/{leader(task)}/ns/net").st_ino == os.stat(group.path).st_ino


def output_so_far(task: Task) -> str:
    return task.logmon.stdout.decode()


@pytest.mark.root
def test_two_tasks_of_a_group_meet_on_loopback(group: Group, tasks: Tasks) -> None:
    """As a service and its sidecar do with Consul Connect."""
    allocation = Allocation()
    server = tasks.start(serve(9090, "the sidecar"), name="sidecar", network=group.spec, allocation=allocation)
    server.logmon.wait_for("listening\n")
    reader = "use IO::Socket::INET; print IO::Socket::INET->new('127.0.0.1:9090')->getline"
    client, result = tasks.run(["/usr/bin/perl", "-e", reader], network=group.spec, allocation=allocation)
    assert result.successful, client.logmon.stderr
    assert output(client) == "hello from the sidecar\n"


@pytest.mark.root
def test_ping_works_in_a_group(group: Group, tasks: Tasks) -> None:
    """Modern ones open this kind of socket, which every user may only if the namespace says so."""
    script = "use Socket; socket(S, PF_INET, SOCK_DGRAM, 1) or die $!; print 'opened'"
    task, _ = tasks.run(["/usr/bin/perl", "-e", script], network=group.spec, user="daemon")
    assert output(task) == "opened"


@pytest.mark.root
def test_root_inside_has_no_rights_over_the_groups_network(group: Group, tasks: Tasks) -> None:
    script = "echo 1 >/proc/sys/net/ipv4/ip_forward"
    _, result = tasks.run(script, network=group.spec)
    assert not result.successful


@pytest.mark.root
def test_hosts_own_network_keeps_its_settings(group: Group, tasks: Tasks) -> None:
    names = ("ip_unprivileged_port_start", "ping_group_range")
    before = [Path("/proc/sys/net/ipv4", name).read_text() for name in names]
    tasks.run(["/bin/true"], network=group.spec)
    assert [Path("/proc/sys/net/ipv4", name).read_text() for name in names] == before


@pytest.mark.root
def test_booted_system_in_a_group(group: Group, tasks: Tasks) -> None:
    task = tasks.boot(network=group.spec, network_veth=True, kill_timeout=30)
    task.logmon.wait_for("Reached target multi-user.target", timeout=60)
    assert os.stat(f"/proc/{leader(task)}/ns/net").st_ino == os.stat(group.path).st_ino
    task.stop()
    assert task.wait(1).successful


@pytest.mark.root
@pytest.mark.parametrize("victim", ["stop", "nspawn", "keeper", "leader", "destroy"])
def test_nothing_holds_the_groups_namespace(tasks: Tasks, victim: str) -> None:
    """Another task, started while the group was there, must not keep its namespace either."""
    with make_group() as group:
        task = tasks.start(FOREVER, network=group.spec)
        tasks.start(FOREVER, name="other")
        if victim == "stop":
            task.stop(timeout=0)
        elif victim != "destroy":
            kill({"nspawn": nspawn, "keeper": keeper, "leader": leader}[victim](task))
            if victim == "keeper":
                task.stop(timeout=0)
            task.wait(PATIENCE)
        task.destroy()
        assert leftovers(task.allocation.id) == []


@pytest.mark.root
@USER_NAMESPACES
@pytest.mark.parametrize("mode", [{"read_only": True}, {"volatile": "overlay", "user_namespacing": False}, {}])
def test_names_in_a_group(
    group: Group, tasks: Tasks, small: Path, user_namespacing: bool, mode: dict[str, Any]
) -> None:
    """In an image without the two files, too, and that is to be read-only."""
    dns = driver_pb2.DNSConfig(servers=["192.0.2.1"], searches=["a.example", "b.example"], options=["ndots:3"])
    options = {"image": str(small), "user_namespacing": user_namespacing, "read_only": False, **mode}
    task, result = tasks.run("cat /etc/resolv.conf /etc/hosts", network=group.spec, dns=dns, **options)
    assert result.successful, task.logmon.stderr
    assert output(task).splitlines() == [
        "nameserver 192.0.2.1",
        "search a.example b.example",
        "options ndots:3",
        "127.0.0.1 localhost",
        "::1 localhost ip6-localhost ip6-loopback",
        f"{group.address} {driver_name(task)}",
    ]


def driver_name(task: Task) -> str:
    return driver.plan_machine(task.name, task.allocation.id)


@pytest.mark.root
def test_names_without_a_dns_block_are_the_hosts(group: Group, tasks: Tasks) -> None:
    task, _ = tasks.run("cat /etc/resolv.conf; hostname; getent hosts $(hostname)", network=group.spec)
    given, own = output(task).split(driver_name(task), 1)
    servers = [line for line in Path("/etc/resolv.conf").read_text().splitlines() if line.startswith("nameserver")]
    assert given.splitlines()[: len(servers)] == servers
    assert own.split() == [group.address, driver_name(task)]


@pytest.mark.root
def test_dns_block_on_the_hosts_network(tasks: Tasks) -> None:
    dns = driver_pb2.DNSConfig(servers=["192.0.2.1"])
    task, _ = tasks.run("cat /etc/resolv.conf", dns=dns, resolv_conf="copy-host")
    assert output(task).splitlines()[0] == "nameserver 192.0.2.1"
    assert any("copy-host" in event.message for event in task.events)


@pytest.mark.root
def test_restart_in_the_same_group(group: Group, tasks: Tasks) -> None:
    task = tasks.start(serve(8080), network=group.spec)
    for number in range(3):
        task.logmon.wait_for("listening\n" * (number + 1))
        assert read_port(group.address, 8080) == "hello from task\n"
        task.stop(timeout=0)
        task.wait(PATIENCE)
        task.destroy()
        task.start()


@pytest.mark.root
def test_namespace_that_is_gone(tasks: Tasks, tmp_path: Path) -> None:
    def spec(path: str) -> driver_pb2.NetworkIsolationSpec:
        return driver_pb2.NetworkIsolationSpec(mode=driver_pb2.NetworkIsolationSpec.GROUP, path=path)

    (tmp_path / "file").touch()
    for path, why in (
        ("/var/run/netns/no-such-group", "is not there"),
        (str(tmp_path / "file"), "is no network namespace"),
        ("/proc/self/ns/uts", "is a namespace, but not of a network"),
    ):
        task = tasks.make(["/bin/true"], network=spec(path))
        with pytest.raises(DriverError, match=f"{re.escape(path)}.*{why}"):
            task.start()


def test_check_namespace() -> None:
    driver.check_namespace("/proc/self/ns/net")
    with pytest.raises(HostError):
        driver.check_namespace("/etc")


# -- nspawn's own networks -----------------------------------------------------------------------------------


def inside(task: Task, *command: str) -> str:
    """Run a program of this machine in a container's network namespace."""
    argv = ["nsenter", f"--net=/proc/{leader(task)}/ns/net", *command]
    return subprocess.run(argv, stdout=subprocess.PIPE, check=True, timeout=30).stdout.decode()


def find_link(task: Task) -> str:
    """The name of the host's end of a container's host0."""
    index = peer(leader(task))
    return next(name for name, number in links().items() if number == index)


@dataclass(frozen=True)
class Link:
    name: str
    host: str  # addresses
    container: str


def give_addresses(task: Task) -> Link:
    """Do what networkd on the host and a DHCP client in the container would."""
    number = next(numbers) * 4 % 65536
    subnet = f"198.19.{number // 256}"
    link = Link(find_link(task), f"{subnet}.{number % 256 + 1}", f"{subnet}.{number % 256 + 2}")
    ip("addr", "add", f"{link.host}/30", "dev", link.name)
    ip("link", "set", link.name, "up")
    inside(task, "ip", "addr", "add", f"{link.container}/30", "dev", "host0")
    inside(task, "ip", "link", "set", "host0", "up")
    inside(task, "ip", "route", "add", "default", "via", link.host)
    return link


def port_maps(port: int) -> list[str]:
    """nspawn's elements for a port of the host in its tables of nftables."""
    shown = subprocess.run(
        ["nft", "list", "ruleset"], stdout=subprocess.PIPE, check=True, timeout=30
    ).stdout.decode()
    return re.findall(rf"\S+ \. {port} : \S+ \. \d+", shown)


def kill_all(task: Task) -> None:
    """End a container so that nspawn can clean up nothing."""
    for pid in (keeper(task), nspawn(task), leader(task)):
        kill(pid)
    eventually(lambda: not is_alive(leader(task)))


@pytest.mark.root
def test_ports_lead_to_the_container(tasks: Tasks) -> None:
    ports = {"http-alt": GivenPort(free_port(), host_ip="192.0.2.2")}
    host_port = ports["http-alt"].value
    script = 'echo "$NOMAD_PORT_http_alt"; exec /usr/bin/perl -e "$0" 80'
    task = tasks.start(["/bin/sh", "-c", script, SERVER], network_veth=True, resources=Resources(ports=ports),
                       port_map=[{"http-alt": 80}])  # fmt: skip
    link = give_addresses(task)
    task.logmon.wait_for("80\nlistening\n")
    assert len(eventually(lambda: port_maps(host_port))) == 2, "TCP and UDP"
    assert read_port(link.host, host_port) == "hello from \n"
    task.stop(timeout=0)
    task.wait(PATIENCE)
    assert port_maps(host_port) == []


@pytest.mark.root
def test_ports_of_a_killed_nspawn_are_removed(tasks: Tasks) -> None:
    """They would lead to nowhere, or to the next container that gets the address."""
    ports = {name: GivenPort(free_port()) for name in ("http", "other")}
    killed, other = (
        tasks.start(FOREVER, name=name, network_veth=True, resources=Resources(ports=ports), port_map=[{name: 80}])
        for name in ports
    )
    for task in (killed, other):
        give_addresses(task)
    for port in ports.values():
        eventually(lambda port=port: len(port_maps(port.value)) == 2)  # type: ignore[misc]
    kill_all(killed)
    assert len(port_maps(ports["http"].value)) == 2, "if not, nspawn cleans up by itself, and this test is empty"
    killed.destroy()
    assert port_maps(ports["http"].value) == []
    assert len(port_maps(ports["other"].value)) == 2


@pytest.mark.root
def test_link_goes_though_somebody_looks_inside(tasks: Tasks) -> None:
    task = tasks.start(FOREVER, network_veth=True)
    link = find_link(task)
    argv = ["nsenter", f"--net=/proc/{leader(task)}/ns/net", "sleep", "60"]
    with subprocess.Popen(argv) as onlooker:
        try:
            eventually(lambda: Path(f"/proc/{onlooker.pid}/comm").read_text() == "sleep\n")
            kill_all(task)
            assert link in links()
            task.destroy()
            assert link not in links()
        finally:
            onlooker.kill()


@pytest.mark.root
def test_start_waits_for_an_address_if_asked(tasks: Tasks) -> None:
    """A service with address_mode = "driver" needs it, and there is no later way to tell."""
    resources = Resources(ports={"http": GivenPort(free_port(), host_ip="192.0.2.2")})
    task = tasks.make(
        FOREVER, network_veth=True, address_timeout="60s", resources=resources, port_map=[{"http": 80}]
    )
    override = start_with_address(task, "198.19.255.253/30")
    assert override and (override.addr, dict(override.port_map)) == ("198.19.255.253", {"http": 80})
    assert not override.auto_advertise, "others cannot reach it: by default services have the host's address"
    eventually(lambda: any("198.19.255.253" in event.message for event in task.events))


def start_with_address(task: Task, address: str) -> driver_pb2.NetworkOverride | None:
    """Start a task that waits for its address, and give it one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(task.start)
        pid = eventually(lambda: find_leader(task))
        argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "addr", "add", address, "dev", "host0"]
        eventually(lambda: subprocess.run(argv, check=False, stderr=subprocess.DEVNULL).returncode == 0)
        started.result(PATIENCE)
    return task.network_override


def find_leader(task: Task) -> int:
    """The container's PID 1 of a task whose start has not returned."""
    for pid, command in processes(task.allocation.id):
        if command.startswith("/bin/sh -c") and "/proc" and os.path.exists(f"/proc/{pid}/root/usr/lib/os-release"):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino:
                    return pid
    return 0


@pytest.mark.root
@pytest.mark.parametrize("options", [{"network_veth": True}, {"network_veth": False}])
def test_start_does_not_wait_for_an_address(tasks: Tasks, options: dict[str, Any]) -> None:
    task = tasks.start(FOREVER, **options)
    assert task.network_override is None


@pytest.mark.root
def test_end_of_a_task_ends_the_wait_for_its_address(tasks: Tasks) -> None:
    task, result = tasks.run("exit 3", network_veth=True, address_timeout="1h")
    assert result.exit_code == 3
    assert task.network_override is None


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
    assert words in driver.explain_no_address(mode, booted, networkd)


NFT = """\
table ip io.systemd.nat {
    map map_port_ipport {
        type inet_proto . inet_service : ipv4_addr . inet_service
        elements = { 6 . 8080 : 192.168.233.150 . 80, tcp . 8081 : 192.168.233.150 . 80,
                 17 . 8080 : 192.168.233.150 . 80, 6 . 8080 : 192.168.233.151 . 81 }
    }
}
"""
IPTABLES = """\
-P PREROUTING ACCEPT
-A PREROUTING -p tcp -m tcp --dport 8080 -m addrtype --dst-type LOCAL -j DNAT --to-destination 192.168.233.150:80
-A PREROUTING -p tcp -m tcp --dport 8080 -m addrtype --dst-type LOCAL -j DNAT --to-destination 192.168.233.150:81
-A OUTPUT ! -d 127.0.0.0/8 -p tcp --dport 8080 -m addrtype --dst-type LOCAL -j DNAT --to-destination 10.0.0.2:80
-A POSTROUTING -s 192.168.233.144/28 -j MASQUERADE
"""


def test_port_maps_are_found() -> None:
    assert driver.find_port_maps(NFT, driver.NAT_ELEMENT, [(8080, 80)]) == [
        "6 . 8080 : 192.168.233.150 . 80",
        "17 . 8080 : 192.168.233.150 . 80",
    ]
    assert driver.find_port_maps(NFT, driver.NAT_ELEMENT, [(8080, 82)]) == []
    assert driver.find_port_maps(IPTABLES, driver.NAT_RULE, [(8080, 80)]) == [
        IPTABLES.splitlines()[number] for number in (1, 3)
    ]


# -- zones, bridges and other interfaces ---------------------------------------------------------------------


@pytest.fixture
def bridge() -> Iterator[str]:
    """A bridge of the host's with an address, as its administrator has made it."""
    name = f"br{next(numbers)}"
    ip("link", "add", name, "type", "bridge")
    ip("link", "set", name, "up")
    yield name
    ip("link", "delete", name)


def inside_links(task: Task) -> set[str]:
    return {link["ifname"] for link in json.loads(inside(task, "ip", "-json", "link"))}


def master(name: str) -> str:
    """The bridge an interface is joined to."""
    return str(json.loads(ip("-json", "link", "show", name))[0].get("master"))


@pytest.mark.root
def test_zone_is_there_as_long_as_a_member_runs(tasks: Tasks) -> None:
    zone = f"z{next(numbers)}"
    first, second = (tasks.start(FOREVER, name=name, network_zone=zone, network_veth=None) for name in ("a", "b"))
    assert {master(find_link(task)) for task in (first, second)} == {f"vz-{zone}"}
    first.destroy()
    assert f"vz-{zone}" in links()
    second.destroy()
    assert f"vz-{zone}" not in links()


@pytest.mark.root
def test_zone_of_killed_nspawns_is_removed_with_the_last(tasks: Tasks) -> None:
    zone = f"z{next(numbers)}"
    first, second = (tasks.start(FOREVER, name=name, network_zone=zone, network_veth=None) for name in ("a", "b"))
    kill_all(first)
    first.destroy()
    assert master(find_link(second)) == f"vz-{zone}"
    kill_all(second)
    assert f"vz-{zone}" in links(), "if not, somebody else cleans up, and this test is empty"
    second.destroy()
    assert f"vz-{zone}" not in links()
    assert not Path(driver.ZONE_LOCK).exists()


@pytest.mark.root
@pytest.mark.parametrize("killed", [False, True])
def test_container_on_a_bridge(tasks: Tasks, bridge: str, killed: bool) -> None:
    before = set(links())
    task = tasks.start(FOREVER, network_bridge=bridge, network_veth=None)
    assert master(find_link(task)) == bridge
    assert inside_links(task) == {"lo", "host0"}
    if killed:
        kill_all(task)
    task.destroy()
    assert set(links()) == before


def sys_is_writable() -> bool:
    return not os.statvfs("/sys").f_flag & os.ST_RDONLY


NEEDS_UDEV = pytest.mark.skipif(
    sys_is_writable() and not Path("/run/udev/control").exists(),
    reason="nspawn takes interfaces only where udev knows them: not run here, but in the hosts of test_hosts.py",
)


@pytest.mark.root
@NEEDS_UDEV
@pytest.mark.parametrize("killed", [False, True])
def test_macvlan(tasks: Tasks, bridge: str, killed: bool) -> None:
    before = set(links())
    task = tasks.start(FOREVER, network_macvlan=[bridge], network_veth=None)
    assert inside_links(task) == {"lo", f"mv-{bridge}"}
    if killed:
        kill_all(task)
    task.destroy()
    assert set(links()) == before


@pytest.mark.root
@NEEDS_UDEV
def test_interface_moves_in_and_comes_back(tasks: Tasks, bridge: str) -> None:
    name = f"vx{next(numbers)}"
    ip("link", "add", name, "type", "veth", "peer", "name", f"{name}p")
    try:
        task = tasks.start(FOREVER, network_interface=[name], network_veth=None)
        assert inside_links(task) == {"lo", name}
        assert name not in links()
        task.stop(timeout=0)
        task.wait(PATIENCE)
        task.destroy()
        assert name in links()
    finally:
        ip("link", "delete", f"{name}p")


@pytest.mark.root
def test_extra_links(tasks: Tasks) -> None:
    name = f"vx{next(numbers)}"
    task = tasks.start(FOREVER, network_veth_extra=[f"{name}:db0"], network_veth=True)
    assert inside_links(task) == {"lo", "host0", "db0"}
    assert name in links()
    kill_all(task)
    task.destroy()
    eventually(lambda: name not in links())


@pytest.mark.root
def test_network_of_its_own_with_nothing_in_it(tasks: Tasks) -> None:
    task = tasks.start(FOREVER, private_network=True, network_veth=None)
    assert inside_links(task) == {"lo"}


@pytest.mark.root
def test_container_on_a_bridge_is_registered_under_its_own_address(tasks: Tasks, bridge: str) -> None:
    """Static addresses of the image's own making are there at once; this stands for one."""
    task = tasks.make(FOREVER, network_bridge=bridge, network_veth=None, address_timeout="60s")
    override = start_with_address(task, "198.19.255.249/30")
    assert override and (override.addr, override.auto_advertise) == ("198.19.255.249", True)


@pytest.mark.root
def test_hostname_and_extra_hosts(tasks: Tasks, small: Path) -> None:
    script = "cat /proc/sys/kernel/hostname; cat /etc/hosts"
    task, result = tasks.run(script, image=str(small), hostname="web1.example", extra_hosts=["db:192.0.2.7"])
    assert result.successful, task.logmon.stderr
    assert output(task) == f"web1.example\n{LOCALHOST}127.0.1.1 web1.example\n192.0.2.7 db\n"


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network_bridge": "no-such-br"}, "network_bridge: there is no bridge no-such-br on the host"),
        ({"network_bridge": "lo"}, "network_bridge: the interface lo of the host is no bridge"),
        ({"network_macvlan": ["no-such-if"]}, "there is no interface no-such-if on the host"),
        ({"network_interface": ["no-such-if"]}, "there is no interface no-such-if on the host"),
        ({"network_veth_extra": ["lo:db0"]}, "there is an interface lo on the host already"),
    ],
)
def test_interface_that_is_not_there(tasks: Tasks, options: dict[str, Any], words: str) -> None:
    task = tasks.make(FOREVER, network_veth=None, **options)
    with pytest.raises(DriverError, match=words):
        task.start()
