# SPDX-License-Identifier: MPL-2.0
"""Image: from a job's name to a place on disk, and paths as the container sees them."""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nspawn.accounts import Account, find_account
from nspawn.bundle import render_bundle
from nspawn.common import ConfigError
from nspawn.images import (
    MAX_TEXT,
    Image,
    ImageConfig,
    Origin,
    apply_image,
    demand_signature,
    find_archive,
    find_image,
    image_places,
    plan_origin,
    read_head,
)
from nspawn.mounts import Mount
from nspawn.view import ELF_MACHINES, View, explain_command, find_interpreter, is_foreign
from tests.options import read_options


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
    return find_image(read_options(image=name, **options), task_dir, image_dir())


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
    assert find("debian") == Image(tree, is_directory=True)


def test_name_of_a_file(machines: Path) -> None:
    file = machines / "debian.raw"
    file.touch()
    for name in ("debian", "debian.raw"):
        assert find(name) == Image(file, is_directory=False)


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


def test_path_in_the_directory_of_the_allocation(machines: Path, task_dir: Path) -> None:
    tree = make_tree(task_dir.parent / "alloc/images/x")
    make_tree(task_dir.parent / "other/x")
    assert find("alloc/images/x", task_dir).path == tree
    assert "leads out" in refusal("alloc/../other/x", task_dir)


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
        task_dir / "no",
        tmp_path / "plugins/no",
        tmp_path / "empty/no",
    ]
    assert refusal("no", task_dir) == (
        f'image = "no": not found (looked for {", ".join(map(str, places))}); '
        f"give the path of an image, or the name of one in {machines}, "
        f"which `mmdebstrap --include=systemd-sysv,dbus bookworm {machines}/no` would make"
    )
    assert refusal("a/no") == (
        f'image = "a/no": not found (looked for {tmp_path}/plugins/a/no, {tmp_path}/empty/a/no); '
        f"give the path of an image, or the name of one in {machines}"
    )


def test_place_is_named_once(machines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(tmp_path / "empty/nomad-driver-nspawn")])
    assert refusal("a/no").count("empty/a/no") == 1


@pytest.mark.parametrize("name", [".", ".."])
def test_dots_are_no_names(machines: Path, name: str) -> None:
    """They would be the directory of all images, and the one it is in."""
    assert not any(place.is_relative_to(machines) for place in image_places(name, None, machines))
    assert machines / "x" in image_places("x", None, machines)


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


# -- paths in an image ---------------------------------------------------------------------------------------


