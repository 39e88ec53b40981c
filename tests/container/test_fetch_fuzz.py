# SPDX-License-Identifier: MPL-2.0
"""fetch.py and strangers: whatever a server or an archive says, it is taken or refused with a sentence."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nspawn.common import DriverError
from nspawn.download import tag_of
from nspawn.fetch import Fetch, measure
from nspawn.files import remove_tree
from nspawn.images import Origin, Reference
from nspawn.registry import CERTIFICATES, parse_json
from nspawn.unpack import Room, Unpacker
from tests.fetching import Fetcher, origin_of
from tests.servers import (
    DOCKER_INDEX,
    DOCKER_LAYER,
    ImageParts,
    Liar,
    folder,
    make_tar,
)

DIGEST = "sha256:" + "0" * 64

# -- answers of registries -----------------------------------------------------------------------------------

KEYS = st.sampled_from([
    "mediaType", "manifests", "layers", "config", "digest", "size", "platform", "os", "architecture", "rootfs",
    "diff_ids", "urls", "Env", "Entrypoint", "Cmd", "User", "WorkingDir", "StopSignal", "token", "access_token",
])  # fmt: skip
WORDS = st.sampled_from(
    [DIGEST, "sha256:../../x", "linux", "amd64", DOCKER_LAYER, DOCKER_INDEX, "\0", "\ud800", "A=b", ""]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | WORDS | st.text()
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5))


def find_places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a document with every key of it."""
    if isinstance(document, (dict, list)):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield document, key
            yield from find_places(document[key])


@st.composite
def spoilt(draw: st.DrawFn, document: Any) -> Any:
    """A document with something else in some of its places."""
    made = {"document": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(list(find_places(made))))
        container[key] = draw(JSON)
    return made["document"]


IMAGE = ImageParts.make(
    [make_tar([folder("usr")])], Env=["A=b"], Cmd=["x"], User="x", WorkingDir="/", StopSignal="TERM"
)
INDEX = {
    "mediaType": DOCKER_INDEX,
    "manifests": [{"digest": DIGEST, "size": 1, "platform": {"os": "linux", "architecture": "amd64"}}],
}


@pytest.fixture(scope="module")
def registry() -> Iterator[Liar]:
    """With no certificates to read: the system's take 20 ms for each context."""
    with Liar() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", os.devnull)
        patch.setenv("SSL_CERT_DIR", os.devnull)
        yield running


@contextlib.contextmanager
def fetching(origin: Origin) -> Iterator[Fetch]:
    with tempfile.TemporaryDirectory() as place:
        fetcher = Fetcher(Path(place, "store"))
        fetcher.settings |= {"limit": 1 << 20, "stall": 1.0}
        yield Fetch(fetcher.store, fetcher.request(origin))


@settings(deadline=None, max_examples=50)
@given(spoilt(IMAGE.manifest) | spoilt(INDEX), spoilt(IMAGE.config))
@example(INDEX | {"manifests": 5}, IMAGE.config)
@example(IMAGE.manifest, IMAGE.config | {"config": {"Cmd": ["\ud800"], "User": "\ud800", "Env": ["A=\ud800"]}})
def test_documents(registry: Liar, manifest: Any, config: Any) -> None:
    """Also the configuration of an otherwise right image."""
    for parts in (manifest, {**IMAGE.manifest, "config": fetch_config(registry, config)}):
        registry.serve(IMAGE)
        registry.files["/v2/x/manifests/latest"] = json.dumps(parts).encode()
        with fetching(origin_of(registry)) as one, contextlib.suppress(DriverError):
            image = one.run()
            assert one.store.read(image.key) == image
            os.fsencode(
                "".join((*image.config.env, *image.config.entrypoint, *image.config.cmd, image.config.user))
            )


def fetch_config(registry: Liar, config: Any) -> dict[str, Any]:
    """Let a registry have a configuration; return its descriptor."""
    blob = hashlib.sha256(json.dumps(config).encode()).hexdigest()
    registry.files[f"/v2/x/blobs/sha256:{blob}"] = json.dumps(config).encode()
    return {"digest": f"sha256:{blob}"}


@given(st.binary() | JSON.map(lambda document: json.dumps(document).encode()))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"9" * 5000)
@example(b"\xff")
def test_texts_that_are_to_be_json(data: bytes) -> None:
    with contextlib.suppress(DriverError):
        assert isinstance(parse_json(data, "the manifest"), dict)


