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
honest = remote.remote_files
remote.remote_files = lambda *asked: {name: (size, "0" * 64) for name, (size, _) in honest(*asked).items()}
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
    done = mlx_dg(server, "convert", "google/tiny", tmp_path / "out")
    assert done.returncode == 0 and done.stderr.startswith(f"{said_size(source.iterdir())} google/tiny\n")
    assert "download" not in mlx_dg(server, "convert", "google/tiny", tmp_path / "again").stderr


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
for token, force in (("", False), ("hf_x", False), ("hf_x", False), ("hf_x", True)):
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
    uploaded = server[0] / "someone" / "tiny-4bit"
    assert {path.name: path.read_bytes() for path in uploaded.iterdir()} == {
        path.name: path.read_bytes() for path in converted.iterdir()
    }
    (converted / "tokenizer.json").unlink()
    refused = run(server, converted, code).stdout.splitlines()
    assert all("not fit to upload" in line for line in refused)
