# SPDX-License-Identifier: MPL-2.0
"""The wire between agent and plugin: SetConfig, streams, load, errors, log. Begin and end: test_handshake.py.

Most tests share one plugin and one running task: what they ask for must not disturb anybody else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest
from google.protobuf import empty_pb2

from nomad_pb import (
    base_pb2,
    base_pb2_grpc,
    driver_pb2,
    driver_pb2_grpc,
    grpc_plugin_pb2,
    grpc_plugin_pb2_grpc,
    health_pb2,
    recoverable_error_pb2,
    rpc_status_pb2,
)
from tests.agent import (
    HANG,
    MAX_INT32,
    Allocation,
    ConfigError,
    DriverError,
    Plugin,
    Task,
    call,
    driver_error,
    launch_like_agent,
    set_duration,
)
from tests.containers import eventually, zombies

MIB = 1 << 20
AT_ONCE = 10.0  # seconds; generous, for machines that do something else at the same time
FINGERPRINT_PERIOD = 30.0  # seconds between two looks at the host
ROOT = Path(__file__).parents[2]
STATE_ROOT = Path("/run/nomad-driver-nspawn")
UNKNOWN = "6b1d2f9e-0000-4000-8000-000000000000/task/0badcafe"
RECOVERABLE = "type.googleapis.com/hashicorp.nomad.plugins.shared.structs.RecoverableError"
FRAME_SETTINGS, FRAME_PING, FRAME_GOAWAY, ACK = 4, 6, 7, 1


# === Fixtures ================================================================================================


@pytest.fixture
def quiet(shared: Plugin) -> Iterator[None]:
    """The test must not make the shared plugin break a rule."""
    before = len(shared.violations)
    yield
    time.sleep(0.1)
    assert shared.violations[before:] == []


@pytest.fixture(scope="module")
def running(shared: Plugin, image: Path) -> Iterator[Task]:
    """A task that runs as long as the tests."""
    with Allocation() as allocation, Task(shared, allocation, "running", config(image, "exec sleep 600")) as task:
        task.start()
        yield task


@pytest.fixture(scope="module")
def ended(shared: Plugin, image: Path) -> Iterator[Task]:
    """A task that has ended with code 0 and is not destroyed yet."""
    with Allocation() as allocation, Task(shared, allocation, "ended", config(image, "exit 0")) as task:
        task.start()
        task.wait()
        yield task


@dataclasses.dataclass
class Watcher:
    """A client that does nothing but follow the streams, and sends a ping every second."""

    opened: float
    streams: list[Any]
    states: list[grpc.ChannelConnectivity]


@pytest.fixture(scope="module", autouse=True)
def watcher(shared: Plugin) -> Iterator[Watcher]:
    options = {
        "grpc.keepalive_time_ms": 1000,
        "grpc.keepalive_timeout_ms": 2000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
    }
    channel = open_channel(shared, **options)
    streams: list[Any] = [
        driver_pb2_grpc.DriverStub(channel).TaskEvents(driver_pb2.TaskEventsRequest()),
        driver_pb2_grpc.DriverStub(channel).Fingerprint(driver_pb2.FingerprintRequest()),
        grpc_plugin_pb2_grpc.GRPCStdioStub(channel).StreamStdio(empty_pb2.Empty()),
    ]
    states: list[grpc.ChannelConnectivity] = []
    channel.subscribe(states.append)
    next(streams[1])
    yield Watcher(time.monotonic(), streams, states)
    channel.close()


# === Helpers =================================================================================================


def config(image: Path, script: str, **options: object) -> dict[str, object]:
    """The config of a task that runs a shell script and leaves the image as it is."""
    return {
        "image": str(image),
        "boot": False,
        "command": ["/bin/sh", "-c", script],
        "volatile": "overlay",
        "user_namespacing": False,
        "network_veth": False,
        **options,
    }


def failure(method: Any, request: Any, timeout: float = HANG) -> DriverError:
    """The error a call must end with; checks all that an agent or a person would stumble over."""
    with pytest.raises(grpc.RpcError) as caught:
        response = method(request, timeout=timeout)
        if hasattr(response, "__next__"):
            next(response)
    raw: Any = caught.value
    check_detail(raw.code(), raw.details(), dict(raw.trailing_metadata()))
    check_text(raw.details())
    # UNAVAILABLE and CANCELLED mean to an agent that the plugin is dying; UNKNOWN is gRPC's for exceptions.
    assert raw.code().name not in ("UNAVAILABLE", "CANCELLED", "UNKNOWN", "INTERNAL", "DEADLINE_EXCEEDED")
    return driver_error(raw)


def check_detail(code: grpc.StatusCode, text: str, metadata: Mapping[str, Any]) -> None:
    status = rpc_status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert (status.code, status.message) == (code.value[0], text)
    assert status.details[0].type_url == RECOVERABLE
    recoverable_error_pb2.RecoverableError.FromString(status.details[0].value)


def check_text(text: str) -> None:
    """A sentence for people: nothing of Python in it, one line, not endless."""
    python = r"internal error|Traceback|Errno|<class|\w+(Error|Exception)\b|__\w+__|object at 0x|\.py\b|NoneType"
    assert text.strip()
    assert not re.search(python, text), text
    assert not re.search(r"\b(codec|dict|str|int|bytes)\b", text), text
    assert "\n" not in text
    assert len(text) < 2000
    assert not text.rstrip().endswith((":", ": ''", ";"))


def packed(value: object) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True))


def set_config(plugin: Plugin, value: object) -> DriverError:
    raw = value if isinstance(value, bytes) else packed(value)
    return failure(plugin.base.SetConfig, base_pb2.SetConfigRequest(msgpack_config=raw))


def open_channel(plugin: Plugin, **options: int) -> grpc.Channel:
    """A second connection to the same plugin."""
    settings: list[tuple[str, Any]] = [
        ("grpc.default_authority", "unused"),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", MAX_INT32),
        ("grpc.max_receive_message_length", MAX_INT32),
        *options.items(),
    ]
    channel = grpc.insecure_channel(plugin.address, options=settings)
    grpc.channel_ready_future(channel).result(HANG)
    return channel


def read_status(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]


def count_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def count_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def plugin_info_seconds(plugin: Plugin) -> float:
    begin = time.monotonic()
    call(plugin.base.PluginInfo, base_pb2.PluginInfoRequest(), HANG)
    return time.monotonic() - begin


# === Config ==================================================================================================


def fingerprint_with(plugin: Plugin, raw: bytes) -> driver_pb2.FingerprintResponse:
    call(plugin.base.SetConfig, base_pb2.SetConfigRequest(msgpack_config=raw), HANG)
    stream: Any = plugin.driver.Fingerprint(driver_pb2.FingerprintRequest(), timeout=HANG)
    try:
        return next(iter(stream))  # type: ignore[no-any-return]
    finally:
        stream.cancel()


@pytest.fixture
def fresh(driver_file: Path) -> Iterator[Plugin]:
    """A plugin before SetConfig."""
    with Plugin(driver_file) as plugin:
        yield plugin
    assert not plugin.violations


def documented_attributes() -> set[str]:
    """Return the names of the node's attributes in the table of docs/operations.md."""
    text = (ROOT / "docs/operations.md").read_text()
    table = text[text.index("| `driver.nspawn.` | meaning |") :].split("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    return {"driver.nspawn"} | {f"driver.nspawn.{name}" for cell in cells for name in re.findall("`(.+?)`", cell)}


@pytest.mark.parametrize("raw", [b"", packed({}), packed({"enabled": None, "volumes": None})])
def test_empty_plugin_config_gives_the_defaults(fresh: Plugin, raw: bytes) -> None:
    response = fingerprint_with(fresh, raw)
    assert response.health != driver_pb2.FingerprintResponse.UNDETECTED
    assert response.attributes["driver.nspawn"].bool_val
    assert response.attributes["driver.nspawn.volumes"].bool_val
    assert set(response.attributes) == documented_attributes()
    capabilities = call(fresh.driver.Capabilities, driver_pb2.CapabilitiesRequest(), HANG).capabilities
    assert capabilities.mount_configs == driver_pb2.DriverCapabilities.ANY_MOUNTS


def test_set_config_may_be_called_again(fresh: Plugin) -> None:
    for _ in range(2):
        fresh.set_config({"volumes": False}, nomad=False)
    fresh.set_config({"volumes": False})
    capabilities = call(fresh.driver.Capabilities, driver_pb2.CapabilitiesRequest(), HANG).capabilities
    assert capabilities.mount_configs == driver_pb2.DriverCapabilities.NO_MOUNTS


def test_disabled_driver_starts_nothing(fresh: Plugin) -> None:
    fresh.set_config({"enabled": False})
    with pytest.raises(DriverError, match="enabled = false") as caught:
        call(fresh.driver.StartTask, driver_pb2.StartTaskRequest(task=driver_pb2.TaskConfig(id="a/b/c")), HANG)
    assert not caught.value.recoverable


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("alloc_dir", "", "it has no directory (alloc_dir)"),
        ("alloc_dir", "/a\0b", r'"/a\u0000b" holds a NUL character'),
        ("name", "a\0b", r'"a\u0000b" holds a NUL character'),
        ("name", "..", ".. is no name for it; give it another"),
        ("stdout_path", "/a\0b", r'"/a\u0000b" holds a NUL character'),
        ("mounts", [driver_pb2.Mount(host_path="/a\0b")], r'"/a\u0000b" holds a NUL character'),
        (
            "resources",
            driver_pb2.Resources(linux_resources=driver_pb2.LinuxResources(PercentTicks=float("nan"))),
            "its share of the CPU is no number (nan)",
        ),
    ],
)
def test_what_nomad_never_sends_is_refused(shared: Plugin, field: str, value: Any, sentence: str) -> None:
    config = driver_pb2.TaskConfig(**{"id": "a/b/c", "name": "b", "alloc_dir": "/a", field: value})
    with pytest.raises(DriverError) as caught:
        call(shared.driver.StartTask, driver_pb2.StartTaskRequest(task=config), HANG)
    assert caught.value.text == f"the task cannot be started: {sentence}"


