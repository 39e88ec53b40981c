# SPDX-License-Identifier: MPL-2.0
"""Reading, writing and removing files and trees."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nspawn.common import SAFE_PATH, is_shortage, log
from nspawn.linux import RESOLVE_NO_XDEV, openat2


def read_text(path: Path) -> str:
    """Return the text of a file, "" if it cannot be read. Raises OSError if the host lacks what reading takes,
    which says nothing about the file. Line ends stay as they are: names that a job or a container chose may
    contain a carriage return."""
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError as error:
        if is_shortage(error) and error.errno != errno.EIO:
            raise
        return ""


def find_tool(name: str) -> str | None:
    """Return the path of a program of this machine. (shutil would load four libraries for it.)"""
    paths = (f"{directory}/{name}" for directory in SAFE_PATH.split(":"))
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), None)


def write_file(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file in one step: readers see the old text or the new one. Raises OSError with the file's name."""
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    write_new_file(temporary, text.encode(), mode)
    temporary.rename(path)


def write_new_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file that is not there yet. If that fails, there is none. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            file.write(content)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def remove_tree(path: Path) -> None:
    """Remove a file, or a directory with its content. Never follows a link below `path.parent` and never enters
    another mount. What cannot be removed is logged and stays. It blocks, perhaps for minutes: call it in the
    event loop only for files that no job made."""
    errors = empty_tree(path)
    if errors:
        shown = "; ".join(map(str, errors[:5]))
        log.warn("cannot remove all of a tree", path=str(path), errors=len(errors), first=shown)


def empty_tree(path: Path) -> list[OSError]:
    """As remove_tree, but return why something stays."""
    remover = TreeRemover()
    try:
        remover.run(path)
    except OSError as error:
        remover.errors.append(error)
    finally:
        remover.close()
    return remover.errors


@dataclass
class TreeLevel:
    """A directory that is being emptied."""

    name: str  # its name in the parent directory
    above: tuple[int, int]  # device and inode of the parent directory
    pending: list[str] = field(default_factory=list)  # subdirectories to empty next
    stuck: set[str] = field(default_factory=set)  # names that cannot be removed


class TreeRemover:
    """Empties directories of any depth, with at most two descriptors and without recursion. shutil.rmtree needs a
    descriptor per level, and before Python 3.13 a stack frame, too; a path ends at 4,096 bytes. This goes down by
    name and up by "..", and checks that ".." is the directory it came from."""

    BATCH = 1000  # subdirectories noted at a time: a directory may have millions

    def __init__(self) -> None:
        self.here = -1
        self.errors: list[OSError] = []

    def run(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.here = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            levels = [TreeLevel("", (0, 0), [path.name])]
            while levels[0].pending or levels[1:]:
                level = levels[-1]
                if level.pending:
                    levels += self.enter(level.pending.pop(), level)
                elif len(levels) > 1 and not self.empty(level):
                    levels.pop()
                    self.leave(level, levels[-1])

    def close(self) -> None:
        if self.here >= 0:
            os.close(self.here)

    def enter(self, name: str, level: TreeLevel) -> list[TreeLevel]:
        """Go into a directory and return its level in a list. The list is empty if there is no directory to go
        into; anything else of this name is removed."""
        try:
            inner = openat2(self.here, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, RESOLVE_NO_XDEV)
        except NotADirectoryError:
            self.remove(os.unlink, name, level)
            return []
        except FileNotFoundError:
            return []
        except OSError as error:
            self.errors.append(OSError(error.errno, error.strerror, name))  # EXDEV: another mount
            level.stuck.add(name)
            return []
        outer, self.here = self.here, inner
        above = os.fstat(outer)
        os.close(outer)
        return [TreeLevel(name, (above.st_dev, above.st_ino))]

    def empty(self, level: TreeLevel) -> list[str]:
        """Remove the files of a directory, and return up to BATCH of its subdirectories; [] when it is done."""
        with os.scandir(self.here) as entries:
            for entry in entries:
                if entry.name in level.stuck:
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    self.remove(os.unlink, entry.name, level)
                else:
                    level.pending.append(entry.name)
                    if len(level.pending) == self.BATCH:
                        break
        return level.pending

    def leave(self, level: TreeLevel, above: TreeLevel) -> None:
        """Go up to the parent directory and remove the one just emptied."""
        outer = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.here)
        os.close(self.here)
        self.here = outer
        found = os.fstat(outer)
        if (found.st_dev, found.st_ino) != level.above:
            raise OSError(errno.ESTALE, "was moved while it was being removed", level.name)
        if level.stuck:
            above.stuck.add(level.name)
        else:
            self.remove(os.rmdir, level.name, above)

    def remove(self, how: Callable[..., None], name: str, level: TreeLevel) -> None:
        try:
            try:
                how(name, dir_fd=self.here)
            except PermissionError:  # even for root, if `chattr` protects it
                make_removable(self.here, name)
                how(name, dir_fd=self.here)
        except FileNotFoundError:
            return
        except OSError as error:
            self.errors.append(error)
            level.stuck.add(name)


FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
PROTECTING_ATTRIBUTES = 0x10 | 0x20  # immutable, append-only


def make_removable(directory: int, name: str) -> None:
    """Clear the attributes that keep even root from removing a file: a container without a user namespace can set
    them. They may be on the file or on its directory."""
    with contextlib.suppress(OSError):
        clear_attributes(directory)
        kind = os.lstat(name, dir_fd=directory).st_mode
        if stat.S_ISREG(kind) or stat.S_ISDIR(kind):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
            try:
                clear_attributes(fd)
            finally:
                os.close(fd)


def clear_attributes(fd: int) -> None:
    """Clear the two attributes of a file. Raises OSError on file systems that have none."""
    flags = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
    number = struct.unpack("=Q", flags)[0]
    if number & PROTECTING_ATTRIBUTES:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=Q", number & ~PROTECTING_ATTRIBUTES))


def close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
