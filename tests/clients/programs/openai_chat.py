"""openai_chat.py HISTORY TASK [stream]: an agent on the OpenAI SDK's chat completions."""

import json
import sys
from pathlib import Path

from openai import OpenAI

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def ask(client, messages, streamed):
    request = {"model": "model", "messages": messages, "tools": [TOOL]}
    if not streamed:
        return client.chat.completions.create(**request).choices[0].message
    with client.chat.completions.stream(**request) as stream:
        return stream.get_final_completion().choices[0].message


def main(history, task, streamed=""):
    messages = [{"role": "system", "content": "You answer by what you have looked up."}]
    if Path(history).exists():
        messages = json.loads(Path(history).read_text())
    messages.append({"role": "user", "content": task})
    while (message := ask(OpenAI(), messages, streamed)).tool_calls:
        messages.append(message.to_dict())
        for call in message.tool_calls:
            city = json.loads(call.function.arguments)["city"]
            result = {"role": "tool", "tool_call_id": call.id, "content": f"{city}: sun"}
            messages.append(result)
    messages.append(message.to_dict())
    Path(history).write_text(json.dumps(messages))
    print(message.content)


main(*sys.argv[1:])
