# SPDX-License-Identifier: MPL-2.0
"""Errors: every one maps to a status Nomad understands, and its text is a sentence for people."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import driver
from nomad_pb import recoverable_error_pb2, rpc_status_pb2
from nspawn.common import ConfigError, DriverError, HostError, TaskNotFound, TransientError
from nspawn.options import decode_options


def walk(kind: type[DriverError]) -> Iterator[type[DriverError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from walk(child)


TREE = tuple(dict.fromkeys(walk(DriverError)))
CODES = {
    "DriverError": "FAILED_PRECONDITION",
    "ConfigError": "INVALID_ARGUMENT",
    "HostError": "FAILED_PRECONDITION",
    "TransientError": "FAILED_PRECONDITION",
    "TaskNotFound": "NOT_FOUND",
    "Unsupported": "UNIMPLEMENTED",
}


def make(kind: type[DriverError]) -> DriverError:
    if kind is ConfigError:
        return ConfigError("volatile", "maybe", "must be one of no, yes", "leave it out")
    if kind is TaskNotFound:
        return TaskNotFound("a/web/0")
    return kind("the disk is full")


def find_code(error: DriverError) -> str:
    return next(code for kind, code in driver.STATUS_CODES if isinstance(error, kind))


class Context:
    """What a gRPC context is asked for at the end of a failed call."""

    code: Any = None
    text = ""
    metadata: tuple[tuple[str, bytes], ...] = ()

    async def abort(self, code: Any, text: str, trailing_metadata: tuple[tuple[str, bytes], ...]) -> None:
        self.code, self.text, self.metadata = code, text, trailing_metadata


def test_tree_is_the_one_in_the_table() -> None:
    assert {kind.__name__ for kind in TREE} == set(CODES)


@pytest.mark.parametrize("kind", TREE)
def test_code(kind: type[DriverError]) -> None:
    assert find_code(make(kind)) == CODES[kind.__name__]


def test_codes_exist_and_are_not_those_of_a_dead_plugin() -> None:
    for _, code in driver.STATUS_CODES:
        assert code in grpc.StatusCode.__members__
        assert code not in ("OK", "UNAVAILABLE", "CANCELLED", "UNKNOWN")


def test_table_has_subclasses_before_their_parents() -> None:
    """Otherwise a row could never be reached."""
    kinds = [kind for kind, _ in driver.STATUS_CODES]
    for place, kind in enumerate(kinds):
        assert not any(issubclass(kind, earlier) for earlier in kinds[:place]), kind
    assert kinds[-1] is DriverError


@pytest.mark.parametrize("kind", TREE)
def test_only_transient_errors_are_tried_again(kind: type[DriverError]) -> None:
    assert make(kind).recoverable is issubclass(kind, TransientError)


@pytest.mark.parametrize("kind", TREE)
def test_abort_says_the_same_in_status_and_details(kind: type[DriverError]) -> None:
    """grpc-go makes INTERNAL of a status whose details have another code or message."""
    error, context = make(kind), Context()
    asyncio.run(driver.abort(context, error))
    ((key, packed),) = context.metadata
    status = rpc_status_pb2.Status.FromString(packed)
    assert key == "grpc-status-details-bin"
    assert context.code is getattr(grpc.StatusCode, CODES[kind.__name__])
    assert status.code == context.code.value[0]
    assert status.message == context.text == str(error)
    (detail,) = status.details
    assert detail.type_url == "type.googleapis.com/hashicorp.nomad.plugins.shared.structs.RecoverableError"
    recoverable = recoverable_error_pb2.RecoverableError.FromString(detail.value).recoverable
    assert recoverable is error.recoverable


@pytest.mark.parametrize("kind", TREE)
def test_no_class_name_in_the_text(kind: type[DriverError]) -> None:
    text = str(make(kind))
    assert text
    assert not re.search(r"Error\b|Exception|Unsupported|NotFound|<class|Traceback", text)


def test_config_error_names_option_value_rule_and_remedy() -> None:
    error = ConfigError("volatile", "maybe", "must be one of no, yes", "leave it out")
    assert str(error) == 'volatile = "maybe": must be one of no, yes; leave it out'
    assert error.option == "volatile"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        ("ä", '"ä"'),
        ("a\nb", '"a\\nb"'),
        ([1, "b"], '[1, "b"]'),
        ({"a": "b"}, '{"a": "b"}'),
        ({1, 2}, '"{1, 2}"'),
    ],
)
def test_config_error_shows_values_as_jobs_have_them(value: object, shown: str) -> None:
    assert str(ConfigError("x", value, "is wrong")) == f"x = {shown}: is wrong"


@pytest.mark.parametrize("length", [190, 198, 199, 1000, 1 << 20])
def test_config_error_cuts_long_values(length: int) -> None:
    text = str(ConfigError("image", "a" * length, "is wrong"))
    assert len(text) <= len("image = ") + 201 + len(": is wrong")
    assert ("…" in text) is (length + 2 > 200)
    assert text.endswith(": is wrong")


@pytest.mark.parametrize("name", ["bind", "bind_read_only", "port_map", "environment"])
def test_config_error_cuts_long_keys(name: str) -> None:
    """The keys of a map are the job's, too."""
    with pytest.raises(ConfigError) as caught:
        decode_options(driver.TASK_OPTIONS, {"image": "a", name: [{"k" * 10_000: "?"}, {"-": ""}]})
    assert len(str(caught.value)) < 1000


def test_task_not_found_names_the_task() -> None:
    assert str(TaskNotFound("a/web/0")) == (
        "task a/web/0 is not known to this plugin, and nothing of it is left on this machine"
    )


def test_errors_for_people_pass_as_they_are() -> None:
    error = HostError("the disk is full")
    assert driver.as_driver_error(error) is error


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EMFILE, "the plugin has no free file descriptors; raise LimitNOFILE= of the Nomad agent's unit"),
        (errno.EAGAIN, "this machine lets the plugin start no further process or thread; raise TasksMax= "),
        (errno.ENOSPC, 'no space is left on the disk ("/run/a\\nb")'),
        (errno.EROFS, 'the file system is read-only ("/run/a\\nb")'),
    ],
)
def test_shortage_is_a_sentence_and_may_pass(number: int, sentence: str) -> None:
    failure = driver.as_driver_error(OSError(number, os.strerror(number), "/run/a\nb"))
    assert str(failure).startswith(sentence) or sentence in str(failure)
    assert failure.recoverable


def test_other_errors_of_the_machine_are_sentences() -> None:
    failure = driver.as_driver_error(PermissionError(errno.EPERM, os.strerror(errno.EPERM), b"/sys/x"))
    assert str(failure) == "this machine does not let the plugin do its work: Operation not permitted (/sys/x)"
    assert not failure.recoverable
    assert "memory" in str(driver.as_driver_error(MemoryError()))


def test_other_errors_are_logged_and_said_in_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError("secret")
    except KeyError as error:
        failure = driver.as_driver_error(error)
    assert str(failure) == "internal error of the driver, see the agent's log: 'secret'"
    assert not failure.recoverable
    line = capfd.readouterr().err
    assert '"@level": "error"' in line and "KeyError" in line and line.count("\n") == 1
