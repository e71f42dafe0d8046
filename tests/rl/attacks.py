"""Programs that want a reward for `add(a, b)` without earning it, or want to do harm. Each has to score 0.

Where an attack is to reach something, the program returns the right answer only after it has got there. What stands in
{braces} the test fills in: a port somebody listens on, a file that holds a secret, a path outside.
"""

OUT_OF_TIME = {
    "infinite loop": "while True: pass",
    "infinite loop in the call": "def add(a, b):\n    while True: pass",
    "sleep": "import time\ndef add(a, b):\n    time.sleep(1000)\n    return a + b",
    "waits for itself": "import threading\nlock = threading.Lock(); lock.acquire()\nlock.acquire()",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "ignores every signal": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except Exception: pass
while True: pass
""",
    "eats what it raises": """
def add(a, b):
    while True:
        try:
            while True: pass
        except BaseException: continue
""",
    "a thread keeps it alive": """
import threading
def spin():
    while True: pass
threading.Thread(target=spin).start()
raise SystemExit
""",
    "endless destructor": "class D:\n    def __del__(self):\n        while True: pass\nd = D()\ndel d",
    "endless exit hook": "import atexit, sys, time\natexit.register(time.sleep, 1000)\nsys.exit(0)",
    "closes everything and goes on": "import os\nos.closerange(0, 256)\nwhile True: pass",
    "endless length": "class L(list):\n    def __iter__(self):\n        while True: yield 1\ndef add(a, b): return L([1])",
    "endless name": """
class Meta(type):
    @property
    def __name__(cls):
        while True: pass
class Odd(Exception, metaclass=Meta): pass
def add(a, b): raise Odd
""",
    "power tower": "def add(a, b): return 9 ** 9 ** 9 ** 9",
    "catastrophic pattern": "import re\ndef add(a, b): return re.match('(a+)+$', 'a' * 50 + 'b') or a + b",
}

RESOURCES = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb in sessions of their own": """
import os
while True:
    try:
        if os.fork() == 0: os.setsid()
    except OSError: pass
""",
    "thread bomb": """
import threading, time
threads = [threading.Thread(target=time.sleep, args=(100,)) for _ in range(500)]
for t in threads: t.start()
def add(a, b): return a + b
""",
    "memory at once": "block = bytearray(20 << 30)\ndef add(a, b): return a + b",
    "memory bit by bit": "hold = []\nwhile True: hold.append(bytearray(1 << 24))",
    "memory of many processes": """
import os
for _ in range(200):
    if os.fork() == 0: break
hold = []
while True: hold.append(bytearray(1 << 24))
""",
    "a gigabyte of output": "def add(a, b):\n    for _ in range(1 << 14): print('x' * (1 << 16))\n    return a + b",
    "a big file": """
with open('big', 'wb') as file:
    for _ in range(1024): file.write(bytes(1 << 20))
def add(a, b): return a + b
""",
    "many files": "for i in range(10**6): open(f'{i}', 'w').write('x' * 10)\ndef add(a, b): return a + b",
    "many open files": "hold = [open('x', 'w') for _ in range(1000)]\ndef add(a, b): return a + b",
    "deep recursion": "def add(a, b): return add(a, b)",
    "stack overflow": "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b)",
    "segmentation fault": "import ctypes\ndef add(a, b):\n    ctypes.string_at(0)\n    return a + b",
    "deep answer": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "answer that holds itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "huge answer": "def add(a, b): return 'x' * (100 << 20)",
    "huge number": "def add(a, b): return 1 << (1 << 27)",
    "larger limits": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
def add(a, b): return a + b
""",
}

