# SPDX-License-Identifier: MPL-2.0
"""From the name of an image to something that nspawn can run, or to the source to fetch it from.

Also who a command runs as: USER or, in the configuration of an OCI image, USER:GROUP, each a name or a number.
The driver looks them up in the image's own files and gives nspawn numbers. nspawn itself would run the image's
`getent`, which many images lack (distroless, scratch) or have in a form it cannot use (Alpine). Nothing here
writes to an image.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import struct
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from nspawn.checks import NO_TEXT, USER, IdRange, Mount, check_user
from nspawn.common import MACHINES_ROOT, ConfigError, check_shortage, is_below, quote, render_value, shorten
from nspawn.job import Download, JobOptions, Login
from nspawn.linux import open_in_root


@dataclass(frozen=True)
class ImageConfig:
    """How an image's maker wants its command run: from the configuration of an OCI image."""

    env: tuple[str, ...] = ()  # NAME=VALUE
    command: tuple[str, ...] = ()  # Entrypoint, then Cmd
    user: str = ""
    working_directory: str = ""
    stop_signal: str = ""


@dataclass(frozen=True)
class Image:
    path: Path  # a directory, a disk image or a block device
    is_directory: bool
    layers: tuple[Path, ...] = ()  # directories, topmost first, if there is more than `path`
    key: str = ""  # of an image in the store: nothing may ever write to it
    label: str = ""  # for people, if the path means nothing to them
    config: ImageConfig = ImageConfig()
    fd: int = -1  # the open image; -1 before open_image, and in the store, which only root can reach
    is_fixed: bool = False  # tasks cannot swap it: see sources.is_fixed
    is_shared: bool = False  # not the task's own, and the operator lets no task write to it

    @property
    def is_protected(self) -> bool:
        return self.is_shared or bool(self.key)

    @property
    def opened(self) -> Path:
        """A path for this process only. It leads to what was opened, even if the image was swapped since."""
        return self.path if self.fd < 0 else Path(f"/proc/self/fd/{self.fd}")

    @property
    def directories(self) -> tuple[Path, ...]:
        return self.layers or (self.opened,)


def find_image(options: JobOptions, task_dir: Path | None, image_dir: Path = MACHINES_ROOT) -> Image:
    """Return the image that a job names. Raises ConfigError.

    A name without a slash is looked up in `image_dir` first. Relative paths are looked up in the task's directory
    (where artifacts land), then in the plugin's, then in the agent's working directory. In the task's directory,
    `alloc/` stands for what all tasks of the allocation share, as in the options for mounts.
    """
    path = find_image_path(options.image, task_dir, image_dir)
    check_tree(path, options)
    return Image(path, path.is_dir())


def explain_linked_usr() -> ConfigError:
    """Return the error for it: systemd-nspawn would follow the link on the host (measured on 252)."""
    return ConfigError("volatile", "yes", "needs an image whose /usr is no symbolic link", 'use "overlay"')


def check_tree(path: Path, options: JobOptions) -> None:
    """Refuse what nspawn cannot run, or must not run: the host's own root."""
    name, mode = options.image, path.stat().st_mode
    if path == Path("/") and not (options.ephemeral or options.volatile in ("yes", "state")):
        raise ConfigError("image", name, "is the host's own root", "set ephemeral, or volatile to yes or state")
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ConfigError("image", name, "must be a directory, a disk image or a block device")
    if stat.S_ISDIR(mode) and not any((root / "usr").is_dir() for root in (path, path / options.root.lstrip("/"))):
        raise ConfigError("image", name, "has no /usr directory, so it is no operating system tree")
    if options.volatile == "yes" and (path / "usr").is_symlink():
        raise explain_linked_usr()


def find_image_path(name: str, task_dir: Path | None, image_dir: Path) -> Path:
    candidates = list(dict.fromkeys(image_places(name, task_dir, image_dir)))
    for candidate in candidates:
        found = Path(os.path.realpath(candidate))
        if not os.path.exists(found):  # Path.exists raises ENAMETOOLONG; this says no
            continue
        own = (task_dir, task_dir.parent / "alloc") if task_dir else ()
        inside = next((place for place in own if candidate.is_relative_to(place)), Path("/"))
        if not found.is_relative_to(os.path.realpath(inside)):
            raise ConfigError("image", name, "leads out of the task's directory")
        return found
    rule = f"not found (looked for {', '.join(quote(str(place)) for place in candidates)})"
    remedy = f"give the path of an image, or the name of one in {image_dir}"
    if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        remedy += f", which `mmdebstrap --include=systemd-sysv,dbus bookworm {image_dir}/{name}` would make"
    raise ConfigError("image", name, rule, remedy)


