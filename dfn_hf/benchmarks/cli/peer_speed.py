"""Commands that measure compared models and operations in round-robin order."""

from typing import Annotated

import typer

from .options import (
    Device,
    HiddenSize,
    IntermediateSize,
    Lengths,
    Models,
    NumAttentionHeads,
    NumHiddenLayers,
    Plot,
    Repeats,
    Results,
    Threads,
    TimeLimit,
    Workloads,
    results_path,
)
from .output import print_table, report_progress

PEER_LENGTHS = [2**power for power in range(10, 17)]
TRAINING_LENGTHS = PEER_LENGTHS[:5]
HEAD_LENGTHS = [4**power for power in range(5, 11)]


def peers(
    models: Models = ["dfn", "llama", "lfm2", "mamba2", "reformer"],  # noqa: B006
    workloads: Workloads = None,
    lengths: Lengths = PEER_LENGTHS,
    training_lengths: Annotated[
        list[int], typer.Option("--training-length", min=2, help="Tokens of a training step; repeatable.")
    ] = TRAINING_LENGTHS,
    caches: Annotated[
        list[str], typer.Option("--cache", help="Cache of decoding: dynamic, or static and compiled; repeatable.")
    ] = ["dynamic"],  # noqa: B006
    time_limit: TimeLimit = 15.0,
    interleave_lengths: Annotated[
        bool, typer.Option(help="Alternate between all lengths and skip none; memory must suffice for all of them.")
    ] = False,
    hidden_size: HiddenSize = 128,
    num_hidden_layers: NumHiddenLayers = 4,
    num_attention_heads: NumAttentionHeads = 4,
    intermediate_size: IntermediateSize = 512,
    dtype: Annotated[str, typer.Option(help="Dtype of the model: float32, bfloat16, …")] = "float32",
    repeats: Repeats = 3,
    plot: Plot = None,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """DFN and other families with equal size over the length. Workloads: forward, training, prefill, decoding.

    Example: dfn-hf bench peers --model dfn --model llama --workload decoding --cache dynamic --cache static
    """
    from ..harness.length_plots import plot_lengths
    from ..speed.peers import WORKLOADS, PeerSettings, peer_runs, peers_table, run_peers

    settings = PeerSettings(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        dtype=dtype,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    runs = peer_runs(
        settings,
        models=models,
        workloads=workloads or WORKLOADS,
        lengths=lengths,
        training_lengths=training_lengths,
        caches=caches,
    )
    path = results_path(results, "peers.csv")
    finished = run_peers(runs, time_limit, path, report_progress, interleave_lengths=interleave_lengths)
    plot_lengths(finished, figure := plot or path.with_suffix(".png"))
    print_table(peers_table(finished), finished, path)
    typer.echo(f"figure: {figure}")


def single_head(
    names: Annotated[
        list[str] | None, typer.Option("--operation", help="An operation of the table; repeatable. Default: all.")
    ] = None,
    workloads: Workloads = None,
    lengths: Lengths = HEAD_LENGTHS,
    time_limit: TimeLimit = 60.0,
    heads: Annotated[int, typer.Option(min=1, help="Heads, each with separate positions.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the values. Default: float32 on a CPU, bfloat16 on a GPU.")
    ] = None,
    repeats: Repeats = 3,
    plot: Plot = None,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """One head of flow attention and of torch's causal attention. Workloads: forward, forward and backward.

    Example: dfn-hf bench single-head --length 4096 --length 16384 --workload forward
    """
    from ..harness.length_plots import lengths_table, plot_lengths
    from ..speed.single_head import WORKLOADS, SingleHeadSettings, operations, run_single_head

    runs = [
        SingleHeadSettings(
            operation=name,
            workload=workload,
            length=length,
            heads=heads,
            dtype=dtype or ("float32" if device == "cpu" else "bfloat16"),
            repeats=repeats,
            threads=threads,
            device=device,
        )
        for workload in workloads or WORKLOADS
        for length in sorted(lengths)
        for name in names or operations(device)
    ]
    path = results_path(results, "single-head.csv")
    finished = run_single_head(runs, time_limit, path, report_progress)
    plot_lengths(finished, figure := plot or path.with_suffix(".png"))
    print_table(lengths_table(finished, "µs per token" if heads == 1 else "µs per token and head"), finished, path)
    typer.echo(f"figure: {figure}")
