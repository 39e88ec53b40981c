# SPDX-License-Identifier: MPL-2.0
"""Servers on loopback that images are fetched from: files with every fault a network has, and a real registry."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

DOCKER_IMAGE = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- files ---------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """A request that came."""

    path: str
    headers: Mapping[str, str]


Answer = Callable[[BaseHTTPRequestHandler], None]
Server = TypeVar("Server", bound="FileServer")


class FileServer:
    """Serves bytes by path, with ranges and ETags. `answers` stand above them, for all that can go wrong."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, Answer] = {}
        self.seen: list[Seen] = []
        self.authorization = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.seen.append(Seen(self.path, dict(self.headers)))
                with contextlib.suppress(ConnectionError):
                    outer.answer(self)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
            daemon_threads = True

        self.server = Listener((address, 0), Handler)
        self.port = self.server.server_port
        self.url = f"http://[{address}]:{self.port}" if ":" in address else f"http://{address}:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if path in self.answers:
            self.answers[path](request)
        elif self.authorization and request.headers.get("Authorization") != self.authorization:
            send(request, 401)
        elif path in self.files:
            self.send_file(request, self.files[path])
        else:
            send(request, 404)

    def send_file(self, request: BaseHTTPRequestHandler, data: bytes) -> None:
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and request.headers.get("If-Range", tag) == tag else 0
        headers = {"ETag": tag}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        send(request, 206 if start else 200, data[start:], headers)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self: Server) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def send(
    request: BaseHTTPRequestHandler, status: int, data: bytes = b"", headers: Mapping[str, str] | None = None
) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(data)


def redirect(to: str) -> Answer:
    return lambda request: send(request, 302, b"", {"Location": to})


def status(code: int) -> Answer:
    return lambda request: send(request, code)


def cut_off(data: bytes, at: int, *, times: int = 1 << 30, tag: str = '"t"') -> Answer:
    """Break the connection after `at` more bytes, the first `times` times; ranges are honoured."""
    left = [times]

    def answer(request: BaseHTTPRequestHandler) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("ETag", tag)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        left[0] -= 1
        request.wfile.write(data[start : start + at] if left[0] >= 0 else data[start:])
        request.close_connection = True

    return answer


def stall(data: bytes, at: int) -> Answer:
    """Send a part, then nothing, and keep the connection."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[:at])
        request.wfile.flush()
        with contextlib.suppress(OSError):
            request.connection.settimeout(120)
            request.connection.recv(1)  # until the client goes

    return answer


# -- archives ------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """An entry of an archive. `kind` is tarfile's type."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    target: str = ""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    pax: dict[str, str] = field(default_factory=dict)
    device: tuple[int, int] = (0, 0)


def folder(name: str, mode: int = 0o755, **more: Any) -> Entry:
    return Entry(name, kind=tarfile.DIRTYPE, mode=mode, **more)


def link(name: str, target: str) -> Entry:
    return Entry(name, kind=tarfile.SYMTYPE, target=target)


def hard_link(name: str, target: str) -> Entry:
    return Entry(name, kind=tarfile.LNKTYPE, target=target)


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True, timeout=60).stdout


def make_tar(entries: Sequence[Entry]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.linkname, info.mode = entry.kind, entry.target, entry.mode
            info.uid, info.gid, info.size, info.mtime = entry.uid, entry.gid, len(entry.data), 1_600_000_000
            info.pax_headers = dict(entry.pax)
            info.devmajor, info.devminor = entry.device
            archive.addfile(info, io.BytesIO(entry.data))
    return buffer.getvalue()


def pack_files(files: Mapping[str, Any]) -> bytes:
    """Archive entries as they are, blobs, and all else as JSON."""

    def entry(name: str, item: object) -> Entry:
        if isinstance(item, Entry):
            return item
        return Entry(name, item.data if isinstance(item, Blob) else json.dumps(item).encode())

    return make_tar([entry(name, item) for name, item in files.items()])


def pack_tree(tree: Path) -> bytes:
    """Archive a directory as `tar` does it."""
    done = subprocess.run(
        ["tar", "--numeric-owner", "--sort=name", "-cf", "-", "-C", str(tree), "."],
        stdout=subprocess.PIPE, check=True, timeout=300,
    )  # fmt: skip
    return done.stdout


def make_deep(top: Path, levels: int) -> None:
    """Make a directory with so many levels below it, and a file in each."""
    top.mkdir(parents=True)
    here = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d" * 100, dir_fd=here)
        os.close(os.open("file", os.O_CREAT, dir_fd=here))
        inner = os.open("d" * 100, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)


# -- a registry ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    data: bytes
    media_type: str = DOCKER_LAYER

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.data).hexdigest()

    @property
    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "size": len(self.data), "digest": self.digest}


