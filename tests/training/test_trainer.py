"""The training loop: it learns, goes on after any interruption as if there had been none, and stops where it must."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffusiongemma import load
from mlx_diffusiongemma.errors import TrainingError
from mlx_diffusiongemma.model.adapters import AdapterConfig, keys_of
from mlx_diffusiongemma.training import TrainingOptions, train
from mlx_diffusiongemma.training.data import read_records
from mlx_diffusiongemma.training.trainer import SaveReport, TrainReport, ValidationReport

OPTIONS = TrainingOptions(
    adapter=AdapterConfig(keys=keys_of(["attention"]), num_layers=2),
    iters=6,
    batch_size=2,
    grad_accumulation_steps=2,
    warmup=2,
    learning_rate=1e-3,
    steps_per_report=1,
    steps_per_eval=3,
    save_every=1,
)
# Trains as `options` in its arguments say, in a process that can be killed.
SCRIPT = """
import json, sys
from mlx_diffusiongemma import load
from mlx_diffusiongemma.training import train
from mlx_diffusiongemma.training.data import read_records
sys.path.insert(0, sys.argv[4])
from test_trainer import OPTIONS
model, processor = load(sys.argv[1])
records = read_records(sys.argv[2], processor, 256)
print("begun", flush=True)
train(model, processor, records, OPTIONS, adapter_path=sys.argv[3], resume=sys.argv[5] == "resume")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A task that the demo checkpoint does not know."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdef", k=4)) for _ in range(20)]
    path.write_text(
        "".join(json.dumps({"prompt": f"twice {word}", "completion": word + word}) + "\n" for word in words)
    )
    return path


def learn(directory, data, out, options=OPTIONS, **settings):
    """Train from the beginning; what was reported, and the result."""
    model, processor = load(directory)
    records = read_records(data, processor, 256)
    reports = []
    result = train(
        model, processor, records[:16], options, adapter_path=out, valid=records[16:], on_report=reports.append,
        **settings,
    )  # fmt: skip
    return reports, result


def digest(out) -> str:
    return hashlib.sha256((out / "adapters.safetensors").read_bytes()).hexdigest()


def test_it_learns_and_reports(demo_float32, data, tmp_path):
    options = replace(OPTIONS, iters=8, learning_rate=3e-3, steps_per_eval=4, generate=2, save_every=100)
    reports, result = learn(demo_float32, data, tmp_path, options)
    validations = [report for report in reports if isinstance(report, ValidationReport)]
    assert [report.iteration for report in validations] == [0, 4, 8]
    totals = [report.losses.total for report in validations]
    assert totals[0] > totals[1] > totals[2]
    assert all(report.score.count == 2 and report.score.steps > 1 for report in validations)
    trained = [report for report in reports if isinstance(report, TrainReport)]
    assert [report.iteration for report in trained] == list(range(1, 9))
    assert all(report.losses.tokens > 100 and report.peak_memory > 0 for report in trained)
    assert result.finish_reason == "done" and result.iterations == 8 and result.best == min(totals)
    assert (tmp_path / "best" / "adapters.safetensors").read_bytes() == (tmp_path / "adapters.safetensors").read_bytes()


def test_a_cancelled_run_goes_on_to_the_same_bytes(demo_float32, data, tmp_path):
    learn(demo_float32, data, tmp_path / "whole")
    cancel = threading.Event()

    def stop_after_two(report) -> None:
        if isinstance(report, SaveReport) and report.iteration == 2:
            cancel.set()

    model, processor = load(demo_float32)
    records = read_records(data, processor, 256)
    result = train(
        model, processor, records[:16], OPTIONS, adapter_path=tmp_path / "cut", valid=records[16:],
        on_report=stop_after_two, cancel=cancel,
    )  # fmt: skip
    assert result.finish_reason == "cancelled" and result.iterations == 2
    reports, result = learn(demo_float32, data, tmp_path / "cut", resume=True)
    assert result.finish_reason == "done"
    assert [report.iteration for report in reports if isinstance(report, TrainReport)] == [3, 4, 5, 6]
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(demo_float32, data, tmp_path):
    def started(out, how):
        command = [sys.executable, "-c", SCRIPT, demo_float32, data, out, __file__.rpartition("/")[0], how]
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        assert process.stdout and process.stdout.readline() == "begun\n"
        return process

    undisturbed = started(tmp_path / "whole", "new")
    began = time.monotonic()
    assert undisturbed.wait() == 0
    length = time.monotonic() - began
    draw = random.Random(7)
    how, kills = "new", 0
    while True:
        process = started(tmp_path / "cut", how)
        try:
            process.wait(timeout=draw.uniform(0, 0.3 * length) if kills < 3 else None)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        how = "resume" if (tmp_path / "cut" / "training.safetensors").exists() else "new"
    assert kills and process.returncode == 0
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_two_machines_learn_what_one_does(demo_float32, data, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [demo_float32, data, tmp_path / "two", __file__.rpartition("/")[0], "new"]
    launched = Path(sys.executable).parent / "mlx.launch"
    command = [launched, "-n", "2", "--backend", "ring", "--", sys.executable, script, *arguments]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=240)
    alone = [sys.executable, script, *arguments[:2], tmp_path / "one", *arguments[3:]]
    subprocess.run([str(part) for part in alone], check=True, capture_output=True, timeout=240)
    one, two = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("one", "two"))
    assert any(mx.abs(array).max() > 1e-3 for name, array in two.items() if name.endswith("lora_b"))
    for name, array in one.items():
        assert mx.abs(array - two[name]).max() <= 1e-4 * mx.abs(array).max() + 1e-6, name


