# SPDX-License-Identifier: MPL-2.0
"""The command line: what people ask of the built file.

The plugin itself never imports this room: argparse would cost it some milliseconds at each start. What a command
needs of driver.py comes as a Program.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import difflib
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nspawn.checks import parse_duration
from nspawn.common import MACHINES_ROOT, ConfigError, DriverError, quote, render_line
from nspawn.diagnosis import Finding, Verdict, diagnose
from nspawn.fetches import Fetches, plan_fetching, render_size
from nspawn.host import read_host
from nspawn.images import DOCKER, choose_image_dir, plan_origin
from nspawn.options import Option, decode_options, list_notes, render_reference
from nspawn.permissions import PERMISSIONS, PluginOptions
from nspawn.process import ProcessId
from nspawn.rules import decode_job
from nspawn.running import find_nspawn, find_states, is_held
from nspawn.state import State, split_id
from nspawn.store import Retention, Store, StoredImage, find_sizes


@dataclass(frozen=True)
class Program:
    """What the commands need of driver.py."""

    name: str
    version: str
    task_groups: Mapping[str, Sequence[Option]]  # by their titles
    plugin_options: Sequence[Option]
    stop_task: Callable[[State, float], Coroutine[None, None, str]]  # returns how the task ended
    try_plugin: Callable[[], str]  # returns why the plugin cannot start, "" if it can

    @property
    def task_options(self) -> list[Option]:
        return [option for group in self.task_groups.values() for option in group]


INTRODUCTION = """\
{name} {version}: runs Nomad tasks as systemd-nspawn containers

This file is a plugin: the Nomad agent starts it. Put it into the agent's
plugin_dir and add to the agent's configuration:

    plugin "{name}" {{
      config {{ }}
    }}

