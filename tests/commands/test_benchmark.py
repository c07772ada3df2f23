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
from convert_data import DEMO
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from rich.console import Console

from mlx_diffusiongemma import load
from mlx_diffusiongemma.benchmark import ceilings, measuring, operations
from mlx_diffusiongemma.benchmark.report import bar, render, render_plan
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.errors import CheckpointError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return convert_checkpoint(DEMO, tmp_path_factory.mktemp("bench") / "demo", bits=None, dtype="float32").out


@pytest.fixture(scope="module")
def report(checkpoint):
    tiny = ceilings.Sizes(width=64, experts=2, keys=64, copied=1 << 16, launches=20, seconds=0.0)
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
    assert all(part.seconds > 0 and part.operations > 0 and part.ceiling > 0 for part in report.components)
    assert all(rate > 0 for rate in report.ceilings.to_dict().values())


def test_fixed_work_and_natural_stop(report):
    assert [work.steps for work in report.fixed] == [1, 2]
    assert all(work.tokens == report.canvas and work.tokens_per_second > 0 for work in report.fixed)
    assert sum(steps * count for steps, count in report.natural.distribution.items()) == sum(report.natural.steps)
    assert report.natural.first_canvas_seconds > 0
    assert report.natural.tokens > 0 and report.natural.peak_memory > 0


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
    assert 0 < rival.tokens <= 5 and rival.tokens_per_second > 0 and rival.peak_memory > 0
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
    assert content["machine"].keys() >= {"chip", "system", "mlx", "device"}
    assert content["natural"]["tokens_per_second"] == pytest.approx(report.natural.tokens_per_second)
    shown = text_of(render(report))
    assert all(part.name in shown for part in report.components)
    assert ("Measured on the CPU" in shown) == (report.machine.device == "CPU")


def test_the_plan_of_a_checkpoint_needs_no_weights(checkpoint, tmp_path):
    memory = measuring.plan_memory(checkpoint, context=1000)
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert size * 0.9 < memory.weights <= size
    model, _ = load(checkpoint)
    cache = model.make_cache()
    model.encode(mx.zeros((1, 1000), mx.int32), cache)
    assert memory.cache == cache.nbytes  # float32, twice what bfloat16 takes
    assert f"{memory.total / 1e9:.3f}" in text_of(render_plan(memory, 1000))


def test_bars():
    assert bar(0) == "" and bar(1) == "█" * 24 and bar(0.5) == "█" * 12 and bar(2) == bar(1)
    assert bar(1 / 24 / 8) == "▏"
