# SPDX-License-Identifier: MPL-2.0
"""Plan: what is given to systemd-nspawn for a job, and what is made of its last words. No container is started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from driver import TASK_OPTIONS
from nspawn import mounts
from nspawn.accounts import Account
from nspawn.bundle import DEFAULT_PATH, check_environment, render_bundle
from nspawn.cgroup import plan_cgroup
from nspawn.checks import RESOLV_CONF, USER, escape_field
from nspawn.common import STATE_ROOT, ConfigError, DriverError, HostError, TransientError
from nspawn.host import CgroupMode, Host, Mounts
from nspawn.images import Image
from nspawn.inits import POWER_OFF, Init, Request, plan_request
from nspawn.job import (
    GroupNetwork,
    JobOptions,
    Mode,
    Port,
    TaskConfig,
    parse_signal,
    plan_machine,
    render_signal,
    state_directory,
)
from nspawn.logs import open_log
from nspawn.mounts import Mount, parse_bind
from nspawn.network import NetworkInputs
from nspawn.notify import Claim, parse_claim, split_notification
from nspawn.outcome import (
    SENTENCES,
    Ending,
    ExitRecord,
    ExitResult,
    explain_exit,
    explain_failure,
    find_message,
    parse_nspawn_log,
)
from nspawn.plan import HostInputs, Plan, plan_task, plan_volumes, stage_directories
from nspawn.process import ProcessId
from nspawn.rules import check_targets
from nspawn.sources import Source, name_sources, open_directories
from nspawn.state import State, split_id
from tests.options import CONFIG, read_options

ALLOC = "6b1f1c2e-0d3a-4c5e-9f7a-1234567890ab"
ALLOC_DIR = f"/var/nomad/alloc/{ALLOC}"
MACHINE = f"web-{ALLOC}"
HOST = Host(systemd=252, kernel=(6, 1), cgroups=CgroupMode.V2, problems=(), has_selinux=True)
EXT4 = Mounts((("/", "ext4"),))
IMAGE = Image(Path("/var/lib/machines/debian"), is_directory=True)
NO_NAMES = NetworkInputs()
TASK = TaskConfig(id=f"{ALLOC}/web/0a1b2c3d", name="web", alloc_id=ALLOC, alloc_dir=ALLOC_DIR, options={})

HEAD = (
    "--quiet",
    "--keep-unit",
    "--register=no",
    "--link-journal=no",
    f"--uuid={ALLOC}",
    "--directory=/var/lib/machines/debian",
)
USERS = ("--private-users=pick", "--private-users-ownership=auto")
DIRECTORIES = f"{state_directory(TASK.id)}/directories"
VOLUMES = (
    f"--bind={DIRECTORIES}/0:/alloc:idmap",
    f"--bind-ro={DIRECTORIES}/1:/alloc/logs",
    f"--bind={DIRECTORIES}/2:/local:idmap",
    f"--bind={DIRECTORIES}/3:/secrets:idmap",
)
AUTO = ("--timezone=auto", "--resolv-conf=auto")  # where nothing is said of them
BUNDLE = f"--oci-bundle={state_directory(TASK.id)}/bundle"


def find_sources(options: JobOptions) -> dict[str, Source]:
    """What a job names, as if it were there."""
    names = dict.fromkeys(named.name for named in name_sources(options))
    return {name: Source(f"/real/{name.lstrip('/')}", mode=0o040755) for name in names}


def find_directories(task: TaskConfig) -> dict[str, Source]:
    """The task's directories and volumes, as if they were there."""
    paths = [*(f"{task.alloc_dir}/{name}" for name in task.directory_names), *(m.source for m in task.mounts)]
    return {path: Source(path, mode=0o040755) for path in paths}


def plan(
    options: Mapping[str, object],
    task: TaskConfig = TASK,
    host: Host = HOST,
    mounts: Mounts = EXT4,
    names: NetworkInputs = NO_NAMES,
    image: Image = IMAGE,
    account: Account | None = None,
) -> Plan:
    job = read_options(CONFIG, bool(task.network.namespace), **options)
    credentials = {key: b"" for key in (*job.set_credential, *job.load_credential)}
    found = HostInputs(
        image,
        mounts,
        find_sources(job),
        credentials,
        names,
        directories=find_directories(task),
        account=account,
    )
    return plan_task(TASK_OPTIONS, task, job, host, found)


def network(ports: Mapping[str, int]) -> GroupNetwork:
    return GroupNetwork(ports={label: Port(number) for label, number in ports.items()})


def command(*argv: str, **options: object) -> dict[str, object]:
    return {"boot": False, "command": list(argv), **options}


# -- argv ----------------------------------------------------------------------------------------------------


def test_set_user_id_files_of_others_have_no_effect() -> None:
    found = plan({"bind": [{"/a": "/a", "/b": "/b:idmap", "local/c": "/c:norbind,rootidmap"}]})
    own = (
        staged.path
        for staged in found.staged_sources
        if staged.source.path.rpartition("/")[2] in ("alloc", "local", "secrets")
    )
    assert set(found.nosuid) == {*own, f"{MOUNTS}/1", f"{MOUNTS}/2"}
    assert plan({"user_namespacing": False}).nosuid == ()


def test_only_what_nspawn_mounts_is_staged() -> None:
    """Each staged source costs two mounts at every start."""
    found = plan({"bind": [{"/a": "/a"}], "overlay": ["/b::/b"], "ephemeral": True})
    argv = " ".join(found.argv)
    assert [staged.source.path for staged in found.staged_sources if staged.path not in argv] == []


def test_whole_argv() -> None:
    assert plan({}).argv == (
        *HEAD,
        "--boot",
        "--console=read-only",
        *USERS,
        "--network-veth",
        *VOLUMES,
        *AUTO,
        BUNDLE,
    )


# The usual arguments between the image and the volumes.
BOOT = ("--boot", "--console=read-only", *USERS, "--network-veth")
RUN = ("--console=pipe", *USERS, "--network-veth")
MOUNTS = f"{state_directory(TASK.id)}/mounts"
CREDENTIALS = f"{state_directory(TASK.id)}/credentials"
HEX = "ab" * 32

# Options, and what they add to the arguments: a row for each way in which an option becomes one.
ADDED: list[tuple[dict[str, object], list[str]]] = [
    ({"boot": True, "private_users": "pick", "network_veth": True, "image_download": {"url": "https://x/y"}}, []),
    ({"read_only": True}, ["--read-only"]),
    ({"notify_ready": True}, ["--notify-ready=yes"]),
    ({"hostname": "web1.example"}, ["--hostname=web1.example"]),
    ({"bind_user": ["a", "b"]}, ["--bind-user=a", "--bind-user=b"]),
    ({"cap_add": ["net_admin,mknod"]}, ["--capability=CAP_NET_ADMIN", "--capability=CAP_MKNOD"]),
    ({"capability": ["all"], "drop_capability": ["NET_RAW"]}, ["--capability=all", "--drop-capability=CAP_NET_RAW"]),
    ({"system_call_filter": ["~@mount", "bpf"]}, ["--system-call-filter=~@mount", "--system-call-filter=bpf"]),
    ({"rlimit": [{"nofile": "1:2", "RLIMIT_CORE": "infinity"}]}, ["--rlimit=RLIMIT_NOFILE=1:2", "--rlimit=RLIMIT_CORE=infinity"]),
    ({"network_zone": "web", "network_veth": True}, ["--network-zone=web"]),
    ({"pivot_root": "/a:/b"}, ["--pivot-root=/a:/b"]),
    ({"private_users": "131072:65536", "private_users_ownership": "map"}, ["--private-users=131072:65536", "--private-users-ownership=map"]),
    ({"console": "pipe"}, ["--console=pipe"]),
    ({"resolv_conf": "copy-host", "timezone": "off"}, ["--resolv-conf=copy-host", "--timezone=off"]),
    ({"tmpfs": ["/a", "/b:size=10M,mode=755", "/c\\d"]}, ["--tmpfs=/a", "--tmpfs=/b:size=10M,mode=755", "--tmpfs=/c\\\\d"]),
    ({"inaccessible": ["/usr/bin/ssh", "/a b"]}, ["--inaccessible=/usr/bin/ssh", "--inaccessible=/a b"]),
    ({"set_credential": [{"z": "1", "a\\b": "2"}], "load_credential": [{"m": "secrets/x"}]}, [f"--load-credential={name}:{CREDENTIALS}/{number}" for number, name in enumerate(("z", "a\\\\b", "m"))]),
    ({"bind": [{"/z": "/1", "/a": "/2"}, {"local/m": "/3"}], "bind_read_only": [{"/b": "/4"}]}, [f"--bind={MOUNTS}/0:/1", f"--bind={MOUNTS}/1:/2", f"--bind={MOUNTS}/2:/3", f"--bind-ro={MOUNTS}/3:/4"]),
    ({"mount": [{"source": "/z", "target": "/1"}, {"source": "/z", "target": "/2", "read_only": True, "options": ["idmap"]}]}, [f"--bind={MOUNTS}/0:/1", f"--bind-ro={MOUNTS}/0:/2:idmap"]),
    ({"bind": [{"/a:b": "/c:norbind,rootidmap"}]}, [f"--bind={MOUNTS}/0:/c:norbind,rootidmap"]),
    ({"bind": [{"/a\\": "/c\\:d"}]}, [f"--bind={MOUNTS}/0:/c\\\\\\:d"]),
    ({"overlay": ["/a:local/b:+/c::/d"]}, [f"--overlay={MOUNTS}/0:{MOUNTS}/1:+/c::/d"]),
    ({"overlay_read_only": ["+/usr:/srv/usr:/usr", "/a\\:b:/c:/d\\:e"]}, [f"--overlay-ro=+/usr:{MOUNTS}/0:/usr", f"--overlay-ro={MOUNTS}/1:{MOUNTS}/2:/d\\:e"]),
    ({"link_journal": "try-guest", "address_timeout": "5s"}, []),
]  # fmt: skip


