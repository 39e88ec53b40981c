# SPDX-License-Identifier: MPL-2.0
"""The short-lived process that fetches an image into the store; `Fetches` of nspawn/store.py starts it.

It holds the lock of the image's key all along: a second process for the same image waits, and then finds it. It
shares the locks of the layers: no layer is collected meanwhile, and nobody waits for another image's download,
which a stranger could make last forever.

skopeo and umoci would be five more packages on every client (23 MB on Debian 12) and would replace registry.py
alone. umoci unpacks all layers of an image into one tree, so images could not share them, and archives and
addresses need the rest anyway.

Nothing from outside is trusted: addresses, redirects, sizes, names, links. A thing gets its name in the store when
it is complete and its digest is right, never before.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nspawn.common import DriverError, TransientError, shorten
from nspawn.download import (
    Client,
    Download,
    check_checksum,
    check_published,
    discard,
    explain_status,
    explaining,
    hash_file,
    start_tool,
    tell,
    telling,
    too_large,
    work_ahead,
)
from nspawn.files import remove_tree
from nspawn.images import Reference, redact
from nspawn.process import run
from nspawn.registry import (
    CERTIFICATES,
    INDEXES,
    LAYERS,
    Credentials,
    Platform,
    Registry,
    Saved,
    check_platform,
    choose_manifest,
    find_credentials,
    find_mirrors,
    read_image_config,
    read_layer_names,
    want_digest,
    want_size,
)
from nspawn.signature import check_signature
from nspawn.store import Retention, Store, StoredImage
from nspawn.unpack import MeteredStream, Room, Unpacker, copy_sparse, decompressed

LAYERS_AT_ONCE = 4  # downloads of one image; as many layers wait on disk until they are unpacked
MAX_MEMORY = 1 << 30  # bytes of address space: an archive's headers and dictionaries can ask for any amount


@contextlib.contextmanager
def hold(store: Store, name: str, *, alone: bool = False) -> Iterator[None]:
    """Wait for a lock and hold it."""
    with telling():
        while (fd := store.try_lock(name, alone=alone)) is None:
            time.sleep(0.1)
    try:
        yield
    finally:
        os.close(fd)


@dataclass
class Fetch:
    """One request. `values` is what the plugin says about the image."""

    store: Store
    values: Mapping[str, Any]
    limit: int = 0
    client: Client = field(init=False)
    work: Path = field(init=False)
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    brought: set[tuple[str, str]] = field(default_factory=set)  # digests and names of layers that came this time
    room: Room = field(init=False)
    retention: Retention = field(init=False)

    def __post_init__(self) -> None:
        self.limit = int(self.values["limit"])
        self.room = Room(self.limit)
        self.retention = Retention.parse(self.values["retention"])
        self.client = Client(float(self.values["stall"]))
        self.work = self.store.work / self.key

    @property
    def key(self) -> str:
        return str(self.values["key"])

    def keep(self, name: str, *, alone: bool = False) -> None:
        """Wait for a lock and hold it until the image is in the store."""
        self.held.enter_context(hold(self.store, name, alone=alone))

    def run(self) -> StoredImage:
        self.store.prepare()
        with self.held:
            self.keep(self.key, alone=True)
            found = self.store.read(self.key)
            if found and not self.is_old(found):
                return found
            self.remove_work()
            try:
                self.work.mkdir(mode=0o700)
                image = self.fetch(found)
            except TransientError as error:
                if not found or self.values["force"]:
                    raise
                tell(note=f"{error}; the copy of {found.name} that is here already is used")
                image = found
            except DriverError:
                self.discard_parts()  # never resume what is wrong
                raise
            finally:
                self.remove_work()
            self.store.write(image)
            return image

    def remove_work(self) -> None:
        with telling():
            remove_tree(self.work)

    def discard_parts(self) -> None:
        for path in self.store.parts.glob(f"{self.key}*"):
            path.unlink()

    def is_old(self, found: StoredImage) -> bool:
        """Whether to ask the image's source again; not if somebody did while this waited."""
        return bool(self.values["force"] or self.values["refresh"]) and found.checked_at < self.values["asked_at"]

    def fetch(self, found: StoredImage | None) -> StoredImage:
        kind = self.values["type"]
        if kind == "docker":
            return self.fetch_docker(found)
        path = Path(self.values["address"]) if kind == "archive" else self.download()
        if kind == "archive":
            path = self.hold_archive(path)
        self.make_room(path.stat().st_size)
        image = self.image((self.convert(path),)) if kind == "raw" else self.load(path)
        self.discard_parts()
        return image

    def make_room(self, size: int) -> None:
        """Remove images if the store would be too large with as many bytes more. They take more when unpacked, so
        the plugin looks again afterwards."""
        if self.retention.max_size:
            with telling():
                self.store.collect(self.retention, size)

    def measure(self, layer: str) -> int:
        """Return the bytes on disk of a layer that is there."""
        with telling():
            return self.store.read_size(layer) or measure(self.store.layer(layer))

    def image(self, layers: tuple[str, ...], **more: Any) -> StoredImage:
        now = time.time()
        sizes = tuple(map(self.measure, layers))
        return StoredImage(self.key, self.values["name"], self.values["type"], layers, sizes, now, now, **more)

    def hold_archive(self, path: Path) -> Path:
        """Return a path that stays the archive's. Raises DriverError if something else has taken its place."""
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)  # not yet for reading: it may be a device
        if os.path.realpath(f"/proc/self/fd/{fd}") != str(path) or not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DriverError(f"{path} has become something else meanwhile")
        return Path(f"/proc/self/fd/{fd}")

    def download(self) -> Path:
        """Fetch what an address holds, check it, and return its file."""
        with explaining(self.values["address"]):
            parts = urllib.parse.urlsplit(self.values["address"])
        credentials = Credentials(self.values.get("username") or "", self.values.get("password") or "")
        if "@" in parts.netloc and not credentials.header:
            names = [urllib.parse.unquote(part or "") for part in (parts.username, parts.password)]
            credentials = Credentials(*names)
        url = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        part = self.store.part(self.key)
        file = Download(self.client, url, part, limit=self.limit)
        try:
            file.run(lambda: credentials.header)
        except urllib.error.HTTPError as error:
            raise explain_status(error, redact(url)) from None
        if self.values["checksum"]:
            check_checksum(part, self.values["checksum"])
        if self.values["verify"] != "no":
            check_published(self.client, url, credentials.header, part, self.values["verify"], self.work)
        return part

    def load(self, path: Path) -> StoredImage:
        """Bring what an archive holds into the store: a system's tree, or an image of layers."""
        tree = self.work / "tree"
        name = "tar-" + self.unpack(path, tree, Room(self.limit))
        saved = Saved(tree, self.values["name"])
        if not saved.is_there:
            self.commit(tree, name)
            return self.image((name,))
        config, blobs = saved.parts()
        check_platform(config, Platform.parse(""), saved.shown)
        layers = read_layer_names(config, len(blobs), saved.shown)
        for blob, layer in zip(blobs, layers, strict=True):
            self.keep(layer)
            self.bring_layer(blob, layer)
        return self.stack(layers, config)

    def stack(self, layers: Sequence[str], config: Mapping[str, Any], digest: str = "") -> StoredImage:
        """Return the image of these layers, given lowest first, with its configuration."""
        names = dict.fromkeys((*reversed(layers), self.make_skeleton()))  # overlayfs takes no layer twice
        return self.image(tuple(names), digest=digest, config=read_image_config(config))

    def unpack(self, path: Path, tree: Path, room: Room, wanted: str = "") -> str:
        """Unpack an archive to a new directory; return the digest of its decompressed bytes. With `wanted`, it is
        a layer and must have that digest."""
        tree.mkdir(mode=0o755)
        unpacker = Unpacker(tree, room, is_layer=bool(wanted))
        digest = ""
        # Suppress it out here, so that the tool ends first. Then the memory is free again.
        with contextlib.suppress(MemoryError), decompressed(path) as stream:
            digest = unpacker.run(stream)
        if not digest:
            raise DriverError("the archive needs more memory to unpack than it may have")
        if wanted:
            check_contents(digest, wanted)
        if unpacker.devices:
            tell(note=f"{unpacker.devices} device nodes of the archive were left out")
        return digest

    def convert(self, path: Path) -> str:
        """Make a raw disk image of a download, with holes, and commit it. Decompresses it, and converts qcow2."""
        name = f"{hash_file(path, 'sha256')}.raw"
        disk = self.work / "disk.raw"
        with decompressed(path) as stream, open(disk, "wb") as target:
            source = MeteredStream(stream, self.limit, "unpacking")
            copy_sparse(source, target)
        with open(disk, "rb") as file:
            head = file.read(32)
        if head.startswith(b"QFI\xfb"):
            size = int.from_bytes(head[24:32], "big")  # not the file's: it can name a cluster again and again
            if size > self.limit:
                raise too_large(f"the disk image has {size} bytes", self.limit)
            disk = convert_qcow2(disk, self.work)
        if disk.stat().st_size > self.limit:
            raise too_large(f"the disk image has {disk.stat().st_size} bytes", self.limit)
        check_disk(disk)
        disk.chmod(0o600)
        self.commit(disk, name)
        return name

    def commit(self, made: Path, name: str) -> None:
        """Give something complete its name in the store. What is there already is the same: names are digests."""
        self.keep(name)
        with telling():  # without the sync, a power failure might leave the name without the data
            run(["sync", "--file-system", str(made)], timeout=600)
            size = measure(made)
        target = self.store.layer(name)
        try:
            if not target.exists():
                (self.store.sizes / name).write_text(str(size))
                made.rename(target)
        except OSError:
            if not target.exists():
                raise

    def fetch_docker(self, found: StoredImage | None) -> StoredImage:
        reference = Reference.parse(self.values["address"])
        for mirror in find_mirrors(reference.host, self.values["mirrors"]):
            try:
                return self.fetch_image(self.open_registry(reference, mirror), found)
            except DriverError as error:
                tell(note=f"the mirror {mirror} is passed over: {error}")
                self.start_over()
        return self.fetch_image(self.open_registry(reference), found)

    def open_registry(self, reference: Reference, mirror: str = "") -> Registry:
        """Return an image's registry, or a mirror of it, which gets none of the job's credentials."""
        host = mirror.partition("/")[0] or reference.host
        certificates = sorted((CERTIFICATES / host).glob("*.crt"))
        client = Client(self.client.stall, certificates, is_mirror=bool(mirror))
        own = {"username": "", "password": ""} if mirror else {}
        credentials = find_credentials(host, {**self.values, **own})
        return Registry(client, reference, credentials, host in self.values["insecure"], mirror)

    def start_over(self) -> None:
        """Forget what a mirror has sent, but for the layers whose digests were right."""
        self.discard_parts()
        self.remove_work()
        self.work.mkdir(mode=0o700)
        self.room = Room(self.limit)

    def fetch_image(self, registry: Registry, found: StoredImage | None) -> StoredImage:
        wanted = Platform.parse(self.values.get("platform") or "")
        manifest, digest = registry.read_manifest(registry.reference.version)
        if self.values["signer"] and not (found and found.digest == digest):
            check_signature(registry, digest, self.values["signer"], self.work, self.client.stall)
        if manifest["mediaType"] in INDEXES:
            chosen = choose_manifest(manifest, wanted, registry.shown)
            manifest, _ = registry.read_manifest(chosen)
        if manifest["mediaType"] in INDEXES:
            raise DriverError(f"{registry.shown} is a list of lists of images")
        if found and found.digest == digest:
            return replace(found, checked_at=time.time())
        config = registry.read_config(manifest.get("config") or {})
        check_platform(config, wanted, registry.shown)
        return self.stack(self.fetch_layers(registry, manifest, config), config, digest)

    def make_skeleton(self) -> str:
        """Make the layer of directories that nspawn needs, which is the lowest, and return its name: an image may
        hold nothing but one program."""
        self.keep(SKELETON)
        if not self.store.layer(SKELETON).exists():
            tree = self.work / "skeleton"
            for name in ("alloc", "dev", "etc", "local", "proc", "run", "secrets", "sys", "tmp", "usr", "var"):
                (tree / name).mkdir(parents=True)
            (tree / "tmp").chmod(0o1777)
            self.commit(tree, SKELETON)
        return SKELETON

    def fetch_layers(
        self, registry: Registry, manifest: Mapping[str, Any], config: Mapping[str, Any]
    ) -> list[str]:
        """Bring an image's layers into the store; return their names, the lowest first."""
        descriptors = manifest.get("layers")
        if not isinstance(descriptors, list):
            raise DriverError(f"{registry.shown} is no image of file system layers")
        layers = read_layer_names(config, len(descriptors), registry.shown)
        for descriptor in descriptors:
            want_digest(descriptor)
            if not LAYERS.fullmatch(str(descriptor.get("mediaType"))) or descriptor.get("urls"):
                kind = shorten(str(descriptor.get("mediaType")))
                raise DriverError(f"{registry.shown} has a layer of a kind that is not fetched ({kind})")
        total = sum(want_size(descriptor, self.limit) for descriptor in descriptors)
        if total > self.limit:
            raise too_large(f"{registry.shown} has layers of {total} bytes", self.limit)
        once = {(want_digest(descriptor), name): descriptor
                for descriptor, name in zip(descriptors, layers, strict=True)}  # fmt: skip
        for digest, name in once:
            if find_proof(self.store, name, registry.server, digest).exists():  # it need not be downloaded
                self.keep(name)
        self.make_room(sum(want_size(descriptor, self.limit) for (_, name), descriptor in once.items()
                           if not self.store.layer(name).exists()))  # fmt: skip
        acts = [
            functools.partial(
                self.fetch_layer, copy.copy(registry), descriptor, name, f"layer {number} of {len(once)}"
            )
            for number, ((_, name), descriptor) in enumerate(once.items(), 1)
        ]
        work_ahead(acts, LAYERS_AT_ONCE, registry.client.stop, self.bring_fetched)
        return layers

    def fetch_layer(
        self, registry: Registry, descriptor: Mapping[str, Any], name: str, which: str
    ) -> FetchedLayer:
        """Fetch one layer, in a thread with a `registry` of its own.

        A layer that is in the store already may be another job's secret, but its digest is no secret. So the
        server that sent it must grant this job access to it. Any other server must send all of it. So must a
        server without encryption: nobody knows who answers there.
        """
        digest = want_digest(descriptor)
        proof = find_proof(self.store, name, registry.server, digest)
        if (digest, name) in self.brought:
            return FetchedLayer(name, digest, proof)
        if proof.exists() and registry.server.startswith("https://"):
            self.keep(name)
            if self.store.layer(name).exists():
                registry.check_access(descriptor)
                return FetchedLayer(name, digest, proof)
        # Each image has its own part: what another image has begun may be another job's secret, or nonsense.
        part = self.store.part(f"{self.key}.{digest.partition(':')[2]}.{name}")
        registry.download(descriptor, part, self.limit, f"downloading {which}")
        return FetchedLayer(name, digest, proof, part)

    def bring_fetched(self, layer: FetchedLayer) -> None:
        """Bring a layer into the store; only for its size, if it is there and this job may have it."""
        if layer.part is None:
            self.room.take(self.measure(layer.name))
            return
        try:
            self.keep(layer.name)  # not while it is downloaded: a server can make that last forever
            self.bring_layer(layer.part, layer.name)
        finally:
            discard(layer.part)
        layer.proof.touch(mode=0o600)
        self.brought.add((layer.digest, layer.name))

    def bring_layer(self, path: Path, name: str) -> None:
        """Unpack a layer into the store. If it is there already, check that `path` has the same contents."""
        wanted = name.partition("-")[2]
        if self.store.layer(name).exists():
            with decompressed(path) as stream:
                source = MeteredStream(stream, 2 * self.limit, "checking")
                source.drain()
            check_contents(source.digest.hexdigest(), wanted)
            self.room.take(self.measure(name))
            return
        tree = self.work / "layer"
        self.unpack(path, tree, self.room, wanted)
        self.commit(tree, name)
        with telling():
            remove_tree(tree)  # it is still there if another process was faster


