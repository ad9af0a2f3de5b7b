"""Requests that are answered with an error, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

# What the metrics call them, by HTTP status.
REASONS = {
    400: "invalid",
    401: "unauthorized",
    403: "unauthorized",
    404: "invalid",
    408: "too_slow",
    413: "too_large",
    415: "invalid",
    422: "invalid",
}


class Refused(Exception):
    """A request that is answered with an error. `field`: the part of the body that is wrong, if any."""

    def __init__(self, status: int, message: str, field: str | None = None, retry: float | None = None):
        super().__init__(message)
        self.status, self.message, self.field, self.retry = status, message, field, retry


def error_body(refused: Refused) -> dict[str, Any]:
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
    message = refused.message
    if refused.field is not None and not message.startswith(refused.field):
        message = f"{refused.field}: {message}"
    return {"error": {"message": message, "type": kind, "param": refused.field, "code": refused.status}}


def error_response(refused: Refused) -> JSONResponse:
    headers = {} if refused.retry is None else {"Retry-After": f"{refused.retry:g}"}
    return JSONResponse(error_body(refused), refused.status, headers=headers)
