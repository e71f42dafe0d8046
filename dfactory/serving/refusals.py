"""Error responses in OpenAI's shape, for every endpoint."""

from aiohttp import web

from dfactory.errors import DFactoryError
from dfactory.serving.bodies import SlowClient, TooManyBytes
from dfactory.serving.engine import Engine, QueueFull, Stopped
from dfactory.serving.reading import ReadingFailed, Refused, TooSlow
from dfactory.serving.shapes import error

LATER = {"Retry-After": "5"}


class EngineFailed(Exception):
    """The engine's thread ended before a request was answered."""


class OutOfTime(DFactoryError):
    """A request whose answer took longer than `request_timeout`."""


EXPECTED = (Refused, QueueFull, Stopped, TooSlow, TooManyBytes, SlowClient, OutOfTime, EngineFailed, ReadingFailed)


@web.middleware
async def error_responses(request: web.Request, handler) -> web.StreamResponse:
    """Turn expected failures into error responses. Any other is a bug: aiohttp logs it and answers 500."""
    try:
        return await handler(request)
    except EXPECTED as problem:
        return refusal_of(problem)
    except web.HTTPException as problem:
        if problem.status < 400:
            raise
        kept = {"Allow": problem.headers["Allow"]} if "Allow" in problem.headers else {}
        return refusal(problem.status, problem.reason, "invalid_request", kept)


def refusal_of(problem: Exception) -> web.Response:
    match problem:
        case Refused():
            return refusal(problem.status, problem.message, problem.code)
        case QueueFull():
            return refusal(429, str(problem), "queue_full", {"Retry-After": str(problem.retry_after)})
        case TooManyBytes():
            return closing(refusal(429, str(problem), "too_many_bytes", LATER))
        case SlowClient():
            return closing(refusal(408, str(problem), "slow_client"))
        case Stopped():
            return refusal(503, str(problem), "shutting_down", LATER)
        case TooSlow():
            return refusal(503, str(problem), "not_read", LATER)
        case OutOfTime():
            return refusal(504, str(problem), "timeout")
        case EngineFailed():
            return refusal(500, "the decoder has failed; see the server's log", "decoder_failed")
        case _:
            return refusal(500, "the request cannot be read; see the server's log", "reading_failed")


def ending_of(engine: Engine) -> Exception:
    """Why an engine has given up an answer."""
    return EngineFailed() if engine.failed else Stopped("the server is shutting down")


def event_of(problem: Exception) -> dict:
    """The same as an event in a stream, whose status has already been sent."""
    known = {
        OutOfTime: ("the time limit is reached", "timeout"),
        Stopped: ("the server is shutting down", "shutting_down"),
    }
    message, code = known.get(type(problem), ("the decoder has failed; see the server's log", "decoder_failed"))
    return error(message, "server_error", code)


def refusal(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> web.Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return web.json_response(error(message, kind, code), status=status, headers=headers)


def closing(response: web.Response) -> web.Response:
    """The response, after which the connection closes without reading the rest of the request."""
    response.force_close()
    return response
