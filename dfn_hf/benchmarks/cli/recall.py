"""Commands that measure recall."""

from typing import Annotated

import typer

from .options import Device, Lengths, MaxSteps, Models, Results, Seeds, Threads, results_path
from .output import print_table, report_progress


def associative_recall(
    models: Models = ["dfn", "llama-conv"],  # noqa: B006
    seeds: Seeds = 3,
    max_steps: MaxSteps = 1000,
    tuning_steps: Annotated[int, typer.Option(min=0, help="Fine-tuning steps at 512 tokens.")] = 400,
    long_length: Annotated[int, typer.Option(help="Tokens of the evaluation before fine-tuning.")] = 2048,
    longest_length: Annotated[int, typer.Option(help="Tokens of the evaluation after fine-tuning.")] = 8192,
    long_num_pairs: Annotated[int, typer.Option(help="Key-value pairs of both evaluations.")] = 120,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Associative recall: training on 64 tokens with 8 pairs, evaluation on 2,048 and 8,192 tokens with 120 pairs.

    Example: dfn-hf bench recall --seeds 1 --model dfn
    """
    from ..harness.environment import set_up_device
    from ..recall.associative_recall import RecallSettings, recall_table, run_recall

    set_up_device(device, threads)
    runs = [
        RecallSettings(
            model=model,
            seed=seed,
            steps=max_steps,
            tuning_steps=tuning_steps,
            long_length=long_length,
            long_num_pairs=long_num_pairs,
            longest_length=longest_length,
            longest_num_pairs=long_num_pairs,
            device=device,
        )
        for model in models
        for seed in range(seeds)
    ]
    path = results_path(results, "recall.csv")
    finished = run_recall(runs, path, report_progress)
    print_table(recall_table(finished), finished, path)


def retrieval(
    lengths: Lengths = [2**14, 2**17, 2**20],  # noqa: B006
    contexts: Annotated[int, typer.Option(min=1, help="Contexts per length, with five pairs at each depth.")] = 10,
    control_contexts: Annotated[int, typer.Option(min=0, help="Contexts read without far neighbours too.")] = 2,
    seeds: Seeds = 3,
    max_steps: Annotated[int, typer.Option("--max-steps", min=1, help="Training steps on 64 tokens.")] = 600,
    tuning_steps: Annotated[int, typer.Option(min=0, help="Fine-tuning steps of 8 rows of 1,024 tokens.")] = 250,
    chunk_length: Annotated[int, typer.Option(min=1, help="Tokens per forward pass.")] = 2**16,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Retrieval of key-value pairs planted at 1, 50 and 99 % of contexts of up to 2^20 random tokens.

    Example: dfn-hf bench retrieval --length 16384 --length 131072
    """
    from ..harness.environment import set_up_device
    from ..recall.retrieval import RetrievalSettings, retrieval_table, run_retrieval

    set_up_device(device, threads)
    runs = [
        RetrievalSettings(
            length=length,
            context=context,
            num_neighbors=num_neighbors,
            seed=seed,
            chunk_length=chunk_length,
            steps=max_steps,
            tuning_steps=tuning_steps,
            threads=threads,
            device=device,
        )
        for seed in range(seeds)
        for length in lengths
        for num_neighbors, count in ((RetrievalSettings.num_neighbors, contexts), (0, control_contexts))
        for context in range(count)
    ]
    path = results_path(results, "retrieval.csv")
    finished = run_retrieval(runs, path, report_progress)
    print_table(retrieval_table(finished), finished, path)


def memory(
    memory_sizes: Annotated[list[int], typer.Option("--memory-size", help="Memory slots; repeatable.")] = [8, 0],  # noqa: B006
    seeds: Seeds = 3,
    max_steps: MaxSteps = 1000,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Recall with FlowNetwork's memory: an answer beyond the reach of its windows, with and without memory.

    Example: dfn-hf bench memory --seeds 1
    """
    from ..harness.environment import set_up_device
    from ..recall.memory_recall import MemoryRecallSettings, memory_recall_table, run_memory_recall

    set_up_device(device, threads)
    runs = [
        MemoryRecallSettings(memory_size=size, seed=seed, steps=max_steps, device=device)
        for size in memory_sizes
        for seed in range(seeds)
    ]
    path = results_path(results, "memory.csv")
    finished = run_memory_recall(runs, path, report_progress)
    print_table(memory_recall_table(finished), finished, path)
