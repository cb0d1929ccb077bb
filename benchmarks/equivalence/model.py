"""A small model whose every answer depends on its whole context, with weights kept on disk.

`--load-format dummy` draws all weights from ±0.001: attention then adds so little to the residual
stream that the last token alone decides the next, and a wrong KV block would go unnoticed.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

_MAKE = Path(__file__).parents[2] / "scripts" / "make-model"
_WEIGHTS = "model.safetensors"
#: Standard deviation of attention scores: a few tokens of the context get most of the attention.
_SCORES = 4.0
#: Standard deviation of logits: log probabilities of some nats, and a clear first among 512.
_LOGITS = 8.0


class NotMade(RuntimeError):
    """scripts/make-model failed; the message has its output."""


def make(folder: Path, seed: int = 0) -> Path:
    """The model directory, made where it is not there yet: float32 weights of about 20 MB.

    Raises:
        NotMade: scripts/make-model failed; its output says why.
    """
    marker = folder / f"seed-{seed}"
    if marker.exists():
        return folder
    made = subprocess.run(
        [sys.executable, str(_MAKE), str(folder), "--dtype", "float32", "--max-len", "8192"],
        capture_output=True, text=True,
    )  # fmt: skip
    if made.returncode:
        raise NotMade(f"{_MAKE.name} failed: {made.stderr.strip()}")
    _write_weights(folder, seed)
    marker.touch()
    return folder


def _write_weights(folder: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    width, inner, vocabulary = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    head = config["head_dim"]
    queries, keys = (config[f"num_{name}_heads"] * head for name in ("attention", "key_value"))
    source = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        """Outputs of this standard deviation for inputs of 1."""
        deviation = scale / math.sqrt(columns)
        return torch.randn(rows, columns, generator=source) * deviation

    # A score is the sum of `head` products over sqrt(head): its deviation is the product of both.
    sharp = math.sqrt(_SCORES)
    weights = {
        "model.embed_tokens.weight": torch.randn(vocabulary, width, generator=source),
        "model.norm.weight": torch.ones(width),
        "lm_head.weight": random(vocabulary, width, _LOGITS),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        weights |= {
            f"{layer}.input_layernorm.weight": torch.ones(width),
            f"{layer}.post_attention_layernorm.weight": torch.ones(width),
            f"{layer}.self_attn.q_proj.weight": random(queries, width, sharp),
            f"{layer}.self_attn.k_proj.weight": random(keys, width, sharp),
            f"{layer}.self_attn.v_proj.weight": random(keys, width),
            f"{layer}.self_attn.o_proj.weight": random(width, queries),
            f"{layer}.mlp.gate_proj.weight": random(inner, width),
            f"{layer}.mlp.up_proj.weight": random(inner, width),
            f"{layer}.mlp.down_proj.weight": random(width, inner),
        }
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
