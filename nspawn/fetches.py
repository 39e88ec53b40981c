# SPDX-License-Identifier: MPL-2.0
"""The plugin's side of fetching images.

Each image is fetched by a process of its own (fetch.py), which ends with the plugin: no download, certificate or
archive takes the plugin's time or memory. All tasks that wait for an image share its process. It reports its
progress in lines of JSON; if it is silent for too long, it has stalled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nspawn.common import MAX_LINE, SAFE_PATH, DriverError, HostError, TransientError, explain_host, log
from nspawn.images import Origin, demand_signature, plan_preload
from nspawn.permissions import PluginOptions, RegistryAuth
from nspawn.process import CHILDREN, NO_PROCESS, run_in_thread, start_process, wait_readable
from nspawn.store import Retention, Store, StoredImage

FETCH = "import sys; sys.path.insert(0, sys.argv[1]); from nspawn import fetch; fetch.main()"
COLLECTION_DELAY = 86400.0  # seconds
PRELOAD_PAUSE, MAX_PRELOAD_PAUSE = 30.0, 3600.0  # seconds until what has failed is tried again: first, and at most
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
    mirrors: Mapping[str, tuple[str, ...]]  # by the names of registries
    keys: Mapping[str, str]  # files of public keys that must have signed images, see demand_signature
    retention: Retention


def plan_fetching(config: PluginOptions) -> FetchSettings:
    auth = config.auth or RegistryAuth()
    return FetchSettings(
        limit=config.image_size_limit << 20,
        stall=max(config.image_stall_timeout or 60.0, 1.0),
        auth_config=auth.config or "",
        auth_helper=auth.helper or "",
        insecure=config.insecure_registries,
        mirrors=config.registry_mirrors,
        keys=config.require_signature,
        retention=plan_retention(config),
    )


def plan_retention(config: PluginOptions) -> Retention:
    preload = tuple(plan_preload(reference).name for reference in config.preload)
    if not config.image_gc:
        return Retention(keep=config.image_keep, preload=preload)
    delay = COLLECTION_DELAY if config.image_gc_delay is None else config.image_gc_delay
    max_size = config.image_store_max.bytes if config.image_store_max else 0
    return Retention(delay, max_size, config.image_keep, preload)


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
        self.preload_turn = asyncio.Semaphore(1)  # so that no start waits for a turn
        self.wanted: list[str] = []  # keys of the images that callers of `provide` wait for
        self.collecting: asyncio.Task[None] | None = None
        self.collect_next: Retention | None = None  # when the collection that runs has ended
        self.has_excess = False

    async def provide(
        self,
        origin: Origin,
        settings: FetchSettings,
        tell: Callable[[str], None],
        turns: asyncio.Semaphore | None = None,
    ) -> tuple[StoredImage, int]:
        """Return a stored image, fetched if need be, and a descriptor whose lock keeps it from being collected."""
        asked_at, is_fresh = time.time(), False
        if settings.keys:
            asked_for = origin
            origin = await run_in_thread(lambda: demand_signature(asked_for, settings.keys))
        wanted = await self.want(origin, tell)
        self.wanted.append(origin.key)
        try:
            for _ in range(3):
                fd = self.store.try_lock(origin.key)
                image = self.store.read(origin.key) if fd is not None else None
                wants_newer = (origin.force or origin.refresh) and not is_fresh
                if fd is not None and image and not (wants_newer and image.checked_at < asked_at):
                    self.store.touch(origin.key)
                    return image, fd
                if fd is not None:
                    os.close(fd)
                await self.fetch(origin, settings, asked_at, tell, turns or self.turns)
                is_fresh = True
        finally:
            self.wanted.remove(origin.key)
            os.close(wanted)
        raise TransientError(f"image {origin.name}: others fetch it or remove it again and again")

    async def want(self, origin: Origin, tell: Callable[[str], None]) -> int:
        """Return a descriptor whose lock keeps an image from being collected, from before its fetch on. If it is
        just being removed, wait for the end of that: it is then fetched again."""
        fd = self.store.try_start(origin.key)
        if fd is None:
            tell(f"Waiting for the image {origin.name}, which is just being removed.")
        while fd is None:
            await asyncio.sleep(0.05)
            fd = self.store.try_start(origin.key)
        return fd

    async def fetch(
        self,
        origin: Origin,
        settings: FetchSettings,
        asked_at: float,
        tell: Callable[[str], None],
        turns: asyncio.Semaphore,
    ) -> None:
        """Fetch the image, or wait for the fetch that runs. The last caller to give up ends the process."""
        key = origin.key
        fetching = self.running.get(key)
        if fetching is None:
            request = self.render_request(origin, settings, asked_at)
            fetching = self.running[key] = Fetching(request, settings.stall + SILENCE_LIMIT, turns)
        else:
            tell(f"Waiting for the image {origin.name}, which is already being fetched.")
        fetching.listeners.append(tell)
        try:
            await asyncio.shield(fetching.task)
        finally:
            fetching.listeners.remove(tell)
            if not fetching.listeners:
                fetching.task.cancel()
            if self.running.get(key) is fetching and (fetching.task.done() or not fetching.listeners):
                del self.running[key]
        self.collect(settings.retention)

    async def preload(self, config: PluginOptions) -> None:
        """Fetch the images that the plugin's block lists, one after another. Those that fail are tried again, with
        growing pauses. Call it when an agent is there: SetConfig also comes to processes that only live for it."""
        settings, pause = plan_fetching(config), PRELOAD_PAUSE
        try:
            self.store.write_retention(settings.retention)
        except OSError as error:
            log.warn("cannot write to the store of images", error=str(explain_host(error)))
        origins = [plan_preload(reference) for reference in config.preload if config.enabled]
        while origins:
            origins = [origin for origin in origins if not await self.try_preload(origin, settings, pause)]
            if origins:
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PRELOAD_PAUSE)

    async def try_preload(self, origin: Origin, settings: FetchSettings, pause: float) -> bool:
        """Fetch an image if it is not there. Return whether it is; if not, log why."""

        def tell(text: str) -> None:
            log.info(text)

        try:
            _, kept = await self.provide(origin, settings, tell, self.preload_turn)
            os.close(kept)
            return True
        except (DriverError, OSError) as error:
            log.warn("cannot preload an image", image=origin.name, error=str(error), again_in=f"{pause:g} s")
            return False

    def render_request(self, origin: Origin, settings: FetchSettings, asked_at: float) -> dict[str, object]:
        return {
            **asdict(origin),
            **asdict(settings),
            "action": "fetch",
            "root": str(self.store.root),
            "key": origin.key,
            "asked_at": asked_at,
        }

    def collect(self, retention: Retention) -> None:
        """Start a collection in the background if there is garbage, after the one that runs. To look for garbage
        blocks."""
        if self.collecting is not None and not self.collecting.done():
            self.collect_next = retention
            return
        try:
            garbage = self.store.find_garbage(retention, is_free=lambda name: name not in self.wanted)
        except OSError as error:
            log.warn("this machine keeps images from being collected", error=error.strerror)
            return
        if garbage.excess and not self.has_excess:
            used = render_size(retention.max_size + garbage.excess)
            log.warn("the images that are in use or kept need more than image_store_max allows", size=used)
        self.has_excess = garbage.excess > 0
        if garbage.paths:
            self.collecting = asyncio.create_task(self.run_collection(retention))
            self.collecting.add_done_callback(self.collect_again)

    def collect_again(self, ended: asyncio.Task[None]) -> None:
        retention, self.collect_next = self.collect_next, None
        if retention and not ended.cancelled():
            self.collect(retention)

    async def run_collection(self, retention: Retention) -> None:
        request = {"action": "collect", "root": str(self.store.root), "retention": asdict(retention)}
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
