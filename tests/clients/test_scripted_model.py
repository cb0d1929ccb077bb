"""The model that real clients talk to: it says what its script says."""

from __future__ import annotations

import json

import jinja2
import pytest
import scripted_model
from safetensors.numpy import load_file
from scripted_model import CALLS, DELEGATE, HELPERS, LAST_WORD, SUBMIT
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    scripted_model.make(folder)
    return folder


def say(model, start: str) -> str:
    """Greedy decoding of a model whose layers add nothing."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tensors = load_file(model / "model.safetensors")
    token, said = tokenizer.token_to_id(start), []
    while (
        token := int(
            (tensors["lm_head.weight"] @ tensors["model.embed_tokens.weight"][token]).argmax()
        )
    ) != tokenizer.token_to_id("<|eos|>"):
        said.append(token)
        assert len(said) < 100
    return tokenizer.decode(said)


def start_of(model, messages, tools=()) -> str:
    """The last token of the prompt that the chat template makes."""
    template = json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    offered = [{"type": "function", "function": {"name": name}} for name in tools]
    prompt = environment.from_string(template).render(
        messages=messages, tools=offered, add_generation_prompt=True, bos_token="<|bos|>"
    )
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return tokenizer.id_to_token(tokenizer.encode(prompt).ids[-1])


@pytest.mark.parametrize("tool, arguments", [*CALLS.items(), *HELPERS.items()])
def test_each_script_is_a_whole_tool_call(model, tool, arguments):
    said = say(model, f"<|{tool}|>")
    call = json.loads(said.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call == {"name": tool, "arguments": arguments}


def test_the_last_word(model):
    assert say(model, "<|say|>") == LAST_WORD
    assert json.dumps(SUBMIT) in say(model, "<|submit|>")


TASK = {"role": "user", "content": "Look."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "Bash"}}]}
RESULT = {"role": "tool", "content": [{"type": "text", "text": "seen"}]}
REMINDER = {"role": "user", "content": "By the way."}
SUBMITS = {"role": "user", "content": "End with COMPLETE_TASK."}
DELEGATES = {"role": "user", "content": DELEGATE}


@pytest.mark.parametrize(
    "messages, tools, start",
    [
        ([TASK], [], "say"),
        ([TASK], ["other"], "say"),
        ([TASK], ["other", "Bash"], "Bash"),
        ([TASK, CALL, RESULT], ["Bash"], "say"),
        ([TASK, CALL, RESULT, REMINDER], ["Bash"], "say"),
        ([TASK, CALL, RESULT, CALL, TASK], ["Bash"], "Bash"),
        ([SUBMITS], ["bash"], "bash"),
        ([SUBMITS, CALL, RESULT], ["bash"], "submit"),
        ([DELEGATES], ["Agent", "Bash"], "Agent"),
        ([DELEGATES, CALL, RESULT], ["Agent", "Bash"], "say"),
    ],
)
def test_the_prompt_ends_in_the_script_that_the_client_s_turn_wants(model, messages, tools, start):
    assert start_of(model, messages, tools) == f"<|{start}|>"
