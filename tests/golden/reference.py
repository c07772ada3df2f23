"""What Transformers' DiffusionGemma computes for a case, in float32 or in true float64. Needs PyTorch."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from transformers import modeling_rope_utils
from transformers.cache_utils import DynamicCache
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaConfig

if TYPE_CHECKING:
    from cases import Case

Arrays = dict[str, np.ndarray]


class _Widened:
    """`torch`, where float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@contextmanager
def _precision(dtype: torch.dtype):
    """Norms, softmaxes, rotary angles and logits ask for float32 by name; a float64 model must get float64 there."""
    with ExitStack() as stack:
        if dtype == torch.float64:
            for module in (modeling, modeling_rope_utils):
                stack.enter_context(mock.patch.object(module, "torch", _Widened()))
            stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


def build(case: Case, dtype: torch.dtype) -> modeling.DiffusionGemmaForBlockDiffusion:
    """The case's model with its weights. Call it, and the model, within `_precision(dtype)`."""
    config = DiffusionGemmaConfig(**case.config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = modeling.DiffusionGemmaForBlockDiffusion(config).to(dtype).eval()
    saved = {
        name: torch.from_numpy(case.weight(name, tuple(tensor.shape))).to(dtype)
        for name, tensor in model.state_dict().items()
        if name.startswith("model.decoder.") or name.endswith("layer_scalar")
    }
    model.load_state_dict(saved, strict=False)
    return model


def run(case: Case, dtype: torch.dtype, conditioning: np.ndarray | None = None) -> Arrays:
    """Every quantity that is compared. conditioning: the second step's processed logits, by default this run's own."""
    torch.set_num_threads(1)  # models this small only wait for other threads
    with _precision(dtype):
        return quantities(build(case, dtype), case, conditioning)


@torch.no_grad()
def quantities(
    model: modeling.DiffusionGemmaForBlockDiffusion, case: Case, conditioning: np.ndarray | None = None
) -> Arrays:
    """What `run` returns, for any model of the case's shape."""
    tokens = {name: torch.from_numpy(case.tokens(name)) for name in ("prompt", "first", "second", "commit", "next")}
    cache = DynamicCache(config=model.config.text_config)
    out = {"encoded": model.model.encoder(tokens["prompt"], past_key_values=cache).last_hidden_state}
    for kind, layer in first_of_each_kind(model.config.text_config.layer_types).items():
        out[f"{kind} keys"], out[f"{kind} values"] = cache.layers[layer].keys, cache.layers[layer].values
    out["logits"] = model(decoder_input_ids=tokens["first"], past_key_values=cache).logits
    if conditioning is None:
        conditioning = case.processed(out["logits"].numpy())
    given = torch.from_numpy(conditioning).to(model.dtype)
    out["conditioned logits"] = model(
        decoder_input_ids=tokens["second"], past_key_values=cache, self_conditioning_logits=given
    ).logits
    out["encoded commit"] = model.model.encoder(tokens["commit"], past_key_values=cache).last_hidden_state
    out["next logits"] = model(decoder_input_ids=tokens["next"], past_key_values=cache).logits
    return {name: tensor.numpy().copy() for name, tensor in out.items()}


def first_of_each_kind(kinds: list[str]) -> dict[str, int]:
    return {kind: kinds.index(kind) for kind in sorted(set(kinds))}


def measure(case: Case) -> tuple[Arrays, dict[str, float]]:
    """The float64 values, rounded to float32, and the largest error of the reference's own float32."""
    exact = run(case, torch.float64)
    single = run(case, torch.float32, conditioning=case.processed(exact["logits"]))
    errors = {name: float(np.abs(single[name] - exact[name]).max()) for name in exact}
    return {name: array.astype(np.float32) for name, array in exact.items()}, errors
