# SPDX-License-Identifier: MPL-2.0
"""A stand-in for the Nomad agent: the client's side of the driver plugin protocol.

It starts the plugin file as an agent does, turns HCL into what the plugin receives, lays out allocation
directories, reads the log FIFOs and calls the driver in the order in which a real client calls it. It is also
stricter than an agent: what an agent would swallow, log or die of is kept as a *violation*, a sentence in
`Plugin.violations`, so that a test can say `assert not plugin.violations`.

Sections: Errors, HCL, Spec, Plugin log, Plugin, Logmon, Allocation, Task, Job, Real agent, Command line.
Run `python tests/agent.py --help` to run job files without Nomad.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import grpc
import hcl2
import msgpack
from google.protobuf import duration_pb2, empty_pb2

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a script: the generated modules stand beside tests/, not in it
    sys.path.insert(0, str(ROOT))

from nomad_pb import (  # noqa: E402 # only what stands above finds them
    base_pb2,
    base_pb2_grpc,
    driver_pb2,
    driver_pb2_grpc,
    grpc_plugin_pb2,
    grpc_plugin_pb2_grpc,
    hcl_spec_pb2,
    health_pb2_grpc,
    recoverable_error_pb2,
    rpc_status_pb2,
)
from tests.leftovers import leftovers  # noqa: E402 # as above

T = TypeVar("T")
MAX_INT32 = 2**31 - 1
MAGIC_COOKIE = "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255"
PLUGIN_ENV = {
    "NOMAD_PLUGIN_MAGIC_COOKIE": MAGIC_COOKIE,
    "PLUGIN_MIN_PORT": "10000",
    "PLUGIN_MAX_PORT": "25000",
    "PLUGIN_PROTOCOL_VERSIONS": "2",
}
API_VERSION = "v0.1.0"
MIB = 1024 * 1024

# === Errors ==================================================================================================


class AgentError(Exception):
    """Something the stand-in itself could not do, or that would end a real agent."""


class PluginError(AgentError):
    """The plugin could not be started, or its handshake is not one."""


class ConfigError(AgentError):
    """A driver or plugin config that does not fit its schema; `problems` holds one sentence for each fault."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("failed to parse config:\n" + "\n".join(f" * {line}" for line in self.problems))


class DriverError(AgentError):
    """A gRPC error of the driver, as Nomad's client reads it. `recoverable` is None without that detail."""

    def __init__(self, text: str, recoverable: bool | None = None, code: str = "UNKNOWN") -> None:
        self.text, self.recoverable, self.code = text, recoverable, code
        super().__init__(text)


def driver_error(error: grpc.RpcError) -> DriverError:
    """Read status and details as the client does: only details[0] counts, and only a RecoverableError there."""
    call: Any = error
    code, text = call.code(), call.details() or ""
    for key, value in call.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        status = rpc_status_pb2.Status.FromString(value)
        if status.code != code.value[0]:  # grpc-go 1.59 and later report this instead of the real error
            text = f"status details say code {status.code}, the call {code.value[0]}"
            return DriverError(text, None, "INTERNAL")
        flag = recoverable_error_pb2.RecoverableError()
        if status.details and status.details[0].Unpack(flag):
            return DriverError(text, flag.recoverable, code.name)
    return DriverError(text, None, code.name)


def call(method: Callable[..., T], request: Any, timeout: float | None = None) -> T:
    """One unary call; a gRPC error becomes a DriverError, a passed deadline a TimeoutError."""
    try:
        return method(request, timeout=timeout)
    except grpc.RpcError as error:
        failure = driver_error(error)
        if failure.code == "DEADLINE_EXCEEDED":
            raise TimeoutError(f"no answer within {timeout} s") from error
        raise failure from error
    except ValueError as error:  # grpc's word for a channel that is no more
        raise DriverError("plugin is shut down", None, "UNAVAILABLE") from error


# === HCL =====================================================================================================
# A driver config is evaluated twice. The CLI evaluates the job file, leaves ${NOMAD_...}, ${env[...]}, ${node...},
# ${attr...} and ${meta...} in place and turns blocks and literal objects into lists of maps; the client evaluates
# the result again, as JSON, against the driver's schema. parse_hcl() is step one, decode_config() step two.

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


# === Spec ====================================================================================================


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
            return _literal(spec.literal.value)
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


def _literal(text: str) -> Any:
    value = _value(hcl2.loads(f"value = {text}\n", serialization_options=_HCL_OPTIONS)["value"])
    if isinstance(value, Expression) or (isinstance(value, str) and not text.lstrip().startswith(('"', "<<"))):
        raise AgentError(f"the literal {text} in the schema is not an HCL literal; strings need inner quotes")
    return convert(value, "any")


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


# === Plugin log ==============================================================================================

_LEVELS = ("trace", "debug", "info", "warn", "error")
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)\Z")
_LINE_LIMIT = 64 * 1024


@dataclasses.dataclass(frozen=True)
class LogEntry:
    """One line of the plugin's stderr as the agent understands it."""

    level: str
    message: str
    module: str = ""
    timestamp: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_log_line(line: str) -> tuple[LogEntry, list[str]]:
    """The entry and what is wrong with the line; an agent drops, garbles or even panics on each of these."""
    shown = line if len(line) <= 300 else line[:300] + "..."
    if len(line.encode()) >= _LINE_LIMIT:
        return LogEntry("debug", line), [f"log line of {len(line)} bytes is cut by the agent: {shown}"]
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        return LogEntry("debug", line), [f"log line is not a JSON object: {shown}"]
    faults = [
        f"log line has {key} of type {type(record[key]).__name__}, the agent panics: {shown}"
        for key in ("@message", "@level", "@timestamp")
        if key in record and not isinstance(record[key], str)
    ]
    level = str(record.pop("@level", "")).strip().lower()
    stamp = str(record.pop("@timestamp", ""))
    if level not in _LEVELS:
        faults.append(f"log line has an unknown level {level!r}: {shown}")
    if not _is_timestamp(stamp):
        faults.append(f"log line has a bad @timestamp {stamp!r}: {shown}")
    message, module = str(record.pop("@message", "")), str(record.pop("@module", ""))
    return LogEntry(level, message, module, stamp, record), faults


def _is_timestamp(stamp: str) -> bool:
    if not _TIMESTAMP.match(stamp):
        return False
    with contextlib.suppress(ValueError):
        datetime.fromisoformat(stamp.replace("Z", "+00:00"))
        return True
    return False


class FdReader:
    """A thread that hands on what a file descriptor yields until EOF or close(), which can interrupt it."""

    def __init__(self, fd: int, on_data: Callable[[bytes], None]) -> None:
        self._fd, self._on_data = fd, on_data
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self._wake_read in ready:
                break
            data = os.read(self._fd, _LINE_LIMIT)
            if not data:
                break
            self._on_data(data)
        os.close(self._fd)

    def ended(self, timeout: float = 0) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        if self._wake_write < 0:
            return
        os.close(self._wake_write)
        self._wake_write = -1
        self._thread.join()
        os.close(self._wake_read)