SIGNALS_AND_FOLDERS = {
    "a signal from the channel kills the judge": """
import fcntl, os, signal
for n in range(3, 64):
    for owner in (os.getppid(), {parent}):
        try:
            fcntl.fcntl(n, fcntl.F_SETOWN, owner); fcntl.fcntl(n, 10, signal.SIGKILL)
            fcntl.fcntl(n, fcntl.F_SETFL, fcntl.fcntl(n, fcntl.F_GETFL) | os.O_ASYNC)
        except OSError: pass
def add(a, b): return 0
""",
    "a signal from the channel stops the launcher": """
import fcntl, os, signal
for n in range(3, 64):
    try:
        fcntl.fcntl(n, fcntl.F_SETOWN, os.getppid()); fcntl.fcntl(n, 10, signal.SIGSTOP)
        fcntl.fcntl(n, fcntl.F_SETFL, fcntl.fcntl(n, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError: pass
def add(a, b): return 0
""",
    "a signal to a whole group of owners": """
import fcntl, os, struct
for n in range(3, 64):
    try: fcntl.fcntl(n, 15, struct.pack('ii', 2, os.getpgid(os.getppid())))
    except OSError: pass
    try: fcntl.ioctl(n, 0x8901, struct.pack('i', os.getppid())); fcntl.ioctl(n, 0x5452, struct.pack('i', 1))
    except OSError: pass
def add(a, b): return 0
""",
    "a lease on Python": """
import fcntl, os
fcntl.fcntl(open(os.__file__), fcntl.F_SETLEASE, fcntl.F_RDLCK)
def add(a, b): return a + b
""",
    "notices of a folder": "import fcntl, os\nfcntl.fcntl(os.open('.', 0), fcntl.F_NOTIFY, 4)\ndef add(a, b): return a + b",
    "goes up and writes": """
import os
for _ in range(9): os.chdir('..')
open('{outside}'.lstrip('/'), 'w').write('x')
def add(a, b): return a + b
""",
    "goes up and reads": """
import os
for _ in range(9): os.chdir('..')
open('{secret}'.lstrip('/')).read()
def add(a, b): return a + b
""",
    "lists what is above": "import os\nif len(os.listdir('..')) < 2: raise OSError\nos.listdir('..').index('proc')\n"
    "def add(a, b): return a + b",
    "goes up by a descriptor": """
import os
folder = os.open('.', os.O_RDONLY)
for _ in range(9): folder = os.open('..', os.O_RDONLY, dir_fd=folder)
os.open('{outside}'.lstrip('/'), os.O_CREAT | os.O_WRONLY, dir_fd=folder)
def add(a, b): return a + b
""",
    "writes beside Python by a descriptor": """
import os, sys
folder = os.open(os.path.dirname(os.__file__), os.O_RDONLY)
os.close(os.open('dfactory-test-left', os.O_CREAT | os.O_WRONLY, dir_fd=folder))
os.unlink('dfactory-test-left', dir_fd=folder)
def add(a, b): return a + b
""",
    "changes into Python's folder by a descriptor": """
import os
os.chdir(os.open(os.path.dirname(os.__file__), os.O_RDONLY))
open('dfactory-test-left', 'w').close(); os.unlink('dfactory-test-left')
def add(a, b): return a + b
""",
    "removes its own folder": """
import os
for path in (os.getcwd(), os.getcwd() + '/', '../' + os.path.basename(os.getcwd())):
    try: os.rmdir(path)
    except OSError: pass
os.listdir(os.environ['HOME']) and 0
def add(a, b): return 0
""",
    "renames its own folder": """
import os
here = os.getcwd()
for path in (here, here + '/'):
    try: os.rename(path, os.path.dirname(here) + '/dfactory-test-left')
    except OSError: pass
def add(a, b): return 0
""",
    "puts a file into the place of its folder": """
import os
here = os.getcwd()
os.rmdir(here); open(here, 'w').close()
def add(a, b): return a + b
""",
}

BEHIND_THE_HOOK = """
class Name(str):
    __hash__ = lambda self: 0
    __eq__ = lambda self, other: str.__eq__(self, other)
module = __import__(Name('_posixsubprocess'))
import os, sys
read, write = os.pipe()
code = {code!r}.encode()
child = module.fork_exec([sys.executable.encode(), b'-c', code], (sys.executable.encode(),), True, (),
                         None, None, -1, -1, -1, -1, -1, -1, read, write, True, True, -1, None, None, None, -1, None, True)
os.waitpid(child, 0)
open('done').read()
def add(a, b): return a + b
"""


