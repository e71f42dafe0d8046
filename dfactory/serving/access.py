"""Who may ask a server of dFactory: the rules of the token, of the Host header and of a body's type.

With a token every request shows it. Without one, only requests that address this machine by its own name are accepted,
which refuses a web page whose name was made to resolve to it (DNS rebinding). No response allows another origin to read it,
and a body is JSON, which no page of another origin can send without asking first (CORS).
"""

import dataclasses
import hmac
import re

from aiohttp import web

from dfactory.serving.refusals import refusal

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{0,5})?", re.IGNORECASE)
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


@dataclasses.dataclass(frozen=True)
class Access:
    """`allowed` is the middleware. Paths of `open_to_all` work without the token: they hold nothing of a model or a run."""

    token: str | None
    open_to_all: frozenset[str] = frozenset()

    @web.middleware
    async def allowed(self, request: web.Request, handler) -> web.StreamResponse:
        names = _names(request)
        if None in names:
            return refusal(400, f"Host {_host(request)} is not one name and a port", "invalid_request")
        if self.token is None:
            if not names or not names.issubset(LOCAL_NAMES):
                return refusal(
                    403, f"Host {_host(request)} is not this machine's own name: use 127.0.0.1", "wrong_host"
                )
        elif request.path not in self.open_to_all and not self._is_shown(request):
            challenge = {"WWW-Authenticate": "Bearer"}
            return refusal(401, "Authorization: Bearer TOKEN is missing or wrong", "invalid_api_key", challenge)
        if request.method == "POST" and request.content_type != "application/json":
            return refusal(415, "Content-Type must be application/json", "invalid_request")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            return refusal(415, "Content-Encoding is not supported: send the body as it is", "invalid_request")
        return await handler(request)

    def _is_shown(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        given = given.strip().encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self.token.encode()) and scheme.lower() == "bearer"


def _names(request: web.Request) -> set[str | None]:
    """The names by which a request addresses this server: its Host headers, and its target through aiohttp's `host`. None
    stands for one that is not a plain name."""
    hosts = request.headers.getall("Host", [])
    found = [HOST.fullmatch(host) for host in (*hosts, request.host)] if hosts else []
    return {host and host[1].lower() for host in found} | ({None} if len(hosts) > 1 else set())


def _host(request: web.Request) -> str:
    return ", ".join(request.headers.getall("Host", ["(none)"]))[:80]
