# SPDX-License-Identifier: MPL-2.0
"""nspawn/fetch.py: downloads with every fault a network has, and archives that mean harm, by the real process."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nspawn.images
from nspawn.images import Image, Origin
from tests.containers import eventually
from tests.fetching import Fetcher, layer_of, tar_name, url_origin
from tests.servers import (
    Entry,
    FileServer,
    cut_off,
    folder,
    free_port,
    hard_link,
    link,
    make_tar,
    redirect,
    send,
    stall,
    status,
    zstd,
)


def small_tree(*more: Entry) -> bytes:
    return make_tar([folder("./"), folder("./usr"), Entry("./usr/file", b"contents"), *more])


NOISE = os.urandom(3 << 20)  # does not compress


# -- what is fetched -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, lzma.compress, bz2.compress, zstd], ids=["plain", "gz", "xz", "bz2", "zst"]
)
def test_tar(fetcher: Fetcher, server: FileServer, compress: Callable[[bytes], bytes]) -> None:
    server.files["/image"] = compress(small_tree())
    image = fetcher.fetch(url_origin(f"{server.url}/image"))
    (name,) = image.layers
    assert name == tar_name(small_tree())
    assert (fetcher.store.layer(name) / "usr/file").read_bytes() == b"contents"
    assert image.size > 0
    assert not list(fetcher.store.parts.glob("*"))
    assert stat.S_IMODE(fetcher.store.root.stat().st_mode) == 0o700


def test_one_content_is_one_layer(fetcher: Fetcher, server: FileServer) -> None:
    server.files |= {"/a.tar": small_tree(), "/b.tar.gz": gzip.compress(small_tree())}
    images = [fetcher.fetch(url_origin(server.url + path)) for path in ("/a.tar", "/b.tar.gz")]
    assert images[0].layers == images[1].layers
    assert images[0].key != images[1].key


def make_disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk.raw"
    with open(disk, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(disk)], check=True, timeout=60)
    return disk


@pytest.mark.parametrize("form", ["raw", "gz", "xz", "zst", "qcow2"])
def test_raw(fetcher: Fetcher, server: FileServer, tmp_path: Path, form: str) -> None:
    disk = make_disk(tmp_path)
    if form == "qcow2":
        convert = ["qemu-img", "convert", "-O", "qcow2", str(disk), str(tmp_path / "disk.qcow2")]
        subprocess.run(convert, check=True, timeout=60)
        server.files["/disk"] = (tmp_path / "disk.qcow2").read_bytes()
    else:
        ways: dict[str, Callable[[bytes], bytes]] = {
            "raw": bytes, "gz": gzip.compress, "xz": lzma.compress, "zst": zstd,
        }  # fmt: skip
        server.files["/disk"] = ways[form](disk.read_bytes())
    (name,) = fetcher.fetch(url_origin(f"{server.url}/disk", "raw")).layers
    assert name.endswith(".raw")
    found = fetcher.store.layer(name)
    assert found.read_bytes() == disk.read_bytes()
    assert found.stat().st_blocks * 512 < 4 << 20, "holes stay holes"


@pytest.mark.parametrize("data", [b"<html>" + b"x" * 9000, b"", b"short", make_tar([Entry("a", bytes(9000))])])
def test_what_is_no_disk(fetcher: Fetcher, server: FileServer, data: bytes) -> None:
    server.files["/disk"] = data
    text, kind = fetcher.refuse(url_origin(f"{server.url}/disk", "raw"))
    assert "disk image" in text or "type = " in text
    assert kind == "DriverError"


@pytest.mark.parametrize("data", [b"<html>no</html>" * 100, b"", b"\x1f\x8bgarbage", NOISE[:100000]])
def test_what_is_no_archive(fetcher: Fetcher, server: FileServer, data: bytes) -> None:
    server.files["/image"] = data
    text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "tar archive" in text or "damaged" in text
    assert kind == "DriverError"


@pytest.mark.parametrize("at", [512 * 3, 512 * 3 + 100, 512 * 4 + 10, 1000])
def test_an_archive_cut_off_by_its_maker(fetcher: Fetcher, server: FileServer, at: int) -> None:
    """Also where one entry ends, which tarfile takes for the end of the archive."""
    server.files["/image"] = make_tar([folder("usr"), Entry("usr/a", b"x" * 600), Entry("usr/b", b"y")])[:at]
    text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "tar archive" in text or "cut off" in text
    assert kind == "DriverError"


def test_garbage_in_the_middle(fetcher: Fetcher, server: FileServer) -> None:
    data = bytearray(make_tar([folder("usr"), Entry("usr/a", b"x"), Entry("usr/b", b"y")]))
    data[512 * 3 : 512 * 3 + 100] = b"?" * 100
    server.files["/image"] = bytes(data)
    text, _ = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "damaged or cut off" in text


def test_truncated_gzip(fetcher: Fetcher, server: FileServer) -> None:
    server.files["/image"] = gzip.compress(small_tree(Entry("noise", NOISE)))[:-1000]
    text, _ = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "damaged or cut off" in text or "unexpected end" in text


# -- the network ---------------------------------------------------------------------------------------------


def test_nobody_listens(fetcher: Fetcher) -> None:
    text, kind = fetcher.refuse(url_origin(f"http://127.0.0.1:{free_port()}/image"))
    assert "cannot be reached: Connection refused" in text
    assert kind == "TransientError"


def test_no_such_host(fetcher: Fetcher) -> None:
    text, kind = fetcher.refuse(url_origin("http://no-such-host.invalid/image"))
    assert "http://no-such-host.invalid/image cannot be reached" in text
    assert kind == "TransientError"


@pytest.mark.parametrize(
    ("code", "words", "kind"),
    [
        (401, "is denied (HTTP 401); check the credentials", "DriverError"),
        (403, "is denied (HTTP 403)", "DriverError"),
        (404, "is not there (HTTP 404)", "DriverError"),
        (410, "HTTP 410", "DriverError"),
        (429, "HTTP 429", "TransientError"),
        (500, "HTTP 500", "TransientError"),
        (503, "HTTP 503", "TransientError"),
    ],
)
def test_status(fetcher: Fetcher, server: FileServer, code: int, words: str, kind: str) -> None:
    server.answers["/image"] = status(code)
    assert fetcher.refuse(url_origin(f"{server.url}/image?token=secret"))[1] == kind
    text, _ = fetcher.refuse(url_origin(f"{server.url}/image?token=secret"))
    assert words in text and "secret" not in text


def test_a_broken_transfer_is_taken_up_again(fetcher: Fetcher, server: FileServer) -> None:
    data = small_tree(Entry("noise", NOISE))
    server.answers["/image"] = cut_off(data, 1 << 20, times=3)
    fetcher.fetch(url_origin(f"{server.url}/image"))
    ranges = [seen.headers.get("Range") for seen in server.seen]
    assert ranges == [None, "bytes=1048576-", "bytes=2097152-", "bytes=3145728-"]


def test_a_transfer_that_breaks_off_for_good(fetcher: Fetcher, server: FileServer) -> None:
    server.answers["/image"] = cut_off(b"x" * 100000, 0)
    text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "broke off" in text
    assert kind == "TransientError"


def test_what_has_changed_meanwhile_is_begun_anew(fetcher: Fetcher, server: FileServer) -> None:
    """The server answers If-Range with the whole new file."""
    old, new = small_tree(Entry("a", NOISE)), small_tree(Entry("b", NOISE))
    server.files["/image"] = new
    first = cut_off(old, 1 << 20)

    def answer(request: Any) -> None:
        del server.answers["/image"]
        first(request)

    server.answers["/image"] = answer
    (name,) = fetcher.fetch(url_origin(f"{server.url}/image")).layers
    assert name == tar_name(new)
    assert server.seen[1].headers["If-Range"] == '"t"'


def test_a_server_that_sends_another_part(fetcher: Fetcher, server: FileServer) -> None:
    data = small_tree(Entry("noise", NOISE))
    whole = cut_off(data, 1 << 20)

    def answer(request: Any) -> None:
        if "Range" in request.headers:
            send(request, 206, data, {"Content-Range": f"bytes 5-{len(data) - 1}/{len(data)}"})
        else:
            whole(request)

    server.answers["/image"] = answer
    text, _ = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "another part" in text


def test_a_killed_download_is_taken_up_again(fetcher: Fetcher, server: FileServer) -> None:
    data = small_tree(Entry("noise", NOISE))
    origin = url_origin(f"{server.url}/image")
    server.answers["/image"] = stall_with_tag(data, 2 << 20)
    process = fetcher.start(fetcher.request(origin))
    part = fetcher.store.part(origin.key)
    eventually(lambda: part.exists() and part.stat().st_size > 1 << 20)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert fetcher.store.read(origin.key) is None
    server.answers["/image"] = cut_off(data, len(data))
    fetcher.fetch(origin)
    assert int(server.seen[-1].headers["Range"][6:-1]) > 1 << 20


def stall_with_tag(data: bytes, at: int) -> Any:
    whole = stall(data, at)

    def answer(request: Any) -> None:
        send_header, request.sent = request.send_header, False

        def add(name: str, value: str) -> None:
            send_header(name, value)
            if not request.sent:
                request.sent = True
                send_header("ETag", '"t"')

        request.send_header = add
        whole(request)

    return answer


def test_a_stall_is_no_wait_without_end(fetcher: Fetcher, server: FileServer) -> None:
    fetcher.settings["stall"] = 1.0
    server.answers["/image"] = stall(small_tree(Entry("noise", NOISE)), 1000)
    text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "stalled" in text
    assert kind == "TransientError"


def test_a_trickle_is_a_stall(fetcher: Fetcher, server: FileServer) -> None:
    def answer(request: Any) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "100000")
        request.end_headers()
        for _ in range(300):
            request.wfile.write(b"x")
            request.wfile.flush()
            time.sleep(0.1)

    fetcher.settings["stall"] = 1.0
    server.answers["/image"] = answer
    text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "stalled" in text
    assert kind == "TransientError"


def test_a_slow_download_takes_its_time(fetcher: Fetcher, server: FileServer) -> None:
    """Longer than the limit on stalls, in pieces."""
    data = small_tree(Entry("noise", NOISE[: 40 << 10]))

    def answer(request: Any) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        for start in range(0, len(data), 4096):
            request.wfile.write(data[start : start + 4096])
            request.wfile.flush()
            time.sleep(0.4)

    fetcher.settings["stall"] = 3.0
    server.answers["/image"] = answer
    fetcher.fetch(url_origin(f"{server.url}/image"))


def test_progress_is_told(fetcher: Fetcher, server: FileServer) -> None:
    server.files["/image"] = small_tree(Entry("noise", NOISE))
    messages = fetcher.talk(fetcher.request(url_origin(f"{server.url}/image")))
    assert {"downloading", "unpacking"} <= {message.get("what") for message in messages}
    assert messages[0]["total"] == len(server.files["/image"])


# -- where it may come from, and who gets what ---------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://[/x", "http://127.0.0.1:99999/", "http://a b/", "http://127.0.0.1:x/"])
def test_broken_addresses(fetcher: Fetcher, url: str) -> None:
    text, kind = fetcher.refuse(url_origin(url))
    assert "is no address" in text
    assert kind == "DriverError"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "/etc/passwd"])
def test_other_schemes(fetcher: Fetcher, url: str) -> None:
    text, kind = fetcher.refuse(url_origin(url))
    assert "no http or https address" in text
    assert kind == "DriverError"


def test_redirects_without_end(fetcher: Fetcher, server: FileServer) -> None:
    server.answers["/image"] = redirect(f"{server.url}/image")
    text, _ = fetcher.refuse(url_origin(f"{server.url}/image"))
    assert "HTTP 302" in text


@pytest.mark.parametrize("way", ["auth", "address"])
def test_credentials(fetcher: Fetcher, server: FileServer, way: str) -> None:
    server.authorization = "Basic Y2k6c2VjcmV0"
    server.files["/image"] = small_tree()
    if way == "auth":
        origin = url_origin(f"{server.url}/image", username="ci", password="secret")
    else:
        origin = url_origin(f"{server.url}/image".replace("//", "//ci:secret@"))
    image = fetcher.fetch(origin)
    assert "secret" not in image.name
    for path in (fetcher.store.root / "images").iterdir():
        assert "secret" not in path.read_text()


def test_proxy(fetcher: Fetcher, server: FileServer) -> None:
    """The agent's proxy settings count."""
    server.files["http://images.example/image"] = small_tree()  # what a proxy is asked for
    fetcher.environ["http_proxy"] = server.url
    fetcher.fetch(url_origin("http://images.example/image"))
    fetcher.environ["no_proxy"] = "images.invalid"
    assert "cannot be reached" in fetcher.talk(fetcher.request(url_origin("http://images.invalid/x")))[-1]["error"]


