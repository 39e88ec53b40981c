# SPDX-License-Identifier: MPL-2.0
"""Options: the schema Nomad checks jobs against, what arrives from it, and the sentence for each mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from ipaddress import ip_address, ip_interface
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import driver
from driver import PLUGIN_OPTIONS, TASK_OPTIONS
from nspawn.checks import IdRange, IoLimit, any_of
from nspawn.common import ConfigError, DriverError
from nspawn.host import CgroupMode, Host
from nspawn.job import ImageDownload, JobOptions
from nspawn.mounts import Device, Mount, Overlay, parse_binds
from nspawn.options import (
    Kind,
    Option,
    decode_map,
    decode_number,
    decode_options,
    decode_string,
    is_set,
    render_section,
)
from nspawn.permissions import PERMISSIONS, Permission, PluginOptions, Size
from nspawn.process import run
from nspawn.rules import RULES, Rule, check_own_settings, check_permissions, check_plugin, check_rules, decode_job
from tests import agent
from tests.options import CONFIG, read_options

ALL_OPTIONS = (*TASK_OPTIONS, *PLUGIN_OPTIONS)
BY_NAME = {option.name: option for option in (*PLUGIN_OPTIONS, *TASK_OPTIONS)}
PLUGIN_ONLY = [option for option in PLUGIN_OPTIONS if option.name != "user_namespacing"]
# The options of the Go driver, with their types: jobs written for it run unchanged.
GO_OPTIONS = {
    "boot": ("bool", True),
    "ephemeral": ("bool", False),
    "process_two": ("bool", False),
    "read_only": ("bool", False),
    "user_namespacing": ("bool", True),
    "command": ("list(string)", ()),
    "console": ("string", None),
    "image": ("string", None),
    "image_download": ("block", None),
    "pivot_root": ("string", None),
    "private_users": ("string", "pick"),
    "private_users_ownership": ("string", "auto"),
    "resolv_conf": ("string", None),
    "user": ("string", None),
    "volatile": ("string", None),
    "working_directory": ("string", None),
    "bind": ("list(map(string))", ()),
    "bind_read_only": ("list(map(string))", ()),
    "environment": ("list(map(string))", {}),
    "port_map": ("list(map(number))", {}),
    "ports": ("list(string)", ()),
    "capability": ("list(string)", ()),
    "network_veth": ("bool", True),
    "network_zone": ("string", None),
    "network_bridge": ("string", None),
}


def make_host(systemd: int = 252) -> Host:
    return Host(systemd=systemd, kernel=(6, 1), cgroups=CgroupMode.V2, problems=())


def decode(**options: object) -> dict[str, Any]:
    """Decode a job's options as they come over the wire: packed, and with every key of the schema."""
    raw: dict[str, object] = {name: None for option in TASK_OPTIONS for name in option.names}
    packed = msgpack.packb({**raw, **options, "image": options.get("image", "debian")})
    return decode_options(TASK_OPTIONS, driver.unpack_options(packed))


def refusal(options: Sequence[Option], raw: Mapping[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        decode_options(options, raw)
    return str(caught.value)


# -- the tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ALL_OPTIONS, ids=lambda option: str(option.name))
def test_option_is_documented(option: Option) -> None:
    assert re.fullmatch(r"[A-Z].*\.", option.doc, re.DOTALL)
    assert "  " not in option.doc and "\n" not in option.doc


ALL_FIELDS = (*ALL_OPTIONS, *(inner for option in ALL_OPTIONS for inner in option.fields))


@pytest.mark.parametrize("options", [TASK_OPTIONS, PLUGIN_OPTIONS])
def test_names_are_unique_hcl_identifiers(options: Sequence[Option]) -> None:
    names = [name for option in options for name in option.names]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in names)


@pytest.mark.parametrize("option", ALL_FIELDS, ids=lambda option: str(option.name))
def test_default_is_a_value_of_the_option(option: Option) -> None:
    if option.default is None:
        return
    kinds = {
        Kind.BOOL: bool,
        Kind.NUMBER: int,
        Kind.STRING: str,
        Kind.STRINGS: tuple,
        Kind.STRING_MAP: tuple if option.check is parse_binds else dict,
        Kind.NUMBER_MAP: dict,
        Kind.STRINGS_MAP: dict,
        Kind.BLOCKS: tuple,
    }
    assert type(option.default) is kinds[option.kind]
    assert option.decode(option.default) == option.default


@pytest.mark.parametrize("option", ALL_FIELDS, ids=lambda option: str(option.name))
def test_row_is_whole(option: Option) -> None:
    assert option.example
    assert not (option.choices and option.kind is not Kind.STRING)
    assert bool(option.fields) == option.kind.is_block
    if option.argument:
        assert option.argument.startswith("-")
    if option.kind in (Kind.STRINGS, Kind.STRING_MAP, Kind.NUMBER_MAP, Kind.STRINGS_MAP):
        assert option.default is not None  # the plan walks over it


def example_of(option: Option, options: Sequence[Option]) -> str:
    """The option as a job has it, with what else is required."""
    line = f"{option.name}{' ' if option.kind.is_block else ' = '}{option.example}"
    required = [f"{other.name} = {other.example}" for other in options if other.required and other is not option]
    return "\n".join([*required, line])


def decode_hcl(options: Sequence[Option], body: str) -> dict[str, Any]:
    """Decode HCL the way a client does: by the schema, over the wire."""
    packed = agent.to_msgpack(agent.decode_config(driver.render_spec(options), body))
    return decode_options(options, driver.unpack_options(packed))


@pytest.mark.parametrize("options", [TASK_OPTIONS, PLUGIN_OPTIONS], ids=["task", "plugin"])
def test_every_example_is_a_value_other_than_the_default(options: Sequence[Option]) -> None:
    for option in options:
        value = decode_hcl(options, example_of(option, options))[option.name]
        assert (value != option.default and is_set(value)) or value is False, option.name
        for inner in option.fields:
            body = example_of(inner, option.fields)
            assert decode_hcl(option.fields, body)[inner.name] not in (None, inner.default), inner.name


@pytest.mark.parametrize(
    "option", [option for option in TASK_OPTIONS if option.aliases], ids=lambda o: str(o.name)
)
def test_aliases(option: Option) -> None:
    value = decode_hcl(TASK_OPTIONS, example_of(option, TASK_OPTIONS))[option.name]
    for alias in option.aliases:
        body = example_of(option, TASK_OPTIONS).replace(option.name, alias)
        assert decode_hcl(TASK_OPTIONS, body)[option.name] == value
        with pytest.raises(ConfigError, match=f"^{alias} = .*: is another name of {option.name}; set one"):
            decode_hcl(TASK_OPTIONS, f"{example_of(option, TASK_OPTIONS)}\n{alias} = {option.example}")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (TASK_OPTIONS, JobOptions),
        (PLUGIN_OPTIONS, PluginOptions),
        *((option.fields, option.into) for option in ALL_OPTIONS if option.fields),
    ],
)
def test_rows_are_the_fields_of_their_type(options: Sequence[Option], kind: Any) -> None:
    assert [option.name for option in options] == [field.name for field in fields(kind)]


# -- nspawn's own list ---------------------------------------------------------------------------------------

