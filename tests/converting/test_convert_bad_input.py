"""What conversion refuses: each with one sentence that says what is wrong, and with nothing left behind."""

import errno
import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
from convert_data import DEMO, all_tensors, copy_demo, edit_json, split

from mlx_diffusiongemma.convert import conversion, convert_checkpoint, plan_conversion
from mlx_diffusiongemma.errors import CheckpointError

NORM = "model.decoder.norm.weight"
ROUTER = "model.decoder.layers.0.router.proj.weight"


def refused(source, out, *parts, **options):
    """Converting `source` raises one sentence that holds all of `parts` and leaves neither `out` nor its partial."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(source, out, **options)
    message = str(error.value)
    for part in parts:
        assert part in message, message
    assert message.endswith(".") and "\n" not in message
    assert sorted(out.parent.rglob("*")) == before


def test_missing_directory(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "out", "There is no directory", "nowhere")
    refused("./nowhere", tmp_path / "out", "There is no directory", "nowhere")


def test_no_config(tmp_path):
    (tmp_path / "source").mkdir()
    refused(tmp_path / "source", tmp_path / "out", "has no config.json")


def test_another_models_config(tmp_path):
    refused(copy_demo(tmp_path / "source", model_type="llama"), tmp_path / "out", "'llama'", "DiffusionGemma")


def test_no_weights_and_pickle_is_never_read(tmp_path):
    source = copy_demo(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path / "out", "no model.safetensors", "pickle")


@pytest.mark.parametrize("kept", [0, 5, 100, 1_000_000])
def test_truncated(kept, tmp_path):
    source = copy_demo(tmp_path / "source")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(source, tmp_path / "out", "model.safetensors", "download it again")


def test_header_larger_than_the_file(tmp_path):
    source = copy_demo(tmp_path / "source")
    with (source / "model.safetensors").open("r+b") as file:
        file.write((1 << 62).to_bytes(8, "little"))
    refused(source, tmp_path / "out", "model.safetensors", "announces a header of")


def test_garbage_header(tmp_path):
    source = copy_demo(tmp_path / "source")
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"\xff\xfe")
    refused(source, tmp_path / "out", "no readable safetensors header")


def test_overlapping_tensors(tmp_path):
    source = copy_demo(tmp_path / "source")
    path = source / "model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header["model.decoder.layers.1.layer_scalar"]["data_offsets"] = header["model.decoder.layers.0.layer_scalar"][
        "data_offsets"
    ]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    refused(source, tmp_path / "out", "overlap")


def test_shard_absent(tmp_path):
    source = split(copy_demo(tmp_path / "source"))
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, tmp_path / "out", "lacks model-00002-of-00003.safetensors")


def test_shards_swapped(tmp_path):
    source = split(copy_demo(tmp_path / "source"))
    one, two = (source / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    one.rename(source / "other")
    two.rename(one)
    (source / "other").rename(two)
    refused(source, tmp_path / "out", "model-00001-of-00003.safetensors does not hold", "swapped")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_index_points_outside(file, tmp_path):
    source = split(copy_demo(tmp_path / "source"))
    edit_json(source / "model.safetensors.index.json", lambda index: index["weight_map"].update({NORM: file}))
    refused(source, tmp_path / "out", "outside its own directory", repr(file))


def test_tensors_missing(tmp_path):
    refused(copy_demo(tmp_path / "one", lambda t: {n: v for n, v in t.items() if n != NORM}), tmp_path / "out", NORM)
    many = copy_demo(tmp_path / "many", lambda t: {n: v for n, v in t.items() if "router" not in n})
    refused(many, tmp_path / "out", "lacks model.decoder.layers.0.router", "and 15 more tensors")


def test_tensor_extra(tmp_path):
    source = copy_demo(tmp_path / "source", lambda t: t | {"model.decoder.extra.weight": t[NORM]})
    refused(source, tmp_path / "out", "model.decoder.extra.weight", "no place")


def test_wrong_shape(tmp_path):
    def cut(tensors):
        dtype, shape, data = tensors[ROUTER]
        tensors[ROUTER] = (dtype, (shape[0], shape[1] // 2), data[: len(data) // 2])

    refused(copy_demo(tmp_path / "source", cut), tmp_path / "out", ROUTER, "[8, 64] instead of [8, 128]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [ROUTER, "model.decoder.layers.3.experts.down_proj", NORM])
def test_not_finite(name, value, tmp_path):
    def spoil(tensors):
        dtype, shape, data = tensors[name]
        values = np.frombuffer(data, np.uint16).copy()
        values[-3] = np.float32(value).view(np.uint32) >> 16
        tensors[name] = (dtype, shape, values.tobytes())

    source = copy_demo(tmp_path / "source", spoil)
    refused(source, tmp_path / "out", name, "NaN")
    convert_checkpoint(source, tmp_path / "allowed", allow_nan=True)


def test_beyond_float16(tmp_path):
    def grow(tensors):
        dtype, shape, _ = tensors[NORM]
        tensors[NORM] = (dtype, shape, np.full(shape, np.float32(1e6).view(np.uint32) >> 16, np.uint16).tobytes())

    refused(copy_demo(tmp_path / "source", grow), tmp_path / "out", NORM, "float16", dtype="float16")


def test_integers_as_weights(tmp_path):
    source = copy_demo(tmp_path / "source", lambda t: t | {NORM: ("I16", *t[NORM][1:])})
    refused(source, tmp_path / "out", NORM, "I16")


def test_out_exists(tmp_path):
    (tmp_path / "out").mkdir()
    refused(DEMO, tmp_path / "out", "exists already")


def test_out_has_no_parent(tmp_path):
    refused(DEMO, tmp_path / "deep" / "out", "There is no directory", "deep")


def test_disk_too_small(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(conversion, "write_shard", None)  # nothing may be written first
    refused(DEMO, tmp_path / "out", "0.0 GB free")


def test_disk_full_while_writing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversion, "write_shard", full)
    refused(DEMO, tmp_path / "out", "No space left on device")


def test_bits_and_group_sizes_that_mlx_lacks(tmp_path):
    refused(DEMO, tmp_path / "out", "no bits 7", bits=7)
    refused(DEMO, tmp_path / "out", "no group size 48", group_size=48)
    refused(DEMO, tmp_path / "out", "'int8'", dtype="int8")


def test_no_tokenizer(tmp_path):
    source = copy_demo(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    refused(source, tmp_path / "out", "tokenizer.json", "tokenizer.model")


def test_flipped_bytes_where_a_hash_is_known(tmp_path):
    source = convert_checkpoint(DEMO, tmp_path / "source").out
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))
    refused(source, tmp_path / "out", "model.safetensors is damaged", "SHA-256")


def test_hub_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing-here", tmp_path / "out", "nobody/nothing-here", "network")
    with pytest.raises(CheckpointError, match="network"):
        plan_conversion("nobody/nothing-here")


def test_file_that_shrinks_after_its_header_was_read(tmp_path):
    source = split(copy_demo(tmp_path / "source"))
    last = source / "model-00003-of-00003.safetensors"

    def cut(done, total, name):
        if last.stat().st_size > 1000:
            last.write_bytes(last.read_bytes()[:-500])

    with pytest.raises(CheckpointError, match="truncated"):
        convert_checkpoint(source, tmp_path / "out", progress=cut)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_interrupted_before_the_first_shard_leaves_nothing(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(DEMO, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_later_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_diffusiongemma.convert.plan.SHARD_BYTES", 400_000)
    whole = convert_checkpoint(DEMO, tmp_path / "whole")

    def interrupt(done, total, _):
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(DEMO, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    damaged = sorted((tmp_path / "out.partial").glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")  # caught by its hash and written again
    resumed = convert_checkpoint(DEMO, tmp_path / "out")
    assert 0 < resumed.resumed < len(whole.files) - 1
    assert resumed.files == whole.files
    assert all_tensors(resumed.out) == all_tensors(whole.out)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_is_not_a_stopped_conversion_is_never_deleted(kind, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    partial = tmp_path / "out.partial"
    if kind == "directory":
        shutil.copytree(tmp_path / "mine", partial)
    elif kind == "file":
        partial.write_text("Dear")
    else:
        partial.symlink_to(tmp_path / "mine")
    refused(DEMO, tmp_path / "out", "out.partial is in the way")


def test_other_options_do_not_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_diffusiongemma.convert.plan.SHARD_BYTES", 400_000)

    def interrupt(done, total, _):
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(DEMO, tmp_path / "out", progress=interrupt)
    assert convert_checkpoint(DEMO, tmp_path / "out", bits=3).resumed == 0


def test_two_conversions_to_one_place(tmp_path):
    def again(done, total, _):
        if done == total:
            with pytest.raises(CheckpointError, match="Another conversion is writing"):
                convert_checkpoint(DEMO, tmp_path / "out")

    assert convert_checkpoint(DEMO, tmp_path / "out", progress=again).out.is_dir()
