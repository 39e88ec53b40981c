# SPDX-License-Identifier: MPL-2.0
"""Image: from a job's name to a place on disk, and paths as the container sees them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import driver
from driver import ConfigError, Image


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in place of /var/lib/machines; the working directory is an empty one."""
    path = tmp_path / "machines"
    path.mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", [str(tmp_path / "plugins/nomad-driver-nspawn")])
    monkeypatch.chdir(tmp_path / "empty")
    return path


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    path = tmp_path / "alloc/web"
    path.mkdir(parents=True)
    return path


def make_tree(path: Path, tree: str = "usr") -> Path:
    (path / tree).mkdir(parents=True)
    return path


def find(name: str, task_dir: Path | None = None, **options: object) -> Image:
    values: dict[str, Any] = {"ephemeral": False, "volatile": None, "pivot_root": None, **options}
    return driver.find_image(name, task_dir, values, image_dir())


def image_dir() -> Path:
    return Path.cwd().parent / "machines"  # see the fixture


def refusal(name: str, task_dir: Path | None = None, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        find(name, task_dir, **options)
    assert caught.value.option == "image"
    return str(caught.value)


# -- find_image ----------------------------------------------------------------------------------------------


def test_name(machines: Path) -> None:
    tree = make_tree(machines / "debian")
    image = find("debian")
    assert image == Image(tree, is_directory=True)
    assert image.argv == [f"--directory={tree}"]


def test_name_of_a_file(machines: Path) -> None:
    file = machines / "debian.raw"
    file.touch()
    for name in ("debian", "debian.raw"):
        image = find(name)
        assert image == Image(file, is_directory=False)
        assert image.argv == [f"--image={file}"]


def test_name_prefers_machines(machines: Path, task_dir: Path) -> None:
    make_tree(task_dir / "debian")
    assert find("debian", task_dir).path == task_dir / "debian"
    make_tree(machines / "debian")
    assert find("debian", task_dir).path == machines / "debian"


def test_absolute_path(machines: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "x")
    assert find(str(tree)).path == tree
    assert find(f"{tree}/../x/").path == tree


def test_absolute_path_of_a_link(machines: Path, tmp_path: Path) -> None:
    """nspawn gets the real path, so that two names of one image share its lock."""
    tree = make_tree(tmp_path / "x")
    (tmp_path / "link").symlink_to(tree)
    assert find(str(tmp_path / "link")).path == tree


def test_link_in_machines(machines: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "big disk")
    (machines / "debian").symlink_to(tree)
    assert find("debian").path == tree


@pytest.mark.parametrize("name", ["local/image", "./local/image", "local/../local/image/"])
def test_path_in_the_task_directory(machines: Path, task_dir: Path, name: str) -> None:
    tree = make_tree(task_dir / "local/image")
    assert find(name, task_dir).path == tree


def test_places_beside_the_plugin(machines: Path, task_dir: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "plugins/images/x")
    assert find("images/x", task_dir).path == tree


def test_working_directory(machines: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "empty/x")
    assert find("x").path == tree


def test_link_inside_the_task_directory(machines: Path, task_dir: Path) -> None:
    tree = make_tree(task_dir / "local/real")
    (task_dir / "local/image").symlink_to("real")
    assert find("local/image", task_dir).path == tree


def test_task_directory_behind_a_link(machines: Path, task_dir: Path, tmp_path: Path) -> None:
    tree = make_tree(task_dir / "local/image")
    (tmp_path / "link").symlink_to(tmp_path / "alloc")
    assert find("local/image", tmp_path / "link/web").path == tree


@pytest.mark.parametrize("target", ["../../../secret", "../../../secret/deeper/.."])
@pytest.mark.parametrize("name", ["local/image", "local/folder/image"])
def test_link_out_of_the_task_directory(
    machines: Path, task_dir: Path, tmp_path: Path, name: str, target: str
) -> None:
    """An artifact could hold such a link; the path is the task's, the tree behind it is not."""
    make_tree(make_tree(tmp_path / "secret") / "deeper")
    (task_dir / "local/real").mkdir(parents=True)
    (task_dir / "local/folder").symlink_to("real")
    (task_dir / "local/image").symlink_to(target)
    (task_dir / "local/real/image").symlink_to(f"../{target}")
    assert refusal(name, task_dir) == f'image = "{name}": leads out of the task\'s directory'
    absolute = str(task_dir / name)
    assert refusal(absolute, task_dir) == f'image = "{absolute}": leads out of the task\'s directory'


def test_dots_out_of_the_task_directory(machines: Path, task_dir: Path, tmp_path: Path) -> None:
    make_tree(tmp_path / "secret")
    name = "../../secret"
    assert refusal(name, task_dir) == f'image = "{name}": leads out of the task\'s directory'


def test_neighbour_with_the_same_beginning(machines: Path, task_dir: Path) -> None:
    make_tree(task_dir.with_name("web2") / "image")
    assert "leads out" in refusal("../web2/image", task_dir)


def test_not_found(machines: Path, task_dir: Path, tmp_path: Path) -> None:
    places = [
        machines / "no",
        machines / "no.raw",
        machines / "no.v",
        machines / "no.raw.v",
        task_dir / "no",
        tmp_path / "plugins/no",
        tmp_path / "empty/no",
    ]
    assert refusal("no", task_dir) == (
        f'image = "no": not found (looked for {", ".join(map(str, places))}); '
        f"give the path of an image, or the name of one in {machines}"
    )


@pytest.mark.parametrize("name", [".", ".."])
def test_dots_are_no_names(machines: Path, name: str) -> None:
    """They would be the directory of all images, and the one it is in."""
    assert not any(place.is_relative_to(machines) for place in driver.image_places(name, None, machines))
    assert machines / "x" in driver.image_places("x", None, machines)


@pytest.mark.parametrize("name", ["a" * 256, "a/" + "b" * 256, "/" + "a" * 5000, "/" + "a/" * 5000])
def test_too_long_to_exist(machines: Path, task_dir: Path, name: str) -> None:
    assert "not found" in refusal(name, task_dir)


def test_link_to_nothing_and_loops(machines: Path, task_dir: Path) -> None:
    (task_dir / "nothing").symlink_to("nowhere")
    (task_dir / "loop").symlink_to("loop")
    assert "not found" in refusal("nothing", task_dir)
    assert "not found" in refusal("loop", task_dir)


def test_no_operating_system(machines: Path) -> None:
    (machines / "x").mkdir()
    assert refusal("x") == 'image = "x": has no /usr directory, so it is no operating system tree'
    (machines / "x/usr").touch()
    assert "has no /usr" in refusal("x")


def test_tree_nspawn_takes(machines: Path) -> None:
    make_tree(machines / "x", "usr")
    assert find("x").is_directory


@pytest.mark.parametrize("pivot_root", ["/sysroot", "/sysroot:/old"])
def test_tree_below_pivot_root(machines: Path, pivot_root: str) -> None:
    make_tree(machines / "x/sysroot")
    assert "has no /usr" in refusal("x")
    assert find("x", pivot_root=pivot_root).path == machines / "x"
    assert "has no /usr" in refusal("x", pivot_root="/other")


def test_neither_directory_nor_file(machines: Path) -> None:
    os.mkfifo(machines / "x")
    assert refusal("x") == 'image = "x": must be a directory, a disk image or a block device'
    assert refusal("/dev/null") == 'image = "/dev/null": must be a directory, a disk image or a block device'


@pytest.mark.parametrize("name", ["/", "//", "/usr/..", "/proc/self/root"])
def test_root_of_the_host(machines: Path, name: str) -> None:
    sentence = f'image = "{name}": is the host\'s own root; set ephemeral, or volatile to yes or state'
    assert refusal(name) == sentence
    assert refusal(name, volatile="no") == sentence
    assert refusal(name, volatile="overlay") == sentence
    assert find(name, volatile="yes").path == Path("/")
    assert find(name, volatile="state").path == Path("/")
    assert find(name, ephemeral=True).path == Path("/")


# -- find_in_image -------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image with links of every kind, and things around it that must not be found."""
    path = tmp_path / "image"
    for folder in ("usr/bin", "etc", "opt/app/bin", "loops/inner"):
        (path / folder).mkdir(parents=True)
    for file in ("usr/bin/sh", "opt/app/bin/run", "usr/bin/data"):
        (path / file).touch()
    for file in ("usr/bin/sh", "opt/app/bin/run"):
        (path / file).chmod(0o755)
    (tmp_path / "outside").touch()
    links = {
        "bin": "usr/bin",
        "absolute": "/opt/app/bin/run",
        "etc/relative": "../opt/app/bin/run",
        "etc/too-many": "../../../../../../usr/bin/sh",
        "chain": "etc/relative",
        "folder": "/opt/app",
        "host": str(tmp_path / "outside"),
        "escape": "../outside",
        "dangling": "/nowhere",
        "root": "/",
        "self": "self",
        "ping": "pong",
        "pong": "ping",
        "loops/self": "self",
        "loops/inner/ping": "../inner/ping",
        "volume": "/mnt/data",
    }
    for name, target in links.items():
        (path / name).symlink_to(target)
    return path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/usr/bin/sh", "usr/bin/sh"),
        ("usr/bin/sh", "usr/bin/sh"),
        ("//usr/./bin//sh", "usr/bin/sh"),
        ("/usr/bin/", "usr/bin"),
        ("/", ""),
        ("", ""),
        ("/..", ""),
        ("/bin/sh", "usr/bin/sh"),
        ("/absolute", "opt/app/bin/run"),
        ("/etc/relative", "opt/app/bin/run"),
        ("/etc/too-many", "usr/bin/sh"),
        ("/chain", "opt/app/bin/run"),
        ("/folder/bin/run", "opt/app/bin/run"),
        ("/folder/../app/bin/run", "opt/app/bin/run"),
        ("/bin/../bin/sh", "usr/bin/sh"),
        ("/root/root/usr/bin/sh", "usr/bin/sh"),
        ("/../../usr/bin/sh", "usr/bin/sh"),
        ("/nowhere", None),
        ("/usr/bin/sh/x", None),
        ("/dangling", None),
        ("/host", None),
        ("/escape", None),
        ("/../outside", None),
    ],
)
def test_path_in_image(root: Path, path: str, found: str | None) -> None:
    assert driver.find_in_image(root, path, {}) == (None if found is None else root / found)


