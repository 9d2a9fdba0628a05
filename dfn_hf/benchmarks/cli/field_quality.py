"""Commands that measure the reconstruction of fields and contrastive training."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .options import Results, Seeds, Threads, results_path
from .output import print_table, report_progress


def fields(
    names: Annotated[list[str] | None, typer.Option("--field", help="A field of the table; repeatable.")] = None,
    side: Annotated[int, typer.Option(min=8, help="Samples per side, to which images are averaged down.")] = 128,
    max_steps: Annotated[int, typer.Option("--max-steps", min=3, help="Training steps of each model.")] = 150,
    recording: Annotated[Path | None, typer.Option(help="WAV file of speech, for runs missing in the CSV.")] = None,
    results: Results = None,
    threads: Threads = 1,
) -> None:
    """Field reconstruction from 1/16 as many entities as samples: adaptive, uniform, and baselines.

    Example: dfn-hf bench fields --field camera
    """
    from ..harness.environment import set_up_device
    from ..quality.fields import FIELDS, FieldSettings, field_runs, fields_table, run_fields

    set_up_device("cpu", threads)
    runs = field_runs(FieldSettings(side=side, steps=max_steps), names or FIELDS)
    path = results_path(results, "fields.csv")
    finished = run_fields(runs, path, recording, report_progress)
    print_table(fields_table(finished), finished, path)


def contrastive(
    tasks: Annotated[list[str] | None, typer.Option("--task", help="verses, sounds or images; repeatable.")] = None,
    seeds: Seeds = 1,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=1, help="Training steps. Default: the tuned number of the task.")
    ] = None,
    recordings: Annotated[
        Path | None, typer.Option(help="Folder of spoken digits for sounds, for runs missing in the CSV.")
    ] = None,
    results: Results = None,
    threads: Threads = 1,
) -> None:
    """Contrastive retrieval of held-out pairs: verses in two languages, sounds and words, images and captions.

    Example: dfn-hf bench contrastive --task images
    """
    from ..harness.environment import set_up_device
    from ..quality.contrastive import TASKS, contrastive_runs, contrastive_table, run_contrastive

    set_up_device("cpu", threads)
    runs = contrastive_runs(tasks or TASKS, range(seeds))
    if max_steps is not None:
        runs = [replace(run, steps=max_steps) for run in runs]
    path = results_path(results, "contrastive.csv")
    finished = run_contrastive(runs, path, recordings or "", report_progress)
    print_table(contrastive_table(finished), finished, path)
