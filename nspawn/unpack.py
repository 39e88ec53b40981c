# SPDX-License-Identifier: MPL-2.0
"""Unpacks archives, which may be hostile, to a directory.

tarfile only reads. Every entry is made here, in a directory that only root can enter, one path component at a time
and never through a symbolic link, no matter who made it. An archive is refused for "..", very deep or very long
names, hard links to files outside, and attributes that mean something to overlayfs. Devices (nspawn makes its own)
and entries of unknown types are left out. Whiteouts become those of overlayfs, so layers can be stacked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nspawn.common import DriverError, HostError, shorten
from nspawn.download import CHUNK, MAX_DEPTH, MAX_PATH, Meter, start_tool, telling, too_large
from nspawn.files import remove_tree

MAX_ENTRIES = 5_000_000  # of an image

COMPRESSIONS = ((b"\x1f\x8b", "gzip"), (b"\xfd7zXZ\0", "lzma"), (b"BZh", "bz2"), (b"\x28\xb5\x2f\xfd", "zstd"))
DECOMPRESS = "import sys, shutil, {0}; shutil.copyfileobj({0}.open(sys.stdin.buffer), sys.stdout.buffer, 1 << 18)"


def find_decompressor(name: str) -> list[str]:
    """Return the command that decompresses stdin to stdout, beside the process that unpacks. Python's own modules
    need no package on the client, and its zlib is faster than gzip (0.7 s instead of 1.6 s for 400 MB)."""
    if name == "zstd":  # Python has it from 3.14 on
        return [name, "-dc"]
    if not importlib.util.find_spec({"gzip": "zlib"}.get(name, f"_{name}")):
        raise HostError(f"Python's module {name} is missing on this client: install the package python3")
    return [sys.executable, "-ISc", DECOMPRESS.format(name)]


@contextlib.contextmanager
def decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file's contents, decompressed if needed. The caller must read to the end; then DriverError is raised
    if the file is damaged."""
    with open(path, "rb", buffering=0) as file:  # unbuffered: the other process reads on from this position
        magic = file.read(8)
        file.seek(0)
        found = next((name for start, name in COMPRESSIONS if magic.startswith(start)), None)
        if not found:
            yield file
            return
        process = start_tool(find_decompressor(found), found, stdin=file, stdout=subprocess.PIPE)
        assert process.stdout
        try:
            yield process.stdout
            if process.wait():
                raise DriverError(f"the {found} file is damaged or cut off")
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


MAX_READS_AT_END = 16  # tarfile needs three: for what an entry has left, for its padding, for the next header


class MeteredStream:
    """A stream that is measured, hashed and limited as it is read."""

    def __init__(self, stream: IO[bytes], limit: int, what: str) -> None:
        self.stream, self.limit = stream, limit
        self.digest = hashlib.sha256()
        self.meter = Meter(what)
        self.reads_at_end = 0

    def read(self, size: int = CHUNK) -> bytes:
        """Raises DriverError beyond the limit, and if the caller does not notice the end: tarfile skips an entry
        that claims to have 2^62 bytes in as many reads as that takes."""
        data = self.stream.read(size)
        self.reads_at_end += not data
        if self.reads_at_end > MAX_READS_AT_END:
            raise DriverError("the archive is cut off: an entry is longer than what is left")
        self.digest.update(data)
        self.meter.add(len(data))
        if self.meter.done > self.limit:
            raise too_large("the image unpacks to more", self.limit)
        return data

    def drain(self) -> None:
        while self.read():
            pass


@dataclass
class Room:
    """What an image may unpack to, all its layers together. `take` raises DriverError beyond that."""

    limit: int  # bytes
    size: int = 0
    entries: int = 0

    def take(self, size: int, entries: int = 0) -> None:
        self.size += size
        self.entries += entries
        if self.size > self.limit:
            raise too_large("the image unpacks to more", self.limit)
        if self.entries > MAX_ENTRIES:
            raise DriverError(f"the image has more than the {MAX_ENTRIES} files and directories that it may have")


class TarEntry(tarfile.TarInfo):
    """An entry whose damaged header is an error; tarfile takes it for the archive's end."""

    needs_end = True

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> TarEntry:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in typeshed
            raise
        except tarfile.HeaderError as error:
            is_empty = isinstance(error, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]  # not in typeshed
            if is_empty and not cls.needs_end:
                raise
            raise tarfile.ReadError(f"it is damaged or cut off: {error}") from None


class LayerTarEntry(TarEntry):
    """A layer's digest proves that it is complete, so it may lack the empty blocks at the end. Some do."""

    needs_end = False


