# SPDX-License-Identifier: MPL-2.0
"""From the name of an image to something that nspawn can run, or to the source to fetch it from.

Nothing here writes to an image.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from nspawn.checks import IdRange, name_registry
from nspawn.common import MACHINES_ROOT, ConfigError, DriverError, HostError, check_shortage, quote
from nspawn.job import ImageDownload, JobOptions, Login
from nspawn.linux import open_in_root


@dataclass(frozen=True)
class ImageConfig:
    """How an image's maker wants its command run: from the configuration of an OCI image."""

    env: tuple[str, ...] = ()  # NAME=VALUE
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
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
    config = ImageConfig() if options.boot else image.config
    options = replace(options, command=plan_command(options, config), entrypoint=(), args=())
    if options.boot:
        return options
    return replace(
        options,
        environment={**dict(entry.split("=", 1) for entry in config.env), **options.environment},
        working_directory=options.working_directory or config.working_directory or None,
        user=options.user or user or config.user or None,
    )


def plan_command(options: JobOptions, config: ImageConfig) -> tuple[str, ...]:
    """Return the whole command line. As in docker, an `entrypoint` of the job replaces the image's Cmd, too. A
    `command` replaces both, as in jobs of the Go driver."""
    if options.entrypoint or options.command:
        return (*options.entrypoint, *options.command, *options.args)
    return (*config.entrypoint, *(options.args or config.cmd))


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
    signer: str = ""  # the public key that must have signed it, in PEM

    @property
    def key(self) -> str:
        """The image's name in the store. It depends on the credentials, so no job gets what it could not fetch,
        and on the key of its signature: an image that was stored without one has to be verified."""
        parts = (self.type, self.address, *self.identity, self.verify, self.checksum, self.platform, self.username)
        secret = hashlib.sha256(self.password.encode()).hexdigest()
        signer = [self.signer] if self.signer else []
        return hashlib.sha256(json.dumps([*parts, secret, *signer]).encode()).hexdigest()[:40]


DOCKER = "docker://"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """A place in a registry: docker://[host[:port]/]name[:tag][@digest]."""

    host: str
    name: str
    tag: str
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        rest, _, digest = text.removeprefix(DOCKER).partition("@")
        host, slash, name = rest.partition("/")
        if not slash or not (re.search(r"[.:]", host) or host == "localhost"):
            host, name = "docker.io", rest
        name, colon, tag = name.partition(":")
        if host in ("docker.io", "index.docker.io"):
            host, name = "docker.io", name if "/" in name else f"library/{name}"
        component = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
        if not (
            re.fullmatch(rf"{component}(?:/{component})*", name)
            and (not colon or re.fullmatch(r"\w[\w.-]{0,127}", tag, re.ASCII))
            and (not digest or DIGEST.fullmatch(digest))
            and re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?", host)
        ):
            raise DriverError(
                "this is no name of an image: it is docker://HOST/NAME:TAG or docker://HOST/NAME@sha256:..."
            )
        return cls(host, name, tag or "latest", digest)

    @property
    def server(self) -> str:
        """HOST[:PORT] that answers for the registry."""
        return "registry-1.docker.io" if self.host == "docker.io" else self.host

    @property
    def version(self) -> str:
        return self.digest or self.tag


def demand_signature(origin: Origin, keys: Mapping[str, str]) -> Origin:
    """Return the source with the public key that must have signed its image, by the operator's longest rule for
    it. `keys`: the keys' files, by registries and prefixes of repositories. Raises HostError. It blocks."""
    if origin.type != "docker" or not keys:
        return origin
    reference = Reference.parse(origin.address)
    place = f"{name_registry(reference.host)}/{reference.name}/"
    rules = [rule for rule in keys if rule == "*" or place.startswith(f"{rule}/")]
    if not rules:
        return origin
    path = keys[max(rules, key=len)]
    try:
        signer = Path(path).read_text()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise HostError(f"the public key {path} of require_signature cannot be read: {why}") from None
    return replace(origin, signer=signer)


def plan_origin(options: JobOptions, image_dir: Path) -> Origin | None:
    """Return where to fetch an image from, None if it has to be on this machine. Raises ConfigError."""
    name, block, login = options.image, options.image_download, options.auth or Login()
    if name.startswith(DOCKER):
        if block:
            rule = "says a second time where the image comes from"
            raise ConfigError("image_download", redact(block.url), rule, f"set image to a name without {DOCKER}")
        block = ImageDownload(name, "docker")
    elif "://" in name:
        rule = f"must be a path, the name of an image, or an address that begins with {DOCKER}"
        raise ConfigError("image", redact(name), rule, "give other addresses in image_download { url = ... }")
    elif not block or (not block.force and is_image_name(name) and has_image(image_dir, name)):
        return None
    return make_origin(block, login)


def make_origin(block: ImageDownload, login: Login) -> Origin:
    """Return the source that a block names. Raises ConfigError."""
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


def plan_preload(reference: str) -> Origin:
    """Return the source of an image of `preload`: that of a job which says the same. Raises ConfigError."""
    rule = f"must be {DOCKER}HOST/NAME:TAG, or the http(s) address of a tar archive"
    if reference.startswith(DOCKER):
        try:
            Reference.parse(reference)
        except DriverError:
            raise ConfigError("preload", reference, rule) from None
        return make_origin(ImageDownload(reference, "docker"), Login())
    if not re.match(r"https?://[^/]", reference):
        raise ConfigError("preload", redact(reference), rule)
    return make_origin(ImageDownload(reference), Login())


def check_preload(name: str, value: Sequence[str]) -> Sequence[str]:
    for reference in value:
        plan_preload(reference)
    return value


def check_image_patterns(name: str, value: Sequence[str]) -> Sequence[str]:
    for pattern in value:
        if not pattern.startswith((DOCKER, "http://", "https://", "/", "*")):
            rule = f"must begin as the names of fetched images do: with {DOCKER}, http://, https://, / or *"
            raise ConfigError(name, pattern, rule, "`nomad-driver-nspawn images` shows the names")
    return value


def has_image(image_dir: Path, name: str) -> bool:
    return any(
        os.path.exists(image_dir / f"{name}{suffix}") for suffix in IMAGE_SUFFIXES
    )  # not of a name too long


def check_download(block: ImageDownload) -> None:
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


BUSY = (
    "image: {0} is in use by another container that may write to it; "
    "set ephemeral, read_only or volatile for all tasks that share it"
)