# All options of systemd-nspawn 262.
NSPAWN = """
    --quiet --settings --cleanup --directory --template --ephemeral --image --image-policy --mstack
    --oci-bundle --read-only --volatile --root-hash --root-hash-sig --verity-data --pivot-root --as-pid2
    --boot --chdir --setenv -u --kill-signal --notify-ready --suppress-sync --machine --hostname --uuid
    --slice --property --register --keep-unit --private-users --private-users-ownership
    --private-users-delegate -U --private-network --network-interface --network-macvlan --network-ipvlan
    --network-veth --network-veth-extra --network-bridge --network-zone --network-namespace-path --port
    --capability --drop-capability --ambient-capability --no-new-privileges --system-call-filter
    --restrict-address-families --selinux-context --selinux-apifs-context --rlimit --oom-score-adjust
    --cpu-affinity --personality --resolv-conf --timezone --link-journal -j --forward-journal
    --forward-journal-max-use --forward-journal-keep-free --forward-journal-max-file-size
    --forward-journal-max-files --bind --bind-ro --bind-user --bind-user-shell --bind-user-group
    --inaccessible --tmpfs --overlay --overlay-ro --console --pipe --background --load-credential
    --set-credential --system --user --no-pager --no-ask-password --help --version
""".split()  # noqa: SIM905 # as a text it is a fifth as long
BY_PLAN = {
    "--oom-score-adjust", "--bind", "--bind-ro", "--overlay", "--overlay-ro", "--load-credential",
    "--set-credential", "--link-journal",
}  # fmt: skip

# Options of nspawn that jobs do not have, each with the reason.
NOT_OFFERED = {
    "--quiet": "always set; its messages are in the task's events",
    "--settings": "settings files are never read: those beside an image come with the image",
    "--cleanup": "the driver cleans up itself",
    "--directory": "`image`",
    "--image": "`image`",
    "--template": "`ephemeral` gives each task its own root without a copy",
    "--mstack": "`image_download` brings images of several layers",
    "--oci-bundle": "the driver's own, for environment and user; images in this form come from a registry",
    "--verity-data": "put the hash partition into the disk image",
    "--setenv": "`environment`, and Nomad's `env` block",
    "--kill-signal": "Nomad's `kill_signal`, sent to the payload itself",
    "--machine": "made of the names of task and allocation",
    "--uuid": "the allocation's id",
    "--slice": "the task lives in the cgroup Nomad made for it",
    "--property": "the same; limits come from Nomad's `resources`",
    "--register": "the driver registers the machine where systemd-machined runs",
    "--keep-unit": "always set, for the same reason",
    "-U": "`user_namespacing`",
    "--network-namespace-path": "Nomad's `network` block makes the group's namespace",
    "--port": "`ports` and `port_map`",
    "--forward-journal": "root of the host would write to a path of the job's choice; use `link_journal`",
    "--forward-journal-max-use": "as `--forward-journal`",
    "--forward-journal-keep-free": "as `--forward-journal`",
    "--forward-journal-max-file-size": "as `--forward-journal`",
    "--forward-journal-max-files": "as `--forward-journal`",
    "-j": "`link_journal`",
    "--pipe": "`console`",
    "--background": "there is no terminal",
    "--no-pager": "there is no pager",
    "--no-ask-password": "nobody could be asked",
    "--system": "the driver runs as root",
    "--user": "the driver runs as root; the user inside is `user`",
    "--help": "`nomad-driver-nspawn options`",
    "--version": "the attribute `driver.nspawn.version` of the node",
}


def offered() -> set[str]:
    arguments = {option.argument.split("=")[0] for option in TASK_OPTIONS if option.argument}
    return arguments | BY_PLAN


def test_every_option_of_nspawn_is_offered_or_has_a_reason() -> None:
    assert set(NSPAWN) == offered() | set(NOT_OFFERED)


def test_options_are_nspawns_own() -> None:
    """What this machine's nspawn has is in the list above, by its long name."""
    shown = run(["systemd-nspawn", "--help"], timeout=30)
    have = set(re.findall(r"(?m)^\s+(?:-\w )?(--[a-z0-9-]+)", shown))
    assert len(have) > 50
    assert have <= set(NSPAWN)


# -- the reference -------------------------------------------------------------------------------------------


def test_row_of_the_reference() -> None:
    option = Option(
        "a",
        Kind.STRING,
        "First.",
        '"x"',
        default="y",
        aliases=("b",),
        choices=any_of("x", "y", z=260),
        since=251,
        permission=Permission.DEVICES,
    )
    assert render_section(option, "### `a`").splitlines() == [
        "### `a`",
        "",
        "First.",
        "",
        "* type: `string`",
        '* default: `"y"`',
        "* values: `x`, `y`, `z`",
        "* needs: systemd 251",
        "* needs: systemd 260, for `z`",
        "* also called: `b`",
        "* permission: [`allow`: devices](#permissions)",
        "",
        "```hcl",
        'a = "x"',
        "```",
    ]


@pytest.mark.parametrize("option", ALL_FIELDS, ids=lambda option: str(option.name))
def test_reference_is_no_broken_table(option: Option) -> None:
    assert "|" not in option.doc + option.example and "`" not in option.example


@pytest.mark.parametrize("name", GO_OPTIONS)
def test_option_of_the_go_driver(name: str) -> None:
    option = BY_NAME[name]
    kind, default = GO_OPTIONS[name]
    assert option.kind.value == kind
    assert option.required is (name == "image")
    if not option.required:
        assert str(getattr(read_options(), name)) == str(default)


def test_block_of_the_go_driver() -> None:
    block = decode(image_download={"url": "http://x/y", "type": None, "force": None, "verify": None})
    assert block["image_download"] == ImageDownload("http://x/y", "tar", "no", None, None, force=False)


@pytest.mark.parametrize("options", [TASK_OPTIONS, PLUGIN_OPTIONS])
def test_schema(options: Sequence[Option]) -> None:
    spec = driver.render_spec(options)
    assert spec.WhichOneof("block") == "object"
    assert set(spec.object.attributes) == {name for option in options for name in option.names}
    for option in options:
        for name in option.names:
            entry = spec.object.attributes[name]
            if option.kind is Kind.BLOCK:
                assert entry.block_value.name == name
                assert entry.block_value.nested == driver.render_spec(option.fields)
            elif option.kind is Kind.BLOCKS:
                assert entry.block_list.name == name
                assert entry.block_list.nested == driver.render_spec(option.fields)
            else:
                assert (entry.Attr.name, entry.Attr.type) == (name, option.kind.value)
                assert entry.Attr.required is option.required


# -- decoding ------------------------------------------------------------------------------------------------

