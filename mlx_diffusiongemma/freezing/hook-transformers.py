"""Transformers: tokenizers and chat templates; no models, and nothing that only they need.

A program that uses its models says so with a hook of its own: `--additional-hooks-dir` comes before this one.
"""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions

from PyInstaller.utils.hooks import copy_metadata, get_module_attribute

from mlx_diffusiongemma.freezing.trial import modules_needed, outermost, packages_not_needed, submodules

present, needed = submodules("transformers"), modules_needed()
# Tables of the models' names, which it asks for without importing them.
tables = frozenset(name for name in present if name.startswith("transformers.models.auto."))

hiddenimports = sorted(present & needed | tables)
excludedimports = outermost(present - needed - tables) + packages_not_needed()

# It reads its own sources to see what there is, and the versions of what it needs.
module_collection_mode = "pyz+py"
wanted = {name for module, names in packages_distributions().items() if module in needed for name in names}
wanted |= set(get_module_attribute("transformers.dependency_versions_check", "pkgs_to_check_at_runtime"))
datas = []
for name in sorted(wanted):
    with suppress(PackageNotFoundError):  # some are optional
        datas += copy_metadata(name)
