"""`mlx-dg train` as a user runs it: its settings from three places, its lines, its figures, and how it is stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_diffusiongemma import TrainingError
from mlx_diffusiongemma.checkpoints.adapter_files import load_adapter
from mlx_diffusiongemma.cli import app
from mlx_diffusiongemma.commands.training.reporting import Narrator, Places, Reporter, duration
from mlx_diffusiongemma.commands.training.settings import make_settings, size_in_bytes
from mlx_diffusiongemma.errors import AdapterError
from mlx_diffusiongemma.model.adapters import GROUPS
from mlx_diffusiongemma.training import TrainingOptions
from mlx_diffusiongemma.training.trainer import Losses, TrainReport, UpdateReport, ValidationReport

COMMAND = [str(Path(sys.executable).with_name("mlx-dg"))]
SHORT = ["--iters", "2", "--grad-accumulation-steps", "1", "--steps-per-report", "1", "--val-batches", "2"]


def run(*arguments, cwd):
    """The verb in this process, which has imported everything already."""
    with chdir(cwd):
        return CliRunner().invoke(app, ["train", *map(str, arguments)])


@pytest.fixture
def data(tmp_path):
    """A folder with examples of a task that the demo knows."""
    lines = [json.dumps({"prompt": f"sort {n}", "completion": "".join(sorted(str(n)))}) for n in range(321, 341)]
    for name, few in (("train", lines[:12]), ("valid", lines[12:16]), ("test", lines[16:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(few) + "\n")
    return tmp_path


@pytest.fixture
def config(tmp_path):
    """A function that writes a file of settings and returns its path."""

    def written(text):
        (tmp_path / "config.yaml").write_text(text)
        return str(tmp_path / "config.yaml")

    return written


# As in mlx-lm's own example of a configuration, less the model.
OF_MLX_LM = """
model: "mlx_model"
train: true
fine_tune_type: dora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
  sgd: {}
data: "/path/to/training/data"
seed: 1
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
trust_remote_code: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 16
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""


def test_the_command_line_beats_the_file_which_beats_the_defaults(config):
    assert make_settings({}).options == TrainingOptions()
    path = config(OF_MLX_LM)
    settings = make_settings({"iters": 7, "lora_keys": "attention, router", "adapter_path": "here"}, path)
    options, adapter = settings.options, settings.options.adapter
    assert (settings.model, settings.data, settings.adapter_path) == ("mlx_model", "/path/to/training/data", "here")
    assert (options.iters, options.batch_size, options.learning_rate, options.seed) == (7, 4, 1e-5, 1)
    assert options.lr_schedule["arguments"] == [1e-5, 1000, 1e-7]
    assert options.optimizer_config == {"betas": [0.9, 0.98]}
    assert (adapter.fine_tune_type, adapter.rank, adapter.scale, adapter.num_layers) == ("dora", 16, 20.0, 16)
    assert adapter.keys == (*GROUPS["attention"], *GROUPS["router"])
    assert make_settings({}, path).options.adapter.keys == ("self_attn.q_proj", "self_attn.v_proj")
    assert (options.patience, options.grad_accumulation_steps) == (None, 8)


@pytest.mark.parametrize("given, trains", [({}, True), ({"test": True}, False), ({"test": True, "train": True}, True)])
def test_a_test_alone_trains_nothing(given, trains):
    assert make_settings(given).trains is trains


WRONG = {
    "iter: 5": "'iter' is no setting of training; did you mean 'iters'?",
    "lora_parameters: {alpha: 16}": "lora_parameters: 'alpha' is no setting of training",
    "lora_parameters: 8": "lora_parameters holds settings",
    "lora_parameters: {dropout: 0.1}": "dropout is not used",
    "lora_parameters: {rank: 0}": "rank is a whole number from 1 on, not 0",
    "lora_parameters: {scale: big}": "scale is a number, not 'big'",
    "lora_keys: [7]": "keys is a list of names",
    "lora_keys: everything": "'everything' is no linear layer that can be adapted",
    "iters: many": "iters cannot be 'many'",
    "iters: true": "iters cannot be True",
    "iters: 0": "iters is a whole number from 1 on, not 0",
    "learning_rate: -1": "learning_rate is a number above 0",
    "optimizer: adamax": "optimizer is one of adam, adamw",
    "fine_tune_type: qlora": "fine_tune_type is one of lora, dora, full, not 'qlora'",
    "towers: both": "towers is one of shared, separate, decoder, not 'both'",
    "num_layers: -2": "num_layers is a whole number",
    "optimizer_config: [1]": "optimizer_config cannot be",
    "lr_schedule: {name: cosine}": "lr_schedule describes no schedule",
    "lr_schedule: {name: cosine_decay, arguments: [1e-5], warmup: 5}": "lr_schedule describes no schedule",
    "lr_schedule: {kind: cosine_decay}": "lr_schedule has name, arguments, warmup, warmup_init; leave 'kind' out",
    "trust_remote_code: true": "trust_remote_code can only be false",
    "- iters": "holds no settings",
    "iters: [": "is not YAML",
    "data: [a]": "data cannot be ['a']",
}


