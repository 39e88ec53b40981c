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
  chaos [N] [SEED]    build and do N random rounds of accidents; root, the same; see \`chaos --help\`
  release             make dist/: the file for each architecture, Debian packages, SHA256SUMS
  protos              generate the Python code in nomad_pb/ anew
  reference           write docs/options.md, the reference of all options, anew
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
	mkdir -p "$work/app/nomad_pb" "$work/app/nspawn"
	cp driver.py "$work/app/"
	cp nomad_pb/*.py "$work/app/nomad_pb/"
	cp nspawn/*.py nspawn/shim.sh nspawn/unit.sh nspawn/journal.sh "$work/app/nspawn/"
	rm "$work/app/nspawn/bootstrap.py" "$work/app/nspawn/pack.py"	# these make the file, and are not in it
	$python -W ignore::DeprecationWarning -m shiv --reproducible --uncompressed --entry-point driver:main \
		--python /bin/sh --site-packages "$libraries" --site-packages "$work/app" --output-file "$work/shiv"
	$python nspawn/pack.py "$arch" "$work/shiv" "$work/$name" "${COMMIT-$(find_commit)}"
	mv "$work/$name" "$out"
	rm -rf "$work"
	trap - EXIT
	echo "$out: $(wc -c <"$out") bytes, $arch, sha256 $(sha256sum <"$out" | cut -c1-16)..."
}

# Everything that a release has, the same bytes for the same commit.
release() {
	[ $# = 0 ] || die "release: what is '$1'? It takes no arguments"
	command -v dpkg-deb >/dev/null || die "release: needs dpkg-deb, of the Debian package dpkg"
	make_tools
	release=$($python -c 'from nspawn.pack import read_version; print(read_version())')
	commit=${COMMIT-$(find_commit)}
	case $commit in
	"" | *-dirty) tag= ;;
	*) tag=$(git describe --exact-match --match "v$release" 2>/dev/null) || tag= ;;
	esac
	# What is built before a release is older than it, for apt.
	date=$(git log -1 --format=%cd --date=format:%Y%m%d%H%M%S 2>/dev/null) || date=0
	[ -n "$tag" ] || release=$release~$date.${commit:-unknown}
	rm -rf dist
	mkdir dist
	for arch in x86_64 aarch64; do
		build --arch "$arch"
		cp "$out" "dist/$name-$arch"
		make_package "$arch" "$release"
	done
	(cd dist && sha256sum -- *) >build/SHA256SUMS
	mv build/SHA256SUMS dist/
	[ -n "$tag" ] || echo "dist/: $release is no release: no tag of driver.py's version is on the commit, or files changed"
}

# dist/*.deb: the plugin where Debian's and Arch's packages of drivers have theirs, and a configuration to copy.
make_package() {
	case $1 in
	x86_64) machine=amd64 ;;
	aarch64) machine=arm64 ;;
	esac
	tree=$(mktemp -d build/package.XXXXXX)
	chmod 755 "$tree"
	install -D -m 755 "dist/$name-$1" "$tree/usr/lib/nomad/plugins/$name"
	install -d "$tree/usr/share/doc/$name/examples" "$tree/DEBIAN"
	cp -R README.md CHANGELOG.md docs "$tree/usr/share/doc/$name/"
	cp LICENSE "$tree/usr/share/doc/$name/copyright"
	cp -R example/. "$tree/usr/share/doc/$name/examples/"
	cat >"$tree/DEBIAN/control" <<-EOF
		Package: $name
		Version: $2
		Architecture: $machine
		Maintainer: The $name authors
		Section: admin
		Priority: optional
		Depends: python3 (>= 3.10), systemd-container (>= 252), libstdc++6, util-linux
		Recommends: iproute2, zstd
		Description: Nomad task driver for systemd-nspawn containers
		 Runs tasks of HashiCorp Nomad as systemd-nspawn containers: a whole booted
		 operating system, or one command. Nomad loads the plugin from
		 /usr/lib/nomad/plugins once its configuration says so: an example is
		 /usr/share/doc/$name/examples/package.hcl.
	EOF
	chmod -R u=rwX,go=rX "$tree"
	# The times are those of the commit. The plugin is compressed already.
	SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || echo 0)
	find "$tree" -exec touch -hd "@$SOURCE_DATE_EPOCH" {} +
	export SOURCE_DATE_EPOCH
	dpkg-deb --root-owner-group -Znone --build "$tree" "dist/${name}_${2}_$machine.deb"
	unset SOURCE_DATE_EPOCH
	rm -rf "$tree"
}

run_tests() {
	# shellcheck disable=SC2086 # lists of words
	prepare_host $container_needs $test_needs
	build
	make_image
	export NSPAWN_TEST_IMAGE="$image"
	case " $* " in
	*" tests/"* | *" -"[!-]*) exec $python -m pytest "$@" ;;	# some tests, not all
	esac
	# The hosts of test_hosts.py keep one core busy, and all other tests the other one.
	hosts=$(mktemp build/hosts.XXXXXX)
	$python -m pytest tests/host/test_hosts.py "$@" >"$hosts" 2>&1 &
	beside=$!
	trap 'kill $beside; rm -f "$hosts"' EXIT
	trap 'exit 1' INT TERM HUP
	failed=0
	$python -m pytest tests --ignore=tests/host/test_hosts.py "$@" || failed=$?
	wait $beside || failed=$?
	trap - EXIT
	cat "$hosts"
	rm -f "$hosts"
	return $failed
}

demo() {
	# shellcheck disable=SC2086 # a list of words
	prepare_host $container_needs
	build
	machines=/var/lib/machines
	if [ ! -e $machines/debian ]; then
		install -d -m 700 $machines
		make_debian $machines/debian ,systemd-resolved
	fi
	exec $python -m tests.agent demo
}

bench() {
	# shellcheck disable=SC2086 # a list of words
	prepare_host $container_needs
	build
	make_image
	NSPAWN_TEST_IMAGE=$image $python tests/bench.py "$@"
}

chaos() {
	# shellcheck disable=SC2086 # a list of words
	prepare_host $container_needs
	build
	make_image
	NSPAWN_TEST_IMAGE=$image $python -m tests.chaos "$@"
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
	$python -c 'import driver, nspawn.options as options
print(options.render_reference(driver.TASK_GROUPS, driver.PLUGIN_OPTIONS), end="")' >build/options.md
	mv build/options.md docs/options.md
}

clean() {
	rm -rf build dist "$name"
}

# -- what the commands need ----------------------------------------------------------------------------------

# What containers need, and what tests need in addition: the command that shows a Debian package to be there, and the
# package. So other distributions work with their own.
container_needs='python3:python3 systemd-nspawn:systemd-container mmdebstrap:mmdebstrap ip:iproute2'
test_needs='nft:nftables ps:procps unshare:util-linux setpriv:util-linux mke2fs:e2fsprogs
	qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils /usr/lib/cni/bridge:containernetworking-plugins
	mkfs.btrfs:btrfs-progs mkfs.xfs:xfsprogs docker-registry:docker-registry openssl:openssl gpg:gnupg
	zstd:zstd nginx:nginx-light'

# Install what is missing of these.
prepare_host() {
	[ "$(id -u)" = 0 ] || die "containers need root: run this command as root"
	missing=
	for need in "$@"; do
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

# The Debian that tests boot. Outside the checkout: it belongs to root and outlives `clean`.
make_image() {
	image=$image_cache/debian-bookworm
	[ ! -d "$image" ] || return 0
	mkdir -p "$image_cache"
	make_debian "$image" ""
}

# A Debian with systemd and the packages that $2 adds. With systemd-resolved it gets a DHCP client, too.
make_debian() {
	rm -rf "$1.tmp"
	mmdebstrap --quiet --variant=minbase --include="systemd,systemd-sysv,dbus$2" bookworm "$1.tmp"
	[ -z "$2" ] || systemctl --root="$1.tmp" enable systemd-networkd
	: >"$1.tmp/etc/machine-id"	# the allocation's id is used only where the image has none of its own
	mv "$1.tmp" "$1"
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

# The commit that the file is built from, for `--version`; with -dirty if what goes into it has changed since, and
# nothing outside a git checkout. Who builds from an archive can say it: COMMIT=... sh build.sh
find_commit() {
	[ -e .git ] || return 0
	commit=$(git -c safe.directory="$PWD" rev-parse HEAD 2>/dev/null) || return 0
	changes=$(git -c safe.directory="$PWD" --no-optional-locks status --porcelain -- \
		build.sh driver.py nspawn nomad_pb requirements.lock 2>/dev/null) || return 0
	echo "$commit" | cut -c1-12 | sed "s/\$/${changes:+-dirty}/"
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

[ $# -gt 0 ] || set -- build
case $1 in
build | release | demo | bench | chaos | protos | reference | clean) "$@" ;;
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
