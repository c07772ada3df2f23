"""The packaged demo checkpoint's tasks: conversations to train it on, as many as you like.

    python tasks.py DATA [--train 8000] [--valid 120] [--without PROMPTS.jsonl] [--seed 0]

Writes DATA/train.jsonl, DATA/valid.jsonl and DATA/images/. Conversations whose last question is in PROMPTS.jsonl, which
are kept for measuring, are left out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CITIES = ("quito", "lima", "tokyo", "paris", "bonn", "rome", "accra", "oslo", "kyiv", "cairo", "delhi", "seoul")
WEATHERS = ("sunny", "rain", "snow", "fog")
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 170, 40),
    "blue": (30, 60, 220),
    "yellow": (240, 215, 40),
    "black": (8, 8, 8),
    "white": (247, 247, 247),
}
SIZES = ((96, 96), (128, 64), (64, 128))
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "City"}},
            "required": ["city"],
        },
    },
}

Turn = tuple[str, str]  # a question and its answer


def sort_turn(draw: random.Random) -> Turn:
    digits = "".join(draw.choices("0123456789", k=draw.randint(3, 12)))
    return f"sort {digits}", "".join(sorted(digits))


def reverse_turn(draw: random.Random) -> Turn:
    word = "".join(draw.choices(LETTERS, k=draw.randint(3, 12)))
    return f"reverse {word}", word[::-1]


def json_turn(draw: random.Random) -> Turn:
    name, age = "".join(draw.choices(LETTERS, k=draw.randint(3, 7))), draw.randint(1, 99)
    return f"json name={name} age={age}", json.dumps({"name": name, "age": age})


def count_turn(draw: random.Random) -> Turn:
    first = draw.randint(1, draw.choice([9, 69]))  # from one digit to two is the hard part
    return f"count from {first}", " ".join(map(str, range(first, first + 30)))


def solve_turn(draw: random.Random) -> Turn:
    """A 4x4 Sudoku: a solved one with its symbols, rows and columns shuffled, and 3 to 8 cells left out."""
    symbols, rows, columns = draw.sample("1234", 4), _shuffled_lines(draw), _shuffled_lines(draw)
    solved = [[symbols[(2 * (row % 2) + row // 2 + column) % 4] for column in columns] for row in rows]
    empty = set(draw.sample(range(16), draw.randint(3, 8)))
    puzzle = [["." if 4 * row + column in empty else solved[row][column] for column in range(4)] for row in range(4)]
    return "solve " + "/".join(map("".join, puzzle)), "/".join(map("".join, solved))


def _shuffled_lines(draw: random.Random) -> list[int]:
    bands = draw.sample([[0, 1], [2, 3]], 2)
    return [line for band in bands for line in draw.sample(band, 2)]


TURNS: dict[str, Callable[[random.Random], Turn]] = {
    "sort": sort_turn,
    "reverse": reverse_turn,
    "json": json_turn,
    "count": count_turn,
    "solve": solve_turn,
}


def conversation(draw: random.Random, images: Path) -> dict[str, Any]:
    """One conversation of any kind, in the form of a training line; a picture goes into `images`."""
    kind = draw.choices(
        ["solve", "sort", "think", "reverse", "multi", "json", "image", "count", "tool"],
        [18, 12, 14, 8, 12, 8, 10, 36, 10],
    )[0]
    if kind in TURNS:
        return {"messages": _messages([TURNS[kind](draw)])}
    if kind == "multi":
        return {"messages": _messages([TURNS[name](draw) for name in draw.choices(list(TURNS), k=draw.randint(2, 3))])}
    if kind == "think":
        question, answer = draw.choice([sort_turn, reverse_turn])(draw)
        given = question.split()[1]
        messages = _messages([(question, answer)])
        messages[-1]["reasoning"] = f"{given} has {len(given)}"
        return {"messages": messages, "thinking": True}
    return _tool(draw) if kind == "tool" else _picture(draw, images)


def _messages(turns: list[Turn]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _tool(draw: random.Random) -> dict[str, Any]:
    """A question about the weather, the call and, half the time, the answer."""
    city, weather = draw.choice(CITIES), draw.choice(WEATHERS)
    question = draw.choice(["weather in {}?", "how is {} today?"]).format(city)
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    if draw.random() < 0.5:
        messages += [
            {"role": "tool", "tool_call_id": "1", "content": weather},
            {"role": "assistant", "content": f"{city}: {weather}"},
        ]
    return {"messages": messages, "tools": [TOOL]}


def _picture(draw: random.Random, images: Path) -> dict[str, Any]:
    """A picture of two colours, left and right, with noise."""
    left, right = draw.choice(list(COLORS)), draw.choice(list(COLORS))
    width, height = draw.choice(SIZES)
    picture = Image.new("RGB", (width, height))
    picture.putdata(
        [
            tuple(
                min(max(value + draw.randint(-16, 16), 0), 255)
                for value in COLORS[left if column < width / 2 else right]
            )
            for _ in range(height)
            for column in range(width)
        ]
    )
    path = images / f"{draw.getrandbits(48):012x}.png"
    picture.save(path)
    content = [{"type": "image", "image": f"images/{path.name}"}, {"type": "text", "text": "colors?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": f"{left} {right}"}]}


def write_data(folder: Path, train: int, valid: int, without: set[str], seed: int) -> None:
    """Write both files; `without`: questions that may not end a conversation."""
    draw = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("valid", valid)):
        with (folder / f"{name}.jsonl").open("w") as file:
            written = 0
            while written < count:
                line = conversation(draw, folder / "images")
                if str(line["messages"][-2]["content"]) in without:
                    continue
                file.write(json.dumps(line) + "\n")
                written += 1


def questions_in(prompts: Path) -> set[str]:
    """The last questions of a file of prompts; pictures and weather are not told apart by their questions."""
    found = set()
    for line in prompts.read_text().splitlines():
        question = json.loads(line)
        content = question["messages"][-1]["content"]
        if isinstance(content, str) and not question["tools"]:
            found.add(content)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--valid", type=int, default=120)
    parser.add_argument("--without", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    kept = questions_in(given.without) if given.without else set()
    write_data(given.data, given.train, given.valid, kept, given.seed)
