"""The page in a real browser, before a real policy: what people see, and what they can do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from small_engines import Agent, SmallEngine, serving

pytestmark = [
    pytest.mark.switch("SAGA_TEST_PAGE", "a minute, and needs Chromium and the extra page-test"),
    pytest.mark.timeout(180),
]

HOSTILE = """<img src=x onerror="alert(1)">'</script><b>&amp;\u202e/..%2F"""


def crowd(count: int = 8, first: int = 0) -> list[Agent]:
    """Agents of two tenants; six of them fill a pool of 2,000 blocks."""
    return [
        Agent(f"task-{n}", ("red", "blue")[n % 2], starts=10.0 * (n - first), blocks=300)
        for n in range(first, first + count)
    ]


@contextmanager
def visiting(page, *engines: SmallEngine, **how: Any) -> Iterator[str]:
    """In `page` the page of who serves these engines; it is left before they stop."""
    with serving(*engines, **how) as url:
        page.goto(f"{url}/saga")
        yield url
        page.goto("about:blank")


def lane(page, name: str):
    return page.get_by_role("button", name=f"{name}, ")


def lanes(page) -> list[str]:
    found = page.locator("#lanes .label").evaluate_all("all => all.map(one => one.ariaLabel)")
    return [name.rpartition(",")[0] for name in found]


def wait_for_lanes(page, count: int) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#lanes li")).to_have_count(count, timeout=15_000)


def test_workflows_appear_one_is_opened_and_a_session_is_ended(page):
    engine = SmallEngine().add(*crowd(), Agent("sub", "red", 30.0, blocks=30, parent="task-0"))
    with visiting(page, engine):
        wait_for_lanes(page, 8)
        held = page.locator("#lanes li:has(.state.held)").count()
        assert held and f"{held} held" in page.locator("#counts").inner_text()
        assert page.locator("#lanes .state").first.inner_text() == "held"

        engine.add_now(Agent("newcomer", "red", blocks=100))
        lane(page, "newcomer").click()
        details = page.locator("#details")
        details.get_by_text("What it waits for").wait_for()
        text = details.inner_text().lower()
        assert re.search("it needs [0-9]+ blocks", text) and "its place in line" in text
        assert "runs in any case within 5" in text and "held" in text

        details.get_by_role("button", name="End session").click()
        page.get_by_role("button", name="Cancel").click()
        assert ("red", "newcomer") in engine.policy.table.sessions
        details.get_by_role("button", name="End session").click()
        page.locator("#confirm").get_by_role("button", name="End session").click()
        details.get_by_text("was told to end").wait_for()
        session = engine.policy.table.sessions[("red", "newcomer")]
        assert session.ending

        page.keyboard.press("Escape")
        assert details.is_hidden()
        lane(page, "task-0").click()
        details.get_by_text("sub", exact=True).wait_for()
        assert details.get_by_role("button", name="End session").count() == 2
        assert "prompt" in details.locator("table").inner_text()
        page.locator("#feed li").first.wait_for()


def pixels(page, name: str) -> dict[str, int]:
    """How many points of a lane's last pixels have which colour of the stylesheet."""
    return page.locator(f"#lanes li:has([aria-label^='{name},']) canvas").evaluate(
        """canvas => {
            const style = getComputedStyle(document.documentElement);
            const points = canvas.getContext('2d').getImageData(canvas.width - 4, 0, 3, 24).data;
            const found = {};
            for (const name of ['held', 'call', 'computed', 'gap']) {
                const [r, g, b] = style.getPropertyValue('--' + name).trim().slice(1)
                    .match(/../g).map(part => parseInt(part, 16));
                found[name] = 0;
                for (let i = 0; i < points.length; i += 4) {
                    found[name] += points[i] === r && points[i + 1] === g && points[i + 2] === b;
                }
            }
            return found;
        }"""
    )