@dataclass
class ImageParts:
    """An image for a registry, to be spoilt before it is pushed."""

    layers: list[Blob]
    config: dict[str, Any]
    manifest: dict[str, Any]

    @classmethod
    def make(cls, tars: Sequence[bytes], architecture: str = "", **config: Any) -> ImageParts:
        blobs = [Blob(gzip.compress(tar, 1, mtime=0)) for tar in tars]
        return cls.of_blobs(blobs, tars, architecture, **config)

    @classmethod
    def of_blobs(
        cls, blobs: Sequence[Blob], tars: Sequence[bytes], architecture: str = "", **config: Any
    ) -> ImageParts:
        document = {
            "architecture": architecture or native(),
            "os": "linux",
            "config": config,
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars],
            },
        }
        parts = cls(list(blobs), document, {})
        parts.describe()
        return parts

    def describe(self) -> None:
        self.manifest = {
            "schemaVersion": 2,
            "mediaType": DOCKER_IMAGE,
            "config": self.config_blob.descriptor,
            "layers": [layer.descriptor for layer in self.layers],
        }

    def save(self) -> dict[str, Any]:
        """The files of an archive as `docker save` makes it."""
        names = [f"{number}/layer.tar" for number in range(len(self.layers))]
        files: dict[str, Any] = {"config.json": self.config, **dict(zip(names, self.layers, strict=True))}
        return {**files, "manifest.json": [{"Config": "config.json", "RepoTags": ["x:1"], "Layers": names}]}

    def lay_out(self) -> dict[str, Any]:
        """The files of an OCI layout, with an index in the index as buildx makes it."""
        manifest = Blob(json.dumps(self.manifest).encode())
        about = [{"os": "unknown", "architecture": "unknown"}, {"os": "linux", "architecture": native()}]
        entries = [{**manifest.descriptor, "platform": platform} for platform in about]
        inner = Blob(json.dumps({"mediaType": DOCKER_INDEX, "manifests": entries}).encode())
        blobs = {blob.digest.replace("sha256:", "blobs/sha256/"): blob for blob in
                 (*self.layers, self.config_blob, manifest, inner)}  # fmt: skip
        return {**blobs, "oci-layout": {}, "index.json": {"manifests": [inner.descriptor]}}

    @property
    def config_blob(self) -> Blob:
        return Blob(json.dumps(self.config).encode(), DOCKER_CONFIG)


class Liar(FileServer):
    """A registry of files: every manifest, blob and header is the test's."""

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def serve(self, image: ImageParts, name: str = "x", tag: str = "latest") -> None:
        self.files[f"/v2/{name}/manifests/{tag}"] = json.dumps(image.manifest).encode()
        for blob in (*image.layers, image.config_blob):
            self.files[f"/v2/{name}/blobs/{blob.digest}"] = blob.data


def native() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


# bcrypt of "secret"
PASSWORD_HASH = "$2b$04$memBH7.2Biy.yGmA1vI.wexKy6PL/5kQ.QVcI6fnoawUjWn9ohqs."


