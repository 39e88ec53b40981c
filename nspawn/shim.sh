#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# The shim of a task. It outlives the plugin, waits for nspawn and leaves the exit record. Run by `sh -c`.
#
# Arguments: state directory, cgroup ("" for none), "filter" or "", then nspawn and its arguments. nspawn starts
# when a line comes on stdin: if the plugin dies before the shim's pid is on disk, nothing has happened.
shim_state=$1 shim_cgroup=$2 shim_filter=$3
shift 3
read -r shim_go || exit 1
exec </dev/null
enter() { [ -z "$shim_cgroup" ] || echo 0 >"$shim_cgroup$1/cgroup.procs"; }
keep() {
	(
		enter ""
		# nspawn keeps the changes of overlays in /var/tmp, and leaves them there if it is killed.
		[ ! -d "$shim_state/tmp" ] || mount --bind "$shim_state/tmp" /var/tmp || exit 1
		if mount --bind "$shim_state/nspawn.log" /dev/kmsg; then
			SYSTEMD_LOG_TARGET=kmsg
			export SYSTEMD_LOG_TARGET
		fi
		exec "$@" 2>&3 3>&-
	)
	shim_status=$? shim_left=0
	if [ -n "$shim_cgroup" ]; then
		read -r _ shim_left <"$shim_cgroup/payload/cgroup.events"
		[ "$shim_left" = 0 ] || echo 1 >"$shim_cgroup/payload/cgroup.kill"
	fi
	{
		echo "$shim_status $shim_left"
		while read -r shim_name; do echo "$shim_name"; done <"$shim_cgroup/memory.events"
		for shim_name in max peak; do
			read -r shim_value <"$shim_cgroup/memory.$shim_name" && echo "memory.$shim_name $shim_value"
		done
	} >"$shim_state/exit.new"
	mv "$shim_state/exit.new" "$shim_state/exit"
}
exec 3>&2 2>/dev/null
enter /shim
if [ -n "$shim_filter" ]; then
	keep "$@" | sed -u 's/\r//g'
else
	keep "$@"
fi
