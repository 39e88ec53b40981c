# SPDX-License-Identifier: MPL-2.0
"""The health of a booted system, as its systemd tells it: an event when it changes.

systemd has a socket for its own tools, /run/systemd/private, where it speaks D-Bus. It tells everybody there when
the number of failed units changes. It refuses processes that it cannot see, so a command inside makes the
connection (measured on 252, 257 and 262). The command ends at once, and the plugin keeps the socket: nothing runs
for this, on the host or inside.

What is in the socket may be anything, and as much as the container likes. What takes too long or is too much ends
the connection, and the next one is made later. A container may also send descriptors. The kernel closes them for a
receiver that does not want them, and a closed socket may linger: so they are never received, and a connection that
may have some is closed in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from nspawn.common import DriverError, quote, render_line, shorten
from nspawn.entries import ExecServer
from nspawn.exec import Exec
from nspawn.files import read_text, write_file
from nspawn.inits import ROOT, SYSTEMD, read_init, wait_init
from nspawn.process import DESCRIPTORS, run_in_thread
from nspawn.state import State

PLACE = "/run/systemd/private"
PATIENCE = 30.0  # seconds for a connection or an answer
SETTLE = 1.0  # seconds from a change to the question: much may change at once
FIRST_PAUSE, LAST_PAUSE = 1.0, 900.0  # seconds between two events; they double while changes go on
FIRST_RETRY = 1.0  # seconds to the next connection; doubled as well
CHUNK = 64 << 10  # bytes read at a time
MAX_MESSAGE = 1 << 20  # bytes
MAX_TRAFFIC, TRAFFIC_PERIOD = 2 << 20, 10.0  # bytes in so many seconds; the boot of a Debian is 0.5 MB
MAX_NAMES, MAX_NAME = 5, 100  # of failed units in an event; characters


@dataclass(frozen=True)
class Health:
    """What systemd says of the whole system."""

    state: str  # as in `systemctl is-system-running`
    failed: tuple[str, ...] = ()  # names of units

    @property
    def is_settled(self) -> bool:
        """Whether it is neither booting nor shutting down, nor has changed between the two answers."""
        return self.state in ("running", "maintenance") or (self.state == "degraded" and bool(self.failed))

    def render(self, before: str) -> str:
        """Return the sentence for an event. `before`: the sentence that was told last, "" if none was."""
        if self.state == "running":
            return AGAIN if before not in ("", RUNNING, AGAIN) else before or RUNNING
        if self.state == "maintenance":
            return "The system inside is in its rescue or emergency shell."
        names = [shorten(render_line(quote(name)), MAX_NAME) for name in self.failed[:MAX_NAMES]]
        more = f" and {len(self.failed) - MAX_NAMES} more" if len(self.failed) > MAX_NAMES else ""
        return f"The system inside is degraded. Failed units: {', '.join(names)}{more}."


RUNNING, AGAIN = "The system inside is running.", "The system inside is running again."


# -- D-Bus ---------------------------------------------------------------------------------------------------

OBJECT, MANAGER = "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"
CALL, REPLY, ERROR, SIGNAL = 1, 2, 3, 4
# Byte order, kind, flags, version, size of the body, serial, size of the fields.
HEADER = struct.Struct("<BBBBIII")


def pad(data: bytes, boundary: int) -> bytes:
    return data + bytes(-len(data) % boundary)


def pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data + b"\0"


def pack_call(serial: int, interface: str, method: str, signature: str, body: bytes) -> bytes:
    """Return a call of a method of systemd's manager."""
    fields = b""
    for code, kind, value in ((1, "o", OBJECT), (2, "s", interface), (3, "s", method)):
        fields = pad(fields, 8) + bytes([code, 1]) + kind.encode() + b"\0" + pack_string(value)
    fields = pad(fields, 8) + b"\x08\x01g\0" + bytes([len(signature)]) + signature.encode() + b"\0"
    header = HEADER.pack(ord("l"), CALL, 0, 1, len(body), serial, len(fields))
    return pad(header + fields, 8) + body


STATE = pad(pack_string(MANAGER), 4) + pack_string("SystemState")
ASK_STATE = ("org.freedesktop.DBus.Properties", "Get", "ss", STATE)
ASK_FAILED = (MANAGER, "ListUnitsFiltered", "as", struct.pack("<I", 11) + pack_string("failed"))
# In the signals that may mean another health.
CHANGES = (b"NFailedUnits", b"StartupFinished", b"rescue.target", b"emergency.target")


