"""Whether the names of tools can be read from what a tool parser of vLLM reads."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_saga.doctor.findings import Finding, ok, problem, warning
from vllm_saga.policy.tools import ToolNames

_CHECK = "tool parser"
_OBJECT = '{"name": "find", "arguments": {}}'
_CODER = "<tool_call>\n<function=find>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
_GLM = "<tool_call>find\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"

#: A call of the tool "find" as the models write it for which vLLM has these parsers.
SAMPLES: Mapping[str, str] = {
    "hermes": f"<tool_call>\n{_OBJECT}\n</tool_call>",
    "qwen3_json": f"<tool_call>\n{_OBJECT}\n</tool_call>",
    "qwen3_coder": _CODER,
    "qwen3_xml": _CODER,
    "llama3_json": '{"name": "find", "parameters": {}}',
    "llama4_json": '{"name": "find", "parameters": {}}',
    "llama4_pythonic": "[find(a=1)]",
    "pythonic": "[find(a=1)]",
    "mistral": '[TOOL_CALLS]find{"a": 1}',
    "deepseek_v3": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{}\n```",
    "deepseek_v31": "<｜tool▁call▁begin｜>find<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="find">\n',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="find">\n</invoke>\n</minimax:tool_call>',
    "glm45": _GLM,
    "glm47": _GLM,
    "kimi_k2": "<|tool_call_begin|>functions.find:0<|tool_call_argument_begin|>{}",
    "openai": "<|channel|>commentary to=functions.find <|constrain|>json<|message|>{}",
    "granite": f"<|tool_call|>[{_OBJECT}]",
    "internlm": '<|action_start|><|plugin|>{"name": "find", "parameters": {}}<|action_end|>',
    "jamba": f"<tool_calls>[{_OBJECT}]</tool_calls>",
    "hunyuan_a13b": f"<tool_calls>[{_OBJECT}]</tool_calls>",
    "phi4_mini_json": f"functools[{_OBJECT}]",
    "xlam": f"[{_OBJECT}]",
}


def check_parser(name: str, patterns: Mapping[str, str]) -> Finding:
    """name: as `--tool-call-parser` takes it; patterns: the operator's own (`tool_patterns`)."""
    sample = SAMPLES.get(name)
    if sample is not None and ToolNames(patterns).read(sample) == ("find",):
        return ok(_CHECK, f"{name}: names of tools are read from outputs")
    known = _registered()
    if known and name not in known:
        return problem(_CHECK, f"this vLLM has no parser {name!r}", f"It has {', '.join(known)}.")
    return warning(
        _CHECK,
        f"{name}: not known to be read",
        "Gaps are then learned of all calls together, which works, less precisely. Add the format "
        "to tool_patterns, or compare `vllm-saga graph show` with the tools of your agents.",
    )


def _registered() -> list[str]:
    try:
        from vllm.tool_parsers import ToolParserManager

        return list(ToolParserManager.list_registered())
    except Exception:  # another check says that vLLM cannot be imported
        return []
