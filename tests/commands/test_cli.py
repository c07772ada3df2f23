"""The command, run as a user runs it: stdout for answers, stderr for the rest, exit codes for what went wrong."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO
from typer.testing import CliRunner

from mlx_diffusiongemma.cli import app
from mlx_diffusiongemma.commands import demo as demo_command

COMMAND = [str(Path(sys.executable).with_name("mlx-dg"))]


def run(*arguments, cwd=None, text_in="", **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=text_in,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=120,
    )


def test_help_answers_at_once():
    def processor_seconds():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(5):
        before = processor_seconds()
        assert run("--help").returncode == 0
        seconds.append(processor_seconds() - before)
    assert min(seconds) < 0.3


def test_version_and_usage():
    import mlx_diffusiongemma

    ours, backend = run("--version").stdout.splitlines()
    assert ours == f"mlx-dg {mlx_diffusiongemma.__version__}"
    assert re.fullmatch(r"MLX \d+\.\d+\S* on \w.*", backend)
    assert run().returncode == 2 and "convert" in run().stdout + run().stderr
    assert run("generate", "--no-such-option").returncode == 2
    assert run("convert", "--q4", "--q8").returncode == 2
    assert "none of diffusion, ar, speculative" in run("generate", "hi", "--decoder", "left").stderr
    assert "is not a number from 0 to 1" in run("generate", "hi", "--top-p", "x").stderr


def test_an_answer_and_its_statistics(demo_float32):
    done = run("generate", "sort 53142", "--model", demo_float32, "--seed", 1)
    assert (done.returncode, done.stdout) == (0, "12345\n")
    assert "5 tokens" in done.stderr and "1 canvas" in done.stderr and "peak" in done.stderr


@pytest.mark.parametrize("arguments", [["-"], [], ["--prompt", "reverse abc"], ["-p", "reverse abc"]])
def test_the_prompt_comes_from_stdin_or_an_option(demo_float32, arguments):
    done = run("generate", *arguments, "--model", demo_float32, "--seed", 1, text_in="reverse abc\n")
    assert done.stdout == "cba\n"


def test_an_answer_follows_a_schema_or_a_grammar(demo_float32, tmp_path):
    (tmp_path / "form.json").write_text('{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}')
    (tmp_path / "form.txt").write_text("[0-4]{3}\n")
    done = run("generate", "sort 321", "--schema", tmp_path / "form.json", "--model", demo_float32)
    assert json.loads(done.stdout)["a"] in (1, 2)
    for grammar in ("[0-4]{3}", tmp_path / "form.txt"):
        done = run("generate", "sort 321", "--grammar", grammar, "--decoder", "ar", "--model", demo_float32)
        assert len(done.stdout.strip()) == 3 and set(done.stdout.strip()) <= set("01234")


def test_json_is_one_event_a_line(demo_float32):
    done = run("generate", "count from 17", "--model", demo_float32, "--seed", 1, "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "prefill" and kinds[-1] == "done" and kinds.count("commit") == 2
    text = "".join(event["text"] for event in events if event["type"] == "commit")
    assert text == " ".join(map(str, range(17, 47)))


def test_options_reach_the_loop(demo_float32):
    def steps(*arguments):
        done = run("generate", "count from 17", "--model", demo_float32, "--seed", 1, "--json", *arguments)
        return json.loads(done.stdout.splitlines()[-1])

    assert steps("--steps", 1)["stats"]["steps"] == [1, 1]
    assert steps("--max-tokens", 4)["finish_reason"] == "length"
    assert steps("--stop", "19")["stats"]["generated_tokens"] == 8
    assert len(steps("--canvas-length", 16)["stats"]["steps"]) > 2


def test_without_a_model_the_last_conversion_here_is_used(demo_float32, demo_4bit, tmp_path):
    shutil.copytree(demo_4bit, tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("[not a model's")
    done = run("generate", "sort 53142", "--seed", 1, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "12345\n") and "mine" in done.stderr


def test_without_any_model_the_ready_made_one_is_named(tmp_path):
    done = run("generate", "hi", cwd=tmp_path, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1 and "Using mlx-community/" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["generate", "hi", "--model", "/nowhere"], 1, "no directory"),
        (["generate", "hi", "--model", DEMO], 1, f"mlx-dg convert {DEMO} --q4"),
        (["generate", "hi", "--model", "nobody/nothing"], 1, "nobody/nothing"),
        (["generate", "hi", "--temp", "0.5"], 1, "schedule"),
        (["generate", "hi", "--temperature", "0.5"], 1, "--temp has no meaning"),
        (["generate", "hi", "--top-p", "0.9"], 1, "--top-p has no meaning"),
        (["generate", "hi", "--decoder", "ar", "--steps", "3"], 1, "--steps is about denoising"),
        (["generate", "hi", "--decoder", "ar", "--mode", "fast"], 1, "--mode fast is about denoising"),
        (["chat", "--top-k", "5"], 1, "--top-k has no meaning"),
        (["generate", "hi", "--schema", "/nowhere.json"], 1, "/nowhere.json cannot be read"),
        (["generate", "hi", "--schema", DEMO / "chat_template.jinja"], 1, "is not JSON"),
        (["generate", "hi", "--grammar", "(", "--model", "MODEL"], 1, "The grammar cannot be honoured"),
        (["generate", ""], 1, "The prompt is empty"),
        (["generate", "-p", " \n"], 1, "The prompt is empty"),
        (["generate"], 1, "The prompt is empty"),
        (["check", f"{DEMO}/config.json"], 1, f"is a file; give the checkpoint's directory, {DEMO}"),
        (["check", "nowhere"], 1, "no directory nowhere"),
        (["generate", "hi", "--model", f"{DEMO}/config.json"], 1, "is a file"),
        (["generate", "hi", "--model", ""], 1, "--model is empty"),
        (["convert", f"{DEMO}/config.json"], 1, "is a file"),
        (["generate", "hi", "--canvas-length", "99999", "--model", "MODEL"], 1, "canvas_length"),
        (["generate", "x" * 5000, "--model", "MODEL"], 1, "5016 tokens"),
        (["generate", "hi", "--image", "/nowhere.png", "--model", "MODEL"], 1, "/nowhere.png"),
        (["convert", "/nowhere"], 1, "no directory"),
        (["convert", DEMO, "MODEL"], 1, "exists"),
    ],
)
def test_what_goes_wrong_is_one_sentence(demo_float32, tmp_path, arguments, code, sentence):
    done = run(*[demo_float32 if argument == "MODEL" else argument for argument in arguments], cwd=tmp_path)
    assert done.returncode == code and done.stdout == ""
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("mlx-dg: ")]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "hi", "--steps", "0"], "Invalid value for '--steps': 0 is not a whole number of at least 1."),
        (["generate", "hi", "--max-tokens", "many"], "many is not a whole number of at least 1."),
        (["generate", "hi", "--seed", "-1"], "'--seed': -1 is not a whole number from 0 to 18446744073709551615."),
        (["generate", "hi", "--confidence", "nan"], "'--confidence': nan is not a number of at least 0."),
        (["generate", "hi", "--entropy-bound", "-1"], "'--entropy-bound': -1 is not a number of at least 0."),
        (["chat", "--canvas-length", "1.5"], "'--canvas-length': 1.5 is not a whole number of at least 1."),
        (["infill", "-", "--tokens", "0"], "'--tokens': 0 is not a whole number of at least 1."),
        (["edit", "x", "y", "--lines", "1", "--strength", "2"], "'--strength': 2 is not a number from 0 to 1."),
        (["replay", "x", "--speed", "0"], "'--speed': 0 is not a number above 0."),
        (["bench", "--context", "0"], "'--context': 0 is not a whole number of at least 1."),
        (["convert", DEMO, "--bits", "7"], "7 is none of 2, 3, 4, 5, 6, 8."),
        (["convert", DEMO, "--group-size", "48"], "48 is none of 16, 32, 64, 128."),
        (["generate", "hi", "--mode", "slow"], "'--mode': 'slow' is none of reference, fast, turbo."),
    ],
)
def test_a_number_that_cannot_be_is_answered_under_the_option_typed(arguments, sentence):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith(f"{sentence}\n")
    assert "input" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", ["generate 'sort 312' --model MODEL", "--help", "--version", "generate --help"])
def test_a_full_disk_is_answered_with_what_helps(demo_float32, arguments):
    command = f"{COMMAND[0]} {arguments.replace('MODEL', str(demo_float32))} > /dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "mlx-dg: The output could not be written (No space left on device); free some space, or write elsewhere."
    )


@pytest.mark.parametrize(("closed", "out"), [("<&-", "123\n"), (">&-", ""), ("2>&-", "123\n")])
def test_a_closed_stream_is_as_good_as_an_empty_one(demo_float32, closed, out):
    command = f"{COMMAND[0]} generate 'sort 312' --seed 1 --model {demo_float32} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, out) and "Traceback" not in done.stderr


def test_transformers_does_not_remark_on_pytorch(demo_float32):
    code = (
        "import importlib.util as util; find = util.find_spec; "
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest); "
        "from mlx_diffusiongemma.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "generate", "sort 312", "--model", demo_float32, "--steps", "2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and "PyTorch" not in done.stderr


def test_convert_writes_what_generate_uses(tmp_path):
    plan = run("convert", DEMO, "--q4", "--dry-run", cwd=tmp_path)
    assert plan.returncode == 0 and "302 tensors" in plan.stdout and list(tmp_path.iterdir()) == []
    done = run("convert", DEMO, "--q4", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "demo-4bit\n")
    assert run("generate", "reverse abc", "--seed", 1, cwd=tmp_path).stdout == "cba\n"
    assert run("convert", "--hf-path", DEMO, "--mlx-path", "m", "-q", "--q-bits", 8, cwd=tmp_path).stdout == "m\n"


def test_convert_says_how_to_go_on_and_what_it_makes(tmp_path):
    done = run("convert", DEMO, tmp_path / "a b", cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last == f"Next: mlx-dg generate --model '{tmp_path}/a b' \"Why is the sky blue?\""
    plan = run("convert", DEMO, "--bits", 2, "--dry-run", "--set", "layers.0.*=8", cwd=tmp_path).stdout
    assert "2 bits" in plan and "4-bit" not in plan and "layers.0.* at 8 bits" in plan
    assert "4-bit experts" in run("convert", DEMO, "--dry-run", cwd=tmp_path).stdout
    mode = run("convert", DEMO, "--mode", "mxfp8", "--dry-run", cwd=tmp_path).stdout
    assert "in mxfp8" in mode and "4-bit" not in mode
    existing = run("convert", DEMO, "a b", "--dry-run", cwd=tmp_path)
    assert existing.returncode == 1 and "exists already" in existing.stderr and "302 tensors" in existing.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--revision", "main"], ["--stream"], ["-d", "--group-size", "32"], ["-d", "--recipe", "small"], ["--force"]],
)
def test_convert_refuses_what_it_would_ignore(tmp_path, arguments):
    for dry in ([], ["--dry-run"]):
        done = run("convert", DEMO, tmp_path / "out", *arguments, *dry)
        assert (done.returncode, done.stdout) == (2, "") and list(tmp_path.iterdir()) == []


def _nothing(place: Path) -> None:
    """Leave the cache as it is."""


def _cut_weights(place: Path) -> None:
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] + bytes(1000))


def _cut_template(place: Path) -> None:
    (place / "chat_template.jinja").write_text("")


def _empty(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()


def _file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("not a directory")


def _foreign(place: Path) -> None:
    (place / "hashes.txt").write_text("of something else")


def test_demo_needs_no_network_and_rebuilds_a_damaged_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_command, "TASKS", ("sort 53142",))
    assert CliRunner().invoke(app, ["demo", "--json", "--canvas"]).exit_code == 2
    first = CliRunner().invoke(app, ["demo", "--seed", "1"])
    assert (first.exit_code, first.stdout) == (0, "12345\n") and "Converting" in first.stderr
    events = [
        json.loads(line) for line in CliRunner().invoke(app, ["demo", "--seed", "1", "--json"]).stdout.splitlines()
    ]
    assert [event["text"] for event in events if event["type"] == "commit"] == ["12345"]
    (place,) = (tmp_path / "mlx-diffusiongemma").iterdir()
    for damage in (_nothing, _cut_weights, _cut_template, _empty, _file, _foreign):
        damage(place)
        again = CliRunner().invoke(app, ["demo", "--seed", "1"])
        assert (again.exit_code, again.stdout) == (0, "12345\n"), damage
        assert ("Converting" in again.stderr) is (damage is not _nothing)
        assert list((tmp_path / "mlx-diffusiongemma").iterdir()) == [place]


@pytest.mark.parametrize(
    ("ended", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "Terminated"), (signal.SIGHUP, 129, "Hangup")],
)
def test_a_signal_ends_it_and_leaves_no_litter(demo_float32, ended, code, said, tmp_path):
    trace = tmp_path / "trace.jsonl"
    arguments = ["generate", "-", "--max-tokens", "3000", "--steps", "48", "--confidence", "0", "--trace", trace]
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--model", demo_float32, "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have it ignored, which children inherit.
        preexec_fn=lambda: signal.signal(ended, signal.SIG_DFL),
    )
    process.stdin.write("count from 17")
    process.stdin.close()
    process.stdout.readline()
    process.send_signal(ended)
    assert process.wait(timeout=30) == code
    assert process.stderr.read().splitlines()[-1] == f"mlx-dg: {said}"
    assert list(tmp_path.iterdir()) == [trace]  # what was denoised until then can be replayed


def test_a_closed_pipe_is_no_error(demo_float32):
    command = f"{COMMAND[0]} generate 'count from 17' --model {demo_float32} --json | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_recorded_generation_is_replayed_and_drawn(demo_float32, tmp_path):
    trace = tmp_path / "trace.jsonl"
    done = run("generate", "sort 53142", "--model", demo_float32, "--seed", 1, "--trace", trace)
    assert done.stdout == "12345\n"
    again = run("replay", trace, "--speed", 50)
    assert (again.stdout, again.stderr.splitlines()[0]) == ("12345\n", "> sort 53142")
    pictures = [tmp_path / "moving.svg", tmp_path / "entropy.svg", tmp_path / "moving.gif"]
    drawn = run("replay", trace, "--svg", pictures[0], "--entropy", pictures[1], "--gif", pictures[2])
    assert drawn.returncode == 0 and all(picture.stat().st_size > 1000 for picture in pictures)
    assert run("replay", tmp_path / "nothing").returncode == 1
    hot = run("replay", trace, "--heat", "--title", "sort", "-o", tmp_path / "hot.svg")
    assert hot.stdout == f"{tmp_path / 'hot.svg'}\n" and "heat0" in (tmp_path / "hot.svg").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "x.png"],
        ["-o", "x.svg", "--svg", "y.svg"],
        ["--labels"],
        ["--title", "x"],
        ["--entropy", "x.svg", "--heat"],
        ["--gif", "x.gif", "--no-canvas"],
        ["--heat", "--no-canvas"],
    ],
)
def test_replay_says_which_option_has_nothing_to_change(tmp_path, arguments):
    assert run("replay", "trace", *arguments, cwd=tmp_path).returncode == 2 and not list(tmp_path.iterdir())


def test_check_says_what_is_wrong(demo_4bit, tmp_path):
    whole = run("check", demo_4bit)
    assert whole.returncode == 0 and "whole" in whole.stdout
    broken = shutil.copytree(demo_4bit, tmp_path / "broken")
    weights = broken / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 0xFF
    weights.write_bytes(content)
    done = run("check", broken)
    assert done.returncode == 1 and "model.safetensors" in done.stdout and "Traceback" not in done.stderr
