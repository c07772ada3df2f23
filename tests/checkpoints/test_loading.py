"""Loading is strict, and what is loaded can go to any thread."""

import dataclasses
import json
import shutil
import threading
import time

import mlx.core as mx
import pytest
from conftest import DEMO
from mlx.utils import tree_flatten
from PIL import Image
from random_models import config_json, random_model, true_pattern

import mlx_diffusiongemma
from mlx_diffusiongemma import CheckpointError, GenerationOptions, choose, generate, load
from mlx_diffusiongemma.checkpoints import loading
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.model import vocabulary
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffusiongemma.options import REFERENCE_SETTINGS

NORM = "model.decoder.norm.weight"


@pytest.fixture
def copy(demo_float32, tmp_path):
    """A checkpoint of one's own to break."""
    return shutil.copytree(demo_float32, tmp_path / "copy")


def weights_of(directory):
    weights = {}
    for path in directory.glob("*.safetensors"):
        weights.update(mx.load(str(path)))
    return weights


def rewrite(directory, change):
    """Save the checkpoint's tensors again, as `change` leaves them."""
    weights = weights_of(directory)
    mx.eval(weights)
    change(weights)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    mx.save_safetensors(str(directory / "model.safetensors"), weights)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_unquantized_checkpoints_of_any_dtype_load_and_answer(copy, dtype):
    rewrite(copy, lambda weights: weights.update({name: array.astype(dtype) for name, array in weights.items()}))
    assert generate(*load(copy), "sort 53142", seed=1).text == "12345"


def test_quantized_checkpoints_load_and_answer(demo_4bit):
    model, processor = load(demo_4bit)
    assert model.model.decoder.layers[0].experts.down_proj.bits == 4
    assert model.model.decoder.embed_tokens.bits == 8
    assert generate(model, processor, "reverse abc", seed=1).text == "cba"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_vocabulary_of_any_width_is_read_in_blocks_as_at_once(bits, tmp_path, monkeypatch):
    setting = {"embed_tokens": str(bits)}
    model, processor = load(convert_checkpoint(DEMO, tmp_path / "m", dtype="float32", overrides=setting).out)
    text = model.config.text
    assert model.model.decoder.embed_tokens.bits == bits
    hidden = mx.random.normal((1, 8, text.hidden_size), key=mx.random.key(0))
    monkeypatch.setattr(vocabulary, "BLOCK_BUDGET", 4 * 8 * 96)
    assert text.vocab_size > 2 * vocabulary.block_length(8, text.vocab_size)
    reading = model.read_vocabulary(hidden, 0.6, mx.random.key(1))
    processed = model.logits(hidden) / 0.6
    assert mx.array_equal(reading.tokens, processed.argmax(-1))
    assert mx.array_equal(reading.sample, vocabulary.sample_from(processed, mx.random.key(1)))
    soft = model.soft_embedding(processed)
    assert mx.allclose(reading.soft_embedding, soft, rtol=0, atol=2e-6 * mx.abs(soft).max().item())
    if bits >= 5:
        assert generate(model, processor, "reverse abc", seed=1).text == "cba"


@pytest.mark.parametrize("checkpoint", ["demo_float32", "demo_4bit"])
def test_fusing_leaves_names_values_and_text_as_they_are(checkpoint, request, monkeypatch):
    directory = request.getfixturevalue(checkpoint)
    monkeypatch.setattr(loading, "_fusing_pays", lambda: True)  # as on a GPU
    fused, processor = load(directory)
    plain, _ = load(directory, fuse=False)
    assert fused.model.decoder.layers[0].self_attn._joined and not plain.model.decoder.layers[0].self_attn._joined
    ours, theirs = (dict(tree_flatten(model.parameters())) for model in (fused, plain))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    assert (
        generate(fused, processor, "sort 53142", seed=1).tokens
        == generate(plain, processor, "sort 53142", seed=1).tokens
    )


def test_fused_weights_are_not_stored_twice(demo_float32, monkeypatch):
    monkeypatch.setattr(loading, "_fusing_pays", lambda: True)

    def size(fuse):
        before = mx.get_active_memory()
        model, _ = load(demo_float32, fuse=fuse)
        return mx.get_active_memory() - before, model

    assert size(True)[0] <= 1.01 * size(False)[0]


