"""The bits that each module gets: modes and recipes as data, and what they make of one checkpoint. No arrays here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal

from ..config import Quantization
from ..errors import CheckpointError

ASKED: Final = "asked"  # the bits the caller asks for
AUTO: Final = "auto"  # the recipe's own bits, and codes that a source already has in NVFP4 stay as they are
Bits = int | Literal["auto"] | None


@dataclass(frozen=True)
class Mode:
    """The choices that `mx.quantize` offers in one mode; the first of each is the default."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]


QUANTIZATION_MODES = {
    "affine": Mode(bits=(4, 2, 3, 5, 6, 8), group_sizes=(64, 32, 128)),
    "mxfp4": Mode(bits=(4,), group_sizes=(32,)),
    "mxfp8": Mode(bits=(8,), group_sizes=(32,)),
    "nvfp4": Mode(bits=(4,), group_sizes=(16,)),
}
NVFP4 = Quantization(group_size=16, bits=4, mode="nvfp4")


@dataclass(frozen=True)
class Recipe:
    """Bits per group of modules (`names.GROUPS`); a group that is not named stays unquantized.

    bits: what ASKED means when the caller says nothing. total_bytes: the weights at true shapes. macs: where they run
    with 8k tokens of context, as `plan.fitting_mac` says it.
    """

    summary: str
    bits: int
    groups: Mapping[str, int | Literal["asked"]]
    total_bytes: int
    macs: str

    def __str__(self) -> str:
        return f"{self.summary}; {self.total_bytes / 1e9:.1f} GB, {self.macs}"


RECIPES = {
    "community": Recipe(
        summary="mlx-community's: 4-bit experts, the rest of the language model at 8",
        bits=4,
        groups={
            "experts": ASKED,
            "self-conditioning": ASKED,
            "vision projection": ASKED,
            "embedding": 8,
            "attention": 8,
            "dense MLP": 8,
            "router": 8,
        },
        total_bytes=16_542_844_632,
        macs="fits Macs from 32 GB, or 24 GB after `sudo sysctl iogpu.wired_limit_mb=17300`",
    ),
    "compact": Recipe(
        summary="4-bit experts, the rest at 4 to 6: for 24 GB Macs",
        bits=4,
        groups={
            "experts": ASKED,
            "self-conditioning": 4,
            "vision projection": 4,
            "embedding": 5,
            "attention": 5,
            "dense MLP": 5,
            "router": 6,
        },
        total_bytes=15_646_275_288,
        macs="fits Macs from 24 GB",
    ),
    "small": Recipe(
        summary="3-bit experts, the rest at 4 to 6: the least that is useful",
        bits=3,
        groups={
            "experts": ASKED,
            "self-conditioning": 4,
            "vision projection": 4,
            "embedding": 4,
            "attention": 4,
            "dense MLP": 4,
            "router": 6,
        },
        total_bytes=12_493_571_800,
        macs="fits Macs from 24 GB, or 16 GB after `sudo sysctl iogpu.wired_limit_mb=13200`",
    ),
    "fidelity": Recipe(
        summary="8-bit experts and projections, embedding and router unquantized: fewest steps",
        bits=8,
        groups={
            "experts": ASKED,
            "self-conditioning": ASKED,
            "vision projection": ASKED,
            "attention": ASKED,
            "dense MLP": ASKED,
        },
        total_bytes=28_674_578_136,
        macs="fits Macs from 48 GB, or 36 GB after `sudo sysctl iogpu.wired_limit_mb=29400`",
    ),
}


@dataclass(frozen=True)
class Scheme:
    """A choice of quantization for every module of a checkpoint. Build it with `make_scheme`, which checks it.

    asked: for the recipe's ASKED groups; None leaves everything unquantized.
    keep_nvfp4: carry over the modules that the source has in NVFP4.
    overrides: (pattern of module paths, quantization) pairs; the last that matches wins.
    """

    recipe: str
    asked: Quantization | None
    keep_nvfp4: bool
    overrides: tuple[tuple[str, Quantization | None], ...] = ()

    def for_module(self, path: str, group: str, is_nvfp4: bool) -> Quantization | None:
        """The quantization of the module at `path`; None where it stays unquantized."""
        for pattern, quantization in reversed(self.overrides):
            if matches(path, pattern):
                return quantization
        bits = RECIPES[self.recipe].groups.get(group)
        if self.asked is None or bits is None:
            return None
        if is_nvfp4 and self.keep_nvfp4:
            return NVFP4
        return self.asked if bits == ASKED else _affine(self.asked, bits)


