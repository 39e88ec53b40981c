# SPDX-License-Identifier: MPL-2.0
"""Reading what processes write: bytes from a descriptor, lines from bytes, the log FIFOs of a task."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

LINE_LIMIT = 64 * 1024
HANG = 120.0  # seconds: a wait this long means that it never ends, on slow and busy machines, too


class FdReader:
    """A thread that hands on what a file descriptor yields until EOF or close(), which can interrupt it."""

    def __init__(self, fd: int, on_data: Callable[[bytes], None]) -> None:
        self._fd, self._on_data = fd, on_data
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self._wake_read in ready:
                break
            data = os.read(self._fd, LINE_LIMIT)
            if not data:
                break
            self._on_data(data)
        os.close(self._fd)

    def ended(self, timeout: float = 0) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        if self._wake_write < 0:
            return
        os.close(self._wake_write)
        self._wake_write = -1
        self._thread.join()
        os.close(self._wake_read)


class Lines:
    """Bytes in, lines out."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._rest, self._on_line = b"", on_line

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._on_line(line.decode(errors="replace"))

    @property
    def rest(self) -> str:
        return self._rest.decode(errors="replace")


class Logmon:
    """The log collector of one task: owns the reading ends of its two FIFOs.

    A stream ends at EOF, when its last writer has closed, and comes back only with restart(), which the agent
    calls before each start of the task and after its own restart. `stdout` and `stderr` hold all bytes so far.
    """

    def __init__(
        self, logs: Path, task: str, on_output: Callable[[str, bytes], None] = lambda stream, data: None
    ) -> None:
        self.paths = {name: logs / f".{task}.{name}.fifo" for name in ("stdout", "stderr")}
        self.files = {name: logs / f"{task}.{name}.0" for name in ("stdout", "stderr")}
        self._output = {"stdout": b"", "stderr": b""}
        self._readers: dict[str, FdReader] = {}
        self._changed = threading.Condition()
        self._on_output = on_output

    @property
    def stdout(self) -> bytes:
        return self._output["stdout"]

    @property
    def stderr(self) -> bytes:
        return self._output["stderr"]

    def start(self) -> None:
        for name, path in self.paths.items():
            if not path.exists():
                os.mkfifo(path, 0o600)
            # Non-blocking, or a thread would hang in open() until a writer comes; for a writer both look the
            # same, and poll() reports no hang-up before there has been one.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(fd, True)
            self._readers[name] = FdReader(fd, self._sink(name))

    def _sink(self, name: str) -> Callable[[bytes], None]:
        def sink(data: bytes) -> None:
            with self.files[name].open("ab") as file:
                file.write(data)
            with self._changed:
                self._output[name] += data
                self._changed.notify_all()
            self._on_output(name, data)

        return sink

    def running(self, name: str) -> bool:
        return name in self._readers and not self._readers[name].ended()

    def restart(self) -> None:
        """As the prestart hook: nothing while both streams live, otherwise close and open both again."""
        if self.running("stdout") and self.running("stderr"):
            return
        if self._readers:
            self.stop(0)
        self.start()

    def stop(self, tolerance: float = 2) -> None:
        """Wait `tolerance` seconds for EOF of each stream, then close the reader: what comes later is lost."""
        deadline = time.monotonic() + tolerance
        for reader in self._readers.values():
            reader.ended(max(0, deadline - time.monotonic()))
            reader.close()
        self._readers = {}

    def wait_for(self, text: bytes | str, stream: str = "stdout", timeout: float = HANG) -> bytes:
        """All output of a stream, as soon as it contains `text`."""
        wanted = text.encode() if isinstance(text, str) else text
        with self._changed:
            if not self._changed.wait_for(lambda: wanted in self._output[stream], timeout):
                raise TimeoutError(f"{wanted!r} not in {stream} within {timeout:g} s: {self._output!r}")
            return self._output[stream]

    def wait_eof(self, timeout: float = HANG) -> None:
        """Wait until both streams have ended, that is all writers have closed."""
        for name, reader in self._readers.items():
            if not reader.ended(timeout):
                raise TimeoutError(f"somebody still holds the {name} FIFO open")
