# SPDX-License-Identifier: MPL-2.0
"""The process that fetches images, alone: without a plugin, spoken to with the store's own types."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nspawn.common import SAFE_PATH
from nspawn.fetches import FETCH
from nspawn.files import read_text
from nspawn.images import Origin, redact
from nspawn.store import STORE_ROOT, Retention, Store, StoredImage
from tests.agent import HANG
from tests.containers import make_client
from tests.servers import Entry, FileServer, Liar, folder, make_tar

TOP = Path(__file__).resolve().parent.parent


def tar_name(data: bytes) -> str:
    """The name in the store of what an archive unpacks to."""
    return f"tar-{hashlib.sha256(data).hexdigest()}"


def layer_name(data: bytes) -> str:
    """The same for a layer of an image."""
    return f"layer-{hashlib.sha256(data).hexdigest()}"


class Fetcher:
    """Runs the process that fetches images as the plugin does, on a store of the test's own."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.environ: dict[str, str] = {}
        self.settings: dict[str, Any] = {"limit": 1 << 30, "stall": 5.0, "auth_config": "", "auth_helper": "",
                                         "retention": asdict(Retention())}  # fmt: skip
        self.insecure: list[str] = []
        self.mirrors: dict[str, list[str]] = {}

    def request(self, origin: Origin) -> dict[str, Any]:
        return {
            **asdict(origin), **self.settings, "insecure": self.insecure, "mirrors": self.mirrors,
            "action": "fetch", "key": origin.key, "root": str(self.store.root), "asked_at": time.time(),
        }  # fmt: skip

    def start(self, request: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-IS", "-X", "utf8", "-c", FETCH, str(TOP)],
            env={"PATH": SAFE_PATH, "LANG": "C.UTF-8", **self.environ},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        assert process.stdin
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        return process

    def talk(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        output, _ = self.start(request).communicate(timeout=120)
        messages = []
        for line in output.decode().splitlines():
            assert line.startswith("{"), output.decode()
            messages.append(json.loads(line))
        return messages

    def fetch(self, origin: Origin) -> StoredImage:
        """Fetch an image; fails with what the process says."""
        messages = self.talk(self.request(origin))
        assert "image" in messages[-1], messages
        image = self.store.read(origin.key)
        assert image
        return image

    def refuse(self, origin: Origin) -> tuple[str, str]:
        """Return the error and its kind; nothing may be there of the image."""
        last = self.talk(self.request(origin))[-1]
        assert "error" in last, last
        assert self.store.read(origin.key) is None
        assert not list(self.store.work.iterdir())
        assert not [path for path in self.store.layers.iterdir() if not path.name.startswith("skeleton")]
        text = last["error"]
        assert "Traceback" not in text and "Error(" not in text, text
        return text, last["kind"]

    def collect(self, delay: float = 0, **more: Any) -> int:
        retention = asdict(Retention(delay, **more))
        (message,) = self.talk({"action": "collect", "root": str(self.store.root), "retention": retention})
        return int(message["collected"])


def url_origin(url: str, type: str = "tar", **more: Any) -> Origin:
    return Origin(type, url, redact(url), **more)


def docker_origin(reference: str, **more: Any) -> Origin:
    return Origin("docker", reference, f"docker://{reference}", **more)


def origin_of(liar: Liar) -> Origin:
    """Of the image that a liar serves unless told otherwise."""
    return docker_origin(f"{liar.host}/x")


def layer_of(fetcher: Fetcher, server: FileServer, entries: Sequence[Entry]) -> Path:
    server.files["/image"] = make_tar([folder("usr"), *entries])
    (name,) = fetcher.fetch(url_origin(f"{server.url}/image")).layers
    return fetcher.store.layer(name)


@contextlib.contextmanager
def stacked(layers: Sequence[Path], directory: Path) -> Iterator[Path]:
    """Mount layers, topmost first, over each other."""
    for name in ("upper", "work", "merged"):
        (directory / name).mkdir(parents=True)
    options = f"lowerdir={':'.join(map(str, layers))},upperdir={directory}/upper,workdir={directory}/work"
    # util-linux 2.39 and later hands options over one by one, and none of more than 255 bytes.
    environ = {**os.environ, "LIBMOUNT_FORCE_MOUNT2": "always"}
    argv = ["mount", "-t", "overlay", "overlay", "-o", options, str(directory / "merged")]
    subprocess.run(argv, env=environ, check=True)
    try:
        yield directory / "merged"
    finally:
        subprocess.run(["umount", str(directory / "merged")], check=True)


def download(url: str, **more: object) -> dict[str, Any]:
    """The options of a job that fetches its image."""
    return {"image": "fetched", "read_only": None, "image_download": {"url": url, **more}}


def fetchers(plugin: int) -> list[int]:
    """The processes of a plugin that fetch, or collect, images."""
    shown = subprocess.run(["pgrep", "-P", str(plugin)], stdout=subprocess.PIPE, check=False, timeout=HANG)
    return [
        pid for pid in map(int, shown.stdout.split()) if "fetch.main" in read_text(Path(f"/proc/{pid}/cmdline"))
    ]


def use_store(driver_file: Path, store: Store, folder: Path) -> Path:
    """Return a program that runs the built file with this store in the place of the real one."""
    STORE_ROOT.mkdir(mode=0o700, exist_ok=True)
    return make_client(driver_file, folder / "nomad-driver-nspawn", {store.root: str(STORE_ROOT)})
