# SPDX-License-Identifier: MPL-2.0
"""Attacks of people who may submit jobs, of what runs in a container, of images and of registries.

Each is as short as it can be, and runs under the strictest plugin block. A race is repeated: RACES says how often
here, `NSPAWN_TEST_RACES=1000` for as often as one wants. Nothing in here may ever succeed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tarfile
import threading
import unittest.mock
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import nspawn.registry
from nomad_pb import driver_pb2
from nspawn import common
from nspawn.cgroup import read_cgroup_pids, read_roots
from nspawn.download import Client, check_address
from nspawn.images import Origin, Reference
from nspawn.job import plan_machine, state_directory
from nspawn.linux import AT_FDCWD, call_libc
from nspawn.process import ProcessId, read_status
from nspawn.registry import Credentials
from tests.agent import Allocation, DriverError, Plugin, Task, call, launch_like_agent
from tests.container.test_effects import swapping
from tests.containers import Tasks, driver_state, eventually, leader, make_small_image, output, zombies
from tests.fetching import Fetcher, docker_origin, layer_name, layer_of, origin_of, url_origin
from tests.servers import (
    Answer,
    Blob,
    Entry,
    FileServer,
    ImageParts,
    Liar,
    Registry,
    basic,
    folder,
    hard_link,
    link,
    make_deep,
    make_tar,
    pack_files,
    redirect,
    send,
    stall,
)

STRICT = "volumes = false\nallow = []\nallow_caps = []\nallow_paths = []\n"
PATIENCE = 30.0  # seconds for what others ask meanwhile
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


@pytest.fixture(scope="module")
def caged(driver_file: Path, image: Path) -> Iterator[Plugin]:
    """As `strict`, with the image where jobs may name it."""
    with launch_like_agent(driver_file, f'{STRICT}image_dir = "{image.parent}"\n') as running:
        yield running
        assert not running.exited()
    assert not running.violations


@pytest.fixture
def prisoners(caged: Plugin, image: Path) -> Iterator[Tasks]:
    with Tasks(caged, image) as made:
        yield made


def imprison(tasks: Tasks, program: str, *arguments: object, **options: Any) -> Task:
    """Start a container whose first process is a Perl program. It may use SEIZE and the like."""
    usual = {"image": tasks.image.name, "network_veth": None, "private_network": True}
    command = ["perl", "-MSocket", "-e", PTRACE + program, *map(str, arguments)]
    return tasks.start(command, **(usual | options))


PTRACE = (
    "my $ptrace = `uname -m` =~ /x86_64/ ? 101 : 117; $| = 1;"
    "sub ptrace { return syscall($ptrace, $_[0], $_[1], 0, 0) }"
    "my ($SEIZE, $INTERRUPT, $DETACH) = (0x4206, 0x4207, 17);"
)
# What str.splitlines takes for the end of a line.
LINE_ENDS = ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r"]


@pytest.mark.parametrize("is_ready", [False, True], ids=["before READY", "with READY"])
def test_no_process_of_the_host_is_taken_for_the_first_one(prisoners: Tasks, is_ready: bool) -> None:
    """systemd-nspawn passes the status text of its payload on, with whatever the driver might take for a line."""
    program = """
        socket(my $notify, AF_UNIX, SOCK_DGRAM, 0);
        my $to = pack_sockaddr_un("/run/host/notify");
        send($notify, $_, 0, $to) for @ARGV, "READY=1";
        sleep 1 while 1;
    """
    with subprocess.Popen(["sleep", "600"]) as victim:
        try:
            claims = [f"X_NSPAWN_LEADER_PID={victim.pid}", *(["READY=1"] if is_ready else [])]
            texts = ["".join(f"{end}{claim}" for claim in claims) for end in LINE_ENDS]
            task = imprison(prisoners, program, *(f"STATUS=hello{text}" for text in texts), notify_ready=True)
            assert leader(task) != victim.pid
            assert task.exec(["cat", "/proc/1/comm"])[0] == b"perl\n"
            task.stop(timeout=0.1)
            task.destroy()
            assert victim.poll() is None
        finally:
            victim.kill()


@pytest.mark.parametrize("role", ["leader", "shim"])
def test_no_stored_state_names_a_process_of_the_host(prisoners: Tasks, driver_file: Path, role: str) -> None:
    task = imprison(prisoners, "sleep 1 while 1")
    assert task.handle
    with subprocess.Popen(["sleep", "600"]) as victim, launch_like_agent(driver_file) as second:
        try:
            genuine = task.handle.driver_state
            forged = {**driver_state(task), role: dataclasses.asdict(ProcessId.of_child(victim.pid))}
            task.handle.driver_state = json.dumps(forged).encode()
            with pytest.raises(DriverError, match=f"process {victim.pid} is not the (first|shim) of"):
                task.recover(second)
            task.handle.driver_state = genuine
            task.recover(second)
            task.destroy()  # as an agent does where a task cannot be recovered
            assert victim.poll() is None
        finally:
            victim.kill()


@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
def test_no_name_of_a_cgroup_leads_a_command_out(prisoners: Tasks, end: str) -> None:
    program = """
        my $place = "/sys/fs/cgroup"; mkdir "$place/a";
        for (split m{/}, $ARGV[0]) { $place .= "/$_"; mkdir $place }
        open(my $procs, ">", "$place/cgroup.procs"); print $procs "1"; close $procs or die $!;
        print "moved\\n"; sleep 1 while 1;
    """
    root = Path(read_roots()[""])
    target = root / f"target-{os.getpid()}"
    target.mkdir()
    try:
        task = imprison(prisoners, program, f"a{end}0::/{target.name}")
        task.logmon.wait_for("moved\n")
        session = task.exec_streaming(["sh", "-c", "echo here; read -r end"])
        session.wait_for(b"here\n")
        assert (target / "cgroup.procs").read_text() == ""
        payload = f"{driver_state(task)['cgroup']}/payload"
        eventually(lambda: len(read_cgroup_pids(payload)) == 2)  # the entry leaves it once its command runs
        session.send(b"\n")
        assert session.wait().exit_code == 0
    finally:
        task.destroy()
        target.rmdir()


def test_nested_cgroups_are_removed(prisoners: Tasks) -> None:
    program = """
        for my $root (glob("/sys/fs/cgroup /sys/fs/cgroup/*")) {
            chdir $root or next;
            for (1..1200) { mkdir "a" or last; chdir "a" or last }
        }
        print "made\\n"; sleep 1 while 1;
    """
    task = imprison(prisoners, program)
    task.logmon.wait_for("made\n")
    assert next(task.stats(0.1)).agg_resource_usage.memory.usage > 0
    assert task.exec(["true"])[1].successful
    task.stop(timeout=0)
    assert task.wait().signal == signal.SIGKILL
    task.destroy()  # `prisoners` looks for what is left


def test_deep_directories_of_a_killed_nspawn_are_removed(prisoners: Tasks) -> None:
    """It keeps in the state directory what a task has changed of an overlay."""
    task = imprison(prisoners, "sleep 1 while 1")
    task.stop(timeout=0)
    here = os.open(state_directory(task.id), os.O_RDONLY)
    for name in ["tmp"] + ["a"] * 1200:
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    task.destroy()
    assert not state_directory(task.id).exists()


# -- exec ----------------------------------------------------------------------------------------------------


def test_no_command_runs_with_fewer_filters_than_its_payload(prisoners: Tasks) -> None:
    """There can be one tracer of a process: those inside try to be it while the filters are read."""
    program = """
        for (1..3) {
            next if fork;
            while (1) {
                next if ptrace($SEIZE, 1) < 0;
                ptrace($INTERRUPT, 1); waitpid(1, 0x40000000); ptrace($DETACH, 1);
            }
        }
        print "racing\\n"; sleep 1 while 1;
    """
    task = imprison(prisoners, program)
    task.logmon.wait_for("racing\n")
    status = read_status(leader(task))
    wanted = f"{status['Seccomp']} {status['Seccomp_filters']}\n"
    script = "grep -E '^Seccomp(_filters)?:' /proc/self/status | tr -dc '0-9\\n' | xargs"
    refused = 0
    for _ in range(RACES):
        got, result = task.exec(["sh", "-c", script], timeout=30)
        if result.successful:
            assert got.decode() == wanted
        else:
            assert b"seccomp filters" in got
            refused += 1
    print(f"{refused} of {RACES} were refused")


def test_a_traced_command_stops_nobody_else(prisoners: Tasks) -> None:
    """A process inside traces all others and never waits for them: what ends stays a zombie of its own."""
    program = """
        my %traced = ($$ => 1);
        if (fork == 0) {
            $traced{$$} = 1;
            print "tracing\\n";
            while (1) { for (glob("/proc/[0-9]*")) { my ($pid) = /(\\d+)/;
                $traced{$pid} = 1 if !$traced{$pid} and ptrace($SEIZE, $pid + 0) == 0 and print "traced\\n" } }
        }
        sleep 1 while 1;
    """
    task = imprison(prisoners, program)
    task.logmon.wait_for("tracing\n")
    session = task.exec_streaming(["sleep", "1"])
    task.logmon.wait_for("traced\n")
    with pytest.raises(DriverError, match="has ended, but a process in the container traces it"):
        session.wait()
    other = imprison(prisoners, "sleep 1 while 1")
    assert other.exec(["true"])[1].successful
    task.stop(timeout=0)
    task.destroy()
    assert zombies(task.plugin.pid) == []


# -- images and directories ----------------------------------------------------------------------------------


PROGRAMS = ["dash", "cat", "ls", "touch", "chmod", "mkdir", "sleep"]


@pytest.fixture
def images(driver_file: Path, image: Path, tmp_path: Path) -> Iterator[Tasks]:
    """Tasks under the strictest block, and the operator's image_dir with one image in it, `small`."""
    small = tmp_path / "images/small"
    make_small_image(image, small, PROGRAMS)
    with launch_like_agent(driver_file, f'{STRICT}image_dir = "{small.parent}"\n') as plugin:
        with Tasks(plugin, small) as made:
            yield made
        assert not plugin.exited()
        assert not plugin.violations