def image_places(name: str, task_dir: Path | None, image_dir: Path) -> Iterator[Path]:
    if name.startswith("/"):
        yield Path(name)
        return
    if is_image_name(name):
        yield from (image_dir / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES)
    if task_dir:
        yield (task_dir.parent if name.startswith("alloc/") else task_dir) / name
    yield Path(sys.argv[0]).resolve().parent / name
    yield Path.cwd() / name


IMAGE_SUFFIXES = ("", ".raw")
# Where systemd-machined looks for images, beside /var/lib/machines: machinectl lists them all.
OTHER_MACHINES = tuple(
    map(Path, ("/etc/machines", "/run/machines", "/usr/local/lib/machines", "/usr/lib/machines"))
)


def image_directories(image_dir: str) -> tuple[Path, ...]:
    """Return the directories for images: the operator's, or those of systemd-machined."""
    own = Path(image_dir)
    return (own, *OTHER_MACHINES) if own == MACHINES_ROOT else (own,)


def choose_image_dir(name: str, image_dir: str) -> Path:
    """Return the directory that has an image of this name, the first one if none has."""
    own, *others = image_directories(image_dir)
    if not is_image_name(name) or has_image(own, name):
        return own
    return next((place for place in others if has_image(place, name)), own)


def is_image_name(name: str) -> bool:
    return "/" not in name and name not in (".", "..")


@contextlib.contextmanager
def open_directory(root: Path, path: str) -> Iterator[int]:
    """Open a directory of an image without following symbolic links, and yield its O_PATH descriptor. A container
    that writes to the image can make links to anywhere. Tasks must not control the path `root`. Raises OSError."""
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = open_in_root(top, path, os.O_PATH | os.O_DIRECTORY, follow=False)
    finally:
        os.close(top)
    try:
        yield fd
    finally:
        os.close(fd)


MAX_TEXT = 256 << 10  # bytes of an image's /etc/hosts, passwd or group


def read_in_image(image: Image, path: str) -> str:
    """Return the first MAX_TEXT bytes of an image's file, "" if it is not regular, cannot be read, or has symbolic
    links in its path. Always "" for a disk image."""
    return look_up(image, path, lambda name, fd: read_head(name, MAX_TEXT, fd).decode(errors="replace")) or ""


T = TypeVar("T")


def look_up(image: Image, path: str, use: Callable[[str, int], T]) -> T | None:
    """Call a function with the name of an image's file and the descriptor of its directory, and return the result.
    None if there is no such file, if there are symbolic links in the path of its directory, or for a disk image.
    The file itself may be anything: a link, a pipe, a whiteout."""
    folder, name = os.path.split(path)
    for directory in image.directories if image.is_directory else ():
        try:
            fd, is_covered = open_layer(directory, folder)
            if fd is not None:
                try:
                    os.stat(name, dir_fd=fd, follow_symlinks=False)
                    return use(name, fd)
                except FileNotFoundError:  # a lower layer may have it
                    pass
                finally:
                    os.close(fd)
        except OSError as error:
            check_shortage(error)
            break
        if is_covered:
            break
    return None


UNIT_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


def enables_unit(image: Image, root: str, unit: str) -> bool:
    """Whether the systemd of an image starts a unit when it boots. `root` is the directory of the image that
    becomes the root. False for a disk image."""

    def read_link(name: str, folder: int) -> str:
        with contextlib.suppress(OSError):
            return os.readlink(name, dir_fd=folder)
        return ""

    if look_up(image, f"{root}/etc/systemd/system/{unit}", read_link) == "/dev/null":  # masked
        return False
    return any(
        look_up(image, f"{root}{folder}/multi-user.target.wants/{unit}", read_link) for folder in UNIT_FOLDERS
    )


def open_layer(layer: Path, folder: str) -> tuple[int | None, bool]:
    """Open a directory of one layer of an image, without following links. Return its O_PATH descriptor, None if
    the layer has nothing there, and whether an opaque directory covers what lower layers have there. Raises
    OSError, also if something else is there, such as a whiteout."""
    is_covered = False
    here = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in filter(None, folder.split("/")):
            below = open_in_root(here, part, os.O_PATH | os.O_DIRECTORY, follow=False)
            os.close(here)
            here = below
            is_covered = is_covered or is_opaque(here)
    except FileNotFoundError:
        os.close(here)
        return None, is_covered
    except OSError:
        os.close(here)
        raise
    return here, is_covered


def is_opaque(directory: int) -> bool:
    try:
        return os.getxattr(f"/proc/self/fd/{directory}", "trusted.overlay.opaque") == b"y"
    except OSError as error:
        check_shortage(error)
        return False


