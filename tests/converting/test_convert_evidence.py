"""After a conversion: its report, `check` and calibration."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from convert_data import DEMO, edit_json, read_tensors, write_tensors

from mlx_diffusiongemma.convert import calibrate, check_checkpoint, convert_checkpoint, read_prompts
from mlx_diffusiongemma.convert.calibration import divergence
from mlx_diffusiongemma.errors import CheckpointError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return convert_checkpoint(DEMO, tmp_path_factory.mktemp("original") / "demo")


@pytest.fixture
def converted(original, tmp_path):
    shutil.copytree(original.out, tmp_path / "demo")
    return tmp_path / "demo"


def test_report_measures_errors(original):
    report = json.loads((original.out / "conversion.json").read_text())
    assert 0.05 < report["groups"]["experts"]["relative_error"] < 0.15
    assert report["groups"]["attention"]["relative_error"] < 0.02
    assert report["groups"]["norms and other"]["relative_error"] is None
    assert report["groups"]["experts"]["bits"] == "4-bit, group size 64"
    assert len(report["worst"]) == 5 and max(original.errors.values()) == next(iter(report["worst"].values()))
    name = "model.decoder.layers.0.router.proj"
    dtype_shape_data = read_tensors(DEMO / "model.safetensors")[f"{name}.weight"]
    values = mx.array(np.frombuffer(dtype_shape_data[2], np.uint16)).view(mx.bfloat16).reshape(dtype_shape_data[1])
    decoded = mx.dequantize(*mx.quantize(values, group_size=64, bits=8), group_size=64, bits=8).astype(mx.float32)
    error = mx.linalg.norm(values.astype(mx.float32) - decoded) / mx.linalg.norm(values.astype(mx.float32))
    assert original.errors[name] == pytest.approx(error.item(), rel=1e-3)
    error = report["groups"]["experts"]["relative_error"]
    assert f"error {error:.2%}" in original.render() and "| experts | 4-bit" in (original.out / "README.md").read_text()


def test_check_of_a_whole_checkpoint(converted):
    names = []
    assert check_checkpoint(converted, names.append) == []
    assert names[0] == "configuration" and names[-1] == "one canvas"


def test_check_finds_a_flipped_byte(converted):
    path = converted / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    (problem,) = check_checkpoint(converted)
    assert problem.startswith("model.safetensors has changed")


def test_check_finds_values_that_are_not_finite(converted):
    name = "model.decoder.layers.3.self_attn.q_proj.scales"
    tensors = read_tensors(converted / "model.safetensors")
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, b"\xc0\x7f" + data[2:])
    write_tensors(converted / "model.safetensors", tensors)
    problems = check_checkpoint(converted)
    assert [name in problem for problem in problems] == [False, True]  # the hash, then the value


def test_check_names_what_is_missing_or_left_over(converted):
    tensors = read_tensors(converted / "model.safetensors")
    removed = tensors.pop("model.decoder.norm.weight")
    write_tensors(converted / "model.safetensors", tensors)
    (converted / "model.safetensors.index.json").unlink()
    assert "lacks model.decoder.norm.weight" in check_checkpoint(converted)[0]
    write_tensors(converted / "model.safetensors", tensors | {"model.decoder.norm.weight": removed, "odd": removed})
    assert "has odd" in check_checkpoint(converted)[0]


def test_check_compares_the_configuration(converted):
    module = "model.decoder.layers.77.mlp.up_proj"
    edit_json(converted / "config.json", lambda c: c["quantization"].update({module: {"group_size": 64, "bits": 8}}))
    assert module in check_checkpoint(converted)[0]


@pytest.mark.parametrize(("file", "part"), [("config.json", "config.json"), ("tokenizer.json", "tokenizer.json")])
def test_check_without_a_file(converted, file, part):
    (converted / file).unlink()
    assert part in check_checkpoint(converted)[0]


def test_check_of_what_is_not_converted():
    assert "mlx-dg convert" in check_checkpoint(DEMO)[0]


def test_divergence():
    random = np.random.default_rng(0)
    reference, other = (mx.array(random.standard_normal((6, 50)).astype(np.float32)) for _ in range(2))
    assert divergence(reference, reference) == (pytest.approx(0, abs=1e-6), 1.0)
    p, q = (np.exp(np.array(x)) / np.exp(np.array(x)).sum(-1, keepdims=True) for x in (reference, other))
    kl, agreement = divergence(reference, other)
    assert kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-4)
    assert agreement == (p.argmax(-1) == q.argmax(-1)).mean()


def test_calibration_goes_into_card_and_report(converted, tmp_path):
    (tmp_path / "prompts.txt").write_text("sort 53142\n\nreverse abc\n")
    prompts = read_prompts(tmp_path / "prompts.txt")
    result = calibrate(converted, DEMO, prompts)
    assert result.prompts == 2
    assert 0 <= result.kl < 0.5 and result.agreement > 0.8
    assert 1 <= result.steps < 10 and 1 <= result.reference_steps < 10
    assert result.render() in (converted / "README.md").read_text()
    assert json.loads((converted / "conversion.json").read_text())["calibration"]["kl"] == result.kl
    alone = calibrate(converted, None, prompts)
    assert alone.kl is None and alone.steps == result.steps
    assert (converted / "README.md").read_text().count("## Against") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "prompts.txt"]
    with pytest.raises(CheckpointError, match="no prompt"):
        calibrate(converted, DEMO, [])


def test_calibration_where_the_unquantized_model_does_not_fit(converted, monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 10**6})
    result = calibrate(converted, DEMO, ["sort 321"])
    assert result.kl is None and result.steps >= 1
    assert "was not run" in result.render()
