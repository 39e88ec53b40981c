# SPDX-License-Identifier: MPL-2.0
"""HCL as Nomad's command line reads it.

A driver config is evaluated twice. The CLI evaluates the job file, leaves ${NOMAD_...}, ${env[...]}, ${node...},
${attr...} and ${meta...} in place and turns blocks and literal objects into lists of maps; the client evaluates
the result again, as JSON, against the driver's schema. parse_hcl() is step one, decode_config() step two.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import hcl2

from tests.agent.errors import AgentError, ConfigError

_HCL_OPTIONS = hcl2.SerializationOptions(with_comments=False)
_RUNTIME_NAME = re.compile(r'(NOMAD_\w+|(node|attr|meta)\.[\w.\-]+|(env|meta|attr)\["[^"]+"\])\Z')
_HEREDOC = re.compile(r'"<<(-?)(\w+)\n(.*?)[ \t]*\2"\Z', re.DOTALL)
_ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[nrt"\\])')
_SIMPLE_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\"}
_TEMPLATE = re.compile(r"\$\$\{|%%\{|\$\{([^}]*)\}")


class Expression(str):
    """HCL that only Nomad's own CLI can compute (functions, variables); kept as text to name it in errors."""


def parse_hcl(text: str) -> dict[str, Any]:
    """HCL to the JSON form in which the CLI hands a config to the server."""
    try:
        return _body(hcl2.loads(text if text.endswith("\n") else text + "\n", serialization_options=_HCL_OPTIONS))
    except AgentError:
        raise
    except Exception as error:  # lark's errors share no base class of their own worth importing
        raise ConfigError([f"Invalid HCL: {error}"]) from error


def _body(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {_unquote(key): _argument(value) for key, value in raw.items() if key != "__is_block__"}


def _argument(value: Any) -> Any:
    """Value of one argument of a body: blocks become a list of maps, and so does a literal object."""
    if isinstance(value, list) and value and all(_is_block(item) for item in value):
        return [_block(item) for item in value]
    return [_value(value)] if isinstance(value, dict) else _value(value)


def _is_block(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    return "__is_block__" in item or (len(item) == 1 and _is_block(next(iter(item.values()))))


def _block(item: Mapping[str, Any]) -> dict[str, Any]:
    if "__is_block__" in item:
        return _body(item)
    label, inner = next(iter(item.items()))
    return {_unquote(label): [_block(inner)]}


def _value(raw: Any) -> Any:
    if isinstance(raw, list):
        return [_value(item) for item in raw]
    if isinstance(raw, dict):
        return {_unquote(key): _value(item) for key, item in raw.items()}
    return _unquote(raw) if isinstance(raw, str) else raw


def _unquote(raw: str) -> Any:
    """python-hcl2 keeps the quotes of strings, heredocs with their markers, and expressions as "${...}"."""
    if heredoc := _HEREDOC.match(raw):
        text = heredoc[3]
        return _unescape_template(textwrap.dedent(text) if heredoc[1] else text)
    if raw.startswith('"'):
        return _unescape_template(_ESCAPE.sub(_escape, raw[1:-1]))
    inner = raw[2:-1] if raw.startswith("${") and raw.endswith("}") else raw
    if _RUNTIME_NAME.match(inner):
        return "${" + inner + "}"
    if re.match(r"-?[\d.]+(e[+-]?\d+)?\Z", inner, re.IGNORECASE):
        number = Decimal(inner)
        return int(number) if number == number.to_integral_value() else float(number)
    if inner.startswith('("') and inner.endswith('")'):  # a key in parentheses
        return _unquote(inner[1:-1])
    return Expression(inner) if raw.startswith("${") else raw


def _escape(match: re.Match[str]) -> str:
    code = match[1]
    return chr(int(code[1:], 16)) if code[0] in "uU" else _SIMPLE_ESCAPES[code]


def _unescape_template(text: str) -> str:
    """What the CLI leaves of a template: `$${` loses one dollar here and is a reference for the client."""
    return _TEMPLATE.sub(lambda match: match[0] if match[1] is not None else match[0][1:], text)


def interpolate(text: str, variables: Mapping[str, str], strict: bool = True) -> str:
    """Replace references in a string as the client does; env["X"] and a bare X mean the same variable.

    Raises ConfigError for names that are not known, or leaves them as they are if not `strict`: the client does
    the one in a driver config and the other in env blocks.
    """

    def replace(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][1:]
        name = match[1].strip()
        if quoted := re.match(r'(\w+)\["([^"]+)"\]\Z', name):
            name = quoted[2] if quoted[1] == "env" else f"{quoted[1]}.{quoted[2]}"
        if name not in variables and not strict:
            return match[0]
        if name not in variables:
            raise ConfigError([f'Unknown variable: There is no variable named "{name}".'])
        return variables[name]

    return _TEMPLATE.sub(replace, text)
