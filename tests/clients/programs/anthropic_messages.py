"""anthropic_messages.py HISTORY TASK [stream]: an agent on the Anthropic SDK."""

import json
import sys
from pathlib import Path

from anthropic import Anthropic

TOOL = {
    "name": "look_up",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def ask(client, messages, streamed):
    request = {
        "model": "model",
        "max_tokens": 500,
        "system": "You answer by what you have looked up.",
        "tools": [TOOL],
        "messages": messages,
    }
    if not streamed:
        return client.messages.create(**request)
    with client.messages.stream(**request) as stream:
        return stream.get_final_message()


def main(history, task, streamed=""):
    messages = json.loads(Path(history).read_text()) if Path(history).exists() else []
    messages.append({"role": "user", "content": task})
    while True:
        answer = ask(Anthropic(), messages, streamed)
        messages.append({"role": "assistant", "content": answer.to_dict()["content"]})
        results = [
            {
                "type": "tool_result",
                "tool_use_id": block.id,
                "content": f"{block.input['city']}: sun",
            }
            for block in answer.content
            if block.type == "tool_use"
        ]
        if not results:
            break
        messages.append({"role": "user", "content": results})
    Path(history).write_text(json.dumps(messages))
    print("".join(block.text for block in answer.content if block.type == "text"))


main(*sys.argv[1:])
