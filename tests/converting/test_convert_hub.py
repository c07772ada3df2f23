"""From a hub and back to it: the real client against a small server of our own, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from convert_data import DEMO, all_tensors, copy_demo, split
from test_convert import one_key_per_expert

from mlx_diffusiongemma.convert import convert_checkpoint

HERE = Path(__file__).parents[1]
PRELUDE = """
import sys
from pathlib import Path
from mlx_diffusiongemma.convert import conversion, convert_checkpoint, plan, plan_conversion
from mlx_diffusiongemma.convert.reading import remote
from mlx_diffusiongemma.errors import CheckpointError
plan.SHARD_BYTES = 400_000
out = Path(sys.argv[1])
"""


@pytest.fixture
def server(tmp_path):
    """(root directory, environment) of a running hub."""
    root = tmp_path / "hub"
    root.mkdir()
    command = [sys.executable, str(HERE / "fake_hub.py"), str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        offline = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        yield root, {**os.environ, **offline}
        process.terminate()


def run(server, out, code):
    command = [sys.executable, "-c", PRELUDE + code, str(out)]
    return subprocess.run(command, env=server[1], capture_output=True, text=True, check=False)


def reference(source, out):
    """What a local conversion of `source` writes, in shards of the same size."""
    code = f"convert_checkpoint({str(source)!r}, out)"
    subprocess.run([sys.executable, "-c", PRELUDE + code, str(out)], check=True)
    return out


def weights(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("change", [None, one_key_per_expert])
def test_streamed_conversion_is_the_local_one_with_one_file_on_disk(server, tmp_path, change):
    source = split(copy_demo(server[0] / "google" / "tiny", change))
    done = run(
        server,
        tmp_path / "out",
        """
most = 0
def progress(*_):
    global most
    files = [path for path in (out.parent / "out.partial" / "source").rglob("*") if path.is_file()]
    most = max(most, sum(path.stat().st_blocks * 512 for path in files))
report = convert_checkpoint("google/tiny", out, stream=True, progress=progress)
print(most)
""",
    )
    assert done.returncode == 0, done.stderr
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert int(done.stdout) < largest * 1.2  # what a module spanning two files needs of the first stays
    assert weights(tmp_path / "out") == weights(reference(source, tmp_path / "local"))
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert "base_model: google/tiny" in (tmp_path / "out" / "README.md").read_text()


def test_dropped_network_resumes(server, tmp_path):
    source = split(copy_demo(server[0] / "google" / "tiny"), 4)
    convert = 'convert_checkpoint("google/tiny", out, stream=True, progress=progress)'
    dropping = f"""
def progress(done, total, name):
    if done > total * 0.5:
        (out.parent / "hub" / "drop-after").write_text("150000")
try:
    {convert}
except CheckpointError as error:
    print(error)
"""
    first = run(server, tmp_path / "out", dropping)
    assert "run the same command again" in first.stdout, first.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    (server[0] / "drop-after").unlink()
    again = run(server, tmp_path / "out", f"progress = None\nprint({convert}.resumed)")
    assert again.returncode == 0, again.stderr
    assert int(again.stdout) > 0
    assert weights(tmp_path / "out") == weights(reference(source, tmp_path / "local"))


def test_a_file_that_arrives_damaged_is_refused(server, tmp_path):
    split(copy_demo(server[0] / "google" / "tiny"))
    done = run(
        server,
        tmp_path / "out",
        """
honest = conversion.remote_files
conversion.remote_files = lambda *asked: {name: (size, "0" * 64) for name, (size, _) in honest(*asked).items()}
try:
    convert_checkpoint("google/tiny", out, stream=True)
except CheckpointError as error:
    print(error)
""",
    )
    assert "model-00001-of-00003.safetensors arrived damaged" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()


def test_plan_reads_headers_only(server, tmp_path):
    split(copy_demo(server[0] / "google" / "tiny"))
    done = run(server, tmp_path / "out", 'print(len(plan_conversion("google/tiny").tensors))')
    assert done.stdout.strip() == "302", done.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_whole_download_and_unknown_names(server, tmp_path):
    source = copy_demo(server[0] / "google" / "tiny")
    done = run(server, tmp_path / "out", 'convert_checkpoint("google/tiny", out)')
    assert done.returncode == 0, done.stderr
    assert all_tensors(tmp_path / "out") == all_tensors(convert_checkpoint(source, tmp_path / "local").out)
    refused = """