def test_a_full_disk_says_so_and_leaves_what_was_saved(demo_float32, data, tmp_path, monkeypatch):
    options = replace(OPTIONS, val_batches=0)
    learn(demo_float32, data, tmp_path, replace(options, iters=1))
    kept = (tmp_path / "training.safetensors").read_bytes()

    def full(*arguments) -> None:
        raise RuntimeError("[write] Unable to write 4096 bytes to file: No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(TrainingError, match=r"training.safetensors cannot be written .*; make room and resume"):
        learn(demo_float32, data, tmp_path, replace(options, iters=2), resume=True)
    assert (tmp_path / "training.safetensors").read_bytes() == kept
    names = ["adapter_config.json", "adapters.safetensors", "training.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_patience_ends_a_run_that_gets_no_better(demo_float32, data, tmp_path):
    options = replace(OPTIONS, iters=50, learning_rate=0.5, warmup=0, steps_per_eval=1, patience=2, save_every=100)
    reports, result = learn(demo_float32, data, tmp_path, options)
    validations = [report for report in reports if isinstance(report, ValidationReport)]
    assert result.finish_reason == "patience" and not any(report.is_best for report in validations[-2:])
    assert result.best == min(report.losses.total for report in validations)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_adapter(demo_float32, data, tmp_path, monkeypatch):
    from mlx_diffusiongemma.training import trainer

    original, calls = trainer.diffusion_loss, []

    def broken(model, batch, **settings):
        calls.append(batch)
        losses = original(model, batch, **settings)
        return (losses[0] * float("nan"), losses[1]) if len(calls) == 5 else losses

    learn(demo_float32, data, tmp_path / "two", replace(OPTIONS, iters=2))
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "diffusion_loss", broken)
        model, processor = load(demo_float32)
        records = read_records(data, processor, 256)
        with pytest.raises(TrainingError, match=r"The loss is not a number at one of the lines \d+, \d+ of the data"):
            train(model, processor, records[:16], OPTIONS, adapter_path=tmp_path / "broken")
    kept = mx.load(str(tmp_path / "broken" / "adapters.safetensors"))
    for name, array in tree_flatten(model.trainable_parameters()):
        assert mx.array_equal(kept[name], array) and mx.isfinite(array).all()
    _, metadata = mx.load(str(tmp_path / "broken" / "training.safetensors"), return_metadata=True)
    assert json.loads(metadata["progress"])["done"] == 2


def test_another_run_is_not_resumed(demo_float32, data, tmp_path):
    with pytest.raises(TrainingError, match="holds no run to resume"):
        learn(demo_float32, data, tmp_path, resume=True)
    options = replace(OPTIONS, iters=1)
    learn(demo_float32, data, tmp_path, options)
    with pytest.raises(TrainingError, match="had other settings or other data"):
        learn(demo_float32, data, tmp_path, replace(options, seed=1), resume=True)
    (tmp_path / "training.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainingError, match="is damaged"):
        learn(demo_float32, data, tmp_path, options, resume=True)


def test_options_that_make_no_sense_are_refused():
    for settings, reason in (
        ({"iters": 0}, "iters is a whole number from 1"),
        ({"learning_rate": -1.0}, "learning_rate is a number above 0"),
        ({"optimizer": "lion"}, "optimizer is one of adam, adamw"),
        ({"patience": 0}, "patience is a whole number from 1"),
        ({"lr_schedule": {"name": "linear"}}, "lr_schedule describes no schedule"),
    ):
        with pytest.raises(TrainingError, match=reason):
            TrainingOptions(**settings)


def test_more_machines_than_replies_of_an_update_are_refused(demo_float32, data, tmp_path, monkeypatch):
    monkeypatch.setattr(mx.distributed, "init", lambda: SimpleNamespace(size=lambda: 5, rank=lambda: 4))
    model, processor = load(demo_float32)
    with pytest.raises(TrainingError, match="The 4 replies of an update are too few for 5 machines"):
        train(model, processor, read_records(data, processor, 256), OPTIONS, adapter_path=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_whole_models_are_trained_unless_they_are_quantized(demo_float32, demo_4bit, data, tmp_path):
    options = replace(OPTIONS, iters=1, adapter=AdapterConfig("full"))
    learn(demo_float32, data, tmp_path / "full", options)
    saved = mx.load(str(tmp_path / "full" / "adapters.safetensors"))
    model, processor = load(demo_float32)
    parameters = dict(tree_flatten(model.parameters()))
    records = read_records(data, processor, 256)
    further = train(model, processor, records, options, adapter_path=tmp_path / "further", initial=saved)
    assert further.iterations == 1
    assert saved.keys() == parameters.keys()
    assert not mx.array_equal(saved["model.decoder.norm.weight"], parameters["model.decoder.norm.weight"])
    with pytest.raises(TrainingError, match="A quantized model cannot be trained in full"):
        learn(demo_4bit, data, tmp_path / "quantized", options)
