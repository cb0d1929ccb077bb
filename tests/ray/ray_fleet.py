"""Two real vLLM replicas behind Ray Serve LLM on this machine's CPU, and what they say."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from benchmarks.live.process import free_port

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "tiny-model"
BLOCK = 32
PAGE = ROOT / "docs" / "ray.md"
_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
ENGINE = {
    "load_format": "dummy",
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": BLOCK,
    "num_gpu_blocks_override": 600,
    "max_model_len": 3072,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "enable_prompt_tokens_details": True,
}


@contextmanager
def cluster(verbose: bool) -> Iterator[int]:
    """A Ray cluster of this process's own with Serve on it; yields the port of its proxy."""
    os.environ.update(_ENV)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    port = free_port()
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": _ENV},
        log_to_driver=verbose,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
        yield port
        serve.shutdown()
    finally:
        ray.shutdown()


def documented() -> dict[str, Any]:
    """The one `LLMConfig` of docs/ray.md, as its reader would write it."""
    block = re.search(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    (application,) = yaml.safe_load(block[1])["applications"]
    (config,) = application["args"]["llm_configs"]
    return config


def start(request_router: dict[str, Any] | None = None, ingresses: int = 1) -> None:
    """Serve two replicas as documented, on CPU; returns when they are up.

    request_router: takes the place of ours in `request_router_config`.
    """
    from ray import serve
    from ray.serve.llm import build_openai_app

    config = documented()
    config["model_loading_config"] = {"model_id": "model", "model_source": str(MODEL)}
    config["engine_kwargs"] |= ENGINE
    config["accelerator_config"] = {"kind": "cpu"}
    deployment = config["deployment_config"]
    if request_router is not None:
        deployment["request_router_config"] = request_router
    ingress = {"num_replicas": ingresses, "autoscaling_config": None}
    app = build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress})
    serve.run(app, name="saga", blocking=False)


def stop() -> None:
    from ray import serve

    serve.delete("saga")


def reports() -> list[dict[str, Any]]:
    """What each replica that is up says of its engine, asked now."""
    from ray import serve

    handle = serve.get_deployment_handle("SagaLLMServer:model", "saga")
    return [stats["saga"] for stats in handle.broadcast("record_routing_stats").results()]


def sessions_by_engine() -> dict[str, set[str]]:
    """The sessions that each engine has computed something of, by the run of the engine."""
    return {report["started"]: {name for _, name in report["sessions"]} for report in reports()}


def replica_processes() -> list[psutil.Process]:
    """The replicas of our deployment, children of this process's raylet."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "ServeReplica:saga:SagaLLM" in " ".join(child.cmdline())]


@dataclass
class Answered:
    """One call's answer: tokens of its prompt, and how many of them were cached."""

    prompt: int
    cached: int


class Agent:
    """A session on top of a system prompt that all agents share; each call adds some text."""

    path = "/v1/completions"

    def __init__(self, name: str, headers: dict[str, str]) -> None:
        self.name, self.headers = name, headers
        self.prompt: Any = None
        self.answers: list[Answered] = []
        self.extend()

    def body(self) -> dict[str, Any]:
        return {"prompt": self.prompt}

    def extend(self) -> None:
        """What the next call says beyond the last one."""
        self.prompt = (self.prompt or _SYSTEM) + self.text()

    def text(self) -> str:
        said = f"{self.name} {len(self.answers)}"
        return " ".join(hashlib.sha256(f"{said} {i}".encode()).hexdigest() for i in range(4))

    async def call(self, http: aiohttp.ClientSession, url: str) -> None:
        body = {"model": "model", "max_tokens": 4, "ignore_eos": True, **self.body()}
        async with http.post(url + self.path, json=body, headers=self.headers) as answer:
            assert answer.status == 200, await answer.text()
            told = (await answer.json())["usage"]
        details = told.get("prompt_tokens_details") or {}
        self.answers.append(Answered(told["prompt_tokens"], details.get("cached_tokens") or 0))
        self.extend()

    def hit_rate(self, since: int = 1) -> float:
        """Cached tokens over those that the call before has computed, in whole blocks."""
        known = [answer.prompt // BLOCK * BLOCK for answer in self.answers[since - 1 : -1]]
        return sum(answer.cached for answer in self.answers[since:]) / sum(known)


class ChatAgent(Agent):
    """One that calls a tool: messages whose content is a list of parts, and tools."""

    path = "/v1/chat/completions"

    def body(self) -> dict[str, Any]:
        return {"messages": self.prompt, "tools": [_TOOL], "tool_choice": "none"}

    def extend(self) -> None:
        if not self.answers:
            task = {"role": "user", "content": [{"type": "text", "text": self.text()}]}
            self.prompt = [{"role": "system", "content": _SYSTEM}, task]
            return
        function = {"name": "bash", "arguments": '{"command": "ls"}'}
        called = [{"id": f"call_{len(self.answers)}", "type": "function", "function": function}]
        self.prompt = [
            *self.prompt,
            {"role": "assistant", "content": None, "tool_calls": called},
            {"role": "tool", "tool_call_id": called[0]["id"], "content": self.text()},
        ]


_TOOL = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}
_SYSTEM = "You repair programs. Say which tool you use, then use it. " * 4


async def converse(agents: list[Agent], port: int, calls: int, gap_s: float = 0.3) -> None:
    """All agents at a time, each of its calls after the last one's answer."""
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as http:

        async def run(agent: Agent, index: int) -> None:
            await asyncio.sleep(index * 0.1)
            for _ in range(calls):
                await agent.call(http, f"http://127.0.0.1:{port}")
                await asyncio.sleep(gap_s)

        await asyncio.gather(*(run(agent, index) for index, agent in enumerate(agents)))


def wait_until(what: Any, timeout_s: float, why: str) -> Any:
    """The first true value of `what()`.

    Raises:
        TimeoutError: there is none in time; `why` says what was waited for.
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.5)
    raise TimeoutError(why)