@pytest.mark.parametrize(("options", "added"), ADDED)
def test_arguments_of_options(options: dict[str, object], added: list[str]) -> None:
    usual = plan({}).argv
    assert [word for word in plan(options).argv if word not in usual] == added
    assert plan(dict(reversed(options.items()))).argv == plan(options).argv


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"user_namespacing": False}, USERS),
        ({"private_users": "no", "private_users_ownership": "chown"}, USERS),
        ({"network_veth": False}, ("--network-veth",)),
        ({"network_bridge": "br0"}, ("--network-veth",)),
        ({"private_network": True}, ("--network-veth",)),
    ],
)
def test_arguments_that_options_take_away(options: dict[str, object], missing: Sequence[str]) -> None:
    assert not set(missing) & set(plan(options).argv)


@pytest.mark.parametrize(
    "words", [("/bin/true",), ("--boot", "--"), ("--", "--bind=/:/host"), ("a", "", "b c; $HOME", "d\ne")]
)
def test_command_comes_last(words: tuple[str, ...]) -> None:
    assert plan(command(*words)).argv == (*HEAD, *RUN, *VOLUMES, *AUTO, BUNDLE, "--", *words)


def test_order_of_arguments() -> None:
    options = command(
        "a", process_two=True, user="nobody", working_directory="/a b", read_only=True, pivot_root="/a",
        network_veth=False, resolv_conf="auto", bind=[{"/c": "/d"}], ambient_capability=["chown"],
    )  # fmt: skip
    assert plan(options).argv == (
        *HEAD, "--read-only", "--pivot-root=/a", "--as-pid2", "-unobody", "--chdir=/a b", "--console=pipe", *USERS,
        "--resolv-conf=auto", "--capability=CAP_CHOWN", "--ambient-capability=CAP_CHOWN", f"--bind={MOUNTS}/0:/d",
        *VOLUMES, AUTO[0], BUNDLE, "--", "a",
    )  # fmt: skip


NO_DEVICES = "--drop-capability=CAP_MKNOD"


def test_device_nodes_are_made_by_nobody_but_whom_the_operator_lets() -> None:
    for capability in (["CAP_MKNOD"], ["all"]):
        assert NO_DEVICES not in plan({"user_namespacing": False, "capability": capability}).argv
    assert NO_DEVICES in plan({"user_namespacing": False, "capability": ["CAP_NET_ADMIN"]}).argv
    assert NO_DEVICES not in plan({}).argv, "the kernel refuses in a user namespace"


# options that need a newer systemd, its version, the arguments they become
GOLDEN_NEW: list[tuple[dict[str, object], int, tuple[str, ...]]] = [
    ({"private_users_ownership": "foreign"}, 258, ("--private-users=pick", "--private-users-ownership=foreign")),
    ({"private_users_delegate": 2}, 260, (*USERS, "--private-users-delegate=2")),
    (
        {"bind_user": ["a"], "bind_user_shell": "/bin/sh"},
        258,
        (*USERS, "--bind-user=a", "--bind-user-shell=/bin/sh"),
    ),
    (
        {"bind_user": ["a"], "bind_user_group": ["video"]},
        259,
        (*USERS, "--bind-user=a", "--bind-user-group=video"),
    ),
    ({"restrict_address_families": ["AF_UNIX", "AF_INET"]}, 261, ("--restrict-address-families=AF_UNIX AF_INET",)),
]


@pytest.mark.parametrize(("options", "systemd", "arguments"), GOLDEN_NEW)
def test_argv_on_newer_systemd(options: dict[str, object], systemd: int, arguments: tuple[str, ...]) -> None:
    argv = plan(options, host=replace(HOST, systemd=systemd)).argv
    place = argv.index(arguments[0])
    assert argv[place : place + len(arguments)] == arguments
    with pytest.raises(ConfigError, match=rf"needs systemd {systemd} or newer, and this host has {systemd - 1}"):
        plan(options, host=replace(HOST, systemd=systemd - 1))


def test_argv_of_a_disk_image() -> None:
    options = {"image_policy": "root=verity", "root_hash": HEX, "root_hash_sig": "base64:AAAA"}
    image = replace(IMAGE, path=Path("/var/lib/machines/debian.raw"), is_directory=False)
    argv = plan(options, host=replace(HOST, systemd=254), image=image).argv
    assert argv[len(HEAD) - 1 :][:4] == (
        "--image=/var/lib/machines/debian.raw",
        "--image-policy=root=verity",
        f"--root-hash={HEX}",
        "--root-hash-sig=base64:AAAA",
    )
    for option in ("image_policy", "root_hash"):
        with pytest.raises(ConfigError, match=f"^{option} = .*: is for disk images, and .* is a directory"):
            plan({option: options[option]}, host=replace(HOST, systemd=262))


@pytest.mark.parametrize(
    ("options", "starter"),
    [
        ({}, ()),
        ({"oom_score_adjust": 0}, ("choom", "-n", "0", "--")),
        ({"oom_score_adj": 500}, ("choom", "-n", "500", "--")),
    ],
)
def test_program(options: dict[str, object], starter: tuple[str, ...]) -> None:
    assert plan(options).program == (*starter, "systemd-nspawn", f"--machine={MACHINE}")


@pytest.mark.parametrize(
    ("users", "is_mapped"),
    [("pick", True), ("65536", True), ("identity", False), ("0", False), ("0:65536", False)],
)
def test_ids_that_stay_the_same_are_not_mapped(users: str, is_mapped: bool) -> None:
    argv = plan({"private_users": users}).argv
    assert (VOLUMES[0] in argv) is is_mapped
    assert (VOLUMES[0].removesuffix(":idmap") in argv) is not is_mapped


JOURNAL = f"/var/log/journal/{ALLOC.replace('-', '')}"


@pytest.mark.parametrize(
    ("options", "argv", "target"),
    [
        ({"link_journal": "host", "user_namespacing": False}, (f"--bind={JOURNAL}:{JOURNAL}",), ""),
        (
            {"link_journal": "try-host", "user_namespacing": False, "ephemeral": True},
            (f"--bind={JOURNAL}:{JOURNAL}",),
            "",
        ),
        ({"link_journal": "guest"}, (), f"/var/lib/machines/debian{JOURNAL}"),
        ({"link_journal": "try-guest"}, (), f"/var/lib/machines/debian{JOURNAL}"),
    ],
)
def test_journal(options: dict[str, object], argv: tuple[str, ...], target: str) -> None:
    found = plan(options)
    assert (found.journal.path, found.journal.target) == (JOURNAL, target)
    assert tuple(word for word in found.argv if "journal/" in word) == argv


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("host", {}, "in a user namespace the container could not write there"),
        ("guest", {"ephemeral": True}, "the container's files are not in a directory of the host"),
        ("guest", {"volatile": "overlay"}, "the container's files are not in a directory of the host"),
    ],
)
def test_journal_that_cannot_be_had(kind: str, options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=f'^link_journal = "{kind}": is not possible: {why}; leave it out$'):
        plan({"link_journal": kind, **options})
    found = plan({"link_journal": f"try-{kind}", **options})
    assert found.journal.path == ""
    assert f"link_journal has no effect: {why}." in found.notes


@pytest.mark.parametrize("systemd", [249, 252, 260])
def test_no_new_argument_for_old_systemd(systemd: int) -> None:
    assert plan({}, host=replace(HOST, systemd=systemd)).argv == plan({}).argv


@pytest.mark.parametrize("systemd", [261, 262])
def test_new_systemd_is_silenced(systemd: int) -> None:
    argv = plan({}, host=replace(HOST, systemd=systemd)).argv
    assert argv == (*HEAD[:-1], "--restrict-address-families=", *HEAD[-1:], *BOOT, *VOLUMES, *AUTO, BUNDLE)


def test_volatile_on_new_systemd() -> None:
    argv = plan({"volatile": "yes"}, host=replace(HOST, systemd=257)).argv
    assert argv == (*HEAD, "--volatile=yes", *BOOT, *VOLUMES, *AUTO, BUNDLE)


@pytest.mark.parametrize(
    ("alloc_id", "argument"),
    [
        (ALLOC, f"--uuid={ALLOC}"),
        (ALLOC.replace("-", "").upper(), f"--uuid={ALLOC.replace('-', '').upper()}"),
        ("not-a-uuid", ""),
        (f"{ALLOC}\n", ""),
        (f"x{ALLOC}", ""),
    ],
)
def test_machine_id(alloc_id: str, argument: str) -> None:
    argv = plan({}, task=replace(TASK, alloc_id=alloc_id)).argv
    assert [word for word in argv if word.startswith("--uuid")] == ([argument] if argument else [])


def test_image_file() -> None:
    image = Image(Path("/var/lib/machines/debian.raw"), is_directory=False)
    argv = plan({}, image=image).argv
    assert "--image=/var/lib/machines/debian.raw" in argv
    assert not any(word.startswith("--directory") for word in argv)
    task = replace(TASK, network=GroupNetwork(namespace="/var/run/netns/a"))
    found = plan({"user_namespacing": False}, task, image=image)
    assert "--network-namespace-path=/var/run/netns/a" in found.argv and not found.network.entry
    with pytest.raises(ConfigError, match=r"^user_namespacing = true: is not possible .* in a group's network"):
        plan({}, task, image=image)


