# SPDX-License-Identifier: MPL-2.0
"""Fetched images on disk, and the plugin's side of fetching them.

The store is under /var/lib, and only root can enter it, so nobody can reach a set-uid program in an image. An
image is a record that names its layers; a layer is a directory, or the file of a disk image. Each gets its name
when it is complete. The driver makes all names, most from digests. Locks (flock) end with their holders. A task's
use of an image is a file that counts as long as the task's state directory exists. So nothing needs repair after
a crash. A fetch holds the lock of its image exclusively and those of its layers shared, so it never waits for the
download of another image. A collection takes only locks that are free.

Each image is fetched by a process of its own (fetch.py), which ends with the plugin: no download, certificate or
archive takes the plugin's time or memory. All tasks that wait for an image share its process. It reports its
progress in lines of JSON; if it is silent for too long, it has stalled.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nspawn.common import MAX_LINE, SAFE_PATH, STATE_ROOT, DriverError, HostError, TransientError, log, tuples
from nspawn.files import remove_tree, write_file
from nspawn.images import Image, ImageConfig, Origin
from nspawn.permissions import PluginOptions, RegistryAuth
from nspawn.process import CHILDREN, NO_PROCESS, start_process, wait_readable

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
        self.trash = self.work / "trash"

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

    def find_garbage(self, delay: float, is_free: Callable[[str], bool] = lambda key: True) -> list[Path]:
        """Return what can be removed: what no task has used for `delay` seconds, unfinished things as old, and all
        damaged records. `is_free`: whether nobody else has locked an image."""
        oldest = time.time() - delay
        uses = self.read_uses()
        keys = {use.key for use in uses}
        kept: list[StoredImage] = []
        records = []
        for path in list_directory(self.images):
            image = self.read(path.stem) if path.suffix == ".json" else None
            if image and (image.key in keys or self.last_use(image) > oldest or not is_free(image.key)):
                kept.append(image)
            elif path.suffix == ".json" or has_aged(path, oldest):
                records.append(path)
        needed = {name for image in kept for name in image.layers} | {name for use in uses for name in use.layers}
        things = [path for folder in (self.layers, self.proofs) for path in list_directory(folder)
                  if find_owner(path) not in needed]  # fmt: skip
        things += [*list_directory(self.parts), *list_directory(self.work)]
        things += [path for path in list_directory(self.in_use) if not (STATE_ROOT / path.name).is_dir()]
        return records + [path for path in things if has_aged(path, oldest)]

    def collect(self, delay: float) -> int:
        """Remove garbage; return how many things it found, 0 if another process collects. What others have locked
        stays: it is being fetched, or a task is being started from it. Blocks, perhaps for minutes."""
        collecting = self.try_lock("trash", alone=True)
        if collecting is None:  # another process collects
            return 0
        held: dict[str, int] = {}
        try:
            # Look twice: under the locks nobody can begin to use what the second look finds.
            for name in sorted({find_owner(path) for path in self.find_garbage(delay)} - {"trash"})[
                :MAX_COLLECTED
            ]:
                fd = self.try_lock(name, alone=True)
                if fd is not None:
                    held[name] = fd
            garbage = [path for path in self.find_garbage(delay, held.__contains__) if find_owner(path) in held]
            self.trash.mkdir(mode=0o700, exist_ok=True)
            for path in garbage:
                with contextlib.suppress(OSError):
                    path.rename(self.trash / os.urandom(8).hex())
            self.remove_locks()
        finally:
            for fd in held.values():
                os.close(fd)
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


MAX_COLLECTED = 500  # locks of one collection, with a descriptor each; the next one does the rest


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
    if path.parent.name in ("layers", "proofs") and layer:
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


FETCH = "import sys; sys.path.insert(0, sys.argv[1]); from nspawn import fetch; fetch.main()"
FETCHES_AT_ONCE = 16  # each may take a processor and a gigabyte of memory; a slow server holds up one
SILENCE_LIMIT = 60.0  # seconds beyond the limit on stalls; the process usually writes a line every second
PROGRESS_PERIOD = 15.0  # seconds between two events
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ssl_cert_file", "ssl_cert_dir")


@dataclass(frozen=True)
class FetchSettings:
    """The operator's settings for fetching."""

    limit: int  # bytes that an image may have
    stall: float  # seconds
    auth_config: str
    auth_helper: str
    insecure: tuple[str, ...]


