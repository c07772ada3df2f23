"""Named settings of the denoising loop, chosen by `tests/benchmarks/modes.py`."""

from __future__ import annotations

from .config import GenerationOptions

# `reference` leaves everything to the checkpoint. `fast` stops a canvas as soon as it is confident, more so than the
# reference asks, without a step to confirm it, and gives up early on one that does not settle. An option given beside
# a mode wins: `options.filled_from(MODES["fast"])`.
MODES: dict[str, GenerationOptions] = {
    "reference": GenerationOptions(),
    "fast": GenerationOptions(max_steps=24, stability=0, confidence=0.002),
}
