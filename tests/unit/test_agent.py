# SPDX-License-Identifier: MPL-2.0
"""The stand-in does what the real client was seen to do, and notices what a client would not stand."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from nomad_pb import driver_pb2, hcl_spec_pb2
from tests.agent import (
    Allocation,
    ConfigError,
    DriverError,
    Logmon,
    Plugin,
    PluginError,
    Task,
    Template,
    call,
    decode_config,
    interpolate,
    launch_like_agent,
    parse_duration,
    parse_hcl,
    parse_job,
    parse_log_line,
    plugin_config,
    to_msgpack,
    wire_number,
)

Spec = hcl_spec_pb2.Spec
ROOT = Path(__file__).resolve().parents[2]


def attr(name: str, kind: str, required: bool = False) -> Spec:
    return Spec(Attr=hcl_spec_pb2.Attr(name=name, type=kind, required=required))


def body(**attributes: Spec) -> Spec:
    return Spec(object=hcl_spec_pb2.Object(attributes=attributes))


def one(kind: str, text: str) -> Any:
    """The value of `x` for a schema with this one attribute."""
    return decode_config(body(x=attr("x", kind)), text, {"NOMAD_ALLOC_ID": "a1", "meta.m": "M", "PATH": "/bin"})[
        "x"
    ]


def problem(spec: Spec, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        decode_config(spec, text)
    return "\n".join(caught.value.problems)


# --- HCL to msgpack: each row was seen at a real client ---


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("bool", "", None),
        ("bool", "x = true", True),
        ("bool", 'x = "true"', True),
        ("bool", 'x = "0"', False),
        ("string", "", None),
        ("string", "x = null", None),
        ("string", "x = 1", "1"),
        ("string", "x = true", "true"),
        ("string", r'x = "a\tb\"c\\n"', 'a\tb"c\\n'),
        ("string", 'x = "${NOMAD_ALLOC_ID}-${meta.m}-${env["PATH"]}"', "a1-M-/bin"),
        ("string", "x = NOMAD_ALLOC_ID", "a1"),
        ("string", 'x = <<EOT\n one\ntwo "2"\nEOT\n', ' one\ntwo "2"\n'),
        ("string", "x = <<-EOT\n    one\n      two\n    EOT\n", "one\n  two\n"),
        ("number", "x = 42", 42),
        ("number", 'x = "42"', 42),
        ("number", "x = 5000000000", 5000000000),
        ("number", "x = -3", -3),
        ("number", "x = 1.5", 1.5),
        ("number", "x = 0.25", 0.25),
        ("number", "x = 0.1", "0.1"),
        ("number", "x = 1e30", "1" + 30 * "0"),
        ("list(string)", "", None),
        ("list(string)", "x = []", []),
        ("list(string)", 'x = ["a", 1, true]', ["a", "1", "true"]),
        ("list(map(string))", 'x = { a = "b" }', [{"a": "b"}]),
        ("list(map(string))", 'x { a = "b" }', [{"a": "b"}]),
        ("list(map(string))", 'x { a = "b" }\nx { c = "d" }', [{"a": "b"}, {"c": "d"}]),
        ("list(map(string))", 'x = [{ a = "b" }, { c = "d" }]', [{"a": "b"}, {"c": "d"}]),
        ("list(map(string))", "x {}", [{}]),
        ("list(map(string))", "x = {}", [{}]),
        ("list(map(string))", "x = { a = 1, b = true, c = null }", [{"a": "1", "b": "true", "c": None}]),
        ("list(map(string))", 'x = { "/a" = "/b", "/${NOMAD_ALLOC_ID}" = "/c" }', [{"/a": "/b", "/a1": "/c"}]),
        ("list(map(number))", "x { a = 8080 }", [{"a": 8080}]),
    ],
)
def test_decode_attribute(kind: str, text: str, value: Any) -> None:
    result = one(kind, text)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        ("bool", 'x = "yes"', "a bool is required"),
        ("number", 'x = "many"', "a number is required"),
        ("list(string)", 'x = "a"', "list of string required, but have string"),
        ("list(string)", 'x = [["a"]]', "element 0: string required, but have tuple"),
        ("list(map(string))", 'x = "a"', "list of map of string required, but have string"),
        ("list(map(string))", "x = merge({ a = 1 }, { b = 2 })", "list of map of string required."),
        ("list(map(string))", "x = var.m", "list of map of string required."),
        ("list(map(string))", 'x = ["a"]', "element 0: map of string required, but have string"),
        ("list(map(string))", "x { a = [1] }", 'element 0: element "a": string required, but have tuple'),
        ("list(map(number))", 'x { a = "many" }', '"x": a number is required'),
        ("map(string)", 'x = { a = "b" }', "map of string required"),
        ("map(string)", 'x { a = "b" }', "map of string required"),
        ("string", 'x = ["a"]', "string required, but have tuple"),
        ("string", 'x = "${nonsense}"', 'There is no variable named "nonsense"'),
    ],
)
def test_decode_attribute_refuses(kind: str, text: str, sentence: str) -> None:
    assert sentence in problem(body(x=attr("x", kind)), text)


def test_decode_json_object_is_no_list_of_maps() -> None:
    with pytest.raises(ConfigError, match="list of map of string required"):
        decode_config(body(x=attr("x", "list(map(string))")), {"x": {"a": "b"}})


def test_decode_quoted_names_in_blocks_are_a_parse_error() -> None:
    assert "Invalid HCL" in problem(body(x=attr("x", "list(map(string))")), 'x { "/a" = "/b" }')


def test_decode_sorted_keys() -> None:
    spec = body(boot=attr("boot", "bool"), a=attr("a", "string"))
    assert list(decode_config(spec, "boot = false").items()) == [("a", None), ("boot", False)]


def test_decode_names_unknown_and_missing() -> None:
    text = problem(body(image=attr("image", "string", required=True)), "imgae = 1")
    assert 'Invalid label: No argument or block type is named "imgae".' in text
    assert 'The argument "image" is required, but no definition was found.' in text


NESTED = body(a=attr("a", "number"), b=attr("b", "string"))
BLOCK = body(x=Spec(block_value=hcl_spec_pb2.Block(name="x", nested=NESTED, required=True)))
BLOCKS = body(x=Spec(block_list=hcl_spec_pb2.BlockList(name="x", nested=NESTED)))


@pytest.mark.parametrize(
    ("spec", "text", "value"),
    [
        (BLOCK, "x {}", {"a": None, "b": None}),
        (BLOCK, "x = { a = 1 }", {"a": 1, "b": None}),
        (BLOCKS, "", []),
        (BLOCKS, "x {}\nx { a = 1 }", [{"a": None, "b": None}, {"a": 1, "b": None}]),
        (BLOCKS, "x = [{ a = 1 }]", [{"a": 1, "b": None}]),
    ],
)
def test_decode_blocks(spec: Spec, text: str, value: Any) -> None:
    assert decode_config(spec, text)["x"] == value


def test_decode_block_counts_and_names() -> None:
    assert "Only one block" in problem(BLOCK, "x {}\nx {}")
    assert "A x block is required" in problem(BLOCK, "")
    assert 'named "c"' in problem(BLOCK, "x { c = 1 }")


def test_interpolate_twice() -> None:
    """The CLI takes one dollar of `$${`; what is left is a reference for the client."""
    assert parse_hcl('x = "$${NOMAD_ALLOC_ID} ${NOMAD_ALLOC_ID}"') == {"x": "${NOMAD_ALLOC_ID} ${NOMAD_ALLOC_ID}"}
    assert interpolate("$${A} ${A}", {"A": "1"}) == "${A} 1"
    assert interpolate("${B} ${A}", {"A": "1"}, strict=False) == "${B} 1"


@pytest.mark.parametrize(
    ("number", "wire"), [(2**63 - 1, 2**63 - 1), (2**63, 2.0**63), (2**63 + 1, str(2**63 + 1)), (3.0, 3)]
)
def test_wire_number(number: float, wire: Any) -> None:
    assert wire_number(number) == wire
    assert type(wire_number(number)) is type(wire)


def test_to_msgpack() -> None:
    packed = to_msgpack({"b": None, "a": [{"d": 5000000000, "c": "x"}]})
    assert msgpack.unpackb(packed) == {"a": [{"c": "x", "d": 5000000000}], "b": None}
    assert packed.index(b"a") < packed.index(b"b") and packed.index(b"c") < packed.index(b"d")


# --- log lines ---

STAMP = "2026-01-02T03:04:05.000006Z"


def test_log_line() -> None:
    line = f'{{"@level":"WARN","@message":"m","@module":"x","@timestamp":"{STAMP}","task":"t","n":1}}'
    entry, faults = parse_log_line(line)
    assert not faults
    assert (entry.level, entry.message, entry.module, entry.fields) == ("warn", "m", "x", {"task": "t", "n": 1})


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("Traceback (most recent call last):", "not a JSON object"),
        ("[1]", "not a JSON object"),
        (f'{{"@level":"info","@message":1,"@timestamp":"{STAMP}"}}', "the agent panics"),
        (f'{{"@level":"warning","@message":"m","@timestamp":"{STAMP}"}}', "unknown level 'warning'"),
        ('{"@level":"info","@message":"m"}', "bad @timestamp ''"),
        ('{"@level":"info","@message":"m","@timestamp":"2026-01-02T03:04:05Z"}', "bad @timestamp"),
        ('{"@level":"info","@message":"m","@timestamp":"2026-13-02T03:04:05.000006Z"}', "bad @timestamp"),
        ('{"@message":"' + 65536 * "x" + '"}', "cut by the agent"),
    ],
)
def test_log_line_faults(line: str, fault: str) -> None:
    assert any(fault in text for text in parse_log_line(line)[1])


# --- log collector ---


@pytest.fixture
def logmon(tmp_path: Path) -> Iterator[Logmon]:
    collector = Logmon(tmp_path, "web")
    collector.restart()
    yield collector
    collector.stop(0)


def test_logmon_copies_until_eof(logmon: Logmon, tmp_path: Path) -> None:
    fifo = tmp_path / ".web.stdout.fifo"
    assert fifo.stat().st_mode & 0o777 == 0o600
    with fifo.open("wb") as writer:
        writer.write(b"one\n")
        writer.flush()
        assert logmon.wait_for("one") == b"one\n"
        assert logmon.running("stdout")
    (tmp_path / ".web.stderr.fifo").open("wb").close()
    logmon.wait_eof()
    assert (tmp_path / "web.stdout.0").read_bytes() == b"one\n"


def test_logmon_reader_goes_and_comes_back(logmon: Logmon, tmp_path: Path) -> None:
    fds = [os.open(tmp_path / f".web.{name}.fifo", os.O_RDWR) for name in ("stdout", "stderr")]
    os.write(fds[0], b"one ")
    logmon.wait_for("one ")
    logmon.restart()  # both streams live: nothing happens
    logmon.stop(0)
    os.write(fds[0], b"two ")  # no reader, but the writer holds a reading end too: nothing is lost
    logmon.restart()
    assert logmon.wait_for("two ") == b"one two "
    for fd in fds:
        os.close(fd)
    logmon.wait_eof()


def test_logmon_without_a_writer_stops_at_once(tmp_path: Path) -> None:
    collector = Logmon(tmp_path, "web")
    collector.start()
    assert collector.running("stdout")
    collector.stop(0)
    with pytest.raises(OSError):  # nobody reads any more
        os.open(tmp_path / ".web.stdout.fifo", os.O_WRONLY | os.O_NONBLOCK)


# --- allocation and job files ---


def test_allocation_layout(tmp_path: Path) -> None:
    with Allocation(tmp_path) as allocation:
        task = allocation.add_task("web")
        assert {path.name for path in task.iterdir()} == {"local", "tmp", "secrets", "private"}
        assert (task / "tmp").stat().st_mode & 0o7777 == 0o1777
        assert (allocation.dir / "alloc" / "data").stat().st_mode & 0o7777 == 0o777
        if os.geteuid() == 0:
            assert (task / "secrets").is_mount() and (task / "local").stat().st_uid == 65534
    assert not list(tmp_path.iterdir())


JOB = """\
job "j" {
  type = "batch"
  meta { owner = "me" }
  group "g" {
    network {
      port "http" { to = 80 }
      port "fixed" { static = 8080 }
    }
    task "t" {
      driver = "nspawn"
      kill_timeout = "1m30s"
      kill_signal = "SIGQUIT"
      user = "nobody"
      config {
        image = "debian"
        bind = { "/a" = "/b" }
      }
      env { A = "${NOMAD_TASK_NAME}" }
      resources {
        cpu = 200
        memory = 64
        memory_max = 128
      }
      template {
        data = "x"
        destination = "local/x"
      }
    }
  }
}
"""


def test_parse_job(tmp_path: Path) -> None:
    path = tmp_path / "job.hcl"
    path.write_text(JOB)
    job = parse_job(path)
    (group,) = job.groups
    (task,) = group.tasks
    assert (job.name, job.type, group.name, task.name, task.user) == ("j", "batch", "g", "t", "nobody")
    assert task.config == {"image": "debian", "bind": [{"/a": "/b"}]}
    assert (task.kill_timeout, task.kill_signal, task.meta) == (90, "SIGQUIT", {"owner": "me"})
    assert (task.resources.cpu, task.resources.memory, task.resources.memory_max) == (200, 64, 128)
    assert task.resources.ports["http"].to == 80 and task.resources.ports["fixed"].value == 8080
    assert task.templates == (Template("x", "local/x"),)


@pytest.mark.parametrize("path", sorted((ROOT / "example").rglob("*.hcl")), ids=lambda path: path.name)
def test_examples_parse(path: Path) -> None:
    if path.name in ("config.hcl", "hardened.hcl", "package.hcl"):
        assert plugin_config(path, "nomad-driver-nspawn") is not None
    else:
        assert all(task.driver == "nspawn" for group in parse_job(path).groups for task in group.tasks)
    assert not path.stat().st_mode & 0o111, "an agent would start it as a plugin"


def test_parse_duration() -> None:
    assert [parse_duration(text) for text in ("5s", "1h2m", "250ms", 1_000_000_000)] == [5, 3720, 0.25, 1]
    with pytest.raises(Exception, match="not a duration"):
        parse_duration("5 s")


# --- plugin ---

FAKE = '''\
#!{python}
"""A plugin that does as little as an agent lets it, and one thing wrong: the one in $FAULT."""
import os, subprocess, sys, tempfile, threading
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, {root!r})
fault = os.environ.get("FAULT", "")
if fault == "banner":
    print("Welcome!", flush=True)
if fault == "crash":
    sys.exit("no luck today")
if fault == "log":
    print("plain text", file=sys.stderr, flush=True)
if fault == "child":
    subprocess.Popen(["sleep", "3"])
import grpc
from google.protobuf import any_pb2
from nomad_pb import (base_pb2, base_pb2_grpc, driver_pb2, driver_pb2_grpc, grpc_plugin_pb2, grpc_plugin_pb2_grpc,
                      hcl_spec_pb2, recoverable_error_pb2, rpc_status_pb2)

server = grpc.server(ThreadPoolExecutor(20))


class Base(base_pb2_grpc.BasePluginServicer):
    def PluginInfo(self, request, context):
        return base_pb2.PluginInfoResponse(
            type=base_pb2.DRIVER, plugin_api_versions=["v0.1.0"], plugin_version="0.1.0", name="fake")

    def ConfigSchema(self, request, context):
        return base_pb2.ConfigSchemaResponse()

    def SetConfig(self, request, context):
        return base_pb2.SetConfigResponse()


class Driver(driver_pb2_grpc.DriverServicer):
    def Fingerprint(self, request, context):
        yield driver_pb2.FingerprintResponse(health=driver_pb2.FingerprintResponse.HEALTHY)
        fault == "stream" or threading.Event().wait()

    def TaskEvents(self, request, context):
        yield driver_pb2.DriverTaskEvent(message="no time")
        threading.Event().wait()

    def TaskConfigSchema(self, request, context):
        return driver_pb2.TaskConfigSchemaResponse(spec=hcl_spec_pb2.Spec(object=hcl_spec_pb2.Object()))

    def StartTask(self, request, context):
        detail = any_pb2.Any()
        detail.Pack(recoverable_error_pb2.RecoverableError(recoverable=True))
        code = 2 if fault == "code" else 9
        status = rpc_status_pb2.Status(code=code, message="try again", details=[detail])
        context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "try again")

    def WaitTask(self, request, context):
        return driver_pb2.WaitTaskResponse(err="lost")


class Plugin(grpc_plugin_pb2_grpc.GRPCControllerServicer, grpc_plugin_pb2_grpc.GRPCBrokerServicer,
             grpc_plugin_pb2_grpc.GRPCStdioServicer):
    def Shutdown(self, request, context):
        fault == "stubborn" or threading.Timer(0.05, os._exit, [0]).start()
        return grpc_plugin_pb2.Empty()

    def StartStream(self, requests, context):
        yield from ()
        threading.Event().wait()

    StreamStdio = StartStream


base_pb2_grpc.add_BasePluginServicer_to_server(Base(), server)
driver_pb2_grpc.add_DriverServicer_to_server(Driver(), server)
grpc_plugin_pb2_grpc.add_GRPCControllerServicer_to_server(Plugin(), server)
grpc_plugin_pb2_grpc.add_GRPCBrokerServicer_to_server(Plugin(), server)
grpc_plugin_pb2_grpc.add_GRPCStdioServicer_to_server(Plugin(), server)
path = tempfile.mkdtemp() + "/socket"
server.add_insecure_port("unix:" + path)
server.start()
print("1|2|unix|" + path + ("|netrpc" if fault == "netrpc" else "|grpc|"), flush=True)
threading.Event().wait()
'''


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    path = tmp_path / "fake-plugin"
    path.write_text(FAKE.format(python=sys.executable, root=str(ROOT)))
    path.chmod(0o755)
    return path


def environment(fault: str, tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "FAULT": fault, "TMPDIR": str(tmp_path)}


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("banner", "the first line on stdout is no handshake: 'Welcome!'"),
        ("crash", "ended with code 1 before its handshake"),
        ("netrpc", "the protocol must be grpc"),
    ],
)
def test_handshake_is_refused(fake: Path, tmp_path: Path, fault: str, text: str) -> None:
    with pytest.raises(PluginError) as caught:
        Plugin(fake, env=environment(fault, tmp_path))
    assert text in str(caught.value)
    if fault == "crash":
        assert "no luck today" in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "violation"),
    [
        ("", ""),
        ("log", "log line is not a JSON object: plain text"),
        ("child", "a child holds the plugin's stdout or stderr"),
        ("stubborn", "failed to exit within 2.0 s"),
    ],
)
def test_violations_of_a_process(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, violation: str
) -> None:
    monkeypatch.setattr("tests.agent.plugin.EXIT_TIME", 2.0)
    with Plugin(fake, env=environment(fault, tmp_path)) as plugin:
        plugin.wait_for(lambda: plugin.log or fault != "log")
        plugin.kill(eof_timeout=2.0)
    assert len(plugin.violations) == (2 if fault == "child" else bool(fault))  # one for each pipe
    assert all(violation in text for text in plugin.violations)
    assert plugin.exited()


def test_violations_of_streams(fake: Path, tmp_path: Path) -> None:
    with launch_like_agent(fake, env=environment("stream", tmp_path)) as plugin:
        plugin.wait_for(lambda: len(plugin.violations) >= 2)
        texts = "\n".join(plugin.violations)
        assert "the Fingerprint stream ended (it returned)" in texts and "without a timestamp" in texts
        assert plugin.fingerprint and plugin.fingerprint.health == driver_pb2.FingerprintResponse.HEALTHY


@pytest.mark.parametrize(
    ("fault", "recoverable", "code"), [("", True, "FAILED_PRECONDITION"), ("code", None, "INTERNAL")]
)
def test_driver_errors(fake: Path, tmp_path: Path, fault: str, recoverable: bool | None, code: str) -> None:
    with Plugin(fake, env=environment(fault, tmp_path)) as plugin, Allocation(tmp_path) as allocation:
        task = Task(plugin, allocation, "web", "")
        with pytest.raises(DriverError) as caught:
            task.start()
        assert (caught.value.recoverable, caught.value.code) == (recoverable, code)
        assert task.wait(5).err == "lost"
        assert any("WaitTask answered without a result" in text for text in plugin.violations)
        task.logmon.stop(0)


def test_reattach_and_crash(fake: Path, tmp_path: Path) -> None:
    plugin = Plugin(fake, env=environment("", tmp_path))
    again = Plugin.reattach(*plugin.detach())
    assert not again.exited()
    again.open_streams()
    again.wait_for(lambda: again.fingerprint)
    again.kill()
    assert again.exited() and not [text for text in again.violations if "timestamp" not in text]
    other = Plugin(fake, env=environment("", tmp_path))
    other.kill_hard()
    with pytest.raises(DriverError, match="shut down"):
        call(other.driver.WaitTask, driver_pb2.WaitTaskRequest(task_id="x"), 5)
    assert other.violations == []


def test_task_config(fake: Path, tmp_path: Path) -> None:
    with Plugin(fake, env=environment("", tmp_path)) as plugin, Allocation(tmp_path) as allocation:
        task = Task(plugin, allocation, "web", {}, env={"A": "${NOMAD_ALLOC_ID} ${unknown}"}, user="u")
        task.templates.append(Template('port {{ env "A" }}\n', "${NOMAD_TASK_DIR}/x"))
        task.id = f"{allocation.id}/web/01234567"
        task.prestart()
        config = task.task_config()
        task.logmon.stop(0)
        assert config.env["A"] == f"{allocation.id} ${{unknown}}" and config.env["NOMAD_TASK_DIR"] == "/local"
        assert config.alloc_dir == str(allocation.dir) and config.user == "u"
        assert config.stdout_path == f"{allocation.dir}/alloc/logs/.web.stdout.fifo"
        assert config.resources.linux_resources.memory_limit_bytes == 300 * 2**20
        assert (task.dir / "local" / "x").read_text() == textwrap.dedent(f"""\
            port {allocation.id} ${{unknown}}
            """)
        assert task.cgroup.remove() is None