def exchange(path: Path, other: Path) -> None:
    call_libc("renameat2", AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(other), 2)


@contextlib.contextmanager
def exchanging(path: Path, other: Path) -> Iterator[None]:
    """Exchange two names, over and over, as whoever may write to their directories can."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(0.0005):
            exchange(path, other)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def try_to_print(tasks: Tasks, script: str, one: Path, other: Path, **settings: Any) -> str:
    """What a script prints, "" when its task is refused, or fails; two names are exchanged during its start."""
    wait = "while ! [ -e /secrets/go ]; do sleep 0.01; done;"
    task = tasks.make(f"{wait} {script}", private_network=True, **settings)
    task.prestart()  # the agent's own part
    (task.dir / "secrets/go").unlink(missing_ok=True)
    try:
        with exchanging(one, other), unittest.mock.patch.object(task, "prestart"):
            task.start()
        if one.is_symlink():
            exchange(one, other)
        (task.dir / "secrets/go").touch()
        task.wait()
        return output(task)
    except DriverError:
        return ""
    finally:
        if one.is_symlink():
            exchange(one, other)
        task.close()


@pytest.mark.parametrize("options", [{"read_only": True}, {"ephemeral": True}, {"volatile": "overlay"}])
def test_image_is_exchanged_with_the_hosts_root(
    images: Tasks, image: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Whoever may write to an image can exchange what is in it, also while a start looks at it."""
    inner = images.image / "srv/x"
    make_small_image(image, inner, PROGRAMS)
    (inner / "marker").touch()
    link = images.image / "srv/link"
    link.symlink_to("/")
    for _ in range(RACES // 3 + 1):
        seen = try_to_print(images, "cat /marker && echo own; ls /", inner, link, image=str(inner), **options)
        assert not seen or seen.startswith("own\n"), seen


def test_file_system_put_into_a_shared_image(images: Tasks) -> None:
    """A job may write a disk image into an image, and name it: the kernel would read its file system."""
    (images.image / "srv").mkdir()
    (images.image / "srv/e.raw").write_bytes(bytes(1 << 20))
    with pytest.raises(DriverError, match='"disk_images" in allow'):
        images.start("true", image=str(images.image / "srv/e.raw"), private_network=True, read_only=True)


@pytest.mark.parametrize("name", ["alloc/logs", "alloc", "task/local"])
def test_directory_of_a_task_is_exchanged_with_one_of_the_host(images: Tasks, tmp_path: Path, name: str) -> None:
    """Another task of the allocation, or of another driver, may be able to."""
    secret = tmp_path / "secret"
    (secret / "of-the-host/logs").mkdir(parents=True)
    script = "for i in /alloc /alloc/logs /local; do ls $i; done"
    with Allocation() as allocation:
        link = allocation.dir / "link"
        link.symlink_to(secret)
        for _ in range(RACES // 3 + 1):
            seen = try_to_print(images, script, allocation.dir / name, link, allocation=allocation)
            assert "of-the-host" not in seen
        link.unlink()


def fingerprint(root: Path) -> list[tuple[str, int, int, int, int]]:
    """What would differ if anybody had written to an image."""
    found = []
    for place, names, files in os.walk(root):
        for path in (place, *(os.path.join(place, name) for name in (*names, *files))):
            status = os.lstat(path)
            found.append((path, status.st_uid, status.st_gid, status.st_mode, status.st_ctime_ns))
    return sorted(found)


WRITE = "touch /written /usr/written /etc/passwd; mkdir /etc/new; chmod 700 /usr; echo x >/etc/group; echo done"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"read_only": None},
        {"read_only": True, "extra_hosts": ["a:10.0.0.1"]},
        {"ephemeral": True},
        {"volatile": "yes"},
        {"volatile": "state"},
        {"volatile": "overlay"},
        {"private_users_ownership": "auto", "read_only": None},
        {"tmpfs": ["/new-place"], "read_only": None},
        {"bind": [{"local": "/another-place"}], "read_only": None},
    ],
    ids=str,
)
def test_no_task_changes_an_image_that_others_run_from(images: Tasks, options: dict[str, Any]) -> None:
    before = fingerprint(images.image)
    task, _ = images.run(WRITE, private_network=True, **options)
    assert output(task) == "done\n"
    assert fingerprint(images.image) == before