class Registry:
    """Debian's docker-registry, the reference implementation of the protocol."""

    def __init__(self, directory: Path, auth: Mapping[str, Any] | None = None, tls: bool = False) -> None:
        binary = shutil.which("docker-registry")
        assert binary, "docker-registry is missing: install the package docker-registry"
        self.port = free_port()
        self.host = f"localhost:{self.port}"
        self.directory = directory
        self.headers: dict[str, str] = {}
        self.certificate = directory / "registry.crt"
        directory.mkdir(parents=True, exist_ok=True)
        http: dict[str, Any] = {"addr": f"127.0.0.1:{self.port}"}
        if tls:
            make_certificate(self.certificate, directory / "registry.key")
            http["tls"] = {"certificate": str(self.certificate), "key": str(directory / "registry.key")}
        config = {
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": str(directory / "data")}},
            "http": http,
            "log": {"level": "error"},
            **({"auth": auth} if auth else {}),
        }
        (directory / "config.yml").write_text(json.dumps(config))  # JSON is YAML
        self.scheme = "https" if tls else "http"
        with open(directory / "log", "w") as log:
            self.process = subprocess.Popen(
                [binary, "serve", str(directory / "config.yml")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            assert self.process.poll() is None, (self.directory / "log").read_text()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            assert time.monotonic() < deadline, "docker-registry does not come up"
            time.sleep(0.05)

    def call(self, method: str, path: str, data: bytes | None = None, **headers: str) -> Any:
        import ssl

        url = path if "://" in path else f"{self.scheme}://{self.host}{path}"
        request = urllib.request.Request(url, data=data, method=method, headers={**self.headers, **headers})
        context = ssl.create_default_context(cafile=str(self.certificate)) if self.scheme == "https" else None
        return urllib.request.urlopen(request, timeout=30, context=context)

    def push_blob(self, name: str, blob: Blob) -> None:
        with self.call("POST", f"/v2/{name}/blobs/uploads/") as response:
            place = response.headers["Location"]
        separator = "&" if "?" in place else "?"
        kind = {"Content-Type": "application/octet-stream"}
        self.call("PUT", f"{place}{separator}digest={blob.digest}", blob.data, **kind).close()

    def push_manifest(self, name: str, tag: str, manifest: Mapping[str, Any]) -> str:
        data = json.dumps(manifest).encode()
        kind = {"Content-Type": str(manifest["mediaType"])}
        self.call("PUT", f"/v2/{name}/manifests/{tag}", data, **kind).close()
        return "sha256:" + hashlib.sha256(data).hexdigest()

    def push(self, name: str, image: ImageParts, tag: str = "latest") -> str:
        for blob in (*image.layers, image.config_blob):
            self.push_blob(name, blob)
        return self.push_manifest(name, tag, image.manifest)

    def damage(self, digest: str, data: bytes) -> None:
        """Exchange what the registry keeps under a digest."""
        hexadecimal = digest.partition(":")[2]
        (path,) = (self.directory / "data").rglob(f"sha256/{hexadecimal[:2]}/{hexadecimal}/data")
        path.write_bytes(data)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


MIRROR = """\
daemon off;
user root;
pid {directory}/pid;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/temp;
    proxy_cache_path {directory}/cache keys_zone=images:1m;
    server {{
        listen 127.0.0.1:{port};
        location /v2/ {{
            proxy_pass {upstream};
            proxy_cache images;
            proxy_cache_key $uri;
            proxy_cache_valid 200 1h;
            proxy_cache_lock on;  # who asks for what is being fetched waits for it
            proxy_cache_lock_age 10m;
            proxy_cache_lock_timeout 10m;
        }}
    }}
}}
"""


class CachingMirror:
    """Debian's nginx as a mirror of a registry, which fetches a layer once for all who want it at a time."""

    def __init__(self, directory: Path, upstream: str) -> None:
        binary = shutil.which("nginx")
        assert binary, "nginx is missing: install the package nginx-light"
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        directory.mkdir(parents=True)
        config, log = directory / "nginx.conf", directory / "log"
        config.write_text(MIRROR.format(directory=directory, port=self.port, upstream=upstream))
        argv = [binary, "-c", str(config), "-e", str(log)]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.05)

    def __enter__(self) -> CachingMirror:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait(10)


def make_certificate(certificate: Path, key: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
         "3650", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout",
         str(key), "-out", str(certificate)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, timeout=60,
    )  # fmt: skip


def basic_auth(directory: Path) -> dict[str, Any]:
    """The registry's configuration for a user "ci" with the password "secret"."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "htpasswd").write_text(f"ci:{PASSWORD_HASH}\n")
    return {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}


def basic(username: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


class TokenServer:
    """Gives tokens that the registry takes, to the user "ci" with the password "secret"."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.key, self.certificate = directory / "token.key", directory / "token.crt"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650", "-subj", "/CN=tokens",
             "-keyout", str(self.key), "-out", str(self.certificate)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, timeout=60,
        )  # fmt: skip
        self.server = FileServer()
        self.server.answers["/token"] = self.answer
        self.lifetime = 300
        self.given = 0

    @property
    def auth(self) -> dict[str, Any]:
        realm = {"realm": f"{self.server.url}/token", "service": "registry", "issuer": "tests"}
        return {"token": {**realm, "rootcertbundle": str(self.certificate)}}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.headers.get("Authorization") != basic("ci", "secret"):
            send(request, 401)
            return
        scope = re.search(r"scope=repository(?:%3A|:)([^&]*?)(?:%3A|:)pull", request.path)
        name = scope[1].replace("%2F", "/") if scope else ""
        self.given += 1
        send(request, 200, json.dumps({"token": self.make(name, ["pull"])}).encode())

    def make(self, name: str, actions: Sequence[str]) -> str:
        der = subprocess.run(
            ["openssl", "x509", "-in", str(self.certificate), "-outform", "DER"],
            stdout=subprocess.PIPE, check=True, timeout=60,
        ).stdout  # fmt: skip
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        now = int(time.time())
        claims = {
            "iss": "tests", "sub": "ci", "aud": "registry", "exp": now + self.lifetime, "nbf": now - 60,
            "iat": now, "jti": os.urandom(8).hex(),
            "access": [{"type": "repository", "name": name, "actions": list(actions)}],
        }  # fmt: skip
        signed = b".".join(encode_part(json.dumps(part).encode()) for part in (header, claims))
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self.key)],
            input=signed, stdout=subprocess.PIPE, check=True, timeout=60,
        ).stdout  # fmt: skip
        return (signed + b"." + encode_part(signature)).decode()

    def close(self) -> None:
        self.server.close()


def encode_part(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