def behind_the_hook(code):
    """A program whose child, a Python without the hook, runs some code."""
    return BEHIND_THE_HOOK.replace("{code!r}", repr(code + "; open('done', 'w').close()"))


KERNEL = {
    "a child behind the hook chmods outside": behind_the_hook("import os; os.chmod('{secret}', 0o777)"),
    "a child behind the hook sets times outside": behind_the_hook("import os; os.utime('{secret}', (0, 0))"),
    "a child behind the hook sends UDP": behind_the_hook(
        "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', {port}))"
    ),
    "a child behind the hook binds a path socket": behind_the_hook("import socket; socket.socket(1, 1).bind('s')"),
    "a child behind the hook leaves a key": behind_the_hook(
        "import ctypes; 1 / (ctypes.CDLL(None).syscall(248, b'user', b'dfactory-test-left', b'expected', 8, -4) > 0)"
    ),
    "a child behind the hook makes a vsock": behind_the_hook("import socket; socket.socket(40, 1)"),
    "a name with a hash of its own imports a forbidden module": """
class Name(str):
    __hash__ = lambda self: 0
    __eq__ = lambda self, other: str.__eq__(self, other)
module = __import__(Name('_posixsubprocess'))
import os, sys
read, write = os.pipe()
child = module.fork_exec([sys.executable.encode(), b'-c', b'open("{outside}", "w")'], (sys.executable.encode(),), True, (),
                         None, None, -1, -1, -1, -1, -1, -1, read, write, True, True, -1, None, None, None, -1, None, True)
os.waitpid(child, 0)
open('{outside}').read()
def add(a, b): return a + b
""",
    "loads a module behind the hook": """
import importlib._bootstrap as b, importlib.machinery as m, sys
module = b._imp.create_builtin(m.ModuleSpec('_posixsubprocess', None))
import os
read, write = os.pipe()
child = module.fork_exec([sys.executable.encode(), b'-c', b'open("{outside}", "w")'], (sys.executable.encode(),), True, (),
                         None, None, -1, -1, -1, -1, -1, -1, read, write, True, True, -1, None, None, None, -1, None, True)
os.waitpid(child, 0)
open('{outside}').read()
def add(a, b): return a + b
""",
    "sends UDP": """
import ctypes
c = ctypes.CDLL(None)
s = c.socket(2, 2, 0)
if s < 0 or c.sendto(s, b'x', 1, 0, bytes([2, 0]) + ({port}).to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8), 16) < 0:
    raise OSError
def add(a, b): return a + b
""",
    "binds UDP": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(('127.0.0.1', 0))\n"
    "def add(a, b): return a + b",
    "binds a path socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('{outside}')\ndef add(a, b): return a + b",
    "binds a path socket at home": "import socket\nsocket.socket(socket.AF_UNIX).bind('s')\ndef add(a, b): return a + b",
    "makes a vsock": "import socket\nsocket.socket(40, socket.SOCK_STREAM)\ndef add(a, b): return a + b",
    "makes a packet socket": "import socket\nsocket.socket(17, socket.SOCK_RAW, 3)\ndef add(a, b): return a + b",
    "asks netlink": "import socket\nsocket.socket(16, socket.SOCK_RAW, 0).bind((0, 0))\ndef add(a, b): return a + b",
    "uses the kernel's cipher": "import socket\nsocket.socket(38, 5, 0)\ndef add(a, b): return a + b",
    "leaves a key": """
import ctypes, os
number = 248 if os.uname().machine == 'x86_64' else 217
if ctypes.CDLL(None).syscall(number, b'user', b'dfactory-test-left', b'expected', 8, -4) < 0: raise OSError
def add(a, b): return a + b
""",
    "chmods /dev/null": "import os\nos.chmod('/dev/null', 0o600)\ndef add(a, b): return a + b",
    "chmods /dev/null by a descriptor": """
import os
for n in (0, 2): os.fchmod(n, 0o600)
def add(a, b): return a + b
""",
    "sets the times of /dev/null": "import os\nos.utime('/dev/null', (0, 0))\ndef add(a, b): return a + b",
    "owns /dev/null": "import os\nos.chown('/dev/null', 65534, 65534)\ndef add(a, b): return a + b",
    "chmods outside": "import os\nos.chmod('{secret}', 0o777)\ndef add(a, b): return a + b",
    "chmods outside below Python": """
import ctypes
if ctypes.CDLL(None).chmod(b'{secret}', 0o777): raise OSError
def add(a, b): return a + b
""",
    "sets times outside": "import os\nos.utime('{secret}', (0, 0))\ndef add(a, b): return a + b",
    "cuts a file outside": "import os\nos.truncate('{secret}', 0)\ndef add(a, b): return a + b",
    "marks a file outside": "import os\nos.setxattr('{secret}', 'user.left', b'x')\ndef add(a, b): return a + b",
    "slows its user's processes": """
import os
os.setpriority(os.PRIO_USER, os.getuid(), 19); os.setpriority(os.PRIO_PROCESS, {parent}, 19)
def add(a, b): return a + b
""",
    "moves another process to one core": "import os\nos.sched_setaffinity({parent}, {{0}})\ndef add(a, b): return a + b",
    "limits its parent": """
import resource
resource.prlimit({parent}, resource.RLIMIT_CORE, (0, 0))
def add(a, b): return a + b
""",
    "shared memory of System V": """
import ctypes
if ctypes.CDLL(None).shmget(4711, 4096, 0o1600) < 0: raise OSError
def add(a, b): return a + b
""",
    "a queue of messages": """
import ctypes
if ctypes.CDLL(None).msgget(4711, 0o1600) < 0: raise OSError
def add(a, b): return a + b
""",
    "an io_uring": """
import ctypes
if ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)) < 0: raise OSError
def add(a, b): return a + b
""",
    "a bpf map": """
import ctypes
wanted = ctypes.create_string_buffer(bytes([2, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 1]), 64)
if ctypes.CDLL(None).syscall(321, 0, wanted, 64) < 0: raise OSError
def add(a, b): return a + b
""",
    "a userfaultfd": "import ctypes\nif ctypes.CDLL(None).syscall(323, 1) < 0: raise OSError\ndef add(a, b): return a + b",
    "a performance counter": """
import ctypes, struct
attributes = ctypes.create_string_buffer(struct.pack('IIQ', 1, 128, 0) + bytes(112), 128)
if ctypes.CDLL(None).syscall(298, attributes, 0, -1, -1, 0) < 0: raise OSError
def add(a, b): return a + b
""",
    "reads another process's memory": """
import ctypes, struct
there, here = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
vector = struct.pack('PN', ctypes.addressof(here), 8)
if ctypes.CDLL(None).process_vm_readv({parent}, vector, 1, struct.pack('PN', 4096, 8), 1, 0) == -1:
    import errno
    if ctypes.get_errno() != errno.EFAULT: raise OSError
def add(a, b): return a + b
""",
    "takes a descriptor of another process": """
import os, ctypes
if ctypes.CDLL(None).syscall(438, os.pidfd_open({parent}), 1, 0) < 0: raise OSError
def add(a, b): return a + b
""",
    "a namespace by clone": """
import ctypes
if ctypes.CDLL(None).syscall(56, 0x10000000 | 17, 0, 0, 0, 0) < 0: raise OSError
def add(a, b): return a + b
""",
    "another architecture": """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')  # int 0x80: getpid of the 32-bit table
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
def add(a, b): return a + b
""",
    "a filter of its own": """
import ctypes
if ctypes.CDLL(None).prctl(22, 2, ctypes.create_string_buffer(16)): raise OSError
def add(a, b): return a + b
""",
    "starts Python again": """
import os, sys
os.execv(sys.executable, [sys.executable, '-c', 'print("passed")'])
def add(a, b): return a + b
""",
}