For a quick try: nomad agent -dev -plugin-dir=DIRECTORY -config=FILE
"""

WIDTH = 79


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=find_width(), max_help_position=28)


def find_width() -> int:
    """Return how many characters a line may have: what the terminal shows, and never more than WIDTH."""
    return max(min(shutil.get_terminal_size((WIDTH + 1, 24)).columns - 1, WIDTH), 40)


def make_parser(program: Program) -> argparse.ArgumentParser:
    description = INTRODUCTION.format(name=program.name, version=program.version)
    parser = argparse.ArgumentParser(
        program.name, description=description, formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument(
        "--version", action="store_true", help="print the version and the commit it was built from"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sentence = textwrap.fill(text[0].upper() + text[1:] + ".", find_width())
        return commands.add_parser(name, help=text, description=sentence, formatter_class=Help, allow_abbrev=False)

    add_check(
        add("check", "tell whether tasks can run on this machine, what is missing, and what jobs may do to it")
    )
    add("images", "list the fetched images: their sizes and ages, and the tasks that use them")
    add_tasks(add("tasks", "list the tasks on this machine, or end one"))
    add_pull(add("pull", "fetch an image ahead of time, so that the first job need not wait for it"))
    options = add("options", "print the reference of all options, or of one")
    options.add_argument("name", nargs="?", metavar="NAME", help="one option, as in `boot` or `auth.username`")
    options.add_argument("--markdown", action="store_true", help="the whole reference in Markdown")
    add("version", "print the version and the commit it was built from")
    topic = add("help", "print this help, or that of a command")
    topic.add_argument("topic", nargs="?", metavar="COMMAND", choices=[*commands.choices], help="a command")
    return parser


def add_check(check: argparse.ArgumentParser) -> None:
    check.add_argument("--image-dir", metavar="DIRECTORY", default=str(MACHINES_ROOT),
                       help=f"the image_dir of the plugin's block ({MACHINES_ROOT})")  # fmt: skip
    check.add_argument("--alloc-dir", metavar="DIRECTORY", action="append", default=[],
                       help="the agent's directory of allocations (the usual ones)")  # fmt: skip


def add_tasks(tasks: argparse.ArgumentParser) -> None:
    tasks.epilog = textwrap.fill(STOP_RULES, find_width())
    tasks.add_argument("--json", action="store_true", help="print a list of objects")
    tasks.add_argument("--stop", metavar="ID", help="end the task whose id begins so")
    tasks.add_argument("--timeout", metavar="DURATION", type=parse_timeout, default=10.0,
                       help="how long it may take to end by itself, as in 30s (10s)")  # fmt: skip


def parse_timeout(text: str) -> float:
    """Return the seconds of a duration as in a job. Raises ArgumentTypeError."""
    try:
        return parse_duration("--timeout", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.rule) from None


STOP_RULES = """\
--stop sends the image's stop signal, waits, and then kills. If no agent has the task, what is left of it is
removed, too. An agent that has it may start it again: nomad alloc stop ends it for good.
"""
PULL_RULES = """\
The rules are those for jobs. A job uses the image if it names it in the same way: the same address, type, verify,
checksum and platform, no auth block of its own, and the same key if it has to be signed. An image that no task
uses is removed after the plugin's image_gc_delay, by default a day; preload and image_keep keep it.
"""


def add_pull(pull: argparse.ArgumentParser) -> None:
    pull.epilog = textwrap.fill(PULL_RULES, find_width())
    pull.add_argument("image", metavar="IMAGE", help="docker://HOST/NAME:TAG, or the http(s) address of a file")
    for name, text in (
        ("type", "what an http(s) address holds: tar (the default) or raw"),
        ("verify", "how to verify the file: no (the default), checksum or signature"),
        ("checksum", "the checksum the file must have, as sha256:..."),
        ("platform", "the platform to pick from a multi-platform image"),
    ):
        pull.add_argument(f"--{name}", metavar=name.upper(), help=text)
    pull.add_argument("--auth-config", metavar="FILE", help="Docker's configuration file with credentials")
    pull.add_argument("--auth-helper", metavar="NAME", help="the credential helper to ask")
    pull.add_argument(
        "--insecure-registry", metavar="HOST", action="append", default=[], help="a registry to ask by plain http"
    )
    pull.add_argument("--mirror", metavar="REGISTRY=MIRROR", type=parse_pair, action="append", default=[],
                      help="a mirror to ask first, as in registry_mirrors of the plugin's block")  # fmt: skip
    pull.add_argument("--require-signature", metavar="REGISTRY=FILE", type=parse_pair, action="append", default=[],
                      help="the public key that must have signed the image, as in the plugin's block")  # fmt: skip


def parse_pair(text: str) -> tuple[str, str]:
    """Return the two sides of NAME=VALUE. Raises ArgumentTypeError."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError("it must be two words with = between them")
    return name, value