# What an agent sends for what a job says; every row was seen from a real one.
DECODED: list[tuple[str, object, object]] = [
    ("boot", None, True),
    ("boot", True, True),
    ("boot", False, False),
    ("read_only", None, False),
    ("read_only", True, True),
    ("user", None, None),
    ("user", "", None),
    ("user", "www-data", "www-data"),
    ("user", "1000", "1000"),
    ("user", "Zoë", "Zoë"),
    ("command", None, ()),
    ("command", [], ()),
    ("command", ["a", "1", "true"], ("a", "1", "true")),
    ("command", ["a", ""], ("a", "")),
    ("command", ["a", None], ("a", "")),
    ("command", ["--", "-x", "a b", "a\nb"], ("--", "-x", "a b", "a\nb")),
    ("environment", None, {}),
    ("environment", [], {}),
    ("environment", [{}], {}),
    ("environment", [{"A": "b"}], {"A": "b"}),
    ("environment", [{"A": "1"}, {"B": "2"}], {"A": "1", "B": "2"}),
    ("environment", [{"A": "1", "B": "2"}, {"A": "3"}], {"A": "3", "B": "2"}),
    ("environment", [{"A": "1", "B": "true", "C": None}], {"A": "1", "B": "true", "C": ""}),
    ("environment", [{"A": "a\nb"}], {"A": "a\nb"}),
    ("bind", [{"/a": "/b"}], (Mount("/a", "/b"),)),
    (
        "bind",
        [{"/a": "/b"}, {"/a": "/c", "/d": "/e:idmap"}],
        (Mount("/a", "/c"), Mount("/d", "/e", options=("idmap",))),
    ),
    ("bind_read_only", [{"local/a": "/b:c"}], (Mount("local/a", "/b:c", read_only=True),)),
    ("mount", [{"source": "/a", "target": "/b"}], (Mount("/a", "/b"),)),
    (
        "mount",
        [
            {"source": "/a", "target": "/b", "type": "bind", "readonly": True, "options": ["norbind", "idmap"]},
            {"source": "local", "target": "/c"},
        ],
        (Mount("/a", "/b", read_only=True, options=("norbind", "idmap")), Mount("local", "/c")),
    ),
    ("overlay", ["/a:+/b::/c"], (Overlay("/a:+/b::/c", ("/a", "+/b", ""), "/c", read_only=False),)),
    ("private_users", "131072:10", IdRange("131072:10", 131072, 10)),
    ("private_users", "identity", IdRange("identity", 0)),
    ("address_timeout", "1m", 60.0),
    ("network_address", ["10.0.0.7/24", "fd00::07/64"], (ip_interface("10.0.0.7/24"), ip_interface("fd00::7/64"))),
    ("network_gateway", ["10.0.0.1", "fd00::1"], (ip_address("10.0.0.1"), ip_address("fd00::1"))),
    ("network_mac", "02:00:00:00:00:AF", "02:00:00:00:00:af"),
    ("memory_swap_max", "1K", "1024"),
    ("io_max", [{"write_bps": "10 MiB", "read_iops": 7}], (IoLimit(write_bps=10 << 20, read_iops=7),)),
    ("root_size", "2 GiB", Size("2 GiB", 2 << 30)),
    ("root_size", "1024K", Size("1024K", 1 << 20)),
    ("extra_hosts", ["db:fd00::5", "web:[fd00::6]"], ("fd00::5 db", "fd00::6 web")),
    ("devices", [{"host_path": "/a"}], (Device("/a", None, "rwm"),)),
    ("port_map", [{"http": 8080}], {"http": 8080}),
    ("port_map", [{"http": 80}, {"http": 81}], {"http": 81}),
    ("port_map", [{"http": "8080"}], {"http": 8080}),
    ("port_map", [{"http": 8080.0}], {"http": 8080}),
    ("port_map", [{"http": "8080.0"}], {"http": 8080}),
]


@pytest.mark.parametrize(("name", "value", "expected"), DECODED)
def test_decode(name: str, value: object, expected: object) -> None:
    decoded = decode(**{name: value})[name]
    assert decoded == expected
    assert type(decoded) is type(expected)


def test_decoded_order_of_maps_is_the_jobs() -> None:
    names = ["/z", "/a", "/m"]
    assert [mount.source for mount in decode(bind=[{name: "/x"} for name in names])["bind"]] == names


@pytest.mark.parametrize(
    ("value", "expected"),
    [(42, 42), ("42", 42), (5_000_000_000, 5_000_000_000), (-3, -3), (1e3, 1000), ("1e3", 1000), (0, 0)],
)
def test_number(value: object, expected: int) -> None:
    number = decode_number("x", value)
    assert number == expected
    assert type(number) is int


@pytest.mark.parametrize("value", [1.5, 0.25, "0.1", "x", "", None, True, [], {}, "nan", float("nan")])
def test_no_whole_number(value: object) -> None:
    with pytest.raises(ConfigError, match="must be a whole number"):
        decode_number("x", value)


@pytest.mark.parametrize("value", ["inf", "-inf", "1e400", "9" * 400, float("inf")])
def test_number_without_end(value: object) -> None:
    """HCL's numbers have no largest one: port_map { a = 1e400 } is fine for Nomad."""
    with pytest.raises(ConfigError, match=r"must be a (whole number|port from 1 to 65535)"):
        decode(port_map=[{"a": value}])


def test_everything_unset() -> None:
    values = decode()
    assert values.pop("image") == "debian"
    assert values == {option.name: option.default for option in TASK_OPTIONS if option.name != "image"}


def test_plugin_options() -> None:
    usual = {
        "enabled": True,
        "volumes": True,
        "allow_paths": ("/",),
        "allow_caps": ("all",),
        "allow": ("host_network", "host_users", "disk_images", "image_write", "device_binds", "pivot_root"),
        "user_namespacing": True,
        "pids_limit": 16384,
        "image_dir": "/var/lib/machines",
        "ephemeral_dir": None,
        "root_size": None,
        "image_gc": True,
        "image_gc_delay": None,
        "image_store_max": None,
        "image_keep": (),
        "preload": (),
        "image_size_limit": 65536,
        "image_stall_timeout": None,
        "insecure_registries": (),
        "registry_mirrors": {},
        "require_signature": {},
        "auth": None,
        "reap_after": None,
        "reap_dry_run": False,
        "disable_log_collection": False,
    }
    assert decode_options(PLUGIN_OPTIONS, {}) == usual
    assert decode_options(PLUGIN_OPTIONS, {"enabled": None, "volumes": False}) == usual | {"volumes": False}


@pytest.mark.parametrize("name", ["allow_paths", "allow_caps", "allow"])
def test_an_empty_list_of_what_is_allowed_allows_nothing(name: str) -> None:
    assert decode_options(PLUGIN_OPTIONS, {name: []})[name] == ()


def test_what_is_allowed_can_be_added_to() -> None:
    usual = decode_options(PLUGIN_OPTIONS, {})["allow"]
    assert decode_options(PLUGIN_OPTIONS, {"allow": ["default", "devices"]})["allow"] == (*usual, "devices")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(ALL_OPTIONS), json_values)
@example(BY_NAME["port_map"], [{"a": float("inf")}])
@example(BY_NAME["bind"], [None])
@example(BY_NAME["bind"], {"": None})
def test_any_value_is_taken_or_refused_in_a_sentence(option: Option, value: object) -> None:
    try:
        decoded = option.decode(value)
    except ConfigError as error:
        assert str(error).startswith(option.name)
    else:
        assert decoded == option.default or type(decoded) in (bool, int, str, tuple, dict, option.into, IdRange)


msgpack_keys = (
    st.sampled_from([name for option in TASK_OPTIONS for name in option.names])
    | st.text(max_size=9) | st.binary(max_size=9) | st.integers(0, 9) | st.none() | st.floats()
)  # fmt: skip
msgpack_values = st.recursive(
    json_values | st.binary() | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=9)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(msgpack_keys, inner, max_size=3),
    max_leaves=8,
)


def nested(depth: int) -> object:
    value: object = "x"
    for _ in range(depth):
        value = [value]
    return value


@given(st.dictionaries(msgpack_keys, msgpack_values, max_size=4))
@example({"devices": [{b"host_path": "/dev/null"}]})
@example({"a\nb": "x"})
@example({"bind": [{"/\x1b[31m": "x"}]})
@example({"pids_limit": "1" * 5000})
@example({"pids_limit": "1e300"})
def test_any_config_is_taken_or_refused_in_one_line(config: dict[object, object]) -> None:
    """Whatever a job's msgpack holds: no other error than ours, and no line break or control character in it."""
    packed = msgpack.packb({"image": "x", **config})
    try:
        options = decode_job(TASK_OPTIONS, driver.unpack_options(packed), CONFIG)
        check_permissions(TASK_OPTIONS, options, HARDENED)
        check_rules(TASK_OPTIONS, options, make_host())
    except DriverError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 10000


