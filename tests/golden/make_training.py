"""Write training.npz: both losses of fine-tuning and the gradient of every parameter, in float64.

    cd tests && python -m golden.make_training

The network is Transformers', which has no loss for this model: the published objective (arXiv 2608.00146, section 4)
is written out here. Its draws are given, not made: which canvas, what it was corrupted to, and the coin of
self-conditioning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from golden.cases import SPECIAL, WINDOW, _generator
from golden.make_images import Arrays, ImageCase, Picture, _padded, _precision, build

PATH = Path(__file__).with_name("training.npz")
LOSSES = ("denoising", "next token")
END = 1
# Small, for every gradient of every case goes into one file.
NARROW = {
    "hidden_size": 24,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "head_dim": 8,
    "global_head_dim": 16,
}


@dataclass(frozen=True)
class Example:
    """One prompt and reply. pieces: as of `ImageCase`. reply: its tokens, before the fill. drawn: which canvas."""

    pieces: tuple[int | tuple[int, int], ...]
    reply: int
    drawn: int
    conditioned: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class Draws:
    """An example of a case in tokens; see `mlx_diffusiongemma.training.draws.Drawn`, whose fields these are."""

    tokens: tuple[int, ...]
    prompt: int
    start: int
    noisy: tuple[int, ...]
    weights: tuple[float, ...]
    learned: int
    conditioned: bool
    images: tuple[Picture, ...]


@dataclass(frozen=True)
class TrainingCase(ImageCase):
    """A model and a batch of examples for it."""

    examples: tuple[Example, ...] = ()
    mask_prompt: bool = False

    @property
    def config(self) -> dict[str, Any]:
        config = super().config
        config["text_config"] |= {name: self.text.get(name, value) for name, value in NARROW.items()}
        return config

    def weight(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Milder than other cases': gradients pass through everything twice, and self-conditioning once more."""
        made = super().weight(name, shape)
        return made / np.float32(4) if name.endswith(("q_norm.weight", "decoder.norm.weight")) else made

    @cached_property
    def draws(self) -> tuple[Draws, ...]:
        return tuple(self._drawn(row, example) for row, example in enumerate(self.examples))

    def _drawn(self, row: int, example: Example) -> Draws:
        random = _generator(self.name, f"example {row}")
        config, pictures = self.config, replace(self, pieces=example.pieces).pictures
        vocabulary = config["text_config"]["vocab_size"]
        tokens: list[int] = []
        for piece in example.pieces:
            if isinstance(piece, int):
                tokens += random.integers(2, vocabulary - SPECIAL, piece).tolist()
            else:
                image = [config["image_token_id"]] * (piece[0] * piece[1])
                tokens += [config["boi_token_id"], *image, config["eoi_token_id"]]
        prompt, real = len(tokens), len(tokens) + example.reply
        tokens += random.integers(2, vocabulary - SPECIAL, example.reply).tolist()
        tokens += [END] * (-example.reply % self.canvas)
        start = prompt + example.drawn * self.canvas
        clean = np.array(tokens[start : start + self.canvas])
        # In a canvas the image token is one as any other.
        corrupted = random.random(self.canvas) < 0.6
        noisy = np.where(corrupted, random.integers(0, vocabulary, self.canvas), clean)
        weighted = np.arange(start, start + self.canvas) < real if example.truncated else np.ones(self.canvas)
        return Draws(
            tokens=tuple(tokens),
            prompt=prompt,
            start=start,
            noisy=tuple(noisy.tolist()),
            weights=tuple(map(float, weighted)),
            learned=real if example.truncated else len(tokens),
            conditioned=example.conditioned,
            images=tuple(pictures),
        )


def _case(name: str, *examples: Example, layers: str = "SSF", canvas: int = 8, **others: Any) -> TrainingCase:
    return TrainingCase(name, layers, 0, canvas, examples=examples, **others)


