"""Conversion, from a source and its options to a directory that loads here and in mlx-vlm."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..checkpoints.hub import is_repository
from ..checkpoints.safetensors import Entry, read_checkpoint_headers, read_index
from ..config import ModelConfig, read_json
from ..errors import CheckpointError
from ..paths import user_path
from .plan import DTYPES, SHORT, Plan, make_plan
from .quantization import AUTO, Bits, Scheme, make_scheme
from .reading.reader import Files, Reader
from .reading.remote import download, remote_files, remote_headers
from .reading.stream import StreamedFiles
from .report import ConversionReport
from .writing.hashes import REPORT
from .writing.packaging import CARD, check_tokenizer, write_card, write_companions
from .writing.partial import (
    DOWNLOADS,
    Identity,
    Partial,
    amount,
    check_same,
    finished_bytes,
    open_partial,
    write_json,
)
from .writing.writer import write_shard

Progress = Callable[[int, int, str], None]
DISK_MARGIN = 64 << 20  # bytes, for what is not weights


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert: `directory` has its small files, and the weights too unless they are streamed.

    repository and commit: where on the hub it came from. is_here: whether the weights are on this disk. remote: size
    and SHA-256 of its files on the hub, when streamed.
    """

    directory: Path
    entries: Mapping[str, Entry]
    repository: str | None = None
    commit: str | None = None
    is_here: bool = True
    remote: Mapping[str, tuple[int, str]] | None = None

    @property
    def identity(self) -> list[list[object]]:
        """A value that changes when the weights do."""
        files = sorted({entry.file for entry in self.entries.values()})
        if self.repository:
            return [[file, self.repository, self.commit] for file in files]
        stats = [(self.directory / file).stat() for file in files]
        return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    bits: Bits = AUTO,
    group_size: int | None = None,
    mode: str = "affine",
    recipe: str = "community",
    overrides: Mapping[str, str] | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    allow_nan: bool = False,
    stream: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Convert the checkpoint in a directory or hub repository to MLX arrays in the new directory `out`.

    bits: for the modules the recipe leaves to the caller; "auto" is the recipe's own and keeps NVFP4 codes, None
    quantizes nothing. group_size: None is the mode's own. overrides: patterns of module paths → bits, a mode or "none".
    dtype: bfloat16, float16 or float32; None is the checkpoint's. revision: of a repository. allow_nan: convert weights
    that are not finite too. stream: take a repository's files one at a time and delete each when it is used up, so that
    the disk holds no more than one of them beside `out`. restart: delete what a stopped conversion to `out` finished.
    progress: called with bytes done, bytes in all and the name of the tensor at work. tell: called with a sentence
    where a stopped conversion is resumed.

    `out` appears only when whole; until then its files are in `out`.partial. That stays, and the same call goes on from
    it, where an interruption or an error leaves finished shards in it; other options are refused beside it, unless with
    `restart`. What can be wrong is looked for before anything is downloaded or written. Raises CheckpointError;
    KeyboardInterrupt passes through.
    """
    started = time.monotonic()
    out = user_path(out).absolute()
    scheme = make_scheme(bits, group_size, mode, recipe, overrides)
    found, plan, identity = _prepare(source, out, scheme, dtype, revision, allow_nan, stream, restart)
    if not found.is_here and not stream:
        found = _downloaded(found)
        plan = _plan(found, scheme, dtype)
    with open_partial(out, identity, restart=restart) as partial:
        resumed = len(partial.finished)
        _check_disk(out, found, plan, sum((partial.path / name).stat().st_size for name in partial.finished))
        if tell and (resumed or partial.damaged):
            tell(_resuming(partial, plan))
        with _files(found, plan, partial) as files:
            _write_shards(plan, partial, Reader(files, allow_nan), progress)
        report = ConversionReport(out, plan, dict(partial.finished), time.monotonic() - started, resumed)
        _write_rest(found, report, partial)
        partial.publish()
    return report


def plan_conversion(
    source: str | Path,
    *,
    bits: Bits = AUTO,
    group_size: int | None = None,
    mode: str = "affine",
    recipe: str = "community",
    overrides: Mapping[str, str] | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> Plan:
    """Plan what `convert_checkpoint` would write with the same arguments. Of a repository only the small files and the
    headers of the large ones are read. Raises CheckpointError.
    """
    scheme = make_scheme(bits, group_size, mode, recipe, overrides)
    return _plan(find_source(source, revision), scheme, dtype)


def check_conversion(
    source: str | Path,
    out: str | Path,
    *,
    bits: Bits = AUTO,
    group_size: int | None = None,
    mode: str = "affine",
    recipe: str = "community",
    overrides: Mapping[str, str] | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    allow_nan: bool = False,
    stream: bool = False,
    restart: bool = False,
    further_bytes: int = 0,
) -> Plan:
    """Look for all that can be wrong before `convert_checkpoint` is called with the same arguments; returns its plan.

    further_bytes: what is going to be written beside `out` in the end. Raises CheckpointError.
    """
    out = user_path(out).absolute()
    scheme = make_scheme(bits, group_size, mode, recipe, overrides)
    return _prepare(source, out, scheme, dtype, revision, allow_nan, stream, restart, further_bytes)[1]


def plan_tensors(
    tensors: Iterable[tuple[str, tuple[int, ...], str]], config: Mapping[str, Any], scheme: Scheme | None = None
) -> Plan:
    """The plan for a checkpoint that exists as a list of (name, shape, safetensors dtype) and a config.json only."""
    entries = [Entry(name, dtype, tuple(shape)) for name, shape, dtype in tensors]
    return make_plan(entries, ModelConfig.from_dict(dict(config)), scheme or make_scheme(), _dtype(config, None))


def find_source(source: str | Path, revision: str | None = None, *, stream: bool = False) -> Source:
    """Find what tells how a checkpoint is converted: its small files, which are downloaded, and all headers.

    Raises CheckpointError for what is no checkpoint that can be converted.
    """
    if not is_repository(source):
        if revision is not None or stream:
            raise CheckpointError(
                f"{source} is a directory, which has no revision and nothing to stream; leave that out."
            )
        directory = user_path(source)
        ModelConfig.from_directory(directory)  # says most plainly what is wrong with another model's directory
        check_tokenizer(directory)
        return Source(directory, read_checkpoint_headers(directory))
    repository = str(source)
    directory = download(repository, revision, weights=False)
    ModelConfig.from_directory(directory)
    check_tokenizer(directory)
    commit = directory.name
    index = read_index(directory)  # refuses names that lead elsewhere before anything is asked for by them
    files = set(index.values()) or {path.name for path in directory.glob("model*.safetensors")}
    if files and all((directory / name).is_file() for name in files) and not stream:
        return Source(directory, read_checkpoint_headers(directory), repository, commit)
    remote = remote_files(repository, commit) if stream else None
    return Source(directory, remote_headers(repository, commit), repository, commit, False, remote)


def _downloaded(source: Source) -> Source:
    """Download the weights of `source`, where it is a repository. Raises CheckpointError."""
    if source.repository is None:
        return source
    directory = download(source.repository, source.commit)
    return replace(source, directory=directory, entries=read_checkpoint_headers(directory), is_here=True)


def _prepare(
    source: str | Path,
    out: Path,
    scheme: Scheme,
    dtype: str | None,
    revision: str | None,
    allow_nan: bool,
    stream: bool,
    restart: bool,
    further_bytes: int = 0,
) -> tuple[Source, Plan, Identity]:
    """Find the source, plan the conversion and look for all that can be wrong. Raises CheckpointError."""
    _check_target(out)
    found = find_source(source, revision, stream=stream)
    plan = _plan(found, scheme, dtype)
    about = f"{found.repository or found.directory} as {plan.recipe_text}"
    identity = Identity(_fingerprint(found, plan, allow_nan), about)
    check_same(out, identity, restart)
    _check_disk(out, found, plan, finished_bytes(out) - further_bytes)
    return found, plan, identity


def _resuming(partial: Partial, plan: Plan) -> str:
    done = sum(
        job.nbytes
        for name, jobs in zip(plan.shard_names, plan.shards, strict=True)
        for job in jobs
        if name in partial.finished
    )
    text = f"Going on with {partial.path}: {len(partial.finished)} of {len(plan.shards)} files are done"
    text += f" ({amount(done)} of {amount(plan.total_bytes)})"
    return f"{text}; {partial.damaged} damaged ones are written again" if partial.damaged else text


def _files(source: Source, plan: Plan, partial: Partial) -> Files:
    if not (source.remote and source.repository and source.commit):
        return Files(source.directory)
    shards = zip(plan.shard_names, plan.shards, strict=True)
    jobs = [job for name, shard in shards if name not in partial.finished for job in shard]
    hashes = {name: sha256 for name, (_, sha256) in source.remote.items()}
    downloads = partial.path / DOWNLOADS
    downloads.mkdir(exist_ok=True)
    return StreamedFiles(source.repository, source.commit, downloads, jobs, hashes)


def _plan(source: Source, scheme: Scheme, dtype: str | None) -> Plan:
    config = read_json(source.directory / "config.json")
    return make_plan(source.entries.values(), ModelConfig.from_dict(config), scheme, _dtype(config, dtype))


def _dtype(config: Mapping[str, Any], asked: str | None) -> str:
    """The asked dtype or the checkpoint's own, in full."""
    text = config.get("text_config") or {}
    own = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16"
    dtype = asked or str(own).removeprefix("torch.")
    dtype = SHORT.get(dtype, dtype)
    if dtype not in DTYPES:
        raise CheckpointError(f"Weights cannot be written as {dtype!r}; choose bfloat16, float16 or float32.")
    return dtype