@pytest.mark.parametrize("name", ["image", "bind", "command", "devices"])
def test_very_deep_value(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        decode_options(TASK_OPTIONS, driver.unpack_options(msgpack.packb({"image": "x", name: nested(500)})))


@pytest.mark.parametrize("packed", [b"", msgpack.packb({})])
def test_unpack_nothing(packed: bytes) -> None:
    assert driver.unpack_options(packed) == {}


@pytest.mark.parametrize(
    "packed", [b"\xc1", b"\x81", b"\x81\xa1a", b"\x80\x80", b"\x81\x91\x01\x01", b"\x91" * 2000]
)
def test_unpack_garbage(packed: bytes) -> None:
    with pytest.raises(DriverError, match=r"^the configuration cannot be read: it is no msgpack$"):
        driver.unpack_options(packed)


@pytest.mark.parametrize(
    ("packed", "sentence"),
    [
        (b"\x82\xa5image\xa1x\xa4user\xa2a\xff", r'user = "a\udcff": must be text in UTF-8'),
        (b"\x81\xa5image\xa1\xff", r'image = "\udcff": must be text in UTF-8'),
        (b"\x82\xa5image\xa1x\xa6rlimit\x91\x81\xa1\xff\xa11", r'rlimit = "\udcff": must be text in UTF-8'),
        (b"\x81\xa1\xff\xa1x", r'"\udcff" = "x": no such option'),
    ],
)
def test_bytes_that_are_no_text_name_their_option(packed: bytes, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode_options(TASK_OPTIONS, driver.unpack_options(packed))
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"bind": [{"/a\nb; all is well": "x"}]}, r'bind."/a\nb; all is well" = "x": '),
        ({"rlimit": [{"no file": "1"}]}, 'rlimit."no file" = "1": '),
        ({"port_map": [{"a = b": 0}]}, 'port_map."a = b" = 0: '),
        ({"load_credential": [{"a": "no\npath"}]}, r'load_credential.a = "no\npath": '),
        ({"a = 1: fine": 1}, '"a = 1: fine" = 1: no such option'),
    ],
)
def test_keys_of_a_job_are_quoted(options: dict[str, object], shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode_options(TASK_OPTIONS, {"image": "x", **options})
    assert str(caught.value).startswith(shown)


@pytest.mark.parametrize("value", [None, 1, "a", []])
def test_unpack_no_map(value: object) -> None:
    with pytest.raises(DriverError, match=r"^the configuration is no map$"):
        driver.unpack_options(msgpack.packb(value))


# -- refusals ------------------------------------------------------------------------------------------------

# Each rule's sentence, and values that break it. One option stands for all that share a rule.
# fmt: off
REFUSED: dict[str, list[tuple[str, list[object]]]] = {
    "is required": [("image", [None]), ("image_download", [{}]), ("devices", [[{}]])],
    "must not be empty": [("image", [""])],
    "the program must not be empty; leave it out and set command: it replaces the image's Entrypoint": [
        ("entrypoint", [[""], ["", "a"]]),
    ],
    "must be a string": [("image", [["a"]]), ("volatile", [True]), ("command", [["a", 1]])],
    "must not hold a NUL character": [
        ("image", ['a\x00b']), ("command", [['a\x00']]), ("environment", [[{"A": 'b\x00'}]]),
    ],
    "must be a block": [("image_download", ["x"]), ("auth", ["ci:secret"]), ("devices", [["/a"]])],
    "must be the name of a setting, as in net.core.somaxconn": [
        ("sysctl", [[{name: "1"}] for name in ("", "net", "net.", "net..core.x", "net/../x", "net/core/a b", "/net/x", "net.core.x\n", "net/./x")]),
    ],
    "is a setting of the whole host; those of a container are net.*, fs.mqueue.*, kernel.sem, kernel.msgmax, kernel.msgmnb, kernel.msgmni, kernel.shmall, kernel.shmmax, kernel.shmmni, kernel.shm_rmid_forced": [
        ("sysctl", [[{name: "1"}] for name in ("vm.swappiness", "kernel.core_pattern", "kernel.sem_next_id", "fs.file-max", "kernel.shmall.x", "kernel/net.x")]),
    ],
    "the name of a label must be letters and digits, with dots, dashes, slashes or underscores between": [
        ("labels", [[{name: "1"}] for name in ("", "a b", "é", ".a", "a\n")]),
    ],
    "all labels together may have 4096 characters, and these have 4097; shorten them, or leave some out": [("labels", [[{"a": "b" * 4096}]])],
    "must be one line of printable ASCII": [("sysctl", [[{"net.core.somaxconn": value}] for value in ("", "1\n2", "é")])],
    "must be an http:// or https:// address, or the name of an image in a registry": [
        ("image_download", [{"url": "ftp://x"}, {"url": "file:///etc/passwd"}]),
    ],
    "must be true or false": [
        ("image_download", [{"url": "http://x", "force": "yes"}]), ("image_gc", ["yes"]), ("ephemeral", [[]]),
    ],
    "no such option; the options are url, type, verify, checksum, platform, force": [
        ("image_download", [{"url": "http://x", "sha": "1"}]),
    ],
    "must be ALGORITHM:HEX, for sha256, sha384 or sha512": [
        ("image_download", [{"url": "http://x", "checksum": "sha256:12"}]),
    ],
    "must be linux/ARCHITECTURE or linux/ARCHITECTURE/VARIANT": [
        ("image_download", [{"url": "x/y", "platform": "arm64"}]),
    ],
    "must be a duration such as 500ms, 5s or 1m": [
        ("image_gc_delay", ["soon"]), ("image_stall_timeout", ["1"]), ("address_timeout", ["5"]),
    ],
    "must be a number above 0": [("io_max", [[{"read_iops": 0}], [{"write_iops": -1}]]), ("image_size_limit", [0])],
    "must be docker://HOST/NAME:TAG, or the http(s) address of a tar archive": [
        ("preload", [["debian"], ["docker://h.example/Team/app"], ["http:///x"], ["docker://h.example/a:1", ""]]),
    ],
    "must begin as the names of fetched images do: with docker://, http://, https://, / or *; `nomad-driver-nspawn images` shows the names": [
        ("image_keep", [["ghcr.io/*"], [""]]),
    ],
    "must be a list of strings": [
        ("insecure_registries", ["x:5000"]), ("registry_mirrors", [[{"x": "m"}]]), ("command", ["/bin/true"]), ("ports", ["http"]),
    ],
    "must be HOST or HOST:PORT, without http:// and without a path": [
        ("insecure_registries", [["x:5000", "http://x/"]]),
        ("registry_mirrors", [[{"https://x": ["m"]}], [{"x/y": ["m"]}]]),
    ],
    "must be HOST[:PORT] or HOST[:PORT]/PREFIX, without http://": [
        ("registry_mirrors", [[{"docker.io": ["http://m"]}], [{"*": ["m/"]}], [{"*": ["m/a/../b"]}]]),
        ("require_signature", [[{"https://x": "/key"}], [{"x/": "/key"}]]),
    ],
    "must not be empty; the default is /var/lib/machines": [("image_dir", [""])],
    "must be one of no, yes, state, overlay": [("volatile", ["maybe"])],
    "must be an absolute path inside the container": [
        ("pivot_root", ["sysroot", "/a:b"]), ("working_directory", ["srv"]), ("work_dir", ["srv"]),
        ("bind", [[{"/a": "b"}], [{"/a": None}]]), ("tmpfs", [["run"]]), ("overlay", [["/a::c"]]),
        ("inaccessible", [["x"]]), ("devices", [[{"host_path": "/a", "container_path": "kvm"}]]),
    ],
    'must not contain ".."': [
        ("pivot_root", ["/a/../b", "/a:/b/.."]), ("working_directory", ["/srv/../x"]),
        ("bind", [[{"/a": "/b/../c"}], [{"/a": "/b/..:idmap"}]]), ("bind_read_only", [[{"/a": "/.."}]]),
        ("tmpfs", [["/a/../b:size=1M"]]), ("inaccessible", [["/a/.."]]),
    ],
    "must be PATH or PATH:PATH": [("pivot_root", ["/a:/b:/c"])],
    "must be printable ASCII": [
        ("image_policy", ['a\nb']), ("selinux_context", ['a\nb']), ("selinux_apifs_context", ["é"]),
    ],
    "must be a hash in hexadecimal digits": [("root_hash", ["xyz", "abc"])],
    "must be base64: and the signature in it": [("root_hash_sig", ["/etc/sig"])],
    "must be the name or the number of a user inside the container": [("user", ["-x", "a b", "a:b", 'a\nb'])],
    "must be a map": [("environment", ["A=b"]), ("set_credential", ["a:b"]), ("port_map", [8080])],
    "variable names have letters, digits and underscores, and do not start with a digit": [
        ("environment", [[{"A.B": "c"}], [{"1A": "c"}], [{"": "c"}], [{"A\n": "c"}]]),
    ],
    'the name of a credential is printable ASCII without "/" and ":"': [
        ("set_credential", [[{"a/b": "c"}], [{"a:b": "c"}], [{"..": "c"}], [{"": "c"}]]),
        ("load_credential", [[{"a b": "/x"}]]),
    ],
    "the source must be an absolute path of the host, or one that begins with alloc, local or secrets": [
        ("load_credential", [[{"a": "etc/passwd"}]]), ("bind", [[{"a": "/b"}], [{"": "/b"}], [{"+/a": "/b"}]]),
        ("bind_read_only", [[{"": "/b"}]]), ("overlay", [["a::/c"]]), ("overlay_read_only", [["/a:b:/c"]]),
    ],
    'the source must not contain ".."': [
        ("mount", [[{"source": "local/..", "target": "/b"}]]),
        ("load_credential", [[{"a": "secrets/../../x"}]]), ("bind", [[{"local/../../x": "/b"}]]),
    ],
    "must be no, yes, pick, identity, or user ids as BASE or BASE:COUNT": [("private_users", ["auto", "-1"])],
    "the range must not be empty and must end below 4294967295": [("private_users", ["4294967295", "1:0"])],
    "must be a whole number from 1 to 1024": [("private_users_delegate", [0])],
    "must be a whole number": [
        ("private_users_delegate", [1.5]), ("port_map", [[{"http": "x"}], [{"http": None}], [{"http": 1.5}]]),
        ("pids_limit", ["many"]),
    ],
    "must be the name of a user of the host": [("bind_user", [["a b"], ["-x"]])],
    "must be a path, true or false": [("bind_user_shell", ["sh"])],
    "must be the name of a group": [("bind_user_group", [["a,b"]])],
    "must be 1 to 12 letters, digits, dots, dashes or underscores": [("network_zone", ["thirteen-char", "a/b"])],
    "must be the name of a network interface": [("network_bridge", ["a b", "sixteen-chars-xx"])],
    "must be the name of an interface of the host, or HOST:CONTAINER, each of up to 15 characters": [
        ("network_veth_extra", [["a:b:c"]]), ("network_macvlan", [["a/b"]]), ("network_ipvlan", [[".."]]),
        ("network_interface", [["eth0 "]]),
    ],
    "must be an address with the length of its network's prefix, as in 10.0.0.7/24 or fd00::7/64": [
        ("network_address", [["10.0.0.7"], ["10.0.0.7/33"], ["10.0.0.7/255.255.255.0"], ["fe80::1%eth0/64"], ["a/8"]])
    ],
    "is the address of the network, or its broadcast address; use one between the two": [
        ("network_address", [["10.0.0.0/24"], ["10.0.0.255/24"], ["fd00::/64"]])
    ],
    "names an address that is there already; name it once": [("network_address", [["10.0.0.7/24", "10.0.0.7/8"]])],
    "must be an address by which others can reach it, and this one is loopback": [
        ("network_address", [["127.0.0.7/8"], ["::1/128"]]), ("network_gateway", [["127.0.0.1"]]),
    ],
    "must be an address by which others can reach it, and this one is multicast": [
        ("network_address", [["224.0.0.7/24"], ["ff02::1/64"]]), ("network_gateway", [["224.0.0.1"]]),
    ],
    "must be an address by which others can reach it, and this one is link-local": [
        ("network_address", [["169.254.0.7/16"], ["fe80::7/64"]]),
    ],
    "must be an address by which others can reach it, and this one is unspecified": [
        ("network_address", [["0.0.0.0/0"]])
    ],
    "must be an address, as in 10.0.0.1 or fd00::1": [("network_gateway", [["10.0.0.1/24"], ["a"]])],
    "must be a MAC address, as in 02:00:00:00:00:07": [("network_mac", ["02:00:00:00:00", "02-00-00-00-00-07"])],
    "is no address of one interface: it is all zero, or the first byte is odd, as for groups": [
        ("network_mac", ["01:00:00:00:00:07", "00:00:00:00:00:00"])
    ],
    "must be a port from 1 to 65535": [("port_map", [[{"http": 0}], [{"http": -1}], [{"http": 65536}]])],
    "must be NAME:ADDRESS, as in db:192.0.2.7 or db:2001:db8::7": [("extra_hosts", [["db"]])],
    "must be a host name of up to 64 letters, digits, dashes and dots": [
        ("hostname", ["a_b", "-a", "a..b", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"]),
    ],
    "must be PATH or PATH:OPTIONS, with options of tmpfs, as in /run/cache:size=100M,mode=755": [
        ("tmpfs", [["/run:size=1M:x"], ["/run:"], ["/run:size 1"]]),
    ],
    "must be LOWER::TARGET": [("overlay", [["/a"], ["/a:/b"], ["::/c"]])],
    "the field before the target must be empty: changes are kept in memory; use bind for a directory that keeps changes": [
        ("overlay", [["/a:/b:/c"]]),
    ],
    "must be LOWER:LOWER:TARGET with the topmost last": [("overlay_read_only", [["/a:/b"]])],
    "is not a capability; use a name such as CAP_NET_ADMIN, or all": [
        ("capability", [["CAP_FOO"]]), ("cap_add", [["foo"]]), ("drop_capability", [["1"]]),
        ("allow_caps", [["foo"]]),
    ],
    "must be a list of single capabilities": [("ambient_capability", [["all"]])],
    "must be a system call or a group as @mount, or ~ and one of them": [
        ("system_call_filter", [["a b"], ["~~x"]]),
    ],
    "must be an address family such as AF_INET": [("restrict_address_families", [["INET"]])],
    "is not a resource limit; the limits are as, core, cpu, data, fsize, locks, memlock, msgqueue, nice, nofile, nproc, rss, rtprio, rttime, sigpending, stack": [
        ("rlimit", [[{"files": "1"}]]),
    ],
    "must be LIMIT or SOFT:HARD, each a number or infinity": [
        ("rlimit", [[{"nofile": "-1"}], [{"nofile": "1:2:3"}]]),
    ],
    "the soft limit must not be above the hard one": [
        ("rlimit", [[{"nofile": "3:2"}]]), ("ulimit", [[{"nofile": "infinity:2"}]]),
    ],
    "must be a whole number from 0 to 1000": [("oom_score_adjust", [-1]), ("oom_score_adj", [1001])],
    "must be CPUs and ranges, as in 0-3,5": [("cpu_affinity", ["all", "0-"])],
    "must be a size such as 512M or 2G, or infinity": [("memory_swap_max", ["1.5G", "-1"])],
    "must be a size such as 512M or 2G, and at least 1M": [
        ("root_size", ["0", "1023K", "1.5G", "-1", "infinity", "1 gib", "2 G B"]),
        ("image_store_max", ["20 GB", "1K"]),
    ],
    "must be a whole number from 1 to 10000": [("io_weight", [10001])],
    "must be a device node of the host, such as /dev/sda": [
        ("io_max", [[{"device": "sda", "read_bps": "1M"}], [{"device": "/dev/../x", "read_bps": "1M"}]]),
    ],
    "must be a size above 0, such as 512K or 10M": [("io_max", [[{"read_bps": "0"}], [{"write_bps": "max"}]])],
    'must have one of read_bps, write_bps, read_iops and write_iops; write it as in write_bps = "10M"': [("io_max", [[{"device": "/dev/sda"}]])],
    'must be an absolute path of the host without ".."': [
        ("allow_paths", [["srv"], ["/srv/../x"]]), ("ephemeral_dir", ["x"]), ("devices", [[{"host_path": "/a/.."}]]),
        ("image_dir", ["images"]),
    ],
    "must be a node as /dev/kvm, a class as char-ttyUSB, or a device of CDI as nvidia.com/gpu=0": [
        ("devices", [[{"host_path": "kvm"}], [{"host_path": "char-"}], [{"host_path": "gpu=0"}], [{"host_path": "char-/dev/tty"}]]),
    ],
    "is for a single node, and char-tty is a class; leave it out": [
        ("devices", [[{"host_path": "char-tty", "container_path": "/a"}]]),
    ],
    "is for a single node, and a.b/c=d is a device of CDI; leave it out": [
        ("devices", [[{"host_path": "a.b/c=d", "container_path": "/a"}]]),
    ],
    "cannot be chosen: the file of CDI says it for a.b/c=0:1; leave it out": [
        ("devices", [[{"host_path": "a.b/c=0:1", "cgroup_permissions": "r"}]]),
    ],
    "must be blocks": [("devices", [{"host_path": "/a"}])],
    "no such option; the options are host_path, container_path, cgroup_permissions": [
        ("devices", [[{"host_path": "/a", "path": "/b"}]]),
    ],
    "must be one of rbind, norbind, idmap, noidmap, rootidmap, owneridmap": [
        ("mount", [[{"source": "/a", "target": "/b", "options": ["ro"]}]]),
    ],
    'must be bind; write tmpfs = ["/run/cache:size=100M"] in place of this block': [
        ("mount", [[{"source": "/a", "target": "/b", "type": "tmpfs"}]]),
    ],
    "must be bind; use a volume of Nomad's with a volume_mount block, or a directory of the host": [
        ("mount", [[{"source": "data", "target": "/b", "type": "volume"}]]),
    ],
    "must be what follows docker-credential- in the name of the program": [("auth", [{"helper": "../a"}])],
    "must be one or more of the letters r, w and m": [
        ("devices", [[{"host_path": "/a", "cgroup_permissions": "rx"}], [{"host_path": "/a", "cgroup_permissions": "rr"}]]),
    ],
}
# fmt: on


def test_plugin_options_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match='image_store_max = "1G": means nothing with image_gc = false'):
        check_plugin(replace(CONFIG, image_gc=False, image_store_max=Size("1G", 1 << 30)))


@pytest.mark.parametrize("rule", REFUSED)
def test_refused_values(rule: str) -> None:
    for name, values in REFUSED[rule]:
        options = PLUGIN_OPTIONS if any(name in option.names for option in PLUGIN_ONLY) else TASK_OPTIONS
        for value in values:
            raw = {name: value} if options is PLUGIN_OPTIONS else {"image": "debian", name: value}
            said = refusal(options, raw)
            assert said.startswith(name) and said.endswith(f": {rule}"), said


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("image", None, "image = null: is required"),
        ("image", "a\x00b", 'image = "a\\u0000b": must not hold a NUL character'),
        ("work_dir", "srv", 'work_dir = "srv": must be an absolute path inside the container'),
        ("command", ["a", 1], "command = 1: must be a string"),
        ("environment", [{"1A": "c"}], 'environment = "1A": variable names have letters, digits and underscores, and do not start with a digit'),
        ("port_map", [{"http": None}], "port_map.http = null: must be a whole number"),
        ("bind", [{"/a": "b"}], 'bind./a = "b": must be an absolute path inside the container'),
        ("devices", [{}], "devices.host_path = null: is required"),
        ("devices", {"host_path": "/a"}, 'devices = {"host_path": "/a"}: must be blocks'),
    ],
)  # fmt: skip
def test_whole_sentences(name: str, value: object, sentence: str) -> None:
    assert refusal(TASK_OPTIONS, {"image": "debian", name: value}) == sentence