@pytest.mark.parametrize("text, reason", WRONG.items(), ids=WRONG)
def test_a_wrong_setting_is_named(config, text, reason):
    with pytest.raises((TrainingError, AdapterError)) as raised:
        make_settings({}, config(text))
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_a_configuration_that_is_not_there():
    with pytest.raises(TrainingError, match=r"nowhere\.yaml cannot be read"):
        make_settings({}, "nowhere.yaml")


def test_an_empty_configuration_changes_nothing(config):
    assert make_settings({}, config("# nothing\n")) == make_settings({})


def test_sizes_are_read_as_mlx_lm_reads_them():
    assert [size_in_bytes(text) for text in ("0", "500M", "1.5GB", 7)] == [0, 500_000_000, 1_500_000_000, 7]
    with pytest.raises(TrainingError, match="is no size"):
        size_in_bytes("much")


def test_durations_are_written_in_two_units():
    assert [duration(seconds) for seconds in (0.4, 59, 61, 3599, 7500)] == [
        "0 s",
        "59 s",
        "1 min 01 s",
        "59 min 59 s",
        "2 h 05 min",
    ]


def test_the_time_left_follows_from_the_whole_run_so_far(capsys):
    narrate = Narrator(100)
    narrate(UpdateReport(1))
    for iteration, seconds in ((10, 100.0), (20, 50.0)):
        narrate(TrainReport(iteration, Losses(1.5, 0.25, 1000), 1e-4, 10, seconds, 19_200_000_000))
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "iteration 10/100: loss 1.750 (denoising 1.500, next token 0.250), rate 1.00e-04, 0.1 it/s, 10 tokens/s, "
        "peak 19.2 GB, 15 min 00 s left"
    )
    assert second.endswith("20 tokens/s, peak 19.2 GB, 10 min 00 s left")


def test_figures_go_to_a_file_and_to_services_as_mlx_lm_names_them(tmp_path, monkeypatch):
    logged = []
    wandb = SimpleNamespace(init=lambda **how: logged.append(how), log=lambda info, step: logged.append((info, step)))
    monkeypatch.setattr("mlx_lm.tuner.callbacks.wandb", wandb)
    places = Places.named(f"wandb, {tmp_path / 'curve.jsonl'}")
    with Reporter(places, "mine", tmp_path / "adapters", {"iters": 3}) as report:
        report(TrainReport(1, Losses(2.0, 1.0, 50), 1e-4, 1, 0.5, 10**9))
        report(TrainReport(2, Losses(2.0, 1.0, 60), 1e-4, 1, 0.5, 10**9))
        report(ValidationReport(2, Losses(1.0, 0.5, 50), None, True))
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line.get("train_loss", line.get("val_loss")) for line in lines] == [3.0, 3.0, 1.5]
    assert (lines[1]["trained_tokens"], lines[1]["tokens_per_second"], lines[1]["peak_memory"]) == (110, 120.0, 1.0)
    assert logged[0]["project"] == "mine" and logged[0]["config"] == {"iters": 3}
    assert [step for _, step in logged[1:]] == [1, 2, 2] and [info for info, _ in logged[1:]] == lines


