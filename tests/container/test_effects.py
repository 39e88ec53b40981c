# SPDX-License-Identifier: MPL-2.0
"""Options: what each does, as a program in a real container sees it; and what a job cannot do with them."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from driver import TASK_OPTIONS
from nspawn import checks
from nspawn.common import ConfigError
from nspawn.host import read_host
from nspawn.sources import open_sources
from tests.agent import Allocation, DriverError, Task, launch_like_agent
from tests.container.test_reach import make_group
from tests.containers import Tasks, make_small_image, nspawn, output
from tests.leftovers import STATE
from tests.options import CONFIG, read_options
from tests.servers import FileServer


def run(tasks: Tasks, script: str, **options: Any) -> str:
    """Run a script in a container and return what it prints; it must succeed."""
    task, result = tasks.run(script, **options)
    text = output(task)
    assert result.successful, (result, text, task.logmon.stderr)
    return text.strip()


def refusal(tasks: Tasks, **options: Any) -> str:
    with pytest.raises(DriverError) as caught:
        tasks.start("true", **options)
    return str(caught.value)


# -- security ------------------------------------------------------------------------------------------------

CAPABILITIES = {f"CAP_{name}": 1 << number for number, name in enumerate(checks.CAPABILITIES)}
KNOWN = (1 << int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1) - 1


def status(tasks: Tasks, field: str, **options: Any) -> str:
    """A field of /proc/self/status inside."""
    return run(tasks, f"sed -n 's/^{field}:\\t*//p' /proc/self/status", **options)


def bounding_set(tasks: Tasks, **options: Any) -> int:
    return int(status(tasks, "CapBnd", **options), 16)


def test_capabilities(tasks: Tasks) -> None:
    usual = bounding_set(tasks)
    admin, raw = CAPABILITIES["CAP_NET_ADMIN"], CAPABILITIES["CAP_NET_RAW"]
    assert usual & raw and not usual & admin
    assert bounding_set(tasks, capability=["CAP_NET_ADMIN"]) == usual | admin
    assert bounding_set(tasks, cap_add=["net_admin"], cap_drop=["net_raw"]) == (usual | admin) & ~raw
    assert bounding_set(tasks, drop_capability=["all"]) == 0
    everything = bounding_set(tasks, capability=["all"])
    assert everything & admin and everything | usual == everything <= KNOWN


def test_ambient_capability(tasks: Tasks) -> None:
    options = {"ambient_capability": ["CAP_NET_BIND_SERVICE"], "user": "daemon"}
    effective = status(tasks, "CapEff", private_network=True, **options)
    assert int(effective, 16) == CAPABILITIES["CAP_NET_BIND_SERVICE"]
    assert int(status(tasks, "CapEff", user="daemon"), 16) == 0
    assert "set private_network" in refusal(tasks, **options), "the host's ports below 1024 are the host's"


def test_no_new_privileges(tasks: Tasks) -> None:
    assert status(tasks, "NoNewPrivs", no_new_privileges=True) == "1"
    assert status(tasks, "NoNewPrivs") == "0"


def test_system_call_filter(tasks: Tasks) -> None:
    script = "chmod 700 /local && echo changed || echo refused"
    assert run(tasks, script) == "changed"
    assert run(tasks, script, system_call_filter=["~@chown", "~chmod", "~fchmodat", "~fchmodat2"]) == "refused"


def test_restrict_address_families(tasks: Tasks) -> None:
    script = "perl -e 'print socket(my $s, 2, 1, 0) ? 1 : 0, socket(my $t, 1, 1, 0) ? 1 : 0'"
    if read_host().systemd < 261:
        assert "needs systemd 261 or newer" in refusal(tasks, restrict_address_families=["AF_UNIX"])
    else:
        assert run(tasks, script, restrict_address_families=["AF_UNIX"]) == "01"
    assert run(tasks, script) == "11"


def test_inaccessible(tasks: Tasks) -> None:
    script = "cat /usr/bin/id; ls /usr/lib/apt; stat -c '%A %s' /usr/bin/id; true"
    task, _ = tasks.run(script, inaccessible=["/usr/bin/id", "/usr/lib/apt"], user="daemon")
    assert output(task) == "---------- 0\n"
    assert task.logmon.stderr.count(b"Permission denied") == 2
    assert "/usr/nothing" in refusal(tasks, inaccessible=["/usr/nothing"])


# -- program -------------------------------------------------------------------------------------------------


def test_personality(tasks: Tasks) -> None:
    assert run(tasks, "uname -m", personality="x86") == "i686"


def test_suppress_sync(tasks: Tasks) -> None:
    """fsync() of a descriptor that is not open: an error, unless nobody looks."""
    script = "perl -e 'print syscall(74, 99)'"
    assert run(tasks, script) == "-1"
    assert run(tasks, script, suppress_sync=True) == "0"


def test_notify_ready(tasks: Tasks) -> None:
    began = time.monotonic()
    task = tasks.start("sleep 1; exec systemd-notify --ready", notify_ready=True)
    assert time.monotonic() - began >= 1
    task.wait()  # of 262 systemd-notify fails after it has said it


def test_a_booted_system_says_when_it_is_ready(tasks: Tasks) -> None:
    task = tasks.boot(notify_ready=True)
    assert "multi-user.target" in task.logmon.stdout.decode()


def test_never_ready_but_ended(tasks: Tasks) -> None:
    text = refusal(tasks, command=["/bin/sh", "-c", "exit 3"], notify_ready=True)
    assert "status 3" in text


SECRET = "s3cret\nwith 'quotes', \\ and $\t\x01 é"


def test_credentials(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)))
    task = tasks.make(
        "cd $CREDENTIALS_DIRECTORY; cat a.b; echo; od -An -tx1 -v file | tr -d ' \\n'; echo; cat own; sleep 5",
        set_credential=[{"a.b": SECRET.replace("${", "$${")}],
        load_credential=[{"file": str(tmp_path / "file"), "own": "secrets/own"}],
    )
    task.prestart()
    secret = Path(task.allocation.dir, "task/secrets/own")
    secret.write_text("mine\n")
    task.start()
    task.logmon.wait_for("mine")
    assert task.logmon.stdout.decode() == f"{SECRET}\n{bytes(range(256)).hex()}\nmine\n"
    assert "s3cret" not in Path(f"/proc/{nspawn(task)}/cmdline").read_text()
    found = subprocess.run(["grep", "-rl", "s3cret", STATE], stdout=subprocess.PIPE, check=False).stdout
    assert found == b"", "nothing of it stays on the host"


def test_credentials_are_files(tasks: Tasks, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        assert "must be a file" in refusal(tasks, load_credential=[{"x": str(tmp_path / name)}])
    (tmp_path / "large").write_bytes(b"x" * ((1 << 20) + 1))
    assert "1 MiB" in refusal(tasks, load_credential=[{"x": str(tmp_path / "large")}])


# -- users and resources -------------------------------------------------------------------------------------


def test_private_users(tasks: Tasks) -> None:
    for users, expected in (
        ("1000000:65536", ["1000000", "65536"]),
        ("identity", ["0", "65536"]),
        ("yes", ["0", "65536"]),  # the range of the image's owner
    ):
        shown = run(
            tasks, "cat /proc/self/uid_map; touch /local/file; stat -c %U /local /secrets", private_users=users
        )
        assert shown.split()[1:3] == expected
    assert run(tasks, "cat /proc/self/uid_map", private_users="no").split() == ["0", "0", "4294967295"]


def test_users_of_an_image_that_nspawn_has_shifted(tasks: Tasks, image: Path, tmp_path: Path) -> None:
    """As jobs of the Go driver have them. Volumes can be mapped then, too."""
    small = tmp_path / "shifted"
    make_small_image(image, small, ["dash", "cat", "touch", "stat"])
    for path in (small, *small.rglob("*")):
        os.chown(path, 1 << 20, 1 << 20, follow_symlinks=False)
    script = "cat /proc/self/uid_map; touch /local/file; stat -c %U / /local/file"
    shown = run(tasks, script, image=str(small), private_users="yes")
    assert shown.split() == ["0", str(1 << 20), "65536", "root", "root"]


def test_name_of_an_image_of_machined(driver_file: Path, tasks: Tasks, image: Path) -> None:
    """machinectl lists images of several directories. An operator's own image_dir is the only one."""
    folder, name = Path("/run/machines"), f"test-{os.getpid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / name).symlink_to(image)
    try:
        assert run(tasks, "echo found", image=name) == "found"
        with (
            launch_like_agent(driver_file, f'image_dir = "{image.parent}"') as plugin,
            Tasks(plugin, image) as own,
            pytest.raises(DriverError, match=f"{name}.*not found"),
        ):
            own.make("true", image=name).start()
    finally:
        (folder / name).unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()


