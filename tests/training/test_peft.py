"""Adapters that PEFT trained compute here what they compute in PEFT, and ours there what they compute here: stored
adapters and float64 values everywhere, and PEFT itself where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from golden import make_peft, ours
from golden.make_images import Arrays
from golden.make_peft import CASE, CONFIGS, PATH
from golden.ours_training import adapted, batch, gradients

from mlx_diffusiongemma.checkpoints.adapter_files import export_peft, load_adapter
from mlx_diffusiongemma.checkpoints.peft import ARRAYS, from_peft, to_peft
from mlx_diffusiongemma.errors import AdapterError
from mlx_diffusiongemma.model.adapters import TRAINED, Adapter, AdapterConfig, keys_of, trained_arrays
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma

TOLERANCE = 1e-5  # of the largest value, or of a gradient's norm
ALL_LINEAR, EVERYWHERE = keys_of(("all-linear",)), keys_of(("all-linear", "experts"))
OURS = {
    "shared": AdapterConfig(rank=3, keys=EVERYWHERE),
    "separate": AdapterConfig(rank=3, keys=EVERYWHERE, towers="separate"),
    "decoder": AdapterConfig(rank=2, scale=1.3, keys=EVERYWHERE, towers="decoder"),
    "dora": AdapterConfig("dora", rank=3, keys=ALL_LINEAR),
    "separate dora": AdapterConfig("dora", rank=3, keys=ALL_LINEAR, towers="separate"),
    "the last layer": AdapterConfig(rank=3, keys=keys_of(("mlp", "experts")), num_layers=1),
    "some of the experts": AdapterConfig(rank=3, keys=("experts.down_proj",)),
}

each_of_pefts = pytest.mark.parametrize("name", CONFIGS)
each_of_ours = pytest.mark.parametrize("config", OURS.values(), ids=OURS)
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("peft") is None,
    reason="PyTorch and PEFT are not both installed",
)


@pytest.fixture(scope="module")
def golden() -> Arrays:
    with np.load(PATH) as arrays:
        return dict(arrays)


def saved(golden: Arrays, name: str) -> tuple[dict, dict[str, mx.array]]:
    """A stored adapter's configuration and arrays."""
    prefix = f"{name}/saved/"
    content = json.loads(golden[f"{name}/config"].tobytes())
    return content, {key.removeprefix(prefix): mx.array(a) for key, a in golden.items() if key.startswith(prefix)}


def write(directory: Path, content: dict, arrays: dict[str, mx.array]) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(content))
    mx.save_safetensors(str(directory / ARRAYS), arrays)


def quantities(adapter: Adapter, conditioning: np.ndarray) -> Arrays:
    model = bare()
    model.use_adapter(adapter)
    return ours.run(model, CASE, conditioning)


def bare() -> DiffusionGemma:
    return ours.build(CASE, lambda: ours.vision(CASE))


def assert_close(made: Arrays, exact: Arrays) -> None:
    for name, expected in exact.items():
        off = np.abs(made[name] - expected).max() / np.abs(expected).max()
        assert off <= TOLERANCE, f"{name}: off by {off:.1e} of the largest value"


def assert_same_gradients(made: dict[str, mx.array], exact: dict[str, mx.array]) -> None:
    least = 0.01 * np.sqrt(sum(float(mx.square(array).sum()) for array in exact.values()))
    for name, expected in exact.items():
        norm = max(float(mx.linalg.norm(expected.flatten())), least)
        off = float(mx.linalg.norm((made[name] - expected).flatten())) / norm
        assert off <= TOLERANCE, f"{name}: off by {off:.1e} of its norm"


# From PEFT


@each_of_pefts
def test_an_adapter_of_pefts_computes_the_stored_values(name, golden, tmp_path):
    write(tmp_path, *saved(golden, name))
    exact = {key: golden[f"{name}/{key}"] for key in ("logits", "conditioned logits", "next logits")}
    adapter = load_adapter(tmp_path)
    made = quantities(adapter, exact["logits"])
    assert_close(made, exact)
    without = ours.run(bare(), CASE, exact["logits"])
    assert np.abs(without["logits"] - made["logits"]).max() > 1e-3  # it does change something


@each_of_pefts
def test_adapters_of_pefts_are_what_they_say(name, golden):
    adapter = from_peft(*saved(golden, name), name)
    assert adapter.config.fine_tune_type == ("dora" if name == "dora" else "lora")
    assert adapter.config.towers == ("decoder" if name == "the decoder" else "separate")
    assert adapter.config.rank == (5 if "ranks" in name else 3)
    assert adapter.config.scale == pytest.approx(5 / 3**0.5 if name == "rslora" else 5 / 3)


@needs_peft
@each_of_pefts
def test_an_adapter_of_pefts_computes_what_peft_does(name, tmp_path):
    content, _ = make_peft.train(name, tmp_path)
    exact, slopes = make_peft.measure(tmp_path)
    adapter = load_adapter(tmp_path)
    assert_close(quantities(adapter, exact["logits"]), exact)
    if content["alpha_pattern"]:
        return  # there, `lora_b` is not PEFT's B
    model = bare()
    model.freeze()
    model.use_adapter(adapter)
    model.unfreeze(keys=list(TRAINED))
    expected = from_peft(content, {key: mx.array(each) for key, each in slopes.items()}, "the gradients").arrays
    assert expected.keys() == adapter.arrays.keys()
    assert_same_gradients(gradients(model, batch(CASE.draws)), dict(expected))