class Unpacker:
    """Makes the entries of an archive below `root`. With `is_layer`, whiteouts mean what OCI says."""

    def __init__(self, root: Path, room: Room, *, is_layer: bool) -> None:
        self.root, self.room, self.is_layer = root, room, is_layer
        self.devices = 0  # left out
        self.directories: dict[str, tarfile.TarInfo] = {}  # they get their owners, modes and times last
        self.open_path: str | None = None
        self.open_fd = -1

    def run(self, stream: IO[bytes]) -> str:
        """Unpack a decompressed archive; return its sha256. Raises DriverError, or OSError about the host."""
        source: Any = MeteredStream(stream, 2 * self.room.limit, "unpacking")
        try:
            with tarfile.open(
                fileobj=source,
                mode="r|",
                bufsize=CHUNK,
                tarinfo=LayerTarEntry if self.is_layer else TarEntry,
                encoding="utf-8",
                errors="surrogateescape",
            ) as archive:
                while (entry := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # or all would stay in memory
                    with refusing(entry.name):
                        self.make(archive, entry)
            source.drain()
            with telling():
                self.finish()
        except RecursionError:  # in tarfile: each header extends the next one, without end
            raise DriverError("the archive is refused: it has too many headers for one entry") from None
        except tarfile.TarError as error:
            raise DriverError(f"this is no tar archive that can be unpacked: {shorten(str(error))}") from None
        except (ValueError, OverflowError, UnicodeError) as error:  # a NUL in a name, a time too large for utime
            raise DriverError(f"the archive is damaged: {shorten(str(error))}") from None
        finally:
            self.close_directory()
        return str(source.digest.hexdigest())

    def make(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        if entry.size < 0:
            raise refused(entry.name, f"says that it has {entry.size} bytes")
        self.room.take(entry.size if entry.isreg() else 0, 1)
        parts = split_name(entry.name)
        if not parts:
            if entry.isdir():
                self.directories["."] = entry
            return
        where, name = self.open_directory(parts[:-1]), parts[-1]
        if self.is_layer and name.startswith(".wh."):
            self.make_whiteout(where, name[4:], entry.name)
        elif entry.isdir():
            self.make_directory(where, name, "/".join(parts), entry)
        elif entry.ischr() or entry.isblk():
            self.devices += 1
        else:
            self.remove(where, name)
            self.make_file(archive, where, name, entry)

    def open_directory(self, parts: Sequence[str]) -> int:
        """Return an entry's directory, open until the next call; make it if needed. No component may be a link."""
        path = "/".join(parts)
        if self.open_path == path:
            return self.open_fd
        self.close_directory()
        try:
            self.open_fd = self.descend(parts, make=True)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise refused(path, "is not a directory but a link or a file, and has entries below it") from None
            raise
        self.open_path = path
        return self.open_fd

    def descend(self, parts: Sequence[str], *, make: bool) -> int:
        """Open a directory, one component at a time; the caller closes it. Raises OSError if one is a link."""
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts:
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=fd)
                        self.room.take(0, 1)
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return fd

    def close_directory(self) -> None:
        if self.open_path is not None:
            os.close(self.open_fd)
        self.open_path = None

    def remove(self, where: int, name: str) -> None:
        """Remove an earlier entry of the same name: the later one counts."""
        try:
            found = os.lstat(name, dir_fd=where)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            with telling():
                remove_tree(Path(f"/proc/self/fd/{where}/{name}"))
        else:
            os.unlink(name, dir_fd=where)

    def make_whiteout(self, where: int, name: str, shown: str) -> None:
        """Hide what the layers below have. What this layer has itself stays."""
        if name == ".wh..opq":
            os.setxattr(where, "trusted.overlay.opaque", b"y")
            return
        if name in ("", ".", "..") or name.startswith(".wh."):
            if name.startswith(".wh."):
                return  # aufs's own files, such as .wh..wh.plnk
            raise refused(shown, "is no name")
        try:
            found = os.lstat(name, dir_fd=where)
        except FileNotFoundError:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=where)
            return
        if stat.S_ISDIR(found.st_mode):
            os.setxattr(f"/proc/self/fd/{where}/{name}", "trusted.overlay.opaque", b"y")

    def make_directory(self, where: int, name: str, path: str, entry: tarfile.TarInfo) -> None:
        try:
            found = os.lstat(name, dir_fd=where)
        except FileNotFoundError:
            os.mkdir(name, 0o755, dir_fd=where)
        else:
            if not stat.S_ISDIR(found.st_mode):
                os.unlink(name, dir_fd=where)
                os.mkdir(name, 0o755, dir_fd=where)
                if is_whiteout(found):
                    os.setxattr(f"/proc/self/fd/{where}/{name}", "trusted.overlay.opaque", b"y")
        self.directories[path] = entry

    def make_file(self, archive: tarfile.TarFile, where: int, name: str, entry: tarfile.TarInfo) -> None:
        if entry.islnk():
            self.make_link(where, name, entry)
        elif entry.issym():
            os.symlink(entry.linkname, name, dir_fd=where)
            os.chown(name, entry.uid, entry.gid, dir_fd=where, follow_symlinks=False)
            os.utime(name, (entry.mtime, entry.mtime), dir_fd=where, follow_symlinks=False)
        elif entry.isfifo():
            os.mkfifo(name, 0o600, dir_fd=where)
            os.chown(name, entry.uid, entry.gid, dir_fd=where, follow_symlinks=False)
            os.chmod(f"/proc/self/fd/{where}/{name}", entry.mode & 0o7777)
        elif entry.isreg():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(name, flags, 0o600, dir_fd=where), "wb") as file:
                contents = archive.extractfile(entry)
                assert contents
                copy_sparse(contents, file)
                set_owner(file.fileno(), entry)
                os.utime(file.fileno(), (entry.mtime, entry.mtime))

    def make_link(self, where: int, name: str, entry: tarfile.TarInfo) -> None:
        parts = split_name(entry.linkname)
        where = os.dup(where)
        try:
            source = self.open_directory(parts[:-1])
            os.link(parts[-1], name, src_dir_fd=source, dst_dir_fd=where, follow_symlinks=False)
        except (OSError, IndexError) as error:
            if isinstance(error, OSError) and error.errno in HOST_TROUBLE:
                raise
            why = f"is a hard link to {shorten(entry.linkname)!r}, and the archive has no such file before it"
            raise refused(entry.name, why) from None
        finally:
            os.close(where)

    def finish(self) -> None:
        """Set the owners, attributes, modes and times of directories, the deepest first."""
        for path, entry in sorted(self.directories.items(), reverse=True):
            parts = [part for part in path.split("/") if part != "."]
            try:
                fd = self.descend(parts, make=False)
            except (FileNotFoundError, NotADirectoryError):  # a later entry replaced it
                continue
            try:
                set_owner(fd, entry)
                os.utime(fd, (entry.mtime, entry.mtime))
            finally:
                os.close(fd)


