# SPDX-License-Identifier: MPL-2.0
"""The store, and tasks from fetched images: the built plugin, real servers, real containers."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import driver
from nspawn.fetches import Fetches
from nspawn.files import TreeRemover, remove_tree
from nspawn.store import STORE_ROOT, Retention, Store
from tests.agent import HANG, AgentError, DriverError, Plugin, Task, launch_like_agent
from tests.containers import Starting, Tasks, eventually, is_alive, kill, make_small_image, output
from tests.fetching import Fetcher, download, fetchers, url_origin, use_store
from tests.leftovers import free_locks, processes
from tests.servers import (
    Entry,
    FileServer,
    ImageParts,
    Registry,
    basic,
    basic_auth,
    folder,
    make_deep,
    make_tar,
    pack_files,
    pack_tree,
    stall,
)


@pytest.fixture
def driver_file(driver_file: Path, store: Store, tmp_path: Path) -> Path:
    return use_store(driver_file, store, tmp_path)


@pytest.fixture
def tasks(plugin: Plugin, image: Path, store: Store) -> Iterator[Tasks]:
    with Tasks(plugin, image) as made:
        yield made


# -- tasks from fetched images -------------------------------------------------------------------------------


def test_task_from_an_address(tasks: Tasks, server: FileServer, archive: bytes, store: Store) -> None:
    server.files["/image.tar.gz"] = gzip.compress(archive, 1)
    config = download(f"{server.url}/image.tar.gz")
    script = "echo hello; touch /usr/written; ls /usr"
    task, result = tasks.run(script, **config)
    assert result.exit_code == 0 and "written" in output(task)
    messages = [event.message for event in task.events]
    assert any("Fetching the image" in message for message in messages)
    assert any(re.search(r"is there after \d", message) for message in messages)
    again, _ = tasks.run("ls /usr", **config)
    assert "written" not in output(again), "each task has a root of its own"
    assert len(server.seen) == 1, "it is fetched once"
    (layer,) = store.layers.iterdir()
    assert not (layer / "usr/written").exists()


def pull(driver_file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [str(driver_file), "pull", *arguments]
    return subprocess.run(argv, capture_output=True, check=False, text=True, timeout=60)


def test_image_pulled_ahead_of_time(
    driver_file: Path, tasks: Tasks, server: FileServer, archive: bytes, tmp_path: Path
) -> None:
    """Jobs that name it in the same way find it, and do not ask its server again."""
    server.files["/image.tar"] = archive
    url = f"{server.url}/image.tar"
    said = pull(driver_file, url)
    assert said.returncode == 0 and f"{url} is in the store: " in said.stdout, said
    asked = len(server.seen)
    _, result = tasks.run("true", **download(url))
    assert result.exit_code == 0 and len(server.seen) == asked
    with Registry(tmp_path / "registry") as registry:
        registry.push("app", ImageParts.make([archive]), tag="1")
        address = f"docker://{registry.host}/app:1"
        assert pull(driver_file, address).returncode == 0
        mirrored = "docker://registry.invalid/app:1"
        assert pull(driver_file, mirrored, "--mirror", f"registry.invalid={registry.host}").returncode == 0
    for image in (address, mirrored):
        _, result = tasks.run("true", image=image, read_only=None)
        assert result.exit_code == 0, "the registry is gone by now"
    failed = pull(driver_file, f"{server.url}/nothing")
    assert failed.returncode == 1 and "404" in failed.stderr and failed.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["image.tar", "image.tar.gz"])
def test_task_from_an_archive_in_its_directory(tasks: Tasks, archive: bytes, name: str) -> None:
    """As `artifact` brings it."""
    task = tasks.make("echo hello", image=f"local/{name}", read_only=None)
    task.prestart()
    place = Path(task.task_config().alloc_dir, task.name, "local", name)
    place.write_bytes(gzip.compress(archive, 1) if name.endswith("gz") else archive)
    task.start()
    assert task.wait().exit_code == 0
    assert output(task) == "hello\n"


def test_task_from_a_registry(tasks: Tasks, archive: bytes, tmp_path: Path) -> None:
    """The image says what is run, as whom, where and with which variables; the job can say otherwise."""
    upper = make_tar([Entry("etc/marker", b"upper layer\n"), Entry("usr/bin/.wh.touch"), folder("work", uid=1)])
    with Registry(tmp_path / "registry") as registry:
        registry.push("app", ImageParts.make(
            [archive, upper], Env=["GREETING=from the image", "OTHER=x"], WorkingDir="/work",
            Entrypoint=["/bin/sh", "-c"], Cmd=['echo "$GREETING"; cat /etc/marker; cd . && echo "${PWD}"'],
        ))  # fmt: skip
        config = {"image": f"docker://{registry.host}/app", "read_only": None}
        task, result = tasks.run(**config, command=None)
        assert result.exit_code == 0, result
        assert output(task) == "from the image\nupper layer\n/work\n"
        task, _ = tasks.run("echo $GREETING $OTHER; ls /usr/bin", **config, environment=[{"OTHER": "job"}])
        assert output(task).splitlines()[0] == "from the image job"
        assert "touch" not in output(task), "a whiteout hides what the lower layer has"
        go_job = {"image": "app", "read_only": None,
                  "image_download": {"url": f"{registry.host}/app:latest", "type": "docker"}}  # fmt: skip
        task, _ = tasks.run("cat /etc/marker", **go_job)
        assert output(task) == "upper layer\n"


# What a job says, and what is run of an image with Entrypoint ["echo", "E"] and Cmd ["echo", "C"], with one of the
# two, and with none.
COMMAND_LINES: list[tuple[dict[str, list[str]], tuple[str, str, str, str]]] = [
    ({}, ("E echo C", "E", "C", "")),
    ({"args": ["echo", "a"]}, ("E echo a", "E echo a", "a", "a")),
    ({"command": ["echo", "c"]}, ("c", "c", "c", "c")),
    ({"command": ["echo", "c"], "args": ["a"]}, ("c a", "c a", "c a", "c a")),
    ({"entrypoint": ["echo", "e"]}, ("e", "e", "e", "e")),
    ({"entrypoint": ["echo", "e"], "args": ["a"]}, ("e a", "e a", "e a", "e a")),
    ({"entrypoint": ["echo", "e"], "command": ["c"], "args": ["a"]}, ("e c a", "e c a", "e c a", "e c a")),
]


@pytest.mark.parametrize(
    ("number", "config"),
    [(0, {"Entrypoint": ["echo", "E"], "Cmd": ["echo", "C"]}), (1, {"Entrypoint": ["echo", "E"]}),
     (2, {"Cmd": ["echo", "C"]}), (3, {})],
)  # fmt: skip
def test_command_lines_of_image_and_job(
    tasks: Tasks, archive: bytes, tmp_path: Path, number: int, config: dict[str, Any]
) -> None:
    """As docker makes them; the table is in docs/images.md."""
    place = tmp_path / "app.tar"
    place.write_bytes(pack_files(ImageParts.make([archive], **config).save()))
    for said, expected in COMMAND_LINES:
        job: dict[str, Any] = {"command": None, "image": str(place), "read_only": None, **said}
        if expected[number]:
            task, result = tasks.run(**job)
            assert (output(task), result.exit_code) == (f"{expected[number]}\n", 0), said
        else:
            with pytest.raises(DriverError, match="is required when boot is false"):
                tasks.start(**job)


def test_saved_image_and_its_user(tasks: Tasks, archive: bytes) -> None:
    """An archive of `docker save` in the task's directory; command and exec run as the image's user."""
    upper = make_tar([
        Entry("etc/passwd", b"root:x:0:0::/:\napp:x:700:700::/tmp:\n"),
        Entry("etc/group", b"root:x:0:\napp:x:700:\nother:x:701:app\n"),
    ])  # fmt: skip
    who = "uid=700(app) gid=700(app) groups=700(app),701(other)"

    def start(user: str, job_user: str | None = None) -> Task:
        image = ImageParts.make([archive, upper], User=user, Cmd=["/bin/sh", "-c", "id; sleep 300"])
        task = tasks.make(image="local/app.tar", read_only=None, command=None, options={"user": job_user})
        task.prestart()
        Path(task.task_config().alloc_dir, task.name, "local/app.tar").write_bytes(pack_files(image.save()))
        task.start()
        return task

    users = {
        "app": who,
        "app:other": "uid=700(app) gid=701(other) groups=701(other)",
        "1001": "uid=1001 gid=0(root) groups=0(root)",
    }
    for user, expected in (*users.items(), ("", who)):
        task = start(user, None if user else "700")
        assert task.logmon.wait_for("\n").decode() == f"{expected}\n"
        assert task.exec(["id"])[0].decode() == f"{expected}\n"
    with pytest.raises(DriverError, match=r'user = "app:x": .*has no group x'):
        start("app:x")


def test_user_of_an_image_without_a_system(tasks: Tasks, image: Path, tmp_path: Path) -> None:
    """Nothing in it but a program and its libraries: no /usr, no /etc, no getent."""
    make_small_image(image, tmp_path / "tree", ["dash", "id", "sleep"])
    for name in ("bin", "lib", "lib64"):
        (tmp_path / "tree" / name).unlink()
        (tmp_path / "tree/usr" / name).rename(tmp_path / "tree" / name)
    for name in ("sbin", "usr", "etc", "dev", "proc", "sys", "run", "var", "tmp", "mnt"):
        path = tmp_path / "tree" / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    parts = ImageParts.make([pack_tree(tmp_path / "tree")], User="65532:65533", Cmd=["id"])
    (tmp_path / "app.tar").write_bytes(pack_files(parts.save()))
    for more in ({}, {"user_namespacing": False}, {"read_only": True}, {"volatile": "overlay"}):
        options = {"image": str(tmp_path / "app.tar"), "read_only": None, "command": None, **more}
        task, result = tasks.run(**options)
        assert output(task) == "uid=65532 gid=65533 groups=65533\n", (more, result, task.logmon.stderr)
    task = tasks.start(**{**options, "command": ["sleep", "300"]})
    assert task.exec(["id"])[0] == b"uid=65532 gid=65533 groups=65533\n"


def test_stop_signal_of_the_image(tasks: Tasks, archive: bytes, tmp_path: Path) -> None:
    script = "trap 'echo quit; exit 7' QUIT; echo ready; while :; do sleep 0.05; done"
    with Registry(tmp_path / "registry") as registry:
        registry.push("app", ImageParts.make([archive], StopSignal="SIGQUIT"))
        task = tasks.start(script, image=f"docker://{registry.host}/app", read_only=None)
        task.logmon.wait_for("ready")
        task.stop(kill_signal="")
        assert task.wait().exit_code == 7


def test_booted_system_and_other_roots(tasks: Tasks, image: Path, tmp_path: Path, store: Store) -> None:
    """An image of the store with everything that changes what the root is."""
    (tmp_path / "debian.tar").write_bytes(pack_tree(image))
    name = str(tmp_path / "debian.tar")
    for volatile in (None, "state"):
        task = tasks.start(image=name, boot=True, command=None, volatile=volatile)
        task.logmon.wait_for("Reached target multi-user.target")
        task.stop(20)
        task.destroy()
    for more, writable in (
        ({"read_only": True}, "/dev"), ({"volatile": "state"}, "/var"), ({"volatile": "yes"}, "/ /etc /var"),
        ({"volatile": "overlay"}, "/ /etc /usr /var"),
    ):  # fmt: skip
        script = "for place in / /etc /usr /var /dev; do touch $place/x 2>/dev/null && echo $place; done"
        task, _ = tasks.run(script, image=name, **{"read_only": None, **more})
        assert [*dict.fromkeys([*output(task).split(), "/dev"])] == [
            *writable.split(),
            *["/dev"] * (writable != "/dev"),
        ]
    assert len(store.read_all()) == 1
    (layer,) = store.layers.iterdir()
    assert not (layer / "x").exists() and not (layer / "var/x").exists()


def test_boot_without_init(tasks: Tasks, server: FileServer, archive: bytes) -> None:
    server.files["/image"] = archive
    with pytest.raises(DriverError, match=r"boot = true: the image has no init .* set boot = false"):
        tasks.start(boot=True, **download(f"{server.url}/image"))


def test_private_image(tasks: Tasks, archive: bytes, tmp_path: Path) -> None:
    with Registry(tmp_path / "registry", basic_auth(tmp_path / "auth")) as registry:
        registry.headers = {"Authorization": basic("ci", "secret")}
        registry.push("app", ImageParts.make([archive]))
        config = {"image": f"docker://{registry.host}/app", "read_only": None}
        with pytest.raises(DriverError, match="needs credentials") as caught:
            tasks.start("echo hello", **config)
        assert not caught.value.recoverable
        task, _ = tasks.run("echo hello", **config, auth={"username": "ci", "password": "secret"})
        assert output(task) == "hello\n"


def test_network_trouble_is_recoverable(tasks: Tasks) -> None:
    with pytest.raises(DriverError, match="cannot be reached") as caught:
        tasks.start("echo hello", **download("http://127.0.0.1:1/image"))
    assert caught.value.recoverable


# -- once ----------------------------------------------------------------------------------------------------


def test_several_tasks_at_once_fetch_once(tasks: Tasks, server: FileServer, archive: bytes) -> None:
    server.files["/image"] = archive
    made = [tasks.make("echo hello", name=f"t{n}", **download(f"{server.url}/image")) for n in range(6)]
    threads = [threading.Thread(target=task.start) for task in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [task.wait().exit_code for task in made] == [0] * 6
    assert len(server.seen) == 1


def test_several_processes_at_once_fetch_once(server: FileServer, archive: bytes, tmp_path: Path) -> None:
    """As several plugins would."""
    server.files["/image"] = archive
    fetcher = Fetcher(tmp_path / "store")
    request = fetcher.request(url_origin(f"{server.url}/image"))
    processes = [fetcher.start(request) for _ in range(5)]
    for process in processes:
        assert b'"image"' in process.communicate(timeout=HANG)[0]
    assert len(server.seen) == 1


@pytest.mark.parametrize("way", ["cancel", "stop", "destroy", "shutdown"])
def test_a_start_that_is_ended_ends_the_fetch(
    driver_file: Path, image: Path, store: Store, server: FileServer, way: str
) -> None:
    """Whoever ends it; unless another task waits for the image, too."""
    server.answers["/image"] = stall(bytes(100000), 1000)
    config = download(f"{server.url}/image")
    with launch_like_agent(driver_file) as plugin, Tasks(plugin, image) as tasks:
        one, two = Starting(tasks.make("true", **config)), Starting(tasks.make("true", name="two", **config))
        (fetcher,) = eventually(lambda: fetchers(plugin.pid))
        eventually(lambda: server.seen)
        if way == "shutdown":
            plugin.kill()  # notes a violation when that takes longer than an agent waits
        else:
            one.end(way)
            assert is_alive(fetcher)
            two.end(way)
        eventually(lambda: not is_alive(fetcher))
        errors = [str(starting.join()) for starting in (one, two)]
        if way in ("stop", "destroy"):
            assert all(error.endswith("was stopped while it was being started") for error in errors), errors
        tasks.made = [] if way == "shutdown" else tasks.made
        for starting in (one, two):
            starting.task.logmon.stop(0)
            starting.task.allocation.close()
    assert not plugin.violations


def test_a_killed_plugin_takes_its_fetch_along(driver_file: Path, store: Store, server: FileServer) -> None:
    server.answers["/image"] = stall(bytes(100000), 1000)
    with launch_like_agent(driver_file) as plugin, Tasks(plugin, Path("/nothing")) as tasks:
        task = tasks.make("echo hello", **download(f"{server.url}/image"))

        def start() -> None:
            with contextlib.suppress(AgentError):
                task.start()

        starting = threading.Thread(target=start)
        starting.start()
        (fetcher,) = eventually(lambda: fetchers(plugin.pid))
        plugin.kill_hard()
        starting.join()
        eventually(lambda: not Path(f"/proc/{fetcher}").exists())
        tasks.made = []
        task.logmon.stop(0)
        task.allocation.close()


# -- collection ----------------------------------------------------------------------------------------------


def test_collection_spares_what_is_used(
    tasks: Tasks, server: FileServer, archive: bytes, store: Store, tmp_path: Path
) -> None:
    server.files |= {"/used": archive, "/unused": make_tar([folder("usr")])}
    task = tasks.start("sleep 300", **download(f"{server.url}/used"))
    fetcher = Fetcher(store.root)
    fetcher.fetch(url_origin(f"{server.url}/unused"))
    assert fetcher.collect(3600) == 0
    assert fetcher.collect(0) > 0
    (image,) = store.read_all()
    assert image.name == f"{server.url}/used"
    assert [use.task_id for use in store.read_uses()] == [task.task_config().id]
    task.destroy()
    assert store.read_uses() == []
    fetcher.collect(0)
    assert store.read_all() == [] and not list(store.layers.iterdir())
    assert not list(store.work.iterdir()) and not list(store.parts.iterdir())


def test_the_plugin_collects_without_any_task(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its looks at the host, which are half a minute apart."""
    monkeypatch.setattr("driver.FINGERPRINT_PERIOD", 0.1)
    server.files["/image"] = make_tar([folder("usr")])
    fetcher = Fetcher(tmp_path / "store")
    fetcher.fetch(url_origin(f"{server.url}/image"))

    async def look_at_host(service: driver.DriverService) -> None:
        async for _ in service.Fingerprint(None, None):
            pass

    async def collect() -> None:
        service = driver.DriverService()
        service.fetches = Fetches(fetcher.store)
        service.config = replace(service.config, image_gc_delay=0.0)
        looking = asyncio.create_task(look_at_host(service))
        while any(fetcher.store.images.iterdir()) or any(fetcher.store.layers.iterdir()):
            await asyncio.sleep(0.02)
        looking.cancel()

    asyncio.run(asyncio.wait_for(collect(), HANG))


