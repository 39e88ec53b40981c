# SPDX-License-Identifier: MPL-2.0
"""Attacks of people who may submit jobs, of what runs in a container, of images and of registries.

Each is as short as it can be, and runs under the strictest plugin block. A race is repeated: RACES says how often
here, `NSPAWN_TEST_RACES=1000` for as often as one wants. Nothing in here may ever succeed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nomad_pb import driver_pb2
from tests.agent import Allocation, DriverError, Plugin, Task, launch_like_agent
from tests.containers import Tasks, eventually, make_small_image, output
from tests.test_effects import swapping

pytestmark = pytest.mark.root

STRICT = "volumes = false\nallow = []\nallow_caps = []\nallow_paths = []\n"
RACES = int(os.environ.get("NSPAWN_TEST_RACES", "20"))


@pytest.fixture(scope="module")
def strict(driver_file: Path) -> Iterator[Plugin]:
    """A plugin that allows jobs nothing of what an operator can forbid."""
    with launch_like_agent(driver_file, STRICT) as running:
        yield running
        assert not running.exited()
    assert not running.violations


@pytest.fixture
def hostile(strict: Plugin, image: Path) -> Iterator[Tasks]:
    """Makes tasks of somebody who means harm; at the end nothing may be left of them."""
    with Tasks(strict, image) as made:
        yield made


# -- what a container says of its processes and cgroups ------------------------------------------------------


# -- exec ----------------------------------------------------------------------------------------------------


# -- images and directories ----------------------------------------------------------------------------------


# -- registries, archives and addresses ----------------------------------------------------------------------


# -- options, permissions and names --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small system, for attackers to bring along."""
    path = tmp_path_factory.mktemp("tree") / "image"
    make_small_image(
        image,
        path,
        ("dash", "cat", "chmod", "cp", "getent", "id", "ls", "ln", "mkdir", "mv", "rm", "sleep", "touch"),
    )
    return path


def bring(tasks: Tasks, tree: Path, script: str, **options: Any) -> tuple[Task, Path]:
    """A task that is not started yet, with an image in its own directory, and that directory."""
    usual = {"image": "local/image", "read_only": None, "network_veth": None, "private_network": True}
    task = tasks.make(script, **(usual | options))
    task.prestart()
    own = Path(task.allocation.dir, task.name)
    shutil.copytree(tree, own / "local/image", symlinks=True, copy_function=os.link)
    return task, own


def run_to_end(task: Task) -> str:
    """What a task prints that goes well."""
    task.start()
    result = task.wait(60)
    assert result.successful, (result, task.logmon.stdout, task.logmon.stderr)
    return output(task)


def refusal(task: Task) -> str:
    with pytest.raises(DriverError) as caught:
        task.start()
    return str(caught.value)


