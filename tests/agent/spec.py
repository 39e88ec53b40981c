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
from tests.agent.hcl import Expression, interpolate, parse_hcl, parse_literal


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
        value = self.decode(spec, content, "")
        known = _names(spec, "")
        for key in content:
            if key not in known:
                self.problems.append(f'Invalid label: No argument or block type is named "{key}".')
        return value

    def decode(self, spec: hcl_spec_pb2.Spec, content: Mapping[str, Any], implied: str) -> Any:
        kind = spec.WhichOneof("block")
        if kind == "object":
            return {name: self.decode(sub, content, name) for name, sub in sorted(spec.object.attributes.items())}
        if kind == "array":
            return [self.decode(sub, content, "") for sub in spec.array.values]
        if kind == "Attr":
            return self.attribute(spec.Attr, content, implied)
        if kind == "literal":
            return convert(parse_literal(spec.literal.value), "any")
        if kind == "default":
            # An implied name is not passed through a default: such an attribute has no name at all.
            value = self.decode(spec.default.primary, content, "")
            return self.decode(spec.default.default, content, "") if value is None else value
        if kind in ("block_value", "block_attrs", "block_list", "block_set"):
            return getattr(self, kind)(getattr(spec, kind), content, implied)
        raise AgentError("nil spec given" if kind is None else f"the stand-in cannot decode a {kind} spec")

    def attribute(self, attr: hcl_spec_pb2.Attr, content: Mapping[str, Any], implied: str) -> Any:
        name = attr.name or implied
        if not name:
            raise AgentError("Missing name in attribute spec: an attribute within a default needs its own name")
        if name not in content:
            if attr.required:
                self.missing(name)
            return None
        return self.convert(name, content[name], attr.type)

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

    def single(self, name: str, required: bool, content: Mapping[str, Any]) -> Mapping[str, Any] | None:
        items = self.blocks(name, content)
        if len(items) > 1:
            self.problems.append(f'Duplicate {name} block: Only one block of type "{name}" is allowed.')
        if not items and required:
            self.problems.append(f"Missing {name} block: A {name} block is required.")
        return items[0] if items else None

    def block_value(self, block: hcl_spec_pb2.Block, content: Mapping[str, Any], implied: str) -> Any:
        found = self.single(block.name or implied, block.required, content)
        return None if found is None else self.body(block.nested, found)

    def block_attrs(self, block: hcl_spec_pb2.BlockAttrs, content: Mapping[str, Any], implied: str) -> Any:
        found = self.single(block.name or implied, block.required, content)
        if found is None:
            return None
        return {key: self.convert(key, item, block.type) for key, item in found.items()}

    def block_list(
        self, block: hcl_spec_pb2.BlockList | hcl_spec_pb2.BlockSet, content: Mapping[str, Any], implied: str
    ) -> list[Any]:
        name = block.name or implied
        items = self.blocks(name, content)
        if len(items) < block.min_items:
            self.problems.append(
                f'Insufficient {name} blocks: At least {block.min_items} "{name}" blocks are required.'
            )
        if block.max_items and len(items) > block.max_items:
            self.problems.append(
                f'Too many {name} blocks: No more than {block.max_items} "{name}" blocks are allowed.'
            )
        return [self.body(block.nested, item) for item in items]

    def block_set(self, block: hcl_spec_pb2.BlockSet, content: Mapping[str, Any], implied: str) -> list[Any]:
        unique: list[Any] = []
        for item in self.block_list(block, content, implied):
            if item not in unique:
                unique.append(item)
        return unique


def _names(spec: hcl_spec_pb2.Spec, implied: str) -> set[str]:
    """Names which a body of this spec may use."""
    kind = spec.WhichOneof("block")
    if kind == "object":
        return {found for name, sub in spec.object.attributes.items() for found in _names(sub, name)}
    if kind == "array":
        return {found for sub in spec.array.values for found in _names(sub, "")}
    if kind == "default":
        return _names(spec.default.primary, "") | _names(spec.default.default, "")
    if kind in (None, "literal"):
        return set()
    return {getattr(spec, kind).name or implied}


def convert(value: Any, kind: str) -> Any:
    """Convert to an HCL type as cty does. Raises _Mismatch with the end of the client's sentence."""
    kind = kind.replace(" ", "")
    if value is None:
        return None
    if kind == "any":
        return _untyped(value)
    if kind in ("list(any)", "map(any)", "set(any)") or "(" not in kind:
        return _primitive(value, kind) if "(" not in kind else _untyped(value)
    outer, inner = kind[:-1].split("(", 1)
    if outer in ("list", "set") and isinstance(value, list):
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


def _untyped(value: Any) -> Any:
    if isinstance(value, list):
        return [_untyped(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _untyped(item) for key, item in value.items()}
    return wire_number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


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
