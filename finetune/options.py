"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys to change, such as lora.rank=16.", show_default=False),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
Backend = Annotated[
    str | None, typer.Option("--backend", metavar="NAME", help="One that `finetune doctor` lists; not the recipe's.")
]
Devices = Annotated[
    str | None,
    typer.Option("--devices", metavar="N", help="Processes that share each step, on this machine; all: one per GPU."),
]
Alone = Annotated[bool, typer.Option("--no-supervisor", help="Run training in this process (for debuggers).")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the most probable token.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="The most tokens in an answer.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NAME=TEXT", help="Another column of the prompt, such as input=...; repeatable."),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system text.")]
Tools = Annotated[
    Path | None, typer.Option("--tools", metavar="FILE", help="The tools that the model may call: a JSON list.")
]
SuiteFile = Annotated[
    str | None,
    typer.Option("--suite", metavar="FILE", help='A JSON object a line: {"prompt": ..., "checks": {"contains": ...}}.'),
]
AtLeast = Annotated[
    float | None,
    typer.Option("--at-least", metavar="SHARE", help="Of the suite's cases; else exit code 10 (the interval's end)."),
]
ExportTo = Annotated[
    str, typer.Option("--to", metavar="FORMAT", help="merged, mlx, gguf or ollama.", show_default=False)
]
NumberType = Annotated[
    str | None, typer.Option("--type", metavar="TYPE", help="f32, f16, bf16; GGUF: also q8_0, q6_k, q5_k_m, q4_k_m.")
]
Bits = Annotated[int | None, typer.Option("--bits", help="Quantise an MLX folder: 4, 6 or 8.")]
AdapterAlone = Annotated[bool, typer.Option("--adapter", help="The adapter alone, for a GGUF of the base.")]
ExportFolder = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Instead of a folder in the run's exports/.")
]
VerifiedRows = Annotated[int, typer.Option("--rows", min=2, help="Held-out rows that it is verified on.")]
WithoutRows = Annotated[
    bool, typer.Option("--without-rows", help="Leave every text of the data out of the page, labels too.")
]
