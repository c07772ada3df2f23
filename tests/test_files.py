"""Files that the package writes: whole or not at all, whatever fails, and never in the place of something else."""

import errno
import io
import json
import os
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_diffusiongemma import ChatSession, PromptError, files, load
from mlx_diffusiongemma.checkpoints.session_file import KIND, SESSION
from mlx_diffusiongemma.commands import text_files
from mlx_diffusiongemma.convert.writing.partial import write_json
from mlx_diffusiongemma.display.picture_files import GIF, SVG, write_svg
from mlx_diffusiongemma.display.pictures import animated_gif
from mlx_diffusiongemma.display.trace import TRACE, TraceWriter, read_trace
from mlx_diffusiongemma.events import Commit, Draft, Prefill
from mlx_diffusiongemma.files import Kind, check_place, write_file, write_whole

ANY = Kind("a file", lambda path: True)
SVG_TEXT = "<svg></svg>\n"
EVENTS = [Prefill(1, 1), Draft(0, 1, 9, [1], [True], [0.5], "a", [], ["a"]), Commit(0, [1], [("text", "a")], 1)]
THESIS = "My thesis\n"
COMMAND = str(Path(sys.executable).with_name("mlx-dg"))


def traced(path, force=False):
    with TraceWriter(path, force=force) as writer:
        for event in EVENTS:
            writer.write(event)


def drawn(path, force=False):
    animated_gif(read_trace(path.with_name("source.jsonl")), path, force=force)


def session(path, force=False):
    with write_file(path, SESSION, force=force) as file:
        mx.save_safetensors(file, {"keys": mx.arange(1000)}, {"kind": KIND})


WRITERS = {
    "trace": (TRACE, traced),
    "svg": (SVG, lambda path, force=False: write_svg(SVG_TEXT, path, force=force)),
    "gif": (GIF, drawn),
    "session": (SESSION, session),
}


@pytest.fixture(autouse=True)
def source(tmp_path):
    traced(tmp_path / "source.jsonl")


def names(directory):
    return sorted(path.name for path in directory.iterdir() if path.name != "source.jsonl")


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_another_kind_stays_but_by_force(tmp_path, name):
    kind, write = WRITERS[name]
    path = tmp_path / "thesis.txt"
    path.write_text(THESIS)
    with pytest.raises(PromptError, match=f"thesis.txt is there already and is not {kind.name}; .*--force"):
        write(path)
    assert path.read_text() == THESIS and names(tmp_path) == ["thesis.txt"]
    write(path, force=True)
    assert kind.is_one(path) and names(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_the_same_kind_and_an_empty_one_are_replaced(tmp_path, name):
    kind, write = WRITERS[name]
    path = tmp_path / "file"
    path.touch()
    write(path)
    assert kind.is_one(path)
    write(path)
    assert kind.is_one(path) and names(tmp_path) == ["file"]
    for other in WRITERS.keys() - {name}:
        assert not WRITERS[other][0].is_one(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"{}", b"[]\n", b"\2\0\0\0\0\0\0\0[]", b"<html><svg></html>"])
