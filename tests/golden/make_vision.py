"""Make tests/data/vision/*.npz: Transformers' pixels and image features, for tests that run without PyTorch.

    python tests/golden/make_vision.py

The tests take the cases below from here, and compare with Transformers itself where PyTorch is installed.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

TESTS = Path(__file__).parent.parent
DATA = TESTS / "data" / "vision"
DEMO = TESTS.parent / "mlx_diffusiongemma" / "demo"
KEPT_ROWS = 12  # of each result, evenly spaced, go into the file

# name: (mode, width, height, budget)
PIXEL_CASES = {
    "photo": ("RGB", 640, 480, 280),
    "no resize": ("RGB", 480, 336, 70),
    "tiny": ("RGB", 3, 2, 140),
    "one pixel": ("RGB", 1, 1, 70),
    "wide 8:1": ("RGB", 800, 100, 560),
    "tall 1:8": ("RGB", 100, 800, 1120),
    "line": ("RGB", 5000, 2, 70),
    "column": ("RGB", 3, 900, 140),
    "grey": ("L", 211, 97, 70),
    "grey, alpha": ("LA", 97, 211, 70),
    "alpha": ("RGBA", 300, 200, 140),
    "palette": ("P", 120, 130, 70),
    "palette, transparent": ("P+", 130, 120, 70),
    "black and white": ("1", 150, 90, 70),
    "print": ("CMYK", 90, 150, 70),
}
# (width, height, budget): the sides of the demo's position table are 128 patches, too few for longer pictures
DEMO_CASES = [
    *((w, h, budget) for budget in (70, 140) for w, h in ((400, 50), (90, 90), (50, 400))),
    *((96, 96, budget) for budget in (280, 560)),
]
SEEDED_CASES = [(w, h, budget) for budget in (70, 140, 280, 560, 1120) for w, h in ((800, 100), (60, 480))]
SEEDED_TEXT_HIDDEN = 24
SEEDED_CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 288,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    "standardize": True,
}


def picture(mode: str, width: int, height: int) -> Image.Image:
    """A picture with edges, gradients and noise, the same on every machine."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    planes = [
        Image.fromarray(
            (((3 + c) * x + (7 - c) * y + 40 * ((x >> 4 ^ y >> 3) & 3) + x * y * 31 % 17) % 256).astype("u1")
        )
        for c in range(4)
    ]
    if mode == "1":
        return planes[0].point(lambda value: 255 * (value > 127)).convert("1")
    if mode == "L":
        return planes[0]
    if not mode.startswith("P"):
        return Image.merge(mode, planes[: len(mode)])
    image = Image.fromarray(np.asarray(planes[0]))
    image.putpalette([(index * step) % 256 for index in range(256) for step in (7, 11, 13)])
    if mode == "P+":
        image.info["transparency"] = bytes(range(256))
    return image


def kept(rows: np.ndarray) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(KEPT_ROWS, len(rows))).astype(int)]


def reference_patches(image: Image.Image, budget: int, patch_size: int = 16) -> dict[str, np.ndarray]:
    """The Pillow processor's pixels [budget * 9, patch_size² * 3] and positions [budget * 9, 2], padding and all."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    made = Gemma4ImageProcessorPil(max_soft_tokens=budget, patch_size=patch_size)(image, return_tensors="np")
    return {"pixels": made["pixel_values"][0], "positions": made["image_position_ids"][0]}


def reference_features(config: dict, weights: dict[str, np.ndarray], patches: dict[str, np.ndarray]) -> np.ndarray:
    """Embeddings [soft_tokens, text hidden] of one padded image in float64. `weights` are named from
    `model.encoder.` on.
    """
    import torch
    from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaMultimodalEmbedder
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    vision = Gemma4VisionConfig(**config)
    text_hidden = len(weights["embed_vision.embedding_projection.weight"])
    modules = {
        "vision_tower.": Gemma4VisionModel(vision),
        "embed_vision.": DiffusionGemmaMultimodalEmbedder(vision, DiffusionGemmaTextConfig(hidden_size=text_hidden)),
    }
    for prefix, module in modules.items():
        own = {k.removeprefix(prefix): torch.tensor(w) for k, w in weights.items() if k.startswith(prefix)}
        module.load_state_dict(own, strict=True)
        module.double().eval()
    pixels = torch.tensor(patches["pixels"], dtype=torch.float64)[None]
    with torch.no_grad():
        soft = modules["vision_tower."](pixels, torch.tensor(patches["positions"])[None]).last_hidden_state
        return modules["embed_vision."](soft).numpy()


def seeded_weights() -> dict[str, np.ndarray]:
    """Random float32 weights for SEEDED_CONFIG. q and k norms near 0.2 keep attention, and so float32, well
    conditioned.
    """
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    draw = np.random.default_rng(7)
    hidden = SEEDED_CONFIG["hidden_size"]
    shapes = {
        f"vision_tower.{k}": w.shape
        for k, w in Gemma4VisionModel(Gemma4VisionConfig(**SEEDED_CONFIG)).state_dict().items()
    }
    shapes["embed_vision.embedding_projection.weight"] = (SEEDED_TEXT_HIDDEN, hidden)
    weights = {}
    for name, shape in sorted(shapes.items()):
        noise = draw.standard_normal(shape)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            noise = 0.2 + 0.02 * noise
        elif name.endswith(("norm.weight", "std_scale")):
            noise = 1 + 0.1 * noise
        elif len(shape) == 2:
            noise /= shape[1] ** 0.5
        weights[name] = noise.astype(np.float32)
    return weights


def demo_weights() -> tuple[dict, dict[str, np.ndarray]]:
    """The demo checkpoint's vision configuration and float32 weights, named from `model.encoder.` on."""
    import mlx.core as mx

    config = json.loads((DEMO / "config.json").read_text())["vision_config"]
    weights = {
        name.removeprefix("model.encoder."): np.array(weight.astype(mx.float32))
        for name, weight in mx.load(str(DEMO / "model.safetensors")).items()
        if name.startswith(("model.encoder.vision_tower.", "model.encoder.embed_vision."))
    }
    return config, weights


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    (DATA / f"{name}.npz").write_bytes(buffer.getvalue())
    print(f"{name}.npz: {len(buffer.getvalue()) / 1000:.0f} kB")


def main() -> None:
    pixels = {}
    for name, (mode, width, height, budget) in PIXEL_CASES.items():
        patches = reference_patches(picture(mode, width, height), budget)
        real = patches["positions"][:, 0] >= 0
        pixels[f"{name}/pixels"] = np.round(kept(patches["pixels"][real]) * 255).astype(np.uint8)
        pixels[f"{name}/positions"] = patches["positions"][real].astype(np.uint16)
    save("pixels", pixels)

    config, weights = demo_weights()
    demo = {}
    for width, height, budget in DEMO_CASES:
        patches = reference_patches(picture("RGB", width, height), budget)
        demo[f"{width}x{height}@{budget}"] = kept(reference_features(config, weights, patches)).astype(np.float32)
    save("demo_features", demo)

    weights = seeded_weights()
    seeded = dict(weights)
    for width, height, budget in SEEDED_CASES:
        patches = reference_patches(picture("RGB", width, height), budget, SEEDED_CONFIG["patch_size"])
        features = reference_features(SEEDED_CONFIG, weights, patches)
        seeded[f"{width}x{height}@{budget}"] = kept(features).astype(np.float32)
    save("seeded_features", seeded)


if __name__ == "__main__":
    main()
