"""Commands that measure the quality of language models."""

from typing import Annotated

import typer

from .options import (
    BatchSize,
    Device,
    EvaluationWindows,
    HiddenSize,
    IntermediateSize,
    LearningRates,
    MaxSteps,
    Models,
    NumAttentionHeads,
    NumHiddenLayers,
    Results,
    SearchSteps,
    Seeds,
    Threads,
    results_path,
)
from .output import print_table, report_progress


def lm(
    models: Models = ["dfn", "llama", "llama-conv"],  # noqa: B006
    seeds: Seeds = 3,
    max_steps: MaxSteps = 800,
    search_steps: SearchSteps = 150,
    learning_rates: LearningRates = [1e-3, 3e-3, 6e-3],  # noqa: B006
    batch_size: BatchSize = 8,
    length: Annotated[int, typer.Option(min=2, help="Bytes per window.")] = 256,
    hidden_size: HiddenSize = 128,
    num_hidden_layers: NumHiddenLayers = 5,
    num_attention_heads: NumAttentionHeads = 4,
    intermediate_size: IntermediateSize = 384,
    evaluation_windows: EvaluationWindows = 256,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Byte language models of equal size on the same batches: DFN, Llama, Llama with DFN's convolution and gate.

    Example: dfn-hf bench lm --seeds 1 --max-steps 400
    """
    from ..harness.environment import set_up_device
    from ..quality.byte_lm import ByteLMSettings, byte_lm_table, run_byte_lm

    set_up_device(device, threads)
    settings = ByteLMSettings(
        steps=max_steps,
        batch_size=batch_size,
        length=length,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        evaluation_windows=evaluation_windows,
        device=device,
    )
    path = results_path(results, "lm.csv")
    finished = run_byte_lm(
        settings,
        models=models,
        seeds=range(seeds),
        learning_rates=learning_rates,
        search_steps=search_steps,
        path=path,
        report=report_progress,
    )
    print_table(byte_lm_table(finished), finished, path)


def long_lm(
    models: Models = ["dfn", "llama"],  # noqa: B006
    seeds: Seeds = 1,
    max_steps: MaxSteps = 600,
    search_steps: SearchSteps = 40,
    learning_rates: LearningRates = [1.5e-3, 3e-3, 6e-3],  # noqa: B006
    batch_size: BatchSize = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 4096,
    hidden_size: HiddenSize = 256,
    num_hidden_layers: NumHiddenLayers = 4,
    num_attention_heads: NumAttentionHeads = 4,
    intermediate_size: IntermediateSize = 384,
    evaluation_windows: EvaluationWindows = 64,
    tokenizer: Annotated[str, typer.Option(help="bpe or byte.")] = "bpe",
    data: Annotated[str, typer.Option(help="File or folder of texts, or corpus for the bundled corpus.")] = "corpus",
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Language models of equal size on long windows of contiguous text: loss by position.

    Example: dfn-hf bench long-lm --max-steps 200

    30 million parameters at 32,768 tokens: dfn-hf bench long-lm --length 32768 --hidden-size 512
    --num-hidden-layers 12 --num-attention-heads 8 --intermediate-size 1536 --max-steps 4000 --data texts/
    --device cuda
    """
    from ..harness.environment import set_up_device
    from ..quality.long_lm import LongLMSettings, long_lm_table, run_long_lm

    set_up_device(device, threads)
    settings = LongLMSettings(
        steps=max_steps,
        batch_size=batch_size,
        length=length,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        evaluation_windows=evaluation_windows,
        tokenizer=tokenizer,
        data=data,
        device=device,
    )
    path = results_path(results, "long-lm.csv")
    finished = run_long_lm(
        settings,
        models=models,
        seeds=range(seeds),
        learning_rates=learning_rates,
        search_steps=search_steps,
        path=path,
        report=report_progress,
    )
    print_table(long_lm_table(finished), finished, path)


def byte_chunking(
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A model of the table; repeatable. Default: all.")
    ] = None,
    seeds: Seeds = 3,
    max_steps: MaxSteps = 800,
    batch_size: BatchSize = 4,
    length: Annotated[int, typer.Option(min=2, help="Bytes per window.")] = 512,
    search_steps: SearchSteps = 400,
    learning_rates: LearningRates = [1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2],  # noqa: B006
    evaluation_windows: EvaluationWindows = 128,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Byte language models with dynamic chunking: adaptive and fixed chunks, one entity per byte, and Llamas.

    Example: dfn-hf bench byte-chunking --seeds 1 --model adaptive
    """
    from ..harness.environment import set_up_device
    from ..quality.byte_chunking import MODELS, ByteChunkingSettings, byte_chunking_table, run_byte_chunking

    set_up_device(device, threads)
    path = results_path(results, "byte-chunking.csv")
    finished = run_byte_chunking(
        ByteChunkingSettings(
            steps=max_steps,
            batch_size=batch_size,
            length=length,
            evaluation_windows=evaluation_windows,
            device=device,
        ),
        models=models or MODELS,
        seeds=range(seeds),
        learning_rates=learning_rates,
        search_steps=search_steps,
        path=path,
        report=report_progress,
    )
    print_table(byte_chunking_table(finished), finished, path)