class Lines:
    """Bytes in, lines out."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._rest, self._on_line = b"", on_line

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._on_line(line.decode(errors="replace"))

    @property
    def rest(self) -> str:
        return self._rest.decode(errors="replace")


# === Plugin ==================================================================================================


class Plugin:
    """A started plugin and the one connection to it, as go-plugin's client holds it.

    `base`, `driver`, `controller`, `health`: stubs. `log`: entries of its stderr. `violations`: sentences about
    what an agent would not stand. `fingerprint`: the latest response; `events`: all DriverTaskEvents so far.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        start_timeout: float = 60,
    ) -> None:
        self._prepare()
        self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [str(Path(path).absolute()), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**(os.environ if env is None else env), **PLUGIN_ENV},
            cwd=cwd,
        )
        self.pid = self.process.pid
        self._started = time.monotonic()
        lines: queue.Queue[str] = queue.Queue()
        assert self.process.stdout and self.process.stderr
        self._stdout_lines, self._stderr_lines = Lines(lines.put), Lines(self._on_log_line)
        self._readers += [
            FdReader(os.dup(self.process.stdout.fileno()), self._stdout_lines),
            FdReader(os.dup(self.process.stderr.fileno()), self._stderr_lines),
        ]
        self.process.stdout.close()
        self.process.stderr.close()
        try:
            self.address = self._handshake(lines, start_timeout)
            self.start_seconds = time.monotonic() - self._started
            self._connect(self.address)
        except BaseException:
            self.kill_hard()
            raise

    def _prepare(self) -> None:
        self.log: list[LogEntry] = []
        self.raw_log: list[str] = []
        self.violations: list[str] = []
        self.fingerprint: driver_pb2.FingerprintResponse | None = None
        self.fingerprints: list[driver_pb2.FingerprintResponse] = []
        self.events: list[driver_pb2.DriverTaskEvent] = []
        self.on_event: Callable[[driver_pb2.DriverTaskEvent], None] = lambda event: None
        self.on_log: Callable[[LogEntry], None] = lambda entry: None
        self.closing = False
        self.start_seconds = 0.0
        self._readers: list[FdReader] = []
        self._changed = threading.Condition()
        self._streams: list[Any] = []
        self._broker_end = threading.Event()
        self._schema: hcl_spec_pb2.Spec | None = None

    @classmethod
    def reattach(cls, address: str, pid: int) -> Plugin:
        """Connect to a plugin that outlived its agent: PluginInfo only, no SetConfig, and no log to read."""
        plugin = cls.__new__(cls)
        plugin._prepare()
        plugin.process, plugin.pid, plugin.address = None, pid, address
        plugin._connect(address)
        call(plugin.base.PluginInfo, base_pb2.PluginInfoRequest(), 10)
        return plugin

    # --- start ---

    def _on_log_line(self, line: str) -> None:
        entry, faults = parse_log_line(line)
        self.raw_log.append(line)
        self.log.append(entry)
        self.violations += faults
        self.on_log(entry)

    def _handshake(self, lines: queue.Queue[str], timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = self._readers[0].ended()
            with contextlib.suppress(queue.Empty):
                return self._parse_handshake(lines.get(timeout=0.02))
            if ended:
                assert self.process
                code = self.process.wait(5)
                raise PluginError(self._explain(f"the plugin ended with code {code} before its handshake"))
        raise PluginError(self._explain(f"no handshake within {timeout:g} s"))

    def _parse_handshake(self, line: str) -> str:
        fields = line.split("|")
        if len(fields) < 4:
            raise PluginError(self._explain(f"the first line on stdout is no handshake: {line!r}"))
        fault = None
        if fields[0] != "1" or fields[1] != "2":
            fault = "core version must be 1 and protocol version 2"
        elif fields[2] not in ("unix", "tcp") or not fields[3]:
            fault = "network must be unix or tcp, with an address"
        elif len(fields) < 5 or fields[4] != "grpc":
            fault = "the protocol must be grpc"
        elif len(fields) > 6 or (len(fields) == 6 and fields[5]):
            fault = "fields 6 and 7 (certificate, multiplexing) must be empty: the agent offers neither"
        if fault:
            raise PluginError(self._explain(f"bad handshake {line!r}: {fault}"))
        return f"unix:{fields[3]}" if fields[2] == "unix" else fields[3]

    def _explain(self, problem: str) -> str:
        self._readers[1].ended(0.5)
        text = "\n".join([*self.raw_log, self._stderr_lines.rest]).strip()
        return f"{problem}\nstdout: {self._stdout_lines.rest!r}\nstderr:\n{textwrap.indent(text, '  ')}"

    def _connect(self, address: str) -> None:
        options = [
            ("grpc.default_authority", "unused"),
            ("grpc.max_send_message_length", MAX_INT32),
            ("grpc.max_receive_message_length", MAX_INT32),
            ("grpc.enable_http_proxy", 0),
            # Without it a second client in this process would share the first one's connection.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self.channel = grpc.insecure_channel(address, options=options)
        grpc.channel_ready_future(self.channel).result(timeout=10)
        self.base = base_pb2_grpc.BasePluginStub(self.channel)
        self.driver = driver_pb2_grpc.DriverStub(self.channel)
        self.controller = grpc_plugin_pb2_grpc.GRPCControllerStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        broker = grpc_plugin_pb2_grpc.GRPCBrokerStub(self.channel)
        stdio = grpc_plugin_pb2_grpc.GRPCStdioStub(self.channel)
        self._follow("broker", broker.StartStream(self._silence()), lambda message: None)
        self._follow("stdio", stdio.StreamStdio(empty_pb2.Empty()), lambda message: None)

    def _silence(self) -> Iterator[grpc_plugin_pb2.ConnInfo]:
        """Nothing, until the end; gRPC asks for it in a thread Python waits for, so that counts as one."""
        while not self._broker_end.wait(1) and threading.main_thread().is_alive():
            pass
        yield from ()

    # --- streams ---

    def _follow(self, name: str, stream: Any, on_message: Callable[[Any], None]) -> None:
        """Consume a stream that has to stay open as long as the connection does."""

        def run() -> None:
            reason = "it returned"
            try:
                for message in stream:
                    with self._changed:
                        on_message(message)
                        self._changed.notify_all()
            except grpc.RpcError as error:
                failure = driver_error(error)
                reason = f"{failure.code}: {failure.text}"
            if not self.closing and not self.exited(1):
                self.violations.append(f"the {name} stream ended ({reason}): an agent re-opens it in a busy loop")
            with self._changed:
                self._changed.notify_all()

        self._streams.append(stream)
        threading.Thread(target=run, name=f"plugin {self.pid} {name}", daemon=True).start()

    def open_streams(self) -> None:
        """What the driver manager does after SetConfig: Init (2.0.4 and later), Fingerprint and TaskEvents."""
        try:
            call(self.driver.Init, driver_pb2.InitRequest(), 30)
        except DriverError as error:
            if error.code != "UNIMPLEMENTED":
                raise
        self._follow("Fingerprint", self.driver.Fingerprint(driver_pb2.FingerprintRequest()), self._on_fingerprint)
        self._follow("TaskEvents", self.driver.TaskEvents(driver_pb2.TaskEventsRequest()), self._on_task_event)

    def _on_fingerprint(self, response: driver_pb2.FingerprintResponse) -> None:
        self.fingerprint = response
        self.fingerprints.append(response)
        if response.err:
            self.violations.append(f"Fingerprint answered with err: {response.err}")

    def _on_task_event(self, event: driver_pb2.DriverTaskEvent) -> None:
        self.events.append(event)
        if not event.HasField("timestamp"):
            self.violations.append(f"task event without a timestamp, shown as 1970: {event.message}")
        self.on_event(event)

    def wait_for(self, condition: Callable[[], Any], timeout: float = 10) -> Any:
        """Wait until `condition` is true; it is looked at again after every streamed message."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not (result := condition()):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"not true within {timeout:g} s")
                self._changed.wait(min(left, 0.1))
        return result

    # --- calls ---

    @property
    def task_schema(self) -> hcl_spec_pb2.Spec:
        if self._schema is None:
            response = call(self.driver.TaskConfigSchema, driver_pb2.TaskConfigSchemaRequest(), 10)
            self._schema = response.spec
        return self._schema

    def set_config(self, config: Mapping[str, Any] | str | None = None, nomad: bool = True) -> None:
        """SetConfig with the agent's `config {}` block (HCL or JSON form). `nomad`: with nomad_config."""
        schema = call(self.base.ConfigSchema, base_pb2.ConfigSchemaRequest(), 10)
        request = base_pb2.SetConfigRequest(plugin_api_version=API_VERSION)
        if schema.HasField("spec"):
            request.msgpack_config = to_msgpack(decode_config(schema.spec, config or {}))
        elif config:
            raise AgentError("the plugin has no config schema, but a config was given: an agent would not start")
        if nomad:
            request.nomad_config.CopyFrom(nomad_config())
        call(self.base.SetConfig, request, 30)

    # --- end ---

    def exited(self, timeout: float = 0) -> bool:
        """Whether the process is gone; waits up to `timeout` seconds for it."""
        deadline = time.monotonic() + timeout
        while not self._gone():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        return True

    def _gone(self) -> bool:
        if self.process:
            return self.process.poll() is not None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # ours when a test reattaches within one process
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def kill(self, *, driver_shutdown: bool = False, eof_timeout: float = 5) -> None:
        """End the plugin as an agent does: Shutdown, 2 s to exit, SIGKILL, then EOF on both pipes.

        driver_shutdown: call Driver.Shutdown first, as Nomad 2.0.4 and later do for the long-lived process.
        """
        self.closing = True
        with contextlib.suppress(AgentError, TimeoutError):
            if driver_shutdown:
                call(self.driver.Shutdown, driver_pb2.ShutdownRequest(), 2)
        self._broker_end.set()
        with contextlib.suppress(AgentError):
            try:
                call(self.controller.Shutdown, grpc_plugin_pb2.Empty(), 10)
            except TimeoutError:
                self.violations.append("GRPCController.Shutdown did not answer: an agent would hang at its exit")
        self.channel.close()
        if not self.exited(2):
            self.violations.append("the plugin failed to exit within 2 s of Shutdown")
        self._end(eof_timeout)

    def kill_hard(self, eof_timeout: float = 5) -> None:
        """SIGKILL, as a crash of the plugin."""
        self.closing = True
        self._end(eof_timeout)
        self._broker_end.set()
        if hasattr(self, "channel"):
            self.channel.close()

    def _end(self, eof_timeout: float) -> None:
        if not self._gone():
            os.kill(self.pid, signal.SIGKILL)
        self.exited(5)
        deadline = time.monotonic() + eof_timeout
        for reader in self._readers:
            if not reader.ended(max(0, deadline - time.monotonic())):
                self.violations.append("a child holds the plugin's stdout or stderr: an agent would wait for it")
            reader.close()
        self._readers = []

    def detach(self) -> tuple[str, int]:
        """What is left when the agent dies by SIGKILL: pipes and connection break, the plugin goes on.

        Returns the address and pid for reattach().
        """
        self.closing = True
        for reader in self._readers:
            reader.close()
        self._readers = []
        self._broker_end.set()
        self.channel.close()
        return self.address, self.pid

    def __enter__(self) -> Plugin:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.closing:
            self.kill()


_TRIED: set[tuple[object, ...]] = set()


def _try_like_agent(
    path: str | Path,
    plugin_config: Mapping[str, Any] | str | None,
    args: Sequence[str],
    env: Mapping[str, str] | None,
) -> list[str]:
    """The first two launches, of which nothing stays: what is it, and does the config fit? Returns violations."""
    with Plugin(path, args=args, env=env) as probe:
        info = call(probe.base.PluginInfo, base_pb2.PluginInfoRequest(), 30)
        if info.type != base_pb2.DRIVER or API_VERSION not in info.plugin_api_versions or not info.name:
            raise PluginError(f"an agent would not load this plugin: {info}")
        has_schema = call(probe.base.ConfigSchema, base_pb2.ConfigSchemaRequest(), 30).HasField("spec")
    if not has_schema:
        return probe.violations
    with Plugin(path, args=args, env=env) as validator:
        validator.set_config(plugin_config, nomad=False)
        validator.set_config(plugin_config, nomad=False)
    return probe.violations + validator.violations


def launch_like_agent(
    path: str | Path,
    plugin_config: Mapping[str, Any] | str | None = None,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Plugin:
    """The three launches of an agent's start; returns the long-lived third with its streams open.

    A start that has gone well before in this process is the third launch alone.
    Raises PluginError, ConfigError or DriverError where an agent would refuse to start.
    """
    start = (str(path), os.stat(path).st_mtime_ns, str(plugin_config), str(args), str(env))
    violations = [] if start in _TRIED else _try_like_agent(path, plugin_config, args, env)
    if not violations:
        _TRIED.add(start)
    plugin = Plugin(path, args=args, env=env)
    plugin.violations += violations
    try:
        plugin.set_config(plugin_config)
        plugin.open_streams()
        plugin.wait_for(lambda: plugin.fingerprint or plugin.exited(), 50)
    except BaseException:
        plugin.kill_hard()
        raise
    return plugin


def nomad_config() -> base_pb2.NomadConfig:
    """The agent's own facts for SetConfig, with this machine's cores."""
    driver = base_pb2.NomadDriverConfig(ClientMaxPort=14512, ClientMinPort=14000)
    driver.Topology.node_ids.append(0)
    speeds = re.findall(r"^cpu MHz\s*:\s*(\d+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    for core in range(os.cpu_count() or 1):
        speed = int(speeds[core]) if core < len(speeds) else 1000
        driver.Topology.cores.add(core_id=core, guess_speed=speed)
    return base_pb2.NomadConfig(driver=driver)


# === Logmon ==================================================================================================


class Logmon:
    """The log collector of one task: owns the reading ends of its two FIFOs.

    A stream ends at EOF, when its last writer has closed, and comes back only with restart(), which the agent
    calls before each start of the task and after its own restart. `stdout` and `stderr` hold all bytes so far.
    """

    def __init__(
        self, logs: Path, task: str, on_output: Callable[[str, bytes], None] = lambda stream, data: None
    ) -> None:
        self.paths = {name: logs / f".{task}.{name}.fifo" for name in ("stdout", "stderr")}
        self.files = {name: logs / f"{task}.{name}.0" for name in ("stdout", "stderr")}
        self._output = {"stdout": b"", "stderr": b""}
        self._readers: dict[str, FdReader] = {}
        self._changed = threading.Condition()
        self._on_output = on_output

    @property
    def stdout(self) -> bytes:
        return self._output["stdout"]

    @property
    def stderr(self) -> bytes:
        return self._output["stderr"]

    def start(self) -> None:
        for name, path in self.paths.items():
            if not path.exists():
                os.mkfifo(path, 0o600)
            # Non-blocking, or a thread would hang in open() until a writer comes; for a writer both look the
            # same, and poll() reports no hang-up before there has been one.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(fd, True)
            self._readers[name] = FdReader(fd, self._sink(name))

    def _sink(self, name: str) -> Callable[[bytes], None]:
        def sink(data: bytes) -> None:
            with self.files[name].open("ab") as file:
                file.write(data)
            with self._changed:
                self._output[name] += data
                self._changed.notify_all()
            self._on_output(name, data)

        return sink

    def running(self, name: str) -> bool:
        return name in self._readers and not self._readers[name].ended()

    def restart(self) -> None:
        """As the prestart hook: nothing while both streams live, otherwise close and open both again."""
        if self.running("stdout") and self.running("stderr"):
            return
        if self._readers:
            self.stop(0)
        self.start()

    def stop(self, tolerance: float = 2) -> None:
        """Wait `tolerance` seconds for EOF of each stream, then close the reader: what comes later is lost."""
        deadline = time.monotonic() + tolerance
        for reader in self._readers.values():
            reader.ended(max(0, deadline - time.monotonic()))
            reader.close()
        self._readers = {}

    def wait_for(self, text: bytes | str, stream: str = "stdout", timeout: float = 10) -> bytes:
        """All output of a stream, as soon as it contains `text`."""
        wanted = text.encode() if isinstance(text, str) else text
        with self._changed:
            if not self._changed.wait_for(lambda: wanted in self._output[stream], timeout):
                raise TimeoutError(f"{wanted!r} not in {stream} within {timeout:g} s: {self._output!r}")
            return self._output[stream]

    def wait_eof(self, timeout: float = 5) -> None:
        """Wait until both streams have ended, that is all writers have closed."""
        for name, reader in self._readers.items():
            if not reader.ended(timeout):
                raise TimeoutError(f"somebody still holds the {name} FIFO open")


# === Allocation ==============================================================================================

_NOBODY = 65534


class Allocation:
    """The directories of one allocation on the host, as the client lays them out for image isolation.

    `violations`: what a driver left below them. As a context manager it raises AgentError for these and all other
    that is left of the allocation on this machine.
    """

    def __init__(self, parent: str | Path | None = None) -> None:
        self.id = str(uuid.uuid4())
        self.root = Path(tempfile.mkdtemp(prefix="nomad-allocs-", dir=parent))
        self.root.chmod(0o711)
        self.dir = self.root / self.id
        self.violations: list[str] = []
        self._mounts: list[Path] = []
        self.closed = False
        self.dir.mkdir(0o755)
        for name in ("alloc", "alloc/logs", "alloc/tmp", "alloc/data"):
            self._make(self.dir / name)
        self.logs = self.dir / "alloc" / "logs"

    @staticmethod
    def _make(path: Path, mode: int = 0o777) -> None:
        path.mkdir(exist_ok=True)
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, _NOBODY, -1)

    def add_task(self, name: str) -> Path:
        """Make a task's directories; idempotent, as the task-dir hook at each start."""
        task = self.dir / name
        for path in (task, task / "local", task / "secrets", task / "private"):
            self._make(path)
        self._make(task / "tmp", 0o1777)
        for path in (task / "secrets", task / "private"):
            self._mount_tmpfs(path)
        return task

    def _mount_tmpfs(self, path: Path) -> None:
        if os.geteuid() != 0 or path in self._mounts:
            return
        command = ["mount", "-t", "tmpfs", "-o", "size=1m,noexec", "tmpfs", str(path)]
        subprocess.run(command, check=True, timeout=30)
        self._mounts.append(path)
        self._make(path)
        (path / ".nomad-mount").touch()

    def mounts_below(self) -> list[Path]:
        """Mount points below the allocation other than its own tmpfs."""
        return [path for path in mount_points(self.dir) if path not in self._mounts]

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for path in sorted(self.mounts_below(), reverse=True):
            self.violations.append(f"{path} is still mounted: an agent would delete what is behind it")
            subprocess.run(["umount", "--lazy", str(path)], check=False, timeout=30)
        for path in self._mounts:
            subprocess.run(["umount", str(path)], check=False, timeout=30)
        self._mounts = []
        if not mount_points(self.dir):  # never delete through a mount
            shutil.rmtree(self.root)

    def __enter__(self) -> Allocation:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self.close()
        left = [*self.violations, *leftovers(self.id)]
        if left and kind is None:
            raise AgentError("\n".join(left))


def mount_points(below: Path) -> list[Path]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        name = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        if Path(name).is_relative_to(below):
            found.append(Path(name))
    return found


# === Task ====================================================================================================


@dataclasses.dataclass(frozen=True)
class Port:
    """A port of the group network: the host's, and the one inside (0: the same)."""

    value: int
    to: int = 0
    host_ip: str = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Resources:
    """cpu in MHz, memory in MiB (memory_max -1: unlimited, 0: none), cores: ids reserved for the task."""

    cpu: int = 100
    memory: int = 300
    memory_max: int = 0
    cores: tuple[int, ...] = ()
    ports: Mapping[str, Port] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ExitResult:
    """The end of a task as WaitTask or an exec reports it."""

    exit_code: int
    signal: int = 0
    oom_killed: bool = False
    err: str = ""

    @property
    def successful(self) -> bool:
        return not (self.exit_code or self.signal or self.err)

    def __str__(self) -> str:
        text = f"Exit Code: {self.exit_code}"
        text += f", Signal: {self.signal}" if self.signal else ""
        return text + (f', Exit Message: "{self.err}"' if self.err else "")


@dataclasses.dataclass(frozen=True)
class Template:
    """A template block; `data` may use {{ env "NAME" }}, `destination` is relative to the task directory."""

    data: str
    destination: str
    perms: int = 0o644


class Task:
    """One task: the calls of a task runner in its order.

    start() may be called again after destroy(): a restart, with a new id in the same allocation.
    """

    def __init__(
        self,
        plugin: Plugin,
        allocation: Allocation,
        name: str,
        config: str | Mapping[str, Any],
        *,
        env: Mapping[str, str] | None = None,
        user: str = "",
        resources: Resources | None = None,
        kill_timeout: float = 5,
        kill_signal: str = "",
        network: driver_pb2.NetworkIsolationSpec | None = None,
        dns: driver_pb2.DNSConfig | None = None,
        mounts: Sequence[driver_pb2.Mount] = (),
        devices: Sequence[driver_pb2.Device] = (),
        templates: Sequence[Template] = (),
        meta: Mapping[str, str] | None = None,
        job: str = "example",
        group: str = "group",
        logs_disabled: bool = False,
        on_output: Callable[[str, bytes], None] = lambda stream, data: None,
    ) -> None:
        self.plugin, self.allocation, self.name, self.driver_config = plugin, allocation, name, config
        self.user_env, self.user, self.meta = dict(env or {}), user, dict(meta or {})
        self.resources = resources or Resources()
        self.kill_timeout, self.kill_signal = kill_timeout, kill_signal
        self.network, self.dns, self.mounts, self.devices = network, dns, list(mounts), list(devices)
        self.templates, self.job, self.group, self.logs_disabled = list(templates), job, group, logs_disabled
        self.dir = allocation.add_task(name)
        self.logmon = Logmon(allocation.logs, name, on_output)
        self.cgroup = TaskCgroup(allocation.id, name, bool(self.resources.cores))
        self.id = ""
        self.handle: driver_pb2.TaskHandle | None = None
        self.network_override: driver_pb2.NetworkOverride | None = None

    # --- what the driver gets ---

    @property
    def env(self) -> dict[str, str]:
        """The task's environment; contains nothing of the host's, as for all image drivers."""
        resources = self.resources
        env = {
            "NOMAD_ALLOC_DIR": "/alloc",
            "NOMAD_TASK_DIR": "/local",
            "NOMAD_SECRETS_DIR": "/secrets",
            "NOMAD_MEMORY_LIMIT": str(resources.memory),
            "NOMAD_CPU_LIMIT": str(resources.cpu),
            # The client really sends a space for none: the kernel's notation of an empty set.
            "NOMAD_CPU_CORES": ",".join(map(str, resources.cores)) or " ",
            "NOMAD_ALLOC_ID": self.allocation.id,
            "NOMAD_SHORT_ALLOC_ID": self.allocation.id[:8],
            "NOMAD_ALLOC_NAME": f"{self.job}.{self.group}[0]",
            "NOMAD_ALLOC_INDEX": "0",
            "NOMAD_TASK_NAME": self.name,
            "NOMAD_GROUP_NAME": self.group,
            "NOMAD_JOB_ID": self.job,
            "NOMAD_JOB_NAME": self.job,
            "NOMAD_DC": "dc1",
            "NOMAD_REGION": "global",
            "NOMAD_NAMESPACE": "default",
            "NOMAD_PARENT_CGROUP": "nomad.slice",
        }
        if resources.memory_max > 0:
            env["NOMAD_MEMORY_MAX_LIMIT"] = str(resources.memory_max)
        for key, value in self.meta.items():
            env[f"NOMAD_META_{key}"] = env[f"NOMAD_META_{key.upper()}"] = value
        for label, port in resources.ports.items():
            env |= _port_env(re.sub(r"\W", "_", label), port)
        known = {**_node_variables(self.meta), **env}
        return env | {key: interpolate(value, known, strict=False) for key, value in self.user_env.items()}

    @property
    def variables(self) -> dict[str, str]:
        """What ${...} in the driver config can refer to."""
        return {**_node_variables(self.meta), **self.env}

    def task_config(self) -> driver_pb2.TaskConfig:
        """TaskConfig for the next StartTask; raises ConfigError as the client's "Failed Validation" event."""
        logs = {name: "/dev/null" if self.logs_disabled else str(path) for name, path in self.logmon.paths.items()}
        config = driver_pb2.TaskConfig(
            id=self.id,
            name=self.name,
            msgpack_driver_config=to_msgpack(
                decode_config(self.plugin.task_schema, self.driver_config, self.variables)
            ),
            env=self.env,
            resources=self._resources(),
            mounts=self.mounts,
            devices=self.devices,
            user=self.user,
            alloc_dir=str(self.allocation.dir),
            stdout_path=logs["stdout"],
            stderr_path=logs["stderr"],
            task_group_name=self.group,
            job_name=self.job,
            job_id=self.job,
            alloc_id=self.allocation.id,
            namespace="default",
            node_name=socket.gethostname(),
            node_id=_NODE_ID,
        )
        if self.network:
            config.network_isolation_spec.CopyFrom(self.network)
        if self.dns:
            config.dns.CopyFrom(self.dns)
        return config

    def _resources(self) -> driver_pb2.Resources:
        wanted = self.resources
        ports = [
            driver_pb2.PortMapping(label=label, value=port.value, to=port.to, host_ip=port.host_ip)
            for label, port in wanted.ports.items()
        ]
        result = driver_pb2.Resources(ports=ports)
        result.allocated_resources.cpu.cpu_shares = wanted.cpu
        result.allocated_resources.memory.memory_mb = wanted.memory
        result.allocated_resources.memory.memory_max_mb = wanted.memory_max
        linux = result.linux_resources
        linux.cpu_shares = wanted.cpu
        linux.memory_limit_bytes = max(wanted.memory, wanted.memory_max) * MIB
        linux.cpuset_cpus = ",".join(map(str, wanted.cores))
        linux.PercentTicks = wanted.cpu / (1000.0 * (os.cpu_count() or 1))
        linux.cpuset_cgroup = str(self.cgroup.path)
        return result

    # --- calls ---

    def prestart(self) -> None:
        """The hooks before StartTask: directories, log collector, cgroup, templates."""
        self.allocation.add_task(self.name)
        if not self.logs_disabled:
            self.logmon.restart()
        self.cgroup.create()
        for template in self.templates:
            self._render(template)

    def _render(self, template: Template) -> None:
        env = self.env
        text = re.sub(r'\{\{-?\s*env\s+"([^"]+)"\s*-?\}\}', lambda match: env.get(match[1], ""), template.data)
        if "{{" in text:
            raise ConfigError([f'template {template.destination}: the stand-in knows only {{{{ env "NAME" }}}}'])
        path = self.dir / interpolate(template.destination, {**env, "NOMAD_TASK_DIR": "local"}).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(template.perms)

    def start(self, timeout: float | None = 120) -> driver_pb2.TaskHandle:
        self.id = f"{self.allocation.id}/{self.name}/{os.urandom(4).hex()}"
        self.prestart()
        request = driver_pb2.StartTaskRequest(task=self.task_config())
        response = call(self.plugin.driver.StartTask, request, timeout)
        handle = response.handle
        for ok, fault in (
            (handle.version != 0, "has version 0"),
            (handle.HasField("config"), "has no config: an agent would start a second copy after its restart"),
            (handle.config.id == self.id, f"has config.id {handle.config.id!r} instead of {self.id!r}"),
            (handle.state == driver_pb2.RUNNING, "is not in state RUNNING"),
        ):
            if not ok:
                self.plugin.violations.append(f"the handle of StartTask {fault}")
        if response.driver_error_msg or response.result:
            self.plugin.violations.append("StartTask set result or driver_error_msg, which no client reads")
        self.handle = handle
        self.network_override = response.network_override if response.HasField("network_override") else None
        return handle

    def wait(self, timeout: float | None = None) -> ExitResult:
        """WaitTask; raises TimeoutError when the task still runs after `timeout` seconds."""
        response = call(self.plugin.driver.WaitTask, driver_pb2.WaitTaskRequest(task_id=self.id), timeout)
        if not response.HasField("result"):
            self.plugin.violations.append("WaitTask answered without a result: clients before 1.11.3 panic")
        return _exit_result(response.result, response.err)

    def stop(self, timeout: float | None = None, kill_signal: str | None = None) -> None:
        """StopTask with the job's kill_timeout and kill_signal unless given; WaitTask tells how it ended."""
        request = driver_pb2.StopTaskRequest(
            task_id=self.id, signal=self.kill_signal if kill_signal is None else kill_signal
        )
        set_duration(request.timeout, self.kill_timeout if timeout is None else timeout)
        call(self.plugin.driver.StopTask, request)

    def signal(self, name: str) -> None:
        call(self.plugin.driver.SignalTask, driver_pb2.SignalTaskRequest(task_id=self.id, signal=name), 60)

    def inspect(self) -> driver_pb2.InspectTaskResponse:
        response = call(self.plugin.driver.InspectTask, driver_pb2.InspectTaskRequest(task_id=self.id), 10)
        for field in ("started_at", "completed_at", "result"):
            if not response.task.HasField(field):
                self.plugin.violations.append(f"InspectTask answered without {field}")
        return response

    def stats(self, interval: float = 1) -> Iterator[driver_pb2.TaskStats]:
        """TaskStats, one message an interval; close the iterator (or leave the loop) to end the call."""
        request = driver_pb2.TaskStatsRequest(task_id=self.id)
        set_duration(request.collection_interval, interval)
        stream: Any = self.plugin.driver.TaskStats(request)
        try:
            for response in stream:
                stats = response.stats
                if not stats.HasField("timestamp") or not stats.HasField("agg_resource_usage"):
                    self.plugin.violations.append("TaskStats without timestamp or usage: an agent panics")
                yield stats
        except grpc.RpcError as error:
            raise driver_error(error) from error
        finally:
            stream.cancel()

    def destroy(self, force: bool = True) -> None:
        """DestroyTask. An agent discards its error; here it is raised."""
        call(self.plugin.driver.DestroyTask, driver_pb2.DestroyTaskRequest(task_id=self.id, force=force))

    def recover(self, plugin: Plugin, *, agent_restart: bool = True) -> None:
        """RecoverTask on `plugin`, which from then on is this task's plugin.

        agent_restart: the handle comes from the client's state, where the driver config is lost, and the log
        collector is restarted afterwards. Otherwise the plugin crashed under a living agent: the handle is whole
        and nobody restarts the log collector.
        """
        assert self.handle, "only a started task can be recovered"
        handle = driver_pb2.TaskHandle()
        handle.CopyFrom(self.handle)
        if agent_restart:
            handle.config.ClearField("msgpack_driver_config")
        self.plugin = plugin
        call(plugin.driver.RecoverTask, driver_pb2.RecoverTaskRequest(handle=handle), 30)
        if agent_restart and not self.logs_disabled:
            self.logmon.restart()

    def exec(self, command: Sequence[str], timeout: float = 10) -> tuple[bytes, ExitResult]:
        """ExecTask, as for script checks: output and result."""
        request = driver_pb2.ExecTaskRequest(task_id=self.id, command=command)
        set_duration(request.timeout, timeout)
        response = call(self.plugin.driver.ExecTask, request, timeout + 10)
        if not response.HasField("result"):
            self.plugin.violations.append("ExecTask answered without a result: an agent panics")
        return response.stdout, _exit_result(response.result)

    def exec_streaming(self, command: Sequence[str], tty: bool = False) -> ExecSession:
        return ExecSession(self.plugin, self.id, command, tty)

    @property
    def events(self) -> list[driver_pb2.DriverTaskEvent]:
        """Driver events of this task, routed as the client does: by allocation and task name."""
        return [
            event
            for event in list(self.plugin.events)
            if event.alloc_id == self.allocation.id and event.task_name == self.name
        ]

    def close(self) -> None:
        """The end of the task runner: destroy what is left, stop logmon, remove the task's cgroup."""
        try:
            if self.id and not self.plugin.exited():
                self.destroy()
        finally:
            self.logmon.stop(2 if self.handle else 0)  # without a start nobody writes, so nothing ends
            if fault := self.cgroup.remove():
                self.plugin.violations.append(fault)

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ExecSession:
    """One `nomad alloc exec`. The client never half-closes: messages tell the end of stdin and of the process."""

    def __init__(self, plugin: Plugin, task_id: str, command: Sequence[str], tty: bool) -> None:
        self._plugin = plugin
        self._requests: queue.Queue[driver_pb2.ExecTaskStreamingRequest | None] = queue.Queue()
        setup = driver_pb2.ExecTaskStreamingRequest.Setup(task_id=task_id, command=command, tty=tty)
        self._requests.put(driver_pb2.ExecTaskStreamingRequest(setup=setup))
        self._stream: Any = plugin.driver.ExecTaskStreaming(iter(self._requests.get, None))
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self.ended: list[str] = []  # the outputs whose end was told
        self.reading = threading.Event()  # cleared: the client takes nothing, as a slow one
        self.reading.set()
        self._changed = threading.Condition()
        self._result: ExitResult | None = None
        self._error: DriverError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def stdout(self) -> bytes:
        return bytes(self._output["stdout"])

    @property
    def stderr(self) -> bytes:
        return bytes(self._output["stderr"])

    def _run(self) -> None:
        try:
            for response in self._stream:
                self.reading.wait()
                with self._changed:
                    self._on_response(response)
                    self._changed.notify_all()
        except grpc.RpcError as error:
            self._error = driver_error(error)
        finally:
            self._requests.put(None)
            with self._changed:
                self._changed.notify_all()

    def _on_response(self, response: driver_pb2.ExecTaskStreamingResponse) -> None:
        if self._result:
            self._plugin.violations.append("an exec stream went on after its exited message")
        if response.exited:
            if response.HasField("stdout") or response.HasField("stderr"):
                self._plugin.violations.append("an exec message carries both output and the exit: clients drop it")
            if not response.HasField("result"):
                self._plugin.violations.append("the exited message of an exec has no result")
            self._result = _exit_result(response.result)
        for name, operation in (("stdout", response.stdout), ("stderr", response.stderr)):
            if operation.data and name in self.ended:
                self._plugin.violations.append(f"an exec's {name} went on after its end")
            self._output[name] += operation.data
            self.ended += [name] if operation.close else []

    def send(self, data: bytes) -> None:
        operation = driver_pb2.ExecTaskStreamingIOOperation(data=data)
        self._requests.put(driver_pb2.ExecTaskStreamingRequest(stdin=operation))

    def close_stdin(self) -> None:
        operation = driver_pb2.ExecTaskStreamingIOOperation(close=True)
        self._requests.put(driver_pb2.ExecTaskStreamingRequest(stdin=operation))

    def resize(self, height: int, width: int) -> None:
        size = driver_pb2.ExecTaskStreamingRequest.TerminalSize(height=height, width=width)
        self._requests.put(driver_pb2.ExecTaskStreamingRequest(tty_size=size))

    def heartbeat(self) -> None:
        self._requests.put(driver_pb2.ExecTaskStreamingRequest())

    def wait_for(self, text: bytes, stream: str = "stdout", timeout: float = 10) -> bytes:
        with self._changed:
            if not self._changed.wait_for(lambda: text in self._output[stream], timeout):
                raise TimeoutError(f"{text!r} not in {stream} within {timeout:g} s: {self._shown()}")
            return bytes(self._output[stream])

    def _shown(self) -> str:
        return ", ".join(f"{name} {bytes(data[-2000:])!r}" for name, data in self._output.items())

    def wait(self, timeout: float = 20) -> ExitResult:
        """The result, after the stream has ended with OK; a DriverError or TimeoutError otherwise."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the exec stream did not end within {timeout:g} s: {self._shown()}")
        if self._error:
            raise self._error
        if not self._result:
            raise AgentError("the exec stream ended without an exited message")
        return self._result

    def cancel(self) -> None:
        """The user went away."""
        self._stream.cancel()


class TaskCgroup:
    """The cgroup which Nomad 1.7 and later make for a task; on cgroup v1 only its path is told."""

    def __init__(self, alloc_id: str, task: str, reserved: bool) -> None:
        mount, part = Path("/sys/fs/cgroup"), "reserve" if reserved else "share"
        self.unified = (mount / "cgroup.controllers").exists()
        self.slice = mount / "nomad.slice" / f"{part}.slice"
        v1 = mount / "cpuset" / "nomad" / (f"reserve/{alloc_id}.{task}" if reserved else "share")
        self.path = self.slice / f"{alloc_id}.{task}.scope" if self.unified else v1
        self._made = False

    def create(self) -> None:
        if not self.unified or os.geteuid() != 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._made = True
        for parent in (Path("/sys/fs/cgroup"), self.slice.parent, self.slice):
            for controller in (parent / "cgroup.controllers").read_text().split():
                with contextlib.suppress(OSError):  # not every controller can be had in every host
                    (parent / "cgroup.subtree_control").write_text(f"+{controller}")

    def remove(self) -> str | None:
        """Kill what is in it and remove it, as the client does; a sentence if the driver left cgroups in it."""
        if not self._made or not self.path.exists():
            return None
        left = [path.name for path in self.path.iterdir() if path.is_dir()]
        with contextlib.suppress(OSError):
            (self.path / "cgroup.kill").write_text("1")
        for path in sorted(self.path.rglob("*/"), reverse=True):
            _remove_cgroup(path)
        _remove_cgroup(self.path)
        if not left:
            return None
        return f"the task's cgroup still held {', '.join(sorted(left))}: an agent could not remove it"


def _remove_cgroup(path: Path) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            return
        time.sleep(0.01)  # killed processes leave a cgroup a moment after the kill


_NODE_ID = str(uuid.uuid4())


def _node_variables(meta: Mapping[str, str]) -> dict[str, str]:
    kernel = os.uname()
    variables = {
        "node.unique.id": _NODE_ID,
        "node.unique.name": socket.gethostname(),
        "node.datacenter": "dc1",
        "node.region": "global",
        "node.class": "",
        "attr.kernel.name": kernel.sysname.lower(),
        "attr.kernel.version": kernel.release,
        "attr.cpu.arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(kernel.machine, kernel.machine),
        "attr.unique.hostname": socket.gethostname(),
    }
    return variables | {f"meta.{key}": value for key, value in meta.items()}


def _port_env(label: str, port: Port) -> dict[str, str]:
    inside, host = str(port.to or port.value), str(port.value)
    return {
        f"NOMAD_IP_{label}": port.host_ip,
        f"NOMAD_PORT_{label}": inside,
        f"NOMAD_ADDR_{label}": f"{port.host_ip}:{host}",
        f"NOMAD_HOST_IP_{label}": port.host_ip,
        f"NOMAD_HOST_PORT_{label}": host,
        f"NOMAD_HOST_ADDR_{label}": f"{port.host_ip}:{host}",
        f"NOMAD_ALLOC_PORT_{label}": inside,
    }


def _exit_result(result: driver_pb2.ExitResult, err: str = "") -> ExitResult:
    return ExitResult(result.exit_code, result.signal, result.oom_killed, err)


def set_duration(target: duration_pb2.Duration, seconds: float) -> None:
    target.FromNanoseconds(round(seconds * 1e9))


# === Job =====================================================================================================


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task block of a job file; `config` is in the JSON form that decode_config() takes."""

    name: str
    driver: str
    config: Mapping[str, Any]
    env: Mapping[str, str]
    user: str
    resources: Resources
    templates: tuple[Template, ...]
    kill_timeout: float
    kill_signal: str
    meta: Mapping[str, str]
    logs_disabled: bool


@dataclasses.dataclass(frozen=True)
class Group:
    name: str
    tasks: tuple[TaskSpec, ...]
    network_mode: str = "host"


@dataclasses.dataclass(frozen=True)
class Job:
    """As much of a job file as the stand-in can run. `type`: service, batch, system or sysbatch."""

    name: str
    type: str
    groups: tuple[Group, ...]


def parse_job(path: str | Path) -> Job:
    """Read a job file. Raises ConfigError for what is not HCL and AgentError for what the stand-in cannot run."""
    body = parse_hcl(Path(path).read_text())
    jobs = _labelled(body, "job")
    if len(jobs) != 1:
        raise AgentError(f"{path}: a job file holds exactly one job block, this one has {len(jobs)}")
    name, job = jobs[0]
    meta = _plain(_one(job, "meta"))
    groups = tuple(_parse_group(label, group, meta) for label, group in _labelled(job, "group"))
    return Job(str(job.get("name", name)), str(job.get("type", "service")), groups)


def _parse_group(name: str, body: Mapping[str, Any], meta: Mapping[str, str]) -> Group:
    network = _one(body, "network")
    ports = {label: _parse_port(port) for label, port in _labelled(network, "port")}
    meta = {**meta, **_plain(_one(body, "meta"))}
    tasks = tuple(_parse_task(label, task, ports, meta) for label, task in _labelled(body, "task"))
    return Group(name, tasks, str(network.get("mode", "host")))


def _parse_port(body: Mapping[str, Any]) -> Port:
    return Port(int(body.get("static", 0)) or free_port(), int(body.get("to", 0)))


def _parse_task(
    name: str, body: Mapping[str, Any], ports: Mapping[str, Port], meta: Mapping[str, str]
) -> TaskSpec:
    wanted = _one(body, "resources")
    cores = tuple(range(int(wanted.get("cores", 0))))
    return TaskSpec(
        name=name,
        driver=str(body.get("driver", "")),
        config=_one(body, "config"),
        env=_plain(_one(body, "env")),
        user=str(body.get("user", "")),
        resources=Resources(
            cpu=int(wanted.get("cpu", 100)),
            memory=int(wanted.get("memory", 300)),
            memory_max=int(wanted.get("memory_max", 0)),
            cores=cores,
            ports=ports,
        ),
        templates=tuple(_parse_template(item) for item in body.get("template", [])),
        kill_timeout=parse_duration(body.get("kill_timeout", "5s")),
        kill_signal=str(body.get("kill_signal", "")),
        meta={**meta, **_plain(_one(body, "meta"))},
        logs_disabled=bool(_one(body, "logs").get("disabled", False)),
    )


def _parse_template(body: Mapping[str, Any]) -> Template:
    if "data" not in body or "destination" not in body:
        raise AgentError("the stand-in knows templates with data and destination only")
    return Template(str(body["data"]), str(body["destination"]), int(str(body.get("perms", "644")), 8))


def _one(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The only block `name`, or an empty one."""
    found = body.get(name) or [{}]
    return dict(found[0])


def _labelled(body: Mapping[str, Any], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(label, inner[0]) for item in body.get(name, []) for label, inner in item.items()]


def _plain(body: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(convert(value, "string")) for key, value in body.items()}


def parse_duration(text: str | int) -> float:
    """Seconds of a Go duration such as "1m30s"; a bare number is nanoseconds, as in Nomad."""
    if isinstance(text, int):
        return text / 1e9
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    if not re.match(r"(\d+(\.\d+)?(h|ms|us|ns|m|s))+\Z", text):
        raise AgentError(f'"{text}" is not a duration such as "30s" or "1m30s"')
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|ms|us|ns|m|s)", text)
    return sum(float(number) * units[unit] for number, unit in parts)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plugin_config(path: str | Path, plugin: str) -> Mapping[str, Any] | None:
    """The config block for `plugin` in an agent's config file.

    Raises AgentError when the file does not name the plugin: Nomad 1.10 and later then skip it.
    """
    for name, body in _labelled(parse_hcl(Path(path).read_text()), "plugin"):
        if name == plugin:
            return _one(body, "config")
    raise AgentError(f'{path} has no block plugin "{plugin}": Nomad 1.10 and later would skip the file')


# === Real agent ==============================================================================================


# Asking the clouds' metadata services takes seconds where they do not answer, and may fail the agent; nothing a
# test starts shall talk to other machines.
NO_FINGERPRINTS = "env_aws,env_azure,env_digitalocean,env_gce,consul,vault"


class NomadAgent:
    """A real `nomad agent` with this plugin, in a temporary directory and on ports of its own.

    dev: `-dev`, which forgets its state at the end; otherwise server and client with a data directory, for
    tests that stop() and start() again.
    """

    def __init__(
        self, plugin: str | Path, config: str | Path, *, dev: bool = True, nomad: str | None = None
    ) -> None:
        found = nomad or shutil.which("nomad")
        if not found:
            raise AgentError("there is no `nomad` on PATH")
        self.nomad, self.config, self.dev = found, Path(config).absolute(), dev
        self.root = Path(tempfile.mkdtemp(prefix="nomad-agent-"))
        self.root.chmod(0o711)
        self.log_path = self.root / "agent.log"
        plugins = self.root / "plugins"
        plugins.mkdir()
        shutil.copy2(plugin, plugins)
        self.plugin = plugins / Path(plugin).name
        self.http = free_port()
        (self.root / "local.hcl").write_text(
            f"ports {{\n  http = {self.http}\n  rpc = {free_port()}\n  serf = {free_port()}\n}}\n"
            'advertise {\n  http = "127.0.0.1"\n  rpc = "127.0.0.1"\n  serf = "127.0.0.1"\n}\n'
            "disable_update_check = true\n"
            f'client {{\n  options = {{ "fingerprint.denylist" = "{NO_FINGERPRINTS}" }}\n}}\n'
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    # --- life ---

    def start(self) -> None:
        command = [self.nomad, "agent", f"-plugin-dir={self.plugin.parent}", f"-config={self.config}"]
        command += [f"-config={self.root / 'local.hcl'}"]
        if self.dev:
            command.append("-dev")
        else:
            command += ["-server", "-client", "-bootstrap-expect=1", "-bind=127.0.0.1"]
            command.append(f"-data-dir={self.root / 'data'}")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                env={**os.environ, "TMPDIR": str(self.root)},
                start_new_session=True,  # our Ctrl-C must not reach the agent: it would take the tasks down first
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_ready(self, driver: str = "nspawn", timeout: float = 60) -> dict[str, Any]:
        """Wait until the node is ready and `driver` healthy; returns the node."""

        def ready() -> dict[str, Any] | None:
            if self.process and self.process.poll() is not None:
                last = "\n".join(self.log.splitlines()[-10:])
                raise AgentError(f"nomad ended with code {self.process.returncode}:\n{last}")
            with contextlib.suppress(AgentError, ValueError):
                node: dict[str, Any] = json.loads(self.run("node", "status", "-self", "-json"))
                state = (node.get("Drivers") or {}).get(driver) or {}
                return node if node["Status"] == "ready" and state.get("Healthy") else None
            return None

        return self._poll(ready, f"the node was not ready with a healthy driver {driver}", timeout)

    def stop(self) -> None:
        """SIGINT, as Ctrl-C: with -dev its tasks end first."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AgentError(
                    f"nomad did not end within 60 s; the end of its log:\n{self.log[-2000:]}"
                ) from None

    def kill(self) -> None:
        """SIGKILL of the agent alone, as a crash."""
        if self.process:
            self.process.kill()
            self.process.wait(10)

    def plugin_pid(self) -> int:
        """The long-lived plugin process: a child of the agent that runs the plugin file."""
        assert self.process
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.process.pid and str(self.plugin).encode() in (entry / "cmdline").read_bytes():
                    return int(entry.name)
        raise AgentError("the agent has no plugin process")

    def kill_plugin(self) -> int:
        pid = self.plugin_pid()
        os.kill(pid, signal.SIGKILL)
        return pid

    def close(self) -> None:
        try:
            if not self.dev and self.process and self.process.poll() is None:
                self.drain()  # it would leave its tasks to the next start
            self.stop()
        finally:
            self._kill_orphans()
            for path in sorted(mount_points(self.root), reverse=True):
                subprocess.run(["umount", str(path)], check=False, timeout=30)
            if not mount_points(self.root):
                shutil.rmtree(self.root, ignore_errors=True)

    def _kill_orphans(self) -> None:
        """An agent that was killed leaves its log collectors behind; they work in its directory."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(self.root):
                    os.kill(int(entry.name), signal.SIGKILL)

    def __enter__(self) -> NomadAgent:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- commands ---

    def run(self, *args: str, stdin: bytes | None = None, check: bool = True, timeout: float = 120) -> str:
        """Output of a `nomad` command; raises AgentError with what it printed."""
        result = subprocess.run(
            [self.nomad, *args],
            input=stdin or b"",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NOMAD_ADDR": self.url},
            timeout=timeout,
        )
        output = result.stdout.decode(errors="replace")
        if check and result.returncode != 0:
            raise AgentError(f"nomad {' '.join(args)}: {output.strip()}")
        return output

    def run_job(self, path: str | Path, timeout: float = 60) -> str:
        """Submit a job file; returns the id of its newest allocation once that is placed."""
        name = parse_job(path).name
        before = {alloc["ID"] for alloc in self.allocations(name)}
        self.run("job", "run", "-detach", str(path))

        def placed() -> str | None:
            return next((alloc["ID"] for alloc in self.allocations(name) if alloc["ID"] not in before), None)

        return self._poll(placed, f"no allocation for job {name}", timeout)

    def allocations(self, job: str) -> list[dict[str, Any]]:
        """By the API: the command `nomad job allocs` came after 1.0."""
        address = f"{self.url}/v1/job/{job}/allocations"
        with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(address, timeout=10) as answer:
            return list(json.load(answer) or [])
        return []

    def allocation(self, alloc: str) -> dict[str, Any]:
        return dict(json.loads(self.run("alloc", "status", "-json", alloc)))

    def wait_status(self, alloc: str, *wanted: str, timeout: float = 60) -> dict[str, Any]:
        """Wait for a client status (running, complete, failed); returns the allocation."""

        def reached() -> dict[str, Any] | None:
            state = self.allocation(alloc)
            return state if state["ClientStatus"] in wanted else None

        try:
            return self._poll(reached, f"allocation {alloc[:8]} did not become {' or '.join(wanted)}", timeout)
        except AgentError as error:
            tasks = self.allocation(alloc).get("TaskStates") or {}
            events = [f"{task}: {event}" for task in tasks for event in self.task_events(alloc, task)]
            raise AgentError("\n".join([str(error), *events])) from None

    def task_events(self, alloc: str, task: str) -> list[str]:
        states = self.allocation(alloc).get("TaskStates") or {}
        return [
            f"{event['Type']}: {event['DisplayMessage']}" for event in states.get(task, {}).get("Events") or []
        ]

    def logs(self, alloc: str, task: str, stderr: bool = False) -> str:
        return self.run("alloc", "logs", *(["-stderr"] if stderr else []), alloc, task)

    def exec(self, alloc: str, task: str, *command: str, stdin: bytes | None = None) -> str:
        return self.run("alloc", "exec", "-t=false", "-task", task, alloc, *command, stdin=stdin)

    def signal(self, alloc: str, task: str, name: str) -> None:
        self.run("alloc", "signal", "-s", name, alloc, task)

    def restart(self, alloc: str) -> None:
        self.run("alloc", "restart", alloc)

    def stop_job(self, job: str) -> None:
        """Stop without waiting: following the deployment would make the command fail, because it is cancelled."""
        self.run("job", "stop", "-detach", job)

    def drain(self, timeout: float = 180) -> None:
        """Take everything off the node, system jobs too; returns when nothing runs there."""
        self.run("node", "drain", "-enable", "-self", "-yes", "-deadline=5s", timeout=timeout)

    @staticmethod
    def _poll(condition: Callable[[], T | None], failure: str, timeout: float) -> T:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (result := condition()) is not None:
                return result
            time.sleep(0.1)
        raise AgentError(f"{failure} within {timeout:g} s")


# === Command line ============================================================================================

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\r")
_COLOURS = {
    "say": "1;36",
    "stdout": "32",
    "stderr": "33",
    "event": "35",
    "stats": "34",
    "plugin": "90",
    "bad": "1;31",
}


class Console:
    """Prints whole lines from several threads; coloured only on a terminal."""

    def __init__(self) -> None:
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._lock = threading.Lock()

    def paint(self, text: str, style: str) -> str:
        return f"\x1b[{_COLOURS[style]}m{text}\x1b[0m" if self.colour else text

    def print(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """What the agent does now."""
        self.print(self.paint(f"==> {text}", "say"))

    def line(self, source: str, style: str, text: str) -> None:
        shown = _CONTROL.sub("", text) if not self.colour else text.replace("\r", "")
        self.print(f"    {self.paint(f'{source:<8}', style)} {shown}")


class Runner:
    """Runs jobs on one plugin and shows what happens. Tasks are not restarted: one run shows one life."""

    def __init__(self, plugin: Plugin, console: Console, stats_interval: float = 5) -> None:
        self.plugin, self.console, self.stats_interval = plugin, console, stats_interval
        self.violations: list[str] = []
        plugin.on_event = self._on_event
        plugin.on_log = self._on_log

    def _on_event(self, event: driver_pb2.DriverTaskEvent) -> None:
        details = "".join(f" {key}={value}" for key, value in sorted(event.annotations.items()))
        self.console.line("event", "event", f"{event.task_name}: {event.message}{details}")

    def _on_log(self, entry: LogEntry) -> None:
        if entry.level in ("info", "warn", "error"):
            details = "".join(f" {key}={value}" for key, value in entry.fields.items())
            self.console.line("plugin", "plugin", f"{entry.level}: {entry.message}{details}")

    def run(self, job: Job, limit: float | None = None, until: str | None = None, linger: float = 0) -> bool:
        """Run a job until its tasks end, `limit` seconds have passed, or `linger` after `until` was printed.

        Returns whether all tasks succeeded; a task that was stopped for one of these reasons counts as such.
        """
        good = True
        for group in job.groups:
            if group.network_mode != "host":
                raise AgentError(f"group {group.name}: the stand-in makes no {group.network_mode} networks")
            self.console.say(f'Job "{job.name}" ({job.type}), group "{group.name}"')
            with Allocation() as allocation:
                with contextlib.ExitStack() as stack:
                    runs = [
                        stack.enter_context(_TaskRun(self, allocation, job, group, spec)) for spec in group.tasks
                    ]
                    self._wait(runs, limit, until, linger)
                good = all(run.good for run in runs) and good
        return good

    def _wait(self, runs: Sequence[_TaskRun], limit: float | None, until: str | None, linger: float) -> None:
        deadline = None if limit is None else time.monotonic() + limit
        shown = False
        try:
            for run in runs:
                run.start()
            while not all(run.ended.is_set() for run in runs):
                if until and not shown and all(run.printed(until) for run in runs):
                    shown = True
                    deadline = min(deadline or MAX_INT32, time.monotonic() + linger)
                if deadline and time.monotonic() >= deadline:
                    break
                time.sleep(0.05)
        except KeyboardInterrupt:
            self.console.say("Interrupted: stopping the tasks in order; press Ctrl-C again to kill them")
        try:
            for run in runs:
                run.stop()
        except KeyboardInterrupt:
            for run in runs:
                run.stop(0)


class _TaskRun:
    """One task of a running job: its output, statistics and end on the console."""

    def __init__(self, runner: Runner, allocation: Allocation, job: Job, group: Group, spec: TaskSpec) -> None:
        self._runner, self._console, self._spec = runner, runner.console, spec
        self._lines = {name: Lines(self._printer(name)) for name in ("stdout", "stderr")}
        if spec.driver != "nspawn":
            raise AgentError(f'task {spec.name}: driver "{spec.driver}" is not this plugin\'s')
        self.task = Task(
            runner.plugin,
            allocation,
            spec.name,
            spec.config,
            env=spec.env,
            user=spec.user,
            resources=spec.resources,
            kill_timeout=spec.kill_timeout,
            kill_signal=spec.kill_signal,
            templates=spec.templates,
            meta=spec.meta,
            job=job.name,
            group=group.name,
            logs_disabled=spec.logs_disabled,
            on_output=lambda stream, data: self._lines[stream](data),
        )
        self.ended = threading.Event()
        self.good = False
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def _printer(self, stream: str) -> Callable[[str], None]:
        return lambda line: self._console.line(stream, stream, line)

    def printed(self, pattern: str) -> bool:
        return re.search(pattern, self.task.logmon.stdout.decode(errors="replace")) is not None

    def start(self) -> None:
        self._console.say(f'Task "{self._spec.name}"')
        for key, value in self._spec.config.items():
            text = json.dumps(value)
            self._console.line("config", "plugin", f"{key} = {text if len(text) < 90 else text[:87] + '...'}")
        began = time.monotonic()
        try:
            self.task.start()
        except AgentError as error:
            self._console.line("failed", "bad", str(error))
            self.ended.set()
            return
        self._console.say(f"Started after {1000 * (time.monotonic() - began):.0f} ms, as {self.task.id}")
        for target in (self._watch, self._show_stats):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()

    def _watch(self) -> None:
        try:
            result = self.task.wait()
        except AgentError as error:
            self._console.line("failed", "bad", f"WaitTask: {error}")
        else:
            self.good = result.successful or self._stopped
            self.task.logmon.wait_eof()
            for name, lines in self._lines.items():
                if lines.rest:
                    self._printer(name)(lines.rest)
            oom = " (out of memory)" if result.oom_killed else ""
            self._console.say(f'Task "{self._spec.name}" ended. {result}{oom}')
        finally:
            self.ended.set()

    def _show_stats(self) -> None:
        with contextlib.suppress(AgentError):
            for number, stats in enumerate(self.task.stats(self._runner.stats_interval)):
                usage = stats.agg_resource_usage
                if number and not self.ended.is_set():  # the first one has nothing to compare its CPU time with
                    memory = usage.memory.usage or usage.memory.rss
                    self._console.line(
                        "stats", "stats", f"{usage.cpu.percent:.1f} % of a core, {memory / MIB:.1f} MiB of memory"
                    )

    def stop(self, timeout: float | None = None) -> None:
        if self.ended.is_set():
            return
        self._stopped = True
        wanted = self._spec.kill_signal or "the driver's default signal"
        limit = self._spec.kill_timeout if timeout is None else timeout
        self._console.say(f'Stopping task "{self._spec.name}" with {wanted}; SIGKILL after {limit:g} s')
        self.task.stop(timeout)
        self.ended.wait(30)

    def __enter__(self) -> _TaskRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop(0)
        self.task.close()


def show_fingerprint(plugin: Plugin, console: Console) -> None:
    found = plugin.fingerprint
    if not found:
        raise PluginError("the plugin ended before its first fingerprint")
    health = driver_pb2.FingerprintResponse.HealthState.Name(found.health)
    console.say(f"Fingerprint: {health} ({found.health_description})")
    for key, value in sorted(found.attributes.items()):
        kind = value.WhichOneof("value")
        console.line("", "plugin", f"{key} = {getattr(value, kind) if kind else ''}{value.unit}")


@contextlib.contextmanager
def launched(options: argparse.Namespace, console: Console) -> Iterator[Runner]:
    """The plugin, started as an agent does, shown, and ended with what was wrong with it."""
    path: Path = options.plugin
    console.say(f"Starting {path} three times, as an agent does: to ask it, to check its config, and to stay")
    config = plugin_config(options.config, path.name) if options.config else None
    plugin = launch_like_agent(path, config)
    try:
        console.say(f"The plugin answered {1000 * plugin.start_seconds:.0f} ms after its start, pid {plugin.pid}")
        show_fingerprint(plugin, console)
        runner = Runner(plugin, console, options.stats)
        yield runner
    finally:
        plugin.kill(driver_shutdown=True)
        console.say("The plugin has been shut down")
        for sentence in plugin.violations:
            console.line("VIOLATED", "bad", sentence)


def run_command(options: argparse.Namespace, console: Console) -> bool:
    jobs = [parse_job(path) for path in options.jobs]
    with launched(options, console) as runner:
        results = [runner.run(job, options.seconds) for job in jobs]
    return all(results) and not runner.plugin.violations


DEMO = (
    (
        "debian.hcl",
        "A whole Debian, booted by its own systemd. Its console is the task's log.",
        r"multi-user\.target|login:",
    ),
    (
        "hello.hcl",
        "One command in the same image: a batch job that prints a few lines and ends with code 0.",
        None,
    ),
)


def demo_command(options: argparse.Namespace, console: Console) -> bool:
    """Two example jobs, on a real agent if there is one."""
    if shutil.which("nomad"):
        return _demo_nomad(options, console)
    console.say("There is no `nomad` on PATH: tests/agent.py plays the agent")
    good = True
    with launched(options, console) as runner:
        for name, text, until in DEMO:
            console.say(text)
            good = runner.run(parse_job(ROOT / "example" / name), limit=30, until=until, linger=5) and good
    good = good and not runner.plugin.violations
    console.say("All jobs ran as they should" if good else "Something went wrong, see above")
    return good


def _demo_nomad(options: argparse.Namespace, console: Console) -> bool:
    agent = NomadAgent(options.plugin, options.config)
    console.say(f"Starting a Nomad agent: {agent.nomad} agent -dev, its log is {agent.log_path}")
    good = True
    with agent:
        node = agent.wait_ready()
        driver = node["Drivers"]["nspawn"]
        console.say(f"Node ready; driver nspawn: {driver['HealthDescription']}. Web UI: {agent.url}")
        for key, value in sorted(node["Attributes"].items()):
            if key.startswith("driver.nspawn"):
                console.line("", "plugin", f"{key} = {value}")
        for name, text, until in DEMO:
            console.say(text)
            good = _demo_job(agent, ROOT / "example" / name, until, console) and good
        console.say("Stopping the agent")
    console.say("All jobs ran as they should" if good else "Something went wrong, see above")
    return good


def _demo_job(agent: NomadAgent, path: Path, until: str | None, console: Console) -> bool:
    job = parse_job(path)
    task = job.groups[0].tasks[0].name
    console.say(f"nomad job run {path.relative_to(ROOT)}")
    alloc = agent.run_job(path)
    state = agent.wait_status(alloc, "running", "complete", "failed")
    deadline = time.monotonic() + 20
    while until and state["ClientStatus"] == "running" and time.monotonic() < deadline:
        if re.search(until, agent.logs(alloc, task)):
            time.sleep(3)  # for numbers in the statistics
            break
        time.sleep(0.2)
    if not until:
        state = agent.wait_status(alloc, "complete", "failed")
    console.say(f"nomad alloc status -stats {alloc[:8]}")
    console.print(textwrap.indent(agent.run("alloc", "status", "-stats", alloc[:8]), "    "))
    console.say(f"nomad alloc logs {alloc[:8]} {task}")
    for line in agent.logs(alloc, task).splitlines():
        console.line("stdout", "stdout", line)
    console.say(f"nomad job stop {job.name}")
    agent.stop_job(job.name)
    state = agent.wait_status(alloc, "complete", "failed")
    console.say(f"Allocation {alloc[:8]} is {state['ClientStatus']}")
    return bool(state["ClientStatus"] == "complete")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tests/agent.py", description="Play a Nomad agent: run job files on the driver without Nomad."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run job files and show what happens; Ctrl-C stops their tasks")
    run.add_argument("jobs", nargs="+", metavar="JOB.hcl", type=Path)
    run.add_argument(
        "--for", dest="seconds", type=float, metavar="SECONDS", help="stop a job that still runs after that time"
    )
    demo = commands.add_parser("demo", help="run example jobs, on a real agent when `nomad` is on PATH")
    for command in (run, demo):
        command.add_argument("--plugin", type=Path, metavar="FILE", default=ROOT / "nomad-driver-nspawn")
        command.add_argument("--config", type=Path, metavar="FILE", default=ROOT / "example" / "config.hcl")
        command.add_argument("--stats", type=float, metavar="SECONDS", default=2, help="interval of statistics")
    options = parser.parse_args(arguments)
    options.plugin = options.plugin.absolute()
    return options


def main(arguments: Sequence[str]) -> int:
    options, console = parse_arguments(arguments), Console()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        if os.geteuid() != 0:
            raise AgentError("containers and mounts need root: run this with sudo")
        if not options.plugin.exists():
            raise AgentError(f"{options.plugin} does not exist: `sh build.sh` makes it")
        good = run_command(options, console) if options.command == "run" else demo_command(options, console)
    except AgentError as error:
        console.print(console.paint(f"agent.py: {error}", "bad"))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
