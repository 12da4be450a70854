"""Runs in the process that is to run untrusted code: gives up, for good, all that the code could do harm with, then runs it.

It is started as a program of its own (``python -I -S confine.py``), so it imports nothing of the package; the job is JSON on
standard input. Every protection is asked of the kernel, and the process says which of them it got before it runs anything.
Linux alone has them: Landlock (https://docs.kernel.org/userspace-api/landlock.html), seccomp filters, namespaces, limits.
"""

import ctypes
import json
import os
import platform
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any

CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_PDEATHSIG = 38, 22, 1
SECCOMP_MODE_FILTER = 2
EPERM, ENOSYS = 1, 38
SIGKILL = 9

# Landlock: rights to change the file system, and to read it (access rights of ABI 1 to 5, in their order).
EXECUTE, WRITE, READ_FILE, READ_DIR = 1, 2, 4, 8
ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
NO_NETWORK = 3  # bind and connect of TCP, from ABI 4
SCOPES = 3  # abstract sockets and signals to others, from ABI 6
LANDLOCK_CREATE, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT = 444, 445, 446

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LARGEST_KNOWN = 462
"""System calls that are younger than this filter are refused: nobody has looked at them."""

# What is refused, by architecture: processes (fork and vfork; clone is looked into), other processes (signals, tracing, their
# memory and limits), network, what Landlock does not cover (owners, modes, times, attributes), mounts and namespaces, the
# kernel (modules, clocks, names), and ways around a filter (io_uring).
_X86 = {
    "fork": 57, "vfork": 58, "kill": 62, "tkill": 200, "tgkill": 234, "ptrace": 101, "socket": 41, "socketpair": 53,
    "connect": 42, "bind": 49, "chmod": 90, "fchmod": 91, "fchmodat": 268, "chown": 92, "fchown": 93, "lchown": 94,
    "fchownat": 260, "utime": 132, "utimes": 235, "utimensat": 280, "futimesat": 261, "setxattr": 188, "lsetxattr": 189,
    "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "mount": 165, "umount2": 166,
    "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "init_module": 175, "finit_module": 313,
    "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320, "reboot": 169, "swapon": 167, "swapoff": 168,
    "sethostname": 170, "setdomainname": 171, "settimeofday": 164, "clock_settime": 227, "adjtimex": 159,
    "clock_adjtime": 305, "acct": 163, "quotactl": 179, "iopl": 172, "ioperm": 173, "syslog": 103, "bpf": 321,
    "perf_event_open": 298, "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249,
    "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_send_signal": 424, "pidfd_open": 434,
    "pidfd_getfd": 438, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "setpriority": 141,
    "sched_setscheduler": 144, "sched_setparam": 142, "sched_setattr": 314, "sched_setaffinity": 203, "ioprio_set": 251,
    "migrate_pages": 256, "move_pages": 279, "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240,
    "open_by_handle_at": 304, "name_to_handle_at": 303, "fanotify_init": 300, "personality": 135, "execve": 59,
    "execveat": 322, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "truncate": 76, "memfd_create": 319,
}  # fmt: skip
_ARM = {
    "kill": 129, "tkill": 130, "tgkill": 131, "ptrace": 117, "socket": 198, "socketpair": 199, "connect": 203,
    "bind": 200, "fchmod": 52, "fchmodat": 53, "fchown": 55, "fchownat": 54, "utimensat": 88, "setxattr": 5,
    "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "mount": 40,
    "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268, "init_module": 105,
    "finit_module": 273, "delete_module": 106, "kexec_load": 104, "kexec_file_load": 294, "reboot": 142, "swapon": 224,
    "swapoff": 225, "sethostname": 161, "setdomainname": 162, "settimeofday": 170, "clock_settime": 112,
    "adjtimex": 171, "clock_adjtime": 266, "acct": 89, "quotactl": 60, "syslog": 116, "bpf": 280,
    "perf_event_open": 241, "userfaultfd": 282, "keyctl": 219, "add_key": 217, "request_key": 218,
    "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "pidfd_send_signal": 424, "pidfd_open": 434,
    "pidfd_getfd": 438, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "setpriority": 140,
    "sched_setscheduler": 119, "sched_setparam": 118, "sched_setattr": 274, "sched_setaffinity": 122, "ioprio_set": 30,
    "migrate_pages": 238, "move_pages": 239, "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180,
    "open_by_handle_at": 265, "name_to_handle_at": 264, "fanotify_init": 262, "personality": 92, "execve": 221,
    "execveat": 281, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "truncate": 45, "memfd_create": 279,
}  # fmt: skip
_NEWER = {"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
          "clone3": 435, "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443, "fchmodat2": 452}  # fmt: skip
REFUSED = {"x86_64": _X86 | _NEWER, "aarch64": _ARM | _NEWER}
CLONE = {"x86_64": 56, "aarch64": 220}
PRLIMIT = {"x86_64": 302, "aarch64": 261}
CLONE_THREAD = 0x00010000
FCNTL, IOCTL = {"x86_64": 72, "aarch64": 25}, {"x86_64": 16, "aarch64": 29}
SETS_OWNER = {"fcntl": (8, 15), "ioctl": (0x8901, 0x8902)}
"""F_SETOWN and F_SETOWN_EX, FIOSETOWN and SIOCSPGRP: who is sent a signal when a file is ready, which may be anybody."""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def limit(job: dict[str, Any]) -> bool:
    """Bound processor time, memory, the size of a file, open files and core dumps; the hard limit is the soft one."""
    limits = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_DATA: job["memory_bytes"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    return _set_limits(limits)


def _set_limits(limits: dict[int, int]) -> bool:
    for which, most in limits.items():
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))
    return True