def test_user_namespaces_by_the_operators_choice(driver_file: Path, image: Path) -> None:
    with launch_like_agent(driver_file, "user_namespacing = false") as plugin, Tasks(plugin, image) as tasks:
        assert run(tasks, "cat /proc/self/uid_map").split()[1] == "0"
        assert run(tasks, "cat /proc/self/uid_map", user_namespacing=True).split()[1] != "0"


def test_rlimit(tasks: Tasks) -> None:
    script = "ulimit -Sn; ulimit -Hn; ulimit -c"
    assert run(tasks, script, rlimit=[{"nofile": "1024:2048", "core": "infinity"}]).split() == [
        "1024",
        "2048",
        "unlimited",
    ]


def test_oom_score(tasks: Tasks) -> None:
    assert run(tasks, "cat /proc/self/oom_score_adj", oom_score_adj=500) == "500"
    assert run(tasks, "cat /proc/self/oom_score_adj", oom_score_adj=500, user_namespacing=False) == "500"


def test_cpu_affinity(tasks: Tasks) -> None:
    assert status(tasks, "Cpus_allowed_list", cpu_affinity="0") == "0"


# -- names and networks --------------------------------------------------------------------------------------


def test_hostname(tasks: Tasks) -> None:
    assert run(tasks, "cat /proc/sys/kernel/hostname", hostname="web1.example") == "web1.example"


