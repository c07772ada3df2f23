"""A benchmark's report and a memory plan as a person reads them: tables for rich to print."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .measuring import Plan, Report

BAR = 24  # cells of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"


def render(report: Report) -> Group:
    """The whole report: machine, ceilings, a step's components, speed."""
    parts: list[RenderableType] = [_machine(report), _ceilings(report), _components(report), _speed(report)]
    parts += [_rows(report), Text(report.decoders.recommendation, style="bold")]
    if report.against:
        ratio = report.natural.tokens_per_second / report.against.tokens_per_second
        parts.append(
            Text(f"On the same prompts this writes {ratio:.3g}× as fast as {report.against.model} through mlx-lm.")
        )
    return Group(*parts)


def render_plan(plan: Plan) -> Group:
    """Render what running needs: weights, keys and values, one step; what some uses add; and which Macs have it."""
    memory = plan.memory
    table = Table(title=f"Memory with {plan.context:,} tokens of context", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    table.add_column("")
    for name, size in (("weights", memory.weights), ("keys and values", memory.cache), ("one step", memory.step)):
        table.add_row(name, f"{size / 1e9:.3f}", bar(size / memory.total))
    table.add_section()
    table.add_row("in all", f"{memory.total / 1e9:.3f}", "")
    table.add_section()
    table.add_row("more in a chat, to undo a turn", f"{memory.snapshot / 1e9:.3f}", "")
    table.add_row("more while infilling", f"{memory.rows / 1e9:.3f}", "")
    texts = [Text(f"To answer: {plan.macs}.")]
    if plan.macs_to_infill != plan.macs:
        texts.append(Text(f"To infill: {plan.macs_to_infill}."))
    return Group(table, *texts, _predictions(plan))


def bar(share: float) -> str:
    """A bar for 0 to 1, to an eighth of a cell."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _predictions(plan: Plan) -> Group:
    """Narrow enough for a terminal of 40 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("chip", "step", "tok/s", "token", "tok/s", "ratio"):
        table.add_column(name, justify="left" if name == "chip" else "right")
    for own in plan.predictions:
        rates = own.diffusion_tokens_per_second, own.autoregressive_tokens_per_second
        times = (f"{seconds * 1e3:.{0 if seconds > 0.1 else 1}f}" for seconds in (own.step_seconds, own.token_seconds))
        step, token = times
        table.add_row(own.chip, step, f"{rates[0]:.0f}", token, f"{rates[1]:.0f}", f"{rates[1] / rates[0]:.1f}×")
    head = Text("Predicted, not measured, with these weights: ")
    head.append(
        "ms a step and tokens/s of diffusion, ms a token and tokens/s left to right, and the second by the first."
    )
    return Group(head, table)


def _rows(report: Report) -> Table:
    """Plot what a step costs by its rows, beside a token left to right."""
    speeds = report.decoders
    table = Table(title="A pass by its rows", title_justify="left")
    table.add_column("rows", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("")
    most = max(*speeds.step_seconds.values(), speeds.token_seconds)
    table.add_row("1, left to right", f"{speeds.token_seconds * 1e3:.1f}", bar(speeds.token_seconds / most))
    for rows, seconds in speeds.step_seconds.items():
        table.add_row(f"{rows}, denoised", f"{seconds * 1e3:.1f}", bar(seconds / most))
    table.add_section()
    table.add_row("a step is", f"{speeds.tokens_per_step:.1f}", "tokens left to right")
    return table


def _machine(report: Report) -> Text:
    machine = report.machine
    text = Text(f"{machine.chip}, {machine.memory_bytes / 2**30:.0f} GiB, {machine.system}, mlx {machine.mlx}")
    if machine.device == "CPU":
        text.append("\nMeasured on the CPU: these numbers say nothing about a GPU.", style="bold")
    return text


def _ceilings(report: Report) -> Table:
    best = report.best
    table = Table(title="This machine at best", title_justify="left")
    table.add_column("operation")
    table.add_column("rate", justify="right")
    for name, rate in (("square matrix product", best.matrix_operations_per_second), *report.ceilings.items()):
        table.add_row(name, f"{rate / 1e9:,.{0 if rate > 1e10 else 2}f} GFLOP/s")
    table.add_row("copy", f"{best.copied_bytes_per_second / 1e9:,.1f} GB/s")
    table.add_row("launch", f"{best.launch_seconds * 1e6:.1f} µs")
    return table


def _components(report: Report) -> Table:
    title = f"One step: {report.canvas_tokens} tokens after {report.prefix_tokens:,}"
    table = Table(title=title, title_justify="left")
    table.add_column("component")
    table.add_column("ms", justify="right")
    table.add_column("share of the step")
    table.add_column("of the ceiling", justify="right")
    for part in report.components:
        share = bar(part.seconds / report.step_seconds)
        table.add_row(part.name, f"{part.seconds * 1e3:.1f}", share, f"{part.share_of_ceiling:.0%}")
    rest = report.step_seconds - sum(part.seconds for part in report.components)
    if rest > 0:
        table.add_row("norms, sums, the rest", f"{rest * 1e3:.1f}", bar(rest / report.step_seconds), "")
    table.add_section()
    table.add_row("a whole step", f"{report.step_seconds * 1e3:.1f}", "", "")
    return table


def _speed(report: Report) -> Table:
    natural = report.natural
    table = Table(title="Speed", title_justify="left")
    table.add_column("")
    table.add_column("tokens/s", justify="right")
    table.add_column("ms a step", justify="right")
    table.add_column("")
    for work in report.fixed:
        name = f"{work.steps} steps a canvas"
        table.add_row(name, f"{work.tokens_per_second:.1f}", f"{work.seconds_per_step * 1e3:.1f}", "fixed work")
    taken = sum(natural.steps)
    spread = ", ".join(f"{steps}×{count}" for steps, count in natural.distribution.items())
    table.add_row(
        "natural stop",
        f"{natural.tokens_per_second:.1f}",
        f"{natural.seconds / taken * 1e3:.1f}" if taken else "",
        f"{taken / len(natural.steps):.1f} steps a canvas (steps×canvases: {spread})" if taken else "",
    )
    if report.against:
        rival = report.against
        note = f"autoregressive, peak {rival.peak_memory_bytes / 1e9:.2f} GB"
        table.add_row(rival.model, f"{rival.tokens_per_second:.1f}", "", note)
    for name, replies in report.decoders.replies.items():
        kept = f"{replies.tokens_per_pass:.1f} tokens a causal pass" if name == "speculative" else "natural stop"
        table.add_row(f"decoder {name}", f"{replies.tokens_per_second:.1f}", "", kept)
    table.add_row("prefill", f"{report.prefill_tokens_per_second:.1f}", "", f"{report.prefix_tokens:,} tokens")
    first, peak = natural.first_seconds, natural.peak_memory_bytes / 1e9
    table.add_section()
    table.add_row("first canvas", "", "", f"after {first:.2f} s (median)")
    table.add_row("peak memory", "", "", f"{peak:.2f} GB")
    return table
