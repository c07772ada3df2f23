"""Everything of a checkpoint that is not a tensor: configuration, tokenizer and template files, index, model card."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from ...checkpoints.safetensors import INDEX_NAME
from ...config import ModelConfig, read_json
from ...errors import CheckpointError
from ...files import write_whole
from ..plan import Plan
from ..quantization import as_config
from .partial import write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # one of them must be there
COPIED = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
CARD = "README.md"


def check_tokenizer(directory: Path) -> None:
    """Raise CheckpointError unless the checkpoint in `directory` has a tokenizer."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{directory} has neither {' nor '.join(TOKENIZER_FILES)}; copy the tokenizer files of the model there."
        )


def write_companions(source: Path, target: Path, plan: Plan) -> None:
    """Write into `target` everything but the weights, from the checkpoint's files in `source`."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = converted_config(source, plan)
    write_json(target / "config.json", dict(sorted(config.items())))
    if "generation_config" in config:
        write_json(target / "generation_config.json", config["generation_config"])
    files = {
        output.name: shard
        for shard, jobs in zip(plan.shard_names, plan.shards, strict=True)
        for job in jobs
        for output in job.outputs
    }
    index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(files.items()))}
    write_json(target / INDEX_NAME, index)


def converted_config(source: Path, plan: Plan) -> dict[str, Any]:
    """Make config.json as mlx-community has it: the hub's spelling, with generation_config and quantization inside."""
    config = copy.deepcopy(read_json(source / "config.json"))
    for stale in ("quantization", "quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(stale, None)
    config["text_config"] = _hub_spelling(config["text_config"], plan.config)
    for part in (config, config["text_config"], config.get("vision_config")):
        if part:
            part.pop("torch_dtype", None)
            part["dtype"] = plan.dtype
    path = source / "generation_config.json"
    generation = read_json(path) if path.is_file() else config.get("generation_config")
    if generation:
        config["generation_config"] = generation
        config["eos_token_id"] = _union(config.get("eos_token_id"), generation.get("eos_token_id"))
    default = plan.default_quantization
    if default:
        modules = {job.weight.path: job.quantization for job in plan.jobs}
        config["quantization"] = config["quantization_config"] = as_config(default, modules)
    return config


def write_card(target: Path, plan: Plan, source_card: Path | None, base_model: str | None, evidence: str) -> None:
    """The model card: the source's metadata, then what was done to it. `evidence` is Markdown."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData()
    if source_card and source_card.is_file():
        data = ModelCard.load(source_card, ignore_metadata_errors=True).data
    data.library_name = "mlx"
    data.pipeline_tag = "image-text-to-text"
    data.tags = sorted({*(data.tags or []), "mlx", "diffusion"})
    if base_model:
        data.base_model = base_model
    origin = (
        f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a local DiffusionGemma checkpoint"
    )
    content = f"""---
{data.to_yaml()}
---

# {target.name.removesuffix(".partial")}

{origin} in MLX format, converted with mlx-diffusiongemma.

```bash
mlx-dg generate --model . "Why is the sky blue?"
```

{evidence}"""
    write_whole(target / CARD, content.rstrip() + "\n")


def _hub_spelling(text: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Spell `per_layer_config`, which Transformers writes when it saves again, as the hub's two global keys."""
    full = {(layer.head_dim, layer.num_key_value_heads) for layer in config.text.layers if not layer.is_sliding}
    if text.get("per_layer_config") is not None and len(full) == 1:
        del text["per_layer_config"]
        text["global_head_dim"], text["num_global_key_value_heads"] = full.pop()
        text["layer_types"] = [layer.kind for layer in config.text.layers]
    return text


def _union(*tokens: int | list[int] | None) -> list[int]:
    lists = [[token] if isinstance(token, int) else token or [] for token in tokens]
    return list(dict.fromkeys(token for listed in lists for token in listed))
