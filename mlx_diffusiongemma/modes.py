"""Named settings of the denoising loop. The README's table says what each costs and gains."""

from __future__ import annotations

from .config import GenerationOptions

# `reference` leaves everything to the checkpoint. An option given beside a mode wins:
# `options.filled_from(MODES["fast"])`.
MODES: dict[str, GenerationOptions] = {
    "reference": GenerationOptions(),
    "fast": GenerationOptions(max_steps=16, entropy_bound=0.3, stability=0, confidence=0.02),
}
