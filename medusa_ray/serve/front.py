"""What stands before every route: the request's id, the API key, the access log, and the last resort for errors."""

import logging
import uuid
from collections.abc import Callable
from hmac import compare_digest
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa_ray import openai_api
from medusa_ray.openai_api import ApiError
from medusa_ray.serve.calls import LOG, Call, Totals
from medusa_ray.serve.server import RETRY_AFTER_S

OPEN_TO_ALL = ("/health", "/ping")
UNLOGGED = (*OPEN_TO_ALL, "/metrics")  # asked for every few seconds; only where they fail
MAX_ID_CHARACTERS = 128

log = logging.getLogger("medusa_ray")


class Front:
    """An ASGI middleware. Routes find the Call of their request in `scope["call"]`."""

    def __init__(self, app: ASGIApp, api_keys: list[bytes], totals: Totals, tells_id: bool) -> None:
        """api_keys: whoever has one is let in; everybody, if there are none. tells_id: whether responses get the
        x-request-id, or what stands before this server sees to that."""
        self._app, self._api_keys, self._totals, self._tells_id = app, api_keys, totals, tells_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        scope["call"] = call = Call(_request_id(headers), path[:200])

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                if self._tells_id:
                    MutableHeaders(scope=message)["x-request-id"] = call.id
            await send(message)

        try:
            if path in OPEN_TO_ALL or self._has_key(headers):
                await self._app(scope, receive, send_on)
            else:
                error = ApiError(
                    401, "The API key is missing or wrong; send it as Authorization: Bearer KEY."
                )
                await error_response(error, call)(scope, receive, send_on)
        except Exception:
            log.exception("request %s to %s failed", call.id, call.route)
            call.error = "internal_error"
            if call.status:
                raise  # half a response has gone; the server closes the connection on it
            await error_response(internal_error(call), call)(scope, receive, send_on)
        finally:
            if call.is_for_reply:
                self._totals.end(call)
            if LOG.isEnabledFor(logging.INFO) and (call.status != 200 or path not in UNLOGGED):
                LOG.info(call.line())

    def _has_key(self, headers: Headers) -> bool:
        """Whether no key is asked for, or the right one is there. Takes as long whichever it is."""
        if not self._api_keys:
            return True
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        return kind.lower() == "bearer" and sum(compare_digest(given, key) for key in self._api_keys) > 0


def _request_id(headers: Headers) -> str:
    """The client's own where it is fit for a log, or a new one."""
    own = headers.get("x-request-id", "")
    is_fit = 0 < len(own) <= MAX_ID_CHARACTERS and own.isascii() and own.isprintable()
    return own if is_fit else uuid.uuid4().hex


def internal_error(call: Call) -> ApiError:
    """What a client is told of our own mistakes: nothing, but where the log has them."""
    message = f"The server failed at this request; its log has the reason under the id {call.id}."
    return ApiError(500, message, code="internal_error")


def error_response(
    error: ApiError,
    call: Call,
    shape: Callable[[ApiError], tuple[int, dict[str, Any]]] = openai_api.error_body,
) -> JSONResponse:
    """The error in its shape, and the request's id beside it."""
    status, body = shape(error)
    call.error = error.code or "error"  # not its message, which may have what the client sent, for the log
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({**body, "request_id": call.id}, status, headers)
