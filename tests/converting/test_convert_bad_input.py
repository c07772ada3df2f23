"""What conversion refuses: each with one sentence that says what is wrong, and with nothing left behind."""

import errno
import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
from convert_data import DEMO, all_tensors, copy_demo, edit_json, split

from mlx_diffusiongemma.convert import check_conversion, conversion, convert_checkpoint, plan_conversion
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


def stop(out, monkeypatch, error=KeyboardInterrupt, **options):
    """Begin a conversion of small shards to `out` and stop it after some of them with `error`."""
    monkeypatch.setattr("mlx_diffusiongemma.convert.plan.SHARD_BYTES", 400_000)

    def interrupt(done, total, _):
        if done > total * 0.6:
            raise error

    with pytest.raises((KeyboardInterrupt, CheckpointError)) as caught:
        convert_checkpoint(DEMO, out, progress=interrupt, **options)
    return str(caught.value)


def test_other_options_leave_what_is_finished_alone(tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop(out, monkeypatch)
    refused(DEMO, out, "out.partial holds 0.", "from another source or with other options", "4-bit experts", bits=3)
    with pytest.raises(CheckpointError, match="--restart"):  # and a dry run says so
        check_conversion(DEMO, out, bits=3)
    check_conversion(DEMO, out)
    check_conversion(DEMO, out, bits=3, restart=True)
    assert convert_checkpoint(DEMO, tmp_path / "beside", bits=3).resumed == 0
    assert convert_checkpoint(DEMO, out).resumed > 0
    shutil.rmtree(out)
    stop(out, monkeypatch)
    assert convert_checkpoint(DEMO, out, bits=3, restart=True).resumed == 0
    assert [path.name for path in tmp_path.glob("*.partial")] == []


@pytest.mark.parametrize("change", ["version", "record"])
def test_another_version_and_an_unreadable_record_leave_it_alone_too(tmp_path, monkeypatch, change):
    stop(tmp_path / "out", monkeypatch)
    if change == "version":
        monkeypatch.setattr(conversion, "__version__", "9")
        refused(DEMO, tmp_path / "out", "by another version or from other files", "--restart")
    else:
        (tmp_path / "out.partial" / "finished-shards.json").write_text("{")
        refused(DEMO, tmp_path / "out", "whose record cannot be read", "--restart")
    assert convert_checkpoint(DEMO, tmp_path / "out", restart=True).resumed == 0


def test_restart_deletes_what_the_same_conversion_finished(tmp_path, monkeypatch):
    stop(tmp_path / "out", monkeypatch)
    assert convert_checkpoint(DEMO, tmp_path / "out", restart=True).resumed == 0


def test_restart_deletes_nothing_but_a_stopped_conversion(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").write_text("Dear")
    refused(DEMO, tmp_path / "out", "out.partial is in the way", restart=True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), CheckpointError("Something.")])
def test_an_error_leaves_what_is_finished(tmp_path, monkeypatch, error):
    said = stop(tmp_path / "out", monkeypatch, error)
    if isinstance(error, OSError):
        assert "No space left on device" in said and "goes on from" in said
    told = []
    assert convert_checkpoint(DEMO, tmp_path / "out", tell=told.append).resumed > 0
    (sentence,) = told
    assert sentence.startswith(f"Going on with {tmp_path}/out.partial: ") and "files are done (0." in sentence


def test_too_little_disk_leaves_what_is_finished(tmp_path, monkeypatch):
    stop(tmp_path / "out", monkeypatch)
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        refused(DEMO, tmp_path / "out", "0.0 GB free")
    assert convert_checkpoint(DEMO, tmp_path / "out").resumed > 0


def test_a_damaged_shard_is_told(tmp_path, monkeypatch):
    stop(tmp_path / "out", monkeypatch)
    damaged = sorted((tmp_path / "out.partial").glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    told = []
    convert_checkpoint(DEMO, tmp_path / "out", tell=told.append)
    assert "; 1 damaged ones are written again" in told[0]


def test_what_is_about_repositories_is_not_ignored_for_a_directory(tmp_path):
    for options in ({"revision": "main"}, {"stream": True}):
        refused(DEMO, tmp_path / "out", "is a directory, which has no revision", **options)
    with pytest.raises(CheckpointError, match="no revision"):
        plan_conversion(DEMO, revision="main")


def test_a_plan_needs_a_tokenizer(tmp_path):
    source = copy_demo(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        plan_conversion(source)


def test_two_conversions_to_one_place(tmp_path):
    def again(done, total, _):
        if done == total:
            with pytest.raises(CheckpointError, match="Another conversion is writing"):
                convert_checkpoint(DEMO, tmp_path / "out")

    assert convert_checkpoint(DEMO, tmp_path / "out", progress=again).out.is_dir()
