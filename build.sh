#!/bin/sh
# Builds, tests and shows nomad-driver-nspawn: `sh build.sh help` lists the commands.
# Has no execute bit: an agent started with -plugin-dir=$(pwd) would run it as a plugin.
set -eu
umask 022
cd "$(dirname "$0")"
export LC_ALL=C
unset SOURCE_DATE_EPOCH		# shiv would put it into the file; the same sources shall give the same bytes

name=nomad-driver-nspawn
pythons='3.10 3.11 3.12 3.13 3.14'
image_cache=${IMAGE_CACHE:-/var/cache/$name-tests}
python=build/venv/bin/python

help() {
	cat <<EOF
usage: sh build.sh [command]

  build [--arch A]    make ./$name for this machine (the default command), or with
                      another A (x86_64, aarch64) build/$name-A
  test [pytest args]  build and run the tests; root, installs what is missing with apt
  demo                build and start a Nomad agent with the driver; root, the same
  bench               build and measure; root, the same
  protos              generate the Python code in nomad_pb/ anew
  reference           write the reference of all options into README.md anew
  clean               remove what was built

Images for tests are made once in \$IMAGE_CACHE (now $image_cache).
EOF
}

die() {
	echo "build.sh: $1" >&2
	exit 1
}

# -- commands ------------------------------------------------------------------------------------------------

