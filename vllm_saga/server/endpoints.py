"""/v1/saga: what each engine of this server reports, its workflows, and the end of sessions; /saga,
a page that shows them.

On with `VLLM_PLUGINS=saga` (vLLM's opt-in). Under /v1 vLLM's --api-key guards it like the rest; the
page itself holds nothing that is secret, and asks who looks at it for the key.

Who may see what: vLLM knows no tenants, so a tenant is who the tenant header names
(`tenant_header`), as the engine knows it (`tenant_source`: its saga_tenant, or its cache salt or
that one's digest). Your gateway has to set that header on every request that it passes on, over
whatever the client sent. With it there are only that tenant's workflows, and another's are not
found (404). Without it whoever has the API key is an operator, and sees everybody's: behind a
gateway that sets the header nobody else can come without. What is never told, to anybody: a cache
salt (its digest stands for it), and what prompts and outputs say, but for names of tools.
`/v1/saga/state` is the router's; a gateway should not pass it on. What changes something is
refused to web pages of other origins (403).
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from vllm_saga import page
from vllm_saga.config import load_config
from vllm_saga.engine.control import (
    END,
    PAST,
    STATE,
    WORKFLOW,
    WORKFLOWS,
    ControlError,
    Listing,
    Past,
    ask,
)
from vllm_saga.policy import overview
from vllm_saga.policy.clients import is_of_another_site
from vllm_saga.policy.identity import short_id
from vllm_saga.policy.report import together

RANK_HEADER = "x-data-parallel-rank"

T = TypeVar("T", Listing, Past)


class SagaEndpoints:
    """The entry point of `vllm.endpoint_plugins`: makes the routes, and is given the engine."""

    name = "saga"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine_client: Any = None
        self._tenant_header = ""
        self._unavailable: str | None = None
        self._page: dict[str, page.File] = {}

    def attach_router(self, app: FastAPI) -> None:
        router = APIRouter(prefix="/v1/saga", tags=["saga"])
        add = router.add_api_route
        of_rank, of_tenant = [_in_header(RANK_HEADER)], [_in_query("tenant", {"type": "string"})]
        add("/state", self.state, methods=["GET"], **_described(400, 404, takes=of_rank))
        takes = [*of_rank, *_fields_of(Listing)]
        add("/workflows", self.workflows, methods=["GET"], **_described(400, 404, takes=takes))
        takes = [*of_rank, *of_tenant]
        path = "/workflows/{name:path}"
        add(path, self.workflow, methods=["GET"], **_described(400, 404, takes=takes))
        takes = [*of_rank, *_fields_of(Past)]
        add("/past", self.past, methods=["GET"], **_described(400, 404, takes=takes))
        path = "/sessions/{session:path}/end"
        add(path, self.end, methods=["POST"], **_described(403, 404))
        app.include_router(router)
        for path in (page.PATH, page.PATH + "/{name}"):
            app.add_api_route(path, self.show_page, methods=["GET"], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        self._engine_client = engine_client
        vllm_config = getattr(state, "vllm_config", None)
        self._tenant_header = load_config(
            getattr(vllm_config, "additional_config", None)
        ).tenant_header
        self._page = page.load(self._tenant_header, served_by="server")

    async def state(self, request: Request) -> JSONResponse:
        """The engine's report: of the data-parallel rank that X-data-parallel-rank names, or of all
        together, with each one's under "ranks".
        """
        try:
            reports = await self._ask_wanted(request, STATE, {})
        except _Refusal as refusal:
            return refusal.answer
        return JSONResponse(together(list(reports.values())))

    async def workflows(self, request: Request) -> JSONResponse:
        """Who is running, held, or in a gap, of all ranks or of the one that X-data-parallel-rank
        names: `?state=` (held, queued, running, gap, presumed_ended), `?limit=`, and for operators
        `?tenant=`. Answers `policy.overview.Overview`; what a workflow is says `policy.explain`.
        """
        try:
            asked = self._asked(request, Listing)
            answers = await self._ask_wanted(request, WORKFLOWS, msgspec.to_builtins(asked))
        except _Refusal as refusal:
            return refusal.answer
        parts = (overview.of_engine(rank, answer) for rank, answer in answers.items())
        return JSONResponse(overview.together(parts, asked.limit))

    async def workflow(self, name: str, request: Request) -> JSONResponse:
        """Of the workflow that has the session `name` all that is known: what it waits for, what
        is expected of it, and the last decisions about it. 404 if the tenant has none.
        """
        query = {"tenant": request.query_params.get("tenant")} | self._whose(request)
        try:
            answers = await self._ask_wanted(request, WORKFLOW, {"name": name, **query})
        except _Refusal as refusal:
            return refusal.answer
        found = [
            {"engine": rank, **answer["workflow"]}
            for rank, answer in answers.items()
            if answer["workflow"] is not None
        ]
        told = overview.latest(found)
        return JSONResponse(told) if told else _error(404, f"no workflow has a session {name!r}")

    async def past(self, request: Request) -> JSONResponse:
        """Calls and workflows that have ended lately, of all ranks or of the one that
        X-data-parallel-rank names: `?within_s=` (60), `?limit=` (1000), and for operators
        `?tenant=`. Answers `policy.overview.Past`; what an event is says `Explainer.past`.
        """
        try:
            asked = self._asked(request, Past)
            answers = await self._ask_wanted(request, PAST, msgspec.to_builtins(asked))
        except _Refusal as refusal:
            return refusal.answer
        parts = (overview.past_of_engine(rank, answer) for rank, answer in answers.items())
        return JSONResponse(overview.past_together(parts, asked.limit))

    async def show_page(self, request: Request) -> Response:
        """The page, and what it consists of (docs/page.md)."""
        name = request.path_params.get("name")
        file = self._page.get(page.PATH if name is None else f"{page.PATH}/{name}")
        if file is None:
            return _error(404, f"the page has no {name!r}")
        return Response(file.body, media_type=file.content_type, headers=page.HEADERS)

    async def end(self, session: str, request: Request) -> JSONResponse:
        """A session of the tenant that the tenant header names is over: its KV is the first to go.

        Calls in flight finish first. Answers `{"ended": whether it was known}`.
        """
        if is_of_another_site(request.headers):
            return _error(403, "a web page of another origin may not do this")
        tenant = short_id(request.headers.get(self._tenant_header, "").strip())
        try:
            answers = await self._ask(END, {"tenant": tenant, "session": session})
        except ControlError as error:
            return _error(404, str(error))
        return JSONResponse({"ended": any(answer["ended"] for answer in answers)})

    def _whose(self, request: Request) -> dict[str, str]:
        """The tenant that may see the answer; nothing if there is no telling: then all of it."""
        tenant = request.headers.get(self._tenant_header)
        return {} if tenant is None else {"tenant": short_id(tenant.strip())}

    def _asked(self, request: Request, kind: type[T]) -> T:
        """What the query asks for, and may.

        Raises:
            _Refusal: it asks for what there is not.
        """
        query = {k: v for k, v in request.query_params.items() if v} | self._whose(request)
        try:
            return msgspec.convert(query, kind, strict=False)
        except msgspec.ValidationError as error:
            raise _Refusal(400, f"{request.url.query!r}: {error}") from None

    async def _ask_wanted(
        self, request: Request, op: str, payload: dict[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Answers by rank: of the one that X-data-parallel-rank names, or of all.

        Raises:
            _Refusal: there is no saga, or no such rank.
        """
        try:
            answers = await self._ask(op, payload)
        except ControlError as error:
            raise _Refusal(404, str(error)) from None
        known = {str(index): answer for index, answer in enumerate(answers)}
        rank = request.headers.get(RANK_HEADER)
        if rank is None:
            return known
        if rank not in known:
            raise _Refusal(400, f"{RANK_HEADER} = {rank!r}: there are {', '.join(known)}")
        return {rank: known[rank]}

    async def _ask(self, op: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        # An engine logs a traceback each time that it is asked in vain.
        if self._unavailable is not None:
            raise ControlError(self._unavailable)
        try:
            return await ask(self._engine_client, op, payload)
        except ControlError as error:
            self._unavailable = str(error)
            raise


class _Refusal(Exception):
    """There is nothing to answer but this."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.answer = _error(status, message)


def _described(*errors: int, takes: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """For OpenAPI: what a route answers besides 200, and what it takes besides its path."""
    answers = {status: {"description": HTTPStatus(status).phrase} for status in errors}
    return {"responses": answers, "openapi_extra": {"parameters": takes} if takes else None}


def _fields_of(kind: type[msgspec.Struct]) -> list[dict[str, Any]]:
    (_,), components = msgspec.json.schema_components([kind])
    properties = components[kind.__name__]["properties"]
    return [_in_query(name, schema) for name, schema in properties.items()]


def _in_query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema}


def _in_header(name: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "schema": {"type": "string"}}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "saga", "code": status}}, status)
