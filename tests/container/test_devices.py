# SPDX-License-Identifier: MPL-2.0
"""Devices: which ones a container has, and that it cannot open any other, whatever nodes it comes by."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nomad_pb import driver_pb2
from nspawn.common import HostError
from nspawn.devices import DeviceRule, render_device_program
from nspawn.host import read_host
from nspawn.sources import open_source, read_rules
from tests.agent import DriverError, launch_like_agent
from tests.containers import Tasks, eventually, is_alive, make_small_image, output
from tests.options import read_options

# -- rendering -----------------------------------------------------------------------------------------------


def allows(program: bytes, kind: str, major: int, minor: int, access: str) -> bool:
    """Run a program as the kernel would; it stops at whatever the kernel does not have."""
    context = {0: (1 if kind == "b" else 2) | sum({"m": 1, "r": 2, "w": 4}[x] for x in access) << 16}
    context |= {4: major, 8: minor}
    registers = [0] * 11
    place = 0
    while True:
        code, pair = program[place * 8], program[place * 8 + 1]
        skip = int.from_bytes(program[place * 8 + 2 : place * 8 + 4], "little", signed=True)
        number = int.from_bytes(program[place * 8 + 4 : place * 8 + 8], "little", signed=True)
        target, source = pair & 15, pair >> 4
        place += 1
        if code == 0x61:
            assert source == 1, "the context"
            registers[target] = context[skip]
        elif code in CALCULATIONS:
            operand = registers[source] if code & 8 else number
            registers[target] = CALCULATIONS[code](registers[target], operand)
        elif code == 0x55:
            place += skip if registers[target] != number else 0
        else:
            assert code == 0x95
            return bool(registers[0])


CALCULATIONS: dict[int, Callable[[int, int], int]] = {
    0xBF: lambda a, b: b,
    0xB7: lambda a, b: b,
    0x57: int.__and__,
    0x4F: int.__or__,
    0x67: int.__lshift__,
    0x77: int.__rshift__,
}


def test_policy_allows_what_the_rules_say() -> None:
    program = render_device_program(
        [DeviceRule(False, 1, 3, "rw"), DeviceRule(True, 7, 5, "w"), DeviceRule(True, 7, None, "r"),
         DeviceRule(False, 1, 5, "m"), DeviceRule(False, 1, 5, "r"), DeviceRule(True, 4095, 1048575, "r")]
    )  # fmt: skip
    for allowed in (
        ("c", 1, 3, "r"), ("c", 1, 3, "w"), ("c", 1, 3, "rw"), ("b", 7, 0, "r"), ("b", 7, 1048575, "r"),
        ("c", 1, 5, "m"), ("c", 1, 5, "mr"), ("b", 7, 5, "rw"), ("b", 4095, 1048575, "r"),
    ):  # fmt: skip
        assert allows(program, *allowed), allowed
    for refused in (
        ("c", 1, 3, "m"), ("c", 1, 3, "rwm"), ("b", 1, 3, "r"), ("c", 1, 4, "r"), ("c", 2, 3, "r"),
        ("b", 7, 0, "w"), ("b", 7, 0, "rw"), ("c", 7, 0, "r"), ("c", 1, 5, "w"), ("b", 7, 5, "m"),
        ("c", 4095, 1048575, "r"), ("b", 4095, 1048574, "r"),
    ):  # fmt: skip
        assert not allows(program, *refused), refused
    assert not allows(render_device_program([]), "c", 1, 3, "r")


# -- what a job says -----------------------------------------------------------------------------------------


def test_what_a_block_means() -> None:
    more = {"container_path": "/dev/cd", "cgroup_permissions": "r"}
    raw = {"devices": [{"host_path": "/dev/kvm"}, {"host_path": "/dev/sg0", **more}]}
    assert [
        (device.host_path, device.target, device.cgroup_permissions) for device in read_options(**raw).devices
    ] == [
        ("/dev/kvm", "/dev/kvm", "rwm"),
        ("/dev/sg0", "/dev/cd", "r"),
    ]


# -- in containers -------------------------------------------------------------------------------------------

USERS = pytest.mark.parametrize("namespaces", [True, False], ids=["user namespace", "host users"])
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "process_two": {"process_two": True},
    "ephemeral": {"read_only": None, "ephemeral": True},
    "booted": {"boot": True, "volatile": "overlay"},
}
LOOP_CONTROL = 10, 237  # a device that nothing but the devices of a job makes usable, and that all kernels have


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A device of the host that only its owner can open, and a link to it."""
    assert read_host().has_device_policy, "this kernel takes no BPF program for the devices of a cgroup"
    os.mknod(tmp_path / "control", stat.S_IFCHR | 0o600, os.makedev(*LOOP_CONTROL))
    (tmp_path / "link").symlink_to("control")
    return tmp_path / "link"


