"""Hostile requests, each with the outcome that it has to have: a table for test_attacks.py.

The server that they are for takes 256 tokens and waits 3 s for a client. An outcome is a status, or CLOSED where the
connection is cut without an answer; several where both are right. What a request does to /health is measured besides.
"""

import dataclasses
import gzip
import json
import socket
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlparse

CLOSED = 0
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
PIECE = 2**16  # bytes that are sent at once
MEGABYTE = 10**6

Outcomes = int | tuple[int, ...]
Pieces = Iterable[bytes | float]  # what is sent, and seconds to wait between


@dataclasses.dataclass(frozen=True)
class Attack:
    name: str
    outcomes: tuple[int, ...]
    pieces: Callable[[], Pieces]  # made when it is sent
    told: str = ""  # in the answer
    reads: bool = True  # whether the client takes its answer


def request(line: bytes, headers: dict[str, str], body: bytes = b"", length: bool = True) -> bytes:
    given = {"Host": "127.0.0.1", "Content-Type": "application/json"} | headers
    if length:
        given.setdefault("Content-Length", str(len(body)))
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value is not None)
    return line + b" HTTP/1.1\r\n" + head.encode() + b"\r\n" + body


def post(
    name: str,
    outcomes: Outcomes,
    body: Callable[[], Any],
    told: str = "",
    path: str = "/generate",
    **headers,
) -> Attack:
    """A body that is JSON, or bytes as they are."""

    def pieces() -> Pieces:
        made = body()
        raw = made if isinstance(made, bytes) else json.dumps(made).encode()
        yield request(f"POST {path}".encode(), {key.replace("_", "-"): value for key, value in headers.items()}, raw)

    return Attack(name, outcomes if isinstance(outcomes, tuple) else (outcomes,), pieces, told)


def chat(name: str, outcomes: Outcomes, fields: Callable[[], dict], told: str = "") -> Attack:
    """Fields over a question."""
    question = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8}
    return post(name, outcomes, lambda: question | fields(), told, "/v1/chat/completions")


def completion(name: str, outcomes: Outcomes, fields: Callable[[], dict], told: str = "") -> Attack:
    return post(name, outcomes, lambda: {"prompt": "x", "max_tokens": 8} | fields(), told, "/v1/completions")


def raw(name: str, outcomes: Outcomes, *pieces: bytes | float, told: str = "", reads: bool = True) -> Attack:
    return Attack(name, outcomes if isinstance(outcomes, tuple) else (outcomes,), lambda: pieces, told, reads)


def user(content: Any) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


def nested(levels: int) -> dict:
    value: dict = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def chunked(chunks: Iterable[bytes]) -> Pieces:
    yield request(b"POST /generate", {"Transfer-Encoding": "chunked"}, length=False)
    yield b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def get(**headers: str | None) -> bytes:
    return request(b"GET /health", {name.replace("_", "-"): value for name, value in headers.items()})


