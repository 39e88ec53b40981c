# SPDX-License-Identifier: MPL-2.0
"""Where rounds run: a plugin, an image of its own, and small file systems in place of those of the host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.agent import Plugin, launch_like_agent
from tests.containers import kill, make_small_image
from tests.leftovers import NSPAWN, STATE, leftovers, processes

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(os.environ.get("NSPAWN_TEST_DRIVER", ROOT / "nomad-driver-nspawn"))
IMAGE = Path(os.environ.get("NSPAWN_TEST_IMAGE", "/var/cache/nomad-driver-nspawn-tests/debian-bookworm"))
FILLER = "chaos"  # the file that fills a file system
PLACES = {STATE: "size=4m,mode=0700", NSPAWN: "size=1m,mode=0755", Path("/run/systemd/nspawn-uid"): "size=1m"}


class Worker:
    """Needs a mount namespace of its own."""

    def __init__(self) -> None:
        for place, options in PLACES.items():
            place.mkdir(parents=True, exist_ok=True)
            command = ["mount", "-t", "tmpfs", "-o", options, "chaos", str(place)]
            subprocess.run(command, check=True, timeout=30)
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.image = self.folder / "images/small"
        make_small_image(IMAGE, self.image, ["dash", "sleep"])
        self.launch()

    def launch(self) -> Plugin:
        self.plugin = launch_like_agent(DRIVER, 'allow = ["all"]')
        self.pidfd = os.pidfd_open(self.plugin.pid)
        self.descriptors = self.count_descriptors()
        return self.plugin

    def count_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.plugin.pid}/fd"))

    def stop(self, *, hard: bool) -> list[str]:
        """End the plugin in order, or as a crash; return what an agent would not stand of it."""
        if hard:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self.plugin.kill_hard()
        else:
            self.plugin.kill()
        os.close(self.pidfd)
        return self.plugin.violations

    def find_files(self) -> Iterator[Path]:
        """What is in the directories of driver and nspawn, but for sockets of plugins: a crash leaves these."""
        for place in PLACES:
            for path in place.rglob("*"):
                is_expected = path.name == FILLER or f"{STATE}/plugin-" in str(path)
                if not is_expected and (path.parent == STATE or not path.is_dir()):
                    yield path
        yield from (path for path in self.image.parent.iterdir() if path != self.image)

    def clear(self, alloc_id: str) -> None:
        """Remove all that a failed round has left, with the plugin that may know of it."""
        self.stop(hard=True)
        for pid, _ in processes(alloc_id):
            kill(pid)
        time.sleep(0.5)
        for path in self.find_files():
            subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=False, timeout=30)
        for kind, _, name in (line.partition(" ") for line in leftovers(alloc_id)):
            if kind == "cgroup":
                with contextlib.suppress(OSError):
                    for folder, _, _ in os.walk(name, topdown=False):
                        os.rmdir(folder)
            elif kind == "interface":
                subprocess.run(["ip", "link", "delete", name], check=False, timeout=30)
        self.launch()

    def close(self) -> None:
        self.stop(hard=True)
        shutil.rmtree(self.folder)
