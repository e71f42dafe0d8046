"""First process of the sandbox: isolates itself, starts the program, and cleans up when it ends.

    python -I -S launcher.py SPEC     (SPEC is the JSON that dfactory/rl/sandbox/ writes)

    launcher -> bwrap -> program     bubblewrap makes the namespaces
    launcher -> init -> program      with namespaces: init is process 1 of its namespace; when it ends, the kernel kills
                                     every process in there, whatever session or group it has moved to
    launcher -> program              without: the launcher is the reaper of all orphans and kills them itself

It ends when the program ends, or when its standard input closes: its parent is done with it, or gone. What it cannot set up
it says on standard error, which the program never gets to see; then nothing was run. There it also says which processes it
could not end.
"""

import base64
import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable

# linux/sched.h, linux/mount.h, linux/prctl.h, linux/landlock.h; the numbers of new system calls are the same everywhere
NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # user mnt pid net ipc uts
NEW_MOUNTS = 0x00020000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 1, 36, 38, 22, 2
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
LANDLOCK_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a folder
LANDLOCK_WRITE = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 8  # read, list, write, remove, make files; no folders, links
CAPABILITIES_V3 = 0x20080522
SYS_KEYCTL, JOIN_SESSION_KEYRING = {"x86_64": 250, "aarch64": 219, "riscv64": 219}, 1

INSIDE_ID, NOBODY = 1000, 65534  # the program's user inside, and the one it stands for outside when started by root
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
WORK = "/work" if not sys.base_prefix.startswith("/work/") else "/work-in-the-sandbox"
BUBBLEWRAP = ["bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
BUBBLEWRAP += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--hostname", "sandbox"]

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3), "prctl")


def main() -> None:
    spec = json.loads(sys.argv[1])
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, the kernel takes us first
    with open(spec["runner"]) as file:
        spec["source"] = file.read()
    leave_keyring()
    spec["from_root"] = os.geteuid() == 0
    spec["two_users"] = False
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if spec["isolation"] == "namespaces":
        enter_namespaces(spec)
    elif spec["isolation"] != "bubblewrap":
        spec["limits"]["RLIMIT_NPROC"] += tasks_of_this_user()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    child = os.fork()
    if child == 0:
        {"bubblewrap": start_bubblewrap, "namespaces": init}.get(spec["isolation"], start_program)(spec)
    os.close(spec["request_fd"])
    os.close(spec["reply_fd"])
    os.dup2(2, 1)
    supervise(child)


def leave_keyring() -> None:
    """Kerberos tickets and their like lie in the session's keyring, which no namespace hides: begin an empty one. A kernel
    or container that has no keys, or keeps them from us, keeps them from the program too."""
    number = SYS_KEYCTL.get(os.uname().machine)
    if number is not None and libc.syscall(number, JOIN_SESSION_KEYRING, None) < 0:
        problem = ctypes.get_errno()
        if problem not in (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP):
            raise OSError(problem, f"keyctl: {os.strerror(problem)}")


def supervise(child: int) -> None:
    """Wait for the child's end or the parent's word, kill what is left, pass the exit status on."""
    ends = select.poll()
    ends.register(os.pidfd_open(child), select.POLLIN)
    ends.register(0, select.POLLIN)  # readable: closed
    ends.poll()
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    kill_orphans()
    if left := descendants():
        os.write(2, f"left: processes {left}".encode())
    os._exit(exit_status(status))


def exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


# ---------------------------------------------------------------------------------------------- with namespaces


def enter_namespaces(spec: dict) -> None:
    """New user, mount, process, network, IPC and host name namespaces, with a root that holds Python and nothing else."""
    user, group = os.geteuid(), os.getegid()
    write_maps = fork_mapper() if spec["from_root"] else None
    check(libc.unshare(NEW_NAMESPACES), "unshare")
    spec["two_users"] = write_maps is not None and write_maps()
    if not spec["two_users"]:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{INSIDE_ID} {user} 1")
        write("/proc/self/gid_map", f"{INSIDE_ID} {group} 1")
    # The program shall not become root of a namespace of its own. Some containers have a read-only /proc/sys: then it can,
    # but what is mounted here stays locked for it.
    with contextlib.suppress(OSError):
        write("/proc/sys/user/max_user_namespaces", "0")
    build_root(spec["folder"], spec["file_bytes"])


