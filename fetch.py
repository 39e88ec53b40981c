# SPDX-License-Identifier: MPL-2.0
"""Fetches images into the store: what the short-lived process does that `Fetches` of driver.py starts.

    Talk        what the process tells the plugin
    Download    http and https, with progress, resumption and a limit on stalls
    Unpack      archives that may mean harm, to a directory
    Registry    OCI and Docker registries
    Saved       images of theirs in an archive
    Fetch       from a request to an image in the store

skopeo and umoci would be five packages more on every client (23 MB on Debian 12), and spare the Registry section
alone: umoci unpacks all layers of an image into one tree, so that images share none, and the rest is needed for
archives and addresses anyway.

Everything that comes from outside is a stranger's: addresses, redirects, sizes, names, links. A thing gets its
name in the store when it is whole and its digest is right, never before.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import hmac
import http.client
import ipaddress
import json
import os
import re
import resource
import socket
import ssl
import stat
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from driver import (
    SAFE_PATH,
    DriverError,
    HostError,
    ImageConfig,
    Store,
    StoredImage,
    TransientError,
    cut,
    open_in_root,
    redact,
    remove_tree,
    run,
)

CHUNK = 1 << 20
MAX_DOCUMENT = 4 << 20  # bytes of a manifest, a configuration, a list of checksums
MAX_LAYERS = 400  # the kernel stacks 500
MAX_ENTRIES = 5_000_000  # of an image
MAX_DEPTH = 256  # directories in each other, of an archive
MAX_PATH = 4095  # bytes of a name in an archive: what the kernel takes at once
MAX_MEMORY = 1 << 30  # bytes of address space: headers and dictionaries of archives can ask for any amount


# =====================================================================================================
# Talk
#
# JSON, one object a line, on stdout. Silence for long means a stall, so that all work tells how far it is.
# =====================================================================================================


def tell(**values: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Give a sign of life every second, during work that can say nothing of its own and waits for no stranger."""
    done = threading.Event()

    def go_on() -> None:
        while not done.wait(1):
            tell()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Meter:
    """Tells how far a piece of work is, once a second."""

    def __init__(self, what: str, total: int = 0) -> None:
        self.what, self.total = what, total
        self.done = 0
        self.told = 0.0

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told >= 1:
            self.told = now
            tell(what=self.what, done=self.done, total=self.total)


# =====================================================================================================
# Download
#
# urllib with what a root process on a client's network needs: http and https only, also after a redirect, never
# from https to http; no credentials to another host than they are for; no addresses at which clouds tell a machine
# its secrets. Proxies are those of the agent's environment.
# =====================================================================================================

# Where clouds serve their machines: Alibaba, Azure, Oracle, AWS, Google. All others use link-local addresses.
METADATA = tuple(
    map(
        ipaddress.ip_network,
        ("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32", "fd00:ec2::/32", "fd20:ce::254/128"),
    )
)
# IPv6 addresses with an IPv4 address at their end: mapped, compatible, translated (RFC 6052).
IPV4_AT_END = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "::ffff:0:0:0/96", "::/96", "64:ff9b::/96")))
LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")  # RFC 8215: who runs it chooses the length of the prefix


def check_address(text: str) -> None:
    """Refuse an address at which there may be secrets of this machine, in whatever form it comes."""
    address = ipaddress.ip_address(text.partition("%")[0])
    for form in (address, *find_ipv4(address)):
        if form.is_link_local or any(form in network for network in METADATA):
            rule = "is a link-local address, or one where a cloud serves its machines"
            raise DriverError(f"{address} {rule}; images are not fetched from there")


