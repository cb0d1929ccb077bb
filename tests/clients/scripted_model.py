"""Makes a model small enough for two cores whose weights follow a script, so that agents act.

Real clients want answers that mean something: a call of the tool they offer, then a last word. The
chat template ends each prompt in the start token of a script, and the weights do nothing but lead
from one of its tokens to the next: the layers add zero, and the output row of a token is the
embedding of the token before it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer

MAKE_MODEL = Path(__file__).parents[2] / "scripts" / "make-model"
#: One narrow head: Claude Code alone asks for 58,000 tokens of attention.
HIDDEN, HEAD = 128, 32
#: Shortest piece of a script that is a token: a call then comes in several deltas.
PIECE_CHARS = 6

LAST_WORD = "I have looked, and all is well."
#: The tool of each client, and what the model calls it with.
CALLS: Mapping[str, Mapping[str, object]] = {
    "look_up": {"city": "Rome"},
    "Bash": {"command": "echo seen", "description": "Look around"},
    "bash": {"command": "echo seen", "description": "Look around"},
    "exec_command": {"cmd": "echo seen"},
    "shell": {"command": ["echo", "seen"]},
}
#: A task that holds these words goes to a sub-agent, where the client offers one of these tools.
DELEGATE = "Send a helper."
_HELP = {"description": "Look", "prompt": "Look for me."}
HELPERS: Mapping[str, Mapping[str, object]] = {
    "Agent": {**_HELP, "subagent_type": "general-purpose"},
    "task": {**_HELP, "subagent_type": "general"},
}
#: mini-swe-agent's way to say that it is done.
SUBMIT = {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"}

TEMPLATE = Template(
    """\
{{ bos_token -}}
{% for tool in tools or [] -%}
<|turn|>tool {{ tool | tojson }}
{% endfor -%}
{% set now = namespace(looked=false, submits=false, delegates=false, start="say") -%}
{% for message in messages -%}
<|turn|>{{ message.role }}
{% if message.content is string %}{% set text = message.content -%}
{% else %}{% set text = message.content | default([], true) | map(attribute="text") | join -%}
{% endif -%}
{{ text -}}
{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor -%}
<|end|>
{% if message.role == "tool" %}{% set now.looked = true -%}
{% elif message.role == "assistant" %}{% set now.looked = false -%}
{% elif message.role == "user" and "$delegate" in text %}{% set now.delegates = true -%}
{% endif -%}
{% if "COMPLETE_TASK" in text %}{% set now.submits = true %}{% endif -%}
{% endfor -%}
{% set wanted = $helpers if now.delegates else $calls -%}
{% for tool in tools or [] if tool.function.name in wanted -%}
{% if not now.looked %}{% set now.start = tool.function.name -%}
{% elif now.submits %}{% set now.start = "submit" -%}
{% endif -%}
{% endfor -%}
{% if add_generation_prompt -%}
<|turn|>assistant
<|{{ now.start }}|>
{%- endif %}"""
).substitute(calls=json.dumps([*CALLS]), helpers=json.dumps([*HELPERS]), delegate=DELEGATE)


def scripts() -> dict[str, str]:
    """What the model says behind each start token."""
    calls = {**CALLS, **HELPERS, "submit": SUBMIT}
    made = {"say": LAST_WORD}
    for start, arguments in calls.items():
        call = {"name": "bash" if start == "submit" else start, "arguments": arguments}
        made[start] = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    return made


def pieces(text: str, rests: dict[str, str | None]) -> Iterator[str]:
    """Cuts `text` into tokens, and notes in `rests` what follows each: always the same.

    Raises:
        ValueError: two scripts do not go together.
    """
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS if len(text) - start >= 2 * PIECE_CHARS else len(text)
        while rests.get(text[start:end], text[end:]) != text[end:]:
            if end == len(text):
                raise ValueError(f"{text[start:]!r} has another meaning in another script")
            end += 1
        rests[text[start:end]] = text[end:]
        yield text[start:end]
        start = end


def add_scripts(tokenizer: Tokenizer) -> dict[int, int]:
    """Adds the tokens of all scripts; gives the successor of each."""
    after: dict[int, int] = {}
    rests: dict[str, str | None] = dict.fromkeys(tokenizer.get_vocab())
    for start, text in scripts().items():
        tokenizer.add_tokens([AddedToken(f"<|{start}|>", special=True, normalized=False)])
        last = tokenizer.token_to_id(f"<|{start}|>")
        for piece in pieces(text, rests):
            tokenizer.add_tokens([AddedToken(piece, normalized=False)])
            after[last] = last = tokenizer.token_to_id(piece)
        after[last] = tokenizer.token_to_id("<|eos|>")
    return after


def weights(after: Mapping[int, int], vocab: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    embedded = draw.choice(np.array([-1, 1], np.float32), (vocab, HIDDEN))
    output = np.zeros((vocab, HIDDEN), np.float32)
    for token, successor in after.items():
        output[successor] += embedded[token]
    narrow = np.zeros((HEAD, HIDDEN), np.float32)
    wide = np.zeros((4 * HIDDEN, HIDDEN), np.float32)
    layer = "model.layers.0."
    ones = np.ones(HIDDEN, np.float32)
    return {
        "model.embed_tokens.weight": embedded,
        "lm_head.weight": output,
        "model.norm.weight": ones,
        f"{layer}input_layernorm.weight": ones,
        f"{layer}post_attention_layernorm.weight": ones,
        f"{layer}self_attn.q_proj.weight": narrow,
        f"{layer}self_attn.k_proj.weight": narrow.copy(),
        f"{layer}self_attn.v_proj.weight": narrow.copy(),
        f"{layer}self_attn.o_proj.weight": narrow.T.copy(),
        f"{layer}mlp.gate_proj.weight": wide,
        f"{layer}mlp.up_proj.weight": wide.copy(),
        f"{layer}mlp.down_proj.weight": wide.T.copy(),
    }


def make(folder: Path) -> None:
    """Writes the model's directory."""
    shape = {"--hidden": HIDDEN, "--heads": 1, "--kv-heads": 1, "--layers": 1}
    flags = [str(word) for pair in shape.items() for word in pair]
    command = [sys.executable, str(MAKE_MODEL), str(folder), "--dtype", "float32", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    after = add_scripts(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _change(folder / "config.json", vocab_size=tokenizer.get_vocab_size(), head_dim=HEAD)
    _change(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    save_file(weights(after, tokenizer.get_vocab_size()), folder / "model.safetensors")


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")
