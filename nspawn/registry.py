# SPDX-License-Identifier: MPL-2.0
"""Pulling from OCI and Docker registries, and images that were saved to an archive.

Manifests, configurations and layers that do not match their digests are refused. Layers come from the registry,
never from an address that an image names. Of an archive, only what was unpacked from it is read.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import json
import os
import re
import stat
import subprocess
import urllib.error
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nspawn.checks import name_registry
from nspawn.common import SAFE_PATH, DriverError, HostError, TransientError, quote, shorten
from nspawn.download import MAX_DOCUMENT, Client, Download, basic, discard, explain_status, hash_file, too_large
from nspawn.images import DIGEST, ImageConfig, Reference
from nspawn.linux import open_in_root

CERTIFICATES = Path("/etc/docker/certs.d")  # docker's directory for the certificates of single registries
MAX_LAYERS = 400  # the kernel stacks 500
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
LAYERS = re.compile(
    r"application/vnd\.(docker\.image\.rootfs\.diff\.tar(\.gzip|\.zstd)?|oci\.image\.layer\.v1\.tar(\+gzip|\+zstd)?)"
)
MACHINES = {
    "x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "ppc64le": "ppc64le",
    "s390x": "s390x", "riscv64": "riscv64", "loongarch64": "loong64",
}  # fmt: skip


def is_loopback(host: str) -> bool:
    name = re.sub(r":\d+$", "", host).strip("[]")
    if name.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False


@dataclass(frozen=True)
class Credentials:
    username: str = ""
    password: str = ""
    token: str = ""  # an identity token, instead of both

    @property
    def header(self) -> dict[str, str]:
        return {"Authorization": basic(self.username, self.password)} if self.username or self.password else {}


def find_credentials(host: str, request: Mapping[str, Any]) -> Credentials:
    """Return the job's credentials, or the operator's for this registry, or empty ones. Raises HostError."""
    if request.get("username") or request.get("password"):
        return Credentials(request.get("username") or "", request.get("password") or "")
    config = read_docker_config(request.get("auth_config") or "")
    names = [host, f"https://{host}", f"http://{host}"]
    if host == "docker.io":
        names = ["https://index.docker.io/v1/", "index.docker.io", *names]
    helpers = config.get("credHelpers") or {}
    helper = next((helpers[name] for name in names if name in helpers), "")
    helper = helper or request.get("auth_helper") or config.get("credsStore") or ""
    if helper and (found := ask_helper(str(helper), names[0])):
        return found
    for name in names:
        entry = (config.get("auths") or {}).get(name)
        if not isinstance(entry, dict):
            continue
        if entry.get("identitytoken"):
            return Credentials(token=entry["identitytoken"])
        if entry.get("auth"):
            username, _, password = decode_auth(name, entry["auth"]).partition(":")
            return Credentials(username, password.rstrip("\0"))
    return Credentials()


def decode_auth(name: str, auth: object) -> str:
    try:
        return base64.b64decode(str(auth), validate=True).decode()
    except ValueError:  # binascii.Error and UnicodeDecodeError are ones
        rule = "is damaged: it must be base64 of USER:PASSWORD; log in again"
        raise HostError(f"the auth of {quote(name)} in the file of registry credentials {rule}") from None


def read_docker_config(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise HostError(f"the file of registry credentials {path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def ask_helper(name: str, host: str) -> Credentials | None:
    """Return what docker-credential-NAME knows of a registry, None if nothing. Raises HostError."""
    argv = [f"docker-credential-{name}", "get"]
    environ = {"PATH": SAFE_PATH, "HOME": "/root", "LANG": "C.UTF-8"}
    try:
        done = subprocess.run(argv, input=host.encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env=environ, timeout=60, check=False)  # fmt: skip
        found = json.loads(done.stdout) if done.returncode == 0 else None
        if not found:
            return None
        if found["Username"] == "<token>":
            return Credentials(token=found["Secret"])
        return Credentials(found["Username"], found["Secret"])
    except FileNotFoundError:
        raise HostError(f"the credential helper {argv[0]} is not in {SAFE_PATH}") from None
    except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        raise HostError(f"the credential helper {argv[0]} gives no usable answer") from None


def find_mirrors(host: str, mirrors: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """Return the mirrors to ask before a registry."""
    return mirrors.get(name_registry(host), mirrors.get("*", ()))


class Registry:
    """One repository of a registry, with the authorization that it asked for. A `mirror`, HOST[:PORT][/PREFIX],
    stands for the registry, and has its repositories below the prefix."""

    def __init__(
        self, client: Client, reference: Reference, credentials: Credentials, is_plain: bool, mirror: str = ""
    ) -> None:
        self.client, self.reference, self.credentials = client, reference, credentials
        self.place = mirror or reference.host
        host, _, prefix = (mirror or reference.server).partition("/")
        self.host = host
        self.name = f"{prefix}/{reference.name}" if prefix else reference.name
        # As containerd asks its mirrors: one cache can serve several registries by this.
        self.query = f"?ns={urllib.parse.quote(reference.host)}" if mirror else ""
        self.schemes = ("http",) if is_plain else ("https", "http") if is_loopback(host) else ("https",)
        self.authorization: dict[str, str] = {}

    @property
    def server(self) -> str:
        return f"{self.schemes[0]}://{self.host}"

    def url(self, path: str) -> str:
        return f"{self.server}/v2/{self.name}/{path}{self.query}"

    def retrying(self, act: Callable[[], Any]) -> Any:
        """Call `act` and return its result. Authorize and repeat it if it is refused; repeat it with http if a
        registry on this machine has no https. Raises DriverError."""
        for attempt in range(4):  # a token may have expired since the last request
            try:
                done = act()
                self.schemes = self.schemes[:1]
                return done
            except urllib.error.HTTPError as error:
                if error.code != 401 or attempt > 1:
                    raise explain_status(error, self.shown) from None
                self.authorize(error.headers.get_all("WWW-Authenticate") or [])
            except TransientError:
                if len(self.schemes) < 2 or self.authorization:
                    raise
                self.schemes = self.schemes[1:]
        raise AssertionError

    @property
    def shown(self) -> str:
        version = f"@{self.reference.digest}" if self.reference.digest else f":{self.reference.tag}"
        return f"{self.place}/{self.reference.name}{version}"

    def authorize(self, challenges: Sequence[str]) -> None:
        for challenge in challenges:
            scheme, _, rest = challenge.partition(" ")
            values = dict(re.findall(r'\b(\w{1,50})="([^"]*)"', rest[:8192]))
            if scheme.lower() == "bearer" and values.get("realm"):
                self.authorization = {"Authorization": f"Bearer {self.fetch_token(values)}"}
                return
            if scheme.lower() == "basic" and self.credentials.header:
                self.authorization = self.credentials.header
                return
        raise DriverError(f"{self.shown} needs credentials; give them in auth, or in the plugin's block")

    def fetch_token(self, challenge: Mapping[str, str]) -> str:
        realm = challenge["realm"]
        if self.schemes[0] == "https" and not realm.lower().startswith("https://"):
            raise DriverError(f"the registry {self.host} asks to send credentials without encryption")
        query = {key: challenge[key] for key in ("service", "scope") if challenge.get(key)}
        query.setdefault("scope", f"repository:{self.name}:pull")
        try:
            if self.credentials.token:
                form = {**query, "grant_type": "refresh_token", "refresh_token": self.credentials.token,
                        "client_id": "nomad-driver-nspawn"}  # fmt: skip
                data, _ = self.client.read(realm, {}, form)
            else:
                separator = "&" if "?" in realm else "?"
                address = f"{realm}{separator}{urllib.parse.urlencode(query)}"
                data, _ = self.client.read(address, self.credentials.header)
        except urllib.error.HTTPError as error:
            raise explain_status(error, self.shown) from None
        answer = parse_json(data, "the registry's token")
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise DriverError(f"the registry {self.host} gives no token")
        return token

    def read_manifest(self, version: str) -> tuple[dict[str, Any], str]:
        """Return a manifest or an index, with its `mediaType` set, and its digest."""
        accept = {"Accept": ", ".join(MANIFESTS + INDEXES)}
        data, headers = self.retrying(
            lambda: self.client.read(self.url(f"manifests/{version}"), {**accept, **self.authorization})
        )
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        wanted = version if DIGEST.fullmatch(version) else headers.get("Docker-Content-Digest") or digest
        if digest != wanted:
            raise DriverError(f"{self.shown}: the registry sends a manifest of another digest ({digest})")
        manifest = parse_json(data, "the manifest")
        kind = manifest.get("mediaType") or headers.get_content_type()
        if "manifests" in manifest:
            kind = INDEXES[0]
        elif kind not in MANIFESTS and not ("layers" in manifest and "config" in manifest):
            raise DriverError(f"{self.shown} is no image of file system layers (it is {shorten(str(kind))})")
        return {**manifest, "mediaType": kind}, digest

    def read_config(self, descriptor: Mapping[str, Any]) -> dict[str, Any]:
        digest = want_digest(descriptor)
        data, _ = self.retrying(lambda: self.client.read(self.url(f"blobs/{digest}"), self.authorization))
        if "sha256:" + hashlib.sha256(data).hexdigest() != digest:
            raise DriverError(f"{self.shown}: the image's configuration has another digest than its manifest says")
        return parse_json(data, "the image's configuration")

    def check_access(self, descriptor: Mapping[str, Any]) -> None:
        """Raise DriverError unless the registry gives this job a layer. Asks for the first byte: a server that it
        redirects to may allow only GET."""
        url = self.url(f"blobs/{want_digest(descriptor)}")
        self.retrying(lambda: self.client.open(url, {"Range": "bytes=0-0", **self.authorization}).close())

    def download(self, descriptor: Mapping[str, Any], part: Path, limit: int, what: str) -> None:
        """Fetch a layer. Raises DriverError if its digest or size is not what the manifest says."""
        digest, size = want_digest(descriptor), want_size(descriptor, limit)
        blob = Download(self.client, self.url(f"blobs/{digest}"), part, limit=size, is_fixed=True, what=what)
        self.retrying(lambda: blob.run(lambda: self.authorization))
        if blob.size != size or "sha256:" + hash_file(part, "sha256") != digest:
            discard(part)
            raise DriverError(
                f"{self.shown}: a layer has another digest or size than the manifest says ({digest})"
            )


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DriverError(f"{what} is not the JSON it should be")
    return found


def want_digest(descriptor: object) -> str:
    digest = descriptor.get("digest") if isinstance(descriptor, dict) else None
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise DriverError(f"the manifest has a digest that is none: {shorten(repr(digest))}")
    return digest


def want_size(descriptor: Mapping[str, Any], limit: int) -> int:
    size = descriptor.get("size")
    if not isinstance(size, int) or not 0 <= size <= limit:
        raise too_large(f"a layer has {shorten(str(size))} bytes", limit)
    return size


@dataclass(frozen=True)
class Platform:
    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Parse linux/arm64/v8 or arm64; "" means this machine's platform."""
        if not text:
            machine = os.uname().machine
            return cls("linux", MACHINES.get(machine, machine), {"armv7l": "v7", "armv6l": "v6"}.get(machine, ""))
        parts = text.split("/")
        return cls(*parts) if 2 <= len(parts) <= 3 else cls("linux", text)

    @classmethod
    def read(cls, found: object) -> Platform:
        values = found if isinstance(found, dict) else {}
        return cls(*(str(values.get(key) or "") for key in ("os", "architecture", "variant")))

    def fits(self, wanted: Platform) -> bool:
        return (self.os, self.architecture) == (wanted.os, wanted.architecture) and (
            not wanted.variant or not self.variant or self.variant == wanted.variant
        )

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