@pytest.mark.parametrize("read_only", [False, True])
def test_working_directory_that_no_layer_has(
    tasks: Tasks, archive: bytes, tmp_path: Path, read_only: bool
) -> None:
    parts = ImageParts.make([archive], WorkingDir="/srv/made/here", Cmd=["/bin/sh", "-c", "pwd"])
    (tmp_path / "saved.tar").write_bytes(pack_files(parts.save()))
    task, result = tasks.run(image=str(tmp_path / "saved.tar"), read_only=read_only, command=None)
    assert output(task) == "/srv/made/here\n", result


def test_images_for_people(tasks: Tasks, server: FileServer, archive: bytes, driver_file: Path) -> None:
    server.files["/image"] = archive
    task = tasks.start("sleep 300", **download(f"{server.url}/image"))
    printed = subprocess.run(
        [driver_file, "images"], stdout=subprocess.PIPE, check=True, text=True, timeout=60
    ).stdout
    assert printed.splitlines()[0].split() == ["IMAGE", "TYPE", "SIZE", "FETCHED", "LAST", "USE", "KEPT"]
    line = printed.splitlines()[1]
    assert f"{server.url}/image" in line and task.allocation.id in line and "MB" in line and "ago" in line


def read_mount_points(pid: int) -> list[str]:
    """Mount points as a process sees them, where the driver mounts something: others may mount elsewhere."""
    points = [line.split(" ")[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    places = ("/dev", "/run/nomad-driver-nspawn", "/run/systemd", str(STORE_ROOT), "/var/tmp")
    return sorted(point for point in points if point.startswith(places))


def test_kill_at_any_moment_of_fetch_and_start(
    driver_file: Path, image: Path, store: Store, server: FileServer, archive: bytes
) -> None:
    """SIGKILL, 51 times: to the plugin, or to all it has started for a task; all works then, nothing is left."""
    server.files["/image"] = gzip.compress(archive, 1)
    seed = random.randrange(1 << 32)
    chance, whole = random.Random(seed), 0.0
    plugin = launch_like_agent(driver_file)
    mounts = read_mount_points(plugin.pid)
    with Tasks(plugin, image) as tasks:
        for number in range(51):
            begun = time.monotonic()
            start = Starting(tasks.make("sleep 300", **download(f"{server.url}/image", force=number % 3 < 2)))
            if number == 0:
                assert start.join() is None
                whole = time.monotonic() - begun
            time.sleep(chance.uniform(0, whole))
            if number % 4:
                for pid in (*fetchers(plugin.pid), *(pid for pid, _ in processes(start.task.allocation.id))):
                    kill(pid)
                start.join()
            else:
                plugin.kill_hard()
                start.join()
                plugin = tasks.plugin = start.task.plugin = launch_like_agent(driver_file)
            tasks.close()  # destroys it, and looks for leftovers
            eventually(lambda: not free_locks())
        task, result = tasks.run("echo hello", **download(f"{server.url}/image"))
        assert result.exit_code == 0 and output(task) == "hello\n", seed
    assert read_mount_points(plugin.pid) == mounts
    plugin.kill()
    (layer,) = store.layers.iterdir()
    assert pack_tree(layer) == archive, seed
    Fetcher(store.root).collect(0)
    for place in (store.images, store.layers, store.parts, store.work, store.in_use):
        assert not list(place.iterdir()), seed


# -- removal -------------------------------------------------------------------------------------------------


def test_trees_of_any_depth_are_removed(tmp_path: Path) -> None:
    """Deeper than Python's stack, than paths may be long, and than there may be open files."""
    make_deep(tmp_path / "tree", 5000)
    remove_tree(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []


def test_large_directories_are_removed(tmp_path: Path) -> None:
    for number in range(TreeRemover.BATCH + 100):
        (tmp_path / f"tree/{number}/inner").mkdir(parents=True)
        (tmp_path / f"tree/{number}.txt").touch()
    remove_tree(tmp_path / "tree")
    remove_tree(tmp_path / "tree")  # again: there is nothing
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mount", [["-t", "tmpfs", "tmpfs"], ["--bind", "."]], ids=["tmpfs", "bind"])
def test_removal_leaves_what_links_and_mounts_lead_to(tmp_path: Path, mount: list[str]) -> None:
    """A bind mount has the device number of its source, which may be that of the tree."""
    for name in ("tree/inner", "kept", "tree/mounted", "source"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "kept/file").touch()
    (tmp_path / "tree/inner/link").symlink_to(tmp_path / "kept")
    (tmp_path / "tree/link").symlink_to(tmp_path / "kept/file")
    os.mkfifo(tmp_path / "tree/pipe")
    subprocess.run(["mount", *mount, str(tmp_path / "tree/mounted")], cwd=tmp_path / "source", check=True)
    try:
        (tmp_path / "tree/mounted/file").touch()
        remove_tree(tmp_path / "tree")
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} - {"source", "source/file"}
        assert left == {"kept", "kept/file", "tree", "tree/mounted", "tree/mounted/file"}
    finally:
        subprocess.run(["umount", str(tmp_path / "tree/mounted")], check=True)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "link")
    assert (tmp_path / "kept/file").exists() and not (tmp_path / "link").is_symlink()


def test_what_a_container_has_sealed_is_removed(tmp_path: Path) -> None:
    """Root may not remove a file with the attribute `i`, nor one of a directory with `a`."""
    (tmp_path / "tree/sealed/inner").mkdir(parents=True)
    (tmp_path / "tree/file").touch()
    for flag, name in (("+i", "file"), ("+i", "sealed/inner"), ("+a", "sealed")):
        subprocess.run(["chattr", flag, str(tmp_path / "tree" / name)], check=True)
    remove_tree(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []


# -- the records ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"key": 1}', "[" * 9999])
def test_damaged_records_are_none(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    (store.images / "abc.json").write_text(text)
    (store.in_use / "task").write_text(text)
    assert store.read("abc") is None and store.read_all() == [] and store.read_uses() == []
    assert store.find_garbage(Retention(3600)).paths