@pytest.mark.parametrize(
    ("options", "user", "argument"),
    [
        (command("a"), "www-data", "-uwww-data"),
        (command("a", user="root"), "www-data", "-uroot"),
        (command("a"), "", None),
        ({}, "www-data", None),
    ],
)
def test_task_user(options: dict[str, object], user: str, argument: str | None) -> None:
    """Nomad's `user` is whom the command runs as; the init of a booted system stays root."""
    argv = plan(options, task=replace(TASK, user=user)).argv
    assert next((word for word in argv if word.startswith("-u")), None) == argument


def test_task_user_is_one() -> None:
    """Also where another counts: Nomad's comes without any check, and an image's may name a group, too."""
    with pytest.raises(ConfigError, match=r'^user = "0:0": must be the name or the number of a user'):
        plan(command("a", user="www"), task=replace(TASK, user="0:0"))


def test_ports() -> None:
    task = replace(TASK, network=network({"http": 20080, "unused": 1, "dns": 20053}))
    argv = plan({"port_map": [{"dns": 53, "http": 80}]}, task=task).argv
    ports = ("--port=tcp:20053:53", "--port=udp:20053:53", "--port=tcp:20080:80", "--port=udp:20080:80")
    assert argv == (*HEAD, *BOOT, *ports, *VOLUMES, *AUTO, BUNDLE)


def test_port_map_takes_the_ports_of_the_task_along() -> None:
    ports = {"http": Port(20080, is_of_task=True), "admin": Port(20081, is_of_task=True), "group": Port(20082)}
    task = replace(TASK, network=GroupNetwork(ports=ports))
    argv = plan({"port_map": [{"http": 80}]}, task=task).argv
    assert [word for word in argv if word.startswith("--port=tcp")] == [
        "--port=tcp:20080:80", "--port=tcp:20081:20081",
    ]  # fmt: skip
    assert not [word for word in plan({}, task=task).argv if word.startswith("--port")]


@pytest.mark.parametrize(
    ("ports", "known"), [({}, "the labels are none"), ({"a": 1, "b": 2}, "the labels are a, b")]
)
def test_port_without_label(ports: dict[str, int], known: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan({"port_map": [{"http": 80}]}, task=replace(TASK, network=network(ports)))
    rule = "no port of this label in the group's or task's network block"
    assert str(caught.value) == f"port_map.http = 80: {rule}; {known}"


def test_rules_are_checked() -> None:
    with pytest.raises(ConfigError, match="cannot be combined with boot"):
        plan({"process_two": True})


def test_hybrid_cgroups_need_a_switch() -> None:
    switch = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
    assert plan({}, host=replace(HOST, cgroups=CgroupMode.HYBRID)).environ == switch
    assert plan({}).environ == {}


@pytest.mark.parametrize(
    ("options", "filtered"),
    [({}, True), ({"console": "pipe"}, False), ({"console": "passive"}, True), (command("a"), False)],
)
def test_only_consoles_of_booted_systems_are_filtered(options: dict[str, object], filtered: bool) -> None:
    assert plan(options).options.is_terminal is filtered


def test_words_of_a_command_are_no_options() -> None:
    """They stand among nspawn's arguments, behind "--": `--console=pipe` there switched the filter off."""
    words = ("--console=pipe", "--read-only", "--inaccessible=/x", "--overlay=/a::/b")
    assert plan({"command": words}).options == replace(plan({}).options, command=words)


def test_rest_of_the_plan() -> None:
    task = replace(TASK, stdout_path="/o", stderr_path="/e", env={"PATH": "/x", "A-B": "", "1": ""})
    found = plan(command("a", "b", environment=[{"PATH": "/y"}]), task=task)
    assert found.task_id == TASK.id
    assert found.machine == MACHINE
    assert found.options.mode is Mode.COMMAND
    assert found.options.command == ("a", "b")
    assert found.search_path == "/x"
    assert found.log_paths == ("/o", "/e")
    assert found.private is None
    assert found.copying == ""
    assert found.cgroup == f"/sys/fs/cgroup/nomad.slice/share.slice/{ALLOC}.web.scope"
    assert found.notes == tuple(
        f"The variable {name!r} is not passed on: systemd-nspawn accepts letters, digits and underscores only."
        for name in ("1", "A-B")
    )
    assert plan(command("a")).search_path == DEFAULT_PATH


# Names of arguments that a plan may have. A job can fill in values, and choose among these, nothing else.
ARGUMENTS = set(
    """
    --quiet --keep-unit --boot --as-pid2 --ephemeral --read-only --network-veth --register= --machine= --uuid=
    --restrict-address-families= --directory= --image= --chdir= --console= --volatile= --pivot-root=
    --private-users= --private-users-ownership= --resolv-conf= --bind= --bind-ro= --port= --oci-bundle=
    --overlay= --overlay-ro= --tmpfs= --inaccessible= --hostname= --private-network --network-zone=
    --network-bridge= --network-veth-extra= --network-macvlan= --network-ipvlan= --network-interface=
    --capability= --drop-capability=
    --ambient-capability= --no-new-privileges= --system-call-filter= --selinux-context= --selinux-apifs-context=
    --rlimit= --oom-score-adjust= --cpu-affinity= --timezone= --link-journal= --personality= --notify-ready=
    --suppress-sync= --load-credential= --bind-user=
    """.split()  # noqa: SIM905 # a list of words reads better
)
PLACES = re.compile(
    rf"{re.escape(str(STATE_ROOT))}/[A-Za-z0-9-]+/((mounts|directories|credentials)/\d+|etc/(resolv\.conf|hosts))"
)


def split_fields(text: str) -> list[str]:
    """Split as nspawn does with --bind: at colons, a backslash takes the next character as it is."""
    fields, characters = [""], iter(text)
    for character in characters:
        if character == ":":
            fields.append("")
        else:
            fields[-1] += next(characters) if character == "\\" else character
    return fields


def check_structure(found: Plan, options: Mapping[str, Any], task: TaskConfig) -> None:
    before, after = found.argv, tuple(options.get("command") or ())
    if after:
        place = found.argv.index("--")  # the first one is ours: nothing before may be equal to it
        before, rest = found.argv[:place], found.argv[place + 1 :]
        assert rest == after
    for word in before:
        if re.fullmatch(r"-u[^-\s:/,][^\s:/,]*", word):
            continue
        assert word.startswith("--")
        name, equals, value = word.partition("=")
        assert name + equals in ARGUMENTS
        check_host_paths(name, value)
    assert not any("\0" in word for word in found.argv)
    for once in ("--register=no", "--link-journal=no", "--keep-unit"):
        assert found.argv.count(once) == 1
        assert sum(word.split("=")[0] == once.split("=")[0] for word in before) == 1


def check_host_paths(name: str, value: str) -> None:
    """What nspawn takes from the host is at places of the driver's own."""
    if name in ("--bind", "--bind-ro"):
        assert PLACES.fullmatch(split_fields(value)[0])
    if name in ("--overlay", "--overlay-ro"):
        assert all(PLACES.fullmatch(field) or field[:2] in ("", "+/") for field in split_fields(value)[:-1])
    if name == "--load-credential":
        assert PLACES.fullmatch(split_fields(value)[1])


words = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        ["--", "-x", "--bind=/:/host", "--capability=all", "a --boot", "\n--settings=yes", "=", ":", "'"]
    ),
)
paths = words.filter(lambda text: ".." not in text).map(lambda text: "/" + text)
binds = st.lists(st.dictionaries(paths, paths, max_size=3), max_size=2)
names = st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_]{0,9}\Z") | st.sampled_from(["LD_PRELOAD", "PATH", "TERM"])
users = words.filter(USER.fullmatch)
interfaces = st.lists(st.from_regex(r"\A[a-z0-9-]{1,7}(:[a-z0-9-]{1,7})?\Z"), max_size=2)
capabilities = st.lists(st.sampled_from(["all", "net_admin", "CAP_CHOWN,sys_time"]), max_size=2)
credentials = st.dictionaries(st.from_regex(r"\A[!-.0-9;-~]{3,9}\Z"), words, max_size=2)
field_paths = paths.map(escape_field)
overlays = st.lists(
    st.builds(
        lambda lower, target: f"{lower}::{target}",
        st.one_of(field_paths, field_paths.map("+".__add__)),
        field_paths,
    ),
    max_size=2,
)
valid_options = st.fixed_dictionaries(
    {
        "image": words.filter(bool),
        "boot": st.just(False),
        "command": st.lists(words, min_size=1, max_size=3),
        "network_veth": st.just(True),
    },
    optional={
        "user": users,
        "working_directory": paths,
        "environment": st.lists(st.dictionaries(names, words, max_size=3), max_size=2),
        "console": st.sampled_from([None, "", "interactive", "read-only", "passive", "pipe"]),
        "ephemeral": st.booleans(),
        "read_only": st.booleans(),
        "volatile": st.sampled_from([None, "no"]),
        "pivot_root": paths.map(lambda path: path.replace(":", "")),
        "user_namespacing": st.booleans(),
        "private_users": st.sampled_from(["pick", "identity", "no", "1000000:65536"]),
        "network_zone": st.just("web"),
        "network_veth_extra": interfaces,
        "network_macvlan": interfaces,
        "port_map": st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(1, 65535)), max_size=2),
        "ports": st.lists(st.sampled_from("abc"), max_size=2),
        "hostname": st.just("a.b"),
        "extra_hosts": st.lists(st.sampled_from(["db:192.0.2.7", "a.b:::1"]), max_size=2),
        "address_timeout": st.sampled_from(["0s", "1.5m"]),
        "resolv_conf": st.sampled_from(RESOLV_CONF),
        "bind": binds,
        "bind_read_only": binds,
        "tmpfs": st.lists(paths.map(lambda path: path.replace(":", "")), max_size=2),
        "overlay": overlays,
        "inaccessible": st.lists(paths, max_size=2),
        "capability": capabilities,
        "drop_capability": capabilities,
        "system_call_filter": st.lists(st.sampled_from(["@mount", "~bpf"]), max_size=2),
        "set_credential": st.lists(credentials, max_size=2),
        "rlimit": st.lists(
            st.dictionaries(st.sampled_from(["nofile", "RLIMIT_CORE"]), st.just("1:2")), max_size=2
        ),
        "oom_score_adjust": st.integers(0, 1000),
        "selinux_context": st.just("--boot"),
        "image_policy": st.none(),
    },
)
valid_tasks = st.builds(
    TaskConfig,
    id=words,
    name=words.filter(bool),
    alloc_id=words.filter(bool) | st.just(ALLOC),
    alloc_dir=paths,
    options=st.just({}),
    user=users | st.just(""),
    env=st.dictionaries(words, words, max_size=3),
    cgroup=words | st.just("/sys/fs/cgroup/nomad.slice/x.scope"),
    network=st.just(network({"a": 1, "b": 2, "c": 3})),
    mounts=st.lists(
        st.builds(Mount, paths, paths, st.booleans(), st.sampled_from(["", "private"])), max_size=2
    ).map(tuple),
)