def test_disabled_driver_is_undetected_and_says_why(fresh: Plugin) -> None:
    response = fingerprint_with(fresh, packed({"enabled": False}))
    assert response.health == driver_pb2.FingerprintResponse.UNDETECTED
    assert "enabled = false" in response.health_description
    assert not response.attributes["driver.nspawn"].bool_val
    assert not response.err


def test_unknown_plugin_option_is_named_with_the_known_ones(shared: Plugin) -> None:
    error = set_config(shared, {"volume": True})
    assert error.code == "INVALID_ARGUMENT"
    assert error.text.startswith("volume = true: no such option")
    assert "enabled, volumes" in error.text


@pytest.mark.parametrize("value", ["yes", 1, [True], {"a": True}, 0.5])
def test_plugin_option_of_a_wrong_type_is_named_with_its_rule(shared: Plugin, value: object) -> None:
    error = set_config(shared, {"enabled": value})
    assert error.code == "INVALID_ARGUMENT"
    assert error.text == f"enabled = {json.dumps(value)}: must be true or false"


@pytest.mark.parametrize(
    "raw", [b"\xc1", b"\x81", packed({}) + b"x", packed([1]), packed({1: 2}), b"\xa1\xff", b"\xd9"]
)
def test_plugin_config_that_is_no_map_of_options_is_refused(shared: Plugin, raw: bytes) -> None:
    assert not set_config(shared, raw).recoverable