def apply_image(options: JobOptions, image: Image, user: str) -> JobOptions:
    """Return the options; for a command, the image sets those that the job leaves out. `user` is Nomad's.

    An image that no task may write to becomes `ephemeral`, unless it is `volatile` or a `read_only` disk image.
    """
    if image.is_protected and not options.is_volatile and (image.is_directory or not options.read_only):
        options = replace(options, ephemeral=True)
    if image.key and options.is_volatile and options.private_users_ownership in ("auto", "chown"):
        options = replace(options, private_users_ownership="map")
    if options.private_users and options.private_users.text == "yes":
        options = replace(options, private_users=find_owner(image), private_users_ownership="off")
    if options.boot:
        return options
    config = image.config
    return replace(
        options,
        environment={**dict(entry.split("=", 1) for entry in config.env), **options.environment},
        command=options.command or config.command,
        working_directory=options.working_directory or config.working_directory or None,
        user=options.user or user or config.user or None,
    )


def find_owner(image: Image) -> IdRange:
    """Return the range of ids that the root directory of an image belongs to, as nspawn for --private-users=yes
    does. Volumes can be id-mapped to a range that is known. Raises ConfigError."""
    if not image.is_directory:
        raise ConfigError("private_users", "yes", "needs an image that is a directory", 'use "pick"')
    base = os.stat(image.layers[0] if image.layers else image.opened).st_uid & ~0xFFFF
    return IdRange(str(base), base) if base else IdRange("identity", 0)


@dataclass(frozen=True)
class Origin:
    """The source of an image that must be fetched or unpacked."""

    type: str  # tar, raw, docker, archive
    address: str  # a URL, a reference, or a path
    name: str  # for people, without credentials
    identity: tuple[str, ...] = ()  # what else tells it from other images
    verify: str = "no"
    checksum: str = ""
    platform: str = ""
    username: str = ""
    password: str = ""
    force: bool = False  # ask the source even if the image is in the store, and fail if it does not answer
    refresh: bool = False  # ask it, and use the stored image if it does not answer

    @property
    def key(self) -> str:
        """The image's name in the store. It depends on the credentials, so no job gets what it could not fetch."""
        parts = (self.type, self.address, *self.identity, self.verify, self.checksum, self.platform, self.username)
        secret = hashlib.sha256(self.password.encode()).hexdigest()
        return hashlib.sha256(json.dumps([*parts, secret]).encode()).hexdigest()[:40]


DOCKER = "docker://"


def plan_origin(options: JobOptions, image_dir: Path) -> Origin | None:
    """Return where to fetch an image from, None if it has to be on this machine. Raises ConfigError."""
    name, block, login = options.image, options.image_download, options.auth or Login()
    if name.startswith(DOCKER):
        if block:
            rule = "says a second time where the image comes from"
            raise ConfigError("image_download", redact(block.url), rule, f"set image to a name without {DOCKER}")
        block = Download(name, "docker")
    elif "://" in name:
        rule = f"must be a path, the name of an image, or an address that begins with {DOCKER}"
        raise ConfigError("image", redact(name), rule, "give other addresses in image_download { url = ... }")
    elif not block or (not block.force and is_image_name(name) and has_image(image_dir, name)):
        return None
    check_download(block)
    is_docker = block.type == "docker"
    address = block.url.removeprefix(DOCKER)
    is_latest = address.endswith(":latest") or not re.search(r"[:@][^/]*$", address)
    return Origin(
        type=block.type,
        address=address,
        name=DOCKER + address if is_docker else redact(address),
        verify="no" if is_docker else block.verify,
        checksum=block.checksum or "",
        platform=block.platform or "",
        force=block.force,
        refresh=is_docker and is_latest,
        username=login.username or "",
        password=login.password or "",
    )


def has_image(image_dir: Path, name: str) -> bool:
    return any((image_dir / f"{name}{suffix}").exists() for suffix in IMAGE_SUFFIXES)


def check_download(block: Download) -> None:
    is_docker = block.type == "docker"
    if block.url.startswith(("http://", "https://")) == is_docker:
        rule = "must be HOST/NAME:TAG for an image in a registry" if is_docker else "must be an http(s) address"
        raise ConfigError("image_download.url", redact(block.url), rule, "or set type to what is there")
    option, value = ("checksum", block.checksum) if is_docker else ("platform", block.platform)
    if value:
        rule = f'has no meaning with type = "{block.type}"'
        remedy = "name the image by its digest, NAME@sha256:..." if is_docker else "leave it out"
        raise ConfigError(f"image_download.{option}", value, rule, remedy)


def redact(url: str) -> str:
    """Return an address without user, password, query and fragment, which may be secret."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return url.partition("://")[0] + "://…"


def read_head(path: Path | str, size: int, folder: int | None = None) -> bytes:
    """Return the first `size` bytes of a regular file, b"" for anything else, and for symbolic links. A pipe or
    device that a task puts there is not opened: it would block the plugin."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            return read_opened(fd, size)
        finally:
            os.close(fd)
    return b""