def interfaces(tasks: Tasks, **options: Any) -> set[str]:
    return set(run(tasks, "tail -n +3 /proc/net/dev | cut -d: -f1", **options).split())


def test_networks(tasks: Tasks) -> None:
    assert interfaces(tasks, network_veth=None) == {"lo", "host0"}
    assert interfaces(tasks, network_veth=None, private_network=True) == {"lo"}
    assert interfaces(tasks, network_veth=None, network_zone="nspawn-tst") == {"lo", "host0"}
    assert interfaces(tasks, network_veth=None, network_veth_extra=["vx-tst:eth7"]) == {"lo", "eth7"}


SETTINGS = {"net.core.somaxconn": "1234", "net/ipv4/conf/all/rp_filter": "2"}
SHOW = "cat /proc/sys/net/core/somaxconn /proc/sys/net/ipv4/conf/all/rp_filter"


@pytest.mark.parametrize(
    "options",
    [
        {"private_network": True},
        {"network_veth": True, "process_two": True},
        {"private_network": True, "user_namespacing": False},
    ],
    ids=str,
)
def test_sysctl(tasks: Tasks, options: dict[str, Any]) -> None:
    """The program finds them as soon as it starts; the host keeps its own."""
    before = Path("/proc/sys/net/core/somaxconn").read_text()
    assert run(tasks, SHOW, sysctl=[SETTINGS], **options).split() == ["1234", "2"]
    assert before == Path("/proc/sys/net/core/somaxconn").read_text() != "1234\n"


@pytest.mark.parametrize("namespacing", [True, False])
def test_sysctl_of_ipc(tasks: Tasks, namespacing: bool) -> None:
    """Not on hosts that are containers, where /proc/sys is read-only."""
    before = Path("/proc/sys/kernel/shmmax").read_text()
    settings = {"kernel.shmmax": "123456", "fs.mqueue.msg_max": "7"}
    script = "cat /proc/sys/kernel/shmmax /proc/sys/fs/mqueue/msg_max"
    assert run(tasks, script, sysctl=[settings], user_namespacing=namespacing).split() == ["123456", "7"]
    assert before == Path("/proc/sys/kernel/shmmax").read_text()


def test_sysctl_of_a_group(tasks: Tasks) -> None:
    """They are for all its tasks."""
    with make_group() as group, tasks:  # it ends them before the namespace goes
        in_group = {"network": group.spec, "network_veth": None}
        for options in ({"sysctl": [SETTINGS]}, {}):
            assert run(tasks, SHOW, **options, **in_group).split() == ["1234", "2"]


