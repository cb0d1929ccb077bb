"""Who may do what: clients use the models, operators change the router."""

from __future__ import annotations

import hmac
import ipaddress

from aiohttp import web

from vllm_saga.router.problems import Problem


class Access:
    """Keys, where they are set. Without an operator's key, operators must be on this machine.

    A request that a proxy has passed on is not from this machine, wherever the proxy is.
    """

    def __init__(self, api_key: str | None, admin_api_key: str | None) -> None:
        self._api_key = api_key
        self._admin_key = admin_api_key

    def check_client(self, request: web.BaseRequest) -> None:
        """Raises Problem 401 unless the request may use the models."""
        keys = [key for key in (self._api_key, self._admin_key) if key is not None]
        if self._api_key is not None and not any(_shows(request, key) for key in keys):
            raise Problem(401, "unauthorized", "the API key is missing or wrong")

    def check_operator(self, request: web.BaseRequest) -> None:
        """Raises Problem 401 or 403 unless the request may see and change everything."""
        if self._admin_key is not None:
            if not _shows(request, self._admin_key):
                raise Problem(401, "unauthorized", "this needs the operator's key")
        elif not _is_local(request):
            raise Problem(
                403, "forbidden", "without --admin-api-key this is for clients on its own machine"
            )
        else:
            self.check_client(request)


def _shows(request: web.BaseRequest, key: str) -> bool:
    sent = request.headers.get("Authorization", "")
    scheme, _, token = sent.partition(" ")
    if scheme.lower() != "bearer":
        token = request.headers.get("x-api-key", "")
    return hmac.compare_digest(token.strip().encode("utf-8", "replace"), key.encode())


def _is_local(request: web.BaseRequest) -> bool:
    passed_on = any(name in request.headers for name in ("Forwarded", "X-Forwarded-For"))
    try:
        return not passed_on and ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        return False
