"""Both losses and the gradient of every parameter are those of the published objective on Transformers' network:
against stored float64 values everywhere, and against Transformers itself where PyTorch is installed.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from golden import make_training, ours_training
from golden.make_images import Arrays
from golden.make_training import CASES, PATH, random_case

# Of a loss, or of a gradient's norm. Where the reference's own float32 is off by more than a third of this, three times
# that is.
TOLERANCE = 1e-5

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


@pytest.fixture(scope="module")
def golden() -> Arrays:
    with np.load(PATH) as arrays:
        return dict(arrays)


def of_case(golden: Arrays, name: str) -> Arrays:
    return {key.removeprefix(f"{name}/"): array for key, array in golden.items() if key.startswith(f"{name}/")}


def assert_close(made: Arrays, exact: Arrays, own: dict[str, float] | None = None) -> None:
    """own: by how much the reference's own float32 is off."""
    assert made.keys() == exact.keys()
    assert all(made[name].shape == exact[name].shape for name in exact)
    for name, off in make_training.errors(made, exact).items():
        allowed = max(TOLERANCE, 3 * own[name] if own else 0)
        assert off <= allowed, f"{name}: off by {off:.1e}, allowed {allowed:.1e}"


@each_case
def test_equals_the_stored_reference(case, golden):
    assert_close(ours_training.measure(case), of_case(golden, case.name))


@needs_torch
@pytest.mark.parametrize("case", [*CASES, *map(random_case, range(12))], ids=lambda case: case.name)
def test_equals_transformers(case):
    exact = make_training.measure(case)
    own = make_training.errors(make_training.measure(case, exact=False), exact)
    assert_close(ours_training.measure(case), exact, own)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.examples) > 1], ids=lambda case: case.name)
def test_a_batch_is_the_mean_of_its_rows(case):
    together = ours_training.measure(case)
    alone = [ours_training.measure(case, [drawn]) for drawn in case.draws]
    mean = {name: sum(each.get(name, np.float32(0)) for each in alone) / len(alone) for name in together}
    assert_close(together, mean)


@each_case
def test_without_a_signal_self_conditioning_learns_nothing(case):
    """Exactly nothing, as at inference's first step; with one, every weight of it does."""
    made = ours_training.measure(case)
    of_signal = {name: array for name, array in made.items() if ".self_conditioning." in name}
    assert len(of_signal) == 4
    conditioned = any(drawn.conditioned for drawn in case.draws)
    assert all(bool(array.any()) == conditioned for array in of_signal.values())


def test_the_cases_hold_what_they_are_named_for():
    """Lest all this hold for cases that leave something out."""
    drawn = [each for case in CASES for each in case.draws]
    assert any(each.start > each.prompt for each in drawn) and any(each.start == each.prompt for each in drawn)
    assert any(0 in each.weights for each in drawn) and any(each.learned < len(each.tokens) for each in drawn)
    assert any(each.images for each in drawn) and any(each.conditioned for each in drawn)
    assert any(each.prompt > 2 * make_training.WINDOW for each in drawn)