SMALL = b'{"prompt": "x", "max_new_tokens": 8}'
ZEROS = 200 * MEGABYTE
BOMB = gzip.compress(b'{"prompt": "' + bytes(ZEROS // 10) + b'"}', 9)  # 20 MB in 20 KB

BODIES = [
    post("a stop text of 2,000,000 characters", 413, lambda: {"prompt": "x", "stop": "a" * 2 * MEGABYTE}),
    post("a stop text of 900,000", 400, lambda: {"prompt": "x", "stop": "a" * 900_000}, "1024 characters"),
    post("16 stop texts of 60,000", 400, lambda: {"prompt": "x", "stop": ["a" * 60_000] * 16}, "1024 characters"),
    post("16 stop texts of 1,024", 200, lambda: {"prompt": "x", "stop": ["a" * 1024] * 16, "max_new_tokens": 200}),
    post("100,000 stop texts", 400, lambda: {"prompt": "x", "stop": ["a"] * 100_000}, "at most 16"),
    post("a prompt of 7 MB", 413, lambda: {"prompt": "word " * 1_400_000}),
    post("a prompt of 1 MB", 400, lambda: {"prompt": "word " * 200_000}, "8192 characters"),
    post("a prompt of 1 MB without a space", 400, lambda: {"prompt": "x" * MEGABYTE}, "8192 characters"),
    post("a prompt of escapes", 400, lambda: {"prompt": "\u00e9" * 160_000}, "8192 characters"),
    post("8,000 spaces", (200, 400), lambda: {"prompt": " " * 8000}),
    post("8,000 letters that are one word", (200, 400), lambda: {"prompt": "ab" * 4000}),
    post("8,000 combining marks", (200, 400), lambda: {"prompt": "e" + "\u0301" * 8000}),
    post("8,000 zero bytes", (200, 400), lambda: {"prompt": "\0" * 8000}),
    post("900 literals of special tokens", (200, 400), lambda: {"prompt": "<|mask|>" * 900}),
    post("private-use characters", (200, 400), lambda: {"prompt": "".join(map(chr, range(0xF0000, 0xF1000)))}),
    post("half a character", 400, lambda: {"prompt": "\ud800"}, "lone surrogate"),
    post("brackets in a text", 400, lambda: {"prompt": "[{" * 200_000}, "8192 characters"),
    post("500,000 ids", 400, lambda: b'{"prompt_ids": [%s1]}' % (b"1," * 500_000), "tokens"),
    post(
        "an id of 4,000 digits", 400, lambda: b'{"prompt_ids": [%s]}' % (b"9" * 4000), "outside the model's vocabulary"
    ),
    post("an id of 400,000 digits", 400, lambda: b'{"prompt_ids": [%s]}' % (b"9" * 400_000), "not JSON"),
    post("ids below zero", 400, lambda: {"prompt_ids": [-1] * 100}, "outside the model's vocabulary"),
    post("a million open brackets", 400, lambda: b"[" * MEGABYTE, "the body is"),
    post("100,000 open objects", 400, lambda: b'{"a":' * 100_000, "the body is"),
    post("350,000 empty lists", 400, lambda: b"[" + b"[]," * 349_000 + b"[]]", "20000 objects and lists"),
    post("340,000 empty objects", 400, lambda: b"[" + b"{}," * 339_000 + b"{}]", "20000 objects and lists"),
    post("lists of 100 levels", 400, lambda: b"[" + (b"[" * 99 + b"]" * 99 + b",") * 5000 + b"1]", "objects and lists"),
    post("100,000 unknown fields", 400, lambda: {f"k{number}": 0 for number in range(80_000)}, "unknown field k0"),
    post("one field 50,000 times", 200, lambda: b'{%s"max_new_tokens": 8}' % (b'"prompt": "x",' * 50_000)),
    post("a field's name of 500 KB", 400, lambda: {"a" * 500_000: 1}, "unknown field aaaa"),
    post("NaN", 400, lambda: b'{"prompt": "x", "temperature": NaN}', "not a JSON value"),
    post("1e999", 400, lambda: b'{"prompt": "x", "temperature": 1e999}', "temperature"),
    post("a number of 900,000 digits", 400, lambda: b'{"seed": %s}' % (b"1" * 900_000), "not JSON"),
    post("no UTF-8", 400, lambda: b'{"prompt": "\xff\xfe"}', "not JSON"),
    post("a seed of 100 digits", 400, lambda: {"prompt": "x", "seed": 10**100}, "seed"),
    post("10**18 tokens", 400, lambda: {"prompt": "x", "max_new_tokens": 10**18}, "max_new_tokens"),
    post("a key's value of 500 KB", 400, lambda: {"prompt": "x", "acceptance": "a" * 500_000}, "8192 characters"),
    post("a key's value of 8 KB", 400, lambda: {"prompt": "x", "acceptance": "a" * 8000}, "acceptance"),
    post("an empty body", 400, lambda: b"", "not JSON"),
    completion("200,000 prompts", 400, lambda: {"prompt": ["x"] * 200_000}, "a request has 1 to"),
    completion("200,000 prompts of ids", 400, lambda: {"prompt": [[1]] * 200_000}, "objects and lists"),
    completion("a billion answers", 400, lambda: {"n": 10**9}, "a request has 1 to"),
    completion("fewer answers than one", 400, lambda: {"n": -1}, "a request has 1 to"),
    completion("true answers", 400, lambda: {"n": True}, "n is bool"),
    completion("100,000 biases", 400, lambda: {"logit_bias": {str(n): 1 for n in range(50_000)}}, "8192 characters"),
    completion("a model's name of 500 KB", 400, lambda: {"model": "m" * 500_000}, "8192 characters"),
    completion("a user of 500 KB", 400, lambda: {"user": "u" * 500_000}, "8192 characters"),
    chat("metadata of 500 KB", 400, lambda: {"metadata": {"a": "m" * 500_000}}, "8192 characters"),
    chat("20,000 messages", 400, lambda: {"messages": user("x")["messages"] * 19_000}, "messages has 19000"),
    chat(
        "500 turns without text",
        400,
        lambda: {"messages": [{"role": role, "content": ""} for _ in range(250) for role in ("assistant", "user")]},
        "tokens",
    ),
    chat("a turn of 10,000 parts", 400, lambda: user([{"type": "text", "text": ""}] * 10_000), "8192 characters"),
    chat("a turn of 900 KB", 400, lambda: user("word " * 180_000), "8192 characters"),
    chat(
        "a picture",
        400,
        lambda: user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        "the model reads text alone",
    ),
    chat("a role of 900 KB", 400, lambda: {"messages": [{"role": "r" * 900_000}]}, "8192 characters"),
    chat("10,000 tools", 400, lambda: {"tools": [{"type": "function"}] * 10_000}, "8192 characters"),
    chat("a tool of 90 levels", 400, lambda: {"tools": [nested(90)]}, "tokens"),
    chat("a tool of 5,000 levels", 400, lambda: {"tools": [nested(900)]}, "nested deeper"),
    chat(
        "arguments of 100,000 levels",
        400,
        lambda: {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 4000}}]},
                *user("x")["messages"],
            ]
        },
        "not valid JSON",
    ),
    chat(
        "10,000 variables of the template",
        400,
        lambda: {"chat_template_kwargs": {f"v{number}": False for number in range(10_000)}},
        "8192 characters",
    ),
    chat("a variable that is an expression", 400, lambda: {"chat_template_kwargs": {"(a+)+$": False}}, "not a name"),
    chat("another template", 400, lambda: {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "the server sets it"),
    chat("a template in a message", (200, 400), lambda: user("{{ ''.__class__.__mro__ }}{% for i in range(10**9) %}")),
]
HTTP = [
    post("a gzip bomb", 415, lambda: BOMB, "Content-Encoding", Content_Encoding="gzip"),
    post("a deflate bomb", 415, lambda: zlib.compress(bytes(ZEROS), 9), "Content-Encoding", Content_Encoding="deflate"),
    post("a br body", 415, lambda: b"\x0b\x00", "Content-Encoding", Content_Encoding="br"),
    post("a zstd body", 415, lambda: b"\x28\xb5\x2f\xfd", "Content-Encoding", Content_Encoding="zstd"),
    post("two encodings", 415, lambda: BOMB, "Content-Encoding", Content_Encoding="gzip, gzip"),
    post("plain text", 415, lambda: SMALL, "application/json", Content_Type="text/plain"),
    post("a form", 415, lambda: SMALL, "application/json", Content_Type="multipart/form-data; boundary=x"),
    Attack("chunks of one byte", (200,), lambda: chunked(SMALL[n : n + 1] for n in range(len(SMALL)))),
    Attack("300,000 chunks of one byte", (400,), lambda: chunked([b'"'] + [b"x"] * 300_000 + [b'"']), "object"),
    Attack("chunks without an end", (413,), lambda: chunked(b"x" * PIECE for _ in range(200))),
    raw("a length of 10**12", 413, request(b"POST /generate", {"Content-Length": str(10**12)}, SMALL)),
    raw("a length below zero", 400, request(b"POST /generate", {"Content-Length": "-1"}, SMALL)),
    raw("a length of 30 digits", (400, 413), request(b"POST /generate", {"Content-Length": "9" * 30}, SMALL)),
    raw("a length and chunks", 400, request(b"POST /generate", {"Transfer-Encoding": "chunked"}, SMALL)),
    raw(
        "a chunk of 10**20 bytes",
        (400, 413),
        request(b"POST /generate", {"Transfer-Encoding": "chunked"}, b"FFFFFFFFFFFFFFFFF\r\nx", length=False),
    ),
    raw("half a body", 408, request(b"POST /generate", {"Content-Length": "100"}, SMALL), told="within 3 s"),
    raw("a body of one byte a second", 408, request(b"POST /generate", {"Content-Length": "100"}), *[b"x", 0.5] * 12),
    raw("half a header", CLOSED, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: "),
    raw("headers without an end", CLOSED, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n", *[b"X-A: b\r\n", 0.5] * 12),
    raw("nothing at all", CLOSED, 0.1),
    raw("a header of 1 MB", 400, get(X_A="a" * MEGABYTE)),
    raw("10,000 headers", 400, get(**{f"X_{number}": "a" for number in range(10_000)})),
    raw("a target of 1 MB", 400, request(b"GET /" + b"a" * MEGABYTE, {})),
    raw("user info in Host", 400, get(Host="evil@127.0.0.1"), told="not one name and a port"),
    raw("Host that begins like ours", 400, get(Host="127.0.0.1:80@evil.example"), told="not one name and a port"),
    raw("Host with a port that is none", 400, get(Host="127.0.0.1:x"), told="not one name and a port"),
    raw("Host of another", 403, get(Host="evil.example"), told="not this machine's own name"),
    raw("Host that ends like another", 403, get(Host="localhost.evil.example"), told="not this machine's own name"),
    raw("no Host", (400, 403), get(Host=None)),
    raw("two Hosts", 400, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n"),
    raw("a target on another host", (400, 403), request(b"GET http://evil.example/health", {})),
    raw("TRACE", (400, 404, 405), request(b"TRACE /health", {})),
    raw("CONNECT", (400, 403, 404, 405), request(b"CONNECT evil.example:443", {})),
    raw("a method that is none", (400, 405), request(b"A" * 5000 + b" /health", {})),
    raw("TLS", (CLOSED, 400), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)),
    raw("HTTP/2", (CLOSED, 400, 505), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(20)),
    raw("HTTP/9.9", (200, 400, 505), b"GET /health HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n"),
    raw("bytes", (CLOSED, 400), bytes(range(256)) * 100),
    raw("1,000 requests in one go", 200, get() * 1000),
    raw("100 requests that nobody reads", CLOSED, request(b"GET /metrics", {}) * 3000, 12.0, reads=False),
    raw(
        "what is to be continued",
        413,
        request(b"POST /generate", {"Expect": "100-continue", "Content-Length": str(10**9)}),
    ),
    raw("another expectation", (400, 417), request(b"POST /generate", {"Expect": "a miracle"}, SMALL)),
    raw("a websocket", (200, 400), get(Upgrade="websocket", Connection="Upgrade", Sec_WebSocket_Version="13")),
    raw("up and out of the folder", 404, request(b"GET /v1/models/../../../../etc/passwd", {})),
    raw("a path with zero bytes", (400, 404), request(b"GET /v1/models/%00%00%0d%0aX:%20y", {})),
    raw("a line break in a header", 400, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: b\nc d\r\n\r\n"),
]
ATTACKS = [*BODIES, *HTTP]


def send(url: str, attack: Attack, timeout_s: float) -> tuple[int, str]:
    """(status or CLOSED, what the first answer says). Raises TimeoutError where neither comes."""
    place, pieces = urlparse(url), list(attack.pieces())  # made before the clock of the connection runs
    with socket.create_connection((place.hostname, place.port), timeout=timeout_s) as connection:
        try:
            for piece in pieces:
                if isinstance(piece, bytes):
                    connection.sendall(piece)
                else:
                    time.sleep(piece)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass  # it stopped listening; what it said is read all the same
        return _answer(connection) if attack.reads else _is_cut(connection)


def _answer(connection: socket.socket) -> tuple[int, str]:
    said = b""
    try:
        while b"\r\n\r\n" not in said or len(said) < _end(said):
            more = connection.recv(PIECE)
            if not more:
                break
            said = (said + more).removeprefix(CONTINUE)
    except ConnectionResetError:
        pass
    return (int(said.split(b" ", 2)[1]) if said.startswith(b"HTTP/") else CLOSED), said.decode(errors="replace")


def _end(said: bytes) -> int:
    """Bytes of the first answer, as far as that is known."""
    head, _, _ = said.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return len(head) + 4 + (int(lengths[0]) if lengths else 0)


def _is_cut(connection: socket.socket) -> tuple[int, str]:
    """Whether the other side has cut a connection whose answers nobody took."""
    try:
        while connection.recv(PIECE):
            pass
    except ConnectionResetError:
        return CLOSED, "cut"
    return 200, "all was kept until it was read"
