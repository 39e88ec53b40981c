# SPDX-License-Identifier: MPL-2.0
"""Options: the schema Nomad checks jobs against, what arrives from it, and the sentence for each mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import driver
from driver import PLUGIN_OPTIONS, TASK_OPTIONS, CgroupMode, ConfigError, Host, Kind, Option
from nomad_pb import hcl_spec_pb2
from tests import agent

ALL_OPTIONS = (*TASK_OPTIONS, *PLUGIN_OPTIONS)
BY_NAME = {option.name: option for option in ALL_OPTIONS}
# The options of the Go driver, with their types: jobs written for it run unchanged.
GO_OPTIONS = {
    "boot": ("bool", True),
    "ephemeral": ("bool", False),
    "process_two": ("bool", False),
    "read_only": ("bool", False),
    "user_namespacing": ("bool", True),
    "command": ("list(string)", None),
    "console": ("string", None),
    "image": ("string", None),
    "pivot_root": ("string", None),
    "resolv_conf": ("string", None),
    "user": ("string", None),
    "volatile": ("string", None),
    "working_directory": ("string", None),
    "bind": ("list(map(string))", None),
    "bind_read_only": ("list(map(string))", None),
    "environment": ("list(map(string))", None),
    "port_map": ("list(map(number))", None),
    "network_veth": ("bool", True),
}


def make_host(systemd: int = 252) -> Host:
    return Host(systemd=systemd, kernel=(6, 1), cgroups=CgroupMode.V2, problems=())


def decode(**options: object) -> dict[str, Any]:
    """Decode a job's options as they come over the wire: packed, and with every key of the schema."""
    raw = {option.name: options.pop(option.name, None) for option in TASK_OPTIONS}
    packed = msgpack.packb({**raw, **options, "image": raw["image"] or "debian"})
    return driver.decode_options(TASK_OPTIONS, driver.unpack_options(packed))