@given(valid_options, valid_tasks)
@settings(max_examples=100)
def test_valid_options_become_a_plan(options: dict[str, Any], task: TaskConfig) -> None:
    found = plan(options, task=task)
    check_structure(found, options, task)
    assert plan(options, task=task) == found


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from([name for option in TASK_OPTIONS for name in option.names]) | words, anything, max_size=4
    ),
    st.dictionaries(st.text(), st.text(), max_size=3),
)
@settings(max_examples=150)
def test_any_options_become_a_plan_or_a_sentence(options: dict[str, Any], env: dict[str, str]) -> None:
    try:
        found = plan(options, task=replace(TASK, env=env))
    except DriverError as error:
        assert str(error)
    else:
        check_structure(found, options, TASK)


# -- machine names -------------------------------------------------------------------------------------------

# nspawn's rule, on all versions: else "Invalid machine name"
MACHINE_NAME = re.compile(r"(?=.{1,64}\Z)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
task_names = st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1) | (
    st.text("ab-_.", min_size=1)
)


@pytest.mark.parametrize(
    ("name", "alloc_id", "machine"),
    [
        ("web", ALLOC, f"web-{ALLOC}"),
        ("a" * 27, ALLOC, f"{'a' * 27}-{ALLOC}"),
        ("a" * 28, ALLOC, f"{'a' * 10}-9c547cb8115a4488-{ALLOC}"),
        ("web_1", ALLOC, f"web-1-c703c3ba9dda9d34-{ALLOC}"),
        ("web-1", ALLOC, f"web-1-{ALLOC}"),
        ("web.1", ALLOC, f"web-1-f2059589cb873f97-{ALLOC}"),
        ("-", ALLOC, f"3973e022e93220f9-{ALLOC}"),
        ("web", "", "web-alloc"),
        ("web", "../../x", "web-x"),
    ],
)
def test_machine_name(name: str, alloc_id: str, machine: str) -> None:
    assert plan_machine(name, alloc_id) == machine


@given(task_names, st.just(ALLOC) | st.text(st.characters(exclude_categories=["Cs"])))
@example("-" * 100, "-")
@example("é" * 100, ALLOC)
@example("a" * 20 + "-" * 20, ALLOC)
def test_any_task_has_a_valid_machine_name(name: str, alloc_id: str) -> None:
    machine = plan_machine(name, alloc_id)
    assert MACHINE_NAME.fullmatch(machine)
    assert ".." not in machine


@given(st.sets(task_names, min_size=2, max_size=8))
@example({"web_1", "web-1", "web.1", "web 1", "web--1"})
@example({"a" * 27, "a" * 28, "a" * 29})
@example({"-", "_", ".", "--"})
@example({"a_!!_!b", "a.~!...b"})  # one name with 24 bits of a digest
@example({"web_1", "web-1-c703c3ba9dda9d34"})
@example({"-", "3973e022e93220f9"})
def test_tasks_of_an_allocation_have_different_machine_names(distinct: set[str]) -> None:
    machines = {plan_machine(name, ALLOC) for name in distinct}
    assert len(machines) == len(distinct)


@given(task_names)
def test_machine_name_holds_the_whole_allocation_id(name: str) -> None:
    assert plan_machine(name, ALLOC).endswith(f"-{ALLOC}")


# -- environment ---------------------------------------------------------------------------------------------

EXACT = [
    "",
    "plain",
    " two  blanks\tand a tab ",
    'double " quote',
    "single ' quote",
    "'",
    "''",
    "'\"'\"'",
    "back\\slash \\n \\x41 \\",
    "$HOME ${PATH} $$ %h %%",
    "# ; = [Exec]",
    "ünïcödé 😀",
    "\x01\x1b[31m\x7f",
    "a=b=c",
]


def read_bundle(text: str) -> dict[str, str]:
    """Return the variables of a bundle's config.json, which must be ASCII: DEL, too, is refused by systemd."""
    assert re.fullmatch(r"[ -~]*", text)
    pairs = [entry.split("=", 1) for entry in json.loads(text)["process"]["env"]]
    assert len({name for name, _ in pairs}) == len(pairs)
    return {name: value for name, value in pairs}


def bundled(task: TaskConfig, options: dict[str, object] | None = None) -> dict[str, str]:
    return read_bundle(plan(command("a") if options is None else options, task=task).bundle)


@pytest.mark.parametrize("value", [*EXACT, "a\nb", "\r\n[Exec]\r\n"])
def test_bundle_keeps_every_byte(value: str) -> None:
    assert bundled(replace(TASK, env={"A": value})) == {"A": value}


def test_bundle() -> None:
    account = Account("www", 33, 34, (50, 7), "/srv")
    assert render_bundle({"HOME": "ü", "A": "b"}, account) == (
        '{"ociVersion": "1.0.0", "process": {"env": ["A=b", "HOME=\\u00fc", "LOGNAME=www", "USER=www"], '
        '"user": {"uid": 33, "gid": 34, "additionalGids": [50, 7]}}}'
    )
    assert render_bundle({}, None) == '{"ociVersion": "1.0.0", "process": {"env": []}}'


def test_bundle_takes_no_default_away() -> None:
    """nspawn would take "off" for these two as soon as there is a bundle."""
    assert set(AUTO) <= set(plan(command("a")).argv)
    argv = plan(command("a", timezone="off", resolv_conf="copy-host")).argv
    assert {"--timezone=off", "--resolv-conf=copy-host"} <= set(argv)
    assert not [word for word in argv if word.startswith(("--settings", "--setenv"))]


values = st.text(st.characters(exclude_categories=["Cs"])) | st.text("a'\"\\ \n\r\0=[]\t$%")


@given(st.dictionaries(names | values, values))
@example({"A": "x\0Bind=/:/host\0Environment=B='"})
@example({"A": "\ufffe", "B": "\ufdd0", "C": "\U0010ffff"})
@example({"A": "\ufffd", "B": "\ufdcf", "C": "\U0010fffd", "A=B": "x"})
def test_environment_arrives_exactly(variables: dict[str, str]) -> None:
    """And nothing else does. systemd takes neither NUL nor what is never a character."""
    kept = {name: value for name, value in variables.items() if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)}
    never = [value for value in kept.values() if any(ord(c) & 0xFFFE == 0xFFFE or c == "\0"
             or 0xFDD0 <= ord(c) <= 0xFDEF for c in value)]  # fmt: skip
    try:
        found = plan(command("a"), task=replace(TASK, env=variables))
    except ConfigError as error:
        assert never and error.option == "env"
        return
    assert not never
    assert read_bundle(found.bundle) == kept
    assert [note.split(" is not ")[0] for note in found.notes] == [
        f"The variable {name!r}" for name in sorted(variables.keys() - kept)
    ]


def test_value_that_is_no_text() -> None:
    """An image's config can hold half of a surrogate pair."""
    with pytest.raises(ConfigError) as caught:
        check_environment({"A": "x\ud800"})
    assert str(caught.value) == (
        'env = "A": the value must not hold the character U+D800: systemd-nspawn takes text only; '
        "put the value into a file with a template block"
    )


LIMIT = 131072  # MAX_ARG_STRLEN of the kernel: bytes of one string, with the final NUL