def test_sysctl_of_a_booted_system(tasks: Tasks) -> None:
    task = tasks.boot(sysctl=[SETTINGS], private_network=True)
    assert task.exec(["cat", "/proc/sys/net/core/somaxconn"])[0] == b"1234\n"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("net.core.somaxconn", "many", "the kernel refuses this value"),
        ("net.core.no_such", "1", "the kernel has no such setting in this container"),
        ("net.core.rmem_max", "1", "the kernel lets nobody change it for one container"),
    ],
)
def test_sysctl_that_the_kernel_refuses(tasks: Tasks, name: str, value: str, why: str) -> None:
    said = refusal(tasks, sysctl=[{name: value}], private_network=True)
    assert said.startswith(f'sysctl.{name} = "{value}": {why}')


def test_sysctl_of_a_container_that_does_not_start(tasks: Tasks) -> None:
    """nspawn ends before it has a process for the payload."""
    options = {"sysctl": [SETTINGS], "private_network": True}
    assert "/no_such" in refusal(tasks, inaccessible=["/no_such/place"], **options)


def test_timezone(tasks: Tasks, image: Path) -> None:
    assert run(tasks, "readlink /etc/localtime", timezone="off") == os.readlink(image / "etc/localtime")
    options = {"timezone": "delete", "volatile": "overlay", "user_namespacing": False}
    assert run(tasks, "test -L /etc/localtime || echo gone", **options) == "gone"


# -- files ---------------------------------------------------------------------------------------------------


def test_tmpfs(tasks: Tasks) -> None:
    script = "stat -f -c '%T %b %S' /mnt; stat -c %a /mnt; echo x >/mnt/x && cat /mnt/x"
    kind, blocks, size, mode, text = run(tasks, script, tmpfs=["/mnt:size=1M,mode=700"]).split()
    assert (kind, int(blocks) * int(size), mode, text) == ("tmpfs", 1 << 20, "700", "x")


@pytest.mark.parametrize("namespacing", [True, False])
def test_overlay(tasks: Tasks, tmp_path: Path, namespacing: bool) -> None:
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower/file").write_text("below")
    (tmp_path / "lower/file").chmod(0o666)
    options = {"overlay": [f"{tmp_path}/lower::/mnt"], "user_namespacing": namespacing}
    assert run(tasks, "cat /mnt/file; echo above >/mnt/file; cat /mnt/file", **options) == "belowabove"
    assert (tmp_path / "lower/file").read_text() == "below"


def test_overlay_of_the_image(tasks: Tasks) -> None:
    script = "echo changed >/etc/hostname; cat /etc/hostname; ls /etc/passwd"
    assert run(tasks, script, overlay=["+/etc::/etc"], user_namespacing=False).split() == [
        "changed",
        "/etc/passwd",
    ]


def test_overlay_read_only(tasks: Tasks, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "same").write_text(name)
        (tmp_path / name / name).touch()
    options = {"overlay_read_only": [f"{tmp_path}/a:{tmp_path}/b:/mnt"]}
    script = "ls /mnt; cat /mnt/same; touch /mnt/new 2>/dev/null || echo read-only"
    assert run(tasks, script, **options).split() == ["a", "b", "same", "bread-only"]


def test_pivot_root(tasks: Tasks, image: Path, tmp_path: Path) -> None:
    make_small_image(image, tmp_path / "tree/sysroot", ("dash", "ls"))
    (tmp_path / "tree/usr").mkdir()
    options = {"image": str(tmp_path / "tree"), "pivot_root": "/sysroot", "read_only": None}
    assert run(tasks, "ls -d /usr/bin/ls /sysroot 2>/dev/null || true", **options) == "/usr/bin/ls"


def prepared(tasks: Tasks, script: str, **options: Any) -> tuple[Task, Path]:
    """A task whose directories are there, and the path of its own one."""
    task = tasks.make(script, **options)
    task.prestart()
    return task, Path(task.allocation.dir, task.name)


