from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pages
import pytest

_TESTS = Path(__file__).parents[1]
# Helpers of other parts' tests: small servers, the known clients, a router in a process.
sys.path += [str(_TESTS / part) for part in ("cli", "clients", "router")]

from fleet_of_two import fleet  # noqa: E402
from small_server import serving  # noqa: E402
from ways import run_here  # noqa: E402

_TRACES = ("sweagent_glm45_timed.jsonl", "claudecode_swe_timed.jsonl")
_CALLS = 6
_METRICS = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",enable_prefix_caching="True",num_gpu_blocks="1000"} 1.0
# TYPE vllm:saga_callers counter
vllm:saga_callers_total{source="claude-code"} 60.0
"""
_SERVER = {
    "/version": (200, {"version": "0.32.0"}),
    "/v1/models": (200, {"data": [{"id": "m", "max_model_len": 4096}]}),
    "/v1/saga/state": (
        200, {"resident": 2, "held_calls": [], "saga": {"holds": 100, "forced": 1}},
    ),
    "/metrics": (200, _METRICS),
}  # fmt: skip


@dataclass(frozen=True)
class Places:
    """What stands in for the names that the docs use; rules name them between braces."""

    root: Path
    model: Path
    trace: Path
    traces: Path
    graph: Path
    settings: Path
    server: str
    backends: tuple[str, str]

    def fill(self, text: str) -> str:
        """`text` with `{name}` replaced."""
        for name, value in vars(self).items():
            text = text.replace("{" + name + "}", str(value))
        return text


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("docs")
    trace = folder / "trace.jsonl"
    trace.write_text(small_trace())
    for name in _TRACES:
        (folder / name).write_text(small_trace())
    run_here(f"vllm-saga graph fit {trace} -o graph.json", folder)
    with ExitStack() as stack:
        backends = [stack.enter_context(serving({"/health": (200, "ok")})) for _ in range(2)]
        answers = {**_SERVER, "/v1/saga/workflows": (200, fleet())}
        yield Places(
            root=pages.ROOT,
            model=pages.ROOT / ".cache" / "tiny-model",
            trace=trace,
            traces=folder,
            graph=folder / "graph.json",
            settings=settings_file(folder),
            server=stack.enter_context(serving(answers)),
            backends=(backends[0], backends[1]),
        )


def small_trace() -> str:
    """Three agents with six short calls each, in our trace format."""
    calls = [
        {
            "prompt_tokens": 400 + 130 * number,
            "new_tokens": 100 if number else 400,
            "output_tokens": 30,
            "tool": "bash",
            "tool_latency_s": 0.5,
        }
        for number in range(_CALLS)
    ]
    lines = (json.dumps({"session_id": f"s{n}", "source": "x", "calls": calls}) for n in range(3))
    return "\n".join(lines)


def settings_file(folder: Path) -> Path:
    """The settings that docs/settings.md shows, learned things kept in `folder`."""
    page = pages.ROOT / "docs" / "settings.md"
    [shown] = [block.text for block in pages.blocks(page) if block.language == "yaml"]
    path = folder / "saga.yaml"
    path.write_text(shown.replace("/var/lib/vllm", str(folder)))
    return path
