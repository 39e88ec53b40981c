# SPDX-License-Identifier: MPL-2.0
"""How long fetched images are kept: the limit of the store, the keep list, and images fetched ahead of time."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nspawn.fetches import Fetches
from nspawn.store import Retention, Store
from tests.agent import Plugin, launch_like_agent
from tests.agent.log import LogEntry
from tests.containers import Starting, Tasks, eventually, is_alive, output
from tests.fetching import Fetcher, docker_origin, download, fetchers, url_origin, use_store
from tests.options import CONFIG
from tests.servers import Entry, FileServer, ImageParts, Liar, folder, make_tar, pack_files, send, stall, status

MIB = 1 << 20


@pytest.fixture
def driver_file(driver_file: Path, store: Store, tmp_path: Path) -> Path:
    return use_store(driver_file, store, tmp_path)


@pytest.fixture
def tasks(plugin: Plugin, image: Path) -> Iterator[Tasks]:
    with Tasks(plugin, image) as made:
        yield made


def make_layer(name: str, size: int = MIB) -> bytes:
    return make_tar([folder("usr"), Entry(f"usr/{name}", os.urandom(size))])


@pytest.fixture
def fetched(fetcher: Fetcher, server: FileServer) -> Iterator[Fetcher]:
    """Three images of a mebibyte each; `a` was used first and `c` last."""
    for number, name in enumerate("abc"):
        server.files[f"/{name}"] = make_layer(name)
        image = fetcher.fetch(url_origin(f"{server.url}/{name}"))
        os.utime(fetcher.store.images / f"{image.key}.json", (number + 1, number + 1))
    yield fetcher


def names(store: Store) -> str:
    """The images in the store, by the last letters of their names."""
    return "".join(sorted(image.name[-1] for image in store.read_all()))


DAY = 86400.0
EVER = 1e12  # seconds: the images of these tests were last used in 1970


# -- the limit -----------------------------------------------------------------------------------------------


def test_least_recently_used_go_first(fetched: Fetcher) -> None:
    assert fetched.collect(EVER, max_size=4 * MIB) == 0
    assert fetched.collect(EVER, max_size=3 * MIB) > 0
    assert names(fetched.store) == "bc"
    assert len(list(fetched.store.layers.iterdir())) == len(list(fetched.store.sizes.iterdir())) == 2
    fetched.collect(EVER, max_size=1)
    assert names(fetched.store) == "" and not list(fetched.store.layers.iterdir())


def test_what_is_listed_stays(fetched: Fetcher, server: FileServer) -> None:
    preload = [f"{server.url}/a"]
    fetched.collect(EVER, max_size=1, keep=["*/b"], preload=preload)
    assert names(fetched.store) == "ab"
    fetched.collect(0, keep=["http://*"])
    assert names(fetched.store) == "ab"
    fetched.collect(0, keep=["http:"], preload=preload)
    assert names(fetched.store) == "a"


def test_shared_layers_count_once(fetcher: Fetcher, liar: Liar) -> None:
    base = make_layer("base")
    for name in "abc":
        liar.serve(ImageParts.make([base, make_layer(name)]), name)
        fetcher.fetch(docker_origin(f"{liar.host}/{name}"))
    assert fetcher.collect(DAY, max_size=5 * MIB) == 0
    fetcher.collect(DAY, max_size=4 * MIB)
    assert names(fetcher.store) == "bc", "with the layer that they share with the image that is gone"
    assert len([*fetcher.store.layers.glob("layer-*")]) == 3


def test_room_is_made_before_a_fetch(fetched: Fetcher, server: FileServer, liar: Liar) -> None:
    """By the process that fetches, before it downloads layers: it does not look once more afterwards."""
    parts = ImageParts.make([make_layer("x")])
    liar.serve(parts)
    seen: list[str] = []
    blob = parts.layers[0]

    def answer(request: Any) -> None:
        seen.append(names(fetched.store))
        send(request, 200, blob.data)

    liar.answers[f"/v2/x/blobs/{blob.digest}"] = answer
    fetched.settings["retention"] = asdict(Retention(EVER, 3 * MIB))
    fetched.fetch(docker_origin(f"{liar.host}/x"))
    assert seen == ["c"], "compressed, the layer has as many bytes"
    server.files["/y"] = make_layer("y")
    fetched.fetch(url_origin(f"{server.url}/y"))
    assert names(fetched.store) == "xy"


def test_what_a_failed_fetch_has_left_goes_first(fetched: Fetcher, liar: Liar) -> None:
    parts = ImageParts.make([make_layer("x"), make_layer("y")])
    liar.serve(parts)

    def answer(request: Any) -> None:
        eventually(lambda: len(list(fetched.store.layers.iterdir())) == 4)
        status(500)(request)

    liar.answers[f"/v2/x/blobs/{parts.layers[1].digest}"] = answer
    assert "error" in fetched.talk(fetched.request(docker_origin(f"{liar.host}/x")))[-1]
    fetched.collect(EVER, max_size=4 * MIB)
    assert names(fetched.store) == "abc" and len(list(fetched.store.layers.iterdir())) == 3


def test_images_in_use_exceed_the_limit(
    driver_file: Path, image: Path, store: Store, server: FileServer, archive: bytes
) -> None:
    """Starts go on, and one line of the log says it. Afterwards the images go."""
    server.files |= {"/a": archive, "/b": pack_files(ImageParts.make([archive]).save())}
    with launch_like_agent(driver_file, 'image_store_max = "1M"') as plugin, Tasks(plugin, image) as tasks:
        first, second = (tasks.start("sleep 300", **download(f"{server.url}/{name}")) for name in "ab")
        assert names(store) == "ab"
        said = [entry for entry in plugin.log if "more than image_store_max allows" in entry.message]
        assert len(said) == 1 and said[0].fields["size"].endswith("MB")
        first.destroy()
        eventually(lambda: names(store) == "b")
        second.destroy()
        eventually(lambda: names(store) == "" and not list(store.layers.iterdir()))


# -- starts and plugins that end meanwhile -------------------------------------------------------------------


def test_a_start_while_its_image_is_removed(
    tasks: Tasks, store: Store, server: FileServer, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the end of that, and fetches the image again."""
    server.files["/image"] = archive
    task, _ = tasks.run("true", **download(f"{server.url}/image"))
    task.destroy()
    tasks.made.clear()
    started: list[Starting] = []

    def start(store: Store) -> None:
        started.append(Starting(tasks.make("echo hello", **download(f"{server.url}/image"))))
        eventually(lambda: any("is just being removed" in event.message for event in tasks.plugin.events))

    monkeypatch.setattr(Store, "remove_locks", start)  # called while the image is locked
    store.collect(Retention(0))
    assert started[0].join() is None
    assert len(server.seen) == 2


