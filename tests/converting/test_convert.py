"""Conversion on the demo checkpoint: what is written, in which layout, with which options."""

import json

import mlx.core as mx
import numpy as np
import pytest
from convert_data import DEMO, all_tensors, copy_demo, edit_json, read_tensors, split

from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.convert import convert_checkpoint, plan_conversion
from mlx_diffusiongemma.convert.reading import reader

MX_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}
STORED = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "U32": np.uint32, "U8": np.uint8}


def array(tensor):
    dtype, shape, data = tensor
    return mx.array(np.frombuffer(data, STORED[dtype])).view(MX_TYPES[dtype]).reshape(shape)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "demo-4bit"
    return convert_checkpoint(DEMO, out)


def test_every_tensor_equals_mlx_quantize_of_the_whole(converted, monkeypatch, tmp_path):
    monkeypatch.setattr(reader, "SLAB_BYTES", 4096)  # many slabs for every tensor of any size
    sliced = convert_checkpoint(DEMO, tmp_path / "sliced")
    assert sliced.files == converted.files
    ours = all_tensors(converted.out)
    config = ModelConfig.from_directory(converted.out)
    for name, tensor in read_tensors(DEMO / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in ours:
            assert ours[name] == tensor
            continue
        module = config.quantization.for_module(path)
        expected = mx.quantize(array(tensor), group_size=module.group_size, bits=module.bits)
        for role, whole in zip(("weight", "scales", "biases"), expected, strict=True):
            assert mx.array_equal(array(ours[f"{path}.{role}"]), whole), f"{path}.{role}"


def test_files_are_those_of_a_whole_checkpoint(converted):
    names = {path.name for path in converted.out.iterdir()}
    copied = {path.name for path in DEMO.iterdir()}
    assert names == copied | {"model.safetensors.index.json", "conversion.json", "README.md"}
    index = json.loads((converted.out / "model.safetensors.index.json").read_text())
    tensors = all_tensors(converted.out)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (converted.out / name).read_bytes() == (DEMO / name).read_bytes()
    assert "library_name: mlx" in (converted.out / "README.md").read_text()


def test_config_is_the_communitys(converted):
    config = json.loads((converted.out / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert {key: config["quantization"][key] for key in ("group_size", "bits", "mode")} == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    assert config["quantization"]["model.decoder.embed_tokens"] == {"group_size": 64, "bits": 8}
    assert config["generation_config"] == json.loads((DEMO / "generation_config.json").read_text())
    assert config["eos_token_id"] == [1, 16, 9]
    before, after = ModelConfig.from_directory(DEMO), ModelConfig.from_directory(converted.out)
    assert (before.text, before.vision) == (after.text, after.vision)


def test_two_conversions_are_identical(converted, tmp_path):
    again = convert_checkpoint(DEMO, tmp_path / converted.out.name)
    assert {p.name: p.read_bytes() for p in again.out.iterdir()} == {
        p.name: p.read_bytes() for p in converted.out.iterdir()
    }


def test_shards_of_source_and_target(converted, monkeypatch, tmp_path):
    monkeypatch.setattr("mlx_diffusiongemma.convert.plan.SHARD_BYTES", 400_000)
    source = split(copy_demo(tmp_path / "source"))
    report = convert_checkpoint(source, tmp_path / "out")
    count = len(report.files)
    assert count > 3
    assert set(report.files) == {f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)}
    assert all((report.out / name).stat().st_size <= 400_000 for name in report.files)
    assert all_tensors(report.out) == all_tensors(converted.out)
    weight_map = json.loads((report.out / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name in read_tensors(report.out / file) for name, file in weight_map.items())


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("fp16", "F16"), ("float32", "F32")])
def test_unquantized_in_every_dtype(dtype, stored, tmp_path):
    report = convert_checkpoint(DEMO, tmp_path / "out", bits=None, dtype=dtype)
    ours = all_tensors(report.out)
    source = read_tensors(DEMO / "model.safetensors")
    assert len(ours) == len(source)
    for name, tensor in source.items():
        renamed = f"{name}.weight" if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) else name
        assert ours[renamed][0] == stored
        assert mx.array_equal(array(ours[renamed]), array(tensor).astype(MX_TYPES[stored]))
    config = json.loads((report.out / "config.json").read_text())
    assert "quantization" not in config
    assert MX_TYPES[stored] == getattr(mx, config["dtype"])


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (5, 32), (6, 64), (8, 32)])
def test_bits_and_group_sizes(bits, group_size, tmp_path):
    report = convert_checkpoint(DEMO, tmp_path / "out", bits=bits, group_size=group_size)
    module = ModelConfig.from_directory(report.out).quantization.for_module("model.decoder.layers.0.experts.down_proj")
    assert (module.bits, module.group_size) == (bits, group_size)
    assert ModelConfig.from_directory(report.out).quantization.for_module("model.decoder.embed_tokens").bits == 8


