"""Prefixes on disk between two runs of the server."""

import os
import stat

import pytest
from servers import loader, running, user

from mlx_diffusiongemma import PromptError
from mlx_diffusiongemma.server.work.kept_files import KeptFiles

CHAT = "/v1/chat/completions"
RULES = {"role": "system", "content": "Answer in one line, and say nothing else. " * 3}


def ask(server, text):
    reply = server.post(CHAT, messages=[RULES, *user(text)], seed=0, max_steps=2, max_tokens=8).json()
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_next_run_has_read_what_this_one_read(demo_float32, demo_4bit, tmp_path):
    folder = tmp_path / "kept"
    with running(loader(demo_float32), kept_files=KeptFiles(folder, 10**9)) as server:
        said, cached = ask(server, "sort 4231")
        assert cached == 0 and list(folder.iterdir()) == []
    (path,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = path.stat().st_mtime_ns
    with running(loader(demo_float32), kept_files=KeptFiles(folder, 10**9)) as server:
        again, cached = ask(server, "sort 4231")
        assert again == said and cached > 100
    assert list(folder.iterdir()) == [path] and path.stat().st_mtime_ns > before
    with running(loader(demo_4bit), kept_files=KeptFiles(folder, 10**9)) as server:
        assert len(server.engine.loaded.prefixes) == 0, "those of another model are not used"
    assert path.exists()


def test_files_keep_to_their_budget_and_what_is_damaged_is_passed_over(demo_float32, tmp_path):
    with running(loader(demo_float32), kept_files=KeptFiles(tmp_path, 10**9)) as server:
        for text in ("reverse " + "abcdefgh" * 20, "sort 4231"):
            ask(server, text)
    files = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-10])
    os.utime(files[0], ns=(0, 0))
    with running(loader(demo_float32), kept_files=KeptFiles(tmp_path, files[1].stat().st_size)) as server:
        assert len(server.engine.loaded.prefixes) == 1
    assert list(tmp_path.iterdir()) == [files[1]]


def test_nothing_is_kept_where_nothing_may_be(demo_float32, tmp_path):
    with running(loader(demo_float32), kept_files=KeptFiles(tmp_path, 0)) as server:
        ask(server, "sort 4231")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PromptError, match="cannot be a folder"):
        KeptFiles(tmp_path / "file" / "kept", 1)
