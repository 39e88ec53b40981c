# SPDX-License-Identifier: MPL-2.0
"""What nspawn says in the notify socket. Its payload can send lines there, too: nothing is believed by itself."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@contextlib.contextmanager
def listen(path: Path) -> Iterator[socket.socket]:
    """Yield a notify socket, in a directory that only root can enter: nobody else can send."""
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_UNIX, kind) as notify:
        notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        notify.bind(str(path))
        try:
            yield notify
        finally:
            path.unlink(missing_ok=True)


async def wait_claim(notify: socket.socket, ended: asyncio.Task[None]) -> Claim | None:
    """Wait for READY, and return what nspawn said of the leader before that; None if the shim has `ended` without
    it. Reads lines, because nspawn is free to split its messages into datagrams."""
    loop = asyncio.get_running_loop()
    wake, claim = asyncio.Event(), None
    loop.add_reader(notify.fileno(), wake.set)
    ended.add_done_callback(lambda _: wake.set())
    try:
        while True:
            is_over = ended.done()  # before reading, so that nspawn's last words are not missed
            wake.clear()
            for sender, line in read_notifications(notify):
                claim = claim or parse_claim(sender, line)
                if line == b"READY=1" and claim:
                    return claim
            if is_over:
                return None
            await wake.wait()
    finally:
        loop.remove_reader(notify.fileno())


def read_notifications(notify: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Yield the lines waiting in a notify socket, each with its sender's pid as the kernel gives it (0: none)."""
    with contextlib.suppress(BlockingIOError):
        while True:
            data, ancillary, _, _ = notify.recvmsg(65536, socket.CMSG_SPACE(CREDENTIALS.size))
            senders = [packed for _, kind, packed in ancillary if kind == socket.SCM_CREDENTIALS]
            sender = CREDENTIALS.unpack(senders[0])[0] if senders else 0
            yield from ((sender, line) for line in split_notification(data))


CREDENTIALS = struct.Struct("iii")  # pid, uid and gid


def split_notification(data: bytes) -> list[bytes]:
    """Return the lines of a datagram, which end at \\n alone: nspawn passes on its payload's STATUS, which may
    hold the other characters at which splitlines() splits."""
    return data.split(b"\n")


@dataclass(frozen=True)
class Claim:
    """The leader as a message names it. Do not trust it before check_leader."""

    sender: int
    leader: int


def parse_claim(sender: int, line: bytes) -> Claim | None:
    match = re.fullmatch(rb"X_NSPAWN_LEADER_PID=([0-9]{1,9})", line)
    return Claim(sender, int(match[1])) if match else None