CASES = [
    _case("the first canvas", Example((5,), reply=16, drawn=0)),
    _case("the last of three canvases, filled", Example((5,), reply=19, drawn=2)),
    _case("the middle canvas, self-conditioned", Example((6,), reply=24, drawn=1, conditioned=True)),
    _case("a prompt of many windows", Example((3 * WINDOW + 5,), reply=12, drawn=1, conditioned=True)),
    _case("a prompt of one window", Example((WINDOW,), reply=7, drawn=0), layers="FSSF"),
    _case("a truncated reply", Example((9,), reply=5, drawn=0, conditioned=True, truncated=True)),
    _case("the reply's next tokens alone", Example((11,), reply=12, drawn=1), mask_prompt=True),
    _case(
        "two rows of different lengths",
        Example((2 * WINDOW + 1,), reply=14, drawn=1, conditioned=True),
        Example((4,), reply=6, drawn=0),
    ),
    _case(
        "a truncated row and one of many canvases",
        Example((3,), reply=3, drawn=0, truncated=True),
        Example((7,), reply=25, drawn=3, conditioned=True),
    ),
    _case("an image", Example((5, (2, 2), 6), reply=10, drawn=0, conditioned=True)),
    _case("images longer than the window", Example((3, (4, 3), 2, (1, 2), 5), reply=12, drawn=1), layers="SF"),
    _case(
        "a row with an image beside one without",
        Example((4, (3, 1), 3), reply=8, drawn=0),
        Example((WINDOW + 3,), reply=13, drawn=1, conditioned=True),
        layers="SF",
    ),
]


