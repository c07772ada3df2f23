"""Events as JSON lines, there and back, and what a replay shows."""

import json
import time

import pytest

from mlx_diffusiongemma.display import trace
from mlx_diffusiongemma.display.trace import TraceWriter, event_json, read_trace, replay
from mlx_diffusiongemma.errors import PromptError
from mlx_diffusiongemma.events import Commit, Done, Draft, Filled, Prefill, Stats, ToolCall

STATS = Stats(17, 0, 4, [2], 0, 0.1, 0.5, 15_000_000_000)
EVENTS = [
    Prefill(17, 17),
    Draft(0, 1, 48, [1, 2], [True, False], [0.0, 1.23456], "a\u2028"),
    Draft(0, 2, 48, [1, 3], [True, True], [0.0, 0.001], "a\n", [("thinking", "hm"), ("text", "a\n")], ["hma", "\n"]),
    Commit(0, [1, 3], [("thinking", "hm"), ("text", "a\n")], 2),
    Commit(1, [4], [("tool_call", "call:f{x:1}")], 2, [ToolCall("f", {"x": 1}, "call_2")]),
    Done("stop", STATS),
]


def written(path, events=EVENTS):
    with TraceWriter(path) as writer:
        assert list(writer.watch(events)) == events
    return path


def test_a_trace_reads_back_as_it_was(tmp_path):
    read = read_trace(written(tmp_path / "trace"))
    rounded = Draft(0, 1, 48, [1, 2], [True, False], [0.0, 1.2346], "a\u2028")
    assert [traced.event for traced in read] == [EVENTS[0], rounded, *EVENTS[2:]]
    assert [traced.seconds for traced in read] == sorted(traced.seconds for traced in read)
    assert read[0].seconds == 0


def test_a_trace_keeps_what_was_asked_with_its_first_event(tmp_path):
    with TraceWriter(tmp_path / "trace", title="Why?") as writer:
        list(writer.watch(EVENTS))
    assert [traced.title for traced in read_trace(tmp_path / "trace")] == ["Why?", *[""] * (len(EVENTS) - 1)]


def test_holes_filled_are_an_event_of_a_trace(tmp_path):
    path = written(tmp_path / "trace", [Filled(3, 40)])
    assert json.loads(path.read_text())["type"] == "filled"
    assert read_trace(path)[0].event == Filled(3, 40)


def test_what_json_prints_reads_as_a_trace(tmp_path):
    path = tmp_path / "events"
    path.write_text("".join(event_json(event) + "\n" for event in EVENTS), encoding="utf-8")
    assert [traced.event for traced in read_trace(path)][2:] == EVENTS[2:]


def test_event_json():
    lines = [event_json(event) for event in EVENTS]
    assert not any("\n" in line for line in lines)
    prefill, draft, _, commit, calling, done = map(json.loads, lines)
    assert prefill == {"type": "prefill", "done": 17, "total": 17}
    assert (draft["type"], draft["step"], draft["accepted"]) == ("draft", 1, [True, False])
    assert (commit["type"], commit["text"], commit["parts"][0]) == ("commit", "a\n", ["thinking", "hm"])
    assert calling["tool_calls"] == [{"name": "f", "arguments": {"x": 1}, "id": "call_2"}]
    assert (done["type"], done["finish_reason"]) == ("done", "stop")
    assert done["stats"]["tokens_per_second"] == 8
    assert done["stats"]["prompt_tokens_per_second"] == 170
    assert done["stats"]["steps"] == [2]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe binary",
        b"not json",
        b"[1, 2]",
        b'{"type": "draft"}',
        b'{"type": "letter"}',
        b'{"type": "prefill", "done": 1, "total": 2}\n\n',
        b'{"type": "draft", "canvas": 0, "step": 1, "max_steps": 9, "tokens": [1], "accepted": [], "entropy": [0], '
        b'"text": ""}',
        b'{"type": "done", "finish_reason": "stop", "stats": {}}',
        b'{"type": "commit", "canvas": 0, "tokens": [], "parts": ["text"], "steps": 1}',
    ],
)
def test_a_file_that_is_no_trace_is_named(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=r"file.*give a file that"):
        read_trace(path)


def test_paths_that_cannot_be_used(tmp_path):
    with pytest.raises(PromptError, match="cannot be read"):
        read_trace(tmp_path / "missing")
    with pytest.raises(PromptError, match="cannot be written"):
        TraceWriter(tmp_path / "missing" / "trace")


def test_an_interrupted_trace_can_be_replayed(tmp_path, capsys):
    path = written(tmp_path / "trace", EVENTS[:4])
    assert replay(path).finish_reason == "cancelled"
    assert capsys.readouterr().out == "a\n"


def test_replay_keeps_the_time_but_for_long_waits(tmp_path, capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(trace, "time", type("Clock", (), {"monotonic": lambda: clock[0]}))
    with TraceWriter(tmp_path / "trace") as writer:
        for event, seconds in zip(EVENTS, (0, 5, 5.5, 5.5, 5.5, 5.75), strict=True):
            clock[0] = 100 + seconds
            writer.write(event)
    waits = []
    monkeypatch.setattr(trace.time, "sleep", waits.append, raising=False)
    done = replay(tmp_path / "trace", speed=2)
    assert waits == [0, 0.5, 0.75, 0.75, 0.75, 0.875]  # the clock stands still
    assert done == EVENTS[-1]
    assert capsys.readouterr().out == "a\n"


@pytest.mark.parametrize("speed", [0, -1, float("nan")])
def test_replay_needs_a_speed(tmp_path, speed):
    with pytest.raises(PromptError, match="speed"):
        replay(written(tmp_path / "trace"), speed=speed)


def test_a_replay_is_not_slowed_by_drawing(tmp_path, capsys):
    started = time.monotonic()
    replay(written(tmp_path / "trace", EVENTS * 100))
    assert time.monotonic() - started < 5


def test_a_trace_can_go_nowhere():
    with TraceWriter("/dev/null") as writer:
        writer.write(Prefill(1, 1))
