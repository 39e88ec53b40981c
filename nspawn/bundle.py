# SPDX-License-Identifier: MPL-2.0
"""The variables and the user of a task's payload, and of commands that exec runs beside it.

They reach the payload in an OCI bundle that only root can read. nspawn reads it when it starts (252, 257, 262) and
gives the variables to the payload byte for byte. They are not in nspawn's environment and on no command line. With
a bundle nspawn reads no settings file (*.nspawn).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nspawn.accounts import Account
from nspawn.checks import NO_TEXT, VARIABLE
from nspawn.common import ConfigError
from nspawn.job import UUID, JobOptions, TaskConfig

MAX_VARIABLE = 128 << 10  # bytes of NAME=VALUE and its final NUL: the kernel's MAX_ARG_STRLEN
MAX_ENVIRONMENT = 1536 << 10  # bytes; the kernel takes 2 MiB of arguments and environment together


def check_environment(variables: Mapping[str, str]) -> None:
    total = 0
    for name, value in variables.items():
        if found := NO_TEXT.search(value):
            rule = f"the value must not hold the character U+{ord(found[0]):04X}: systemd-nspawn takes text only"
            raise ConfigError("env", name, rule, "put the value into a file with a template block")
        size = len(f"{name}={value}".encode(errors="replace")) + 1
        total += size
        if size > MAX_VARIABLE:
            rule = f"a variable may have {MAX_VARIABLE >> 10} KiB, this one has {size >> 10}"
            raise ConfigError("env", name, rule, "put the value into a file with a template block")
    if total > MAX_ENVIRONMENT:
        rule = f"all variables together may have {MAX_ENVIRONMENT >> 10} KiB"
        raise ConfigError("env", f"{total >> 10} KiB", rule, "put large values into files with template blocks")


def select_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables whose names nspawn accepts. A key of a meta block, for example, may contain dots."""
    return {name: value for name, value in variables.items() if VARIABLE.fullmatch(name)}


def explain_variables(variables: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each variable that does not reach the task."""
    for name in sorted(variables):
        if not VARIABLE.fullmatch(name):
            why = "systemd-nspawn accepts letters, digits and underscores only"
            yield f"The variable {name!r} is not passed on: {why}."


def render_bundle(variables: Mapping[str, str], account: Account | None) -> str:
    """Return the bundle's config.json, in ASCII; nspawn's command line has the rest. Raises ConfigError for
    variables that are too large or no text."""
    variables = {**(account.variables if account else {}), **variables}
    check_environment(variables)
    process: dict[str, object] = {"env": [f"{name}={value}" for name, value in sorted(variables.items())]}
    if account:
        process["user"] = {"uid": account.uid, "gid": account.gid, "additionalGids": account.groups}
    return json.dumps({"ociVersion": "1.0.0", "process": process})


DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # nspawn's default for the payload


@dataclass(frozen=True)
class ExecContext:
    """What a command gets that exec runs in the container: the task's user, directory and variables."""

    user: str = ""  # "": root
    directory: str = "/"
    variables: Mapping[str, str] = field(default_factory=dict)
    account: Account | None = None  # None: enter.py looks the user up in the container


def plan_exec_context(
    task: TaskConfig, options: JobOptions, variables: Mapping[str, str], account: Account | None
) -> ExecContext:
    """Return what exec gives to commands. Without an account, enter.py looks the user up in the container."""
    given = {
        "PATH": DEFAULT_PATH,
        "LANG": "C.UTF-8",
        "container": "systemd-nspawn",
        **({"container_uuid": task.alloc_id} if UUID.fullmatch(task.alloc_id) else {}),
        **variables,
    }
    user = account.name if account else options.user or ""
    return ExecContext(user, options.working_directory or "/", given, account)
