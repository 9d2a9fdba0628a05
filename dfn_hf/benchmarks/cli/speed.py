"""Commands that measure time and memory."""

from typing import Annotated

import typer

from .options import (
    Device,
    HiddenSize,
    Lengths,
    Models,
    NumAttentionHeads,
    NumHiddenLayers,
    Plot,
    Repeats,
    Results,
    Threads,
    Workloads,
    results_path,
)
from .output import print_table, report_progress


def scaling(
    lengths: Annotated[list[int], typer.Option("--length", min=1, help="Tokens of DFN; repeatable.")] = [  # noqa: B006
        2**14,
        2**15,
        2**16,
        2**17,
        2**18,
    ],
    baseline_lengths: Annotated[
        list[int], typer.Option("--baseline-length", min=1, help="Tokens of Llama; repeatable.")
    ] = [2**14, 2**15],  # noqa: B006
    hidden_size: HiddenSize = 256,
    num_hidden_layers: NumHiddenLayers = 2,
    num_attention_heads: NumAttentionHeads = 4,
    repeats: Repeats = 3,
    plot: Plot = None,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Time and memory of a forward pass of DFN and Llama over the length; one fresh process per length.

    Example: dfn-hf bench scaling --length 16384 --length 65536 --length 1048576
    """
    from ..speed.scaling import ScalingSettings, plot_scaling, run_scaling, scaling_table

    settings = ScalingSettings(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    path = results_path(results, "scaling.csv")
    finished = run_scaling(
        settings, lengths=lengths, baseline_lengths=baseline_lengths, path=path, report=report_progress
    )
    figure = plot or path.with_suffix(".png")
    plot_scaling(finished, figure)
    print_table(scaling_table(finished), finished, path)
    typer.echo(f"figure: {figure}")


def paper_lengths(
    lengths: Annotated[list[int] | None, typer.Option("--length", min=1, help="Tokens; repeatable.")] = None,
    hidden_size: HiddenSize = 256,
    num_hidden_layers: NumHiddenLayers = 2,
    repeats: Repeats = 1,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Time and memory of a forward pass over the lengths that the paper's repository reports, up to 768,000 tokens.

    Example: dfn-hf bench paper-lengths --length 32 --length 256000
    """
    from ..speed.paper_lengths import LENGTHS, paper_lengths_table
    from ..speed.scaling import ScalingSettings, run_scaling

    settings = ScalingSettings(
        hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, repeats=repeats, threads=threads, device=device
    )
    path = results_path(results, "paper-lengths.csv")
    finished = run_scaling(
        settings, lengths=sorted(lengths or LENGTHS), baseline_lengths=(), path=path, report=report_progress
    )
    print_table(paper_lengths_table(finished), finished, path)


def million_tokens(
    length: Annotated[int, typer.Option(min=2, help="Tokens.")] = 2**20,
    chunk_length: Annotated[int, typer.Option(min=1, help="Tokens per chunk of the chunked pass.")] = 2**16,
    hidden_size: HiddenSize = 256,
    num_hidden_layers: NumHiddenLayers = 4,
    entity_sampling: Annotated[str, typer.Option(help="token, or adaptive for dynamic chunking of bytes.")] = "token",
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """2^20 tokens in one forward pass and in chunks: time, peak memory, and equality of the last logits.

    Example: dfn-hf bench million-tokens --threads 2
    """
    from ..speed.million_tokens import MillionTokensSettings, million_tokens_table, run_million_tokens

    settings = MillionTokensSettings(
        length=length,
        chunk_length=chunk_length,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        entity_sampling=entity_sampling,
        threads=threads,
        device=device,
    )
    path = results_path(results, "million-tokens.csv")
    result = run_million_tokens(settings, path)
    print_table(million_tokens_table(settings, result), [(settings, result)], path)


def field_speed(
    sides: Annotated[list[int] | None, typer.Option("--side", min=8, help="Samples per side; repeatable.")] = None,
    results: Results = None,
    threads: Threads = 1,
) -> None:
    """Time and peak memory of a forward pass over images of 125² to 1,000² samples.

    Example: dfn-hf bench field-speed --side 125 --side 250
    """
    from ..speed.field_speed import SIDES, FieldSpeedSettings, field_speed_table, run_field_speed

    path = results_path(results, "field-speed.csv")
    runs = [FieldSpeedSettings(side=side, threads=threads) for side in sides or SIDES]
    finished = run_field_speed(runs, path, report_progress)
    print_table(field_speed_table(finished), finished, path)


def throughput(
    models: Models = ["flownetwork", "llama"],  # noqa: B006
    workloads: Workloads = None,
    lengths: Lengths = [2**13, 2**14, 2**15, 2**16, 2**17],  # noqa: B006
    longest_quadratic: Annotated[
        int, typer.Option(help="Maximum length of training steps and of models with full attention.")
    ] = 2**14,
    repeats: Repeats = 3,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Models of equal size over the length. Workloads: forward, training, decoding.

    Example: dfn-hf bench speed --model flownetwork --model flow-transformer --model llama --workload training
    """
    from ..speed.throughput import WORKLOADS, SpeedSettings, run_speed, speed_table

    linear = ("dfn", "flownetwork")
    runs = [
        SpeedSettings(model=model, workload=workload, length=length, repeats=repeats, threads=threads, device=device)
        for workload in workloads or WORKLOADS
        for length in lengths
        for model in models
        if length <= longest_quadratic or (workload != "training" and model in linear)
    ]
    path = results_path(results, "speed.csv")
    finished = run_speed(runs, path, report_progress)
    print_table(speed_table(finished), finished, path)


def seq2seq_speed(
    models: Models = ["liquid", "liquid-no-lstm", "t5"],  # noqa: B006
    workloads: Workloads = None,
    lengths: Lengths = [2**11, 2**12, 2**13, 2**14, 2**15, 2**16],  # noqa: B006
    longest_quadratic: Annotated[
        int, typer.Option(help="Maximum length of T5, and of workloads with source and target of this length.")
    ] = 2**12,
    repeats: Repeats = 3,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Liquid and a T5 over the length. Workloads: encoder, decoder, joint, training, decoding.

    Example: dfn-hf bench seq2seq-speed --model liquid --workload encoder
    """
    from ..speed.seq2seq_speed import WORKLOADS, Seq2SeqSpeedSettings, run_seq2seq_speed
    from ..speed.throughput import speed_table

    runs = [
        Seq2SeqSpeedSettings(
            model=model, workload=workload, length=length, repeats=repeats, threads=threads, device=device
        )
        for workload in workloads or WORKLOADS
        for length in lengths
        for model in models
        if length <= longest_quadratic or (workload not in ("joint", "training") and model != "t5")
    ]
    path = results_path(results, "seq2seq-speed.csv")
    finished = run_seq2seq_speed(runs, path, report_progress)
    print_table(speed_table(finished), finished, path)


def search(
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help="Distribution of the positions; repeatable. Default: all.")
    ] = None,
    position_dims: Annotated[
        list[int], typer.Option("--position-dim", min=1, help="Dimensions of the positions; repeatable.")
    ] = [4, 8],  # noqa: B006
    lengths: Annotated[list[int], typer.Option("--length", min=1, help="Entities of the row; repeatable.")] = [  # noqa: B006
        2**12,
        2**14,
        2**17,
        2**20,
    ],
    num_leaves: Annotated[
        int | None, typer.Option(min=1, help="Leaves of the tree that a query reads. Default: that of a DFN.")
    ] = None,
    timed_queries: Annotated[
        int, typer.Option(min=300, help="Last entities of the row, whose search is timed.")
    ] = 2048,
    repeats: Repeats = 3,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Neighbour search of one head: recall against the exact search, time per query, bytes of the index per entity.

    Example: dfn-hf bench search --shape clusters --position-dim 4 --length 131072
    """
    from ..speed.tree_search import SHAPES, SearchSettings, run_search, search_runs, search_table

    settings = SearchSettings(
        num_leaves=num_leaves or SearchSettings.num_leaves,
        timed_queries=timed_queries,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    runs = search_runs(settings, shapes=shapes or list(SHAPES), position_dims=position_dims, lengths=lengths)
    path = results_path(results, "search.csv")
    finished = run_search(runs, path, report_progress)
    print_table(search_table(finished), finished, path)
