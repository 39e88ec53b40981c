# SPDX-License-Identifier: MPL-2.0
"""The built file as a host meets it: other Pythons, hostile environments, bad places to unpack to, interruptions.

Every test starts the real file. Its cache is in a directory of the test (SHIV_ROOT) or, where the default places
are the subject, in a mount namespace of its own, so nothing of this machine's own cache is touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import random
import re
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nspawn.host import read_cgroup_mode
from tests.agent import HANG, Allocation, Task, launch_like_agent
from tests.built import find_changed

TOP = Path(__file__).resolve().parents[2]
NAME = "nomad-driver-nspawn"
[VERSION] = re.findall(r'^__version__ = "(.+?)"', (TOP / "driver.py").read_text(), re.MULTILINE)
HELLO = f"usage: {NAME} "  # of `help`, which unpacks the file; `--version` does not
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
COOKIE = {"NOMAD_PLUGIN_MAGIC_COOKIE": "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255"}
HANDSHAKE = re.compile(r"1\|2\|unix\|/.+\|grpc\|\n")
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
Result = subprocess.CompletedProcess[str]


# -- helpers -------------------------------------------------------------------------------------------------


def build(*arguments: str, top: Path = TOP, **environment: str) -> None:
    subprocess.run(["sh", "build.sh", *arguments], cwd=top, env=os.environ | environment, check=True, timeout=600)


def run(file: Path, **environment: str) -> Result:
    return subprocess.run(
        [file, "help"], env={"PATH": SYSTEM_PATH, "HOME": "/nonexistent"} | environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@contextlib.contextmanager
def plugin(file: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The file started as an agent starts it; killed at the end."""
    with subprocess.Popen(
        [file], env={"PATH": SYSTEM_PATH, "HOME": "/nonexistent"} | COOKIE | environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()  # then it removes its socket
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(HANG)
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    assert select.select([process.stdout], [], [], 60)[0], "nothing on stdout for a minute"
    return process.stdout.readline()


def handshake(file: Path, **environment: str) -> str:
    with plugin(file, **environment) as process:
        return first_line(process)


def check_refusal(result: Result, *parts: str) -> None:
    """Where Nomad looks: the sentence is the first line of stdout, and an [ERROR] line on stderr."""
    assert result.returncode == 1
    assert result.stdout.startswith(f"{NAME}: ")
    assert result.stdout.count("\n") == 1
    assert result.stderr == f"[ERROR] {result.stdout}"
    for part in parts:
        assert part in result.stdout


def in_namespace(file: Path, script: str, **environment: str) -> Result:
    """Runs a shell script in a mount namespace of its own, with the file as $file on a file system of its own."""
    prologue = (
        'set -e; mount -t tmpfs none /mnt; file=/mnt/nomad-driver-nspawn; : >$file; mount --bind "$1" $file; '
        "mount -o remount,bind,exec $file; hide() { mount -t tmpfs -o mode=755,$2 none $1; }\n"
    )
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", prologue + script, "sh", file],
        env={"PATH": SYSTEM_PATH, "HOME": "/nonexistent"} | environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def find_python(version: str) -> Path | None:
    places = [
        Path("/usr/bin"),
        Path("/usr/local/bin"),
        *Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin"),
    ]
    return next((place / f"python{version}" for place in places if (place / f"python{version}").exists()), None)


def find_tree(cache: Path) -> Path:
    (tree,) = (path for path in cache.iterdir() if path.is_dir())
    return tree / "site-packages"


def check_tree(cache: Path, file: Path) -> None:
    """Everything but the modules compiled for other Pythons is there, whole."""
    tree = find_tree(cache)
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.filename.startswith("site-packages/") and ".cpython-" not in entry.filename:
                assert (tree.parent / entry.filename).stat().st_size == entry.file_size
    assert len(list(tree.glob("grpc/_cython/cygrpc.*.so"))) == 1


def read_machine(elf: bytes) -> int:
    assert elf[:4] == b"\x7fELF"
    return int.from_bytes(elf[18:20], "little")


# -- the build -----------------------------------------------------------------------------------------------


def copy_checkout(target: Path) -> Path:
    """The sources with other modes and times, and the tools and wheels that are there already."""
    (target / "build").mkdir(parents=True)
    for name in (
        "build.sh",
        "driver.py",
        "requirements.lock",
        "requirements-dev.txt",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
    ):
        shutil.copyfile(TOP / name, target / name)
    for name in ("nomad_pb", "nspawn", "docs", "example"):
        shutil.copytree(TOP / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (TOP / "build").glob("libraries-*"):
        (target / "build" / path.name).symlink_to(path)
    (target / "build/venv").symlink_to(TOP / "build/venv")
    for path in target.rglob("*.py"):
        path.chmod(0o700)
        os.utime(path, (1e9, 1e9 + random.randrange(1000)))
    return target


def read_commit(file: Path) -> str:
    """The commit that a file was built from; the copy has no .git to tell it."""
    said = subprocess.run([file, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    match = re.fullmatch(rf"{NAME} {re.escape(VERSION)}(?: \((\S+)\))?\n", said)
    assert match, said
    return match[1] or ""


@pytest.fixture(scope="module")
def released(driver_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dist/ of the same sources in another place, under other circumstances."""
    other = copy_checkout(tmp_path_factory.mktemp("release") / "another place")
    subprocess.run(
        ["sh", "-c", "umask 077; exec sh ../another*/build.sh release"], cwd=other, check=True, timeout=600,
        env=os.environ | {"TZ": "Pacific/Auckland", "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": "1700000000",
                          "COMMIT": read_commit(driver_file)},
    )  # fmt: skip
    return other / "dist"


def test_same_sources_give_the_same_bytes(driver_file: Path, released: Path) -> None:
    file = released / f"{NAME}-{platform.machine()}"
    assert file.read_bytes() == driver_file.read_bytes(), "or the sources are newer than the file"
    assert stat.S_IMODE(file.stat().st_mode) == 0o755


def test_sums_of_a_release(released: Path) -> None:
    """As the README has it: only the files that one has loaded are checked."""
    names = {path.name for path in released.iterdir()} - {"SHA256SUMS"}
    packages = {name.rpartition("_")[2] for name in names if name.endswith(".deb")}
    assert names >= {f"{NAME}-x86_64", f"{NAME}-aarch64"} and packages == {"amd64.deb", "arm64.deb"}
    said = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=released, capture_output=True, text=True, check=True
    )
    assert said.stdout.count(": OK\n") == len(names) == 4, said


def test_debian_package(released: Path, driver_file: Path, tmp_path: Path) -> None:
    [package] = released.glob("*_amd64.deb" if platform.machine() == "x86_64" else "*_arm64.deb")
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True, timeout=60)
    installed = tmp_path / f"usr/lib/nomad/plugins/{NAME}"
    assert installed.read_bytes() == driver_file.read_bytes()
    assert (tmp_path / f"usr/share/doc/{NAME}/examples/package.hcl").is_file()
    owners = subprocess.run(["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in owners.stdout.splitlines()} == {"root/root"}
    check = ["dpkg", "--dry-run", "--install", str(package)]
    said = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said  # its dependencies are those of the tests


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_compiled_modules_are_of_the_right_architecture(released: Path, machine: str) -> None:
    with zipfile.ZipFile(released / f"{NAME}-{machine}") as archive:
        modules = [name for name in archive.namelist() if name.endswith(".so")]
        machines = {read_machine(archive.read(name)) for name in modules}
    assert machines == {{"x86_64": 62, "aarch64": 183}[machine]}
    for version in PYTHONS:
        tag = f".cpython-{version.replace('.', '')}-{machine}-linux-gnu.so"
        assert {Path(name).name for name in modules if name.endswith(tag)} == {f"cygrpc{tag}", f"_cmsgpack{tag}"}


def test_architecture_without_wheels_is_refused() -> None:
    result = subprocess.run(
        ["sh", "build.sh", "--arch", "sparc"], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "'sparc'" in result.stderr and "aarch64" in result.stderr


OURS = ("site-packages/nomad_pb/", "site-packages/nspawn/", "site-packages/driver")
NOT_INSIDE = {"bootstrap.py", "launcher.sh", "pack.py"}  # of nspawn/: they make the file


def test_contents(driver_file: Path) -> None:
    with zipfile.ZipFile(driver_file) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o100644}
    assert len(set(names)) == len(names)
    ours = {name for name in names if name.startswith(OURS)}
    assert ours == {
        f"site-packages/{path.relative_to(TOP)}"
        for path in [
            TOP / "driver.py",
            *TOP.glob("nomad_pb/*.py"),
            *(path for path in TOP.glob("nspawn/*.*") if path.name not in NOT_INSIDE),
        ]
    }
    assert not [name for name in names if "__pycache__" in name]
    assert {"grpcio", "msgpack", "protobuf", "typing_extensions"} == {
        name.split("/")[1].split("-")[0] for name in names if re.search(r"\.dist-info/.*(LICENSE|COPYING)", name)
    }


def test_tools_and_built_file_have_the_same_libraries() -> None:
    pins = re.findall(r"^\S+==\S+", (TOP / "requirements.lock").read_text(), re.MULTILINE)
    assert len(pins) == 4
    assert set(pins) <= set((TOP / "requirements-dev.txt").read_text().splitlines())


@pytest.mark.parametrize(
    "source",
    ["driver.py", "nomad_pb/base_pb2.py", *(f"nspawn/{name}" for name in ("plan.py", "new.py", "shim.sh"))]
    + ["nspawn/launcher.sh", "nspawn/bootstrap.py"],
)
def test_file_of_other_sources_is_not_tested(driver_file: Path, tmp_path: Path, source: str) -> None:
    top = copy_checkout(tmp_path / "checkout")
    assert find_changed(driver_file, top) == []
    with (top / source).open("a") as file:
        file.write("#\n")
    assert find_changed(driver_file, top) == [source]


# -- which Python runs it ------------------------------------------------------------------------------------


def environment_for(version: str, cache: Path) -> dict[str, str]:
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} in /usr/bin, /usr/local/bin or ~/.pyenv: this version was NOT tested")
    return {"SHIV_ROOT": str(cache), "NOMAD_DRIVER_NSPAWN_PYTHON": str(python)}


@pytest.mark.parametrize("version", PYTHONS)
def test_runs_under(version: str, driver_file: Path, tmp_path: Path) -> None:
    environment = environment_for(version, tmp_path / "cache")
    assert run(driver_file, **environment).stdout.startswith(HELLO)
    assert HANDSHAKE.fullmatch(handshake(driver_file, **environment))
    (module,) = find_tree(tmp_path / "cache").glob("grpc/_cython/*.so")
    assert f"cpython-{version.replace('.', '')}-" in module.name


@pytest.mark.parametrize("version", PYTHONS)
def test_runs_a_task_under(version: str, driver_file: Path, image: Path, tmp_path: Path) -> None:
    """Start, statistics, a killed plugin, recovery, stop: what touches asyncio, pidfds and signals."""
    environment = {**os.environ, **environment_for(version, tmp_path / "cache")}
    config = {
        "image": str(image),
        "boot": False,
        "read_only": True,
        "command": ["/bin/sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done"],
    }
    with (
        launch_like_agent(driver_file, env=environment) as first,
        Allocation() as allocation,
        Task(first, allocation, "web", config) as task,
    ):
        task.start()
        task.logmon.wait_for("up")
        assert next(task.stats(0.2)).agg_resource_usage.memory.usage > 0
        first.kill_hard()
        with launch_like_agent(driver_file, env=environment) as second:
            task.recover(second, agent_restart=False)
            task.stop()
            assert task.wait().exit_code == 3
            task.close()
    assert not first.violations + second.violations


def test_no_python(driver_file: Path) -> None:
    result = in_namespace(
        driver_file,
        """
        for python in /usr/bin/python3* /usr/local/bin/python3*; do
            if [ -e "$python" ]; then mount --bind /dev/null "$(readlink -f "$python")"; fi
        done
        exec "$file"
        """,
    )
    check_refusal(result, "Python 3.10 to 3.14", "/usr/local/bin", SYSTEM_PATH, "set NOMAD_DRIVER_NSPAWN_PYTHON")


def test_override_that_does_not_exist(driver_file: Path, tmp_path: Path) -> None:
    result = run(driver_file, SHIV_ROOT=str(tmp_path), NOMAD_DRIVER_NSPAWN_PYTHON="/no/python")
    check_refusal(result, "'/no/python'", "NOMAD_DRIVER_NSPAWN_PYTHON", "3.10")


def test_python_without_modules_for_it(driver_file: Path, tmp_path: Path) -> None:
    """Any too old or too new Python, PyPy, musl or debug build: this one only says that it is."""
    fake = tmp_path / "python"
    fake.write_text(f"""#!/bin/sh
shift
exec {sys.executable} -IS -c '
import importlib.machinery, runpy, sys
importlib.machinery.EXTENSION_SUFFIXES[0] = ".cpython-39-x86_64-linux-gnu.so"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")' "$@"
""")
    fake.chmod(0o755)
    result = run(driver_file, SHIV_ROOT=str(tmp_path / "cache"), NOMAD_DRIVER_NSPAWN_PYTHON=str(fake))
    check_refusal(result, "CPython 3.10 to 3.14", ".cpython-39-", "set NOMAD_DRIVER_NSPAWN_PYTHON")


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.9"])
def test_old_python(version: str, driver_file: Path, tmp_path: Path) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} here; test_python_without_modules_for_it has a stand-in")
    result = run(driver_file, SHIV_ROOT=str(tmp_path / "cache"), NOMAD_DRIVER_NSPAWN_PYTHON=str(python))
    check_refusal(result, "CPython 3.10 to 3.14", f"is Python {version}.")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("version", ["2.7.18", "3.6.8", "3.9.20"])
def test_stand_in_for_an_old_python(version: str, driver_file: Path, tmp_path: Path) -> None:
    """Python 2 says its version on stderr, and has no option -I."""
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\n[ "$1" != -V ] || exec echo Python {version} >&2\necho "Unknown option: -I"\nexit 2\n'
    )
    fake.chmod(0o755)
    result = run(driver_file, SHIV_ROOT=str(tmp_path / "cache"), NOMAD_DRIVER_NSPAWN_PYTHON=str(fake))
    check_refusal(result, "CPython 3.10 to 3.14", f"{fake} is Python {version}", "NOMAD_DRIVER_NSPAWN_PYTHON")


LACK = """
mkdir /mnt/upper /mnt/work
mount -t overlay -o lowerdir="$folder",upperdir=/mnt/upper,workdir=/mnt/work none "$folder"
rm -r "$folder"/$lacking
exec "$file" $argument
"""


@pytest.mark.parametrize(
    ("folder", "lacking", "parts"),
    [
        (
            f"/usr/lib/{platform.machine()}-linux-gnu",
            "libstdc++.so.6*",
            ("libstdc++.so.6", "libstdc++6", "Fedora"),
        ),
        (os.path.dirname(os.__file__), "shutil.py", ("shutil", "python3-minimal", "NOMAD_DRIVER_NSPAWN_PYTHON")),
        (os.path.dirname(os.__file__), "asyncio", ("asyncio", "python3-minimal", "NOMAD_DRIVER_NSPAWN_PYTHON")),
    ],
    ids=["libstdc++", "shutil", "asyncio"],
)
def test_minimal_system(driver_file: Path, folder: str, lacking: str, parts: tuple[str, ...]) -> None:
    """The agent refuses to start with a plugin that does not, so its error must say what to install."""
    python = os.path.realpath(sys.executable)
    environment = COOKIE | {"SHIV_ROOT": "/mnt/cache", "NOMAD_DRIVER_NSPAWN_PYTHON": python}
    for argument in ("", "check"):
        script = f"folder={folder} lacking={lacking} argument={argument}\n{LACK}"
        check_refusal(in_namespace(driver_file, script, **environment), *parts)


def test_python_of_another_machine(driver_file: Path, tmp_path: Path) -> None:
    fake = tmp_path / "python3.11"
    fake.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xff\x00" + bytes(100))
    fake.chmod(0o755)
    for shell in ("dash", "bash"):
        said = subprocess.run(
            [shell, driver_file], env={"PATH": SYSTEM_PATH, "NOMAD_DRIVER_NSPAWN_PYTHON": str(fake)},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert said.returncode == 1 and f"[ERROR] {said.stdout}" in said.stderr
        assert said.stdout.startswith(f"{NAME}: cannot execute {fake}: is it for this machine?")


def test_no_place_for_the_socket(driver_file: Path) -> None:
    result = in_namespace(
        driver_file, 'hide /run ro; hide /tmp ro; exec "$file"', SHIV_ROOT="/mnt/cache", **COOKIE
    )
    check_refusal(result, "no directory for the plugin's socket", "PLUGIN_UNIX_SOCKET_DIR", "/tmp")
    result = in_namespace(driver_file, 'hide /run ro; hide /tmp ro; exec "$file" check', SHIV_ROOT="/mnt/cache")
    assert result.returncode == 1 and "\nmissing: no directory for the plugin's socket" in result.stdout
    assert "\ntasks cannot run here\n" in result.stdout


def test_place_that_takes_no_sockets(driver_file: Path, tmp_path: Path) -> None:
    # A directory that takes directories, and nothing else.
    mode = read_cgroup_mode()
    assert mode
    cgroup = mode.root / f"sockets-{os.getpid()}"
    cgroup.mkdir()
    try:
        with plugin(driver_file, SHIV_ROOT=str(tmp_path / "cache"), PLUGIN_UNIX_SOCKET_DIR=str(cgroup)) as process:
            assert first_line(process).startswith(f"{NAME}: the plugin cannot listen at {cgroup}/")
            assert process.wait(HANG) == 1
    finally:
        for path in (*cgroup.glob("plugin-*"), cgroup):
            path.rmdir()


def test_version_needs_no_home_and_no_room(driver_file: Path, tmp_path: Path) -> None:
    for word in ("--version", "version"):
        said = subprocess.run(
            [driver_file, word], env={"PATH": SYSTEM_PATH, "SHIV_ROOT": str(tmp_path / "cache")},
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert said.stdout.startswith(f"{NAME} {VERSION}") and said.stderr == ""
    assert not (tmp_path / "cache").exists()


def test_truncated_file(driver_file: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(driver_file.read_bytes()[:10_000_000])
    part.chmod(0o755)
    check_refusal(run(part, SHIV_ROOT=str(tmp_path / "cache")), "is damaged", str(driver_file.stat().st_size))


def test_file_with_damage_inside(driver_file: Path, tmp_path: Path) -> None:
    """Of the right size: the rest of a download is zeros, say."""
    damaged = tmp_path / "damaged"
    shutil.copy2(driver_file, damaged)
    with damaged.open("r+b") as file:
        for place in range(1_000_000, damaged.stat().st_size - 1_000_000, 1_000_000):
            file.seek(place)
            file.write(bytes(100_000))
    check_refusal(run(damaged, SHIV_ROOT=str(tmp_path / "cache")), f"{damaged} is damaged", "download")


def test_unpacked_code_of_zeros(driver_file: Path, tmp_path: Path) -> None:
    """A power failure may leave them. Its size is right, so this code is not unpacked again."""
    cache = tmp_path / "cache"
    assert run(driver_file, SHIV_ROOT=str(cache)).stdout.startswith(HELLO)
    module = find_tree(cache) / "driver.py"
    module.write_bytes(bytes(module.stat().st_size))
    os.utime(module, (1, 1))  # within the same second Python would still use what it has compiled
    check_refusal(run(driver_file, SHIV_ROOT=str(cache)), str(cache), "remove")


# -- the environment -----------------------------------------------------------------------------------------


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A directory of modules that announce themselves where the handshake should be."""
    directory = tmp_path / "evil"
    user_site = directory / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    user_site.mkdir(parents=True)
    for name in ("sitecustomize", "usercustomize", "asyncio", "grpc", "driver", "nspawn", "zipfile", "nomad_pb"):
        (directory / f"{name}.py").write_text("import os; os.write(1, b'EVIL\\n')\ndef main(): pass\n")
    (user_site / "evil.pth").write_text(f"import sys; exec(open({str(directory / 'grpc.py')!r}).read())\n")
    return directory


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONPATH": "EVIL"},
        {"PYTHONHOME": "EVIL"},
        {"PYTHONUSERBASE": "EVIL"},
        {"PYTHONPATH": "EVIL", "PYTHONHOME": "EVIL", "PYTHONUSERBASE": "EVIL", "PYTHONSTARTUP": "EVIL/grpc.py"},
        {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONINSPECT": "1", "PYTHONVERBOSE": "1", "PYTHONOPTIMIZE": "2"},
        {"SHIV_INTERPRETER": "1"},
        {"SHIV_ENTRY_POINT": "asyncio:main"},
        {"SHIV_MODULE": "asyncio:main"},
        {"SHIV_CONSOLE_SCRIPT": "../../../../evil/grpc.py"},
        {"SHIV_PREPEND_PYTHONPATH": "EVIL"},
        {"SHIV_FORCE_EXTRACT": "1", "SHIV_COMPILE_PYC": "1", "SHIV_EXTEND_PYTHONPATH": "1"},
    ],
    ids=lambda variables: "+".join(variables),
)
def test_environment_cannot_steer_python(
    variables: dict[str, str], driver_file: Path, evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evil)  # a script's directory is on sys.path, the current one must not be
    variables = {name: value.replace("EVIL", str(evil)) for name, value in variables.items()}
    line = handshake(driver_file, SHIV_ROOT=str(tmp_path / "cache"), **variables)
    assert HANDSHAKE.fullmatch(line)
    assert list(find_tree(tmp_path / "cache").glob("__pycache__/driver.*.pyc")), (
        "byte code is not cached: slow starts"
    )


def test_empty_environment(driver_file: Path) -> None:
    result = in_namespace(driver_file, 'hide /var/cache rw; env -i "$file" help >/dev/null; ls /var/cache')
    assert result.stdout == f"{NAME}\n"
    assert result.stderr == ""


def test_umask_does_not_open_the_cache(driver_file: Path, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        assert run(driver_file, SHIV_ROOT=str(tmp_path / "cache")).stdout.startswith(HELLO)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.stat().st_mode & 0o022]


def test_started_through_a_link(driver_file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(driver_file)
    for file in (link, driver_file):
        assert run(file, SHIV_ROOT=str(tmp_path / "cache")).stdout.startswith(HELLO)
    assert find_tree(tmp_path / "cache").parent.name.startswith(f"{NAME}_")


# -- where it unpacks to -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mounts", "place"),
    [
        ("hide /var/cache rw", "/var/cache/nomad-driver-nspawn"),
        ("hide /var/cache ro; hide /var/lib rw", "/var/lib/nomad-driver-nspawn-cache"),
        ("hide /var/cache noexec; hide /var/lib rw", "/var/lib/nomad-driver-nspawn-cache"),
        ("hide /var/cache size=1m; hide /var/lib rw", "/var/lib/nomad-driver-nspawn-cache"),
        ("hide /var/cache ro; hide /var/lib noexec; hide /run rw", "/run/nomad-driver-nspawn-cache"),
        ("hide /var/cache ro; hide /var/lib ro; hide /run noexec; hide /home rw",
         "/home/.cache/nomad-driver-nspawn"),
        ("hide /var/cache rw; mkdir -m 777 /var/cache/nomad-driver-nspawn; hide /var/lib rw",
         "/var/lib/nomad-driver-nspawn-cache"),
    ],
)  # fmt: skip
def test_place_for_root(mounts: str, place: str, driver_file: Path) -> None:
    script = f'{mounts}\n"$file" help >/dev/null; ls -d {place}/{NAME}_*/site-packages/driver.py'
    result = in_namespace(driver_file, script, HOME="/home")
    assert result.stdout.startswith(place), result
    assert result.stderr == ""


def test_no_place_for_root(driver_file: Path) -> None:
    result = in_namespace(
        driver_file,
        "hide /var/cache ro; hide /var/lib noexec; hide /run size=1m; hide /home rw; chown 1234 /home\n"
        'exec "$file"',
        HOME="/home",
    )
    parts = ("/var/cache/nomad-driver-nspawn Read-only file system", "noexec", "No space left", "user 1234")
    check_refusal(result, *parts, "set SHIV_ROOT")


def test_full_disk_keeps_no_half_written_file(driver_file: Path) -> None:
    result = in_namespace(
        driver_file, 'hide /var/cache size=12m; SHIV_ROOT=/var/cache/x "$file" || find /var/cache -name .part >&2'
    )
    assert "No space left on device" in result.stdout
    assert ".part" not in result.stderr


@pytest.mark.parametrize("mode", ["ro", "noexec"])
def test_chosen_place_that_cannot_be_used(mode: str, driver_file: Path) -> None:
    result = in_namespace(driver_file, f'hide /home {mode}; export SHIV_ROOT=/home; exec "$file"')
    check_refusal(result, "/home", {"ro": "read-only", "noexec": "noexec"}[mode], "set SHIV_ROOT")


@pytest.mark.parametrize(
    "case", ["foreign", "world-writable", "group-writable", "foreign-link", "foreign-parent", "open-parent"]
)
def test_place_that_others_can_change(case: str, driver_file: Path, tmp_path: Path) -> None:
    """What lies there already is not run, even if it is complete and only the place is wrong."""
    cache = tmp_path / "cache"
    assert run(driver_file, SHIV_ROOT=str(cache)).stdout.startswith(HELLO)
    (find_tree(cache) / "driver.py").write_text("def main(): print('EVIL')\n")
    chosen = cache
    if case == "foreign":
        os.chown(cache, 12345, 12345)
    elif case == "foreign-link":
        os.chown(cache, 12345, 12345)
        chosen = tmp_path / "link"
        chosen.symlink_to(cache)
    elif case == "foreign-parent":
        (tmp_path / "parent").mkdir()
        chosen = cache.rename(tmp_path / "parent/cache")
        os.chown(tmp_path / "parent", 12345, 12345)
    elif case == "open-parent":
        (tmp_path / "parent").mkdir()
        (tmp_path / "parent").chmod(0o777)
        chosen = cache.rename(tmp_path / "parent/cache")
    else:
        cache.chmod(0o777 if case == "world-writable" else 0o770)
    check_refusal(run(driver_file, SHIV_ROOT=str(chosen)), str(chosen.resolve()), "cannot be trusted")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Where another user can go, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_user(*command: str | Path, **environment: str) -> Result:
    """As a user without an entry in passwd."""
    return subprocess.run(
        ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--", *command],
        env={"PATH": SYSTEM_PATH} | environment, cwd="/", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_places_for_a_user(driver_file: Path, open_directory: Path) -> None:
    file = open_directory / NAME
    shutil.copy(driver_file, file)
    home = open_directory / "home"
    home.mkdir()
    check_refusal(as_user(file), "neither HOME nor XDG_CACHE_HOME")
    check_refusal(as_user(file, HOME=str(home)), f"{home}/.cache/{NAME} Permission denied")
    os.chown(home, 12345, 12345)
    for variables, place in (({"HOME": str(home)}, ".cache"), ({"XDG_CACHE_HOME": str(home / "xdg")}, "xdg")):
        assert as_user(file, "help", **variables).stdout.startswith(HELLO)
        assert find_tree(home / place / NAME).exists()


# -- interruptions, damage, upgrades -------------------------------------------------------------------------


def test_six_starts_on_a_cold_cache(driver_file: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(plugin(driver_file, SHIV_ROOT=str(tmp_path / "cache"))) for _ in range(6)]
        for process in processes:
            assert HANDSHAKE.fullmatch(first_line(process))
    check_tree(tmp_path / "cache", driver_file)


def test_killed_while_unpacking(driver_file: Path, tmp_path: Path) -> None:
    interrupted = 0
    for attempt in range(6):
        cache = tmp_path / f"cache{attempt}"
        with plugin(driver_file, SHIV_ROOT=str(cache)) as process:
            while not cache.exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(attempt * random.uniform(0.015, 0.05))
            process.kill()
        interrupted += not list(cache.glob("*/site-packages/nomad_pb/stats_pb2.py"))  # among the last
        assert HANDSHAKE.fullmatch(handshake(driver_file, SHIV_ROOT=str(cache)))
        check_tree(cache, driver_file)
        shutil.rmtree(cache)
    assert interrupted, "no attempt met the unpacking: choose other moments"


@pytest.mark.parametrize("damage", ["module", "driver", "removed", "everything", "link"])
def test_damage_is_repaired(damage: str, driver_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run(driver_file, SHIV_ROOT=str(cache)).stdout.startswith(HELLO)
    tree = find_tree(cache)
    if damage == "module":
        (module,) = tree.glob("grpc/_cython/cygrpc.*.so")
        os.truncate(module, 1_000_000)
    elif damage == "driver":
        os.truncate(tree / "driver.py", 0)
    elif damage == "removed":
        (tree / "google/protobuf/message.py").unlink()
    elif damage == "link":
        (tree / "driver.py").unlink()
        (tree / "driver.py").symlink_to("/nonexistent")
    else:
        shutil.rmtree(tree)
    assert HANDSHAKE.fullmatch(handshake(driver_file, SHIV_ROOT=str(cache)))
    check_tree(cache, driver_file)


def test_old_trees_are_removed_unless_held(driver_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old, held = (cache / f"{NAME}_{letter * 64}" for letter in "ab")
    others = [cache / f"another-program_{'c' * 64}", cache / f"{NAME}_notes"]
    for tree in (old, held, *others):
        (tree / "site-packages").mkdir(parents=True)
        (tree / "site-packages/driver.py").touch()
    cache.chmod(0o700)
    with open(f"{held}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert run(driver_file, SHIV_ROOT=str(cache)).stdout.startswith(HELLO)
        assert not old.exists() and not Path(f"{old}.lock").exists()
        assert held.exists()
    assert run(driver_file, SHIV_ROOT=str(cache)).stdout.startswith(HELLO)
    assert not held.exists() and not Path(f"{held}.lock").exists()
    assert all(tree.exists() for tree in others)


def test_running_plugin_holds_its_tree(driver_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with plugin(driver_file, SHIV_ROOT=str(cache)) as process:
        assert HANDSHAKE.fullmatch(first_line(process))
        with open(f"{find_tree(cache).parent}.lock") as lock:
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process.kill()
            process.wait()
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