build() {
	arch=$(uname -m)
	out=$name
	if [ "${1-}" = --arch ]; then
		# Not at the top when it cannot run here: the agent would start it, fail, and refuse to start itself.
		[ "${2-}" = "$arch" ] || out=build/$name-${2-}
		arch=${2-}
		shift $(($# < 2 ? $# : 2))
	fi
	[ $# = 0 ] || die "build: what is '$1'? Only --arch x86_64 or --arch aarch64 is known"
	case $arch in
	x86_64 | aarch64) ;;
	*) die "build: no architecture '$arch': requirements.lock has wheels for x86_64 and aarch64" ;;
	esac
	make_tools
	work=$(mktemp -d build/work.XXXXXX)	# its own for every run, so that builds at the same time do not meet
	trap 'rm -rf "$work"' EXIT
	trap 'exit 1' INT TERM HUP
	make_libraries "$arch"
	mkdir -p "$work/app/nomad_pb"
	cp driver.py fetch.py "$work/app/"
	cp nomad_pb/*.py "$work/app/nomad_pb/"
	$python -W ignore::DeprecationWarning -m shiv --reproducible --uncompressed --entry-point driver:main \
		--python /bin/sh --site-packages "$libraries" --site-packages "$work/app" --output-file "$work/shiv"
	header >"$work/header"
	start | sed "s/@ARCH@/$arch/" >"$work/start.py"
	pack "$work/header" "$work/start.py" "$work/shiv" "$work/$name"
	mv "$work/$name" "$out"
	rm -rf "$work"
	trap - EXIT
	echo "$out: $(wc -c <"$out") bytes, $arch, sha256 $(sha256sum <"$out" | cut -c1-16)..."
}

run_tests() {
	prepare_host
	build
	make_image
	NSPAWN_TEST_IMAGE=$image $python -m pytest "$@"
}

demo() {
	prepare_host
	build
	make_image
	if [ ! -e /var/lib/machines/debian ]; then
		install -d -m 700 /var/lib/machines
		rm -rf /var/lib/machines/.debian.tmp
		cp -a --reflink=auto "$image" /var/lib/machines/.debian.tmp
		mv /var/lib/machines/.debian.tmp /var/lib/machines/debian
	fi
	exec $python tests/agent.py demo
}

bench() {
	prepare_host
	build
	make_image
	NSPAWN_TEST_IMAGE=$image $python tests/bench.py "$@"
}

protos() {
	make_tools
	# The plugins of protoc are found on PATH. Files without a service would get empty _pb2_grpc files.
	PATH=$PWD/build/venv/bin:$PATH $python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. \
		--mypy_out=. --mypy_grpc_out=. nomad_pb/*.proto
	for proto in nomad_pb/*.proto; do
		grep -q '^service ' "$proto" || rm -f "${proto%.proto}_pb2_grpc.py" "${proto%.proto}_pb2_grpc.pyi"
	done
}

reference() {
	make_tools
	$python - <<'EOF'
import re
import driver
text = open("README.md").read()
marks = re.compile(r"(?s)(<!-- what `nomad-driver-nspawn options` prints.*?-->\n\n).*?(\n<!-- end of the reference -->)")
open("README.md", "w").write(marks.sub(lambda found: found[1] + driver.render_reference() + found[2], text))
EOF
}

clean() {
	rm -rf build "$name"
}

# -- what the commands need ----------------------------------------------------------------------------------

# Packages by the command that shows them to be there, so that other distributions work with their own.
prepare_host() {
	[ "$(id -u)" = 0 ] || die "containers need root: run this command as root"
	missing=
	for need in python3:python3 systemd-nspawn:systemd-container mmdebstrap:mmdebstrap nft:nftables ip:iproute2 \
		ps:procps unshare:util-linux setpriv:util-linux mke2fs:e2fsprogs qemu-system-x86_64:qemu-system-x86 \
		qemu-img:qemu-utils iptables:iptables /usr/lib/cni/bridge:containernetworking-plugins \
		mkfs.btrfs:btrfs-progs mkfs.xfs:xfsprogs docker-registry:docker-registry openssl:openssl gpg:gnupg \
		zstd:zstd xz:xz-utils bzip2:bzip2; do
		command -v "${need%:*}" >/dev/null || missing="$missing ${need#*:}"
	done
	python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
	[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing="$missing debian-archive-keyring"
	[ -n "$missing" ] || return 0
	command -v apt-get >/dev/null || die "install what these Debian packages hold:$missing"
	export DEBIAN_FRONTEND=noninteractive
	apt-get -q update
	# shellcheck disable=SC2086 # a list of words
	apt-get -qy --no-install-recommends install $missing
}

# The Debian that tests and the demo boot. Outside the checkout: it belongs to root and outlives `clean`.
make_image() {
	image=$image_cache/debian-bookworm
	[ ! -d "$image" ] || return 0
	mkdir -p "$image_cache"
	rm -rf "$image.tmp"
	mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,dbus bookworm "$image.tmp"
	: >"$image.tmp/etc/machine-id"	# the allocation's id is used only where the image has none of its own
	mv "$image.tmp" "$image"
}

# build/venv, made anew when requirements-dev.txt or the host's Python has changed.
make_tools() {
	if cmp -s requirements-dev.txt build/venv/installed && $python -c 'import shiv' 2>/dev/null; then return; fi
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "needs python3 3.10 or later to build"
	python3 -c 'import ensurepip, venv' 2>/dev/null || die "needs Python's venv: apt install python3-venv"
	rm -rf build/venv
	python3 -m venv build/venv
	$python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	cp requirements-dev.txt build/venv/installed
}

# $libraries: the locked wheels of every supported Python in one tree. Only their compiled modules differ, and
# those carry the Python's version in their names; RECORD and WHEEL differ too, but nothing reads them.
make_libraries() {
	libraries=build/libraries-$1-$(echo "$pythons" | cat - requirements.lock | sha256sum | cut -c1-16)
	[ ! -d "$libraries" ] || return 0
	parts=$work/wheels
	mkdir -p "$parts/all"
	for version in $pythons; do
		$python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary=:all: \
			--require-hashes --requirement requirements.lock --target "$parts/$version" \
			--implementation cp --python-version "$version" \
			--platform "manylinux2014_$1" --platform "manylinux_2_17_$1" --platform "manylinux_2_28_$1"
		rm -f "$parts/$version"/*.dist-info/RECORD "$parts/$version"/*.dist-info/WHEEL
		if diff -rq "$parts/all" "$parts/$version" | grep '^Files .* differ$'; then
			die "these files differ between Python versions: pin releases whose files are the same for all"
		fi
		cp -R "$parts/$version/." "$parts/all/"
	done
	mv -T "$parts/all" "$libraries" 2>/dev/null || [ -d "$libraries" ]	# or another build was faster
}

# pack HEADER START SHIV OUT: the shell header, then shiv's archive compressed, with START as its __main__.py.
pack() {
	$python - "$@" <<'EOF'
import json
import os
import sys
import zipfile

header, start, shiv, out = sys.argv[1:]
with zipfile.ZipFile(shiv) as source, open(out, "wb") as target:
    build_id = json.loads(source.read("environment.json"))["build_id"]
    replaced = {"__main__.py": open(start).read().replace("@BUILD_ID@", build_id)}
    text = open(header).read().replace("@BUILD_ID@", build_id)
    target.write(text.encode())
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            entry = zipfile.ZipInfo(name)  # always of 1980-01-01
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, replaced.get(name) or source.read(name))
    size = target.seek(0, os.SEEK_END)
    target.seek(0)
    target.write(text.replace("@FILE_SIZE@", f"{size:<11}").encode())  # no byte more or less than before
os.chmod(out, 0o755)
EOF
}

# -- the two programs at the beginning of the built file -----------------------------------------------------

# The header finds a Python by its versioned name, because `python3` is too old on some hosts that have a newer
# one beside it (RHEL 9) and is what a virtual environment or pyenv says on others.
header() {
	cat <<'EOF'
#!/bin/sh
# Nomad task driver for systemd-nspawn: a zip of Python code, made by shiv, behind this header that finds a Python.
fail() {	# Nomad shows the first line of stdout in its error and logs lines of stderr that begin with [ERROR]
	printf '[ERROR] nomad-driver-nspawn: %s\n' "$1" >&2
	printf 'nomad-driver-nspawn: %s\n' "$1"
	exit 1
}
find_python() {	# starts none to ask for its version: that would cost as much as all the rest
	for version in 3.13 3.12 3.11 3.10 3.14; do
		for directory in /usr/bin /usr/local/bin; do
			python=$directory/python$version
			if [ -x "$python" ]; then return; fi
		done
	done
	for command in python3.13 python3.12 python3.11 python3.10 python3.14 python3; do
		if python=$(command -v "$command"); then return; fi
	done
	fail "needs Python 3.10 to 3.14, found none in /usr/bin, /usr/local/bin or PATH ($PATH): install one or set NOMAD_DRIVER_NSPAWN_PYTHON to its path"
}
PATH=${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}
export PATH
python=${NOMAD_DRIVER_NSPAWN_PYTHON-}
if [ -z "$python" ]; then find_python; fi
# A failing exec would end this shell without our words.
command -v "$python" >/dev/null 2>&1 ||
	fail "cannot run '$python', the value of NOMAD_DRIVER_NSPAWN_PYTHON: it must be the path of a Python 3.10 to 3.14"
size=@FILE_SIZE@
# A broken download has no zip directory, so Python would read it as a script. Once unpacked it was whole.
[ -d "/var/cache/nomad-driver-nspawn/${0##*/}_@BUILD_ID@" ] || [ "$(wc -c <"$0")" -eq "$size" ] ||
	fail "$0 is damaged: it must have $size bytes; download or build it again"
exec "$python" -IS "$0" "$@"
EOF
}