def test_image_is_required_even_if_the_key_is_missing() -> None:
    assert refusal(TASK_OPTIONS, {}) == "image = null: is required"


def test_unknown_option() -> None:
    names = ", ".join(name for option in TASK_OPTIONS for name in option.names)
    assert refusal(TASK_OPTIONS, {"image": "debian", "imgae": "x"}) == (
        f'imgae = "x": no such option; the options are {names}'
    )
    names = ", ".join(option.name for option in PLUGIN_OPTIONS)
    assert refusal(PLUGIN_OPTIONS, {"image": "x"}) == f'image = "x": no such option; the options are {names}'


# -- rules ---------------------------------------------------------------------------------------------------

BROKEN: list[tuple[dict[str, object], int, str]] = [
    (
        {"unit": "app.service", "boot": False, "command": ["a"]},
        252,
        'unit = "app.service": needs boot; set boot, too',
    ),
    (
        {"journal": True, "boot": False, "command": ["a"]},
        252,
        "journal = true: needs boot; set boot, too",
    ),
    (
        {"journal": True, "unit": "app.service"},
        252,
        "journal = true: cannot be combined with unit; leave it out: the output of the unit is the task's log",
    ),
    (
        {"process_two": True, "command": ["a"]},
        252,
        "process_two = true: cannot be combined with boot; "
        "set boot = false to run a command, or leave process_two out",
    ),
    (
        {"entrypoint": ["a"]},
        252,
        'entrypoint = ["a"]: cannot be combined with boot; '
        "set boot = false, or leave it out: a booted system runs the image's init",
    ),
    (
        {"boot": False},
        252,
        "command = []: is required when boot is false; "
        'name the program and its arguments, as in command = ["/bin/sleep", "60"]',
    ),
    (
        {"port_map": [{"http": 80}], "network_veth": False},
        252,
        'port_map = {"http": 80}: needs a network of the container\'s own; '
        "leave network_veth at true, or listen on the host's port itself",
    ),
    (
        {"volatile": "overlay", "ephemeral": True},
        257,
        'volatile = "overlay": cannot be combined with ephemeral; either one already throws all changes away',
    ),
    (
        {"volatile": "state", "root_size": "1G"},
        257,
        'root_size = "1G": cannot be combined with volatile = yes or state; '
        "set volatile to overlay, or leave it out and set ephemeral = true",
    ),
    (
        {"user": "app"},
        252,
        'user = "app": cannot be combined with boot; set boot = false: an init must run as root',
    ),
    (
        {"ambient_capability": ["CAP_CHOWN"]},
        252,
        'ambient_capability = ["CAP_CHOWN"]: cannot be combined with boot; '
        "set boot = false: an init has its capabilities by itself",
    ),
    (
        {"boot": False, "command": ["a"], "process_two": True, "notify_ready": True},
        252,
        "notify_ready = true: cannot be combined with process_two; "
        "leave process_two out: only PID 1 can say that it is ready",
    ),
    (
        {"ports": ["http"], "network_veth": False},
        252,
        'ports = ["http"]: needs a network of the container\'s own; '
        "leave network_veth at true, or listen on the host's port itself",
    ),
    (
        {"ports": ["http"], "private_network": True},
        252,
        'ports = ["http"]: needs a network of the container\'s own; '
        "leave network_veth at true, or listen on the host's port itself",
    ),
    (
        {"network_zone": "a", "network_bridge": "b"},
        252,
        'network_zone = "a": cannot be combined with network_bridge; a link can be joined to one bridge only',
    ),
    (
        {"private_users_ownership": "chown", "read_only": True},
        252,
        'private_users_ownership = "chown": cannot be combined with read_only or volatile; '
        "leave it out: the image's files are then mapped",
    ),
    (
        {"private_users_ownership": "chown", "volatile": "overlay"},
        252,
        'private_users_ownership = "chown": cannot be combined with read_only or volatile; '
        "leave it out: the image's files are then mapped",
    ),
    (
        {"bind_user": ["a"], "user_namespacing": False},
        252,
        'bind_user = ["a"]: needs user namespaces; set user_namespacing = true',
    ),
    ({"bind_user_shell": "/bin/sh"}, 262, 'bind_user_shell = "/bin/sh": needs bind_user; set bind_user, too'),
    ({"bind_user_group": ["a"]}, 262, 'bind_user_group = ["a"]: needs bind_user; set bind_user, too'),
    (
        {"root_hash_sig": "base64:AA"},
        252,
        'root_hash_sig = "base64:AA": needs root_hash; set root_hash, too',
    ),
    (
        {"private_users_delegate": 1, "user_namespacing": False},
        262,
        "private_users_delegate = 1: needs user_namespacing; set user_namespacing, too",
    ),
    (
        {"set_credential": [{"a": "b"}], "load_credential": [{"a": "/c"}]},
        252,
        'load_credential = {"a": "/c"}: names a credential that set_credential sets, too; '
        "give it one of the two ways",
    ),
    (
        {"suppress_sync": True},
        249,
        "suppress_sync = true: needs systemd 250 or newer, and this host has 249; "
        "leave it out, or constrain the job to newer hosts",
    ),
    (
        {"io_max": [{"read_iops": 5}]},
        252,
        'io_max = [{"read_iops": 5}]: needs the cgroup v2 controller io, which this machine does not have; '
        "constrain the job to clients whose attribute driver.nspawn.limits has io",
    ),
    (
        {"private_users_ownership": "foreign"},
        257,
        'private_users_ownership = "foreign": needs systemd 258 or newer, and this host has 257; '
        "leave it out, or constrain the job to newer hosts",
    ),
]


