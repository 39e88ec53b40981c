# SPDX-License-Identifier: MPL-2.0
"""Hosts for tests that this machine itself may not be: Debian machines with systemd as PID 1.

Two kinds, with the same few methods. `Container` is a Debian that systemd-nspawn boots: native speed, with
systemd, machined, networkd and D-Bus, but without limits where this machine has no cgroup v2. `Machine` is a
virtual one under qemu's own emulation, which needs no KVM: everything is real there (cgroup v2 with all
controllers, udev, a kernel of its own), and everything takes ten times as long; so it is for what only it shows.

Both are made from one tree for each Debian release, kept in $IMAGE_CACHE and never written to: a container keeps
its changes in memory, a machine is restored from a snapshot that was taken when it had booted. In every host
/checkout is this checkout with the built file, and a Python with the tests' libraries runs parts of these tests.

    python tests/hosts.py make [SUITE...]          make all images that are missing
    python tests/hosts.py shell container|machine SUITE     run commands from stdin in a host, one a line
"""

from __future__ import annotations

import abc
import base64
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("IMAGE_CACHE", "/var/cache/nomad-driver-nspawn-tests"))
CONTAINER_IMAGE = CACHE / "debian-bookworm"  # what tests run as tasks; made by build.sh
BUILT = "nomad-driver-nspawn"

# Releases and the major version of their systemd; of sid's nobody knows tomorrow's.
SYSTEMD = {"bookworm": 252, "trixie": 257, "sid": 0}

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
PACKAGES = (
    "systemd", "systemd-sysv", "systemd-container", "dbus", "udev", "iproute2", "iputils-ping", "nftables",
    "procps", "python3", "ca-certificates", "e2fsprogs", "xfsprogs", f"linux-image-cloud-{ARCHITECTURE}",
)  # fmt: skip
# What the tests import; the versions are those of requirements-dev.txt.
LIBRARIES = (
    "grpcio", "msgpack", "protobuf", "typing_extensions", "pytest", "pytest-timeout", "iniconfig", "packaging",
    "pluggy", "Pygments", "python-hcl2", "lark", "regex",
)  # fmt: skip
LIBRARY_ROOT = "/usr/local/lib/tests"

# The guest's end of the virtio port: a line of JSON for each command, and one for each answer.
AGENT = r"""
import json, os, signal, subprocess, time
port = os.open("/dev/virtio-ports/agent", os.O_RDWR)
buffer = b""
while True:
    try:
        data = os.read(port, 65536)
    except OSError:
        data = b""
    if not data:
        time.sleep(0.1)  # nobody at the other end
        continue
    buffer += data
    while b"\n" in buffer:
        line, _, buffer = buffer.partition(b"\n")
        try:
            request = json.loads(line)
        except ValueError:
            continue
        with open("/run/agent.out", "w+b") as out:
            process = subprocess.Popen(request["argv"], stdin=subprocess.DEVNULL, stdout=out,
                                       stderr=subprocess.STDOUT, start_new_session=True, cwd="/root")
            try:
                code = process.wait(request["timeout"])
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait() and None
            out.seek(0)
            text = out.read().decode(errors="backslashreplace")
        answer = json.dumps({"id": request["id"], "code": code, "output": text}).encode() + b"\n"
        while answer:
            answer = answer[os.write(port, answer):]
"""
AGENT_UNIT = """\
[Unit]
DefaultDependencies=no
After=sysinit.target dbus.socket
ConditionVirtualization=vm
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/bin/python3 -u /usr/local/lib/agent.py
KillMode=process
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
"""
RECIPE = 3  # counts changes to how images are made that nothing above shows


def have_cgroup2() -> bool:
    with contextlib.suppress(OSError):
        return "memory" in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    return False


# Where the v2 hierarchy is mounted, and systemd's own of v1, which nspawn keeps in step with it.
CGROUPS = [Path("/sys/fs/cgroup") / name for name in ("", "unified", "systemd")]


