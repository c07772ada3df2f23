"""Take of mlx-lm tokenizers, layers, and the parser of Gemma's tool calls, which it imports by name; no training."""

from mlx_diffusiongemma.freezing.trial import modules_needed, outermost, packages_not_needed, submodules

hiddenimports = sorted(submodules("mlx_lm") & modules_needed())
excludedimports = outermost(submodules("mlx_lm") - modules_needed()) + packages_not_needed()
