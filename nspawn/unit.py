# SPDX-License-Identifier: MPL-2.0
"""A task that is a unit of a booted system, or has its journal in its log: the files that make the container's
systemd run it so.

They are in a directory of the state directory that is mounted read-only at /run/nomad. A variable makes systemd
look for units there first. (With mounts below /run/systemd nothing boots in a user namespace: nspawn makes
/run/systemd for them, and the container's root cannot write to it. Measured on 252.)

The unit gets a drop-in that sends its output to two FIFOs. Two units stand beside it. One waits for its end
(unit.sh). The other wakes that one when systemd has started the unit, or will never start it. For the journal
there is one unit, which writes it to the first FIFO (journal.sh). Nothing in the image changes.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from nspawn.common import ConfigError
from nspawn.files import write_file
from nspawn.job import JobOptions, render_signal
from nspawn.mounts import Mount

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{,200}(@[A-Za-z0-9_.-]{1,40})?\.service"
WAITER, TELLER, JOURNAL = "nomad-unit.service", "nomad-unit-started.service", "nomad-journal.service"
FOLDER = "unit"  # in the state directory; shim.sh knows it and the pipes, too
PIPES = ("stdout", "stderr")
PLACE = "/run/nomad"  # of the folder, in the container
SCRIPT, JOURNAL_SCRIPT = ((Path(__file__).parent / name).read_text() for name in ("unit.sh", "journal.sh"))

DROP_IN = """\
[Unit]
OnFailure={teller}

[Service]
StandardOutput=append:{place}/stdout
StandardError=append:{place}/stderr
ExecStopPost=-+/bin/sh -c 'echo 1<>/run/nomad-unit/ended'
"""
WANTS = """\
[Unit]
Wants={waiter} {unit} {teller}
"""
WAIT = """\
[Unit]
Description=Wait for the end of {unit}
Before={unit}

[Service]
RuntimeDirectory=nomad-unit
ExecStartPre=/bin/sh -c 'umask 077; exec mkfifo /run/nomad-unit/ended'
ExecStart=/bin/sh -c 'exec /bin/sh {place}/unit.sh {unit} 0<>/run/nomad-unit/ended'
StandardError=append:{place}/stderr
"""
TELL = """\
[Unit]
Description=Look whether {unit} has ended
After={waiter} {unit}

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo 1<>/run/nomad-unit/ended'
"""
# Without default dependencies nothing stops it before journald, and it starts in a rescue shell, too.
FORWARD = """\
[Unit]
Description=Write the journal to the task's log
DefaultDependencies=no
After=systemd-journald.service
IgnoreOnIsolate=yes

[Service]
RuntimeDirectory=nomad-journal
RuntimeDirectoryPreserve=restart
ExecStart=/bin/sh {place}/journal.sh
StandardOutput=append:{place}/stdout
StandardError=append:{place}/stderr
Restart=on-failure
RestartPreventExitStatus=69
"""
WANTS_JOURNAL = """\
[Unit]
Wants={journal}
"""


def check_unit(name: str, value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise ConfigError(
            name, value, "must be the name of a service", "write it as in app.service or app@one.service"
        )
    if value in (WAITER, TELLER, JOURNAL):
        raise ConfigError(name, value, "is a unit of the driver's own", "give yours another name")
    return value


def plan_unit_files(unit: str | None) -> dict[str, str]:
    """Return texts by their paths in the folder. Without a unit they are for the journal."""
    if not unit:
        units = {f"units/{JOURNAL}": FORWARD, "units/sysinit.target.d/zz-nomad.conf": WANTS_JOURNAL}
        texts = {path: text.format(journal=JOURNAL, place=PLACE) for path, text in units.items()}
        return {**texts, "journal.sh": JOURNAL_SCRIPT}
    # Of all drop-ins, systemd reads the one whose name comes last in the alphabet last.
    files = {
        f"units/{unit}.d/zz-nomad.conf": DROP_IN,
        "units/default.target.d/zz-nomad.conf": WANTS,
        f"units/{WAITER}": WAIT,
        f"units/{TELLER}": TELL,
    }
    names = {"unit": unit, "waiter": WAITER, "teller": TELLER, "place": PLACE}
    return {**{path: text.format(**names) for path, text in files.items()}, "unit.sh": SCRIPT}


def plan_unit_environ(options: JobOptions, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that systemd needs to find the units, with the task's `variables` in mind."""
    if not options.adds_units:
        return {}
    # A colon at the end adds the usual places.
    return {"SYSTEMD_UNIT_PATH": f"{PLACE}/units:{variables.get('SYSTEMD_UNIT_PATH', '')}"}


def plan_unit_mounts(options: JobOptions, directory: Path) -> tuple[Mount, ...]:
    """Return the mount of the folder. `directory` is the task's state directory."""
    return (Mount(f"{directory}/{FOLDER}", PLACE, read_only=True),) if options.adds_units else ()


def make_unit(directory: Path, unit: str | None) -> None:
    """Make the folder in the state directory, readable by all users of the container. Only they can get to it.
    Its root may write to the pipes; in a user namespace others may, too, until `chown_unit_pipes`. Raises OSError.
    """
    folder = directory / FOLDER
    for path, text in plan_unit_files(unit).items():
        file = folder / path
        for parent in reversed([*file.relative_to(directory).parents][:-1]):
            if not (directory / parent).is_dir():
                (directory / parent).mkdir()
                (directory / parent).chmod(0o755)
        write_file(file, text, 0o644)
    for name in PIPES:
        os.mkfifo(folder / name)
        (folder / name).chmod(0o622)


def chown_unit_pipes(directory: Path, users: Sequence[tuple[int, int]]) -> None:
    """Leave the pipes to the container's root alone. Raises OSError."""
    for name in PIPES:
        os.chown(directory / FOLDER / name, users[0][0] if users else 0, -1)
        (directory / FOLDER / name).chmod(0o600)


SIGNAL = ("systemctl", "kill", "--kill-who=main")
# systemd would take the end after a signal for an accident, which Restart= is for.
LAST_SIGNAL = (
    'd="/run/systemd/system/$2.d" && mkdir -p "$d" && printf "[Service]\\nRestart=no\\n" >"$d/zzz-nomad.conf" && '
    'systemctl daemon-reload && exec systemctl kill --kill-who=main "$1" "$2"'
)


def plan_signal(unit: str, number: int) -> tuple[str, ...]:
    """Return the command that sends a signal to the unit's main process."""
    return (*SIGNAL, f"--signal={render_signal(number)}", unit)


def plan_stop(unit: str, number: int) -> tuple[str, ...]:
    """Return the command that ends the unit, with a signal to its main process if that is not the usual one."""
    if number == signal.SIGTERM:
        return ("systemctl", "stop", "--no-block", unit)
    return ("/bin/sh", "-c", LAST_SIGNAL, "sh", f"--signal={render_signal(number)}", unit)
