# SPDX-License-Identifier: MPL-2.0
"""Who a command in a container runs as: USER or, in the configuration of an OCI image, USER:GROUP.

Each is a name or a number. The driver looks them up in the image's own files and gives nspawn numbers. nspawn
itself would run the image's `getent`, which many images lack (distroless, scratch) or have in a form it cannot use
(Alpine).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nspawn.checks import NO_TEXT, USER, check_user
from nspawn.common import ConfigError, quote
from nspawn.images import MAX_TEXT, Image, read_in_image
from nspawn.job import JobOptions
from nspawn.mounts import Mount


@dataclass(frozen=True)
class Account:
    """A user of a container."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]  # further ones
    home: str

    @property
    def variables(self) -> dict[str, str]:
        """The variables that nspawn sets for a user given by name, but not for one given by number."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}


def find_account(image: Image, options: JobOptions, volumes: Iterable[Mount] = ()) -> Account | None:
    """Return the user for the command. None: none is set, the container boots, or nspawn has to look the user up.
    It does for a disk image and, outside the store, if mounts hide /etc/passwd or the name is not there: systemd
    knows others (`bind_user`). `volumes` are Nomad's mounts. Raises ConfigError."""
    wanted = options.user
    if not wanted or options.boot or not image.is_directory:
        return None
    if not image.key and hides_accounts(options, volumes):
        return None
    name, _, group = wanted.partition(":")
    name = check_user("user", name or "root")
    groups = read_entries(image, f"{options.root}/etc/group")
    gid = find_group(wanted, group, groups)
    if name in ("root", "0"):
        return Account("root", 0, gid or 0, (), "/root")
    for entry in read_entries(image, f"{options.root}/etc/passwd"):
        if len(entry) > 5 and name in (entry[0], entry[2]) and is_id(entry[2]) and is_id(entry[3]):
            return parse_account(entry, gid, groups)
    if is_number(wanted, name):
        return Account(name, int(name), gid or 0, (), "/")
    if not image.key:
        return None
    raise ConfigError("user", wanted, "the image's /etc/passwd has no such user", "give the user's number")


def hides_accounts(options: JobOptions, volumes: Iterable[Mount]) -> bool:
    """Whether something is mounted over the image's passwd or group."""
    targets = [mount.target for mount in (*options.binds, *volumes)]
    targets += [overlay.target for overlay in options.overlays]
    hidden = {os.path.normpath(f"/{target}").lstrip("/") for target in targets}
    return not hidden.isdisjoint(("", "etc", "etc/passwd", "etc/group"))


def read_entries(image: Image, path: str) -> list[list[str]]:
    """Return the lines of an image's passwd or group, each split into fields."""
    text = read_in_image(image, path)
    if len(text.encode()) >= MAX_TEXT:
        text = text.rpartition("\n")[0]  # the last line may have been cut in the middle of a number
    return [line.split(":") for line in text.split("\n")]


def parse_account(entry: Sequence[str], gid: int | None, groups: Sequence[Sequence[str]]) -> Account:
    """Return the user of a line of passwd. A group that was asked for replaces all others."""
    name, uid, home = entry[0] if USER.fullmatch(entry[0]) else entry[2], int(entry[2]), entry[5]
    if not home.startswith("/") or NO_TEXT.search(home):
        home = "/"
    if gid is not None:
        return Account(name, uid, gid, (), home)
    members = [group for group in groups if len(group) > 3 and is_id(group[2]) and name in group[3].split(",")]
    return Account(name, uid, int(entry[3]), tuple(int(group[2]) for group in members), home)


def find_group(wanted: str, group: str, groups: Sequence[Sequence[str]]) -> int | None:
    """Return the number of a group, None if none is asked for. Raises ConfigError if the image has none such."""
    if not group:
        return None
    numbers = [int(entry[2]) for entry in groups if len(entry) > 2 and entry[0] == group and is_id(entry[2])]
    if not numbers and not is_number(wanted, group):
        raise ConfigError("user", wanted, f"the image has no group {quote(group)}", "give the group's number")
    return numbers[0] if numbers else int(group)


def is_number(wanted: str, text: str) -> bool:
    """Whether a name is a number. Raises ConfigError for a number that no user can have."""
    if text.isascii() and text.isdigit() and not is_id(text):
        raise ConfigError("user", wanted, "user numbers go up to 999999999, without 65535", "give another")
    return is_id(text)


def is_id(text: str) -> bool:
    """Whether a text is the number of a user or group. systemd refuses 65535, which is -1 in 16 bits."""
    return bool(re.fullmatch(r"\d{1,9}", text, re.ASCII)) and int(text) != 0xFFFF