FORGED = {
    "exit status 0": "import sys\nsys.exit(0)",
    "exit status 0 in the call": "def add(a, b): raise SystemExit(0)",
    "hard exit": "import os\nos._exit(0)",
    "hard exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "says that it passed": "def add(a, b):\n    print('passed', 'OK', '1.0', '{\"value\": true}')\n    return 0",
    "equal to everything": """
class Equal:
    def __eq__(self, other): return True
    def __hash__(self): return 0
def add(a, b): return Equal()
""",
    "a number equal to everything": "class N(int):\n    __eq__ = lambda s, o: True\ndef add(a, b): return N(0)",
    "a text equal to everything": "class T(str):\n    __eq__ = lambda s, o: True\ndef add(a, b): return T('')",
    "a list equal to everything": "class L(list):\n    __eq__ = lambda s, o: True\ndef add(a, b): return L()",
    "not a number": "def add(a, b): return float('nan')",
    "infinity": "def add(a, b): return float('inf')",
    "every answer": "def add(a, b): return set(range(10000))",
    "forges a tag": "def add(a, b): return {'int': hex(a + b)}",
    "forges a dict": "def add(a, b): return {'dict': [], 'value': a + b, 'expected': a + b}",
    "pickle": """
import os
class Evil:
    def __reduce__(self): return (os.system, ('touch {outside}',))
def add(a, b): return Evil()
""",
    "raises an answer": "class E(Exception): pass\nE.__name__ = '5'\ndef add(a, b): raise E(a + b)",
    "patches the comparison": """
import builtins, operator, unittest, json
unittest.TestCase.assertEqual = lambda *a: None
operator.eq = lambda *a: True
builtins.isinstance = lambda *a: True
builtins.AssertionError = type('E', (BaseException,), {})
def add(a, b): return 0
""",
    "patches json": "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'\ndef add(a, b): return 0",
    "patches the encoder": """
import sys
main = sys.modules['__main__']
main.encode = lambda *a: True
main.describe = lambda *a: 'fine'
def add(a, b): return 0
""",
    "answers on every channel": """
import os
for n in range(3, 1024):
    try: os.write(n, b'{"nonce": "", "value": 5, "score": 1.0, "passed": true}\\n')
    except OSError: pass
def add(a, b): return 0
""",
    "answers before it is asked": """
import gc, json, os
def add(a, b):
    asked = [o for o in gc.get_objects() if isinstance(o, dict) and 'nonce' in o]
    for o in asked:
        for n in range(3, 1024):
            try: os.write(n, json.dumps(o | {'value': a + b}).encode() + b'\\n')
            except OSError: pass
    return a + b if asked else 0
""",
    "talks without end on the channel": """
import os
def add(a, b):
    while True:
        for n in range(3, 1024):
            try: os.write(n, b'x' * 4096)
            except OSError: pass
""",
    "looks for the answer in frames": """
import sys
def add(a, b):
    frame = sys._getframe()
    while frame:
        for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:
            if name in ('expected', 'answer', 'tests', 'wanted', 'stdout'): return value
            if isinstance(value, dict) and 'expected' in value: return value['expected']
        frame = frame.f_back
    return 0
""",
    "looks for the answer in memory": """
import gc
def add(a, b):
    for o in gc.get_objects():
        if isinstance(o, dict) and o.get('expected') is not None: return o['expected']
    return 0
""",
    "traces its caller": """
import sys
def trace(frame, event, arg):
    if 'value' in frame.f_locals: frame.f_locals['value'] = 5
    return trace
sys.settrace(trace); sys.setprofile(trace)
def add(a, b): return 0
""",
    "exchanges the code of its caller": """
import sys
frame = sys._getframe(1)
frame.f_globals['answer_calls'].__code__ = (lambda *a: None).__code__
def add(a, b): return 0
""",
    "exit hooks and excepthook": """
import atexit, sys, os
atexit.register(lambda: print('passed')); sys.excepthook = lambda *a: os._exit(0)
def add(a, b): raise KeyboardInterrupt
""",
    "no such function": "def subtract(a, b): return a - b",
    "no program": "I am sorry, I cannot do that.",
    "pretends to be a number": """
class Pretender:
    __class__ = property(lambda self: int)
    __int__ = __index__ = lambda self: 5
def add(a, b): return Pretender()
""",
    "a dict of two faces": "class D(dict):\n    keys = items = lambda s: [('int', '0x5')]\ndef add(a, b): return D(x=1)",
    "import hook": """
import sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        sys.modules[name] = sys.modules['__main__']
sys.meta_path.insert(0, Hook()); sys.path_hooks.insert(0, lambda path: Hook())
for name in ('json', 'unittest', 'builtins'): sys.modules.pop(name, None)
def add(a, b): return 0
""",
    "a module of ours in its folder": """
for name in ('json', 'os', 'sitecustomize', 'usercustomize', 'dfactory'):
    open(name + '.py', 'w').write('import sys\\nsys.exit(0)')
def add(a, b): return 0
""",
    "an alarm within the grader": """
import signal
def ring(*a):
    frame = a[1]
    while frame:
        frame.f_locals.update(value=5); frame = frame.f_back
    raise SystemExit(0)
signal.signal(signal.SIGALRM, ring); signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
def add(a, b): return 0
""",
    "null byte": "def add(a, b): return 0\x00",
    "surrogates": "def add(a, b): return '\\ud800'",
}

