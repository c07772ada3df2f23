"""Every source format, written by the tests from its description, against a dequantization in NumPy."""

import json

import mlx.core as mx
import numpy as np
import pytest
from convert_data import DEMO, all_tensors, copy_demo, edit_json, read_tensors
from convert_formats import f32_tensor, floats, fp8_tensors, nvfp4_tensors, quantize_experts, quantize_linears

from mlx_diffusiongemma import load
from mlx_diffusiongemma.convert import RECIPES, convert_checkpoint
from mlx_diffusiongemma.convert.quantization import QUANTIZATION_MODES
from mlx_diffusiongemma.errors import CheckpointError

LINEARS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight")
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
ALL_BUT_EXPERTS = {"*": "none", "*.experts.*": "nvfp4"}


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory):
    """An NVFP4 checkpoint and the same values in float32: (source, plain)."""
    return _pair(tmp_path_factory.mktemp("nvfp4"), nvfp4_tensors, (), MODELOPT)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """An FP8-dynamic checkpoint and the same values in float32: (source, plain)."""
    return _pair(tmp_path_factory.mktemp("fp8"), fp8_tensors, LINEARS, COMPRESSED)


def _pair(directory, encode, linears, quantization_config):
    encoded, decoded = quantize_experts(read_tensors(DEMO / "model.safetensors"), encode)
    encoded, rest = quantize_linears(encoded, encode, linears)
    decoded |= {name: rest[name] for name in decoded if linears and name.endswith(linears)}
    source = copy_demo(directory / "source", lambda _: encoded, quantization_config=quantization_config)
    return source, copy_demo(directory / "plain", lambda _: decoded)


def logits(directory):
    """Of one canvas after a prompt, float32, in a model that computes in float32."""
    model, _ = load(directory)
    model.set_dtype(mx.float32)
    cache = model.make_cache()
    model.encode(mx.array([[2, 40, 50, 60, 70, 80]]), cache)
    canvas = mx.array([[(7 * i) % 300 + 40 for i in range(32)]])
    return np.array(model.logits(model.denoise(canvas, cache)))


def assert_same_logits(one, other, tolerance=2e-5):
    a, b = logits(one), logits(other)
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_nvfp4_codes_are_carried_bit_for_bit(nvfp4, tmp_path):
    source, _ = nvfp4
    report = convert_checkpoint(source, tmp_path / "out")
    assert "NVFP4" in report.plan.source
    before, after = read_tensors(source / "model.safetensors"), all_tensors(report.out)
    home = "model.decoder.layers.2.experts"
    gate_up = np.frombuffer(after[f"{home}.gate_up_proj.weight"][2], np.uint8).reshape(8, 128, 64)
    scales = np.frombuffer(after[f"{home}.down_proj.scales"][2], np.uint8).reshape(8, 128, 4)
    for expert in range(8):
        halves = [before[f"{home}.{expert}.{half}_proj.weight"][2] for half in ("gate", "up")]
        assert gate_up[expert].tobytes() == b"".join(halves)
        assert scales[expert].tobytes() == before[f"{home}.{expert}.down_proj.weight_scale"][2]
    down = np.frombuffer(after[f"{home}.down_proj.weight_scale_2"][2], np.float32)
    assert [down[e].tobytes() for e in range(8)] == [
        before[f"{home}.{e}.down_proj.weight_scale_2"][2] for e in range(8)
    ]
    both = np.frombuffer(after[f"{home}.gate_up_proj.weight_scale_2"][2], np.float32).reshape(8, 2, 64)
    assert both[3, 1].tolist() == [np.frombuffer(before[f"{home}.3.up_proj.weight_scale_2"][2], np.float32)[0]] * 64
    quantization = json.loads((report.out / "config.json").read_text())["quantization"]
    assert quantization[f"{home}.gate_up_proj"] == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert after["model.decoder.embed_tokens.weight"][0] == "U32"


def test_nvfp4_equals_its_dequantization(nvfp4, tmp_path):
    source, plain = nvfp4
    ours = convert_checkpoint(source, tmp_path / "ours", overrides=ALL_BUT_EXPERTS, dtype="float32")
    reference = convert_checkpoint(plain, tmp_path / "reference", bits=None, dtype="float32")
    assert_same_logits(ours.out, reference.out)


