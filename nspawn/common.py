# SPDX-License-Identifier: MPL-2.0
"""Errors, the log, paths: what every room uses.

The text of an error is what a person reads in the task's events: whole sentences, without any class name.
`recoverable` decides whether Nomad tries again under the job's restart policy; without it every failed start is
final.

The log is one JSON object a line, as go-plugin reads it: @message, @level and @timestamp must be strings
(anything else panics the agent), the time has exactly six digits, and the levels are hclog's. A closed stderr
means that the agent has died, which is no reason to die too.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLUGIN_NAME = "nspawn"  # what a job writes as `driver`
STATE_ROOT = Path("/run/nomad-driver-nspawn")  # root only, gone at reboot, as the containers are
SETTINGS_ROOT = Path("/run/systemd/nspawn")
MACHINES_ROOT = Path("/var/lib/machines")
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class DriverError(Exception):
    """Something a person must be told; str() is the sentence."""

    recoverable = False

    def __init__(self, text: str) -> None:
        super().__init__(render_line(text))


class ConfigError(DriverError):
    """The job or the plugin block asks for what cannot be.

    `rule` says what is allowed, `remedy` what to do about it.
    """

    def __init__(self, option: str, value: object, rule: str, remedy: str = "") -> None:
        self.option, self.value, self.rule, self.remedy = option, value, rule, remedy
        text = f"{shorten(option)} = {shorten(render_value(value))}: {rule}"
        super().__init__(f"{text}; {remedy}" if remedy else text)

    def within(self, block: str) -> ConfigError:
        """Return the error as one of an option inside a block."""
        return ConfigError(f"{block}.{self.option}", self.value, self.rule, self.remedy)


def render_value(value: object) -> str:
    """Return a value of a job as JSON, or as near to it as it comes."""
    try:
        return json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):
        return f"(a {type(value).__name__})"  # very deep, or with keys that are no strings, as msgpack may have


def render_line(text: str) -> str:
    """Return a sentence with all that is not printable escaped: a job, an image or a registry could otherwise add
    lines of its own to events and logs, or control a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )


def shorten(text: str, length: int = 200) -> str:
    """Shorten what a job says, for a sentence."""
    return text if len(text) <= length else text[:length] + "…"


class HostError(DriverError):
    """This machine cannot do it, whatever the job says."""


class TransientError(DriverError):
    """It may work when tried again."""

    recoverable = True


class TaskNotFound(DriverError):
    """Nothing is known of the task. Nomad's client cannot match this error, it only shows it."""

    def __init__(
        self, task_id: str, why: str = "is not known to this plugin, and nothing of it is left on this machine"
    ) -> None:
        super().__init__(f"task {shorten(task_id)} {why}")


class Unsupported(DriverError):
    """The call is part of the protocol, but not of this driver."""


LEVELS = ("trace", "debug", "info", "warn", "error")
MAX_LINE = 48 << 10  # go-plugin cuts lines at 64 KiB, and Nomad 0.10 stops reading the log there


def render_log(level: str, message: str, values: Mapping[str, object], now: datetime.datetime) -> bytes:
    """Return one line of hclog JSON."""
    assert level in LEVELS
    entry: dict[str, str] = {
        "@level": level,
        "@message": message,
        "@timestamp": now.isoformat(timespec="microseconds"),
        "@module": PLUGIN_NAME,
    }
    for key, value in values.items():
        entry[key.lstrip("@") or "value"] = value if isinstance(value, str) else repr(value)
    for keep in (MAX_LINE, 2000, 100):  # characters of a text; one can be twelve bytes of JSON
        line = json.dumps({key[:50]: text[:keep] for key, text in list(entry.items())[:20]})
        if len(line) < MAX_LINE:
            break
    return line.encode() + b"\n"


class Log:
    """Writes lines; `bind` gives every line of the child the same values."""

    def __init__(self, **values: object) -> None:
        self.values = values

    def bind(self, **values: object) -> Log:
        return Log(**{**self.values, **values})

    def write(self, level: str, message: str, **values: object) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        with contextlib.suppress(OSError, ValueError):
            os.write(2, render_log(level, message, {**self.values, **values}, now))

    def debug(self, message: str, **values: object) -> None:
        self.write("debug", message, **values)

    def info(self, message: str, **values: object) -> None:
        self.write("info", message, **values)

    def warn(self, message: str, **values: object) -> None:
        self.write("warn", message, **values)

    def error(self, message: str, **values: object) -> None:
        self.write("error", message, **values)


log = Log()


class LibraryLog(logging.Handler):
    """Turns what libraries log (asyncio, grpc) into lines of ours, at debug: it is about their insides."""

    def emit(self, record: logging.LogRecord) -> None:
        log.debug(record.getMessage(), logger=record.name, trace=record.exc_text or repr(record.exc_info))


def is_below(path: str, directory: str) -> bool:
    """Whether a path is a directory or in it; both without symbolic links and dots."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