def random_case(seed: int) -> TrainingCase:
    """One of the endless others, for the live comparison."""
    random = np.random.default_rng(seed)
    canvas = int(random.integers(2, 20))

    def example() -> Example:
        truncated = bool(random.random() < 0.3)
        reply = int(random.integers(1, canvas if truncated else 4 * canvas))
        pieces: tuple[int | tuple[int, int], ...] = (int(random.integers(1, 5 * WINDOW)),)
        if random.random() < 0.3:
            pieces += ((int(random.integers(1, 4)), int(random.integers(1, 4))), int(random.integers(1, WINDOW)))
        return Example(pieces, reply, int(random.integers(-(-reply // canvas))), bool(random.random() < 0.5), truncated)

    experts = int(random.integers(2, 9))
    text = {
        "sliding_window": int(random.integers(2, 3 * WINDOW)),
        "num_experts": experts,
        "top_k_experts": int(random.integers(1, experts + 1)),
        "num_key_value_heads": int(random.choice([1, 2, 4])),
        "final_logit_softcapping": float(random.choice([5.0, 30.0])),
    }
    layers = "".join(random.choice(["S", "F"], random.integers(1, 4))) + "F"
    examples = [example() for _ in range(random.integers(1, 4))]
    return _case(f"random {seed}", *examples, layers=layers, canvas=canvas, text=text, mask_prompt=bool(seed % 3 == 0))


def measure(case: TrainingCase, *, exact: bool = True) -> Arrays:
    """Both losses, and under the published names the gradient of their sum with respect to every parameter that
    takes part. Transformers in float64, or else float32.
    """
    import torch

    with _precision(exact):
        model = build(case, exact=exact)
        # PyTorch's embeddings leave the padding's row without a gradient; as noise it is a token as any other.
        model.model.encoder.language_model.embed_tokens.padding_idx = model.model.decoder.embed_tokens.padding_idx = (
            None
        )
        # The published objective stops the gradient at the whole signal, the embedding's share in it included.
        model.model.decoder.self_conditioning.register_forward_pre_hook(lambda _, given: (given[0], given[1].detach()))
        trained = dict(model.named_parameters(remove_duplicate=False))
        trained |= {
            name: each.requires_grad_() for name, each in model.named_buffers() if name.endswith("layer_scalar")
        }
        rows = [_losses(model, drawn, case.mask_prompt) for drawn in case.draws]
        denoising, next_token = (torch.stack(each).mean() for each in zip(*rows, strict=True))
        (denoising + next_token).backward()
    out = dict(zip(LOSSES, (denoising, next_token), strict=True))
    published = [name for name in trained if name.startswith("model.decoder.") or not _is_tied(name)]
    out |= {name: trained[name].grad for name in published if trained[name].grad is not None}
    return {name: tensor.detach().numpy() for name, tensor in out.items()}


def _is_tied(name: str) -> bool:
    """Whether a weight is the decoder's under another name, and not saved."""
    return name == "lm_head.weight" or (".language_model." in name and not name.endswith("layer_scalar"))


def _losses(model: Any, drawn: Draws, mask_prompt: bool) -> tuple[Any, Any]:
    """The two losses of one example."""
    import torch
    from torch.nn.functional import cross_entropy

    tokens = torch.tensor([drawn.tokens])
    hidden, _ = _encode(model, tokens, drawn.images)
    first = drawn.prompt if mask_prompt else 1
    predicted = _logits(model, hidden)[0, first - 1 : drawn.learned - 1]
    next_token = cross_entropy(predicted, tokens[0, first : drawn.learned])

    # Encoded on its own, the prefix can know of nothing after it, and the cache is what the decoder finds in inference.
    _, cache = _encode(model, tokens[:, : drawn.start], drawn.images)
    canvas = torch.tensor([drawn.noisy])
    conditioning = None
    if drawn.conditioned:
        with torch.no_grad():
            conditioning = model(decoder_input_ids=canvas, past_key_values=cache).logits
    logits = model(decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=conditioning).logits[0]
    weights = torch.tensor(drawn.weights, dtype=logits.dtype)
    clean = tokens[0, drawn.start : drawn.start + len(drawn.noisy)]
    denoising = (cross_entropy(logits, clean, reduction="none") * weights).sum() / weights.sum()
    return denoising, next_token


def _encode(model: Any, tokens: Any, images: tuple[Picture, ...]) -> tuple[Any, Any]:
    """Hidden states and the cache, with the masks that `generate` builds."""
    import torch
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config.text_config)
    places = torch.arange(tokens.shape[1])[None]
    _, masks = model._prepare_encoder_inputs(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens, dtype=torch.bool),
        encoder_position_ids=places,
        past_key_values=cache,
        is_prefill=True,
        canvas_length=model.config.canvas_length,
        batch_size=1,
        mm_token_type_ids=(tokens == model.config.image_token_id).int(),
    )
    pixels, positions = _padded(list(images), model.dtype) if images else (None, None)
    encoded = model.model.encoder(
        input_ids=tokens,
        attention_mask=masks,
        position_ids=places,
        past_key_values=cache,
        pixel_values=pixels,
        image_position_ids=positions,
    )
    return encoded.last_hidden_state, cache


def _logits(model: Any, hidden: Any) -> Any:
    cap = model.config.text_config.final_logit_softcapping
    return (model.lm_head(hidden) / cap).tanh() * cap


def errors(made: Arrays, exact: Arrays) -> dict[str, float]:
    """By how much losses and gradients are off: of the loss, and of the gradient's norm.

    The layers' scalars count as one tensor: those of the last have next to no gradient of their own, for the norm that
    follows takes any scale away. So does a softmax over one expert with the router's: a gradient below a
    thousandth of all gradients together is measured by that thousandth.
    """
    made, exact = _with_stacked_scalars(made), _with_stacked_scalars(exact)
    norms = {name: float(np.linalg.norm(array)) for name, array in exact.items()}
    least = 1e-3 * np.linalg.norm([norm for name, norm in norms.items() if name not in LOSSES])
    off = {name: float(np.linalg.norm(made[name] - exact[name].astype(np.float64))) for name in exact}
    return {name: off[name] / (norms[name] if name in LOSSES else max(norms[name], least)) for name in exact}


def _with_stacked_scalars(arrays: Arrays) -> Arrays:
    out = {name: array for name, array in arrays.items() if not name.endswith("layer_scalar")}
    scalars = [arrays[name] for name in sorted(arrays) if name.endswith("layer_scalar")]
    return out | {"layer scalars": np.concatenate(scalars)}


def main() -> None:
    arrays: Arrays = {}
    for case in CASES:
        exact, single = measure(case), measure(case, exact=False)
        arrays |= {f"{case.name}/{name}": array.astype(np.float32) for name, array in exact.items()}
        off = errors(single, exact)
        worst = max(off, key=off.__getitem__)
        print(f"{case.name}: float32 is off by {off[worst]:.1e} at most: {worst}")
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
