# SPDX-License-Identifier: MPL-2.0
"""Fetched images on disk.

The store is under /var/lib, and only root can enter it, so nobody can reach a set-uid program in an image. An
image is a record that names its layers; a layer is a directory, or the file of a disk image. Each gets its name
when it is complete. The driver makes all names, most from digests. Locks (flock) end with their holders. A task's
use of an image is a file that counts as long as the task's state directory exists. So nothing needs repair after
a crash. A fetch holds the lock of its image exclusively and those of its layers shared, so it never waits for the
download of another image. A start holds a second lock of its image, from before the fetch until it has the image.
A collection takes only locks that are free, and needs both of an image.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nspawn.common import STATE_ROOT, tuples
from nspawn.files import close_all, remove_tree, write_file
from nspawn.images import Image, ImageConfig

STORE_ROOT = Path("/var/lib/nomad-driver-nspawn")

# An archive has different trees as an image (tar-) and as a layer (layer-), where some names are whiteouts.
LAYER_NAME = re.compile(r"(tar|layer)-[0-9a-f]{64}|[0-9a-f]{64}\.raw|skeleton-1")


@dataclass(frozen=True)
class StoredImage:
    """An image in the store. The mtime of its record is the time of its last use."""

    key: str
    name: str  # for people, without credentials
    type: str
    layers: tuple[str, ...]  # names in the store, topmost first
    sizes: tuple[int, ...]  # bytes on disk, of each layer
    fetched_at: float  # Unix time
    checked_at: float  # Unix time when its source was last asked for a newer one
    digest: str = ""  # of its manifest in a registry
    config: ImageConfig = ImageConfig()

    @classmethod
    def parse(cls, text: str) -> StoredImage:
        """Read a record. Raises ValueError if this version cannot."""
        try:
            values = json.loads(text, object_hook=tuples)
            image = cls(**{**values, "config": ImageConfig(**values["config"])})
            if not image.layers or not all(map(LAYER_NAME.fullmatch, image.layers)):
                raise ValueError("a record without layers")
            return image
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"a damaged record: {error}") from None

    @property
    def size(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class ImageUse:
    """A task that uses an image."""

    task_id: str
    key: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Retention:
    """How long fetched images are kept, by the plugin's block. The default is for ever."""

    delay: float = math.inf  # seconds after the last use
    max_size: int = 0  # bytes that the images may have; then the least recently used go first. 0: any number
    keep: tuple[str, ...] = ()  # names of images that stay; * stands for anything
    preload: tuple[str, ...] = ()  # names of images that stay

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Retention:
        """Return it from the fields as JSON has them. Raises KeyError or TypeError."""
        return cls(
            float(values["delay"]), int(values["max_size"]), tuple(values["keep"]), tuple(values["preload"])
        )

    @property
    def is_on(self) -> bool:
        return self.delay < math.inf

    def find_option(self, image: StoredImage) -> str:
        """Return the option that keeps an image, "" if none does."""
        if image.name in self.preload:
            return "preload"
        return "image_keep" if any(matches(pattern, image.name) for pattern in self.keep) else ""


def matches(pattern: str, name: str) -> bool:
    """Whether a name fits a pattern with * for anything. No other character is special: names hold brackets."""
    return bool(re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name))


@dataclass(frozen=True)
class Garbage:
    """What can be removed from the store."""

    paths: tuple[Path, ...] = ()
    excess: int = 0  # bytes beyond the limit that are in use or kept


# What says that a record is not there or is damaged, and not that something is wrong with this machine.
NO_RECORD = (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, RecursionError)