def write_random(directory, bits, dtype):
    """A checkpoint of six layers, 4 MB each in float32, with the demo's tokenizer."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 64, "vocab_size": 1024}
    config = config_json(true_pattern(6), 32, **sizes, head_dim=64, global_head_dim=128)
    model = random_model(config, bits, dtype)
    quantized = {name: module for name, module in model.named_modules() if "bits" in vars(module)}
    overrides = {name: {"group_size": part.group_size, "bits": part.bits} for name, part in quantized.items()}
    quantization = {"quantization": {"group_size": 64, "bits": 8, **overrides}} if bits else {}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config, **quantization, "eos_token_id": 1}))
    for path in DEMO.glob("token*"):
        shutil.copyfile(path, directory / path.name)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return directory


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize(("bits", "dtype"), [(None, mx.float32), (None, mx.bfloat16), (4, mx.bfloat16)])
def test_loading_holds_one_layer_twice_at_most(bits, dtype, fuse, tmp_path, monkeypatch):
    """Fusing copies a layer's projections, and on a CPU bfloat16 experts become float32."""
    monkeypatch.setattr(loading, "_fusing_pays", lambda: True)
    directory = write_random(tmp_path / "model", bits, dtype)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load(directory, fuse=fuse)
    peak = mx.get_peak_memory() - before
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    layer = max(sum(array.nbytes for _, array in tree_flatten(layer)) for layer in model.model.decoder.layers)
    assert weights <= mx.get_active_memory() - before <= 1.01 * weights
    assert peak <= weights + layer / 2


def test_vision_weights_are_read_once_when_the_first_images_come(demo_float32, monkeypatch):
    """Two threads have one each, and the reading takes long enough for both to wait for it."""
    reads = []

    def slowly(checkpoint):
        reads.append(threading.current_thread())
        time.sleep(0.2)
        return load_vision(checkpoint)

    load_vision = loading.load_vision
    monkeypatch.setattr(loading, "load_vision", slowly)
    model, processor = load(demo_float32)
    assert not reads
    picture = processor.prepare_image(Image.new("RGB", (96, 96), "red"))
    together, soft = threading.Barrier(2), []

    def see():
        together.wait()
        tokens = model.encode_image(picture)
        mx.eval(tokens)
        soft.append(tokens)

    threads = [threading.Thread(target=see) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1 and len(soft) == 2
    assert mx.array_equal(*soft) and mx.array_equal(soft[0], model.encode_image(picture))
    assert not any("vision" in name for name, _ in model.named_modules())


def test_vision_weights_that_could_not_be_read_are_tried_again(demo_float32, monkeypatch):
    model, processor = load(demo_float32)
    picture = processor.prepare_image(Image.new("RGB", (96, 96), "red"))
    with monkeypatch.context() as broken:
        broken.setattr(loading, "load_vision", lambda checkpoint: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.encode_image(picture)
    assert model.encode_image(picture).shape[0] == picture.soft_tokens


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
def test_a_loaded_model_works_in_another_thread(demo_float32, fuse, monkeypatch):
    monkeypatch.setattr(loading, "_fusing_pays", lambda: fuse)
    model, processor = load(demo_float32)
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.append(generate(model, processor, "sort 53142", seed=1).text))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["12345", "12345"]


def test_progress_counts_layers(demo_float32):
    seen = []
    load(demo_float32, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 6) for n in range(1, 7)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop(NORM), f"{NORM} is missing"),
        (lambda w: w.update({"model.decoder.extra": mx.zeros(3)}), "model.decoder.extra is not part of the model"),
        (lambda w: w.update({NORM: mx.zeros(7)}), f"{NORM} is [7] instead of [128]"),
        (lambda w: [w.pop(name) for name in list(w) if "layernorm" in name and "vision" not in name], "and 39 more"),
        (lambda w: w.pop("model.encoder.vision_tower.std_bias"), "std_bias is missing"),
        (lambda w: w.update({"model.encoder.vision_tower.more": mx.zeros(3)}), "more is not part"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, change, sentence):
    rewrite(copy, change)
    with pytest.raises(CheckpointError) as error:
        load(copy)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_without_vision_weights_reads_text_and_refuses_images(copy):
    rewrite(copy, lambda w: [w.pop(name) for name in list(w) if "vision" in name])
    model, processor = load(copy)
    assert generate(model, processor, "sort 53142", seed=1).text == "12345"
    with pytest.raises(CheckpointError, match="no vision weights"):
        generate(model, processor, "colors?", images=[Image.new("RGB", (96, 96))])


def test_an_unconverted_checkpoint_is_refused_with_the_command_to_run():
    with pytest.raises(CheckpointError, match=f"mlx-dg convert {DEMO} --q4"):
        load(DEMO)


