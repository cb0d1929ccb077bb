"""Which tools a call's output calls, by the formats models write tool calls in.

The text is a model's, so it is untrusted: only its tail is read, and every pattern of ours is made
of literals and bounded classes, so that none can backtrack for long.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

#: Characters that are read, from the end of the output.
MAX_TEXT = 4096
MAX_CALLS = 32

#: What a model writes before stays a thought, and calls nothing.
THOUGHT_ENDS = "</think>"

_NAME = r"([A-Za-z_][\w.:/-]{0,127})"
_QUOTED = r'\s{0,9}:\s{0,9}"([^"\\\n]{1,128})"'


class ToolFormatError(ValueError):
    """A pattern for tool names that cannot be used; the message names it."""


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written: group 1 of every match of `pattern` is a tool's name.

    Only text that holds `marker` is searched, and only if `whole` (if given) matches all of it.
    """

    pattern: re.Pattern[str]
    marker: str = ""
    whole: re.Pattern[str] | None = None

    def find(self, text: str) -> list[tuple[int, str]]:
        """(place, name) of each call in `text`."""
        if self.marker not in text or (self.whole and not self.whole.search(text)):
            return []
        found = []
        for match in self.pattern.finditer(text):
            if match[1]:
                found.append((match.start(1), match[1]))
                if len(found) == MAX_CALLS:
                    break
        return found


def _format(pattern: str, marker: str, whole: str | None = None) -> ToolFormat:
    return ToolFormat(re.compile(pattern), marker, re.compile(whole) if whole else None)


FORMATS: Mapping[str, ToolFormat] = {
    # Hermes and Qwen's JSON, Llama 3's JSON, Mistral's list of objects.
    "json": _format(
        r'\{\s{0,9}(?:"type"\s{0,9}:\s{0,9}"function"\s{0,9},\s{0,9})?"name"'
        + _QUOTED
        + r'\s{0,9},\s{0,9}"(?:arguments|parameters)"',
        '"name"',
    ),
    "json, name only or first": _format(r'<tool_call>\s{0,9}\{\s{0,9}"name"' + _QUOTED, '"name"'),
    "json, name last": _format(r'"name"' + _QUOTED + r"\s{0,9}\}\s{0,9}</tool_call>", '"name"'),
    # Qwen3-Coder's XML, Llama's user-defined functions.
    "function": _format(r"<function=([^>\s]{1,128})>", "<function="),
    # GLM 4.5: the bare name, then <arg_key>.
    "glm": _format(r"<tool_call>\s{0,9}" + _NAME, "<tool_call>"),
    "mistral": _format(r"\[TOOL_CALLS\]\s{0,9}" + _NAME, "[TOOL_CALLS]"),
    "deepseek": _format(
        r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?\s{0,9}" + _NAME, "<｜tool▁call▁begin｜>"
    ),
    # DeepSeek V3.2 (DSML), MiniMax M2.
    "invoke": _format(r'(?:<|｜DSML｜)invoke name="([^"\n]{1,128})"', "invoke name="),
    "kimi": _format(
        r"<\|tool_call_begin\|>\s{0,9}(?:functions\.)?([A-Za-z_][\w./-]{0,127})",
        "<|tool_call_begin|>",
    ),
    "harmony": _format(r" to=functions\.([\w.-]{1,128})", " to=functions."),
    # Llama 4: nothing but a list of calls.
    "pythonic": _format(
        r"(?:\[|\),\s{0,9})([A-Za-z_][\w.]{0,127})\((?=\)|[A-Za-z_]\w{0,127}=)",
        "[",
        r"\A\s{0,9}(?:<\|[\w]{1,32}\|>)?\[[A-Za-z_][\w.]{0,127}\(",
    ),
}
#: SWE-agent's and mini-swe-agent's convention, where no other format is found.
FENCE = "```"
BASH_BLOCK = _format(FENCE + r"(?:mswea_)?(bash)(?=[\s_])", FENCE)


class ToolNames:
    """Reads the names of tools from the text of finished calls.

    Args:
        patterns: further formats, name → regular expression with one group, the tool's name. They
            are the operator's own: what they cost is theirs to judge.

    Raises:
        ToolFormatError: a pattern that is no regular expression, or has not one group.
    """

    def __init__(self, patterns: Mapping[str, str] | None = None) -> None:
        own = [_own_format(name, pattern) for name, pattern in (patterns or {}).items()]
        self._formats = (*FORMATS.values(), *own)

    def read(self, text: str) -> tuple[str, ...]:
        """Names of the tools that `text` calls, in their order; at most 32."""
        text = text[-MAX_TEXT:].rpartition(THOUGHT_ENDS)[2]
        found = {place: name for form in self._formats for place, name in form.find(text)}
        if not found:
            found = dict(BASH_BLOCK.find(text)[-1:])
        return tuple(found[place] for place in sorted(found))[:MAX_CALLS]


def _own_format(name: str, pattern: str) -> ToolFormat:
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ToolFormatError(f"tool pattern {name!r} = {pattern!r}: {error}") from error
    if compiled.groups != 1:
        raise ToolFormatError(
            f"tool pattern {name!r} = {pattern!r}: it needs one group, the tool's name, "
            f"and has {compiled.groups}"
        )
    return ToolFormat(compiled)
