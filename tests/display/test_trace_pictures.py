"""Pictures of a trace: well-formed, complete, and safe whatever the model wrote."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from mlx_diffusiongemma.display import pictures
from mlx_diffusiongemma.display.pictures import animated_gif, animated_svg, entropy_svg
from mlx_diffusiongemma.display.trace import Traced
from mlx_diffusiongemma.errors import PromptError
from mlx_diffusiongemma.events import Commit, Done, Draft, Prefill, Stats

SVG = "{http://www.w3.org/2000/svg}"


def traced(text, steps=3, canvas=0, start=0.0):
    """Drafts in which ever more characters of `text` are accepted, and the commit."""
    for step in range(1, steps + 1):
        accepted = [position * steps < len(text) * step for position in range(len(text))]
        entropy = [0.0 if a else 3.0 / step for a in accepted]
        tokens = [ord(c) for c in text]
        event = Draft(canvas, step, 48, tokens, accepted, entropy, text, [("text", text)], list(text))
        yield Traced(event, start + 0.1 * step)
    yield Traced(Commit(canvas, [], [("text", text)], steps), start + 0.1 * steps)


TRACE = [
    Traced(Prefill(1, 1), 0.0),
    *traced("A first <b>canvas</b> & more, 天空 🙂 été, "),
    *traced("and\nits \x1b[2J end.\x00\ufffe", steps=4, canvas=1, start=9.0),
    Traced(Done("stop", Stats()), 9.6),
]


def test_the_svg_has_a_frame_per_draft_and_commit():
    root = ElementTree.fromstring(animated_svg(TRACE))
    frames = root.findall(f"{SVG}g/{SVG}g")
    assert len(frames) == 3 + 1 + 4 + 1
    lines = ["".join(text.itertext()) for text in frames[-1].findall(f"{SVG}text")]
    assert lines[0] == "A first <b>canvas</b> & more, 天空 🙂 été, and"
    assert lines[1] == "its ␛[2J end.␀�"
    assert lines[-1] == "canvas 2 · step 4/48 · entropy 0.000"
    styles = {span.get("class") for span in frames[0].iter(f"{SVG}tspan")}
    assert styles == {"accepted", "noise", "status"}
    assert root.find(f"{SVG}style").text.count("translateY") == 9 + 1


def test_every_run_of_an_svg_row_begins_in_its_own_cell():
    root = ElementTree.fromstring(animated_svg([*traced("天空x", steps=3)]))
    first = root.find(f"{SVG}g/{SVG}g/{SVG}text")
    assert [(span.text, float(span.get("x"))) for span in first] == [
        ("天", pictures.MARGIN),
        ("空x", round(pictures.MARGIN + 2 * pictures.CELL_WIDTH, 1)),
    ]


def test_a_long_reply_keeps_its_last_rows():
    root = ElementTree.fromstring(animated_svg([*traced("line\n" * 200, steps=1)]))
    assert len(root.findall(f"{SVG}g/{SVG}g")[0]) == pictures.MOST_ROWS  # one of them is empty, one is the status


@pytest.mark.parametrize("fonts", [pictures.FONTS, ()])
def test_the_gif_plays_as_the_svg(tmp_path, monkeypatch, fonts):
    monkeypatch.setattr(pictures, "FONTS", fonts)
    animated_gif(TRACE, tmp_path / "reply.gif")
    with Image.open(tmp_path / "reply.gif") as image:
        assert image.info["loop"] == 0
        durations = []
        for number in range(image.n_frames):
            image.seek(number)
            durations.append(image.info["duration"])
            assert len(image.convert("RGB").getcolors()) > 3
    # A long wait is cut to a second, and the last frame stays for three.
    assert durations == [100, 100, 20, 1000, 100, 100, 100, 20, 3000]


def test_bad_paths_and_fonts(tmp_path):
    with pytest.raises(PromptError, match="cannot be written"):
        animated_gif(TRACE, tmp_path / "missing" / "reply.gif")
    with pytest.raises(PromptError, match="not a font"):
        animated_gif(TRACE, tmp_path / "reply.gif", font=__file__)


@pytest.mark.parametrize("draw", [animated_svg, entropy_svg, lambda trace: animated_gif(trace, "unwritten.gif")])
def test_a_trace_without_drafts_has_no_picture(draw):
    with pytest.raises(PromptError, match="no drafts"):
        draw([Traced(Prefill(1, 1), 0.0)])


def test_the_map_covers_every_position_of_every_step():
    root = ElementTree.fromstring(entropy_svg(TRACE))
    panels = [group.findall(f"{SVG}path") for group in root.findall(f"{SVG}g")]
    cells = [sum(_length(path.get("d")) for path in panel) for panel in panels]
    first, second = len(TRACE[1].event.tokens), len(TRACE[-3].event.tokens)
    cell = pictures.MAP_WIDTH // first
    assert cells == [3 * first * cell, 4 * second * cell]
    headings = [text.text for text in root.iter(f"{SVG}text") if text.text.startswith("canvas")]
    assert [heading.split(":")[0] for heading in headings] == ["canvas 1", "canvas 2"]


def test_the_map_of_a_certain_reply():
    certain = Traced(Draft(0, 1, 48, [1] * 256, [True] * 256, [0.0] * 256, "x"), 0.0)
    root = ElementTree.fromstring(entropy_svg([certain]))
    (path,) = root.iter(f"{SVG}path")
    assert path.get("stroke") == pictures.SCALE[0]


def kinds(steps=2):
    """A thought and an answer, as one canvas of a trace that knows what was asked."""
    parts = [("thinking", "Hm, sky."), ("text", "Blue.")]
    text = "Hm, sky.Blue."
    for step in range(1, steps + 1):
        accepted = [step == steps or position % 2 == 0 for position in range(len(text))]
        entropy = [0.0 if a else 0.3 for a in accepted]
        event = Draft(0, step, 48, [ord(c) for c in text], accepted, entropy, text, parts, list(text))
        yield Traced(event, float(step), "Why is\nthe sky <blue>?" if step == 1 else "")
    yield Traced(Commit(0, [], parts, steps), float(steps))


def svg_lines(frame):
    return ["".join(text.itertext()) for text in frame.findall(f"{SVG}text")]


def test_a_thought_stands_apart_from_the_answer():
    frames = ElementTree.fromstring(animated_svg([*kinds()])).findall(f"{SVG}g/{SVG}g")
    assert [svg_lines(frame)[1:3] for frame in frames] == [["Hm, sky.", "Blue."]] * 3
    styles = [[span.get("class") for span in frame.iter(f"{SVG}tspan")] for frame in frames]
    assert set(styles[0]) == {"title", "thought thought-accepted", "thought noise", "accepted", "noise", "status"}
    assert styles[2] == ["title", "thought thought-committed", "committed", "status"]


def test_the_title_is_the_traces_own_unless_another_is_given():
    def first(**options):
        return svg_lines(ElementTree.fromstring(animated_svg([*kinds()], **options)).find(f"{SVG}g/{SVG}g"))[0]

    assert first() == "> Why is the sky <blue>?"
    assert first(title="Sky") == "> Sky"
    assert first(title="") == "Hm, sky."
    assert first(title="long " * 200).startswith("> long long")
    assert "> Sky" in "".join(ElementTree.fromstring(entropy_svg([*kinds()], title="Sky")).itertext())


def test_heat_colours_tokens_by_entropy(tmp_path):
    svg = animated_svg([*kinds()], heat=True)
    styles = {span.get("class") for span in ElementTree.fromstring(svg).iter(f"{SVG}tspan")}
    assert {"thought heat0", "heat0", "thought unsure2", "unsure2"} <= styles and "accepted" not in styles
    assert svg != animated_svg([*kinds()])
    animated_gif([*kinds()], tmp_path / "heat.gif", heat=True)
    animated_gif([*kinds()], tmp_path / "plain.gif")
    assert (tmp_path / "heat.gif").read_bytes() != (tmp_path / "plain.gif").read_bytes()


def test_pictures_play_at_the_speed_asked_for(tmp_path):
    animated_gif(TRACE, tmp_path / "fast.gif", speed=2)
    with Image.open(tmp_path / "fast.gif") as image:
        assert image.info["duration"] == 50
    with pytest.raises(PromptError, match="speed"):
        animated_svg(TRACE, speed=0)


def test_every_canvas_has_its_own_scale():
    hot = [Draft(0, 1, 48, [1, 2], [True] * 2, [8.0, 0.0], "ab", [("text", "ab")], ["a", "b"])]
    cool = [Draft(1, 1, 48, [1, 2], [True] * 2, [0.02, 0.0], "ab", [("text", "ab")], ["a", "b"])]
    root = ElementTree.fromstring(entropy_svg([Traced(event, 0.0) for event in hot + cool]))
    strokes = [{path.get("stroke") for path in panel.findall(f"{SVG}path")} for panel in root.findall(f"{SVG}g")]
    assert strokes == [{pictures.SCALE[0], pictures.SCALE[-1]}] * 2
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "8" in texts and "0.02" in texts


def test_labels_name_the_tokens_that_positions_ended_with():
    drafts = [
        Draft(0, step, 48, [1, 2, 3, 4], [True] * 4, [0.1] * 4, "x", [("text", "x")], pieces)
        for step, pieces in enumerate([["no"] * 4, ["a <b>", "\n", "", "a very long token"]], start=1)
    ]
    root = ElementTree.fromstring(entropy_svg([Traced(draft, 0.0) for draft in drafts], labels=True))
    names = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "token"]
    assert names == ["a·<b>", "⏎", "a·very·long…"]
    without = Draft(0, 1, 48, [11, 12], [True] * 2, [0.1] * 2, "x")
    root = ElementTree.fromstring(entropy_svg([Traced(without, 0.0)], labels=True))
    assert [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "token"] == ["11", "12"]


def _length(strokes):
    return sum(float(stroke.partition("h")[2]) for stroke in strokes.split("M")[1:])


def test_the_picture_among_the_examples_shows_two_canvases_and_is_small():
    path = Path(__file__).parents[2] / "examples" / "canvas.svg"
    assert path.stat().st_size < 200_000
    frames = ElementTree.parse(path).getroot().findall(f"{SVG}g/{SVG}g")
    assert svg_lines(frames[0])[0] == "> count from 5"
    assert {svg_lines(frame)[-1][:8] for frame in frames} == {"canvas 1", "canvas 2"}
