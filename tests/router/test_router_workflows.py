"""/v1/saga/workflows and /past of a router: every engine's, each to whom it belongs; its page."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from engines import Engine, fleet

KEY = {"Authorization": "Bearer key"}


def tells(*workflows: dict[str, Any], ranks: int = 1):
    """An engine's server that has these workflows; what it was asked is kept in `asked`."""
    asked: list[tuple[str, str | None, str | None]] = []

    async def answer(seen, request) -> web.StreamResponse:
        tenant = request.headers.get("x-tenant-id")
        asked.append((request.raw_path, tenant, request.headers.get("x-data-parallel-rank")))
        mine = [w for w in workflows if tenant in (None, w["tenant"])]
        if request.path == "/v1/saga/past":
            engines = [{"engine": str(rank)} for rank in range(ranks)]
            events = [{**w, "number": 3, "ended_ago_s": w["idle_s"]} for w in mine]
            return web.json_response({"events": events, "engines": engines})
        if request.path == "/v1/saga/workflows":
            engines = [{"engine": str(rank), "scheduler": "saga"} for rank in range(ranks)]
            return web.json_response(
                {"total": len(mine), "workflows": mine, "engines": engines, "tenants": {}}
            )
        named = [w for w in mine if request.path.endswith("/" + w["id"])]
        return web.json_response(named[0]) if named else web.json_response({}, status=404)

    return Engine(answer), asked


def workflow(name: str, state: str, tenant: str = "t", idle_s: float | None = None):
    return {"engine": "0", "id": name, "tenant": tenant, "state": state, "idle_s": idle_s}


async def test_the_workflows_of_all_engines_are_one_list():
    first, asked = tells(workflow("a", "running"), workflow("b", "gap", idle_s=3.0))
    second, _ = tells(workflow("c", "held"), ranks=2)
    stock = Engine(lambda seen, request: not_found())
    async with fleet(first, second, stock) as client:
        told = (await client.get("/v1/saga/workflows?limit=2&state=held")).json()
    assert [(w["id"], w["engine"]) for w in told["workflows"]] == [
        ("c", f"{second.name}-dp0"),
        ("a", first.name),
    ]
    assert told["total"] == 3
    names = [engine["engine"] for engine in told["engines"]]
    assert names == [first.name, f"{second.name}-dp0", f"{second.name}-dp1", stock.name]
    assert "without saga" in told["engines"][-1]["error"]
    assert asked == [("/v1/saga/workflows?limit=2&state=held", None, None)]


async def not_found() -> web.StreamResponse:
    return web.json_response({"detail": "Not Found"}, status=404)


async def test_a_workflow_is_told_by_the_engine_where_it_made_a_call_last():
    old, _ = tells(workflow("a", "presumed_ended", idle_s=300.0))
    new, asked = tells(workflow("a", "held"))
    async with fleet(old, new) as client:
        told = (await client.get("/v1/saga/workflows/a")).json()
        missing = await client.get("/v1/saga/workflows/x%2Fy%20z")
    assert (told["engine"], told["state"]) == (new.name, "held")
    assert missing.status == 404
    assert asked[-1][0] == "/v1/saga/workflows/x%2Fy%20z"


async def test_an_engine_that_has_died_is_listed_as_such():
    engine, _ = tells(workflow("a", "held"))
    dead = Engine(healthy=True)
    async with fleet(engine, dead) as client:
        await dead.stop()
        told = (await client.get("/v1/saga/workflows")).json()
        assert [w["id"] for w in told["workflows"]] == ["a"]
        assert {"engine": dead.name, "error": "it does not answer"} in told["engines"]


async def test_clients_see_their_tenant_s_and_operators_all():
    engine, asked = tells(workflow("a", "held"), workflow("b", "held", tenant="u"))
    async with fleet(engine, api_key="key", admin_api_key="admin") as client:
        mine = await client.get("/v1/saga/workflows", **KEY, x_tenant_id="t")
        other = await client.get("/v1/saga/workflows/b", **KEY, x_tenant_id="t")
        nobody = await client.get("/v1/saga/workflows", **KEY)
        everybody = await client.get("/v1/saga/workflows", Authorization="Bearer admin")
        keyless = await client.get("/v1/saga/workflows", x_tenant_id="t")
    assert [w["id"] for w in mine.json()["workflows"]] == ["a"]
    assert other.status == 404
    assert (nobody.status, keyless.status) == (401, 401)
    assert len(everybody.json()["workflows"]) == 2
    assert [tenant for _, tenant, _ in asked] == ["t", "t", None]


