#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# The shim of a task. It outlives the plugin, waits for nspawn and leaves the exit record. Run by `sh -c`.
#
# Arguments: state directory, cgroup, "filter" or "", then nspawn and its arguments. nspawn starts when a line comes on
# stdin: if the plugin dies before the shim's pid is on disk, nothing has happened. Until then everything is made
# ready. The shim's end tells the plugin that the record is complete.
shim_state=$1 shim_cgroup=$2 shim_filter=$3
shift 3
enter() { echo 0 >"$shim_cgroup$1/cgroup.procs"; }

exec 3>&2 4>&1 2>/dev/null # 3 and 4: the task's stderr and stdout
exec 9<>"$shim_state/exit" # as long as it is open for writing, its file system cannot become read-only
enter /shim
if [ -n "$shim_filter" ]; then
	sed -u 's/\r//g' <"$shim_state/console" >&4 2>&3 3>&- 4>&- 9>&- &
	exec >"$shim_state/console"
fi
if [ -p "$shim_state/unit/stdout" ]; then # a unit's output; 5 and 6 keep the pipes open while the unit is not running
	exec 5<>"$shim_state/unit/stdout" 6<>"$shim_state/unit/stderr"
	exec 7<"$shim_state/unit/stdout" 8<"$shim_state/unit/stderr"
	cat <&7 >&4 2>&3 3>&- 4>&- 5>&- 6>&- 7<&- 8<&- 9>&- &
	cat <&8 >&3 2>&3 3>&- 4>&- 5>&- 6>&- 7<&- 8<&- 9>&- &
	exec 7<&- 8<&-
fi
(
	enter ""
	read -r _ || { kill -KILL $$; exit 1; }
	exec "$@" </dev/null 2>&3 3>&- 4>&- 5>&- 6>&- 9>&-
)
shim_status=$? shim_left=0
exec >/dev/null 5>&- 6>&- # the end of what the filter and cat read
read -r _ shim_left <"$shim_cgroup/payload/cgroup.events"
[ "$shim_left" = 0 ] || echo 1 >"$shim_cgroup/payload/cgroup.kill"
# "<>" overwrites the file in place: a full disk has no room for a new one. The path comes first, because the state
# directory may have been made anew.
record() {
	echo "$shim_status $shim_left"
	while read -r shim_name; do echo "$shim_name"; done <"$shim_cgroup/memory.events"
	for shim_name in max peak; do
		read -r shim_value <"$shim_cgroup/memory.$shim_name" && echo "memory.$shim_name $shim_value"
	done
	echo end
}
record 1<>"$shim_state/exit" || record >&9
# A pipe's content is gone with the last process that holds it. `sleep` holds both until the plugin has found them
# empty, or for a day if there is no plugin. It has them as stdout and stderr from its first moment on.
exec </dev/null >&4 2>&3 3>&- 4>&- 9>&-
sleep 86400 &
