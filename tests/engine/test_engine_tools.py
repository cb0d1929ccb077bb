"""Names of tools out of a request's output tokens."""

from __future__ import annotations

import random
import time

import pytest
import vllm.tokenizers

from vllm_saga.engine.tools import ToolReader

CALL = '<tool_call>{"name": "find", "arguments": {"path": "/"}}</tool_call>'


class Words:
    """A tokenizer whose tokens are single signs, but for the markers that it is given."""

    def __init__(self, *markers: str) -> None:
        signs = [chr(code) for code in range(32, 127)] + ["\n"]
        self.tokens = [*signs, *markers]
        self.decoded = 0

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def encode(self, text: str) -> list[int]:
        out, vocabulary = [], self.get_vocab()
        while text:
            token = max((t for t in self.tokens if text.startswith(t)), key=len)
            out.append(vocabulary[token])
            text = text[len(token) :]
        return out

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        self.decoded += len(ids)
        return "".join(self.tokens[index] for index in ids)


@pytest.fixture
def reader(monkeypatch):
    def make(tokenizer, patterns=None):
        monkeypatch.setattr(
            vllm.tokenizers, "cached_tokenizer_from_config", lambda model_config: tokenizer
        )
        return ToolReader(None, patterns)

    return make


def test_a_marked_call_is_found_wherever_it_stands(reader):
    words = Words("<tool_call>", "</tool_call>", "```", "</think>")
    read = reader(words)
    long = CALL.replace("/", "x" * 3000)
    for text in (CALL, "Let me see. " * 50 + CALL, long, "y" * 6000 + long):
        words.decoded = 0
        assert read.names(words.encode(text)) == ("find",)
        assert words.decoded <= 4 * 24


def test_parallel_calls_come_in_order(reader):
    words = Words("<tool_call>", "```")
    calls = '<tool_call>{"name": "b", "argu' + "." * 30 + '<tool_call>{"name": "a", "argu'
    assert reader(words).names(words.encode(calls)) == ("b", "a")


def test_thoughts_do_not_count(reader):
    words = Words("<tool_call>", "</tool_call>", "```", "</think>")
    read = reader(words)
    assert read.names(words.encode(f"{CALL}</think>It is done.")) == ()
    assert read.names(words.encode(f"hm</think>{CALL}")) == ("find",)


def test_an_answer_is_hardly_decoded(reader):
    words = Words("<tool_call>", "```")
    read = reader(words)
    assert read.names(words.encode("It is done. " * 200)) == ()
    assert words.decoded <= 4


def test_calls_without_a_marker(reader):
    words = Words("```")
    read = reader(words)
    assert read.names(words.encode('{"name": "ls", "parameters": {}}')) == ("ls",)
    assert read.names(words.encode(f'[ls(path="{"x" * 900}")]')) == ("ls",)
    assert read.names(words.encode("THOUGHT\n" * 60 + "```bash\nls\n```")) == ("bash",)
    assert reader(Words()).names(words.encode("Now: CALL")) == ()
    assert reader(words, {"own": "CALL (\\w+)"}).names(words.encode("x" * 500 + "CALL ls")) == (
        "ls",
    )


def test_no_tokenizer_means_not_known(reader):
    read = reader(None)
    assert read.names([1, 2, 3]) is None
    assert read.names([]) is None


@pytest.mark.parametrize("broken", ["get_vocab", "decode"])
def test_a_broken_tokenizer_raises_nothing(reader, broken, monkeypatch):
    words = Words("<tool_call>")

    def fail(*args, **kwargs):
        raise KeyError("out of the vocabulary")

    monkeypatch.setattr(words, broken, fail)
    read = reader(words)
    assert read.names(words.encode(CALL) if broken == "decode" else [1]) is None
    assert read.names([1]) is None


def test_empty_outputs_call_nothing(reader):
    assert reader(Words("```")).names([]) == ()


def test_long_outputs_are_quickly_read(reader):
    words, rng = Words("<tool_call>", "```"), random.Random(1)
    read = reader(words)
    read.names([])
    tokens = [rng.randrange(95) for _ in range(100_000)]
    began = time.process_time()
    for _ in range(20):
        assert read.names(tokens) is not None
    assert (time.process_time() - began) / 20 < 0.01
