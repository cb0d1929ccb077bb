"""Errors that the router itself answers, in a shape that OpenAI's and Anthropic's clients read."""

from __future__ import annotations

from aiohttp import web


class Problem(Exception):
    """A request ends here. `reason` is one of a small fixed set, fit for a metric label."""

    def __init__(
        self, status: int, reason: str, message: str, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after

    def response(self) -> web.Response:
        error = {"type": self.reason, "message": str(self), "code": self.status}
        response = web.json_response({"type": "error", "error": error}, status=self.status)
        if self.retry_after is not None:
            response.headers["Retry-After"] = str(self.retry_after)
        return response
