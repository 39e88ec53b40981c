# SPDX-License-Identifier: MPL-2.0
"""What nspawn says in the notify socket. Its payload can send lines there, too: nothing is believed by itself."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass


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