@pytest.mark.parametrize(("name", "letter"), [("A", "a"), ("A", "é"), ("NAME", "a")])
def test_largest_variable(name: str, letter: str) -> None:
    room = LIMIT - len(name) - 2
    largest = letter * (room // len(letter.encode()))
    check_environment({name: largest})
    with pytest.raises(ConfigError) as caught:
        check_environment({name: largest + letter})
    assert str(caught.value) == (
        f'env = "{name}": a variable may have 128 KiB, this one has 128; '
        "put the value into a file with a template block"
    )


def test_size_is_said() -> None:
    with pytest.raises(ConfigError, match="this one has 300;"):
        check_environment({"A": "a" * (300 << 10)})


def test_largest_environment() -> None:
    """The kernel takes 2 MiB for arguments and environment together."""
    variables = {f"A{number}": "a" * 102_394 for number in range(16)}
    with pytest.raises(ConfigError) as caught:
        check_environment(variables)
    assert str(caught.value) == (
        'env = "1599 KiB": all variables together may have 1536 KiB; '
        "put large values into files with template blocks"
    )
    del variables["A0"]
    check_environment(variables)


def test_nomads_variables_win() -> None:
    found = bundled(replace(TASK, env={"A": "nomad"}), command("a", environment=[{"A": "job", "B": "job"}]))
    assert found == {"A": "nomad", "B": "job"}


@pytest.mark.parametrize(
    ("options", "env", "expected"),
    [
        ({}, {}, {"TERM": "dumb"}),
        ({}, {"TERM": "xterm"}, {"TERM": "xterm"}),
        ({"environment": [{"TERM": "vt100"}]}, {}, {"TERM": "vt100"}),
        (command("a"), {}, {}),
    ],
)
def test_booted_systems_have_no_colours(
    options: dict[str, object], env: dict[str, str], expected: dict[str, str]
) -> None:
    assert bundled(replace(TASK, env=env), options) == expected


def test_user_of_the_image_has_a_home(tmp_path: Path) -> None:
    """nspawn sets these three for a user by name only. The job's own win."""
    account = Account("www", 33, 34, (), "/srv")
    found = plan(command("a", user="www"), task=replace(TASK, env={"HOME": "/mine"}), account=account)
    assert read_bundle(found.bundle) == {"HOME": "/mine", "USER": "www", "LOGNAME": "www"}
    assert not [word for word in found.argv if word.startswith("-u")]
    assert (found.inside.user, found.inside.account) == ("www", account)


def test_values_are_in_the_bundle_only() -> None:
    task = replace(TASK, env={"TOKEN": "s3cret", "KEY": "-----BEGIN\ns3cret\n-----END", "LD_PRELOAD": "s3cret"})
    found = plan(command("a", environment=[{"PASSWORD": "s3cret"}]), task=task)
    assert "s3cret" not in " ".join((*found.argv, *found.environ.values()))
    assert found.bundle.count("s3cret") == 4


# -- cgroups -------------------------------------------------------------------------------------------------

GIVEN = "/sys/fs/cgroup/nomad.slice/share.slice/a.web.scope"
OWN = f"nomad.slice/share.slice/{ALLOC}.web.scope"


@pytest.mark.parametrize(
    ("mode", "given_path", "expected"),
    [
        (CgroupMode.V2, GIVEN, GIVEN),
        (CgroupMode.V2, "/sys/fs/cgroup/x.slice/a.scope", "/sys/fs/cgroup/x.slice/a.scope"),
        (CgroupMode.V2, "", f"/sys/fs/cgroup/{OWN}"),
        (CgroupMode.V2, "/sys/fs/cgroup/../../etc", f"/sys/fs/cgroup/{OWN}"),
        (CgroupMode.V2, "/sys/fs/cgroup/a/..", f"/sys/fs/cgroup/{OWN}"),
        (CgroupMode.V2, "/sys/fs/cgroup2/a", f"/sys/fs/cgroup/{OWN}"),
        (CgroupMode.V2, "/etc", f"/sys/fs/cgroup/{OWN}"),
        (CgroupMode.V2, "relative", f"/sys/fs/cgroup/{OWN}"),
        (CgroupMode.HYBRID, "/sys/fs/cgroup/cpuset/nomad/share", f"/sys/fs/cgroup/unified/{OWN}"),
        (CgroupMode.HYBRID, "", f"/sys/fs/cgroup/unified/{OWN}"),
    ],
)
def test_cgroup(mode: CgroupMode, given_path: str, expected: str) -> None:
    assert plan_cgroup(mode, given_path, ALLOC, "web") == expected


def test_no_task_without_the_second_hierarchy() -> None:
    with pytest.raises(HostError, match="no cgroup v2 hierarchy on this machine: boot it with"):
        plan_cgroup(None, "", ALLOC, "web")


@pytest.mark.parametrize(
    "given_path", ["/sys/fs/cgroup", "/sys/fs/cgroup/", "/sys/fs/cgroup//", "/sys/fs/cgroup/."]
)
def test_root_cgroup_is_never_a_tasks(given_path: str) -> None:
    """The end of the task would be the end of the machine: all processes in its cgroup are killed."""
    assert plan_cgroup(CgroupMode.V2, given_path, ALLOC, "web") == f"/sys/fs/cgroup/{OWN}"


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
@example("", "")
@example("..", "..")
@example(ALLOC, "../../../system.slice/ssh.service")
@example(ALLOC, "a/b")
@example(ALLOC, "a\nb")
@example(ALLOC, "é" * 300)
@example(ALLOC, "a" * 163)
def test_own_cgroup_is_one_folder_whatever_the_name(alloc_id: str, name: str) -> None:
    path = plan_cgroup(CgroupMode.V2, "", alloc_id, name)
    parent, _, folder = path.rpartition("/")
    assert parent == "/sys/fs/cgroup/nomad.slice/share.slice"
    assert re.fullmatch(r"[\w.~%-]+\.scope", folder, re.ASCII)
    assert len(folder) <= 255


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=2, max_size=5))
@example({"é" * 300, "é" * 301})
@example({"a" * 300, "a" * 301})
@example({"a/b", "a%2Fb"})
def test_own_cgroups_are_distinct(distinct: set[str]) -> None:
    found = {plan_cgroup(CgroupMode.V2, "", ALLOC, name) for name in distinct}
    assert len(found) == len(distinct)


# -- volumes -------------------------------------------------------------------------------------------------


def volumes(
    options: Mapping[str, object] | None = None,
    mounts: Mounts = EXT4,
    asked: tuple[Mount, ...] = (),
) -> list[str]:
    task = replace(TASK, mounts=asked)
    staged_sources = stage_directories(task, find_directories(task), state_directory(TASK.id))
    planned = plan_volumes(task, read_options(**options or {}), mounts, staged_sources)
    return [volume.argv for volume in planned]


def test_task_directories() -> None:
    assert volumes() == list(VOLUMES)


@pytest.mark.parametrize(
    ("mappable", "mapped"),
    [
        ("", []),
        (f"{ALLOC_DIR}/web/secrets", ["/secrets"]),
        (f"{ALLOC_DIR}/", ["/alloc", "/local", "/secrets"]),
    ],
)
def test_only_what_can_be_mapped_is(mappable: str, mapped: list[str]) -> None:
    found = volumes(mounts=Mounts(EXT4.points, lambda path: bool(mappable) and path.startswith(mappable)))
    assert [word.split(":")[1] for word in found if word.endswith(":idmap")] == mapped
    assert [word.split(":")[1] for word in found] == ["/alloc", "/alloc/logs", "/local", "/secrets"]


@pytest.mark.parametrize("namespacing", [True, False])
def test_logs_are_read_only_and_never_mapped(namespacing: bool) -> None:
    found = volumes({"user_namespacing": namespacing})
    assert [word for word in found if "/logs" in word] == [f"--bind-ro={DIRECTORIES}/1:/alloc/logs"]
    assert [word for word in found if word.startswith("--bind-ro=")] == found[1:2]


def test_nothing_is_mapped_without_user_namespace() -> None:
    assert not any(word.endswith(":idmap") for word in volumes({"user_namespacing": False}))


def test_nomads_volumes() -> None:
    asked = (
        Mount("/srv/data", "/data", read_only=False),
        Mount("/srv/a:b", "/ro:x", read_only=True, propagation="private"),
        Mount("/mnt/nfs/x", "/nfs", read_only=False, propagation="host-to-task"),
    )
    mounts = Mounts(EXT4.points, lambda path: not path.startswith("/mnt/nfs"))
    assert volumes(asked=asked, mounts=mounts)[4:] == [
        f"--bind={DIRECTORIES}/4:/data:idmap",
        rf"--bind-ro={DIRECTORIES}/5:/ro\:x:idmap",
        f"--bind={DIRECTORIES}/6:/nfs",
    ]


def test_bidirectional_volumes_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        volumes(asked=(Mount("/a", "/b", propagation="bidirectional"),))
    assert str(caught.value) == (
        'volume_mount.propagation_mode = "bidirectional": systemd-nspawn cannot pass mounts back to the host; '
        "use private or host-to-task"
    )


def test_labels_are_never_ignored() -> None:
    task = replace(TASK, mounts=(Mount("/srv", "/data", selinux_label="z"),))
    with pytest.raises(ConfigError) as caught:
        plan({}, task=task)
    assert str(caught.value) == (
        'volume_mount.selinux_label = "z": is not possible: this driver gives no labels to the files of volumes; '
        "leave it out, and label them on the host with semanage fcontext and restorecon"
    )
    off = replace(HOST, has_selinux=False)
    assert (
        "selinux_label of the volume /data has no effect: SELinux is off on this host."
        in plan({}, task=task, host=off).notes
    )
    with pytest.raises(ConfigError, match=r'^selinux_context = "a": needs SELinux, which is off on this host'):
        plan({"selinux_context": "a"}, host=off)


@pytest.mark.parametrize("target", ["data", "", "/data/../etc", ".."])
def test_volumes_have_absolute_targets(target: str) -> None:
    with pytest.raises(ConfigError, match=r"^volume_mount = "):
        volumes(asked=(Mount("/a", target, False),))


