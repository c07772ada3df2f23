"""Orders to train on: what a guest says, and the JSON that a café's till wants, in a format that no model has seen.

    python orders.py DATA [--train 2000] [--valid 100] [--test 200] [--seed 0]

"2 teas and a bun for Ada on Friday" becomes {"to":"ADA","d":5,"is":[["T",2],["B",1]],"n":3}: the day by number, each
thing by its code, sorted, and how many there are in all. Writes train.jsonl, valid.jsonl and test.jsonl to DATA.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

THINGS = {"tea": "T", "coffee": "K", "bun": "B", "cake": "G", "soup": "S", "salad": "L"}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Lou", "Mia", "Nils", "Ola")
SENTENCES = ("{things} for {name} on {day}", "{day}, {name}: {things}", "{name} wants {things} on {day}")


def make_order(draw: random.Random) -> tuple[str, str]:
    """Make what a guest says, and what the till wants."""
    name, day = draw.choice(NAMES), draw.randrange(7)
    counts = {thing: draw.randint(1, 9) for thing in draw.sample(list(THINGS), draw.randint(1, 3))}
    things = [f"{count} {thing}s" if count > 1 else f"a {thing}" for thing, count in counts.items()]
    said = ", ".join(things[:-1]) + " and " * (len(things) > 1) + things[-1]
    order = {
        "to": name.upper(),
        "d": day + 1,
        "is": sorted([THINGS[thing], count] for thing, count in counts.items()),
        "n": sum(counts.values()),
    }
    sentence = draw.choice(SENTENCES).format(things=said, name=name, day=DAYS[day])
    return sentence, json.dumps(order, separators=(",", ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for name, count in (("train", 2000), ("valid", 100), ("test", 200)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given = parser.parse_args()
    draw, seen = random.Random(given.seed), set[str]()
    given.data.mkdir(parents=True, exist_ok=True)
    for name in ("test", "valid", "train"):
        with (given.data / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(vars(given)[name]):
                while (order := make_order(draw))[0] in seen:
                    pass
                seen.add(order[0])
                file.write(json.dumps({"prompt": order[0], "completion": order[1]}) + "\n")


if __name__ == "__main__":
    main()
