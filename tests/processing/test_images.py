"""Preprocessing against Transformers' Pillow processor, and what becomes of every kind of source, good or bad."""

import base64
import importlib.util
import io
import random
import struct
import urllib.parse
import zlib
from pathlib import Path

import numpy as np
import pytest
from golden.make_vision import DATA, PIXEL_CASES, kept, picture, reference_patches
from PIL import Image, features

from mlx_diffusiongemma.errors import PromptError
from mlx_diffusiongemma.processing import images
from mlx_diffusiongemma.processing.images import (
    BUDGETS,
    VIDEO_BUDGET,
    load_image,
    prepare_image,
    prepare_video,
    resized_size,
    sample_video,
    video_text,
)

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
ORIENTATION = 0x0112  # the EXIF tag


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animation(kind: str = "GIF", frames: int = 5, duration: int | list[int] = 500) -> bytes:
    """Frame i is plain grey of brightness 40 * i."""
    first, *rest = (Image.new("RGB", (32, 24), (40 * i,) * 3) for i in range(frames))
    return encoded(first, kind, save_all=True, append_images=rest, duration=duration, **options_of(kind))


def options_of(kind: str) -> dict[str, bool]:
    return {"lossless": True} if kind == "WEBP" else {}


@pytest.mark.parametrize("name", PIXEL_CASES)
def test_pixels_equal_the_reference(name):
    golden = np.load(DATA / "pixels.npz")
    mode, width, height, budget = PIXEL_CASES[name]
    made = prepare_image(picture(mode, width, height), budget=budget)
    # Pillow's own rounding may differ by one level between its versions.
    assert np.abs(kept(made.pixels) - golden[f"{name}/pixels"] / np.float32(255)).max() < 1.01 / 255
    assert np.array_equal(made.positions, golden[f"{name}/positions"])
    assert made.soft_tokens == len(made.positions) // 9 <= budget
    assert (made.pixels.dtype, made.positions.dtype) == (np.float32, np.int32)


@needs_torch
@pytest.mark.parametrize("name", PIXEL_CASES)
def test_pixels_equal_the_live_reference(name):
    mode, width, height, budget = PIXEL_CASES[name]
    made = prepare_image(picture(mode, width, height), budget=budget)
    theirs = reference_patches(picture(mode, width, height), budget)
    assert np.array_equal(made.pixels, theirs["pixels"][: len(made.pixels)])
    assert np.array_equal(made.positions, theirs["positions"][: len(made.positions)])
    assert (theirs["positions"][len(made.positions) :] == -1).all()


@needs_torch
@pytest.mark.parametrize("budget", BUDGETS)
def test_sizes_equal_the_live_reference(budget):
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    draw = random.Random(budget)
    squares = [(48 * i, 48 * j) for i in range(1, 36) for j in range(1, 36)]
    for width, height in squares + [
        (draw.randint(1, 5000), draw.randint(1, 5000) // draw.choice([1, 99]) + 1) for _ in range(3000)
    ]:
        theirs = get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
        assert resized_size(width, height, budget=budget) == theirs[::-1], (width, height)


def test_every_source_gives_the_same_image(tmp_path):
    image = picture("RGB", 100, 80)
    file = tmp_path / "née 1.png"
    file.write_bytes(encoded(image))
    base = base64.encodebytes(file.read_bytes()).decode()  # with line breaks, as mail clients have it
    sources = [
        image,
        file,
        str(file),
        file.read_bytes(),
        f"data:image/png;base64,{base}",
        f"DATA:image/png;name=a;BASE64,{urllib.parse.quote(base)}",
        "data:image/png," + urllib.parse.quote(file.read_bytes()),
        encoded(image, "WEBP", lossless=True),
        encoded(image, "TIFF"),
        encoded(image, "BMP"),
        encoded(image, "PPM"),
    ]
    assert {prepare_image(source, budget=70).digest for source in sources} == {prepare_image(image, budget=70).digest}
    assert load_image(image) == image


def test_digests_tell_pictures_sizes_and_budgets_apart():
    wide, tall = Image.new("RGB", (96, 48)), Image.new("RGB", (48, 96))
    sources = [(wide, 70), (wide, 140), (tall, 70), (Image.new("RGB", (96, 48), "red"), 70)]
    assert len({prepare_image(image, budget=budget).digest for image, budget in sources}) == len(sources)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image = picture("RGB", 60, 40)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)  # as Image.Transpose numbers them
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = image if turn is None else image.transpose(Image.Transpose(turn))
    assert np.array_equal(load_image(encoded(image, exif=exif)), upright)