def leave_networks() -> bool:
    """Be alone in new network and IPC namespaces; an unprivileged process needs a user namespace for it."""
    libc = _libc()
    if os.getuid() == 0 and libc.unshare(CLONE_NEWNET | CLONE_NEWIPC) == 0:
        return True
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError:
            return True  # alone all the same, as nobody
    return True


def restrict_files(job: dict[str, Any]) -> bool:
    """Landlock: read the interpreter's folders alone, write into the job's folder alone."""
    libc = _libc()
    abi = min(libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1), job["landlock"])  # less, in tests
    if abi < 1:
        return False
    rights = ALL_BY_ABI[min(abi, 5)]
    fields = [rights, *([NO_NETWORK] if abi >= 4 else []), *([SCOPES] if abi >= 6 else [])]
    attributes = (ctypes.c_uint64 * len(fields))(*fields)
    ruleset = libc.syscall(LANDLOCK_CREATE, ctypes.byref(attributes), ctypes.c_size_t(8 * len(fields)), 0)
    if ruleset < 0:
        return False
    readable = [(path, READ_FILE | READ_DIR | EXECUTE) for path in job["readable"]]
    # Truncating is a right of its own from ABI 3 on; making devices, sockets and pipes is not given.
    own = rights & ~(EXECUTE | (1 << 6) | (1 << 9) | (1 << 10) | (1 << 11) | (1 << 15))
    for path, allowed in [
        *readable,
        (job["folder"], own),
        ("/dev/null", READ_FILE | WRITE),
        ("/dev/urandom", READ_FILE),
    ]:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            allowed &= EXECUTE | WRITE | READ_FILE | (1 << 14)

        class Rule(ctypes.Structure):
            _pack_ = 1
            _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]

        rule = Rule(allowed & rights, opened)
        failed = libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0)
        os.close(opened)
        if failed:
            return False
    done = libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return done


