# SPDX-License-Identifier: MPL-2.0
"""Many clients behind one mirror: plugins with stores of their own, and nginx as the cache before a registry."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.agent import Plugin
from tests.containers import Tasks, make_client, output
from tests.servers import CachingMirror, Entry, ImageParts, Liar, folder, make_tar

CLIENTS = 20


@contextlib.contextmanager
def start_client(program: Path, block: str) -> Iterator[Plugin]:
    with Plugin(program) as plugin:
        plugin.set_config(block)
        plugin.open_streams()
        yield plugin
    assert not plugin.violations


def test_twenty_clients_ask_upstream_once(driver_file: Path, image: Path, archive: bytes, tmp_path: Path) -> None:
    """All at a time; each runs a task from the image, and each layer leaves the registry once."""
    Path("/var/lib/nomad-driver-nspawn").mkdir(mode=0o700, exist_ok=True)
    stores = [tmp_path / f"store{number}" for number in range(CLIENTS)]
    programs = []  # all of them first: a program that is being written cannot be started by another thread
    for store in stores:
        store.mkdir()
        place = {store: "/var/lib/nomad-driver-nspawn"}
        programs.append(make_client(driver_file, store.with_suffix(".sh"), place))
    layers = [
        archive,
        *(make_tar([folder("layers"), Entry(f"layers/{n}", os.urandom(1 << 20))]) for n in range(5)),
    ]
    with Liar() as upstream, CachingMirror(tmp_path / "mirror", upstream.url) as mirror:
        upstream.serve(ImageParts.make(layers), tag="1")
        block = f"""
            registry_mirrors    = {{ "{upstream.host}" = ["{mirror.host}"] }}
            insecure_registries = ["{mirror.host}"]
        """

        def run(program: Path) -> str:
            with start_client(program, block) as plugin, Tasks(plugin, image) as tasks:
                reference = f"docker://{upstream.host}/x:1"
                task, _ = tasks.run("ls /layers", image=reference, read_only=None)
                return output(task)

        with ThreadPoolExecutor(CLIENTS) as pool:
            said = list(pool.map(run, programs))
        assert said == ["0\n1\n2\n3\n4\n"] * CLIENTS
        asked = Counter(seen.path.partition("?")[0] for seen in upstream.seen)
        assert asked == dict.fromkeys(upstream.files, 1)
    assert [len(list((store / "layers").iterdir())) for store in stores] == [len(layers) + 1] * CLIENTS