@pytest.mark.parametrize(
    "options",
    [
        {"private_users_ownership": "chown", "read_only": None},
        {"bind": [{"IMAGES": "/mnt"}]},
        {"mount": [{"source": "IMAGES", "target": "/mnt"}]},
    ],
    ids=str,
)
def test_writing_to_images_takes_a_permission(
    driver_file: Path, image: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Also where jobs may mount what the images lie in."""
    small = tmp_path / "images/small"
    make_small_image(image, small, PROGRAMS)
    before = fingerprint(small)
    options = json.loads(json.dumps(options).replace("IMAGES", str(small.parent)))
    block = f'allow = []\nallow_paths = ["{tmp_path}"]\nimage_dir = "{small.parent}"\n'
    refused = pytest.raises(DriverError, match='"image_write" in allow')
    with launch_like_agent(driver_file, block) as plugin, Tasks(plugin, small) as tasks, refused:
        tasks.start("true", private_network=True, **options)
    assert fingerprint(small) == before


def test_image_with_endless_links_for_its_init(images: Tasks) -> None:
    (images.image / "usr/lib/systemd").mkdir(parents=True, exist_ok=True)
    deep = images.image / "/".join(["d" * 10] * 100)
    deep.mkdir(parents=True)
    for number in range(60):
        (images.image / f"l{number}").symlink_to("/".join(["d" * 10] * 100 + [".."] * 100 + [f"l{number + 1}"]))
    (images.image / "usr/lib/systemd/systemd").symlink_to("/l0")
    task = images.make([], boot=True, private_network=True, read_only=True)
    try:
        task.start()
    except DriverError as error:
        assert "the image has no init" in error.text
    else:  # the kernel gives a look-up up while others rename directories: then nspawn finds that out
        assert not task.wait().successful


def test_image_of_many_layers_holds_nobody_up(strict: Plugin, hostile: Tasks) -> None:
    """Its init is a link of 2.3 KB: each step of it was looked for in 41 layers, below 149 directories, while no
    other task got an answer."""
    deep = "/".join(["d"] * 149)
    above = [folder("/".join(["d"] * depth)) for depth in range(1, 150)]
    top = make_tar([*above, folder("usr")])
    init = [folder("usr/sbin"), link("sbin", "usr/sbin"), link("usr/sbin/init", f"/{deep}/" + "x/../" * 400)]
    bottom = make_tar([*above, folder(f"{deep}/x"), folder("usr"), Entry("usr/lib/os-release", b"ID=x\n"), *init])
    image = ImageParts.make([bottom, *[top + bytes(512 * number) for number in range(40)]])
    task = hostile.make(
        [], image="local/app.tar", read_only=None, boot=True, network_veth=None, private_network=True
    )
    task.prestart()
    Path(task.allocation.dir, task.name, "local/app.tar").write_bytes(pack_files(image.save()))
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(task.start)
        while not start.done():
            call(strict.driver.Capabilities, driver_pb2.CapabilitiesRequest(), PATIENCE)
        start.result()
    assert not task.wait().successful, "its init is a directory"


def test_pipe_for_what_the_driver_reads(images: Tasks) -> None:
    """To open one would be to wait for ever, with all tasks."""
    hosts = images.image / "etc/hosts"
    hosts.unlink(missing_ok=True)
    os.mkfifo(hosts)
    task, _ = images.run("echo done", private_network=True, extra_hosts=["a:10.0.0.1"])
    assert output(task) == "done\n"


# -- registries, archives and addresses ----------------------------------------------------------------------


SECRET = b"of another job " + os.urandom(8).hex().encode()


@pytest.fixture
def private(fetcher: Fetcher, liar: Liar) -> Iterator[ImageParts]:
    """An image that another job has fetched with its credentials, which the registry wants to see."""
    image = ImageParts.make([make_tar([folder("usr"), Entry("usr/secret", SECRET)])])
    with Liar() as registry:
        registry.serve(image)
        registry.authorization = basic("ci", "secret")
        registry.answers["/v2/x/manifests/latest"] = ask_for_credentials(registry)
        fetcher.fetch(docker_origin(f"{registry.host}/x", username="ci", password="secret"))
        assert "needs credentials" in fetcher.talk(fetcher.request(origin_of(registry)))[-1]["error"]
    yield image
    assert fetcher.store.layer(layer_name(gzip.decompress(image.layers[0].data))).is_dir()


def ask_for_credentials(registry: Liar) -> Answer:
    def answer(request: Any) -> None:
        if request.headers.get("Authorization") == registry.authorization:
            registry.send_file(request, registry.files[request.path])
        else:
            send(request, 401, b"", {"WWW-Authenticate": 'Basic realm="x"'})

    return answer


def see(fetcher: Fetcher, origin: Origin) -> str:
    """Return what the process that fetches says; nothing of the secret may be in the image."""
    last = fetcher.talk(fetcher.request(origin))[-1]
    image = fetcher.store.read(origin.key)
    for layer in image.layers if image else ():
        assert not (fetcher.store.layer(layer) / "usr/secret").exists()
    return str(last.get("error"))


@pytest.mark.parametrize("answer", ["nothing", "a byte", "another blob"])
def test_layers_of_others(fetcher: Fetcher, liar: Liar, private: ImageParts, answer: str) -> None:
    """Who knows the digests of a private image, and has a registry of their own, gets nothing of it."""
    liar.serve(private)
    path = f"/v2/x/blobs/{private.layers[0].digest}"
    del liar.files[path]
    if answer == "a byte":  # which is what it would be asked for, were it known to have the layer
        liar.answers[path] = lambda request: send(request, 206, b"\x1f", {"Content-Range": "bytes 0-0/9999"})
    if answer == "another blob":
        liar.files[path] = gzip.compress(make_tar([folder("usr")]))
    assert "a layer has another digest" in (said := see(fetcher, origin_of(liar))) or "is not there" in said


def test_layers_of_others_by_another_digest(fetcher: Fetcher, liar: Liar, private: ImageParts) -> None:
    mine = ImageParts.make([make_tar([folder("usr")])])
    mine.config["rootfs"] = private.config["rootfs"]
    mine.describe()
    liar.serve(mine)
    assert "contents are not what the image says" in see(fetcher, origin_of(liar))


def test_layers_of_others_in_an_archive(fetcher: Fetcher, private: ImageParts, tmp_path: Path) -> None:
    files = {**private.save(), "0/layer.tar": Blob(gzip.compress(make_tar([folder("usr")])))}
    (tmp_path / "mine.tar").write_bytes(pack_files(files))
    origin = Origin("archive", str(tmp_path / "mine.tar"), "mine")
    assert "contents are not what the image says" in see(fetcher, origin)


def test_layers_of_others_at_the_same_registry(fetcher: Fetcher, tmp_path: Path) -> None:
    """Which shows whether this job may have them; it is asked for one byte, not for all of it."""
    image = ImageParts.make([make_tar([folder("usr"), Entry("usr/secret", SECRET)])])
    with Registry(tmp_path / "registry", tls=True) as registry:
        fetcher.environ["SSL_CERT_FILE"] = str(registry.certificate)
        registry.push("theirs", image)
        registry.push("also-theirs", image)
        fetcher.fetch(docker_origin(f"{registry.host}/theirs"))
        registry.damage(image.layers[0].digest, b"x")  # so that it cannot be fetched again
        fetcher.fetch(docker_origin(f"{registry.host}/also-theirs"))
        registry.push("mine", image)  # it takes no manifest of layers that it has not got
        shutil.rmtree(next(registry.directory.glob(f"data/**/mine/_layers/sha256/{image.layers[0].digest[7:]}")))
        origin = docker_origin(f"{registry.host}/mine")
        assert "is not there" in see(fetcher, origin)


def test_an_archive_is_no_layer(fetcher: Fetcher, server: FileServer, liar: Liar) -> None:
    """Only in a layer does .wh.x hide what is below: one must not stand for the other."""
    upper = make_tar([folder("usr"), Entry("usr/.wh.gone")])
    server.files["/image"] = upper
    (tree,) = fetcher.fetch(url_origin(f"{server.url}/image")).layers
    assert (fetcher.store.layer(tree) / "usr/.wh.gone").is_file()
    liar.serve(ImageParts.make([upper]))
    layer, _ = fetcher.fetch(origin_of(liar)).layers
    assert stat.S_ISCHR((fetcher.store.layer(layer) / "usr/gone").lstat().st_mode)


def test_half_a_download_of_another_image(fetcher: Fetcher, liar: Liar) -> None:
    """Rubbish in the place of a layer that somebody else will want spoils nothing for them."""
    image = ImageParts.make([make_tar([folder("usr"), Entry("usr/x", os.urandom(100000))])])
    liar.serve(image)
    fetcher.store.prepare()
    with Liar() as other:
        other.serve(image)
        other.answers[f"/v2/x/blobs/{image.layers[0].digest}"] = stall(bytes(len(image.layers[0].data)), 5000)
        process = fetcher.start(fetcher.request(origin_of(other)))
        eventually(lambda: any(path.stat().st_size for path in fetcher.store.parts.iterdir()))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    fetcher.fetch(origin_of(liar))
    assert all("Range" not in seen.headers for seen in liar.seen)


def test_a_trickle_holds_nobody_up(fetcher: Fetcher, liar: Liar, server: FileServer) -> None:
    """Not who wants the same layer from elsewhere, and not those who remove what is unused."""
    image = ImageParts.make([make_tar([folder("usr"), Entry("usr/x", os.urandom(100000))])])
    liar.serve(image)
    server.files["/image"] = make_tar([folder("usr")])
    fetcher.fetch(url_origin(f"{server.url}/image"))
    with Liar() as other:
        other.serve(image)
        other.answers[f"/v2/x/blobs/{image.layers[0].digest}"] = stall(image.layers[0].data, 5000)
        fetcher.settings["stall"] = 1000.0
        process = fetcher.start(fetcher.request(origin_of(other)))
        try:
            eventually(lambda: list(fetcher.store.parts.iterdir()))
            fetcher.fetch(origin_of(liar))
            assert fetcher.collect() > 0
            assert not list(fetcher.store.images.iterdir()) and not list(fetcher.store.layers.iterdir())
            assert len([path for path in fetcher.store.parts.iterdir() if path.suffix != ".etag"]) == 1
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_the_limit_is_for_the_whole_image(fetcher: Fetcher, liar: Liar) -> None:
    fetcher.settings["limit"] = 50 << 20
    layers = [make_tar([folder("usr"), Entry(f"usr/{name}", os.urandom(20 << 20))]) for name in "abc"]
    liar.serve(ImageParts.make(layers[:2]))
    fetcher.fetch(origin_of(liar))
    liar.serve(ImageParts.make(layers), tag="more")
    said = see(fetcher, docker_origin(f"{liar.host}/x:more"))
    assert "has layers of 6" in said and "more than the 50 MB that image_size_limit" in said
    liar.serve(ImageParts.make([make_tar([Entry(name, bytes(20 << 20))]) for name in "abc"]), tag="zeros")
    said = see(fetcher, docker_origin(f"{liar.host}/x:zeros"))
    assert "unpacks to more" in said and "more than the 50 MB that image_size_limit" in said


@pytest.mark.parametrize("name", ["d/" * 3000 + "x", "/".join(["d" * 250] * 20)])
def test_deep_archives(hostile: Tasks, name: str) -> None:
    task = hostile.make("true", image="local/deep.tar", read_only=None, network_veth=True)
    task.prestart()
    place = Path(task.task_config().alloc_dir, task.name, "local/deep.tar")
    place.write_bytes(make_tar([folder("usr"), Entry(name)]))
    with pytest.raises(DriverError, match=r"the archive is refused: .* is too deep or too long"):
        task.start()


def test_deep_trees_are_collected(fetcher: Fetcher) -> None:
    """Nothing in the store keeps all else from being removed."""
    fetcher.store.prepare()
    make_deep(fetcher.store.work / "half", 1200)
    (fetcher.store.layers / f"tar-{'0' * 64}").mkdir()
    assert fetcher.collect() == 2
    assert not list(fetcher.store.layers.iterdir()) and not list(fetcher.store.work.iterdir())


def test_a_disk_image_that_grows(fetcher: Fetcher, server: FileServer, tmp_path: Path) -> None:
    """A qcow2 image may name one cluster again and again."""
    make = ["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "disk"), "1T"]
    subprocess.run(make, check=True, timeout=60)
    fetcher.settings["limit"] = 50 << 20
    server.files["/disk"] = (tmp_path / "disk").read_bytes()
    text, _ = fetcher.refuse(url_origin(f"{server.url}/disk", "raw"))
    assert "the disk image has 1099511627776 bytes" in text


SECRETS_OF_CLOUDS = [
    "169.254.99.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "fd00:ec2::254",
    "fd20:ce::254",
]


@pytest.mark.parametrize("address", SECRETS_OF_CLOUDS)
def test_addresses_of_clouds(fetcher: Fetcher, server: FileServer, address: str) -> None:
    """Where they tell a machine its secrets; also behind a redirect, and in the forms that IPv6 has for them."""
    host, add = (f"[{address}]", ["-6"]) if ":" in address else (address, ["-4"])
    subprocess.run(["ip", *add, "address", "add", address, "dev", "lo", *["nodad"] * (":" in address)], check=True)
    try:
        with FileServer(address) as cloud:
            cloud.files["/latest"] = make_tar([folder("usr"), Entry("usr/secret")])
            there = f"http://{host}:{cloud.port}/latest"
            server.answers["/image"] = redirect(there)
            mapped = [f"http://[::ffff:{address}]:{cloud.port}/latest"] if "." in address else []
            for url in (there, f"{server.url}/image", *mapped):
                text, kind = fetcher.refuse(url_origin(url))
                assert "images are not fetched from there" in text and kind == "DriverError"
            assert cloud.seen == []
    finally:
        subprocess.run(["ip", *add, "address", "del", address, "dev", "lo"], check=True)


@pytest.mark.parametrize("address", [
    "fe80::1", "::ffff:169.254.169.254", "::169.254.169.254", "::ffff:0:169.254.169.254", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1:a9fe:a9:fe00::", "64:ff9b:1:a9:fe:a9fe::", "64:ff9b:1::a9:fea9:fe00:0", "64:ff9b:1::a9fe:a9fe",
    "2002:a9fe:a9fe::1", "2002:a83f:8110::", "64:ff9b::a83f:8110", "2001:0:a9fe:a9fe::1",
    "2001:0:102:304:0:0:5601:5601",
])  # fmt: skip
def test_addresses_in_other_forms(address: str) -> None:
    with pytest.raises(common.DriverError, match="images are not fetched from there"):
        check_address(address)
    for other in ("127.0.0.1", "::1", "192.0.2.7", "2001:db8::a9fe:a9fe", "64:ff9b::c000:207", "fd00:ec3::1"):
        check_address(other)


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "2852039166", "0xa9fea9fe", "169.254.169.254.", "[::ffff:a9fe:a9fe]"]
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_addresses_of_clouds_through_a_proxy(fetcher: Fetcher, server: FileServer, scheme: str, host: str) -> None:
    fetcher.environ[f"{scheme}_proxy"] = server.url
    text, _ = fetcher.refuse(url_origin(f"{scheme}://{host}/latest"))
    assert "images are not fetched from there" in text
    assert server.seen == []


def test_a_redirect_past_the_proxy(fetcher: Fetcher, server: FileServer) -> None:
    """The proxy's password is for the proxy."""
    with FileServer() as proxy:
        server.files["/image"] = make_tar([folder("usr")])
        proxy.answers["http://images.example/image"] = redirect(f"{server.url}/image")
        fetcher.environ |= {"http_proxy": f"http://user:pass@localhost:{proxy.port}", "no_proxy": "127.0.0.1"}
        fetcher.fetch(url_origin("http://images.example/image"))
        assert "Proxy-Authorization" in {key.title() for key in proxy.seen[0].headers}
        assert "Proxy-Authorization" not in {key.title() for key in server.seen[0].headers}


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x"])
def test_redirects_to_other_schemes(fetcher: Fetcher, server: FileServer, to: str) -> None:
    server.answers["/image"] = redirect(to)
    text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "which is not followed" in text or "is not allowed" in text
    assert kind == "DriverError"


def test_credentials_do_not_go_to_another_host(fetcher: Fetcher, server: FileServer) -> None:
    with FileServer() as other:
        other.files["/image"] = make_tar([folder("usr")])
        server.answers["/image"] = redirect(f"{other.url}/image")
        fetcher.fetch(url_origin(f"{server.url}/image", username="ci", password="secret"))
        assert server.seen[0].headers["Authorization"] == "Basic Y2k6c2VjcmV0"
        assert "Authorization" not in other.seen[0].headers


def test_who_has_no_credentials_does_not_get_what_others_have_fetched(
    fetcher: Fetcher, server: FileServer
) -> None:
    server.authorization = "Basic Y2k6c2VjcmV0"
    server.files["/image"] = make_tar([folder("usr")])
    fetcher.fetch(url_origin(f"{server.url}/image", username="ci", password="secret"))
    messages = fetcher.talk(fetcher.request(url_origin(f"{server.url}/image")))
    assert "is denied" in messages[-1]["error"]


def test_authorization_does_not_go_to_another_host(fetcher: Fetcher, liar: Liar) -> None:
    image = ImageParts.make([make_tar([folder("usr")])])
    with FileServer() as other:
        liar.serve(image)
        path = f"/v2/x/blobs/{image.layers[0].digest}"
        other.files[path] = liar.files.pop(path)
        seen_by_liar: list[str] = []

        def blob(request: Any) -> None:
            seen_by_liar.append(request.headers.get("Authorization", ""))
            redirect(f"{other.url}{path}")(request)

        def manifest(request: Any) -> None:
            if "Authorization" in request.headers:
                send(request, 200, json.dumps(image.manifest).encode())
            else:
                send(request, 401, b"", {"WWW-Authenticate": 'Basic realm="x"'})

        liar.answers |= {path: blob, "/v2/x/manifests/latest": manifest}
        fetcher.fetch(docker_origin(f"{liar.host}/x", username="ci", password="secret"))
        assert seen_by_liar == [basic("ci", "secret")]
        assert [seen.headers.get("Authorization") for seen in other.seen] == [None]


def test_credentials_stay_on_encrypted_ways(fetcher: Fetcher, tmp_path: Path) -> None:
    """A registry with TLS whose challenge names a token server without."""
    client = Client(5)
    reference = Reference.parse("docker://registry.example/x")
    registry = nspawn.registry.Registry(client, reference, Credentials("ci", "secret"), is_plain=False)
    with FileServer() as server:
        with pytest.raises(common.DriverError, match="without encryption"):
            registry.authorize([f'Bearer realm="{server.url}/token",service="x"'])
        assert server.seen == []


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file beside the store that no archive may change, read from or link to."""
    path = tmp_path / "victim"
    path.write_text("secret")
    before = path.stat()
    yield path
    after = path.stat()
    assert path.read_text() == "secret"
    assert (before.st_mode, before.st_uid, before.st_nlink) == (after.st_mode, after.st_uid, after.st_nlink)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["store", "victim"]


UP = "../" * 12

HARM = {
    "dots": [Entry(f"usr/{UP}tmp/x")],
    "dots at the start": [Entry("../x")],
    "dots as a directory": [folder("usr/.."), folder("..")],
    "through a link": [link("usr/out", "@"), Entry("usr/out/x", b"harm")],
    "over a link's target": [link("out", "@"), folder("out/x")],
    "a link to a link": [link("a", "b"), link("b", "@"), Entry("a/x", b"harm")],
    "hard link to the host": [hard_link("x", "@/victim")],
    "hard link by dots": [hard_link("x", f"{UP}etc/passwd")],
    "hard link through a link": [link("out", "@"), hard_link("x", "out/victim")],
    "hard link to nothing": [hard_link("x", "not/there")],
    "a file's child": [Entry("file", b"x"), Entry("file/child", b"x")],
    "overlay attributes": [folder("x", pax={"SCHILY.xattr.trusted.overlay.redirect": "/etc"})],
    "overlay attributes of users": [Entry("x", pax={"SCHILY.xattr.user.overlay.opaque": "y"})],
    "NUL": [Entry("x", pax={"path": "a\0b"})],
}


@pytest.mark.parametrize("name", HARM)
def test_harm_is_refused(fetcher: Fetcher, server: FileServer, tmp_path: Path, victim: Path, name: str) -> None:
    for entry in HARM[name]:
        entry.target = entry.target.replace("@", str(tmp_path))
    server.files["/image"] = make_tar([folder("usr"), *HARM[name]])
    text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "the archive is refused: its entry" in text or "damaged" in text
    assert kind == "DriverError"


def test_absolute_names_stay_inside(fetcher: Fetcher, server: FileServer, tmp_path: Path, victim: Path) -> None:
    tree = layer_of(fetcher, server, [Entry(f"{tmp_path}/victim", b"harm"), Entry("//etc//passwd", b"x")])
    assert (tree / str(victim)[1:]).read_text() == "harm"
    assert (tree / "etc/passwd").read_text() == "x"


def test_a_link_is_replaced_not_followed(
    fetcher: Fetcher, server: FileServer, tmp_path: Path, victim: Path
) -> None:
    for later in (Entry("x", b"new"), folder("x", 0o777), link("x", "other"), hard_link("x", "usr/file")):
        entries = [Entry("usr/file", b"f"), link("x", str(victim)), later]
        tree = layer_of(fetcher, server, entries)
        assert os.readlink(tree / "x") != str(victim) if (tree / "x").is_symlink() else True


def test_devices_are_left_out(fetcher: Fetcher, server: FileServer) -> None:
    entries = [
        Entry("dev/sda", kind=tarfile.BLKTYPE, device=(254, 0), mode=0o666),
        Entry("dev/mem", kind=tarfile.CHRTYPE, device=(1, 1)),
        Entry("usr/hidden", kind=tarfile.CHRTYPE, device=(0, 0)),  # a whiteout to overlayfs
        Entry("pipe", kind=tarfile.FIFOTYPE, mode=0o622, uid=7),
    ]
    server.files["/image"] = make_tar([folder("usr"), *entries])
    messages = fetcher.talk(fetcher.request(url_origin(f"{server.url}/image")))
    assert {"note": "3 device nodes of the archive were left out"} in messages
    (layer,) = fetcher.store.layers.iterdir()
    assert list((layer / "dev").iterdir()) == [] and list((layer / "usr").iterdir()) == []
    pipe = (layer / "pipe").lstat()
    assert stat.S_ISFIFO(pipe.st_mode) and stat.S_IMODE(pipe.st_mode) == 0o622 and pipe.st_uid == 7


def test_devices_and_attributes_in_layers(fetcher: Fetcher, liar: Liar) -> None:
    entries = [folder("usr"), Entry("usr/x", kind=tarfile.CHRTYPE), Entry("dev/sda", kind=tarfile.BLKTYPE)]
    liar.serve(ImageParts.make([make_tar(entries)]))
    layer, _ = fetcher.fetch(origin_of(liar)).layers
    assert list((fetcher.store.layer(layer) / "usr").iterdir()) == []
    for name in ("trusted.overlay.opaque", "user.overlay.opaque"):
        liar.serve(ImageParts.make([make_tar([folder("usr", pax={f"SCHILY.xattr.{name}": "y"})])]), tag=name)
        assert f"has the attribute {name}" in see(fetcher, docker_origin(f"{liar.host}/x:{name}"))


def test_a_bomb(fetcher: Fetcher, server: FileServer) -> None:
    """A gigabyte in a megabyte, and a file that says it has a terabyte."""
    fetcher.settings["limit"] = 50 << 20
    server.files["/image"] = gzip.compress(make_tar([folder("usr"), Entry("usr/zeros", bytes(200 << 20))]), 1)
    text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "more than the 50 MB that image_size_limit" in text
    assert kind == "DriverError"
    assert sum(path.lstat().st_size for path in fetcher.store.root.rglob("*")) < 10 << 20


def test_a_bomb_for_the_stack(fetcher: Fetcher, server: FileServer) -> None:
    """Headers about headers about headers, each of which tarfile reads inside of the one before."""
    about = tarfile.TarInfo("x")
    about.type = tarfile.XHDTYPE
    server.files["/image"] = about.tobuf(tarfile.USTAR_FORMAT) * 2000 + make_tar([folder("usr")])
    text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "too many headers for one entry" in text
    assert kind == "DriverError"


def test_a_bomb_for_memory(fetcher: Fetcher, server: FileServer) -> None:
    """A header for a long name that says the name has three gigabytes."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    fetcher.settings["limit"] = 8 << 30
    zeros = gzip.compress(bytes(12_000_000), 1) * 100
    server.files["/image"] = gzip.compress(header.tobuf(tarfile.GNU_FORMAT)) + zeros
    text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "memory" in text
    assert kind == "DriverError"


# -- options, permissions and names --------------------------------------------------------------------------


def test_no_name_takes_the_machine_of_another_task(prisoners: Tasks) -> None:
    """These two had one name with 24 bits of a digest: the second start removed the first task."""
    allocation = Allocation()
    first, second = (
        imprison(prisoners, "sleep 1 while 1", name=name, allocation=allocation)
        for name in ("a_!!_!b", "a.~!...b")
    )
    assert driver_state(first)["machine"] != driver_state(second)["machine"]
    assert first.exec(["true"])[1].successful and second.exec(["true"])[1].successful


def test_start_removes_no_task_of_another_name(prisoners: Tasks) -> None:
    first = imprison(prisoners, "sleep 1 while 1", name="first")
    path = state_directory(first.id) / "state.json"
    machine = plan_machine("second", first.allocation.id)
    path.write_text(json.dumps({**driver_state(first), "machine": machine}))
    with pytest.raises(DriverError, match=f"the machine name {machine}, which is that of the task {first.id}"):
        imprison(prisoners, "sleep 1 while 1", name="second", allocation=first.allocation)
    assert first.exec(["true"])[1].successful


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
    result = task.wait()
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
    ({"mount": [{"source": "/etc", "target": "/mnt", "read_only": True}]}, "volumes = false"),
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
            task.wait()
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
    task, own = bring(hostile, tree, "true", command=["--boot", "--bind=/:/host"])
    program = own / "local/image/usr/bin/--boot"
    program.write_text("#!/bin/sh\necho got $*; ls /host\n")
    program.chmod(0o755)
    task.start()
    assert not task.wait().successful
    assert output(task) == "got --bind=/:/host\n"


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
    assert said in " ".join(check.stdout.split())  # it breaks its lines
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
            text = task.wait().err
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
            eventually(lambda: (found / "own").exists() and (found / "own").read_text() == "own\n")
        assert [path.name for path in journal.iterdir()] == ["system.journal"]
        assert b"secret" not in task.logmon.stdout
        task.close()
        assert not os.path.lexists(found)


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


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Path:
    """An image_dir with one small image."""
    folder = tmp_path_factory.mktemp("machines")
    make_small_image(image, folder / "small", ["dash", "cat", "id", "ls", "sleep"])
    return folder


@pytest.fixture(scope="module")
def strict_machines(driver_file: Path, machines: Path) -> Iterator[Plugin]:
    with launch_like_agent(driver_file, f'{STRICT}image_dir = "{machines}"\n') as running:
        yield running
    assert not running.violations


@pytest.fixture
def guests(strict_machines: Plugin) -> Iterator[Tasks]:
    with Tasks(strict_machines, Path("small")) as made:
        yield made


APART: dict[str, Any] = {"network_veth": None, "private_network": True}  # the host's network is not for them

# What acts on the loader, libc, systemd, sh, Python and the tools that run as root of the host around a container.
STEERING = """
    LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT SYSTEMD_LOG_LEVEL SYSTEMD_NSPAWN_LOCK SYSTEMD_SECCOMP LISTEN_FDS
    NOTIFY_SOCKET GCONV_PATH GLIBC_TUNABLES LOCPATH TZ HOSTALIASES XTABLES_LIBDIR OPENSSL_CONF PATH HOME TMPDIR
    LIBMOUNT_FSTAB BASH_ENV ENV IFS PS4 SHELLOPTS PYTHONPATH PYTHONSTARTUP shim_state NOTHING_SPECIAL
""".split()  # noqa: SIM905 # a list of words reads better


@contextlib.contextmanager
def watch_host(secret: str) -> Iterator[list[str]]:
    """Look for a text in all that /proc shows of processes, but those of containers; yield where it was."""
    seen: list[str] = []
    over = threading.Event()
    own = os.readlink("/proc/self/ns/pid")

    def look() -> None:
        while not over.is_set():
            for entry in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    if secret.encode() in text and os.readlink(entry / "ns/pid") == own:
                        seen.append(text.decode(errors="replace"))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


@pytest.mark.parametrize("end", ["", "\n"], ids=["plain", "lines"])
def test_no_value_reaches_a_process_of_root(guests: Tasks, end: str) -> None:
    """Command lines and, with the right name, variables act on root's processes; others can read command lines."""
    secret = f"hunter{uuid.uuid4().hex}"
    variables = {name: f"/{secret}{end}" for name in STEERING}
    with watch_host(secret) as seen:
        for _ in range(max(RACES // 10, 1)):
            task = guests.start(["/bin/sleep", "600"], env=variables, process_two=True, **APART)
            given = f"LD_PRELOAD=/{secret}{end}\0".encode()
            eventually(lambda: given in task.exec(["/bin/cat", "/proc/2/environ"])[0])  # noqa: B023 # at once
            assert secret.encode() not in Path(f"/proc/{leader(task)}/environ").read_bytes(), "nspawn's stub"
            task.destroy()
    assert not seen


def test_names_of_variables_make_no_others(guests: Tasks) -> None:
    names = (
        "A\nLD_PRELOAD",
        "A=LD_PRELOAD",
        "A\0B",
        "",
        " ",
        "LD_PRELOAD ",
        "\nLD_PRELOAD",
        "A\r\n[Exec]\r\nUser",
    )
    variables = dict.fromkeys(names, "/evil") | {"GOOD": "x"}
    task, result = guests.run(["cat", "/proc/self/environ"], env=variables, **APART)
    assert result.successful
    assert "/evil" not in output(task) and "GOOD=x\0" in output(task)


@pytest.mark.parametrize("kind", ["fifo", "link out", "device", "huge", "odd lines", "directory"])
def test_image_with_a_passwd_that_misleads(guests: Tasks, machines: Path, tmp_path: Path, kind: str) -> None:
    """What is not a line of a file in the image is no user; a number is one all the same."""
    name = f"passwd-{kind}"
    shutil.copytree(machines / "small", machines / name, symlinks=True)
    passwd, root = machines / name / "etc/passwd", "victim:x:0:0::/:\n"
    passwd.unlink(missing_ok=True)
    (tmp_path / "outside").write_text(root)
    if kind == "fifo":
        os.mkfifo(passwd)
    elif kind == "link out":
        passwd.symlink_to(tmp_path / "outside")
    elif kind == "device":
        os.mknod(passwd, 0o20666, os.makedev(1, 5))  # zero
    elif kind == "huge":
        passwd.write_text("first:x:7:8::/:\n")
        os.truncate(passwd, 1 << 30)
    elif kind == "odd lines":
        odd = ("victim", "victim:x:", "victim:x:-1:0::/:", "victim:x:0x0:0::/:", "victim:x:4294967296:0::/:",
               "victim:x:65535:65535::/:", f"a\x0b{root}", f"a\x85{root}", f"\u2028{root}")  # fmt: skip
        passwd.write_text("\n".join(odd))
    else:
        passwd.mkdir()
    options = {"image": name, "volatile": "overlay", **APART}

    def ids(user: str) -> list[str]:
        task, _ = guests.run(["cat", "/proc/self/status"], **options, user=user)
        return re.findall(r"^[UG]id:\t(\d+)", output(task), re.MULTILINE)

    assert ids("1234") == ["1234", "0"]
    with contextlib.suppress(DriverError):  # systemd 257 and later fail when the container is up
        assert ids("victim") == []
    if kind == "huge":
        assert ids("first") == ["7", "8"]


@pytest.mark.parametrize(
    "user", ["a\nb", "root\n", "a:b", "0:0", "-x", "a b", "../x", "65535", "065535", "4294967295", "4294967296"]
)
def test_user_that_is_none(guests: Tasks, user: str) -> None:
    """systemd takes some numbers for "none", which for a payload would be root."""
    for given in ({"user": user}, {"options": {"user": user}}):
        with pytest.raises(DriverError, match="user = "):
            guests.start(["id"], **given, **APART)


def test_settings_files_are_not_read(guests: Tasks, machines: Path) -> None:
    """One beside the image comes with it; others are for machines that somebody starts by hand."""
    script = "echo ${FROM_FILE:-none}; id -u; ls -A /mnt"
    task = guests.make(script, **APART)
    names = (f"task-{task.allocation.id}", "small")
    folders = (machines, Path("/run/systemd/nspawn"), Path("/etc/systemd/nspawn"))
    files = [folder / f"{name}.nspawn" for folder in folders for name in names]
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("[Exec]\nEnvironment=FROM_FILE=1\nUser=daemon\n[Files]\nBind=/etc:/mnt\n")
        task.start()
        assert task.wait().successful
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    assert output(task) == "none\n0\n"
