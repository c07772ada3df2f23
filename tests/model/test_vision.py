"""The vision tower against Transformers: golden files everywhere, the live model where PyTorch is installed."""

import importlib.util
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from golden.make_vision import (
    DATA,
    DEMO,
    DEMO_CASES,
    SEEDED_CASES,
    SEEDED_CONFIG,
    SEEDED_TEXT_HIDDEN,
    demo_weights,
    kept,
    picture,
    reference_features,
    reference_patches,
)

from mlx_diffusiongemma.config import ModelConfig, VisionConfig
from mlx_diffusiongemma.errors import CheckpointError, PromptError
from mlx_diffusiongemma.model.vision import VisionModel, VisionTower, attend, image_blocks
from mlx_diffusiongemma.processing.images import prepare_image

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
TOLERANCE = 5e-5  # of the largest feature


@pytest.fixture(scope="module")
def demo() -> VisionModel:
    config, weights = demo_weights()
    return build(config, len(weights["embed_vision.embedding_projection.weight"]), weights)


@pytest.fixture(scope="module")
def seeded() -> VisionModel:
    golden = np.load(DATA / "seeded_features.npz")
    weights = {name: golden[name] for name in golden.files if "vision" in name}
    return build(SEEDED_CONFIG, SEEDED_TEXT_HIDDEN, weights)


def build(config: dict, text_hidden: int, weights: dict[str, np.ndarray]) -> VisionModel:
    model = VisionModel(VisionConfig.from_dict(config), text_hidden)
    model.load_weights([(name, mx.array(weight)) for name, weight in weights.items()], strict=True)
    return model


def features(model: VisionModel, width: int, height: int, budget: int) -> np.ndarray:
    patch_size = model.vision_tower.config.patch_size
    image = prepare_image(picture("RGB", width, height), budget=budget, patch_size=patch_size)
    made = np.array(model(mx.array(image.pixels), mx.array(image.positions)))
    assert len(made) == image.soft_tokens
    return made


def error(ours: np.ndarray, reference: np.ndarray) -> float:
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("case", DEMO_CASES, ids=str)
def test_features_of_the_demo_checkpoint(demo, case):
    golden = np.load(DATA / "demo_features.npz")["{}x{}@{}".format(*case)]
    assert error(kept(features(demo, *case)), golden) < TOLERANCE


@pytest.mark.parametrize("case", SEEDED_CASES, ids=str)
def test_features_of_a_seeded_tower(seeded, case):
    golden = np.load(DATA / "seeded_features.npz")["{}x{}@{}".format(*case)]
    assert error(kept(features(seeded, *case)), golden) < TOLERANCE


@needs_torch
@pytest.mark.parametrize("case", [(400, 50, 70), (90, 90, 280), (2, 90, 140)], ids=str)
def test_every_feature_equals_the_live_reference(seeded, case):
    golden = np.load(DATA / "seeded_features.npz")
    weights = {name: golden[name] for name in golden.files if "vision" in name}
    *size, budget = case
    patches = reference_patches(picture("RGB", *size), budget, SEEDED_CONFIG["patch_size"])
    assert error(features(seeded, *case), reference_features(SEEDED_CONFIG, weights, patches)) < TOLERANCE


@needs_torch
def test_the_demo_checkpoint_equals_the_live_model(demo):
    import torch
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaForBlockDiffusion

    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(DEMO, dtype=torch.float32).double().eval()
    made = reference_patches(picture("RGB", 300, 120), 70)
    with torch.no_grad():
        pixels = torch.tensor(made["pixels"], dtype=torch.float64)[None]
        positions = torch.tensor(made["positions"])[None]
        theirs = reference.model.encoder.get_image_features(pixels, positions).pooler_output.numpy()
    assert error(features(demo, 300, 120, 70), theirs) < TOLERANCE


def test_patch_order_does_not_matter_to_pooling(seeded):
    image = prepare_image(picture("RGB", 300, 200), budget=70, patch_size=4)
    shuffled = np.random.default_rng(0).permutation(len(image.pixels))
    tower = seeded.vision_tower
    straight = tower(mx.array(image.pixels), mx.array(image.positions))
    mixed = tower(mx.array(image.pixels[shuffled]), mx.array(image.positions[shuffled]))
    assert error(np.array(mixed), np.array(straight)) < 1e-5


