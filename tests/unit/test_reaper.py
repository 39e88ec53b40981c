# SPDX-License-Identifier: MPL-2.0
"""What the reaper takes for the kernel's word that an allocation's directory was removed."""

from __future__ import annotations

import pytest

from nspawn.checks import parse_duration
from nspawn.reaper import is_mounted_removed

ALLOC = "0b3c7f4e-1c3f-7b6e-3b41-2f9f0d6b9a10"


@pytest.mark.parametrize(
    ("mounts", "is_removed"),
    [
        ([f"/opt/alloc/{ALLOC}/alloc//deleted /alloc"], True),
        ([f"/alloc/{ALLOC}/alloc//deleted /alloc", "/ /proc"], True),
        ([f"/opt/alloc/{ALLOC}/alloc /alloc"], False),
        (["/ /alloc"], False),
        ([f"/opt/alloc/{ALLOC}/alloc//deleted /alloc", "/else /alloc"], False),  # something over it
        (["/opt/alloc/another/alloc//deleted /alloc"], False),
        ([f"/opt/alloc/{ALLOC}/alloc//deleted /local"], False),
        ([], False),
    ],
)
def test_removed_directories(mounts: list[str], is_removed: bool) -> None:
    text = "".join(f"36 35 98:0 {mount} rw,noatime master:1 - ext4 /dev/root rw\n" for mount in mounts)
    assert is_mounted_removed(text, ALLOC) is is_removed


def test_zero_is_a_duration() -> None:
    assert parse_duration("reap_after", "0") == 0
