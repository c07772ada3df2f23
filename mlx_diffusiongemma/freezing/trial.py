"""Find the modules of other packages that a program needs: those that a trial imports, in any version."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PyInstaller import isolated
from PyInstaller.utils.hooks import get_package_paths


@functools.cache
def modules_needed() -> frozenset[str]:
    """All modules that are imported where checkpoints are found, prompts made and replies read. Nothing is computed."""
    own = _required("mlx-diffusiongemma", set(), ("cpu", "cuda"))
    strange = [
        module
        for module, distributions in packages_distributions().items()
        if not own.intersection(map(canonicalize_name, distributions))
    ]
    return frozenset(isolated.call(_modules_of_a_trial, strange))


def submodules(package: str) -> frozenset[str]:
    """The modules that a package has, itself among them."""
    root = Path(get_package_paths(package)[1])
    names = (".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.rglob("*.py"))
    return frozenset(name.removesuffix(".__init__") for name in names)


def packages_not_needed() -> list[str]:
    """The installed packages that the trial did without: PyTorch, where it is installed, pytest and the like."""
    return sorted(packages_distributions().keys() - modules_needed())


def outermost(modules: frozenset[str]) -> list[str]:
    """Those of the modules that lie in no other of them."""
    return sorted(name for name in modules if name.rpartition(".")[0] not in modules)


def _required(distribution: str, found: set[str], extras: tuple[str, ...] = ()) -> set[str]:
    """The distributions that come with one, itself among them."""
    found.add(canonicalize_name(distribution))
    try:
        lines = requires(distribution) or ()
    except PackageNotFoundError:
        return found
    for requirement in map(Requirement, lines):
        wanted = not requirement.marker or any(requirement.marker.evaluate({"extra": name}) for name in ("", *extras))
        if wanted and canonicalize_name(requirement.name) not in found:
            _required(requirement.name, found, tuple(requirement.extras))
    return found


def _modules_of_a_trial(strange: list[str]) -> list[str]:
    # Runs by itself in a fresh process: nothing of this module is there.
    import sys
    from pathlib import Path

    # Where Transformers and others find PyTorch, they import it.
    sys.modules.update(dict.fromkeys(strange))

    import huggingface_hub.utils.tqdm
    import mlx_lm.utils
    import sentencepiece.sentencepiece_model_pb2
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from PIL import Image
    from transformers import AddedToken, PreTrainedTokenizerFast

    import mlx_diffusiongemma
    from mlx_diffusiongemma.checkpoints.checkpoint import Checkpoint

    try:
        import hf_xet  # which the Hub's client imports when it downloads
    except ImportError:
        pass
    for name in mlx_diffusiongemma.__all__:
        getattr(mlx_diffusiongemma, name)

    def weather(city: str) -> str:
        """Weather

        Args:
            city: City
        """
        return city

    directory = Path(mlx_diffusiongemma.__file__).parent / "demo"
    processor = mlx_diffusiongemma.Processor.from_directory(directory, Checkpoint.open(directory).config)
    prompt = processor.prompt("How is Lima?", images=[Image.new("RGB", (64, 64))], tools=[weather], thinking=True)
    processor.parse(prompt.tokens)
    return sorted(name for name, module in sys.modules.items() if module)