def test_calls_holds_and_gaps_are_drawn_as_such(page):
    engine = SmallEngine(blocks=1000).add(
        Agent("running", blocks=700, calls=2, call_s=1000.0, starts=10.0),
        Agent("held", blocks=700, starts=20.0),
        Agent("away", blocks=50, call_s=100.0, gap_s=1000.0),
    )
    with visiting(page, engine):
        wait_for_lanes(page, 3)
        page.wait_for_timeout(1000)
        running, held, away = (pixels(page, name) for name in ("running", "held", "away"))
        assert running["call"] >= 40 and not running["held"]
        assert held["held"] >= 10 and not held["call"]
        assert away["gap"] >= 3 and not away["call"]
        box = page.locator("#lanes li:has([aria-label^='away,']) canvas").bounding_box()
        # 240 s ago it began: 100 s of a call, then its gap.
        page.mouse.move(box["x"] + box["width"] * (600 - 200) / 600, box["y"] + 10)
        hint = page.locator("#hint")
        hint.wait_for()
        assert "0 cached, 800 computed" in hint.inner_text()
        page.mouse.move(box["x"] + box["width"] * (600 - 60) / 600, box["y"] + 10)
        assert "gap of 2 min after bash" in hint.inner_text()


def test_what_others_have_named_is_text(page):
    hostile = Agent(HOSTILE, "<b>red</b>", blocks=1500, call_s=1000.0)
    engine = SmallEngine().add(hostile, Agent("..", "<b>red</b>", 5.0, blocks=900))
    with visiting(page, engine):
        wait_for_lanes(page, 2)
        shown = HOSTILE.replace("\u202e", "\ufffd")
        lane(page, shown).click()
        details = page.locator("#details")
        details.get_by_text("A call is running").wait_for()
        assert details.locator("h2").inner_text() == shown
        assert "<b>red</b>" in details.inner_text()
        page.locator("#by-tenant").select_option(label="<b>red</b>")
        details.get_by_role("button", name="End session").click()
        page.locator("#confirm").get_by_role("button", name="End session").click()
        details.get_by_text("was told to end").wait_for()
        assert engine.policy.table.sessions["<b>red</b>", HOSTILE].ending
        page.keyboard.press("Escape")
        lane(page, "..").click()
        details.get_by_text("no URL can name ..").wait_for()
        assert page.locator("img, b b, main script").count() == 0


def test_the_key_is_asked_for_and_kept_in_this_tab(page):
    with visiting(page, SmallEngine().add(*crowd(2)), api_key="sesame"):
        dialog = page.locator("#ask-key")
        dialog.get_by_text("Unauthorized").wait_for()
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use it").click()
        dialog.get_by_text("The key was refused").wait_for()
        page.get_by_label("API key").fill("sesame")
        page.get_by_role("button", name="Use it").click()
        wait_for_lanes(page, 2)
        assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
        assert page.context.cookies() == [] and "sesame" not in page.url
        page.reload()
        wait_for_lanes(page, 2)
        page.get_by_role("button", name="forget key").click()
        dialog.get_by_text("Unauthorized").wait_for()
        assert page.evaluate("sessionStorage.length") == 0
        assert page.faults and all("401" in fault for fault in page.faults)
        page.faults.clear()


def test_lanes_are_chosen_by_tenant_state_and_text(page):
    with visiting(page, SmallEngine().add(*crowd())):
        wait_for_lanes(page, 8)
        page.locator("#by-tenant").select_option("=blue")
        wait_for_lanes(page, 4)
        assert sorted(lanes(page)) == ["task-1", "task-3", "task-5", "task-7"]
        # The shares are everybody's.
        assert page.locator("#tenants .pool").count() == 2
        page.locator("#by-text").fill("K-3")
        assert lanes(page) == ["task-3"]
        page.locator("#by-text").fill("nobody")
        page.get_by_text("None of the 4 workflows matches the filter.").wait_for()
        page.locator("#by-text").fill("")
        page.locator("#by-tenant").select_option("*")
        wait_for_lanes(page, 8)
        page.locator("#by-state").select_option("held")
        page.locator("#lanes .state.running").wait_for(state="detached")
        assert set(page.locator("#lanes .state").all_inner_texts()) == {"held"}
        page.locator("#by-state").select_option("*")
        page.locator("#order").select_option("age")
        assert lanes(page) == [f"task-{n}" for n in range(8)]


