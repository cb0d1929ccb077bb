"""/v1/saga: what each engine of this server reports, and the end of sessions.

On with `VLLM_PLUGINS=saga` (vLLM's opt-in). Under /v1 vLLM's --api-key guards it like the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from vllm_saga.config import load_config
from vllm_saga.engine.control import END, STATE, ControlError, ask
from vllm_saga.policy.identity import short_id

RANK_HEADER = "x-data-parallel-rank"


class SagaEndpoints:
    """The entry point of `vllm.endpoint_plugins`: makes the routes, and is given the engine."""

    name = "saga"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine_client: Any = None
        self._tenant_header = ""
        self._unavailable: str | None = None

    def attach_router(self, app: FastAPI) -> None:
        router = APIRouter(prefix="/v1/saga", tags=["saga"])
        router.add_api_route("/state", self.state, methods=["GET"])
        router.add_api_route("/sessions/{session:path}/end", self.end, methods=["POST"])
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        self._engine_client = engine_client
        vllm_config = getattr(state, "vllm_config", None)
        self._tenant_header = load_config(
            getattr(vllm_config, "additional_config", None)
        ).tenant_header

    async def state(self, request: Request) -> JSONResponse:
        """The engine's report: of the data-parallel rank that X-data-parallel-rank names, or of all
        together, with each one's under "ranks".
        """
        try:
            reports = await self._ask(STATE, {})
        except ControlError as error:
            return _error(404, str(error))
        rank = request.headers.get(RANK_HEADER)
        if rank is None:
            return JSONResponse(together(reports))
        known = {str(index): report for index, report in enumerate(reports)}
        if rank not in known:
            return _error(400, f"{RANK_HEADER} = {rank!r}: there are {', '.join(known)}")
        return JSONResponse(known[rank])

    async def end(self, session: str, request: Request) -> JSONResponse:
        """A session of the tenant that the tenant header names is over: its KV is the first to go.

        Calls in flight finish first. Answers `{"ended": whether it was known}`.
        """
        tenant = short_id(request.headers.get(self._tenant_header, "").strip())
        try:
            answers = await self._ask(END, {"tenant": tenant, "session": session})
        except ControlError as error:
            return _error(404, str(error))
        return JSONResponse({"ended": any(answer["ended"] for answer in answers)})

    async def _ask(self, op: str, payload: dict[str, str]) -> list[dict[str, Any]]:
        # An engine logs a traceback each time that it is asked in vain.
        if self._unavailable is not None:
            raise ControlError(self._unavailable)
        try:
            return await ask(self._engine_client, op, payload)
        except ControlError as error:
            self._unavailable = str(error)
            raise


def together(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report of several ranks as of one engine."""
    if len(reports) == 1:
        return reports[0]
    whole: dict[str, Any] = {
        name: sum(report[name] for report in reports)
        for name in ("kv_tokens", "used_tokens", "running", "waiting", "resident")
    }
    for name in ("held_calls", "sessions"):
        whole[name] = [entry for report in reports for entry in report[name]]
    return whole | {
        "started": "-".join(report["started"] for report in reports),
        "prefill_tokens_per_s": fmean(report["prefill_tokens_per_s"] for report in reports),
        "saga": {},
        "ranks": reports,
    }


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "saga", "code": status}}, status)
