# SPDX-License-Identifier: MPL-2.0
"""For hypothesis: a slow machine is no fault, and a checkout may be read-only."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unit", deadline=None, database=None)
settings.load_profile("unit")