def test_a_start_keeps_its_image_from_the_end_of_the_fetch_on(fetcher: Fetcher, server: FileServer) -> None:
    """Also when the fetch has ended, and the start does not hold the image itself yet."""
    server.files["/image"] = make_layer("x")
    origin = url_origin(f"{server.url}/image")
    start = fetcher.store.try_start(origin.key)
    assert start is not None
    fetcher.fetch(origin)
    fetcher.collect(0)
    assert fetcher.store.read(origin.key)
    os.close(start)
    fetcher.collect(0)
    assert not fetcher.store.read(origin.key)


def test_a_plugin_killed_while_it_removes(
    driver_file: Path, image: Path, store: Store, server: FileServer, archive: bytes
) -> None:
    """The next one removes the rest at once, and not after the delay."""
    server.files["/image"] = archive
    with launch_like_agent(driver_file, 'image_gc_delay = "0s"') as plugin, Tasks(plugin, image) as tasks:
        task = tasks.start("sleep 300", **download(f"{server.url}/image"))
        (layer,) = store.layers.iterdir()
        for number in range(300):
            (layer / f"usr/{number}").touch()
        task.destroy()
        eventually(lambda: store.trash.is_dir() and list(store.trash.iterdir()), pause=0.001)
        collectors = fetchers(plugin.pid)
        plugin.kill_hard()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in collectors))
    with launch_like_agent(driver_file) as plugin, Tasks(plugin, image) as tasks:
        task, result = tasks.run("echo hello", **download(f"{server.url}/image"))
        assert result.exit_code == 0 and output(task) == "hello\n"
        task.destroy()
        eventually(lambda: not list(store.work.iterdir()))
        assert len(store.read_all()) == 1


