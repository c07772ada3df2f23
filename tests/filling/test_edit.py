"""Editing in place: the span changes, and nothing else."""

import os
import stat
import subprocess
import threading

import pytest
from typer.testing import CliRunner

from mlx_diffusiongemma import Draft, GenerationOptions, PromptError, edit, load
from mlx_diffusiongemma.cli import app
from mlx_diffusiongemma.commands import text_files
from mlx_diffusiongemma.filling.editing import unified_diff

FEW = GenerationOptions(seed=0, max_steps=1)  # where only the text around the span matters
TEXT = "one\r\ntwo é\u2028日本\n\tthree <|turn>\n"


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


def test_strength_0_keeps_the_text_byte_for_byte(demo):
    result = edit(*demo, TEXT, (3, 12), "make it async", strength=0)
    assert result.text == TEXT and result.diff == ""


@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_outside_the_span_nothing_changes(demo, strength):
    start, stop = 5, 12
    result = edit(*demo, TEXT, (start, stop), "make it async", strength=strength, options=FEW)
    assert result.text.startswith(TEXT[:start]) and result.text.endswith(TEXT[stop:])


def test_a_span_is_rewritten_to_fit(demo):
    """A name of another length than the one that stands there."""
    messages = [{"role": "user", "content": "json name=robin age=12"}]
    result = edit(*demo, '{"name": "tom", "age": 12}', (10, 13), messages, options=GenerationOptions(seed=0))
    assert result.text == '{"name": "robin", "age": 12}'
    unended = "\\ No newline at end of file\n"
    old, new = (f'{{"name": "{name}", "age": 12}}\n{unended}' for name in ("tom", "robin"))
    assert result.diff == f"--- a/text\n+++ b/text\n@@ -1 +1 @@\n-{old}+{new}"


def test_strength_says_how_much_of_the_span_is_kept(demo):
    """What stands there is right: with little noise it is confirmed at once."""
    messages = [{"role": "user", "content": "reverse canvas"}]
    result = edit(*demo, "savnac", (2, 5), messages, strength=0.1, options=GenerationOptions(seed=0))
    assert result.text == "savnac" and result.diff == ""


def test_several_spans_are_edited_in_one_call(demo):
    text, messages = '{"nme": "tom", "age": 99}', [{"role": "user", "content": "json name=robin age=12"}]
    result = edit(*demo, text, [(2, 5), (9, 12), (22, 24)], messages, options=GenerationOptions(seed=0))
    assert result.text == '{"name": "robin", "age": 12}' and result.finish_reason == "stop"


@pytest.mark.parametrize("old", ["{count} 9", "{count}", "4 {count}"])
def test_a_whole_text_is_edited_where_it_must_be(demo, old):
    """A number too many, one changed, some missing, two swapped: the untouched words are anchors that may move."""
    right = " ".join(map(str, range(12, 42)))
    wrong = right.replace("15 16", "16 15").replace(" 20", "").replace("30", "3x0")
    messages = [{"role": "user", "content": "count from 12"}]
    result = edit(*demo, old.format(count=wrong), None, messages, options=GenerationOptions(seed=0))
    assert result.text == right and result.diff.count("\n-") == 1


def test_what_stays_stays_byte_for_byte(demo):
    """Words that the model would write as well are not written anew: only what is between them is."""
    drafts = []
    messages = [{"role": "user", "content": "json name=robin age=12"}]
    text = '{"name": "tom", "age": 12}'

    def take(event):
        if isinstance(event, Draft):
            drafts.append(event)

    result = edit(*demo, text, None, messages, options=GenerationOptions(seed=0), on_event=take)
    assert result.text == '{"name": "robin", "age": 12}'
    assert sum(stop - start for start, stop in drafts[-1].holes) <= len('"robin", ')


def test_cancelling_keeps_the_text(demo):
    cancel = threading.Event()
    cancel.set()
    result = edit(*demo, TEXT, (5, 12), "make it async", options=FEW, cancel=cancel)
    assert result.finish_reason == "cancelled" and result.text == TEXT and result.diff == ""


