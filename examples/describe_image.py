"""Ask about an image.

python examples/describe_image.py CHECKPOINT picture.png "What is this?"
"""

import sys

from mlx_diffusiongemma import generate, load

model, processor = load(sys.argv[1])
print(generate(model, processor, sys.argv[3], images=[sys.argv[2]], seed=0))