def read_opened(fd: int, size: int) -> bytes:
    """Return the first `size` bytes of an O_PATH descriptor's file, b"" if it is not regular. Raises OSError."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return b""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        return file.read(size)


ARCHIVES = (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh")  # the first bytes of compressed files


def find_archive(image: Image) -> Origin | None:
    """Return the source for an image that is a tar archive or compressed, None for others. Raises OSError."""
    head = b"" if image.is_directory else read_opened(image.fd, 512)
    if not (head[257:262] == b"ustar" or head.startswith(ARCHIVES)):
        return None
    status = os.fstat(image.fd)  # another file at this path is another image
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return Origin("archive", str(image.path), str(image.path), tuple(map(str, stamp)))


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


@dataclass(frozen=True)
class Account:
    """A user of a container."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]  # further ones
    home: str

    @property
    def variables(self) -> dict[str, str]:
        """The variables that nspawn sets for a user given by name, but not for one given by number."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}


def find_account(image: Image, options: JobOptions, volumes: Iterable[Mount] = ()) -> Account | None:
    """Return the user for the command. None: none is set, the container boots, or nspawn has to look the user up.
    It does for a disk image and, outside the store, if mounts hide /etc/passwd or the name is not there: systemd
    knows others (`bind_user`). `volumes` are Nomad's mounts. Raises ConfigError."""
    wanted = options.user
    if not wanted or options.boot or not image.is_directory:
        return None
    if not image.key and hides_accounts(options, volumes):
        return None
    name, _, group = wanted.partition(":")
    name = check_user("user", name or "root")
    groups = read_entries(image, f"{options.root}/etc/group")
    gid = find_group(wanted, group, groups)
    if name in ("root", "0"):
        return Account("root", 0, gid or 0, (), "/root")
    for entry in read_entries(image, f"{options.root}/etc/passwd"):
        if len(entry) > 5 and name in (entry[0], entry[2]) and is_id(entry[2]) and is_id(entry[3]):
            return parse_account(entry, gid, groups)
    if is_number(wanted, name):
        return Account(name, int(name), gid or 0, (), "/")
    if not image.key:
        return None
    raise ConfigError("user", wanted, "the image's /etc/passwd has no such user", "give the user's number")


def hides_accounts(options: JobOptions, volumes: Iterable[Mount]) -> bool:
    """Whether something is mounted over the image's passwd or group."""
    targets = [mount.target for mount in (*options.binds, *volumes)]
    targets += [overlay.target for overlay in options.overlays]
    hidden = {os.path.normpath(f"/{target}").lstrip("/") for target in targets}
    return not hidden.isdisjoint(("", "etc", "etc/passwd", "etc/group"))


def read_entries(image: Image, path: str) -> list[list[str]]:
    """Return the lines of an image's passwd or group, each split into fields."""
    text = read_in_image(image, path)
    if len(text.encode()) >= MAX_TEXT:
        text = text.rpartition("\n")[0]  # the last line may have been cut in the middle of a number
    return [line.split(":") for line in text.split("\n")]


def parse_account(entry: Sequence[str], gid: int | None, groups: Sequence[Sequence[str]]) -> Account:
    """Return the user of a line of passwd. A group that was asked for replaces all others."""
    name, uid, home = entry[0] if USER.fullmatch(entry[0]) else entry[2], int(entry[2]), entry[5]
    if not home.startswith("/") or NO_TEXT.search(home):
        home = "/"
    if gid is not None:
        return Account(name, uid, gid, (), home)
    members = [group for group in groups if len(group) > 3 and is_id(group[2]) and name in group[3].split(",")]
    return Account(name, uid, int(entry[3]), tuple(int(group[2]) for group in members), home)


def find_group(wanted: str, group: str, groups: Sequence[Sequence[str]]) -> int | None:
    """Return the number of a group, None if none is asked for. Raises ConfigError if the image has none such."""
    if not group:
        return None
    numbers = [int(entry[2]) for entry in groups if len(entry) > 2 and entry[0] == group and is_id(entry[2])]
    if not numbers and not is_number(wanted, group):
        raise ConfigError("user", wanted, f"the image has no group {quote(group)}", "give the group's number")
    return numbers[0] if numbers else int(group)


def is_number(wanted: str, text: str) -> bool:
    """Whether a name is a number. Raises ConfigError for a number that no user can have."""
    if text.isascii() and text.isdigit() and not is_id(text):
        raise ConfigError("user", wanted, "user numbers go up to 999999999, without 65535", "give another")
    return is_id(text)


def is_id(text: str) -> bool:
    """Whether a text is the number of a user or group. systemd refuses 65535, which is -1 in 16 bits."""
    return bool(re.fullmatch(r"\d{1,9}", text, re.ASCII)) and int(text) != 0xFFFF


BUSY = (
    "image: {0} is in use by another container that may write to it; "
    "set ephemeral, read_only or volatile for all tasks that share it"
)
