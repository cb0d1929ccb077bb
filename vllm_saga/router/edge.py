"""Whose call a request is, as placement needs to know it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vllm_saga.policy.clients import Rules, identify
from vllm_saga.policy.identity import salt_tenant
from vllm_saga.policy.messages import MessageLineage, estimate_tokens, shared_prefix
from vllm_saga.router.fleet import Arrival, SessionKey

logger = logging.getLogger(__name__)

_CALLS = ("/completions", "/messages", "/responses")
"""Ends of the paths that compute on a prompt; `/chat/completions` is among them."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """A request as the placer knows it. forward: the id to send as X-Session-ID, None for none."""

    arrival: Arrival
    source: str
    forward: str | None


class Edge:
    """Recognises callers by headers and body, else by what their prompt continues.

    A bug here costs affinity, never a call: the first one is logged, all are counted.
    """

    def __init__(self, rules: Rules, max_sessions: int, session_idle: float) -> None:
        self.rules = rules
        self.errors = 0
        self._lineage = MessageLineage(max_sessions, session_idle)

    def recognise(
        self,
        call_id: str,
        path: str,
        headers: Mapping[str, str],
        body: Mapping[str, object] | None,
        now: float,
    ) -> Recognised:
        prompt = body if body is not None and path.endswith(_CALLS) else {}
        try:
            caller = identify(headers, body, self.rules)
            salt = prompt.get("cache_salt")
            if not caller.tenant and isinstance(salt, str) and salt:
                caller = replace(caller, tenant=salt_tenant(salt))  # as engines report it
            if caller.session is None:
                known = self._lineage.recognise(caller.tenant, prompt, now)
                if known is not None:
                    caller = replace(caller, session=known, source="lineage")
            arrival = Arrival(
                call_id,
                _key(caller.tenant, caller.session),
                estimate_tokens(prompt),
                shared_prefix(prompt),
                _key(caller.tenant, caller.parent),
                caller.last,
            )
        except Exception:
            self.errors += 1
            if self.errors == 1:
                logger.exception("a bug in identity: the call has none; later ones are counted")
            return Recognised(Arrival(call_id, None, 0), "none", None)
        forward = None if caller.source == "vllm" else caller.session
        return Recognised(arrival, caller.source, forward)

    def note_response(self, response_id: str, arrival: Arrival, now: float) -> None:
        """A response of the Responses API was given to a session; requests may go on with it."""
        if arrival.session is not None:
            tenant, session = arrival.session
            self._lineage.note_response(tenant, response_id, session, now)

    def forget(self, session: SessionKey) -> None:
        """It has ended: what begins like it is another one."""
        self._lineage.forget(*session)

    def tenant(self, headers: Mapping[str, str]) -> str:
        return identify(headers, None, self.rules).tenant


def _key(tenant: str, session: str | None) -> SessionKey | None:
    return None if session is None else (tenant, session)