def test_a_router_shows_the_workflows_of_all_engines(page):
    engines = SmallEngine().add(*crowd(4)), SmallEngine().add(*crowd(4, first=4))
    with visiting(page, *engines, router={"policy": "saga"}) as url:
        wait_for_lanes(page, 8)
        assert page.locator("#pools .bar").count() == 2
        body = {"model": "m", "prompt": "x", "session_id": "routed"}
        headers = {"x-tenant-id": "red"}
        page.request.post(f"{url}/v1/completions", data=body, headers=headers)
        page.locator("#feed").get_by_text("router: placed to 127.0.0.1:").wait_for()

        lane(page, "task-5").click()
        details = page.locator("#details")
        details.get_by_role("button", name="End session").click()
        page.locator("#confirm").get_by_role("button", name="End session").click()
        details.get_by_text(re.compile("was told to end|No session is called")).wait_for()
        session = engines[1].policy.table.sessions.get(("blue", "task-5"))
        page.wait_for_timeout(500)
        assert session is None or session.ending

        page.keyboard.press("Escape")
        engines[0].error = "it is broken"
        page.locator("#pools").get_by_text("Nothing is told: it does not answer").wait_for()
        page.locator("#lanes .state.unlisted").first.wait_for()
        assert lane(page, "task-6").count() == 1


def test_a_router_s_clients_see_their_own_and_operators_the_rest(page):
    keys = {"api_key": "key", "admin_api_key": "admin"}
    with serving(SmallEngine().add(*crowd()), router=keys) as url:
        page.set_extra_http_headers({"x-tenant-id": "blue"})
        page.goto(f"{url}/saga")
        page.get_by_label("API key").fill("key")
        page.get_by_role("button", name="Use it").click()
        wait_for_lanes(page, 4)
        page.get_by_text("the router's are for operators").wait_for()
        assert page.locator("#tenants .pool").count() == 1
        page.set_extra_http_headers({})
        page.get_by_text("this needs the operator's key").wait_for()
        page.get_by_label("API key").fill("admin")
        page.get_by_role("button", name="Use it").click()
        wait_for_lanes(page, 8)
        assert all("401" in fault for fault in page.faults)
        page.faults.clear()


def test_where_there_is_nothing_it_says_why(page):
    with serving(SmallEngine()) as url:
        page.goto(f"{url}/saga")
        page.get_by_text("No workflows yet").wait_for()
        page.get_by_text("Nobody has been served yet.").wait_for()
    page.get_by_text("does not answer").wait_for()
    stock = SmallEngine()
    stock.policy = None
    with visiting(page, stock):
        page.get_by_text("schedules as stock vLLM does, which knows none").wait_for()
        page.get_by_text("prefix caching is off").wait_for()
    off = SmallEngine()
    off.error = "'EngineCoreProc' object has no attribute 'saga_control'"
    with visiting(page, off):
        page.get_by_text("without --scheduler-cls saga: it tells nothing of workflows").wait_for()
    with visiting(page, router={}):
        page.get_by_text("the router has no backends").wait_for()
    assert all(re.search("404|ERR_|Failed to load", fault) for fault in page.faults)
    page.faults.clear()


def test_nobody_is_asked_while_nobody_looks(page):
    asked = []
    with visiting(page, SmallEngine().add(*crowd())):
        wait_for_lanes(page, 8)
        hide = (
            "hidden => Object.defineProperty(document, 'hidden', {value: hidden, writable: true})"
        )
        page.evaluate(hide, True)
        page.wait_for_timeout(1500)
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(5000)
        assert asked == []
        page.evaluate(
            "document.hidden = false; document.dispatchEvent(new Event('visibilitychange'))"
        )
        page.wait_for_timeout(1500)
        assert any("/v1/saga/past?within_s=" in url for url in asked)


def test_what_is_told_twice_is_drawn_once_and_a_restart_begins_anew(page):
    with visiting(page, SmallEngine()):
        call = {
            "engine": "0", "number": 7, "what": "call", "id": "a", "session": "a", "tenant": "",
            "arrived_ago_s": 9, "let_in_ago_s": 5, "ended_ago_s": 2, "prompt_tokens": 10,
            "cached_tokens": 4, "output_tokens": 1, "tool": None,
        }  # fmt: skip
        other = {**call, "session": "a:sub", "prompt_tokens": 99}
        found = page.evaluate(
            """async ([call, other]) => {
                const { Model } = await import('/saga/model.js');
                const model = new Model();
                model.addPast({ events: [call] }, 100000);
                model.addPast({ events: [{ ...call, ended_ago_s: 4 }] }, 102000);
                model.addPast({ events: [other] }, 102000);
                const [lane] = model.lanes.values();
                const times = lane.spans.map(({ from, letIn, to }) => [from, letIn, to]);
                return [model.lanes.size, times];
            }""",
            [call, other],
        )
        assert found == [1, [[91000, 95000, 98000], [93000, 97000, 100000]]]
