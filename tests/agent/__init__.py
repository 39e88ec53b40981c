# SPDX-License-Identifier: MPL-2.0
"""A stand-in for the Nomad agent: the client's side of the driver plugin protocol.

It starts the plugin file as an agent does, turns HCL into what the plugin receives, lays out allocation
directories, reads the log FIFOs and calls the driver in the order in which a real client calls it. It is also
stricter than an agent: what an agent would swallow, log or die of is kept as a *violation*, a sentence in
`Plugin.violations`, so that a test can say `assert not plugin.violations`.

`python -m tests.agent --help` runs job files without Nomad. Tests import from here; a module imports only what
stands above it in this list:

    errors      what can go wrong, and a call with its error
    streams     descriptors, lines, the log FIFOs
    log         the plugin's stderr
    hcl, spec   HCL, and a config against the driver's schema
    values      what a task is given, how it ended
    plugin      the process and its connection
    allocation  directories and cgroups
    session     `nomad alloc exec`
    task        the calls of a task runner
    job         job files
    nomad       a real agent
    runner      jobs on the console
"""

from tests.agent.allocation import Allocation
from tests.agent.errors import AgentError, ConfigError, DriverError, PluginError, call, driver_error
from tests.agent.hcl import interpolate, parse_hcl
from tests.agent.job import free_port, parse_duration, parse_job, plugin_config
from tests.agent.log import parse_log_line
from tests.agent.nomad import NomadAgent
from tests.agent.plugin import MAX_INT32, PLUGIN_ENV, Plugin, launch_like_agent
from tests.agent.session import ExecSession
from tests.agent.spec import decode_config, to_msgpack, wire_number
from tests.agent.streams import HANG, Logmon
from tests.agent.task import Task
from tests.agent.values import MIB, ExitResult, Port, Resources, Template, set_duration

__all__ = [
    "HANG",
    "MAX_INT32",
    "MIB",
    "PLUGIN_ENV",
    "AgentError",
    "Allocation",
    "ConfigError",
    "DriverError",
    "ExecSession",
    "ExitResult",
    "Logmon",
    "NomadAgent",
    "Plugin",
    "PluginError",
    "Port",
    "Resources",
    "Task",
    "Template",
    "call",
    "decode_config",
    "driver_error",
    "free_port",
    "interpolate",
    "launch_like_agent",
    "parse_duration",
    "parse_hcl",
    "parse_job",
    "parse_log_line",
    "plugin_config",
    "set_duration",
    "to_msgpack",
    "wire_number",
]
