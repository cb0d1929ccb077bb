"""SagaLLMServer: Ray's LLM server, whose routing stats hold what its engine reports of itself."""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.llm.deployment import LLMServer

from vllm_saga.engine.control import STATE, ControlError, ask
from vllm_saga.policy.report import together
from vllm_saga.ray.dispatch import NUMBER, REPORT

# Ray Serve configures this one.
logger = logging.getLogger("ray.serve")


class SagaLLMServer(LLMServer):
    """`LLMConfig(server_cls="vllm_saga.ray.server.SagaLLMServer")`.

    Ray asks for the stats every `request_routing_stats_period_s` (of its `RequestRouterConfig`;
    its default is 10 s, and 1 s is better here), and gives them to the routers of all handles.
    """

    _reports = 0
    _silent = False

    async def record_routing_stats(self) -> dict[str, Any]:
        """Ray's own stats, and the engine's report where it runs saga."""
        stats = await super().record_routing_stats()
        # An engine logs a traceback each time that it is asked in vain.
        client = None if self._silent else getattr(self.engine, "_engine_client", None)
        if client is None:
            return stats
        try:
            answers = await ask(client, STATE, {})
        except ControlError as error:
            self._silent = True
            logger.warning("saga: no reports of this replica: %s", error)
            return stats
        self._reports += 1
        return {**stats, NUMBER: self._reports, REPORT: together(answers)}