def find_in(root: Path, path: str, mounts: Mapping[str, str] | None = None) -> Path | None:
    """Where a path of a container leads."""
    fd = View(root, mounts or {}).open(path)
    if fd is None:
        return None
    try:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image with links of every kind, and things around it that must not be found."""
    path = tmp_path / "image"
    for folder in ("usr/bin", "etc", "opt/app/bin"):
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
        "self": "self",
        "ping": "pong",
        "pong": "ping",
        "volume": "/mnt/data",
    }
    for name, target in links.items():
        (path / name).symlink_to(target)
    return path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("//usr/./bin//sh", "usr/bin/sh"),
        ("", ""),
        ("/bin/sh", "usr/bin/sh"),
        ("/absolute", "opt/app/bin/run"),
        ("/chain", "opt/app/bin/run"),
        ("/folder/../app/bin/run", "opt/app/bin/run"),
        ("/etc/too-many", "usr/bin/sh"),
        ("/usr/bin/sh/x", None),
        ("/dangling", None),
        ("/host", None),
        ("/escape", None),
        ("/../outside", None),
        ("/self/x", None),
        ("/ping", None),
    ],
)
def test_path_in_image(root: Path, path: str, found: str | None) -> None:
    assert find_in(root, path) == (None if found is None else root / found)


@pytest.mark.parametrize("path", ["/" + "a" * 300, "/usr/" + "a" * 5000 + "/x", "/a" * 5000])
def test_paths_too_long_to_exist_are_nothing(root: Path, path: str) -> None:
    """An exception here would be one in the watcher of a task."""
    assert find_in(root, path) is None


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
        ("/volume/file", "data/file"),
        ("/bin/one", "one"),
        ("/mnt/data/no", None),
        ("/mnt/database", None),
    ],
)
def test_path_in_a_mount(root: Path, mounts: dict[str, str], tmp_path: Path, path: str, found: str | None) -> None:
    assert find_in(root, path, mounts) == (None if found is None else tmp_path / found)


@pytest.mark.parametrize("path", ["/mnt/data/to-image", "/mnt/data/to-local", "/local/../nowhere"])
def test_path_that_leads_out_of_a_mount_is_not_judged(root: Path, mounts: dict[str, str], path: str) -> None:
    with pytest.raises(OSError):
        find_in(root, path, mounts)
    assert explain_command(path, SEARCH, View(root, mounts)) == ""


parts = st.sampled_from(
    ["usr", "bin", "sh", "..", ".", "", "root", "escape", "host", "chain", "folder", "etc", "self"]
)


@given(st.lists(parts | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=12))
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
    found = find_in(root, "/".join(path))
    assert found is None or found.resolve().is_relative_to(root)


# -- explain_command -----------------------------------------------------------------------------------------

SEARCH = "/usr/local/bin:/usr/bin:/bin"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("/usr/bin/sh", ""),
        ("/bin/sh", ""),
        ("sh", ""),
        ("/nope", 'command: there is no "/nope" in the container'),
        ("/dangling", 'command: there is no "/dangling" in the container'),
        ("nope", f'command: there is no "nope" in the container\'s PATH ({SEARCH})'),
        ("run", f'command: there is no "run" in the container\'s PATH ({SEARCH})'),
        ("/usr/bin/data", 'command: "/usr/bin/data" in the container is not an executable file'),
        ("/usr/bin", 'command: "/usr/bin" in the container is not an executable file'),
        ("data", 'command: "data" in the container is not an executable file'),
        ("a" * 300, f'command: there is no "{"a" * 200}…" in the container\'s PATH ({SEARCH})'),
    ],
)
def test_why_a_command_did_not_run(root: Path, command: str, why: str) -> None:
    assert explain_command(command, SEARCH, View(root)) == why


def test_later_places_of_the_path_count(root: Path) -> None:
    (root / "usr/local/bin").mkdir(parents=True)
    (root / "usr/local/bin/sh").touch()
    assert explain_command("sh", SEARCH, View(root)) == ""


def test_command_in_a_mount(root: Path, tmp_path: Path) -> None:
    tool = tmp_path / "local/tool"
    tool.parent.mkdir()
    tool.touch()
    mounts = {"/local": str(tmp_path / "local")}
    assert explain_command("/local/tool", SEARCH, View(root, mounts)) == (
        'command: "/local/tool" in the container is not an executable file'
    )
    tool.chmod(0o755)
    assert explain_command("/local/tool", SEARCH, View(root, mounts)) == ""


@pytest.mark.parametrize(("command", "is_there"), [("./sh", True), ("bin/sh", False), ("../bin/sh", True)])
def test_commands_relative_to_the_working_directory(root: Path, command: str, is_there: bool) -> None:
    why = explain_command(command, SEARCH, View(root), "/usr/bin")
    assert why == ("" if is_there else f'command: there is no "{command}" in the container')


def test_command_in_the_working_directory_itself(root: Path) -> None:
    assert explain_command("sh", ":/nowhere", View(root), "/usr/bin") == ""
    assert explain_command("sh", ":/nowhere", View(root), "/usr") != ""


@pytest.mark.parametrize("command", ["/run/tool", "/to-run", "../run/tool"])
def test_command_that_only_the_running_container_has_is_not_judged(root: Path, command: str) -> None:
    (root / "to-run").symlink_to("/run/tool")
    assert explain_command(command, SEARCH, View(root, {"/run": ""})) == ""
    assert explain_command("/nope", SEARCH, View(root, {"/run": ""})) != ""


def test_mounts_behind_links_are_not_judged(root: Path, tmp_path: Path) -> None:
    """/bin is a link: what is mounted on /bin/tool is at /usr/bin/tool, too."""
    assert explain_command("/usr/bin/tool", SEARCH, View(root, {"/bin/tool": str(tmp_path)})) == ""


def test_nspawn_makes_bin(root: Path) -> None:
    (root / "bin").unlink()
    assert explain_command("/bin/sh", SEARCH, View(root)) == ""
    (root / "bin").mkdir()
    assert explain_command("/bin/sh", SEARCH, View(root)) != ""


def elf(interpreter: bytes) -> bytes:
    """The start of a program of this machine."""
    machine = ELF_MACHINES[os.uname().machine][0]
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    segments = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, 0, 0)
    segments += struct.pack("<IIQQQQQQ", 3, 4, 176, 0, 0, len(interpreter) + 1, 0, 1)
    return header + segments + interpreter + b"\0"


@pytest.mark.parametrize(
    ("data", "missing"),
    [
        (b"#!/usr/bin/sh\n", ""),
        (b"#! \t/bin/sh -eu\n", ""),
        (b"#!/usr/bin/nope\n", "/usr/bin/nope"),
        (b"#!/nope", "/nope"),
        (b"#!\n", ""),
        (b"#!", ""),
        (b"echo hello\n", ""),
        (elf(b"/usr/bin/sh"), ""),
        (elf(b"/lib64/ld-nope.so.2"), "/lib64/ld-nope.so.2"),
        (elf(b"/nope")[:70], ""),
        (elf(b"/nope")[:178], ""),
        (b"\x7fELF", ""),
    ],
)
def test_missing_interpreters(root: Path, data: bytes, missing: str) -> None:
    tool = root / "usr/bin/tool"
    tool.write_bytes(data)
    tool.chmod(0o755)
    why = f'command: "tool" in the container needs the interpreter {missing}, which is not there'
    assert explain_command("tool", SEARCH, View(root)) == (why if missing else "")


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda data: elf(b"/x")[:64] + data))
def test_any_program_can_be_looked_at(data: bytes) -> None:
    assert isinstance(find_interpreter(data), str)


# -- where images are fetched from ---------------------------------------------------------------------------


def plan(machines: Path, image: str, auth: dict[str, str] | None = None, /, **block: Any) -> Origin | None:
    return plan_origin(read_options(image=image, image_download=block or None, auth=auth), machines)


def test_origin_of_a_url(machines: Path) -> None:
    origin = plan(machines, "x", url="http://u:p@h/x.tar?token=secret", checksum="a" * 64)
    assert origin and (origin.type, origin.name, origin.verify) == ("tar", "http://h/x.tar", "no")
    assert "secret" in origin.address and not origin.refresh


def test_an_image_that_is_here_is_not_fetched(machines: Path) -> None:
    make_tree(machines / "x")
    assert plan(machines, "x", url="http://h/x") is None
    assert plan(machines, "x", url="http://h/x", force=True) is not None
    assert plan(machines, "y", url="http://h/x") is not None
    assert plan(machines, "y") is None


def test_demand_for_a_signature(tmp_path: Path) -> None:
    """The longest name that fits counts, however the job spells the registry."""
    keys = {}
    for name, rule in (("any", "*"), ("hub", "docker.io"), ("team", "ghcr.io/team"), ("app", "ghcr.io/team/app")):
        (tmp_path / name).write_text(name)
        keys[rule] = str(tmp_path / name)

    def demand(address: str, keys: Mapping[str, str] = keys, type: str = "docker") -> str:
        return demand_signature(Origin(type, address, address), keys).signer

    for address in (
        "ghcr.io/team/x",
        "GHCR.io/team/x",
        "ghcr.io./team/x",
        "ghcr.io:443/team/x",
        "ghcr.io:0443/team/x",
    ):
        assert demand(address) == "team", address
    for address in (
        "x",
        "docker.io/x",
        "index.docker.io/a/x",
        "registry-1.docker.io/library/x",
        "Docker.io/library/x",
    ):
        assert demand(address) == "hub", address
    assert demand("ghcr.io/team/app:1") == demand(f"ghcr.io/team/app/x@sha256:{'0' * 64}") == "app"
    assert demand("ghcr.io/teams/app") == demand("ghcr.io:5000/team/app") == "any"
    assert demand("ghcr.io/x", {"docker.io": "/nothing"}) == demand("x", keys, "tar") == ""
    unsigned, signed = Origin("docker", "x", "x"), Origin("docker", "x", "x", signer="key")
    assert unsigned.key != signed.key


@pytest.mark.parametrize(
    ("reference", "refresh"),
    [("debian", True), ("debian:latest", True), ("h:5000/debian", True), ("debian:12", False),
     ("h:5000/debian:12", False), ("debian@sha256:" + "a" * 64, False)],
)  # fmt: skip
def test_latest(machines: Path, reference: str, refresh: bool) -> None:
    for origin in (
        plan(machines, f"docker://{reference}"),
        plan(machines, "x", type="docker", url=reference),
    ):
        assert origin and (origin.type, origin.address, origin.refresh) == ("docker", reference, refresh)


def test_keys_tell_images_apart(machines: Path) -> None:
    origins = [
        plan(machines, "x", url="http://h/x"),
        plan(machines, "x", url="http://h/y"),
        plan(machines, "x", url="http://h/x", type="raw"),
        plan(machines, "x", url="http://h/x", verify="checksum"),
        plan(machines, "x", url="http://h/x", checksum="a" * 64),
        plan(machines, "x", {"username": "a", "password": "b"}, url="http://h/x"),
        plan(machines, "x", {"username": "a", "password": "c"}, url="http://h/x"),
    ]
    keys = [origin.key for origin in origins if origin]
    assert len(set(keys)) == len(origins)
    again = plan(machines, "other name", url="http://h/x", force=True)
    assert again and again.key == keys[0]


@pytest.mark.parametrize(
    ("image", "block", "words"),
    [
        ("docker://x", {"url": "http://h/x"}, "a second time"),
        ("http://h/x", {}, "give other addresses in image_download"),
        ("x", {"url": "http://h/x", "type": "docker"}, "HOST/NAME:TAG"),
        ("x", {"url": "h/x"}, "must be an http(s) address"),
        ("x", {"url": "h/x", "type": "docker", "checksum": "a" * 64}, "name the image by its digest"),
        ("x", {"url": "http://h/x", "platform": "linux/arm64"}, "has no meaning"),
    ],
)
def test_contradictions(machines: Path, image: str, block: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        plan(machines, image, None, **block)


def test_what_the_image_says_counts_where_the_job_says_nothing(machines: Path) -> None:
    config = ImageConfig(("A=1", "B=2"), ("/entry",), ("cmd",), "www", "/srv", "SIGQUIT")
    image = Image(machines, True, key="k", config=config)
    unset = read_options(boot=False, environment={"B": "job"})
    found = apply_image(unset, image, "")
    assert found.command == ("/entry", "cmd") and found.environment == {"A": "1", "B": "job"}
    assert (found.user, found.working_directory, found.ephemeral) == ("www", "/srv", True)
    said = replace(unset, command=("/mine",), working_directory="/x", user="me")
    found = apply_image(said, image, "task")
    assert (found.command, found.working_directory, found.user) == (("/mine",), "/x", "me")
    assert apply_image(unset, image, "task").user == "task"
    booted = apply_image(replace(unset, boot=True), image, "")
    assert booted.command == () and booted.environment == {"B": "job"}
    volatile = apply_image(replace(unset, volatile="state"), image, "")
    assert not volatile.ephemeral and volatile.private_users_ownership == "map"


@pytest.mark.parametrize(
    ("user", "found"),
    [
        ("www", ("www", 33, 34, (50,), "/srv")), ("33", ("www", 33, 34, (50,), "/srv")),
        ("www:staff", ("www", 33, 50, (), "/srv")), ("33:7", ("www", 33, 7, (), "/srv")),
        ("1000", ("1000", 1000, 0, (), "/")), ("1000:staff", ("1000", 1000, 50, (), "/")),
        ("root", ("root", 0, 0, (), "/root")), ("0:root", ("root", 0, 0, (), "/root")),
        (":0", ("root", 0, 0, (), "/root")),
        (":staff", ("root", 0, 50, (), "/root")), ("ü", ("ü", 11, 12, (), "/")), ("13", ("13", 13, 14, (), "/")),
        ("bad", "no such user"), ("www:unknown", "no group unknown"), ("x", "no such user"),
        ("-x", "must be the name"), ("a b", "must be the name"), ("99999999999", "up to 999999999"),
        ("65535", "without 65535"), ("33:65535", "without 65535"), ("last", "no such user"),
    ],
)  # fmt: skip
def test_account(tmp_path: Path, user: str, found: tuple[object, ...] | str) -> None:
    """Files are looked for in the layers from the top."""
    for name, file, text in (
        ("low", "passwd", "root:x:0:0::/:\n"),
        ("low", "group", "root:x:0:\nwww:x:34:\nstaff:x:50:www\nbad:x:y:www\n"),
        (
            "top",
            "passwd",
            "root:x:0:0::/:\nbad:x:-1:0::/:\nbad:x:1\nwww:x:33:34::/srv:\nx\x0bwww:x:0:0::/:\n"
            "ü:x:11:12::no/path:\n$( ):x:13:14::/a\0b:\nlast:x:65535:0::/:",
        ),
    ):
        (tmp_path / name / "etc").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "etc" / file).write_text(text)
    image = Image(tmp_path / "top", True, (tmp_path / "top", tmp_path / "low"), key="k")
    options = replace(read_options(boot=False), user=user)
    if isinstance(found, str):
        with pytest.raises(ConfigError, match=found):
            find_account(image, options)
    else:
        assert find_account(image, options) == Account(*found)  # type: ignore[arg-type]
    assert find_account(image, replace(options, boot=True)) is None


@pytest.mark.parametrize(
    "more",
    [
        {"bind": {"/a": "/etc/passwd"}}, {"bind_read_only": {"/a": "/etc//group:norbind"}},
        {"bind": {"/a": "/etc/"}}, {"overlay_read_only": ["/a:/b:/etc"]}, {"bind": {"/a": "/"}},
        {"volumes": [Mount("/a", "/etc/passwd")]}, {"user": "systems"},
    ],
)  # fmt: skip
def test_user_that_only_the_container_knows(tmp_path: Path, more: dict[str, Any]) -> None:
    """It is left to nspawn. A job can mount files of its own over an image's, and systemd knows further users."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("www:x:33:34::/srv:\n")
    job: dict[str, Any] = {"user": "www", "boot": False, "bind": {"/a": "/etc/passwd/x"}}
    assert find_account(Image(tmp_path, True), read_options(**job)) == Account("www", 33, 34, (), "/srv")
    volumes = more.pop("volumes", [])
    assert find_account(Image(tmp_path, True), read_options(**{**job, **more}), volumes) is None
    assert find_account(Image(tmp_path, False), read_options(**job)) is None