def test_modules_that_the_group_size_does_not_divide_stay_whole(tmp_path):
    report = convert_checkpoint(DEMO, tmp_path / "out", group_size=128)
    assert "model.decoder.layers.0.experts.down_proj" in report.plan.unquantized
    tensors = all_tensors(report.out)
    assert "model.decoder.layers.0.experts.down_proj.scales" not in tensors
    assert tensors["model.decoder.layers.0.experts.down_proj.weight"][0] == "BF16"
    assert "model.decoder.layers.0.experts.down_proj" in report.render()


def test_tied_duplicates_are_dropped(converted, tmp_path):
    def with_duplicates(tensors):
        embedding = tensors["model.decoder.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding
        tensors["model.encoder.language_model.embed_tokens.weight"] = embedding
        tensors["model.decoder.rotary_emb.inv_freq"] = ("F32", (2,), bytes(8))

    source = copy_demo(tmp_path / "source", with_duplicates)
    assert all_tensors(convert_checkpoint(source, tmp_path / "out").out) == all_tensors(converted.out)


def test_one_key_per_expert(converted, tmp_path):
    source = copy_demo(tmp_path / "source", one_key_per_expert)
    report = convert_checkpoint(source, tmp_path / "out")
    assert "one key per expert" in report.plan.source
    assert all_tensors(report.out) == all_tensors(converted.out)


def one_key_per_expert(tensors):
    """gate_proj, up_proj and down_proj of every expert under keys of their own."""
    apart = {}
    for name, (dtype, shape, data) in tensors.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            apart[name] = (dtype, shape, data)
            continue
        home, values = name.rpartition(".")[0], np.frombuffer(data, np.uint16).reshape(shape)
        for expert, matrix in enumerate(values):
            parts = {"down": matrix}
            if name.endswith("gate_up_proj"):
                parts = dict(zip(("gate", "up"), np.split(matrix, 2), strict=True))
            for part, value in parts.items():
                apart[f"{home}.{expert}.{part}_proj.weight"] = (dtype, value.shape, value.tobytes())
    return apart


def test_gate_and_up_apart(converted, tmp_path):
    def apart(tensors):
        for name in [name for name in tensors if name.endswith(".experts.gate_up_proj")]:
            dtype, shape, data = tensors.pop(name)
            values = np.frombuffer(data, np.uint16).reshape(shape)
            for part, value in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                tensors[name.replace("gate_up", part) + ".weight"] = (dtype, value.shape, value.tobytes())

    source = copy_demo(tmp_path / "source", apart)
    assert all_tensors(convert_checkpoint(source, tmp_path / "out").out) == all_tensors(converted.out)


def test_config_saved_again_by_transformers(converted, tmp_path):
    def saved_again(content):
        text = content["text_config"]
        text["per_layer_config"] = {"5": {"head_dim": text.pop("global_head_dim"), "num_key_value_heads": 1}}
        del text["num_global_key_value_heads"]

    source = copy_demo(tmp_path / "source")
    edit_json(source / "config.json", saved_again)
    out = convert_checkpoint(source, tmp_path / converted.out.name).out
    assert json.loads((out / "config.json").read_text()) == json.loads((converted.out / "config.json").read_text())
    assert all_tensors(out) == all_tensors(converted.out)


def test_progress_reaches_the_total(tmp_path):
    seen = []
    report = convert_checkpoint(DEMO, tmp_path / "out", progress=lambda done, total, name: seen.append((done, total)))
    assert seen[-1] == (report.plan.total_bytes, report.plan.total_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_buffer_cache_limit_is_restored(tmp_path):
    before = mx.set_cache_limit(123_456_789)
    try:
        convert_checkpoint(DEMO, tmp_path / "out")
        assert mx.set_cache_limit(123_456_789) == 123_456_789
    finally:
        mx.set_cache_limit(before)


def test_the_plan_tells_what_will_be_written(converted):
    plan = plan_conversion(DEMO)
    assert {o.name: (o.dtype, o.shape) for o in plan.tensors} == {
        name: tensor[:2] for name, tensor in all_tensors(converted.out).items()
    }
    assert plan.file_bytes == sum(path.stat().st_size for path in converted.out.glob("*.safetensors"))
