# SPDX-License-Identifier: MPL-2.0
"""The example jobs are valid, and do what they say."""

from __future__ import annotations

import functools
import lzma
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

import driver
from nspawn.commands import STRICT_BLOCK
from nspawn.host import CgroupMode, Host
from nspawn.options import decode_options
from nspawn.rules import check_rules, decode_job
from tests.agent import (
    HANG,
    Allocation,
    Task,
    decode_config,
    launch_like_agent,
    parse_hcl,
    parse_job,
    plugin_config,
    to_msgpack,
)
from tests.containers import Tasks, eventually
from tests.options import CONFIG
from tests.servers import FileServer, ImageParts, Registry

ROOT = Path(__file__).resolve().parents[2]
JOBS = [
    path
    for path in sorted((ROOT / "example").rglob("*.hcl"))
    if path.name not in ("config.hcl", "hardened.hcl", "package.hcl")
]
VARIABLES = {"NOMAD_ALLOC_NAME": "unit.unit[0]", "NOMAD_SHORT_ALLOC_ID": "00000000", "node.unique.name": "host"}


def find_blocks(value: Any, name: str) -> Iterator[Any]:
    """All blocks of a name, however deep."""
    for item in value if isinstance(value, list) else ():
        yield from find_blocks(item, name)
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from item if key == name else find_blocks(item, name)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_example_is_valid(path: Path) -> None:
    """By the schema Nomad is given, and by everything the driver checks before it starts a task."""
    host = Host(systemd=252, kernel=(6, 1), cgroups=CgroupMode.V2, problems=())
    sidecars = [sidecar["config"][0] for sidecar in find_blocks(parse_hcl(path.read_text()), "sidecar_task")]
    assert bool(sidecars) == (path.name == "connect.hcl")
    for group in parse_job(path).groups:
        for block in (*(task.config for task in group.tasks), *sidecars):
            raw = decode_config(driver.render_spec(driver.TASK_OPTIONS), block, VARIABLES)
            is_in_group = group.network_mode != "host"
            packed = driver.unpack_options(to_msgpack(raw))
            options = decode_job(driver.TASK_OPTIONS, packed, CONFIG, is_in_group=is_in_group)
            if options.image.startswith("docker://"):  # such an image says it itself
                options = replace(options, command=options.command or ("/entrypoint",))
            check_rules(driver.TASK_OPTIONS, options, host)


def test_hardened_operator_is_valid() -> None:
    assert plugin_config(ROOT / "example/package.hcl", driver.FILE_NAME) == {}
    block = plugin_config(ROOT / "example/hardened.hcl", driver.FILE_NAME)
    raw = decode_config(driver.render_spec(driver.PLUGIN_OPTIONS), block or {})
    values = decode_options(driver.PLUGIN_OPTIONS, msgpack.unpackb(to_msgpack(raw)))
    assert {name: values[name] for name in ("allow", "allow_caps", "allow_paths", "volumes")} == {
        "allow": (), "allow_caps": (), "allow_paths": (), "volumes": False,
    }  # fmt: skip
    assert STRICT_BLOCK in (ROOT / "docs/security.md").read_text(), "the first block for operators there"


@pytest.fixture
def image_dir(image: Path, tmp_path: Path) -> Path:
    (tmp_path / "debian").symlink_to(image)
    return tmp_path


def run_example(
    name: str, driver_file: Path, image_dir: Path, address: Mapping[str, str] | None = None
) -> Iterator[Task]:
    """Run the tasks of an example, one after the other; `address` says what stands for addresses in it."""
    job = image_dir / "job.hcl"
    text = (ROOT / "example" / name).read_text()
    for old, new in (address or {}).items():
        assert old in text
        text = text.replace(old, new)
    job.write_text(text)
    with launch_like_agent(driver_file, f'image_dir = "{image_dir}"') as plugin, Allocation() as allocation:
        for group in parse_job(job).groups:
            for spec in group.tasks:
                task = Task(
                    plugin, allocation, spec.name, spec.config, templates=spec.templates, kill_timeout=HANG
                )
                with task:
                    task.start()
                    yield task
                    task.stop()
                    assert task.wait()


def test_units_of_the_job_run(driver_file: Path, image_dir: Path) -> None:
    for task in run_example("unit.hcl", driver_file, image_dir):
        task.logmon.wait_for("The time by")


def test_booted_batch_job_ends_with_the_code_of_its_unit(driver_file: Path, image_dir: Path) -> None:
    for task in run_example("nightly.hcl", driver_file, image_dir):
        assert task.wait().exit_code == 7
        task.logmon.wait_eof()
        assert task.logmon.stdout.decode().endswith(" programs in the image\n")


def test_tasks_with_fixed_addresses_reach_each_other(driver_file: Path, image_dir: Path) -> None:
    """Both run at once: the client asks the server by its address."""
    (group,) = parse_job(ROOT / "example/address.hcl").groups
    config = f'image_dir = "{image_dir}"'
    with launch_like_agent(driver_file, config) as plugin, Tasks(plugin, image_dir / "debian") as tasks:
        for spec in group.tasks:
            tasks.made.append(Task(plugin, Allocation(), spec.name, spec.config))
            tasks.made[-1].start()
        tasks.made[-1].logmon.wait_for("hello from 10.73.0.1\n")


def test_system_job_sees_the_host(driver_file: Path, image_dir: Path) -> None:
    for task in run_example("system.hcl", driver_file, image_dir):
        task.logmon.wait_for("log files: ")
        time.sleep(0.1)
        assert "load " in task.logmon.stdout.decode()


def test_fetched_system_runs(driver_file: Path, image_dir: Path, archive: bytes) -> None:
    with FileServer() as server:
        server.files["/debian.tar.xz"] = lzma.compress(archive, preset=0)
        for task in run_example("download.hcl", driver_file, image_dir, {"http://127.0.0.1:8000": server.url}):
            task.logmon.wait_for("\nmine\n")
            assert task.logmon.stdout.startswith(b"A root of my own\n")
            assert task.wait().exit_code == 0


def test_image_of_a_registry_runs(driver_file: Path, image_dir: Path, archive: bytes, tmp_path: Path) -> None:
    with Registry(tmp_path / "registry") as registry:
        command = ["/bin/sh", "-c", "trap exit TERM; echo I serve $SITE; while :; do sleep 0.1; done"]
        registry.push("library/nginx", ImageParts.make([archive], Env=["SITE=pages"], Cmd=command), "1.27")
        for task in run_example("docker.hcl", driver_file, image_dir, {"docker.io": registry.host}):
            task.logmon.wait_for("I serve pages")


def test_tasks_that_share_an_image_run(driver_file: Path, image_dir: Path, image: Path) -> None:
    (group,) = parse_job(ROOT / "example/shared.hcl").groups
    (spec,) = group.tasks
    with launch_like_agent(driver_file, f'image_dir = "{image_dir}"') as plugin, Tasks(plugin, image) as tasks:
        for index in range(5):
            env = {"NOMAD_ALLOC_INDEX": str(index)}
            tasks.made.append(Task(plugin, Allocation(), spec.name, spec.config, env=env))
            tasks.made[-1].start()
        for index, task in enumerate(tasks.made):
            eventually(functools.partial(is_gone, task))
            assert task.exec(["cat", "/etc/hostname"])[0] == b"%d\n" % index
    assert (image / "usr/share/doc").is_dir()


def is_gone(task: Task) -> bool:
    return not task.exec(["ls", "/usr/share/doc"])[1].successful