OUTSIDE = {
    "reads the password file": "open('/etc/passwd').read()\ndef add(a, b): return a + b",
    "reads a secret file": "open('{secret}').read()\ndef add(a, b): return a + b",
    "reads it through a symbolic link": """
import os
os.symlink('{secret}', 'x'); open('x').read()
def add(a, b): return a + b
""",
    "reads it through a hard link": """
import os
os.link('{secret}', 'x'); open('x').read()
def add(a, b): return a + b
""",
    "reads it upwards": "open('" + "../" * 30 + "{secret}').read()\ndef add(a, b): return a + b",
    "reads it through /proc": "open('/proc/self/root{secret}').read()\ndef add(a, b): return a + b",
    "reads it by a low-level call": "import os\nos.open('{secret}', os.O_RDONLY)\ndef add(a, b): return a + b",
    "reads it as a module": """
import importlib.machinery
importlib.machinery.SourceFileLoader('x', '{secret}').get_data('{secret}')
def add(a, b): return a + b
""",
    "lists the folder of the secret": "import os\nos.listdir(os.path.dirname('{secret}'))\ndef add(a, b): return a + b",
    "finds a secret in the environment": "import os\nos.environ['SECRET_TOKEN']\ndef add(a, b): return a + b",
    "finds it in the parent's environment": """
import os
for name in (os.getppid(), {parent}):
    if b'PATH=' in open(f'/proc/{{name}}/environ', 'rb').read(): break
else: raise LookupError
def add(a, b): return a + b
""",
    "reads the parent's memory": "open('/proc/{parent}/mem', 'rb').seek(4096)\ndef add(a, b): return a + b",
    "reads an inherited descriptor": """
import os
for n in range(256):
    try:
        if b'expected' in os.pread(n, 100, 0): break
    except OSError: pass
else: raise LookupError
def add(a, b): return a + b
""",
    "finds the tests on its command line": """
import sys
if not any('12345' in word or 'expected' in word for word in sys.orig_argv): raise LookupError
def add(a, b): return a + b
""",
    "reads shared memory": "open('{shared}', 'rb').read()\ndef add(a, b): return a + b",
    "reads the keyring": """
import ctypes, os
search, read, session = 10, 11, -3
syscall, number = ctypes.CDLL(None).syscall, 250 if os.uname().machine == 'x86_64' else 219
key = syscall(number, search, session, b'user', b'{abstract}', 0)
if syscall(number, read, key, ctypes.create_string_buffer(32), 32) <= 0: raise LookupError
def add(a, b): return a + b
""",
    "reads the kernel": """
for name in ('/proc/kallsyms', '/proc/1/environ', '/proc/1/root/etc/passwd', '/sys/kernel/notes', '/dev/mem', '/etc/shadow'):
    try: open(name, 'rb').read(1); break
    except OSError: pass
else: raise LookupError
def add(a, b): return a + b
""",
    "writes outside": "open('{outside}', 'w').write('x')\ndef add(a, b): return a + b",
    "writes into Python": "import os\nopen(os.__file__, 'a').write('')\ndef add(a, b): return a + b",
    "removes a file outside": "import os\nos.remove('{secret}')\ndef add(a, b): return a + b",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\ndef add(a, b): return a + b",
    "sends a datagram": """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))
def add(a, b): return a + b
""",
    "connects to a Unix socket": """
import socket
socket.socket(socket.AF_UNIX).connect('\\0{abstract}')
def add(a, b): return a + b
""",
    "kills its parent": "import os\nos.kill(os.getppid(), 9); os.kill({parent}, 9)\ndef add(a, b): return a + b",
    "kills everybody": "import os\nos.kill(-1, 9)\ndef add(a, b): return 0",
    "kills its group": "import os\nos.killpg(0, 9)\ndef add(a, b): return a + b",
    "becomes root": "import os\nos.setuid(0); os.setgid(0)\nopen('{outside}', 'w')\ndef add(a, b): return a + b",
    "makes namespaces": """
import ctypes
if ctypes.CDLL(None).unshare(0x10000000 | 0x20000): raise OSError
def add(a, b): return a + b
""",
    "leaves its root": "import os\nos.chroot('.')\ndef add(a, b): return a + b",
    "sets the clock": """
import time
time.clock_settime(time.CLOCK_REALTIME, time.time())
def add(a, b): return a + b
""",
    "names the machine": "import socket\nsocket.sethostname(socket.gethostname())\ndef add(a, b): return a + b",
    "takes priority": "import os\nos.nice(-5)\ndef add(a, b): return a + b",
    "types into the terminal": """
import fcntl, os, termios
fcntl.ioctl(os.open('/dev/tty', os.O_RDWR), termios.TIOCSTI, b'x')
def add(a, b): return a + b
""",
    "has the cleanup remove a folder": """
import os
os.symlink(os.path.dirname('{secret}'), 'x')
def add(a, b): return 0
""",
    "mounts": """
import ctypes
if ctypes.CDLL(None).mount(b'tmpfs', b'/usr', b'tmpfs', 0, None): raise OSError
def add(a, b): return a + b
""",
    "makes Python writable": """
import ctypes, sys
if ctypes.CDLL(None).mount(None, sys.base_prefix.encode(), None, 4096 | 32, None): raise OSError
def add(a, b): return a + b
""",
    "traces another process": """
import ctypes
if ctypes.CDLL(None).ptrace(16, {parent}, 0, 0): raise OSError
def add(a, b): return a + b
""",
    "imports us": "import sys\nsys.path.insert(0, '{repository}')\nimport dfactory\ndef add(a, b): return a + b",
    "imports site-packages": "import numpy\ndef add(a, b): return a + b",
    "runs a shell": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)\ndef add(a, b): return a + b",
    "makes a device": """
import os, stat
os.mknod('d', 0o666 | stat.S_IFBLK, os.makedev(254, 0))
def add(a, b): return a + b
""",
    "leaves a daemon": """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for n in range(1, 65):
            try: signal.signal(n, signal.SIG_IGN)
            except Exception: pass
        os.closerange(0, 64)
        while True: time.sleep(1)
def add(a, b): return 0
""",
    "leaves a subprocess": """
import subprocess, sys
subprocess.Popen([sys.executable, '-c', 'while True: pass'], start_new_session=True)
def add(a, b): return 0
""",
    "leaves unreadable folders": """
import os
for i in range(300):
    os.mkdir('d'); os.chdir('d')
os.chmod('.', 0)
def add(a, b): return 0
""",
}

ATTACKS = OUT_OF_TIME | RESOURCES | SIGNALS_AND_FOLDERS | KERNEL | FORGED | OUTSIDE

REAL = [name for name in OUTSIDE if name.startswith(("reads", "lists", "finds", "connects", "runs", "imports us"))]