def test_a_full_disk_does_not_end_what_is_only_reported(capsys, tmp_path):
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    places = Places.named(f"{tmp_path / 'full.jsonl'},{tmp_path / 'curve.jsonl'}")
    with Reporter(places, None, tmp_path, {}) as report:
        for iteration in range(3):
            report(ValidationReport(iteration, Losses(1.0, 0.5, 50), None, True))
    [said] = capsys.readouterr().err.splitlines()
    assert "full.jsonl cannot be written (No space left on device); nothing more is reported to it" in said
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("columns", [60, 80])
def test_updates_are_counted_in_a_terminal(monkeypatch, capsys, columns):
    for name, value in (("COLUMNS", columns), ("FORCE_COLOR", 1), ("TERM", "xterm")):
        monkeypatch.setenv(name, str(value))
    with Narrator(2000) as narrate:
        narrate(UpdateReport(7))
        narrate(TrainReport(7, Losses(1.5, 0.25, 1000), 1e-4, 7, 10.0, 10**9))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "7/2000" in shown and "iteration 7/2000: loss 1.750" in shown


def test_what_cannot_be_reported_to_is_said_at_once(tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match="Nothing can be reported to 'tensorboard'; give wandb, swanlab or"):
        Places.named("tensorboard")
    with pytest.raises(TrainingError, match=r"curve\.jsonl cannot be written"):
        Reporter(Places.named(str(tmp_path / "no" / "curve.jsonl")), None, tmp_path, {})
    monkeypatch.setattr("mlx_lm.tuner.callbacks.swanlab", None)
    with pytest.raises(TrainingError, match="swanlab is not installed"):
        Reporter(Places.named("swanlab"), None, tmp_path, {})


