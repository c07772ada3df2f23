"""The Hub's client: downloads; neither its command line nor what it does for other frameworks."""

from mlx_diffusiongemma.freezing.trial import modules_needed, outermost, packages_not_needed, submodules

excludedimports = ["huggingface_hub.cli", *packages_not_needed()]
excludedimports += outermost(submodules("safetensors") - modules_needed())