def test_bind(tasks: Tasks, image: Path, tmp_path: Path) -> None:
    """Every way to say it, with names that nspawn would take for something else."""
    make_small_image(image, tmp_path / "image", ("dash", "cat", "id"))
    odd = tmp_path / "a:b\\c, d\ne"
    odd.mkdir()
    (odd / "file").write_text("odd")
    (tmp_path / "link").symlink_to(odd)
    task, own = prepared(
        tasks,
        "cat '/mnt/x:y/file' /mnt/l/file; cat /mnt/own/file; cat /mnt/one; echo w >/mnt/own/new; id -u",
        image=str(tmp_path / "image"),
        read_only=None,
        bind=[{str(odd): "/mnt/x:y", str(tmp_path / "link"): "/mnt/l", "local/dir": "/mnt/own:idmap"}],
        bind_read_only=[{"alloc/data/one": "/mnt/one"}],
    )
    (own / "local/dir").mkdir()
    (own / "local/dir/file").write_text("own")
    data = own.parent / "alloc/data"
    data.mkdir(exist_ok=True)
    (data / "one").write_text("one")
    task.start()
    assert task.wait().successful
    assert output(task) == "oddoddownone0\n"
    assert (own / "local/dir/new").stat().st_uid == 0


def test_bind_idmap(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    script = "touch /mnt/x 2>/dev/null && echo written || echo refused"
    assert run(tasks, script, bind=[{f"{tmp_path}/private": "/mnt"}]) == "refused"
    assert run(tasks, script, bind=[{f"{tmp_path}/private": "/mnt:norbind,idmap"}]) == "written"


def test_bind_read_only(tasks: Tasks, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    script = "touch /mnt/x 2>/dev/null && echo written || echo refused"
    assert run(tasks, script, bind_read_only=[{str(tmp_path): "/mnt"}]) == "refused"
    assert run(tasks, script, bind=[{str(tmp_path): "/mnt"}]) == "written"


def test_mount(tasks: Tasks, tmp_path: Path) -> None:
    """One source at several places; docker's word for read_only; a directory of the task's own."""
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("host")
    (tmp_path / "private").mkdir(mode=0o700)
    source = str(tmp_path)
    task, own = prepared(
        tasks,
        "cat /a/file /b/file /own/file; touch /a/private/x /own/x; touch /b/x || touch /c/x || echo no; id -u",
        volatile="overlay",
        mount=[
            {"source": source, "target": "/a", "options": ["idmap"], "type": "bind"},
            {"source": source, "target": "/b", "readonly": True},
            {"source": f"{source}/private", "target": "/c"},
            {"source": "local/dir", "target": "/own"},
        ],
    )
    (own / "local/dir").mkdir()
    (own / "local/dir/file").write_text("own")
    (own / "local/dir").chmod(0o777)
    task.start()
    assert task.wait().successful
    assert output(task) == "hosthostownno\n0\n"
    assert (tmp_path / "private/x").stat().st_uid == 0 and (own / "local/dir/x").exists()


# -- what a job cannot do ------------------------------------------------------------------------------------


@contextlib.contextmanager
def swapping(first: Path, second: Path) -> Iterator[None]:
    """Exchange two paths with each other as fast as that goes."""
    stop, third = threading.Event(), first.with_name("third")

    def swap() -> None:
        while not stop.is_set():
            os.rename(first, third)
            os.rename(second, first)
            os.rename(first, second)
            os.rename(third, first)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        yield
    finally:
        stop.set()
        swapper.join()


@pytest.fixture(scope="module")
def hardened(driver_file: Path, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tasks]:
    """Tasks on a client whose operator allows next to nothing."""
    allowed = tmp_path_factory.mktemp("allowed")
    allowed.chmod(0o755)
    config = f"""
        allow       = []
        allow_caps  = ["net_admin"]
        allow_paths = ["{allowed}"]
        image_dir   = "{image.parent}"
    """
    with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image) as tasks:
        tasks.allowed = allowed  # type: ignore[attr-defined]  # for the tests of this fixture alone
        yield tasks
    assert not plugin.violations


def test_hardened_client_runs_ordinary_jobs(hardened: Tasks, image: Path) -> None:
    options = {"network_veth": None, "private_network": True}
    assert run(hardened, "id -u", **options) == "0"
    assert run(hardened, "id -u", image=image.name, capability=["net_admin"], **options) == "0"
    allowed = hardened.allowed  # type: ignore[attr-defined]
    (allowed / "file").write_text("allowed")
    assert run(hardened, "cat /mnt/file", bind=[{str(allowed): "/mnt"}], **options) == "allowed"
    task, own = prepared(hardened, "cat /dev/x", bind_read_only=[{"secrets/x": "/dev/x"}], **options)
    (own / "secrets/x").write_text("own")
    task.start()
    task.wait()
    assert output(task) == "own"


def test_devices_are_the_operators(driver_file: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")
    os.mknod(tmp_path / "null", 0o20666, os.makedev(1, 3))
    config = 'allow = ["host_network"]'
    with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image) as tasks:
        for path in ("/dev/zero", f"{tmp_path}/link", f"{tmp_path}/null", "/dev/shm", "/dev"):
            assert "does not allow device_binds" in refusal(tasks, bind=[{path: "/mnt"}])
    for word in ("default", "devices"):
        config = f'allow = ["host_network", "{word}"]'
        with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image) as tasks:
            assert run(tasks, "head -c 3 /dev/z | od -An -tx1", bind=[{"/dev/zero": "/dev/z"}]) == "00 00 00"