# -- preload -------------------------------------------------------------------------------------------------


def test_preload(
    driver_file: Path, image: Path, store: Store, server: FileServer, liar: Liar, archive: bytes
) -> None:
    """One reference is broken. The plugin is killed while it fetches another one; the next plugin has them all."""
    liar.serve(ImageParts.make([archive], Cmd=["/bin/ls"]), "app", "1")
    server.answers["/slow"] = stall(archive, 1000)
    server.files["/image"] = archive
    registry = f"docker://{liar.host}/app:1"
    config = {
        "preload": [f"{server.url}/missing", f"{server.url}/slow", registry],
        "image_gc_delay": "0s",
    }
    with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image) as tasks:
        (fetcher,) = eventually(lambda: fetchers(plugin.pid) if len(server.seen) > 1 else [])
        said = find_failures(plugin)
        assert [entry.fields["image"] for entry in said] == [f"{server.url}/missing"]
        assert "404" in said[0].fields["error"] and said[0].fields["again_in"] == "30 s"
        assert tasks.run("true", **download(f"{server.url}/image"))[1].exit_code == 0
        joining = Starting(tasks.make("echo hello", **download(f"{server.url}/slow")))
        eventually(lambda: any("already being fetched" in event.message for event in plugin.events))
        joining.end("stop")
        joining.join()
        assert is_alive(fetcher), "it is the operator's, too"
        tasks.close()
        plugin.kill_hard()
        eventually(lambda: not Path(f"/proc/{fetcher}").exists())
    server.files["/slow"] = archive
    del server.answers["/slow"]
    with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image) as tasks:
        eventually(lambda: {f"{server.url}/slow", registry} <= {image.name for image in store.read_all()})
        liar.answers["/v2/app/manifests/1"] = server.answers["/slow"] = status(500)
        for options in (download(f"{server.url}/slow"), {"image": registry, "read_only": None}):
            assert tasks.run("true", **options)[1].exit_code == 0, "the start asks nobody"
        eventually(lambda: not list(store.parts.iterdir()))
        printed = show_images(driver_file)
        assert printed.count("/task, preload\n") == 2, printed
        tasks.close()
        eventually(lambda: len(store.read_all()) == 2)
    with launch_like_agent(driver_file, 'image_gc_delay = "0s"') as plugin, Tasks(plugin, image) as tasks:
        tasks.run("true")
        tasks.close()
        eventually(lambda: not store.read_all() and not list(store.layers.iterdir()))


def find_failures(plugin: Plugin) -> list[LogEntry]:
    return [entry for entry in plugin.log if entry.message == "cannot preload an image"]


def show_images(driver_file: Path) -> str:
    return subprocess.run([driver_file, "images"], stdout=subprocess.PIPE, check=True, text=True).stdout


def test_preload_tries_again(
    fetcher: Fetcher, server: FileServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With pauses that grow, until it has the image."""
    monkeypatch.setattr("nspawn.fetches.PRELOAD_PAUSE", 0.01)
    answers = iter([404, 500, 404])
    data = make_layer("x")
    server.answers["/a"] = lambda request: send(request, next(answers, 200), data)
    config = replace(CONFIG, preload=(f"{server.url}/a",))
    asyncio.run(asyncio.wait_for(Fetches(fetcher.store).preload(config), 60))
    assert names(fetcher.store) == "a" and len(server.seen) == 4
    pauses = re.findall(r'"again_in": "(.*?) s"', capfd.readouterr().err)
    assert pauses == ["0.01", "0.02", "0.04"]