def test_mount_table() -> None:
    options: dict[str, Any] = {"bind": [{"/srv/a": "/a/"}]}
    options["bind_read_only"] = [{"/srv/b": "/b"}]
    options |= {"tmpfs": ["/cache:size=1M"], "overlay": ["+/etc::/etc"], "inaccessible": ["/hidden"]}
    assert plan(options, task=replace(TASK, mounts=(Mount("/srv/v", "/v", False),))).mount_table == {
        **dict.fromkeys(("/dev", "/proc", "/run", "/sys", "/tmp", "/cache", "/etc", "/hidden"), ""),
        "/alloc": f"{DIRECTORIES}/0",
        "/alloc/logs": f"{DIRECTORIES}/1",
        "/local": f"{DIRECTORIES}/2",
        "/secrets": f"{DIRECTORIES}/3",
        "/v": f"{DIRECTORIES}/4",
        "/a": f"{MOUNTS}/0",
        "/b": f"{MOUNTS}/1",
    }


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"bind": [{"/srv/a": "/a"}], "bind_read_only": [{"/srv/b": "/a/:norbind"}]},
            'bind_read_only = "/srv/b": is for the path /a in the container, as is bind /srv/a; '
            "give each a path of its own",
        ),
        (
            {"bind": [{"/srv/a": "//local"}]},
            'bind = "/srv/a": is for the path /local in the container, as is the task\'s own directory; '
            "give each a path of its own",
        ),
        (
            {"mount": [{"source": source, "target": "/a"} for source in ("/srv/a", "/srv/b")]},
            'mount = "/srv/b": is for the path /a in the container, as is mount /srv/a; '
            "give each a path of its own",
        ),
        (
            {"devices": [{"host_path": "/dev/a"}, {"host_path": "/dev/b", "container_path": "/dev//a"}]},
            'devices = "/dev/b": is for the path /dev/a in the container, as is devices /dev/a; '
            "give each a path of its own",
        ),
        (
            {"overlay": ["+/v::/v"]},
            'volume_mount = "/srv/v": is for the path /v in the container, as is overlay +/v::/v; '
            "give each a path of its own",
        ),
    ],
)
def test_two_mounts_on_one_path(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_targets(replace(TASK, mounts=(Mount("/srv/v", "/v", False),)), read_options(**options))
    assert str(caught.value) == sentence


@given(st.text(), st.text("\\:a"), st.sampled_from(["", ":idmap"]))
def test_paths_are_escaped_for_nspawn(source: str, target: str, option: str) -> None:
    text = f"{escape_field(source)}:{escape_field(target)}{option}"
    assert split_fields(text) == [source, target, *option.split(":")[1:]]


@given(st.lists(st.text(), min_size=1))
def test_fields_are_split_as_nspawn_does(fields: list[str]) -> None:
    text = ":".join(escape_field(field) for field in fields)
    assert mounts.split_fields(text) == split_fields(text) == fields


@pytest.mark.parametrize(
    ("text", "path", "options"),
    [
        ("/a", "/a", ""),
        ("/a:idmap", "/a", "idmap"),
        ("/a:norbind,rootidmap", "/a", "norbind,rootidmap"),
        ("/a:ro", "/a:ro", ""),
        ("/a:b:idmap", "/a:b", "idmap"),
        ("/a:idmap,", "/a:idmap,", ""),
        ("/a:", "/a:", ""),
    ],
)
def test_bind_options(text: str, path: str, options: str) -> None:
    assert parse_bind(text) == (path, tuple(filter(None, options.split(","))))


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("SIGTERM", 15),
        ("TERM", 15),
        ("sigterm", 15),
        ("15", 15),
        ("SIGHUP", 1),
        ("USR1", 10),
        ("SIGKILL", 9),
        ("SIGIOT", 6),
        ("SIGRTMIN", 34),
        ("SIGRTMIN+4", 38),
        ("RTMIN+3", 37),
        ("SIGRTMAX-1", 63),
        ("SIGRTMAX", 64),
        ("64", 64),
    ],
)
def test_signal(name: str, number: int) -> None:
    assert parse_signal(name) == number


@pytest.mark.parametrize(
    "name",
    ["", "SIG", "SIGFOO", "0", "-1", "65", "999", "SIGRTMIN+31", "SIGRTMAX+1", "TERM+1", "SIGTERM ", "SIGSIGTERM"]
    + ["TERM\n", "SIG_IGN", "1.5", "SIGRTMIN-34", "9" * 5000, "RTMIN+" + "9" * 5000],
)
def test_no_signal(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_signal(name)
    assert str(caught.value).startswith("signal = ")
    assert str(caught.value).endswith(": is not a signal; use a name such as SIGTERM, SIGHUP or SIGRTMIN+4")


@given(st.text())
def test_any_name_is_a_signal_or_refused(name: str) -> None:
    try:
        number = parse_signal(name)
    except ConfigError:
        return
    assert 0 < number < signal.NSIG


@pytest.mark.parametrize("number", range(1, signal.NSIG))
def test_signal_names_can_be_read_back(number: int) -> None:
    assert parse_signal(render_signal(number)) == number


@pytest.mark.parametrize(
    ("mode", "kill_signal", "number"),
    [
        (Mode.BOOT, "", 38),
        (Mode.BOOT, "SIGTERM", 38),  # systemd would re-execute itself
        (Mode.BOOT, "SIGINT", 38),  # systemd would reboot
        (Mode.BOOT, "SIGRTMIN+3", 37),
        (Mode.BOOT, "SIGPWR", 30),
        (Mode.BOOT, "SIGKILL", 9),
        (Mode.COMMAND, "", 15),
        (Mode.COMMAND, "SIGTERM", 15),
        (Mode.COMMAND, "SIGINT", 2),
        (Mode.COMMAND, "SIGUSR1", 10),
        (Mode.PROCESS_TWO, "", 15),
        (Mode.PROCESS_TWO, "SIGINT", 2),
        (Mode.PROCESS_TWO, "quit", 3),
    ],
)
def test_stop_signal(mode: Mode, kill_signal: str, number: int) -> None:
    assert mode.stop_signal(kill_signal) == number


@pytest.mark.parametrize("mode", Mode)
def test_stop_signal_that_is_none(mode: Mode) -> None:
    with pytest.raises(ConfigError, match="SIGFOO"):
        mode.stop_signal("SIGFOO")


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, Mode.BOOT),
        (command("a"), Mode.COMMAND),
        (command("a", process_two=True), Mode.PROCESS_TWO),
    ],
)
def test_mode(options: dict[str, object], mode: Mode) -> None:
    assert plan(options).options.mode is mode


# -- what nspawn says ----------------------------------------------------------------------------------------


def test_nspawn_log() -> None:
    text = (
        "<27>systemd-nspawn[123]: Failed to resolve user nouser.\n"
        "<27>systemd-nspawn[4194304]: Child died too early.\n"
        "<30>(sd-namespace)[7]:   blanks around  \n"
        "\n"
        '<28>systemd-nspawn[1]: Attempted to remove disk file system under "/run/systemd/nspawn/propagate/x", '
        "and we can't allow that.\n"
        "<27>systemd-nspawn[1]: Short read while reading cgroup mode (0 bytes). The child is most likely dead.\n"
        "a line without a header\n"
        "<27>systemd-nspawn[1]: a[2]: b\n"
    )
    assert parse_nspawn_log(text) == [
        "Failed to resolve user nouser.",
        "blanks around",
        "a line without a header",
        "a[2]: b",
    ]


def test_nspawn_log_of_nothing() -> None:
    assert parse_nspawn_log("") == []


# nspawn's words, the option that our sentence names, and whether another start may go well.
EXPLAINED: list[tuple[str, str, bool]] = [
    ("Directory tree /var/lib/machines/debian is currently busy.", "image", True),
    ("Disk image /srv/a b.raw is currently busy.", "image", True),
    ("AmbientCapability= setting is not fully covered by Capability= setting.", "ambient_capability", False),
    ("Network interface eth9 is not initialized yet.", "network", True),
    ("Failed to resolve user nouser.", "user", False),
    ("Changing privileges failed: Invalid argument", "user", False),
    ("setresuid() failed: Invalid argument", "user", False),
    ("Failed to change to specified working directory /nodir: No such file or directory", "working_directory", False),
    ("Sorry, but --image= requires access to the host's /run/ hierarchy, since we need access to udev.", "image", False),
    ("Failed to set up ID mapped mounts: Device or resource busy", "user_namespacing", False),
    ("ID mapped mounts are apparently not available, sorry.", "user_namespacing", False),
    ("Failed to create mount point /srv/i/alloc: Read-only file system", "read_only", False),
    ("Failed to copy /a: No space left on device", "image", True),
]  # fmt: skip


@pytest.mark.parametrize(("line", "option", "transient"), EXPLAINED)
def test_known_message(line: str, option: str, transient: bool) -> None:
    known = find_message(["something else", line, "No space left on device"])
    assert str(known).startswith(f"{option}: ") and str(known).endswith(f" (systemd-nspawn: {line})")
    assert type(known) is (TransientError if transient else DriverError)
    failure = explain_failure([line], 1)
    assert (str(failure), type(failure)) == (str(known), type(known))


def test_what_nspawn_says_is_filled_in() -> None:
    line = "Failed to change to specified working directory /a {b}: No such file or directory"
    assert str(find_message([line])) == (
        f"working_directory: there is no directory /a {{b}} in the container (systemd-nspawn: {line})"
    )