def test_nvfp4_dequantized_and_encoded_again(nvfp4, tmp_path):
    source, plain = nvfp4
    whole = convert_checkpoint(source, tmp_path / "whole", bits=None, dtype="float32")
    reference = convert_checkpoint(plain, tmp_path / "reference", bits=None, dtype="float32")
    ours, expected = all_tensors(whole.out), all_tensors(reference.out)
    assert set(ours) == set(expected)
    for name in ours:
        np.testing.assert_allclose(floats(ours[name]), floats(expected[name]), rtol=1e-6, atol=1e-9)
    again = convert_checkpoint(source, tmp_path / "again", bits=4)
    assert again.plan.total_bytes == convert_checkpoint(DEMO, tmp_path / "demo", bits=4).plan.total_bytes


def test_fp8_equals_its_dequantization(fp8, tmp_path):
    source, plain = fp8
    ours = convert_checkpoint(source, tmp_path / "ours", bits=None, dtype="float32")
    assert "FP8" in ours.plan.source
    reference = convert_checkpoint(plain, tmp_path / "reference", bits=None, dtype="float32")
    written, expected = all_tensors(ours.out), all_tensors(reference.out)
    assert set(written) == set(expected)
    for name in written:
        np.testing.assert_allclose(floats(written[name]), floats(expected[name]), rtol=1e-6, atol=0)
    assert_same_logits(ours.out, reference.out)


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"mode": "mxfp8"}, {}])
def test_fp8_in_other_precisions(fp8, options, tmp_path):
    report = convert_checkpoint(fp8[0], tmp_path / "out", **options)
    assert report.plan.default_quantization.mode == options.get("mode", "affine")
    assert np.isfinite(logits(report.out)).all()


def test_stacked_fp8_and_nvfp4(tmp_path):
    for encode in (fp8_tensors, nvfp4_tensors):
        name = "model.decoder.layers.1.experts.down_proj"
        values = floats(read_tensors(DEMO / "model.safetensors")[name])
        added, decoded = encode(name, values)

        def change(tensors, added=added, name=name):
            del tensors[name]
            return tensors | added

        source = copy_demo(tmp_path / encode.__name__, change)
        out = convert_checkpoint(source, tmp_path / f"{encode.__name__}-out", bits=None, dtype="float32").out
        np.testing.assert_allclose(floats(all_tensors(out)[f"{name}.weight"]), decoded, rtol=1e-6)


def test_mlx_checkpoints_are_carried_requantized_and_dequantized(tmp_path):
    four = convert_checkpoint(DEMO, tmp_path / "four")
    same = convert_checkpoint(four.out, tmp_path / "same")
    assert all_tensors(same.out) == all_tensors(four.out)
    assert "quantized by MLX" in same.plan.source
    three = convert_checkpoint(four.out, tmp_path / "three", bits=3)
    tensors = all_tensors(three.out)
    assert tensors["model.decoder.layers.0.experts.down_proj.weight"][1] == (8, 128, 6)
    assert tensors["model.decoder.embed_tokens.weight"] == all_tensors(four.out)["model.decoder.embed_tokens.weight"]
    whole = convert_checkpoint(four.out, tmp_path / "whole", bits=None)
    assert_same_logits(whole.out, four.out, tolerance=2e-2)  # the decoded weights are rounded to bfloat16 once more
    name = "model.decoder.layers.3.mlp.gate_proj"
    read = mx.load(str(four.out / "model.safetensors"))
    parts = [read[f"{name}.{role}"] for role in ("weight", "scales", "biases")]
    decoded = mx.dequantize(parts[0], *(p.astype(mx.float32) for p in parts[1:]), group_size=64, bits=8)
    assert mx.array_equal(mx.load(str(whole.out / "model.safetensors"))[f"{name}.weight"], decoded.astype(mx.bfloat16))


def test_compact_checkpoints_are_carried_and_dequantized(tmp_path):
    """Its embedding has 5 bits, which do not divide a word."""
    compact = convert_checkpoint(DEMO, tmp_path / "compact", recipe="compact")
    assert compact.plan.group_bits["embedding"] == "5-bit, group size 64"
    same = convert_checkpoint(compact.out, tmp_path / "same", recipe="compact")
    assert all_tensors(same.out) == all_tensors(compact.out)
    whole = convert_checkpoint(compact.out, tmp_path / "whole", bits=None)
    assert_same_logits(whole.out, compact.out, tolerance=2e-2)


