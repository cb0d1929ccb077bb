"""Every `vllm serve` of the docs: read by vLLM itself, and on request started and asked."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
from pages import ROOT, blocks, commands, pages
from rules import RULES
from ways import AsksServer, Serves, run_curl, run_here, split

from benchmarks.live.server import Server, tiny_server
from vllm_saga import SagaScheduler
from vllm_saga.config import load_config
from vllm_saga.plugin import SCHEDULER_NAME

MODEL = ROOT / ".cache" / "tiny-model"
CLIENT_SDK = ROOT / ".cache" / "clients" / "sdk" / "bin" / "python"
AGENTS = ROOT / "docs" / "agents.md"
KEY = "SECRET"
SERVER = "http://127.0.0.1:8000"


def texts_of(way: type) -> list[str]:
    found = (command.text for page in pages() for command in commands(page))
    return [
        text
        for text in dict.fromkeys(found)
        if any(isinstance(rule.way, way) and rule.covers(text) for rule in RULES)
    ]


SERVED = texts_of(Serves)
on_request = pytest.mark.switch("SAGA_TEST_DOCS", "a minute each")
needs_model = pytest.mark.skipif(not MODEL.exists(), reason="scripts/setup makes the model")


@needs_model
@pytest.mark.parametrize("text", SERVED, ids=[text[:90] for text in SERVED])
def test_vllm_reads_it(text, places, monkeypatch):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    env, words = split(text)
    for name, value in env.items():
        monkeypatch.setenv(name, value.replace("saga.yaml", str(places.settings)))
    parser = FlexibleArgumentParser()
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers())
    args = parser.parse_args([str(MODEL) if word == "MODEL" else word for word in words[1:]])
    args.model = args.model_tag
    command.validate(args)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    if args.scheduler_cls is not None:
        assert args.scheduler_cls in (SCHEDULER_NAME, "vllm_saga.SagaScheduler")
        assert config.scheduler_config.get_scheduler_cls() is SagaScheduler
    load_config(config.additional_config)
    for dotted in args.middleware:
        module, _, name = dotted.rpartition(".")
        assert callable(getattr(import_module(module), name))


@contextmanager
def served(text: str, log: Path, settings: Path) -> Iterator[str]:
    """A small server of a `vllm serve` of the docs; its URL."""
    env, words = split(text)
    if "--data-parallel-size" in words:
        # The default binding gives each rank cores of its own.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "auto"
    env = {name: value.replace("saga.yaml", str(settings)) for name, value in env.items()}
    options = tiny_server(MODEL, 300, *words[3:], env=env)
    server = Server(options, "stock", log, Path(sys.executable).with_name("vllm"))
    server.launch()
    try:
        asyncio.run(server.wait_until_ready())
        yield server.url
    finally:
        server.stop()


@on_request
@needs_model
@pytest.mark.live
@pytest.mark.parametrize("text", SERVED, ids=[text[:90] for text in SERVED])
def test_it_serves_a_completion(text, places, tmp_path):
    log = tmp_path / "server.log"
    with served(text, log, places.settings) as url:
        body = json.dumps({"model": "model", "prompt": "Hello", "max_tokens": 4}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(f"{url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=200) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] >= 1
    assert ("saga: on," in log.read_text()) == ("--scheduler-cls" in text)


@on_request
@needs_model
@pytest.mark.live
@pytest.mark.timeout(900)
def test_what_the_docs_ask_of_a_server(places, tmp_path):
    """One server: agents' programs first, then operators' questions, then the calibration."""
    text = next(text for text in SERVED if "--middleware" in text)
    with served(text, tmp_path / "server.log", places.settings) as url:
        for block in blocks(AGENTS):
            if block.language == "python":
                run_program(block.text, url)
        for asked in sorted(texts_of(AsksServer), key=is_end):
            asked = asked.replace(SERVER, url).replace("MODEL", "model")
            answer = run_curl(asked)
            assert "/end" not in asked or json.loads(answer) == {"ended": True}
        calibrate = f"vllm-saga simulate calibrate {url} --out mine.json --rounds 1"
        run_here(f"{calibrate} --max-num-seqs 8 --max-num-batched-tokens 512", tmp_path)
        assert json.loads((tmp_path / "mine.json").read_text())["kv_tokens"] == 299 * 32


def is_end(asked: str) -> int:
    """What leaves the session alive comes before what ends it."""
    return 2 if "saga_last" in asked else int("/end" in asked)


def run_program(source: str, url: str) -> None:
    """A snippet of docs/agents.md, with the SDK that it imports, where that is installed."""
    python = str(CLIENT_SDK) if "langchain" in source else sys.executable
    if not Path(python).exists():
        return
    env = {
        "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "any", "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "any",
    }  # fmt: skip
    done = subprocess.run(
        [python, "-c", source.replace("MODEL", "model")],
        env=os.environ | env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout, done.stderr
