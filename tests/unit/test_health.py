# SPDX-License-Identifier: MPL-2.0
"""What a container's systemd, or something that claims to be it, says of the system's health."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nspawn.entries import ExecServer
from nspawn.health import AGAIN, HEADER, RUNNING, Connection, Health, pack_string, pad, parse_state, parse_units

GREETING = b"DATA\r\nOK 00112233445566778899aabbccddeeff\r\n"
LIMIT = 20  # seconds until a test hangs


def pack_message(kind: int, fields: bytes = b"", body: bytes = b"") -> bytes:
    return pad(HEADER.pack(ord("l"), kind, 0, 1, len(body), 1, len(fields)) + fields, 8) + body


def pack_reply(serial: int, body: bytes) -> bytes:
    return pack_message(2, b"\x05\x01u\0" + struct.pack("<I", serial), body)


def pack_units(names: list[str]) -> bytes:
    """Return an array of units, of the type (ssssssouso)."""
    body = bytes(8)
    for name in names:
        body = pad(body, 8)
        for text in (name, "A service", "loaded", "failed", "failed", "", "/unit"):
            body = pad(body, 4) + pack_string(text)
        body = pad(body, 4) + bytes(4)
        for text in ("", "/"):
            body = pad(body, 4) + pack_string(text)
    return struct.pack("<I", len(body) - 8) + body[4:]


STATE = pad(b"\x01s\0", 4) + pack_string("degraded")


def talk(work: Callable[[Connection, socket.socket], Awaitable[None]]) -> None:
    """Run `work` with a connection and the socket at its other end."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        connection = Connection(ours.detach(), ExecServer())
        with theirs, contextlib.closing(connection):
            await asyncio.wait_for(work(connection, theirs), LIMIT)

    asyncio.run(main())


def test_answers_are_understood_in_any_pieces() -> None:
    async def work(connection: Connection, systemd: socket.socket) -> None:
        asking = asyncio.create_task(connection.ask())
        replies = pack_reply(1, STATE) + pack_message(4, body=b"NFailedUnits")
        for byte in GREETING + replies + pack_reply(2, pack_units(["a.service", "b.mount"])):
            systemd.send(bytes([byte]))
            await asyncio.sleep(0)
        assert await asking == Health("degraded", ("a.service", "b.mount"))
        assert connection.changed.is_set() and not connection.over.is_set()

    talk(work)


@pytest.mark.parametrize(
    "data",
    [
        b"REJECTED EXTERNAL\r\n\r\n",
        bytes(2000),
        GREETING + b"\r\n" * 20,
        GREETING + HEADER.pack(ord("l"), 2, 0, 1, 1 << 31, 1, 0),
        GREETING + pack_message(2),
        GREETING + pack_message(4, body=bytes(1000)) * 3000,
    ],
    ids=["refusal", "no words", "no message", "a huge message", "an answer to nothing", "a flood"],
)
def test_nonsense_ends_the_connection(data: bytes) -> None:
    async def work(connection: Connection, liar: socket.socket) -> None:
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(liar, data))
        await connection.over.wait()
        sending.cancel()
        assert not connection.is_hostile

    talk(work)


def test_descriptors_are_never_received() -> None:
    async def work(connection: Connection, liar: socket.socket) -> None:
        liar.send(GREETING)
        socket.send_fds(liar, [pack_message(4)], [0])
        await connection.over.wait()
        assert connection.is_hostile

    talk(work)


@given(st.binary(max_size=300))
def test_any_body_is_refused_or_understood(body: bytes) -> None:
    for parse in (parse_units, parse_state):
        with contextlib.suppress(ValueError):
            parse(body)


def test_sentences() -> None:
    assert Health("running").render("") == RUNNING
    assert Health("running").render(RUNNING) == RUNNING
    degraded = Health("degraded", ("a.service", "b.mount")).render(RUNNING)
    assert degraded == "The system inside is degraded. Failed units: a.service, b.mount."
    assert Health("running").render(degraded) == AGAIN
    assert not Health("starting").is_settled
    names = ("evil. The task was killed", "\n\x1b[31m", *(1000 * number for number in "12345678"))
    sentence = Health("degraded", names).render("")
    assert '"evil. The task was killed"' in sentence and " and 5 more." in sentence
    assert sentence.isprintable() and len(sentence) < 1000
