"""openai_responses.py HISTORY TASK [stored]: an agent on the OpenAI SDK's Responses API, streamed.

It sends its whole history; if `stored`, only what is new, and the id of the response before.
"""

import json
import sys
from pathlib import Path

from openai import OpenAI

TOOL = {
    "type": "function",
    "name": "look_up",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def ask(client, **request):
    fixed = {"model": "model", "instructions": "Look it up, then answer.", "tools": [TOOL]}
    with client.responses.stream(**fixed, **request) as stream:
        return stream.get_final_response()


def run_tools(response):
    calls = [item for item in response.output if item.type == "function_call"]
    return [
        {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": f"{json.loads(call.arguments)['city']}: sun",
        }
        for call in calls
    ]


def main(history, task, stored=""):
    earlier = json.loads(Path(history).read_text()) if Path(history).exists() else []
    turn = {"role": "user", "content": task}
    client = OpenAI()
    if stored:
        before, news = (earlier[-1] if earlier else None), [turn]
        while news:
            named = {"previous_response_id": before} if before else {}
            response = ask(client, input=news, **named)
            before, news = response.id, run_tools(response)
        earlier = [before]
    else:
        earlier.append(turn)
        news = True
        while news:
            response = ask(client, input=earlier, store=False)
            news = run_tools(response)
            earlier += [item.to_dict() for item in response.output] + news
    Path(history).write_text(json.dumps(earlier))
    print(response.output_text)


main(*sys.argv[1:])
