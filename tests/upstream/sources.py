"""vLLM's own tests, what they need to run offline, and a copy of vLLM with our patches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
CACHE = REPO / ".cache" / "upstream"


class SourceError(Exception):
    """The tests or a stand-in model could not be made; the message says what to do."""


def clean_environment() -> dict[str, str]:
    """Ours, without what would change how a run of tests goes: offline, and no settings of saga."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SAGA_", "PYTEST_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def fetch_tests(version: str) -> Path:
    """The directory that holds `tests/` of this vLLM version, from its sdist on PyPI."""
    target = CACHE / f"vllm-{version}"
    if not target.exists():
        sdist = fetch_sdist(version)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            extract(sdist, Path(scratch), lambda name: name.startswith("tests/"))
            (Path(scratch) / f"vllm-{version}").rename(target)
    return target


def fetch_sdist(version: str) -> Path:
    """The source distribution of this vLLM version, from PyPI."""
    target = CACHE / f"vllm-{version}.tar.gz"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            _download_sdist(version, Path(scratch)).rename(target)
    return target


def extract(sdist: Path, out: Path, is_wanted: Callable[[str], bool]) -> Path:
    """Unpack the files wanted, and pyproject.toml; returns their root, `out/vllm-<version>`.

    is_wanted: of a name such as `tests/v1/core/utils.py`.
    """

    def chosen(name: str) -> bool:
        name = name.partition("/")[2]
        return name == "pyproject.toml" or is_wanted(name)

    with tarfile.open(sdist) as archive:
        wanted = [member for member in archive if chosen(member.name)]
        archive.extractall(out, wanted, filter="data")
    return out / sdist.name.removesuffix(".tar.gz")


def has_patches(version: str) -> bool:
    """Whether patches/ has a series for this version."""
    return (REPO / "patches" / f"vllm-{'.'.join(version.split('.')[:2])}").is_dir()


def make_patched_copy(out: Path, package: Path, tests: Path) -> Path:
    """A folder with the package `vllm/`, vLLM's `tests/`, and our patches applied to both.

    Files that the patches leave alone are links.

    Args:
        package: the folder of the package, for example of the installed one.
        tests: the folder that holds `tests/` and `pyproject.toml`.
    """
    shutil.copytree(package, out / "vllm", copy_function=os.symlink)
    shutil.copytree(tests / "tests", out / "tests", copy_function=os.symlink)
    shutil.copy(tests / "pyproject.toml", out)
    command = [sys.executable, str(REPO / "scripts" / "patch-vllm"), "apply", "--target", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SourceError(f"the patches do not apply:\n{done.stderr}")
    return out


def _download_sdist(version: str, scratch: Path) -> Path:
    # pip runs the sdist's setup.py before it hands the file over, and that needs two build tools.
    tools = scratch / "build-tools"
    _pip("install", "--target", str(tools), "setuptools-rust", "setuptools-scm")
    _pip(
        *("download", "--dest", str(scratch), "--no-deps", "--no-build-isolation"),
        *("--no-binary", "vllm", f"vllm=={version}"),
        env={
            "PYTHONPATH": str(tools),
            "VLLM_TARGET_DEVICE": "empty",
            "VLLM_VERSION_OVERRIDE": version,
        },
    )
    found = list(scratch.glob("vllm-*.tar.gz"))
    if len(found) != 1:
        raise SourceError(f"pip downloaded no source distribution of vLLM {version}")
    return found[0]


def _pip(*args: str, env: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", *args]
    done = subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True)
    if done.returncode:
        log = CACHE / "pip.log"
        log.write_text(done.stdout + done.stderr)
        raise SourceError(
            f"'pip {args[0]}' failed, so vLLM's tests cannot be had (they come from its source "
            f"distribution on PyPI); pip's output: {log.relative_to(REPO)}"
        )


_OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "activation_function": "relu",
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "torch_dtype": "float16",
}
_QWEN: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
# llava and Qwen-VL need torchvision. BAGEL, set to llava's 576 tokens for an image, does not,
# and the scheduler tests ask nothing more of a multimodal model.
_IMAGES: dict[str, Any] = {
    "architectures": ["BagelForConditionalGeneration"],
    "model_type": "bagel",
    "torch_dtype": "float16",
    "vit_max_num_patch_per_side": 24,
    "llm_config": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 32064,
    },
    "vit_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
}
# The tests read configurations, never weights.
STAND_INS: dict[str, dict[str, Any]] = {
    "facebook/opt-125m": _OPT
    | {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "facebook/opt-350m": _OPT
    | {
        "hidden_size": 1024,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "Qwen/Qwen3-0.6B": _QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "head_dim": 128,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen1.5-7B": _QWEN
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "llava-hf/llava-1.5-7b-hf": _IMAGES,
    "Qwen/Qwen2.5-VL-3B-Instruct": _IMAGES,
}


def make_stand_ins() -> Path:
    """Model directories for the names the tests use; returns a map for VLLM_MODEL_REDIRECT_PATH."""
    models = CACHE / "models"
    shutil.rmtree(models, ignore_errors=True)
    redirects = {}
    for name, config in STAND_INS.items():
        folder = models / name.replace("/", "--")
        if config is _IMAGES:
            _run_make_model(folder)  # a multimodal processor insists on a tokenizer
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        redirects[name] = str(folder)
    redirect_file = models / "redirects.json"
    redirect_file.write_text(json.dumps(redirects, indent=2))
    return redirect_file


def _run_make_model(folder: Path) -> None:
    command = [sys.executable, str(REPO / "scripts" / "make-model"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SourceError(f"scripts/make-model failed:\n{done.stderr}")
