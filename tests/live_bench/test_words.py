"""Prompts as words: text and token ids are the same, for the tokenizer and for us."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks.live import words

VOCABULARY = 512
TOKENIZER = words.tokenizer(VOCABULARY)


@given(st.lists(st.integers(0, VOCABULARY - 1)))
def test_text_and_ids_are_the_same(tokens: list[int]) -> None:
    text = words.write(tokens)
    assert words.read(text) == tokens
    assert TOKENIZER.encode(text).ids == tokens
    assert TOKENIZER.decode(tokens) == text
    assert text.isascii() and len(text) == words.WIDTH * len(tokens)


@pytest.mark.parametrize("text", ["aaab", "aaa", "aa1 ", "aaa aaa", "\ufffd"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        words.read(text)


def test_a_model_that_reads_words(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {"vocab_size": 300, "max_position_embeddings": 1000, "hidden_size": 64}
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text("{}")
    made = words.make_model(model, tmp_path / "words")
    assert json.loads((made / "config.json").read_text()) == config
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.encode(words.write([0, 299, 7])).ids == [0, 299, 7]