def test_nvfp4_converted_once_converts_again(nvfp4, tmp_path):
    once = convert_checkpoint(nvfp4[0], tmp_path / "once")
    twice = convert_checkpoint(once.out, tmp_path / "twice")
    assert all_tensors(twice.out) == all_tensors(once.out)
    whole = convert_checkpoint(once.out, tmp_path / "whole", bits=None, dtype="float32")
    direct = convert_checkpoint(nvfp4[0], tmp_path / "direct", bits=None, dtype="float32")
    name = "model.decoder.layers.0.experts.gate_up_proj.weight"
    assert all_tensors(whole.out)[name] == all_tensors(direct.out)[name]


@pytest.mark.parametrize(
    "options", [{"recipe": name} for name in RECIPES] + [{"mode": mode} for mode in QUANTIZATION_MODES], ids=str
)
def test_recipes_and_modes_load_and_stay_close(options, tmp_path):
    report = convert_checkpoint(DEMO, tmp_path / "out", **options)
    whole = convert_checkpoint(DEMO, tmp_path / "whole", bits=None)
    assert report.plan.total_bytes < 0.6 * whole.plan.total_bytes
    ours, expected = logits(report.out), logits(whole.out)
    assert np.abs(ours - expected).mean() < 0.2 * np.abs(expected).mean()


def test_missing_scale_is_named(nvfp4, fp8, tmp_path):
    for source, role in ((nvfp4[0], "weight_scale_2"), (nvfp4[0], "weight_scale"), (fp8[0], "weight_scale")):
        name = f"model.decoder.layers.4.experts.5.up_proj.{role}"
        tensors = read_tensors(source / "model.safetensors")
        del tensors[name]
        target = tmp_path / f"{source.parent.name}-{role}"
        broken = copy_demo(target, lambda _, tensors=tensors: tensors)
        with pytest.raises(CheckpointError) as error:
            convert_checkpoint(broken, tmp_path / "out")
        assert "model.safetensors: model.decoder.layers.4.experts.5.up_proj.weight" in str(error.value)
        assert role in str(error.value)


def test_wrong_block_size_is_named(nvfp4, fp8, tmp_path):
    name = "model.decoder.layers.4.experts.5.up_proj.weight_scale"
    for source, shape, kind in ((nvfp4[0], (64, 4), "F8_E4M3"), (fp8[0], (4, 1), "BF16")):
        tensors = read_tensors(source / "model.safetensors")
        tensors[name] = (kind, shape, bytes(np.prod(shape) * (1 if kind == "F8_E4M3" else 2)))
        broken = copy_demo(tmp_path / source.parent.name, lambda _, tensors=tensors: tensors)
        with pytest.raises(CheckpointError) as error:
            convert_checkpoint(broken, tmp_path / "out")
        assert f"model.safetensors: {name}" in str(error.value)


def test_scales_of_a_wrong_type_are_named(nvfp4, tmp_path):
    name = "model.decoder.layers.4.experts.5.up_proj.weight_scale"
    tensors = read_tensors(nvfp4[0] / "model.safetensors")
    tensors[name] = ("BF16", tensors[name][1], bytes(2 * len(tensors[name][2])))
    broken = copy_demo(tmp_path / "source", lambda _: tensors)
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(broken, tmp_path / "out")
    assert f"{name}, of type BF16" in str(error.value)


def test_one_expert_missing_is_named(nvfp4, tmp_path):
    tensors = read_tensors(nvfp4[0] / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.2.experts.6.gate_proj." not in name}
    broken = copy_demo(tmp_path / "source", lambda _: kept)
    with pytest.raises(CheckpointError, match=r"lacks model\.decoder\.layers\.2\.experts\.6\.gate_proj\.weight"):
        convert_checkpoint(broken, tmp_path / "out")


def test_quantized_without_a_configuration(tmp_path):
    four = convert_checkpoint(DEMO, tmp_path / "four")
    edit_json(four.out / "config.json", lambda config: config.pop("quantization") and config)
    with pytest.raises(CheckpointError, match=r"does not say how"):
        convert_checkpoint(four.out, tmp_path / "out")


def test_fine_tuned_in_float32(tmp_path):
    source = copy_demo(tmp_path / "source", lambda t: {n: f32_tensor(floats(v)) for n, v in t.items()})
    edit_json(source / "config.json", lambda config: config.update(dtype="float32"))
    assert convert_checkpoint(source, tmp_path / "own").plan.dtype == "float32"
    narrowed = convert_checkpoint(source, tmp_path / "narrowed", dtype="bfloat16")
    assert all_tensors(narrowed.out) == all_tensors(convert_checkpoint(DEMO, tmp_path / "demo").out)
