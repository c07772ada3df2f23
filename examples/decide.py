"""How probable is each of a few answers? Nothing is generated.

python examples/decide.py CHECKPOINT "Is this spam? …" yes no
"""

import sys

from mlx_diffusiongemma import choose, load

model, processor = load(sys.argv[1])
prompt, *options = sys.argv[2:]
for option, probability in choose(model, processor, prompt, options, seed=0).items():
    print(f"{probability:6.1%}  {option}")