def test_what_is_no_file_of_ours_is_none_of_any_kind(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert not any(kind.is_one(path) for kind, _ in WRITERS.values())


@pytest.mark.parametrize("begin", ["", "\ufeff", '<?xml version="1.0"?>\n<!-- <html> -->\n<!DOCTYPE svg>\n'])
def test_an_svg_of_any_program_is_one(tmp_path, begin):
    (tmp_path / "file").write_text(f"{begin}<svg xmlns='…'>")
    assert SVG.is_one(tmp_path / "file")


@pytest.mark.parametrize("name", WRITERS)
def test_the_mode_and_a_symlink_stay(tmp_path, name):
    kind, write = WRITERS[name]
    (tmp_path / "kept").mkdir()
    path, link = tmp_path / "kept" / "file", tmp_path / "link"
    link.symlink_to(Path("kept") / "file")
    write(link)  # which leads nowhere yet
    path.chmod(0o600)
    write(link)
    assert link.is_symlink() and kind.is_one(path) and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(tmp_path) == ["kept", "link"] and names(tmp_path / "kept") == ["file"]


def test_a_new_file_has_the_mode_that_the_process_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_is_read_only_stays(tmp_path, name, force):
    _, write = WRITERS[name]
    path = tmp_path / "file"
    write(path)
    before = path.read_bytes()
    path.chmod(0o444)
    with pytest.raises(PromptError, match="read-only"):
        write(path, force=force)
    assert path.read_bytes() == before and names(tmp_path) == ["file"]
    with pytest.raises(PermissionError):
        write_whole(path, "x")


def test_what_is_read_is_never_replaced(tmp_path):
    (tmp_path / "link").symlink_to("source.jsonl")
    for path in (tmp_path / "source.jsonl", tmp_path / "link"):
        with pytest.raises(PromptError, match="is the file that is being read"):
            check_place(path, ANY, force=True, inputs=[tmp_path / "source.jsonl"])


@pytest.mark.parametrize("path", ["missing/x", "source.jsonl/x", "", ".", "x" * 300, "a\0b", "loop", "~nobody-here/x"])
def test_a_place_where_no_file_can_be_is_one_sentence(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for kind, _ in WRITERS.values():
        with pytest.raises(PromptError) as caught, write_file(path, kind):
            pytest.fail("began")
        assert "\n" not in str(caught.value) and "[Errno" not in str(caught.value)
    assert names(tmp_path) == ["loop"]


class Failing(io.BufferedRandom):
    """A file that fails in the middle of what is written."""

    def __init__(self, path, mode):
        super().__init__(io.FileIO(path, mode.replace("b", "")))

    def write(self, data):
        super().write(bytes(data)[: len(data) // 2])
        raise self.error

    error: BaseException = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Interrupted(Failing):
    error = KeyboardInterrupt()


def all_writers(path):
    """Every way to write over the file at `path`, which is of the right kind for each."""
    for name, (_, write) in WRITERS.items():
        yield name, lambda write=write: write(path)
    yield "text", lambda: write_whole(path, "text" * 1000)
    yield "json", lambda: write_json(path, {"a": 1})
    yield "edited", lambda: text_files.replace_text(str(path), path.read_text(errors="replace"), "new\n")


WAYS = [name for name, _ in all_writers(None)]


def fails(way, path, *errors):
    """Begin with a file of its kind where there is one, and see that the failure of `way` changes nothing."""
    write = dict(all_writers(path))[way]
    if way in WRITERS:
        write()
    else:
        path.write_text("before\n")
    before = path.read_bytes()

    def check():
        with pytest.raises(errors):
            write()
        assert path.read_bytes() == before and names(path.parent) == [path.name]

    return check


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Failing, Interrupted])
def test_what_fails_in_the_middle_changes_nothing(tmp_path, monkeypatch, way, kind):
    check = fails(way, tmp_path / "file", PromptError, OSError, KeyboardInterrupt)
    monkeypatch.setattr(Path, "open", opening(kind))
    if (way, kind) == ("trace", Interrupted):
        # No event is whole, so that there is nothing to keep.
        traced_before = (tmp_path / "file").read_bytes()
        with suppress(KeyboardInterrupt):
            traced(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == traced_before and names(tmp_path) == ["file"]
    else:
        check()


def opening(kind):
    honest = Path.open
    return lambda self, mode="r", *rest, **named: (
        kind(str(self), mode) if mode == "x+b" else honest(self, mode, *rest, **named)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_last_step_that_fails_changes_nothing(tmp_path, monkeypatch, way, step, error):
    def fail(*_):
        raise error

    check = fails(way, tmp_path / "file", PromptError, OSError, KeyboardInterrupt)
    monkeypatch.setattr(*((Path, "replace") if step == "replace" else (files.os, "fsync")), fail)
    check()


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_changes_nothing(tmp_path, way):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("a small disk can be mounted by the superuser of Linux alone")
    try:
        shutil.copy(tmp_path / "source.jsonl", disk)
        check = fails(way, disk / "file", PromptError, OSError)
        with suppress(OSError), (tmp_path / "disk" / "source.jsonl").open("ab") as filler:
            while True:
                filler.write(b"\n" * 512)
                filler.flush()
        shutil.copy(tmp_path / "source.jsonl", tmp_path / "kept")
        if way == "gif":  # whose source now ends in empty lines
            trace = read_trace(tmp_path / "kept")
            with pytest.raises(PromptError, match="No space left"):
                animated_gif(trace, disk / "file")
            assert names(disk) == ["file"]
        else:
            check()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_something_else_that_comes_meanwhile_stays(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(PromptError, match="there already"), write_file(path, SVG) as file:
        file.write(SVG_TEXT.encode())
        path.write_text(THESIS)
    assert path.read_text() == THESIS and names(tmp_path) == ["file"]


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE) as reader:
        traced(tmp_path / "pipe")
        lines = reader.stdout.read().splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["prefill", "draft", "commit"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and names(tmp_path) == ["pipe"]


def test_a_trace_that_is_cut_can_be_replayed(tmp_path):
    path = tmp_path / "trace"
    with pytest.raises(KeyboardInterrupt), TraceWriter(path) as writer:
        for event in EVENTS[:2]:
            writer.write(event)
        assert not path.exists()
        writer._whole.file.write(b'{"type":"com')  # cut in the middle of a line
        raise KeyboardInterrupt
    assert [traced.event for traced in read_trace(path)] == EVENTS[:2] and names(tmp_path) == ["trace"]


def test_a_trace_without_events_leaves_what_was_there(tmp_path):
    traced(tmp_path / "old")
    before = (tmp_path / "old").read_bytes()
    for name in ("old", "new"):
        with pytest.raises(RuntimeError), TraceWriter(tmp_path / name):
            raise RuntimeError("the prompt is too long")
    assert (tmp_path / "old").read_bytes() == before and names(tmp_path) == ["old"]


def test_a_chat_is_not_saved_over_a_thesis(demo_float32, tmp_path):
    chat = ChatSession(*load(demo_float32))
    (tmp_path / "thesis.txt").write_text(THESIS)
    with pytest.raises(PromptError, match="is not a saved session"):
        chat.save(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == THESIS
    chat.save(tmp_path / "thesis.txt", force=True)
    chat.save(tmp_path / "thesis.txt")
    chat.restore(tmp_path / "thesis.txt")


def mlx_dg(*arguments, text_in="", cwd=None):
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, input=text_in, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_the_command_refuses_and_can_be_forced(demo_float32, tmp_path):
    thesis, trace = tmp_path / "thesis.txt", tmp_path / "source.jsonl"
    thesis.write_text(THESIS)
    before = trace.read_bytes()
    for arguments in (
        ("replay", trace, "--gif", trace),
        ("replay", trace, "--gif", trace, "--force"),
        ("replay", trace, "--svg", tmp_path / "new.svg", "--gif", trace),  # and nothing is half done
        ("replay", trace, "--svg", thesis),
        ("generate", "sort 53142", "--trace", thesis, "--model", "/nowhere"),  # known before the model is loaded
    ):
        refused = mlx_dg(*arguments)
        assert (refused.returncode, refused.stdout) == (1, "") and refused.stderr.count("\n") == 1, refused.stderr
        assert thesis.read_text() == THESIS and trace.read_bytes() == before
        assert names(tmp_path) == ["thesis.txt"]
    assert mlx_dg("replay", trace, "--svg", thesis, "--entropy", thesis).returncode == 2
    assert mlx_dg("replay", trace, "--svg", thesis, "--force").returncode == 0 and SVG.is_one(thesis)
    assert mlx_dg("generate", "sort 53142", "--force").returncode == 2
    forced = mlx_dg("generate", "sort 53142", "--trace", thesis, "--force", "--model", demo_float32)
    assert forced.returncode == 0 and TRACE.is_one(thesis)
    said = mlx_dg("chat", "--model", demo_float32, text_in=f"/save {thesis}\n/save --force {thesis}\n")
    assert "is not a saved session" in said.stderr and "Saved." in said.stderr and SESSION.is_one(thesis)


def test_what_edit_cannot_replace_is_said_before_the_model_is_loaded(tmp_path):
    path = tmp_path / "e.txt"
    path.write_text("one\n")
    path.chmod(0o400)
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("e.txt", "read-only"), ("pipe", "no file"), (".", "directory")):
        done = mlx_dg("edit", name, "shorten", "--lines", "1", "--write", "--model", "/nowhere", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "") and words in done.stderr and done.stderr.count("\n") == 1
    assert path.read_text() == "one\n" and names(tmp_path) == ["e.txt", "pipe"]