def make_cgroup(name: str) -> Path | None:
    """Make a cgroup where there is a v2 hierarchy."""
    for root in CGROUPS:
        if (root / "cgroup.controllers").exists():
            (root / name).mkdir()
            return root / name
    return None


def remove_cgroup(name: str) -> bool:
    """Remove a cgroup with all below it, everywhere; return whether it is gone."""
    for root in CGROUPS:
        for folder, _, _ in os.walk(root / name, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
    return not any((root / name).exists() for root in CGROUPS)


needs_cgroup2 = pytest.mark.skipif(
    not have_cgroup2(), reason="no cgroup v2 with controllers here: runs in virtual machines, see test_hosts.py"
)
needs_systemd = pytest.mark.skipif(
    not Path("/run/systemd/system").is_dir() or not shutil.which("machinectl"),
    reason="systemd is not PID 1 here: runs in containers with one, see test_hosts.py",
)


class HostError(Exception):
    """A host cannot be made or does not answer."""


@dataclasses.dataclass(frozen=True)
class Result:
    code: int | None  # None: it took too long
    output: str  # stdout and stderr


def run(argv: Sequence[str | Path], timeout: float = 600) -> str:
    """Run a tool of this machine; raise HostError with its output when it fails."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
    )
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        raise HostError(f"{shlex.join(map(str, argv))} ended with {done.returncode}:\n{output}")
    return output


# === Images ==================================================================================================


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """One maker at a time: test runs of several checkouts share the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pinned_libraries() -> list[str]:
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#") and '< "3.11"' not in line]
    return [
        pin.partition(";")[0].strip()
        for pin in pins
        if re.split(r"==", pin)[0].lower() in {name.lower() for name in LIBRARIES}
    ]


def image_key(suite: str, *more: object) -> str:
    """Tells an image from all that were made of other things."""
    parts = (RECIPE, suite, PACKAGES, pinned_libraries(), AGENT, AGENT_UNIT, *more)
    return f"{suite}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def make_tree(suite: str) -> Path:
    """Return the release's root directory; make it when it is missing: two minutes."""
    tree = CACHE / f"host-{image_key(suite)}"
    with lock(f"host-{suite}"):
        if tree.is_dir():
            os.utime(tree)
            return tree
        remove_unused("host")
        assert CONTAINER_IMAGE.is_dir(), f"{CONTAINER_IMAGE} is not there: `sh build.sh test` makes it"
        part = CACHE / f".part-{tree.name}"
        remove_image(part)
        expired = 'Acquire::Check-Valid-Until "false"'  # clocks of test machines are not always right
        docs = "path-exclude=/usr/share/{doc,locale,man}/*"
        run(
            ["mmdebstrap", "--quiet", "--variant=minbase", f"--aptopt={expired}", f"--dpkgopt={docs}",
             f"--include={','.join(PACKAGES)}", suite, part],
            timeout=1500,
        )  # fmt: skip
        furnish(part)
        part.rename(tree)
    return tree


def furnish(tree: Path) -> None:
    """Make a bare Debian a host for tests."""
    (tree / "usr/local/lib/agent.py").write_text(AGENT)
    (tree / "etc/systemd/system/agent.service").write_text(AGENT_UNIT)
    (tree / "etc/hostname").write_text("host\n")
    (tree / "etc/machine-id").write_text("")
    (tree / "checkout").mkdir()
    inside = ["chroot", str(tree)]
    run([*inside, "systemctl", "enable", "agent.service"])
    noise = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service",
             "systemd-networkd-wait-online.service", "systemd-random-seed.service")  # fmt: skip
    run([*inside, "systemctl", "mask", *noise])
    version = run([*inside, "python3", "-c", "import sys; print(*sys.version_info[:2], sep='.')"]).strip()
    platforms = [f"--platform=manylinux{tag}_{os.uname().machine}" for tag in ("2014", "_2_17", "_2_28")]
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--no-compile", "--only-binary=:all:", f"--python-version={version}", *platforms,
         f"--target={tree}{LIBRARY_ROOT}", *pinned_libraries()]
    )  # fmt: skip
    run([*inside, "python3", "-m", "compileall", "-q", LIBRARY_ROOT])
    target = tree / str(CONTAINER_IMAGE).lstrip("/")
    target.parent.mkdir(parents=True)
    run(["cp", "-a", "--reflink=auto", CONTAINER_IMAGE, target])


