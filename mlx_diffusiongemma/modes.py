"""Named settings of the denoising loop, chosen by `tests/benchmarks/modes.py`."""

from __future__ import annotations

from .config import GenerationOptions

# `reference` leaves everything to the checkpoint. `fast` accepts more per step, stops as soon as it is confident
# without a step to confirm it, and gives up early on canvases that do not settle. An option given beside a mode wins:
# `options.filled_from(MODES["fast"])`.
MODES: dict[str, GenerationOptions] = {
    "reference": GenerationOptions(),
    "fast": GenerationOptions(max_steps=24, entropy_bound=0.3, stability=0),
}
