# SPDX-License-Identifier: MPL-2.0
"""The __main__.py of the built file: unpacks what this interpreter needs, then lets shiv's bootstrap run it.

shiv's bootstrap unpacks too, but it trusts any directory of the right name. Files that a power failure or a
cleaner removed stay missing, a directory that somebody else put there is executed, and nothing is ever removed. So
this unpacks first, and shiv finds its tree. A preamble of shiv would run too late, and would itself be in the tree
that it has to check.

Any Python 3 must be able to parse this file, so that it can say that it is too old.

The cache holds `<file name>_<build id>/site-packages`, as shiv expects. Every start compares it with the archive
and unpacks what is missing or has another size. That also completes an interrupted start. Each running process
holds a shared lock on its tree; trees of other builds that nobody holds are removed.
"""

import sys

NAME = "nomad-driver-nspawn"


def fail(text: str) -> None:
    """Nomad shows the first line of stdout in its error and logs lines of stderr that begin with [ERROR]."""
    text = " ".join(text.split())
    print("[ERROR] %s: %s" % (NAME, text), file=sys.stderr)
    print("%s: %s" % (NAME, text))
    sys.exit(1)


def explain_import(error: ImportError) -> str:
    """Returns what to install for a module that cannot be imported: a minimal system lacks some."""
    name = error.name or ""
    if "libstdc++" in str(error):
        return "needs libstdc++.so.6 (%s): install libstdc++6 (Debian, Ubuntu) or libstdc++ (Fedora, RHEL)" % error
    if name.partition(".")[0] in getattr(sys, "stdlib_module_names", ()):  # since 3.10
        return (
            "%s is not complete, it lacks the module %s: install the package python3 (not just python3-minimal), "
            "or set NOMAD_DRIVER_NSPAWN_PYTHON to the path of another Python" % (sys.executable, name)
        )
    return explain_load(error)


def explain_load(error: Exception) -> str:
    where = os.environ.get("SHIV_ROOT", FILE)
    return "%s cannot load its code from %s (%s): remove what is damaged there" % (sys.executable, where, error)


try:
    import fcntl
    import gc
    import os
    import shutil
    import zipfile
    import zlib
    from importlib.machinery import EXTENSION_SUFFIXES
    from importlib.util import find_spec
except ImportError as error:
    fail(explain_import(error))

FILE = os.path.realpath(sys.argv[0])
STEM = os.path.basename(FILE) + "_"
TREE = STEM + "@BUILD_ID@"
SUFFIX = EXTENSION_SUFFIXES[0]  # .cpython-311-x86_64-linux-gnu.so


def needed(archive: zipfile.ZipFile) -> "list[zipfile.ZipInfo]":
    """Returns the files for this interpreter. Modules compiled for others, three quarters of all bytes, are left
    out. Exits if there are none for this one."""
    entries = [e for e in archive.infolist() if e.filename.startswith("site-packages/")]
    if not any(e.filename.endswith(SUFFIX) for e in entries):
        fail(
            "needs CPython 3.10 to 3.14 for @ARCH@ and glibc; %s is %s %d.%d and loads %s: install one or set "
            "NOMAD_DRIVER_NSPAWN_PYTHON to its path"
            % (sys.executable, sys.implementation.name, sys.version_info[0], sys.version_info[1], SUFFIX)
        )
    return [e for e in entries if ".cpython-" not in e.filename or e.filename.endswith(SUFFIX)]


def places() -> "list[str]":
    """Returns the directories for a tree, best first. None is world-writable: anybody knows the tree's name."""
    if os.environ.get("SHIV_ROOT"):
        return [os.path.expanduser(os.environ["SHIV_ROOT"])]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    own = [os.path.join(cache, NAME)] if os.path.isabs(cache) else []
    if os.geteuid() != 0:
        return own
    return ["/var/cache/" + NAME, "/var/lib/" + NAME + "-cache", "/run/" + NAME + "-cache"] + own


def check_place(place: str) -> None:
    """Makes a directory for trees. Raises OSError if another user could plant code there, which this user would
    run, or if no code can run there. It trusts groups that can write to a parent directory."""
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

    The file is removed only under an exclusive lock, so a lock on a removed file is void: retry. Raises OSError.
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
    """Returns the entries whose files are missing or have another size. One stat per file finds what a power
    failure, a full disk or a cleaner leaves."""

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
        for entry in damaged(tree, entries):  # look again: another process may just have repaired it
            path = tree + "/" + entry.filename
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(part, "wb") as file:
                file.write(archive.read(entry))
            os.rename(part, path)
    except OSError:
        if os.path.exists(part):
            os.unlink(part)  # frees its room on a full disk
        raise
    finally:
        os.close(writing)


def prune(place: str) -> None:
    """Removes the trees of other builds of this file that no process holds: after an upgrade, the old one."""
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
            pass  # most likely a process holds it; this is never a reason not to start


def unpack() -> str:
    """Returns the directory that now holds a complete, locked tree. Exits with a sentence if there is none."""
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


if sys.argv[1:] in (["--version"], ["version"]):  # nothing has to be unpacked for that
    try:
        os.write(1, (NAME + " @VERSION@\n").encode())
    except OSError:
        pass  # the reader is gone
    sys.exit()
os.umask(0o022)  # with another one, all users might be able to write to the tree
for variable in [v for v in os.environ if v.startswith("SHIV_") and v != "SHIV_ROOT"]:
    del os.environ[variable]  # they would give shiv another entry point, sys.path or interpreter
try:
    os.environ["SHIV_ROOT"] = unpack()
except (zipfile.BadZipFile, zlib.error, EOFError) as error:
    fail("%s is damaged (%s): download or build it again" % (FILE, error))
# What grpc reads when it is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # its fork handlers crash the children we start (grpc#41768)
os.environ["GRPC_VERBOSITY"] = "NONE"  # its C core writes to stderr by itself
sys.modules["ssl"] = None  # type: ignore[assignment]  # asyncio does without: 12 ms and 4 MB less
if find_spec("_md5") and (find_spec("_sha2") or find_spec("_sha256")):  # some distributions leave them out
    sys.modules["_hashlib"] = None  # type: ignore[assignment]  # Python's own hashes will do: 3 MB of OpenSSL less
gc.disable()  # imports make no garbage: this saves 10 ms; driver.py enables it again
try:
    from _bootstrap import bootstrap  # shiv's, which reads the environment set above

    bootstrap()
except ImportError as error:
    fail(explain_import(error))
except Exception as error:  # a power failure leaves files of the right size that hold zeros
    if "driver" in sys.modules:
        raise
    fail(explain_load(error))