@pytest.mark.parametrize("query", ["limit=501", "limit=x", "state=ill"])
async def test_a_wrong_query_is_refused_here(query):
    engine, asked = tells()
    async with fleet(engine) as client:
        answer = await client.get(f"/v1/saga/workflows?{query}")
    assert answer.status == 400 and query.partition("=")[0] in answer.body.decode()
    assert not asked


async def test_what_has_ended_on_all_engines_is_one_list():
    first, asked = tells(workflow("a", "gap", idle_s=2.0), workflow("b", "gap", idle_s=9.0))
    second, _ = tells(workflow("c", "gap", idle_s=4.0), ranks=2)
    stock = Engine(lambda seen, request: not_found())
    async with fleet(first, second, stock) as client:
        told = (await client.get("/v1/saga/past?within_s=30&limit=2")).json()
        default = (await client.get("/v1/saga/past")).json()
    assert [(e["id"], e["engine"], e["number"]) for e in told["events"]] == [
        ("a", first.name, 3),
        ("c", f"{second.name}-dp0", 3),
    ]
    assert [engine["engine"] for engine in told["engines"]] == [
        first.name, f"{second.name}-dp0", f"{second.name}-dp1", stock.name,
    ]  # fmt: skip
    assert "without saga" in told["engines"][-1]["error"]
    assert [e["id"] for e in default["events"]] == ["a", "c", "b"]
    assert [path for path, _, _ in asked] == [
        "/v1/saga/past?within_s=30&limit=2",
        "/v1/saga/past?limit=1000",
    ]


async def test_the_past_too_is_told_to_whom_it_belongs():
    engine, asked = tells(
        workflow("a", "gap", idle_s=1.0), workflow("b", "gap", tenant="u", idle_s=2.0)
    )
    async with fleet(engine, api_key="key", admin_api_key="admin") as client:
        mine = await client.get("/v1/saga/past", **KEY, x_tenant_id="t")
        nobody = await client.get("/v1/saga/past", **KEY)
        keyless = await client.get("/v1/saga/past", x_tenant_id="t")
        everybody = await client.get("/v1/saga/past", Authorization="Bearer admin")
    assert [e["id"] for e in mine.json()["events"]] == ["a"]
    assert (nobody.status, keyless.status) == (401, 401)
    assert [e["id"] for e in everybody.json()["events"]] == ["a", "b"]
    assert [tenant for _, tenant, _ in asked] == ["t", None]


@pytest.mark.parametrize("query", ["limit=4097", "limit=x", "within_s=-1", "within_s=nan"])
async def test_a_wrong_question_about_the_past_is_refused_here(query):
    engine, asked = tells()
    async with fleet(engine) as client:
        answer = await client.get(f"/v1/saga/past?{query}")
    assert answer.status == 400 and query.partition("=")[0] in answer.body.decode()
    assert not asked


async def test_the_page_is_the_router_s_own_and_needs_no_key():
    engine = Engine()
    async with fleet(engine, api_key="key", tenant_header="x-team") as client:
        shown = await client.get("/saga")
        script = await client.get("/saga/page.js")
        head = await client.send("HEAD", "/saga", None)
        posted = await client.post("/saga", b"{}")
        missing = [await client.get(f"/saga/{name}") for name in ("no.js", "..%2fapp.py", "a/b")]
        async with client.http.get(f"{client.url}/saga/", allow_redirects=False) as slashed:
            assert (slashed.status, slashed.headers["Location"]) == (308, "../saga")
        other = await client.get("/sagacity", **KEY)
    assert shown.status == 200 and shown.headers["Content-Type"] == "text/html; charset=utf-8"
    assert b'content="x-team"' in shown.body and b'content="router"' in shown.body
    assert "default-src 'none'" in shown.headers["Content-Security-Policy"]
    assert script.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert (head.status, head.body, posted.status) == (200, b"", 405)
    assert [answer.status for answer in missing] == [404, 404, 404]
    # Only what is not the page's is passed on.
    assert other.status == 200 and [seen.path for seen in engine.seen] == ["/sagacity"]
