# SPDX-License-Identifier: MPL-2.0
"""Looking files up in a container before it starts, and whether its program can be executed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nspawn.common import is_below, quote, render_value, shorten
from nspawn.images import read_opened
from nspawn.linux import open_in_root

# Errors that mean that there is no such file, not that something is wrong with this machine.
IS_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class View:
    """A container's root and its future mounts, to look up files before the container starts. Use it in a thread:
    the image or a task can make a look-up slow."""

    image: Path
    # Targets in the container to sources on the host; "" for what nobody can look into before the start.
    mounts: Mapping[str, str] = field(default_factory=dict)
    pivot: str = "/"  # the directory of the image that becomes the root

    def open(self, path: str, links: int = 8) -> int | None:
        """Return an O_PATH descriptor of a file, None if there is none. Follows at most `links` links that lead
        from the root into mounts. Raises OSError if it cannot tell."""
        path = "/" + "/".join(part for part in path.split("/") if part not in ("", "."))
        is_plain = ".." not in path.split("/")
        place = self.find_place(path) if is_plain else ""
        if place and not self.mounts[place]:
            raise OSError(errno.ESTALE, "is mounted when the container starts")
        root = os.open(self.mounts[place], os.O_PATH | os.O_CLOEXEC) if place else self.open_root()
        if place == path:
            return root
        try:
            return open_in_root(root, path[len(place) :], os.O_PATH, follow=not place)
        except OSError as error:
            if error.errno not in IS_MISSING or (place and error.errno == errno.ELOOP):
                raise
            if self.mounts and not is_plain:
                raise OSError(errno.ESTALE, "may be in a mount") from None
            leads = self.find_mount(root, path) if self.mounts and links and not place else ""
        finally:
            os.close(root)
        return self.open(leads, links - 1) if leads else None

    def find_place(self, path: str) -> str:
        """Return the target of the mount that a path is in, "" for the root itself."""
        return max((point for point in self.mounts if is_below(path, point)), key=len, default="")

    def have_links(self) -> bool:
        """Whether a mount is at another place than its target says, because a link leads there. Raises OSError."""
        root = self.open_root()
        try:
            for point in self.mounts:
                try:
                    os.close(open_in_root(root, os.path.dirname(point), os.O_PATH, follow=False))
                except OSError as error:
                    if error.errno == errno.ELOOP:
                        return True
                    if error.errno not in IS_MISSING:
                        raise
        finally:
            os.close(root)
        return False

    def open_root(self) -> int:
        top = os.open(self.image, os.O_PATH | os.O_CLOEXEC)
        try:
            return open_in_root(top, self.pivot, os.O_PATH)
        finally:
            os.close(top)

    def find_mount(self, root: int, path: str) -> str:
        """Resolve a link in a path that the root lacks: it may lead into a mount. Return "" if there is none."""
        parts = path.strip("/").split("/")
        for length in range(min(len(parts), MAX_PARTS) - 1, -1, -1):
            with contextlib.suppress(OSError):
                parent = open_in_root(root, "/".join(parts[:length]) or "/", os.O_PATH | os.O_DIRECTORY)
                try:
                    leads = self.follow(root, parent, parts[length])
                finally:
                    os.close(parent)
                leads = os.path.normpath("/".join([leads, *parts[length + 1 :]]))
                return leads if leads != path else ""
        return ""

    def follow(self, root: int, parent: int, name: str) -> str:
        """Return the container's path of a file in an open directory, or what it links to."""
        top, here = (os.readlink(f"/proc/self/fd/{fd}") for fd in (root, parent))
        here = f"/{here.removeprefix(top).lstrip('/')}"
        if not any(is_below(here, point) for point in self.mounts):
            with contextlib.suppress(OSError):  # no link
                name = os.readlink(name, dir_fd=parent)
        return os.path.join(here, name)


MAX_PARTS = 64  # of a path
MAX_PLACES = 64  # of a PATH


def explain_command(command: str, search: str, view: View, directory: str = "/") -> str:
    """Return why a program cannot be executed, "" if it can be or if that is not known. `directory` is the one it
    is started in."""
    places = [command] if "/" in command else [f"{place or '.'}/{command}" for place in search.split(":")]
    kinds = set()
    try:
        for place in places[:MAX_PLACES]:
            if (fd := find_program(os.path.join(directory, place), view)) is not None:
                try:
                    kinds.add(explain_program(fd, view))
                finally:
                    os.close(fd)
        if "" in kinds or view.have_links():
            return ""
    except OSError:
        return ""  # not known
    if not kinds:
        where = "in the container" if "/" in command else f"in the container's PATH ({quote(search)})"
        return f"command: there is no {render_value(shorten(command))} {where}"
    return f"command: {render_value(shorten(command))} in the container {min(kinds)}"


def find_program(path: str, view: View) -> int | None:
    """Open a program as View.open does. If the image has no /bin or the like, nspawn makes it a link into /usr."""
    found = view.open(path)
    top = path.split("/")[1] if path.startswith("/") else ""
    if found is not None or top not in ("bin", "sbin", "lib", "lib64"):
        return found
    if (folder := view.open(f"/{top}")) is not None:
        os.close(folder)
        return None
    return view.open(f"/usr{path}")


def explain_program(fd: int, view: View) -> str:
    """Return what is wrong with a program, "" if nothing is. Raises OSError."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) and mode & 0o111):
        return "is not an executable file"
    if is_foreign(fd):
        return f"is for another machine than this {os.uname().machine}"
    interpreter = find_interpreter(read_opened(fd, 4096))
    if not interpreter.startswith("/"):
        return ""
    if (found := find_program(interpreter, view)) is None:
        return f"needs the interpreter {quote(interpreter)}, which is not there"
    os.close(found)
    return ""


def find_interpreter(head: bytes) -> str:
    """Return the program that the kernel starts for a program, "" if it needs none or that is not known. `head` is
    the start of its file: "#!" and a path, or the headers of a 64-bit ELF file of this machine."""
    if head.startswith(b"#!"):
        return os.fsdecode((re.split(rb"[ \t\n\0]", head[2:256].lstrip(b" \t")) or [b""])[0])
    native = ELF_MACHINES.get(os.uname().machine, (0,))[0]
    if not (head.startswith(b"\x7fELF\x02\x01") and head[18:20] == native.to_bytes(2, "little")):
        return ""
    with contextlib.suppress(struct.error):
        start, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
        for number in range(min(count, 64)):
            kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", head, start + number * size)
            if kind == PT_INTERP and offset + length <= len(head):
                return os.fsdecode(head[offset : offset + length].partition(b"\0")[0])
    return ""


PT_INTERP = 3
ELF_MACHINES = {"x86_64": (62, 3), "aarch64": (183, 40)}  # e_machine of 64-bit and 32-bit programs
BINFMT_MISC = Path("/proc/sys/fs/binfmt_misc")


def is_foreign(fd: int) -> bool:
    """Whether a program is an ELF file for another architecture, and binfmt_misc has no qemu at all."""
    header, native = read_opened(fd, 20), ELF_MACHINES.get(os.uname().machine)
    if not native or len(header) < 20 or not header.startswith(b"\x7fELF"):
        return False
    machine = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return machine not in native and not list(BINFMT_MISC.glob("qemu-*"))
