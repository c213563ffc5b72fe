"""The verb `bench`: the repository's benchmark harness for a user's own model and machine."""

from __future__ import annotations

from typing import Annotated

import typer

from horizon_lm.cli.run import one_of

# Other systems that need only this package.
AGAINST = ("torch", "torch-keep")


def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A shape, a Hugging Face folder, or its config.json.")
    ] = "30m",
    length: Annotated[int, typer.Option("--length", help="Tokens of a sequence.", min=2)] = 512,
    sequences: Annotated[int, typer.Option("--sequences", help="Sequences of a step.", min=1)] = 1,
    rows: Annotated[
        int, typer.Option("--rows", help="Sequences of a micro-batch; 0: the planner's choice.", min=0)
    ] = 0,
    layers: Annotated[int, typer.Option("--layers", help="Another depth; 0: the model's.", min=0)] = 0,
    clip: Annotated[float, typer.Option("--clip", help="Gradient norm to clip to; 0: off.", min=0)] = 1.0,
    activations: Annotated[
        str, typer.Option("--activations", help="auto (the planner's choice), recompute or keep.")
    ] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", help="CPU threads; 0: as torch chooses.", min=0)] = 0,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps that are not timed.", min=0)] = 2,
    steps: Annotated[int, typer.Option("--steps", help="Timed steps.", min=1)] = 5,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="torch: plain, recomputing every layer; torch-keep: keeping all."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each system.")] = False,
) -> None:
    """Measure tokens/s, FLOPs, memory and lanes of training.

    Trains a model with random weights on random tokens.

    Nothing is trained that is kept, and no weights are read. Shapes: tiny, 30m, 100m, 350m, qwen3-0.6b,
    qwen3-4b, qwen3-8b, qwen3-30b-a3b, qwen2.5-7b, qwen2.5-14b, llama-3.1-8b.
    """
    wanted = against or []
    one_of("--activations", activations, ("auto", "recompute", "keep"))
    one_of("--dtype", dtype, ("bfloat16", "float32"))
    one_of("--device", device, ("auto", "cpu", "cuda"))
    for name in wanted:
        one_of("--against", name, AGAINST)
    from horizon_lm.bench import user

    case = user.make_case(
        model,
        layers=layers,
        length=length,
        sequences=sequences,
        rows=rows,
        clip=clip or None,
        activations=activations,
        dtype=dtype,
        device=device,
        threads=threads or None,
        warmup=warmup,
        steps=steps,
    )
    if user.run(case, wanted, as_json=json) != "done":
        raise typer.Exit(3)