def choose_manifest(index: Mapping[str, Any], wanted: Platform, shown: str) -> str:
    manifests = index["manifests"]
    entries = [entry for entry in manifests if isinstance(entry, dict)] if isinstance(manifests, list) else []
    platforms = [(Platform.read(entry.get("platform")), entry) for entry in entries]
    for platform, entry in platforms:
        if platform.fits(wanted):
            return want_digest(entry)
    there = ", ".join(str(platform) for platform, _ in platforms if platform.os != "unknown")
    raise DriverError(f"{shown} is there for {shorten(there) or 'no platform'}, not for {wanted}")


def check_platform(config: Mapping[str, Any], wanted: Platform, shown: str) -> None:
    platform = Platform.read(config)
    if platform.architecture and not platform.fits(wanted):
        raise DriverError(f"{shown} is there for {shorten(str(platform))}, not for {wanted}")


def read_layer_names(config: Mapping[str, Any], count: int, shown: str) -> list[str]:
    """Return the store's names of an image's layers, the lowest first. They hold the digests of the decompressed
    layers. Raises DriverError."""
    rootfs = config.get("rootfs")
    ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(ids, list) or len(ids) != count:
        raise DriverError(f"{shown} is no image of file system layers")
    if count > MAX_LAYERS:
        raise DriverError(f"{shown} has {count} layers; {MAX_LAYERS} can be stacked")
    return ["layer-" + want_digest({"digest": diff_id}).partition(":")[2] for diff_id in ids]


