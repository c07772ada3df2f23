"""Fill a hole in a text so that it fits what comes before and after.

python examples/infill_code.py CHECKPOINT BEFORE AFTER [INSTRUCTION]
"""

import sys

from mlx_diffusiongemma import GenerationOptions, Hole, infill, load

model, processor = load(sys.argv[1])
before, after = sys.argv[2:4]
instruction = sys.argv[4] if len(sys.argv) > 4 else None
result = infill(model, processor, [before, Hole(32), after], instruction, GenerationOptions(seed=0), alternatives=3)
print(result)
for other in result.alternatives:
    print(f"{other.holes[0]!r}: {other.log_likelihood:.3f} nats likely", file=sys.stderr)