# -- verification --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_checksum(fetcher: Fetcher, server: FileServer, algorithm: str) -> None:
    data = server.files["/image"] = gzip.compress(small_tree())
    checksum = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
    fetcher.fetch(url_origin(f"{server.url}/image", checksum=checksum))
    fetcher.fetch(url_origin(f"{server.url}/image", checksum=checksum.upper().replace("SHA", "sha")))


def test_wrong_checksum(fetcher: Fetcher, server: FileServer) -> None:
    """Also when the very file has been fetched before."""
    server.files["/image"] = small_tree()
    wrong = url_origin(f"{server.url}/image", checksum="sha256:" + "0" * 64)
    text, kind = fetcher.refuse(wrong)
    assert "another checksum" in text and hashlib.sha256(small_tree()).hexdigest() in text
    assert kind == "DriverError"
    fetcher.fetch(url_origin(f"{server.url}/image"))
    assert "another checksum" in fetcher.talk(fetcher.request(wrong))[-1]["error"]


@pytest.mark.parametrize("place", ["image.tar.sha256", "SHA256SUMS"])
def test_published_checksum(fetcher: Fetcher, server: FileServer, place: str) -> None:
    server.files["/d/image.tar"] = small_tree()
    origin = url_origin(f"{server.url}/d/image.tar", verify="checksum")
    assert "there is no" in fetcher.refuse(origin)[0]
    line = f"{'0' * 64}  other.tar\n{hashlib.sha256(small_tree()).hexdigest()} *image.tar\n"
    server.files[f"/d/{place}"] = line.replace("image.tar", "image.tarx").encode()
    assert "does not name image.tar" in fetcher.refuse(origin)[0]
    server.files[f"/d/{place}"] = f"{'0' * 64}  image.tar\n".encode()
    assert "another checksum" in fetcher.refuse(origin)[0]
    server.files[f"/d/{place}"] = line.encode()
    fetcher.fetch(origin)


