"""The shape of the project: imports point one way, every folder of code is packaged, names do not hide modules."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import mlx_diffusiongemma

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlx_diffusiongemma"

# Each layer may import those above it, and its own.
LAYERS = [
    {"errors", "paths", "config", "events", "accounting"},
    {"model", "canvas", "sampling", "processor", "messages", "replies", "tools", "images"},
    {"hub", "loading", "memory", "denoising", "prefix", "stops"},
    {"generation", "scoring", "restricting", "gaps", "gap_filling", "modes"},
    {"infilling", "editing", "choosing", "filling"},
    {"session", "session_file", "convert"},
    {"benchmark", "benchmark_report", "ceilings", "step_profile", "layout", "pictures", "terminal", "trace"},
    {"commands"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def sources():
    """(top-level module name, its dotted package, path) of every source file of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield parts[0], ("mlx_diffusiongemma", *parts[:-1]), path
    for path in sorted((ROOT / "convert").glob("*.py")):
        yield "convert", ("mlx_diffusiongemma", "convert"), path


def imported(package, path):
    """Top-level modules of this package that a file imports, at any depth in it; type checking aside."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing_only:
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        full = (*base, *(node.module.split(".") if node.module else ()))
        if full[:1] == ("mlx_diffusiongemma",):
            if len(full) > 1:
                yield full[1]
            else:
                yield from (alias.name for alias in node.names)


def test_imports_point_one_way():
    for name, package, path in sources():
        if name == "__init__":
            continue
        assert name in LEVEL, f"{path} has no place in the layers"
        for target in imported(package, path):
            home = target if target in LEVEL else None
            assert home is None or LEVEL[home] <= LEVEL[name], f"{path} imports {target}, which is above it"


def test_every_code_folder_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {PACKAGE, *(path.parent for path in PACKAGE.rglob("*.py"))}
    dotted = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"mlx_diffusiongemma.convert"}
    assert dotted == set(project["packages"])


def test_no_exported_name_hides_a_module():
    exported = (PACKAGE / "__init__.py").read_text()
    homes = ast.literal_eval(exported.split("_HOMES = ")[1].split("\n}\n")[0] + "\n}")
    modules = {path.stem for path in PACKAGE.iterdir()} | {"convert"}
    for home, exports in homes.items():
        assert home in modules
        assert not set(exports) & modules


def test_the_import_is_silent_and_light():
    code = (
        "import sys, mlx_diffusiongemma; "
        "heavy = {'torch', 'transformers', 'mlx', 'mlx_lm', 'numpy', 'typer'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_everything_exported_can_be_imported():
    for name in mlx_diffusiongemma.__all__:
        assert getattr(mlx_diffusiongemma, name) is not None


def test_every_error_can_be_imported_from_the_package():
    errors = ast.parse((PACKAGE / "errors.py").read_text())
    assert {node.name for node in errors.body if isinstance(node, ast.ClassDef)} <= set(mlx_diffusiongemma.__all__)
