# SPDX-License-Identifier: MPL-2.0
"""Which device nodes the processes of a cgroup may open or make, no matter who made the node, or where.

systemd calls this DevicePolicy=closed. The kernel asks a small BPF program, which is attached to the cgroup and
ends with it. The v2 hierarchy of hybrid hosts takes one, too (measured, Linux 6.18). Rules above the cgroup still
hold.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from nspawn.linux import call_libc


@dataclass(frozen=True)
class DeviceRule:
    """Allows device nodes."""

    is_block: bool
    major: int
    minor: int | None  # None: any
    permissions: str

    @classmethod
    def of(cls, mode: int, number: int, permissions: str) -> DeviceRule:
        """Return the rule for a node, by what stat(2) says of it."""
        return cls(stat.S_ISBLK(mode), os.major(number), os.minor(number), permissions)


# What systemd-nspawn puts into /dev, as its own machines may use it.
USUAL_DEVICES = (
    *(DeviceRule(False, 1, minor, "rwm") for minor in (3, 5, 7, 8, 9)),  # null, zero, full, random, urandom
    *(DeviceRule(False, 5, minor, "rwm") for minor in (0, 2)),  # tty, ptmx
    *(DeviceRule(False, 10, minor, "rwm") for minor in (200, 229)),  # net/tun, fuse
    DeviceRule(False, 136, None, "rw"),  # pts/*
)

BPF_BITS = {"m": 1, "r": 2, "w": 4}  # BPF_DEVCG_ACC_*
R_RESULT, R_CONTEXT, R_KIND, R_ACCESS, R_MAJOR, R_NUMBER = range(6)  # registers


def add_up(rules: Sequence[DeviceRule]) -> dict[tuple[bool, int, int | None], int]:
    """Return what may be done with each device, those of any minor last."""
    bits: dict[tuple[bool, int, int | None], int] = {}
    for rule in sorted(rules, key=lambda rule: rule.minor is not None):
        key, any_minor = (rule.is_block, rule.major, rule.minor), (rule.is_block, rule.major, None)
        bits[key] = bits.get(key, bits.get(any_minor, 0)) | sum(BPF_BITS[letter] for letter in rule.permissions)
    return dict(reversed(bits.items()))


def render_device_program(rules: Sequence[DeviceRule]) -> bytes:
    """Return the BPF program that allows what the rules for a device add up to, and nothing else."""

    def step(code: int, target: int = 0, source: int = 0, skip: int = 0, number: int = 0) -> bytes:
        return struct.pack("=BBhI", code, target | source << 4, skip, number & 0xFFFFFFFF)

    load, copy, put, leave, skip, unless, unless_32 = 0x61, 0xBF, 0xB7, 0x95, 0x05, 0x55, 0x56  # since Linux 5.1
    mask, mask_by, add_by, invert, left, right = 0x57, 0x5F, 0x4F, 0xA7, 0x67, 0x77
    # The context is a struct bpf_cgroup_dev_ctx: kind and access in one number, major, minor.
    start = [step(load, R_KIND, R_CONTEXT, 0), step(copy, R_ACCESS, R_KIND)]
    start += [step(mask, R_KIND, number=0xFFFF), step(right, R_ACCESS, number=16)]
    start += [step(load, R_MAJOR, R_CONTEXT, 4), step(load, R_NUMBER, R_CONTEXT, 8)]
    start += [step(copy, R_RESULT, R_MAJOR), step(left, R_RESULT, number=20), step(add_by, R_NUMBER, R_RESULT)]
    # The first row that is about the device tells what is allowed; then the rest is skipped. Rows that exit by
    # themselves would take the kernel's verifier a hundred times as long.
    rows: list[bytes | None] = [step(put, R_RESULT)]
    devices = add_up(rules)
    for kind, is_block in ((1, True), (2, False)):
        same = [(key, bits) for key, bits in devices.items() if key[0] is is_block]
        rows.append(step(unless, R_KIND, skip=3 * len(same), number=kind))
        for (_, major, minor), bits in same:
            place, number = (R_MAJOR, major) if minor is None else (R_NUMBER, major << 20 | minor)
            rows += [step(unless_32, place, skip=2, number=number), step(put, R_RESULT, number=bits), None]
    found = [row or step(skip, skip=len(rows) - at - 1) for at, row in enumerate(rows)]
    # Allowed is what asks for nothing else.
    end = [step(invert, R_RESULT, number=-1), step(mask_by, R_RESULT, R_ACCESS), step(unless, R_RESULT, skip=2)]
    end += [step(put, R_RESULT, number=1), step(leave), step(put, R_RESULT), step(leave)]
    return b"".join([*start, *found, *end])


BPF_CALL = {"x86_64": 321, "aarch64": 280}  # the number of bpf(2)
BPF_PROG_LOAD, BPF_PROG_ATTACH, BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI = 5, 8, 15, 6, 2


def call_bpf(command: int, attributes: bytes) -> int:
    number = BPF_CALL.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return call_libc("syscall", number, command, attributes, len(attributes))


def load_device_program(rules: Sequence[DeviceRule]) -> int:
    """Return a descriptor of the program for the rules. Raises OSError where the kernel takes none."""
    import ctypes

    program, license = render_device_program(rules), ctypes.create_string_buffer(b"MPL-2.0")
    steps = ctypes.create_string_buffer(program, len(program))
    places = ctypes.addressof(steps), ctypes.addressof(license)
    return call_bpf(
        BPF_PROG_LOAD, struct.pack("=IIQQ", BPF_PROG_TYPE_CGROUP_DEVICE, len(program) // 8, *places) + bytes(24)
    )


def restrict_devices(cgroup: str, rules: Sequence[DeviceRule]) -> None:
    """Let processes in a cgroup open what the rules allow, and nothing else. Raises OSError."""
    program = load_device_program(rules)
    try:
        folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Others, such as a booted systemd for its services, may add programs of their own below.
            call_bpf(BPF_PROG_ATTACH, struct.pack("=IIII", folder, program, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI))
        finally:
            os.close(folder)
    finally:
        os.close(program)


@functools.lru_cache(maxsize=1)
def can_restrict_devices() -> bool:
    """Whether the kernel takes such programs from this process."""
    try:
        os.close(load_device_program(USUAL_DEVICES))
    except OSError:
        return False
    return True