def fork_mapper() -> Callable[[], bool]:
    """Root may stand for two users inside: itself for setting up, and nobody for the program. Only a process outside of
    the namespace may write that map; it is forked before, and signalled when. Root of a container that has no second user
    cannot: then the program runs as root's user, without capabilities."""
    target = os.getpid()
    told, tell = os.pipe()
    mapper = os.fork()
    if mapper == 0:
        os.close(tell)
        try:
            for name in ("uid_map", "gid_map") if os.read(told, 1) else ():
                write(f"/proc/{target}/{name}", f"0 0 1\n{INSIDE_ID} {NOBODY} 1")
        except OSError:
            os._exit(1)
        os._exit(0)
    os.close(told)

    def write_maps() -> bool:
        os.write(tell, b"x")
        os.close(tell)
        return os.waitpid(mapper, 0)[1] == 0

    return write_maps


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def build_root(root: str, file_bytes: int) -> None:
    """A root file system in memory: Python and shared libraries read-only, /dev/null, and a folder to work in."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    shown: list[str] = []
    for path in (sys.base_prefix, sys.base_exec_prefix, *LIBRARIES):
        if os.path.exists(path) and not any(f"{path}/".startswith(f"{other}/") for other in shown):
            show(path, root)
            shown.append(path)
    os.mkdir(f"{root}/dev", 0o755)
    show_null(f"{root}/dev/null")
    os.mkdir(root + WORK)
    options = f"mode=700,uid={INSIDE_ID},gid={INSIDE_ID},size={file_bytes},nr_inodes=1024"
    mount("tmpfs", root + WORK, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    if not os.path.lexists(f"{root}/tmp"):  # Python may live in there
        os.symlink(WORK, f"{root}/tmp")
    set_attributes(root, ATTR_RDONLY, recursive=False)
    os.chdir(root)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir(WORK)


def show(path: str, root: str) -> None:
    """Make a path of the real root visible at the same place, read-only."""
    if os.path.islink(path):
        os.symlink(os.readlink(path), root + path)
        return
    os.makedirs(os.path.dirname(root + path), 0o755, exist_ok=True)
    bind(path, root + path)
    set_attributes(root + path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, recursive=True)


def show_null(place: str) -> None:
    """/dev/null at another place. Read-only: one can write to it all the same, but not change the mode of the inode, which
    is the machine's, where the program runs as root's user."""
    bind("/dev/null", place)
    set_attributes(place, ATTR_RDONLY | ATTR_NOSUID, recursive=False)


def bind(path: str, place: str) -> None:
    if os.path.isdir(path):
        os.mkdir(place, 0o755)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(path, place, None, MS_BIND | MS_REC)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    source, kind = source and source.encode(), kind and kind.encode()
    result = libc.mount(source, target.encode(), kind, ctypes.c_ulong(flags), data.encode())
    check(result, f"mount {target}")


def set_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    request = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    check(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, request, len(request)), f"read-only {path}")


# ---------------------------------------------------------------------------------------------- with bubblewrap


def start_bubblewrap(spec: dict) -> None:
    """Become bwrap, which builds the namespaces and becomes the runner. Never returns."""
    try:
        places = prepare_for_nobody(spec) if spec["from_root"] else {}
        rules = os.memfd_create("filter")
        os.write(rules, base64.b64decode(spec["filters"]["processes"]))
        os.lseek(rules, 0, os.SEEK_SET)
        for number in (rules, spec["request_fd"], spec["reply_fd"]):
            os.set_inheritable(number, True)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        user = ["--uid", str(INSIDE_ID), "--gid", str(INSIDE_ID), "--seccomp", str(rules), "--chdir", WORK]
        command = [*BUBBLEWRAP, *user, *shown_by_bubblewrap(spec, places), "--", *runner_command(spec)]
        os.execve(spec["bwrap"], command, environment(WORK))
    except OSError as problem:
        os.write(2, f"{problem}".encode())
        os._exit(1)


def shown_by_bubblewrap(spec: dict, places: dict[str, str]) -> list[str]:
    """bwrap's options for the files that the program sees; `places` says where some of them are found instead."""
    options = []
    for path in (sys.base_prefix, sys.base_exec_prefix, *LIBRARIES):
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif path in places or os.path.exists(path):
            options += ["--ro-bind", places.get(path, path), path]
    work = ["--bind", places[WORK]] if WORK in places else ["--size", str(spec["file_bytes"]), "--tmpfs"]
    options += ["--dev-bind", places.get("/dev/null", "/dev/null"), "/dev/null", *work, WORK]
    if not sys.base_prefix.startswith("/tmp/"):
        options += ["--symlink", WORK, "/tmp"]
    return [*options, "--remount-ro", "/"]