@pytest.mark.parametrize(
    "path", ["/self", "/ping", "/self/x", "/loops/self", "/loops/inner/ping", "/bin/../ping/.."]
)
def test_loops_of_links_are_nothing(root: Path, path: str) -> None:
    assert driver.find_in_image(root, path, {}) is None


@pytest.mark.parametrize("path", ["/" + "a" * 300, "/usr/" + "a" * 5000 + "/x", "/a" * 5000])
def test_paths_too_long_to_exist_are_nothing(root: Path, path: str) -> None:
    """An exception here would be one in the watcher of a task."""
    assert driver.find_in_image(root, path, {}) is None


@pytest.fixture
def mounts(tmp_path: Path) -> dict[str, str]:
    """A mount table, and what lies on the host behind it."""
    for name in ("data", "local"):
        (tmp_path / name / "folder").mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "data/to-image").symlink_to("/usr/bin/sh")
    (tmp_path / "data/to-local").symlink_to("../../local/file")
    (tmp_path / "one").touch()
    return {
        "/mnt/data": str(tmp_path / "data"),
        "/mnt/data/folder": str(tmp_path / "local"),
        "/local": str(tmp_path / "local"),
        "/usr/bin/one": str(tmp_path / "one"),
    }


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/mnt/data/file", "data/file"),
        ("/mnt/data", "data"),
        ("/mnt/data/folder/file", "local/file"),
        ("/mnt/data/folder/folder", "local/folder"),
        ("/mnt/data/folder/../file", "data/file"),
        ("/mnt/data/to-image", "image/usr/bin/sh"),
        ("/mnt/data/to-local", "local/file"),
        ("/volume/file", "data/file"),
        ("/local/../bin/one", "one"),
        ("/bin/one", "one"),
        ("/mnt/data/no", None),
        ("/mnt/database", None),
        ("/mnt/data/../../outside", None),
    ],
)
def test_path_in_a_mount(root: Path, mounts: dict[str, str], tmp_path: Path, path: str, found: str | None) -> None:
    assert driver.find_in_image(root, path, mounts) == (None if found is None else tmp_path / found)