def say(*paths: str) -> str:
    """A script that says of each path how it can be opened."""
    return f"""
        for path in {" ".join(paths)}; do
            echo $path $( (: <$path) 2>/dev/null && echo r ) $( (: >$path) 2>/dev/null && echo w )
        done
    """


def inside(tasks: Tasks, script: str, **settings: Any) -> list[str]:
    """The lines a script prints in a container, as its payload or as a further command."""
    if not settings.get("boot"):
        task, result = tasks.run(script, **settings)
        assert result.successful, task.logmon.stderr
        return output(task).splitlines()
    task = tasks.start((), **settings)
    text, result = task.exec(["/bin/sh", "-c", script])
    assert result.successful
    return text.decode().splitlines()


@USERS
@pytest.mark.parametrize("mode", MODES)
def test_devices_of_a_job_work(tasks: Tasks, node: Path, namespaces: bool, mode: str) -> None:
    """As the host has them: root's are root's in a user namespace, too, unless the kernel is old."""
    devices = [
        {"host_path": str(node), "container_path": "/dev/my/control"},
        {"host_path": "/dev/zero", "container_path": "/dev/z", "cgroup_permissions": "r"},
    ]
    script = "stat -c '%a %u %g' /dev/my/control; head -c 2 /dev/z | od -An -tx1; echo x >/dev/null"
    script += say("/dev/my/control", "/dev/null", "/dev/net/tun")
    options = {"options": {"devices": devices}, "user_namespacing": namespaces, **MODES[mode]}
    shown = ["600 0 0", " 00 00", "/dev/my/control r w", "/dev/null r w", "/dev/net/tun r w"]
    if namespaces and read_host().kernel < (6, 3):
        shown[0], shown[2] = "600 65534 65534", "/dev/my/control"
    assert inside(tasks, script, **options) == shown
    assert os.stat(node).st_mode & 0o777 == 0o600


def test_container_changes_only_its_own_node(tasks: Tasks, node: Path) -> None:
    devices = [{"host_path": str(node), "container_path": "/dev/control", "cgroup_permissions": "r"}]
    script = "chmod 666 /dev/control; chown daemon /dev/control; stat -c '%a %U' /dev/control; " + say(
        "/dev/control"
    )
    lines = inside(tasks, script, options={"devices": devices}, user_namespacing=False)
    assert lines == ["666 daemon", "/dev/control r"]
    assert (os.stat(node).st_mode & 0o777, os.stat(node).st_uid) == (0o600, 0)


