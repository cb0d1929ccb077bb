"""/v1/saga: reports and ends, against engines that only answer utility calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from vllm_saga.engine.control import END, PAST, STATE, WORKFLOW, WORKFLOWS
from vllm_saga.server.endpoints import SagaEndpoints

REPORT = {
    "started": "a",
    "kv_tokens": 100,
    "used_tokens": 40,
    "running": 1,
    "waiting": 2,
    "resident": 3,
    "prefill_tokens_per_s": 10.0,
    "held_calls": [{"tenant": "", "session": "h", "new": True, "held_s": 1.0, "tokens": 9}],
    "sessions": [["", "s"]],
    "saga": {"held": 1},
}


class Engines:
    """`engine_core` of vLLM's client, with one answer for each rank."""

    def __init__(self, *ranks: dict[str, object], error: str | None = None) -> None:
        self.ranks, self.error, self.asked = ranks, error, []

    async def call_utility_all_async(self, method: str, op: str, payload: dict[str, str]):
        self.asked.append((method, op, payload))
        if self.error is not None:
            raise Exception(f"Call to {method} method failed: {self.error}")
        return list(self.ranks)


class OldEngines(Engines):
    """vLLM < 0.32 answers for the first rank only."""

    call_utility_all_async = None  # type: ignore[assignment]

    async def call_utility_async(self, method: str, op: str, payload: dict[str, str]):
        return (await Engines.call_utility_all_async(self, method, op, payload))[0]


async def client_of(engines: Engines, **saga: object) -> TestClient:
    plugin = SagaEndpoints()
    assert isinstance(plugin, EndpointPlugin)
    app = FastAPI()
    plugin.attach_router(app)
    state = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"saga": saga}))
    await plugin.init_state(SimpleNamespace(engine_core=engines), state, None)
    return TestClient(app)


@pytest.mark.parametrize("kind", [Engines, OldEngines])
async def test_one_engine_s_report_is_the_answer(kind):
    engines = kind(REPORT)
    client = await client_of(engines)
    assert client.get("/v1/saga/state").json() == REPORT
    assert engines.asked == [("saga_control", STATE, {})]


async def test_ranks_are_told_apart_by_vllm_s_header_or_taken_together():
    other = {**REPORT, "started": "b", "running": 5, "prefill_tokens_per_s": 30.0}
    client = await client_of(Engines(REPORT, other))
    second = client.get("/v1/saga/state", headers={"X-data-parallel-rank": "1"})
    assert second.json() == other
    whole = client.get("/v1/saga/state").json()
    assert whole["ranks"] == [REPORT, other]
    assert REPORT.keys() < whole.keys()
    assert (whole["kv_tokens"], whole["running"], len(whole["sessions"])) == (200, 6, 2)
    assert whole["prefill_tokens_per_s"] == 20.0 and whole["started"] not in ("a", "b")
    missing = client.get("/v1/saga/state", headers={"X-data-parallel-rank": "2"})
    assert missing.status_code == 400 and "0, 1" in missing.text


async def test_a_session_ends_for_the_tenant_that_the_header_names():
    engines = Engines({"ended": False}, {"ended": True})
    client = await client_of(engines, tenant_header="x-team")
    answer = client.post("/v1/saga/sessions/a%2Fb:c/end", headers={"x-team": "t"})
    assert answer.json() == {"ended": True}
    client.post("/v1/saga/sessions/plain/end", headers={"x-tenant-id": "t"})
    assert [payload for _, _, payload in engines.asked] == [
        {"tenant": "t", "session": "a/b:c"},
        {"tenant": "", "session": "plain"},
    ]
    assert {op for _, op, _ in engines.asked} == {END}
    assert client.get("/v1/saga/sessions/plain/end").status_code == 405


async def test_an_engine_without_saga_is_asked_once():
    engines = Engines(error="'EngineCoreProc' object has no attribute 'saga_control'")
    client = await client_of(engines)
    for _ in range(3):
        answer = client.get("/v1/saga/state")
        assert answer.status_code == 404 and "--scheduler-cls saga" in answer.text
    assert client.post("/v1/saga/sessions/s/end").status_code == 404
    assert len(engines.asked) == 1


async def test_other_failures_are_not_mistaken_for_stock():
    client = await client_of(Engines(error="shutting down"))
    with pytest.raises(Exception, match="shutting down"):
        client.get("/v1/saga/state")
    client = await client_of(SimpleNamespace())
    assert "no way to ask" in client.get("/v1/saga/state").text


def workflow(name: str, state: str = "gap", tenant: str = "", idle_s: float | None = 1.0):
    return {"id": name, "tenant": tenant, "state": state, "idle_s": idle_s}


def answer_of(*workflows: dict[str, object]) -> dict[str, object]:
    used = {"weight": 1.0, "gpu_s": 2.0, "waiting": 1.0}
    return {
        "scheduler": "saga", "running": 1, "waiting": 2, "total": len(workflows),
        "workflows": list(workflows), "counts": {}, "pool": {"capacity_blocks": 9},
        "tenants": {"t": used},
    }  # fmt: skip


async def test_workflows_of_all_ranks_are_one_list_by_state():
    ranks = answer_of(workflow("a", "running"), workflow("b")), answer_of(workflow("c", "held"))
    engines = Engines(*ranks)
    client = await client_of(engines)
    told = client.get("/v1/saga/workflows?state=&limit=2").json()
    assert engines.asked == [
        ("saga_control", WORKFLOWS, {"tenant": None, "state": None, "limit": 2})
    ]
    assert [(w["engine"], w["id"]) for w in told["workflows"]] == [("1", "c"), ("0", "a")]
    assert told["total"] == 3
    assert [(e["engine"], e["pool"]["capacity_blocks"]) for e in told["engines"]] == [
        ("0", 9), ("1", 9),
    ]  # fmt: skip
    assert told["tenants"] == {"t": {"weight": 1.0, "gpu_s": 4.0, "waiting": 2.0}}
    second = client.get("/v1/saga/workflows", headers={"X-data-parallel-rank": "1"}).json()
    assert [w["id"] for w in second["workflows"]] == ["c"]


