"""Where pictures come from: a path, a file's bytes, a `data:` URL or the network, opened by Pillow.

A caller can pass on what strangers sent: with `allow_files=False` no path is looked at, so that the answer is the same
whether a file is there or not, and with `allow_urls=False` no connection is made.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import struct
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from ..errors import PromptError

MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb
MAX_DOWNLOAD_BYTES = 32 * 2**20
DOWNLOAD_SECONDS = 30.0

# Pillow knows more formats; these are safe on files from strangers (EPS, for one, would run Ghostscript). HEIF is
# read where pillow-heif has registered it, AVIF from Pillow 11.3 on.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "ICO")
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow's decoders raise for damaged files.
_DAMAGED = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError),
    *(struct.error, zlib.error),
)


@dataclass(frozen=True)
class Kind:
    """A kind of picture: how errors call it, and what they ask for instead of a file that is none."""

    name: str
    instead: str


STILL = Kind("an image", "give a PNG, JPEG, WebP or GIF file")
MOVING = Kind("a video", "give a GIF, WebP or APNG file, or its frames as a list of images")


@contextmanager
def opened(
    source: str | os.PathLike[str] | bytes, kind: Kind, *, allow_files: bool, allow_urls: bool
) -> Iterator[Image.Image]:
    """Open a picture with Pillow; whatever goes wrong while it is open becomes a PromptError that names it.

    source: a path, a file's bytes, a `data:` URL or an http(s) URL. Only text is ever taken for a URL.
    """
    name, file = _found(source, allow_files, allow_urls)
    Image.init()  # or Pillow fails on a format that nothing has registered
    formats = [name for name in FORMATS if name in Image.OPEN]
    with one_sentence(name, kind), Image.open(file, formats=formats) as image:
        yield image


def _found(source: str | os.PathLike[str] | bytes, allow_files: bool, allow_urls: bool) -> tuple[str, str | io.BytesIO]:
    """Look for a source where it says that it is. Returns what errors call it, and what Pillow can open: a path, or the
    content of what is no file of this machine. Raises PromptError.
    """
    if isinstance(source, bytes):
        return "The file", io.BytesIO(source)
    text = source if isinstance(source, str) else ""
    if text[:5].lower() == "data:":
        return shortened(text), io.BytesIO(_decode_data_url(text))
    if text[:8].lower().startswith(("http://", "https://")):
        if allow_urls:
            return shortened(text), io.BytesIO(_download(text))
        advice = "download it and give the file, or in Python pass allow_urls=True to processor.prompt"
        if not allow_files:
            advice = "nothing is downloaded here, so give the content as a data: URL"
        raise PromptError(f"{shortened(text)} is on the network; {advice}.")
    if not allow_files:
        # A path object is not even asked which path it is.
        name = shortened(text) if isinstance(source, str) else f"The {type(source).__name__}"
        raise PromptError(f"{name} is a path, and no files are read here; give the content as a data: URL.")
    path = os.fsdecode(source)
    return shortened(path), path


def _decode_data_url(url: str) -> bytes:
    """Decode the content of a `data:` URL (RFC 2397), base64 or percent-encoded. Raises PromptError."""
    header, comma, payload = url.partition(",")
    if not comma:
        raise PromptError("The data: URL has no comma before its content; write data:image/png;base64,…")
    try:
        content = urllib.parse.unquote_to_bytes(payload)
        if not header.lower().endswith(";base64"):
            return content
        return base64.b64decode(b"".join(content.split()), validate=True)
    except UnicodeEncodeError as error:
        raise PromptError(f"The data: URL is not valid Unicode ({error.reason}); encode the file again.") from None
    except binascii.Error as error:
        raise PromptError(f"The data: URL is not valid base64 ({error}); encode the file again.") from None


def _download(url: str) -> bytes:
    """Download the content at an http(s) URL, within the limits on size and time. Raises PromptError."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    content = bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mlx-diffusiongemma"})
        with _http_opener().open(request, timeout=DOWNLOAD_SECONDS) as response:
            while chunk := response.read1(2**16):
                content += chunk
                if len(content) > MAX_DOWNLOAD_BYTES:
                    raise PromptError(
                        f"{shortened(url)} is larger than {MAX_DOWNLOAD_BYTES // 2**20} MB; give a smaller file."
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it took longer than {DOWNLOAD_SECONDS:.0f} seconds")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PromptError(f"{shortened(url)} cannot be downloaded ({shortened(str(error))}); check the URL.") from None
    return bytes(content)


def _http_opener() -> urllib.request.OpenerDirector:
    """Make an opener that knows http and https alone: urllib's own would follow a redirection to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


@contextmanager
def one_sentence(name: str, kind: Kind) -> Iterator[None]:
    """Turn what Pillow raises for missing, damaged and hostile files into a PromptError about `name`."""
    try:
        yield
    except FileNotFoundError:
        raise PromptError(f"There is no file {name}; check its path.") from None
    except UnidentifiedImageError:
        raise PromptError(f"{name} is not {kind.name} in a known format; {kind.instead}.") from None
    except _BOMB:
        raise PromptError(f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels; make it smaller.") from None
    except _DAMAGED as error:
        reason = shortened(str(error))
        raise PromptError(f"{name} cannot be read as {kind.name} ({reason}); save it again or give another.") from None


def shortened(text: str, longest: int = 120) -> str:
    """Fit text from elsewhere into a sentence: the beginning of a long one, and nothing that a terminal obeys."""
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