def _affine(asked: Quantization, bits: int) -> Quantization:
    is_affine = asked.mode == "affine"
    return Quantization(asked.group_size if is_affine else QUANTIZATION_MODES["affine"].group_sizes[0], bits)


def make_scheme(
    bits: Bits = AUTO,
    group_size: int | None = None,
    mode: str = "affine",
    recipe: str = "community",
    overrides: Mapping[str, str] | None = None,
) -> Scheme:
    """The scheme that the caller's options describe. Raises CheckpointError for what MLX or the recipes lack."""
    if recipe not in RECIPES:
        raise CheckpointError(f"There is no recipe {recipe!r}; choose one of {', '.join(RECIPES)}.")
    parsed = tuple((pattern, parse_setting(text, group_size)) for pattern, text in (overrides or {}).items())
    if bits is None:
        return Scheme(recipe, None, False, parsed)
    default = RECIPES[recipe].bits if mode == "affine" else None
    asked = make_quantization(default if bits == AUTO else bits, group_size, mode)
    return Scheme(recipe, asked, bits == AUTO and mode in ("affine", "nvfp4"), parsed)


def make_quantization(bits: int | None, group_size: int | None, mode: str) -> Quantization:
    """A quantization that MLX has; None means the mode's default. Raises CheckpointError."""
    if mode not in QUANTIZATION_MODES:
        raise CheckpointError(f"MLX has no quantization mode {mode!r}; choose one of {', '.join(QUANTIZATION_MODES)}.")
    offered = QUANTIZATION_MODES[mode]
    bits = offered.bits[0] if bits is None else bits
    group_size = offered.group_sizes[0] if group_size is None else group_size
    for value, choices, what in ((bits, offered.bits, "bits"), (group_size, offered.group_sizes, "group size")):
        if value not in choices:
            listed = ", ".join(str(choice) for choice in sorted(choices))
            raise CheckpointError(f"MLX has no {what} {value!r} in {mode} mode; choose from {listed}.")
    return Quantization(group_size, bits, mode)


def parse_setting(text: str, group_size: int | None = None) -> Quantization | None:
    """Read an override: a number of bits, a mode, or "none" for unquantized. Raises CheckpointError."""
    if text == "none":
        return None
    if text in QUANTIZATION_MODES and text != "affine":
        return make_quantization(None, None, text)
    if not text.isdecimal():
        modes = ", ".join(mode for mode in QUANTIZATION_MODES if mode != "affine")
        raise CheckpointError(f"A module cannot be set to {text!r}; give a number of bits, {modes}, or none.")
    return make_quantization(
        int(text), group_size if group_size in QUANTIZATION_MODES["affine"].group_sizes else None, "affine"
    )


def matches(path: str, pattern: str) -> bool:
    """Whether a shell-style pattern covers the module at `path`, with or without the leading `model.decoder.`."""
    return any(fnmatchcase(path, prefix + pattern) for prefix in ("", "model.decoder.", "model.encoder."))


def as_config(default: Quantization, modules: Mapping[str, Quantization | None]) -> dict[str, object]:
    """The `quantization` object of config.json as mlx-community writes it: overrides only where they differ.

    `modules` are all the quantizable ones by path; the unquantized are told by their lack of scales, not listed.
    """
    content: dict[str, object] = {"group_size": default.group_size, "bits": default.bits, "mode": default.mode}
    for path, module in modules.items():
        if module is not None and module != default:
            override: dict[str, object] = {"group_size": module.group_size, "bits": module.bits}
            if module.mode != "affine":  # an override without a mode is affine
                override["mode"] = module.mode
            content[path] = override
    return content
