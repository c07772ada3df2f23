"""The shape of the project: imports point one way, every folder of code is packaged, names do not hide modules."""

import ast
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_diffusiongemma
from mlx_diffusiongemma import convert

ROOT = Path(__file__).parent.parent
PACKAGE = "mlx_diffusiongemma"

# Rooms and single modules; each may import those above it, and of its own row only itself.
LAYERS = [
    {"errors", "events"},
    {"paths"},
    {"files"},
    {"config"},
    {"options"},
    {"model", "processing"},
    {"checkpoints"},
    {"generation"},
    {"filling", "training", "display"},
    {"convert"},
    {"benchmark", "server"},
    {"commands"},
    {"cli"},
    {"freezing"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MOST_LINES, MOST_MODULES = 400, 12


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name; a folder goes by its own."""
    folders = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.convert": ROOT / "convert"}
    found = {}
    for dotted, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([dotted, *parts]).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imported(module: str, at_import: bool = False) -> set[str]:
    """Modules of this package that `module` imports; type checking aside.

    at_import: only those that it imports while it is imported itself, not those inside functions.
    """
    path = SOURCES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found.update(f"{source}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {home for name in found if (home := module_of(name)) and home != module}


def module_of(name: str) -> str | None:
    """The module that `name`, a module or something in one, belongs to."""
    while name and name not in SOURCES:
        name = name.rpartition(".")[0]
    return name or None


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_point_one_way():
    for module in SOURCES:
        if module == PACKAGE:
            continue
        assert room(module) in LEVEL, f"{module} has no place in the layers"
        for target in imported(module) - {PACKAGE}:
            downwards = LEVEL[room(target)] < LEVEL[room(module)]
            assert downwards or room(target) == room(module), f"{module} imports {target}, which is not below it"


def test_no_import_comes_back_to_where_it_began():
    graph = {module: imported(module, at_import=True) - {PACKAGE} for module in SOURCES}
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                walk(target, [*path, module])
            done.add(module)

    for module in graph:
        walk(module, [])


def test_every_way_to_import_is_seen(monkeypatch, tmp_path):
    """The tests above would pass on anything if the reader of imports saw nothing."""
    source = "import mlx_diffusiongemma.model.cache\nfrom ..model import moe\ndef f():\n    from .. import errors\n"
    path = tmp_path / "x.py"
    path.write_text(source)
    monkeypatch.setitem(SOURCES, f"{PACKAGE}.options.x", path)
    assert imported(f"{PACKAGE}.options.x") == {f"{PACKAGE}.{name}" for name in ("model.cache", "model.moe", "errors")}
    assert f"{PACKAGE}.errors" not in imported(f"{PACKAGE}.options.x", at_import=True)


def test_every_code_folder_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(project["packages"]) == {name for name, path in SOURCES.items() if path.name == "__init__.py"}


def test_rooms_and_modules_stay_small():
    rooms = defaultdict(list)
    for module, path in SOURCES.items():
        rooms[path.parent].append(path.name)
        lines = path.read_text().count("\n")
        assert lines <= MOST_LINES, f"{module} has {lines} lines"
    for folder, modules in rooms.items():
        assert len(modules) <= MOST_MODULES, f"{folder} has {len(modules)} modules"


def test_no_exported_name_hides_a_module():
    top = {module.split(".")[1] for module in SOURCES if module.count(".") == 1}
    assert not set(mlx_diffusiongemma.__all__) & top


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


@pytest.mark.parametrize("module", SOURCES)
def test_docstrings_begin_with_a_sentence_that_stands_alone(module):
    """What `help` shows first must make sense to someone who has not read the code."""
    fragments = {"Of", "What", "As", "Which", "How", "In"}
    documented = [("", tree := ast.parse(SOURCES[module].read_text())), *public_definitions(tree)]
    for name, node in documented:
        first = (ast.get_docstring(node) or "Nothing").split()[0]
        assert first[0].isupper() and first not in fragments, f"{module}.{name} begins with {first!r}"


def public_definitions(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Classes and functions without a leading underscore, those of such classes too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child)


def test_what_is_imported_on_first_use_is_what_is_listed():
    for package in (mlx_diffusiongemma, convert):
        assert set(package.__all__) - {"__version__"} == set(package._HOME_OF)


def test_every_error_can_be_imported_from_the_package():
    errors = ast.parse(SOURCES[f"{PACKAGE}.errors"].read_text())
    assert {node.name for node in errors.body if isinstance(node, ast.ClassDef)} <= set(mlx_diffusiongemma.__all__)