def _check_target(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already; choose another name or delete it.")
    if not out.parent.is_dir():
        raise CheckpointError(f"There is no directory {out.parent} to write {out.name} in; create it first.")


def _check_disk(out: Path, source: Source, plan: Plan, there: int) -> None:
    """Raise CheckpointError unless the disk has room for what will be written, of which so many bytes are there."""
    download = max((size for size, _ in source.remote.values()), default=0) if source.remote else 0
    needed = plan.file_bytes - there + download + DISK_MARGIN
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise CheckpointError(
            f"{out.parent} has {free / 1e9:.1f} GB free and the conversion needs {needed / 1e9:.1f}; free some space "
            "or choose another disk."
        )


def _write_shards(plan: Plan, partial: Partial, reader: Reader, progress: Progress | None) -> None:
    done = 0

    def tick(count: int, tensor: str) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, plan.total_bytes, tensor)

    # Freed buffers of one slab would otherwise wait for another of the same size.
    cache_limit = mx.set_cache_limit(0)
    try:
        for name, jobs in zip(plan.shard_names, plan.shards, strict=True):
            if name in partial.finished:
                tick(sum(job.nbytes for job in jobs), name)
                continue
            sha256, errors = write_shard(partial.path / name, jobs, reader, DTYPES[plan.dtype], tick)
            partial.finish(name, {"sha256": sha256, "errors": errors})
    finally:
        mx.set_cache_limit(cache_limit)


def _write_rest(source: Source, report: ConversionReport, partial: Partial) -> None:
    write_companions(source.directory, partial.path, report.plan)
    write_json(partial.path / REPORT, report.to_dict())
    write_card(partial.path, report.plan, source.directory / CARD, source.repository, report.evidence())


def _fingerprint(source: Source, plan: Plan, allow_nan: bool) -> str:
    """Equal exactly when finished shards of an earlier run are what this one would write."""
    content = {
        "versions": [__version__, metadata.version("mlx")],
        "source": source.identity,
        "tensors": [[output.name, output.dtype, output.shape] for output in plan.tensors],
        "modules": [repr(job.quantization) for job in plan.jobs],
        "shards": plan.shard_names,
        "allow_nan": allow_nan,
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