def test_without_standardisation(seeded):
    tower = VisionTower(replace(seeded.vision_tower.config, standardize=False))
    assert not {"std_bias", "std_scale"} & set(tower.parameters())


def test_works_in_the_dtype_of_the_weights(demo):
    config, weights = demo_weights()
    model = build(config, 128, weights)
    model.set_dtype(mx.bfloat16)
    image = prepare_image(picture("RGB", 90, 90), budget=70)
    made = model(mx.array(image.pixels), mx.array(image.positions))
    assert made.dtype == mx.bfloat16
    assert error(np.array(made.astype(mx.float32)), features(demo, 90, 90, 70)) < 0.1


def test_the_projection_can_be_quantized(demo):
    config, weights = demo_weights()
    model = build(config, 128, weights)
    nn.quantize(model.embed_vision, group_size=64, bits=8)
    assert error(features(model, 90, 90, 70), features(demo, 90, 90, 70)) < 0.02


def test_an_image_longer_than_the_position_table_is_refused(demo):
    with pytest.raises(PromptError, match=r"282 patches long .* at most 128"):
        features(demo, 800, 100, 1120)


def test_unsupported_variants_are_refused():
    config = VisionConfig.from_dict(SEEDED_CONFIG)
    with pytest.raises(CheckpointError, match="use_clipped_linears"):
        VisionTower(replace(config, use_clipped_linears=True))
    with pytest.raises(CheckpointError, match="head_dim is 6"):
        VisionTower(replace(config, head_dim=6))


def test_both_spellings_of_the_rope_are_the_same():
    default = SEEDED_CONFIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    assert VisionConfig.from_dict(default) == VisionConfig.from_dict(SEEDED_CONFIG)


@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 144])
def test_attention_is_exact_whatever_the_head_size(head_dim):
    draw = np.random.default_rng(head_dim)
    q, k, v = (draw.standard_normal((9, heads, head_dim)).astype(np.float32) for heads in (4, 2, 2))
    scores = np.einsum("qhd,khd->hqk", q, k.repeat(2, axis=1))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hqk,khd->qhd", weights, v.repeat(2, axis=1))
    made = attend(*map(mx.array, (q, k, v)))
    assert error(np.array(made), expected) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [
        ([], []),
        ([1, 2], []),
        ([9], [(0, 1)]),
        ([9, 9, 1, 9], [(0, 2), (3, 4)]),
        ([1, 9, 9, 2, 2, 9, 9, 9], [(1, 3), (5, 8)]),
    ],
)
def test_image_blocks(tokens, blocks):
    assert image_blocks(tokens, image_token_id=9) == blocks


@needs_torch
def test_image_blocks_are_those_of_the_encoders_masks():
    """In `generate`, image tokens see their whole block in both layer kinds, beyond the sliding window too."""
    import torch
    from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaEncoderModel

    image, window = ModelConfig.from_directory(DEMO).image_token_id, 8
    tokens = [2, 5, *[image] * 12, 5, *[image] * 3, 5, 5, 5]
    made = DiffusionGemmaEncoderModel.create_masks_for_generate(
        config=DiffusionGemmaTextConfig(
            sliding_window=window, use_bidirectional_attention="vision", attn_implementation="sdpa"
        ),
        inputs_embeds=torch.empty(1, len(tokens), 0),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.bool),
        past_key_values=None,
        position_ids=torch.arange(len(tokens))[None],
        mm_token_type_ids=(torch.tensor([tokens]) == image).int(),
    )
    query, key = np.mgrid[: len(tokens), : len(tokens)]
    full = key <= query
    sliding = full & (key > query - window)
    for start, end in image_blocks(tokens, image):
        full[start:end, start:end] = True
        sliding[start:end, start:end] = True
    assert np.array_equal(made["full_attention"][0, 0].numpy(), full)
    assert np.array_equal(made["sliding_attention"][0, 0].numpy(), sliding)