def unpack_string(data: bytes, at: int) -> tuple[str, int]:
    """Return a string and where it ends. Raises ValueError."""
    at += -at % 4
    try:
        (size,) = struct.unpack_from("<I", data, at)
    except struct.error:
        raise ValueError("cut off") from None
    end = at + 4 + size + 1
    if end > len(data):
        raise ValueError("cut off")
    return data[at + 4 : end - 1].decode(errors="replace"), end


def parse_state(body: bytes) -> str:
    """Return the string in a variant. Raises ValueError."""
    if body[:3] != b"\x01s\0":
        raise ValueError("no string")
    return unpack_string(body, 3)[0]


def parse_units(body: bytes) -> tuple[str, ...]:
    """Return the names of an array of units, of the type (ssssssouso). Raises ValueError."""
    if len(body) < 8:
        raise ValueError("no array")
    names, at = [], 8
    while at < len(body):
        at += -at % 8
        name, at = unpack_string(body, at)
        for _ in range(6):
            _, at = unpack_string(body, at)
        at += -at % 4 + 4
        for _ in range(2):
            _, at = unpack_string(body, at)
        names.append(name)
    return tuple(names)


def find_reply_serial(fields: bytes) -> int:
    """Return the serial of the call that a message answers. Raises ValueError."""
    at = fields.find(b"\x05\x01u\0")
    if at < 0 or at + 8 > len(fields):
        raise ValueError("answers nothing")
    return int.from_bytes(fields[at + 4 : at + 8], "little")