def test_refused_plugin_config_changes_nothing(shared: Plugin) -> None:
    set_config(shared, {"enabled": False, "volumes": 3})
    capabilities = call(shared.driver.Capabilities, driver_pb2.CapabilitiesRequest(), HANG).capabilities
    assert capabilities.mount_configs == driver_pb2.DriverCapabilities.ANY_MOUNTS


# === Services of go-plugin ===================================================================================


def test_health_is_told_for_the_plugin_only(shared: Plugin) -> None:
    response = call(shared.health.Check, health_pb2.HealthCheckRequest(service="plugin"), HANG)
    assert response.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(DriverError) as caught:
        call(shared.health.Check, health_pb2.HealthCheckRequest(service="another"), HANG)
    assert caught.value.code == "NOT_FOUND"
    check_text(caught.value.text)


def test_names_of_nomad_0_10_0_work(driver_file: Path) -> None:
    plugin = Plugin(driver_file)
    end = threading.Event()

    def silence() -> Iterator[Any]:
        end.wait()
        yield from ()

    connection, empty = grpc_plugin_pb2.ConnInfo, grpc_plugin_pb2.Empty
    broker: Any = plugin.channel.stream_stream(
        "/proto.GRPCBroker/StartStream", connection.SerializeToString, connection.FromString
    )(silence())
    time.sleep(0.2)
    assert broker.is_active()
    shutdown: Any = plugin.channel.unary_unary(
        "/proto.GRPCController/Shutdown", empty.SerializeToString, empty.FromString
    )
    plugin.closing = True
    call(shutdown, empty(), HANG)
    assert plugin.exited(2)
    end.set()
    plugin.kill_hard()
    assert not plugin.violations


def test_broker_takes_messages_and_ends_with_its_client(shared: Plugin) -> None:
    stub = grpc_plugin_pb2_grpc.GRPCBrokerStub(shared.channel)
    knocks = [grpc_plugin_pb2.ConnInfo(service_id=number, network="unix", address="x") for number in range(3)]
    stream: Any = stub.StartStream(iter(knocks))
    assert list(stream) == []  # the client half-closed, the call ends without an error
    assert stream.code() == grpc.StatusCode.OK


def test_calls_that_are_not_for_this_driver_are_unimplemented(shared: Plugin, running: Task) -> None:
    driver = shared.driver
    for method, request in (
        (driver.CreateNetwork, driver_pb2.CreateNetworkRequest(alloc_id="a")),
        (driver.DestroyNetwork, driver_pb2.DestroyNetworkRequest(alloc_id="a")),
    ):
        error = failure(method, request)
        assert error.code == "UNIMPLEMENTED"
        assert "closed" not in error.text  # the client of an exec drops such errors