@pytest.mark.parametrize("capability", [[], ["CAP_MKNOD"], ["all"]], ids=str)
def test_nodes_of_an_image_are_dead(tasks: Tasks, image: Path, tmp_path: Path, capability: Sequence[str]) -> None:
    """Without user namespaces a payload is root, and may get CAP_MKNOD: neither opens it the host's devices."""
    small = tmp_path / "image"
    make_small_image(image, small, ["dash", "mknod", "rm"])
    for name, kind, number in (("disk", stat.S_IFBLK, (7, 0)), ("control", stat.S_IFCHR, LOOP_CONTROL)):
        os.mknod(small / name, kind | 0o666, os.makedev(*number))
    script = say("/disk", "/control", "/dev/null") + "rm -f /mnt/*; PATH=/usr/bin\n"
    script += "for new in 'b 7 0' 'c 10 237' 'c 1 3'; do mknod /mnt/x $new && echo $new && rm /mnt/x; done; exit 0"
    options = {"image": str(small), "read_only": None, "user_namespacing": False, "capability": list(capability)}
    lines = inside(tasks, script, **options)
    assert lines == ["/disk", "/control", "/dev/null r w", *(["c 1 3"] if capability else [])]


def test_bound_devices_work(tasks: Tasks, node: Path) -> None:
    """Read-only devices can be read only, which no mount sees to."""
    place = Path(f"/dev/{node.parent.name}")  # elsewhere may be mounted nodev
    os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(*LOOP_CONTROL))
    try:
        for option, access in (("bind", "r w"), ("bind_read_only", "r")):
            bound = {option: [{str(place): "/dev/a"}]}
            assert inside(tasks, say("/dev/a"), user_namespacing=False, **bound) == [f"/dev/a {access}"]
    finally:
        place.unlink()
    folder = open_source("bind", "/dev", "/dev")
    assert DeviceRule(False, 1, 3, "r") in read_rules(folder, "r")
    os.close(folder.fd)


def test_no_node_of_a_large_directory_is_left_out_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nspawn.sources.MAX_NODES", 2)
    folder = open_source("bind", "/dev", "/dev")
    with pytest.raises(HostError, match=r"^/dev cannot be used in a container: it has more than 2 files"):
        list(read_rules(folder, "r"))
    os.close(folder.fd)


@USERS
def test_device_plugins(driver_file: Path, image: Path, node: Path, namespaces: bool) -> None:
    """What the operator's device plugins give needs no permission, and commands have it after a crash, too."""
    config = 'allow = ["host_network", "host_users"]'
    given = [driver_pb2.Device(host_path=str(node), task_path="/dev/gpu0", cgroup_permissions="rw")]
    with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image) as tasks:
        with pytest.raises(DriverError, match="does not allow devices"):
            tasks.start("true", options={"devices": [{"host_path": str(node)}]})
        task = tasks.start("sleep 60", devices=given, user_namespacing=namespaces)
        with launch_like_agent(driver_file, config) as other:
            plugin.kill_hard()
            task.recover(other)
            text, _ = task.exec(["/bin/sh", "-c", say("/dev/gpu0", "/dev/zero")])
            assert text.decode() == "/dev/gpu0 r w\n/dev/zero r w\n"
            tasks.plugin = other
            tasks.close()