@pytest.mark.parametrize("pattern", [pattern for pattern, _, _ in SENTENCES])
def test_every_message_is_explained_above(pattern: str) -> None:
    assert any(re.search(pattern, line) for line, _, _ in EXPLAINED)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Failed to stat /a: Permission denied"],
        ["execv(/nope) failed: No such file or directory"],
        ["Container x1 terminated by signal KILL."],
    ],
)
def test_unknown_message(lines: list[str]) -> None:
    assert find_message(lines) is None


def test_failure_with_unknown_words_repeats_the_last_ones() -> None:
    failure = explain_failure(["first", "a.", "b {0}.", "c."], 1)
    assert str(failure) == "systemd-nspawn could not start the container: a. b {0}. c."
    assert type(failure) is DriverError


def test_failure_without_words() -> None:
    failure = explain_failure([], 137)
    assert str(failure) == (
        "systemd-nspawn ended with status 137 before the container was up, and said nothing here; the task's "
        "stderr may have its words"
    )
    assert failure.recoverable


# -- exits ---------------------------------------------------------------------------------------------------

KILLED = "Container x1 terminated by signal KILL."
UNKNOWN = "ended by a signal, or with exit code 255: systemd-nspawn does not tell which with process_two"
REBOOT = "the container asked for a reboot; Nomad's restart policy decides"
B, C, P = Mode.BOOT, Mode.COMMAND, Mode.PROCESS_TWO

# case, mode, nspawn's status, its messages, last signal sent; code, signal, sentence
EXITS: list[tuple[str, Mode, int, list[str], int, int, int, str]] = [
    ("payload exit 0", C, 0, [], 0, 0, 0, ""),
    ("payload exit 0, pid2", P, 0, [], 0, 0, 0, ""),
    ("payload exit N", C, 7, [], 0, 7, 0, ""),
    ("payload exit N, pid2", P, 42, [], 0, 42, 0, ""),
    ("payload exit N after a signal it handles", P, 42, [], 15, 42, 0, ""),
    ("payload exit 133", C, 1, [], 0, 1, 0, ""),
    ("payload exit 255", C, 255, [], 0, 255, 0, ""),
    ("payload exit 255 after a signal", C, 255, [], 15, 255, 0, ""),
    ("payload exit 137 by itself", C, 137, [], 0, 137, 0, ""),
    ("pid2: killed by a signal nobody sent", P, 255, [], 0, 255, 0, UNKNOWN),
    ("pid2: killed by Nomad's SIGTERM", P, 255, [], 15, 143, 15, ""),
    ("pid2: killed by Nomad's SIGUSR1", P, 255, [], 10, 138, 10, ""),
    ("plain: leader killed", C, 1, [KILLED], 0, 137, 9, ""),
    ("plain: leader killed, other words before", C, 1, ["x", KILLED], 15, 137, 9, ""),
    ("plain: leader crashed", C, 1, ["Container x1 terminated by signal SEGV."], 0, 139, 11, ""),
    ("plain: real-time signal", C, 1, ["Container x1 terminated by signal RTMIN+3."], 0, 165, 37, ""),
    ("missing command", C, 1, ["execv(/nope) failed: No such file or directory"], 0, 1, 0, ""),
    ("reboot inside", C, 133, ["Rebooting."], 0, 133, 0, REBOOT),
    ("reboot of a booted one", B, 133, [], 0, 133, 0, REBOOT),
    ("poweroff inside", C, 0, ["Powering off."], 0, 0, 0, ""),
    ("booted halt", B, 0, [], 38, 0, 0, ""),
    ("machinectl terminate, plain", C, 1, [KILLED], 0, 137, 9, ""),
    ("SIGTERM to nspawn, pid2", P, 1, [KILLED], 0, 137, 9, ""),
    ("init's own exit code", B, 3, [], 0, 3, 0, ""),
]


@pytest.mark.parametrize(
    ("mode", "status", "lines", "sent", "code", "number", "error"),
    [row[1:] for row in EXITS],
    ids=[row[0] for row in EXITS],
)
def test_exit(mode: Mode, status: int, lines: list[str], sent: int, code: int, number: int, error: str) -> None:
    found = explain_exit(Ending(mode, 5.0, ExitRecord(status, False, 5.0), False, lines, "", sent))
    assert found == ExitResult(code, number, error, 5.0)


@pytest.mark.parametrize("mode", Mode)
def test_exit_of_a_killed_nspawn(mode: Mode) -> None:
    found = explain_exit(Ending(mode, 5.0, ExitRecord(137, True, 5.0), is_cut_short=True))
    why = "systemd-nspawn itself was killed (status 137); the container was ended with it"
    assert found == ExitResult(137, 9, why, 5.0)
    found = explain_exit(Ending(mode, 5.0, ExitRecord(137, False, 5.0), is_cut_short=True))
    why = "systemd-nspawn itself was killed (status 137) when the container had ended: its exit code is not known"
    assert found == ExitResult(137, 9, why, 5.0)
    assert explain_exit(Ending(mode, 5.0, ExitRecord(137, True, 5.0))) == ExitResult(137, 0, "", 5.0)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("is_orphaned", [True, False])
@pytest.mark.parametrize("record", [None, ExitRecord(255, True, 5.0)])
def test_exit_by_the_driver(mode: Mode, is_orphaned: bool, record: ExitRecord | None) -> None:
    found = explain_exit(Ending(mode, 5.0, record, is_orphaned, [KILLED], "killed: too slow", 15))
    assert found == ExitResult(137, 9, "killed: too slow", 5.0)


def test_exit_without_a_record() -> None:
    lost = "the container's shim was killed, so the exit code is not known"
    assert explain_exit(Ending(Mode.COMMAND, 5.0, None)) == ExitResult(1, 0, lost, 5.0)
    lost = "the container's shim and systemd-nspawn were killed; the container was ended with them"
    assert explain_exit(Ending(Mode.COMMAND, 5.0, None, is_orphaned=True)) == ExitResult(137, 9, lost, 5.0)


@pytest.mark.parametrize("code", [1, 126, 127])
def test_exit_of_a_command_that_cannot_be_executed(code: int) -> None:
    end = Ending(Mode.COMMAND, 5.0, ExitRecord(code, False, 5.0))
    assert explain_exit(end) == ExitResult(code, 0, "", 5.0)
    line = "Failed to change to specified working directory /nodir: No such file or directory"
    assert explain_exit(replace(end, lines=[line])).error.startswith("working_directory: there is no")


@given(
    st.sampled_from(Mode),
    st.builds(ExitRecord, st.integers(0, 255), st.booleans(), st.just(5.0)),
    st.lists(st.text() | st.text().map("Container x terminated by signal {}.".format), max_size=3),
    st.integers(0, 64),
)
@example(Mode.COMMAND, ExitRecord(1, False, 5.0), ["Container x terminated by signal n/a."], 0)
@example(Mode.COMMAND, ExitRecord(1, False, 5.0), ["Container x terminated by signal 99."], 0)
def test_every_end_has_an_explanation(mode: Mode, record: ExitRecord, lines: list[str], sent: int) -> None:
    """An exception here would leave the task running for ever in Nomad's eyes."""
    found = explain_exit(Ending(mode, record.at, record, False, lines, "", sent))
    assert 0 <= found.code <= 255
    assert found.at == record.at


# -- state ---------------------------------------------------------------------------------------------------

SOCKET_PATH = 107  # bytes in a sockaddr_un, without the final NUL


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("")
@example("/")
@example("..")
@example("../../etc")
@example(TASK.id)
@example(f"{ALLOC}/{'é' * 200}/0a1b2c3d")
@example("a\0b\n")
def test_state_directory(task_id: str) -> None:
    path = state_directory(task_id)
    assert path.parent == STATE_ROOT
    assert path.name not in (".", "..")
    assert re.fullmatch(r"[A-Za-z0-9-]+", path.name)
    assert len(f"{path}/notify".encode()) <= SOCKET_PATH
    assert not path.name.startswith("plugin-") or task_id.startswith("plugin")  # a plugin's own socket


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=10))
@example({"a/b", "a-b", "a_b", "a//b"})
@example({"x" * 60 + "1", "x" * 60 + "2"})
@example({f"{ALLOC}/web/0a1b2c3d", f"{ALLOC}/web/0a1b2c3e"})
def test_state_directories_are_distinct(ids: set[str]) -> None:
    assert len({state_directory(task_id) for task_id in ids}) == len(ids)


processes = st.builds(ProcessId, st.integers(1, 1 << 22), st.integers(0, 1 << 62))
words = st.text(st.characters(exclude_characters="/\0"), min_size=1).filter(lambda word: word not in (".", ".."))
states = st.builds(
    State,
    task_id=st.text(),
    machine=st.from_regex(r"[A-Za-z0-9-]{1,64}", fullmatch=True),
    mode=st.sampled_from(Mode),
    cgroup=words.map("/sys/fs/cgroup/x.slice/{}".format),
    boot_id=st.text(),
    shim=processes,
    leader=st.none() | processes,
    started_at=st.floats(0, 1e11),
    image=st.just("") | words.map("/images/{}".format),
    upper_dir=st.just("") | words.map("/allocs/{}/.nspawn-root".format),
    users=st.lists(st.tuples(st.integers(0, 1 << 32), st.integers(0, 1 << 32)), max_size=3).map(tuple),
    labels=st.lists(st.tuples(st.text(), st.text()), max_size=3).map(tuple),
)
STATE = State(
    task_id=TASK.id,
    machine=MACHINE,
    mode=Mode.BOOT,
    cgroup=GIVEN,
    boot_id="b",
    shim=ProcessId(10, 20),
    leader=ProcessId(11, 21),
    started_at=1.5,
    image="/i",
    upper_dir="/p/.nspawn-root",
)


