"""Figures of the server's work, in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator

from ...events import Stats

_HELP = {
    "requests": ("counter", "Requests answered, by path and status."),
    "prompt_tokens": ("counter", "Tokens of prompts."),
    "cached_tokens": ("counter", "Tokens of prompts that a kept prefix had already."),
    "generated_tokens": ("counter", "Tokens written."),
    "steps": ("counter", "Denoising steps."),
    "prompt_seconds": ("counter", "Time spent reading prompts."),
    "denoise_seconds": ("counter", "Time spent writing."),
    "queue": ("gauge", "Jobs that wait."),
    "prefixes": ("gauge", "Prefixes kept."),
    "prefix_bytes": ("gauge", "Memory of kept prefixes."),
    "memory_bytes": ("gauge", "Memory that MLX holds now."),
    "peak_memory_bytes": ("gauge", "The most that MLX has held in a request."),
}


class Metrics:
    """Counts requests and what they took; any thread may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._peak = 0
        self._jobs = 0
        self._step_seconds = 0.0  # of jobs that denoised

    def answered(self, path: str, status: int) -> None:
        with self._lock:
            self._requests[path, status] += 1

    def worked(self, stats: Stats) -> None:
        """Add what a job took."""
        with self._lock:
            self._jobs += 1
            self._step_seconds += stats.denoise_seconds if stats.steps else 0.0
            self._peak = max(self._peak, stats.peak_memory_bytes)
            for name, value in (
                ("prompt_tokens", stats.prompt_tokens),
                ("cached_tokens", stats.cached_tokens),
                ("generated_tokens", stats.generated_tokens),
                ("steps", sum(stats.steps)),
                ("prompt_seconds", stats.prompt_seconds),
                ("denoise_seconds", stats.denoise_seconds),
            ):
                self._totals[name] += value

    @property
    def seconds_per_job(self) -> float:
        with self._lock:
            return (self._totals["prompt_seconds"] + self._totals["denoise_seconds"]) / max(self._jobs, 1)

    @property
    def seconds_per_step(self) -> float:
        """The mean time of a denoising step so far; 0 before the first."""
        with self._lock:
            return self._step_seconds / max(self._totals["steps"], 1)

    def text(self, gauges: dict[str, int]) -> str:
        """Write all of it. gauges: what is read off rather than counted."""
        return "".join(f"{line}\n" for line in self._lines(gauges))

    def _lines(self, gauges: dict[str, int]) -> Iterator[str]:
        with self._lock:
            requests, totals = dict(self._requests), dict(self._totals)
            gauges = {**gauges, "peak_memory_bytes": self._peak}
        for name, (kind, what) in _HELP.items():
            full = f"mlx_dg_{name}" + ("_total" if kind == "counter" else "")
            yield f"# HELP {full} {what}"
            yield f"# TYPE {full} {kind}"
            if name == "requests":
                for (path, status), count in sorted(requests.items()):
                    yield f'{full}{{path="{path}",status="{status}"}} {count}'
            else:
                yield f"{full} {gauges.get(name, totals.get(name, 0)):g}"
