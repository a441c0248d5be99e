"""`dsv4c synth CONFIG -o DIR`: a random checkpoint in the release's names and formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4c.cli.console import print_json, progress_bar, size
from dsv4c.cli.options import ConfigArgument, JsonOption, OverwriteOption
from dsv4c.config import load_config
from dsv4c.models.synth import synthesize

OutputOption = Annotated[
    Path, typer.Option("-o", "--output", help="Folder to write.", metavar="DIR", show_default=False)
]
SeedOption = Annotated[int, typer.Option(help="What the numbers depend on, with the tensor's name.")]
ShardsOption = Annotated[
    int | None, typer.Option(help="Number of files.", min=1, show_default="as many as keep each near 2 GB")
]


def register(app: typer.Typer) -> None:
    app.command("synth")(synth_command)


def synth_command(
    config: ConfigArgument,
    output: OutputOption,
    seed: SeedOption = 0,
    shards: ShardsOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Write a random checkpoint of a model, for tests and benchmarks.

    Examples:

      dsv4c synth tiny -o tiny-weights --seed 1

      dsv4c synth my-config.json -o weights --shards 4 --overwrite
    """
    model = load_config(config)
    with progress_bar("synth", bytes_counted=True) as progress:
        folder = synthesize(model, output, seed, shards, overwrite=overwrite, progress=progress)
    files = sorted(path.name for path in folder.iterdir())
    written = sum((folder / name).stat().st_size for name in files)
    if json:
        print_json(
            {"folder": str(folder), "config": model.name, "seed": seed, "bytes": written, "files": files}
        )
    else:
        print(f"{folder}: {model.name}, {size(written)} in {len(files)} files, seed {seed}")
