"""The view, written to a small terminal that knows the escape sequences the view may use, and no others."""

import re
from types import SimpleNamespace

import pytest

from mlx_diffusiongemma.display import terminal
from mlx_diffusiongemma.display.cells import Row, break_rows, clusters, printable
from mlx_diffusiongemma.display.terminal import View, show, statistics_line
from mlx_diffusiongemma.events import Commit, Done, Draft, Filled, Prefill, Stats


class Screen:
    """A terminal's cells, with wrapping, scrolling, and rows that are wrapped again when it becomes narrower.

    Rows for which it becomes too low go out of sight at the top, and come back when it becomes taller.
    """

    SEQUENCE = re.compile(r"\x1b\[(\??)(\d*)([A-Za-z])")

    def __init__(self, columns=40, lines=12):
        self.columns, self.lines = columns, lines
        self.rows, self.history, self.gives_back = [[]], [], True
        self.x = self.y = 0
        self.modes = {"7": True, "25": True, "2026": False}
        self.styled = []  # characters written while a style was set

    def write(self, text):
        style, position = "", 0
        while position < len(text):
            if text[position] == "\x1b":
                match = self.SEQUENCE.match(text, position) or re.match(r"\x1b\[([\d;]*)(m)", text[position:])
                if match.lastindex == 2 or match[3] == "m":
                    style = "" if match[0] == "\x1b[0m" else style + match[0]
                else:
                    self.obey(match[1], match[2], match[3])
                position += len(match[0])
                continue
            for cluster, width in clusters(text[position]):
                self.put(cluster, width)
                if style:
                    self.styled.append((style, cluster))
            position += 1
        assert not style, "a write leaves a style set"

    def obey(self, private, number, letter):
        if private:
            self.modes[number] = letter == "h"
        elif letter == "A":
            self.y = max(self.y - int(number), 0)
        elif letter == "C":
            self.x += 1
        elif letter == "K":
            del self.rows[self.y][self.x :]
        elif letter == "J":
            del self.rows[self.y][self.x :]
            del self.rows[self.y + 1 :]
        else:
            raise AssertionError(f"the view moved in a way it should not: {letter}")

    def put(self, character, width):
        assert character in "\r\n\t" or character.isprintable() or width == 0, repr(character)
        if character == "\r":
            self.x = 0
        elif character == "\n":  # the line discipline of a terminal makes it a return as well
            self.x = 0
            self.line_feed()
        else:
            if self.x + width > self.columns:
                if not self.modes["7"]:
                    return
                self.x = 0
                self.line_feed()
            row = self.rows[self.y]
            row += [" "] * (self.x - len(row))
            row[self.x : self.x + width] = [character, *[""] * (width - 1)]
            self.x += width

    def line_feed(self):
        self.y += 1
        if self.y == len(self.rows):
            self.rows.append([])
        if self.y == self.lines:
            self.history.append(self.rows.pop(0))
            self.y -= 1

    def resize(self, columns, lines=None):
        grown = (lines or self.lines) - self.lines
        self.lines = lines or self.lines
        rows, cursor = [], 0
        for number, row in enumerate(self.rows):
            parts = [row[at : at + columns] for at in range(0, len(row), columns)] or [[]]
            rows += parts
            if number == self.y:
                cursor, self.x = len(rows) - 1, len(parts[-1])
        self.rows, self.y, self.columns = rows, cursor, columns
        while len(self.rows) > self.lines:
            self.history.append(self.rows.pop(0))
            self.y -= 1
        back = min(max(grown, 0), len(self.history)) if self.gives_back else 0
        self.rows[:0] = self.history[len(self.history) - back :]
        del self.history[len(self.history) - back :]
        self.y += back

    @property
    def text(self):
        return ["".join(row).rstrip() for row in self.rows]


class Stream:
    """A standard stream, on a terminal or not."""

    def __init__(self, screen=None):
        self.screen, self.written = screen, []

    def write(self, text):
        self.written.append(text)
        if self.screen:
            self.screen.write(text)

    def flush(self):
        pass

    def isatty(self):
        return self.screen is not None

    def fileno(self):
        return 2

    @property
    def text(self):
        return "".join(self.written)


def use(monkeypatch, out, err):
    """Give the view its streams; pytest puts its own in `sys` for every test."""
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stdout=out, stderr=err))
    return out, err


@pytest.fixture
def screen(monkeypatch):
    """A terminal under stdout and stderr on which every frame is drawn."""
    screen = Screen()
    screen.out, screen.err = use(monkeypatch, Stream(screen), Stream(screen))
    monkeypatch.setattr(terminal.os, "get_terminal_size", lambda _: (screen.columns, screen.lines))
    monkeypatch.setattr(terminal, "FRAME_SECONDS", 0)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return screen