@pytest.mark.parametrize(("options", "systemd", "sentence"), BROKEN)
def test_broken_rule(options: dict[str, object], systemd: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_rules(TASK_OPTIONS, read_options(**options), make_host(systemd))
    assert str(caught.value) == sentence


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.option}: {rule.rule}")
def test_every_rule_is_broken_above(rule: Rule) -> None:
    assert any(sentence.startswith(rule.option) and rule.rule in sentence for _, _, sentence in BROKEN)
    assert rule.option in BY_NAME
    assert rule.remedy


@pytest.mark.parametrize(
    ("options", "systemd"),
    [
        ({}, 252),
        ({"user": "root"}, 252),  # as booted systems of the Go driver
        ({"user": "0"}, 252),
        ({"command": ["systemd.unit=rescue.target"]}, 252),
        ({"boot": False, "command": ["a"]}, 252),
        ({"boot": False, "command": ["a"], "process_two": True}, 252),
        ({"port_map": [{"http": 80}]}, 252),
        ({"network_veth": False}, 252),
        ({"volatile": "yes"}, 257),
        ({"volatile": "state"}, 262),
        ({"volatile": "yes", "user_namespacing": False}, 252),
        ({"volatile": "no"}, 252),
        ({"volatile": "no", "ephemeral": True}, 252),
        ({"ephemeral": True}, 252),
        ({"suppress_sync": True}, 250),
        ({"suppress_sync": False}, 249),
        ({"oom_score_adjust": 0}, 249),
        ({"ports": ["http"]}, 252),
        ({"ports": ["http"], "network_zone": "a"}, 252),
        ({"ports": ["http"], "network_bridge": "br0", "network_veth": True}, 252),
        ({"port_map": [{"http": 80}], "network_macvlan": ["eth0"], "network_veth": True}, 252),
        ({"network_zone": "a", "network_veth": True}, 252),
        ({"private_users_ownership": "chown"}, 252),
        ({"private_users_ownership": "map", "read_only": True}, 252),
        ({"link_journal": "auto", "ephemeral": True}, 252),
        ({"bind_user": ["a"], "bind_user_shell": "true"}, 258),
        ({"set_credential": [{"a": "b"}], "load_credential": [{"c": "/d"}]}, 252),
    ],
)
def test_kept_rules(options: dict[str, object], systemd: int) -> None:
    check_rules(TASK_OPTIONS, read_options(**options), make_host(systemd))