class Connection:
    """A connection to a container's systemd. It is read all the time: systemd would wait for a slow reader."""

    def __init__(self, fd: int, server: ExecServer) -> None:
        self.server = server
        self.socket = socket.socket(fileno=fd)
        self.socket.setblocking(False)
        self.loop = asyncio.get_running_loop()
        self.buffer = bytearray()
        self.is_accepted = self.is_hostile = False
        self.serial = 0
        self.replies: dict[int, asyncio.Future[bytes]] = {}
        self.changed, self.over = asyncio.Event(), asyncio.Event()
        self.traffic, self.since = 0, self.loop.time()
        self.loop.add_reader(self.socket, self.receive)
        self.send(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")

    def close(self) -> None:
        if not self.over.is_set():
            self.over.set()
            self.changed.set()
            self.loop.remove_reader(self.socket)
            self.server.run(run_in_thread(self.socket.close))
            for reply in self.replies.values():
                reply.cancel()

    def send(self, data: bytes) -> None:
        try:
            if self.socket.send(data) == len(data):
                return
        except OSError:
            pass
        self.close()

    def receive(self) -> None:
        try:
            data, _, flags, _ = self.socket.recvmsg(CHUNK, 0, socket.MSG_PEEK)
            if flags & socket.MSG_CTRUNC:
                self.is_hostile = True
                raise ValueError("descriptors")
            data = self.socket.recv(len(data))
            now = self.loop.time()
            if now > self.since + TRAFFIC_PERIOD:
                self.traffic, self.since = 0, now
            self.traffic += len(data)
            if not data or self.traffic > MAX_TRAFFIC:
                raise ValueError("ended, or too much")
            self.buffer += data
            if not self.is_accepted:
                self.take_greeting()
            while self.is_accepted and self.take_message():
                pass
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            self.close()

    def take_greeting(self) -> None:
        """Read the answers to AUTH, DATA and BEGIN, which are lines. Raises ValueError."""
        lines = bytes(self.buffer[:CHUNK]).split(b"\r\n")
        if len(lines) < 3:
            if len(self.buffer) > 1000:
                raise ValueError("no D-Bus")
            return
        if lines[0] != b"DATA" or not lines[1].startswith(b"OK "):
            raise ValueError("refused")
        del self.buffer[: len(lines[0]) + len(lines[1]) + 4]
        self.is_accepted = True
        self.changed.set()

    def take_message(self) -> bool:
        """Take a message from the buffer; return whether a whole one was there. Raises ValueError."""
        if len(self.buffer) < HEADER.size:
            return False
        order, kind, _, _, body_size, _, fields_size = HEADER.unpack_from(self.buffer)
        begin = HEADER.size + fields_size + -fields_size % 8
        if order != ord("l") or begin + body_size > MAX_MESSAGE:
            raise ValueError("no message, or a large one")
        if len(self.buffer) < begin + body_size:
            return False
        message = bytes(self.buffer[: begin + body_size])
        del self.buffer[: begin + body_size]
        if kind == SIGNAL and any(word in message for word in CHANGES):
            self.changed.set()
        if kind in (REPLY, ERROR):
            reply = self.replies.pop(find_reply_serial(message[HEADER.size : begin]), None)
            if reply and not reply.done():
                reply.set_result(message[begin:] if kind == REPLY else b"")
        return True

    def call(self, interface: str, method: str, signature: str, body: bytes) -> asyncio.Future[bytes]:
        """Return what will be the body of the answer, b"" for an error."""
        self.serial += 1
        reply = self.replies[self.serial] = self.loop.create_future()
        self.send(pack_call(self.serial, interface, method, signature, body))
        return reply

    async def ask(self) -> Health:
        """Raises ValueError if there is no answer that can be understood."""
        replies = [self.call(*ASK_STATE), self.call(*ASK_FAILED)]
        if not self.over.is_set():
            await asyncio.wait(replies, timeout=PATIENCE)
        state, failed = (reply.result() if reply.done() and not reply.cancelled() else b"" for reply in replies)
        return Health(parse_state(state), parse_units(failed))


async def connect(server: ExecServer, state: State, ended: asyncio.Event) -> Connection | None:
    """Connect to the container's systemd; None if that is not possible now."""
    run = Exec(server, state, ended, (PLACE,), merge=True, connects=True, inside=ROOT)
    try:
        await asyncio.wait_for(run.start(), PATIENCE)
        if await asyncio.wait_for(run.wait(), PATIENCE) or DESCRIPTORS.is_among_last(run.stdin):
            return None
        fd, run.stdin = run.stdin, -1
        return Connection(fd, server)
    except (DriverError, OSError, asyncio.TimeoutError):
        return None
    finally:
        run.close()


class HealthWatch:
    """Tells the health of a booted system when it has changed."""

    def __init__(
        self, server: ExecServer, state: State, ended: asyncio.Event, tell: Callable[[str], None]
    ) -> None:
        self.server, self.state, self.ended, self.tell = server, state, ended, tell
        self.file = state.directory / "health"  # the sentence that was told last, also by a plugin before this one
        self.told = ""
        self.loop = asyncio.get_running_loop()
        self.pause, self.told_at = FIRST_PAUSE, -LAST_PAUSE

    async def run(self) -> None:
        """Watch until the task has ended, or until it turns out that this is not the systemd it says it is."""
        leader = self.state.leader
        if leader is None:
            return
        await wait_init(leader.pid, self.ended)
        with contextlib.suppress(OSError):
            self.told = read_text(self.file)
        retry = FIRST_RETRY
        while not self.ended.is_set():
            await asyncio.sleep(retry)
            if (await run_in_thread(lambda: read_init(leader.pid))).name != SYSTEMD:
                return  # another init, or systemd-shutdown
            begun = self.loop.time()
            if connection := await connect(self.server, self.state, self.ended):
                with contextlib.closing(connection), contextlib.suppress(ValueError):
                    await self.follow(connection)
                if connection.is_hostile:
                    return
            retry = min(2 * retry, LAST_PAUSE) if self.loop.time() < begun + LAST_PAUSE else FIRST_RETRY

    async def follow(self, connection: Connection) -> None:
        """Raises ValueError when the connection is of no more use."""
        while True:
            await connection.changed.wait()
            await asyncio.sleep(SETTLE)
            connection.changed.clear()
            health = await connection.ask()
            sentence = health.render(self.told)
            if health.is_settled and sentence != self.told:
                self.emit(sentence)
                await asyncio.sleep(self.pause)

    def emit(self, sentence: str) -> None:
        now = self.loop.time()
        self.pause = FIRST_PAUSE if now > self.told_at + LAST_PAUSE else min(2 * self.pause, LAST_PAUSE)
        self.told, self.told_at = sentence, now
        self.tell(sentence)
        with contextlib.suppress(OSError):  # then the next plugin tells it once more
            write_file(self.file, sentence)
