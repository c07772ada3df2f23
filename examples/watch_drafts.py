"""Watch an answer come out of the noise: every denoising step is an event.

python examples/watch_drafts.py CHECKPOINT "Why is the sky blue?"
"""

import sys

from mlx_diffusiongemma import Commit, Done, Draft, load, stream

model, processor = load(sys.argv[1])
for event in stream(model, processor, sys.argv[2], seed=0):
    match event:
        case Draft():
            print(f"step {event.step}, {sum(event.accepted)} tokens accepted: {event.text!r}", file=sys.stderr)
        case Commit():
            print(event.text, end="")  # certain: this part of the answer does not change any more
        case Done():
            print(f"\nfinished: {event.finish_reason}", file=sys.stderr)
