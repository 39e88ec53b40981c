# SPDX-License-Identifier: MPL-2.0
"""What an option is: its type, its decoding, nspawn's argument for it, its line in the manual.

The options themselves are the rows at the top of driver.py. Values arrive as the agent's msgpack has them: every
key of the schema is present, and nil if the job does not set it.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nspawn.common import ConfigError, name_entry, quote
from nspawn.permissions import Permission, render_permission_table


class Kind(enum.Enum):
    """The type of an option. The value is its name in Nomad's hclspec.

    The types are those of the Go driver. A map is a list of maps, because then jobs may write both `x { a = "b" }`
    and `x = { "/a" = "/b" }`. An attribute of type map(string) would accept neither.
    """

    BOOL = "bool"
    NUMBER = "number"
    STRING = "string"
    STRINGS = "list(string)"
    STRING_MAP = "list(map(string))"
    NUMBER_MAP = "list(map(number))"
    STRINGS_MAP = "list(map(list(string)))"
    BLOCK = "block"
    BLOCKS = "list(block)"

    @property
    def is_block(self) -> bool:
        return self in (Kind.BLOCK, Kind.BLOCKS)

    def decode(self, name: str, value: object) -> object:
        """Return the value as a Python type. Raises ConfigError if it is not of this type."""
        decoders: dict[Kind, Callable[[str, object], object]] = {
            Kind.BOOL: decode_bool,
            Kind.NUMBER: decode_number,
            Kind.STRING: decode_string,
            Kind.STRINGS: decode_strings,
            Kind.STRING_MAP: functools.partial(decode_map, decode=decode_string),
            Kind.NUMBER_MAP: functools.partial(decode_map, decode=decode_number),
            Kind.STRINGS_MAP: functools.partial(decode_map, decode=decode_strings),
        }
        return decoders[self](name, value)


def decode_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(name, value, "must be true or false")
    return value


def decode_string(name: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(name, value, "must be a string")
    if "\0" in value:
        raise ConfigError(name, value, "must not hold a NUL character")
    if any("\ud800" <= char <= "\udfff" for char in value):  # how the bytes that are no UTF-8 arrive
        raise ConfigError(name, value, "must be text in UTF-8")
    return value


def decode_number(name: str, value: object) -> int:
    """Also takes strings: numbers that a float cannot hold exactly arrive so. Raises ConfigError."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if float(value) == int(float(value)):
                return int(float(value))
    raise ConfigError(name, value, "must be a whole number")


