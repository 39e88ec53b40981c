# SPDX-License-Identifier: MPL-2.0
"""What of this driver runs on this machine, and whether a plugin has it.

A task's State is in its state directory, and as an extended attribute on its cgroup: the mark. Only root of the
host can write a mark, a container sees no cgroup above its payload/, and a mark lives as long as the cgroup. So a
task is found and known for certain even if /run/nomad-driver-nspawn was emptied under it.

A plugin that has an agent holds a lock on the cgroup of each task it has taken up. The lock ends with the plugin,
and others can ask for it without taking it. What a state says of processes is compared with the kernel before
anything is done to them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

from nspawn.cgroup import find_cgroups
from nspawn.common import STATE_ROOT, HostError, log
from nspawn.files import read_text, write_file
from nspawn.host import read_boot_id, read_cgroup_mode
from nspawn.linux import LOCK_FORMAT, is_locked
from nspawn.process import NO_PROCESS, ProcessId, read_stat, read_status
from nspawn.record import add_note, reserve_room
from nspawn.state import State, read_states

MARK = "trusted.nomad-driver-nspawn"  # only CAP_SYS_ADMIN over the host's users sees attributes of this kind


def write_mark(state: State) -> None:
    """Write a task's state to its cgroup. Where the kernel refuses (a client in an unprivileged container), or if
    there is no such cgroup, the state directory alone has it."""
    with contextlib.suppress(OSError):
        os.setxattr(state.cgroup, MARK, state.render().encode())


def read_mark(cgroup: str) -> State | None:
    """Return the state of the task that a cgroup is of, None if it has none. Raises OSError if the host cannot
    tell."""
    try:
        state = State.parse(os.getxattr(cgroup, MARK))
    except ValueError:
        return None
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOENT, errno.ENOTDIR, errno.EOPNOTSUPP):
            return None
        raise
    return state if state.cgroup == cgroup and state.boot_id == read_boot_id() else None


def list_scopes() -> list[str]:
    """Return the cgroups that tasks can be in: in the slice that the agent's `cgroup_parent` names, or in a slice
    in that. Raises OSError."""
    mode = read_cgroup_mode()
    slices = list_named(str(mode.root), ".slice") if mode else []
    inner = [place for outer in slices for place in list_named(outer, ".slice")]
    return [scope for place in (*slices, *inner) for scope in list_named(place, ".scope")]


def list_named(directory: str, end: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.path for entry in entries if entry.name.endswith(end)]
    except FileNotFoundError:
        return []


def find_marked(task_id: str) -> State | None:
    """Return the state of a task by the mark of its cgroup, None if no cgroup is of this task. Raises OSError."""
    states = map(read_mark, list_scopes())
    return next((state for state in states if state and state.task_id == task_id), None)


def find_states() -> list[State]:
    """Return the states of all tasks of this boot that have something on this machine. Raises OSError."""
    found = {state.task_id: state for state in map(read_mark, list_scopes()) if state}
    found |= {state.task_id: state for state in read_states() if state.boot_id == read_boot_id()}
    return list(found.values())


def restore_directory(state: State) -> None:
    """Make the state directory of a running task anew if somebody has removed it, so that its shim can leave the
    exit record there. What exec needs is lost."""
    if state.directory.is_dir():
        return
    log.warn("the state directory of a running task was removed; it is made anew", task=state.task_id)
    try:
        STATE_ROOT.mkdir(mode=0o700, exist_ok=True)
        state.directory.mkdir(mode=0o700)
        reserve_room(state.directory)
        add_note(state.directory, is_restored=True)
        write_file(state.directory / "state.json", state.render())
    except OSError as error:
        log.warn("the state directory of a running task cannot be made", task=state.task_id, error=str(error))


# -- whether a plugin has a task -------------------------------------------------------------------------------


def hold_cgroup(cgroup: str) -> int | None:
    """Return a descriptor that shows others that this plugin has the task of a cgroup, until it is closed. None if
    the cgroup is gone, or if the host has no descriptor left."""
    with contextlib.suppress(OSError):
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(LOCK_FORMAT, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
            return fd
        except OSError:
            os.close(fd)
    return None


def is_held(cgroup: str) -> bool:
    """Whether a plugin with an agent has the task of a cgroup. Raises OSError if the host cannot tell."""
    try:
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return is_locked(fd)
    finally:
        os.close(fd)


# -- what the kernel says of a task's processes ----------------------------------------------------------------


def find_nspawn(state: State) -> ProcessId:
    """Return the leader's parent if that is nspawn, which is in the shim's session. Return NO_PROCESS if there is
    no leader, nspawn has ended, or nspawn has reaped the leader. Raises OSError."""
    leader = read_stat(state.leader.pid) if state.leader else None
    if leader and state.leader and int(leader[19]) == state.leader.started:
        parent = int(leader[1])
        fields = read_stat(parent)
        if fields and int(fields[3]) == state.shim.pid:
            return ProcessId(parent, int(fields[19]))
    return NO_PROCESS


def read_ranges(pid: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges of host ids that a process's user namespace maps: begin and count. () if it has ended."""
    lines = read_text(Path(f"/proc/{pid}/uid_map")).split("\n")
    return tuple((int(line.split()[1]), int(line.split()[2])) for line in lines if line)


def check_leader(leader: ProcessId, state: State, has_other_users: bool, nspawn: int = 0) -> None:
    """Raise HostError if a live process cannot be a task's leader. The kernel must say that it is a child of the
    nspawn below our shim, in the payload's cgroup, PID 1 of a pid namespace, and one of the task's users. `nspawn`
    is the pid that named it; 0 skips its check after a restart of the plugin, when the parent may be gone."""
    why = find_objection(leader, state, has_other_users, nspawn)
    if why and leader.is_alive:  # else we may have read about another process; a dead leader is not used
        raise HostError(f"process {leader.pid} is not the first of the container {state.machine}: {why}")


def find_objection(leader: ProcessId, state: State, has_other_users: bool, nspawn: int) -> str:
    """Return why a process cannot be a task's leader, "" if it can."""
    status = read_status(leader.pid)
    if nspawn and (status.get("PPid") != str(nspawn) or not has_ancestor(nspawn, state.shim)):
        return "it is no child of the task's systemd-nspawn"
    if not find_cgroups(leader.pid, f"{state.cgroup}/payload"):
        return f"it is not in {state.cgroup}/payload"
    if status.get("NSpid", "").split()[1:] != ["1"]:
        return "it is not the first of a process namespace"
    ids = [int(uid) for uid in status.get("Uid", "").split()]
    ranges = [range(begin, begin + count) for begin, count in state.users]
    if ranges and not all(any(uid in ids for ids in ranges) for uid in ids):
        return "it is no user of the container's"
    if has_other_users and (not ranges or any(0 in ids for ids in ranges)):
        return "it has no user namespace with ids of its own"
    return ""


def has_ancestor(pid: int, ancestor: ProcessId, most: int = 4) -> bool:
    """Whether a process is `ancestor`, or fewer than `most` levels below it: nspawn's parents are subshells."""
    for _ in range(most):
        if pid == ancestor.pid:
            return ancestor.is_alive
        pid = int(read_status(pid).get("PPid", "0"))
    return False


def check_shim(state: State) -> None:
    """Raise HostError if the shim of a stored state lives but is not in the task's cgroup."""
    path = f"{state.cgroup}/shim"
    if not find_cgroups(state.shim.pid, path) and state.shim.is_alive:
        raise HostError(f"process {state.shim.pid} is not the shim of {state.machine}: it is not in {path}")
