# SPDX-License-Identifier: MPL-2.0
"""Errors, the log, paths: what every room uses.

People read the text of an error in the task's events. So it is a whole sentence, without a class name. If an error
is `recoverable`, Nomad tries the start again under the job's restart policy; otherwise the task has failed.

The log is one JSON object per line, as go-plugin reads it. @message, @level and @timestamp must be strings:
anything else panics the agent. The time has exactly six digits after the second, and the levels are hclog's.
Errors when writing the log are ignored: a closed stderr means that the agent has died, and tasks must go on.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLUGIN_NAME = "nspawn"  # what a job writes as `driver`
STATE_ROOT = Path("/run/nomad-driver-nspawn")  # only root reads it; like the containers, it is gone after a reboot
SETTINGS_ROOT = Path("/run/systemd/nspawn")
MACHINES_ROOT = Path("/var/lib/machines")
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class DriverError(Exception):
    """An error for people; str() is the sentence."""

    recoverable = False

    def __init__(self, text: str) -> None:
        super().__init__(render_line(text))


class ConfigError(DriverError):
    """An option of the job or of the plugin block has a wrong value.

    `rule` says what is allowed or what is wrong, `remedy` what to do about it.
    """

    def __init__(self, option: str, value: object, rule: str, remedy: str = "") -> None:
        self.option, self.value, self.rule, self.remedy = option, value, rule, remedy
        text = f"{shorten(option)} = {shorten(render_value(value))}: {rule}"
        super().__init__(f"{text}; {remedy}" if remedy else text)

    def within(self, block: str) -> ConfigError:
        """Return the same error with the option named as part of a block."""
        return ConfigError(f"{block}.{self.option}", self.value, self.rule, self.remedy)


def render_value(value: object) -> str:
    """Return a value of a job as JSON: also one that was parsed, as the job has it."""
    try:
        return json.dumps(value, ensure_ascii=False, default=render_parsed)
    except (TypeError, ValueError, RecursionError):
        return f"(a {type(value).__name__})"  # nested too deeply, or msgpack keys that JSON does not have


def render_parsed(value: object) -> object:
    """Return what JSON can have of a value: the text it was parsed from, the options of a block, or its repr()."""
    return getattr(value, "text", None) or getattr(value, "__dict__", None) or repr(value)


PLAIN = re.compile(r"[\w./:@+~-]{1,200}")


def quote(text: str) -> str:
    """Return a name or path of a job as it is if it is plain, else in quotes, so that nobody takes it for a part
    of the sentence."""
    return text if PLAIN.fullmatch(text) else render_value(shorten(text))


def name_entry(option: str, key: str) -> str:
    """Return how a sentence names an entry of a map."""
    return f"{option}.{quote(key)}"


def render_line(text: str) -> str:
    """Escape what is not printable. Otherwise a job, an image or a registry could add lines to events and logs, or
    send control sequences to a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )


def shorten(text: str, length: int = 200) -> str:
    """Cut a foreign text off at `length` characters, so that it fits into a sentence."""
    return text if len(text) <= length else text[:length] + "…"


class HostError(DriverError):
    """The cause is this machine, not the job."""


class TransientError(DriverError):
    """The same may work later."""

    recoverable = True


class TaskNotFound(DriverError):
    """The task is unknown. Nomad's client only shows this error: it cannot recognise its type."""

    def __init__(
        self, task_id: str, why: str = "is not known to this plugin, and nothing of it is left on this machine"
    ) -> None:
        super().__init__(f"task {quote(task_id)} {why}")


class Unsupported(DriverError):
    """The protocol has this call, but this driver does not support it."""


# What the machine or the plugin is short of, and what the operator can do about it.
SHORTAGES: Mapping[int, str] = {
    errno.EMFILE: "the plugin has no free file descriptors; raise LimitNOFILE= of the Nomad agent's unit",
    errno.ENFILE: "this machine has no free file descriptors; raise the sysctl fs.file-max",
    errno.ENOMEM: "this machine has too little free memory",
    errno.EAGAIN: "this machine lets the plugin start no further process or thread; raise TasksMax= of the Nomad "
    "agent's unit, or the sysctl kernel.pid_max",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk cannot be read or written",
}


NOT_OF_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}


def is_shortage(error: OSError) -> bool:
    """Whether an error is about the machine, and says nothing about the file or process in question."""
    return error.errno in SHORTAGES


def explain_host(error: OSError) -> DriverError:
    """Return the sentence for an error of the machine. It is recoverable if the machine lacks something: then
    another client, or this one later, can do what was asked."""
    is_file = isinstance(error.filename, (str, bytes)) and error.errno not in NOT_OF_FILES
    where = f" ({quote(os.fsdecode(error.filename))})" if is_file else ""
    if error.errno and error.errno in SHORTAGES:
        return TransientError(f"{SHORTAGES[error.errno]}{where}")
    return HostError(f"this machine does not let the plugin do its work: {error.strerror or error}{where}")


def check_shortage(error: OSError) -> None:
    """Raise TransientError if an error is about the machine: no other conclusion can be drawn from it."""
    if is_shortage(error):
        raise explain_host(error) from None


LEVELS = ("trace", "debug", "info", "warn", "error")
MAX_LINE = 48 << 10  # go-plugin cuts lines at 64 KiB; Nomad 0.10 stops reading the log after a longer one


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
    for keep in (MAX_LINE, 2000, 100):  # characters of each value; one can take twelve bytes in JSON
        line = json.dumps({key[:50]: text[:keep] for key, text in list(entry.items())[:20]})
        if len(line) < MAX_LINE:
            break
    return line.encode() + b"\n"


class Log:
    """Writes lines of the log. `bind` returns a log that adds these values to each line."""

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
    """Passes on what libraries (asyncio, grpc) log. The level is always debug: it is about their internals."""

    def emit(self, record: logging.LogRecord) -> None:
        log.debug(record.getMessage(), logger=record.name, trace=record.exc_text or repr(record.exc_info))


def is_below(path: str, directory: str) -> bool:
    """Whether a path is a directory or below it. Both must be free of symbolic links, "." and ".."."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Turn lists into tuples: an object_hook for JSON that becomes frozen dataclasses."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