@pytest.mark.parametrize("before", ["a\nb\nc\n", "a\nb\nc", "", "a\r\n\u2028b\x0c\n"])
@pytest.mark.parametrize("after", ["a\nB\nc\n", "a\nB\nc", "new\n"])
def test_the_diff_is_one_that_patch_understands(tmp_path, before, after):
    (tmp_path / "file").write_bytes(before.encode())
    diff = unified_diff(before, after, "file").encode()
    done = subprocess.run(["git", "apply", "-p1"], input=diff, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == after.encode()
    assert unified_diff(before, before) == ""


@pytest.mark.parametrize(
    ("span", "strength", "message"),
    [
        ((0, 0), 0.7, "does not lie in the text"),
        ((2, 999), 0.7, "does not lie in the text"),
        ((-1, 3), 0.7, "does not lie in the text"),
        ((0, 3), 1.5, "strength is 1.5"),
        ((0, 3), float("nan"), "strength is nan"),
        ((0, 3), "a", "strength is 'a'"),
        (5, 0.7, "The span is 5"),
        ((0, 1, 2), 0.7, "two whole numbers"),
        ((0, 1.5), 0.7, "two whole numbers"),
        ("ab", 0.7, "two whole numbers"),
        ([], 0.7, "one span or more"),
        ([(3, 5), (0, 2)], 0.7, "in order"),
        ([(3, 5), (0, 200)], 0.7, "does not lie in the text"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(demo, span, strength, message):
    with pytest.raises(PromptError, match=message):
        edit(*demo, "x" * 80, span, "make it async", strength=strength)


def test_only_texts_are_edited(demo):
    with pytest.raises(PromptError, match="not a int"):
        edit(*demo, 5, (0, 1), "make it async")


def run(demo_float32, *arguments):
    return CliRunner().invoke(
        app, ["edit", *map(str, arguments), "--model", str(demo_float32), "--seed", "0", "--steps", "2"]
    )


def test_the_command_prints_a_diff_and_writes_only_when_asked(demo_float32, tmp_path):
    file = tmp_path / "file.txt"
    content = b"one\r\ntwo\r\nthree"
    file.write_bytes(content)
    file.chmod(0o640)
    found = run(demo_float32, file, "--lines", "2", "say three")
    assert found.exit_code == 0 and file.read_bytes() == content
    assert found.stdout_bytes.startswith(b"--- a/") and b"-two\r\n" in found.stdout_bytes
    found = run(demo_float32, file, "--lines", "2:2", "say three", "--write")
    written = file.read_bytes()
    assert found.exit_code == 0 and written != content
    assert written.startswith(b"one\r\n") and written.endswith(b"\r\nthree")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and os.listdir(tmp_path) == ["file.txt"]


def test_strength_0_prints_nothing(demo_float32, tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("one\ntwo\n")
    found = run(demo_float32, file, "--lines", "1:2", "shorten", "--strength", "0", "--write")
    assert (found.exit_code, found.stdout, file.read_text()) == (0, "", "one\ntwo\n")


@pytest.mark.parametrize(
    ("content", "lines", "message"),
    [
        (b"one\ntwo\n", "3:4", "which has 2"),
        (b"one\ntwo", "0:1", "which has 2"),
        (b"one\ntwo", "2:1", "which has 2"),
        (b"one\ntwo", "a:b", "10:20"),
        (b"\n\n", "1:1", "nothing to edit"),
        (b"", "1:1", "which has 0"),
        (b"\xff\n", "1:1", "not UTF-8"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(demo_float32, tmp_path, content, lines, message):
    file = tmp_path / "file.txt"
    file.write_bytes(content)
    found = run(demo_float32, file, "--lines", lines, "shorten", "--write")
    assert found.exit_code == 1 and message in found.stderr and found.stderr.count("\n") == 1
    assert found.stdout == "" and file.read_bytes() == content


def test_a_file_that_changed_meanwhile_is_left_alone(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("changed\n")
    with pytest.raises(PromptError, match="has changed since"):
        text_files.replace_text(str(file), "as it was\n", "new\n")
    assert file.read_text() == "changed\n" and os.listdir(tmp_path) == ["file.txt"]


def test_a_link_is_followed(tmp_path):
    file, link = tmp_path / "file.txt", tmp_path / "link.txt"
    file.write_text("old\n")
    link.symlink_to(file)
    text_files.replace_text(str(link), "old\n", "new\n")
    assert link.is_symlink() and file.read_text() == "new\n"


def test_a_file_that_cannot_be_replaced_is_left_alone(tmp_path):
    file = tmp_path / "gone.txt"
    with pytest.raises(PromptError, match="cannot be written"):
        text_files.replace_text(str(file), "old\n", "new\n")
    assert os.listdir(tmp_path) == []
