"""The system calls that a program in the sandbox may make, as a seccomp filter that libseccomp compiles.

The list says what is allowed; the kernel answers everything else with ENOSYS, as if it had been built without it: sockets of
any family (vsock too), keys, mounts, namespaces, ptrace, io_uring, bpf, and what a later kernel adds. Two variants:

    processes     within namespaces: fork, signals, and modes of its own files
    alone         without them: threads only; no signal, no mode, owner or time of any file
"""

import base64
import errno
import functools
import tempfile

from dfactory.errors import RolloutError

FILES = """
    access chdir close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 fallocate fchdir
    fdatasync flock fstat fstatfs fsync ftruncate getcwd getdents getdents64 link linkat lseek lstat mkdir mkdirat
    newfstatat open openat openat2 pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readlink readlinkat
    readv rename renameat renameat2 rmdir sendfile stat statfs statx symlink symlinkat umask unlink unlinkat write writev
"""
MEMORY = "brk madvise memfd_create mmap mprotect mremap msync munmap"
WAITING = """
    alarm clock_getres clock_gettime clock_nanosleep epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2
    epoll_wait eventfd eventfd2 futex futex_waitv getitimer gettimeofday membarrier nanosleep pause poll ppoll pselect6
    restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait select setitimer
    sigaltstack time timerfd_create timerfd_gettime timerfd_settime
"""
ITSELF = """
    arch_prctl capget execve exit exit_group get_robust_list getcpu getegid geteuid getgid getgroups getpgid getpgrp getpid
    getppid getrandom getresgid getresuid getrlimit getrusage getsid gettid getuid riscv_flush_icache rseq
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getparam sched_getscheduler sched_yield
    set_robust_list set_tid_address setrlimit sysinfo times uname wait4 waitid
"""
PROCESSES = """
    chmod fchmod fchmodat fchmodat2 fork futimesat kill rt_sigqueueinfo setpgid setsid tgkill tkill truncate utime utimensat
    utimes vfork
"""
ATTRIBUTES = "getxattr fgetxattr lgetxattr listxattr flistxattr llistxattr setxattr fsetxattr lsetxattr"
DENIED = "socket chown fchown fchownat lchown setuid setgid setresuid setresgid setgroups setpriority mknod mknodat"

# linux/sched.h, fcntl.h, ioctls.h, prctl.h
CLONE_THREAD, NEW_NAMESPACE = 0x00010000, 0x7E020080
F_SETFL, O_ASYNC = 4, 0o20000
FCNTL = (
    0,
    1,
    2,
    3,
    5,
    6,
    7,
    36,
    37,
    38,
    1030,
    1031,
    1032,
    1033,
    1034,
)  # duplicates, flags, locks, size of a pipe, seals
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
PRCTL = (15, 16, 0x53564D41)  # names of threads and of memory
AF_UNIX = 1


@functools.cache
def filter_text(processes: bool) -> str:
    """The filter's instructions in base64. Raises RolloutError where libseccomp is missing."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as problem:
        raise RolloutError(f"{problem}: install the package libseccomp2, and pip install 'dfactory[rl]'") from problem
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    _allow_plain(pyseccomp, rules, processes)
    _allow_some(pyseccomp, rules, processes)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return base64.b64encode(file.read()).decode()


def _allow_plain(seccomp, rules, processes: bool) -> None:
    for name in f"{FILES} {MEMORY} {WAITING} {ITSELF} {PROCESSES if processes else ''}".split():
        if _exists(seccomp, name):
            rules.add_rule(seccomp.ALLOW, name)
    for names, number in (
        (ATTRIBUTES, errno.ENOTSUP),
        (DENIED, errno.EPERM),
        ("" if processes else PROCESSES, errno.EPERM),
    ):
        for name in filter(functools.partial(_exists, seccomp), names.split()):
            rules.add_rule(seccomp.ERRNO(number), name)


def _allow_some(seccomp, rules, processes: bool) -> None:
    """Calls of which the arguments decide. F_SETOWN, F_SETSIG, O_ASYNC are left out: no descriptor may send signals."""
    arg, masked, word = seccomp.Arg, seccomp.MASKED_EQ, 0xFFFFFFFF  # the kernel reads 32 bits of these
    for name, place, values in (("fcntl", 1, FCNTL), ("ioctl", 1, IOCTL), ("prctl", 0, PRCTL), ("prlimit64", 0, (0,))):
        for value in values:
            rules.add_rule(seccomp.ALLOW, name, arg(place, masked, word, value))
    rules.add_rule(seccomp.ALLOW, "fcntl", arg(1, masked, word, F_SETFL), arg(2, masked, O_ASYNC, 0))
    rules.add_rule(seccomp.ALLOW, "socketpair", arg(0, masked, word, AF_UNIX))
    thread = () if processes else (CLONE_THREAD,)
    mask = NEW_NAMESPACE | sum(thread)
    rules.add_rule(seccomp.ALLOW, "clone", arg(0, masked, mask, sum(thread)))


def _exists(seccomp, name: str) -> bool:
    """Whether libseccomp knows the call, and this architecture has it: some have no `open`, some no `fchmodat2` yet."""
    try:
        return seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) >= 0
    except ValueError:
        return False
