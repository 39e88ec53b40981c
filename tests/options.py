# SPDX-License-Identifier: MPL-2.0
"""A job's options, as the driver reads them."""

from __future__ import annotations

from driver import PLUGIN_OPTIONS, TASK_OPTIONS
from nspawn.job import JobOptions
from nspawn.options import decode_options
from nspawn.permissions import PluginOptions
from nspawn.rules import decode_job

CONFIG = PluginOptions(**decode_options(PLUGIN_OPTIONS, {}))  # of an empty plugin block


def read_options(config: PluginOptions = CONFIG, is_in_group: bool = False, /, **options: object) -> JobOptions:
    return decode_job(TASK_OPTIONS, {"image": "debian", **options}, config, is_in_group=is_in_group)
