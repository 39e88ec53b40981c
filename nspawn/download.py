# SPDX-License-Identifier: MPL-2.0
"""Downloads by http and https, with progress, resumption and a limit on stalls.

This is urllib with the restrictions that a root process on a client's network needs. It speaks http and https
only, and no redirect leads elsewhere or from https to http. Credentials go only to the host they belong to.
Addresses where clouds tell a machine its secrets are refused. Proxies are those of the agent's environment.

The fetching process reports to the plugin on stdout, one JSON object per line. Long silence means a stall, so
every step reports its progress.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from nspawn.common import SAFE_PATH, DriverError, HostError, TransientError, shorten
from nspawn.images import redact

CHUNK = 1 << 20
MAX_DOCUMENT = 4 << 20  # bytes of a manifest, a configuration, a list of checksums
MAX_DEPTH = 256  # nested directories of an archive
MAX_PATH = 4095  # bytes of a name in an archive: the kernel takes no longer path


TELLING = threading.Lock()


def tell(**values: object) -> None:
    with TELLING, contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Send a sign of life every second, for work that reports no progress and does not wait for a stranger."""
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
    """Reports the progress of a piece of work, at most once a second."""

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


# Where clouds serve their machines: Alibaba, Azure, Oracle, AWS, Google. All others use link-local addresses.
METADATA = tuple(
    map(
        ipaddress.ip_network,
        ("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32", "fd00:ec2::/32", "fd20:ce::254/128"),
    )
)
# IPv6 addresses with an IPv4 address at their end: mapped, compatible, translated (RFC 6052).
IPV4_AT_END = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "::ffff:0:0:0/96", "::/96", "64:ff9b::/96")))
LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")  # RFC 8215: its operator chooses the length of the prefix


def check_address(text: str) -> None:
    """Raise DriverError for an address that may serve this machine's secrets, in any form of the address."""
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
    """Checks the address it is connected to before it sends anything, even the TLS handshake."""

    is_proxied = False
    use: Callable[[socket.socket], None]  # called with each socket, before anything is sent

    def connect(self) -> None:
        super().connect()
        self.use(self.sock)
        if not self.is_proxied:
            check_address(self.sock.getpeername()[0])


class SecureConnection(http.client.HTTPSConnection, PlainConnection):
    def connect(self) -> None:
        super().connect()
        self.use(self.sock)  # another one than before the TLS handshake


def is_proxied(request: urllib.request.Request) -> bool:
    """Whether a request goes to a proxy. The operator chose the proxy, so it may have any address. The host it is
    asked for is looked up and checked here too (DriverError), unless only the proxy can resolve it."""
    if not (request.has_proxy() or getattr(request, "_tunnel_host", None)):
        return False
    host = urllib.parse.unquote(urllib.parse.urlsplit(request.full_url).hostname or "").rstrip(".")
    with contextlib.suppress(socket.gaierror):
        for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            check_address(str(entry[4][0]))
    return True


class Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https addresses with connections of our own."""

    def __init__(self, context: ssl.SSLContext, use: Callable[[socket.socket], None]) -> None:
        super().__init__()
        self.context, self.use = context, use

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.connecting(PlainConnection, request), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.connecting(SecureConnection, request), request, context=self.context)

    def connecting(self, kind: type[PlainConnection], request: urllib.request.Request) -> Any:
        proxied = is_proxied(request)

        def connect(*args: Any, **kwargs: Any) -> PlainConnection:
            connection = kind(*args, **kwargs)
            connection.use, connection.is_proxied = self.use, proxied
            return connection

        return connect

    http_request = urllib.request.AbstractHTTPHandler.do_request_
    https_request = urllib.request.AbstractHTTPHandler.do_request_


def origin(url: str) -> tuple[str, str, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class RedirectHandler(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        before, after = origin(req.full_url), origin(newurl)
        if after[0] not in ("http", "https") or (before[0] == "https" and after[0] == "http"):
            raise DriverError(
                f"{redact(req.full_url)} redirects to {shorten(redact(newurl))}, which is not followed"
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request:
            request.remove_header("Proxy-authorization")  # added again if the proxy is used again
            if before != after:
                request.remove_header("Authorization")
        return request


def basic(username: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


MIRROR_STALL = 10.0  # seconds. Not for layers: a cache may send nothing until it has the whole layer
MIRROR_SPEED = 10_000  # bytes a second


class Client:
    """Opens addresses, also in several threads. `stall`: seconds without data after which a transfer counts as
    broken. A mirror (`is_mirror`) is given up sooner: there is a registry that can be asked instead."""

    def __init__(self, stall: float, certificates: Sequence[Path] = (), *, is_mirror: bool = False) -> None:
        self.stall, self.is_mirror = stall, is_mirror
        self.document_stall = min(stall, MIRROR_STALL) if is_mirror else stall
        self.least = (
            int(stall * MIRROR_SPEED) if is_mirror else 1024
        )  # bytes; fewer in `stall` seconds are a stall
        self.attempts = 2 if is_mirror else 10  # with the first; one without any progress is the last
        self.sockets: list[socket.socket] = []
        self.is_stopped = False
        context = ssl.create_default_context()
        for path in certificates:
            context.load_verify_locations(path)
        self.director = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            Handler(context, self.use),
            urllib.request.HTTPDefaultErrorHandler(),
            RedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self.director.add_handler(handler)

    def use(self, connected: socket.socket) -> None:
        self.sockets.append(connected)  # before the look: either this or `stop` ends it
        if self.is_stopped:
            raise TransientError("the transfer was ended")

    def stop(self) -> None:
        """End all transfers of other threads, and let none begin. They fail with a TransientError."""
        self.is_stopped = True
        for known in self.sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(known, socket.SHUT_RDWR)  # SSLSocket's own is not for a socket in use

    def open(
        self, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None = None, stall: float = 0
    ) -> Any:
        """Return the response to a GET, or to a POST of `form`. Raises HTTPError, which the caller can explain
        better, and DriverError."""
        data = urllib.parse.urlencode(form).encode() if form else None
        with explaining(url):
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or parts.port == 0:  # raises ValueError for one beyond 65535
                raise DriverError(f"{redact(url)} is no http or https address")
            request = urllib.request.Request(url, data, {"User-Agent": "nomad-driver-nspawn", **headers})
            with self.watching(2 * (stall or self.stall)):
                response = self.director.open(request, timeout=stall or self.stall)
            if self.is_stopped:  # then the headers may be half of them
                raise TransientError(f"{shorten(redact(url))} has stalled")
            return response

    @contextlib.contextmanager
    def watching(self, limit: float) -> Iterator[None]:
        """End what takes longer than `limit` seconds, if it is a mirror's: its headers may come byte by byte."""
        timer = threading.Timer(limit, self.stop)
        timer.daemon = True
        if self.is_mirror:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def read(
        self, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None = None
    ) -> tuple[bytes, Any]:
        """Return a document of at most MAX_DOCUMENT bytes, and the response's headers. Raises as `open`."""
        stall, data = self.document_stall, b""
        with self.open(url, headers, form, stall) as response, explaining(url):
            end = time.monotonic() + stall
            while chunk := response.read1(MAX_DOCUMENT):
                data += chunk
                if len(data) > MAX_DOCUMENT:
                    rule = f"is longer than the {MAX_DOCUMENT >> 20} MB a document may have"
                    raise DriverError(f"{redact(url)} {rule}")
                if time.monotonic() > end:
                    raise TransientError(f"{shorten(redact(url))} has stalled")
            return data, response.headers


@contextlib.contextmanager
def explaining(url: str) -> Iterator[None]:
    """Turn the errors of a transfer into DriverErrors; HTTPError passes."""
    where = shorten(redact(url))
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
        raise DriverError(f"{where} is no address: {shorten(str(error))}") from None
    except http.client.HTTPException as error:
        raise TransientError(
            f"the transfer from {where} broke off: {shorten(str(error)) or 'no answer'}"
        ) from None
    except ssl.SSLError as error:
        raise TransientError(f"the transfer from {where} broke off: {error.reason}") from None
    except ConnectionError as error:
        raise TransientError(f"the transfer from {where} broke off: {explain_os(error)}") from None
    except (ValueError, OverflowError) as error:  # a port beyond 65535, brackets without an IPv6 address, ...
        raise DriverError(f"{where} or where it leads to is no address: {shorten(str(error))}") from None