def break_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard_of(directory):
    return next(directory.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: shutil.rmtree(d), "no directory"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: break_config(d, model_type="gemma4"), "'gemma4'"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
        (lambda d: shard_of(d).write_bytes(shard_of(d).read_bytes()[:-1000]), "is truncated"),
        (lambda d: shard_of(d).write_bytes(b"\xff" * 100), "is damaged"),
        (lambda d: shard_of(d).write_bytes(b""), "is damaged"),
        (lambda d: rewrite(d, lambda weights: weights.update({NORM: mx.zeros(128, mx.complex64)})), "unknown type"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_sentence(copy, damage, sentence):
    damage(copy)
    with pytest.raises(CheckpointError) as error:
        load(copy)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_an_index_is_not_trusted(copy):
    rewrite(copy, lambda weights: None)
    index = copy / "model.safetensors.index.json"
    for name, sentence in [("gone.safetensors", "lacks gone"), ("../model.safetensors", "outside its own directory")]:
        index.write_text(json.dumps({"weight_map": {NORM: name}}))
        with pytest.raises(CheckpointError, match=sentence):
            load(copy)
    index.write_text('{"weight_map": 5}')
    with pytest.raises(CheckpointError, match="weight_map"):
        load(copy)


def test_a_checkpoint_that_ends_no_reply_is_refused(copy):
    (copy / "generation_config.json").unlink()
    text = json.loads((copy / "config.json").read_text())["text_config"] | {"eos_token_id": None}
    break_config(copy, eos_token_id=None, generation_config=None, text_config=text)
    with pytest.raises(CheckpointError, match="add eos_token_id"):
        load(copy)
    break_config(copy, eos_token_id=[1, 9])
    assert load(copy)[0].options.end_tokens == (1, 9)


def test_a_model_without_a_checkpoints_options_has_the_references(demo_float32):
    trained, processor = load(demo_float32)
    model = DiffusionGemma(trained.config)
    model.load_weights(tree_flatten(trained.parameters()))
    settings = REFERENCE_SETTINGS
    assert model.options == dataclasses.replace(settings, canvas_length=trained.config.canvas_length)
    result = generate(model, processor, "sort 53142", seed=1, max_tokens=20)
    assert (result.finish_reason, len(result.tokens)) == ("length", 20)
    assert result.tokens[:3] == generate(trained, processor, "sort 53142", seed=1).tokens[:3]
    assert sum(choose(model, processor, "sort 21", ["12", "21"], seed=1).values()) == pytest.approx(1)
    assert DiffusionGemma(trained.config, GenerationOptions(max_steps=5)).options.max_steps == 5
    assert DiffusionGemma(trained.config, GenerationOptions(max_steps=5)).options.t_max == settings.t_max


def test_quantized_files_need_a_quantization(demo_4bit, tmp_path):
    copy = shutil.copytree(demo_4bit, tmp_path / "copy")
    break_config(copy, quantization=None)
    with pytest.raises(CheckpointError, match="no `quantization`"):
        load(copy)
    break_config(copy, quantization={"group_size": 64, "bits": 8})
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        load(copy)


def test_a_name_that_is_nowhere():
    for name in ("nowhere", "./nowhere", "a/b/c", "~/nowhere/at-all"):
        with pytest.raises(CheckpointError, match="no directory"):
            load(name)


def test_what_cannot_fit_is_refused_and_what_barely_fits_is_warned_about(demo_float32, monkeypatch):
    from mlx_diffusiongemma.checkpoints import memory
    from mlx_diffusiongemma.errors import MemoryWarning

    weights = sum(array.nbytes for array in weights_of(demo_float32).values())
    monkeypatch.setattr(memory, "usable_bytes", lambda: weights)
    with pytest.raises(CheckpointError, match="can be used here"):
        load(demo_float32)
    monkeypatch.setattr(memory, "usable_bytes", lambda: weights + 4 * 2**20)
    with pytest.warns(MemoryWarning, match="8,192 tokens"):
        load(demo_float32)


def test_freed_memory_is_bounded(demo_float32):
    from mlx_diffusiongemma.checkpoints.memory import CACHE_LIMIT

    load(demo_float32)
    assert mx.set_cache_limit(CACHE_LIMIT) == CACHE_LIMIT


def test_mlx_missing_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.delitem(sys.modules, "mlx_diffusiongemma.checkpoints.loading", raising=False)
    monkeypatch.delitem(vars(mlx_diffusiongemma), "load", raising=False)
    with pytest.raises(mlx_diffusiongemma.DiffusionGemmaError, match=r"mlx-diffusiongemma\[cpu\]"):
        _ = mlx_diffusiongemma.load


def test_a_directory_has_no_revision(demo_float32):
    with pytest.raises(CheckpointError, match="`revision` is about a repository"):
        load(demo_float32, revision="main")