@dataclass(frozen=True)
class FetchedLayer:
    name: str  # in the store
    digest: str  # of what was downloaded
    proof: Path  # see find_proof
    part: Path | None = None  # what was downloaded, None if the layer is in the store


def find_proof(store: Store, layer: str, server: str, digest: str) -> Path:
    """Return the file that proves that a server sent a blob of this digest, and that it unpacks to the layer."""
    mark = hashlib.sha256(json.dumps([server, digest]).encode()).hexdigest()[:32]
    return store.proofs / f"{layer}.{mark}"


def check_contents(digest: str, wanted: str) -> None:
    if digest != wanted:
        raise DriverError(f"a layer's contents are not what the image says they are (sha256:{wanted})")


SKELETON = "skeleton-1"


def measure(path: Path) -> int:
    """Return the bytes that a layer takes on disk."""
    size = path.lstat().st_blocks
    for _, folders, names, fd in os.fwalk(path):  # by descriptors: paths from here may be too long
        size += sum(os.lstat(name, dir_fd=fd).st_blocks for name in (*folders, *names))
    return size * 512


def convert_qcow2(disk: Path, work: Path) -> Path:
    """Convert with systemd-pull, which needs no other package. A file: address keeps it off the network."""
    root = work / "pulled"
    root.mkdir()
    source = work / "disk.qcow2"
    disk.rename(source)
    argv = ["/usr/lib/systemd/systemd-pull", "raw", f"--image-root={root}", "--verify=no", "--settings=no",
            "--roothash=no", "--roothash-signature=no", "--verity=no", "--sync=no",
            f"file://{source}", "-"]  # fmt: skip
    tool = start_tool(argv, "systemd-container", stdout=subprocess.DEVNULL)
    with telling():
        status = tool.wait()
    made = list(root.glob(".raw-*.raw"))
    if status or len(made) != 1:
        raise DriverError("the qcow2 image cannot be converted: it is damaged, or needs another file")
    made[0].rename(work / "disk.raw")
    return work / "disk.raw"


def check_disk(disk: Path) -> None:
    """Raise DriverError for what is plainly no disk image: a page of HTML, an archive, an empty file."""
    with open(disk, "rb") as file:
        head = file.read(4096)
    if len(head) < 4096 or head.lstrip()[:1] in (b"<", b"{"):
        raise DriverError("this is no disk image")
    if head[257:262] == b"ustar":
        raise DriverError('this is a tar archive; set type = "tar"')


def main() -> None:
    """Do what the request on stdin says; report the result on stdout."""
    request = json.loads(sys.stdin.readline())
    os.umask(0o022)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, hard))  # cosign may have more
    store = Store(Path(request["root"]))
    try:
        if request["action"] == "collect":
            tell(collected=store.collect(Retention.parse(request["retention"])))
            return
        image = Fetch(store, request).run()
    except DriverError as error:
        tell(error=shorten(str(error), 2000), kind=type(error).__name__)
    except MemoryError:
        tell(error="the image needs more memory to unpack than it may have", kind="DriverError")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = (
            f"the disk under {store.root} is full" if full else f"{error.filename or store.root}: {error.strerror}"
        )
        tell(error=what, kind="TransientError" if full else "HostError")
    else:
        tell(image=image.key)