def explain_os(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    return str(getattr(reason, "strerror", None) or reason)


def explain_status(error: urllib.error.HTTPError, what: str) -> DriverError:
    """Return the error that the job gets for an HTTP error."""
    if error.code == 404:
        return DriverError(f"{what} is not there (HTTP 404)")
    if error.code in (401, 403):
        return DriverError(f"access to {what} is denied (HTTP {error.code}); check the credentials in auth")
    text = f"{what}: the server answers HTTP {error.code} {shorten(str(error.reason), 80)}"
    return TransientError(text) if error.code in (408, 425, 429) or error.code >= 500 else DriverError(text)


def tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def discard(part: Path) -> None:
    for path in (part, tag_of(part)):
        path.unlink(missing_ok=True)


class Download:
    """Fetches one file to `part`, and resumes what an interrupted download left there.

    It resumes only what is surely the same file: its digest is known beforehand (`is_fixed`), or the server's ETag
    was kept beside it.
    """

    def __init__(
        self,
        client: Client,
        url: str,
        part: Path,
        *,
        limit: int,
        is_fixed: bool = False,
        what: str = "downloading",
    ) -> None:
        self.client, self.url, self.part = client, url, part
        self.limit, self.what = limit, what
        self.is_fixed = is_fixed
        self.tag = tag_of(part)
        self.total: int | None = None

    def run(self, headers: Callable[[], Mapping[str, str]]) -> None:
        """Raises TransientError when the network fails for good, HTTPError, DriverError, and OSError of files."""
        left = self.client.attempts
        while True:
            before = self.size
            try:
                self.transfer(headers())
                return
            except TransientError:
                left -= 1
                if self.size <= before or not left or self.client.is_stopped:
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
            if error.code == 416 and extra:  # the part is complete, or of another file
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
        meter = Meter(self.what, self.total or 0)
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
        """Yield data as it comes. Too little of it in `stall` seconds is a stall, too (TransientError)."""
        mark, count = time.monotonic(), 0
        with explaining(self.url):
            while chunk := response.read1(CHUNK):
                count += len(chunk)
                yield chunk
                if time.monotonic() - mark > self.client.stall:
                    if count < self.client.least:
                        raise TransientError(f"{redact(self.url)} has stalled")
                    mark, count = time.monotonic(), 0


T = TypeVar("T")


class Job(threading.Thread, Generic[T]):
    """A thread with a result, or with an error after which it calls `stop`."""

    def __init__(self, act: Callable[[], T], stop: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.act, self.stop = act, stop
        self.result: T
        self.error: BaseException | None = None
        self.failed_at = 0.0

    def run(self) -> None:
        try:
            self.result = self.act()
        except BaseException as error:
            self.error, self.failed_at = error, time.monotonic()
            self.stop()


def work_ahead(
    acts: Sequence[Callable[[], T]], width: int, stop: Callable[[], None], use: Callable[[T], None]
) -> None:
    """Call `use` with the results of `acts`, one by one in their order, while the next ones are done in threads:
    `width` of them are under way or wait for `use`. The first error is raised, after `stop` has ended the others.
    """
    jobs = [Job(act, stop) for act in acts]
    begun: list[Job[T]] = []
    try:
        for number, job in enumerate(jobs):
            for following in jobs[len(begun) : number + width]:
                following.start()
                begun.append(following)
            job.join()
            if failed := [other for other in begun if other.error]:
                error = min(failed, key=lambda other: other.failed_at).error
                assert error
                raise error
            use(job.result)
    except BaseException:
        stop()
        raise
    finally:
        for job in begun:
            job.join()


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
    """Compare a file with "sha256:HEX" or HEX, which checks.py has checked. Raises DriverError if they differ."""
    value = wanted.rpartition(":")[2].lower()
    found = hash_file(path, ALGORITHMS[len(value)])
    if not hmac.compare_digest(found, value):
        raise DriverError(f"the file has another checksum ({ALGORITHMS[len(value)]}:{found}) than the job says")


def check_published(
    client: Client, url: str, headers: Mapping[str, str], path: Path, mode: str, work: Path
) -> None:
    """Check a file as systemd-pull does: its checksum must be in FILE.sha256 or SHA256SUMS beside it. For
    "signature", SHA256SUMS must be signed by a key of systemd's import keyring. Raises DriverError."""
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
    """Return the first of these documents that exists, and its name. Raises DriverError if none does."""
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
    usual = {
        "env": {"PATH": SAFE_PATH, "LANG": "C.UTF-8"}, "stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
    }  # fmt: skip
    try:
        return subprocess.Popen(argv, **{**usual, **streams})
    except FileNotFoundError:
        raise HostError(f"{argv[0]} is not installed: install the package {package}") from None