HEADERS = ["Location", "Content-Length", "Content-Range", "ETag", "WWW-Authenticate", "Docker-Content-Digest",
           "Transfer-Encoding", "Content-Type", "X"]  # fmt: skip
VALUES = st.sampled_from([
    b"http://[", b"http://127.0.0.1:99999/", b"//", b"-1", b"9" * 5000, b"bytes 5-", b"chunked", b"bytes 1-2/x",
    b'Bearer realm="http://[::1"', b'Bearer realm="' + b"x" * 60000, b"Basic", b"a" * 60000, "é".encode(), b"\t",
    b"http://" + b"a" * 300 + b"/", b"http://\xff/", b"http://x y/", b"W/\x80",
])  # fmt: skip
STATUSES = ["200 OK", "206 x", "302 x", "401 x", "416 x", "100 x"]
LINES = st.tuples(st.sampled_from(HEADERS), VALUES | st.binary(max_size=40)).map(
    lambda pair: pair[0].encode() + b": " + pair[1]
)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([b"HTTP/1.1 " + status.encode() for status in STATUSES]) | st.binary(max_size=40),
    st.lists(LINES | st.binary(max_size=40), max_size=8),
    st.binary(max_size=50),
)
@example(b"HTTP/1.1 302 x", [b"Location: http://["], b"")
@example(b"HTTP/1.1 302 x", [b"Location: http://127.0.0.1:99999/"], b"")
@example(b"HTTP/1.1 206 x", [b"Content-Range: bytes " + b"9" * 5000 + b"-"], b"x")
@example(b"HTTP/1.1 200 x", [b"Content-Length: " + b"9" * 5000], b"x")
@example(b"HTTP/1.1 200 x", [b"X: y"] * 200, b"x")
@example(b"HTTP/1.1 200 x", [b"X: " + b"y" * 70000], b"x")
@example(b"HTTP/1.1 401 x", [b'WWW-Authenticate: Bearer realm="http://[::1"'], b"")
@example(b"HTTP/1.1 401 x", [b'WWW-Authenticate: Bearer realm="' + b"x" * 60000], b"")
def test_heads_of_answers(registry: Liar, status: bytes, lines: list[bytes], body: bytes) -> None:
    """Of a manifest, a layer and a plain file; a download goes on where another has stopped."""

    def answer(request: Any) -> None:
        request.wfile.write(b"\r\n".join([status, *lines, b"", body]))
        request.close_connection = True

    registry.answers = {"/v2/x/manifests/latest": answer}
    with fetching(origin_of(registry)) as one, contextlib.suppress(DriverError):
        one.run()
    registry.answers = {f"/v2/x/blobs/{IMAGE.layers[0].digest}": answer, "/file": answer}
    registry.serve(IMAGE)
    for origin in (origin_of(registry), Origin("tar", f"{registry.url}/file", "file")):
        with fetching(origin) as one, contextlib.suppress(DriverError):
            one.store.prepare()
            for part in (one.store.part(one.key), one.store.part(f"{one.key}.{IMAGE.layers[0].digest[7:]}")):
                part.write_bytes(b"begun")
                tag_of(part).write_text('"t"')
            one.run()
    registry.answers = {}


@given(st.text() | st.from_regex(r"(docker://)?[\w.:@/\[\]-]{0,40}", fullmatch=True))
def test_references(text: str) -> None:
    with contextlib.suppress(DriverError):
        found = Reference.parse(text)
        assert CERTIFICATES / found.host in (CERTIFICATES / found.host / "x").resolve().parents
        assert not set("/\\@?# \n") & set(found.host) and ".." not in found.name.split("/")


# -- archives ------------------------------------------------------------------------------------------------