def remove_unused(kind: str) -> None:
    """Remove images that no run has used for a week; younger ones may be another checkout's."""
    for old in CACHE.glob(f"{kind}-*"):
        if old.stat().st_mtime < time.time() - 7 * 86400:
            remove_image(old)


def remove_image(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


QEMU = "qemu-system-x86_64"
MEMORY = 1024  # MiB; the snapshot's size and the time to restore it grow with it
SHARE_SIZE = "1G"  # of the drive with the checkout; part of the snapshot, so always the same
KERNEL_ARGUMENTS = "console=ttyS0 root=/dev/vda rw panic=-1 quiet net.ifnames=0 loglevel=3"


@functools.lru_cache(maxsize=1)
def qemu_version() -> str:
    if not shutil.which(QEMU):
        raise HostError(f"{QEMU} is missing: install qemu-system-x86 and qemu-utils")
    return run([QEMU, "--version"]).splitlines()[0]


def qemu_argv(tree: Path, disk: Path, share: Path, agent: Path, monitor: Path) -> list[str]:
    """The command for a machine; the same for the one that is saved and the ones that are restored from it."""
    kernel, initrd = (sorted((tree / "boot").glob(pattern))[-1] for pattern in ("vmlinuz*", "initrd*"))
    return [
        QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(MEMORY),
        "-display", "none", "-nic", "none", "-no-reboot", "-serial", f"file:{agent}.console",
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", KERNEL_ARGUMENTS,
        "-drive", f"file={disk},format=qcow2,if=virtio,cache=unsafe",
        "-drive", f"file={share},format=raw,if=virtio,readonly=on",
        "-device", "virtio-serial", "-chardev", f"socket,path={agent},server=on,wait=off,id=a",
        "-device", "virtserialport,chardev=a,name=agent", "-device", "virtio-rng-pci",
        "-monitor", f"unix:{monitor},server=on,wait=off",
    ]  # fmt: skip


def make_snapshot(suite: str) -> tuple[Path, Path]:
    """Return the release's tree, and a disk with a snapshot of the booted machine; make what is missing."""
    tree = make_tree(suite)
    key = image_key(suite, qemu_version(), qemu_argv(tree, Path("disk"), Path("share"), Path("a"), Path("m")))
    disk, base = CACHE / f"machine-{key}.qcow2", CACHE / f"machine-{key}.img"
    with lock(f"machine-{suite}"):
        if disk.is_file():
            os.utime(base)
            os.utime(disk)
            return tree, disk
        remove_unused("machine")
        run(["mke2fs", "-q", "-t", "ext4", "-d", tree, base, "5G"])
        with tempfile.TemporaryDirectory(prefix=".part-", dir=CACHE) as work:
            part = Path(work, "disk.qcow2")
            run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", part])
            share = Path(work, "share")
            share.touch()
            os.truncate(share, 1 << 30)
            machine = Machine(suite, Path(work), qemu_argv(tree, part, share, *sockets(Path(work))))
            try:
                machine.wait_answer(900)
                # With all that an ordinary run needs in its caches, restored machines do not read it again.
                machine.check(f"PYTHONPATH={LIBRARY_ROOT} python3 -c 'import pytest, grpc, hcl2, msgpack'", 300)
                machine.check("systemctl is-system-running --wait", 600)
                machine.save("ready")
            finally:
                machine.close()
            part.rename(disk)
    return tree, disk


def sockets(folder: Path) -> tuple[Path, Path]:
    return folder / "agent", folder / "monitor"


# === Hosts ===================================================================================================


class Host(abc.ABC):
    """A running host. Root's commands run in it; it is gone without a trace after close()."""

    suite: str

    @abc.abstractmethod
    def run(self, argv: Sequence[str], timeout: float = 60) -> Result: ...

    @abc.abstractmethod
    def close(self) -> None: ...

    def sh(self, script: str, timeout: float = 60) -> Result:
        return self.run(["/bin/sh", "-c", script], timeout)

    def check(self, script: str, timeout: float = 60) -> str:
        """The output of a script that must not fail."""
        result = self.sh(script, timeout)
        if result.code != 0:
            raise HostError(f"in {self}: {script!r} ended with {result.code}:\n{result.output}\n{self.console()}")
        return result.output

    def console(self) -> str:
        return ""

    def pytest(self, *arguments: str, timeout: float, env: Mapping[str, str] | None = None) -> Result:
        """Run tests of the checkout in the host. A test that is skipped there counts as failed: it is the place
        for it."""
        environ = {
            "PATH": os.defpath + ":/usr/sbin:/sbin:/usr/local/bin",
            "PYTHONPATH": LIBRARY_ROOT,
            "PYTHONDONTWRITEBYTECODE": "1",
            "IMAGE_CACHE": str(CACHE),
            "LANG": "C.UTF-8",
            "HOME": "/root",
            "NSPAWN_TEST_HOST": "1",  # tests may start and stop its services
            **(env or {}),
        }
        words = [f"{name}={value}" for name, value in environ.items()]
        command = [
            "python3",
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--color=no",
            "-q",
            "--no-skips",
            *arguments,
        ]
        # A unit of its own: what it leaves behind ends with it, and its cgroup is a place like any service's.
        unit = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--property=WorkingDirectory=/checkout"]
        return self.run([*unit, "env", "-i", *words, *command], timeout)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} {self.suite}"


