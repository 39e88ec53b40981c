# SPDX-License-Identifier: MPL-2.0
"""Files of CDI: what they may say, which one counts, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nspawn.cdi import Catalog, Edits, Hook, find_edits, read_catalog
from nspawn.common import ConfigError
from nspawn.mounts import CdiNode, Mount

KIND = "a.example/gpu"


def write(place: Path, edits: Mapping[str, Any], *names: str, common: object = None, **more: object) -> Path:
    place.parent.mkdir(exist_ok=True)
    devices = [{"name": name, "containerEdits": edits} for name in names or ("0",)]
    spec = {"cdiVersion": "0.5.0", "kind": KIND, "devices": devices, "containerEdits": common, **more}
    place.write_text(json.dumps(spec))
    return place


def catalog(tmp_path: Path) -> Catalog:
    return read_catalog([str(tmp_path / "etc"), str(tmp_path / "run")])


def find(tmp_path: Path, *names: str) -> Edits:
    return find_edits([f"{KIND}={name}" for name in names or ("0",)], catalog(tmp_path))


def refusal(tmp_path: Path, *names: str) -> str:
    with pytest.raises(ConfigError) as caught:
        find(tmp_path, *names)
    return str(caught.value)


def test_edits(tmp_path: Path) -> None:
    common = {"env": ["A=1", "B=x=y"], "additionalGids": [0, 44], "mounts": []}
    node = {"path": "/dev/n", "hostPath": "/dev/null", "permissions": "rw", "uid": 7}
    mount = {"hostPath": "/etc", "containerPath": "/e", "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"]}
    hook = {"hookName": "createContainer", "path": "/bin/sh", "args": ["sh", "-e"], "env": ["C=3"], "timeout": 5}
    edits = {"hooks": [hook], "env": ["A=2"], "deviceNodes": [node, {"path": "/dev/zero"}], "mounts": [mount]}
    write(tmp_path / "etc/a.json", edits, "0", "1", common=common)
    assert find(tmp_path, "0", "1") == Edits(
        env={"A": "2", "B": "x=y"},
        nodes=(CdiNode("/dev/null", "/dev/n", "rw", uid=7), CdiNode("/dev/zero", "/dev/zero")),
        mounts=(Mount("/etc", "/e", True, propagation="private", option="devices", is_nosuid=True),),
        groups=(44,),
        hooks=tuple(Hook("/bin/sh", ("-e",), {"C": "3"}, 5, f"{KIND}={name}") for name in "01"),
    )


def test_later_directory_counts(tmp_path: Path) -> None:
    write(tmp_path / "etc/a.json", {"env": ["FROM=etc"]}, "0", "1")
    write(tmp_path / "run/b.json", {"env": ["FROM=run"]}, "0")
    assert find(tmp_path, "0").env == {"FROM": "run"}
    assert find(tmp_path, "1").env == {"FROM": "etc"}


def test_two_files_of_one_directory_conflict(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"run/{name}.json", {}) for name in "ab")
    assert refusal(tmp_path) == (
        f'devices.host_path = "{KIND}=0": is in {first} and in {second}, and none of them counts more; '
        "remove one of the files"
    )


def test_unknown_device(tmp_path: Path) -> None:
    write(tmp_path / "etc/a.json", {}, *map(str, range(21)))
    (tmp_path / "etc/b.yaml").write_text("cdiVersion: 0.5.0")
    (tmp_path / "etc/c.json").write_text("{")
    said = refusal(tmp_path, "99")
    assert f"has this device; they have {KIND}=0, {KIND}=1, " in said
    assert f"{KIND}=19 and 1 more; {tmp_path}/etc/b.yaml is YAML, and this driver reads JSON: write it as" in said
    assert f"--output={tmp_path}/etc/b.json; {tmp_path}/etc/c.json is not a valid file of CDI: " in said


@pytest.mark.parametrize(
    ("edits", "why"),
    [
        ({"netDevices": []}, "netDevices is not supported by this driver"),
        ({"intelRdt": {}}, "intelRdt is not supported by this driver"),
        (
            {"hooks": [{"hookName": "poststop", "path": "/h"}]},
            "its hook /h is for poststop, and this driver runs those for createContainer only",
        ),
        ({"hooks": [{"hookName": "createContainer", "path": "/none"}]}, "names /none: No such file or directory"),
        ({"env": "A=1"}, "env must be a list"),
        ({"additionalGids": [True]}, "additionalGids must be numbers of groups"),
        ({"deviceNodes": [{"path": "null"}]}, 'path must be an absolute path without ".."'),
        ({"deviceNodes": [{"path": "/etc"}]}, "/etc is no device node"),
        (
            {"deviceNodes": [{"path": "/dev/null", "type": "b", "minor": 4}]},
            "/dev/null should be b 1:4, and is c 1:3 on this host; write the file anew",
        ),
        (
            {"deviceNodes": [{"path": "/dev/null", "permissions": "x"}]},
            "permissions must be letters of rwm, or none",
        ),
        (
            {"deviceNodes": [{"path": "/dev/nothing"}]},
            "names /dev/nothing: No such file or directory; write the file",
        ),
        (
            {"mounts": [{"hostPath": "/etc", "containerPath": "/e", "type": "tmpfs"}]},
            "a mount of the type tmpfs is",
        ),
        (
            {"mounts": [{"hostPath": "/etc", "containerPath": "/e", "options": ["rshared"]}]},
            "the option rshared of a mount is not supported by this driver",
        ),
    ],
)
def test_nothing_is_ignored(tmp_path: Path, edits: Mapping[str, Any], why: str) -> None:
    place = write(tmp_path / "etc/a.json", edits)
    assert refusal(tmp_path).startswith(f'devices.host_path = "{KIND}=0": {place}')
    assert why in refusal(tmp_path)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"cdiVersion": "2.0.0"}, "its cdiVersion 2.0.0 is newer than 1.1"),
        ({"cdiVersion": "1"}, "cdiVersion must be a version such as 0.6.0"),
        ({"kind": "gpu"}, "kind must be VENDOR/CLASS, as in nvidia.com/gpu"),
        ({"devices": ["0"]}, "devices must be objects"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, more: Mapping[str, Any], why: str) -> None:
    place = write(tmp_path / "etc/a.json", {}, **more)
    assert catalog(tmp_path) == Catalog((), (f"{place} is not a valid file of CDI: {why}",))
