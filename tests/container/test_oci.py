# SPDX-License-Identifier: MPL-2.0
"""nspawn/fetch.py and registries: a real one (Debian's docker-registry), and one that means harm."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import stat
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nspawn.common import DriverError
from nspawn.images import ImageConfig, Origin, Reference, read_in_image
from nspawn.registry import read_image_config
from tests.agent import HANG
from tests.fetching import Fetcher, docker_origin, layer_name, origin_of, stacked
from tests.servers import (
    DOCKER_INDEX,
    Blob,
    Entry,
    FileServer,
    ImageParts,
    Liar,
    Registry,
    TokenServer,
    basic,
    basic_auth,
    cut_off,
    folder,
    hard_link,
    link,
    make_tar,
    native,
    pack_files,
    send,
    stall,
    status,
    zstd,
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


BASE = make_tar([
    folder("usr"), Entry("usr/kept", b"base"), Entry("usr/changed", b"base"), Entry("usr/gone", b"base"),
    folder("dir"), Entry("dir/old", b"base"), folder("hidden"), Entry("hidden/old", b"base"),
    folder("whole"), Entry("whole/old", b"base"), Entry("type", b"a file"), Entry("su", b"x", mode=0o4755),
])  # fmt: skip
TOP_LAYER = make_tar([
    Entry("usr/changed", b"top"), Entry("usr/.wh.gone"), Entry("dir/new", b"top"),
    folder("hidden"), Entry("hidden/.wh..wh..opq"), Entry("hidden/new", b"top"),
    Entry(".wh.whole"), Entry(".wh.type"), folder("type"), Entry("type/inside", b"top"),
    Entry("hard", b"linked"), hard_link("dir/hard", "hard"), link("soft", "/usr/kept"),
])  # fmt: skip


# -- what is pulled ------------------------------------------------------------------------------------------


def test_layers_stack(fetcher: Fetcher, registry: Registry, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "Env": ["PATH=/usr/bin", "A=b=c", "broken"], "Entrypoint": ["/bin/entry"], "Cmd": ["-x", "a b"],
        "User": "nobody:users", "WorkingDir": "dir", "StopSignal": "SIGQUIT",
    }  # fmt: skip
    digest = registry.push("a/b", ImageParts.make([BASE, TOP_LAYER], **config))
    image = fetcher.fetch(docker_origin(f"{registry.host}/a/b"))
    assert image.digest == digest
    assert image.layers == (layer_name(TOP_LAYER), layer_name(BASE), "skeleton-1")
    assert image.config.env == ("PATH=/usr/bin", "A=b=c")
    assert (image.config.entrypoint, image.config.cmd) == (("/bin/entry",), ("-x", "a b"))
    assert (image.config.user, image.config.working_directory) == ("nobody:users", "/dir")
    assert image.config.stop_signal == "SIGQUIT"
    with stacked([fetcher.store.layer(name) for name in image.layers], tmp_path / "overlay") as tree:
        assert read_tree(tree) == {
            "usr/kept": "base", "usr/changed": "top", "dir/old": "base", "dir/new": "top", "hidden/new": "top",
            "type/inside": "top", "hard": "linked", "dir/hard": "linked", "su": "x",
        }  # fmt: skip
        assert os.readlink(tree / "soft") == "/usr/kept"
        assert stat.S_IMODE((tree / "su").stat().st_mode) == 0o4755
        assert (tree / "hard").stat().st_ino == (tree / "dir/hard").stat().st_ino
        for name in ("proc", "sys", "dev", "run", "tmp", "alloc", "local", "secrets"):
            assert (tree / name).is_dir()


def read_tree(tree: Path) -> dict[str, str]:
    return {str(path.relative_to(tree)): path.read_text() for path in tree.rglob("*")
            if path.is_file() and not path.is_symlink()}  # fmt: skip


@pytest.mark.parametrize("first", ["whiteout", "entry"])
def test_a_whiteout_is_about_the_layers_below(
    fetcher: Fetcher, registry: Registry, tmp_path: Path, first: str
) -> None:
    """In whatever order it comes with the layer's own entries of that name."""
    whiteouts = [Entry(".wh.dir"), Entry(".wh.type")]
    entries = [folder("dir"), Entry("dir/new", b"top"), Entry("type", b"new file")]
    order = whiteouts + entries if first == "whiteout" else entries + whiteouts
    registry.push(f"order/{first}", ImageParts.make([BASE, make_tar(order)]))
    image = fetcher.fetch(docker_origin(f"{registry.host}/order/{first}"))
    with stacked([fetcher.store.layer(name) for name in image.layers], tmp_path / "overlay") as tree:
        found = read_tree(tree)
    assert found["dir/new"] == "top" and "dir/old" not in found
    assert found["type"] == "new file"


def test_files_below_an_opaque_directory_are_not_read(fetcher: Fetcher, registry: Registry) -> None:
    """Users and hosts are those that the container sees."""
    lower = make_tar([folder("usr"), folder("etc"), Entry("etc/passwd", b"lower"), Entry("etc/hosts", b"lower")])
    upper = [folder("etc"), Entry("etc/.wh..wh..opq"), Entry("etc/passwd", b"upper")]
    for name, entries, expected in (
        ("opaque", upper, ("upper", "")),
        ("plain", [folder("etc"), Entry("etc/passwd", b"upper")], ("upper", "lower")),
        ("removed", [folder("etc"), Entry("etc/.wh.passwd")], ("", "lower")),
        ("replaced", [Entry("etc", b"a file")], ("", "")),
        ("other", [folder("srv")], ("lower", "lower")),
    ):
        registry.push(f"files/{name}", ImageParts.make([lower, make_tar(entries)]))
        image = fetcher.store.find(fetcher.fetch(docker_origin(f"{registry.host}/files/{name}")))
        assert tuple(read_in_image(image, f"/etc/{file}") for file in ("passwd", "hosts")) == expected, name


