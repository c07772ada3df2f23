"""A chat whose model can call a Python function; type a line, and an empty one to leave.

python examples/chat_with_tools.py CHECKPOINT
"""

import sys

from mlx_diffusiongemma import ChatSession, GenerationOptions, collect, load


def get_weather(city: str) -> str:
    """Get weather

    Args:
        city: City
    """
    return {"lima": "rain", "oslo": "sunny"}.get(city.lower(), "fog")


model, processor = load(sys.argv[1])
chat = ChatSession(model, processor, tools=[get_weather], options=GenerationOptions(seed=0))
while line := input():
    result = chat.ask(line)
    while result.tool_calls:
        answers = [get_weather(**call.arguments) for call in result.tool_calls]
        result = collect(chat.send_tool_results(answers))
    print(result)
