"""The benchmark runs on a small model and reports what it says it reports; its numbers are not judged."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import mlx.core as mx
import pytest
from convert_data import DEMO, true_config, true_shapes
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from rich.console import Console

from mlx_diffusiongemma import load
from mlx_diffusiongemma.benchmark import ceilings, measuring, operations
from mlx_diffusiongemma.benchmark.prediction import predict
from mlx_diffusiongemma.benchmark.report import bar, render, render_plan
from mlx_diffusiongemma.checkpoints.safetensors import Entry
from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.errors import CheckpointError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return convert_checkpoint(DEMO, tmp_path_factory.mktemp("bench") / "demo", bits=None, dtype="float32").out


@pytest.fixture(scope="module")
def report(checkpoint):
    tiny = ceilings.Sizes(width=64, experts=2, copied=1 << 16, launches=20, seconds=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "CPU_SIZES", tiny)
        patch.setattr(measuring, "PREFIX", 64)
        model, processor = load(checkpoint)
        return measuring.run_benchmark(model, processor, prompts=["sort 53142"], steps=(1, 2), max_tokens=64)


def text_of(renderable) -> str:
    console = Console(file=StringIO(), width=160)
    console.print(renderable)
    return console.file.getvalue()


def test_every_component_is_measured_against_a_ceiling(report):
    assert [part.name for part in report.components] == [
        operations.CONDITIONING,
        operations.SLIDING_ATTENTION,
        operations.FULL_ATTENTION,
        operations.DENSE,
        operations.EXPERTS,
        operations.VOCABULARY,
    ]
    assert all(part.seconds > 0 and part.operations > 0 for part in report.components)
    assert all(0 < part.share_of_ceiling <= 1 for part in report.components)
    assert all(rate > 0 for rate in [*report.ceilings.values(), *vars(report.best).values()])
    assert any(name.startswith("float32 experts") for name in report.ceilings)
    assert not any("bit" in name for name in report.ceilings)  # nothing is quantized here


def test_every_product_has_the_ceiling_of_its_own_format(tmp_path):
    """Experts at 4 bits, the rest at 8 but one projection at 6 and one that is not quantized."""
    overrides = {"layers.0.self_attn.q_proj": "6", "layers.1.self_attn.q_proj": "none"}
    out = convert_checkpoint(DEMO, tmp_path / "mixed", bits=4, overrides=overrides).out
    model, _ = load(out)
    counted = operations.step_operations(model, 64)
    names = {part: {operation.name.partition(" product")[0] for operation in own} for part, own in counted.items()}
    assert {"6-bit (group size 64)", "bfloat16"} <= names[operations.SLIDING_ATTENTION]
    assert any(name.startswith("4-bit (group size 64) experts") for name in names[operations.EXPERTS])
    rows, text = model.config.canvas_length, model.config.text
    head = 2 * rows * text.hidden_size * text.vocab_size
    assert list(counted[operations.VOCABULARY].values()) == [head, head]
    dense = 2 * rows * 3 * text.hidden_size * text.intermediate_size * len(text.layers)
    assert sum(counted[operations.DENSE].values()) == dense
    experts = 3 * 2 * rows * text.top_k_experts * text.hidden_size * text.moe_intermediate_size * len(text.layers)
    routing = 2 * rows * text.hidden_size * text.num_experts * len(text.layers)
    assert sum(counted[operations.EXPERTS].values()) == experts + routing


@pytest.mark.parametrize(
    "storage",
    [
        operations.Storage(mx.float32),
        operations.Storage(mx.bfloat16, 3, 32, "affine"),
        operations.Storage(mx.bfloat16, 4, 32, "mxfp4"),
        operations.Storage(mx.bfloat16, 8, 32, "mxfp8"),
        operations.Storage(mx.float32, 4, 16, "nvfp4"),
    ],
)
def test_every_format_can_be_measured_around_something(monkeypatch, storage):
    tiny = ceilings.Sizes(width=64, experts=2, copied=1 << 16, launches=20, seconds=0.0)
    monkeypatch.setattr(ceilings, "CPU_SIZES", tiny)
    monkeypatch.setattr(ceilings, "GPU_SIZES", tiny)
    asked = [
        operations.Product(storage, 16),
        operations.Product(storage, 16, transposed=False),
        operations.Product(storage, 16, rows_each=2),
    ]
    measured = ceilings.Ceilings()
    value, rates = measured.around(asked, lambda: 7.0)
    assert value == 7.0 and rates == measured.best and list(rates) == asked and min(rates.values()) > 0


def test_a_ceiling_is_measured_before_and_after(monkeypatch):
    order, rates = [], iter([5.0, 3.0, 2.0])

    def rate(self, *work):
        order.append("ceiling")
        return next(rates)

    monkeypatch.setattr(ceilings.Ceilings, "_rate", rate)
    monkeypatch.setattr(ceilings, "_work", lambda operation, sizes: ())
    asked = [operations.Product(operations.Storage(mx.float32), 16)]
    measured = ceilings.Ceilings()
    assert measured.around(asked, lambda: order.append("component")) == (None, {asked[0]: 5.0})
    assert order == ["ceiling", "component", "ceiling"]


def test_fixed_work_and_natural_stop(report):
    assert [work.steps for work in report.fixed] == [1, 2]
    assert all(work.tokens == report.canvas_tokens and work.tokens_per_second > 0 for work in report.fixed)
    assert sum(steps * count for steps, count in report.natural.distribution.items()) == sum(report.natural.steps)
    assert report.natural.first_seconds > 0
    assert report.natural.tokens > 0 and report.natural.peak_memory_bytes > 0


def write_llama(directory: Path) -> Path:
    """A small random autoregressive model in mlx-lm's format, with the demo's tokenizer."""
    directory.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": json.loads((DEMO / "config.json").read_text())["text_config"]["vocab_size"],
        "tie_word_embeddings": True,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, directory / name)
    return directory


def test_an_autoregressive_model_beside_it(report, tmp_path):
    rival = measuring.measure_autoregressive(str(write_llama(tmp_path / "llama")), ["sort 53142"], max_tokens=5)
    assert 0 < rival.tokens <= 5 and rival.tokens_per_second > 0 and rival.peak_memory_bytes > 0
    compared = replace(report, against=rival)
    assert compared.to_dict()["against"]["tokens_per_second"] == pytest.approx(rival.tokens_per_second)
    assert f"as {rival.model} through mlx-lm" in text_of(render(compared)).replace("\n", " ")


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("name", ["everything", "config.json", "chat_template.jinja", "model.safetensors"])
def test_a_rival_that_cannot_run(name, damaged, tmp_path):
    directory = tmp_path / "llama"
    if name != "everything":
        write_llama(directory)
        (directory / name).unlink()
    if damaged and name != "chat_template.jinja":
        directory.mkdir(exist_ok=True)
        (directory / name).write_text("junk")
    with pytest.raises(CheckpointError, match=re.escape(str(directory))):
        measuring.measure_autoregressive(str(directory), ["sort 53142"], max_tokens=5)


def test_as_json_and_as_a_table(report):
    content = json.loads(json.dumps(report.to_dict()))
    assert content["machine"].keys() >= {"chip", "system", "mlx", "device", "memory_bytes", "launch_seconds"}
    assert content["natural_stop"]["tokens_per_second"] == pytest.approx(report.natural.tokens_per_second)
    shown = text_of(render(report))
    assert all(part.name in shown for part in report.components)
    assert ("Measured on the CPU" in shown) == (report.machine.device == "CPU")


def test_the_plan_of_a_checkpoint_needs_no_weights(checkpoint, tmp_path):
    plan = measuring.make_plan(checkpoint, context=1000)
    memory = plan.memory
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert size * 0.9 < memory.weights <= size
    model, _ = load(checkpoint)
    cache = model.make_cache()
    model.encode(mx.zeros((1, 1000), mx.int32), cache)
    assert memory.cache == cache.nbytes  # float32, twice what bfloat16 takes
    shown = text_of(render_plan(plan))
    assert f"{memory.total / 1e9:.3f}" in shown and "fits Macs from 8 GB" in shown and not plan.warning
    content = plan.to_dict()
    parts = ("weights_bytes", "keys_and_values_bytes", "one_step_bytes")
    assert content["total_bytes"] == sum(content[part] for part in parts) == memory.total
    assert content["macs"] == plan.macs


def test_a_plan_beyond_the_models_context_says_so(checkpoint):
    config = load(checkpoint)[0].config
    most = config.text.max_position_embeddings - config.canvas_length
    assert measuring.make_plan(checkpoint).context == most  # of 8,192
    assert measuring.make_plan(checkpoint, most).warning == ""
    assert f"{most:,}" in measuring.make_plan(checkpoint, most + 1).warning


def test_bars():
    assert bar(0) == "" and bar(1) == "█" * 24 and bar(0.5) == "█" * 12 and bar(2) == bar(1)
    assert bar(1 / 24 / 8) == "▏"


def test_predictions_lie_near_the_published_measurements():
    """For the true 4-bit checkpoint: a step of 261 ms on an M2 Ultra; Gemma 4 writes 71 tokens/s on an M1 Ultra."""
    config = ModelConfig.from_dict(true_config())
    tensors = {name: Entry(name, dtype, tuple(shape)) for name, shape, dtype in true_shapes("mlx_4bit")}
    found = {own.chip: own for own in predict(config, tensors, 1024, 2)}
    assert found["M2 Ultra"].step_seconds == pytest.approx(0.261, rel=0.1)
    assert 60 <= found["M1 Ultra"].autoregressive_tokens_per_second <= 100
    assert found["M4 Max"].faster == "ar" and 15 <= found["M4 Max"].diffusion_tokens_per_second <= 35


def test_each_decoder_answers_and_one_is_recommended(report):
    speeds = report.decoders
    assert list(speeds.replies) == ["diffusion", "autoregressive", "speculative"]
    assert all(own.tokens > 0 and own.seconds > 0 for own in speeds.replies.values())
    assert list(speeds.step_seconds) == [16, 32, 64] and all(seconds > 0 for seconds in speeds.step_seconds.values())
    assert speeds.recommendation.startswith("Fastest on these prompts here: --decoder ")
    assert json.loads(json.dumps(report.to_dict()))["decoders"]["token_seconds"] == speeds.token_seconds
    assert "left to right" in text_of(render(report))