def split_name(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise refused(name, 'leads out of the image by ".."')
    if len(parts) > MAX_DEPTH or len(name.encode("utf-8", "surrogateescape")) > MAX_PATH:
        rule = f"{MAX_DEPTH} directories and {MAX_PATH} bytes are the most that are unpacked"
        raise refused(name, f"is too deep or too long: {rule}")
    return parts


HOST_TROUBLE = frozenset((
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN,
))  # fmt: skip


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn an OSError about an entry into a refusal of the archive, unless the host is at fault."""
    try:
        yield
    except OSError as error:
        if error.errno in HOST_TROUBLE:
            raise
        raise refused(name, f"cannot be made: {error.strerror}") from None


def refused(name: str, why: str) -> DriverError:
    return DriverError(f"the archive is refused: its entry {shorten(ascii(name)[1:-1])!r} {why}")


def is_whiteout(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def set_owner(fd: int, entry: tarfile.TarInfo) -> None:
    """Set owner, attributes and mode, in this order: chown drops capabilities and set-user-id bits."""
    os.fchown(fd, entry.uid, entry.gid)
    for key, value in entry.pax_headers.items():
        name = key.removeprefix("SCHILY.xattr.")
        if name == key:
            continue
        if name.startswith(("trusted.", "user.overlay.")):
            raise refused(entry.name, f"has the attribute {shorten(name)}, which only the system may set")
        if name == "security.capability" or name.startswith("user."):
            with contextlib.suppress(OSError):  # a file system without them
                os.setxattr(fd, name, value.encode("utf-8", "surrogateescape"))
    os.fchmod(fd, entry.mode & 0o7777)


def copy_sparse(source: IO[bytes] | MeteredStream, target: IO[bytes]) -> None:
    """Copy, with holes for blocks of zeros."""
    zeros = bytes(1 << 16)
    while chunk := source.read(1 << 16):
        if chunk == zeros:
            target.seek(len(chunk), os.SEEK_CUR)
        else:
            target.write(chunk)
    target.truncate()