def refuse_calls() -> bool:
    """A seccomp filter: no new processes, no signals to others, no sockets, no mounts (``REFUSED``)."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH or sys.maxsize < 2**32:
        return False
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050000 | EPERM, 0x80000000
    missing = 0x00050000 | ENOSYS
    argument, pid = 16, 16  # the low half of the first argument (little endian): clone's flags, prlimit's process
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, AUDIT_ARCH[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, LARGEST_KNOWN + 1),  # of 32-bit calls of x86-64 (x32) the numbers are large too
        (give, 0, 0, missing),
        (equal, 0, 3, CLONE[machine]),
        (load, 0, 0, argument),
        (bits, 1, 0, CLONE_THREAD),
        (give, 0, 0, deny),
        (load, 0, 0, 0),
        (equal, 0, 3, PRLIMIT[machine]),
        (load, 0, 0, pid),
        (equal, 1, 0, 0),
        (give, 0, 0, deny),
        (load, 0, 0, 0),
    ]
    for call, number in (("fcntl", FCNTL[machine]), ("ioctl", IOCTL[machine])):
        commands = SETS_OWNER[call]
        program += [(equal, 0, 2 + 2 * len(commands), number), (load, 0, 0, 24)]  # the low half of the second argument
        for command in commands:
            program += [(equal, 0, 1, command), (give, 0, 0, deny)]
        program.append((load, 0, 0, 0))
    for name, number in REFUSED[machine].items():
        # glibc takes ENOSYS of clone3 as "use clone", which is looked into.
        program += [(equal, 0, 1, number), (give, 0, 0, missing if name == "clone3" else deny)]
    program.append((give, 0, 0, allow))

    class Instruction(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("first", ctypes.POINTER(Instruction))]

    array = (Instruction * len(program))(*(Instruction(*one) for one in program))
    given = Program(len(program), array)
    return _libc().prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(given), 0, 0) == 0


def give_up_capabilities() -> bool:
    """Drop all capabilities, which root has."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    header = Header(0x20080522, 0)
    return _libc().capset(ctypes.byref(header), (ctypes.c_uint32 * 6)()) == 0


def confine(job: dict[str, Any]) -> list[str]:
    """Take every protection that there is; gives their names."""

    def there(take: Callable[..., Any], *given: Any) -> bool:
        try:
            return bool(take(*given))
        except (OSError, AttributeError, ValueError):  # no Linux, or an old one
            return False

    libc = _libc()
    there(lambda: libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
    taken = {"namespaces": there(leave_networks)}
    there(lambda: libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    taken["Landlock"] = there(restrict_files, job)
    there(give_up_capabilities)
    taken["limits"] = there(limit, job)
    taken["seccomp"] = there(refuse_calls)  # the last one: it refuses what the others need
    if not taken["seccomp"]:
        there(_set_limits, {resource.RLIMIT_NPROC: 64})  # it counts all that the user runs; root is not bound by it
    return [name for name, got in taken.items() if got]


def main() -> None:
    """Read the job, confine, report, run; say at the end that the end was reached."""
    job = json.loads(sys.stdin.buffer.read())
    report, folder = int(os.environ.pop("CAGSR_REPORT")), job["folder"]
    os.chdir(folder)
    taken = confine(job)
    os.write(report, json.dumps(taken).encode() + b"\n")
    if any(not any(name in taken for name in one) for one in job["needed"]):
        os._exit(97)
    code, done = job.pop("program"), job.pop("done").encode()
    sys.argv, sys.path = ["program.py"], [path for path in sys.path if path != os.path.dirname(__file__)]
    try:
        exec(compile(code, "program.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit:
        raise
    except BaseException as error:  # whatever the program raises is its own failure
        sys.stdout.flush()
        trace = error.__traceback__
        shown = None if trace is None or isinstance(error, SyntaxError) else trace.tb_next
        traceback.print_exception(type(error), error, shown)
        sys.exit(1)
    # A program that leaves early, by exit(0), has not passed.
    sys.stdout.flush()
    os.write(report, done)


if __name__ == "__main__":
    main()
