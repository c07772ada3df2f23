"""Answer the examples of a file: how many replies are JSON, how many are the expected JSON, and in how many steps.

python score.py CHECKPOINT data/test.jsonl [ADAPTER]
"""

import json
import sys
from pathlib import Path

from mlx_diffusiongemma import generate_batch, load

checkpoint, path, *adapter = sys.argv[1:]
model, processor = load(checkpoint, adapter=adapter[0]) if adapter else load(checkpoint)
examples = [json.loads(line) for line in Path(path).read_text().splitlines()]


def read(text: str) -> object:
    """What the JSON in `text` says; None where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


valid = right = 0
steps: list[int] = []
for result in generate_batch(model, processor, [example["prompt"] for example in examples], max_tokens=256, seed=0):
    said = read(result.text)
    valid += said is not None
    right += said == json.loads(examples[result.index]["completion"])
    steps += result.stats.steps
count = len(examples)
print(f"{valid} of {count} are JSON, {right} are as expected; {sum(steps) / len(steps):.2f} steps per canvas")
