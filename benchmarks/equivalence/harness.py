"""lm-evaluation-harness, in a virtual environment of its own, against a running server."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.equivalence import compare, tasks
from benchmarks.live import environments
from benchmarks.live.process import ServerError

VERSION = "0.4.13"
#: The tenant that our gateway would name for the harness' calls.
TENANT = "harness"
SESSION = "lm-eval"
#: Ends the name of a part whose requests name a session.
NAMED = "-session"
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Part:
    """One call of the harness: its model and tasks, and whether its requests name a session."""

    model: str
    tasks: tuple[str, ...]
    named: bool

    @property
    def name(self) -> str:
        return f"{self.model}{NAMED * self.named}"

    @property
    def _path(self) -> str:
        return "chat/completions" if "chat" in self.model else "completions"

    def arguments(self, url: str, model: Path, concurrent: int) -> list[str]:
        """`lm_eval run` with all but where tasks and samples are."""
        headers = {"x-tenant-id": TENANT} | ({"X-Session-ID": SESSION} if self.named else {})
        settings: dict[str, Any] = {
            "base_url": f"{url}/v1/{self._path}", "model": "model", "num_concurrent": concurrent,
            "max_retries": 1, "timeout": _TIMEOUT_S, "header": headers, "max_length": 3072,
        }  # fmt: skip
        chat: tuple[str, ...] = ()
        if "chat" in self.model:
            chat = ("--apply_chat_template", "--fewshot_as_multiturn", "true")
        else:
            settings |= {"tokenizer_backend": "huggingface", "tokenizer": str(model)}
        return [
            "run", "--model", self.model, "--model_args", json.dumps(settings),
            "--tasks", ",".join(self.tasks), *chat, "--log_samples",
        ]  # fmt: skip


COMPLETIONS = ("local-completions", (tasks.CHOICE, tasks.TEXT))
CHAT = ("local-chat-completions", (tasks.CHAT,))
#: With a session id and without: both kinds of calls are held, each for its own reasons.
PARTS = tuple(Part(*what, named) for named in (False, True) for what in (COMPLETIONS, CHAT))


async def install() -> Path:
    """Its executable, installed if it is not there yet.

    Raises:
        InstallFailed: pip did not manage.
    """
    venv = environments.KEPT / f"lm-eval-{VERSION}"
    # Only for its tokenizers: the harness' API models need no torch.
    wanted = (f"lm-eval[api]=={VERSION}", "transformers>=4.50")
    return await environments.make(venv, wanted) / "lm_eval"


async def run(
    part: Part, executable: Path, url: str, model: Path, made: Path, folder: Path, concurrent: int
) -> compare.Results:
    """Run a part; its log and samples are kept in `folder`. made: where the tasks are.

    Raises:
        ServerError: the harness has failed; says the last line of its log.
        NoSamples: it has left nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "lm-eval.log"
    command = part.arguments(url, model, concurrent)
    command += ["--include_path", str(made), "--output_path", str(folder)]
    cache = str(environments.KEPT / f"lm-eval-{VERSION}" / "cache")
    env = os.environ | {
        "HF_HOME": cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            str(executable), *command, stdout=out, stderr=asyncio.subprocess.STDOUT, env=env
        )
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if status:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise ServerError(f"lm_eval ({part.name}) failed: {last}\nits log: {log}")
    return compare.read(folder)