def run_command(program: Program, arguments: Sequence[str]) -> int:
    """Do what a person asks for; return the exit status. Without arguments, say what the file is."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a command as it ends any other, without a trace
    parser = make_parser(program)
    if not arguments:
        parser.print_help(sys.stderr)
        return 1
    given = parser.parse_args(arguments)
    command = "version" if given.version else given.command
    runs: dict[str, Callable[[], int]] = {
        "check": lambda: check_host(program, given),
        "images": show_images,
        "tasks": lambda: stop_task(program, given) if given.stop else show_tasks(given.json),
        "pull": lambda: pull_image(program, given),
        "options": lambda: show_options(program, given),
        "version": lambda: show(f"{program.name} {program.version}\n"),  # the built file answers in bootstrap.py
        "help": lambda: show_help(parser, given.topic),
    }
    try:
        return runs[command]()
    except DriverError as error:
        return fail(program, str(error))
    except PermissionError as error:
        return fail(program, f"{command} needs root: {error.filename}: {error.strerror}; run it with sudo")
    except OSError as error:
        return fail(program, f"{command}: {error.filename or 'this machine'}: {error.strerror}")


def show(text: str) -> int:
    sys.stdout.write(text)
    return 0


def fail(program: Program, text: str, status: int = 1) -> int:
    sys.stderr.write(f"{program.name}: {text}\n")
    return status


def show_help(parser: argparse.ArgumentParser, topic: str | None) -> int:
    if topic:
        parser.parse_args([topic, "--help"])  # ends the process
    parser.print_help()
    return 0


# -- options ---------------------------------------------------------------------------------------------------


def show_options(program: Program, given: argparse.Namespace) -> int:
    if given.markdown and given.name is None:
        return show(render_reference(program.task_groups, program.plugin_options))
    groups = {**program.task_groups, "In the plugin's block": program.plugin_options}
    if given.name is None:
        return show("\n".join(render_group(title, options) for title, options in groups.items()))
    named = {
        where: option
        for where, options in (("a job", program.task_options), ("the plugin's block", program.plugin_options))
        if (option := find_option(options, given.name))
    }
    if not named:
        names = [name for options in groups.values() for option in options for name in option.names]
        near = difflib.get_close_matches(given.name, names, 3)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"`{program.name} options` lists all"
        return fail(program, f"there is no option {json.dumps(given.name)}; {remedy}", 2)
    texts = [
        f"In {where}:\n\n{render_option(option, given.name, is_alone=True)}" for where, option in named.items()
    ]
    return show("\n".join(texts))


def find_option(options: Sequence[Option], name: str) -> Option | None:
    """Return an option by one of its names, or one of a block as in `auth.username`."""
    first, _, rest = name.partition(".")
    found = next((option for option in options if first in option.names), None)
    return find_option(found.fields, rest) if found and rest else found


def render_group(title: str, options: Sequence[Option]) -> str:
    parts = [render_option(option, option.name) for option in options]
    return f"{title}\n{'=' * len(title)}\n\n" + "\n".join(parts)


def render_option(option: Option, name: str, *, is_alone: bool = False) -> str:
    """Return what the reference says of an option and of those in its block, as plain text."""
    kind = option.kind.value + (", required" if option.required else "")
    equals = " " if option.kind.is_block else " = "
    lines = [f"{name} ({kind})", *wrap(" ".join(list_notes(option)), "    ")]
    if option.default not in (None, (), {}):
        lines.append(f"    Default: {json.dumps(option.default)}")
    if option.permission and is_alone:
        lines += wrap(f"With this permission a job can {PERMISSIONS[option.permission].meaning}.", "    ")
    example = option.example.replace("\n", "\n    ")
    lines.append(f"    Example: {option.name}{equals}{example}")
    inner = [render_option(field, f"{name}.{field.name}") for field in option.fields]
    return "\n".join(lines) + "\n" + "".join(f"\n{text}" for text in inner)


def wrap(text: str, indent: str, first: str | None = None) -> list[str]:
    """Return a text of the reference in lines for a terminal, without its marks for Markdown."""
    plain = re.sub(r"\[(.+?)\]\(#.+?\)", r"\1", text).replace("`", "")
    return textwrap.wrap(
        plain,
        find_width(),
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


# -- check -----------------------------------------------------------------------------------------------------

STRICT_BLOCK = """\
plugin "nomad-driver-nspawn" {
  config {
    allow       = []    # nothing that opens the host
    allow_caps  = []    # no capabilities beside the usual ones
    allow_paths = []    # no path of the host
    volumes     = false # nor Nomad's volumes
  }
}
"""
PERMISSIONS_TITLE = (
    "What jobs may do to this host with an empty plugin block (! marks what gives a job the whole host):"
)


def render_permissions() -> str:
    """Return what jobs may do to this host, by permissions, for people."""
    lines = wrap(PERMISSIONS_TITLE, "")
    for permission, info in PERMISSIONS.items():
        mark = "!" if info.gives_host else " "
        answer = "yes" if info.is_default else "no"
        lines += wrap(info.meaning, " " * 29, f"  {answer:<3} {mark} {permission.value:<20} ")
    lines += ["To allow none of it, and then add what is needed:", "", STRICT_BLOCK]
    return "\n".join(lines)


def check_host(program: Program, given: argparse.Namespace) -> int:
    """Print what is good and bad about this machine, and what jobs may do. Return 0 if tasks can run, else 1."""
    host = read_host()
    print(f"systemd-nspawn {host.systemd or 'not found'}, Linux {host.kernel[0]}.{host.kernel[1]}, "
          f"cgroups {host.cgroups.value if host.cgroups else 'v1'}, Python {sys.version.split()[0]}")  # fmt: skip
    why = program.try_plugin()
    start = Finding(Verdict.MISSING if why else Verdict.OK, why or "the plugin starts and answers.")
    findings = [start, *diagnose(host, given.image_dir, given.alloc_dir)]
    for finding in sorted(findings, key=lambda finding: [*Verdict].index(finding.verdict), reverse=True):
        print("\n".join(wrap(finding.text, " " * 9, f"{finding.verdict.value + ':':<9}")))
    is_missing = any(finding.verdict is Verdict.MISSING for finding in findings)
    print("tasks cannot run here" if is_missing else "tasks can run here")
    print(f"\n{render_permissions()}", end="")
    return 1 if is_missing else 0


# -- images ----------------------------------------------------------------------------------------------------


def show_images() -> int:
    check_root("images", f"only root can read {Store().root}")
    return show(render_images(Store(), time.time()))


def check_root(command: str, why: str) -> None:
    if os.geteuid() != 0:
        raise DriverError(f"{command} needs root: {why}; run it with sudo")


def render_images(store: Store, now: float) -> str:
    """Return a table of the images in the store, for people."""
    uses, images, retention = store.read_uses(), store.read_all(), store.read_retention()
    rows = [("IMAGE", "TYPE", "SIZE", "FETCHED", "LAST USE", "KEPT")]
    for image in images:
        tasks = [use.task_id.rpartition("/")[0] for use in uses if use.key == image.key]
        idle = now - store.last_use(image)
        ages = (render_age(now - image.fetched_at), "now" if tasks else render_age(idle))
        rows.append((image.name, image.type, render_size(image.size), *ages,
                     ", ".join([*tasks, *explain_kept(image, idle, retention)]) or "-"))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    size = render_size(sum(find_sizes(images).values()))
    if retention and retention.max_size:
        size += f" of {render_size(retention.max_size)}"
    lines.append(f"{len(images)} images in {store.root}, {size}; layers may be shared")
    return "\n".join(lines) + "\n"


def explain_kept(image: StoredImage, idle: float, retention: Retention | None) -> list[str]:
    """Return what keeps an image beside the tasks that use it: an option of the plugin's block, or its delay."""
    if retention is None:  # no plugin has served an agent here
        return []
    if option := retention.find_option(image):
        return [option]
    if not retention.is_on:
        return ["image_gc = false"]
    return [f"for {render_span(retention.delay - idle)}"] if retention.delay > idle else []


