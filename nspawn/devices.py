# SPDX-License-Identifier: MPL-2.0
"""Which device nodes the processes of a cgroup may open or make, no matter who made the node, or where.

systemd calls this DevicePolicy=closed. A small BPF program is attached to the cgroup, and the kernel asks it for
each access; the program is freed with the cgroup. This also works in the v2 hierarchy of hybrid hosts (measured,
Linux 6.18). Programs of the cgroups above still count.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nspawn.common import is_shortage
from nspawn.files import read_text
from nspawn.linux import call_libc


@dataclass(frozen=True)
class DeviceRule:
    """Allows one device node, or all of one major."""

    is_block: bool
    major: int
    minor: int | None  # None: any
    permissions: str  # letters: r to read, w to write, m to make the node

    @classmethod
    def of(cls, mode: int, number: int, permissions: str) -> DeviceRule:
        """Return the rule for a node. `mode` and `number` are st_mode and st_rdev."""
        return cls(stat.S_ISBLK(mode), os.major(number), os.minor(number), permissions)


# The nodes that systemd-nspawn makes in /dev, with what its own scope units allow.
USUAL_DEVICES = (
    *(DeviceRule(False, 1, minor, "rwm") for minor in (3, 5, 7, 8, 9)),  # null, zero, full, random, urandom
    *(DeviceRule(False, 5, minor, "rwm") for minor in (0, 2)),  # tty, ptmx
    *(DeviceRule(False, 10, minor, "rwm") for minor in (200, 229)),  # net/tun, fuse
    DeviceRule(False, 136, None, "rw"),  # pts/*
)


def parse_majors(text: str, is_block: bool, pattern: str) -> list[int]:
    """Return the majors of the classes that match a pattern. `text`: the content of /proc/devices."""
    characters, _, blocks = text.partition("Block devices:")
    lines = map(str.split, (blocks if is_block else characters).splitlines())
    return [int(words[0]) for words in lines if len(words) == 2 and fnmatch.fnmatchcase(words[1], pattern)]


def find_nodes(is_block: bool, major: int) -> Iterator[str]:
    """Yield the paths in /dev of the devices of a major that there are now. Raises OSError."""
    folder = f"/sys/dev/{'block' if is_block else 'char'}"
    for number in sorted(os.listdir(folder)):
        if number.startswith(f"{major}:"):
            name = re.search("^DEVNAME=(.+)$", read_text(Path(folder, number, "uevent")), re.MULTILINE)
            if name and os.path.exists(path := f"/dev/{name[1]}"):
                yield path


BPF_BITS = {"m": 1, "r": 2, "w": 4}  # BPF_DEVCG_ACC_*
BPF_BLOCK, BPF_CHAR = 1, 2  # BPF_DEVCG_DEV_*
RESULT, CONTEXT, KIND, ACCESS, MAJOR, MINOR = range(6)  # registers
LOAD, COPY, SET, AND, OR_BY, SHIFT_LEFT, SHIFT_RIGHT, JUMP_UNLESS, EXIT = (
    0x61, 0xBF, 0xB7, 0x57, 0x4F, 0x67, 0x77, 0x55, 0x95
)  # fmt: skip


def step(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """Return one BPF instruction. JUMP_UNLESS skips `offset` instructions unless the register holds `value`."""
    return struct.pack("=BBhI", code, target | source << 4, offset, value & 0xFFFFFFFF)


def render_device_program(rules: Sequence[DeviceRule]) -> bytes:
    """Return the BPF program that allows what the rules for a device add up to, and nothing else.

    It tests each major and each minor once: then the verifier's time grows only linearly with the rules (40 ms for
    4,000 of them, Linux 6.18).
    """
    allowed: dict[int, dict[int | None, int]] = {}
    for rule in rules:
        minors = allowed.setdefault(rule.major << 2 | (BPF_BLOCK if rule.is_block else BPF_CHAR), {})
        minors[rule.minor] = minors.get(rule.minor, 0) | sum(BPF_BITS[letter] for letter in rule.permissions)
    # The context is a struct bpf_cgroup_dev_ctx: kind and access in one number, major, minor.
    steps = [step(LOAD, KIND, CONTEXT, 0), step(COPY, ACCESS, KIND), step(AND, KIND, value=0xFFFF)]
    steps += [step(SHIFT_RIGHT, ACCESS, value=16), step(LOAD, MINOR, CONTEXT, 8)]
    steps += [step(LOAD, MAJOR, CONTEXT, 4), step(SHIFT_LEFT, MAJOR, value=2), step(OR_BY, MAJOR, KIND)]
    for major, minors in allowed.items():
        rows = render_minors(minors)
        steps += [step(JUMP_UNLESS, MAJOR, offset=len(rows), value=major), *rows]
    return b"".join([*steps, *render_answer(0)])


def render_minors(minors: Mapping[int | None, int]) -> list[bytes]:
    """Return the steps for one major; the rules for any minor also hold for each single one."""
    steps, of_any = [], minors.get(None, 0)
    for minor, bits in minors.items():
        if minor is not None:
            answer = render_answer(bits | of_any)
            steps += [step(JUMP_UNLESS, MINOR, offset=len(answer), value=minor), *answer]
    return steps + render_answer(of_any)


def render_answer(bits: int) -> list[bytes]:
    """Return the steps that allow an access if it asks for nothing but `bits`."""
    refuse, allow = step(SET, RESULT, value=0), step(SET, RESULT, value=1)
    return [step(AND, ACCESS, value=~bits), refuse, step(JUMP_UNLESS, ACCESS, offset=1), allow, step(EXIT)]


BPF_CALL = {"x86_64": 321, "aarch64": 280}  # the number of bpf(2)
BPF_PROG_LOAD, BPF_PROG_ATTACH, BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI = 5, 8, 15, 6, 2


def call_bpf(command: int, attributes: bytes) -> int:
    """Call bpf(2). Raises OSError, ENOSYS on machines whose call number is not known here."""
    number = BPF_CALL.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return call_libc("syscall", number, command, attributes, len(attributes))


def load_device_program(rules: Sequence[DeviceRule]) -> int:
    """Load the program for the rules and return its descriptor. Raises OSError if the kernel refuses."""
    import ctypes

    program, license = render_device_program(rules), ctypes.create_string_buffer(b"MPL-2.0")
    steps = ctypes.create_string_buffer(program, len(program))
    addresses = ctypes.addressof(steps), ctypes.addressof(license)
    return call_bpf(
        BPF_PROG_LOAD, struct.pack("=IIQQ", BPF_PROG_TYPE_CGROUP_DEVICE, len(program) // 8, *addresses) + bytes(24)
    )


def restrict_devices(cgroup: str, rules: Sequence[DeviceRule]) -> None:
    """Let the processes of a cgroup use the devices that the rules allow, and no others. Raises OSError."""
    program = load_device_program(rules)
    try:
        folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # ALLOW_MULTI: a booted systemd may attach programs for its services below this cgroup.
            call_bpf(BPF_PROG_ATTACH, struct.pack("=IIII", folder, program, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI))
        finally:
            os.close(folder)
    finally:
        os.close(program)


@functools.lru_cache(maxsize=1)
def can_restrict_devices() -> bool:
    """Whether this process can load such a program. Raises OSError if the host cannot tell now."""
    try:
        os.close(load_device_program(USUAL_DEVICES))
    except OSError as error:
        if is_shortage(error):  # the answer is kept
            raise
        return False
    return True