def plan_fetching(config: PluginOptions) -> FetchSettings:
    auth = config.auth or RegistryAuth()
    return FetchSettings(
        limit=config.image_size_limit << 20,
        stall=max(config.image_stall_timeout or 60.0, 1.0),
        auth_config=auth.config or "",
        auth_helper=auth.helper or "",
        insecure=config.insecure_registries,
    )


class Fetching:
    """One image that is being fetched."""

    def __init__(self, request: Mapping[str, object], silence: float, turns: asyncio.Semaphore) -> None:
        self.request, self.silence, self.turns = request, silence, turns
        self.listeners: list[Callable[[str], None]] = []  # of the tasks that wait for it
        self.name = str(request["name"])
        self.last_told = time.monotonic()
        self.task = asyncio.create_task(self.run())

    async def run(self) -> None:
        """Wait for a turn; return when the image is in the store. Raises DriverError or OSError."""
        if self.turns.locked():
            await asyncio.sleep(0)  # then there is a listener
            self.tell(f"The image {self.name} waits until other images have been fetched.")
        async with self.turns:
            await self.fetch()

    async def fetch(self) -> None:
        begun = time.monotonic()
        self.tell(f"Fetching the image {self.name}.")
        async with contextlib.aclosing(talk_to_fetcher(self.request, self.silence)) as lines:
            async for line in lines:
                message = parse_message(line)
                if "kind" in message:
                    kind = FETCH_ERRORS.get(message["kind"], DriverError)
                    raise kind(f"image {self.name}: {message['error']}")
                if "note" in message:
                    self.tell(f"Image {self.name}: {message['note']}.")
                if "what" in message:
                    self.tell_progress(message["what"], message["done"], message["total"])
                if "image" in message:
                    self.tell(f"The image {self.name} is there after {time.monotonic() - begun:.1f} s.")
                    return
        raise TransientError(f"image {self.name}: the process that fetches it has ended without a result")

    def tell(self, text: str) -> None:
        for listener in self.listeners:
            listener(text)

    def tell_progress(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self.last_told < PROGRESS_PERIOD:
            return
        self.last_told = time.monotonic()
        share = f", {done * 100 // total} % of {render_size(total)}" if total else f", {render_size(done)} so far"
        self.tell(f"Fetching the image {self.name}: {what}{share}.")


FETCH_ERRORS: dict[str, type[DriverError]] = {
    "TransientError": TransientError,
    "HostError": HostError,
}


def parse_message(line: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        message = json.loads(line)
        if isinstance(message, dict):
            return message
    log.warn("the process that fetches images says", line=line)
    return {}


async def talk_to_fetcher(request: Mapping[str, object], silence: float) -> AsyncGenerator[str, None]:
    """Start the process with the request and yield its lines; kill it at the end, and wait for that."""
    environ = {name: value for name, value in os.environ.items() if name.lower() in PROXIES}
    environ |= {"PATH": SAFE_PATH, "LANG": "C.UTF-8", "HOME": "/root"}
    argv = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-IS", "-X", "utf8", "-c", FETCH]
    ask = os.memfd_create("request")  # no pipe: a job's request may be too large for one, and writing would block
    answer_fd, answer = os.pipe2(os.O_CLOEXEC)
    process = NO_PROCESS
    try:
        with open(ask, "wb", closefd=False) as file:
            file.write(json.dumps(request).encode() + b"\n")
        os.lseek(ask, 0, os.SEEK_SET)
        process = start_process(
            [*argv, str(Path(__file__).parent.parent)], environ=environ, stdin=ask, stdout=answer, stderr=answer
        )
        os.close(answer)
        answer = -1
        os.set_blocking(answer_fd, False)
        async for line in read_lines(answer_fd, silence):
            yield line
    finally:
        for fd in (ask, answer_fd, answer):
            if fd >= 0:
                os.close(fd)
        with contextlib.suppress(ProcessLookupError):
            if CHILDREN.get(process.pid) == process:  # not reaped: the pid is no other process's
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def read_lines(fd: int, silence: float) -> AsyncIterator[str]:
    """Yield lines until the end or one that is too long. Raises TransientError after `silence` s without data."""
    rest = b""
    while True:
        try:
            await asyncio.wait_for(wait_readable(fd), silence)
        except asyncio.TimeoutError:
            raise TransientError(f"fetching has stalled: nothing has happened for {silence:g} s") from None
        data = os.read(fd, 65536)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        if not data or len(rest) > MAX_LINE:
            return


class Fetches:
    """The images being fetched, by their keys."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.running: dict[str, Fetching] = {}
        self.turns = asyncio.Semaphore(FETCHES_AT_ONCE)
        self.collecting: asyncio.Task[None] | None = None

    async def provide(
        self, origin: Origin, settings: FetchSettings, tell: Callable[[str], None]
    ) -> tuple[StoredImage, int]:
        """Return a stored image, fetched if need be, and a descriptor whose lock keeps it from being collected."""
        asked_at, is_fresh = time.time(), False
        for _ in range(3):
            fd = self.store.try_lock(origin.key)
            image = self.store.read(origin.key) if fd is not None else None
            wants_newer = (origin.force or origin.refresh) and not is_fresh
            if fd is not None and image and not (wants_newer and image.checked_at < asked_at):
                self.store.touch(origin.key)
                return image, fd
            if fd is not None:
                os.close(fd)
            await self.fetch(origin, settings, asked_at, tell)
            is_fresh = True
        raise TransientError(f"image {origin.name}: it was removed from the store again and again")

    async def fetch(
        self, origin: Origin, settings: FetchSettings, asked_at: float, tell: Callable[[str], None]
    ) -> None:
        """Fetch the image, or wait for the fetch that runs. The last caller to give up ends the process."""
        key = origin.key
        fetching = self.running.get(key)
        if fetching is None:
            request = self.render_request(origin, settings, asked_at)
            fetching = self.running[key] = Fetching(request, settings.stall + SILENCE_LIMIT, self.turns)
        else:
            tell(f"Waiting for the image {origin.name}, which another task fetches.")
        fetching.listeners.append(tell)
        try:
            await asyncio.shield(fetching.task)
        finally:
            fetching.listeners.remove(tell)
            if not fetching.listeners:
                fetching.task.cancel()
            if self.running.get(key) is fetching and (fetching.task.done() or not fetching.listeners):
                del self.running[key]

    def render_request(self, origin: Origin, settings: FetchSettings, asked_at: float) -> dict[str, object]:
        return {
            **asdict(origin),
            **asdict(settings),
            "action": "fetch",
            "root": str(self.store.root),
            "key": origin.key,
            "asked_at": asked_at,
        }

    def collect(self, delay: float) -> None:
        """Start a collection in the background, if none runs and there is garbage. To look for it blocks."""
        if self.collecting is not None and not self.collecting.done():
            return
        try:
            if self.store.find_garbage(delay):
                self.collecting = asyncio.create_task(self.run_collection(delay))
        except OSError as error:
            log.warn("this machine keeps images from being collected", error=error.strerror)

    async def run_collection(self, delay: float) -> None:
        request = {"action": "collect", "root": str(self.store.root), "delay": delay}
        try:
            async with contextlib.aclosing(talk_to_fetcher(request, 3600)) as lines:
                async for line in lines:
                    if "collected" in (message := parse_message(line)):
                        log.info("images collected", count=message["collected"])
        except (DriverError, OSError) as error:
            log.warn("images cannot be collected", error=str(error))


def render_size(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
