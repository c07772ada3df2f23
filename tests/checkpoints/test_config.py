"""Configurations in every spelling, and the options a checkpoint brings."""

import json

import pytest
from conftest import DEMO

from mlx_diffusiongemma import CheckpointError, GenerationOptions, ModelConfig, Processor
from mlx_diffusiongemma.config import FULL, SLIDING, Quantization

HUB = json.loads((DEMO / "config.json").read_text())


def changed(**text_config):
    config = json.loads(json.dumps(HUB))
    config["text_config"].update(text_config)
    return config


def resaved():
    """As Transformers saves it: per-layer overrides, KV heads left out when equal, nothing global."""
    config = changed(per_layer_config={"5": {"head_dim": 64, "num_key_value_heads": 1}})
    for name in ("global_head_dim", "num_global_key_value_heads"):
        del config["text_config"][name]
    return config


def test_the_three_spellings_are_the_same_configuration():
    community = {
        **HUB,
        "quantization": {
            "group_size": 32,
            "bits": 4,
            "mode": "mxfp4",
            "model.decoder.embed_tokens": {"group_size": 64, "bits": 8},
            "model.decoder.layers.0.router.proj": False,
        },
    }
    hub = ModelConfig.from_dict(HUB)
    assert ModelConfig.from_dict(resaved()) == hub
    found = ModelConfig.from_dict(community)
    assert found.text == hub.text
    # An override without a mode is affine, whatever the default mode is.
    assert found.quantization.for_module("model.decoder.embed_tokens") == Quantization(64, 8, "affine")
    assert found.quantization.for_module("model.decoder.layers.0.experts.down_proj") == Quantization(32, 4, "mxfp4")
    assert found.quantization.for_module("model.decoder.layers.0.router.proj") is None


def test_keys_are_zero_padded_where_there_are_ten_layers_or_more():
    kinds = [SLIDING] * 11 + [FULL]
    config = changed(num_hidden_layers=12, layer_types=kinds, per_layer_config={"11": {"head_dim": 64}, "05": {}})
    layers = ModelConfig.from_dict(config).text.layers
    assert (layers[11].head_dim, layers[11].num_key_value_heads) == (64, 2)  # KV heads left out: as everywhere
    assert layers[5].head_dim == 32


def test_a_last_layer_that_says_sliding_is_made_full():
    config = changed(layer_types=[SLIDING] * 6)
    assert [layer.kind for layer in ModelConfig.from_dict(config).text.layers] == [SLIDING] * 5 + [FULL]


def test_defaults_and_unknown_keys():
    config = changed(something_new=1)
    del config["text_config"]["final_logit_softcapping"]
    del config["text_config"]["layer_types"]
    text = ModelConfig.from_dict(config).text
    assert text.final_logit_softcapping == 30.0
    assert [layer.kind for layer in text.layers] == [SLIDING] * 5 + [FULL]
    assert ModelConfig.from_dict({**HUB, "vision_config": None}).vision is None


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "llama"}, "describes a 'llama' model"),
        ({"model_type": "diffusion_gemma"}, "lacks text_config"),
        (changed(hidden_size=None, vocab_size=None), "lacks hidden_size, vocab_size"),
        (changed(hidden_activation="silu"), "activation 'silu'"),
        (changed(use_bidirectional_attention="all"), '"all"'),
        (changed(layer_types=[SLIDING]), "must name 6 layers"),
        (changed(hidden_size="big"), "hidden_size"),
        (changed(rope_parameters=3), "rope_parameters"),
        (changed(per_layer_config={"five": {}}), "per_layer_config"),
        ({**HUB, "text_config": []}, "text_config"),
        ({**HUB, "quantization": {"bits": 4}}, "group_size"),
        ({**HUB, "quantization": [4]}, "quantization"),
        ({**HUB, "canvas_length": -5}, "canvas_length"),
        ({**HUB, "canvas_length": True}, "canvas_length"),
        ({**HUB, "quantization": {"group_size": 32, "bits": 4, "lm_head": {"bits": "four"}}}, "lm_head"),
        ({**HUB, "quantization": {"group_size": 32, "bits": 4, "mode": 5}}, "mode by name"),
        ({**HUB, "vision_config": {**HUB["vision_config"], "rope_parameters": 5}}, "vision_config.rope_parameters"),
        ({**HUB, "vision_config": {**HUB["vision_config"], "head_dim": "x"}}, "head_dim"),
        (changed(layer_types=5), "must name 6 layers"),
        (changed(layer_types=[{}] * 6), "must name 6 layers"),
        (changed(num_hidden_layers=0, layer_types=[]), "num_hidden_layers is 0"),
        (changed(head_dim="x"), "head_dim is 'x'"),
        (changed(global_head_dim="x"), "head_dim is 'x'"),
        (changed(rope_parameters={FULL: {"partial_rotary_factor": "x"}}), "rope_parameters of full_attention"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(config, sentence):
    with pytest.raises(CheckpointError) as error:
        ModelConfig.from_dict(config)
    assert sentence in str(error.value)


def test_a_checkpoints_options_are_its_own_and_end_tokens_are_the_union(tmp_path):
    options = GenerationOptions.from_checkpoint(DEMO)
    assert options.end_tokens == (1, 9, 16)  # 9 is in generation_config.json only
    assert options.max_tokens == 1024  # ours: the file's own is a single canvas
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "generation_config": {"t_max": 0.9}}))
    inside = GenerationOptions.from_checkpoint(tmp_path)
    assert (inside.end_tokens, inside.t_max) == ((7,), 0.9)
    (tmp_path / "config.json").write_text("{}")
    bare = GenerationOptions.from_checkpoint(tmp_path)
    assert (bare.max_steps, bare.entropy_bound, bare.t_max, bare.t_min) == (48, 0.1, 0.8, 0.4)
    assert (bare.stability, bare.confidence, bare.canvas_length) == (1, 0.005, 256)
    (tmp_path / "generation_config.json").write_text('{"t_max": "hot"}')
    with pytest.raises(CheckpointError, match="t_max"):
        GenerationOptions.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "sentence"),
    [
        ({"eos_token_id": [1, "a"]}, {}, "eos_token_id"),
        ({"eos_token_id": {}}, {}, "eos_token_id"),
        ({"text_config": 5}, {}, "text_config"),
        ({"generation_config": 5}, {}, "generation_config"),
        ({}, {"sampler_config": 5}, "generation_config.json: sampler_config"),
        ({}, {"t_max": 0, "t_min": 0}, "t_max must be above 0"),
    ],
)
def test_damaged_options_of_a_checkpoint_are_said_in_one_sentence(tmp_path, config, generation, sentence):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(CheckpointError, match=sentence):
        GenerationOptions.from_checkpoint(tmp_path)


@pytest.mark.parametrize("settings", [5, {"max_soft_tokens": "x"}])
def test_damaged_image_settings_are_said_in_one_sentence(tmp_path, settings):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    with pytest.raises(CheckpointError, match="image settings"):
        Processor.from_directory(tmp_path, ModelConfig.from_dict(HUB))


def test_a_field_that_only_transformers_reads_is_said_in_one_sentence(tmp_path):
    for file in DEMO.iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(changed(initializer_range="x")))
    with pytest.raises(CheckpointError, match="initializer_range"):
        Processor.from_directory(tmp_path, ModelConfig.from_dict(HUB))
