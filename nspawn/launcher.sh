#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# Nomad task driver for systemd-nspawn: a zip of Python code, made by shiv, behind this header that finds a Python.
# A Python is looked for by its versioned name: `python3` is too old on some hosts that have a newer one beside it
# (RHEL 9), and on others it is what a virtual environment or pyenv says.
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
case $python in
*python3.1[0-4]) ;;
*)	# Python 2 has no -I, and would print its own usage. This is rare and takes 2 ms: -V runs no Python code.
	found=$("$python" -V 2>&1) || :
	case $found in
	"Python 2."* | "Python 3".[0-9].*)
		fail "needs CPython 3.10 to 3.14, but $python is $found: install one or set NOMAD_DRIVER_NSPAWN_PYTHON to its path"
		;;
	esac
	;;
esac
size=@FILE_SIZE@
# A broken download has no zip directory, so Python would read it as a script. Once unpacked it was whole.
[ -d "/var/cache/nomad-driver-nspawn/${0##*/}_@BUILD_ID@" ] || [ "$(wc -c <"$0")" -eq "$size" ] ||
	fail "$0 is damaged: it must have $size bytes; download or build it again"
# A failing exec ends dash at once, after the trap. bash would not run the trap, so it must go on to the next line.
# shellcheck disable=SC3044
shopt -s execfail 2>/dev/null || :
trap 'fail "cannot execute $python: is it for this machine? Set NOMAD_DRIVER_NSPAWN_PYTHON to the path of a Python"' EXIT
exec "$python" -IS "$0" "$@"
exit 1