LINES = st.text(st.sampled_from("root:x0123456789\n\r\0\x0b\x85,/-+ é\u2028"), max_size=60) | st.text(max_size=30)


@given(LINES, LINES, st.text(st.sampled_from("root:0123456789x²٣ \n"), max_size=12) | LINES)
def test_any_passwd_and_user(passwd: str, group: str, user: str) -> None:
    """There is a user with numbers that nspawn takes, or a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "etc").mkdir()
        for name, text in (("passwd", passwd), ("group", group)):
            (Path(folder) / "etc" / name).write_bytes(text.encode(errors="surrogatepass"))
        options = replace(read_options(boot=False), user=user)
        try:
            found = find_account(Image(Path(folder), True, key="k"), options)
        except ConfigError as error:
            assert error.option == "user"
            return
    assert found is not None or not user
    if found:
        assert all(0 <= number < 10**9 and number != 65535 for number in (found.uid, found.gid, *found.groups))
        render_bundle({}, found)
        assert found.uid or user.partition(":")[0].strip("0") in ("", "root") or ":0:" in passwd or ":00" in passwd


def test_end_of_a_long_passwd_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    line = f"{'x' * (MAX_TEXT - len('www:x:33:3'))}\n"
    (tmp_path / "etc/passwd").write_text(f"{line[1:]}www:x:33:34::/srv:\n")
    assert find_account(Image(tmp_path, True), read_options(user="www", boot=False)) is None


FOREIGN = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + (22).to_bytes(2, "little")  # s390


def test_programs_of_other_machines(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nspawn.view.BINFMT_MISC", tmp_path)
    tool = root / "usr/bin/foreign"
    tool.write_bytes(FOREIGN)
    tool.chmod(0o755)
    machine = os.uname().machine
    assert explain_command("/usr/bin/foreign", SEARCH, View(root)) == (
        f'command: "/usr/bin/foreign" in the container is for another machine than this {machine}'
    )
    (tmp_path / "qemu-s390x").touch()
    assert explain_command("/usr/bin/foreign", SEARCH, View(root)) == ""
    for data in (b"", b"#!/bin/sh\n", FOREIGN[:19], Path("/proc/self/exe").read_bytes()):
        tool.write_bytes(data)
        fd = os.open(tool, os.O_PATH)
        assert not is_foreign(fd)
        os.close(fd)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A task may put a pipe where the plugin looks: to open it would be to wait for ever, with all tasks."""
    os.mkfifo(tmp_path / "init")
    (tmp_path / "link").symlink_to("init")
    for name in ("init", "link"):
        fd = os.open(tmp_path / name, os.O_PATH | os.O_NOFOLLOW)
        assert not is_foreign(fd)
        assert find_archive(Image(tmp_path / name, is_directory=False, fd=fd)) is None
        os.close(fd)
    assert read_head(tmp_path / "missing", 1) == b""