def test_oci_media_types_and_zstd(fetcher: Fetcher, registry: Registry) -> None:
    layer = "application/vnd.oci.image.layer.v1.tar"
    blobs = [Blob(BASE, layer), Blob(zstd(TOP_LAYER), f"{layer}+zstd")]
    image = ImageParts.of_blobs(blobs, [BASE, TOP_LAYER])
    image.manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
    image.manifest["config"]["mediaType"] = "application/vnd.oci.image.config.v1+json"
    registry.push("oci", image)
    assert len(fetcher.fetch(docker_origin(f"{registry.host}/oci")).layers) == 3


def test_layers_are_shared(fetcher: Fetcher, registry: Registry) -> None:
    registry.push("one", ImageParts.make([BASE]))
    registry.push("two", ImageParts.make([BASE, TOP_LAYER]))
    fetcher.fetch(docker_origin(f"{registry.host}/one"))
    layer = fetcher.store.layer(layer_name(BASE))
    before = layer.stat().st_ctime_ns
    fetcher.fetch(docker_origin(f"{registry.host}/two"))
    assert layer.stat().st_ctime_ns == before
    assert len(list(fetcher.store.layers.iterdir())) == 3


def test_a_layer_that_is_there_twice(fetcher: Fetcher, registry: Registry, tmp_path: Path) -> None:
    """As in images that several empty steps have made: overlayfs refuses to stack a directory twice."""
    registry.push("twice", ImageParts.make([BASE, TOP_LAYER, BASE]))
    image = fetcher.fetch(docker_origin(f"{registry.host}/twice"))
    with stacked([fetcher.store.layer(name) for name in image.layers], tmp_path / "overlay") as tree:
        found = read_tree(tree)
    assert found["usr/changed"] == found["usr/gone"] == "base" and found["dir/new"] == "top"


def test_tags_and_digests(fetcher: Fetcher, registry: Registry) -> None:
    first = registry.push("tags", ImageParts.make([BASE]), "v1")
    registry.push("tags", ImageParts.make([TOP_LAYER]), "v2")
    by_digest = fetcher.fetch(docker_origin(f"{registry.host}/tags@{first}"))
    assert by_digest.layers[0] == layer_name(BASE)
    both = fetcher.fetch(docker_origin(f"{registry.host}/tags:v2@{first}"))
    assert both.layers == by_digest.layers
    text, kind = Fetcher(fetcher.store.root / "other").refuse(docker_origin(f"{registry.host}/tags:v3"))
    assert f"{registry.host}/tags:v3 is not there (HTTP 404)" in text
    assert kind == "DriverError"


def push_index(registry: Registry, name: str, images: Mapping[str, ImageParts]) -> None:
    manifests = []
    for platform, image in images.items():
        system, architecture, *variant = platform.split("/")
        digest = registry.push(name, image, platform.replace("/", "-"))
        data = json.dumps(image.manifest).encode()
        about = {"os": system, "architecture": architecture, **({"variant": variant[0]} if variant else {})}
        kind = image.manifest["mediaType"]
        manifests.append({"mediaType": kind, "size": len(data), "digest": digest, "platform": about})
    registry.push_manifest(name, "latest", {"schemaVersion": 2, "mediaType": DOCKER_INDEX, "manifests": manifests})


def test_platform(fetcher: Fetcher, registry: Registry) -> None:
    tars = {f"linux/{native()}": BASE, "linux/mips/v2": TOP_LAYER, "linux/s390x": make_tar([folder("s390x")])}
    images = {name: ImageParts.make([tar], name.split("/")[1]) for name, tar in tars.items()}
    push_index(registry, "index", images)
    place = f"{registry.host}/index"
    for platform in ("", *tars):
        image = fetcher.fetch(docker_origin(place, platform=platform))
        tar = tars[platform or f"linux/{native()}"]
        assert image.layers[0] == layer_name(tar)
    text, kind = Fetcher(fetcher.store.root / "x").refuse(docker_origin(place, platform="linux/riscv64"))
    assert f"is there for linux/{native()}, linux/mips/v2, linux/s390x, not for linux/riscv64" in text
    assert kind == "DriverError"


def test_wrong_architecture(fetcher: Fetcher, registry: Registry) -> None:
    registry.push("foreign", ImageParts.make([BASE], "mips"))
    text, _ = fetcher.refuse(docker_origin(f"{registry.host}/foreign"))
    assert f"is there for linux/mips, not for linux/{native()}" in text


# -- several layers at once ----------------------------------------------------------------------------------


def make_layers(count: int) -> ImageParts:
    return ImageParts.make([make_tar([folder("usr"), Entry(f"usr/{number}", b"x")]) for number in range(count)])


def test_four_layers_at_once(fetcher: Fetcher, liar: Liar) -> None:
    """Here each waits until four are asked for. They are stacked in the image's order, whichever comes first."""
    image = make_layers(8)
    liar.serve(image)
    meeting, under_way, most = threading.Barrier(4), [0], [0]

    def answer(request: Any) -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        meeting.wait(HANG)
        under_way[0] -= 1
        liar.send_file(request, liar.files[request.path])

    liar.answers |= {f"/v2/x/blobs/{layer.digest}": answer for layer in image.layers}
    found = fetcher.fetch(origin_of(liar))
    names = [f"layer-{name.partition(':')[2]}" for name in image.config["rootfs"]["diff_ids"]]
    assert found.layers == (*reversed(names), "skeleton-1")
    assert most == [4]
    assert not list(fetcher.store.parts.iterdir())


