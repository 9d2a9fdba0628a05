"""Commands that measure ablations, the neighbour search, translation, reversal and quantization."""

from typing import Annotated

import typer

from .options import Device, LearningRates, MaxSteps, Results, Seeds, Threads, results_path
from .output import print_table, report_progress


def ablations(
    variants: Annotated[
        list[str] | None, typer.Option("--variant", help="Name of a variant; repeatable. Default: all.")
    ] = None,
    seeds: Seeds = 2,
    lm_steps: Annotated[int, typer.Option(min=1, help="Training steps of the byte language model.")] = 400,
    recall_steps: Annotated[int, typer.Option(min=1, help="Training steps of the recall model.")] = 1000,
    long_length: Annotated[int, typer.Option(help="Tokens of the long recall task.")] = 2048,
    long_num_pairs: Annotated[int, typer.Option(help="Key-value pairs of the long recall task.")] = 120,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Ablations of DFN: loss, accuracy, long recall, memory and gradient norm with one part removed or changed.

    Example: dfn-hf bench ablations --variant full --variant "no far neighbours (K = 0)"
    """
    from ..quality.ablations import VARIANTS, AblationSettings, ablation_table, run_ablations

    runs = [
        AblationSettings(
            variant=variant,
            seed=seed,
            lm_steps=lm_steps,
            recall_steps=recall_steps,
            long_length=long_length,
            long_num_pairs=long_num_pairs,
            device=device,
        )
        for variant in variants or VARIANTS
        for seed in range(seeds)
    ]
    path = results_path(results, "ablations.csv")
    finished = run_ablations(runs, path, threads, report_progress)
    print_table(ablation_table(finished), finished, path)


def neighbor_ranking(
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the language models.")] = 250,
    recall_steps: Annotated[int, typer.Option(min=1, help="Training steps of the recall model.")] = 1000,
    recall_length: Annotated[int, typer.Option(min=480, help="Tokens of the recall task.")] = 2048,
    length: Annotated[int, typer.Option(min=64, help="Tokens per window of the first language model.")] = 1024,
    long_length: Annotated[int, typer.Option(min=64, help="Tokens per window of the second one.")] = 4096,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """DFN with neighbours ranked by distance, by distance and age, and by distance, age and influence.

    Example: dfn-hf bench neighbor-ranking --seeds 1 --steps 100
    """
    from ..harness.environment import set_up_device
    from ..quality.neighbor_ranking import NO_NEIGHBORS, RANKINGS, RankingSettings, ranking_table, run_rankings

    set_up_device(device, threads)
    runs = [
        RankingSettings(
            ranking=ranking,
            seed=seed,
            length=length,
            long_length=long_length,
            steps=steps,
            recall_steps=recall_steps,
            recall_length=recall_length,
            device=device,
        )
        for seed in range(seeds)
        for ranking in (*RANKINGS, NO_NEIGHBORS)
    ]
    path = results_path(results, "neighbor-ranking.csv")
    finished = run_rankings(runs, path, report_progress)
    print_table(ranking_table(finished), finished, path)


def search_settings(
    seeds: Seeds = 3,
    lm_steps: Annotated[int, typer.Option(min=1, help="Training steps of the language model.")] = 250,
    lm_length: Annotated[int, typer.Option(min=2, help="Tokens per window of the language model.")] = 4096,
    recall_steps: Annotated[int, typer.Option(min=1, help="Training steps of the recall model.")] = 1000,
    recall_length: Annotated[int, typer.Option(min=480, help="Tokens of the recall task.")] = 8192,
    retrieval_steps: Annotated[int, typer.Option(min=1, help="Training steps of the retrieval model.")] = 600,
    tuning_steps: Annotated[int, typer.Option(min=0, help="Its fine-tuning steps.")] = 750,
    context_length: Annotated[int, typer.Option(help="Tokens per context of the retrieval task.")] = 2**17,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of the retrieval task.")] = 5,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """DFN with more or fewer position dimensions, neighbours and leaves: language, recall, retrieval, time.

    Example: dfn-hf bench search-settings --seeds 1
    """
    from ..harness.environment import set_up_device
    from ..quality.search_settings import (
        CHOICES,
        LEAVES,
        SearchSettingsRun,
        run_search_settings,
        search_settings_table,
    )

    set_up_device(device, threads)
    runs = [
        SearchSettingsRun(
            position_dim=position_dim,
            num_neighbors=num_neighbors,
            num_leaves=num_leaves,
            seed=seed,
            lm_steps=lm_steps,
            lm_length=lm_length,
            recall_steps=recall_steps,
            recall_length=recall_length,
            retrieval_steps=retrieval_steps,
            tuning_steps=tuning_steps,
            context_length=context_length,
            contexts=contexts,
            threads=threads,
            device=device,
        )
        for seed in range(seeds)
        for position_dim, num_neighbors in CHOICES
        for num_leaves in LEAVES
    ]
    path = results_path(results, "search-settings.csv")
    finished = run_search_settings(runs, path, report_progress)
    print_table(search_settings_table(finished), finished, path)


def isolation(
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A model of the table; repeatable. Default: all.")
    ] = None,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Differences of logits: packed documents and documents alone, cropped tokens and tokens never read.

    Example: dfn-hf bench isolation --model dfn --model llama
    """
    from ..quality.isolation import MODELS, IsolationSettings, isolation_table, run_isolation

    runs = [IsolationSettings(model=model, threads=threads, device=device) for model in models or MODELS]
    path = results_path(results, "isolation.csv")
    finished = run_isolation(runs, path, report_progress)
    print_table(isolation_table(finished), finished, path)


def translation(
    models: Annotated[
        list[str],
        typer.Option("--model", help="liquid, t5, or an ablation of liquid such as 'no LSTM'; repeatable."),
    ] = ["liquid", "t5"],  # noqa: B006
    seeds: Seeds = 1,
    max_steps: MaxSteps = 10000,
    search_steps: Annotated[
        int, typer.Option(min=0, help="Training steps of the learning-rate search; 0 trains fully at every rate.")
    ] = 600,
    learning_rates: LearningRates = [1e-3, 2e-3, 4e-3],  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per training step.")] = 32,
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs of each split. Default: all.")] = None,
    scores: Annotated[
        bool, typer.Option(help="Translate the test split, with its sources and with shuffled sources.")
    ] = True,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """English-Spanish translation of the bundled verses: Liquid, a T5 of equal size, and ablations of Liquid.

    Example: dfn-hf bench translation --model liquid --model "no LSTM" --max-steps 800 --no-scores
    """
    from ..harness.environment import set_up_device
    from ..quality.translation import TranslationSettings, run_translation, translation_table

    set_up_device(device, threads)
    path = results_path(results, "translation.csv")
    finished = run_translation(
        TranslationSettings(steps=max_steps, batch_size=batch_size, pairs=pairs, scored=scores, device=device),
        models=models,
        seeds=range(seeds),
        learning_rates=learning_rates,
        search_steps=search_steps,
        path=path,
        report=report_progress,
    )
    print_table(translation_table(finished), finished, path)


def reversal(
    seeds: Seeds = 3,
    max_steps: MaxSteps = 600,
    results: Results = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """String reversal with Liquid: strings of 32 letters, attention windows of 8.

    Example: dfn-hf bench reversal --seeds 1 --threads 2
    """
    from ..harness.environment import set_up_device
    from ..quality.reversal import ReversalSettings, reversal_table, run_reversal

    set_up_device(device, threads)
    path = results_path(results, "reversal.csv")
    runs = [ReversalSettings(seed=seed, steps=max_steps, device=device) for seed in range(seeds)]
    finished = run_reversal(runs, path, report_progress)
    print_table(reversal_table(finished), finished, path)


def quantization(
    checkpoints: Annotated[
        list[str] | None, typer.Option("--checkpoint", help="Bundled checkpoint; repeatable. Default: all.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="Format, such as bfloat16 or 'bitsandbytes NF4'; repeatable. Default: all."),
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Validation texts of a language model.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="Validation pairs of an encoder-decoder.")] = 256,
    results: Results = None,
    threads: Threads = 1,
) -> None:
    """Loss of the bundled checkpoints in bfloat16 and in the formats of bitsandbytes and torchao.

    Example: dfn-hf bench quantization --checkpoint dfn-tiny --format "bitsandbytes NF4"
    """
    from ..harness.environment import set_up_device
    from ..quality.quantization import CHECKPOINTS, FORMATS, QuantizationSettings, quantization_table, run_quantization

    set_up_device("cpu", threads)
    runs = [
        QuantizationSettings(checkpoint, name, documents, pairs)
        for checkpoint in checkpoints or CHECKPOINTS
        for name in ("float32", *(formats or FORMATS))
    ]
    path = results_path(results, "quantization.csv")
    finished = run_quantization(runs, path, report_progress)
    print_table(quantization_table(finished), finished, path)
