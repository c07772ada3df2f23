"""Ask a question and print the answer.

python examples/generate.py CHECKPOINT "Why is the sky blue?"
"""

import sys

from mlx_diffusiongemma import generate, load

model, processor = load(sys.argv[1])
result = generate(model, processor, sys.argv[2], seed=0)
print(result)
print(f"{result.stats.tokens_per_second:.0f} tokens/s, steps per canvas: {result.stats.steps}", file=sys.stderr)
