# SPDX-License-Identifier: MPL-2.0
"""Runs rounds in several processes at once, and counts. Their plans and faults go to stdout as they come.

Each worker has a mount namespace of its own: there the directories that the driver and nspawn keep below /run are
small file systems, which a round can fill and in which every file that is left is found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from tests.chaos.plan import CHOICES
from tests.chaos.round import ACTIONS, Report, run_round
from tests.chaos.worker import Worker

ROUND_LIMIT = 400.0  # seconds after which a round counts as hanging


def serve(without: Sequence[str]) -> None:
    """A worker: seeds come on stdin, a line each; reports go to stdout."""
    worker = Worker()
    try:
        for line in sys.stdin:
            print(json.dumps(dataclasses.asdict(run_round(worker, int(line), without))), flush=True)
    finally:
        worker.close()


class Rounds:
    """Rounds that are shared out among workers."""

    def __init__(self, seeds: Sequence[int], without: Sequence[str]) -> None:
        self.seeds, self.without = iter(seeds), without
        self.reports: list[Report] = []
        self.lock = threading.Lock()

    def run(self, workers: int) -> None:
        threads = [threading.Thread(target=self.drive) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def draw(self) -> Iterator[int]:
        while True:
            with self.lock:
                seed = next(self.seeds, None)
            if seed is None:
                return
            yield seed

    def drive(self) -> None:
        """Have one worker run rounds until there are no more. One that hangs is replaced."""
        argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.chaos"]
        argv += ["--worker", *self.without]
        process: subprocess.Popen[str] | None = None
        for seed in self.draw():
            if process is None:
                process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert process.stdin and process.stdout
            process.stdin.write(f"{seed}\n")
            process.stdin.flush()
            alarm = threading.Timer(ROUND_LIMIT, process.kill)
            alarm.start()
            line = process.stdout.readline()
            alarm.cancel()
            if line:
                self.note(Report(**json.loads(line)))
                continue
            self.note(Report(seed, faults=[("hang", f"no end within {ROUND_LIMIT:g} s, or the worker died")]))
            process.kill()
            process.wait()
            process = None
        if process and process.stdin:
            process.stdin.close()
            process.wait()

    def note(self, report: Report) -> None:
        with self.lock:
            self.reports.append(report)
            if len(self.reports) % 100 == 0:
                print(f"{len(self.reports)} rounds", flush=True)
            if report.faults:
                print(f"seed {report.seed}: {report.plan}\n    done: {' '.join(report.done)}")
                for kind, text in report.faults:
                    print(f"    {kind}: {text}", flush=True)

    def render(self) -> str:
        """The count: what was done, and what went wrong."""
        failed = [report for report in self.reports if report.faults]
        done = Counter(name for report in self.reports for name in report.done)
        done_in_failed = Counter(name for report in failed for name in set(report.done))
        faults = Counter(kind for report in failed for kind, _ in report.faults)
        lines = [
            f"  {name:<18} {done[name]:>6} times, {done_in_failed[name]} failed rounds" for name in sorted(done)
        ]
        lines.append(f"{len(self.reports)} rounds, {len(failed)} failed")
        return "\n".join([*lines, *(f"  {kind:<18} {count:>6}" for kind, count in faults.most_common())])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="sh build.sh chaos", description="Random rounds against the built plugin."
    )
    parser.add_argument("rounds", nargs="?", type=int, default=100)
    parser.add_argument("first", nargs="?", type=int, help="the seed of the first round; the others follow")
    parser.add_argument("--seed", type=int, help="run the round of this seed alone")
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1), help="rounds at the same time")
    names = ", ".join([*ACTIONS, "cancelled", "short", *CHOICES["destroys"][1:]])
    parser.add_argument("--without", default="", help=f"leave these out, separated by commas: {names}")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        serve(options.worker)
        return 0
    first = random.SystemRandom().randrange(10**9) if options.first is None else options.first
    seeds = range(first, first + options.rounds) if options.seed is None else [options.seed]
    print(f"rounds {seeds[0]} to {seeds[-1]}; one again: sh build.sh chaos --seed {seeds[0]}", flush=True)
    began = time.monotonic()
    rounds = Rounds(seeds, options.without.split(","))
    rounds.run(min(options.workers, len(seeds)))
    print(f"{rounds.render()}\nin {time.monotonic() - began:.0f} s")
    return int(any(report.faults for report in rounds.reports))


if __name__ == "__main__":
    sys.exit(main())
