# SPDX-License-Identifier: MPL-2.0
"""A driver config against the driver's schema, with the client's own sentences for what does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgpack

from nomad_pb import hcl_spec_pb2
from tests.agent.errors import AgentError, ConfigError
from tests.agent.hcl import Expression, interpolate, parse_hcl


class _Mismatch(Exception):
    """A value that cannot become the wanted type; the text ends the client's sentence."""


class _BadText(_Mismatch):
    """Text that is no number or bool; unlike for a wrong type, the client does not say where it is."""


def decode_config(
    spec: hcl_spec_pb2.Spec, body: str | Mapping[str, Any], variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The config a plugin receives, before msgpack: every key of the schema is there, None when unset.

    `body` is HCL text, or a mapping in the JSON form of a job, where a block is a list of maps. Raises
    ConfigError with sentences like the client's.
    """
    content = parse_hcl(body) if isinstance(body, str) else body
    decoder = _Decoder(variables or {})
    value = decoder.body(spec, content)
    if decoder.problems:
        raise ConfigError(decoder.problems)
    return dict(value or {})


def to_msgpack(config: Mapping[str, Any]) -> bytes:
    """msgpack as the client writes it: sorted keys, str for text, the smallest integer form."""
    return bytes(msgpack.packb(_sorted(config), use_bin_type=True))


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def wire_number(number: int | float) -> int | float | str:
    """A number as it travels: int64, else float64 when that is exact, else its decimal text."""
    exact = Decimal(repr(number)) if isinstance(number, float) else Decimal(number)
    if exact == exact.to_integral_value() and -(2**63) <= exact < 2**63:
        return int(exact)
    try:
        rounded = float(number)
    except OverflowError:
        return str(number)
    return rounded if Decimal(rounded) == exact else format(exact, "f")


class _Decoder:
    """One pass over a schema; collects problems instead of stopping at the first, like the client."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables
        self.problems: list[str] = []

    def body(self, spec: hcl_spec_pb2.Spec, content: Mapping[str, Any]) -> Any:
        value = self.decode(spec, content)
        known = _names(spec)
        for key in content:
            if key not in known:
                self.problems.append(f'Invalid label: No argument or block type is named "{key}".')
        return value

    def decode(self, spec: hcl_spec_pb2.Spec, content: Mapping[str, Any]) -> Any:
        """As much of the schema language as this driver uses."""
        kind = spec.WhichOneof("block")
        if kind == "object":
            return {name: self.decode(sub, content) for name, sub in sorted(spec.object.attributes.items())}
        if kind == "Attr":
            return self.attribute(spec.Attr, content)
        if kind == "block_value":
            return self.block_value(spec.block_value, content)
        if kind == "block_list":
            return self.block_list(spec.block_list, content)
        raise AgentError("nil spec given" if kind is None else f"the stand-in cannot decode a {kind} spec")

    def attribute(self, attr: hcl_spec_pb2.Attr, content: Mapping[str, Any]) -> Any:
        if not attr.name:
            raise AgentError("Missing name in attribute spec")
        if attr.name not in content:
            if attr.required:
                self.missing(attr.name)
            return None
        return self.convert(attr.name, content[attr.name], attr.type)

    def missing(self, name: str) -> None:
        self.problems.append(
            f'Missing required argument: The argument "{name}" is required, but no definition was found.'
        )

    def convert(self, name: str, raw: Any, kind: str) -> Any:
        try:
            return convert(self.evaluate(raw, kind), kind)
        except ConfigError as error:
            self.problems.extend(error.problems)
        except _Mismatch as error:
            self.problems.append(
                f'Incorrect attribute value type: Inappropriate value for attribute "{name}": {error}.'
            )
        return None

    def evaluate(self, raw: Any, kind: str) -> Any:
        if isinstance(raw, Expression):
            if kind.replace(" ", "").startswith("list(map("):
                raise _Mismatch(f"{_friendly(kind)} required")
            raise ConfigError([f"the stand-in cannot evaluate {raw}: write a literal value"])
        if isinstance(raw, str):
            return interpolate(raw, self.variables)
        if isinstance(raw, Mapping):
            return {interpolate(key, self.variables): self.evaluate(item, "any") for key, item in raw.items()}
        return [self.evaluate(item, "any") for item in raw] if isinstance(raw, list) else raw

    def blocks(self, name: str, content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        raw = content.get(name)
        items = [] if raw is None else raw if isinstance(raw, list) else [raw]
        if all(isinstance(item, Mapping) for item in items):
            return items
        self.problems.append(f'Incorrect JSON value type: a JSON object is required for block "{name}".')
        return []

    def block_value(self, block: hcl_spec_pb2.Block, content: Mapping[str, Any]) -> Any:
        items = self.blocks(block.name, content)
        if len(items) > 1:
            self.problems.append(
                f'Duplicate {block.name} block: Only one block of type "{block.name}" is allowed.'
            )
        if not items and block.required:
            self.problems.append(f"Missing {block.name} block: A {block.name} block is required.")
        return self.body(block.nested, items[0]) if items else None

    def block_list(self, block: hcl_spec_pb2.BlockList, content: Mapping[str, Any]) -> list[Any]:
        return [self.body(block.nested, item) for item in self.blocks(block.name, content)]


def _names(spec: hcl_spec_pb2.Spec) -> set[str]:
    """Names which a body of this spec may use."""
    kind = spec.WhichOneof("block")
    if kind == "object":
        return {found for sub in spec.object.attributes.values() for found in _names(sub)}
    return {getattr(spec, kind).name} if kind else set()


def convert(value: Any, kind: str) -> Any:
    """Convert to an HCL type as cty does. Raises _Mismatch with the end of the client's sentence."""
    kind = kind.replace(" ", "")
    if value is None:
        return None
    if "(" not in kind:
        return _primitive(value, kind)
    outer, inner = kind[:-1].split("(", 1)
    if outer == "list" and isinstance(value, list):
        return [_element(f"element {index}", item, inner) for index, item in enumerate(value)]
    if outer == "map" and isinstance(value, Mapping):
        return {key: _element(f'element "{key}"', item, inner) for key, item in value.items()}
    collection = isinstance(value, (list, Mapping))
    raise _Mismatch(f"{_friendly(kind)} required" if collection else _wrong_type(kind, value))


def _element(where: str, item: Any, inner: str) -> Any:
    try:
        return convert(item, inner)
    except _BadText:
        raise
    except _Mismatch as error:
        raise _Mismatch(f"{where}: {error}") from error


def _wrong_type(kind: str, value: Any) -> str:
    names = ((bool, "bool"), (str, "string"), ((int, float), "number"), (list, "tuple"), (Mapping, "object"))
    return (
        f"{_friendly(kind)} required, but have {next(name for types, name in names if isinstance(value, types))}"
    )


def _primitive(value: Any, kind: str) -> Any:
    if kind == "string" and isinstance(value, bool):
        return "true" if value else "false"
    if kind == "string" and isinstance(value, (str, int, float)):
        return value if isinstance(value, str) else format(Decimal(repr(value)), "f")
    if kind == "bool" and (isinstance(value, bool) or value in ("true", "false", "1", "0")):
        return value in (True, "true", "1")
    if kind == "number" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return wire_number(value)
    if kind == "number" and isinstance(value, str) and re.match(r"-?\d+(\.\d+)?([eE][+-]?\d+)?\Z", value):
        number = Decimal(value)
        return wire_number(int(number) if number == number.to_integral_value() else float(number))
    if kind not in ("string", "bool", "number"):
        raise AgentError(f'the schema names an unknown type "{kind}"')
    if isinstance(value, str):
        raise _BadText(f"a {kind} is required")
    raise _Mismatch(_wrong_type(kind, value))


def _friendly(kind: str) -> str:
    return kind.replace(" ", "").replace("(", " of ").replace(")", "")
