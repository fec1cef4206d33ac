"""Errors as the API tells them: `ApiError`."""

from typing import Any


class ApiError(Exception):
    """An answer with an error, in the form that OpenAI's clients read.

    Args:
        status: status of HTTP.
        message: sentence with the rule, what was received, and the way out.
        param: field of the request that is to blame.
        code: name for machines.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The answer as JSON."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
