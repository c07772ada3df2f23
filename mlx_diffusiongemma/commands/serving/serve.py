"""The verb `mlx-dg serve`."""

from __future__ import annotations

import logging
import sys
from pathlib import PurePath
from typing import Annotated
from urllib.parse import urlsplit

import typer

from ...errors import PromptError
from ..chatting.decoding import Decoding, chosen_decoder
from ..common import (
    AdapterPath,
    MaxTokens,
    Mode,
    Model,
    Yes,
    announced_model,
    chosen_mode,
    load_source,
    number,
    say,
    whole,
)

# What to type, or where to, for the page and for each client; every line with the server's address.
POINTERS = """\
The page:     {url}
OpenAI:       base URL {url}/v1, any API key
Claude Code:  ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN=any claude
Codex:        model_providers.local = {{ base_url = "{url}/v1", wire_api = "responses" }}
Xcode:        Settings, Intelligence, Add a Model Provider, port {port}
Zed:          language_models.openai_compatible, api_url {url}/v1
Continue:     provider openai, apiBase {url}/v1
llama.vim:    let g:llama_config.endpoint = '{url}/infill'
API:          {url}/docs"""


def serve(
    model: Model = None,
    adapter: AdapterPath = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", parser=whole(0, 65535), help="The port; 0 is any free one.")
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", metavar="KEY", envvar="MLX_DG_API_KEY", help="What requests must carry [MLX_DG_API_KEY]."
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="URL", help="A web page's site that may ask; may be repeated."),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", metavar="N", parser=whole(1), help="Most requests that wait.")] = 32,
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="N", parser=whole(1), help="Most tokens, prompt and reply [the model's]."),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", metavar="GB", parser=number(0), help="Memory for prompts read before [a quarter]."),
    ] = None,
    keep_prefixes: Annotated[
        str | None,
        typer.Option("--keep-prefixes", metavar="DIR", help="A folder for prompts read before, for the next run."),
    ] = None,
    keep_on_disk: Annotated[
        float,
        typer.Option("--keep-on-disk", metavar="GB", parser=number(0), help="What files in that folder may take."),
    ] = 8,
    decoder: Decoding = "diffusion",
    mode: Mode = "reference",
    max_tokens: MaxTokens = 1024,
    strict_model: Annotated[
        bool, typer.Option("--strict-model", help="Refuse requests that name another model.")
    ] = False,
    remote_images: Annotated[
        bool,
        typer.Option("--remote-images", help="Fetch images that requests name by https addresses, public ones alone."),
    ] = False,
    yes: Yes = False,
) -> None:
    """Serve the model to apps, and a page to watch it, on this machine."""
    from dataclasses import replace

    try:
        from ...server.guard import LOOPBACK, Rules
        from ...server.running import serve as run
        from ...server.service import Service
        from ...server.work.engine import LOG, Engine
        from ...server.work.kept_files import KeptFiles
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise PromptError(
            f"The server needs {error.name}, which is not installed; run: pip install 'mlx-diffusiongemma[serve]'"
        ) from None

    if host not in LOOPBACK and not api_key:
        raise typer.BadParameter(f"others can reach {host}: give a key that they need, with --api-key.")
    for origin in allow_origin or ():
        if not (urlsplit(origin).scheme and urlsplit(origin).netloc) or urlsplit(origin).path:
            raise typer.BadParameter(
                f"{origin!r} is no site; name one such as https://example.org", param_hint="'--allow-origin'"
            )
    options = replace(chosen_mode(mode).with_decoder(chosen_decoder(decoder)), max_tokens=max_tokens)
    kept_files = None if keep_prefixes is None else KeptFiles(keep_prefixes, int(keep_on_disk * 1e9))
    source = announced_model(model, yes=yes)
    _log_to_stderr(LOG)
    kept_bytes = None if keep is None else int(keep * 1e9)
    engine = Engine(lambda: load_source(source, adapter), queue=queue, kept_bytes=kept_bytes, kept_files=kept_files)
    service = Service(engine, PurePath(source).name, options, context, strict_model, remote_images)

    def say_where(chosen: int) -> None:
        named = f"[{host}]" if ":" in host else host
        say(POINTERS.format(url=f"http://{named}:{chosen}", port=chosen))

    run(service, Rules(host, api_key, tuple(allow_origin or ())), port, say_where)


def _log_to_stderr(log: logging.Logger) -> None:
    """Print a line for each request, without what is in it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