async def test_a_stock_rank_is_told_without_workflows():
    client = await client_of(Engines({"scheduler": "stock", "running": 3, "waiting": 0}))
    told = client.get("/v1/saga/workflows").json()
    assert told["total"] == 0 and told["engines"][0]["scheduler"] == "stock"


@pytest.mark.parametrize("query", ["state=ill", "limit=-1", "limit=501", "limit=x"])
async def test_a_wrong_query_names_its_field(query):
    engines = Engines(answer_of())
    answer = (await client_of(engines)).get(f"/v1/saga/workflows?{query}")
    assert answer.status_code == 400 and query.partition("=")[0] in answer.text
    assert not engines.asked


async def test_the_tenant_header_decides_who_is_told_what():
    engines = Engines(answer_of())
    client = await client_of(engines, tenant_header="x-team")
    client.get("/v1/saga/workflows?tenant=u", headers={"x-team": "t"})
    client.get("/v1/saga/workflows?tenant=u", headers={"x-team": ""})
    client.get("/v1/saga/workflows?tenant=u")
    client.get("/v1/saga/workflows", headers={"x-tenant-id": "t"})
    assert [asked["tenant"] for _, _, asked in engines.asked] == ["t", "", "u", None]


async def test_one_workflow_is_found_where_it_made_a_call_last():
    moved = workflow("a", idle_s=30.0), workflow("a", "running", idle_s=None)
    engines = Engines(*({"workflow": found} for found in (moved[0], None, moved[1])))
    client = await client_of(engines)
    told = client.get("/v1/saga/workflows/a%2Fb:c", headers={"x-tenant-id": "t"}).json()
    assert told == {"engine": "2", **moved[1]}
    assert engines.asked == [("saga_control", WORKFLOW, {"name": "a/b:c", "tenant": "t"})]
    client = await client_of(Engines({"workflow": None}))
    assert client.get("/v1/saga/workflows/a").status_code == 404


def event(number: int, ended_ago_s: float, **fields: object) -> dict[str, object]:
    return {"number": number, "what": "call", "id": "a", "ended_ago_s": ended_ago_s, **fields}


async def test_what_has_ended_on_all_ranks_is_one_list_latest_first():
    ranks = {"events": [event(7, 1.0), event(6, 5.0)]}, {"events": [event(7, 3.0)]}
    engines = Engines(*ranks)
    client = await client_of(engines)
    told = client.get("/v1/saga/past?within_s=7.5&limit=2&tenant=").json()
    assert engines.asked == [("saga_control", PAST, {"tenant": None, "within_s": 7.5, "limit": 2})]
    assert [(e["engine"], e["ended_ago_s"]) for e in told["events"]] == [("0", 1.0), ("1", 3.0)]
    assert told["engines"] == [{"engine": "0"}, {"engine": "1"}]
    second = client.get("/v1/saga/past", headers={"X-data-parallel-rank": "1"}).json()
    assert [e["engine"] for e in second["events"]] == ["1"]


@pytest.mark.parametrize("query", ["within_s=-1", "within_s=x", "within_s=nan", "limit=4097"])
async def test_a_wrong_question_about_the_past_names_its_field(query):
    engines = Engines({"events": []})
    answer = (await client_of(engines)).get(f"/v1/saga/past?{query}")
    assert answer.status_code == 400 and query.partition("=")[0] in answer.text
    assert not engines.asked


async def test_the_past_is_told_to_whom_it_belongs():
    engines = Engines({"events": []})
    client = await client_of(engines, tenant_header="x-team")
    client.get("/v1/saga/past?tenant=u", headers={"x-team": "t"})
    client.get("/v1/saga/past?tenant=u", headers={"x-team": ""})
    client.get("/v1/saga/past?tenant=u")
    assert [asked["tenant"] for _, _, asked in engines.asked] == ["t", "", "u"]
    stock = await client_of(Engines(error="object has no attribute 'saga_control'"))
    assert stock.get("/v1/saga/past").status_code == 404


async def test_the_page_is_served_outside_of_what_the_key_guards():
    client = await client_of(Engines(answer_of()), tenant_header="x-team")
    shown = client.get("/saga")
    assert shown.status_code == 200 and shown.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    assert 'content="x-team"' in shown.text and 'content="server"' in shown.text
    script = client.get("/saga/page.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert client.get("/saga/", follow_redirects=False).headers["location"].endswith("/saga")
    assert client.get("/saga/no.js").status_code == 404
    assert client.get("/saga/..%2f__init__.py").status_code == 404


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Origin": "http://testserver"}, 200),
        ({"Origin": "https://Testserver"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://elsewhere"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://elsewhere"}, 403),
        ({"Origin": "http://testserver:81"}, 403),
        # vLLM's default CORS lets a page send these.
        ({"Origin": "http://elsewhere", "Authorization": "Bearer junk"}, 403),
        ({"Origin": "http://elsewhere", "X-Forwarded-Host": "elsewhere"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://testserver"}, 403),
    ],
)
async def test_no_web_page_of_somebody_else_s_ends_a_session(headers, status):
    engines = Engines({"ended": True})
    client = await client_of(engines)
    assert client.post("/v1/saga/sessions/s/end", headers=headers).status_code == status
    assert len(engines.asked) == (status == 200)
