"""Last process of the sandbox: runs the program. Started by launcher.py, inside of all limits.

`call`: reads the program, runs it as a module, then answers one call after another: {"nonce", "call", "args", "kwargs"}
or {"nonce", "expression"} gives {"nonce", "value"} or {"nonce", "error"}. `script`: runs the program as __main__ with the
given standard input, the channel closed before.

Nothing here decides anything, and nothing here is worth attacking: the program shares this process and may take the channel
over, but on it travel only arguments and answers. What the right answers are is known to the parent alone.
"""

import json
import os
import resource
import sys

DEEPEST = 100  # of nested answers
PLAIN_INT = 1 << 53


def encode(value, depth=DEEPEST):
    """A plain value as JSON; what JSON lacks is an object with one key, its kind."""
    if depth == 0:
        raise ValueError("the answer is nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        value = int.__int__(value)
        return value if -PLAIN_INT < value < PLAIN_INT else {"int": hex(value)}
    if isinstance(value, float):
        value = float.__float__(value)
        return value if value - value == 0 else {"float": repr(value)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (list, tuple)):
        return [encode(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return {"set": [encode(item, depth - 1) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth - 1), encode(item, depth - 1)] for key, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [encode(value.real, depth - 1), encode(value.imag, depth - 1)]}
    raise TypeError(f"an answer of type {type(value).__name__} is no plain value")


def guard(event, args, type=type, str=str, int=int, readable=(), writable=""):
    """Audit hook at the level that is no wall: no sockets, processes, foreign memory, or files elsewhere. It stops mistakes.

    Uses no global and no builtin name that the program could exchange; defaults are a tuple.
    """
    if event == "import" and type(args[0]) is not str:
        raise PermissionError(event)  # a class of the program's that calls itself text
    if event.startswith(
        ("socket.", "ctypes.", "subprocess.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill",
         "os.chmod", "os.chown", "os.lchown", "os.mkdir", "os.link", "os.symlink", "os.setxattr", "os.startfile", "pty.",
         "signal.pthread_kill", "resource.", "sqlite3.", "shutil.", "code.__new__", "sys._current_frames", "syslog.",
         "fcntl.", "os.rmdir", "os.utime")
    ):  # fmt: skip
        raise PermissionError(event)
    if event == "object.__setattr__" and args[1] == "__code__":
        raise PermissionError(event)
    if event == "object.__setattr__" and args[1] == "__defaults__" and args[0].__code__.co_name == "guard":
        raise PermissionError(event)
    if event == "import" and args[0] in {
        *("_ctypes", "_testcapi", "_posixsubprocess", "_posixshmem", "_multiprocessing", "readline", "_ssl", "_dbm"),
        *("_gdbm", "_tkinter", "_curses", "_testinternalcapi", "_xxsubinterpreters", "_interpreters"),
    }:
        raise ImportError(event)
    if event == "open" or event.startswith(("os.remove", "os.rename", "os.truncate", "os.listdir", "os.scandir", "os.chdir",
                                            "os.fwalk", "os.walk", "os.getxattr", "glob.")):  # fmt: skip
        reads = event in ("os.listdir", "os.scandir") or (event == "open" and args[1] is not None and args[2] & 3 == 0)
        for path in args[:2] if event == "os.rename" else args[:1]:
            if (type(path) is int and event != "os.chdir") or path is None:
                continue
            if type(path) is not str or "/../" in f"/{path}/":
                raise PermissionError(event)
            if path.startswith("/") and not f"{path}/".startswith(
                (writable, "/dev/null/", *(readable if reads else ()))
            ):
                raise PermissionError(event)


def run_script(request):
    text = os.memfd_create("stdin")
    os.write(text, request["stdin"].encode())
    os.lseek(text, 0, os.SEEK_SET)
    os.dup2(text, 0)
    os.close(text)
    sys.argv = ["program.py"]
    exec(compile(request["program"], "program.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


def answer_calls(request, requests, reply):
    namespace = {"__name__": "program", "__builtins__": __builtins__}
    exec(compile(request["program"], "program.py", "exec"), namespace)
    reply({"nonce": request["nonce"], "value": None})
    for line in requests:
        request = json.loads(line)
        try:
            if "expression" in request:
                value = eval(request["expression"], namespace)
            else:
                value = namespace[request["call"]](*request["args"], **request["kwargs"])
            reply({"nonce": request["nonce"], "value": encode(value)})
        except Exception as problem:  # whatever a program raises is its answer
            reply({"nonce": request["nonce"], "error": describe(problem)})


def describe(problem):
    """The name of the exception only: its text is the program's, and may be anything."""
    return type(problem).__name__


def main():
    spec = json.loads(sys.argv[1])
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 2)  # from here on standard error is discarded
    os.close(null)
    requests = os.fdopen(spec["request_fd"])
    replies = os.fdopen(spec["reply_fd"], "w")

    def reply(message, dumps=json.dumps):
        replies.write(dumps(message) + "\n")
        replies.flush()

    for name, value in spec["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.modules["builtins"].exit = sys.modules["builtins"].quit = sys.exit  # as `site` would have it
    reply({"ready": True})
    request = json.loads(requests.readline())
    if spec["guard"]:
        writable = os.getcwd() + "/"
        readable = tuple(f"{path}/" for path in spec["readable"])
        guard.__defaults__ = (type, str, int, readable, writable)
        sys.addaudithook(guard)
    if spec["mode"] == "script":
        requests.close()
        replies.close()
        run_script(request)
        return
    try:
        answer_calls(request, requests, reply)
    except Exception as problem:
        reply({"nonce": request["nonce"], "error": describe(problem)})


main()
