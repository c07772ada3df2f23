"""The verb `mlx-dg train`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..common import Model, Yes, number, whole


def train(
    context: typer.Context,
    model: Model = None,
    data: Annotated[str | None, typer.Option("--data", metavar="DIR", help="The folder with the examples.")] = None,
    config: Annotated[
        str | None, typer.Option("-c", "--config", metavar="FILE", help="A YAML file with these settings.")
    ] = None,
    train: Annotated[bool | None, typer.Option("--train", help="Train; needed only beside --test.")] = None,
    test: Annotated[
        bool | None, typer.Option("--test", help="Measure on test.jsonl, after training or without.")
    ] = None,
    adapter_path: Annotated[
        str | None, typer.Option("--adapter-path", metavar="DIR", help="Where the adapter is kept [adapters].")
    ] = None,
    iters: Annotated[
        int | None, typer.Option("--iters", metavar="N", parser=whole(1), help="Updates of the weights [2000].")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", parser=whole(1), help="Examples computed at once [1].")
    ] = None,
    grad_accumulation_steps: Annotated[
        int | None,
        typer.Option(
            "--grad-accumulation-steps", metavar="N", parser=whole(1), help="Batches that make one update [8]."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", metavar="X", parser=number(0, above=True), help="The highest learning rate [1.5e-4]."
        ),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", metavar="NAME", help="adam, adamw, muon, sgd or adafactor [adamw].")
    ] = None,
    fine_tune_type: Annotated[
        str | None, typer.Option("--fine-tune-type", metavar="TYPE", help="lora, dora or full [lora].")
    ] = None,
    lora_keys: Annotated[
        str | None,
        typer.Option(
            "--lora-keys",
            metavar="KEY,…",
            help="all-linear, self-conditioning, attention, mlp, router, experts or paths [attention,mlp].",
        ),
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option("--num-layers", metavar="N", parser=whole(-1), help="Train the last N layers, -1 for all [-1]."),
    ] = None,
    towers: Annotated[
        str | None,
        typer.Option(
            "--towers", metavar="WHICH", help="One adapter shared by both towers, separate, or decoder [shared]."
        ),
    ] = None,
    mask_prompt: Annotated[
        bool | None, typer.Option("--mask-prompt/--no-mask-prompt", help="Learn no next tokens of prompts.")
    ] = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option("--max-seq-length", metavar="N", parser=whole(2), help="Most tokens of an example [2048]."),
    ] = None,
    grad_checkpoint: Annotated[
        bool | None,
        typer.Option("--grad-checkpoint/--no-grad-checkpoint", help="Compute more and keep less in memory."),
    ] = None,
    clear_cache_threshold: Annotated[
        str | None,
        typer.Option("--clear-cache-threshold", metavar="SIZE", help="Freed memory to keep for reuse [1GB]."),
    ] = None,
    val_batches: Annotated[
        int | None,
        typer.Option("--val-batches", metavar="N", parser=whole(-1), help="Batches of a validation, -1 for all [25]."),
    ] = None,
    test_batches: Annotated[
        int | None,
        typer.Option("--test-batches", metavar="N", parser=whole(-1), help="Batches of the test, -1 for all [500]."),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option("--generate", metavar="N", parser=whole(0), help="Also answer N examples when validating [0]."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option("--patience", metavar="N", parser=whole(1), help="Stop after N validations without progress."),
    ] = None,
    steps_per_report: Annotated[
        int | None, typer.Option("--steps-per-report", metavar="N", parser=whole(1), help="Updates per line [10].")
    ] = None,
    steps_per_eval: Annotated[
        int | None,
        typer.Option("--steps-per-eval", metavar="N", parser=whole(1), help="Updates per validation [200]."),
    ] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", metavar="N", parser=whole(1), help="Updates per save [100].")
    ] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Go on with the run in --adapter-path.")] = None,
    resume_adapter_file: Annotated[
        str | None,
        typer.Option("--resume-adapter-file", metavar="FILE", help="Begin a new run with these weights."),
    ] = None,
    export_peft: Annotated[
        str | None, typer.Option("--export-peft", metavar="DIR", help="Also write the adapter as PEFT's.")
    ] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="DIR", help="A folder with examples of what it shall not forget.")
    ] = None,
    mix_share: Annotated[
        float | None,
        typer.Option("--mix-share", metavar="X", parser=number(0, 0.99), help="Their share of all examples [0.05]."),
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option("--report-to", metavar="WHERE,…", help="A .jsonl file, wandb or swanlab, for the figures."),
    ] = None,
    project_name: Annotated[
        str | None, typer.Option("--project-name", metavar="NAME", help="How those call it [the folder's name].")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", parser=whole(0), help="Of every draw of the run [0].")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the memory that it needs, and which Macs fit.")] = False,
    yes: Yes = False,
) -> None:
    """Teach the model a task: train an adapter on examples of it.

    The folder of --data holds train.jsonl and, if you like, valid.jsonl and test.jsonl, with an example on each line:
    {"messages": [...], "tools": [...]} or {"prompt": "...", "completion": "..."}, as mlx_lm.lora reads them. What is
    not given is taken from the file of --config, spelled as mlx_lm.lora's, else from the model's own recipe. Ctrl-C
    ends training with everything saved; --resume goes on from there.
    """
    from .planning import print_plan
    from .running import run
    from .settings import SETTINGS, make_settings

    given = {name: value for name, value in context.params.items() if name in SETTINGS and value is not None}
    settings = make_settings(given, config)
    if plan:
        print_plan(settings)
        return
    if settings.data is None:
        raise typer.BadParameter("give the folder with the examples", param_hint="'--data'")
    run(settings, yes=yes)