def test_values_in_sentences_are_json() -> None:
    """They can be pasted back into a job."""
    text = refusal(TASK_OPTIONS, {"image": "debian", "volatile": 'a"b'})
    assert json.loads(text.split(" = ")[1].split(": must")[0]) == 'a"b'


# -- what depends on other options, and on the operator ------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "config", "expected"),
    [
        ({}, {}, {"user_namespacing": True, "private_users": "pick", "private_users_ownership": "auto"}),
        ({}, {"user_namespacing": False}, {"user_namespacing": False, "private_users": None}),
        ({"user_namespacing": True}, {"user_namespacing": False}, {"private_users": "pick"}),
        ({"user_namespacing": False}, {}, {"private_users": None, "private_users_ownership": None}),
        ({"user_namespacing": False, "private_users": "pick"}, {}, {"private_users": None}),
        ({"private_users": "no"}, {}, {"user_namespacing": False, "private_users": None}),
        ({"private_users_ownership": "map"}, {}, {"private_users": "pick", "private_users_ownership": "map"}),
        ({}, {}, {"network_veth": True}),
        ({"network_veth": False}, {}, {"network_veth": False}),
        ({"network_zone": "a"}, {}, {"network_veth": False, "network_zone": "a"}),
        ({"private_network": True}, {}, {"network_veth": False}),
        ({"private_network": True, "network_veth": True}, {}, {"network_veth": True}),
    ],
)
def test_settled(options: dict[str, object], config: dict[str, Any], expected: dict[str, object]) -> None:
    found = read_options(replace(CONFIG, **config), **options)
    values = {**vars(found), "private_users": found.private_users and found.private_users.text}
    assert {name: values[name] for name in expected} == expected


def test_settled_in_the_network_of_a_group() -> None:
    found = read_options(CONFIG, True, ports=["http"])
    assert (found.network_veth, found.ports) == (False, ())


HARDENED = replace(CONFIG, allow=(), allow_caps=("CAP_NET_ADMIN",))