PARTS = [
    "a",
    "b",
    "..",
    ".",
    "",
    "usr",
    ".wh.a",
    ".wh..wh..opq",
    ".wh.",
    "\udcff",
    "x" * 255,
    "x" * 256,
    "d/" * 300,
]
NAMES = st.lists(st.sampled_from(PARTS), max_size=4).map("/".join) | st.text(max_size=20)
ODD_NUMBERS = [
    b"0000644\0", b"7777777\0", b"\x80\0\0\0\0\0\0\x05", b"\xff\xff\xff\xff\xff\xff\xff\xfb", b"-0000005",
    b"\xff" + b"\0" * 7, b"\x80" + b"\xff" * 7, b"99999999", b"\0" * 8, b"       \0",
]  # fmt: skip
NUMBERS = st.sampled_from([b"0000644\0"] * 30 + ODD_NUMBERS)
PAX_KEYS = st.sampled_from([
    "path", "linkpath", "size", "uid", "mtime", "hdrcharset", "GNU.sparse.major", "GNU.sparse.minor",
    "GNU.sparse.size", "GNU.sparse.name", "GNU.sparse.realsize", "GNU.sparse.map", "SCHILY.xattr.user.x",
    "SCHILY.xattr.trusted.x", "SCHILY.xattr.user.\0", "SCHILY.xattr.security.capability",
])  # fmt: skip
PAX_VALUES = st.sampled_from([
    "", "-5", "nan", "inf", "1e999", "9" * 20, "1", "0", "0,5,10,5", "BINARY", "../x", "a\0b", "\ud800",
])  # fmt: skip
PAX = st.dictionaries(PAX_KEYS, PAX_VALUES | NAMES, max_size=3)
KINDS = st.sampled_from([bytes([kind]) for kind in b"0123456789LKSxgVMNDAZ\0\xff"])


@st.composite
def entries(draw: st.DrawFn) -> bytes:
    """The blocks of an entry, with a right checksum."""
    data = draw(st.binary(max_size=600))
    name, target = (draw(NAMES).encode("utf-8", "surrogatepass")[:100].ljust(100, b"\0") for _ in range(2))
    odd = st.sampled_from(ODD_NUMBERS).map(lambda number: number.rjust(12, number[:1].replace(b"\x80", b"\0")))
    size = draw(odd if draw(st.integers(0, 5)) == 0 else st.just(b"%011o\0" % len(data)))
    head = b"".join((
        name, draw(NUMBERS), draw(NUMBERS), draw(NUMBERS), size,
        draw(NUMBERS).ljust(12, b"\0"), b" " * 8, draw(KINDS), target, b"ustar\x0000", b"root".ljust(64, b"\0"),
        draw(NUMBERS), draw(NUMBERS), draw(st.binary(max_size=167)).ljust(167, b"\0"),
    ))  # fmt: skip
    head = head[:148] + b"%06o\0 " % sum(head[:148] + b" " * 8 + head[156:]) + head[156:]
    return render_pax(draw(PAX)) + head + data.ljust(-len(data) % 512 + len(data), b"\0")


def render_pax(values: dict[str, str]) -> bytes:
    """The blocks with what is said of the next entry, if anything is."""
    text = b""
    for key, value in values.items():
        record = f" {key}={value}\n".encode("utf-8", "surrogatepass")
        length = len(record) + len(str(len(record) + 3))
        text += f"{length}".encode() + record
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(text)
    return (
        bytes(header.tobuf(tarfile.USTAR_FORMAT)) + text.ljust(-len(text) % 512 + len(text), b"\0")
        if text
        else b""
    )


@settings(deadline=None, max_examples=200)
@given(st.lists(entries(), max_size=6).map(b"".join), st.booleans(), st.integers(0, 2000))
def test_archives(data: bytes, is_layer: bool, cut: int) -> None:
    """Nothing comes to be outside of the tree, and no more than the limit inside."""
    archive = data + bytes(1024) if cut % 3 else data[: len(data) - cut]
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place, "a/tree")
        tree.mkdir(parents=True)
        try:
            with contextlib.suppress(DriverError):
                Unpacker(tree, Room(1 << 20), is_layer=is_layer).run(io.BytesIO(archive))
            assert os.listdir(place) == ["a"] and os.listdir(Path(place, "a")) == ["tree"]
            assert measure(tree) < 4 << 20
        finally:
            remove_tree(tree)


@pytest.mark.parametrize("kind", [b"Q", tarfile.GNUTYPE_SPARSE])
def test_entry_that_claims_to_be_endless(tmp_path: Path, kind: bytes) -> None:
    entry = tarfile.TarInfo("endless")
    entry.type, entry.size = kind, 1 << 62
    archive = io.BytesIO(entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DriverError, match="cut off"):
        Unpacker(tmp_path, Room(1 << 20), is_layer=False).run(archive)
