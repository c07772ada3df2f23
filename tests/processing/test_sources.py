"""Pictures from strangers: no path is looked at and no connection made where that is not allowed."""

from __future__ import annotations

import base64
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from golden.make_vision import picture
from PIL import Image
from templates import demo_processor

from mlx_diffusiongemma import ChatSession, GenerationOptions, PromptError, load
from mlx_diffusiongemma.processing import sources
from mlx_diffusiongemma.processing.images import load_image, prepare_image, prepare_video, sample_video


def png() -> bytes:
    buffer = io.BytesIO()
    picture("RGB", 60, 40).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@pytest.fixture(scope="module")
def processor():
    return demo_processor()


class Watched:
    """What is opened or asked for below a folder."""

    def __init__(self) -> None:
        self.folder = ""
        self.touched: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder and event in ("open", "os.listdir", "os.scandir"):
            self.note(arguments[0])

    def note(self, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike) and self.folder and self.folder in os.fsdecode(path):
            self.touched.append(os.fsdecode(path))


WATCHED = Watched()  # a hook cannot be taken off again: one for all tests


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Iterator[list[str]]:
    """The paths below `tmp_path` that something has asked the system about."""

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Any, *arguments: Any, **named: Any) -> Any:
            WATCHED.note(path)
            return function(path, *arguments, **named)

        return noted

    for name in ("stat", "lstat", "access", "readlink"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    WATCHED.folder, WATCHED.touched = str(tmp_path), []
    yield WATCHED.touched
    WATCHED.folder = ""


class Named(os.PathLike):
    """A path object, which may say what it likes; asked for its path, it opens the file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        WATCHED.touched.append(self.path)
        return self.path


def image(**part: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image", **part}]}


def openai(url: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": url}]}


def video(**part: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "video", **part}]}


# The ways in which a message can name a path.
MESSAGES: dict[str, Callable[[str], Any]] = {
    "image": lambda path: image(image=path),
    "url": lambda path: image(url=path),
    "path": lambda path: image(path=path),
    "image_url": lambda path: image(image_url=path),
    "image_url in an image part": lambda path: image(image_url={"url": path}),
    "a path object": lambda path: image(image=Path(path)),
    "a path object of its own": lambda path: image(image=Named(path)),
    "a path object that says data": lambda path: image(image=Named("data:,")),
    "OpenAI's": lambda path: openai({"url": path, "detail": "high"}),
    "OpenAI's without an object": lambda path: openai(path),
    "a file URL": lambda path: openai({"url": f"file://{path}"}),
    "a file URL in capitals": lambda path: openai({"url": f"FILE://{path}"}),
    "a file URL without slashes": lambda path: openai({"url": f"file:{path}"}),
    "a file URL of this host": lambda path: openai({"url": f"file://localhost{path}"}),
    "urllib's brackets": lambda path: openai({"url": f"<URL:file://{path}>"}),
    "another scheme": lambda path: openai({"url": f"ftp://localhost{path}"}),
    "a scheme that is almost one": lambda path: openai({"url": f"http:{path}"}),
    "white space before": lambda path: openai({"url": f" data:,{path}"}),
    "a line break before": lambda path: image(image=f"\n{path}"),
    "a detour": lambda path: image(image=f"./data:,/../{path}"),
    "a null byte": lambda path: image(image=f"{path}\0.png"),
    "half a surrogate pair": lambda path: image(image=f"{path}\ud800"),
    "video": lambda path: video(video=path),
    "video's url": lambda path: video(url=path),
    "video's path": lambda path: video(path=path),
    "video_url": lambda path: {"role": "user", "content": [{"type": "video_url", "video_url": {"url": path}}]},
    "a frame": lambda path: video(video=[path]),
    "a frame among others": lambda path: video(video=[PNG, DATA_URL, Path(path)]),
    "frames in an object": lambda path: video(video_url={"url": (path, path)}),
    "a tool's image": lambda path: {"role": "tool", "content": [{"type": "image", "image": path}]},
    "a tool's video": lambda path: {"role": "tool", "content": [{"type": "video", "video": [f"file://{path}"]}]},
}
# What takes a path for something else, and so answers something else: whatever it says, it must not look.
OTHERWISE: dict[str, Callable[[str], Any]] = {
    "base64": lambda path: image(base64=path),
    "base64 of a path": lambda path: image(base64=base64.b64encode(path.encode()).decode()),
    "a video's base64": lambda path: video(base64=path),
    "bytes": lambda path: image(image=path.encode()),
    "bytes as a frame": lambda path: video(video=[path.encode()]),
    "data": lambda path: image(image=f"data:,{path}"),
    "data without a comma": lambda path: image(image=f"data:{path}"),
    "a list": lambda path: image(image=[path]),
    "an object in an object": lambda path: openai({"url": {"url": path}}),
    "a list of lists": lambda path: video(video=[[path]]),
    "an object as a frame": lambda path: video(video=[{"url": path}]),
    "bytes of another kind": lambda path: image(image=bytearray(path.encode())),
    "the network": lambda path: openai({"url": f"HTTPS://localhost{path}"}),
    "the network, as a frame": lambda path: video(video=[f"http://localhost{path}"]),
}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}


@pytest.fixture
def paths(tmp_path) -> list[str]:
    """A picture, a file that is none, one that would block, one that is not there: names of one length."""
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_text("secret")
    os.mkfifo(tmp_path / "c.png")
    return [str(tmp_path / f"{name}.png") for name in "abcd"]


@pytest.mark.parametrize("way", [*MESSAGES, *OTHERWISE])
def test_no_message_reaches_a_file_or_tells_whether_it_is_there(processor, paths, watched, way):
    answers = set()
    for path in paths:
        message = (MESSAGES | OTHERWISE)[way](path)
        with pytest.raises(PromptError) as caught:
            processor.prompt([CALL, message] if message["role"] == "tool" else [message], allow_files=False)
        assert "\n" not in str(caught.value) and str(caught.value).isprintable()
        answers.add(str(caught.value).replace(path, "PATH"))
    assert watched == []
    if way in MESSAGES:
        [answer] = answers
        assert answer.endswith(" is a path, and no files are read here; give the content as a data: URL.")
    elif "bytes" not in way and "base64" not in way:
        assert len(answers) == 1


def test_what_watches_sees_what_is_read(processor, paths, watched):
    for message in (image(image=paths[0]), video(video=[Path(paths[0])]), image(image=Named(paths[0]))):
        del watched[:]
        assert processor.prompt([message]).images
        assert paths[0] in watched


def test_every_function_that_takes_a_path_can_refuse_it(processor, paths, watched):
    for path in paths:
        for ask in (
            lambda path=path: processor.prompt("?", images=[path], allow_files=False),
            lambda path=path: processor.content("?", [path], allow_files=False),
            lambda path=path: processor.content("?", [], [path], allow_files=False),
            lambda path=path: processor.content("?", [], [[path]], allow_files=False),
            lambda path=path: processor.prepare_image(path, allow_files=False),
            lambda path=path: processor.prepare_video(path, allow_files=False),
            lambda path=path: processor.prepare_video([path], allow_files=False),
            lambda path=path: prepare_image(Path(path), allow_files=False),
            lambda path=path: prepare_video(Path(path), allow_files=False),
            lambda path=path: load_image(path, allow_files=False),
            lambda path=path: list(sample_video([path], allow_files=False)),
        ):
            with pytest.raises(PromptError, match="no files are read here"):
                ask()
    assert watched == []


def test_content_goes_where_files_do_not(processor):
    expected = prepare_image(PNG, budget=70).digest
    capitals = DATA_URL.replace("data:", "DATA:", 1)
    prepared = processor.prepare_image(PNG)
    for source in (PNG, DATA_URL, capitals, picture("RGB", 60, 40), Image.open(io.BytesIO(PNG)), prepared):
        [made] = processor.prompt([image(image=source)], allow_files=False).images
        assert made.digest == expected
    for message in (openai({"url": DATA_URL}), image(base64=base64.b64encode(PNG).decode()), video(video=[PNG])):
        assert processor.prompt([message], allow_files=False).images[0].digest == expected
    clip = processor.prepare_video([PNG])
    assert processor.prompt([video(video=clip)], allow_files=False).images[0] is clip.frames[0]


def test_a_data_url_that_is_not_unicode(processor):
    for url in ("data:,\ud800", "data:;base64,\ud800", "data:\ud800,"):
        with pytest.raises(PromptError) as caught:
            processor.prepare_image(url)
        assert str(caught.value).isprintable()


def test_what_errors_repeat_draws_nothing_on_a_terminal():
    for name in ("\x1b[2J\r.png", "a\nb.png", "\u202egnp.exe"):
        for allowed in (True, False):
            with pytest.raises(PromptError) as caught:
                load_image(name, allow_files=allowed)
            assert str(caught.value).isprintable()


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


def test_a_session_applies_it_to_all_that_a_turn_names(demo, paths, watched):
    options = GenerationOptions(seed=0, max_tokens=32, max_steps=2)
    chat = ChatSession(*demo, options=options, allow_files=False)
    for path in paths:
        for images, videos in (([path], []), ([Named(path)], []), ([], [Path(path)]), ([], [[PNG, f"file://{path}"]])):
            with pytest.raises(PromptError, match="no files are read here"):
                chat.send("?", images, videos)
        with pytest.raises(PromptError, match="text"):
            chat.send([{"type": "image", "image": path}])
    with pytest.raises(PromptError, match="nothing is downloaded here"):
        chat.ask("?", ["https://localhost/a.png"])
    assert chat.messages == [] and watched == []
    chat.ask("?", [DATA_URL], [[PNG]])
    chat.allow_files = True
    chat.ask("?", [paths[0]])
    assert len(chat.messages) == 4 and paths[0] in watched
    with pytest.raises(PromptError, match="allow_urls"):
        chat.ask("?", ["https://localhost/a.png"])


ELSEWHERE = {"/away": "/cat.png", "/file": "file:///etc/hostname", "/ftp": "ftp://127.0.0.1:1/cat.png"}


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path in ELSEWHERE:
            self.send_response(302)
            self.send_header("Location", ELSEWHERE[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path in ("/cat.png", "/endless") else 404)
        self.end_headers()
        self.wfile.write(PNG)
        try:
            while self.path == "/endless":
                self.wfile.write(bytes(2**16))
        except ConnectionError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls_when_asked_for(site, monkeypatch):
    for allow_files in (True, False):
        for url in (f"{site}/cat.png", f"{site.upper()}/cat.png", f"{site}/away"):
            assert load_image(url, allow_files=allow_files, allow_urls=True) == picture("RGB", 60, 40)
    with pytest.raises(PromptError, match=r"/missing cannot be downloaded \(HTTP Error 404"):
        load_image(f"{site}/missing", allow_urls=True)
    with pytest.raises(PromptError, match="larger than 32 MB"):
        load_image(f"{site}/endless", allow_urls=True)
    monkeypatch.setattr(sources, "MAX_DOWNLOAD_BYTES", 2**60)
    monkeypatch.setattr(sources, "DOWNLOAD_SECONDS", 0.2)
    with pytest.raises(PromptError, match="took longer"):
        load_image(f"{site}/endless", allow_urls=True)
    with pytest.raises(PromptError, match="cannot be downloaded"):
        load_image("http://[nonsense/cat.png", allow_urls=True)


def test_a_redirection_does_not_leave_the_web(site):
    with pytest.raises(PromptError, match=r"cannot be downloaded.*not allowed"):
        load_image(f"{site}/file", allow_urls=True)
    with pytest.raises(PromptError, match=r"cannot be downloaded.*unknown url type: ftp"):
        load_image(f"{site}/ftp", allow_urls=True)


def test_urls_need_no_files_and_files_no_urls(site, tmp_path, processor):
    (tmp_path / "cat.png").write_bytes(PNG)
    path, url = str(tmp_path / "cat.png"), f"{site}/cat.png"
    for allow_files in (True, False):
        for allow_urls in (True, False):
            for source, allowed in ((path, allow_files), (url, allow_urls), (PNG, True)):
                for message in (image(image=source), video(video=[source])):
                    settings = {"allow_files": allow_files, "allow_urls": allow_urls}
                    if allowed:
                        assert processor.prompt([message], **settings).images
                    else:
                        with pytest.raises(PromptError):
                            processor.prompt([message], **settings)