def test_disk_images_are_the_operators(driver_file: Path, image: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\0" * 4096)
    config = 'allow = ["host_network"]'
    with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image) as tasks:
        assert "does not allow disk_images" in refusal(tasks, image=str(disk), read_only=None)
    config += f'\nimage_dir = "{tmp_path}"'
    with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image) as tasks:
        assert "disk_images" not in refusal(tasks, image="disk", read_only=None), "the operator's own"


def test_without_volumes_nothing_of_the_host(driver_file: Path, image: Path) -> None:
    config = f'volumes = false\nallow = ["all"]\nimage_dir = "{image.parent}"'
    with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image) as tasks:
        for options in ({"bind": [{"/srv": "/mnt"}]}, {"overlay": ["/srv::/mnt"]},
                        {"load_credential": [{"x": "/etc/hostname"}]}, {"image": "/srv"}):  # fmt: skip
            assert "volumes = false" in refusal(tasks, **options) or options.get("image")
        assert run(tasks, "ls -d /mnt", bind=[{"local": "/mnt"}]) == "/mnt"


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ('allow = ["everything"]', 'allow = "everything": must be one of host_network'),
        ('allow_paths = ["srv"]', 'allow_paths = "srv": must be an absolute path'),
        ('allow_caps = ["root"]', 'allow_caps = "root": is not a capability'),
        ('image_dir = "images"', 'image_dir = "images": must be an absolute path'),
    ],
)
def test_bad_plugin_block_stops_the_agent_with_a_sentence(driver_file: Path, block: str, said: str) -> None:
    with pytest.raises(DriverError) as caught, launch_like_agent(driver_file, block):
        pass
    assert said in str(caught.value)


def test_user_without_a_home_directory(tasks: Tasks) -> None:
    """For its own -u nspawn makes one, which a read-only image does not let it."""
    assert run(tasks, 'id -un; echo "$HOME"; ls -d "$HOME" 2>/dev/null || echo none', user="www-data") == (
        "www-data\n/var/www\nnone"
    )


def test_task_user(tasks: Tasks) -> None:
    assert run(tasks, "id -un", user="daemon") == "daemon"
    assert run(tasks, "id -un", user="daemon", options={"user": "bin"}) == "bin"


def test_nothing_is_left_of_what_options_make(tasks: Tasks, tmp_path: Path) -> None:
    task = tasks.start(
        "sleep 60",
        bind=[{str(tmp_path): "/mnt"}],
        overlay=["+/etc::/etc"],
        set_credential=[{"a": "b"}],
        tmpfs=["/srv"],
    )
    os.kill(nspawn(task), 9)
    task.wait()
    task.destroy()
    assert not [path for path in Path("/var/tmp").iterdir() if "nspawn" in path.name]
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("ephemeral", [False, True])
def test_image_that_is_exchanged_all_the_time(
    driver_file: Path, image: Path, tmp_path: Path, ephemeral: bool
) -> None:
    """An image in the allocation's directory, which other tasks may swap with a link to the host's own root."""
    make_small_image(image, tmp_path / "other", ("dash", "cat"))
    (tmp_path / "other/etc/secret").write_text("forbidden")
    allocation = Allocation()
    data = allocation.dir / "alloc/data"
    make_small_image(image, data / "image", ("dash", "cat"))
    (data / "image/etc/secret").write_text("allowed")
    (data / "link").symlink_to(tmp_path / "other")
    seen = set()
    options: dict[str, Any] = {"image": str(data / "image"), "ephemeral": ephemeral, "read_only": not ephemeral}
    with (
        launch_like_agent(driver_file, "allow_paths = []") as plugin,
        Tasks(plugin, image) as tasks,
        swapping(data / "image", data / "link"),
    ):
        for number in range(15):
            with contextlib.suppress(DriverError):
                task, _ = tasks.run("cat /etc/secret", name=f"t{number}", allocation=allocation, **options)
                seen.add(output(task))
    assert seen <= {"allowed"}