def refusal(options: Sequence[Option], raw: Mapping[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        driver.decode_options(options, raw)
    return str(caught.value)


# -- the tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ALL_OPTIONS, ids=lambda option: str(option.name))
def test_option_is_documented(option: Option) -> None:
    assert re.fullmatch(r"[A-Z].*\.", option.doc, re.DOTALL)
    assert "  " not in option.doc and "\n" not in option.doc


@pytest.mark.parametrize("options", [TASK_OPTIONS, PLUGIN_OPTIONS])
def test_names_are_unique_hcl_identifiers(options: Sequence[Option]) -> None:
    names = [option.name for option in options]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in names)


@pytest.mark.parametrize("option", ALL_OPTIONS, ids=lambda option: str(option.name))
def test_default_is_a_value_of_the_option(option: Option) -> None:
    if option.default is None:
        return
    kinds = {Kind.BOOL: bool, Kind.STRING: str, Kind.STRINGS: tuple, Kind.STRING_MAP: dict, Kind.NUMBER_MAP: dict}
    assert type(option.default) is kinds[option.kind]
    if option.check:
        option.check(option.name, option.default)


def test_reference() -> None:
    options = (
        Option("a", Kind.STRING, "First.", required=True),
        Option("b", Kind.BOOL, "Second.", default=True),
        Option("c", Kind.BOOL, "Third.", default=False),
        Option("d", Kind.STRING_MAP, "Fourth.", default={}),
        Option("e", Kind.STRINGS, "Fifth."),
    )
    assert driver.render_reference(options) == (
        "| option | type | default | meaning |\n"
        "|---|---|---|---|\n"
        "| `a` | string | required | First. |\n"
        "| `b` | bool | true | Second. |\n"
        "| `c` | bool | false | Third. |\n"
        "| `d` | list(map(string)) |  | Fourth. |\n"
        "| `e` | list(string) |  | Fifth. |\n"
    )


@pytest.mark.parametrize("options", [TASK_OPTIONS, PLUGIN_OPTIONS])
def test_readme_has_the_reference(options: Sequence[Option]) -> None:
    readme = Path(__file__).resolve().parent.parent / "README.md"
    assert f"\n{driver.render_reference(options)}\n" in readme.read_text()


@pytest.mark.parametrize("option", ALL_OPTIONS, ids=lambda option: str(option.name))
def test_reference_is_no_broken_table(option: Option) -> None:
    assert "|" not in option.doc


@pytest.mark.parametrize("name", GO_OPTIONS)
def test_option_of_the_go_driver(name: str) -> None:
    option = BY_NAME[name]
    kind, default = GO_OPTIONS[name]
    assert option.kind.value == kind
    assert option.required is (name == "image")
    if kind == "bool":
        assert option.default is default


@pytest.mark.parametrize("options", [TASK_OPTIONS, PLUGIN_OPTIONS])
def test_schema(options: Sequence[Option], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "hcl_spec_pb2", hcl_spec_pb2, raising=False)
    spec = driver.render_spec(options)
    assert spec.WhichOneof("block") == "object"
    assert set(spec.object.attributes) == {option.name for option in options}
    for option in options:
        entry = spec.object.attributes[option.name]
        if isinstance(option.default, bool):
            assert entry.WhichOneof("block") == "default"
            attribute = entry.default.primary.Attr
            assert entry.default.default.literal.value == ("true" if option.default else "false")
        else:
            assert entry.WhichOneof("block") == "Attr"
            attribute = entry.Attr
        # Nomad passes no implied name on to an attribute inside a default.
        assert attribute.name == option.name
        assert attribute.type == option.kind.value
        assert attribute.required is option.required


def test_schema_kinds() -> None:
    """A map attribute would refuse both ways jobs write maps; a list of maps takes both."""
    assert [kind.value for kind in Kind] == [
        "bool",
        "string",
        "list(string)",
        "list(map(string))",
        "list(map(number))",
    ]


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
    ("bind", [{"/a": "/b"}], {"/a": "/b"}),
    ("bind", [{"/a": "/b"}, {"/a": "/c", "/d": "/e"}], {"/a": "/c", "/d": "/e"}),
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
    assert list(decode(bind=[{name: "/x"} for name in names])["bind"]) == names


@pytest.mark.parametrize(
    ("value", "expected"),
    [(42, 42), ("42", 42), (5_000_000_000, 5_000_000_000), (-3, -3), (1e3, 1000), ("1e3", 1000), (0, 0)],
)
def test_number(value: object, expected: int) -> None:
    number = driver.decode_number("x", value)
    assert number == expected
    assert type(number) is int


@pytest.mark.parametrize("value", [1.5, 0.25, "0.1", "x", "", None, True, [], {}, "nan", float("nan")])
def test_no_whole_number(value: object) -> None:
    with pytest.raises(ConfigError, match="must be a whole number"):
        driver.decode_number("x", value)


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
    decode_plugin = driver.decode_options
    assert decode_plugin(PLUGIN_OPTIONS, {}) == {"enabled": True, "volumes": True}
    assert decode_plugin(PLUGIN_OPTIONS, {"enabled": None, "volumes": False}) == {
        "enabled": True,
        "volumes": False,
    }


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
        assert decoded == option.default or type(decoded) in (bool, str, tuple, dict)


@pytest.mark.parametrize("packed", [b"", msgpack.packb({})])
def test_unpack_nothing(packed: bytes) -> None:
    assert driver.unpack_options(packed) == {}


@pytest.mark.parametrize("packed", [b"\xc1", b"\x81", b"\x81\xa1a", b"\xa1\xff", b"\x80\x80"])
def test_unpack_garbage(packed: bytes) -> None:
    with pytest.raises(driver.DriverError, match=r"^the configuration cannot be read: it is no msgpack$"):
        driver.unpack_options(packed)


@pytest.mark.parametrize("value", [None, 1, "a", []])
def test_unpack_no_map(value: object) -> None:
    with pytest.raises(driver.DriverError, match=r"^the configuration is no map$"):
        driver.unpack_options(msgpack.packb(value))


# -- refusals ------------------------------------------------------------------------------------------------

RESOLV_CONF = (
    "auto, off, delete, copy-host, copy-static, copy-uplink, copy-stub, replace-host, replace-static, "
    "replace-uplink, replace-stub, bind-host, bind-static, bind-uplink, bind-stub"
)
VARIABLE = "the name of a variable is letters, digits and underscores, and no digit comes first"

# One mistake an option at least; this table is what people read.
SENTENCES: list[tuple[str, object, str]] = [
    ("image", None, "image = null: is required"),
    ("image", "", 'image = "": must not be empty'),
    ("image", ["a"], 'image = ["a"]: must be a string'),
    ("image", "a\0b", 'image = "a\\u0000b": must not hold a NUL character'),
    ("boot", "yes", 'boot = "yes": must be true or false'),
    ("boot", 1, "boot = 1: must be true or false"),
    ("command", "/bin/true", 'command = "/bin/true": must be a list of strings'),
    ("command", ["a", 1], "command = 1: must be a string"),
    ("command", ["a\0"], 'command = "a\\u0000": must not hold a NUL character'),
    ("process_two", "no", 'process_two = "no": must be true or false'),
    ("user", 0, "user = 0: must be a string"),
    ("working_directory", "srv", 'working_directory = "srv": must be an absolute path inside the container'),
    ("working_directory", "/srv/../x", 'working_directory = "/srv/../x": must not contain ".."'),
    ("environment", "A=b", 'environment = "A=b": must be a map'),
    ("environment", [{"A.B": "c"}], f'environment = "A.B": {VARIABLE}'),
    ("environment", [{"1A": "c"}], f'environment = "1A": {VARIABLE}'),
    ("environment", [{"": "c"}], f'environment = "": {VARIABLE}'),
    ("environment", [{"A\n": "c"}], f'environment = "A\\n": {VARIABLE}'),
    ("environment", [{"A": 1}], "environment.A = 1: must be a string"),
    ("environment", [{"A": "b\0"}], 'environment.A = "b\\u0000": must not hold a NUL character'),
    ("console", "tty", 'console = "tty": must be one of interactive, read-only, passive, pipe'),
    ("ephemeral", [], "ephemeral = []: must be true or false"),
    ("read_only", "true", 'read_only = "true": must be true or false'),
    ("volatile", "maybe", 'volatile = "maybe": must be one of no, yes, state, overlay'),
    ("volatile", True, "volatile = true: must be a string"),
    ("pivot_root", "sysroot", 'pivot_root = "sysroot": must be an absolute path inside the container'),
    ("pivot_root", "/a/../b", 'pivot_root = "/a/../b": must not contain ".."'),
    ("pivot_root", "/a:b", 'pivot_root = "/a:b": must be an absolute path inside the container'),
    ("pivot_root", "/a:/b/..", 'pivot_root = "/b/..": must not contain ".."'),
    ("pivot_root", "/a:/b:/c", 'pivot_root = "/a:/b:/c": must be PATH or PATH:PATH'),
    ("user_namespacing", 0, "user_namespacing = 0: must be true or false"),
    ("network_veth", "host", 'network_veth = "host": must be true or false'),
    ("port_map", 8080, "port_map = 8080: must be a map"),
    ("port_map", [{"http": "x"}], 'port_map.http = "x": must be a whole number'),
    ("port_map", [{"http": None}], "port_map.http = null: must be a whole number"),
    ("port_map", [{"http": 1.5}], "port_map.http = 1.5: must be a whole number"),
    ("port_map", [{"http": 0}], "port_map.http = 0: must be a port from 1 to 65535"),
    ("port_map", [{"http": -1}], "port_map.http = -1: must be a port from 1 to 65535"),
    ("port_map", [{"http": 65536}], "port_map.http = 65536: must be a port from 1 to 65535"),
    ("resolv_conf", "copy", f'resolv_conf = "copy": must be one of {RESOLV_CONF}'),
    ("bind", ["/a"], 'bind = ["/a"]: must be a map'),
    ("bind", [{"a": "/b"}], 'bind.a = "/b": the source must be an absolute path of the host'),
    ("bind", [{"/a": "b"}], 'bind./a = "b": must be an absolute path inside the container'),
    ("bind", [{"/a": None}], 'bind./a = "": must be an absolute path inside the container'),
    ("bind", [{"/a": "/b/../c"}], 'bind./a = "/b/../c": must not contain ".."'),
    ("bind_read_only", [{"": "/b"}], 'bind_read_only. = "/b": the source must be an absolute path of the host'),
    ("bind_read_only", [{"/a": "/.."}], 'bind_read_only./a = "/..": must not contain ".."'),
    ("enabled", "on", 'enabled = "on": must be true or false'),
    ("volumes", {}, "volumes = {}: must be true or false"),
]


@pytest.mark.parametrize(("name", "value", "sentence"), SENTENCES)
def test_sentence(name: str, value: object, sentence: str) -> None:
    options = TASK_OPTIONS if BY_NAME[name] in TASK_OPTIONS else PLUGIN_OPTIONS
    raw = {name: value} if options is PLUGIN_OPTIONS else {"image": "debian", name: value}
    text = refusal(options, raw)
    # pivot_root = "/a:b" is said of the part that is wrong
    assert text == sentence.replace('pivot_root = "/a:b"', 'pivot_root = "b"')


def test_every_option_has_a_sentence() -> None:
    assert {name for name, _, _ in SENTENCES} == set(BY_NAME)


def test_image_is_required_even_if_the_key_is_missing() -> None:
    assert refusal(TASK_OPTIONS, {}) == "image = null: is required"


def test_unknown_option() -> None:
    names = ", ".join(option.name for option in TASK_OPTIONS)
    assert refusal(TASK_OPTIONS, {"image": "debian", "imgae": "x"}) == (
        f'imgae = "x": no such option; the options are {names}'
    )
    assert refusal(PLUGIN_OPTIONS, {"image": "x"}) == (
        'image = "x": no such option; the options are enabled, volumes'
    )


# -- rules ---------------------------------------------------------------------------------------------------

BROKEN: list[tuple[dict[str, object], int, str]] = [
    (
        {"process_two": True, "command": ["a"]},
        252,
        "process_two = true: cannot be combined with boot; "
        "set boot = false to run a command, or leave process_two out",
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
        {"volatile": "yes"},
        256,
        'volatile = "yes": needs systemd 257 or newer together with user namespaces; set user_namespacing = false',
    ),
    (
        {"volatile": "state"},
        252,
        'volatile = "state": needs systemd 257 or newer together with user namespaces; '
        "set user_namespacing = false",
    ),
    (
        {"volatile": "overlay", "ephemeral": True},
        257,
        'volatile = "overlay": cannot be combined with ephemeral; either one already throws all changes away',
    ),
]


@pytest.mark.parametrize(("options", "systemd", "sentence"), BROKEN)
def test_broken_rule(options: dict[str, object], systemd: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        driver.check_rules(decode(**options), make_host(systemd))
    assert str(caught.value) == sentence


@pytest.mark.parametrize("rule", driver.RULES, ids=lambda rule: f"{rule.option}: {rule.rule}")
def test_every_rule_is_broken_above(rule: driver.Rule) -> None:
    assert any(sentence.startswith(rule.option) and rule.rule in sentence for _, _, sentence in BROKEN)
    assert rule.option in BY_NAME
    assert rule.remedy


@pytest.mark.parametrize(
    ("options", "systemd"),
    [
        ({}, 249),
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
    ],
)
def test_kept_rules(options: dict[str, object], systemd: int) -> None:
    driver.check_rules(decode(**options), make_host(systemd))


def test_values_in_sentences_are_json() -> None:
    """They can be pasted back into a job."""
    text = refusal(TASK_OPTIONS, {"image": "debian", "volatile": 'a"b'})
    assert json.loads(text.split(" = ")[1].split(": must")[0]) == 'a"b'


# --- from HCL, by the schema Nomad is given ---


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
    driver.load_protocol()
    body = body.replace(" a = ", ' "/a" = ') if "bind =" in body else body.replace(" a = ", " host_path = ")
    spec = driver.render_spec(driver.TASK_OPTIONS)
    packed = agent.to_msgpack(agent.decode_config(spec, f'image = "debian"\n{body}'))
    raw = driver.unpack_options(packed)
    source = "/a" if '"/a"' in body else "host_path"
    assert driver.decode_map("bind", raw["bind"], driver.decode_string) == {source: "/b"}
    values = driver.decode_options(driver.TASK_OPTIONS, {**raw, "bind": None})
    assert (values["environment"], values["port_map"]) == ({"FOO": "bar"}, {"http": 80})
    assert (values["boot"], values["user_namespacing"], values["network_veth"]) == (True, True, True)