@pytest.mark.usefixtures("quiet")
def test_unknown_methods_are_unimplemented(shared: Plugin) -> None:
    method: Any = shared.channel.unary_unary("/hashicorp.nomad.plugins.drivers.proto.Driver/FromTheFuture")
    with pytest.raises(grpc.RpcError) as caught:
        method(b"", timeout=HANG)
    raw: Any = caught.value
    assert raw.code() == grpc.StatusCode.UNIMPLEMENTED


# === Wire ====================================================================================================


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags, 0, 0, 0, 0]) + payload


def read_exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = client.recv(size - len(data))
        assert more, "the plugin has closed the connection"
        data += more
    return data


def read_frame(client: socket.socket) -> tuple[int, int]:
    header = read_exactly(client, 9)
    read_exactly(client, int.from_bytes(header[:3], "big"))
    return header[3], header[4]


def raw_connection(plugin: Plugin) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(plugin.address.removeprefix("unix:"))
    return client


def test_any_number_of_pings_is_answered(shared: Plugin) -> None:
    with raw_connection(shared) as client:
        client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(FRAME_SETTINGS, 0, b""))
        answers = 0
        for number in range(200):
            client.sendall(frame(FRAME_PING, 0, struct.pack(">Q", number)))
            while answers <= number:
                kind, flags = read_frame(client)
                assert kind != FRAME_GOAWAY
                answers += (kind, flags) == (FRAME_PING, ACK)


@pytest.mark.parametrize(
    "junk", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4096, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff"]
)
@pytest.mark.usefixtures("quiet")
def test_strangers_on_the_socket_disturb_nobody(shared: Plugin, junk: bytes) -> None:
    for _ in range(3):
        with raw_connection(shared) as client, contextlib.suppress(OSError):
            client.sendall(junk)
    call(shared.base.PluginInfo, base_pb2.PluginInfoRequest(), HANG)


@pytest.mark.usefixtures("quiet")
def test_message_that_cannot_be_parsed_is_answered_and_leaves_the_log_readable(shared: Plugin) -> None:
    method: Any = shared.channel.unary_unary("/hashicorp.nomad.plugins.drivers.proto.Driver/StopTask")
    with pytest.raises(grpc.RpcError) as caught:
        method(b"\xff\xff\xff", timeout=HANG)
    raw: Any = caught.value
    assert raw.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    call(shared.base.PluginInfo, base_pb2.PluginInfoRequest(), HANG)