def test_source_that_is_named_twice_is_opened_once(tmp_path: Path) -> None:
    """If somebody exchanged it in between, what the job may only read was mounted writable."""
    images, source = tmp_path / "images", tmp_path / "source"
    images.mkdir()
    source.mkdir()
    (tmp_path / "link").symlink_to(images)
    options = read_options(bind=[{str(source): "/a"}], bind_read_only=[{str(source): "/b"}])
    config = replace(CONFIG, allow=(), image_dir=str(images))
    # A process of its own, because a thread would seldom run between the two.
    swap = """
import os
while True:
    for names in (("source", "x"), ("link", "source"), ("source", "link"), ("x", "source")):
        os.rename(*names)
"""
    with subprocess.Popen([sys.executable, "-c", swap], cwd=tmp_path) as swapper:
        try:
            for _ in range(3000):
                with contextlib.suppress(ConfigError), open_sources(TASK_OPTIONS, options, {}, config) as found:
                    assert found[str(source)].path != str(images)
        finally:
            swapper.kill()


def test_image_in_the_tasks_directories(tasks: Tasks, image: Path) -> None:
    ways: list[dict[str, Any]] = [{}, {"ephemeral": True}, {"read_only": True}, {"volatile": "overlay"}]
    for number, (place, way) in enumerate(itertools.product(("local", "../alloc"), ways)):
        name = f"{place.removeprefix('../')}/image"
        task, own = prepared(tasks, "cat /etc/secret", name=f"t{number}", image=name, **{"read_only": None, **way})
        make_small_image(image, own / place / "image", ("dash", "cat"))
        (own / place / "image/etc/secret").write_text("own")
        task.start()
        assert task.wait().successful
        assert output(task) == "own"


def test_image_for_another_machine(tasks: Tasks, image: Path, tmp_path: Path) -> None:
    make_small_image(image, tmp_path / "image", ("dash",))
    foreign = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + (22).to_bytes(2, "little") + bytes(100)
    (tmp_path / "image/usr/bin/tool").write_bytes(foreign)
    (tmp_path / "image/usr/bin/tool").chmod(0o755)
    init = tmp_path / "image/usr/lib/systemd/systemd"
    init.parent.mkdir(parents=True, exist_ok=True)
    init.write_bytes(foreign)
    init.chmod(0o755)
    options = {"image": str(tmp_path / "image"), "read_only": None}
    with pytest.raises(DriverError, match=r"^command: .* is for another machine than this"):
        tasks.start(["/usr/bin/tool"], **options)
    with pytest.raises(DriverError, match=r"^image = .* holds a system for another machine than this"):
        tasks.start([], boot=True, **options)


# -- what needs udev: run in virtual machines by tests/host/test_hosts.py -----------------------------------------

needs_udev = pytest.mark.skipif(
    not Path("/run/udev/control").exists(),
    reason="no systemd-udevd here: tests/host/test_hosts.py runs this in machines",
)


@pytest.fixture
def link() -> Iterator[str]:
    """An interface on the host, for containers to use."""
    subprocess.run(["ip", "link", "add", "tst-a", "type", "veth", "peer", "name", "tst-b"], check=True, timeout=30)
    subprocess.run(["udevadm", "settle"], check=True, timeout=60)
    yield "tst-a"
    subprocess.run(["ip", "link", "del", "tst-b"], check=True, timeout=30)


