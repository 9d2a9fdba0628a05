"""`dfn-hf bench`: the measurements behind the README's tables, each resumable and printed from its CSV."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    help="Measure. Every finished run is appended to a CSV, and runs already there are not repeated.",
)

Results = Annotated[Path, typer.Option("--results", help="CSV of finished runs; made where missing.")]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds: 0, 1, 2, …")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Models = Annotated[list[str], typer.Option("--model", help="Such as dfn, flownetwork, llama, llama-conv; repeat it.")]
LearningRates = Annotated[list[float], typer.Option("--learning-rate", help="A rate to try; repeat it for several.")]
Lengths = Annotated[list[int], typer.Option("--length", min=1, help="Tokens for DFN; repeat it for several.")]
BaselineLengths = Annotated[list[int], typer.Option("--baseline-length", min=1, help="Tokens for Llama; repeat it.")]

TimeLimit = Annotated[
    float, typer.Option(min=0, help="Seconds: where a pass would take longer, by the lengths before, it is left out.")
]

RESULTS_FOLDER = Path("benchmarks-results")


@app.callback()
def options(
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Every table at its smallest; exit code 1 where one lacks a row.")
    ] = False,
) -> None:
    if not smoke:
        return
    from .smoke import run_smoke

    lacking = run_smoke(report=typer.echo)
    for line in lacking:
        typer.echo(line, err=True)
    raise typer.Exit(1 if lacking else 0)


@app.command()
def recall(
    models: Models = ["dfn", "llama-conv"],  # noqa: B006
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps on the short task.")] = 1000,
    tuning_steps: Annotated[int, typer.Option(min=0, help="Fine-tuning steps on the middle length.")] = 400,
    long_length: Annotated[int, typer.Option(help="Length of the zero-shot task.")] = 2048,
    longest_length: Annotated[int, typer.Option(help="Length of the task after fine-tuning.")] = 8192,
    long_num_pairs: Annotated[int, typer.Option(help="Key-value pairs in both.")] = 120,
    results: Results = RESULTS_FOLDER / "recall.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Associative recall: trained on 64 tokens with 8 pairs, asked at 2,048 and 8,192 with 120.

    Example: dfn-hf bench recall --seeds 1 --model dfn
    """
    from ..harness.environment import set_up_device
    from ..recall.associative_recall import RecallSettings, recall_table, run_recall

    set_up_device(device, threads)
    runs = [
        RecallSettings(
            model=model,
            seed=seed,
            steps=steps,
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
    finished = run_recall(runs, results, _report)
    _print(recall_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def bytes(
    models: Annotated[list[str] | None, typer.Option("--model", help="One of the table's; repeat it.")] = None,
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 800,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Bytes per window.")] = 512,
    search_steps: Annotated[int, typer.Option(min=1, help="Steps of the short runs that pick a learning rate.")] = 400,
    learning_rates: LearningRates = [1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2],  # noqa: B006
    evaluation_windows: Annotated[int, typer.Option(help="Windows of the validation split.")] = 128,
    results: Results = RESULTS_FOLDER / "bytes.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Bytes without tokens: entities where what follows is uncertain, beside one per byte, fixed spans and Llamas.

    Example: dfn-hf bench bytes --seeds 1 --model adaptive
    """
    from ..harness.environment import set_up_device
    from ..quality.byte_chunking import MODELS, ByteEntitySettings, byte_entities_table, run_byte_entities

    set_up_device(device, threads)
    settings = ByteEntitySettings(
        steps=steps,
        batch_size=batch_size,
        length=length,
        evaluation_windows=evaluation_windows,
        device=device,
    )
    finished = run_byte_entities(
        settings,
        models=models or MODELS,
        seeds=range(seeds),
        learning_rates=learning_rates,
        search_steps=search_steps,
        path=results,
        report=_report,
    )
    _print(byte_entities_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def fields(
    names: Annotated[list[str] | None, typer.Option("--field", help="One of the table's; repeat it.")] = None,
    side: Annotated[int, typer.Option(min=8, help="Images are averaged down to it.")] = 128,
    steps: Annotated[int, typer.Option(min=3, help="Training steps of each model.")] = 150,
    recording: Annotated[Path | None, typer.Option(help="WAV file of speech, where it has not been measured.")] = None,
    results: Results = RESULTS_FOLDER / "fields.csv",
    threads: Threads = 1,
) -> None:
    """Fields from a sixteenth as many entities: sampled adaptively, uniformly, and other ways to hold a field.

    Example: dfn-hf bench fields --field camera
    """
    from ..harness.environment import set_up_device
    from ..quality.fields import FIELDS, FieldSettings, field_runs, fields_table, run_fields

    set_up_device("cpu", threads)
    runs = field_runs(FieldSettings(side=side, steps=steps), names or FIELDS)
    finished = run_fields(runs, results, recording, _report)
    _print(fields_table(finished), {measures.machine for _, measures in finished}, results)


@app.command("field-speed")
def field_speed(
    sides: Annotated[list[int] | None, typer.Option("--side", min=8, help="Samples a side; repeat it.")] = None,
    results: Results = RESULTS_FOLDER / "field-speed.csv",
    threads: Threads = 1,
) -> None:
    """Images of 125² to 1,000² samples in one forward pass: time and peak memory.

    Example: dfn-hf bench field-speed --side 125 --side 250
    """
    from ..speed.field_speed import SIDES, FieldSpeedSettings, field_speed_table, run_field_speed

    finished = run_field_speed([FieldSpeedSettings(side=side, threads=threads) for side in sides or SIDES], results)
    _print(field_speed_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def contrastive(
    tasks: Annotated[list[str] | None, typer.Option("--task", help="verses, sounds or images; repeat it.")] = None,
    seeds: Seeds = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps. Default: those that suit the task.")
    ] = None,
    recordings: Annotated[
        Path | None, typer.Option(help="Folder of spoken digits for sounds, where they have not been measured.")
    ] = None,
    results: Results = RESULTS_FOLDER / "contrastive.csv",
    threads: Threads = 1,
) -> None:
    """Pairs find each other among held-out ones: verses in two languages, sounds and words, images and captions.

    Example: dfn-hf bench contrastive --task images
    """
    from ..harness.environment import set_up_device
    from ..quality.contrastive import TASKS, contrastive_table, planned_runs, run_contrastive

    set_up_device("cpu", threads)
    runs = planned_runs(tasks or TASKS, range(seeds))
    if steps is not None:
        runs = [replace(run, steps=steps) for run in runs]
    finished = run_contrastive(runs, results, recordings or "", _report)
    _print(contrastive_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def lm(
    models: Models = ["dfn", "llama", "llama-conv"],  # noqa: B006
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 800,
    search_steps: Annotated[int, typer.Option(min=1, help="Steps of the short runs that pick a learning rate.")] = 150,
    learning_rates: LearningRates = [1e-3, 3e-3, 6e-3],  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Bytes per window.")] = 256,
    hidden_size: Annotated[int, typer.Option(min=1)] = 128,
    num_hidden_layers: Annotated[int, typer.Option(min=1)] = 5,
    num_attention_heads: Annotated[int, typer.Option(min=1)] = 4,
    intermediate_size: Annotated[int, typer.Option(min=1, help="The DFN's; a Llama's follows.")] = 384,
    evaluation_windows: Annotated[int, typer.Option(min=1, help="Validation windows.")] = 256,
    results: Results = RESULTS_FOLDER / "lm.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Byte language models of equal size on the same batches: DFN, Llama, Llama with DFN's convolution and gate.

    Example: dfn-hf bench lm --seeds 1 --steps 400
    """
    from ..harness.environment import set_up_device
    from ..quality.byte_lm import ByteLMSettings, byte_lm_table, run_byte_lm

    set_up_device(device, threads)
    settings = ByteLMSettings(
        steps=steps,
        batch_size=batch_size,
        length=length,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        evaluation_windows=evaluation_windows,
        device=device,
    )
    finished = run_byte_lm(
        settings,
        models=models,
        seeds=range(seeds),
        learning_rates=learning_rates,
        search_steps=search_steps,
        path=results,
        report=_report,
    )
    _print(byte_lm_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def ablations(
    variants: Annotated[
        list[str] | None, typer.Option("--variant", help="A variant by its name; all of them by default.")
    ] = None,
    seeds: Seeds = 2,
    lm_steps: Annotated[int, typer.Option(min=1, help="Training steps of the byte language model.")] = 400,
    recall_steps: Annotated[int, typer.Option(min=1, help="Training steps of the recall model.")] = 1000,
    long_length: Annotated[int, typer.Option(help="Length of the long recall task.")] = 2048,
    long_num_pairs: Annotated[int, typer.Option(help="Key-value pairs in it.")] = 120,
    results: Results = RESULTS_FOLDER / "ablations.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """DFN with one part off or changed at a time: loss, accuracy, long recall, memory, gradient norm.

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
    finished = run_ablations(runs, results, threads, _report)
    _print(ablation_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def scaling(
    lengths: Lengths = [2**14, 2**15, 2**16, 2**17, 2**18],  # noqa: B006
    baseline_lengths: BaselineLengths = [2**14, 2**15],  # noqa: B006
    hidden_size: Annotated[int, typer.Option(min=1)] = 256,
    num_hidden_layers: Annotated[int, typer.Option(min=1)] = 2,
    num_attention_heads: Annotated[int, typer.Option(min=1)] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes; their median counts.")] = 3,
    plot: Annotated[Path | None, typer.Option(help="PNG to write; beside the CSV by default.")] = None,
    results: Results = RESULTS_FOLDER / "scaling.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Time and memory of a forward pass over the length, DFN beside Llama; a fresh process per length.

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
    finished = run_scaling(settings, lengths=lengths, baseline_lengths=baseline_lengths, path=results, report=_report)
    picture = plot or results.with_suffix(".png")
    plot_scaling(finished, picture)
    _print(scaling_table(finished), {measures.machine for _, measures in finished}, results)
    typer.echo(f"picture: {picture}")


@app.command()
def paper(
    lengths: Annotated[list[int] | None, typer.Option("--length", min=1, help="Tokens; repeat it.")] = None,
    hidden_size: Annotated[int, typer.Option(min=1)] = 256,
    num_hidden_layers: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes; their median counts.")] = 1,
    results: Results = RESULTS_FOLDER / "paper.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """The lengths that the paper's repository reports, up to 768,000 tokens: time and peak memory of a forward pass.

    Example: dfn-hf bench paper --length 32 --length 256000
    """
    from ..speed.paper_lengths import LENGTHS, paper_table
    from ..speed.scaling import ScalingSettings, run_scaling

    settings = ScalingSettings(
        hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, repeats=repeats, threads=threads, device=device
    )
    finished = run_scaling(
        settings, lengths=sorted(lengths or LENGTHS), baseline_lengths=(), path=results, report=_report
    )
    _print(paper_table(finished), {measures.machine for _, measures in finished}, results)


@app.command("long-lm")
def long_lm(
    models: Models = ["dfn", "llama"],  # noqa: B006
    seeds: Seeds = 1,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 600,
    search_steps: Annotated[int, typer.Option(min=1, help="Steps of the short runs that pick a learning rate.")] = 40,
    learning_rates: LearningRates = [1.5e-3, 3e-3, 6e-3],  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 4096,
    hidden_size: Annotated[int, typer.Option(min=1)] = 256,
    num_hidden_layers: Annotated[int, typer.Option(min=1)] = 4,
    num_attention_heads: Annotated[int, typer.Option(min=1)] = 4,
    intermediate_size: Annotated[int, typer.Option(min=1, help="The DFN's; a Llama's follows.")] = 384,
    evaluation_windows: Annotated[int, typer.Option(min=1, help="Held-out windows, at most.")] = 64,
    tokenizer: Annotated[str, typer.Option(help="bpe or byte.")] = "bpe",
    data: Annotated[str, typer.Option(help="File or folder of texts; corpus is the embedded one.")] = "corpus",
    results: Results = RESULTS_FOLDER / "long-lm.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Language models of equal size on the same long windows of contiguous text: the loss by position.

    Example: dfn-hf bench long-lm --steps 200

    Thirty million parameters at 32,768 tokens: dfn-hf bench long-lm --length 32768 --hidden-size 512
    --num-hidden-layers 12 --num-attention-heads 8 --intermediate-size 1536 --steps 4000 --data texts/ --device cuda
    """
    from ..harness.environment import set_up_device
    from ..quality.long_lm import LongLMSettings, long_lm_table, run_long_lm

    set_up_device(device, threads)
    settings = LongLMSettings(
        steps=steps,
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
    finished = run_long_lm(
        settings,
        models=models,
        seeds=range(seeds),
        learning_rates=learning_rates,
        search_steps=search_steps,
        path=results,
        report=_report,
    )
    _print(long_lm_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def million(
    length: Annotated[int, typer.Option(min=2, help="Tokens.")] = 2**20,
    chunk_length: Annotated[int, typer.Option(min=1, help="Tokens per chunk of the second way.")] = 2**16,
    hidden_size: Annotated[int, typer.Option(min=1)] = 256,
    num_hidden_layers: Annotated[int, typer.Option(min=1)] = 4,
    entity_sampling: Annotated[
        str, typer.Option(help="token, or adaptive: bytes are sampled into entities.")
    ] = "token",
    results: Results = RESULTS_FOLDER / "million.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """2^20 tokens in one forward pass and in chunks: time, peak memory, and equal last logits.

    Example: dfn-hf bench million --threads 2
    """
    from ..speed.million_tokens import MillionSettings, million_table, run_million

    settings = MillionSettings(
        length=length,
        chunk_length=chunk_length,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        entity_sampling=entity_sampling,
        threads=threads,
        device=device,
    )
    measures = run_million(settings, results)
    _print(million_table(settings, measures), {measures.machine}, results)


@app.command()
def retrieval(
    lengths: Lengths = [2**14, 2**17, 2**20],  # noqa: B006
    contexts: Annotated[int, typer.Option(min=1, help="Contexts per length, five pairs at each depth of each.")] = 10,
    control_contexts: Annotated[int, typer.Option(min=0, help="Of them read without far neighbours too.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Training steps on 64 tokens.")] = 600,
    lessons: Annotated[
        int, typer.Option(min=0, max=4, help="Of the fine-tuning: on 1,024, 8,192, 16,384 tokens, and again.")
    ] = 4,
    chunk_length: Annotated[int, typer.Option(min=1, help="Tokens read at a time.")] = 2**16,
    results: Results = RESULTS_FOLDER / "retrieval.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Key-value pairs planted at 1, 50 and 99 % of up to 2^20 random tokens and asked for behind them.

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
            chunk_length=chunk_length,
            steps=steps,
            lessons=lessons,
            threads=threads,
            device=device,
        )
        for length in lengths
        for num_neighbors, count in ((RetrievalSettings.num_neighbors, contexts), (0, control_contexts))
        for context in range(count)
    ]
    finished = run_retrieval(runs, results, _report)
    _print(retrieval_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def memory(
    memory_sizes: Annotated[list[int], typer.Option("--memory-size", help="Slots; repeat it for several.")] = [8, 0],  # noqa: B006
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1000,
    results: Results = RESULTS_FOLDER / "memory.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """A FlowNetwork's memory: recall of an answer from far before its windows, with memory and without.

    Example: dfn-hf bench memory --seeds 1
    """
    from ..harness.environment import set_up_device
    from ..recall.memory_recall import MemoryRecallSettings, memory_recall_table, run_memory_recall

    set_up_device(device, threads)
    runs = [
        MemoryRecallSettings(memory_size=size, seed=seed, steps=steps, device=device)
        for size in memory_sizes
        for seed in range(seeds)
    ]
    finished = run_memory_recall(runs, results, _report)
    _print(memory_recall_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def reversal(
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 600,
    results: Results = RESULTS_FOLDER / "reversal.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """A Liquid that reverses strings of 32 letters with windows of 8.

    Example: dfn-hf bench reversal --seeds 1 --threads 2
    """
    from ..harness.environment import set_up_device
    from ..quality.reversal import ReversalSettings, reversal_table, run_reversal

    set_up_device(device, threads)
    runs = [ReversalSettings(seed=seed, steps=steps, device=device) for seed in range(seeds)]
    finished = run_reversal(runs, results, _report)
    _print(reversal_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def translation(
    models: Annotated[
        list[str], typer.Option("--model", help="liquid, t5, or liquid with one part off, as 'no LSTM'; repeat it.")
    ] = ["liquid", "t5"],  # noqa: B006
    seeds: Seeds = 1,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 10000,
    search_steps: Annotated[
        int, typer.Option(min=0, help="Steps of the short runs that pick a learning rate; 0 shows every rate in full.")
    ] = 600,
    learning_rates: LearningRates = [1e-3, 2e-3, 4e-3],  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per step.")] = 32,
    pairs: Annotated[int | None, typer.Option(min=1, help="Of each split, the first so many; all by default.")] = None,
    scores: Annotated[
        bool, typer.Option(help="Translate the test split, with its own and with shuffled sources.")
    ] = True,
    results: Results = RESULTS_FOLDER / "translation.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """English to Spanish on the embedded verses: Liquid beside a T5 of equal size, and Liquid with one part off.

    Example: dfn-hf bench translation --model liquid --model "no LSTM" --steps 800 --no-scores
    """
    from ..harness.environment import set_up_device
    from ..quality.translation import TranslationSettings, run_translation, translation_table

    set_up_device(device, threads)
    finished = run_translation(
        TranslationSettings(steps=steps, batch_size=batch_size, pairs=pairs, scored=scores, device=device),
        models=models,
        seeds=range(seeds),
        learning_rates=learning_rates,
        search_steps=search_steps,
        path=results,
        report=_report,
    )
    _print(translation_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def quantization(
    checkpoints: Annotated[
        list[str] | None, typer.Option("--checkpoint", help="An embedded one; repeat it. Default: all.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="Such as bfloat16, 'bitsandbytes NF4'; repeat it. Default: all."),
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Validation texts of a language model.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="Validation pairs of an encoder-decoder.")] = 256,
    results: Results = RESULTS_FOLDER / "quantization.csv",
    threads: Threads = 1,
) -> None:
    """What bfloat16, bitsandbytes and torchao do to the loss of the embedded checkpoints.

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
    finished = run_quantization(runs, results, _report)
    _print(quantization_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def speed(
    models: Models = ["flownetwork", "llama"],  # noqa: B006
    works: Annotated[
        list[str] | None, typer.Option("--work", help="forward, training or decoding; repeat it. Default: all.")
    ] = None,
    lengths: Lengths = [2**13, 2**14, 2**15, 2**16, 2**17],  # noqa: B006
    longest_quadratic: Annotated[
        int, typer.Option(help="Models with attention over everything, and every training step, are left out beyond.")
    ] = 2**14,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions; their median counts.")] = 3,
    results: Results = RESULTS_FOLDER / "speed.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Forward pass, training step and decoding of models of equal size, over the length.

    Example: dfn-hf bench speed --model flownetwork --model flow-transformer --model llama --work training
    """
    from ..speed.throughput import WORKS, SpeedSettings, run_speed, speed_table

    linear = ("dfn", "flownetwork")
    runs = [
        SpeedSettings(model=model, work=work, length=length, repeats=repeats, threads=threads, device=device)
        for work in works or WORKS
        for length in lengths
        for model in models
        if length <= longest_quadratic or (work != "training" and model in linear)
    ]
    finished = run_speed(runs, results, _report)
    _print(speed_table(finished), {measures.machine for _, measures in finished}, results)


@app.command()
def peers(
    models: Annotated[
        list[str], typer.Option("--model", help="dfn, llama, lfm2, mamba2, reformer, gla, …; repeat it.")
    ] = ["dfn", "llama", "lfm2", "mamba2", "reformer"],  # noqa: B006
    works: Annotated[
        list[str] | None,
        typer.Option("--work", help="forward, training, prefill or decoding; repeat it. Default: all."),
    ] = None,
    lengths: Annotated[list[int], typer.Option("--length", min=1, help="Tokens; repeat it.")] = [  # noqa: B006
        2**power for power in range(10, 17)
    ],
    training_lengths: Annotated[
        list[int], typer.Option("--training-length", min=2, help="Tokens of a training step; repeat it.")
    ] = [2**power for power in range(10, 15)],  # noqa: B006
    caches: Annotated[
        list[str], typer.Option("--cache", help="Of decoding: dynamic, or static and compiled; repeat it.")
    ] = ["dynamic"],  # noqa: B006
    time_limit: TimeLimit = 15.0,
    together: Annotated[
        bool, typer.Option(help="All lengths take turns, too, and none is left out: memory is needed for all at once.")
    ] = False,
    hidden_size: Annotated[int, typer.Option(min=1)] = 128,
    num_hidden_layers: Annotated[int, typer.Option(min=1)] = 4,
    num_attention_heads: Annotated[int, typer.Option(min=1)] = 4,
    intermediate_size: Annotated[int, typer.Option(min=1, help="The DFN's; others' follow.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, …: of weights and states.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns behind a warm-up; their median counts.")] = 3,
    plot: Annotated[Path | None, typer.Option(help="PNG to write; beside the CSV by default.")] = None,
    results: Results = RESULTS_FOLDER / "peers.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """DFN beside models of other families and equal size, over the length; they take turns, each in a fresh process.

    Example: dfn-hf bench peers --model dfn --model llama --work decoding --cache dynamic --cache static
    """
    from ..harness.length_plots import plot_lengths
    from ..speed.peers import WORKS, PeerSettings, peer_runs, peers_table, run_peers

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
        works=works or WORKS,
        lengths=lengths,
        training_lengths=training_lengths,
        caches=caches,
    )
    finished = run_peers(runs, time_limit, results, _report, together=together)
    plot_lengths(finished, picture := plot or results.with_suffix(".png"))
    _print(peers_table(finished), {timing.machine for _, timing in finished}, results)
    typer.echo(f"picture: {picture}")


@app.command()
def operation(
    names: Annotated[
        list[str] | None, typer.Option("--operation", help="One of the table's; repeat it. Default: all.")
    ] = None,
    works: Annotated[
        list[str] | None, typer.Option("--work", help="forward, or 'forward and backward'; repeat it. Default: both.")
    ] = None,
    lengths: Annotated[list[int], typer.Option("--length", min=1, help="Tokens; repeat it.")] = [  # noqa: B006
        4**power for power in range(5, 11)
    ],
    time_limit: TimeLimit = 60.0,
    heads: Annotated[int, typer.Option(min=1, help="Heads, each with its own positions.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="Of values. Default: float32 on a CPU, bfloat16 on a GPU.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns behind a warm-up; their median counts.")] = 3,
    plot: Annotated[Path | None, typer.Option(help="PNG to write; beside the CSV by default.")] = None,
    results: Results = RESULTS_FOLDER / "operation.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """One head of flow attention, search included, beside torch's causal attention of the same width, over the length.

    Example: dfn-hf bench operation --length 4096 --length 16384 --work forward
    """
    from ..harness.length_plots import lengths_table, plot_lengths
    from ..speed.single_head import WORKS, OperationSettings, operations, run_operations

    runs = [
        OperationSettings(
            operation=name,
            work=work,
            length=length,
            heads=heads,
            dtype=dtype or ("float32" if device == "cpu" else "bfloat16"),
            repeats=repeats,
            threads=threads,
            device=device,
        )
        for work in works or WORKS
        for length in sorted(lengths)
        for name in names or operations(device)
    ]
    finished = run_operations(runs, time_limit, results, _report)
    plot_lengths(finished, picture := plot or results.with_suffix(".png"))
    table = lengths_table(finished, "µs per token" if heads == 1 else "µs per token and head")
    _print(table, {timing.machine for _, timing in finished}, results)
    typer.echo(f"picture: {picture}")


@app.command("seq2seq-speed")
def seq2seq_speed(
    models: Models = ["liquid", "liquid-no-lstm", "t5"],  # noqa: B006
    works: Annotated[
        list[str] | None,
        typer.Option("--work", help="encoder, decoder, joint, training or decoding; repeat it. Default: all."),
    ] = None,
    lengths: Lengths = [2**11, 2**12, 2**13, 2**14, 2**15, 2**16],  # noqa: B006
    longest_quadratic: Annotated[
        int, typer.Option(help="T5, whatever reads a source as long as its target, and training stop here.")
    ] = 2**12,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions; their median counts.")] = 3,
    results: Results = RESULTS_FOLDER / "seq2seq-speed.csv",
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Encoder, teacher-forced decoder, both, training step and decoding of Liquid and a T5, over the length.

    Example: dfn-hf bench seq2seq-speed --model liquid --work encoder
    """
    from ..speed.seq2seq_speed import WORKS, Seq2SeqSpeedSettings, run_seq2seq_speed
    from ..speed.throughput import speed_table

    runs = [
        Seq2SeqSpeedSettings(model=model, work=work, length=length, repeats=repeats, threads=threads, device=device)
        for work in works or WORKS
        for length in lengths
        for model in models
        if length <= longest_quadratic or (work not in ("joint", "training") and model != "t5")
    ]
    finished = run_seq2seq_speed(runs, results, _report)
    _print(speed_table(finished), {measures.machine for _, measures in finished}, results)


def _report(line: str) -> None:
    typer.echo(line, err=True)


def _print(table: str, machines: set[str], results: Path) -> None:
    typer.echo(f"\n{table}\n")
    for machine in sorted(machines):
        typer.echo(f"machine: {machine}")
    typer.echo(f"results: {results}")