# A way out, which leads nowhere: no Nomad agent starts without an interface that has a default route. And the name
# that installers of Debian make known.
UPLINK = """
echo 127.0.0.1 localhost >>/etc/hosts
ip link add uplink type veth peer name far
ip address add 10.9.9.1/24 dev uplink
ip link set uplink up
ip link set far up
ip route add default via 10.9.9.2
"""


class Container(Host):
    """A Debian booted by systemd-nspawn, with all capabilities and a network of its own."""

    def __init__(self, suite: str, binds: Sequence[str] = ()) -> None:
        self.suite = suite
        tree = make_tree(suite)
        name = f"host-{suite}-{os.getpid()}-{os.urandom(2).hex()}"
        self.work = tempfile.TemporaryDirectory(prefix="host-")
        self.name = name
        self.cgroup = make_cgroup(name)
        self.disk = Path(self.work.name, "disk")
        self.disk.mkdir()
        self.argv = [
            "systemd-nspawn", "--quiet", "--boot", f"--directory={tree}", "--volatile=overlay",
            f"--machine={name}", "--register=no", "--keep-unit", "--settings=no", "--capability=all",
            "--private-network", "--console=read-only", "--notify-ready=yes", "--link-journal=no",
            "--resolv-conf=off",
            f"--bind-ro={ROOT}:/checkout", f"--bind={CONTAINER_IMAGE}",
            # An overlay cannot be the source of an id-mapped mount, and a data_dir of Nomad is on none.
            "--tmpfs=/tmp:mode=1777,size=8G", "--tmpfs=/var/lib/machines:mode=700",
            "--tmpfs=/var/lib/nomad-driver-nspawn:mode=700",
            f"--bind={self.disk}:/disk",  # the only place that a reboot leaves as it is
            *(f"--bind-ro={bind}" for bind in binds),
        ]  # fmt: skip
        self.boot()

    def boot(self) -> None:
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with notify, open(Path(self.work.name, "console"), "wb") as console:
            notify.bind(f"{self.work.name}/notify")
            self.process = subprocess.Popen(
                # A cgroup of its own, or hosts of several runs would share one; and a mount namespace: nothing it
                # mounts is left here, whatever ends it.
                [
                    "sh",
                    "-c",
                    '[ ! -d "$0" ] || echo 0 >"$0/cgroup.procs"; exec unshare --mount --propagation=slave "$@"',
                    str(self.cgroup),
                    *self.argv,
                ],
                env={
                    "PATH": f"{os.defpath}:/usr/sbin:/sbin",
                    "NOTIFY_SOCKET": f"{self.work.name}/notify",
                    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                    "SYSTEMD_SECCOMP": "0",  # under a filter of its own a host cannot run commands in tasks
                    "SYSTEMD_NSPAWN_LOCK": "0",  # several hosts share the tree, none writes to it
                },
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
            try:
                self.leader = self.wait_ready(notify)
                self.check("touch /dev/kmsg")  # hosts have one, containers do not, and systemd wants none here
                self.check(UPLINK)
            except BaseException:
                self.close()
                raise

    def reboot(self) -> None:
        """As the power switch does it: nothing is asked to end, and all but /disk is as it was at first."""
        os.kill(self.leader, signal.SIGKILL)
        self.process.wait(20)
        Path(self.work.name, "notify").unlink()
        self.boot()

    def wait_ready(self, notify: socket.socket, limit: float = 120) -> int:
        """Return the pid of the host's PID 1 when its system has started."""
        leader, deadline = 0, time.monotonic() + limit
        notify.settimeout(0.5)
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(TimeoutError, socket.timeout):
                for line in notify.recv(65536).decode().splitlines():
                    if line.startswith("X_NSPAWN_LEADER_PID="):
                        leader = int(line.partition("=")[2])
                    elif line == "READY=1":
                        return leader
        raise HostError(f"{self} has not started (nspawn: {self.process.poll()}):\n{self.console()}")

    def run(self, argv: Sequence[str], timeout: float = 60) -> Result:
        # Not into the host's cgroup: its root may hold no process. Who needs one takes systemd-run, as pytest().
        enter = ["nsenter", f"--target={self.leader}", "--all", "--", "env", "-i", "HOME=/root",
                 "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]  # fmt: skip
        with tempfile.TemporaryFile() as out:
            process = subprocess.Popen(
                [*enter, *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code: int | None
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
            out.seek(0)
            return Result(code, out.read().decode(errors="backslashreplace"))

    def console(self) -> str:
        return Path(self.work.name, "console").read_text(errors="replace")[-4000:]

    def close(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(getattr(self, "leader", 0) or self.process.pid, signal.SIGKILL)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for _ in range(50):  # killed processes leave their cgroups a moment later
            if remove_cgroup(self.name):
                break
            time.sleep(0.02)
        self.work.cleanup()


class Machine(Host):
    """A virtual machine, as it was when it had just booted."""

    def __init__(self, suite: str, work: Path, argv: Sequence[str]) -> None:
        self.suite, self.work = suite, work
        self.buffer = b""
        self.connection: socket.socket | None = None
        with open(work / "qemu", "wb") as log:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @classmethod
    @contextlib.contextmanager
    def restored(cls, suite: str) -> Iterator[Machine]:
        """A machine with this checkout, from the release's snapshot: five seconds."""
        tree, saved = make_snapshot(suite)
        with tempfile.TemporaryDirectory(prefix="machine-") as folder:
            work = Path(folder)
            run(["cp", "--reflink=auto", saved, work / "disk"])
            make_share(work / "share")
            argv = qemu_argv(tree, work / "disk", work / "share", *sockets(work))
            machine = cls(suite, work, [*argv, "-loadvm", "ready"])
            try:
                machine.wait_answer(120)
                machine.check(f"date --set=@{time.time():.0f} && mount -o ro /dev/vdb /checkout")
                yield machine
            finally:
                machine.close()

    def wait_answer(self, limit: float) -> None:
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError, HostError):
                if self.run(["true"], timeout=5).code == 0:
                    return
            time.sleep(0.3)
        log = (self.work / "qemu").read_text(errors="replace")
        raise HostError(f"{self} does not answer (qemu: {self.process.poll()}):\n{log}\n{self.console()}")

    def run(self, argv: Sequence[str], timeout: float = 60) -> Result:
        request = {"id": base64.b16encode(os.urandom(8)).decode(), "argv": list(argv), "timeout": timeout}
        if self.connection is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.connect(str(self.work / "agent"))
            self.connection = connection
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + timeout + 20
        while True:
            self.connection.settimeout(max(deadline - time.monotonic(), 0.01))
            line = self.read_line()
            with contextlib.suppress(ValueError):  # the rest of an answer to an earlier client
                answer = json.loads(line)
                if answer.get("id") == request["id"]:
                    return Result(answer["code"], answer["output"])

    def read_line(self) -> bytes:
        assert self.connection
        while b"\n" not in self.buffer:
            data = self.connection.recv(1 << 20)
            if not data:
                raise HostError(f"{self} has gone:\n{self.console()}")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def monitor(self, command: str, limit: float = 120) -> str:
        """Say something to qemu's monitor and return its answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as monitor:
            monitor.settimeout(limit)
            monitor.connect(str(self.work / "monitor"))
            text = b""
            for line in (None, command):
                if line:
                    monitor.sendall(line.encode() + b"\n")
                    text = b""
                while not text.endswith(b"(qemu) "):
                    data = monitor.recv(65536)
                    if not data:
                        return text.decode(errors="replace")
                    text += data
            return text.decode(errors="replace")

    def save(self, name: str) -> None:
        if self.connection:
            self.connection.close()
            self.connection = None
        answer = self.monitor(f"savevm {name}", 300)
        if "Error" in answer:
            raise HostError(f"{self}: {answer}")

    def console(self) -> str:
        with contextlib.suppress(OSError):
            return Path(f"{self.work}/agent.console").read_text(errors="replace")[-4000:]
        return ""

    def close(self) -> None:
        if self.connection:
            self.connection.close()
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.monitor("quit", 10)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def make_share(path: Path) -> None:
    """Make a drive with what a checkout holds, and the built file."""
    with tempfile.TemporaryDirectory(prefix="share-") as folder:
        skip = shutil.ignore_patterns("build", ".git", "__pycache__", ".*_cache", "nomad-driver-nspawn-*")
        share = Path(folder, "checkout")
        shutil.copytree(ROOT, share, ignore=skip, symlinks=True)
        run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", share, path, SHARE_SIZE])


def make_nginx_image() -> Path:
    """Return the image of the example, made as its recipe says when it is missing: half a minute."""
    image = CACHE / "nginx"
    with lock("nginx"):
        if not image.is_dir():
            recipe = (ROOT / "example/nginx/image.sh").read_text()
            part = CACHE / ".part-nginx"
            remove_image(part)
            run(["sh", "-c", recipe.replace("/var/lib/machines/nginx", str(part))])
            part.rename(image)
    return image


def find_binds() -> Iterator[str]:
    """What tests need and no host has: programs in Go, which run on every release, and an agent's image."""
    for tool in ("nomad", "docker-registry"):
        if path := shutil.which(tool):
            yield f"{os.path.realpath(path)}:/usr/local/bin/{tool}"
    if shutil.which("nomad"):
        yield str(make_nginx_image())


@contextlib.contextmanager
def open_host(kind: str, suite: str) -> Iterator[Host]:
    """A running host of a kind ("container" or "machine")."""
    if kind == "machine":
        with Machine.restored(suite) as machine:
            yield machine
    else:
        with Container(suite, list(find_binds())) as host:
            yield host


# === Command line ============================================================================================


def main(arguments: Sequence[str]) -> int:
    command, *rest = arguments or ["help"]
    if command == "make":
        for suite in rest or SYSTEMD:
            started = time.monotonic()
            tree, disk = make_snapshot(suite)
            print(f"{tree} and {disk} ({time.monotonic() - started:.0f} s)", flush=True)
        return 0
    if command == "shell" and len(rest) == 2:
        with open_host(*rest) as host:
            for line in sys.stdin:
                result = host.sh(line, 600)
                print(result.output, end="", flush=True)
                if result.code != 0:
                    print(f"[{result.code}]", flush=True)
        return 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