def draft(text, canvas=0, step=1, accepted=None):
    """A draft whose tokens are its characters."""
    marks = accepted or [True] * len(text)
    entropy = [0.0 if a else 2.0 for a in marks] or [0.0]
    return Draft(canvas, step, 48, [ord(c) for c in text], marks, entropy, text, [("text", text)], list(text))


def commit(text, canvas=0, steps=3):
    return Commit(canvas, [], [("thinking", "hidden"), ("text", text)], steps)


DONE = Done("stop", Stats())


def test_a_pipe_gets_the_reply_byte_for_byte_and_nothing_else(monkeypatch):
    out, err = use(monkeypatch, Stream(), Stream())
    done = show([Prefill(9, 9), draft("noise"), commit("one \x1b[1m"), commit("two\r\n\tend"), DONE])
    assert (out.text, err.text, done) == ("one \x1b[1mtwo\r\n\tend", "", DONE)


def test_text_is_on_stdout_as_soon_as_it_is_committed(monkeypatch):
    out, _ = use(monkeypatch, Stream(), Stream())

    def events():
        yield commit("first")
        assert out.text == "first"
        yield DONE

    show(events())


def test_a_draft_continues_the_unfinished_line_and_nothing_else_stays(screen):
    def events():
        yield Prefill(2048, 10000)
        assert screen.text == ["prompt 2048/10000"]
        yield draft("abc xyz")
        assert screen.text == ["abc xyz", "canvas 1 · step 1/48 · entropy 0.000"]
        yield commit("A line.\nAn unfinished")
        assert screen.text == ["A line.", "An unfinished", "canvas 1 · step 1/48 · entropy 0.000"]
        assert screen.out.text == "A line.\n"
        yield draft(" line, still noise\nand more", canvas=1, step=2)
        assert screen.text[:3] == ["A line.", "An unfinished line, still noise", "and more"]
        yield commit(" line.", canvas=1)
        yield DONE

    show(events())
    assert screen.text == ["A line.", "An unfinished line.", ""]
    assert screen.modes == {"7": True, "25": True, "2026": False}
    assert screen.out.text == "A line.\nAn unfinished line.\n"


def test_a_terminal_that_does_not_say_its_size_is_a_usual_one(screen, monkeypatch):
    monkeypatch.setattr(terminal.os, "get_terminal_size", lambda _: (0, 0))
    screen.columns = 80
    show([draft("text")])
    assert "canvas 1 · step 1/48 · entropy 0.000" in screen.err.text


def test_every_frame_is_one_write_with_the_cursor_shown_after_it(screen):
    def events():
        for step in range(1, 6):
            before = len(screen.err.written)
            yield draft("some text\n" * step, step=step)
            assert len(screen.err.written) == before + 1
            assert screen.modes == {"7": True, "25": True, "2026": False}

    show(events())


def test_tokens_still_noise_are_dim(screen):
    show([draft("yes no", accepted=[True] * 4 + [False] * 2)])
    assert screen.styled == [(terminal.NOISE, "n"), (terminal.NOISE, "o")]
    screen.styled.clear()
    show([draft("yes no", accepted=[True] * 4 + [False] * 2)], heat=True)
    assert [character for _, character in screen.styled] == ["n", "o"]
    assert screen.styled[0][0] == terminal.NOISE + "\x1b[31m"


def test_model_output_cannot_command_the_terminal(screen):
    hostile = "\x1b[2J\x1b[H\r\b\x07\x9b1A\u202e\x7f\x00"

    def events():
        yield draft(hostile)
        assert screen.text[0] == "␛[2J␛[H␍␈␇�1A�␡␀"
        yield commit("ok " + hostile)
        yield DONE

    show(events())
    assert screen.text == ["ok ␛[2J␛[H␍␈␇�1A�␡␀", ""]


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_wide_characters_wrap_whole(screen, columns):
    screen.columns = columns
    text = "天空为什么是蓝色的？" * 5 + "🙂🌈 é"

    def events():
        yield commit("前")
        yield draft(text)
        rows = screen.text[:-1]
        assert "".join(rows).replace(" ", "") == ("前" + text).replace(" ", "")
        assert max(sum(width for _, width in clusters(row)) for row in rows) <= columns
        yield commit(text)

    show(events())
    assert "".join(screen.text).replace(" ", "") == ("前" + text).replace(" ", "")