def decode_strings(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(name, value, "must be a list of strings")
    return tuple(decode_string(name, item) for item in value)


def decode_map(name: str, value: object, decode: Callable[[str, object], object]) -> dict[str, object]:
    """Merge a list of maps. If two have the same key, the later one wins, as in the Go driver."""
    maps = value if isinstance(value, (list, tuple)) else [value]
    folded: dict[str, object] = {}
    for item in maps:
        if not isinstance(item, Mapping):
            raise ConfigError(name, value, "must be a map")
        for key, entry in item.items():
            key = decode_string(name, key)
            folded[key] = decode(name_entry(name, key), entry)
    return folded


Check = Callable[[str, Any], Any]
Render = Callable[[str, Any], list[str]]


@dataclass(frozen=True)
class Option:
    """One option of a task or of the plugin.

    `check` raises ConfigError or returns the value to use. `choices` maps each allowed value to the systemd
    version that it needs, 0 for any. `argument` is nspawn's option. `render` makes its arguments if a value is not
    simply one `argument=value`.
    """

    name: str
    kind: Kind
    doc: str
    example: str = ""  # a value in HCL
    default: Any = None  # the value if the job does not set it
    required: bool = False
    refuses_empty: bool = False  # "" is a mistake, and does not mean "unset"
    aliases: tuple[str, ...] = ()
    check: Check | None = None
    choices: Mapping[str, int] = field(default_factory=dict)
    since: int = 0  # the systemd version it needs, 0: any supported one
    permission: Permission | None = None
    needs_permission: Callable[[Any], bool] = bool  # whether a value needs it, if it is a word of `allow`
    argument: str = ""  # "": the plan handles the value
    render: Render | None = None
    fields: tuple[Option, ...] = ()  # of a BLOCK or BLOCKS
    into: Callable[..., Any] = dict  # the type of a BLOCK, made from its fields

    def decode(self, value: object) -> Any:
        if value is None or value == "":  # HCL expressions cannot say "unset", so "" means it
            if value == "" and self.refuses_empty:
                raise ConfigError(self.name, value, "must not be empty", f"the default is {self.default}")
            if self.required:
                raise ConfigError(self.name, value, "is required" if value is None else "must not be empty")
            return self.default
        if self.kind is Kind.BLOCK:
            return self.decode_block(value)
        decoded = self.decode_blocks(value) if self.kind is Kind.BLOCKS else self.kind.decode(self.name, value)
        if self.choices and decoded not in self.choices:
            raise ConfigError(self.name, decoded, f"must be one of {', '.join(self.choices)}")
        return self.check(self.name, decoded) if self.check else decoded

    def decode_block(self, value: object) -> Any:
        if not isinstance(value, Mapping):
            raise ConfigError(self.name, value, "must be a block")
        try:
            return self.into(**decode_options(self.fields, value))
        except ConfigError as error:
            raise error.within(self.name) from None

    def decode_blocks(self, value: object) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(self.name, value, "must be blocks")
        return tuple(map(self.decode_block, value))

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def needed_systemd(self, value: object) -> int:
        """Return the systemd version that this value of the option needs."""
        return max(self.since, self.choices.get(value, 0) if isinstance(value, str) else 0)

    def argv(self, value: Any) -> list[str]:
        """Return nspawn's arguments. Each holds its value, so that no value can become an argument by itself."""
        if not self.argument or not is_set(value):
            return []
        if self.render:
            return self.render(self.argument, value)
        if self.kind is Kind.BOOL:
            return [self.argument]
        items = value if self.kind is Kind.STRINGS else (value,)
        return [f"{self.argument}={item}" for item in items]


def never(value: object) -> bool:
    """The `needs_permission` of options that are checked elsewhere: their value alone does not decide."""
    return False


def is_set(value: object) -> bool:
    """Whether a value differs from an unset option. 0 does; False, "" and empty collections do not."""
    return value is not None and value is not False and value not in ("", (), {})


def decode_options(options: Sequence[Option], raw: Mapping[str, object]) -> dict[str, Any]:
    """Return the values of all options. Raises ConfigError if one is unknown, missing or wrong."""
    names = [name for option in options for name in option.names]
    for key in raw:
        if key not in names:
            raise ConfigError(quote(str(key)), raw[key], "no such option", f"the options are {', '.join(names)}")
    return {option.name: decode_named(option, raw) for option in options}


def decode_named(option: Option, raw: Mapping[str, object]) -> Any:
    """Return the value of an option under any of its names. Errors use the name that the job uses."""
    said = [name for name in option.names if raw.get(name) is not None]
    if len(said) > 1:
        raise ConfigError(said[1], raw[said[1]], f"is another name of {option.name}", "set one of the two")
    if not said:
        return option.decode(None)
    return (option if said[0] == option.name else replace(option, name=said[0])).decode(raw[said[0]])


REFERENCE_HEAD = """\
<!-- `sh build.sh reference` writes this file. The options are in driver.py. -->

# Options

The options of a task go into its `config` block. Names and meanings are systemd-nspawn's. A map may be written as
a block or with `=`. If two blocks of a map share a key, the later wins.

Each option is checked before the image is fetched, and all together before the container starts. A refusal is one
sentence that names the option, the value and the rule.

`nomad-driver-nspawn options` prints this reference for the version that is installed, and `options NAME` one
option.
"""

REFERENCE_PERMISSIONS = """\
A job may use an option with a permission only if the operator gives it. The permissions are words of
[`allow`](#plugin-allow), or what [`allow_caps`](#plugin-allow_caps) and [`allow_paths`](#plugin-allow_paths)
hold. "The host" means that a job with it can become root of the host.
"""


def render_reference(groups: Mapping[str, Sequence[Option]], plugin: Sequence[Option]) -> str:
    """Return the manual of all options in Markdown: docs/options.md."""
    parts = [REFERENCE_HEAD]
    parts += [render_group(title, options) for title, options in groups.items()]
    parts.append(render_group("The plugin's block", plugin, "plugin "))
    parts.append(f"## Permissions\n\n{REFERENCE_PERMISSIONS}\n{render_permission_table()}")
    return "\n".join(parts)


def render_group(title: str, options: Sequence[Option], prefix: str = "") -> str:
    """Return a chapter of the manual: a short table, then a section for each option. `prefix` stands before the
    names in headings, so that two options of one name can both be linked to."""
    lines = [f"## {title}\n", "| option | type | in short |", "|---|---|---|"]
    for option in options:
        link = f"[`{option.name}`](#{prefix.lower().replace(' ', '-')}{option.name})"
        lines.append(f"| {link} | {option.kind.value} | {option.doc.partition('. ')[0].rstrip('.')} |")
    lines.append("")
    for option in options:
        lines.append(render_section(option, f"### {prefix}`{option.name}`"))
        lines += [render_section(inner, f"#### {prefix}`{option.name}.{inner.name}`") for inner in option.fields]
    return "\n".join(lines)


def render_section(option: Option, heading: str) -> str:
    """Return what the manual says of one option."""
    lines = [heading, "", *textwrap.wrap(option.doc, 120), ""]
    facts = [f"type: `{option.kind.value}`", f"default: {render_default(option)}"]
    if option.choices:
        facts.append(f"values: {', '.join(f'`{choice}`' for choice in option.choices)}")
    for version in sorted({option.since, *option.choices.values()} - {0}):
        which = [f"`{choice}`" for choice, since in option.choices.items() if since == version]
        facts.append(f"needs: systemd {version}{', for ' + ', '.join(which) if which else ''}")
    if option.aliases:
        facts.append(f"also called: {', '.join(f'`{alias}`' for alias in option.aliases)}")
    if option.permission:
        facts.append(f"permission: [{option.permission.reference}](#permissions)")
    equals = " " if option.kind.is_block else " = "
    lines += [*(f"* {fact}" for fact in facts), "", "```hcl", f"{option.name}{equals}{option.example}", "```", ""]
    return "\n".join(lines)


def render_default(option: Option) -> str:
    if option.required:
        return "none, it is required"
    return f"`{json.dumps(option.default)}`" if option.default not in (None, (), {}) else "not set"


def list_notes(option: Option) -> list[str]:
    """Return the sentences of the manual about an option."""
    notes = [option.doc]
    if option.choices:
        notes.append(f"One of {', '.join(f'`{choice}`' for choice in option.choices)}.")
    for version in sorted({option.since, *option.choices.values()} - {0}):
        which = [choice for choice, since in option.choices.items() if since == version]
        notes.append(f"{'`' + '`, `'.join(which) + '` needs' if which else 'Needs'} systemd {version}.")
    if option.aliases:
        notes.append(f"Also called {', '.join(f'`{alias}`' for alias in option.aliases)}.")
    if option.permission:
        notes.append(f"The operator decides: {option.permission.reference}.")
    return notes