def render_age(seconds: float) -> str:
    return f"{render_span(seconds)} ago"


def render_span(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{int(seconds / size)} {name}"
    return f"{max(int(seconds), 0)} seconds"


# -- tasks -----------------------------------------------------------------------------------------------------


def show_tasks(is_json: bool) -> int:
    check_root("tasks", "only root can see all processes and states")
    facts = [describe_task(state) for state in sorted(find_states(), key=lambda state: state.started_at)]
    if is_json:
        return show(json.dumps(facts, indent=2) + "\n")
    return show("\n".join(map(render_task, facts)) if facts else "no tasks\n")


def describe_task(state: State) -> dict[str, Any]:
    """Return what there is to know about a task, with a pid of 0 for a process that has ended. Raises OSError."""
    alloc_id, name = split_id(state.task_id)

    def pid(process: ProcessId | None) -> int:
        return process.pid if process and process.is_alive else 0

    return {
        "id": state.task_id,
        "allocation": alloc_id,
        "namespace": state.namespace,
        "job": state.job,
        "group": state.group,
        "task": name,
        "labels": dict(state.labels),
        "machine": state.machine,
        "started": state.started_at,
        "shim": pid(state.shim),
        "nspawn": pid(find_nspawn(state)),
        "leader": pid(state.leader),
        "cgroup": state.cgroup,
        "directory": str(state.directory),
        "has_agent": is_held(state.cgroup),
    }


def render_task(facts: Mapping[str, Any]) -> str:
    names = {"shim": "shim", "nspawn": "systemd-nspawn", "leader": "leader"}
    pids = ", ".join(f"{text} {facts[name]}" for name, text in names.items() if facts[name])
    labels = ", ".join(f"{name}={quote(text)}" for name, text in facts["labels"].items())
    lines = (
        facts["id"],
        f"    task {facts['task']}, started {render_age(time.time() - facts['started'])}; "
        + ("an agent has it" if facts["has_agent"] else "no agent has it"),
        f"    job:       {facts['job'] or 'unknown'}, group {facts['group']}, namespace {facts['namespace']}",
        *([f"    labels:    {labels}"] if labels else []),
        f"    processes: {pids or 'none, it has ended'}",
        f"    machine:   {facts['machine']}",
        f"    cgroup:    {facts['cgroup'] or 'none'}",
    )
    return "\n".join(map(render_line, lines)) + "\n"


def stop_task(program: Program, given: argparse.Namespace) -> int:
    """End one task. Raises DriverError if none or several have such an id, or if it cannot be killed."""
    check_root("tasks --stop", "only root can end tasks")
    found = [state for state in find_states() if state.task_id.startswith(given.stop)]
    if len(found) != 1:
        what = f"{len(found)} tasks have ids that begin" if found else "no task has an id that begins"
        raise DriverError(f"{what} with {given.stop}; `{program.name} tasks` lists all")
    print(f"{found[0].task_id} has ended: {asyncio.run(program.stop_task(found[0], given.timeout))}.")
    return 0


# -- pull ------------------------------------------------------------------------------------------------------


def pull_image(program: Program, given: argparse.Namespace) -> int:
    """Fetch an image into the store, by the rules for jobs. Raises DriverError."""
    check_root("pull", f"only root can write to {Store().root}")
    auth = {name: value for name in ("config", "helper") if (value := getattr(given, f"auth_{name}"))}
    mirrors: dict[str, list[str]] = {}
    for registry, mirror in given.mirror:
        mirrors.setdefault(registry, []).append(mirror)
    raw = {
        "auth": auth or None,
        "insecure_registries": given.insecure_registry,
        "registry_mirrors": mirrors,
        "require_signature": dict(given.require_signature),
    }
    config = PluginOptions(**decode_options(program.plugin_options, raw))
    options = decode_job(program.task_options, plan_pull(given), config)
    origin = plan_origin(options, choose_image_dir(options.image, config.image_dir))
    assert origin

    store = Store()
    settings = replace(plan_fetching(config), retention=store.read_retention() or Retention())

    async def fetch() -> int:
        fetches = Fetches(store)
        stored, kept = await fetches.provide(origin, settings, print)
        if fetches.collecting:
            await fetches.collecting
        os.close(kept)
        return stored.size

    with contextlib.suppress(KeyboardInterrupt):
        print(f"{origin.name} is in the store: {render_size(asyncio.run(fetch()))}.")
        return 0
    return fail(program, "interrupted; the next pull goes on where this one has stopped")


def plan_pull(given: argparse.Namespace) -> dict[str, object]:
    """Return the options of a job that would use the image."""
    is_file = given.image.startswith(("http://", "https://"))
    said = {name: value for name in ("type", "verify", "checksum", "platform") if (value := getattr(given, name))}
    if is_file:
        return {"image": "pulled", "image_download": {"url": given.image, "force": True, **said}}
    if "://" in given.image.removeprefix(DOCKER) or "/" not in given.image:
        rule = "must be docker://HOST/NAME:TAG or an http(s) address"
        raise ConfigError("IMAGE", given.image, rule, "an image of this machine need not be fetched")
    if set(said) - {"platform"}:
        raise ConfigError(
            "IMAGE", given.image, f"--{min(set(said) - {'platform'})} only works with http(s) addresses"
        )
    address = given.image.removeprefix(DOCKER)
    return {"image": "pulled", "image_download": {"url": address, "type": "docker", "force": True, **said}}