for name in ("google/unknown", "google/tiny"):
    try:
        convert_checkpoint(name, out.parent / "other", revision=None if "unknown" in name else "no-such-branch")
    except CheckpointError as error:
        print(error)
"""
    lines = run(server, tmp_path / "out", refused).stdout.splitlines()
    assert "google/unknown is neither a directory nor a repository on the hub" in lines[0]


def mlx_dg(server, *arguments, **environment):
    command = [str(Path(sys.executable).with_name("mlx-dg")), *map(str, arguments)]
    return subprocess.run(command, env=server[1] | environment, capture_output=True, text=True, check=False)


def said_size(files):
    return f"To download: up to {sum(path.stat().st_size for path in files) / 1e6:.1f} MB of"


def test_a_repository_is_loaded_and_its_size_said_before(server, tmp_path):
    (server[0] / "someone").mkdir()
    converted = convert_checkpoint(DEMO, server[0] / "someone" / "tiny-4bit").out
    (converted / "notes.txt").write_bytes(bytes(10**6))  # no part of a checkpoint
    generate = ("generate", "reverse abc", "--seed", 1, "--model", "someone/tiny-4bit")
    wanted = [path for path in converted.iterdir() if path.suffix in (".json", ".safetensors", ".jinja", ".model")]
    (server[0] / "drop-after").write_text("150000")
    dropped = mlx_dg(server, *generate)
    assert dropped.returncode == 1 and "run the same command again" in dropped.stderr
    assert dropped.stderr.startswith(f"{said_size(wanted)} someone/tiny-4bit\n")
    (server[0] / "drop-after").unlink()
    whole = mlx_dg(server, *generate)
    assert (whole.returncode, whole.stdout) == (0, "cba\n"), whole.stderr
    assert whole.stderr.startswith("To download: ")
    for again in (mlx_dg(server, *generate), mlx_dg(server, *generate, HF_HUB_OFFLINE="1")):
        assert (again.returncode, again.stdout) == (0, "cba\n") and "download" not in again.stderr
    unknown = mlx_dg(server, "generate", "hi", "--model", "someone/unknown")
    assert unknown.returncode == 1 and unknown.stderr.startswith("mlx-dg: someone/unknown is neither a directory nor")


def test_a_conversion_says_how_much_it_downloads(server, tmp_path):
    source = copy_demo(server[0] / "google" / "tiny")
    weights = source.glob("*.safetensors")  # the small files are there by then
    done = mlx_dg(server, "convert", "google/tiny", tmp_path / "out")
    assert done.returncode == 0 and done.stderr.startswith(f"{said_size(weights)} google/tiny\n")
    assert "download" not in mlx_dg(server, "convert", "google/tiny", tmp_path / "again").stderr


def test_what_cannot_be_is_known_before_the_weights_are_downloaded(server, tmp_path):
    source = copy_demo(server[0] / "google" / "tiny")
    (tmp_path / "empty.txt").write_text("\n")
    converted = copy_demo(server[0] / "someone" / "taken")
    refused = [
        (("--calibrate", "/nope.txt"), 1, "/nope.txt cannot be read", {}),
        (("--calibrate", tmp_path / "empty.txt"), 1, "no prompt to calibrate with", {}),
        (("--upload", "someone/new"), 1, "hf auth login", {}),
        (("--upload", "someone/new"), 1, "refuses access", {"HF_TOKEN": "hf_old"}),
        (("--upload", "someone/taken"), 1, "has files already", {"HF_TOKEN": "hf_x"}),
        (("--upload", "new"), 1, "owner/name", {"HF_TOKEN": "hf_x"}),
        (("--set", "nowhere.*=8"), 1, "No module is called", {}),
        (("--dtype", "int8"), 1, "int8", {}),
    ]
    for number, (arguments, code, words, environment) in enumerate(refused):
        dry = ("--dry-run",) if number % 2 == 0 else ()  # the same checks with and without it
        done = mlx_dg(server, "convert", "google/tiny", tmp_path / "out", *arguments, *dry, **environment)
        assert done.returncode == code and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    for dry in ((), ("--dry-run",)):
        done = mlx_dg(server, "convert", "google/tiny", tmp_path / "out", *dry, HF_HOME=str(tmp_path / "other"))
        assert done.returncode == 1 and "tokenizer" in done.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors")) + list((tmp_path / "other").rglob("*.safetensors"))
    assert converted.is_dir() and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_downloaded_repository_converts_without_a_network(server, tmp_path):
    copy_demo(server[0] / "google" / "tiny")
    assert mlx_dg(server, "convert", "google/tiny", tmp_path / "out").returncode == 0
    for arguments in (("--dry-run",), ()):
        done = mlx_dg(server, "convert", "google/tiny", tmp_path / "again", *arguments, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr


def test_a_large_download_is_asked_about_and_fits_the_disk(monkeypatch, tmp_path, capsys):
    import shutil
    from collections import namedtuple

    import typer

    from mlx_diffusiongemma.checkpoints import hub
    from mlx_diffusiongemma.commands import common
    from mlx_diffusiongemma.errors import CheckpointError

    asked, answers = [], [True, False]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(typer, "confirm", lambda text, **_: asked.append(text) or answers.pop(0))
    monkeypatch.setattr(hub, "bytes_to_download", lambda *_: 16_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 20_000_000_000))

    def announce(terminal=True, **options):
        for stream in (sys.stdin, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        common.announce_download("google/tiny", None, (), **options)

    announce()
    with pytest.raises(typer.Exit):
        announce()
    assert "To download: up to 16.5 GB of google/tiny" in capsys.readouterr().err and len(asked) == 2
    announce(yes=True)
    announce(terminal=False)
    with pytest.raises(CheckpointError, match=r"has 20\.0 GB free and 33\.0 are needed"):
        announce(beside={tmp_path: 16_500_000_000})
    announce(terminal=False, beside={tmp_path: 16_500_000_000}, kept=False)
    monkeypatch.setattr(hub, "bytes_to_download", lambda *_: 10**8)
    announce()
    assert len(asked) == 2


def test_an_index_that_points_outside_is_refused_before_any_download(server, tmp_path):
    source = split(copy_demo(server[0] / "google" / "tiny"))
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00003.safetensors", "../../evil.safetensors"))
    code = """
