# SPDX-License-Identifier: MPL-2.0
"""The plugin's stderr, line by line, as the agent understands it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tests.agent.streams import LINE_LIMIT

_LEVELS = ("trace", "debug", "info", "warn", "error")
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)\Z")


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
    if len(line.encode()) >= LINE_LIMIT:
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
