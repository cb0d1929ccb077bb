"""langgraph_agent.py HISTORY TASK: an agent that is a graph of LangGraph's, on langchain-openai."""

import json
import sys
from pathlib import Path

from langchain_core.messages import HumanMessage, messages_from_dict, messages_to_dict
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition


@tool
def look_up(city: str) -> str:
    """The weather of a city."""
    return f"{city}: sun"


def make_agent():
    model = ChatOpenAI(model="model").bind_tools([look_up])
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([look_up]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    return graph.compile()


def main(history, task):
    messages = []
    if Path(history).exists():
        messages = messages_from_dict(json.loads(Path(history).read_text()))
    state = {"messages": [*messages, HumanMessage(task)]}
    # Also streams the tokens of the model's node, so its calls are streamed.
    for _, chunk in make_agent().stream(state, stream_mode=["messages", "values"]):
        state = chunk
    Path(history).write_text(json.dumps(messages_to_dict(state["messages"])))
    print(state["messages"][-1].content)


main(*sys.argv[1:])