@contextlib.contextmanager
def allowing(driver_file: Path, tree: Path, *words: str) -> Iterator[Tasks]:
    """Tasks on a client whose operator allows nothing but this."""
    block = STRICT.replace("allow = []", f"allow = {json.dumps(words)}")
    with launch_like_agent(driver_file, block) as plugin, Tasks(plugin, tree) as tasks:
        yield tasks
    assert not plugin.violations


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"network_veth": False, "private_network": None}, "network_veth = false"),
    ({"network_interface": ["eth0"]}, "network_interface"),
    ({"network_bridge": "br0"}, "network_bridge"),
    ({"network_macvlan": ["eth0"]}, "network_macvlan"),
    ({"user_namespacing": False}, "user_namespacing = false"),
    ({"private_users": "0"}, "private_users"),
    ({"private_users": "identity"}, "private_users"),
    ({"bind_user": ["root"]}, "bind_user"),
    ({"capability": ["all"]}, "capability"),
    ({"cap_add": ["sys_admin"]}, "CAP_SYS_ADMIN"),
    ({"ambient_capability": ["net_raw"]}, "ambient_capability"),
    ({"system_call_filter": ["@module"]}, "system_call_filter"),
    ({"bind": [{"/": "/host"}]}, "volumes = false"),
    ({"bind_read_only": [{"/etc/shadow": "/mnt"}]}, "volumes = false"),
    ({"bind": [{"/dev/zero": "/mnt"}]}, "volumes = false"),
    ({"bind": [{"/proc/self/root": "/mnt"}]}, "volumes = false"),
    ({"overlay": ["/etc::/mnt"]}, "host_overlays"),
    ({"overlay": ["+/a/etc::/mnt"]}, "host_overlays"),
    ({"overlay_read_only": ["/etc:/root:/mnt"]}, "host_overlays"),
    ({"load_credential": [{"x": "/etc/shadow"}]}, "host_credentials"),
    ({"options": {"devices": [{"host_path": "/dev/zero"}]}}, "devices"),
    ({"link_journal": "try-host"}, "link_journal"),
    ({"pivot_root": "/a/var/lib/machines/other"}, "pivot_root"),
    ({"selinux_context": "unconfined_u:unconfined_r:unconfined_t:s0"}, "selinux_labels"),
    ({"rlimit": [{"rtprio": "99"}]}, "priority"),
    ({"image": "/"}, "volumes = false|own root"),
    ({"image": "/", "ephemeral": True}, "volumes = false"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_the_operator_does_not_allow(hostile: Tasks, tree: Path, options: dict[str, Any], said: str) -> None:
    task, own = bring(hostile, tree, "true", **options)
    (own / "local/image/a").symlink_to("/")
    text = refusal(task)
    assert re.search(said, text) and ("operator" in text or "own root" in text)


def test_links_in_allowed_directories_lead_nowhere(driver_file: Path, tree: Path, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "link").symlink_to("/etc")
    block = f'allow = []\nallow_paths = ["{allowed}"]'
    with launch_like_agent(driver_file, block) as plugin, Tasks(plugin, tree) as tasks:
        for name in ("link", "link/shadow", "../../../../etc", "../other"):
            task, _ = bring(tasks, tree, "true", bind_read_only=[{f"{allowed}/{name}": "/mnt"}])
            assert "does not allow this path" in refusal(task)
        for path in ("/", "/etc", "/etc/shadow", "/dev/zero", "/proc/self/root", f"{allowed}-other"):
            task, _ = bring(tasks, tree, "true", bind=[{path: "/mnt"}])
            assert "does not allow this path" in refusal(task)


def test_a_refusal_does_not_tell_what_is_there(hostile: Tasks, tree: Path) -> None:
    for options in ({"bind": [{"{}": "/mnt"}]}, {"load_credential": [{"x": "{}"}]}, {"image": "{}"}):
        said = set()
        for path in ("/root", "/root/no-such-file", "/etc/shadow/x"):
            task, _ = bring(hostile, tree, "true", **json.loads(json.dumps(options).replace("{}", path)))
            said.add(refusal(task).replace(path, "PATH"))
        assert len(said) == 1, said


@pytest.mark.parametrize("name", ["link", "link/passwd", "link/no-such-file", "link/passwd/x"])
def test_sources_in_the_tasks_directories_do_not_lead_out(hostile: Tasks, tree: Path, name: str) -> None:
    """Whether something is there or not: a refusal does not tell."""
    task, own = bring(hostile, tree, "true", bind=[{f"local/{name}": "/mnt"}])
    (own / "local/link").symlink_to("/etc")
    assert "leads out of the task's directories" in refusal(task)


@pytest.mark.parametrize("name", ["alloc", "alloc/logs", "local/logs", "alloc/./logs/../logs"])
def test_log_pipes_are_out_of_reach(hostile: Tasks, tree: Path, name: str) -> None:
    task, own = bring(hostile, tree, "true", bind=[{name: "/mnt:idmap"}])
    (own / "local/logs").symlink_to(own.parent / "alloc/logs")
    assert re.search(r"log pipes|\.\.", refusal(task))


def start_often(tasks: Tasks, allocation: Allocation, script: str, count: int = RACES, **options: Any) -> set[str]:
    """Start tasks from the image in alloc/data, one after the other, and return what they print. Some may be
    refused."""
    usual = {"image": str(allocation.dir / "alloc/data/image"), "network_veth": None, "private_network": True}
    said = set()
    for number in range(count):
        task = tasks.make(script, name=f"t{number}", allocation=allocation, **(usual | options))
        with contextlib.suppress(DriverError):
            task.start()
            task.wait(60)
            said.add(output(task))
        task.close()
    return said


@pytest.mark.parametrize("option", ["bind", "load_credential", "overlay"])
def test_source_that_is_exchanged_all_the_time(hostile: Tasks, tree: Path, tmp_path: Path, option: str) -> None:
    """Whoever writes to the directory swaps it with a link to another place: it is mounted, or nothing is."""
    (tmp_path / "file").write_text("forbidden")
    allocation = Allocation()
    data = allocation.dir / "alloc/data"
    shutil.copytree(tree, data / "image", symlinks=True)
    (data / "dir").mkdir()
    (data / "dir/file").write_text("allowed")
    (data / "link").symlink_to(tmp_path)
    value, script = {
        "bind": ([{"alloc/data/dir": "/mnt:idmap"}], "cat /mnt/file"),
        "load_credential": ([{"x": "alloc/data/dir/file"}], "cat $CREDENTIALS_DIRECTORY/x"),
        "overlay": (["alloc/data/dir::/mnt"], "cat /mnt/file"),
    }[option]
    options: dict[str, Any] = {"ephemeral": True, option: value}
    with swapping(data / "dir", data / "link"):
        said = start_often(hostile, allocation, script, **options)
    assert said | start_often(hostile, allocation, script, 1, **options) == {"allowed"}


def test_a_leading_dash_is_data(hostile: Tasks, tree: Path) -> None:
    task, _ = bring(hostile, tree, "true", command=["--boot", "--bind=/:/host"])
    task.start()
    assert "--boot" in task.wait(60).err


def test_tmpfs_is_nothing_but_a_tmpfs(hostile: Tasks, tree: Path) -> None:
    """nspawn hands what mount(8) knows to the kernel: a bind of the host's, another mount's flags."""
    for options in ("bind", "size=1M,remount", "rshared", "move", "dev"):
        task, _ = bring(hostile, tree, "true", tmpfs=[f"/mnt:{options}"])
        assert "with options of tmpfs" in refusal(task)


def test_operators_hear_who_can_get_to_allocations(
    strict: Plugin, driver_file: Path, hostile: Tasks, tree: Path
) -> None:
    task, _ = bring(hostile, tree, "sleep 600")
    task.start()
    said = f"other users of this machine can get to {task.allocation.root}: a set-user-id file"
    request = driver_pb2.FingerprintRequest()
    assert said in next(strict.driver.Fingerprint(request)).health_description
    check = subprocess.run([driver_file, "check"], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert said in check.stdout
    task.allocation.root.chmod(0o700)
    assert said not in next(strict.driver.Fingerprint(request)).health_description


def test_usr_that_is_a_link(hostile: Tasks, tree: Path, tmp_path: Path) -> None:
    """nspawn mounts /usr for `volatile = "yes"`, and follows a link there on the host."""
    (tmp_path / "secret").write_text("secret")
    shutil.copytree(tree / "usr", tmp_path / "usr", symlinks=True)
    (tmp_path / "usr/secret").write_text("secret")
    task, own = bring(hostile, tree, "cat /usr/secret", volatile="yes")
    inside = own / f"local/image{tmp_path}"
    inside.mkdir(parents=True)
    (own / "local/image/usr").rename(inside / "usr")
    (own / "local/image/usr").symlink_to(tmp_path / "usr")
    assert "needs an image whose /usr is no symbolic link" in refusal(task)


def test_usr_that_is_exchanged_all_the_time(hostile: Tasks, tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "usr", tmp_path / "usr", symlinks=True)
    (tmp_path / "usr/secret").write_text("forbidden")
    allocation = Allocation()
    image = allocation.dir / "alloc/data/image"
    shutil.copytree(tree, image, symlinks=True)
    (image / "usr/secret").write_text("allowed")
    inside = image / str(tmp_path).lstrip("/")
    inside.mkdir(parents=True)
    shutil.copytree(image / "usr", inside / "usr", symlinks=True)
    (image / "link").symlink_to(tmp_path / "usr")
    with swapping(image / "usr", image / "link"):
        said = start_often(hostile, allocation, "cat /usr/secret", volatile="yes")
    assert said - {""} | start_often(hostile, allocation, "cat /usr/secret", 1, volatile="yes") == {"allowed"}


NAMES = ["a\nb", "a\x0bb", "a\u2028b", "a\x1b[31mb", "a\x85b"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_no_sentence_holds_a_line_of_the_jobs(hostile: Tasks, tree: Path, name: str) -> None:
    ways: list[dict[str, Any]] = [
        {"image": f"/{name}"}, {"image": name}, {"bind": [{f"/{name}": "/m"}]}, {"bind": [{f"alloc/{name}": "/"}]},
        {"environment": [{name: "x"}]}, {"set_credential": [{name: "x"}]}, {"rlimit": [{name: "1"}]},
        {"load_credential": [{"x": f"local/{name}"}]}, {"port_map": [{name: 0}]}, {"user": name},
        {"devices": [{"host_path": f"/{name}"}]}, {"hostname": name}, {"tmpfs": [name]}, {"capability": [name]},
        {"command": [f"/{name}"]}, {"working_directory": f"/{name}"}, {"overlay": [name]}, {"ports": [name]},
    ]  # fmt: skip
    for options in ways:
        task, _ = bring(hostile, tree, "true", options=options)
        try:
            task.start()
        except DriverError as error:
            text = str(error)
        else:
            text = task.wait(60).err
        assert text.isprintable(), text


@pytest.fixture
def journal() -> Iterator[Path]:
    """The journal of somebody else on this host."""
    if not JOURNALS.is_dir():
        pytest.skip("this host keeps no journal on disk")
    path = JOURNALS / uuid.uuid4().hex
    path.mkdir()
    path.chmod(0o755)
    (path / "system.journal").write_text("secret")
    yield path
    shutil.rmtree(path)


JOURNALS = Path("/var/log/journal")


@pytest.mark.parametrize("kind", [None, "auto", "no", "host", "try-host", "guest", "try-guest"])
def test_journal_of_the_images_choice(driver_file: Path, tree: Path, journal: Path, kind: str | None) -> None:
    """The image's machine id names a journal of the host; the task gets its own one, and none is left."""
    before = set(JOURNALS.iterdir())
    words = ["host_users"] if kind in (None, "auto", "no") else ["host_users", "link_journal"]
    with allowing(driver_file, tree, *words) as tasks:
        script = "cat /var/log/journal/*/*; for d in /var/log/journal/*; do echo own >$d/own; done; sleep 600"
        task, own = bring(tasks, tree, script, link_journal=kind, user_namespacing=False)
        (own / "local/image/etc/machine-id").unlink()
        (own / "local/image/etc/machine-id").write_text(f"{journal.name}\n")
        task.start()
        eventually(lambda: "No such file" in task.logmon.stderr.decode())
        found = JOURNALS / task.allocation.id.replace("-", "")
        assert found.is_symlink() is (kind in ("guest", "try-guest"))
        if kind in ("host", "try-host"):
            eventually(lambda: (found / "own").read_text() == "own\n")
        else:
            assert set(JOURNALS.iterdir()) - {found} == before
        assert [path.name for path in journal.iterdir()] == ["system.journal"]
        assert b"secret" not in task.logmon.stdout
        task.close()
        assert set(JOURNALS.iterdir()) == before


def test_set_user_id_files_of_other_tasks(hostile: Tasks, tree: Path) -> None:
    """Root of one container, who is the host's root on the allocation's files, would be root in all others."""
    allocation = Allocation()
    script = "cp /usr/bin/id /alloc/data/id && chmod 4755 /alloc/data/id && sleep 600"
    task, own = bring(hostile, tree, script, name="one", allocation=allocation)
    task.start()
    made = allocation.dir / "alloc/data/id"
    eventually(lambda: made.exists() and made.stat().st_mode & stat.S_ISUID)
    assert made.stat().st_uid == 0
    script = "/alloc/data/id -u; /mnt/id -u; /usr/bin/own -u; cat /proc/self/mountinfo"
    task, own = bring(hostile, tree, script, name="two", allocation=allocation, user="daemon",
                      bind=[{"alloc/data": "/mnt:idmap"}])  # fmt: skip
    shutil.copy2(tree / "usr/bin/id", own / "local/image/usr/bin/own")
    (own / "local/image/usr/bin/own").chmod(0o4755)
    alloc, bind, image, *mounts = run_to_end(task).splitlines()
    assert (alloc, bind) == ("1", "1")
    assert image == "0", "the image's own set-user-id programs are what they were"
    flags = {fields[4]: fields[5].split(",") for fields in map(str.split, mounts)}
    assert {path for path in ("/alloc", "/local", "/secrets", "/mnt") if "nosuid" not in flags[path]} == set()


# -- environment and users -----------------------------------------------------------------------------------