def prepare_for_nobody(spec: dict) -> dict[str, str]:
    """Root gives itself up before bwrap starts, and so may not even reach its own Python: what the program needs is shown
    in a place of this process's own, {path: place}. Raises OSError where root may not mount, or become another user."""
    check(libc.unshare(NEW_MOUNTS), "unshare")
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    python = {path: os.open(path, os.O_PATH) for path in (sys.base_prefix, sys.base_exec_prefix)}
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID, "mode=755,size=1m")
    places = {"/dev/null": "/tmp/null", WORK: "/tmp/work"}
    for number, (path, file) in enumerate(python.items()):
        places[path] = f"/tmp/python{number}"
        os.mkdir(places[path], 0o755)
        mount(f"/proc/self/fd/{file}", places[path], None, MS_BIND | MS_REC)
        os.close(file)
    show_null(places["/dev/null"])
    os.mkdir(places[WORK])
    options = f"mode=700,uid={NOBODY},gid={NOBODY},size={spec['file_bytes']},nr_inodes=1024"
    mount("tmpfs", places[WORK], "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    os.setgroups([])
    os.setresgid(*[NOBODY] * 3)
    os.setresuid(*[NOBODY] * 3)
    return places


# ------------------------------------------------------------------------------------------------- process 1


def init(spec: dict) -> None:
    """Process 1 of the namespace: starts the program, and ends with it, and so does everything else in there."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    program = os.fork()
    if program == 0:
        start_program(spec)
    os.closerange(0, 2)
    os.closerange(3, 1 << 16)  # the pipes may have high numbers
    while True:
        process, status = os.wait()
        if process == program:
            os._exit(exit_status(status))


# ------------------------------------------------------------------------------------------- without namespaces


def restrict_by_landlock(folder: str) -> None:
    """The kernel's rule for files, TCP, and signals, for this process and what it starts. Raises OSError if it has none."""
    abi = check(libc.syscall(SYS_LANDLOCK_CREATE, None, 0, 1), "landlock")
    files = (1 << 13) - 1 | (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15
    rules = struct.pack("QQQ", files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = check(libc.syscall(SYS_LANDLOCK_CREATE, rules, size, 0), "landlock")
    readable = [
        path for path in (sys.base_prefix, sys.base_exec_prefix, *LIBRARIES, "/dev/null") if os.path.exists(path)
    ]
    write_rights = LANDLOCK_WRITE | (abi >= 3) << 14
    for path, rights in [*((path, LANDLOCK_READ) for path in readable), (folder, write_rights), ("/dev/null", 1 << 1)]:
        place = os.open(path, os.O_PATH)
        rights &= ~(1 << 3) if not os.path.isdir(path) else ~0
        check(libc.syscall(SYS_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, place), 0), f"landlock {path}")
        os.close(place)
    check(libc.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0), "landlock")
    os.close(ruleset)


def tasks_of_this_user() -> int:
    """Without a namespace, the limit on processes and threads counts all that the user runs."""
    count = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if os.stat(f"/proc/{name}").st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def kill_orphans() -> None:
    """Stop, then kill all that descends from the program: orphans have become our children. One pass is enough where
    nothing can fork on; where something forks faster, passes go on for some seconds."""
    give_up = time.monotonic() + 5
    while (found := descendants()) and time.monotonic() < give_up:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
        reap()


def descendants() -> list[int]:
    parents = {}
    for name in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{name}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(name)] = int(parent)
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


# ------------------------------------------------------------------------------------------------------- program


def start_program(spec: dict) -> None:
    """Give up every privilege and become the runner. Never returns."""
    complaints = os.dup(2)
    namespaces = spec["isolation"] == "namespaces"
    try:
        os.setsid()  # no signal to "our group" reaches init or launcher
        if spec["two_users"]:
            os.setgroups([])
            os.setresgid(*[INSIDE_ID] * 3)
            os.setresuid(*[INSIDE_ID] * 3)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        folder = WORK if namespaces else spec["folder"]
        os.chdir(folder)
        drop_capabilities()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if spec["isolation"] == "landlock":
            restrict_by_landlock(folder)
        for number in (spec["request_fd"], spec["reply_fd"]):
            os.set_inheritable(number, True)
        # The kernel counts no processes of its root: there the program gets threads only.
        may_fork = namespaces and (spec["two_users"] or not spec["from_root"])
        restrict_calls(spec["filters"]["processes" if may_fork else "alone"])
        os.execve(sys.executable, runner_command(spec), environment(folder))
    except OSError as problem:
        os.write(complaints, f"{problem}".encode())
        os._exit(1)


def runner_command(spec: dict) -> list[str]:
    keep = {name: spec[name] for name in ("mode", "request_fd", "reply_fd", "limits")}
    keep |= {"guard": spec["isolation"] == "interpreter", "readable": [sys.base_prefix, sys.base_exec_prefix]}
    return [sys.executable, "-I", "-S", "-c", spec["source"], json.dumps(keep)]


def environment(folder: str) -> dict[str, str]:
    return {"HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8", "MALLOC_ARENA_MAX": "1"}


def restrict_calls(instructions: str) -> None:
    """A seccomp filter, for this process and what it becomes and starts; empty only at the level that is no wall."""
    if instructions:
        code = ctypes.create_string_buffer(base64.b64decode(instructions))
        count = (len(code) - 1) // 8
        program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", count, ctypes.addressof(code)))
        address = ctypes.c_ulong(ctypes.addressof(program))
        check(libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(MODE_FILTER), address, *[ctypes.c_ulong(0)] * 2), "seccomp")


def drop_capabilities() -> None:
    """Also for root: with no-new-privileges set, no exec brings them back."""
    header, none = struct.pack("Ii", CAPABILITIES_V3, 0), bytes(24)
    check(libc.capset(header, none), "capset")


if __name__ == "__main__":
    try:
        main()
    except OSError as problem:
        sys.exit(f"{problem}")
