"""Prompts as text in which every token is one word: routers that read prompts can read them too.

Each id has a word of four ASCII characters, about what a token of English has; the tokenizer made
here splits text into just these, so that text and ids are the same thing in two spellings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

WIDTH = 4
_LETTERS = len(ascii_lowercase)


def word(token: int) -> str:
    """The word of a token id."""
    letters = ""
    for _ in range(WIDTH - 1):
        token, letter = divmod(token, _LETTERS)
        letters = ascii_lowercase[letter] + letters
    return letters + " "


def write(tokens: Sequence[int]) -> str:
    """Token ids as text."""
    return "".join(map(word, tokens))


def read(text: str) -> list[int]:
    """The token ids of a text. Raises ValueError where it is not made of words."""
    tokens = []
    for start in range(0, len(text), WIDTH):
        token = 0
        for letter in text[start : start + WIDTH - 1]:
            token = token * _LETTERS + ascii_lowercase.find(letter)
        tokens.append(token)
        if text[start : start + WIDTH] != word(token):
            raise ValueError(f"no word: {text[start : start + WIDTH]!r}")
    return tokens


def tokenizer(vocabulary: int) -> Tokenizer:
    made = Tokenizer(
        models.WordLevel({word(token): token for token in range(vocabulary)}, unk_token=word(0))
    )
    pattern = Regex(f"[a-z]{{{WIDTH - 1}}} ")
    made.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    made.decoder = decoders.Fuse()
    return made


def make_model(model: Path, folder: Path) -> Path:
    """A copy of a model directory (without weights) that reads and writes these words."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    for name in ("config.json", "generation_config.json"):
        shutil.copy(model / name, folder / name)
    tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder
