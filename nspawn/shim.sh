#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# The shim of a task. It outlives the plugin, waits for nspawn and leaves the exit record. Run by `sh -c`.
#
# Arguments: state directory, cgroup ("" for none), "filter" or "", then nspawn and its arguments. nspawn starts
# when a line comes on stdin: if the plugin dies before the shim's pid is on disk, nothing has happened.
keeper_state=$1 keeper_cgroup=$2 keeper_filter=$3
shift 3
read -r keeper_go || exit 1
exec </dev/null
enter() { [ -z "$keeper_cgroup" ] || echo 0 >"$keeper_cgroup$1/cgroup.procs"; }
keep() {
	(
		enter ""
		# nspawn keeps the changes of overlays in /var/tmp, and leaves them there if it is killed.
		[ ! -d "$keeper_state/tmp" ] || mount --bind "$keeper_state/tmp" /var/tmp || exit 1
		if mount --bind "$keeper_state/nspawn.log" /dev/kmsg; then
			SYSTEMD_LOG_TARGET=kmsg
			export SYSTEMD_LOG_TARGET
		fi
		exec "$@" 2>&3 3>&-
	)
	keeper_status=$? keeper_left=0
	if [ -n "$keeper_cgroup" ]; then
		read -r _ keeper_left <"$keeper_cgroup/payload/cgroup.events"
		[ "$keeper_left" = 0 ] || echo 1 >"$keeper_cgroup/payload/cgroup.kill"
	fi
	{
		echo "$keeper_status $keeper_left"
		while read -r keeper_name; do echo "$keeper_name"; done <"$keeper_cgroup/memory.events"
		for keeper_name in max peak; do
			read -r keeper_value <"$keeper_cgroup/memory.$keeper_name" && echo "memory.$keeper_name $keeper_value"
		done
	} >"$keeper_state/exit.new"
	mv "$keeper_state/exit.new" "$keeper_state/exit"
}
exec 3>&2 2>/dev/null
enter /keeper
if [ -n "$keeper_filter" ]; then
	keep "$@" | sed -u 's/\r//g'
else
	keep "$@"
fi
