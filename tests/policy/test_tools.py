"""Names of tools out of what models write."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.tools import FORMATS, MAX_CALLS, MAX_TEXT, ToolFormatError, ToolNames

read = ToolNames().read

OUTPUTS = {
    "hermes": (
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"name": "x"}}\n'
        '</tool_call>\n<tool_call>{"arguments": {"name": "q"}, "name": "read"}</tool_call>',
        ("get_weather", "read"),
    ),
    "cut off": ('<tool_call>\n{"name": "write", "argu', ("write",)),
    "qwen3 coder": (
        "<tool_call>\n<function=str_replace>\n<parameter=path>\n/x\n</parameter>\n</function>",
        ("str_replace",),
    ),
    "llama 3 json": (
        '{"name": "ls", "parameters": {"p": "/"}}; {"name": "cat", "parameters": {}}',
        ("ls", "cat"),
    ),
    "llama 3 typed": (
        '<|python_tag|>{"type": "function", "name": "ls", "parameters": {}}',
        ("ls",),
    ),
    "pythonic": ('[get_weather(city="SF"), get_time()]', ("get_weather", "get_time")),
    "llama 4": ('<|python_start|>[ls(path="f(a), g(b)")]<|python_end|>', ("ls",)),
    "mistral": ('[TOOL_CALLS]bash[ARGS]{"a":1}[TOOL_CALLS]read{"b":2}', ("bash", "read")),
    "mistral, a list": (
        '[TOOL_CALLS] [{"name": "bash", "arguments": {}}, {"name":"read","arguments":{}}]',
        ("bash", "read"),
    ),
    "deepseek v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{}\n```",
        ("find",),
    ),
    "deepseek v3.1": (
        '<｜tool▁call▁begin｜>find<｜tool▁sep｜>{"a":1}<｜tool▁call▁end｜>',
        ("find",),
    ),
    "deepseek v3.2": ('<｜DSML｜function_calls>\n<｜DSML｜invoke name="find">', ("find",)),
    "minimax m2": ('<minimax:tool_call>\n<invoke name="find">', ("find",)),
    "glm 4.5": ("<tool_call>read_file\n<arg_key>p</arg_key>", ("read_file",)),
    "kimi k2": ("<|tool_call_begin|>functions.find:0<|tool_call_argument_begin|>{}", ("find",)),
    "gpt-oss": ("<|channel|>commentary to=functions.find <|constrain|>json", ("find",)),
    "mini-swe-agent": ("THOUGHT: run it\n\n```bash\npytest -x\n```\n", ("bash",)),
    "mini-swe-agent 2": ("```mswea_bash_command\nls\n```", ("bash",)),
    "only thought of": ("<think><tool_call>\n{}</tool_call></think>Done.", ()),
    "an answer": ('See [the page](http://x), f(x), {"name": "value"} and `code`.', ()),
    "other code": ("```python\nprint(1)\n```", ()),
    "nothing": ("", ()),
}


@pytest.mark.parametrize("text, expected", OUTPUTS.values(), ids=OUTPUTS)
def test_every_format(text, expected):
    assert read(text) == expected


def test_a_call_after_a_thought_counts():
    assert read("<think>[bad(x=1)]</think>\n<tool_call>good<arg_key>") == ("good",)


def test_patterns_of_the_operator():
    assert ToolNames({"mine": r"CALL (\w+)!"}).read("CALL ls! CALL cat!") == ("ls", "cat")


@pytest.mark.parametrize("pattern", ["(", "no group", r"(two) (groups)", 5])
def test_a_bad_pattern_is_named(pattern):
    with pytest.raises(ToolFormatError, match="'mine'"):
        ToolNames({"mine": pattern})


PIECES = [
    *(form.marker for form in FORMATS.values()),
    *(
        "{",
        "}",
        '"name"',
        '"',
        ":",
        " ",
        "\n",
        "a",
        "(",
        ")",
        ",",
        "[",
        "]",
        "=",
        "\\",
        "```bash\n",
    ),
]


@given(st.lists(st.sampled_from(PIECES), max_size=2000).map("".join))
def test_any_text_is_read_quickly_and_names_are_bounded(text):
    began = time.process_time()
    found = read(text)
    assert time.process_time() - began < 0.1
    assert len(found) <= MAX_CALLS
    assert all(0 < len(name) <= 128 and "\n" not in name for name in found)


@pytest.mark.parametrize("piece", [*PIECES, '{"name" : "', "), a(", "<tool_call> ", "[a(b=", '{ "'])
def test_repetition_costs_no_more_than_its_length(piece):
    text = (piece * MAX_TEXT)[: 4 * MAX_TEXT]
    began = time.process_time()
    read("[a(" + text)
    read(text)
    assert time.process_time() - began < 0.1


def test_only_the_tail_is_read():
    call = '<tool_call>{"name": "early", "arguments": {}}</tool_call>'
    assert read(call + " " * MAX_TEXT) == ()
    assert read(" " * 10 * MAX_TEXT + call) == ("early",)
