# SPDX-License-Identifier: MPL-2.0
"""Signatures that the operator demands: the real `cosign`, and a stand-in for what it may do wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from nspawn.common import SAFE_PATH
from tests.agent import DriverError, launch_like_agent
from tests.containers import Tasks, make_client, output
from tests.fetching import Fetcher, docker_origin, layer_name, origin_of
from tests.servers import (
    DOCKER_INDEX,
    Entry,
    ImageParts,
    Liar,
    Registry,
    basic,
    basic_auth,
    folder,
    make_tar,
    native,
)

COSIGN = shutil.which("cosign", path=SAFE_PATH)
BASE = make_tar([folder("usr"), Entry("usr/x", b"signed")])
OTHER = make_tar([folder("usr"), Entry("usr/x", b"not signed")])


class Signer:
    """A key pair of cosign's."""

    def __init__(self, directory: Path, registry: Registry) -> None:
        directory.mkdir()
        self.directory, self.registry = directory, registry
        self.run("generate-key-pair")
        self.key = (directory / "cosign.pub").read_text()

    def run(self, *arguments: str) -> str:
        assert COSIGN
        own = {"HOME": str(self.directory), "COSIGN_PASSWORD": "", "TUF_MIRROR": "http://127.0.0.1:1"}
        argv = [COSIGN, *arguments]
        environ = {**os.environ, **own}
        done = subprocess.run(
            argv, cwd=self.directory, env=environ, check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def sign(self, name: str, digest: str) -> None:
        """Without any server but the registry; cosign 3 takes one more option for that."""
        login = ["--registry-username=ci", "--registry-password=secret"]
        alone = ["--tlog-upload=false", "--use-signing-config=false"]
        known = alone if "--use-signing-config" in self.run("sign", "--help") else alone[:1]
        self.run("sign", "--key=cosign.key", "-y", *known, *login, f"{self.registry.host}/{name}@{digest}")


@pytest.mark.skipif(not COSIGN, reason="cosign is not installed: signatures are verified by a stand-in alone")
def test_signatures(fetcher: Fetcher, tmp_path: Path) -> None:
    """Of an image, of one for several platforms, and of none; in a registry that asks for a password."""
    fetcher.settings["stall"] = 60.0
    with Registry(tmp_path / "registry", basic_auth(tmp_path / "auth")) as registry:
        registry.headers = {"Authorization": basic("ci", "secret")}
        ours, theirs = (Signer(tmp_path / name, registry) for name in ("ours", "theirs"))
        signed = ImageParts.make([BASE])
        origin = docker_origin(f"{registry.host}/app", username="ci", password="secret", signer=ours.key)
        digest = registry.push("app", signed)
        assert "must be signed" in fetcher.refuse(origin)[0]
        theirs.sign("app", digest)
        assert f"cosign refuses {digest}" in fetcher.refuse(origin)[0]
        ours.sign("app", digest)
        assert fetcher.fetch(origin).layers[0] == layer_name(BASE)

        registry.push("app", ImageParts.make([OTHER]))  # the tag moves, the signature does not
        failed = fetcher.talk(fetcher.request(replace(origin, refresh=True)))[-1]
        assert "must be signed" in failed["error"]
        pinned = replace(origin, address=f"{registry.host}/app@{digest}")
        assert fetcher.fetch(pinned).layers[0] == layer_name(BASE)

        registry.push("many", signed, "one")
        platform = {"os": "linux", "architecture": native()}
        entry = {"mediaType": signed.manifest["mediaType"], "size": 1, "digest": digest, "platform": platform}
        index = {"schemaVersion": 2, "mediaType": DOCKER_INDEX, "manifests": [entry]}
        ours.sign("many", registry.push_manifest("many", "latest", index))
        fetcher.fetch(replace(origin, address=f"{registry.host}/many"))


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory for a stand-in, with the other tools that it is called by."""
    path = tmp_path / "tools"
    path.mkdir()
    for tool in ("setpriv", "prlimit", "sh", "sleep", "yes", "cat"):
        found = shutil.which(tool)
        assert found
        (path / tool).symlink_to(found)
    return path


def stand_in(tools: Path, script: str) -> None:
    """Make a `cosign` of our own."""
    (tools / "cosign").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "cosign").chmod(0o755)


@pytest.mark.parametrize(
    ("script", "words", "kind"),
    [
        ("echo no signatures found >&2; exit 10", "cosign refuses {}: no signatures found", "DriverError"),
        ("exit 1", "cosign refuses {}: it ended with 1", "TransientError"),
        ("kill -9 $$", "cosign refuses {}: it ended with -9", "TransientError"),
        ("exec sleep 1d", "cosign has not verified {} within 1 s", "TransientError"),
        ("yes >&2", "cosign refuses {}", "TransientError"),
        (None, "cosign is not installed: put it into", "HostError"),
    ],
)  # fmt: skip
def test_without_a_verdict_nothing_is_fetched(
    fetcher: Fetcher, liar: Liar, tools: Path, script: str | None, words: str, kind: str
) -> None:
    """Not even the image's configuration."""
    if script is not None:
        stand_in(tools, script)
    liar.serve(ImageParts.make([BASE]))
    fetcher.settings["stall"] = 1.0
    fetcher.environ["PATH"] = str(tools)
    text, found = fetcher.refuse(replace(origin_of(liar), signer="key"))
    assert words.partition("{}")[0] in text and words.partition("{}")[2] in text and found == kind
    assert [seen.path for seen in liar.seen] == ["/v2/x/manifests/latest"]


def test_a_mirror_with_an_unsigned_image_is_passed_over(fetcher: Fetcher, liar: Liar, tools: Path) -> None:
    """What is verified is the digest that came, and at the place it came from."""
    with Liar() as mirror:
        liar.serve(ImageParts.make([BASE]))
        mirror.serve(ImageParts.make([OTHER]))
        fetcher.mirrors = {liar.host: [mirror.host]}
        cases = f"{mirror.host}/x@*) exit 12;; {liar.host}/x@sha256:*) ;; *) exit 1;;"
        stand_in(tools, f"for place; do :; done; case $place in {cases} esac")
        fetcher.environ["PATH"] = str(tools)
        assert fetcher.fetch(replace(origin_of(liar), signer="key")).layers[0] == layer_name(BASE)


def test_task_from_a_signed_image(
    driver_file: Path, image: Path, archive: bytes, tmp_path: Path, tools: Path
) -> None:
    """An image that is in the store unverified is verified before it is used. Then the registry may go."""
    key, seen, store = tmp_path / "key.pub", tmp_path / "seen", tmp_path / "store"
    key.write_text("the key\n")
    store.mkdir()
    mounts = {store: "/var/lib/nomad-driver-nspawn", tools: "/usr/local/sbin"}
    program = make_client(driver_file, tmp_path / "client.sh", mounts)
    with Registry(tmp_path / "registry") as registry:
        for name in ("app", "ahead"):
            registry.push(f"team/{name}", ImageParts.make([archive]), tag="1")
        where = f"{registry.host}/team"
        config = {"image": f"docker://{where.replace('localhost', 'LOCALHOST')}/app:1", "read_only": None}
        with launch_like_agent(program) as plugin, Tasks(plugin, image) as tasks:
            assert output(tasks.run("echo hello", **config)[0]) == "hello\n"
        stand_in(tools, "exit 0")
        argv = [str(program), "pull", "--require-signature", f"{where}={key}", f"docker://{where}/ahead:1"]
        subprocess.run(argv, check=True, capture_output=True, timeout=60)
        block = f'require_signature = {{ "*" = "/nothing", "{where}" = "{key}" }}'
        with launch_like_agent(program, block) as plugin, Tasks(plugin, image) as tasks:
            stand_in(tools, "echo Error: no matching signatures >&2; exit 12")
            with pytest.raises(DriverError, match=r"must be signed .require_signature.*no matching signatures"):
                tasks.start("echo hello", **config)
            with pytest.raises(DriverError, match="the public key /nothing of require_signature cannot be read"):
                tasks.start("echo hello", image=f"docker://{registry.host}/other:1", read_only=None)
            stand_in(tools, f"for key; do case $key in --key=*) cat ${{key#--key=}} >{seen};; esac; done")
            assert output(tasks.run("echo hello", **config)[0]) == "hello\n"
            assert seen.read_text() == key.read_text()
            registry.close()
            stand_in(tools, "exit 12")
            for address in (config["image"], f"docker://{where}/ahead:1"):
                assert output(tasks.run("echo hello", image=address, read_only=None)[0]) == "hello\n"
            key.write_text("another key\n")
            with pytest.raises(DriverError):
                tasks.start("echo hello", **config)
