"""Plans at true shapes, without any weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from convert_data import TRUE_SHAPES, true_config, true_shapes

from mlx_diffusiongemma.checkpoints.safetensors import Entry
from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.convert import plan_tensors
from mlx_diffusiongemma.convert.plan import SHARD_BYTES, fitting_mac, gpu_limit, shard_header
from mlx_diffusiongemma.convert.quantization import RECIPES, as_config, make_scheme
from mlx_diffusiongemma.convert.reading.names import GROUPS, expected_tensors
from mlx_diffusiongemma.errors import CheckpointError


@pytest.fixture(scope="module")
def plan():
    return plan_tensors(true_shapes("published"), true_config())


def test_expected_tensors_are_the_published_ones():
    expected = expected_tensors(ModelConfig.from_dict(true_config()))
    assert expected == {name: shape for name, shape, _ in true_shapes("published")}
    assert len(expected) == 1047


def test_default_recipe_is_the_communitys_to_the_byte(plan):
    assert len(plan.tensors) == 1647
    assert plan.total_bytes == 16_542_844_632
    assert sorted((o.name, o.shape, o.dtype) for o in plan.tensors) == sorted(true_shapes("mlx_4bit"))


def test_overrides_are_the_communitys(plan):
    overrides = as_config(plan.default_quantization, {job.weight.path: job.quantization for job in plan.jobs})
    eight_bit = [path for path, value in overrides.items() if isinstance(value, dict)]
    assert all(overrides[path] == {"group_size": 64, "bits": 8} for path in eight_bit)
    assert len(eight_bit) == 236
    patterns = json.loads(TRUE_SHAPES.read_text())["eight_bit_modules"]
    assert sorted({re.sub(r"\.\d+\.", ".N.", path) for path in eight_bit}) == patterns


def test_files_stay_below_their_limit(plan):
    sizes = [sum(job.nbytes for job in shard) + len(shard_header(shard)) for shard in plan.shards]
    assert max(sizes) <= SHARD_BYTES
    assert plan.file_bytes == sum(sizes)
    assert plan.shard_names[0] == f"model-00001-of-{len(sizes):05d}.safetensors"


def test_groups_add_up_and_text_names_them(plan):
    assert sum(plan.group_bytes.values()) == plan.total_bytes
    text = plan.render()
    for group in ("experts", "embedding", "attention", "dense MLP", "router", "self-conditioning", "vision tower"):
        assert re.search(rf"{group} +\d+\.\d+ GB", text)
    assert "1,647 tensors, 16,542,844,632 bytes" in text


def test_memory_to_run_counts_weights_and_context(plan):
    assert plan.total_bytes < plan.running_bytes(0) < plan.running_bytes() < plan.running_bytes(100_000)
    # K and V of 5 full layers with 2 heads of 512, in bf16
    growth = plan.running_bytes(18_192) - plan.running_bytes(8_192)
    assert growth >= 10_000 * 5 * 2 * 2 * 512 * 2


def test_memory_to_run_counts_activations_in_their_type():
    plans = {
        dtype: plan_tensors(true_shapes("published"), {**true_config(), "dtype": dtype})
        for dtype in ("bfloat16", "float32")
    }
    assert [plan.dtype for plan in plans.values()] == list(plans)
    growth = {dtype: plan.running_bytes(18_192) - plan.running_bytes(8_192) for dtype, plan in plans.items()}
    assert growth["float32"] == 2 * growth["bfloat16"]
    beside = {dtype: plan.running_bytes() - plan.total_bytes for dtype, plan in plans.items()}
    assert beside["float32"] > 1.5 * beside["bfloat16"]


def test_macs():
    assert gpu_limit(24) == 16 << 30
    assert fitting_mac(10**9) == "fits Macs from 8 GB"
    assert "iogpu.wired_limit_mb=" in fitting_mac(13 * 10**9)
    assert fitting_mac(10**12).startswith("more than")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 7}, "MLX has no bits 7 in affine mode; choose from 2, 3, 4, 5, 6, 8."),
        ({"group_size": 48}, "MLX has no group size 48 in affine mode; choose from 32, 64, 128."),
        ({"mode": "mxfp4", "bits": 8}, "MLX has no bits 8 in mxfp4 mode; choose from 4."),
        ({"mode": "gptq"}, "MLX has no quantization mode 'gptq'; choose one of affine, mxfp4, mxfp8, nvfp4."),
        ({"recipe": "tasty"}, "There is no recipe 'tasty'"),
        ({"overrides": {"*": "lots"}}, "A module cannot be set to 'lots'"),
    ],
)
def test_options_that_do_not_exist(options, sentence):
    with pytest.raises(CheckpointError) as error:
        make_scheme(**options)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_they_come_to(name):
    plan = plan_tensors(true_shapes("published"), true_config(), make_scheme(recipe=name))
    recipe = RECIPES[name]
    assert plan.total_bytes == recipe.total_bytes
    assert fitting_mac(plan.running_bytes()) == recipe.macs
    assert set(recipe.groups) <= set(GROUPS)
    assert f"{plan.total_bytes / 1e9:.1f} GB" in str(recipe)


@pytest.mark.parametrize("name", RECIPES)
def test_the_readme_says_what_the_recipes_say(name):
    rows = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    row = next(line for line in rows if line.startswith(f"| `{name}` |"))
    recipe = RECIPES[name]
    assert row.endswith(f" | {recipe.total_bytes / 1e9:.1f} GB | {recipe.macs.removeprefix('fits Macs ')} |")


def test_compact_fits_a_24_gb_mac_with_room():
    plan = plan_tensors(true_shapes("published"), true_config(), make_scheme(recipe="compact"))
    assert plan.running_bytes() * 1.05 <= gpu_limit(24)


def test_nvfp4_stays_well_below_its_source():
    tensors = []
    for name, shape, dtype in true_shapes("published"):
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensors.append((name, shape, dtype))
            continue
        halves = ("gate", "up") if name.endswith("gate_up_proj") else ("down",)
        rows, columns = shape[1] // len(halves), shape[2]
        for expert in range(shape[0]):
            for half in halves:
                linear = f"{name.rpartition('.')[0]}.{expert}.{half}_proj"
                tensors += [
                    (f"{linear}.weight", (rows, columns // 2), "U8"),
                    (f"{linear}.weight_scale", (rows, columns // 16), "F8_E4M3"),
                    (f"{linear}.weight_scale_2", (), "F32"),
                    (f"{linear}.input_scale", (), "F32"),
                ]
    source = sum(Entry(name, dtype, shape).nbytes for name, shape, dtype in tensors)
    assert 18.7e9 < source < 18.9e9
    plan = plan_tensors(tensors, true_config())
    assert plan.total_bytes < 16.6e9
    assert "NVFP4" in plan.source and "one key per expert" in plan.source
    assert "nvfp4" in plan.group_bits["experts"]


def test_recipes_need_no_mlx():
    code = "import sys; from mlx_diffusiongemma.convert import RECIPES; assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_overrides_win_and_must_match():
    scheme = make_scheme(overrides={"layers.0.*": "8", "layers.0.self_attn.v_proj": "none", "*.router.proj": "mxfp8"})
    modules = {
        j.weight.path: j.quantization for j in plan_tensors(true_shapes("published"), true_config(), scheme).jobs
    }
    assert modules["model.decoder.layers.0.experts.down_proj"].bits == 8
    assert modules["model.decoder.layers.1.experts.down_proj"].bits == 4
    assert modules["model.decoder.layers.0.self_attn.v_proj"] is None
    assert modules["model.decoder.layers.3.router.proj"].mode == "mxfp8"
    with pytest.raises(CheckpointError, match=r"No module is called 'layers\.77\.\*'"):
        plan_tensors(true_shapes("published"), true_config(), make_scheme(overrides={"layers.77.*": "8"}))
