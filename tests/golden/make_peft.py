"""Write peft.npz: adapters that PEFT trained on a seeded model, as it saves them, and what the model then computes.

    cd tests && python -m golden.make_peft

Needs PyTorch and PEFT. Each adapter learns for two steps, by the published objective; the values are float64.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from golden.make_images import Arrays, _precision, build
from golden.make_training import Example, TrainingCase, _losses

PATH = Path(__file__).with_name("peft.npz")
CASE = TrainingCase("an adapter", "SF", 0, 8, pieces=(19,), examples=(Example((11,), 14, 1, conditioned=True),))
LINEAR = r".*(decoder|language_model)\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# What PEFT is asked for.
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": LINEAR},
    "rslora": {"target_modules": r".*_proj", "exclude_modules": ".*vision.*", "use_rslora": True},
    "dora": {"target_modules": LINEAR + r"|.*self_conditioning\..*_proj|.*router\.proj", "use_dora": True},
    "experts": {"target_modules": ["q_proj"], "exclude_modules": ".*vision.*", "target_parameters": EXPERTS},
    "one of the experts' weights": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "the decoder": {
        "target_modules": LINEAR,
        "exclude_modules": ".*encoder.*",
        "target_parameters": ["model.decoder.layers.0." + EXPERTS[0]],
    },
    "some layers": {
        "target_modules": r".*(decoder|language_model)\.layers\.1\.mlp\..*_proj|.*decoder\.layers\.0\.self_attn\.k_proj"
    },
    "ranks and scales of their own": {
        "target_modules": LINEAR,
        "target_parameters": EXPERTS,
        "rank_pattern": {
            r"self_attn\.k_proj": 1,
            "experts.down_proj": 2,
            r"model\.decoder\.layers\.1\.mlp\.up_proj": 5,
        },
        "alpha_pattern": {"o_proj": 1, "experts.gate_up_proj": 9},
    },
}


def train(name: str, directory: Path) -> tuple[dict[str, Any], Arrays]:
    """Train an adapter for two steps and save it as PEFT does: its configuration and its arrays."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.numpy import load_file

    torch.manual_seed(0)
    with _precision(exact=False):
        adapted = get_peft_model(build(CASE, exact=False), LoraConfig(r=3, lora_alpha=5, **CONFIGS[name]))
        trained = [each for each in adapted.parameters() if each.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            sum(_losses(adapted.get_base_model(), CASE.draws[0], mask_prompt=False)).backward()
            optimizer.step()
        adapted.save_pretrained(directory)
    content = json.loads((directory / "adapter_config.json").read_text())
    return content, load_file(directory / "adapter_model.safetensors")


def measure(directory: Path) -> tuple[Arrays, Arrays]:
    """The model with the adapter that PEFT loads from a folder, in float64: what `reference.run` returns, and the
    gradients of both losses' sum with respect to the adapter, by PEFT's names.
    """
    import torch
    from golden import reference
    from peft import PeftModel

    with _precision(exact=True):
        adapted = PeftModel.from_pretrained(build(CASE, exact=True), directory, is_trainable=True)
        base = adapted.get_base_model()
        out = reference.quantities(base, CASE)
        sum(_losses(base, CASE.draws[0], mask_prompt=False)).backward()
        named = {name.replace(".default", ""): each for name, each in adapted.named_parameters() if each.requires_grad}
        assert all(each.dtype == torch.float64 for each in named.values())
    gradients = {name: each.grad.numpy() for name, each in named.items() if each.grad is not None}
    return out, {name.replace("vector.weight", "vector"): array for name, array in gradients.items()}


def main() -> None:
    arrays: Arrays = {}
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as directory:
            content, saved = train(name, Path(directory))
            values, _ = measure(Path(directory))
        arrays[f"{name}/config"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
        arrays |= {f"{name}/saved/{key}": array for key, array in saved.items()}
        arrays |= {f"{name}/{key}": array.astype(np.float32) for key, array in values.items() if "logits" in key}
        print(f"{name}: {len(saved)} arrays")
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
