"""Leave out of the Hub's client its command line and what it does for other frameworks."""

from mlx_diffusiongemma.freezing.trial import modules_needed, outermost, packages_not_needed, submodules

excludedimports = ["huggingface_hub.cli", *packages_not_needed()]
excludedimports += outermost(submodules("safetensors") - modules_needed())
