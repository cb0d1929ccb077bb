"""Which tools a finished request's output calls, read from its tokens; never an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.logger import init_logger

from vllm_saga.policy.tools import FENCE, FORMATS, THOUGHT_ENDS, ToolNames

logger = init_logger("vllm.saga")

# Tokens before a call, or before the message that is one, besides those that the formats name
# (Llama, gpt-oss, MiniMax M2, DeepSeek V3.2).
_MORE_MARKERS = ("<|python_tag|>", "<|start|>", "<|channel|>", "<minimax:tool_call>", "｜DSML｜")
# A call's name stands within so many tokens of its marker.
_AFTER_MARKER = 24
_MAX_MARKERS = 4
# Outputs that are a call from their first sign on: Llama's JSON, lists of calls.
_OPENINGS = ("{", "[", "<")
_FIRST = 4
_HEAD = 64
_TAIL = 192
# Markers are looked for in so many last tokens.
_SCANNED = 8192


class ToolReader:
    """Decodes as little of an output as names its tools.

    Most models mark a call with a token of its own ("<tool_call>", "[TOOL_CALLS]"; "```" near the
    end). It is found among the ids, and only 24 tokens from each of the last four on are decoded: a
    call that writes a long file costs hardly more than a short one. Of an output without a marker
    four tokens show whether it is a call all the same. Only if it may be one, or the vocabulary or
    the operator's patterns leave that open, are 256 tokens decoded, at both ends.

    Args:
        model_config: vLLM's, which names the tokenizer. It is loaded at the first call, and costs
            little then: the engine's structured outputs have it in vLLM's cache already.
        patterns: further formats of tool calls (`policy.tools.ToolNames`).
    """

    def __init__(self, model_config: Any, patterns: Mapping[str, str] | None = None) -> None:
        self._model_config = model_config
        self._names = ToolNames(patterns)
        self._marks_all = not patterns
        self._markers: tuple[int, ...] = ()
        self._fences: frozenset[int] = frozenset()
        self._thought_ends: int | None = None
        self._tokenizer: Any = None
        self._loaded = False

    def names(self, output_token_ids: Sequence[int]) -> tuple[str, ...] | None:
        """Tools that the output calls, in order; None where it cannot be read."""
        try:
            if not self._loaded:
                self._load()
            if self._tokenizer is None:
                return None
            tokens = self._after_thought(list(output_token_ids[-_SCANNED:]))
            marked = self._marked(tokens)
            if marked and (names := self._names.read(self._decode(marked))):
                return names
            if self._marks_all and not self._opens_as_call(tokens):
                return ()
            ends = tokens[:_HEAD] + tokens[_HEAD:][-_TAIL:]
            return self._names.read(self._decode(ends))
        except Exception:
            self._tokenizer = None
            logger.exception("saga: outputs cannot be decoded; tools stay unknown from here on")
            return None

    def _load(self) -> None:
        self._loaded = True
        from vllm.tokenizers import cached_tokenizer_from_config

        tokenizer = cached_tokenizer_from_config(model_config=self._model_config)
        if tokenizer is None:
            logger.info("saga: the engine runs without a tokenizer, so tools stay unknown")
            return
        vocabulary = tokenizer.get_vocab()
        # "[" is a word like others, and begins an output where it marks a call.
        markers = {form.marker for form in FORMATS.values() if len(form.marker) > 1}
        known = [text for text in sorted({*markers, *_MORE_MARKERS}) if text in vocabulary]
        self._markers = tuple(vocabulary[text] for text in known)
        self._fences = frozenset(token for text, token in vocabulary.items() if FENCE in text)
        self._marks_all = self._marks_all and bool(self._fences)
        self._thought_ends = vocabulary.get(THOUGHT_ENDS)
        self._tokenizer = tokenizer

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def _opens_as_call(self, tokens: list[int]) -> bool:
        return self._decode(tokens[:_FIRST]).lstrip().startswith(_OPENINGS)

    def _after_thought(self, tokens: list[int]) -> list[int]:
        places = _places(tokens, self._thought_ends)
        return tokens[places[-1] + 1 :] if places else tokens

    def _marked(self, tokens: list[int]) -> list[int]:
        """The tokens from each marker on; what two markers have in common once."""
        starts = sorted(place for marker in self._markers for place in _places(tokens, marker))
        if not starts:
            tokens = tokens[-_TAIL:]
            starts = [place for place, token in enumerate(tokens) if token in self._fences]
        out: list[int] = []
        end = 0
        for start in starts[-_MAX_MARKERS:]:
            out += tokens[max(start, end) : start + _AFTER_MARKER]
            end = start + _AFTER_MARKER
        return out


def _places(tokens: list[int], wanted: int | None) -> list[int]:
    """Where `wanted` stands in `tokens`."""
    found: list[int] = []
    if wanted is None:
        return found
    try:
        while True:
            found.append(tokens.index(wanted, found[-1] + 1 if found else 0))
    except ValueError:
        return found
