# SPDX-License-Identifier: MPL-2.0
"""Signatures of images in registries: the `cosign` tool verifies them where the operator demands it.

The key alone decides: cosign asks the registry for the signature, and no other server. It has the credentials that
the image is fetched with, in a directory of its own, and ends with this process.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

from nspawn.common import DriverError, HostError, TransientError, shorten
from nspawn.download import start_tool, telling
from nspawn.registry import CERTIFICATES, Credentials, Registry

# More than this process may have: Go's runtime reserves much address space.
LIMITS = ("setpriv", "--pdeathsig", "KILL", "--", "prlimit", f"--as={4 << 30}:", f"--fsize={16 << 20}:", "--")
SYSTEM_CERTIFICATES = "/etc/ssl/certs:/etc/pki/tls/certs"
NO_SERVER = "http://127.0.0.1:1"  # nobody listens there
# No signature, none that matches, none with a certificate. All else may be the network; cosign 3.1 says 1 also of
# signatures with another key.
VERDICTS = (10, 12, 13)


def check_signature(registry: Registry, digest: str, key: str, work: Path, timeout: float) -> None:
    """Raise DriverError unless a public key has signed a manifest. `key` is in PEM, `work` a directory for files,
    `timeout` the seconds that cosign may take."""
    demand = f"{registry.shown} must be signed (require_signature)"
    if not shutil.which("cosign"):
        raise HostError(f"{demand}, and cosign is not installed: put it into a directory such as /usr/local/bin")
    home = work / "cosign"
    home.mkdir(mode=0o700, exist_ok=True)
    (home / "key.pub").write_text(key)
    (home / "config.json").write_text(json.dumps({"auths": {registry.host: render_login(registry.credentials)}}))
    argv = [*LIMITS, "cosign", "verify", f"--key={home}/key.pub", "--insecure-ignore-tlog=true", "--output=text"]
    if registry.server.startswith("http://"):
        argv.append("--allow-http-registry=true")
    with open(home / "said", "w+b") as said:
        place = f"{registry.host}/{registry.name}@{digest}"
        streams = {"env": make_environ(registry, home), "stdout": subprocess.DEVNULL, "stderr": said}
        process = start_tool([*argv, "--", place], "util-linux", **streams)
        try:
            with telling():
                status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TransientError(f"{demand}, and cosign has not verified {digest} within {timeout:g} s") from None
        finally:
            process.kill()
            process.wait()
            (home / "config.json").unlink()
        said.seek(0)
        lines = said.read(1 << 16).decode(errors="replace").strip().splitlines()
    if status:
        why = lines[-1].removeprefix("error during command execution: ") if lines else f"it ended with {status}"
        kind = DriverError if status in VERDICTS else TransientError
        raise kind(f"{demand}, and cosign refuses {digest}: {shorten(why)}")


def render_login(credentials: Credentials) -> dict[str, str]:
    """Return what docker's configuration file has for a registry."""
    if credentials.token:
        return {"identitytoken": credentials.token}
    if not credentials.header:
        return {}
    return {"auth": base64.b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()}


def make_environ(registry: Registry, home: Path) -> dict[str, str]:
    """Return cosign's environment: the proxies and certificates of this process, and places in `home`."""
    own_places = {"HOME": str(home), "DOCKER_CONFIG": str(home), "TUF_MIRROR": NO_SERVER}
    environ = {**os.environ, **own_places, "COSIGN_MAX_ATTACHMENT_SIZE": "16MiB"}
    own = CERTIFICATES / registry.host
    if own.is_dir():
        environ["SSL_CERT_DIR"] = f"{environ.get('SSL_CERT_DIR') or SYSTEM_CERTIFICATES}:{own}"
    return environ