try:
    convert_checkpoint("google/tiny", out, stream=True)
except CheckpointError as error:
    print(error)
"""
    assert "outside its own directory" in run(server, tmp_path / "out", code).stdout
    assert "evil" not in (server[0] / "requests.log").read_text()


def test_upload(server, tmp_path):
    converted = convert_checkpoint(DEMO, tmp_path / "demo").out
    code = """
import os
from mlx_diffusiongemma.convert import upload_checkpoint
given = (("", False), ("hf_x", False), ("hf_x", False), ("hf_x", True), ("hf_old", True), ("hf_read", True))
for token, force in given:
    os.environ["HF_TOKEN"] = token
    try:
        print(upload_checkpoint(out, "someone/tiny-4bit", force=force))
    except CheckpointError as error:
        print(error)
"""
    done = run(server, converted, code)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "hf auth login" in lines[0]
    assert lines[1].endswith("/someone/tiny-4bit"), done.stderr
    assert "has files already" in lines[2] and "--force" in lines[2]
    assert lines[3] == lines[1]
    assert "refuses access" in lines[4] and "may only read" in lines[5]
    uploaded = server[0] / "someone" / "tiny-4bit"
    assert {path.name: path.read_bytes() for path in uploaded.iterdir()} == {
        path.name: path.read_bytes() for path in converted.iterdir()
    }
    (converted / "tokenizer.json").unlink()
    refused = run(server, converted, code).stdout.splitlines()
    assert all("not fit to upload" in line for line in refused)