def test_environment_of_16_mib_is_refused_by_its_size(shared: Plugin, image: Path) -> None:
    big = {f"BIG_{number}": "x" * 100_000 for number in range(16 * MIB // 100_000)}
    with Allocation() as allocation, Task(shared, allocation, "big", config(image, "true"), env=big) as task:
        with pytest.raises(DriverError) as caught:
            task.start()
        assert caught.value.code == "INVALID_ARGUMENT"
        assert "all variables together may have 1536 KiB" in caught.value.text
        assert caught.value.recoverable is False
        check_text(caught.value.text)
        task.user_env = {"ONE": "x" * 16 * MIB}
        with pytest.raises(DriverError) as caught:
            task.start()
        assert '"ONE": a variable may have 128 KiB' in caught.value.text
        check_text(caught.value.text)


def test_configuration_of_16_mib_is_refused_in_few_words(shared: Plugin) -> None:
    for value in ({"image": "x" * 16 * MIB}, {"image": "/", "x" * 16 * MIB: 1}, {"image": ["x"] * 4 * MIB}):
        task = driver_pb2.TaskConfig(id=UNKNOWN, name="task", msgpack_driver_config=packed(value))
        assert failure(shared.driver.StartTask, driver_pb2.StartTaskRequest(task=task)).recoverable is False


def test_driver_state_of_16_mib_is_taken_and_refused(shared: Plugin) -> None:
    for state in (b"x" * 16 * MIB, b"[" * 16 * MIB, b'"' + b"x" * 16 * MIB + b'"'):
        check_unrecoverable_handle(shared, state, limit=5)


def test_hundred_blocked_calls_do_not_hold_up_others(shared: Plugin, running: Task) -> None:
    channel = open_channel(shared)
    driver = driver_pb2_grpc.DriverStub(channel)
    idle = count_threads(shared.pid)
    waits: list[Any] = [driver.WaitTask.future(driver_pb2.WaitTaskRequest(task_id=running.id)) for _ in range(100)]
    streams: list[Any] = [driver.TaskEvents(driver_pb2.TaskEventsRequest()) for _ in range(100)]
    streams += [grpc_plugin_pb2_grpc.GRPCStdioStub(channel).StreamStdio(empty_pb2.Empty()) for _ in range(100)]
    stats = driver_pb2.TaskStatsRequest(task_id=running.id)
    set_duration(stats.collection_interval, 1)
    streams += [driver.TaskStats(stats) for _ in range(20)]
    try:
        time.sleep(0.5)
        assert not any(one.done() for one in waits)
        assert all(stream.is_active() for stream in streams)
        assert max(plugin_info_seconds(shared) for _ in range(20)) < AT_ONCE
        assert running.inspect().task.state == driver_pb2.RUNNING
        assert count_threads(shared.pid) <= idle  # one thread serves them all
    finally:
        for one in waits + streams:
            one.cancel()
        channel.close()


def test_hundred_waits_all_get_the_same_result(shared: Plugin, image: Path) -> None:
    with Allocation() as allocation, Task(shared, allocation, "t", config(image, "sleep 1; exit 9")) as task:
        task.start()
        request = driver_pb2.WaitTaskRequest(task_id=task.id)
        waits: list[Any] = [shared.driver.WaitTask.future(request) for _ in range(100)]
        results = [one.result(HANG).result for one in waits]
        assert [result.exit_code for result in results] == [9] * 100
        assert task.wait().exit_code == 9  # and after the end


@pytest.mark.usefixtures("quiet")
def test_calls_end_with_their_client(shared: Plugin, running: Task) -> None:
    stats = driver_pb2.TaskStatsRequest(task_id=running.id)
    set_duration(stats.collection_interval, 0.2)

    def round_of_calls(vanish: bool) -> None:
        """50 open calls of each kind, then cancelled, or gone with their connection."""
        channel = open_channel(shared)
        driver = driver_pb2_grpc.DriverStub(channel)
        calls: list[Any] = []
        for _ in range(50):
            calls += [
                driver.WaitTask.future(driver_pb2.WaitTaskRequest(task_id=running.id)),
                driver.TaskEvents(driver_pb2.TaskEventsRequest()),
                driver.Fingerprint(driver_pb2.FingerprintRequest()),
                driver.TaskStats(stats),
                grpc_plugin_pb2_grpc.GRPCStdioStub(channel).StreamStdio(empty_pb2.Empty()),
            ]
        time.sleep(0.3)
        for one in () if vanish else calls:
            one.cancel()
        channel.close()

    round_of_calls(False)
    fds, threads, memory = count_fds(shared.pid), count_threads(shared.pid), read_status(shared.pid, "VmRSS")
    for _ in range(3):
        round_of_calls(False)
        round_of_calls(True)
    eventually(lambda: count_fds(shared.pid) <= fds)
    eventually(lambda: count_threads(shared.pid) <= threads)  # a stat of the last call may just end
    assert read_status(shared.pid, "VmRSS") - memory < 8 << 10  # KiB; 1500 calls that stay would be more
    assert plugin_info_seconds(shared) < AT_ONCE


def test_connections_that_come_and_go_leave_nothing(shared: Plugin) -> None:
    plugin_info_seconds(shared)
    time.sleep(0.2)
    before = count_fds(shared.pid)
    for _ in range(20):
        channel = open_channel(shared)
        call(base_pb2_grpc.BasePluginStub(channel).PluginInfo, base_pb2.PluginInfoRequest(), HANG)
        channel.close()
    eventually(lambda: count_fds(shared.pid) <= before)


# === Errors ==================================================================================================


def unknown_task_calls(plugin: Plugin, task_id: str) -> list[tuple[Any, Any]]:
    driver = plugin.driver
    return [
        (driver.WaitTask, driver_pb2.WaitTaskRequest(task_id=task_id)),
        (driver.SignalTask, driver_pb2.SignalTaskRequest(task_id=task_id, signal="SIGHUP")),
        (driver.InspectTask, driver_pb2.InspectTaskRequest(task_id=task_id)),
        (driver.TaskStats, driver_pb2.TaskStatsRequest(task_id=task_id)),
    ]


@pytest.mark.parametrize("task_id", [UNKNOWN, "", "../../etc", "a/b", "ä/ö/ü"])
def test_unknown_task_is_an_error_at_once(shared: Plugin, task_id: str) -> None:
    for method, request in unknown_task_calls(shared, task_id):
        begin = time.monotonic()
        error = failure(method, request)
        assert time.monotonic() - begin < AT_ONCE
        assert error.code == "NOT_FOUND"
        assert error.recoverable is False
        assert task_id in error.text


def test_overlong_task_id_makes_no_overlong_error(shared: Plugin) -> None:
    for method, request in unknown_task_calls(shared, "a" * 100_000):
        failure(method, request)


@pytest.mark.parametrize("task_id", [UNKNOWN, "", "../../etc", "a" * 100_000])
def test_unknown_task_is_a_stopped_and_destroyed_one(shared: Plugin, task_id: str) -> None:
    stop = driver_pb2.StopTaskRequest(task_id=task_id, signal="SIGTERM")
    set_duration(stop.timeout, 5)
    begin = time.monotonic()
    call(shared.driver.StopTask, stop, HANG)
    for force in (True, False):
        call(shared.driver.DestroyTask, driver_pb2.DestroyTaskRequest(task_id=task_id, force=force), HANG)
    assert time.monotonic() - begin < AT_ONCE


def check_unrecoverable_handle(
    plugin: Plugin, state: bytes, limit: float = AT_ONCE, task_id: str = UNKNOWN
) -> str:
    handle = driver_pb2.TaskHandle(version=1, config=driver_pb2.TaskConfig(id=task_id), driver_state=state)
    begin = time.monotonic()
    error = failure(plugin.driver.RecoverTask, driver_pb2.RecoverTaskRequest(handle=handle))
    assert time.monotonic() - begin < limit
    return error.text


GARBAGE_STATES = [
    b"",
    b"\0",
    b"\xff\xfe\xfd",
    b"null",
    b"3",
    b"[]",
    b"{}",
    b'"text"',
    b'{"version": 1}',
    b'{"version": 1, "leader": null}',
    b'{"version": 1, "leader": 3, "mode": "boot", "shim": {}, "command": []}',
    b'{"version": 1, "leader": null, "mode": "other", "shim": {"pid": 1, "started": 1}, "command": []}',
    b'{"version": 1, "leader": null, "mode": "boot", "shim": {"pid": 1, "started": 1}, "command": [], "new": 1}',
    b'{"version": 2, "leader": null}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("state", GARBAGE_STATES, ids=lambda state: repr(state[:40]))
def test_handle_that_cannot_be_read_is_refused_at_once(shared: Plugin, state: bytes) -> None:
    check_unrecoverable_handle(shared, state)


def test_handle_of_what_is_gone_or_of_another_task_is_refused(shared: Plugin, running: Task) -> None:
    assert running.handle
    state = json.loads(running.handle.driver_state)
    check_unrecoverable_handle(shared, running.handle.driver_state)  # of another task
    check_unrecoverable_handle(shared, json.dumps({**state, "task_id": UNKNOWN}).encode())
    other_boot = {**state, "task_id": UNKNOWN, "boot_id": "another"}
    check_unrecoverable_handle(shared, json.dumps(other_boot).encode())
    for version in (0, 2, "1", None):
        check_unrecoverable_handle(shared, json.dumps({**state, "version": version}).encode())


WRONG_VALUES: tuple[object, ...] = (None, [], {}, "text", -1)


@pytest.mark.usefixtures("quiet")
def test_handles_with_one_wrong_value_are_refused(shared: Plugin, running: Task) -> None:
    """Whatever the value of a key is: an error in plain words, and the plugin goes on."""
    assert running.handle
    state = {**json.loads(running.handle.driver_state), "task_id": UNKNOWN}
    for key in state:
        for wrong in WRONG_VALUES:
            if key != "task_id" and wrong != state[key]:
                check_unrecoverable_handle(shared, json.dumps({**state, key: wrong}).encode())
        check_unrecoverable_handle(shared, json.dumps({k: v for k, v in state.items() if k != key}).encode())


def test_recovering_a_known_task_is_answered_at_once(shared: Plugin, running: Task, ended: Task) -> None:
    for task in (running, ended):
        begin = time.monotonic()
        task.recover(shared)
        task.recover(shared, agent_restart=False)
        assert time.monotonic() - begin < AT_ONCE


def test_handle_is_complete(running: Task) -> None:
    handle = running.handle
    assert handle
    assert handle.version > 0
    assert handle.config == running.task_config()
    assert handle.state == driver_pb2.RUNNING
    assert handle.driver_state


def test_result_is_there_for_code_0_too(shared: Plugin, ended: Task) -> None:
    for _ in range(2):
        response = call(shared.driver.WaitTask, driver_pb2.WaitTaskRequest(task_id=ended.id), HANG)
        assert response.HasField("result")
        assert response.result == driver_pb2.ExitResult()
        assert response.err == ""


def test_inspect_of_a_running_task_has_all_fields(running: Task) -> None:
    status = running.inspect().task
    assert status.id == running.id
    assert status.name
    assert status.state == driver_pb2.RUNNING
    assert status.HasField("started_at") and status.HasField("completed_at") and status.HasField("result")
    assert abs(status.started_at.ToSeconds() - time.time()) < 600


def test_inspect_of_an_ended_task_tells_when(ended: Task) -> None:
    status = ended.inspect().task
    assert status.state == driver_pb2.EXITED
    assert status.HasField("result")
    assert 0 <= status.completed_at.ToNanoseconds() - status.started_at.ToNanoseconds() < 60e9


def test_stats_have_what_an_agent_reads(shared: Plugin, running: Task) -> None:
    begin = time.monotonic()
    samples = []
    for stats in running.stats(0.2):
        samples.append(stats)
        if len(samples) == 3:
            break
    assert time.monotonic() - begin > 0.4
    for stats in samples:
        assert abs(stats.timestamp.ToSeconds() - time.time()) < 60
        cpu, memory = stats.agg_resource_usage.cpu, stats.agg_resource_usage.memory
        assert driver_pb2.CPUUsage.TOTAL_TICKS not in cpu.measured_fields
        assert driver_pb2.CPUUsage.PERCENT in cpu.measured_fields
        assert {driver_pb2.MemoryUsage.RSS, driver_pb2.MemoryUsage.USAGE} <= set(memory.measured_fields)
        assert memory.usage > 0 and memory.rss > 0
        assert 0 <= cpu.percent < 100 * (os.cpu_count() or 1) + 50
    assert len({stats.timestamp.ToNanoseconds() for stats in samples}) == 3


def test_stats_end_with_the_task(ended: Task) -> None:
    assert list(ended.stats(0.2)) == []


def test_running_task_is_not_destroyed_without_force(shared: Plugin, running: Task) -> None:
    error = failure(shared.driver.DestroyTask, driver_pb2.DestroyTaskRequest(task_id=running.id, force=False))
    assert "still running" in error.text and running.id in error.text
    assert running.inspect().task.state == driver_pb2.RUNNING


@pytest.mark.parametrize(
    "name", ["", "SIGNONE", "0", "-1", "65", "TERM; id", "SIGRTMIN+99", "9" * 10_000, "x" * 100_000]
)
def test_signal_that_is_none_is_refused(shared: Plugin, running: Task, name: str) -> None:
    request = driver_pb2.SignalTaskRequest(task_id=running.id, signal=name)
    error = failure(shared.driver.SignalTask, request)
    assert error.code == "INVALID_ARGUMENT"
    assert "SIGTERM" in error.text  # what to write instead


def test_signal_to_an_ended_task_is_an_error(shared: Plugin, ended: Task) -> None:
    request = driver_pb2.SignalTaskRequest(task_id=ended.id, signal="SIGHUP")
    assert "has ended" in failure(shared.driver.SignalTask, request).text


def test_same_task_is_not_started_twice(shared: Plugin, running: Task) -> None:
    assert running.handle
    request = driver_pb2.StartTaskRequest(task=running.handle.config)
    assert "running already" in failure(shared.driver.StartTask, request).text
    assert running.inspect().task.state == driver_pb2.RUNNING


WRONG_CONFIGS: list[tuple[object, str]] = [
    ({}, "image"),
    ({"image": None}, "image"),
    ({"image": ""}, "image"),
    ({"image": "/nonexistent/image"}, "image"),
    ({"image": 3}, "image"),
    ({"image": "a\0b"}, "image"),
    ({"image": "a" * 300}, "image"),
    ({"image": "/" + "a" * 5000}, "image"),
    ({"image": "/" + "ä" * 5000}, "image"),
    ({"image": "@", "boot": False, "command": ["a" * 200_000]}, "command"),
    ({"image": "@", "boot": False, "command": ["a" * 1000] * 3000}, "command"),
    ({"image": "/", "command": ["true"], "boot": False}, "image"),
    ({"image": "/dev/null"}, "image"),
    ({"image": "@", "boot": False}, "command"),
    ({"image": "@", "boot": "yes"}, "boot"),
    ({"image": "@", "process_two": True}, "process_two"),
    ({"image": "@", "command": "true"}, "command"),
    ({"image": "@", "console": "none"}, "console"),
    ({"image": "@", "volatile": "always"}, "volatile"),
    ({"image": "@", "working_directory": "relative"}, "working_directory"),
    ({"image": "@", "bind": [{"relative": "/x"}]}, "bind"),
    ({"image": "@", "bind": {"/x": "../y"}}, "bind"),
    ({"image": "@", "environment": [{"a b": "c"}]}, "environment"),
    ({"image": "@", "port_map": [{"http": 0}]}, "port_map"),
    ({"image": "@", "port_map": [{"http": 80}]}, "port_map"),
    ({"image": "@", "no_such_option": 1}, "no_such_option"),
    (b"\xc1", ""),
    ([1, 2], ""),
    (None, ""),
]


@pytest.mark.parametrize("value, option", WRONG_CONFIGS, ids=lambda value: repr(value)[:50])
def test_wrong_task_config_is_refused_in_words_and_leaves_nothing(
    shared: Plugin, image: Path, value: object, option: str
) -> None:
    if isinstance(value, dict) and value.get("image") == "@":
        value = {**value, "image": str(image)}
    raw = value if isinstance(value, bytes) else packed(value)
    with Allocation() as allocation:
        task_id = f"{allocation.id}/task/00000000"
        allocation.add_task("task")
        task = driver_pb2.TaskConfig(
            id=task_id,
            name="task",
            alloc_id=allocation.id,
            alloc_dir=str(allocation.dir),
            msgpack_driver_config=raw,
        )
        error = failure(shared.driver.StartTask, driver_pb2.StartTaskRequest(task=task))
        assert error.recoverable is False
        assert option in error.text
        assert failure(shared.driver.WaitTask, driver_pb2.WaitTaskRequest(task_id=task_id)).code == "NOT_FOUND"
        assert not list(STATE_ROOT.glob(f"{allocation.id}*"))


def test_nspawn_failing_is_an_error_of_the_start(shared: Plugin, image: Path) -> None:
    settings = config(image, "true", bind=[{"/nonexistent/source": "/mnt"}])
    with Allocation() as allocation, Task(shared, allocation, "task", settings) as task:
        with pytest.raises(DriverError) as caught:
            task.start()
        assert "/nonexistent/source" in caught.value.text
        check_text(caught.value.text)
        assert not list(STATE_ROOT.glob(f"{allocation.id}*"))


def test_unknown_task_option_stops_a_job_before_the_driver_sees_it(shared: Plugin, image: Path) -> None:
    with Allocation() as allocation:
        task = Task(shared, allocation, "task", config(image, "true", imagee="x"))
        with task, pytest.raises(ConfigError, match="imagee"):
            task.start()


def test_start_whose_agent_has_gone_leaves_nothing(shared: Plugin, image: Path) -> None:
    """The agent is killed while StartTask runs: the next one knows nothing of this task."""
    with Allocation() as allocation:
        task = Task(shared, allocation, "task", config(image, "exec sleep 600"))
        try:
            for delay in (0.005, 0.02, 0.05):
                task.id = f"{allocation.id}/task/{os.urandom(4).hex()}"
                task.prestart()
                start: Any = shared.driver.StartTask.future(driver_pb2.StartTaskRequest(task=task.task_config()))
                time.sleep(delay)
                start.cancel()
            call(shared.driver.DestroyTask, driver_pb2.DestroyTaskRequest(task_id=task.id, force=True), HANG)
            eventually(lambda: not list(STATE_ROOT.glob(f"{allocation.id}*")))
            machine = f"--machine=task-{allocation.id}"
            eventually(
                lambda: subprocess.run(["pgrep", "-f", "--", machine], stdout=subprocess.DEVNULL).returncode
            )
        finally:
            task.close()


# === Log =====================================================================================================


def test_log_of_a_whole_session_is_readable_and_keeps_secrets(driver_file: Path, image: Path) -> None:
    secret = "s3cr3t-value-of-the-job"
    with launch_like_agent(driver_file) as plugin:
        with Allocation() as allocation:
            settings = config(image, 'echo "$TOKEN"; exec sleep 60', environment=[{"PASSWORD": secret}])
            with Task(
                plugin, allocation, "task", settings, env={"TOKEN": secret, "LINES": f"{secret}\n2"}
            ) as task:
                task.start()
                task.logmon.wait_for(secret)
                task.signal("SIGWINCH")
                next(task.stats(0.1))
                task.inspect()
                task.stop(timeout=0.2)
                task.wait()
                task.destroy()
                task.driver_config = config(image, "true", bind=[{"/nonexistent": "/mnt"}])
                with pytest.raises(DriverError):
                    task.start()
                task.driver_config = config(image, "exit 3")
                task.start()
                task.wait()
            with pytest.raises(DriverError):
                call(plugin.driver.WaitTask, driver_pb2.WaitTaskRequest(task_id=UNKNOWN), HANG)
        plugin.kill(driver_shutdown=True)
    assert not plugin.violations
    assert plugin.log
    assert {entry.module for entry in plugin.log} == {"nspawn"}
    assert secret not in "\n".join(plugin.raw_log)
    ends = [entry for entry in plugin.log if "has ended" in entry.message]
    assert len(ends) == 2
    assert all(str(entry.fields["task"]).startswith(f"{allocation.id}/task/") for entry in ends)


def test_session_leaves_no_child_behind(shared: Plugin, ended: Task) -> None:
    """Ended shims are waited for: they would stay in the list of processes."""
    assert zombies(shared.pid) == []


# === Time ====================================================================================================


@pytest.mark.usefixtures("quiet")
def test_streams_stay_open_and_the_connection_is_kept(shared: Plugin, watcher: Watcher) -> None:
    """The last test, so that all streams are old by now: nothing has ended, nothing has been said twice, and a
    client that sends a ping every second is still welcome."""
    time.sleep(max(0.0, watcher.opened + FINGERPRINT_PERIOD + 2 - time.monotonic()))
    assert all(stream.is_active() for stream in watcher.streams)
    assert set(watcher.states) <= {grpc.ChannelConnectivity.READY}
    said = [found.SerializeToString(deterministic=True) for found in shared.fingerprints]
    assert len(said) == len(set(said)) <= 2, "the second time, where tasks of this agent are"