@pytest.mark.parametrize("silent_from", [0, 10])
def test_a_layer_that_fails_ends_the_others(fetcher: Fetcher, liar: Liar, silent_from: int) -> None:
    """Two that never come would else be waited for: here ten minutes."""
    image = make_layers(4)
    liar.serve(image)
    fetcher.settings["stall"] = 600.0
    asked = threading.Barrier(3)

    def be_silent(request: Any) -> None:
        asked.wait(HANG)
        silence = stall(liar.files[request.path], silent_from)
        silence(request) if silent_from else request.connection.recv(1)

    def fail(request: Any) -> None:
        asked.wait(HANG)
        send(request, 404)

    places = [f"/v2/x/blobs/{layer.digest}" for layer in image.layers]
    liar.answers |= {places[0]: be_silent, places[1]: be_silent, places[3]: fail}
    text, kind = fetcher.refuse(origin_of(liar))
    assert "is not there (HTTP 404)" in text and kind == "DriverError"


# -- latest, force -------------------------------------------------------------------------------------------


def test_latest_is_asked_for_again(fetcher: Fetcher, registry: Registry) -> None:
    registry.push("moving", ImageParts.make([BASE]))
    origin = docker_origin(f"{registry.host}/moving", refresh=True)
    first = fetcher.fetch(origin)
    registry.push("moving", ImageParts.make([TOP_LAYER]))
    second = fetcher.fetch(origin)
    assert second.layers[0] == layer_name(TOP_LAYER) != first.layers[0]
    third = fetcher.fetch(origin)
    assert third.layers == second.layers and third.fetched_at == second.fetched_at
    assert third.checked_at > second.checked_at


def test_without_network_what_is_here_is_used(fetcher: Fetcher, tmp_path: Path) -> None:
    with Registry(tmp_path / "registry") as registry:
        registry.push("here", ImageParts.make([BASE]))
        origin = docker_origin(f"{registry.host}/here", refresh=True)
        fetcher.fetch(origin)
    messages = fetcher.talk(fetcher.request(origin))
    assert "is used" in messages[0]["note"] and "cannot be reached" in messages[0]["note"]
    assert "image" in messages[-1]
    forced = fetcher.talk({**fetcher.request(origin), "force": True})
    assert forced[-1]["kind"] == "TransientError"
    fixed = fetcher.talk({**fetcher.request(origin), "refresh": False})
    assert len(fixed) == 1 and "image" in fixed[0]


# -- access --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    path = tmp_path_factory.mktemp("private")
    with Registry(path, basic_auth(path)) as running:
        running.headers = {"Authorization": basic("ci", "secret")}
        running.push("private", ImageParts.make([BASE]))
        yield running


def test_basic_auth(fetcher: Fetcher, private: Registry) -> None:
    place = f"{private.host}/private"
    text, kind = fetcher.refuse(docker_origin(place))
    assert "needs credentials; give them in auth" in text
    assert kind == "DriverError"
    text, kind = fetcher.refuse(docker_origin(place, username="ci", password="wrong"))
    assert "is denied (HTTP 401)" in text and "wrong" not in text
    assert kind == "DriverError"
    fetcher.fetch(docker_origin(place, username="ci", password="secret"))


def encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_operators_credentials(fetcher: Fetcher, private: Registry, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    fetcher.settings["auth_config"] = str(config)
    origin = docker_origin(f"{private.host}/private")
    assert "cannot be read" in fetcher.refuse(origin)[0]
    config.write_text(json.dumps({"auths": {"other:1": {"auth": encode("ci:secret")}}}))
    assert "needs credentials" in fetcher.refuse(origin)[0]
    config.write_text(json.dumps({"auths": {private.host: {"auth": "c2VjcmV0/"}}}))
    assert (
        f"the auth of {private.host} in the file of registry credentials is damaged" in fetcher.refuse(origin)[0]
    )
    config.write_text(json.dumps({"auths": {private.host: {"auth": encode("ci:secret")}}}))
    fetcher.fetch(origin)


def test_jobs_credentials_come_first(fetcher: Fetcher, private: Registry, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auths": {private.host: {"auth": encode("ci:wrong")}}}))
    fetcher.settings["auth_config"] = str(config)
    assert "is denied" in fetcher.refuse(docker_origin(f"{private.host}/private"))[0]
    fetcher.fetch(docker_origin(f"{private.host}/private", username="ci", password="secret"))


@pytest.mark.parametrize("way", ["helper", "credHelpers", "credsStore"])
def test_credential_helper(fetcher: Fetcher, private: Registry, tmp_path: Path, way: str) -> None:
    helper = Path("/usr/local/bin/docker-credential-nspawn-test")
    config = tmp_path / "config.json"
    settings: dict[str, Any] = {
        "helper": {}, "credHelpers": {private.host: "nspawn-test"}, "credsStore": "nspawn-test",
    }  # fmt: skip
    config.write_text(json.dumps({way: settings[way]}))
    fetcher.settings |= {"auth_config": str(config), "auth_helper": "nspawn-test" if way == "helper" else ""}
    origin = docker_origin(f"{private.host}/private")
    assert "docker-credential-nspawn-test is not in /usr/local/sbin" in fetcher.refuse(origin)[0]
    answer = json.dumps({"ServerURL": private.host, "Username": "ci", "Secret": "secret"})
    try:
        helper.write_text(f"#!/bin/sh\nread -r host\n[ $host = {private.host} ] && echo '{answer}'\n")
        helper.chmod(0o755)
        fetcher.fetch(origin)
        helper.write_text("#!/bin/sh\necho nonsense\n")
        messages = fetcher.talk({**fetcher.request(origin), "force": True})
        assert "gives no usable answer" in messages[-1]["error"]
    finally:
        helper.unlink()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    server = TokenServer(tmp_path_factory.mktemp("tokens"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def tokened(tmp_path_factory: pytest.TempPathFactory, tokens: TokenServer) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("tokened"), tokens.auth) as running:
        running.headers = {"Authorization": f"Bearer {tokens.make('team/app', ['pull', 'push'])}"}
        running.push("team/app", ImageParts.make([BASE, TOP_LAYER]))
        yield running


def test_token_auth(fetcher: Fetcher, tokened: Registry, tokens: TokenServer) -> None:
    place = f"{tokened.host}/team/app"
    text, kind = fetcher.refuse(docker_origin(place))
    assert "is denied (HTTP 401)" in text
    assert kind == "DriverError"
    tokens.given = 0
    fetcher.fetch(docker_origin(place, username="ci", password="secret"))
    assert tokens.given == 1


@pytest.mark.parametrize("where", ["config", "helper"])
def test_identity_token(fetcher: Fetcher, liar: Liar, tmp_path: Path, where: str) -> None:
    """What some registries have in place of a password."""
    liar.serve(ImageParts.make([BASE]))
    forms: list[dict[str, list[str]]] = []

    def give(request: Any) -> None:
        form = request.rfile.read(int(request.headers["Content-Length"])).decode()
        forms.append(urllib.parse.parse_qs(form))
        right = request.command == "POST" and forms[-1].get("refresh_token") == ["identity"]
        send(request, 200 if right else 401, b'{"access_token": "given"}')

    def manifest(request: Any) -> None:
        if request.headers.get("Authorization") == "Bearer given":
            liar.send_file(request, liar.files["/v2/x/manifests/latest"])
        else:
            realm = f'Bearer realm="{liar.url}/token",service="x",scope="repository:x:pull"'
            send(request, 401, b"", {"WWW-Authenticate": realm})

    liar.answers |= {"/token": give, "/v2/x/manifests/latest": manifest}
    config, helper = tmp_path / "config.json", Path("/usr/local/bin/docker-credential-nspawn-identity")
    answer = json.dumps({"ServerURL": liar.host, "Username": "<token>", "Secret": "identity"})
    known = {"auths": {liar.host: {"identitytoken": "identity"}}} if where == "config" else {}
    config.write_text(json.dumps(known or {"credsStore": "nspawn-identity"}))
    fetcher.settings["auth_config"] = str(config)
    try:
        helper.write_text(f"#!/bin/sh\necho '{answer}'\n")
        helper.chmod(0o755)
        fetcher.fetch(origin_of(liar))
    finally:
        helper.unlink()
    assert [form["grant_type"] for form in forms] == [["refresh_token"]]
    assert forms[0]["scope"] == ["repository:x:pull"]


def test_a_token_that_runs_out(fetcher: Fetcher, liar: Liar) -> None:
    """Each is good for one request here."""
    image = ImageParts.make([BASE, TOP_LAYER])
    liar.serve(image)
    spent: set[str] = set()

    def guard(path: str) -> Any:
        def answer(request: Any) -> None:
            token = request.headers.get("Authorization", "")
            if token and token not in spent:
                spent.add(token)
                liar.send_file(request, liar.files[path])
            else:
                realm = f'Bearer realm="{liar.url}/token",service="x",scope="repository:x:pull"'
                send(request, 401, b"", {"WWW-Authenticate": realm})

        return answer

    liar.answers |= {path: guard(path) for path in liar.files}
    liar.answers["/token"] = lambda request: send(request, 200, json.dumps({"token": f"t{len(spent)}"}).encode())
    fetcher.fetch(origin_of(liar))
    assert len(spent) == 4


def test_tls(fetcher: Fetcher, tmp_path: Path) -> None:
    with Registry(tmp_path / "registry", tls=True) as registry:
        registry.push("secure", ImageParts.make([BASE]))
        origin = docker_origin(f"{registry.host}/secure")
        text, kind = fetcher.refuse(origin)
        assert "the certificate of https://localhost" in text and "is not trusted" in text
        assert kind == "DriverError"
        fetcher.environ["SSL_CERT_FILE"] = str(registry.certificate)
        fetcher.fetch(origin)


def test_certificates_of_single_registries(fetcher: Fetcher, tmp_path: Path) -> None:
    """Where docker looks for them."""
    with Registry(tmp_path / "registry", tls=True) as registry:
        registry.push("secure", ImageParts.make([BASE]))
        folder = Path("/etc/docker/certs.d", registry.host)
        folder.mkdir(parents=True)
        try:
            (folder / "ca.crt").write_bytes(registry.certificate.read_bytes())
            fetcher.fetch(docker_origin(f"{registry.host}/secure"))
        finally:
            subprocess.run(["rm", "-r", str(folder)], check=True)


def test_plain_http_is_for_this_machine_and_the_operators_list(fetcher: Fetcher) -> None:
    """Here an address of this machine where nobody listens."""
    address = f"192.0.2.{os.getpid() % 200 + 20}"
    with FileServer() as server:
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
        try:
            listener = f"{address}:{server.port}"
            text, kind = fetcher.refuse(docker_origin(f"{listener}/x"))
            assert f"https://{listener}" in text
            assert kind == "TransientError"
            fetcher.insecure = [listener]
            assert f"http://{listener}" in fetcher.refuse(docker_origin(f"{listener}/x"))[0]
        finally:
            subprocess.run(["ip", "address", "del", f"{address}/32", "dev", "lo"], check=True)


# -- mirrors -------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror() -> Iterator[Liar]:
    with Liar() as running:
        yield running


def mirrored(fetcher: Fetcher, liar: Liar, *mirrors: str) -> Origin:
    """An image of a registry that has mirrors."""
    fetcher.mirrors = {liar.host: list(mirrors)}
    return origin_of(liar)


def test_a_mirror_is_asked_first(fetcher: Fetcher, liar: Liar, mirror: Liar) -> None:
    """And the registry not at all. It gets credentials of its own, and neither the job's nor the registry's."""
    image = ImageParts.make([BASE])
    liar.serve(image)
    mirror.serve(image, "cache/hub/x")
    for path, data in list(mirror.files.items()):
        mirror.answers[path] = needs_authorization(mirror, data, basic("for", "the mirror"))
    config = fetcher.store.root.with_name("config.json")
    auths = {mirror.host: {"auth": encode("for:the mirror")}, liar.host: {"auth": encode("for:the registry")}}
    config.write_text(json.dumps({"auths": auths}))
    fetcher.settings["auth_config"] = str(config)
    origin = replace(mirrored(fetcher, liar, f"{mirror.host}/cache/hub"), username="job", password="secret")
    assert fetcher.fetch(origin).layers[0] == layer_name(BASE)
    assert not liar.seen
    assert {seen.headers.get("Authorization", "") for seen in mirror.seen} == {"", basic("for", "the mirror")}
    assert {seen.path.partition("?")[2] for seen in mirror.seen} == {f"ns={liar.host.replace(':', '%3A')}"}


def needs_authorization(server: Liar, data: bytes, wanted: str) -> Any:
    def answer(request: Any) -> None:
        if request.headers.get("Authorization") == wanted:
            server.send_file(request, data)
        else:
            send(request, 401, b"", {"WWW-Authenticate": 'Basic realm="x"'})

    return answer


def trickle(request: Any) -> None:
    """A byte now and then, for as long as somebody listens."""
    request.send_response(200)
    request.send_header("Content-Length", "100")
    request.end_headers()
    for _ in range(100):
        request.wfile.write(b" ")
        time.sleep(0.2)


def trickle_headers(request: Any) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
    for _ in range(100):
        request.wfile.write(b"x")
        time.sleep(0.2)


# What a mirror can do wrong, and what the event says then.
MANIFEST, LAYER = "/v2/x/manifests/latest", "layer"
FAULTS: dict[str, tuple[str, Any, str]] = {
    "absent": (MANIFEST, status(404), "is not there (HTTP 404)"),
    "closed": (MANIFEST, status(401), "needs credentials"),
    "broken": (MANIFEST, status(502), "the server answers HTTP 502"),
    "silent": (MANIFEST, stall(bytes(9), 5), "has stalled"),
    "slow": (MANIFEST, trickle, "has stalled"),
    "slow from the start": (MANIFEST, trickle_headers, "has stalled"),
    "garbage": (MANIFEST, lambda request: send(request, 200, b"<html>"), "not the JSON it should be"),
    "other manifest": (
        MANIFEST,
        lambda request: send(request, 200, b"{}", {"Docker-Content-Digest": "sha256:" + "0" * 64}),
        "a manifest of another digest",
    ),
    "layer absent": (LAYER, status(404), "is not there (HTTP 404)"),
    "layer silent": (LAYER, stall(BASE[:100], 10), "has stalled"),
    "layer slow": (LAYER, trickle, "has stalled"),
    "layer slow from the start": (LAYER, trickle_headers, "has stalled"),
    "layer cut off": (LAYER, cut_off(bytes(50), 20), "broke off"),
    "layer wrong": (LAYER, lambda request: send(request, 200, b"x"), "another digest or size"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mirror_with_a_fault_is_passed_over(fetcher: Fetcher, liar: Liar, mirror: Liar, fault: str) -> None:
    """One event says why. Nothing of what it has sent spoils what the registry sends."""
    image = ImageParts.make([TOP_LAYER, BASE])
    for server in (liar, mirror):
        server.serve(image)
    place, answer, words = FAULTS[fault]
    mirror.answers[f"/v2/x/blobs/{image.layers[1].digest}" if place == LAYER else place] = answer
    fetcher.settings["stall"] = 1.0
    origin = mirrored(fetcher, liar, mirror.host)
    messages = fetcher.talk(fetcher.request(origin))
    assert "image" in messages[-1], messages
    notes = [
        text
        for message in messages
        if f"the mirror {mirror.host} is passed over" in (text := message.get("note", ""))
    ]
    assert len(notes) == 1 and words in notes[0], messages
    found = fetcher.store.read(origin.key)
    assert found and found.layers[:2] == (layer_name(BASE), layer_name(TOP_LAYER))


def test_what_a_mirror_has_sent_well_is_kept(fetcher: Fetcher, liar: Liar, mirror: Liar) -> None:
    """Here it fails at the last layer, which is asked for when the first two are in the store."""
    image = make_layers(6)
    for server in (liar, mirror):
        server.serve(image)
    mirror.answers[f"/v2/x/blobs/{image.layers[5].digest}"] = status(500)
    fetcher.fetch(mirrored(fetcher, liar, mirror.host))
    asked = {seen.path for seen in liar.seen}
    assert not {f"/v2/x/blobs/{layer.digest}" for layer in image.layers[:2]} & asked


def test_mirrors_in_their_order(fetcher: Fetcher, liar: Liar, mirror: Liar) -> None:
    """The first is down, the second has the image; for other registries there is none."""
    mirror.serve(ImageParts.make([BASE]))
    origin = mirrored(fetcher, liar, "127.0.0.1:1", mirror.host)
    messages = fetcher.talk(fetcher.request(origin))
    assert "image" in messages[-1] and not liar.seen
    assert ["127.0.0.1:1 is passed over" in message["note"] for message in messages if "note" in message] == [True]
    fetcher.mirrors = {"*": [mirror.host], liar.host: []}
    assert "HTTP 404" in fetcher_of(fetcher, "other").refuse(origin_of(liar))[0]
    fetcher.mirrors = {"*": [mirror.host]}
    fetcher_of(fetcher, "third").fetch(origin_of(liar))


def fetcher_of(fetcher: Fetcher, name: str) -> Fetcher:
    """Another client, with the same settings."""
    other = Fetcher(fetcher.store.root / name)
    other.settings, other.mirrors, other.insecure = fetcher.settings, fetcher.mirrors, fetcher.insecure
    return other


def test_a_digest_is_safe_from_a_mirror(fetcher: Fetcher, liar: Liar, mirror: Liar) -> None:
    """It may say what a tag means, but not what a digest means."""
    honest, other = ImageParts.make([BASE]), ImageParts.make([TOP_LAYER])
    digest = "sha256:" + hashlib.sha256(json.dumps(honest.manifest).encode()).hexdigest()
    liar.serve(honest, tag=digest)
    mirror.serve(other, tag=digest)
    fetcher.mirrors = {liar.host: [mirror.host]}
    assert fetcher.fetch(docker_origin(f"{liar.host}/x@{digest}")).layers[0] == layer_name(BASE)
    liar.serve(honest)
    mirror.serve(other)
    assert fetcher.fetch(origin_of(liar)).layers[0] == layer_name(TOP_LAYER)


def test_the_registrys_own_error_counts(fetcher: Fetcher, liar: Liar) -> None:
    """Not the mirror's; and without any of them, the stored image is used for latest."""
    origin = replace(mirrored(fetcher, liar, "127.0.0.1:1"), refresh=True)
    text, kind = fetcher.refuse(origin)
    assert f"{liar.host}/x:latest is not there (HTTP 404)" in text and kind == "DriverError"
    liar.serve(ImageParts.make([BASE]))
    fetcher.fetch(origin)
    liar.answers["/v2/x/manifests/latest"] = status(503)
    messages = fetcher.talk(fetcher.request(origin))
    assert "is used" in messages[-2]["note"] and "image" in messages[-1]


def test_a_mirror_by_plain_http(fetcher: Fetcher, liar: Liar) -> None:
    """Beyond this machine only from the operator's list."""
    liar.serve(ImageParts.make([BASE]))
    with Liar("0.0.0.0") as server:
        subprocess.run(["ip", "address", "add", "192.0.2.8/32", "dev", "lo"], check=True)
        try:
            host = f"192.0.2.8:{server.port}"
            origin = mirrored(fetcher, liar, host)
            fetcher.fetch(origin)
            assert not server.seen and liar.seen
            fetcher.insecure = [host]
            fetcher_of(fetcher, "other").fetch(origin)
            assert server.seen
        finally:
            subprocess.run(["ip", "address", "del", "192.0.2.8/32", "dev", "lo"], check=True)


# -- a registry that means harm ------------------------------------------------------------------------------


def test_a_liar_that_does_not_lie(fetcher: Fetcher, liar: Liar) -> None:
    liar.serve(ImageParts.make([BASE]))
    fetcher.fetch(origin_of(liar))


def test_damaged_blob_of_a_real_registry(fetcher: Fetcher, registry: Registry) -> None:
    image = ImageParts.make([make_tar([folder("usr"), Entry("usr/x", b"to be damaged")])])
    registry.push("damaged", image)
    data = image.layers[0].data
    registry.damage(image.layers[0].digest, data[:-1] + bytes([data[-1] ^ 1]))
    text, kind = fetcher.refuse(docker_origin(f"{registry.host}/damaged"))
    assert f"another digest or size than the manifest says ({image.layers[0].digest})" in text
    assert kind == "DriverError"


def spoil_config(image: ImageParts, liar: Liar) -> None:
    liar.files[f"/v2/x/blobs/{image.config_blob.digest}"] += b" "


def spoil_layer(image: ImageParts, liar: Liar) -> None:
    liar.files[f"/v2/x/blobs/{image.layers[0].digest}"] = gzip.compress(TOP_LAYER)


def spoil_size(image: ImageParts, liar: Liar) -> None:
    image.manifest["layers"][0]["size"] += 1
    liar.files["/v2/x/manifests/latest"] = json.dumps(image.manifest).encode()


def spoil_small_size(image: ImageParts, liar: Liar) -> None:
    image.manifest["layers"][0]["size"] = 10
    liar.files["/v2/x/manifests/latest"] = json.dumps(image.manifest).encode()


def spoil_huge_size(image: ImageParts, liar: Liar) -> None:
    image.manifest["layers"][0]["size"] = 1 << 60
    liar.files["/v2/x/manifests/latest"] = json.dumps(image.manifest).encode()


def spoil_negative_size(image: ImageParts, liar: Liar) -> None:
    image.manifest["layers"][0]["size"] = -1
    liar.files["/v2/x/manifests/latest"] = json.dumps(image.manifest).encode()


def change_config(image: ImageParts, liar: Liar) -> None:
    image.describe()
    liar.serve(image)


def spoil_diff_id(image: ImageParts, liar: Liar) -> None:
    image.config["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]
    change_config(image, liar)


def spoil_path_in_diff_id(image: ImageParts, liar: Liar) -> None:
    image.config["rootfs"]["diff_ids"] = ["sha256:../../../../etc"]
    change_config(image, liar)


def spoil_count(image: ImageParts, liar: Liar) -> None:
    image.config["rootfs"]["diff_ids"] *= 2
    change_config(image, liar)


def spoil_rootfs(image: ImageParts, liar: Liar) -> None:
    image.config["rootfs"] = ["nonsense"]
    change_config(image, liar)


def spoil_path_in_digest(image: ImageParts, liar: Liar) -> None:
    image.manifest["layers"][0]["digest"] = "sha256:../../other"
    liar.files["/v2/x/manifests/latest"] = json.dumps(image.manifest).encode()


def spoil_media_type(image: ImageParts, liar: Liar) -> None:
    image.manifest["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+encrypted"
    liar.files["/v2/x/manifests/latest"] = json.dumps(image.manifest).encode()


def spoil_foreign(image: ImageParts, liar: Liar) -> None:
    image.manifest["layers"][0]["urls"] = [f"{liar.url}/foreign"]
    liar.files["/v2/x/manifests/latest"] = json.dumps(image.manifest).encode()


def spoil_json(image: ImageParts, liar: Liar) -> None:
    liar.files["/v2/x/manifests/latest"] = b"<html>" * 10


def spoil_nesting(image: ImageParts, liar: Liar) -> None:
    liar.files["/v2/x/manifests/latest"] = b"[" * 100000


def spoil_length(image: ImageParts, liar: Liar) -> None:
    liar.files["/v2/x/manifests/latest"] = b" " * (5 << 20)


def spoil_list(image: ImageParts, liar: Liar) -> None:
    liar.files["/v2/x/manifests/latest"] = b"[]"


def spoil_schema(image: ImageParts, liar: Liar) -> None:
    old = {"schemaVersion": 1, "name": "x", "tag": "latest", "fsLayers": [{"blobSum": "sha256:" + "0" * 64}]}
    liar.files["/v2/x/manifests/latest"] = json.dumps(old).encode()


def spoil_number_of_layers(image: ImageParts, liar: Liar) -> None:
    image.layers *= 401
    image.config["rootfs"]["diff_ids"] *= 401
    change_config(image, liar)


def spoil_entry(image: ImageParts, liar: Liar) -> None:
    bad = ImageParts.make([make_tar([folder("usr"), Entry("../out", b"x")])])
    liar.serve(bad)


def spoil_whiteout(image: ImageParts, liar: Liar) -> None:
    liar.serve(ImageParts.make([make_tar([folder("usr"), Entry("usr/.wh...")])]))


LIES = {
    spoil_config: "configuration has another digest",
    spoil_layer: "another digest or size",
    spoil_size: "another digest or size",
    spoil_small_size: "more than",
    spoil_huge_size: "image_size_limit",
    spoil_negative_size: "a layer has -1 bytes",
    spoil_diff_id: "contents are not what the image says",
    spoil_path_in_diff_id: "a digest that is none",
    spoil_count: "no image of file system layers",
    spoil_rootfs: "no image of file system layers",
    spoil_path_in_digest: "a digest that is none",
    spoil_media_type: "a layer of a kind that is not fetched",
    spoil_foreign: "a layer of a kind that is not fetched",
    spoil_json: "is not the JSON it should be",
    spoil_nesting: "is not the JSON it should be",
    spoil_length: "longer than the 4 MB",
    spoil_list: "is not the JSON it should be",
    spoil_schema: "no image of file system layers",
    spoil_number_of_layers: "401 layers; 400 can be stacked",
    spoil_entry: "its entry '../out' leads out of the image",
    spoil_whiteout: "is no name",
}


@pytest.mark.parametrize("spoil", LIES, ids=lambda spoil: spoil.__name__)
def test_lies(fetcher: Fetcher, liar: Liar, spoil: Any) -> None:
    image = ImageParts.make([BASE])
    liar.serve(image)
    spoil(image, liar)
    text, kind = fetcher.refuse(origin_of(liar))
    assert LIES[spoil] in text
    assert kind == "DriverError"
    assert "/foreign" not in [seen.path for seen in liar.seen]


def test_another_manifest_than_was_asked_for(fetcher: Fetcher, liar: Liar) -> None:
    image = ImageParts.make([BASE])
    digest = "sha256:" + "1" * 64
    liar.serve(image, tag=digest)
    text, _ = fetcher.refuse(docker_origin(f"{liar.host}/x@{digest}"))
    assert "sends a manifest of another digest" in text


def test_an_index_that_lies(fetcher: Fetcher, liar: Liar) -> None:
    image = ImageParts.make([BASE])
    digest = "sha256:" + "1" * 64
    liar.serve(image, tag=digest)
    entry = {"digest": digest, "platform": {"os": "linux", "architecture": native()}}
    liar.files["/v2/x/manifests/latest"] = json.dumps({"mediaType": DOCKER_INDEX, "manifests": [entry]}).encode()
    assert "sends a manifest of another digest" in fetcher.refuse(origin_of(liar))[0]
    liar.files["/v2/x/manifests/latest"] = json.dumps({"manifests": ["x", {}]}).encode()
    assert "is there for no platform" in fetcher.refuse(origin_of(liar))[0]


@pytest.mark.parametrize("code", [404, 429, 500])
def test_status(fetcher: Fetcher, liar: Liar, code: int) -> None:
    liar.answers["/v2/x/manifests/latest"] = status(code)
    text, kind = fetcher.refuse(origin_of(liar))
    assert f"HTTP {code}" in text
    assert kind == ("DriverError" if code == 404 else "TransientError")


def test_a_layer_without_an_end(fetcher: Fetcher, registry: Registry) -> None:
    """As some tools make them; the digest says that it is whole."""
    tar = make_tar([folder("usr"), Entry("usr/x", b"x" * 512)])[: 512 * 3]
    registry.push("endless", ImageParts.make([tar]))
    image = fetcher.fetch(docker_origin(f"{registry.host}/endless"))
    assert (fetcher.store.layer(image.layers[0]) / "usr/x").read_bytes() == b"x" * 512


# -- saved images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["save", "lay_out"])
def test_saved_image(fetcher: Fetcher, tmp_path: Path, form: str) -> None:
    """Is what a registry would give."""
    parts = ImageParts.make([BASE, TOP_LAYER], Cmd=["/bin/x"])
    image = fetcher.fetch(saved(tmp_path, getattr(parts, form)()))
    assert image.layers == (layer_name(TOP_LAYER), layer_name(BASE), "skeleton-1")
    assert image.config.cmd == ("/bin/x",)
    assert not list(fetcher.store.work.iterdir())


def saved(folder: Path, files: Mapping[str, Any]) -> Origin:
    path = folder / "saved.tar"
    path.write_bytes(pack_files(files))
    return Origin("archive", str(path), str(path))


def test_saved_images_that_lie(fetcher: Fetcher, tmp_path: Path) -> None:
    parts = ImageParts.make([BASE])
    (tmp_path / "secret").write_text(json.dumps(parts.config))
    good, layout = parts.save(), parts.lay_out()
    (entry,) = good["manifest.json"]
    foreign = ImageParts.make([BASE], "mips").save()
    itself = {"manifests": [{"digest": "sha256:" + "1" * 64}]}
    for files, words in (
        ({**good, "manifest.json": [entry, entry]}, "must hold one image"),
        ({**good, "manifest.json": {}}, "must hold one image"),
        ({**good, "manifest.json": [{**entry, "Config": f"../..{tmp_path}/secret"}]}, "it lacks"),
        ({**good, "manifest.json": [{**entry, "Config": ["x"]}]}, "it lacks"),
        ({**good, "manifest.json": [{**entry, "Layers": "x"}]}, "no image of file system layers"),
        ({**good, "manifest.json": [{**entry, "Layers": []}]}, "no image of file system layers"),
        ({**good, "config.json": link("config.json", f"{tmp_path}/secret")}, "it lacks 'config.json'"),
        ({**good, "config.json": []}, "no image of file system layers"),
        ({**good, "0/layer.tar": Blob(gzip.compress(TOP_LAYER))}, "contents are not what the image says"),
        (foreign, f"is there for linux/mips, not for linux/{native()}"),
        ({**layout, "index.json": {}}, "no image of file system layers"),
        ({**layout, "index.json": {"manifests": [{"digest": "sha256:../x"}]}}, "a digest that is none"),
        ({"index.json": itself, f"blobs/sha256/{'1' * 64}": itself}, "no image of file system layers"),
    ):
        assert words in fetcher.refuse(saved(tmp_path, files))[0]


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("debian", ("docker.io", "library/debian", "latest", "")),
        ("docker://debian:12", ("docker.io", "library/debian", "12", "")),
        ("grafana/loki:2.9", ("docker.io", "grafana/loki", "2.9", "")),
        ("docker.io/debian", ("docker.io", "library/debian", "latest", "")),
        ("localhost/x", ("localhost", "x", "latest", "")),
        ("ghcr.io/a/b/c:v1.2-rc", ("ghcr.io", "a/b/c", "v1.2-rc", "")),
        ("host:5000/x", ("host:5000", "x", "latest", "")),
        ("[::1]:5000/x:y", ("[::1]:5000", "x", "y", "")),
        (f"x@sha256:{'a' * 64}", ("docker.io", "library/x", "latest", f"sha256:{'a' * 64}")),
        (f"h.io/x:t@sha256:{'a' * 64}", ("h.io", "x", "t", f"sha256:{'a' * 64}")),
    ],
)
def test_reference(text: str, expected: tuple[str, ...]) -> None:
    found = Reference.parse(text)
    assert (found.host, found.name, found.tag, found.digest) == expected


@pytest.mark.parametrize(
    "text",
    ["", "UPPER", "a/../b", "a//b", "x:", "x:a/b", "x@sha256:short", "x@md5:abc", "h.io/", "/x", "x y", "x\ny",
     "h.io:99/x?y", "user@h.io/x", "h.io/x#y", "h_h.io/x", "..", "x:é"],
)  # fmt: skip
def test_no_reference(text: str) -> None:
    with pytest.raises(DriverError, match="no name of an image"):
        Reference.parse(text)


@pytest.mark.parametrize(
    "config",
    [{}, {"config": None}, {"config": []}, {"config": {"Env": "x", "Cmd": [1], "User": 5, "StopSignal": None}},
     {"config": {"Env": ["no equals sign"], "WorkingDir": "a\0b"}}],
)  # fmt: skip
def test_configurations_of_any_form(config: dict[str, Any]) -> None:
    assert read_image_config(config) == ImageConfig()