def test_a_run_trains_tests_and_goes_on(demo_float32, data):
    """All in one, for the sake of time: lines, files, a test of the trained model and of the saved adapter."""
    arguments = ["--model", demo_float32, "--data", ".", *SHORT]
    done = run(*arguments, "--train", "--test", "--generate", 2, "--report-to", "curve.jsonl", cwd=data)
    assert done.exit_code == 0, done.stderr
    tested, path = done.stdout.splitlines()
    assert re.fullmatch(r"test loss [\d.]+ \(denoising .*\); \d+\.\d% of 2 replies as expected, .* canvas", tested)
    assert path == "adapters"
    assert "Examples: 12 in train.jsonl, 4 in valid.jsonl, 4 in test.jsonl" in done.stderr
    assert re.search(r"iteration 1/2: loss .* it/s, .* left\niteration 2/2: ", done.stderr)
    assert "iteration 0: validation loss" in done.stderr and "the lowest so far" in done.stderr
    saved = {path.name for path in (data / "adapters").iterdir()}
    assert saved >= {"adapters.safetensors", "adapter_config.json", "best"}
    lines = [json.loads(line) for line in (data / "curve.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 2]
    again = run(*arguments, "--test", "--generate", 2, cwd=data)
    assert again.stdout.splitlines() == [tested], again.stderr
    further = run(*arguments, "--iters", 3, "--resume", cwd=data)
    assert further.exit_code == 0 and "iteration 3/3: loss" in further.stderr
    assert "iteration 2/" not in further.stderr


def test_an_interrupted_run_is_saved_and_can_go_on(demo_float32, data):
    arguments = ["--model", demo_float32, "--data", ".", *SHORT, "--val-batches", "0"]
    command = [*COMMAND, "train", *map(str, arguments), "--iters", "10000", "--seed", "3"]
    process = subprocess.Popen(command, cwd=data, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("iteration 2/"):
            process.send_signal(signal.SIGINT)
            break
    said = process.stderr.read()
    assert process.wait(60) == 130
    assert "Ctrl-C again ends at once" in said
    [done] = re.findall(r"Interrupted after iteration (\d+), which is saved in adapters; the same command with", said)
    further = run(*arguments, "--iters", int(done) + 1, "--seed", 3, "--resume", cwd=data)
    assert further.exit_code == 0 and f"iteration {int(done) + 1}/{int(done) + 1}: loss" in further.stderr


def test_a_run_begins_with_the_weights_of_another(demo_float32, data):
    arguments = ["--model", demo_float32, "--data", ".", *SHORT]
    assert run(*arguments, "--learning-rate", 0.01, cwd=data).exit_code == 0
    begun = run(*arguments, "--resume-adapter-file", "adapters/adapters.safetensors", "--adapter-path", "b", cwd=data)
    last = re.findall(r"validation loss ([\d.]+)", begun.stderr)[0]
    fresh = run(*arguments, "--adapter-path", "c", cwd=data)
    assert last != re.findall(r"validation loss ([\d.]+)", fresh.stderr)[0]
    other = run(*arguments, "--towers", "separate", "--resume-adapter-file", "b/adapters.safetensors", cwd=data)
    assert other.exit_code == 1 and "does not fit this model" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "give the folder with the examples"),
        (["--data", "nowhere"], 1, "nowhere is no folder"),
        (["--data", ".", "--iters", "0"], 2, "0 is not a whole number of at least 1"),
        (["--data", ".", "--report-to", "tensorboard"], 1, "Nothing can be reported to 'tensorboard'"),
        (["--data", ".", "--clear-cache-threshold", "much"], 1, "'much' is no size"),
        (["--data", ".", "--generate", "2"], 1, "--generate is about examples of ./valid.jsonl, which is not there"),
        (["--data", ".", "--max-seq-length", "8"], 1, "line 1: The prompt before message 2 has"),
        (["--data", ".", "--resume"], 1, "adapters holds no run to resume"),
        (["--data", ".", "--test", "--adapter-path", "no"], 1, "no.jsonl"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(demo_float32, tmp_path, arguments, code, said):
    (tmp_path / "train.jsonl").write_text('{"prompt": "sort 21", "completion": "12"}\n')
    done = run("--model", demo_float32, *arguments, cwd=tmp_path)
    assert done.exit_code == code and done.stdout == ""
    assert said.replace("no.jsonl", "has no test.jsonl") in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "adapters").exists()


def test_a_plan_says_what_memory_it_takes(demo_float32, data):
    planned = run("--model", demo_float32, "--plan", cwd=data)
    assert planned.exit_code == 0 and "Memory to train on 1 × 2,111 tokens, GB" in planned.stdout
    assert "plain: fits Macs from" in planned.stdout and "--grad-checkpoint: fits Macs from" in planned.stdout
    with_data = run("--model", demo_float32, "--data", ".", "--plan", cwd=data)
    assert re.search(r"Memory to train on 1 × \d\d tokens", with_data.stdout)
    assert not (data / "adapters").exists()


def test_a_run_that_cannot_fit_is_refused_before_the_weights_are_read(demo_float32, data, monkeypatch):
    monkeypatch.setattr("mlx_diffusiongemma.training.memory.usable_bytes", lambda: 10**6)
    monkeypatch.setattr("mlx_diffusiongemma.commands.training.running.load_source", None)
    done = run("--model", demo_float32, "--data", ".", *SHORT, cwd=data)
    assert done.exit_code == 1 and "Training needs about 0.0 GB" in done.stderr


def test_old_examples_are_mixed_in(demo_float32, data, tmp_path):
    (data / "old").mkdir()
    (data / "old" / "train.jsonl").write_text('{"prompt": "reverse ab", "completion": "ba"}\n')
    done = run("--model", demo_float32, "--data", ".", *SHORT, "--mix", "old", "--mix-share", "0.2", cwd=data)
    assert done.exit_code == 0 and "Mixed in: 3 of old" in done.stderr


def test_replies_that_are_cut_are_counted(demo_float32, data):
    line = json.dumps({"prompt": "count from 1", "completion": " ".join(map(str, range(1, 60)))})
    (data / "train.jsonl").write_text(f"{line}\n{line}\n")
    done = run("--model", demo_float32, "--data", ".", *SHORT, "--max-seq-length", "40", cwd=data)
    assert "2 of 2 replies are cut at 40 tokens and teach no ending" in done.stderr, done.stderr


def test_the_adapter_is_written_for_peft_too(data, demo_float32):
    made = run("--model", demo_float32, "--data", data, *SHORT, "--export-peft", "for-peft", cwd=data)
    assert made.exit_code == 0, made.output
    own, others = load_adapter(data / "adapters"), load_adapter(data / "for-peft")
    assert json.loads((data / "for-peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert own.arrays.keys() == others.arrays.keys()
    assert all(mx.array_equal(array, others.arrays[name]) for name, array in own.arrays.items())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--export-peft", "a", "--fine-tune-type", "full"], "no form for whole weights"),
        (["--export-peft", "adapters"], "are one folder"),
    ],
)
def test_what_cannot_be_written_for_peft_is_refused_at_once(data, arguments, reason):
    made = run("--model", data, "--data", data, *arguments, cwd=data)
    assert made.exit_code == 1 and reason in made.output
