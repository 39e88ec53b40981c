#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# Runs inside a booted container: writes the journal of this boot to the task's stdout, and goes on with it until all
# has been written at the end.
#
# At the end of a shutdown systemd sends SIGTERM to all processes but those whose name begins with "@", and waits for
# this shell. The journal may get lines until journald has ended. journalctl hears of them at once then.
PATH=/run/nomad-journal:$PATH:/run/current-system/sw/bin # the last one is NixOS's
program=$(command -v journalctl) || { echo "journal: there is no journalctl in the container" >&2; exit 69; }
ln -sf "$program" /run/nomad-journal/@journalctl
has_journald() {
	for file in /proc/[0-9]*/comm; do
		read -r name <"$file" && [ "$name" = systemd-journal ] && return
	done 2>/dev/null
	return 1
}
is_busy() { # when it has written all, it sleeps, and not because the pipe is full
	line='' place=''
	{ read -r line <"/proc/$!/stat" && read -r place <"/proc/$!/wchan"; } 2>/dev/null
	case ${line##*) }:$place in *:*pipe_write) ;; S* | :*) return 1 ;; esac
}

trap 'is_over=yes' TERM
is_over='' first=--no-tail
if [ -e /run/nomad-journal/begun ]; then # what was written is not written twice
	echo "journal: journalctl has ended and is started again; lines may be missing" >&2
	first=--lines=0
fi
: >/run/nomad-journal/begun
@journalctl --follow --boot "$first" --output=with-unit --no-hostname --quiet &
wait "$!"
[ -n "$is_over" ] || exit 1
read -r name </proc/1/comm
[ "$name" = systemd ] && exit # only this service is being stopped
while has_journald; do sleep 0.02; done
for _ in 1 2 3; do # in a row
	while is_busy; do sleep 0.02; done
	sleep 0.02
done