# The archive's __main__.py. shiv's bootstrap unpacks too, but takes any directory of the right name for good: files
# missing after a power failure or a cleaner's visit stay missing, a directory seeded by somebody else is executed,
# and nothing is ever removed. So this does it beforehand, and shiv finds its tree. A preamble of shiv would be
# too late and would itself lie in the tree it has to check.
start() {
	cat <<'EOF'
"""First Python code of the file: unpacks what this interpreter needs, then lets shiv's bootstrap run it.

The cache holds `<file name>_<build id>/site-packages`, as shiv expects. Every start compares it with the archive
and unpacks what is missing or has another size, which also finishes what an interrupted start left. Each running
process shares a lock on its tree; trees of other builds that nobody holds are removed.
"""
import fcntl
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
        fail("needs CPython 3.10 to 3.14 for @ARCH@ and glibc; %s is %s %d.%d and loads %s: install one or set "
             "NOMAD_DRIVER_NSPAWN_PYTHON to its path"
             % (sys.executable, sys.implementation.name, sys.version_info[0], sys.version_info[1], SUFFIX))
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
    fail("no place to unpack to: %s; set SHIV_ROOT to a directory of this user with 30 MB of room"
         % ("; ".join(reasons) or "neither HOME nor XDG_CACHE_HOME is set"))
    raise AssertionError


os.umask(0o022)  # with another one directories of the tree might be writable for all
for variable in [v for v in os.environ if v.startswith("SHIV_") and v != "SHIV_ROOT"]:
    del os.environ[variable]  # shiv would take another entry point, sys.path or interpreter from them
os.environ["SHIV_ROOT"] = unpack()
# grpc's fork handlers crash children of a process that starts many (grpc#41768); read when grpc is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
from _bootstrap import bootstrap  # noqa: E402 - shiv's, which reads the environment set above
bootstrap()
EOF
}

[ $# -gt 0 ] || set -- build
case $1 in
build | demo | bench | protos | reference | clean) "$@" ;;
--arch) build "$@" ;;
test)
	shift
	run_tests "$@"
	;;
help | -h | --help) help ;;
*)
	help >&2
	exit 2
	;;
esac
