# SPDX-License-Identifier: MPL-2.0
"""Enters a running container and executes a command there, confined as its payload is.

The command gets the payload's namespaces and cgroup, bounding set, no_new_privs, seccomp filters and limits, and
runs as the task's user. nsenter would give it the host's capabilities, no filter and no limit.

This program imports nothing of ours, and little else: the first command waits for it. So it has _signal and
_socket, which signal and socket are made of: those make enums of all constants, which takes 8 ms. nspawn/exec.py
gives it to a new Python, the server. The server forks an entry for each command. The entry enters the container,
forks the command, waits for it and reports its end. The server ends when its standard input does, an entry ends
with the server, and a command ends with its entry.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # not in typeshed
import _socket as socket
import ctypes
import errno
import fcntl
import marshal
import os
import resource
import select
import stat
import struct
import termios
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing `typing` takes a moment
    from typing import Any


class Entry:
    """A process that enters a container except its pid namespace, so that nobody inside can see it.

    Only its child, the command, is in the pid namespace. A container without a user namespace may look into any
    process it sees, so everything is given up before that fork. Until the child executes the command, it has only
    the command's rights, the command's descriptors, and pipes whose words count no more than the command's output.
    It has no connected socket, which would lead to the process at its other end (SO_PEERPIDFD). The host's files
    that run it are on read-only mounts (CVE-2019-5736). Its working directory and root are the container's since
    `setns` (CVE-2024-21626).
    """

    PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH, PTRACE_GET_FILTER = 0x4206, 0x4207, 17, 0x420C
    PR_PDEATHSIG, PR_DUMPABLE, PR_KEEPCAPS, PR_SECCOMP, PR_CAPBSET_READ, PR_CAPBSET_DROP = 1, 4, 8, 22, 23, 24
    PR_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47
    CAP_SYS_ADMIN = 1 << 21
    TIOCSPTLCK, TIOCGPTPEER = 0x40045431, 0x5441
    WALL = 0x40000000  # __WALL
    PATIENCE = 2  # seconds for another tracer to let go of a process
    MAX_FILE = 16 << 20  # bytes of a container's passwd or group that are read

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self.libc.ptrace.restype = self.libc.syscall.restype = ctypes.c_long
        self.libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
        self.libc.syscall.argtypes = [ctypes.c_long] * 6
        self.keyctl = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
        self.obstacle = ""
        for number in range(1, signal.NSIG):
            try:
                signal.signal(number, signal.SIG_DFL)  # Python ignores SIGPIPE, and that would be inherited
            except (OSError, ValueError):  # the C library's own, SIGKILL and SIGSTOP
                continue
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def check(self, result: int, what: str) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
        return result

    def prctl(self, option: int, first: int, second: int = 0) -> int:
        return self.check(self.libc.prctl(option, first, second, 0, 0), f"prctl {option}")

    def ptrace(self, request: int, pid: int, address: int = 0, data: int | None = None) -> int:
        return self.check(self.libc.ptrace(request, pid, address, data), "ptrace")

    def die_with(self, parent: int) -> None:
        """Be killed when the parent ends, or exit if it has ended. A change of ids undoes this: call it again."""
        self.prctl(self.PR_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    def serve(self) -> None:
        """Fork an entry for each connection that comes on standard input, until that ends. This process never gets
        a plan: its next child, in another container, would have a copy."""
        self.obstacle = self.find_obstacle()
        server, parent = socket.socket(fileno=0), os.getpid()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps entries
        while True:
            data, descriptors = receive(server, 1)
            if not data:
                return
            if not descriptors:  # too many are open: the kernel has closed it, and the plugin sees that
                continue
            control = socket.socket(fileno=descriptors[0])
            try:
                pid = os.fork()
                if pid == 0:
                    try:
                        self.enter(parent, control)
                    finally:
                        os._exit(1)
            except OSError as error:  # do not exit: other entries would end, too
                control.send(str(error).encode())
            finally:
                control.close()

    def enter(self, parent: int, control: socket.socket) -> None:
        """Do everything for one command, and report how it ended."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.die_with(parent)
        control.send(str(os.getpid()).encode())
        _, descriptors = receive(control, 3)
        if not descriptors:  # the plugin gave the command up
            return
        plan_file, leader, self.report = descriptors
        try:
            self.prctl(self.PR_DUMPABLE, 0)  # nobody inside may read this process's memory
            with open(plan_file, "rb") as file:
                self.plan: dict[str, Any] = marshal.load(file)
            filters = self.read_filters(self.plan["leader"]) if self.plan["has_seccomp"] else []
            self.join()
            self.check(self.libc.setns(leader, self.plan["namespaces"]), "setns")
            self.check(self.libc.syscall(self.keyctl, 1, 0, 0, 0, 0), "keyctl")  # no keys of the host's
            user = self.find_user(self.plan["user"].encode(errors="surrogateescape"))
            self.become(user)
            self.open_stdio(control)
            self.words = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self.limit()  # before the filters, which may forbid it
            self.confine(user[0], filters)
            self.die_with(parent)
            end = self.run(user)
        except SystemExit as error:
            end = f"! {error}"
        except BaseException as error:
            end = f"! the command could not be started: {error}"
        os.write(self.report, end[:2000].encode(errors="replace"))

    def join(self) -> None:
        """Take the OOM score adjustment and the upper limits of the container's first process, and its cgroups: in
        the v2 hierarchy one of the command's own below it, unless the container has used up all it may have."""
        own, *others = self.plan["cgroups"] or [""]
        if own:
            leaf = f"{own}/{self.plan['leaf']}{os.getpid()}"
            try:
                os.mkdir(leaf)
                self.join_cgroup(leaf)
            except OSError:
                self.join_cgroup(own)
        for place in others:
            self.join_cgroup(place)
        with open("/proc/self/oom_score_adj", "w") as adjustment:
            adjustment.write(self.plan["oom_score_adj"])
        for number, (_, hard) in enumerate(self.plan["limits"]):
            most = max(hard, resource.getrlimit(number)[1], key=lambda limit: limit % (1 << 64))  # -1: no limit
            resource.setrlimit(number, (most, most))  # see `limit`

    def limit(self) -> None:
        """Take the exact limits. With few files or little memory the steps before could not be done."""
        for number, limits in enumerate(self.plan["limits"]):
            resource.setrlimit(number, limits)

    def join_cgroup(self, place: str) -> None:
        fd = os.open(f"{place}/cgroup.procs", os.O_WRONLY)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)

    def run(self, user: tuple[int, int, list[int], bytes]) -> str:
        """Fork the command, wait, and return its end: the status, and a shell's words if it cannot be executed."""
        reader, writer = self.words
        pid = os.fork()
        if pid == 0:
            os.close(self.report)
            os.close(reader)
            try:
                status, words = self.execute(user, writer)
            except BaseException as error:
                status, words = 126, f"the command could not be started: {error}"
            os.write(writer, words.encode(errors="replace")[:2000])
            os._exit(status)
        for descriptor in (0, 1, 2, writer):
            os.close(descriptor)  # otherwise readers would never see the end
        os.write(self.report, b"+")
        status = self.wait(pid)
        try:
            words = os.read(reader, 2000).decode(errors="replace")
        except BlockingIOError:  # somebody still has the other end
            words = ""
        return f"{status} {words}"

    def wait(self, pid: int) -> int:
        """Return the exit code of the command, or minus the number of the signal that ended it. The kernel tells a
        tracer first. One inside may never take notice: this raises SystemExit after PATIENCE seconds."""
        try:
            ended = select.poll()
            ended.register(os.pidfd_open(pid), select.POLLIN)
            ended.poll()
        except OSError:  # the payload's filters forbid it
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        deadline = time.monotonic() + self.PATIENCE
        while (result := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                raise SystemExit(
                    "the command has ended, but a process in the container traces it and does not say so"
                )
            time.sleep(0.001)
        return os.waitstatus_to_exitcode(result[1])

    def find_obstacle(self) -> str:
        """Return why filters cannot be read on this host, "" if they can. Tries it on a child of this process,
        before a container can interfere. The child has no filter unless its parent has one."""
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self.die_with(parent)
            while True:
                signal.pause()
        try:
            self.attach(pid, time.monotonic() + 10)
            self.ptrace(self.PTRACE_GET_FILTER, pid)
        except OSError as error:
            return "" if error.errno in (errno.EINVAL, errno.ENOENT) else str(error.strerror)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return "this process is itself under a filter"

    def read_filters(self, pid: int) -> list[bytes]:
        """Return the seccomp filters of a process, the oldest first (measured; ptrace(2) says the opposite). Stops
        it for some microseconds. Raises SystemExit unless it gets them all: no command may run with fewer."""
        if self.obstacle:
            raise SystemExit(f"the seccomp filters of the payload cannot be read on this host: {self.obstacle}")
        if os.readlink(f"/proc/{pid}/exe").endswith("/systemd-shutdown"):
            # It waits for the processes that are left, and kills them at once when it is traced (252).
            raise SystemExit("the system in the container is shutting down")
        filters: list[bytes] = []
        try:
            self.attach(pid, time.monotonic() + self.PATIENCE)
            while True:
                length = self.ptrace(self.PTRACE_GET_FILTER, pid, len(filters))
                buffer = ctypes.create_string_buffer(8 * length)
                self.ptrace(self.PTRACE_GET_FILTER, pid, len(filters), ctypes.addressof(buffer))
                filters.append(buffer.raw)
        except OSError as error:
            if error.errno != errno.ENOENT or not filters:  # the kernel's answer after the last one
                raise SystemExit(f"the seccomp filters of the payload cannot be read: {error.strerror}") from None
        finally:
            self.libc.ptrace(self.PTRACE_DETACH, pid, None, None)
        return filters

    def attach(self, pid: int, deadline: float) -> None:
        """Trace a process and wait until it has stopped. A process has one tracer at most. Another entry soon lets
        go; a tracer inside may not, so this raises OSError at the deadline."""
        while self.libc.ptrace(self.PTRACE_SEIZE, pid, None, None) < 0:
            if ctypes.get_errno() != errno.EPERM:
                self.check(-1, "ptrace")
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "another process is tracing the container's first one")
            time.sleep(0.005)
        self.ptrace(self.PTRACE_INTERRUPT, pid)
        while os.waitpid(pid, self.WALL | os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, "the container's first process does not stop for it")
            time.sleep(0.0002)

    def find_user(self, name: bytes) -> tuple[int, int, list[int], bytes]:
        """Return uid, gid, further groups and home: the account's, or those in the container's files. Raises
        SystemExit for an unknown user."""
        if known := self.plan["account"]:
            return known["uid"], known["gid"], known["groups"], os.fsencode(known["home"])
        if name in (b"", b"root", b"0"):
            self.plan["user"] = "root"
            return 0, 0, [], b"/root"
        for line in self.read(b"/etc/passwd").split(b"\n"):
            entry = line.split(b":")
            if len(entry) > 5 and name in (entry[0], entry[2]):
                groups = [line.split(b":") for line in self.read(b"/etc/group").split(b"\n")]
                # None for a user named by number: nspawn gives it none either.
                further = [int(group[2]) for group in groups if len(group) > 3 and name in group[3].split(b",")]
                self.plan["user"] = os.fsdecode(entry[0])
                return int(entry[2]), int(entry[3]), further, entry[5]
        raise SystemExit(f'user: there is no user "{os.fsdecode(name)}" in the container\'s /etc/passwd')

    def read(self, path: bytes) -> bytes:
        """Return the start of a file of the container, b"" for what is no regular file or cannot be read."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                return file.read(self.MAX_FILE) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        except OSError:
            return b""

    def become(self, user: tuple[int, int, list[int], bytes]) -> None:
        """Take the payload's bounding set and the user's ids and directory; what `confine` needs stays permitted.
        Raises SystemExit if the directory cannot be entered."""
        number = 0
        while self.libc.prctl(self.PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
            if not self.plan["bounding"] >> number & 1:
                self.prctl(self.PR_CAPBSET_DROP, number)
            number += 1
        os.umask(0o022)  # what nspawn gives its payload; a booted systemd has changed its own to 0
        self.libc.personality(self.plan["personality"])
        self.prctl(self.PR_KEEPCAPS, 1)
        os.setgroups(user[2])
        os.setresgid(user[1], user[1], user[1])
        os.setresuid(user[0], user[0], user[0])
        if user[0]:
            # No effective ones: files are opened as the user. Inheritable ones must be set while permitted.
            self.set_capabilities(0, self.CAP_SYS_ADMIN | self.plan["ambient"], self.plan["inheritable"])
        where = self.plan["directory"]
        try:
            os.chdir(os.fsencode(where))
        except OSError as error:
            raise SystemExit(f"working_directory: {where} in the container: {error.strerror}") from None

    def open_stdio(self, control: socket.socket) -> None:
        """Make the command's stdin, stdout and stderr, owned by its user, and send the plugin the other ends."""
        if self.plan["tty"]:
            ours, given = self.open_terminal()
        else:
            pipes = [os.pipe() for _ in range(2 if self.plan["merge"] else 3)]
            pipes += pipes[1:] if self.plan["merge"] else []
            ours = [pipes[0][0], pipes[1][1], pipes[2][1]]
            given = [pipes[0][1], *dict.fromkeys([pipes[1][0], pipes[2][0]])]
            if self.plan["connects"]:  # both have the same socket, which the command connects
                ours[0] = given[0] = socket.socket(socket.AF_UNIX).detach()
        rights = struct.pack(f"{len(given)}i", *given)
        control.sendmsg([b"stdio"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        if not control.recv(1):  # the plugin gave the command up; otherwise the terminal has its size now
            os._exit(1)
        for number, descriptor in enumerate(ours):
            os.dup2(descriptor, number)
        control.close()
        os.closerange(3, self.report)
        os.closerange(self.report + 1, 1024)

    def open_terminal(self) -> tuple[list[int], list[int]]:
        """Open a terminal, with paths of the container only, and check that it is one. Raises SystemExit."""
        try:
            master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            if os.fstat(master).st_rdev != os.makedev(5, 2):
                raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
            fcntl.ioctl(master, self.TIOCSPTLCK, bytes(4))
            slave = fcntl.ioctl(master, self.TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
        except OSError as error:
            raise SystemExit(f"no terminal can be opened in the container: {error.strerror}") from None
        return [slave] * 3, [master]

    def confine(self, uid: int, filters: list[bytes]) -> None:
        """Take the payload's filters and capabilities. This cannot be undone."""
        ambient = self.plan["ambient"]
        rights = ambient if uid else self.plan["bounding"]
        inheritable = self.plan["inheritable"] | ambient  # a user's payload has none, until systemd 262
        needed = rights | self.CAP_SYS_ADMIN  # to install filters
        self.set_capabilities(needed, needed, inheritable)
        if self.plan["no_new_privs"]:
            self.prctl(self.PR_NO_NEW_PRIVS, 1)
        for program in filters:
            buffer = ctypes.create_string_buffer(program, len(program))
            packed = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
            self.prctl(self.PR_SECCOMP, 2, ctypes.addressof(ctypes.create_string_buffer(packed, len(packed))))
        self.set_capabilities(rights, rights, inheritable)
        for number in range(64):
            if ambient >> number & 1:
                self.check(self.libc.prctl(self.PR_CAP_AMBIENT, 2, number, 0, 0), "prctl")

    def set_capabilities(self, *sets: int) -> None:
        """Set the effective, permitted and inheritable capabilities."""
        words = [value >> shift & 0xFFFFFFFF for shift in (0, 32) for value in sets]
        header = struct.pack("Ii", 0x20080522, 0)
        self.check(self.libc.capset(header, struct.pack("6I", *words)), "capset")

    def execute(self, user: tuple[int, int, list[int], bytes], entry: int) -> tuple[int, str]:
        """Become the command. If that fails, return the status and words of a shell."""
        os.setsid()
        if self.plan["tty"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        self.prctl(self.PR_PDEATHSIG, signal.SIGKILL)
        reader = select.poll()
        reader.register(entry, 0)
        if reader.poll(0):  # the entry has ended already
            os._exit(1)
        argv = [os.fsencode(word) for word in self.plan["argv"]]
        if self.plan["connects"]:
            socket.socket(fileno=0).connect(argv[0])
            return 0, ""
        name, login = argv[0], os.fsencode(self.plan["user"])
        given = {os.fsencode(name): os.fsencode(value) for name, value in self.plan["env"].items()}
        env = {b"HOME": user[3], b"USER": login, b"LOGNAME": login, **given}
        if self.plan["tty"]:
            env.setdefault(b"TERM", b"xterm")
        shown, search = os.fsdecode(name), env[b"PATH"]
        denied = ""
        for path in [name] if b"/" in name else [os.path.join(place, name) for place in search.split(b":")]:
            try:
                os.execve(path, argv, env)
            except (FileNotFoundError, NotADirectoryError):
                if os.path.lexists(path):
                    denied = f'"{os.fsdecode(path)}" in the container needs an interpreter that is not there'
            except OSError as error:
                denied = f'"{os.fsdecode(path)}" in the container cannot be executed: {error.strerror}'
        if denied:
            return 126, denied
        where = "in the container" if b"/" in name else f"in the container's PATH ({os.fsdecode(search)})"
        return 127, f'there is no "{shown}" {where}'


def receive(connection: socket.socket, count: int) -> tuple[bytes, list[int]]:
    """Wait for a byte. Return it with its descriptors, at most `count`; b"" is the end. Raises OSError."""
    data, messages, _, _ = connection.recvmsg(1, socket.CMSG_LEN(4 * count))
    return data, [descriptor for _, _, sent in messages for (descriptor,) in struct.iter_unpack("i", sent)]


if __name__ == "__main__":
    os.closerange(3, 1 << 16)  # the file that this program was read from
    Entry().serve()
