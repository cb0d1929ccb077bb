"""The clients, started as their users start them: only the server's address and the key are set."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripted_model import LAST_WORD

INSTALLED = Path(__file__).parents[2] / ".cache" / "clients"
PROGRAMS = Path(__file__).with_name("programs")
KEY = "any-key"


@dataclass(frozen=True, slots=True)
class Client:
    """One client, and what its calls have to be recognised by.

    executable: what has to be installed. begin, go_on: the arguments of a conversation's first
    turn and of a later one, from the task; go_on is None where there is one turn only. env, files
    (by their name in the home directory): made from the router's URL. has_helpers: it offers the
    model sub-agents.
    """

    name: str
    source: str
    executable: Path
    begin: Callable[[str], list[str]]
    go_on: Callable[[str], list[str]] | None
    env: Callable[[str], Mapping[str, str]]
    files: Callable[[str], Mapping[str, str]] = field(default=lambda url: {})
    says: str = LAST_WORD
    has_helpers: bool = False

    def prepare(self, home: Path, url: str) -> dict[str, str]:
        """Writes its files into `home`; gives its environment."""
        for name, text in self.files(url).items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
        return {"HOME": str(home), "PATH": os.environ["PATH"], **self.env(url)}


def _sdk(name: str, program: str, *mode: str) -> Client:
    def turn(task: str) -> list[str]:
        return [str(PROGRAMS / program), "history.json", task, *mode]

    return Client(
        name, "lineage", INSTALLED / "sdk" / "bin" / "python", turn, turn,
        _anthropic if "anthropic" in program else _openai,
    )  # fmt: skip


def _openai(url: str) -> dict[str, str]:
    return {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": KEY}


def _anthropic(url: str) -> dict[str, str]:
    return {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": KEY}


def _cli(name: str) -> Path:
    return INSTALLED / "node" / "node_modules" / ".bin" / name


def _mini(task: str) -> list[str]:
    return ["-m", "openai/model", "-y", "--exit-immediately", "-t", task]


def _mini_env(url: str) -> dict[str, str]:
    local = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "MSWEA_COST_TRACKING": "ignore_errors"}
    return {**_openai(url), **local, "MSWEA_CONFIGURED": "true"}


def _claude(task: str) -> list[str]:
    return ["-p", task, "--allowedTools", "Bash,Agent", "--max-turns", "4"]


def _claude_env(url: str) -> dict[str, str]:
    tiers = ("", "DEFAULT_HAIKU_", "DEFAULT_SONNET_", "DEFAULT_OPUS_")
    models = {f"ANTHROPIC_{tier}MODEL": "model" for tier in tiers}
    quiet = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
    return {**_anthropic(url), **models, **quiet, "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "1000"}


_CODEX_CONFIG = """\
model = "model"
model_provider = "vllm"
check_for_update_on_startup = false

[model_providers.vllm]
name = "vLLM"
base_url = "{url}/v1"
env_key = "OPENAI_API_KEY"
wire_api = "responses"

[analytics]
enabled = false
"""


def _codex(*words: str) -> list[str]:
    return ["exec", "--skip-git-repo-check", *words]


def _opencode_config(url: str) -> str:
    model = {"name": "model", "limit": {"context": 131072, "output": 1000}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "vLLM",
        "options": {"baseURL": f"{url}/v1", "apiKey": KEY},
        "models": {"model": model},
    }
    config = {"model": "vllm/model", "small_model": "vllm/model", "autoupdate": False}
    return json.dumps({**config, "share": "disabled", "provider": {"vllm": provider}})


CLIENTS = (
    _sdk("OpenAI SDK, chat", "openai_chat.py"),
    _sdk("OpenAI SDK, chat streamed", "openai_chat.py", "stream"),
    _sdk("OpenAI SDK, responses", "openai_responses.py"),
    _sdk("OpenAI SDK, responses stored", "openai_responses.py", "stored"),
    _sdk("Anthropic SDK", "anthropic_messages.py"),
    _sdk("Anthropic SDK, streamed", "anthropic_messages.py", "stream"),
    _sdk("LangGraph", "langgraph_agent.py"),
    Client(
        "mini-swe-agent", "lineage", INSTALLED / "mini" / "bin" / "mini", _mini, None, _mini_env,
        says="Saved trajectory",
    ),
    Client(
        "Claude Code", "claude-code", _cli("claude"),
        _claude, lambda task: [*_claude(task), "--continue"], _claude_env,
        has_helpers=True,
    ),
    Client(
        "Codex", "codex", _cli("codex"),
        _codex, lambda task: _codex("resume", "--last", task), _openai,
        lambda url: {".codex/config.toml": _CODEX_CONFIG.format(url=url)},
    ),
    Client(
        "OpenCode", "vllm", _cli("opencode"),
        lambda task: ["run", task], lambda task: ["run", "--continue", task],
        lambda url: {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_LSP_DOWNLOAD": "1"},
        lambda url: {".config/opencode/opencode.json": _opencode_config(url)},
        has_helpers=True,
    ),
)  # fmt: skip