def test_one_stack_is_shared_by_the_towers(golden):
    """As NeMo names it."""
    content, arrays = saved(golden, "lora")
    decoder = {name: array for name, array in arrays.items() if ".decoder." in name}
    single = {name.replace(".decoder.", "."): array for name, array in decoder.items()}
    twice = decoder | {name.replace(".decoder.", ".encoder.language_model."): array for name, array in decoder.items()}
    one, both = from_peft(content, single, "one"), from_peft(content, twice, "both")
    assert one.config.towers == both.config.towers == "shared"
    assert one.arrays.keys() == both.arrays.keys()
    assert all(mx.array_equal(array, both.arrays[name]) for name, array in one.arrays.items())


# To PEFT


def random_adapter(config: AdapterConfig) -> Adapter:
    return Adapter(config, trained_arrays(adapted(bare(), config)))


@each_of_ours
def test_ours_come_back_from_pefts_form(config, tmp_path):
    adapter = random_adapter(config)
    export_peft(tmp_path, adapter)
    again = load_adapter(tmp_path)
    assert again.arrays.keys() == adapter.arrays.keys()
    assert all(mx.array_equal(again.arrays[name], array) for name, array in adapter.arrays.items())
    assert again.config.towers == config.towers
    assert again.config.fine_tune_type == config.fine_tune_type
    assert (again.config.rank, set(again.config.keys)) == (config.rank, set(config.keys))
    assert again.config.scale == pytest.approx(config.scale, rel=1e-12)


@needs_peft
@each_of_ours
def test_ours_compute_in_peft_what_they_compute_here(config, tmp_path):
    adapter = random_adapter(config)
    export_peft(tmp_path, adapter)
    exact, slopes = make_peft.measure(tmp_path)
    assert_close(quantities(adapter, exact["logits"]), exact)
    written = mx.load(str(tmp_path / ARRAYS))
    assert slopes.keys() == written.keys()  # PEFT took every array


def test_whole_weights_have_no_form_in_peft():
    with pytest.raises(AdapterError, match="no form for whole weights"):
        to_peft(Adapter(AdapterConfig("full"), {}))


# What cannot be honoured


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "IA3"}, "of type 'IA3'"),
        ({"bias": "lora_only"}, "trains biases"),
        ({"lora_bias": True}, "has biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
        ({"layer_replication": [[0, 1]]}, "layers that are there twice"),
        ({"use_qalora": True}, "another form of LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base too"),
        ({"r": 0}, "no positive numbers"),
        ({"alpha_pattern": {"q_proj": "much"}}, "no positive numbers"),
        ({"rank_pattern": {"(": 2}}, "no object of patterns"),
        ({"alpha_pattern": [8]}, "no object of patterns"),
        ({"use_dora": True}, "only a part of"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_a_sentence(change, reason, golden, tmp_path):
    content, arrays = saved(golden, "experts")
    write(tmp_path, content | change, arrays)
    with pytest.raises(AdapterError, match=reason) as refusal:
        load_adapter(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path)) and str(refusal.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "base_model.model.model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.linear.lora_A.weight",
            "vision_tower",
        ),
        ("base_model.model.lm_head.weight", "lm_head"),
        ("base_model.model.model.decoder.embed_tokens.lora_embedding_A", "embed_tokens"),
        ("base_model.model.model.decoder.layers.0.mlp.up_proj.lora_A.weight", "only a part of"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "only a part of"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_a_sentence(name, reason, golden):
    content, arrays = saved(golden, "experts")
    with pytest.raises(AdapterError, match=reason):
        from_peft(content, arrays | {name: mx.zeros((3, 24))}, "it")


def test_arrays_of_another_shape_are_refused(golden):
    content, arrays = saved(golden, "lora")
    with pytest.raises(AdapterError, match=r"of shape \[\]"):
        from_peft(content, dict.fromkeys(arrays, mx.array(1.0)), "it")


def test_names_of_two_towers_and_of_one_are_refused(golden):
    content, arrays = saved(golden, "lora")
    single = {name.replace(".decoder.", "."): array for name, array in arrays.items() if ".decoder." in name}
    with pytest.raises(AdapterError, match="names of two towers and of one"):
        from_peft(content, arrays | single, "it")


def test_experts_that_cannot_be_told_are_refused(golden):
    content, arrays = saved(golden, "one of the experts' weights")
    with pytest.raises(AdapterError, match="which of the experts' weights"):
        from_peft(content | {"target_parameters": make_peft.EXPERTS}, arrays, "it")
    with pytest.raises(AdapterError, match="holds no arrays"):
        from_peft(content, {}, "it")


@pytest.mark.parametrize("part", [".q_proj.lora_A.weight", ".experts.lora_B.weight"])
def test_matrices_that_do_not_fit_each_other_are_refused(part, golden):
    content, arrays = saved(golden, "experts")
    torn = {
        name: array[:, :-1] if name.endswith("B.weight") else array[:-1]
        for name, array in arrays.items()
        if part in name
    }
    with pytest.raises(AdapterError, match="do not fit each other"):
        from_peft(content, arrays | torn, "it")


def test_an_adapter_of_pefts_for_another_model_is_refused(golden):
    content, arrays = saved(golden, "lora")
    elsewhere = {name.replace(".layers.1.", ".layers.7."): array for name, array in arrays.items()}
    with pytest.raises(AdapterError, match="does not fit this model"):
        bare().use_adapter(from_peft(content, elsewhere, "it"))
