#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# Runs inside a booted container whose task is a unit: waits for the unit's end, and ends the system with its result.
#
# Each line on stdin says that the unit may have ended, or cannot start. systemd decides whether it has: a unit that
# is to be restarted has not. SuccessAction= would not do: on 252 it also comes at each restart.
unit=$1
code=1
say() { echo "$unit: $*" >&2; }

# It looks once by itself: what was said before stdin was open is lost.
is_first=yes
while [ -n "$is_first" ] || read -r _; do
	while :; do
		LoadState='' ActiveState='' Job='' Result='' ConditionResult='' AssertResult='' ExecMainCode=0 ExecMainStatus=0
		eval "$(systemctl show -p LoadState,ActiveState,Job,Result,ConditionResult,AssertResult,ExecMainCode,ExecMainStatus "$unit")"
		case $is_first:$ActiveState:$Job in
		*:inactive: | *:inactive:0 | *:failed: | *:failed:0) break ;;
		:inactive:* | :failed:* | *::* | *:deactivating:*) sleep 0.1 ;; # for a moment
		*) is_first='' && continue 2 ;; # it is to be started, runs, or will be restarted
		esac
	done
	case $LoadState:$ActiveState:$ConditionResult$AssertResult:$ExecMainCode in
	loaded:inactive:yesyes:*) code=0 ;;
	loaded:inactive:*) code=1 && say "was not started: a condition in it is not met, or something has cancelled it" ;;
	loaded:failed:*:1) code=$ExecMainStatus ;;
	loaded:failed:*:[23]) code=$((128 + ExecMainStatus)) ;; # killed, with or without a core
	loaded:*) code=1 ;;
	*) code=1 && say "cannot be started: its LoadState is $LoadState" ;;
	esac
	if [ "$ActiveState" = failed ]; then
		[ "$code" != 0 ] || code=1 # the program was not at fault
		[ "$Result:$ExecMainCode" = exit-code:1 ] || say "failed: its Result is $Result"
	fi
	break
done
exec systemctl exit "$code"
