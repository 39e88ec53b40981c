# SPDX-License-Identifier: MPL-2.0
"""The rules of the house that a machine can check: linters, types, who imports whom, generated files."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
BUILT = "nomad-driver-nspawn"
# The rooms of the house, the lowest first: a room imports only what stands before it.
ROOMS = (
    "common", "notify", "linux", "files", "quota", "process", "permissions", "options", "checks", "mounts", "job",
    "devices", "host", "cgroup", "images", "accounts", "view", "sources", "cdi", "addresses", "network", "sysctl",
    "roots", "hooks", "unit", "rules", "bundle", "plan", "outcome", "record", "logs", "store", "fetches", "state",
    "setup", "machined", "running", "reaper", "entries", "exec", "inits", "health", "download", "unpack",
    "registry", "signature", "fetch", "diagnosis", "commands",
)  # fmt: skip
APART = ("enter", "bootstrap", "pack")  # programs of their own, which import nothing of ours
FETCHING = ("download", "unpack", "registry", "signature", "fetch")  # a process without gRPC
PATHS = {name: TOP / f"nspawn/{name}.py" for name in (*ROOMS, *APART)} | {"driver": TOP / "driver.py"}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
PLUGIN = [name for name in TREES if name not in (*FETCHING, *APART)]  # what runs in the plugin's process
FUNCTIONS = [
    node
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
]


def run(argv: Sequence[str], cwd: Path = TOP, env: Mapping[str, str] | None = None) -> None:
    """Run a tool; what it prints is the failure."""
    environ = {**os.environ, "NO_COLOR": "1", **(env or {})}
    done = subprocess.run(
        argv,
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}"


# -- tools ---------------------------------------------------------------------------------------------------


def test_ruff_format() -> None:
    run([sys.executable, "-m", "ruff", "format", "--check", "--diff", "--no-cache"])


def test_ruff_check() -> None:
    run([sys.executable, "-m", "ruff", "check", "--no-cache"])


@pytest.mark.parametrize("version", sorted({"3.10", f"{sys.version_info[0]}.{sys.version_info[1]}"}))
def test_mypy(version: str) -> None:
    cache = [] if os.access(TOP, os.W_OK) else ["--cache-dir", os.devnull]
    run([sys.executable, "-m", "mypy", "--strict", "--python-version", version, *cache])


def test_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        assert not os.environ.get("CI"), "shellcheck is not installed: in CI it must be"
        pytest.skip("shellcheck is not installed, so shell scripts are not checked: apt install shellcheck")
    run(["shellcheck", "build.sh", "nspawn/launcher.sh", "nspawn/unit.sh", "nspawn/journal.sh"])
    run(["shellcheck", "--exclude=SC2034", "nspawn/shim.sh"])  # `read` wants a name also for what nobody needs


@pytest.mark.parametrize("script", ["launcher.sh", "shim.sh", "unit.sh", "journal.sh"])
def test_scripts_are_posix(script: str) -> None:
    """They run in whatever sh a host has."""
    run(["sh", "-n", f"nspawn/{script}"])


# -- generated code ------------------------------------------------------------------------------------------


def read_shell_function(name: str) -> str:
    match = re.search(rf"^{name}\(\) \{{\n.*?^\}}\n", (TOP / "build.sh").read_text(), re.MULTILINE | re.DOTALL)
    assert match, f"build.sh has no function {name}"
    return match[0]


def test_protocol_code_is_generated_anew_without_a_difference(tmp_path: Path) -> None:
    """Runs the very command of build.sh, on a copy of the .proto files."""
    folder = tmp_path / "nomad_pb"
    folder.mkdir()
    for proto in (TOP / "nomad_pb").glob("*.proto"):
        shutil.copy(proto, folder)
    body = read_shell_function("protos")
    assert "-m grpc_tools.protoc" in body
    script = f"set -eu\npython=$1\nmake_tools() {{ :; }}\n{body}\nprotos\n"
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    run(["sh", "-c", script, "sh", sys.executable], cwd=tmp_path, env={"PATH": path})
    kept = {file.name: file.read_text() for file in (TOP / "nomad_pb").iterdir() if file.is_file()}
    assert kept.pop("__init__.py") == ""
    made = {file.name: file.read_text() for file in folder.iterdir()}
    assert sorted(kept) == sorted(made)
    for name, text in made.items():
        assert kept[name] == text, f"nomad_pb/{name} is out of date: run `sh build.sh protos`"


def test_commit_of_a_build(tmp_path: Path) -> None:
    """It is said with -dirty after a change, and not at all outside a checkout."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-C", str(tmp_path)]

    def find() -> str:
        script = f"set -eu\n{read_shell_function('find_commit')}\nfind_commit"
        return subprocess.run(
            ["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert find() == ""
    (tmp_path / "driver.py").touch()
    for arguments in (["init", "-q"], ["add", "driver.py"], ["commit", "-q", "-m", "first"]):
        run([*git, *arguments])
    assert re.fullmatch(r"[0-9a-f]{12}\n", commit := find())
    (tmp_path / "notes").touch()
    assert find() == commit
    (tmp_path / "driver.py").write_text("pass\n")
    assert find() == commit.replace("\n", "-dirty\n")


# -- the top of the checkout ---------------------------------------------------------------------------------


def test_nothing_at_the_top_can_be_taken_for_a_plugin() -> None:
    """An agent with -plugin-dir=$(pwd) starts whatever has an execute bit, and stops at a dangling link."""
    for entry in TOP.iterdir():
        mode = entry.stat().st_mode
        assert entry.name == BUILT or stat.S_ISDIR(mode) or not mode & 0o111, entry.name


def test_nothing_at_the_top_is_committed_as_executable() -> None:
    if not (TOP / ".git").exists():
        pytest.skip("no git checkout")
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={TOP}", "ls-files", "-s"],
        cwd=TOP,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    files = {path: mode.split()[0] for mode, _, path in (line.partition("\t") for line in listing.splitlines())}
    assert "driver.py" in files
    assert BUILT not in files
    assert {path for path, mode in files.items() if "/" not in path and mode != "100644"} == set()
    assert {path for path, mode in files.items() if mode == "120000"} == set()  # a link can dangle elsewhere


# -- the house -----------------------------------------------------------------------------------------------


def read_imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


IMPORTS = {
    name: [found for node in ast.walk(tree) for found in read_imports(node)] for name, tree in TREES.items()
}


def importers(*modules: str) -> set[str]:
    """Return the rooms that import modules, or something of them."""
    return {room for room, names in IMPORTS.items() if any(name.split(".")[0] in modules for name in names)}


def test_every_room_is_known() -> None:
    assert {path.stem for path in TOP.glob("nspawn/*.py")} == {*ROOMS, *APART, "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_downwards(room: str) -> None:
    ours = [name.split(".") for name in IMPORTS[room] if name.split(".")[0] in ("nspawn", "driver", "tests")]
    below = ROOMS[: ROOMS.index(room)]
    assert [".".join(name) for name in ours if name[0] != "nspawn" or name[1] not in below] == []


@pytest.mark.parametrize("program", APART)
def test_programs_apart_import_nothing_of_ours(program: str) -> None:
    assert program not in importers("nspawn", "driver", "nomad_pb", "grpc", "msgpack", "google")


@pytest.mark.parametrize(
    "path",
    [*TOP.glob("tests/agent/*.py")]
    + [TOP / f"tests/{name}.py" for name in ("built", "conftest", "containers", "hosts", "leftovers", "servers")],
    ids=lambda path: path.name,
)
def test_helpers_of_tests_know_the_driver_from_outside_only(path: Path) -> None:
    """Who looks with the driver's own eyes does not see its faults."""
    names = [name for node in ast.walk(ast.parse(path.read_text())) for name in read_imports(node)]
    assert [name for name in names if name.split(".")[0] in ("driver", "nspawn")] == []


def test_protocol_is_used_by_driver_only() -> None:
    """What is known of containers is free of protobuf, and the fetching process stays light."""
    assert importers("grpc", "nomad_pb", "google", "msgpack") == {"driver"}


def test_functions_are_short() -> None:
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in FUNCTIONS}
    assert {name: length for name, length in lengths.items() if length > 50} == {}
    assert statistics.median(lengths.values()) <= 12


def test_functions_and_classes_are_used() -> None:
    """Delete before adding: what nothing names but its definition can go."""
    names = [node.name for node in FUNCTIONS if node.name.islower() and not node.name.startswith("__")]
    said = Counter(word for path in PATHS.values() for word in re.findall(r"\w+", path.read_text()))
    assert {name for name in names if said[name] < 2} - OF_LIBRARIES == set()


OF_LIBRARIES = {"http_error_302", "redirect_request", "http_open", "https_open"}  # called by urllib


def test_subprocess_is_used_by_one_room_of_the_plugin() -> None:
    assert importers("subprocess") & {*PLUGIN} == {"process"}


def test_nothing_that_forks() -> None:
    """Forked children of a process that runs gRPC crash (grpc#41768)."""
    banned = {"fork", "forkpty", "spawnv", "spawnve", "spawnvp", "spawnl", "system", "popen", "posix_spawn"}
    for room, node in [(name, node) for name in PLUGIN for node in ast.walk(TREES[name])]:
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            assert node.attr not in banned, f"{room}, line {node.lineno}: os.{node.attr}"
        if isinstance(node, ast.Call):
            keywords = {keyword.arg for keyword in node.keywords}
            forking = {"user", "group", "extra_groups"} if "subprocess." in ast.unparse(node.func) else set()
            assert not keywords & {"preexec_fn", *forking}, f"{room}, line {node.lineno}"
    assert not importers("multiprocessing", "uvloop", "pty", "concurrent")


def test_threads_are_started_by_one_room_of_the_plugin() -> None:
    """Everything is done in one thread, but for what must leave its namespace."""
    assert importers("threading", "_thread") & {*PLUGIN} == {"process"}


def test_no_asyncio_processes_and_threads() -> None:
    """asyncio watches children with a thread each on Python 3.10 and 3.11."""
    banned = {"create_subprocess_exec", "create_subprocess_shell", "to_thread", "run_in_executor"}
    used = {node.attr for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert used & banned == set()


def test_processes_have_explicit_stdio_and_environment() -> None:
    """A child with the plugin's stdout or stderr would keep the agent waiting for their end."""
    nodes = ast.walk(TREES["process"])
    calls = [node for node in nodes if isinstance(node, ast.Call) and "subprocess." in ast.unparse(node.func)]
    assert calls
    for call in calls:
        keywords = {keyword.arg for keyword in call.keywords}
        assert {"env", "stdin", "stdout", "stderr"} <= keywords, f"line {call.lineno}"
        assert "shell" not in keywords, f"line {call.lineno}"


@pytest.mark.parametrize(
    "path",
    ["build.sh", *sorted(f"nspawn/{path.name}" for path in TOP.glob("nspawn/*.sh")), "pyproject.toml"],
)
def test_no_blanks_at_line_ends(path: str) -> None:
    text = (TOP / path).read_text()
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert [number for number, line in enumerate(text.splitlines(), 1) if line != line.rstrip()] == []


@pytest.mark.parametrize(
    "path",
    sorted({*TOP.glob("*.py"), *TOP.glob("nspawn/*.py"), *TOP.glob("tests/**/*.py")}),
    ids=lambda path: path.name,
)
def test_licence_is_said(path: Path) -> None:
    text = path.read_text()
    assert not text or text.startswith("# SPDX-License-Identifier: MPL-2.0\n")


def test_tools_for_types_are_locked() -> None:
    """Every tool used here has its version in requirements-dev.txt, or a new checkout would fail."""
    listed = re.findall(r"^([A-Za-z0-9_.-]+)==", (TOP / "requirements-dev.txt").read_text(), re.MULTILINE)
    for name in (
        "ruff",
        "mypy",
        "pytest",
        "hypothesis",
        "grpcio-tools",
        "mypy-protobuf",
        "msgpack",
        "types-grpcio",
    ):
        assert name in listed, f"requirements-dev.txt does not have {name}"