@pytest.fixture
def loop_control() -> Iterator[Path]:
    """The host's own node, which a host that is a container may lack."""
    place = Path("/dev/loop-control")
    is_made = not place.exists()
    if is_made:
        os.mknod(place, stat.S_IFCHR | 0o660, os.makedev(*LOOP_CONTROL))
    yield place
    if is_made:
        place.unlink()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A directory for device nodes: other file systems may be mounted nodev."""
    place = Path(f"/dev/{tmp_path.name}")
    place.mkdir()
    yield place
    shutil.rmtree(place)


@USERS
def test_class_of_devices(tasks: Tasks, folder: Path, loop_control: Path, namespaces: bool) -> None:
    """The nodes that there are, as the host has them; and any that comes later, in a directory that is bound."""
    options = {"devices": [{"host_path": "char-mi*c", "cgroup_permissions": "r"}]}
    bound = {"bind": [{str(folder): "/mnt"}], "user_namespacing": namespaces}
    task = tasks.start("sleep 60", options=options, **bound)
    for name, number in (("misc", LOOP_CONTROL), ("tty", (4, 64))):
        os.mknod(folder / name, stat.S_IFCHR, os.makedev(*number))
        (folder / name).chmod(0o666)
    script = f"stat -c '%a %u' {loop_control};" + say(str(loop_control), "/mnt/misc", "/mnt/tty", "/dev/net/tun")
    text, _ = task.exec(["/bin/sh", "-c", script])
    mode = f"{stat.S_IMODE(loop_control.stat().st_mode):o} 0"
    assert text.decode().splitlines() == [mode, f"{loop_control} r", "/mnt/misc r", "/mnt/tty", "/dev/net/tun r w"]


HOOK = """
    state=$(cat); bundle=${state##*'"bundle": "'}; root=${bundle%%'"'*}/rootfs
    mount -t tmpfs none "$root/mnt" # needs the rights of hooks as NVIDIA's; nobody else sees it
    cp "$root/tmp/l" "$root/var/made"
    ln -s made "$root/var/link"
    echo "$root $VALUE $1 $(id -u) $(grep -c ' 0 *0 ' /proc/self/uid_map)" >"$root/var/said"
"""


@pytest.fixture
def vendor(node: Path) -> Iterator[str]:
    """The name of a device in a file of CDI on this host."""
    name = f"{node.parent.name.replace('_', '-')}.example/device"
    (node.parent / "library").write_text("found")
    (node.parent / "state").mkdir(mode=0o777)
    (node.parent / "state").chmod(0o777)
    mount = {"options": ["rw", "rbind", "nosuid"], "hostPath": f"{node.parent}/state", "containerPath": "/tmp/s"}
    edits = {
        "deviceNodes": [
            {"path": "/dev/my/control", "hostPath": str(node), "type": "c", "major": LOOP_CONTROL[0],
             "minor": LOOP_CONTROL[1], "fileMode": 0o640, "permissions": "r", "uid": 1, "gid": 44},
            {"path": "/dev/zero"},
        ],
        "mounts": [mount],
        "env": ["DEVICES=one"],
        "additionalGids": [44],
    }  # fmt: skip

    stuck = f"echo $$ >{node.parent}/new; mv {node.parent}/new {node.parent}/began; sleep 60; true"

    def hook(*words: str, timeout: int = 1) -> dict[str, object]:
        more = {"path": "/bin/sh", "args": ["sh", *words], "env": ["VALUE=v"], "timeout": timeout}
        return {"hookName": "createContainer", **more}

    library = {"hostPath": f"{node.parent}/library", "containerPath": "/tmp/l", "options": ["ro", "bind"]}
    spec = {
        "cdiVersion": "0.7.0",
        "kind": name,
        "containerEdits": {"mounts": [library], "env": ["DRIVER=1"]},
        "devices": [
            {"name": "0", "containerEdits": edits},
            {"name": "all", "containerEdits": {}},
            {"name": "hook", "containerEdits": {"hooks": [hook("-ec", HOOK, "sh", "word")]}},
            {"name": "stuck", "containerEdits": {"hooks": [hook("-c", stuck, timeout=60)]}},
            {"name": "slow", "containerEdits": {"hooks": [hook("-c", "sleep 60 & wait")]}},
            {"name": "broken", "containerEdits": {"hooks": [hook("-c", "echo first; echo no GPU >&2; exit 7")]}},
        ],
    }
    place = Path(f"/run/cdi/{node.parent.name}.json")
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(spec))
    yield name
    place.unlink()


def test_check_lists_devices_of_cdi(driver_file: Path, vendor: str) -> None:
    said = subprocess.run([driver_file, "check"], capture_output=True, text=True, check=False).stdout
    assert f".json has the devices {vendor}=0, {vendor}=all, " in " ".join(said.split())


@USERS
@pytest.mark.parametrize("mode", MODES)
def test_devices_of_cdi(tasks: Tasks, vendor: str, namespaces: bool, mode: str) -> None:
    script = "stat -c '%a %u %g' /dev/my/control; cat /tmp/l; echo; >/tmp/s/x && echo kept; echo $DRIVER $DEVICES;"
    script += "grep -q ' /tmp/s .*nosuid' /proc/self/mountinfo && echo nosuid;"
    script += "id -G;" + say("/dev/my/control")
    options = {"options": {"devices": [{"host_path": f"{vendor}=0"}, {"host_path": f"{vendor}=all"}]}}
    lines = inside(tasks, script, **options, user_namespacing=namespaces, **MODES[mode])
    groups = "0" if mode == "booted" else "0 44"  # a command beside a booted system has those of its user
    assert lines[1:6] == ["found", "kept", "1 one", "nosuid", groups]
    if namespaces and read_host().kernel < (6, 3):  # it is nobody's there
        assert lines[0] == "640 65534 65534"
    else:
        assert [lines[0], *lines[6:]] == ["640 1 44", "/dev/my/control r"]


@USERS
@pytest.mark.parametrize("more", [{"ephemeral": True}, {"volatile": "overlay", "boot": True}], ids=str)
def test_hooks_of_cdi(tasks: Tasks, vendor: str, namespaces: bool, more: dict[str, Any]) -> None:
    """They see the root with the device's mounts, as the container's root."""
    options = {"options": {"devices": [{"host_path": f"{vendor}=hook"}]}, "read_only": None, **more}
    script = "cd /var; cat said; cat link; echo; stat -c %u said; ls /mnt"
    root = "/run/nomad-driver-nspawn/rootfs"
    lines = inside(tasks, script, **options, user_namespacing=namespaces)
    assert lines == [f"{root} v word 0 {0 if namespaces else 1}", "found", "0"]


def test_hook_ends_with_its_task(driver_file: Path, image: Path, vendor: str, node: Path) -> None:
    with launch_like_agent(driver_file, 'allow = ["all"]') as plugin, Tasks(plugin, image) as tasks:
        options = {"devices": [{"host_path": f"{vendor}=stuck"}], "ephemeral": True, "user_namespacing": False}
        task = tasks.make("true", options=options)
        with ThreadPoolExecutor() as pool:
            starting = pool.submit(task.start)
            eventually((node.parent / "began").exists)
            plugin.kill_hard()
            assert starting.exception()
        with launch_like_agent(driver_file) as tasks.plugin:
            tasks.close()
        assert not is_alive(int((node.parent / "began").read_text()))


def test_hooks_that_fail(tasks: Tasks, vendor: str) -> None:
    for name, sentence in (
        ("hook", f'devices.host_path = "{vendor}=hook": its hook /bin/sh needs a root of the task\'s own; set'),
        ("broken", f"the hook /bin/sh of {vendor}=broken failed with the exit code 7: no GPU"),
        ("slow", f"the hook /bin/sh of {vendor}=slow was killed after 1 s"),
    ):
        options = {"devices": [{"host_path": f"{vendor}={name}"}], "ephemeral": name != "hook"}
        with pytest.raises(DriverError, match=re.escape(sentence)):
            tasks.start("true", options=options, read_only=None)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("a.example/b=0", "no file of CDI on this host (/etc/cdi, /var/run/cdi) has this device; they have"),
        ("char-nothing", "/proc/devices of this host has no class nothing of char devices; load the module"),
        ("/dev/nothing", 'devices.host_path = "/dev/nothing": cannot be used: No such file or directory'),
        ("/dev", "must be a device node; name each node in a directory by itself"),
        ("/etc/hostname", "must be a device node"),
    ],
)
def test_not_a_device(tasks: Tasks, path: str, sentence: str) -> None:
    with pytest.raises(DriverError) as caught:
        tasks.start("true", options={"devices": [{"host_path": path}]})
    assert sentence in str(caught.value)