parts = st.sampled_from(
    ["usr", "bin", "sh", "..", ".", "", "root", "escape", "host", "chain", "folder", "etc", "self"]
)


@given(st.lists(parts | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=12))
@settings(deadline=None)
def test_nothing_outside_the_image_is_found(tmp_path_factory: pytest.TempPathFactory, path: list[str]) -> None:
    root = tmp_path_factory.getbasetemp() / "jail/image"
    if not root.exists():
        (root / "usr/bin").mkdir(parents=True)
        (root / "usr/bin/sh").touch()
        (root.parent / "outside").touch()
        for name, target in {
            "bin": "usr/bin",
            "root": "/",
            "escape": "../..",
            "self": "self",
            "host": "/etc",
        }.items():
            (root / name).symlink_to(target)
    found = driver.find_in_image(root, "/".join(path), {})
    assert found is None or found.resolve().is_relative_to(root)


# -- explain_command -----------------------------------------------------------------------------------------

SEARCH = "/usr/local/bin:/usr/bin:/bin"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("/usr/bin/sh", ""),
        ("/bin/sh", ""),
        ("/absolute", ""),
        ("sh", ""),
        ("/nope", 'command: there is no "/nope" in the container'),
        ("/dangling", 'command: there is no "/dangling" in the container'),
        ("/loops/self", 'command: there is no "/loops/self" in the container'),
        ("/host", 'command: there is no "/host" in the container'),
        ("nope", f'command: there is no "nope" in the container\'s PATH ({SEARCH})'),
        ("run", f'command: there is no "run" in the container\'s PATH ({SEARCH})'),
        ("/usr/bin/data", 'command: "/usr/bin/data" in the container is not an executable file'),
        ("/usr/bin", 'command: "/usr/bin" in the container is not an executable file'),
        ("data", 'command: "data" in the container is not an executable file'),
        ("a" * 300, f'command: there is no "{"a" * 300}" in the container\'s PATH ({SEARCH})'),
    ],
)
def test_why_a_command_did_not_run(root: Path, command: str, why: str) -> None:
    assert driver.explain_command(command, SEARCH, root, {}) == why


def test_later_places_of_the_path_count(root: Path) -> None:
    (root / "usr/local/bin").mkdir(parents=True)
    (root / "usr/local/bin/sh").touch()
    assert driver.explain_command("sh", SEARCH, root, {}) == ""


def test_command_in_a_mount(root: Path, tmp_path: Path) -> None:
    tool = tmp_path / "local/tool"
    tool.parent.mkdir()
    tool.touch()
    mounts = {"/local": str(tmp_path / "local")}
    assert driver.explain_command("/local/tool", SEARCH, root, mounts) == (
        'command: "/local/tool" in the container is not an executable file'
    )
    tool.chmod(0o755)
    assert driver.explain_command("/local/tool", SEARCH, root, mounts) == ""


@pytest.mark.parametrize("command", ["./run", "bin/run", "../app/bin/run"])
def test_commands_relative_to_the_working_directory_are_not_judged(root: Path, command: str) -> None:
    """They start in `working_directory`, which is not known here: "there is no" would often be wrong."""
    assert driver.explain_command(command, SEARCH, root, {}) == ""
