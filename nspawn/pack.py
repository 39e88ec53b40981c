# SPDX-License-Identifier: MPL-2.0
"""Makes the built file from shiv's archive: `python nspawn/pack.py ARCHITECTURE SHIV OUT COMMIT`, by build.sh.

The file is launcher.sh, then the archive, compressed, with bootstrap.py as its __main__.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent


def read_version() -> str:
    (version,) = re.findall(r'^__version__ = "(.+?)"', (HERE.parent / "driver.py").read_text(), re.MULTILINE)
    return str(version)


def fill(path: Path, facts: Mapping[str, str]) -> str:
    """Return a file's text with the facts of this build filled in."""
    text = path.read_text()
    for name, value in facts.items():
        text = text.replace(name, value)
    return text


def pack(architecture: str, shiv: str, out: str, commit: str) -> None:
    with zipfile.ZipFile(shiv) as source, open(out, "wb") as target:
        build_id = json.loads(source.read("environment.json"))["build_id"]
        version = f"{read_version()} ({commit})" if commit else read_version()
        facts = {"@BUILD_ID@": build_id, "@ARCH@": architecture, "@VERSION@": version}
        launcher = fill(HERE / "launcher.sh", facts)
        replaced = {"__main__.py": fill(HERE / "bootstrap.py", facts)}
        target.write(launcher.encode())
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in source.namelist():
                entry = zipfile.ZipInfo(name)  # always of 1980-01-01
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o100644 << 16
                archive.writestr(entry, replaced.get(name) or source.read(name))
        size = target.seek(0, os.SEEK_END)
        target.seek(0)
        target.write(launcher.replace("@FILE_SIZE@", f"{size:<11}").encode())  # as long as the placeholder
    os.chmod(out, 0o755)


if __name__ == "__main__":
    pack(*sys.argv[1:])