FORBIDDEN: list[tuple[dict[str, object], str, str]] = [
    ({"network_veth": False}, "network_veth = false", "host_network"),
    ({"network_bridge": "br0"}, 'network_bridge = "br0"', "host_network"),
    ({"network_veth_extra": ["a"]}, 'network_veth_extra = ["a"]', "host_interfaces"),
    ({"network_macvlan": ["a"]}, 'network_macvlan = ["a"]', "host_interfaces"),
    ({"network_ipvlan": ["a"]}, 'network_ipvlan = ["a"]', "host_interfaces"),
    ({"network_interface": ["a"]}, 'network_interface = ["a"]', "host_interfaces"),
    ({"network_address": ["10.0.0.7/24"]}, 'network_address = ["10.0.0.7/24"]', "host_interfaces"),
    ({"user_namespacing": False}, "user_namespacing = false", "host_users"),
    ({"private_users": "no"}, "user_namespacing = false", "host_users"),
    ({"private_users": "identity"}, 'private_users = "identity"', "host_users"),
    ({"private_users": "0"}, 'private_users = "0"', "host_users"),
    ({"bind_user": ["a"]}, 'bind_user = ["a"]', "host_accounts"),
    ({"selinux_context": "a"}, 'selinux_context = "a"', "selinux_labels"),
    ({"selinux_apifs_context": "a"}, 'selinux_apifs_context = "a"', "selinux_labels"),
    ({"pivot_root": "/a"}, 'pivot_root = "/a"', "pivot_root"),
    ({"overlay": ["+/a::/b"]}, 'overlay = ["+/a::/b"]', "host_overlays"),
    ({"overlay_read_only": ["alloc:+/a:/b"]}, 'overlay_read_only = ["alloc:+/a:/b"]', "host_overlays"),
    ({"link_journal": "try-guest"}, 'link_journal = "try-guest"', "link_journal"),
    ({"rlimit": [{"rtprio": "99"}]}, 'rlimit = {"RLIMIT_RTPRIO": "99"}', "priority"),
    ({"ulimit": [{"nice": "40"}]}, 'rlimit = {"RLIMIT_NICE": "40"}', "priority"),
    ({"ambient_capability": ["net_admin"]}, 'ambient_capability = ["CAP_NET_ADMIN"]', "ambient_capabilities"),
    ({"system_call_filter": ["~a", "bpf"]}, 'system_call_filter = ["~a", "bpf"]', "system_calls"),
    (
        {"devices": [{"host_path": "/a"}]},
        'devices = [{"host_path": "/a", "container_path": null, "cgroup_permissions": "rwm"}]',
        "devices",
    ),
]


@pytest.mark.parametrize(("options", "said", "permission"), FORBIDDEN)
def test_permission(options: dict[str, object], said: str, permission: str) -> None:
    values = read_options(**options)
    with pytest.raises(ConfigError) as caught:
        check_permissions(TASK_OPTIONS, values, HARDENED)
    assert str(caught.value) == (
        f"{said}: the operator of this client does not allow {permission}; "
        f'its plugin block needs "{permission}" in allow'
    )
    for words in ((permission,), ("all",)):
        check_permissions(TASK_OPTIONS, values, replace(HARDENED, allow=words))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"network_zone": "a"},
        {"private_network": True},
        {"system_call_filter": ["~@mount"]},
        {"private_users": "pick"},
        {"overlay": ["local/a::/b"]},
        {"link_journal": "auto"},
        {"rlimit": [{"nofile": "1000"}]},
        {"capability": ["CAP_NET_ADMIN"], "drop_capability": ["all"]},
        {"no_new_privileges": True, "read_only": True, "tmpfs": ["/tmp"], "inaccessible": ["/x"]},
    ],
)
def test_hardened_operators_allow(options: dict[str, object]) -> None:
    check_permissions(TASK_OPTIONS, read_options(**options), HARDENED)


def test_network_of_a_group_is_not_the_hosts() -> None:
    check_permissions(TASK_OPTIONS, read_options(CONFIG, True), HARDENED, is_in_group=True)


def test_settings_of_a_network_need_one() -> None:
    network, ipc = {"net.core.somaxconn": "1"}, {"kernel.sem": "1 2 3 4"}
    for options in ({}, {"network_zone": "a"}, {"network_veth": False, "private_network": True}):
        check_own_settings(read_options(sysctl=[network], **options))
    check_own_settings(read_options(CONFIG, True, sysctl=[network]), is_in_group=True)
    check_own_settings(read_options(sysctl=[ipc], network_veth=False))
    with pytest.raises(ConfigError) as caught:
        check_own_settings(read_options(sysctl=[network], network_veth=False))
    assert str(caught.value) == (
        'sysctl.net.core.somaxconn = "1": is a setting of the network, and this task uses the host\'s; '
        "give the task a network of its own"
    )


@pytest.mark.parametrize("option", ["capability", "ambient_capability"])
def test_capabilities_are_the_operators(option: str) -> None:
    values = read_options(**{option: ["CAP_NET_ADMIN", "sys_admin"]})
    hardened = replace(HARDENED, allow=("ambient_capabilities",))
    with pytest.raises(ConfigError) as caught:
        check_permissions(TASK_OPTIONS, values, hardened)
    assert str(caught.value) == (
        f'{option} = "CAP_SYS_ADMIN": the operator of this client does not allow this capability; '
        "its plugin block has allow_caps = CAP_NET_ADMIN"
    )
    both = read_options(**{option: ["CAP_SYS_BOOT", "CAP_NET_ADMIN", "sys_admin", "cap_sys_boot"]})
    with pytest.raises(ConfigError, match=r'= \["CAP_SYS_BOOT", "CAP_SYS_ADMIN"\]: .* these capabilities; '):
        check_permissions(TASK_OPTIONS, both, hardened)
    check_permissions(TASK_OPTIONS, values, replace(hardened, allow_caps=("all",)))
    with pytest.raises(ConfigError, match=r"allow_caps = none$"):
        check_permissions(TASK_OPTIONS, values, replace(hardened, allow_caps=()))
    with pytest.raises(ConfigError, match=r'^capability = "all"'):
        check_permissions(TASK_OPTIONS, read_options(capability=["all"]), HARDENED)


def test_every_gate_of_a_row_has_its_case() -> None:
    rows = {option.name for option in TASK_OPTIONS if option.permission and option.permission.is_word}
    named = {name.replace("ulimit", "rlimit") for options, _, _ in FORBIDDEN for name in options}
    assert rows == named | {"load_credential"}, "a path, which is judged when it has been opened"


def test_every_gate_is_explained_once() -> None:
    assert list(PERMISSIONS) == list(Permission)


# -- from HCL, by the schema Nomad is given ------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        'bind { a = "/b" }\nenvironment { FOO = "bar" }\nport_map { http = 80 }',
        'bind = { a = "/b" }\nenvironment = { FOO = "bar" }\nport_map = { http = 80 }',
        'bind = [{ a = "/b" }]\nenvironment = [{ FOO = "bar" }]\nport_map = [{ http = "80" }]',
        'bind { a = "/x" }\nbind { a = "/b" }\nenvironment { FOO = "bar" }\nport_map { http = 80 }',
    ],
    ids=["blocks", "attributes", "lists", "two blocks"],
)
def test_every_form_of_a_map_arrives(body: str) -> None:
    body = body.replace(" a = ", ' "/a" = ') if "bind =" in body else body.replace(" a = ", " host_path = ")
    spec = driver.render_spec(driver.TASK_OPTIONS)
    packed = agent.to_msgpack(agent.decode_config(spec, f'image = "debian"\n{body}'))
    raw = driver.unpack_options(packed)
    source = "/a" if '"/a"' in body else "host_path"
    assert decode_map("bind", raw["bind"], decode_string) == {source: "/b"}
    values = decode_options(driver.TASK_OPTIONS, {**raw, "bind": None})
    assert (values["environment"], values["port_map"]) == ({"FOO": "bar"}, {"http": 80})
    assert values["boot"] is True
