"""Rewrite one word of a text, with everything else pinned, and print the change as a diff.

python examples/edit_in_place.py CHECKPOINT TEXT WORD INSTRUCTION
"""

import sys

from mlx_diffusiongemma import GenerationOptions, edit, load

model, processor = load(sys.argv[1])
text, word, instruction = sys.argv[2:5]
start = text.index(word)
messages = [{"role": "user", "content": instruction}]
result = edit(model, processor, text, (start, start + len(word)), messages, options=GenerationOptions(seed=0))
print(result.diff, end="")
