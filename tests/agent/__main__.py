# SPDX-License-Identifier: MPL-2.0
"""Runs job files on the driver without Nomad, or the examples on a real agent: `python -m tests.agent --help`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nomad_pb import driver_pb2
from tests.agent.errors import AgentError, PluginError
from tests.agent.job import parse_job, plugin_config
from tests.agent.nomad import NomadAgent
from tests.agent.plugin import Plugin, launch_like_agent
from tests.agent.runner import Console, Runner

ROOT = Path(__file__).resolve().parents[2]


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
    console.say("There is no `nomad` on PATH: tests/agent plays the agent")
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
        prog="python -m tests.agent", description="Play a Nomad agent: run job files on the driver without Nomad."
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
        console.print(console.paint(f"tests.agent: {error}", "bad"))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