@pytest.mark.parametrize("sizes", [(40, 23, 61), (80, 20, 80, 21), (30, 200, 29)])
def test_a_resize_between_frames_leaves_nothing_behind(screen, sizes):
    screen.columns, screen.lines = sizes[0], 30

    def events():
        yield commit("Committed.\nUnfinished ")
        for step in range(3 * len(sizes)):
            screen.resize(sizes[step // 3])
            yield draft("word 字 " * (12 + step), canvas=1, step=step + 1)
            assert sum(row.startswith("canvas") for row in screen.text) == 1
            assert screen.text[0] == "Committed."
        yield commit("line.")

    show(events())
    assert screen.text == ["Committed.", "Unfinished line.", ""]


@pytest.mark.parametrize("gives_back", [True, False])
@pytest.mark.parametrize("sizes", [[(20, 6), (40, 24)], [(40, 5), (40, 9), (80, 24)], [(15, 12), (60, 7), (60, 30)]])
def test_rows_that_a_small_terminal_pushed_out_do_not_come_back_to_stay(screen, sizes, gives_back):
    screen.columns, screen.lines, screen.gives_back = 40, 24, gives_back

    def events():
        yield commit("Committed.\nUnfinished ")
        for step, size in enumerate([(40, 24), *sizes, *sizes], start=1):
            screen.resize(*size)
            yield draft(f"draft{step} " + "word " * 50, canvas=1, step=step)
            shown = "\n".join(screen.text)
            assert set(re.findall(r"draft(\d+)", shown)) <= {str(step)} and shown.count("canvas") == 1
        yield commit("line.")

    show(events())
    assert screen.text[-2:] == ["Unfinished line.", ""]
    assert "Committed." in [*("".join(row).rstrip() for row in screen.history), *screen.text]


def test_holes_are_counted_and_the_time_left_is_told(screen, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    screen.columns = 80
    with View() as view:
        view(Filled(0, 40))
        view(draft("x"))
        assert screen.text[-1].startswith("0/40 holes · canvas 1 · step 1/48")
        clock[0] = 30.0
        view(Filled(3, 40))
        view(draft("x", step=2))
        assert screen.text[-1].startswith("3/40 holes · about 6 min left · canvas 1")
        clock[0] = 100.0
        view(draft("x", step=3))
        assert screen.text[-1].startswith("3/40 holes · about 5 min left · canvas 1")
        view(Filled(40, 40))
        view(DONE)
    assert view.done == DONE
    with View() as view:
        view(Filled(0, 1))
        view(draft("x"))
        assert screen.text[-1].startswith("canvas 1 ·")


def test_a_passing_view_writes_no_text_and_leaves_nothing(screen, monkeypatch):
    out, _ = use(monkeypatch, Stream(), Stream(screen))
    with View(passing=True) as view:
        view(commit("many\nlines \x1b[2J before "))
        view(draft("the span"))
        assert screen.text[:2] == ["lines ␛[2J before the span", "canvas 1 · step 1/48 · entropy 0.000"[:39]]
        view(commit("the span\nand after"))
        view(DONE)
    assert (out.text, screen.text) == ("", [""])
    with pytest.raises(KeyboardInterrupt), View(passing=True) as view:
        view(draft("lost"))
        raise KeyboardInterrupt
    assert (out.text, screen.text, screen.modes["25"]) == ("", [""], True)


def test_a_view_taller_than_the_terminal_never_scrolls_its_own_rows_away(screen):
    screen.lines = 5

    def events():
        yield commit("x" * 60)
        for step in range(1, 9):
            yield draft("noise\n" * 9 * step, canvas=1, step=step)
            assert len(screen.text) == 5
            assert screen.text[0].endswith("xxnoise")
            assert screen.text[4].startswith("canvas 2")

    show(events())
    assert screen.history == []
    assert screen.text == ["x" * 40, "x" * 20, ""]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_view_leaves_what_was_committed(screen, error):
    def events():
        yield commit("kept")
        yield draft("lost\nlost", canvas=1)
        raise error

    with pytest.raises(error):
        show(events())
    assert screen.text == ["kept", ""]
    assert screen.modes == {"7": True, "25": True, "2026": False}


def test_a_broken_stdout_leaves_the_terminal_whole(screen, monkeypatch):
    def broken(text):
        raise BrokenPipeError

    monkeypatch.setattr(screen.out, "write", broken)
    with pytest.raises(BrokenPipeError):
        show([draft("noise"), commit("a line\n"), DONE])
    assert screen.modes == {"7": True, "25": True, "2026": False}


def test_without_a_canvas_there_is_only_the_line_of_progress(screen):
    def events():
        yield draft("noise")
        assert screen.text == ["canvas 1 · step 1/48 · entropy 0.000"]
        yield commit("some text")
        assert screen.text == ["some text", "canvas 1 · step 1/48 · entropy 0.000"]

    show(events(), live=False)
    assert screen.text == ["some text", ""]


@pytest.mark.parametrize(
    ("out", "err", "environment", "seen"),
    [
        (True, True, {}, "draft"),
        (True, True, {"NO_COLOR": "1"}, "progress"),
        (True, True, {"NO_COLOR": ""}, "draft"),
        (True, True, {"TERM": "dumb"}, "nothing"),
        (False, True, {}, "progress"),
        (True, False, {}, "nothing"),
        (False, False, {}, "nothing"),
    ],
)
def test_what_the_streams_and_the_environment_allow(screen, monkeypatch, out, err, environment, seen):
    stdout, stderr = use(monkeypatch, Stream(screen if out else None), Stream(screen if err else None))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    show([draft("the draft"), commit("text\n"), DONE])
    assert ("the draft" in stderr.text, "canvas 1" in stderr.text) == (seen == "draft", seen != "nothing")
    assert stdout.text == "text\n"


def test_text_that_a_pipe_brings_to_the_same_terminal_stays(screen, monkeypatch):
    out, _ = use(monkeypatch, Stream(), Stream(screen))

    def events():
        yield draft("noise")
        yield commit("the reply")
        screen.write(out.text)  # as `tee` does
        yield DONE

    show(events())
    assert screen.text == ["the reply"]


def test_drafts_faster_than_the_screen_are_left_out_but_not_the_last(screen, monkeypatch):
    monkeypatch.setattr(terminal, "FRAME_SECONDS", 3600)
    show([*(draft(f"draft {step}", step=step) for step in range(1, 50)), commit("text\n"), DONE])
    shown = re.findall(r"draft (\d+)", screen.err.text)
    assert shown == ["1", "49"]


def test_the_status_line_gives_up_its_last_parts_first(screen):
    from mlx_diffusiongemma.options import GenerationOptions

    options = GenerationOptions(t_max=0.8, t_min=0.4)
    screen.columns = 80
    events = [draft("x", step=3), commit("a\n", steps=3), draft("x", canvas=1, step=2)]
    show(events, options=options)
    assert "step 3/48 · entropy 0.000 · temperature 0.78" in screen.err.text
    assert "step 2/48 · entropy 0.000 · temperature 0.79 · 5 steps so far" in screen.err.text
    screen.columns = 24
    show([draft("x")], options=options)
    assert screen.err.text.count("canvas 1 · step 1/48\x1b") == 1


def test_rows_break_at_line_ends_and_where_they_are_full():
    assert break_rows([("", "")], 10) == []
    assert break_rows([("a", "one"), ("b", " two\n"), ("a", "x")], 5) == [
        Row([("a", "one"), ("b", " t")]),
        Row([("b", "wo")]),
        Row([("a", "x")]),
    ]
    words = break_rows([("", "some "), ("b", "words are"), ("", "long again")], 9, words=True)
    assert [row.text for row in words] == ["some ", "words ", "arelong ", "again"]
    assert [row.text for row in break_rows([("", "eight888 x abcdefghijkl")], 8, words=True)] == [
        "eight888",
        "x ",
        "abcdefgh",
        "ijkl",
    ]
    assert [width for _, width in clusters("e\u0301字👩‍🚀❤️x")] == [1, 2, 2, 2, 1]
    assert printable("a\r\nb\tc\u2028\ud800") == "a\nb\tc��"


@pytest.mark.parametrize(
    ("stats", "line"),
    [
        (
            Stats(17, 0, 41, [4, 3], 0, 0.08, 0.465, 15_200_000_000),
            "prompt 17 tokens, 212 tok/s · 41 tokens, 88.2 tok/s · 2 canvases, 3.5 steps each · peak 15.2 GB",
        ),
        (
            Stats(1, 0, 1, [1], 1, 0.1, 0.1, 5_400_000),
            "prompt 1 token, 10.0 tok/s · 1 token, 10.0 tok/s · 1 canvas, 1.0 steps each · 1 retry · peak 5 MB",
        ),
        (Stats(90, 80), "prompt 90 tokens (80 cached) · 0 tokens · 0 canvases, 0.0 steps each"),
    ],
)
def test_statistics_line(stats, line):
    assert statistics_line(stats) == line


@pytest.mark.parametrize("columns", [40, 24, 12])
def test_the_statistics_break_between_their_parts(columns):
    stats = Stats(17, 10, 41, [4, 3], 2, 0.08, 0.465, 15_200_000_000)
    lines = statistics_line(stats, columns).split("\n")
    assert max(map(len, lines)) <= columns and all(lines)
    assert " ".join(lines).replace(" · ", " ") == statistics_line(stats).replace(" · ", " ")
    if columns == 40:
        assert lines[1:] == ["41 tokens, 88.2 tok/s", "2 canvases, 3.5 steps each · 2 retries", "peak 15.2 GB"]


def test_the_statistics_keep_to_the_terminal(screen):
    screen.columns = 30
    assert max(map(len, statistics_line(Stats(17, 10, 41, [4, 3])).split("\n"))) <= 30
