# SPDX-License-Identifier: MPL-2.0
"""The rules of the house that a machine can check: linters, types, the shape of driver.py, generated files."""

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
BUILT = "nomad-driver-nspawn"
SOURCE = (TOP / "driver.py").read_text()
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
RULER = "# " + "=" * 101
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


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
    run([sys.executable, "-m", "mypy", "--strict", "--python-version", version])


def test_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        assert not os.environ.get("CI"), "shellcheck is not installed: in CI it must be"
        pytest.skip("shellcheck is not installed, so build.sh is not checked: apt install shellcheck")
    run(["shellcheck", "build.sh"])


def test_scripts_inside_driver_are_posix() -> None:
    """The keeper runs in whatever sh a host has."""
    (script,) = [
        node.value.value
        for node in TREE.body
        if isinstance(node, ast.Assign)
        and [ast.unparse(target) for target in node.targets] == ["KEEPER"]
        and isinstance(node.value, ast.Constant)
    ]
    assert isinstance(script, str)
    run(["sh", "-n", "-c", script])
    if shutil.which("shellcheck"):
        done = subprocess.run(
            # without SC2034: `read` wants a name also for what nobody needs
            ["shellcheck", "--shell=sh", "--severity=warning", "--exclude=SC2034", "-"],
            input=script,
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout


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


# -- the shape of driver.py ----------------------------------------------------------------------------------


def read_banners() -> dict[str, int]:
    """Return the sections' names and the lines of their banners."""
    return {
        LINES[number + 1].removeprefix("# "): number + 1
        for number, line in enumerate(LINES[:-2])
        if line == RULER and LINES[number + 2] == "#"
    }


def find_section(line: int) -> str:
    """Return the section that a line is in, "" above the first."""
    return max(((start, name) for name, start in read_banners().items() if start <= line), default=(0, ""))[1]


def test_banners_are_the_sections_of_the_docstring() -> None:
    listed = re.findall(r"^    (\w+) {2,}\S", ast.get_docstring(TREE, clean=False) or "", re.MULTILINE)
    assert len(listed) > 8
    assert list(read_banners()) == listed


def test_banners_are_whole() -> None:
    """A ruler, the name, an empty line, a few lines of contract, a ruler."""
    rulers = [number for number, line in enumerate(LINES) if re.fullmatch(r"# ={20,}", line)]
    assert {LINES[number] for number in rulers} == {RULER}
    assert len(rulers) == 2 * len(read_banners())
    for start, end in zip(rulers[::2], rulers[1::2], strict=True):
        contract = LINES[start + 3 : end]
        assert LINES[start + 2] == "#"
        assert 1 <= len(contract) <= 9, LINES[start + 1]
        assert all(line.startswith("# ") for line in contract)
        assert contract[-1].endswith(".")


def test_functions_are_short() -> None:
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in FUNCTIONS}
    assert {name: length for name, length in lengths.items() if length > 50} == {}
    assert statistics.median(lengths.values()) <= 12


