"""Errors as responses and as events of a stream, in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import Response

from vlmfx.errors import DeadlineExceeded, EngineFull, VlmfxError
from vlmfx.openai.responses import error_body, error_response

log = logging.getLogger("vlmfx.server")
RETRY_AFTER = {"Retry-After": "1"}  # seconds, with 503


class HttpError(VlmfxError):
    """A request that is refused for what HTTP says of it: its key, path, method, type or size."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


class ClientGone(Exception):
    """The client has closed the connection; nobody reads an answer."""


def told(error: Exception, request_id: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, body, headers) of an error. Of a fault of ours the client learns the request's id alone, and the log the rest."""
    if isinstance(error, HttpError):
        return error.status, error_body(str(error), error.status, code=error.code), error.headers
    if isinstance(error, VlmfxError):
        status, body = error_response(error)
        if status != 500:
            return status, body, RETRY_AFTER if isinstance(error, EngineFull) else {}
    log.error("request %s failed", request_id, exc_info=error)
    message = f"The server failed at this request; its log has the cause, under {request_id}."
    return 500, error_body(message, 500, code="internal_error"), {}


def error_reply(error: Exception, request_id: str) -> Response:
    """The response of a request that failed before its answer began."""
    status, body, headers = told(error, request_id)
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def error_kind(error: Exception) -> str:
    """A word for metrics and logs."""
    if isinstance(error, ClientGone):
        return "abort"
    return "deadline" if isinstance(error, DeadlineExceeded) else type(error).__name__