def find_ipv4(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that an IPv6 address may lead to."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    data = address.packed
    found = [address.sixtofour, *(address.teredo or ())]
    if any(address in network for network in IPV4_AT_END):
        found.append(ipaddress.IPv4Address(data[12:]))
    if address in LOCAL_NAT64:
        bits = data[:8] + data[9:]  # RFC 6052 leaves the ninth byte out
        found += [ipaddress.IPv4Address(bits[start : start + 4]) for start in (6, 7, 8, 11)]
    return [form for form in found if form]


class PlainConnection(http.client.HTTPConnection):
    """Looks at where it has been led before it says anything there, be it TLS's greeting."""

    def connect(self) -> None:
        super().connect()
        check_address(self.sock.getpeername()[0])


class SecureConnection(http.client.HTTPSConnection, PlainConnection):
    pass


def is_proxied(request: urllib.request.Request) -> bool:
    """Tell whether a request goes to a proxy, which is the operator's choice and may have any address. What it is
    asked for is looked up here, too, and judged; a name that is not known here is the proxy's to judge."""
    if not (request.has_proxy() or getattr(request, "_tunnel_host", None)):
        return False
    host = urllib.parse.unquote(urllib.parse.urlsplit(request.full_url).hostname or "").rstrip(".")
    with contextlib.suppress(socket.gaierror):
        for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            check_address(str(entry[4][0]))
    return True


class PlainHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(http.client.HTTPConnection if is_proxied(request) else PlainConnection, request)


class SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self.own_context = context

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if is_proxied(request) else SecureConnection
        return self.do_open(kind, request, context=self.own_context)


def origin(url: str) -> tuple[str, str, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class RedirectHandler(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        before, after = origin(req.full_url), origin(newurl)
        if after[0] not in ("http", "https") or (before[0] == "https" and after[0] == "http"):
            raise DriverError(f"{redact(req.full_url)} redirects to {cut(redact(newurl))}, which is not followed")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request:
            request.remove_header("Proxy-authorization")  # comes back if the proxy is asked again
            if before != after:
                request.remove_header("Authorization")
        return request


def basic(username: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


class Client:
    """Opens addresses. `stall`: seconds without data after which a transfer counts as broken."""

    def __init__(self, stall: float, certificates: Sequence[Path] = ()) -> None:
        self.stall = stall
        context = ssl.create_default_context()
        for path in certificates:
            context.load_verify_locations(path)
        self.director = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            PlainHandler(),
            SecureHandler(context),
            urllib.request.HTTPDefaultErrorHandler(),
            RedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self.director.add_handler(handler)

    def open(self, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None = None) -> Any:
        """Return the response; a form is posted. Raises DriverError, and HTTPError for what the caller may know
        better."""
        data = urllib.parse.urlencode(form).encode() if form else None
        with explaining(url):
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or parts.port == 0:  # raises ValueError for one beyond 65535
                raise DriverError(f"{redact(url)} is no http or https address")
            request = urllib.request.Request(url, data, {"User-Agent": "nomad-driver-nspawn", **headers})
            return self.director.open(request, timeout=self.stall)

    def read(
        self, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None = None
    ) -> tuple[bytes, Any]:
        """Return a short document and the response's headers."""
        with self.open(url, headers, form) as response, explaining(url):
            data: bytes = response.read(MAX_DOCUMENT + 1)
            if len(data) > MAX_DOCUMENT:
                raise DriverError(f"{redact(url)} is longer than the {MAX_DOCUMENT >> 20} MB a document may have")
            return data, response.headers


@contextlib.contextmanager
def explaining(url: str) -> Iterator[None]:
    """Turn the many ways in which a transfer can fail into sentences."""
    where = cut(redact(url))
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DriverError(f"the certificate of {where} is not trusted: {reason.verify_message}") from None
        raise TransientError(f"{where} cannot be reached: {explain_os(reason)}") from None
    except TimeoutError:
        raise TransientError(f"{where} has stalled") from None
    except http.client.InvalidURL as error:
        raise DriverError(f"{where} is no address: {cut(str(error))}") from None
    except http.client.HTTPException as error:
        raise TransientError(f"the transfer from {where} broke off: {cut(str(error)) or 'no answer'}") from None
    except ssl.SSLError as error:
        raise TransientError(f"the transfer from {where} broke off: {error.reason}") from None
    except ConnectionError as error:
        raise TransientError(f"the transfer from {where} broke off: {explain_os(error)}") from None
    except (ValueError, OverflowError) as error:  # a port beyond 65535, brackets without an IPv6 address, ...
        raise DriverError(f"{where} or where it leads to is no address: {cut(str(error))}") from None


def explain_os(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    return str(getattr(reason, "strerror", None) or reason)


def explain_status(error: urllib.error.HTTPError, what: str) -> DriverError:
    """Return what an HTTP error means for the job."""
    if error.code == 404:
        return DriverError(f"{what} is not there (HTTP 404)")
    if error.code in (401, 403):
        return DriverError(f"access to {what} is denied (HTTP {error.code}); check the credentials in auth")
    text = f"{what}: the server answers HTTP {error.code} {cut(str(error.reason), 80)}"
    return TransientError(text) if error.code in (408, 425, 429) or error.code >= 500 else DriverError(text)


def tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def discard(part: Path) -> None:
    for path in (part, tag_of(part)):
        path.unlink(missing_ok=True)


MAX_RESUMPTIONS = 10  # without any progress in between: none


class Download:
    """One file to be fetched to `part`; goes on with what an interrupted one has left there.

    What tells that the rest is of the same file: a digest known beforehand, or the server's ETag kept beside it.
    """

    def __init__(self, client: Client, url: str, part: Path, *, limit: int, is_fixed: bool = False) -> None:
        self.client, self.url, self.part = client, url, part
        self.limit = limit
        self.is_fixed = is_fixed
        self.tag = tag_of(part)
        self.total: int | None = None

    def run(self, headers: Callable[[], Mapping[str, str]]) -> None:
        """Raises TransientError when the network fails for good, DriverError on all else."""
        left = MAX_RESUMPTIONS
        while True:
            before = self.size
            try:
                self.transfer(headers())
                return
            except TransientError:
                left -= 1
                if self.size <= before or not left:
                    raise
                tell(note="the transfer broke off and is taken up again")

    @property
    def size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def transfer(self, headers: Mapping[str, str]) -> None:
        have = self.size
        tag = self.tag.read_text() if self.tag.exists() else ""
        extra: dict[str, str] = {}
        if have and (tag or self.is_fixed):
            extra = {"Range": f"bytes={have}-", **({"If-Range": tag} if tag and not self.is_fixed else {})}
        try:
            response = self.client.open(self.url, {**headers, **extra})
        except urllib.error.HTTPError as error:
            if error.code == 416 and extra:  # what is here is all there is, or not of this file
                if self.is_fixed and re.fullmatch(rf"bytes \*/{have}", error.headers.get("Content-Range", "")):
                    return
                discard(self.part)
                return self.transfer(headers)
            raise
        with response:
            start = have if response.status == 206 and extra else 0
            given = re.match(r"bytes ([0-9]{1,18})-", response.headers.get("Content-Range", ""))
            if start and (not given or int(given[1]) != start):
                raise DriverError(f"{redact(self.url)}: the server sends another part than was asked for")
            etag = response.headers.get("ETag", "")
            self.tag.write_text(etag if re.fullmatch(r'"[!#-~]{0,200}"', etag) else "")
            self.receive(response, start)

    def receive(self, response: Any, start: int) -> None:
        length = response.headers.get("Content-Length", "")
        self.total = start + int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
        if (self.total or 0) > self.limit:
            raise too_large(f"{redact(self.url)} has {self.total} bytes", self.limit)
        meter = Meter("downloading", self.total or 0)
        meter.done = start
        with open(self.part, "r+b" if start else "wb") as file:
            file.truncate(start)
            file.seek(start)
            for chunk in self.chunks(response):
                if meter.done + len(chunk) > self.limit:
                    raise too_large(f"{redact(self.url)} has more than {meter.done} bytes", self.limit)
                file.write(chunk)
                meter.add(len(chunk))
        if self.total is not None and meter.done < self.total:
            where = redact(self.url)
            raise TransientError(f"the transfer from {where} broke off after {meter.done} of {self.total} bytes")

    def chunks(self, response: Any) -> Iterator[bytes]:
        """Yield data as it comes. A trickle is a stall, too: a kilobyte in the time allowed is the least."""
        mark, count = time.monotonic(), 0
        with explaining(self.url):
            while chunk := response.read1(CHUNK):
                count += len(chunk)
                yield chunk
                if time.monotonic() - mark > self.client.stall:
                    if count < 1024:
                        raise TransientError(f"{redact(self.url)} has stalled")
                    mark, count = time.monotonic(), 0


def too_large(what: str, limit: int) -> DriverError:
    return DriverError(
        f"{what}, more than the {limit >> 20} MB that image_size_limit of the plugin's block allows"
    )


def hash_file(path: Path, algorithm: str, what: str = "checking") -> str:
    digest, meter = hashlib.new(algorithm), Meter(what, path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            meter.add(len(chunk))
    return digest.hexdigest()


ALGORITHMS = {40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512", 32: "md5"}  # by digits


def check_checksum(path: Path, wanted: str) -> None:
    """Compare with "sha256:HEX", or HEX alone; the option's check has seen to its form."""
    value = wanted.rpartition(":")[2].lower()
    found = hash_file(path, ALGORITHMS[len(value)])
    if not hmac.compare_digest(found, value):
        raise DriverError(f"the file has another checksum ({ALGORITHMS[len(value)]}:{found}) than the job says")


def check_published(
    client: Client, url: str, headers: Mapping[str, str], path: Path, mode: str, work: Path
) -> None:
    """Check a file as systemd-pull does: its checksum stands in FILE.sha256 or SHA256SUMS beside it, and for
    "signature" that list is signed by a key of systemd's import keyring."""
    base, _, name = urllib.parse.urlsplit(url).path.rpartition("/")
    beside = [f"{name}.sha256", "SHA256SUMS"] if mode == "checksum" else ["SHA256SUMS"]
    addresses = {other: urllib.parse.urljoin(url, f"{base}/{other}") for other in beside}
    sums, source = read_first(client, addresses, headers)
    if mode == "signature":
        signatures = {end: f"{addresses[source]}.{end}" for end in ("gpg", "asc")}
        signature, _ = read_first(client, signatures, headers)
        check_signature(sums, signature, work)
    line = rf"^([0-9a-fA-F]{{64}})\s+[ *]?(\./)?{re.escape(urllib.parse.unquote(name))}\s*$"
    match = re.search(line, sums.decode(errors="replace"), re.MULTILINE)
    if not match:
        raise DriverError(f"verify = {mode}: {redact(addresses[source])} does not name {name}")
    if hash_file(path, "sha256") != match[1].lower():
        raise DriverError(f"verify = {mode}: the file has another checksum than {redact(addresses[source])} says")


def read_first(client: Client, addresses: Mapping[str, str], headers: Mapping[str, str]) -> tuple[bytes, str]:
    """Return the first of some documents that is there, and its name."""
    for name, address in addresses.items():
        try:
            return client.read(address, headers)[0], name
        except urllib.error.HTTPError as error:
            if error.code not in (403, 404):
                raise explain_status(error, redact(address)) from None
    wanted = " or ".join(redact(address) for address in addresses.values())
    raise DriverError(f"verify: there is no {wanted}; publish it, or set verify to something else")


KEYRINGS = ("/etc/systemd/import-pubring.gpg", "/usr/lib/systemd/import-pubring.gpg")


def check_signature(text: bytes, signature: bytes, work: Path) -> None:
    keyring = next((path for path in KEYRINGS if os.path.exists(path)), None)
    if keyring is None:
        raise HostError(f"verify = signature: there is no keyring {KEYRINGS[0]} on this machine")
    home = work / "gnupg"
    home.mkdir(mode=0o700, exist_ok=True)
    (work / "sums").write_bytes(text)
    (work / "signature").write_bytes(signature)
    argv = ["gpg", "--no-options", "--batch", "--no-default-keyring", "--no-auto-key-locate",
            "--trust-model=always", f"--homedir={home}", f"--keyring={keyring}", "--no-auto-check-trustdb",
            "--verify", str(work / "signature"), str(work / "sums")]  # fmt: skip
    done = start_tool(argv, "gnupg", stdout=subprocess.DEVNULL)
    if done.wait(60):
        raise DriverError(f"verify = signature: no key of {keyring} has signed the checksums")


def start_tool(argv: Sequence[str], package: str, **streams: Any) -> subprocess.Popen[bytes]:
    environ = {"PATH": SAFE_PATH, "LANG": "C.UTF-8"}
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.Popen(argv, env=environ, **{**quiet, **streams})
    except FileNotFoundError:
        raise HostError(f"{argv[0]} is not installed: install the package {package}") from None


# =====================================================================================================
# Unpack
#
# tarfile reads, nothing of it writes: every entry is made here, below a directory of root's alone, one path
# component after the other and never through a symbolic link, whoever made it. Refused: ".." in a name, names that
# are absurdly deep or long, hard links out of the archive, attributes that mean something to overlayfs. Left out:
# devices (nspawn makes its own) and sockets. Whiteouts become overlayfs's own, so that layers can be stacked.
# =====================================================================================================

COMPRESSIONS = (  # magic, the tool, its package
    (b"\x1f\x8b", "gzip", "gzip"),
    (b"\xfd7zXZ\0", "xz", "xz-utils"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd"),
    (b"BZh", "bzip2", "bzip2"),
)


@contextlib.contextmanager
def decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file's contents, decompressed by a tool if need be; read to the end, a damaged one is an error."""
    with open(path, "rb", buffering=0) as file:  # a tool goes on where this has stopped reading
        magic = file.read(8)
        file.seek(0)
        found = next((entry for entry in COMPRESSIONS if magic.startswith(entry[0])), None)
        if not found:
            yield file
            return
        tool = start_tool([found[1], "-dc"], found[2], stdin=file, stdout=subprocess.PIPE)
        assert tool.stdout
        try:
            yield tool.stdout
            if tool.wait():
                raise DriverError(f"the {found[1]} file is damaged or cut off")
        finally:
            tool.kill()
            tool.stdout.close()
            tool.wait()


class Source:
    """A stream that is measured, hashed and limited as it is read."""

    def __init__(self, stream: IO[bytes], limit: int, what: str) -> None:
        self.stream, self.limit = stream, limit
        self.digest = hashlib.sha256()
        self.meter = Meter(what)

    def read(self, size: int = CHUNK) -> bytes:
        data = self.stream.read(size)
        self.digest.update(data)
        self.meter.add(len(data))
        if self.meter.done > self.limit:
            raise too_large("the image unpacks to more", self.limit)
        return data

    def drain(self) -> None:
        while self.read():
            pass


@dataclass
class Room:
    """What an image may have unpacked, all its layers together."""

    limit: int  # bytes
    size: int = 0
    entries: int = 0

    def take(self, size: int, entries: int = 0) -> None:
        self.size += size
        self.entries += entries
        if self.size > self.limit:
            raise too_large("the image unpacks to more", self.limit)
        if self.entries > MAX_ENTRIES:
            raise DriverError(f"the image has more than the {MAX_ENTRIES} files and directories that it may have")


class Entry(tarfile.TarInfo):
    """tarfile takes a damaged header in the middle for the archive's end; this does not."""

    needs_end = True

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Entry:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in typeshed
            raise
        except tarfile.HeaderError as error:
            is_empty = isinstance(error, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]  # not in typeshed
            if is_empty and not cls.needs_end:
                raise
            raise tarfile.ReadError(f"it is damaged or cut off: {error}") from None


class LayerEntry(Entry):
    """A layer's digest proves it whole: it may lack the empty blocks at the end, as some do."""

    needs_end = False


class Unpacker:
    """Makes the entries of an archive below `root`. With `is_layer`, whiteouts mean what OCI says."""

    def __init__(self, root: Path, room: Room, *, is_layer: bool) -> None:
        self.root, self.room, self.is_layer = root, room, is_layer
        self.devices = 0  # left out
        self.directories: dict[str, tarfile.TarInfo] = {}  # their modes and times are set when all is in them
        self.open_path: str | None = None
        self.open_fd = -1

    def run(self, stream: IO[bytes]) -> str:
        """Return the sha256 of the archive, decompressed."""
        source: Any = Source(stream, 2 * self.room.limit, "unpacking")
        try:
            with tarfile.open(
                fileobj=source,
                mode="r|",
                bufsize=CHUNK,
                tarinfo=LayerEntry if self.is_layer else Entry,
                encoding="utf-8",
                errors="surrogateescape",
            ) as archive:
                while (entry := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # or all would stay in memory
                    with refusing(entry.name):
                        self.make(archive, entry)
            source.drain()
            with telling():
                self.finish()
        except RecursionError:  # tarfile's, at headers that are about headers that are about headers
            raise DriverError("the archive is refused: it has too many headers for one entry") from None
        except tarfile.TarError as error:
            raise DriverError(f"this is no tar archive that can be unpacked: {cut(str(error))}") from None
        except (ValueError, OverflowError, UnicodeError) as error:  # NUL in a name, a time beyond all clocks
            raise DriverError(f"the archive is damaged: {cut(str(error))}") from None
        finally:
            self.close_directory()
        return str(source.digest.hexdigest())

    def make(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        if entry.size < 0:
            raise refused(entry.name, f"says that it has {entry.size} bytes")
        self.room.take(entry.size if entry.isreg() else 0, 1)
        parts = split_name(entry.name)
        if not parts:
            if entry.isdir():
                self.directories["."] = entry
            return
        where, name = self.open_directory(parts[:-1]), parts[-1]
        if self.is_layer and name.startswith(".wh."):
            self.make_whiteout(where, name[4:], entry.name)
        elif entry.isdir():
            self.make_directory(where, name, "/".join(parts), entry)
        elif entry.ischr() or entry.isblk():
            self.devices += 1
        else:
            self.remove(where, name, keep_whiteout=False)
            self.make_file(archive, where, name, entry)

    def open_directory(self, parts: Sequence[str]) -> int:
        """Return the directory an entry belongs in, made if need be; no component of it is a link."""
        path = "/".join(parts)
        if self.open_path == path:
            return self.open_fd
        self.close_directory()
        try:
            self.open_fd = self.descend(parts, make=True)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise refused(path, "is not a directory but a link or a file, and has entries below it") from None
            raise
        self.open_path = path
        return self.open_fd

    def descend(self, parts: Sequence[str], *, make: bool) -> int:
        """Open a directory, one component after the other."""
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts:
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=fd)
                        self.room.take(0, 1)
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return fd

    def close_directory(self) -> None:
        if self.open_path is not None:
            os.close(self.open_fd)
        self.open_path = None

    def remove(self, where: int, name: str, *, keep_whiteout: bool) -> None:
        """Make room for an entry: of two with one name the later counts."""
        try:
            found = os.lstat(name, dir_fd=where)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            with telling():
                remove_tree(Path(f"/proc/self/fd/{where}/{name}"))
        elif not (keep_whiteout and is_whiteout(found)):
            os.unlink(name, dir_fd=where)

    def make_whiteout(self, where: int, name: str, shown: str) -> None:
        """Hide what the layers below have. It does not concern what this layer has itself."""
        if name == ".wh..opq":
            os.setxattr(where, "trusted.overlay.opaque", b"y")
            return
        if name in ("", ".", "..") or name.startswith(".wh."):
            if name.startswith(".wh."):
                return  # aufs's own, as .wh..wh.plnk
            raise refused(shown, "is no name")
        try:
            found = os.lstat(name, dir_fd=where)
        except FileNotFoundError:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=where)
            return
        if stat.S_ISDIR(found.st_mode):
            os.setxattr(f"/proc/self/fd/{where}/{name}", "trusted.overlay.opaque", b"y")

    def make_directory(self, where: int, name: str, path: str, entry: tarfile.TarInfo) -> None:
        try:
            found = os.lstat(name, dir_fd=where)
        except FileNotFoundError:
            os.mkdir(name, 0o755, dir_fd=where)
        else:
            if not stat.S_ISDIR(found.st_mode):
                os.unlink(name, dir_fd=where)
                os.mkdir(name, 0o755, dir_fd=where)
                if is_whiteout(found):
                    os.setxattr(f"/proc/self/fd/{where}/{name}", "trusted.overlay.opaque", b"y")
        self.directories[path] = entry

    def make_file(self, archive: tarfile.TarFile, where: int, name: str, entry: tarfile.TarInfo) -> None:
        if entry.islnk():
            self.make_link(where, name, entry)
        elif entry.issym():
            os.symlink(entry.linkname, name, dir_fd=where)
            os.chown(name, entry.uid, entry.gid, dir_fd=where, follow_symlinks=False)
            os.utime(name, (entry.mtime, entry.mtime), dir_fd=where, follow_symlinks=False)
        elif entry.isfifo():
            os.mkfifo(name, 0o600, dir_fd=where)
            os.chown(name, entry.uid, entry.gid, dir_fd=where, follow_symlinks=False)
            os.chmod(f"/proc/self/fd/{where}/{name}", entry.mode & 0o7777)
        elif entry.isreg():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(name, flags, 0o600, dir_fd=where), "wb") as file:
                contents = archive.extractfile(entry)
                assert contents
                copy_sparse(contents, file)
                set_owner(file.fileno(), entry)
                os.utime(file.fileno(), (entry.mtime, entry.mtime))

    def make_link(self, where: int, name: str, entry: tarfile.TarInfo) -> None:
        parts = split_name(entry.linkname)
        where = os.dup(where)
        try:
            source = self.open_directory(parts[:-1])
            os.link(parts[-1], name, src_dir_fd=source, dst_dir_fd=where, follow_symlinks=False)
        except (OSError, IndexError) as error:
            if isinstance(error, OSError) and error.errno in HOST_TROUBLE:
                raise
            why = f"is a hard link to {cut(entry.linkname)!r}, and the archive has no such file before it"
            raise refused(entry.name, why) from None
        finally:
            os.close(where)

    def finish(self) -> None:
        """Give directories their owners, modes and times, the deepest first."""
        for path, entry in sorted(self.directories.items(), reverse=True):
            parts = [part for part in path.split("/") if part != "."]
            try:
                fd = self.descend(parts, make=False)
            except (FileNotFoundError, NotADirectoryError):  # replaced by something else later on
                continue
            try:
                set_owner(fd, entry)
                os.utime(fd, (entry.mtime, entry.mtime))
            finally:
                os.close(fd)


def split_name(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise refused(name, 'leads out of the image by ".."')
    if len(parts) > MAX_DEPTH or len(name.encode("utf-8", "surrogateescape")) > MAX_PATH:
        rule = f"{MAX_DEPTH} directories and {MAX_PATH} bytes are the most that are unpacked"
        raise refused(name, f"is too deep or too long: {rule}")
    return parts


HOST_TROUBLE = frozenset((
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN,
))  # fmt: skip


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn what the kernel does not want to make into a refusal of the archive, unless the host is the reason."""
    try:
        yield
    except OSError as error:
        if error.errno in HOST_TROUBLE:
            raise
        raise refused(name, f"cannot be made: {error.strerror}") from None


def refused(name: str, why: str) -> DriverError:
    return DriverError(f"the archive is refused: its entry {cut(ascii(name)[1:-1])!r} {why}")


def is_whiteout(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def set_owner(fd: int, entry: tarfile.TarInfo) -> None:
    """Set owner, attributes and mode, in this order: a change of owner drops the others."""
    os.fchown(fd, entry.uid, entry.gid)
    for key, value in entry.pax_headers.items():
        name = key.removeprefix("SCHILY.xattr.")
        if name == key:
            continue
        if name.startswith(("trusted.", "user.overlay.")):
            raise refused(entry.name, f"has the attribute {cut(name)}, which only the system may set")
        if name == "security.capability" or name.startswith("user."):
            with contextlib.suppress(OSError):  # a file system without them
                os.setxattr(fd, name, value.encode("utf-8", "surrogateescape"))
    os.fchmod(fd, entry.mode & 0o7777)


def copy_sparse(source: IO[bytes] | Source, target: IO[bytes]) -> None:
    """Copy, with holes for what is zero."""
    zeros = bytes(1 << 16)
    while chunk := source.read(1 << 16):
        if chunk == zeros:
            target.seek(len(chunk), os.SEEK_CUR)
        else:
            target.write(chunk)
    target.truncate()


# =====================================================================================================
# Registry
#
# The distribution protocol, as far as pulling needs it. Manifests, configurations and layers are what their
# digests say, or refused; layers come from the registry itself and from no address an image names.
# =====================================================================================================

MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
LAYERS = re.compile(
    r"application/vnd\.(docker\.image\.rootfs\.diff\.tar(\.gzip|\.zstd)?|oci\.image\.layer\.v1\.tar(\+gzip|\+zstd)?)"
)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MACHINES = {
    "x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "ppc64le": "ppc64le",
    "s390x": "s390x", "riscv64": "riscv64", "loongarch64": "loong64",
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """A place in a registry: docker://[host[:port]/]name[:tag][@digest]."""

    host: str
    name: str
    tag: str
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        rest, _, digest = text.removeprefix("docker://").partition("@")
        host, slash, name = rest.partition("/")
        if not slash or not (re.search(r"[.:]", host) or host == "localhost"):
            host, name = "docker.io", rest
        name, colon, tag = name.partition(":")
        if host in ("docker.io", "index.docker.io"):
            host, name = "docker.io", name if "/" in name else f"library/{name}"
        component = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
        if not (
            re.fullmatch(rf"{component}(?:/{component})*", name)
            and (not colon or re.fullmatch(r"\w[\w.-]{0,127}", tag, re.ASCII))
            and (not digest or DIGEST.fullmatch(digest))
            and re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?", host)
        ):
            raise DriverError(
                "this is no name of an image: it is docker://HOST/NAME:TAG or docker://HOST/NAME@sha256:..."
            )
        return cls(host, name, tag or "latest", digest)

    @property
    def server(self) -> str:
        return "registry-1.docker.io" if self.host == "docker.io" else self.host

    @property
    def version(self) -> str:
        return self.digest or self.tag


def is_loopback(host: str) -> bool:
    name = re.sub(r":\d+$", "", host).strip("[]")
    if name == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False


@dataclass(frozen=True)
class Credentials:
    username: str = ""
    password: str = ""
    token: str = ""  # an identity token, which stands for both

    @property
    def header(self) -> dict[str, str]:
        return {"Authorization": basic(self.username, self.password)} if self.username or self.password else {}


def find_credentials(host: str, request: Mapping[str, Any]) -> Credentials:
    """Return the job's credentials, or those the operator has for the registry."""
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
        if entry and entry.get("identitytoken"):
            return Credentials(token=entry["identitytoken"])
        if entry and entry.get("auth"):
            username, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
            return Credentials(username, password.rstrip("\0"))
    return Credentials()


def read_docker_config(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise HostError(f"the file of registry credentials {path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def ask_helper(name: str, host: str) -> Credentials | None:
    """Return what docker-credential-NAME knows of a registry."""
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


class Registry:
    """One repository of a registry, with the authorization it has asked for."""

    def __init__(self, client: Client, reference: Reference, credentials: Credentials, is_plain: bool) -> None:
        self.client, self.reference, self.credentials = client, reference, credentials
        self.schemes = ["http"] if is_plain else ["https", *(["http"] if is_loopback(reference.host) else [])]
        self.authorization: dict[str, str] = {}

    @property
    def server(self) -> str:
        return f"{self.schemes[0]}://{self.reference.server}"

    def url(self, path: str) -> str:
        return f"{self.server}/v2/{self.reference.name}/{path}"

    def retrying(self, act: Callable[[], Any]) -> Any:
        """Do something that may need authorization first, or the plain http of a registry on this machine."""
        for attempt in range(4):  # a token may have run out since the last request
            try:
                return act()
            except urllib.error.HTTPError as error:
                if error.code != 401 or attempt > 1:
                    raise explain_status(error, self.shown) from None
                self.authorize(error.headers.get_all("WWW-Authenticate") or [])
            except TransientError:
                if len(self.schemes) < 2 or self.authorization:
                    raise
                del self.schemes[0]
        raise AssertionError

    @property
    def shown(self) -> str:
        version = f"@{self.reference.digest}" if self.reference.digest else f":{self.reference.tag}"
        return f"{self.reference.host}/{self.reference.name}{version}"

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
            raise DriverError(f"the registry {self.reference.host} asks to send credentials without encryption")
        query = {key: challenge[key] for key in ("service", "scope") if challenge.get(key)}
        query.setdefault("scope", f"repository:{self.reference.name}:pull")
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
            raise DriverError(f"the registry {self.reference.host} gives no token")
        return token

    def read_manifest(self, version: str) -> tuple[dict[str, Any], str]:
        """Return a manifest or an index, and its digest."""
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
            raise DriverError(f"{self.shown} is no image of file system layers (it is {cut(str(kind))})")
        return {**manifest, "mediaType": kind}, digest

    def read_config(self, descriptor: Mapping[str, Any]) -> dict[str, Any]:
        digest = want_digest(descriptor)
        data, _ = self.retrying(lambda: self.client.read(self.url(f"blobs/{digest}"), self.authorization))
        if "sha256:" + hashlib.sha256(data).hexdigest() != digest:
            raise DriverError(f"{self.shown}: the image's configuration has another digest than its manifest says")
        return parse_json(data, "the image's configuration")

    def check_access(self, descriptor: Mapping[str, Any]) -> None:
        """Raise unless the registry gives a layer to this job: its first byte is asked for, as a server to which
        it redirects may allow nothing but GET."""
        url = self.url(f"blobs/{want_digest(descriptor)}")
        self.retrying(lambda: self.client.open(url, {"Range": "bytes=0-0", **self.authorization}).close())

    def download(self, descriptor: Mapping[str, Any], part: Path, limit: int) -> None:
        """Fetch a layer as the manifest describes it."""
        digest, size = want_digest(descriptor), want_size(descriptor, limit)
        blob = Download(self.client, self.url(f"blobs/{digest}"), part, limit=size, is_fixed=True)
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
        raise DriverError(f"the manifest has a digest that is none: {cut(repr(digest))}")
    return digest


def want_size(descriptor: Mapping[str, Any], limit: int) -> int:
    size = descriptor.get("size")
    if not isinstance(size, int) or not 0 <= size <= limit:
        raise too_large(f"a layer has {cut(str(size))} bytes", limit)
    return size


@dataclass(frozen=True)
class Platform:
    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Parse linux/arm64/v8; this machine's from ""."""
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
    raise DriverError(f"{shown} is there for {cut(there) or 'no platform'}, not for {wanted}")


def check_platform(config: Mapping[str, Any], wanted: Platform, shown: str) -> None:
    platform = Platform.read(config)
    if platform.architecture and not platform.fits(wanted):
        raise DriverError(f"{shown} is there for {cut(str(platform))}, not for {wanted}")


def read_layer_names(config: Mapping[str, Any], count: int, shown: str) -> list[str]:
    """Return the names in the store of an image's layers, the lowest first: the digests of what they unpack to."""
    rootfs = config.get("rootfs")
    ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(ids, list) or len(ids) != count:
        raise DriverError(f"{shown} is no image of file system layers")
    if count > MAX_LAYERS:
        raise DriverError(f"{shown} has {count} layers; {MAX_LAYERS} can be stacked")
    return ["layer-" + want_digest({"digest": diff_id}).partition(":")[2] for diff_id in ids]


def clean(value: object) -> str:
    """Return a text that a program can be given, "" for all else: JSON may hold NUL and halves of characters."""
    return value if isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value) else ""


def read_image_config(config: Mapping[str, Any]) -> ImageConfig:
    """Return what an image says of how to run it; what is not of the right type counts as not said."""
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
        command=(*words("Entrypoint"), *words("Cmd")),
        user=text("User"),
        working_directory=os.path.join("/", text("WorkingDir")) if text("WorkingDir") else "",
        stop_signal=text("StopSignal"),
    )


# =====================================================================================================
# Saved
#
# What an archive held that is no tree of a system: an image of `docker save` or podman (manifest.json), or an OCI
# layout of skopeo and buildx (index.json). Nothing is found outside of where the archive was unpacked.
# =====================================================================================================


class Saved:
    """A directory with an image of layers. `shown` is its name for people."""

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
        raise DriverError(f"{self.shown} is no whole image: it lacks {cut(ascii(name))}")

    def read(self, name: object) -> Any:
        with open(self.find(name), "rb") as file, contextlib.suppress(ValueError, RecursionError):
            return json.loads(file.read(MAX_DOCUMENT))
        raise DriverError(f"{self.shown} is no whole image: {cut(ascii(name))} is not the JSON it should be")

    def parts(self) -> tuple[dict[str, Any], list[Path]]:
        """Return the image's configuration, and its layers, the lowest first."""
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
            if len(entries) != 1:  # the only one may come without its platform
                entries = [{"digest": choose_manifest(found, Platform.parse(""), self.shown)}]
            found = self.read(blob_path(entries[0]))
        if not isinstance(found, dict) or not isinstance(found.get("layers"), list):
            raise DriverError(f"{self.shown} is no image of file system layers")
        return blob_path(found.get("config")), [blob_path(layer) for layer in found["layers"]]


def blob_path(descriptor: object) -> str:
    return "blobs/" + want_digest(descriptor).replace(":", "/")


# =====================================================================================================
# Fetch
#
# A request to an image in the store. The lock of the image's key is held all along: who asks for the same image
# meanwhile waits, and finds it there. The locks of its layers are shared: no layer is collected meanwhile, and
# nobody waits for another image's download, which a stranger can make last for ever.
# =====================================================================================================


@contextlib.contextmanager
def hold(store: Store, name: str, *, alone: bool = False) -> Iterator[None]:
    """Hold a lock, waiting for it."""
    with telling():
        while (fd := store.try_lock(name, alone=alone)) is None:
            time.sleep(0.1)
    try:
        yield
    finally:
        os.close(fd)


@dataclass
class Fetch:
    """One request. `values` is what driver.py's Source has to say."""

    store: Store
    values: Mapping[str, Any]
    limit: int = 0
    client: Client = field(init=False)
    work: Path = field(init=False)
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    room: Room = field(init=False)

    def __post_init__(self) -> None:
        self.limit = int(self.values["limit"])
        self.room = Room(self.limit)
        self.client = Client(float(self.values["stall"]))
        self.work = self.store.work / self.key

    @property
    def key(self) -> str:
        return str(self.values["key"])

    def keep(self, name: str, *, alone: bool = False) -> None:
        """Hold a lock until the image is in the store."""
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
                self.discard_parts()  # what is wrong is not gone on with
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
        """Tell whether to ask again where the image comes from; not if somebody has while this waited."""
        return bool(self.values["force"] or self.values["refresh"]) and found.checked_at < self.values["asked_at"]

    def fetch(self, found: StoredImage | None) -> StoredImage:
        kind = self.values["type"]
        if kind == "docker":
            return self.fetch_docker(found)
        path = Path(self.values["place"]) if kind == "archive" else self.download()
        if kind == "archive":
            path = self.pin(path)
        image = self.image((self.convert(path),)) if kind == "raw" else self.load(path)
        self.discard_parts()
        return image

    def image(self, layers: tuple[str, ...], **more: Any) -> StoredImage:
        now = time.time()
        with telling():
            sizes = tuple(measure(self.store.layer(name)) for name in layers)
        return StoredImage(self.key, self.values["name"], self.values["type"], layers, sizes, now, now, **more)

    def pin(self, path: Path) -> Path:
        """Open an archive so that nobody can exchange it any more; it must lie where it was found."""
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)  # not yet for reading: it may be a device
        if os.path.realpath(f"/proc/self/fd/{fd}") != str(path) or not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DriverError(f"{path} has become something else meanwhile")
        return Path(f"/proc/self/fd/{fd}")

    def download(self) -> Path:
        """Fetch and check what an address holds."""
        with explaining(self.values["place"]):
            parts = urllib.parse.urlsplit(self.values["place"])
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
        """Bring what an archive holds into the store: the tree of a system, or an image of layers."""
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
        """Return an image of layers, the lowest first, and its maker's configuration."""
        names = dict.fromkeys((*reversed(layers), self.make_skeleton()))  # overlayfs takes none twice
        return self.image(tuple(names), digest=digest, config=read_image_config(config))

    def unpack(self, path: Path, tree: Path, room: Room, wanted: str = "") -> str:
        """Unpack an archive to a new directory; return its contents' digest, which must be what is wanted."""
        tree.mkdir(mode=0o755)
        unpacker = Unpacker(tree, room, is_layer=bool(wanted))
        digest = ""
        # Outside, so that the tool ends; what has filled the memory is free afterwards.
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
        """Make a disk image out of a download: decompressed, from qcow2 to raw, with holes."""
        name = f"{hash_file(path, 'sha256')}.raw"
        disk = self.work / "disk.raw"
        with decompressed(path) as stream, open(disk, "wb") as target:
            source = Source(stream, self.limit, "unpacking")
            copy_sparse(source, target)
        with open(disk, "rb") as file:
            head = file.read(32)
        if head.startswith(b"QFI\xfb"):
            size = int.from_bytes(head[24:32], "big")  # clusters may be named again and again: not the file's
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
        """Give something whole its name in the store. What is there already is the same: names are digests."""
        self.keep(name)
        with telling():  # without the sync a power failure might leave the name alone
            run(["sync", "--file-system", str(made)], timeout=600)
        target = self.store.layer(name)
        try:
            if not target.exists():
                made.rename(target)
        except OSError:
            if not target.exists():
                raise

    def fetch_docker(self, found: StoredImage | None) -> StoredImage:
        reference = Reference.parse(self.values["place"])
        client = Client(self.client.stall, sorted((CERTIFICATES / reference.host).glob("*.crt")))
        credentials = find_credentials(reference.host, self.values)
        registry = Registry(client, reference, credentials, reference.host in self.values["insecure"])
        wanted = Platform.parse(self.values.get("platform") or "")
        manifest, digest = registry.read_manifest(reference.version)
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
        """Make what nspawn wants of every tree, as the lowest layer: an image may hold one program and no more."""
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
        """Return the names of the layers, the lowest first."""
        descriptors = manifest.get("layers")
        if not isinstance(descriptors, list):
            raise DriverError(f"{registry.shown} is no image of file system layers")
        layers = read_layer_names(config, len(descriptors), registry.shown)
        for descriptor in descriptors:
            want_digest(descriptor)
            if not LAYERS.fullmatch(str(descriptor.get("mediaType"))) or descriptor.get("urls"):
                kind = cut(str(descriptor.get("mediaType")))
                raise DriverError(f"{registry.shown} has a layer of a kind that is not fetched ({kind})")
        total = sum(want_size(descriptor, self.limit) for descriptor in descriptors)
        if total > self.limit:
            raise too_large(f"{registry.shown} has layers of {total} bytes", self.limit)
        for descriptor, name in zip(descriptors, layers, strict=True):
            self.fetch_layer(registry, descriptor, name)
        return layers

    def fetch_layer(self, registry: Registry, descriptor: Mapping[str, Any], name: str) -> None:
        """Bring one layer into the store.

        What is there already may be another job's secret, and its digest is none. So the server that has sent it
        must give it to this job, too; any other server must send all of it. So must one that is spoken to without
        encryption: who answers there is not known.
        """
        digest = want_digest(descriptor)
        proof = find_proof(self.store, name, registry.server, digest)
        if proof.exists() and registry.server.startswith("https://"):
            self.keep(name)
            if self.store.layer(name).exists():
                registry.check_access(descriptor)
                self.room.take(measure(self.store.layer(name)))
                return
        # The part is this image's own: what another has begun may be another's secret, or nonsense.
        part = self.store.part(f"{self.key}.{digest.partition(':')[2]}")
        registry.download(descriptor, part, self.limit)
        try:
            self.keep(name)
            self.bring_layer(part, name)
        finally:
            discard(part)
        proof.touch(mode=0o600)

    def bring_layer(self, path: Path, name: str) -> None:
        """Unpack a layer into the store. If it is there already, see to it that the job has what it names."""
        wanted = name.partition("-")[2]
        if self.store.layer(name).exists():
            with decompressed(path) as stream:
                source = Source(stream, 2 * self.limit, "checking")
                source.drain()
            check_contents(source.digest.hexdigest(), wanted)
            self.room.take(measure(self.store.layer(name)))
            return
        tree = self.work / "layer"
        self.unpack(path, tree, self.room, wanted)
        self.commit(tree, name)
        with telling():
            remove_tree(tree)  # if another was faster


def find_proof(store: Store, layer: str, server: str, digest: str) -> Path:
    """Return the file that says that a server has sent a blob of this digest, and that it unpacks to the layer."""
    mark = hashlib.sha256(json.dumps([server, digest]).encode()).hexdigest()[:32]
    return store.proofs / f"{layer}.{mark}"


def check_contents(digest: str, wanted: str) -> None:
    if digest != wanted:
        raise DriverError(f"a layer's contents are not what the image says they are (sha256:{wanted})")


SKELETON = "skeleton-1"
CERTIFICATES = Path("/etc/docker/certs.d")  # docker's own place for those of single registries


def measure(path: Path) -> int:
    """Return the bytes that a layer takes on disk."""
    size = path.lstat().st_blocks
    for _, folders, names, fd in os.fwalk(path):  # not by paths, which may be too long from here
        size += sum(os.lstat(name, dir_fd=fd).st_blocks for name in (*folders, *names))
    return size * 512


def convert_qcow2(disk: Path, work: Path) -> Path:
    """systemd-pull reads the format without any other package; a file address keeps it off the network."""
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
    """Refuse what is plainly no disk image: a page of HTML, an archive, nothing at all."""
    with open(disk, "rb") as file:
        head = file.read(4096)
    if len(head) < 4096 or head.lstrip()[:1] in (b"<", b"{"):
        raise DriverError("this is no disk image")
    if head[257:262] == b"ustar":
        raise DriverError('this is a tar archive; set type = "tar"')


def main() -> None:
    """Do what the request on stdin says; tell how it went on stdout."""
    request = json.loads(sys.stdin.readline())
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    store = Store(Path(request["root"]))
    try:
        if request["action"] == "collect":
            tell(collected=store.collect(request["delay"]))
            return
        image = Fetch(store, request).run()
    except DriverError as error:
        tell(error=cut(str(error), 2000), kind=type(error).__name__)
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