def test_functions_and_classes_are_used() -> None:
    """Delete before adding: what nothing names but its definition can go."""
    names = [node.name for node in FUNCTIONS if node.name.islower() and not node.name.startswith("__")]
    said = Counter(re.findall(r"\w+", SOURCE))
    unused = {name for name in names if said[name] < 2}
    assert unused == set()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def walk_runtime(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs: not what is there for type checkers only, and no annotations, which nothing evaluates."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not is_type_checking(child):
                yield from walk_runtime(child)


RUNTIME = list(walk_runtime(TREE))


def test_annotations_are_not_evaluated() -> None:
    """walk_runtime, and cheap imports, depend on it."""
    assert "from __future__ import annotations" in LINES


def read_imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def uses(*modules: str) -> set[str]:
    """Return the sections that use modules at run time, be it by import or by name."""
    found = set()
    for node in RUNTIME:
        if isinstance(node, ast.Name) and node.id in modules:
            found.add(find_section(node.lineno))
        for name in read_imports(node):
            if name.split(".")[0] in modules and isinstance(node, (ast.Import, ast.ImportFrom)):
                found.add(find_section(node.lineno))
    return found


def test_protocol_is_used_below_services_only() -> None:
    """Helper processes and people's commands start from this file, too: they stay light."""
    names = {path.stem for path in (TOP / "nomad_pb").glob("*_pb2*.py")}
    assert "driver_pb2" in names
    found = uses("grpc", "nomad_pb", "google", "msgpack", *names)
    assert found <= {"Wire", "Services", "Server", "Main"}
    assert "Services" in found


def test_subprocess_is_used_by_one_section_only() -> None:
    assert uses("subprocess") == {"", "Processes"}  # "" is the import


def test_nothing_that_forks() -> None:
    """Forked children of a process that runs gRPC crash (grpc#41768)."""
    banned = {"fork", "forkpty", "spawnv", "spawnve", "spawnvp", "spawnl", "system", "popen", "posix_spawn"}
    for node in RUNTIME:
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            assert node.attr not in banned, f"line {node.lineno}: os.{node.attr}"
        if isinstance(node, ast.Call):
            keywords = {keyword.arg for keyword in node.keywords}
            forking = {"user", "group", "extra_groups"} if "subprocess." in ast.unparse(node.func) else set()
            assert not keywords & {"preexec_fn", *forking}, f"line {node.lineno}"
        for name in read_imports(node):
            assert name.split(".")[0] not in ("multiprocessing", "uvloop", "pty", "concurrent"), name
    assert not uses("multiprocessing", "uvloop", "pty", "concurrent")


def test_threads_are_started_by_one_function_only() -> None:
    """Everything is done in one thread, but for what must leave its namespace."""
    assert uses("threading") == {"", "Processes"}
    assert SOURCE.count("threading.") == 1


def test_no_asyncio_processes_and_threads() -> None:
    """asyncio watches children with a thread each on Python 3.10 and 3.11."""
    banned = {"create_subprocess_exec", "create_subprocess_shell", "to_thread", "run_in_executor"}
    assert {node.attr for node in RUNTIME if isinstance(node, ast.Attribute)} & banned == set()


def test_processes_have_explicit_stdio_and_environment() -> None:
    """A child with the plugin's stdout or stderr would keep the agent waiting for their end."""
    calls = [node for node in RUNTIME if isinstance(node, ast.Call) and "subprocess." in ast.unparse(node.func)]
    assert calls
    for call in calls:
        keywords = {keyword.arg for keyword in call.keywords}
        assert {"env", "stdin", "stdout", "stderr"} <= keywords, f"line {call.lineno}"
        assert "shell" not in keywords, f"line {call.lineno}"


def define_names(node: ast.AST) -> list[str]:
    """Return the names a statement at the top level of the module gives."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def test_sections_use_only_what_stands_above() -> None:
    places = {name: find_section(node.lineno) for node in TREE.body for name in define_names(node)}
    order = ["", *read_banners()]
    wrong = set()
    for node in RUNTIME:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in places:
            here, there = find_section(node.lineno), places[node.id]
            if order.index(there) > order.index(here):
                wrong.add(f"line {node.lineno} in {here}: {node.id} of {there}")
    assert wrong == set()


def test_version_is_one_nomad_can_read() -> None:
    """hashicorp/go-version refuses `.dev1` and `.post1`, and the agent does not start then."""
    (version,) = re.findall(r'^__version__ = "(.+)"', SOURCE, re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+(-?(dev|rc\d+|alpha\d*|beta\d*))?", version)


@pytest.mark.parametrize("path", ["driver.py", "build.sh", "pyproject.toml", "tests/conftest.py"])
def test_no_blanks_at_line_ends(path: str) -> None:
    text = (TOP / path).read_text()
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert [number for number, line in enumerate(text.splitlines(), 1) if line != line.rstrip()] == []


@pytest.mark.parametrize("path", sorted({*TOP.glob("*.py"), *TOP.glob("tests/*.py")}), ids=lambda path: path.name)
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