@needs_torch
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_rotated_files_equal_transformers_loader(tmp_path, kind):
    from transformers.image_utils import load_image as reference

    exif = Image.Exif()
    exif[ORIENTATION] = 6
    file = tmp_path / "photo"
    file.write_bytes(encoded(picture("RGB", 60, 40), kind, exif=exif))
    assert np.array_equal(load_image(file), reference(str(file)))


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    made = load_image(encoded(image))
    assert [made.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]


def test_sixteen_bit_grey_keeps_its_greys():
    grey = (np.arange(64 * 64) * 16).astype(np.uint16).reshape(64, 64)
    made = np.asarray(load_image(encoded(Image.fromarray(grey))))
    assert np.array_equal(made, np.repeat((grey >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_a_moving_image(kind):
    assert load_image(animation(kind)).getpixel((0, 0)) == (0, 0, 0)


def test_the_callers_image_is_left_as_it_was():
    image = picture("RGBA", 50, 50)
    before = image.copy()
    prepare_image(image, budget=70)
    assert image == before
    with Image.open(io.BytesIO(animation())) as moving:
        prepare_video(moving, frames=3)
        assert moving.tell() == 0


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


# name: (source, what the sentence must say)
BAD = {
    "missing": ("no/such/file.png", "There is no file no/such/file.png"),
    "directory": (Path("."), "cannot be read as {kind}"),
    "null byte": ("a\0b.png", "cannot be read as {kind}"),
    "long name": ("a" * 9000, "cannot be read as {kind}"),
    "empty": (b"", "not {kind} in a known format"),
    "text": (b"I am a picture, honest.", "not {kind} in a known format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not {kind} in a known format"),
    "runs a program": (encoded(Image.new("RGB", (8, 8)), "EPS"), "not {kind} in a known format"),
    "truncated": (encoded(picture("RGB", 64, 64))[:300], "cannot be read as {kind}"),
    "truncated jpeg": (encoded(picture("RGB", 64, 64), "JPEG")[:700], "cannot be read as {kind}"),
    "too little data": (png_header(64, 64), "cannot be read as {kind}"),
    "huge": (png_header(60_000, 60_000), "more than 89 million"),
    "large": (png_header(9_500, 9_500), "9500 × 9500 pixels"),
    "no pixels": (Image.new("RGB", (0, 5)), "has no pixels"),
    "network": ("https://example.com/cat.png", "allow_urls=True"),
    "no comma": ("data:image/png;base64", "no comma"),
    "bad base64": ("data:image/png;base64,####", "not valid base64"),
    "data of text": ("data:text/html,<b>cat</b>", "not {kind} in a known format"),
    "a number": (7, "not a int"),
    "nothing": (None, "not a NoneType"),
    "an array": (np.zeros((8, 8, 3), np.uint8), "not a ndarray"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_sources_get_one_sentence(name):
    source, says = BAD[name]
    for read, given, kind in (
        (prepare_image, source, "an image"),
        (prepare_video, source, "a video"),
        (prepare_video, [source], "an image"),
    ):
        with pytest.raises(PromptError) as caught:
            read(given)
        message = str(caught.value)
        assert says.format(kind=kind) in message
        assert "\n" not in message and len(message) < 400


def test_a_file_with_the_wrong_name_is_read_by_its_content(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(picture("RGB", 60, 40)))
    assert load_image(tmp_path / "photo.jpg") == picture("RGB", 60, 40)
    (tmp_path / "notes.png").write_text("groceries")
    with pytest.raises(PromptError, match=r"notes\.png is not an image"):
        load_image(tmp_path / "notes.png")


@pytest.mark.parametrize("budget", [0, 256, 281, -70, None, "280"])
def test_odd_budgets_are_refused(budget):
    with pytest.raises(PromptError, match="70, 140, 280, 560, 1120"):
        prepare_image(picture("RGB", 60, 40), budget=budget)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it mends
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "ICO", "AVIF", "JPEG2000"])
def test_damaged_files_never_raise_anything_else(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    draw = random.Random(kind)
    whole = encoded(picture("RGB", 48, 48), kind)
    for _ in range(150):
        damaged = bytearray(whole[: draw.randint(len(whole) // 4, len(whole))])
        for _ in range(draw.randint(1, 12)):
            damaged[min(int(draw.expovariate(1 / 60)), len(damaged) - 1)] = draw.randrange(256)
        try:
            prepare_image(bytes(damaged), budget=70)
        except PromptError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_video_from_a_file(kind):
    sampled = list(sample_video(animation(kind, duration=[500, 1000, 250, 250, 100]), frames=4))
    assert [time for _, time in sampled] == [0.0, 0.5, 1.5, 1.75]
    assert [frame.getpixel((0, 0))[0] for frame, _ in sampled] == [0, 40, 80, 120]
    assert len(list(sample_video(animation(kind)))) == 5


def test_video_from_a_list_and_from_a_still_image(tmp_path):
    frames = [Image.new("RGB", (8, 8), (i,) * 3) for i in range(100)]
    sampled = list(sample_video(frames, frames=4, fps=10))
    assert [(frame.getpixel((0, 0))[0], time) for frame, time in sampled] == [(0, 0), (25, 2.5), (50, 5), (75, 7.5)]
    (tmp_path / "a.png").write_bytes(encoded(frames[7]))
    for still in ([tmp_path / "a.png"], tmp_path / "a.png", frames[7], (frames[7],)):
        assert list(sample_video(still)) == [(frames[7], 0.0)]


def test_a_prepared_video_is_its_frames_prepared():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    frames = [picture("RGB", 960, 640), encoded(picture("RGB", 60, 40), exif=exif), picture("RGBA", 40, 600)]
    video = prepare_video(frames, fps=2)
    assert video.times == (0, 0.5, 1)
    for made, frame in zip(video.frames, frames, strict=True):
        assert made.digest == prepare_image(frame, budget=VIDEO_BUDGET).digest
        assert made.soft_tokens <= VIDEO_BUDGET


def test_one_frame_is_in_memory_at_a_time():
    frames = sample_video([picture("RGB", 8, 8), b"damaged"])
    assert next(frames)[1] == 0
    with pytest.raises(PromptError):
        next(frames)


@needs_torch
def test_sampled_frames_are_the_references():
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    for total in (1, 31, 32, 33, 100):
        count = min(32, total)
        theirs = default_sample_indices_fn(VideoMetadata(total_num_frames=total, fps=24), num_frames=count)
        sampled = sample_video([Image.new("RGB", (1, 1))] * total)
        assert [time for _, time in sampled] == [index / 24 for index in theirs]


def test_videos_that_cannot_be(monkeypatch):
    for frames in (0, -1, 2.5, True, "8"):
        with pytest.raises(PromptError, match="whole number of frames"):
            prepare_video(animation(), frames=frames)
    for fps in (0, -1, 1e-300, float("inf"), float("nan"), "2"):
        with pytest.raises(PromptError, match="frames per second are a number"):
            prepare_video(animation(), fps=fps)
    for nothing in ([], ()):
        with pytest.raises(PromptError, match="no frames"):
            prepare_video(nothing)
    for odd in ({animation()}, {"path": "a.gif"}, iter([animation()]), bytearray(animation())):
        with pytest.raises(PromptError, match="or a list of frames, not a"):
            prepare_video(odd)
    whole = animation()
    with pytest.raises(PromptError, match="cannot be read as a video"):
        prepare_video(whole[: len(whole) * 2 // 3])
    with pytest.raises(PromptError, match="not a video in a known format; give a GIF"):
        prepare_video(b"\0\0\0\x20ftypisom" + bytes(100))  # the beginning of an MP4
    monkeypatch.setattr(images, "MAX_VIDEO_PIXELS", 4 * 32 * 24)
    with pytest.raises(PromptError, match="5 frames of 32 × 24 pixels, too many"):
        prepare_video(animation())


def test_a_videos_prompt_is_worded_as_gemmas():
    assert video_text([0, 1.99, 61.5, 3600], "abcd") == "00:00 a 00:01 b 01:01 c 60:00 d"


def test_a_videos_prompt_is_the_references():
    from types import SimpleNamespace

    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    times = [0.0, 0.99, 59.9, 60.0, 754.2]
    tokens = SimpleNamespace(boi_token="<", eoi_token=">", video_token=".")
    made = {"num_soft_tokens_per_video": [3], "video_metadata": [SimpleNamespace(fps=24, timestamps=times)]}
    assert video_text(times, ["<...>"] * 5) == Gemma4Processor.replace_video_token(tokens, made, 0)