def test_signature(fetcher: Fetcher, server: FileServer, tmp_path: Path) -> None:
    """Signed by a key of systemd's keyring, which the test puts over the host's."""
    server.files["/image.tar"] = small_tree()
    sums = f"{hashlib.sha256(small_tree()).hexdigest()}  image.tar\n".encode()
    server.files["/SHA256SUMS"] = sums
    origin = url_origin(f"{server.url}/image.tar", verify="signature")
    assert "there is no" in fetcher.refuse(origin)[0]
    known, other = make_key(tmp_path / "known"), make_key(tmp_path / "other")
    with mounted(known.keyring, Path("/usr/lib/systemd/import-pubring.gpg")):
        for signature in (other.sign(sums), known.sign(b"other"), b"garbage"):
            server.files["/SHA256SUMS.gpg"] = signature
            text, kind = fetcher.refuse(origin)
            assert "has signed the checksums" in text
            assert kind == "DriverError"
        server.files["/SHA256SUMS.gpg"] = known.sign(sums)
        fetcher.fetch(origin)


class Key:
    def __init__(self, home: Path) -> None:
        self.home, self.keyring = home, home / "public"
        home.mkdir(mode=0o700)
        self.gpg("--passphrase", "", "--quick-generate-key", "tests <tests@example.com>", "rsa2048", "sign")
        self.keyring.write_bytes(self.gpg("--export"))

    def gpg(self, *arguments: str, input: bytes = b"") -> bytes:
        argv = ["gpg", "--batch", "--quiet", "--pinentry-mode=loopback", f"--homedir={self.home}", *arguments]
        done = subprocess.run(argv, input=input, capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def sign(self, data: bytes) -> bytes:
        return self.gpg("--detach-sign", input=data)


def make_key(home: Path) -> Key:
    return Key(home)


class mounted:
    """A file bound over another."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target

    def __enter__(self) -> None:
        subprocess.run(["mount", "--bind", str(self.source), str(self.target)], check=True)

    def __exit__(self, *exc: object) -> None:
        subprocess.run(["umount", str(self.target)], check=True)


# -- archives ------------------------------------------------------------------------------------------------


def test_what_an_archive_may_have(fetcher: Fetcher, server: FileServer) -> None:
    """Owners, modes with set-uid, times, links, capabilities, attributes, names of any bytes."""
    capability = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    odd = b"od\xffd \n name".decode("utf-8", "surrogateescape")
    tree = layer_of(fetcher, server, [
        folder("home", 0o1777, uid=1000, gid=1001),
        Entry("home/su", b"x", mode=0o4755, uid=0, gid=5),
        Entry("home/ping", b"x", mode=0o755, uid=3,
              pax={"SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape"),
                   "SCHILY.xattr.user.note": "hello"}),
        link("home/link", "/etc/shadow"),
        hard_link("home/hard", "./home/su"),
        Entry(odd, b"odd"),
        folder("closed", 0o000),
        Entry("closed/in", b"x"),
    ])  # fmt: skip
    su = (tree / "home/su").lstat()
    assert (stat.S_IMODE(su.st_mode), su.st_uid, su.st_gid, su.st_mtime) == (0o4755, 0, 5, 1_600_000_000)
    assert su.st_ino == (tree / "home/hard").lstat().st_ino
    home = (tree / "home").lstat()
    assert (stat.S_IMODE(home.st_mode), home.st_uid, home.st_gid) == (0o1777, 1000, 1001)
    assert home.st_mtime == 1_600_000_000
    assert os.getxattr(tree / "home/ping", "security.capability") == capability
    assert os.getxattr(tree / "home/ping", "user.note") == b"hello"
    assert os.readlink(tree / "home/link") == "/etc/shadow"
    assert (Path(os.fsdecode(os.fsencode(tree) + b"/od\xffd \n name"))).read_bytes() == b"odd"
    assert stat.S_IMODE((tree / "closed").lstat().st_mode) == 0


def test_of_two_entries_the_later_counts(fetcher: Fetcher, server: FileServer) -> None:
    tree = layer_of(fetcher, server, [
        Entry("a", b"first", mode=0o4777), Entry("a", b"second", mode=0o600),
        folder("b"), Entry("b/c", b"x"), Entry("b", b"a file now"),
        Entry("c", b"x"), folder("c"), Entry("c/d", b"in it"),
        folder("usr", 0o700), Entry("usr/kept", b"x"),
    ])  # fmt: skip
    assert (tree / "a").read_bytes() == b"second" and stat.S_IMODE((tree / "a").stat().st_mode) == 0o600
    assert (tree / "b").read_bytes() == b"a file now"
    assert (tree / "c/d").read_bytes() == b"in it"
    assert stat.S_IMODE((tree / "usr").stat().st_mode) == 0o700


def test_whiteouts_of_plain_archives_are_names(fetcher: Fetcher, server: FileServer) -> None:
    tree = layer_of(fetcher, server, [Entry("usr/.wh.x", b"file")])
    assert (tree / "usr/.wh.x").read_bytes() == b"file"


def test_a_huge_sparse_file_is_not_written(fetcher: Fetcher, server: FileServer, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse/usr/file"
    sparse.parent.mkdir(parents=True)
    with open(sparse, "wb") as file:
        file.truncate(100 << 20)
        file.seek(50 << 20)
        file.write(b"data")
    data = subprocess.run(
        ["tar", "--sparse", "-cf", "-", "-C", str(tmp_path / "sparse"), "usr"], stdout=subprocess.PIPE, check=True
    ).stdout
    assert len(data) < 1 << 20
    server.files["/image"] = data
    (name,) = fetcher.fetch(url_origin(f"{server.url}/image")).layers
    made = fetcher.store.layer(name) / "usr/file"
    assert made.read_bytes() == sparse.read_bytes()
    assert made.stat().st_blocks * 512 < 1 << 20
    fetcher.settings["limit"] = 50 << 20
    origin = url_origin(f"{server.url}/image", checksum="sha256:" + hashlib.sha256(data).hexdigest())
    assert "image_size_limit" in fetcher.talk(fetcher.request(origin))[-1]["error"]


def test_a_download_that_is_too_large(fetcher: Fetcher, server: FileServer) -> None:
    """By what the server says, and by what it sends when it says nothing."""
    fetcher.settings["limit"] = 1 << 20
    server.files["/image"] = NOISE
    assert "image_size_limit" in fetcher.refuse(url_origin(f"{server.url}/image"))[0]

    def answer(request: Any) -> None:
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        request.wfile.write(NOISE)
        request.close_connection = True

    server.answers["/endless"] = answer
    assert "image_size_limit" in fetcher.refuse(url_origin(f"{server.url}/endless"))[0]


def test_full_disk(server: FileServer, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=True)
    try:
        fetcher = Fetcher(small / "store")
        server.files["/image"] = gzip.compress(small_tree(Entry("a", NOISE), Entry("b", NOISE[::-1])))
        text, kind = fetcher.refuse(url_origin(f"{server.url}/image"))
        assert f"the disk under {small}/store is full" in text
        assert kind == "TransientError"
        server.files["/little"] = small_tree()
        shutil.rmtree(fetcher.store.parts)
        fetcher.fetch(url_origin(f"{server.url}/little"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


# -- archives on this machine --------------------------------------------------------------------------------


def find_archive(path: Path) -> Origin | None:
    fd = os.open(path, os.O_PATH)
    try:
        return nspawn.images.find_archive(Image(path, is_directory=path.is_dir(), fd=fd))
    finally:
        os.close(fd)


def archive_origin(path: Path) -> Origin:
    origin = find_archive(path)
    assert origin
    return origin


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
def test_archive(fetcher: Fetcher, tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(compress(small_tree()))
    (name,) = fetcher.fetch(archive_origin(path)).layers
    assert name == tar_name(small_tree())
    assert path.exists()


def test_another_archive_of_the_same_name(fetcher: Fetcher, tmp_path: Path) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(small_tree())
    first = archive_origin(path)
    assert archive_origin(path) == first
    path.write_bytes(small_tree(Entry("more")))
    assert archive_origin(path).key != first.key


def test_an_archive_that_becomes_a_link(fetcher: Fetcher, tmp_path: Path) -> None:
    """A task of the same allocation can exchange the file after it has been looked at."""
    path, secret = tmp_path / "image.tar", tmp_path / "secret.tar"
    for file in (path, secret):
        file.write_bytes(small_tree())
    origin = archive_origin(path)
    path.unlink()
    path.symlink_to(secret)
    text, _ = fetcher.refuse(origin)
    assert "has become something else" in text
    path.unlink()
    os.mkfifo(path)
    assert "has become something else" in fetcher.refuse(origin)[0]


@pytest.mark.parametrize("name", ["image.raw", "image"])
def test_disk_images_are_no_archives(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(4096))
    assert find_archive(path) is None
    assert find_archive(tmp_path) is None