class Store:
    """The directory of fetched images. Only short-lived processes change images, see `Fetches`; the plugin reads
    and locks them, and notes which its tasks use."""

    def __init__(self, root: Path = STORE_ROOT) -> None:
        self.root = root
        self.images, self.layers, self.parts = root / "images", root / "layers", root / "parts"
        self.work, self.locks, self.in_use = root / "work", root / "locks", root / "uses"
        self.proofs = root / "proofs"  # empty files: a registry has sent this layer, see find_proof in fetch.py
        self.sizes = root / "sizes"  # bytes on disk of each layer: to measure one can take seconds
        self.trash = self.work / "trash"
        self.retention = root / "retention.json"  # of the last plugin, for the command line

    def prepare(self) -> None:
        for path in (
            self.root,
            self.images,
            self.layers,
            self.parts,
            self.work,
            self.locks,
            self.in_use,
            self.proofs,
            self.sizes,
        ):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def layer(self, name: str) -> Path:
        return self.layers / name

    def part(self, name: str) -> Path:
        """Return the path of a download. Up to a dot its name is the key of its image: whoever has that lock may
        write to it."""
        return self.parts / name

    # Locks

    def lock(self, name: str, how: int) -> int:
        """Lock a file and return its descriptor. The file is removed only under an exclusive lock, so a lock on an
        unlinked file is void: retry. It blocks; with LOCK_NB it raises BlockingIOError."""
        while True:
            fd = os.open(self.locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, how)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self.locks / name)):
                        return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def try_lock(self, name: str, *, alone: bool = False) -> int | None:
        """Take a lock, shared or `alone`. Return its descriptor, None if another holder prevents it."""
        self.prepare()
        with contextlib.suppress(BlockingIOError):
            return self.lock(name, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return None

    def try_start(self, key: str) -> int | None:
        """Keep an image that is there or that will be fetched from being collected. Return the descriptor of the
        lock, None while it is being removed."""
        return self.try_lock(f"{key}{OF_START}")

    def lock_unused(self, name: str) -> list[int]:
        """Lock something alone if nobody has it, and if no start wants the image; else return no descriptors."""
        held: list[int] = []
        for lock in (name,) if LAYER_NAME.fullmatch(name) else (f"{name}{OF_START}", name):
            fd = self.try_lock(lock, alone=True)
            if fd is None:
                close_all(held)
                return []
            held.append(fd)
        return held

    # Images

    def read(self, key: str) -> StoredImage | None:
        """Return an image, None if it is not there, incomplete or damaged. Raises OSError when the host cannot
        tell: what cannot be read now is no garbage."""
        with contextlib.suppress(*NO_RECORD):
            image = StoredImage.parse((self.images / f"{key}.json").read_text())
            if all(self.layer(name).exists() for name in image.layers):
                return image
        return None

    def read_all(self) -> list[StoredImage]:
        keys = [path.stem for path in self.images.glob("*.json")] if self.images.is_dir() else []
        return [image for key in sorted(keys) if (image := self.read(key))]

    def last_use(self, image: StoredImage) -> float:
        with contextlib.suppress(OSError):
            return (self.images / f"{image.key}.json").stat().st_mtime
        return 0.0

    def touch(self, key: str) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.images / f"{key}.json")

    def write(self, image: StoredImage) -> None:
        write_file(self.images / f"{image.key}.json", json.dumps(asdict(image)))

    def read_size(self, layer: str) -> int:
        """Return the bytes on disk that a layer was measured to have, 0 if it was not."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.sizes / layer).read_text())
        return 0

    def read_retention(self) -> Retention | None:
        """Return the options of the last plugin that served an agent, None if there was none."""
        with contextlib.suppress(*NO_RECORD):
            return Retention.parse(json.loads(self.retention.read_text()))
        return None

    def write_retention(self, retention: Retention) -> None:
        self.prepare()
        write_file(self.retention, json.dumps(asdict(retention)))

    def find(self, stored: StoredImage) -> Image:
        """Return a stored image in the form that a start uses."""
        layers = tuple(self.layer(name) for name in stored.layers)
        is_directory = layers[0].suffix != ".raw"
        return Image(layers[0], is_directory, layers if layers[1:] else (), stored.key, stored.name, stored.config)

    # Uses

    def use(self, name: str, task_id: str, image: Image) -> None:
        """Note that the task with the state directory `name` uses an image, if it is from the store."""
        if not image.key:
            return
        use = ImageUse(task_id, image.key, tuple(path.name for path in image.layers or (image.path,)))
        write_file(self.in_use / name, json.dumps(asdict(use)))
        self.touch(use.key)

    def release(self, name: str) -> None:
        path = self.in_use / name
        with contextlib.suppress(OSError):
            use = read_image_use(path)
            path.unlink()
            if use:
                self.touch(use.key)

    def read_uses(self) -> list[ImageUse]:
        uses = []
        for path in sorted(list_directory(self.in_use)):
            use = (
                None
                if path.name.startswith(".") or not (STATE_ROOT / path.name).is_dir()
                else read_image_use(path)
            )
            uses += [use] if use else []
        return uses

    # Collection

    def find_garbage(
        self, retention: Retention, room: int = 0, is_free: Callable[[str], bool] = lambda name: True
    ) -> Garbage:
        """Return what can be removed: what no task has used for the delay, the least recently used images as long
        as all have more bytes than they may with `room` more, unfinished things as old (all beyond the limit), and
        all damaged records. `is_free`: whether nobody else has locked an image or a layer."""
        if not retention.is_on:
            return Garbage()
        oldest = time.time() - retention.delay
        uses = self.read_uses()
        keys = {use.key for use in uses}
        held: list[StoredImage] = []
        unused: list[StoredImage] = []
        records = []
        for path in list_directory(self.images):
            image = self.read(path.stem) if path.suffix == ".json" else None
            if image and (image.key in keys or retention.find_option(image) or not is_free(image.key)):
                held.append(image)
            elif image and self.last_use(image) > oldest:
                unused.append(image)
            elif path.suffix == ".json" or has_aged(path, oldest):
                records.append(path)
        sizes = find_sizes([*held, *unused])
        needed = {name for image in held for name in image.layers} | {name for use in uses for name in use.layers}
        allowed = retention.max_size - room if retention.max_size else math.inf
        excess = sum(sizes.get(name) or self.read_size(name) for name in needed) - allowed
        kept = choose_kept(sorted(unused, key=self.last_use, reverse=True), needed, sizes, -excess)
        records += [self.images / f"{image.key}.json" for image in unused if image not in kept]
        needed |= {name for image in kept for name in image.layers}
        loose = self.find_loose(needed)
        is_over = retention.max_size > 0 and self.measure(sizes, loose) > allowed
        loose = [path for path in loose if is_over or path == self.trash or has_aged(path, oldest)]
        loose += [path for path in list_directory(self.in_use)
                  if not (STATE_ROOT / path.name).is_dir() and has_aged(path, oldest)]  # fmt: skip
        paths = (path for path in (*records, *loose) if is_free(find_owner(path)))
        return Garbage(tuple(paths), int(max(excess, 0)))

    def find_loose(self, needed: set[str]) -> list[Path]:
        """Return what belongs to none of the layers that are needed, and what is not finished."""
        folders = (self.layers, self.proofs, self.sizes)
        loose = [path for folder in folders for path in list_directory(folder) if find_owner(path) not in needed]
        return [*loose, *list_directory(self.parts), *list_directory(self.work)]

    def measure(self, sizes: Mapping[str, int], loose: Iterable[Path]) -> int:
        """Return the bytes of all layers of images, and of the loose layers and downloads beside them."""
        total = sum(sizes.values())
        for path in loose:
            if path.parent == self.layers and path.name not in sizes:
                total += self.read_size(path.name)
            elif path.parent == self.parts:
                with contextlib.suppress(FileNotFoundError):
                    total += path.lstat().st_blocks * 512
        return total

    def collect(self, retention: Retention, room: int = 0) -> int:
        """Remove garbage; return how many things it found, 0 if another process collects. What others have locked
        stays: it is being fetched, or a task is being started from it. Blocks, perhaps for minutes."""
        collecting = self.try_lock("trash", alone=True)
        if collecting is None:  # another process collects
            return 0
        held: dict[str, list[int]] = {}
        try:
            # Look twice: under the locks nobody can begin to use what the second look finds.
            owners = {find_owner(path) for path in self.find_garbage(retention, room).paths}
            for name in sorted(owners - {"trash"})[:MAX_COLLECTED]:
                if fds := self.lock_unused(name):
                    held[name] = fds
            garbage = self.find_garbage(retention, room, held.__contains__).paths
            self.trash.mkdir(mode=0o700, exist_ok=True)
            for path in garbage:
                with contextlib.suppress(OSError):
                    path.rename(self.trash / os.urandom(8).hex())
            self.remove_locks()
        finally:
            for fds in held.values():
                close_all(fds)
        remove_tree(self.trash)  # may take long, but the locks are free again
        os.close(collecting)
        return len(garbage)

    def remove_locks(self) -> None:
        """Remove the files of locks that nobody holds now. Taking a lock does not change its file, so the ctime is
        when it was made: a day spares new ones, and what is in daily use is only made again."""
        for path in list_directory(self.locks):
            if has_aged(path, time.time() - 86400):
                fd = self.try_lock(path.name, alone=True)
                if fd is not None:
                    path.unlink()
                    os.close(fd)


OF_START = ".start"  # follows the key in the name of the second lock of an image
MAX_COLLECTED = 300  # things of one collection, with up to two locks and descriptors each; the next does the rest


def find_sizes(images: Iterable[StoredImage]) -> dict[str, int]:
    """Return the bytes on disk of the layers of images."""
    return {name: size for image in images for name, size in zip(image.layers, image.sizes, strict=True)}


def choose_kept(
    unused: Sequence[StoredImage], needed: set[str], sizes: Mapping[str, int], room: float
) -> list[StoredImage]:
    """Return which of the images that no task uses stay, if all they need beside the layers `needed` may have
    `room` bytes. `unused`: the most recently used first; all that follow the first that does not fit go. One that
    needs no more layers stays: without it nothing would be free."""
    layers, kept = set(needed), []
    for image in unused:
        more = set(image.layers) - layers
        room -= sum(sizes[name] for name in more)
        if room >= 0 or not more:
            kept.append(image)
            layers |= more
    return kept


def list_directory(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def has_aged(path: Path, oldest: float) -> bool:
    """Whether something has not changed since `oldest`; False if it is gone."""
    with contextlib.suppress(OSError):
        return path.lstat().st_ctime <= oldest
    return False


def find_owner(path: Path) -> str:
    """Return the name of the lock for something in the store. nspawn puts locks and copies beside a layer, with
    its name in theirs. An earlier version had names without a kind."""
    layer = re.search(r"((tar|layer)-)?[0-9a-f]{64}(\.raw)?|skeleton-1", path.name)
    if path.parent.name in ("layers", "proofs", "sizes") and layer:
        return layer[0]
    return path.name.lstrip(".").partition(".")[0] or "trash"


def read_image_use(path: Path) -> ImageUse | None:
    """Return a task's use of an image, None if it is not there or damaged. Raises OSError when the host cannot
    tell: an image would look unused."""
    with contextlib.suppress(
        FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, RecursionError
    ):
        values = json.loads(path.read_text())
        return ImageUse(values["task_id"], values["key"], tuple(map(str, values["layers"])))
    return None