# What would be killed or removed is never anything else of the machine, whoever has written the state.
UNSAFE: list[dict[str, Any]] = [
    {"cgroup": "/sys/fs/cgroup"},
    {"cgroup": "/sys/fs/cgroup/unified"},
    {"cgroup": "/sys/fs/cgroup/../../../etc"},
    {"cgroup": "/etc"},
    {"cgroup": 5},
    {"upper_dir": "/"},
    {"upper_dir": "/home"},
    {"upper_dir": "/x/../.nspawn-root/../home"},
    {"machine": "../../etc"},
    {"machine": ""},
    {"zone": "../x"},
    {"link": "eth0"},
    {"upper_dir": "x/.nspawn-root"},
    {"shim": ProcessId(-1, 0)},
    {"leader": ProcessId("1", 0)},  # type: ignore[arg-type]
    {"ports": ((1, "x"),)},
    {"users": ((1, 2.5),)},
    {"boot_id": 1},
    {"journal": "/etc"},
    {"journal": "/var/log/journal/../../../etc"},
    {"started_at": "now"},
    {"image": "/i/..", "locks": ("/i/../.#.#machine.1234567890abcdef.lck",)},
    {"locks": (5,)},
    {"labels": (("a", 5),)},
    {"job": 5},
]


def test_locks_of_a_state() -> None:
    locks = (
        "/i/.#a.raw.lck",
        "/i/.#.#machine.a.raw1234567890abcdef.lck", "/i/a.raw/.#.#snapshot.1234567890abcdef.lck",
    )  # fmt: skip
    state = replace(STATE, image="/i/a.raw", locks=locks)
    assert State.parse(state.render()) == state


@pytest.mark.parametrize(
    "lock",
    [
        "/etc/passwd",
        "/run/systemd/nspawn-uid/5",  # as earlier builds noted it
        "/.#.#machine.1234567890abcdef.lck",
        "/i/.#.#machine.b1234567890abcdef.lck",
        "/i/.#.#machine.a.lck",
        "/i/a/../.#.#machine.a1234567890abcdef.lck",
    ],
)
def test_a_state_has_no_locks_of_others(lock: str) -> None:
    """The task is taken up, and the lock stays."""
    state = replace(STATE, image="/i/a", locks=(lock,))
    assert State.parse(state.render()) == replace(state, locks=())


@given(states)
def test_state_comes_back(state: State) -> None:
    assert State.parse(state.render()) == state
    assert State.parse(state.render().encode()) == state


def test_state_directory_of_a_state() -> None:
    assert STATE.directory == state_directory(STATE.task_id)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is damaged"),
        ("{", "it is damaged"),
        ("{}", "it is damaged"),
        ("[]", "it is damaged"),
        ("null", "it is damaged"),
        ("5", "it is damaged"),
        (b"\xff\xfe", "it is damaged"),
        ('{"version": 1}', "it is damaged"),
        ('{"version": 2}', "it is of version "),
        ('{"version": "1"}', "it is of version "),
        (STATE.render().replace('"version": 1', '"version": 999'), "it is of version "),
        (STATE.render().replace('"boot"', '"bott"'), "it is damaged"),
        (STATE.render().replace('"machine"', '"maschine"'), "it is damaged"),
        (STATE.render().replace('"pid"', '"dip"'), "it is damaged"),
        (STATE.render()[:-1], "it is damaged"),
        *((replace(STATE, **change).render(), "it is damaged") for change in UNSAFE),
    ],
)
def test_state_that_cannot_be_read(text: str | bytes, why: str) -> None:
    with pytest.raises(ValueError, match=f"^the task's stored state cannot be read: .*{re.escape(why)}"):
        State.parse(text)


def test_handle_of_the_go_driver() -> None:
    handle = msgpack.packb({"TaskConfig": {"ID": "a/web/1"}, "MachineName": "web-a", "StartedAt": b"\0"})
    with pytest.raises(ValueError, match=r"was started by the Go driver.*Drain a client before"):
        State.parse(handle)


def test_state_of_a_later_release_is_read() -> None:
    """After a downgrade tasks are still found: a field this release does not know is no reason to lose one."""
    assert State.parse(STATE.render().replace("{", '{"of_tomorrow": [1], ', 1)) == STATE


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(json.loads(STATE.render()))), json_values)
@example("shim", {"pid": 1, "started": True})
@example("mounts", {"a": ["b"]})
@example("version", [])
def test_any_field_may_be_garbage(name: str, value: Any) -> None:
    """It is a state as others are, or there is a sentence."""
    with contextlib.suppress(ValueError):
        state = State.parse(json.dumps({**json.loads(STATE.render()), name: value}))
        assert State.parse(state.render()) == state
        assert state.cgroup == "" or state.cgroup.startswith("/sys/fs/cgroup/")


@given(st.text() | st.binary())
@example(b"MachineName")
def test_garbage_is_no_state(text: str | bytes) -> None:
    with pytest.raises(
        ValueError, match=r"^the task('s stored state cannot be read: | was started by the Go driver)"
    ):
        State.parse(text)


@pytest.mark.parametrize(
    ("task_id", "alloc_id", "name"),
    [(TASK.id, ALLOC, "web"), ("a/b/c/0a1b2c3d", "a", "b/c"), ("a", "a", "")],
)
def test_event_names_its_task(task_id: str, alloc_id: str, name: str) -> None:
    assert split_id(task_id) == (alloc_id, name)


# --- what a container says to its notify socket ---

texts = st.binary(max_size=200).map(lambda text: text.replace(b"\n", b""))


@given(texts)
@example(b"hello\vX_NSPAWN_LEADER_PID=1\vREADY=1")
@example("hello\u2028X_NSPAWN_LEADER_PID=1\x85READY=1".encode())
@example(b"\rX_NSPAWN_LEADER_PID=1\r\0READY=1\0")
def test_status_of_a_payload_is_one_line(text: bytes) -> None:
    lines = split_notification(b"STATUS=Container running: " + text)
    assert len(lines) == 1
    assert parse_claim(5, lines[0]) is None


@given(st.binary(max_size=300) | st.from_regex(rb"(X_NSPAWN_LEADER_PID=.*\n?)*"))
@example(b"X_NSPAWN_LEADER_PID=")
@example("X_NSPAWN_LEADER_PID=\u0661".encode())
@example(b"X_NSPAWN_LEADER_PID=" + b"9" * 5000)
def test_any_datagram_can_be_read(data: bytes) -> None:
    for claim in (parse_claim(5, line) for line in split_notification(data)):
        assert claim is None or (claim.sender == 5 and 0 <= claim.leader < 10**9)


def test_leader_is_in_nspawns_own_message() -> None:
    lines = split_notification(b"STATUS=Container running.\nX_NSPAWN_LEADER_PID=4711")
    assert [parse_claim(5, line) for line in lines] == [None, Claim(5, 4711)]


# --- directories ---


def enter_directories(task: TaskConfig) -> None:
    with open_directories(task.alloc_dir, task.directory_names):
        pass


def make_allocation(root: Path) -> TaskConfig:
    for name in ("alloc/logs", "web/local", "web/secrets"):
        (root / name).mkdir(parents=True)
    return replace(TASK, alloc_dir=str(root))


@pytest.mark.parametrize("name", ["alloc", "alloc/logs", "web", "web/local", "web/secrets"])
def test_links_in_place_of_a_tasks_directories_are_refused(tmp_path: Path, name: str) -> None:
    """Another task of the allocation could make root mount or write what lies behind one."""
    task = make_allocation(tmp_path / "a")
    (tmp_path / "a" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "a" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match=f"/{name} is a symbolic link instead of a directory"):
        enter_directories(task)


def test_data_directory_may_lie_behind_a_link(tmp_path: Path) -> None:
    """The operator's own links are no concern: a data_dir on another disk is usual."""
    make_allocation(tmp_path / "disk/a")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    enter_directories(replace(TASK, alloc_dir=str(tmp_path / "data/a")))
    fifo = tmp_path / "data/a/alloc/logs/.web.stdout.fifo"
    os.mkfifo(fifo)
    os.close(open_log(str(fifo)))


@pytest.mark.parametrize(
    ("init", "command", "number"),
    [
        (Init("systemd"), (), POWER_OFF),
        (Init("init", caught=1 << POWER_OFF - 1), (), POWER_OFF),
        (Init("init", caught=1 << 14 | 1 << 29), ("poweroff",), signal.SIGPWR),
        (Init("s6-svscan", caught=1 << 14), ("poweroff",), signal.SIGTERM),
        (Init("busybox"), ("poweroff",), signal.SIGUSR2),
        (Init("dash"), ("poweroff",), 0),
        (Init("openrc-init", 1 << 14, blocked=1 << POWER_OFF - 1), ("openrc-shutdown", "--poweroff", "now"), 15),
    ],
)
def test_request_that_an_init_understands(init: Init, command: tuple[str, ...], number: int) -> None:
    assert plan_request(init, POWER_OFF) == Request(command, number)


def test_systemd_is_ready_when_it_takes_the_signal() -> None:
    assert not Init("systemd", caught=1 << 14).is_ready
    assert Init("systemd", blocked=1 << POWER_OFF - 1).is_ready
    assert not Init("systemd-nspawn").is_ready, "it has not executed the init yet"
    assert Init("runit").is_ready
