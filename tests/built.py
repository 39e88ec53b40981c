# SPDX-License-Identifier: MPL-2.0
"""Whether the built file is made of the sources that stand in the checkout."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

INSIDE = "site-packages/"
OURS = re.compile(rf"{INSIDE}(driver\.py|(nspawn|nomad_pb)/[^/]+)")
APART = {"nspawn/bootstrap.py", "nspawn/pack.py", "nspawn/launcher.sh"}  # not in the archive under their names
BLANK = re.compile(rb"@[A-Z_]+@")  # filled in when the file is made


def find_changed(built: Path, top: Path) -> list[str]:
    """Return the sources that differ from what is in the built file, or that only one of the two has."""
    sources = [top / "driver.py", *top.glob("nspawn/*.py"), *top.glob("nspawn/*.sh"), *top.glob("nomad_pb/*.py")]
    wanted = {str(path.relative_to(top)): path.read_bytes() for path in sources}
    apart = {name: wanted.pop(name) for name in APART}
    with zipfile.ZipFile(built) as archive:
        held = {name.removeprefix(INSIDE): archive.read(name) for name in archive.namelist() if OURS.match(name)}
        head = {"nspawn/launcher.sh": built.read_bytes(), "nspawn/bootstrap.py": archive.read("__main__.py")}
    changed = [name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name)]
    for name, made in head.items():
        pattern = rb".*?".join(re.escape(part) for part in BLANK.split(apart[name]))
        if not re.match(pattern + rb"(PK\x03\x04|\Z)", made, re.DOTALL):  # then comes the archive, or nothing
            changed.append(name)
    return sorted(changed)