@needs_udev
def test_udev_interfaces_of_the_host(tasks: Tasks, link: str) -> None:
    assert interfaces(tasks, network_veth=None, network_macvlan=[link]) == {"lo", f"mv-{link}"}
    assert interfaces(tasks, network_veth=None, network_ipvlan=[link]) == {"lo", f"iv-{link}"}
    assert interfaces(tasks, network_veth=None, network_interface=[link]) == {"lo", link}
    assert Path("/sys/class/net", link).exists(), "it comes back"
    assert "the host has no interface" in refusal(tasks, network_veth=None, network_macvlan=[f"{link}x"])


@needs_udev
def test_udev_disk_image(tasks: Tasks, image: Path, tmp_path: Path) -> None:
    tree, disk = tmp_path / "tree", tmp_path / "disk.raw"
    make_small_image(image, tree, ("dash", "cat", "touch", "readlink", "id", "getent"))
    (tree / "etc/secret").write_text("inside")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "64M"], check=True, timeout=120)
    settings = {"image": str(disk), "read_only": None, "user_namespacing": False}
    assert run(tasks, "cat /etc/secret; touch /etc/new", **settings) == "inside"
    script = 'echo "$LD_PRELOAD|$LINES|$HOME $USER $LOGNAME"; id -un; id -g'
    env = {"LD_PRELOAD": "/no/such.so", "LINES": "a\r\nb"}
    shown = run(tasks, script, **settings, env=env, user="daemon")
    assert shown == "/no/such.so|a\r\nb|/usr/sbin daemon daemon\ndaemon\n1"
    with make_group() as group, tasks:  # it ends them before the namespace goes
        in_group = {**settings, "network": group.spec}
        shown = run(tasks, "readlink /proc/self/ns/net", **in_group)
        assert str(os.stat(group.path).st_ino) in shown
        assert "true: is not possible" in refusal(tasks, **{**in_group, "user_namespacing": True})
    assert run(
        tasks, "cat /etc/new; touch /etc/x 2>/dev/null || echo refused", **{**settings, "read_only": True}
    ) == ("refused")
    if read_host().systemd >= 254:
        assert run(tasks, "cat /etc/secret", image_policy="root=unprotected", **settings) == "inside"
        assert "polic" in refusal(tasks, image_policy="root=verity", **settings)


@needs_udev
def test_udev_fetched_disk_image(tasks: Tasks, image: Path, tmp_path: Path) -> None:
    """A disk with a partition, downloaded and booted, by two tasks at once; each writes to its own copy."""
    tree, part = tmp_path / "tree", tmp_path / "part"
    make_small_image(image, tree, ("dash", "cat", "touch", "ls", "sleep"))
    init = tree / "usr/lib/systemd/systemd"
    init.parent.mkdir()
    init.write_text("#!/bin/sh\nls /srv; touch /srv/$container_uuid; echo booted; exec sleep 600\n")
    init.chmod(0o755)
    (tree / "srv").mkdir()
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, part, "24M"], check=True, timeout=120)
    with FileServer() as server:
        server.files["/disk.raw.gz"] = gzip.compress(make_gpt(part.read_bytes()), 1)
        download = {"url": f"{server.url}/disk.raw.gz", "type": "raw"}
        for name in ("one", "two"):
            task = tasks.start(
                name=name, image="disk", image_download=download, boot=True, command=None, console="pipe"
            )
            task.logmon.wait_for("booted")
            assert task.logmon.stdout == b"booted\n"
        assert len(server.seen) == 1


def make_gpt(partition: bytes) -> bytes:
    """A disk with one partition, for the root of an x86-64 system, and a table that says so."""
    first, size = 2048, len(partition) // 512
    kind, own = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"), uuid.uuid4()
    entry = struct.pack("<16s16sQQQ72s", kind.bytes_le, own.bytes_le, first, first + size - 1, 0, b"")
    entries, last = entry.ljust(128 * 128, b"\0"), first + size + 33
    about = (1, last, 34, last - 33, uuid.uuid4().bytes_le, 2, 128, 128, zlib.crc32(entries))

    def header(checksum: int) -> bytes:
        return struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, checksum, 0, *about)

    mbr = bytes(446) + struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, last)
    head = mbr.ljust(510, b"\0") + b"\x55\xaa" + header(zlib.crc32(header(0))).ljust(512, b"\0") + entries
    return head.ljust(first * 512, b"\0") + partition + bytes(34 * 512)
