# SPDX-License-Identifier: MPL-2.0
"""Random rounds against the built plugin: `sh build.sh chaos --help`.

A round starts a task, does to it, to its processes and to the host what accidents do, and ends it. Then it checks
that the result is true and the same from every plugin, that no line of both logs is lost or comes twice, and that
nothing is left. All of a round is drawn from its seed (`plan`); only the moments at which things happen are the
machine's.
"""