def clean(value: object) -> str:
    """Return a text that can be passed to a program, "" for all else: JSON may hold NUL and lone surrogates."""
    return value if isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value) else ""


def read_image_config(config: Mapping[str, Any]) -> ImageConfig:
    """Return what an image says about how to run it. A value of the wrong type counts as missing."""
    inner = config.get("config")
    inner = inner if isinstance(inner, dict) else {}

    def text(name: str) -> str:
        return clean(inner.get(name))

    def words(name: str) -> tuple[str, ...]:
        value = inner.get(name)
        is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return tuple(item for item in value or () if item == clean(item)) if is_list else ()

    return ImageConfig(
        env=tuple(item for item in words("Env") if "=" in item),
        entrypoint=words("Entrypoint"),
        cmd=words("Cmd"),
        user=text("User"),
        working_directory=os.path.join("/", text("WorkingDir")) if text("WorkingDir") else "",
        stop_signal=text("StopSignal"),
    )


class Saved:
    """An unpacked archive that may be an image of layers (`is_there`). `shown` is its name for people."""

    def __init__(self, tree: Path, shown: str) -> None:
        self.tree, self.shown = tree, shown

    @property
    def is_there(self) -> bool:
        return not (self.tree / "usr").exists() and any(map(self.has, ("manifest.json", "index.json")))

    def has(self, name: str) -> bool:
        return os.path.lexists(self.tree / name)

    def find(self, name: object) -> Path:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, ValueError):
            root = os.open(self.tree, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, root)
            fd = open_in_root(root, str(name), os.O_PATH)
            stack.callback(os.close, fd)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return Path(os.readlink(f"/proc/self/fd/{fd}"))
        raise DriverError(f"{self.shown} is no whole image: it lacks {shorten(ascii(name))}")

    def read(self, name: object) -> Any:
        with open(self.find(name), "rb") as file, contextlib.suppress(ValueError, RecursionError):
            return json.loads(file.read(MAX_DOCUMENT))
        raise DriverError(f"{self.shown} is no whole image: {shorten(ascii(name))} is not the JSON it should be")

    def parts(self) -> tuple[dict[str, Any], list[Path]]:
        """Return the image's configuration, and the files of its layers, the lowest first. Raises DriverError."""
        config, layers = self.read_docker() if self.has("manifest.json") else self.read_layout()
        found = self.read(config)
        if not isinstance(found, dict) or not isinstance(layers, list):
            raise DriverError(f"{self.shown} is no image of file system layers")
        return found, [self.find(layer) for layer in layers]

    def read_docker(self) -> tuple[object, object]:
        images = self.read("manifest.json")
        if not isinstance(images, list) or len(images) != 1 or not isinstance(images[0], dict):
            raise DriverError(f"{self.shown} must hold one image; save each into an archive of its own")
        return images[0].get("Config"), images[0].get("Layers")

    def read_layout(self) -> tuple[object, object]:
        found, levels = self.read("index.json"), 0
        while isinstance(found, dict) and isinstance(found.get("manifests"), list) and levels < 3:
            entries, levels = found["manifests"], levels + 1
            if len(entries) != 1:  # a single one may lack its platform
                entries = [{"digest": choose_manifest(found, Platform.parse(""), self.shown)}]
            found = self.read(blob_path(entries[0]))
        if not isinstance(found, dict) or not isinstance(found.get("layers"), list):
            raise DriverError(f"{self.shown} is no image of file system layers")
        return blob_path(found.get("config")), [blob_path(layer) for layer in found["layers"]]


def blob_path(descriptor: object) -> str:
    return "blobs/" + want_digest(descriptor).replace(":", "/")
