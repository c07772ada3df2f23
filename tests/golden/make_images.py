"""Write images.npz: what Transformers' `generate` makes of prompts with images, in float64.

    cd tests && python -m golden.make_images

The masks are the ones that `generate` builds beforehand: a bare `forward` drops those of the images. The tests take
the cases from here, and compare with Transformers itself where PyTorch is installed.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from golden.cases import SPECIAL, TEMPERATURE, Case

if TYPE_CHECKING:
    import torch

PATH = Path(__file__).with_name("images.npz")
DEMO = Path(__file__).parents[2] / "mlx_diffusiongemma" / "demo"
PATCH, POOLING = 4, 3
KEPT_ROWS = 10  # of the demo's results, evenly spaced, go into the file

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Picture:
    """Patches of pixels [patches, 3 * patch²] in 0…1 and their (x, y) [patches, 2] int32."""

    pixels: np.ndarray
    positions: np.ndarray
    digest: str = ""


@dataclass(frozen=True)
class ImageCase(Case):
    """A prompt of pieces: a number of text tokens, or the (columns, rows) of an image in soft tokens."""

    pieces: tuple[int | tuple[int, int], ...] = field(default=())

    @property
    def config(self) -> dict[str, Any]:
        config = super().config
        config["vision_config"] = config["vision_config"] | {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "patch_size": PATCH,
            "pooling_kernel_size": POOLING,
            "position_embedding_size": 32,
            "standardize": True,
        }
        return config

    def tokens(self, name: str) -> np.ndarray:
        if name != "prompt":
            return super().tokens(name)
        config = self.config
        high = config["text_config"]["vocab_size"] - SPECIAL
        random = np.random.default_rng(len(self.name))
        tokens: list[int] = []
        for piece in self.pieces:
            if isinstance(piece, int):
                tokens += random.integers(0, high, piece).tolist()
            else:
                image = [config["image_token_id"]] * (piece[0] * piece[1])
                tokens += [config["boi_token_id"], *image, config["eoi_token_id"]]
        return np.array([tokens])

    @property
    def pictures(self) -> list[Picture]:
        random = np.random.default_rng(7)
        made = []
        for columns, rows in (piece for piece in self.pieces if not isinstance(piece, int)):
            y, x = np.divmod(np.arange(columns * rows * POOLING**2), columns * POOLING)
            pixels = random.random((len(x), 3 * PATCH**2)).astype(np.float32)
            made.append(Picture(pixels, np.stack([x, y], axis=-1).astype(np.int32)))
        return made

    def weight(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        made = super().weight(name, shape)
        return made * np.float32(0.1) if name.endswith(("std_bias", "std_scale")) else made


CASES = [
    ImageCase("text before and after an image", "SSSSSF", 0, 16, pieces=(5, (2, 2), 6)),
    ImageCase("an image first", "SSF", 0, 16, pieces=((3, 1), 9)),
    ImageCase("an image last", "SSF", 0, 16, pieces=(9, (1, 3))),
    ImageCase("several images, text between", "SFSF", 0, 16, pieces=(3, (2, 1), 4, (1, 4), 2, (3, 2), 5)),
    ImageCase("two images side by side", "SSSF", 0, 16, pieces=(4, (2, 2), (3, 1), 4)),
    ImageCase("an image longer than the window", "SSSF", 0, 16, pieces=(4, (5, 4), 12)),
    ImageCase("images across many windows", "SSSSSF", 0, 32, pieces=(21, (3, 5), 17, (4, 3), 30)),
    ImageCase("causal images", "SSF", 0, 16, pieces=(5, (3, 4), 6), text={"use_bidirectional_attention": None}),
]

# What a user asks the demo checkpoint, and the colours of the squares, 2 by 2, in each picture.
DEMO_CASES = {
    "one picture": ([["red", "blue", "green", "yellow"]], [{"type": "image"}, "colors?"]),
    "text before, between and after": (
        [["blue"] * 4, ["red", "red", "green", "green"]],
        ["sort 53142", {"type": "image"}, "and then", {"type": "image"}, "colors?"],
    ),
}
DEMO_SIZES = {"one picture": (96, 96), "text before, between and after": (300, 200)}


def demo_messages(name: str) -> list[dict[str, Any]]:
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in DEMO_CASES[name][1]]
    return [{"role": "user", "content": parts}]


def demo_pictures(name: str) -> list:
    from PIL import Image, ImageColor

    width, height = DEMO_SIZES[name]
    pictures = []
    for colours in DEMO_CASES[name][0]:
        square = np.array([ImageColor.getrgb(colour) for colour in colours], np.uint8).reshape(2, 2, 3)
        whole = square.repeat(height // 2, axis=0).repeat(width // 2, axis=1)
        pictures.append(Image.fromarray(whole))
    return pictures


def demo_canvas(name: str, length: int) -> np.ndarray:
    return np.random.default_rng(len(name)).integers(30, 380, (1, length))


def seeded(case: ImageCase, *, exact: bool = True) -> Arrays:
    """Transformers on a seeded model, in float64 or else float32."""
    with _precision(exact):
        return _run(build(case, exact=exact), case.tokens("prompt"), case.pictures, case.tokens("first"))


def build(case: ImageCase, *, exact: bool) -> Any:
    """The case's model with its weights. Call it, and the model, within `_precision(exact)`."""
    import torch
    from golden.reference import DiffusionGemmaConfig
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling

    config = DiffusionGemmaConfig(**case.config)
    config._attn_implementation = config._experts_implementation = "eager"
    config.vision_config._attn_implementation = "eager"
    model = modeling.DiffusionGemmaForBlockDiffusion(config).to(torch.float64 if exact else torch.float32).eval()
    saved = {
        name: torch.from_numpy(case.weight(name, tuple(tensor.shape))).to(tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name.startswith(("model.decoder.", "model.encoder.vision_tower.", "model.encoder.embed_vision."))
        or name.endswith("layer_scalar")
    }
    model.load_state_dict(saved, strict=False)
    return model


def demo(tokens: list[int], pictures: list[Picture], canvas: np.ndarray) -> Arrays:
    """Transformers on the demo checkpoint, in float64."""
    import torch
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaForBlockDiffusion

    with _precision(exact=True):
        model = DiffusionGemmaForBlockDiffusion.from_pretrained(
            DEMO, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        return _run(model.double().eval(), np.array([tokens]), pictures, canvas)


def _run(model: Any, tokens: np.ndarray, pictures: list[Picture], canvas: np.ndarray) -> Arrays:
    """The encoder as `generate` calls it, and two denoising steps of one canvas."""
    import torch
    from transformers.cache_utils import DynamicCache

    prompt, first = torch.from_numpy(tokens), torch.from_numpy(canvas)
    pixels, positions = _padded(pictures, model.dtype)
    cache = DynamicCache(config=model.config.text_config)
    places = torch.arange(prompt.shape[1])[None]
    with torch.no_grad():
        _, masks = model._prepare_encoder_inputs(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt, dtype=torch.bool),
            encoder_position_ids=places,
            past_key_values=cache,
            is_prefill=True,
            canvas_length=canvas.shape[1],
            batch_size=1,
            mm_token_type_ids=(prompt == model.config.image_token_id).int(),
        )
        encoded = model.model.encoder(
            input_ids=prompt,
            attention_mask=masks,
            position_ids=places,
            past_key_values=cache,
            pixel_values=pixels,
            image_position_ids=positions,
        ).last_hidden_state
        out = {"encoded": encoded}
        kinds = model.config.text_config.layer_types
        for kind in sorted(set(kinds)):
            layer = cache.layers[kinds.index(kind)]
            out[f"{kind} keys"], out[f"{kind} values"] = layer.keys, layer.values
        out["logits"] = model(decoder_input_ids=first, past_key_values=cache).logits
        processed = out["logits"].to(torch.float32).to(model.dtype) / TEMPERATURE
        out["conditioned logits"] = model(
            decoder_input_ids=first, past_key_values=cache, self_conditioning_logits=processed
        ).logits
    return {name: tensor.numpy().astype(np.float32) for name, tensor in out.items()}


def _padded(pictures: list[Picture], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """All pictures as the reference's processor hands them over: of one length, padding at position (-1, -1)."""
    import torch

    longest = max(len(picture.pixels) for picture in pictures)
    room = [longest - len(picture.pixels) for picture in pictures]
    pixels = [np.pad(each.pixels, [(0, extra), (0, 0)]) for each, extra in zip(pictures, room, strict=True)]
    positions = [
        np.pad(each.positions, [(0, extra), (0, 0)], constant_values=-1)
        for each, extra in zip(pictures, room, strict=True)
    ]
    return torch.from_numpy(np.stack(pixels)).to(dtype), torch.from_numpy(np.stack(positions)).long()


@contextmanager
def _precision(exact: bool):
    """Within it, whatever asks for float32 by name gets float64, in the vision tower too."""
    import torch
    from golden import reference
    from transformers.models.gemma4 import modeling_gemma4

    torch.set_num_threads(1)  # models this small only wait for other threads
    with reference._precision(torch.float64 if exact else torch.float32):
        if exact:
            with mock.patch.object(modeling_gemma4, "torch", reference._Widened()):
                yield
        else:
            yield


def kept(name: str, array: np.ndarray) -> np.ndarray:
    """The rows of a result of the demo that go into the file; keys and values have theirs on the third axis."""
    axis = 2 if array.ndim == 4 else 1
    rows = np.linspace(0, array.shape[axis] - 1, min(KEPT_ROWS, array.shape[axis])).astype(int)
    return array.take(rows, axis)


def main() -> None:
    from mlx_diffusiongemma import Processor
    from mlx_diffusiongemma.config import ModelConfig

    arrays: Arrays = {}
    for case in CASES:
        exact, single = seeded(case), seeded(case, exact=False)
        arrays |= {f"{case.name}/{name}": array for name, array in exact.items()}
        worst = max(np.abs(single[name] - exact[name]).max() / np.abs(exact[name]).max() for name in exact)
        print(f"{case.name}: float32 is off by {worst:.1e} of the largest value, at most")
    config = ModelConfig.from_directory(DEMO)
    processor = Processor.from_directory(DEMO, config)
    for name in DEMO_CASES:
        prompt = processor.prompt(demo_messages(name), images=demo_pictures(name))
        exact = demo(prompt.tokens, list(prompt.images), demo_canvas(name, config.canvas_length))
        arrays |= {f"{name}/{key}": kept(key, array) for key, array in exact.items()}
        print(f"{name}: {len(prompt.tokens)} tokens, {len(prompt.images)} images")
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
