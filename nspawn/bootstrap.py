# SPDX-License-Identifier: MPL-2.0
"""The __main__.py of the built file: unpacks what this interpreter needs, then lets shiv's bootstrap run it.

shiv's bootstrap unpacks too, but it trusts any directory of the right name: files that are missing after a power
failure or a cleaner's visit stay missing, a directory that somebody else has put there is executed, and nothing is
ever removed. So this unpacks first, and shiv finds its tree. A preamble of shiv would run too late, and would
itself lie in the tree it has to check.

Any Python 3 must be able to read this file, to say that it is too old.

The cache holds `<file name>_<build id>/site-packages`, as shiv expects. Every start compares it with the archive
and unpacks what is missing or has another size, which also finishes what an interrupted start left. Each running
process shares a lock on its tree; trees of other builds that nobody holds are removed.
"""

import fcntl
import gc
import os
import shutil
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES

NAME = "nomad-driver-nspawn"
FILE = os.path.realpath(sys.argv[0])
STEM = os.path.basename(FILE) + "_"
TREE = STEM + "@BUILD_ID@"
SUFFIX = EXTENSION_SUFFIXES[0]  # .cpython-311-x86_64-linux-gnu.so


def fail(text: str) -> None:
    """Nomad shows the first line of stdout in its error and logs lines of stderr that begin with [ERROR]."""
    print("[ERROR] %s: %s" % (NAME, text), file=sys.stderr)
    print("%s: %s" % (NAME, text))
    sys.exit(1)


def needed(archive: zipfile.ZipFile) -> "list[zipfile.ZipInfo]":
    """Files for this interpreter: all but the modules compiled for other ones, three quarters of all bytes."""
    entries = [e for e in archive.infolist() if e.filename.startswith("site-packages/")]
    if not any(e.filename.endswith(SUFFIX) for e in entries):
        fail(
            "needs CPython 3.10 to 3.14 for @ARCH@ and glibc; %s is %s %d.%d and loads %s: install one or set "
            "NOMAD_DRIVER_NSPAWN_PYTHON to its path"
            % (sys.executable, sys.implementation.name, sys.version_info[0], sys.version_info[1], SUFFIX)
        )
    return [e for e in entries if ".cpython-" not in e.filename or e.filename.endswith(SUFFIX)]


def places() -> "list[str]":
    """Where a tree may lie, best first. Nothing world-writable: the name of a tree is public."""
    if os.environ.get("SHIV_ROOT"):
        return [os.path.expanduser(os.environ["SHIV_ROOT"])]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    own = [os.path.join(cache, NAME)] if os.path.isabs(cache) else []
    if os.geteuid() != 0:
        return own
    return ["/var/cache/" + NAME, "/var/lib/" + NAME + "-cache", "/run/" + NAME + "-cache"] + own


def check_place(place: str) -> None:
    """Nobody else may be able to change or exchange what will be run from here, or this would run it as root."""
    os.makedirs(place, 0o700, exist_ok=True)
    if os.stat(place).st_mode & 0o022:
        raise PermissionError("cannot be trusted with code: others can write to it (chmod go-w)")
    path = place
    while True:
        status = os.stat(path)
        if status.st_uid != os.geteuid() and (path == place or status.st_uid != 0):
            raise PermissionError("cannot be trusted with code: %s belongs to user %d" % (path, status.st_uid))
        if status.st_mode & 0o1002 == 0o0002:
            raise PermissionError("cannot be trusted with code: all can write to %s" % path)
        if path == "/":
            break
        path = os.path.dirname(path)
    flags = os.statvfs(place).f_flag
    if flags & os.ST_RDONLY:
        raise PermissionError("is on a read-only file system")
    if flags & os.ST_NOEXEC:
        raise PermissionError("is on a file system mounted noexec")


def lock(path: str, how: int) -> int:
    """Returns a file descriptor that holds the lock until it is closed; children do not inherit it.

    Who holds a lock exclusively may remove its file, so a lock got on a removed file counts for nothing.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, how)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def damaged(tree: str, entries: "list[zipfile.ZipInfo]") -> "list[zipfile.ZipInfo]":
    """Looks at sizes only: finds what a power failure, a full disk or a cleaner leaves, with one stat a file."""

    def size(path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError:
            return -1

    return [e for e in entries if size(tree + "/" + e.filename) != e.file_size]


def repair(tree: str, archive: zipfile.ZipFile, entries: "list[zipfile.ZipInfo]") -> None:
    os.makedirs(tree, exist_ok=True)
    writing = lock(tree + "/.lock", fcntl.LOCK_EX)
    part = tree + "/.part"
    try:
        for entry in damaged(tree, entries):  # again: somebody else may just have done it
            path = tree + "/" + entry.filename
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(part, "wb") as file:
                file.write(archive.read(entry))
            os.rename(part, path)
    except OSError:
        if os.path.exists(part):
            os.unlink(part)  # gives a full disk its room back
        raise
    finally:
        os.close(writing)


def prune(place: str) -> None:
    """Removes the trees of other builds that no process holds: after an upgrade, the old one."""
    names = {n[:-5] if n.endswith(".lock") else n for n in os.listdir(place)}
    for name in names:
        if name == TREE or not name.startswith(STEM) or len(name) != len(TREE):
            continue
        path = os.path.join(place, name)
        try:
            held = lock(path + ".lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            os.unlink(path + ".lock")
            os.close(held)
        except OSError:
            pass  # held, most likely; and never a reason not to start


def unpack() -> str:
    """Returns the place that now holds a whole tree, locked; exits with a sentence when there is none."""
    reasons = []
    with zipfile.ZipFile(FILE) as archive:
        entries = needed(archive)
        for place in map(os.path.realpath, places()):
            tree = os.path.join(place, TREE)
            try:
                check_place(place)
                lock(tree + ".lock", fcntl.LOCK_SH)  # kept open until the process ends
                if damaged(tree, entries):
                    repair(tree, archive, entries)
                prune(place)
                return place
            except OSError as error:
                reasons.append("%s %s" % (place, error.strerror or error))
    fail(
        "no place to unpack to: %s; set SHIV_ROOT to a directory of this user with 30 MB of room"
        % ("; ".join(reasons) or "neither HOME nor XDG_CACHE_HOME is set")
    )
    raise AssertionError


os.umask(0o022)  # with another one directories of the tree might be writable for all
for variable in [v for v in os.environ if v.startswith("SHIV_") and v != "SHIV_ROOT"]:
    del os.environ[variable]  # shiv would take another entry point, sys.path or interpreter from them
os.environ["SHIV_ROOT"] = unpack()
if sys.argv[1:] == ["--version"]:  # driver.py would say the same, 60 ms later
    print(NAME + " @VERSION@")
    sys.exit()
# What grpc reads when it is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # its fork handlers crash the children we start (grpc#41768)
os.environ["GRPC_VERBOSITY"] = "NONE"  # its C core writes to stderr by itself
sys.modules["ssl"] = None  # type: ignore[assignment]  # asyncio does without: 12 ms and 4 MB less
gc.disable()  # nothing that is imported now is garbage: 10 ms; driver.py enables it again
from _bootstrap import bootstrap  # noqa: E402 # shiv's, which reads the environment set above

bootstrap()
