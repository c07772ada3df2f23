"""The model computes what Transformers' does, on seeded random tiny models: against stored float64 values everywhere,
and against Transformers itself where PyTorch is installed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from golden import ours
from golden.cases import CASES, Case
from mlx.utils import tree_flatten

from mlx_diffusiongemma.config import ModelConfig

# Of the largest value. Where the reference's own float32 is off by more than a third of this, three times that is.
TOLERANCE = 2e-5

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "golden" / "text.npz") as arrays:
        return dict(arrays)


@each_case
def test_equals_the_stored_reference(case, golden):
    exact, errors = stored(case, golden)
    assert_close(ours.run(ours.build(case), case, exact["logits"]), exact, errors)


@each_case
def test_fused_projections_change_neither_numbers_nor_names(case, golden):
    exact, errors = stored(case, golden)
    model = ours.build(case)
    names = [name for name, _ in tree_flatten(model.parameters())]
    plain = ours.run(model, case, exact["logits"])
    model.fuse()
    fused = ours.run(model, case, exact["logits"])
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert_close(fused, exact, errors)
    for name, array in plain.items():
        np.testing.assert_allclose(fused[name], array, rtol=0, atol=2e-6 * np.abs(array).max(), err_msg=name)


@needs_torch
@each_case
def test_equals_transformers(case):
    from golden import reference  # with torch installed, an import that breaks in here is a failure

    exact, errors = reference.measure(case)
    assert_close(ours.run(ours.build(case), case, exact["logits"]), exact, errors)


@needs_torch
@each_case
def test_a_configuration_saved_by_transformers_means_the_same(case):
    from golden import reference

    saved = json.loads(reference.DiffusionGemmaConfig(**case.config).to_json_string())
    assert ModelConfig.from_dict(saved).text == ModelConfig.from_dict(case.config).text


def stored(case: Case, golden: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The case's float64 values, and by how much the reference's own float32 missed them."""
    prefix, suffix = f"{case.name}/", "/error"
    of_case = {name.removeprefix(prefix): array for name, array in golden.items() if name.startswith(prefix)}
    exact = {name: array for name, array in of_case.items() if not name.endswith(suffix)}
    return exact, {name: float(of_case[name + suffix]) for name in exact}


def assert_close(ours: dict[str, np.ndarray], exact: dict[str, np.ndarray], errors: dict[str, float]) -> None:
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        assert ours[name].shape == expected.shape, name
        difference = np.abs(ours[name] - expected).max()
        allowed = max(TOLERANCE * np.abs(expected).max(), 3 * errors[name])
        assert difference <= allowed, f"{name}: off by {difference:.2e}, allowed {allowed:.2e}"
