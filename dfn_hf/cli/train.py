"""`dfn-hf train lm`, `seq2seq`, `field` and `contrastive`. Each trains a model and saves a transformers folder."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..hub.private_paths import public_name
from ..training.settings import MAX_COUNT
from . import options
from .errors import refuse
from .options import parse_assignments
from .paths import check_data, check_models, prepare_output

app = typer.Typer(no_args_is_help=True)


@app.command()
def lm(
    output: options.Output,
    data: options.TextData = None,
    validation_data: options.ValidationText = None,
    validation_blocks: options.ValidationBlocks = 128,
    text_field: options.TextField = "text",
    streaming: options.Streaming = False,
    block_size: options.BlockSize = 256,
    model: options.CausalModel = None,
    size: options.Size = None,
    config_override: options.ConfigOverride = None,
    tokenizer: options.Tokenizer = None,
    init_from: options.InitFrom = None,
    lora: options.Lora = False,
    lora_rank: options.LoraRank = 16,
    max_steps: options.MaxSteps = 1000,
    batch_size: options.BatchSize = 16,
    gradient_accumulation_steps: options.GradientAccumulationSteps = 1,
    learning_rate: Annotated[
        float | None, options.learning_rate_option("3e-3 from scratch, 3e-4 with --init-from, 1e-3 with --lora")
    ] = None,
    warmup_ratio: options.WarmupRatio = 0.1,
    weight_decay: options.WeightDecay = 0.1,
    save_steps: options.SaveSteps = 200,
    seed: options.Seed = 0,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    push_to_hub: options.PushToHub = None,
) -> None:
    """Train a causal language model on text, from scratch or from another model.

    From scratch on the bundled corpus: `dfn-hf train lm my-model --size small`

    The Llama baseline on the same batches: `dfn-hf train lm my-llama --size small --model llama`

    Fine-tune on your own text: `dfn-hf train lm my-poems --init-from dfn-tiny --data poems/ --lora`

    Bytes instead of tokens: `dfn-hf train lm my-bytes --tokenizer byte --config-override entity_sampling=adaptive
    --block-size 512`

    To continue an interrupted run: add `--resume`

    On several GPUs: `torchrun --nproc-per-node 4 -m dfn_hf.cli train lm my-model`
    """
    new_model = {"--model": model, "--size": size, "--config-override": config_override, "--tokenizer": tokenizer}
    check_start(init_from, lora, new_model)
    check_text(data, validation_data)
    overrides = parse_assignments("--config-override", config_override)
    settings = training_settings(
        learning_rate,
        default_learning_rate(init_from, lora, from_scratch=3e-3),
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        save_steps=save_steps,
        seed=seed,
    )
    check_output(output, resume=resume, overwrite=overwrite, push_to_hub=push_to_hub)

    from ..assets.tokenizers import load_tokenizer
    from ..data.lm_blocks import text_blocks
    from ..loading.models import load_causal_lm
    from ..presets import new_causal_lm
    from ..training.trainer import train_model

    network: Any
    if init_from is None:
        vocabulary = load_tokenizer(tokenizer or "bpe")
        network = new_causal_lm(vocabulary, architecture=model or "dfn", size=size or "tiny", seed=seed, **overrides)
    else:
        network, vocabulary = load_causal_lm(init_from)
        network = with_lora(network, lora_rank) if lora else network
    blocks, validation = text_blocks(
        vocabulary,
        block_size,
        data,
        validation_data,
        num_validation=validation_blocks,
        text_field=text_field,
        streaming=streaming,
        seed=seed,
    )
    result = train_model(
        network,
        vocabulary,
        blocks,
        validation,
        output,
        settings,
        provenance=f"Trained on {public_name(data or options.BUNDLED_TEXT)}, in blocks of {block_size} tokens, "
        f"{describe_start(init_from, lora, lora_rank)}.",
        resume=resume,
        overwrite=overwrite,
    )
    finish_training(result, "nats per token", push_to_hub)


@app.command()
def seq2seq(
    output: options.Output,
    data: options.PairData = None,
    validation_data: options.ValidationPairs = None,
    source_field: options.SourceField = "source",
    target_field: options.TargetField = "target",
    max_length: Annotated[
        int,
        options.panel(options.DATA, min=1, max=MAX_COUNT, help="Maximum tokens per side; longer pairs are dropped."),
    ] = 256,
    model: options.Seq2SeqModel = None,
    size: options.Seq2SeqSize = None,
    config_override: options.ConfigOverride = None,
    tokenizer: options.PairTokenizer = None,
    init_from: options.InitFrom = None,
    lora: options.Lora = False,
    lora_rank: options.LoraRank = 16,
    max_steps: options.MaxSteps = 1000,
    batch_size: options.BatchSize = 16,
    gradient_accumulation_steps: options.GradientAccumulationSteps = 1,
    learning_rate: Annotated[
        float | None, options.learning_rate_option("2e-3 from scratch, 3e-4 with --init-from, 1e-3 with --lora")
    ] = None,
    warmup_ratio: options.WarmupRatio = 0.1,
    weight_decay: options.WeightDecay = 0.1,
    save_steps: options.SaveSteps = 200,
    seed: options.Seed = 0,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    push_to_hub: options.PushToHub = None,
) -> None:
    """Train an encoder-decoder on pairs of texts, such as translations.

    English to Spanish on the bundled verses: `dfn-hf train seq2seq my-translator --max-steps 5000`

    On your own pairs: `dfn-hf train seq2seq my-translator --data pairs.jsonl --source-field en --target-field es`

    The T5 baseline on the same batches: `dfn-hf train seq2seq my-t5 --model t5`

    Fine-tune: `dfn-hf train seq2seq my-tuned --init-from liquid-tiny --data pairs.jsonl`

    To continue an interrupted run: add `--resume`
    """
    new_model = {"--model": model, "--size": size, "--config-override": config_override, "--tokenizer": tokenizer}
    check_start(init_from, lora, new_model)
    check_text(data, validation_data)
    check_pair_fields(data, source_field, target_field)
    overrides = parse_assignments("--config-override", config_override)
    settings = training_settings(
        learning_rate,
        default_learning_rate(init_from, lora, from_scratch=2e-3),
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        save_steps=save_steps,
        seed=seed,
    )
    check_output(output, resume=resume, overwrite=overwrite, push_to_hub=push_to_hub)

    from transformers import DataCollatorForSeq2Seq

    from ..assets.tokenizers import load_tokenizer
    from ..data.pairs import load_pairs, training_pairs
    from ..loading.models import load_seq2seq_lm
    from ..seq2seq_presets import new_seq2seq_lm
    from ..training.trainer import train_model

    network: Any
    if init_from is None:
        vocabulary = load_tokenizer(tokenizer or "bpe-en-es")
        network = new_seq2seq_lm(
            vocabulary, architecture=model or "liquid", size=size or "tiny", seed=seed, **overrides
        )
    else:
        network, vocabulary = load_seq2seq_lm(init_from)
        network = with_lora(network, lora_rank) if lora else network
    loaded = [
        None if path is None else load_pairs(path, source_field=source_field, target_field=target_field)
        for path in (data, validation_data)
    ]
    pairs, validation, dropped = training_pairs(vocabulary, max_length, *loaded, seed=seed)
    if dropped:
        typer.echo(f"{dropped:,} pairs are longer than {max_length} tokens per side (--max-length) and are dropped")
    longer = f" ({dropped:,} longer pairs dropped)" if dropped else ""
    result = train_model(
        network,
        vocabulary,
        pairs,
        validation,
        output,
        settings,
        provenance=f"Trained on {public_name(data or options.BUNDLED_PAIRS)}, in pairs of at most {max_length} tokens "
        f"per side{longer}, {describe_start(init_from, lora, lora_rank)}.",
        resume=resume,
        overwrite=overwrite,
        data_collator=DataCollatorForSeq2Seq(vocabulary, network),
    )
    finish_training(result, "nats per token", push_to_hub)


@app.command()
def field(
    output: options.Output,
    data: Annotated[
        str, options.panel(options.DATA, help="Fields: an image, .npy or .wav file, or a folder of such files.")
    ],
    num_samples: Annotated[
        int,
        options.panel(options.DATA, min=1, max=MAX_COUNT, help="Maximum samples per crop of a field."),
    ] = 256,
    mask_ratio: Annotated[
        float,
        options.panel(options.DATA, min=0, max=1, help="Fraction of the samples to mask and predict; 0: autoencode."),
    ] = 0.0,
    size: options.Size = None,
    config_override: options.ConfigOverride = None,
    max_steps: options.MaxSteps = 1000,
    batch_size: options.BatchSize = 16,
    gradient_accumulation_steps: options.GradientAccumulationSteps = 1,
    learning_rate: Annotated[float | None, options.learning_rate_option("3e-3")] = None,
    warmup_ratio: options.WarmupRatio = 0.1,
    weight_decay: options.WeightDecay = 0.1,
    save_steps: options.SaveSteps = 200,
    seed: options.Seed = 0,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    push_to_hub: options.PushToHub = None,
) -> None:
    """Train a DFN to reconstruct fields (images, arrays, sound) from a small number of entities.

    Images: `dfn-hf train field my-field --data photographs/ --num-samples 4096`

    Masked pre-training: `dfn-hf train field my-field --data photographs/ --mask-ratio 0.75`

    To continue an interrupted run: add `--resume`
    """
    check_data(data)
    overrides = parse_assignments("--config-override", config_override)
    settings = training_settings(
        learning_rate,
        3e-3,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        save_steps=save_steps,
        seed=seed,
    )
    check_output(output, resume=resume, overwrite=overwrite, push_to_hub=push_to_hub)

    from ..training.recipes import train_new_field_model

    result = train_new_field_model(
        data,
        output,
        settings,
        num_samples=num_samples,
        mask_ratio=mask_ratio,
        size=size or "tiny",
        options=overrides,
        resume=resume,
        overwrite=overwrite,
    )
    finish_training(result, "mean squared error", push_to_hub)


@app.command()
def contrastive(
    output: options.Output,
    data: options.PairData = None,
    source_field: options.SourceField = "source",
    target_field: options.TargetField = "target",
    max_length: Annotated[
        int,
        options.panel(options.DATA, min=1, max=MAX_COUNT, help="Maximum tokens per text; longer texts are truncated."),
    ] = 256,
    size: options.Size = None,
    config_override: options.ConfigOverride = None,
    tokenizer: options.EmbeddingTokenizer = "bpe-en-es",
    max_steps: options.MaxSteps = 1000,
    batch_size: options.BatchSize = 16,
    gradient_accumulation_steps: options.GradientAccumulationSteps = 1,
    learning_rate: Annotated[float | None, options.learning_rate_option("3e-3")] = None,
    warmup_ratio: options.WarmupRatio = 0.1,
    weight_decay: options.WeightDecay = 0.1,
    save_steps: options.SaveSteps = 200,
    seed: options.Seed = 0,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    push_to_hub: options.PushToHub = None,
) -> None:
    """Train a DFN embedding model on pairs of texts, images or sounds; 5 % of --data is held out for validation.

    The bundled verses: `dfn-hf train contrastive my-embedder --batch-size 128`

    Images and captions: `dfn-hf train contrastive my-embedder --data pairs.jsonl --source-field image
    --target-field caption`, where a side that names image, .npy or .wav files, relative to --data, is a field.

    To continue an interrupted run: add `--resume`
    """
    check_data(data)
    check_pair_fields(data, source_field, target_field)
    overrides = parse_assignments("--config-override", config_override)
    settings = training_settings(
        learning_rate,
        3e-3,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        save_steps=save_steps,
        seed=seed,
    )
    check_output(output, resume=resume, overwrite=overwrite, push_to_hub=push_to_hub)

    from ..assets.tokenizers import load_tokenizer
    from ..training.recipes import train_new_contrastive_model

    result = train_new_contrastive_model(
        data,
        output,
        settings,
        load_tokenizer(tokenizer),
        source_field=source_field,
        target_field=target_field,
        max_length=max_length,
        size=size or "tiny",
        options=overrides,
        resume=resume,
        overwrite=overwrite,
    )
    finish_training(result, "nats per pair", push_to_hub)


def check_start(init_from: str | None, lora: bool, new_model: dict[str, Any]) -> None:
    """Raise ValueError for options that --init-from excludes, or if --lora has no model to adapt.

    Args:
        new_model: the options that describe a new model, and their values.
    """
    refuse(lora and init_from is None, "--lora needs --init-from: low-rank updates of random weights do not learn")
    for option, value in new_model.items():
        refuse(
            init_from is not None and bool(value),
            f"{option} is for a new model, and --init-from {init_from} is a trained one: leave out {option}",
        )
    check_models(init_from)


def check_text(data: str | None, validation_data: str | None) -> None:
    """Raise ValueError unless the files exist and validation data come with training data."""
    refuse(validation_data is not None and data is None, "--validation-data needs --data: add it")
    check_data(data, validation_data)


def check_pair_fields(data: str | None, source_field: str, target_field: str) -> None:
    """Raise ValueError if fields are named without the data that has them."""
    named = (source_field, target_field) != ("source", "target")
    refuse(named and data is None, "--source-field and --target-field name fields of --data: add --data")


def check_output(output: Path, *, resume: bool, overwrite: bool, push_to_hub: str | None) -> None:
    """Raise ValueError unless the model can be written to `output` and pushed."""
    prepare_output(output, resume=resume, overwrite=overwrite)
    if push_to_hub is not None:
        from ..hub.push import check_destination

        check_destination(push_to_hub)


def default_learning_rate(init_from: str | None, lora: bool, *, from_scratch: float) -> float:
    """The peak learning rate if the user gives none."""
    if init_from is None:
        return from_scratch
    return 1e-3 if lora else 3e-4


def training_settings(learning_rate: float | None, default_rate: float, **settings: Any) -> Any:
    """`TrainingSettings` with the default learning rate if the user gives none."""
    from ..training.settings import TrainingSettings

    return TrainingSettings(learning_rate=default_rate if learning_rate is None else learning_rate, **settings)


def with_lora(model: Any, rank: int) -> Any:
    """`model` with trainable low-rank updates."""
    from ..training.lora import add_lora

    return add_lora(model, rank=rank)


def describe_start(init_from: str | None, lora: bool, lora_rank: int) -> str:
    """The initial weights, in the words of a model card."""
    start = "from scratch" if init_from is None else f"from {public_name(init_from)}"
    return f"{start} with LoRA of rank {lora_rank}" if lora else start


def finish_training(result: Any, unit: str, push_to_hub: str | None) -> None:
    """Print the losses of a run and where its model is, and upload it if `push_to_hub` names a repository."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    typer.echo(f"validation loss {result.initial_loss:.4f} → {result.validation_loss:.4f} {unit}")
    typer.echo(f"saved in {result.folder}")
    if push_to_hub is not None:
        from ..hub.push import push_folder

        typer.echo(f"pushed to {push_folder(result.folder, push_to_hub, say=typer.echo)}")
