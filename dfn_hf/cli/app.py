"""The `dfn-hf` command. Each command is a few lines over public functions of this package."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..benchmarks.cli.app import app as benchmarks

EMBEDDED_TEXT = "the embedded corpus of Shakespeare and the King James Bible"
OBJECTIVES = ("tokens", "field", "contrastive")
MODEL_HELP = "Folder of a saved model, name of an embedded checkpoint, or Hub id."


class UserErrorGroup(TyperGroup):
    """Commands whose errors that a user can mend are one line, without a traceback, and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params.get("traceback") or not is_user_error(error):
                raise
            typer.echo(f"Error: {one_line(error)}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=UserErrorGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="DFN, FlowNetwork and Liquid: train, generate, evaluate, measure, serve. Only Hub ids need a network.",
)
app.add_typer(benchmarks, name="bench")


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@app.command()
def train(
    output: Annotated[Path, typer.Argument(help="Folder for the trained model: new or empty.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Text: a file or a folder of .txt, .md, .jsonl. Default: the embedded corpus. For liquid, t5 and "
            "--objective contrastive: JSON Lines of pairs. Default: the embedded verses, English and Spanish. For "
            "--objective field: images, .npy, .wav."
        ),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="tokens; field: give back fields; contrastive: embed the sides of pairs alike.")
    ] = "tokens",
    hidden_share: Annotated[
        float, typer.Option(help="Of --objective field: share of the samples to hide and ask for.")
    ] = 0.0,
    validation_data: Annotated[
        str | None, typer.Option(help="Text to validate on. Default: 5 % of --data, or the corpus' validation split.")
    ] = None,
    validation_blocks: Annotated[int, typer.Option(help="Validate on so many blocks at most, spread evenly.")] = 128,
    text_field: Annotated[str, typer.Option(help="Field of JSON Lines that holds the text.")] = "text",
    source_field: Annotated[str, typer.Option(help="Field that holds a pair's source, such as en.")] = "source",
    target_field: Annotated[str, typer.Option(help="Field that holds a pair's target, such as es.")] = "target",
    streaming: Annotated[bool, typer.Option(help="Read --data while training, not before.")] = False,
    start: Annotated[str | None, typer.Option("--from", help=f"Fine-tune this model. {MODEL_HELP}")] = None,
    lora: Annotated[bool, typer.Option(help="With --from: train low-rank updates only.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank of the updates.")] = 16,
    architecture: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="dfn (default), flownetwork, or llama, of as many parameters; on pairs of texts, liquid or t5.",
        ),
    ] = None,
    size: Annotated[str | None, typer.Option(help="tiny (default), small, medium or, but of pairs, large.")] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the configuration, FIELD=VALUE, such as position_dim=8. Repeatable."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="bpe (default), byte, bpe-en-es (default for pairs), a folder or Hub id. With --from: the model's."
        ),
    ] = None,
    block_size: Annotated[
        int, typer.Option(help="Tokens per block; of pairs, of a side at most; samples of a field's pieces.")
    ] = 256,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Blocks or pairs per device and forward pass.")] = 16,
    accumulation: Annotated[int, typer.Option(help="Forward passes per optimizer step.")] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak. Default: 3e-3 from scratch (2e-3 for liquid and t5), 3e-4 with --from, 1e-3 with --lora."
        ),
    ] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the learning rate rises.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Decay of matrices.")] = 0.1,
    save_every: Annotated[int, typer.Option(help="Steps between evaluations, each followed by a checkpoint.")] = 200,
    exact_search: Annotated[
        float,
        typer.Option(
            help="Share of the steps, from the first, with exact neighbour search; then cell lists take over. Of use "
            "with small cells (--set cell_sizes=…), which propose too few matches to learn recall from scratch."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of weights and of the order of blocks.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUTPUT holds, at the end.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload the trained model to this Hub repository.")] = None,
) -> None:
    """Train a model, from scratch or from another one, and save it as a transformers folder.

    From scratch on the embedded corpus: `dfn-hf train my-model --size small`

    The baseline on the same batches: `dfn-hf train my-llama --size small --model llama`

    Fine-tune on your own text: `dfn-hf train my-poems --from dfn-tiny --data poems/ --lora`

    An encoder-decoder on pairs: `dfn-hf train my-translator --model liquid --data pairs.jsonl`

    Bytes without tokens: `dfn-hf train my-bytes --tokenizer byte --set entity_sampling=adaptive --block-size 512`

    Images from entities: `dfn-hf train my-field --objective field --data photographs/ --block-size 4096`

    Embeddings of pairs: `dfn-hf train my-embedder --objective contrastive --batch-size 128`

    After a kill: the same command with `--resume`

    On several GPUs: `torchrun --nproc-per-node 4 -m dfn_hf.cli train …`
    """
    from transformers import DataCollatorForSeq2Seq

    from ..assets.tokenizers import load_tokenizer
    from ..data.lm_blocks import text_blocks
    from ..data.pairs import load_pairs, training_pairs
    from ..hub.loading import load_causal_lm, load_config, load_seq2seq_lm
    from ..hub.push import require_token
    from ..presets import ARCHITECTURES as CAUSAL_ARCHITECTURES
    from ..presets import new_causal_lm
    from ..seq2seq_presets import ARCHITECTURES as SEQ2SEQ_ARCHITECTURES
    from ..seq2seq_presets import new_seq2seq_lm
    from ..training.lora import add_lora
    from ..training.recipes import learn_fields, learn_pairs
    from ..training.trainer import TrainingSettings, check_output_folder, train_model

    known = (*CAUSAL_ARCHITECTURES, *SEQ2SEQ_ARCHITECTURES)
    refuse(
        architecture is not None and architecture not in known,
        f"--model is {architecture!r}: choose one of {', '.join(known)}",
    )
    refuse(lora and start is None, "--lora needs --from: low-rank updates of random weights learn nothing")
    refuse(start is not None and tokenizer is not None, "--from brings its own tokenizer: leave out --tokenizer")
    for option, value in (("--set", fields), ("--model", architecture), ("--size", size)):
        refuse(start is not None and bool(value), f"--from brings its own configuration: leave out {option}")
    refuse(validation_data is not None and data is None, "--validation-data needs --data")
    from_scratch = 2e-3 if architecture in SEQ2SEQ_ARCHITECTURES else 3e-3
    usual_rate = 1e-3 if lora else from_scratch if start is None else 3e-4
    settings = TrainingSettings(
        max_steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=usual_rate if learning_rate is None else learning_rate,
        warmup_ratio=warmup,
        weight_decay=weight_decay,
        save_steps=save_every,
        exact_search_ratio=exact_search,
        seed=seed,
    )
    check_output_folder(output, resume=resume, overwrite=overwrite)
    if push_to_hub is not None:
        require_token()

    model: Any
    options = dict(map(parse_field, fields or ()))
    named_sides = (source_field, target_field) != ("source", "target")
    refuse(named_sides and data is None, "--source-field and --target-field are fields of --data: give it")
    refuse(objective not in OBJECTIVES, f"--objective is {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    refuse(hidden_share != 0 and objective != "field", "--hidden-share is for --objective field")
    if objective != "tokens":
        of_language = {"--from": start, "--lora": lora, "--streaming": streaming, "--model": architecture}
        for option, given in of_language.items():
            refuse(bool(given), f"{option} is for language models: leave it out with --objective {objective}")
        refuse(
            validation_data is not None, f"--objective {objective} holds out a twentieth: leave out --validation-data"
        )
        common: dict[str, Any] = {"options": options, "resume": resume, "overwrite": overwrite}
        common["size"] = size or "tiny"
        if objective == "field":
            refuse(data is None, "--objective field needs --data: a file or folder of images, .npy or .wav")
            refuse(tokenizer is not None, "--tokenizer is for text: leave it out with --objective field")
            refuse(named_sides, "--source-field and --target-field are for pairs: leave them out")
            result = learn_fields(
                str(data), output, settings, num_samples=block_size, hidden_share=hidden_share, **common
            )
            unit = "mean squared error"
        else:
            result = learn_pairs(
                data,
                output,
                settings,
                load_tokenizer(tokenizer or "bpe-en-es"),
                source_field=source_field,
                target_field=target_field,
                max_length=block_size,
                **common,
            )
            unit = "nats per pair"
        finish_training(result, unit, push_to_hub)
        return
    pairs = architecture in SEQ2SEQ_ARCHITECTURES or (start is not None and load_config(start).is_encoder_decoder)
    collator = None
    refuse(named_sides and not pairs, "--source-field and --target-field are for pairs of texts: add --model liquid")
    if pairs:
        refuse(streaming, "--streaming is for causal models: leave it out with pairs of texts")
        if start is None:
            vocabulary = load_tokenizer(tokenizer or "bpe-en-es")
            model = new_seq2seq_lm(
                vocabulary, architecture=architecture or "liquid", size=size or "tiny", seed=seed, **options
            )
        else:
            loaded, vocabulary = load_seq2seq_lm(start)
            model = add_lora(loaded, rank=lora_rank) if lora else loaded
        fields_of_pairs = {"source_field": source_field, "target_field": target_field}
        loaded_pairs = None if data is None else load_pairs(data, **fields_of_pairs)
        held_out_of_them = None if validation_data is None else load_pairs(validation_data, **fields_of_pairs)
        blocks, held_out, left_out = training_pairs(vocabulary, block_size, loaded_pairs, held_out_of_them, seed=seed)
        if left_out:
            typer.echo(f"{left_out:,} pairs are longer than {block_size} tokens a side (--block-size) and left out")
        collator = DataCollatorForSeq2Seq(vocabulary, model)
        text = "the verses of the World English Bible and the Reina-Valera" if data is None else data
        longer = f" ({left_out:,} longer ones left out)" if left_out else ""
        unit = f"pairs of at most {block_size} tokens a side{longer}"
    else:
        if start is None:
            vocabulary = load_tokenizer(tokenizer or "bpe")
            model = new_causal_lm(
                vocabulary, architecture=architecture or "dfn", size=size or "tiny", seed=seed, **options
            )
        else:
            loaded, vocabulary = load_causal_lm(start)
            model = add_lora(loaded, rank=lora_rank) if lora else loaded
        blocks, held_out = text_blocks(
            vocabulary,
            block_size,
            data,
            validation_data,
            num_validation=validation_blocks,
            text_field=text_field,
            streaming=streaming,
            seed=seed,
        )
        text = EMBEDDED_TEXT if data is None else data
        unit = f"blocks of {block_size} tokens"
    origin = "from scratch" if start is None else f"from {start}"
    result = train_model(
        model,
        vocabulary,
        blocks,
        held_out,
        output,
        settings,
        provenance=f"Trained on {text}, in {unit}, {origin}{f' with LoRA of rank {lora_rank}' if lora else ''}.",
        resume=resume,
        overwrite=overwrite,
        data_collator=collator,
    )
    finish_training(result, "nats per token", push_to_hub)


def finish_training(result: Any, unit: str, push_to_hub: str | None) -> None:
    """Say what a run has reached, and upload it where that was asked."""
    from accelerate import PartialState

    from ..hub.push import push_folder

    if not PartialState().is_main_process:
        return
    typer.echo(f"validation loss {result.initial_loss:.4f} → {result.validation_loss:.4f} {unit}")
    typer.echo(f"saved in {result.folder}")
    if push_to_hub is not None:
        typer.echo(f"pushed to {push_folder(result.folder, push_to_hub)}")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Checkpoint file of an original; with --from llama a folder or Hub id.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the converted model: new or empty.")],
    start: Annotated[
        str | None, typer.Option("--from", help="llama: make a DFN of a Llama, Mistral or Qwen3.")
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Write a model that computes the original's function, not a causal one.")
    ] = False,
    num_heads: Annotated[int | None, typer.Option(help="Heads of attention.")] = None,
    window_size: Annotated[int | None, typer.Option(help="Window of local attention.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token.")] = None,
    dynamic_k: Annotated[
        bool | None, typer.Option("--dynamic-k/--fixed-k", help="Whether the gate's entropy adds experts.")
    ] = None,
    compression_ratio: Annotated[float | None, typer.Option(help="Of the encoder's spectrum.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout in training.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Another argument of the original's constructor, NAME=VALUE, such as k=8. With --from llama a field "
            "of the DFN: position_dim, num_neighbors, local_window.",
        ),
    ] = None,
) -> None:
    """Write a checkpoint of another maker as a transformers folder.

    A native checkpoint, whose layout is found from its keys: `dfn-hf convert dfn_pure_epoch_010.pt my-dfn`

    With the original's function: `dfn-hf convert best_model.pth my-liquid --native --num-heads 8 --window-size 512`

    A DFN from a Llama, to be fitted by `dfn-hf distill`: `dfn-hf convert --from llama my-llama my-dfn`
    """
    from .convert_command import convert as convert_checkpoint
    from .convert_command import convert_llama

    refuse(start not in (None, "llama"), f"--from is {start!r}: native checkpoints need none, and Llamas llama")
    refuse(start is not None and native, "--native is for checkpoints of an original: leave it out with --from llama")
    given = {
        "num_heads": num_heads,
        "window_size": window_size,
        "top_k": top_k,
        "dynamic_k": dynamic_k,
        "compression_ratio": compression_ratio,
        "dropout": dropout,
        **dict(map(parse_field, settings or ())),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if start is None:
        report = convert_checkpoint(source, output, native=native, settings=given)
    else:
        report = convert_llama(source, output, settings=given)
    for line in report.lines():
        typer.echo(line)
    typer.echo(f"saved in {output}")


@app.command()
def distill(
    output: Annotated[Path, typer.Argument(help="Folder for the distilled model: new or empty.")],
    student: Annotated[str, typer.Option("--from", help="The DFN that `convert --from llama` made of the teacher.")],
    teacher: Annotated[str, typer.Option(help=f"The model that it was made from. {MODEL_HELP}")],
    data: Annotated[
        str | None,
        typer.Option(help="Text: a file or a folder of .txt, .md, .jsonl. Default: the embedded corpus."),
    ] = None,
    validation_data: Annotated[
        str | None, typer.Option(help="Text to validate on. Default: 5 % of --data, or the corpus' validation split.")
    ] = None,
    validation_blocks: Annotated[int, typer.Option(help="Validate on so many blocks at most, spread evenly.")] = 128,
    text_field: Annotated[str, typer.Option(help="Field of JSON Lines that holds the text.")] = "text",
    streaming: Annotated[bool, typer.Option(help="Read --data while training, not before.")] = False,
    block_size: Annotated[int, typer.Option(help="Tokens per block: what the teacher reads at a time.")] = 768,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Blocks per device and forward pass.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Forward passes per optimizer step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak; near that of the teacher's own training.")] = 3e-3,
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the learning rate rises.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Decay of matrices.")] = 0.1,
    layerwise: Annotated[
        float, typer.Option(help="Share of the steps, from the first, that fit each layer alone.")
    ] = 0.15,
    save_every: Annotated[int, typer.Option(help="Steps between evaluations, each followed by a checkpoint.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the order of blocks.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUTPUT holds, at the end.")] = False,
) -> None:
    """Fit a DFN made from a Llama to that Llama, on your own text.

    Example: `dfn-hf convert --from llama my-llama start`, then
    `dfn-hf distill my-dfn --from start --teacher my-llama --data books/`

    After a kill: the same command with `--resume`
    """
    from accelerate import PartialState

    from ..data.lm_blocks import text_blocks
    from ..hub.loading import load_causal_lm
    from ..training.distillation import DistillationSettings, check_tokenizers, distill_model
    from ..training.trainer import check_output_folder

    refuse(validation_data is not None and data is None, "--validation-data needs --data")
    settings = DistillationSettings(
        max_steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate,
        warmup_ratio=warmup,
        weight_decay=weight_decay,
        save_steps=save_every,
        layerwise_ratio=layerwise,
        seed=seed,
    )
    check_output_folder(output, resume=resume, overwrite=overwrite)
    learner, tokenizer = load_causal_lm(student)
    original, vocabulary = load_causal_lm(teacher)
    check_tokenizers(tokenizer, vocabulary)
    blocks, held_out = text_blocks(
        tokenizer,
        block_size,
        data,
        validation_data,
        num_validation=validation_blocks,
        text_field=text_field,
        streaming=streaming,
        seed=seed,
    )
    text = EMBEDDED_TEXT if data is None else data
    result = distill_model(
        learner,
        original,
        tokenizer,
        blocks,
        held_out,
        output,
        settings,
        provenance=f"Distilled from {teacher} on {text}, in blocks of {block_size} tokens, starting at {student}.",
        resume=resume,
        overwrite=overwrite,
    )
    if not PartialState().is_main_process:
        return
    echo_rows(
        {
            "teacher": f"{result.teacher_loss:.4f} nats per token on the validation text",
            "student": f"{result.initial_loss:.4f} → {result.validation_loss:.4f}",
            "tokens": f"{result.num_tokens:,}",
            "operations": f"{result.operations:.2e}, per token 6 for each parameter of the student, 2 of the "
            "teacher, embeddings left out",
            "saved in": str(output),
        }
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    prompt: Annotated[str, typer.Option(help="Text to continue. Default: start a new document.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0: among all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Sample among tokens that together have this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling. Default: another each time.")] = None,
) -> None:
    """Continue a prompt; the text appears as it grows.

    Example: `dfn-hf generate my-model --prompt "To be, or not" --max-new-tokens 100 --temperature 0.7`
    """
    from transformers import TextStreamer

    from ..evaluation.generation import generate_text
    from ..hub.loading import load_causal_lm

    loaded, tokenizer = load_causal_lm(model)
    generate_text(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[str | None, typer.Option(help="Text: a file or a folder. Default: the embedded corpus.")] = None,
    split: Annotated[str, typer.Option(help="Of the embedded corpus: train, validation or test.")] = "validation",
    text_field: Annotated[str, typer.Option(help="Field of JSON Lines that holds the text.")] = "text",
    context_length: Annotated[int, typer.Option(help="Tokens read at a time.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from one window to the next; fewer give more context. Default: the context length."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 8,
) -> None:
    """Loss, perplexity, bits per byte and accuracy over documents; each token is scored once, none sees the future.

    Example: `dfn-hf evaluate my-model --data book.txt --context-length 1024 --stride 512`
    """
    from ..assets.corpus import load_corpus
    from ..data.text import load_text
    from ..evaluation.language_model import evaluate_causal_lm
    from ..hub.loading import load_causal_lm

    documents = load_corpus(split) if data is None else load_text(data, text_field=text_field, streaming=True)
    loaded, tokenizer = load_causal_lm(model)
    found = evaluate_causal_lm(
        loaded,
        tokenizer,
        (document["text"] for document in documents),
        context_length=context_length,
        stride=stride,
        batch_size=batch_size,
    )
    rows = {
        "loss": f"{found.loss:.4f} nats per token",
        "perplexity": f"{found.perplexity:.3f}",
        "bits per byte": f"{found.bits_per_byte:.4f}",
        "top-1 accuracy": f"{found.top1_accuracy:.2%}",
        "top-5 accuracy": f"{found.top5_accuracy:.2%}",
        "scored": f"{found.num_tokens:,} tokens, {found.num_bytes:,} bytes, {found.num_documents:,} documents",
    }
    echo_rows(rows)


@app.command()
def translate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to translate, each in quotes.")] = None,
    data: Annotated[str | None, typer.Option(help="Score the translations of these pairs: JSON Lines.")] = None,
    source_field: Annotated[str, typer.Option(help="Field that holds a pair's source, such as en.")] = "source",
    target_field: Annotated[str, typer.Option(help="Field that holds a pair's target, such as es.")] = "target",
    split: Annotated[
        str | None, typer.Option(help="Score those of the embedded verses: train, validation or test.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="1 takes the most probable token each time.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a translation, at most.")] = 128,
    shuffled: Annotated[
        bool, typer.Option("--shuffled", help="Give each target another source: what the model says without reading.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="New file for pairs and translations, JSON Lines.")] = None,
) -> None:
    """Translate texts, or score the translations of pairs by chrF and BLEU.

    Example: `dfn-hf translate my-translator "In the beginning God created the heavens." --num-beams 4`
    """
    import json

    from ..assets.verses import load_verses
    from ..data.pairs import load_pairs
    from ..evaluation.translation import score_translations, shuffle_sources, translate
    from ..hub.loading import load_seq2seq_lm

    given = [bool(texts), data is not None, split is not None]
    refuse(sum(given) != 1, "give one of three: texts, --data, or --split")
    refuse(bool(texts) and (shuffled or output is not None), "--shuffled and --output are for --data and --split")
    refuse(output is not None and output.exists(), f"{output} exists: choose a new file")
    loaded, tokenizer = load_seq2seq_lm(model)
    generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    if texts:
        for text in translate(loaded, tokenizer, texts, **generation):
            typer.echo(text)
        return
    if data is not None:
        pairs = load_pairs(data, source_field=source_field, target_field=target_field)
    else:
        pairs = load_verses(split or "test")
    sources = list(pairs["source"])
    translations = translate(loaded, tokenizer, shuffle_sources(sources) if shuffled else sources, **generation)
    if output is not None:
        with output.open("x", encoding="utf-8") as file:
            for pair, translation in zip(pairs, translations, strict=True):
                line = {"source": pair["source"], "target": pair["target"], "translation": translation}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    scores = score_translations(translations, list(pairs["target"]))
    echo_rows({"chrF": f"{scores.chrf:.2f}", "BLEU": f"{scores.bleu:.2f}", "pairs": f"{len(pairs):,}"})


@app.command()
def info(model: Annotated[str, typer.Argument(help=MODEL_HELP)]) -> None:
    """Configuration, parameters, state per token and provenance of a model; its weights are not loaded.

    Example: `dfn-hf info dfn-tiny`
    """
    from ..hub.model_info import describe_model

    found = describe_model(model)
    rows = {"path": found.path, "family": found.model_type, "parameters": f"{found.parameters:,}"}
    if found.state_bytes_per_token is not None:
        rows["state"] = f"{found.state_bytes_per_token:,} bytes per token"
    echo_rows(rows | {field: str(value) for field, value in found.fields.items()})
    if found.provenance is not None:
        typer.echo(f"\n{found.provenance}")


@app.command()
def show(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[Path, typer.Argument(help="New picture: .png, .svg or .pdf.")],
    text: Annotated[
        str | None, typer.Option(help="Text to run the model over. Default: a sonnet's beginning.")
    ] = None,
    field: Annotated[Path | None, typer.Option(help="Of a model of fields: an image, a .npy or a .wav.")] = None,
    num_entities: Annotated[
        int | None, typer.Option(min=1, help="With --field: sample it into so many. Default: one for 16 samples.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Of the positions, from 0. Default: where it shows most.")] = None,
    head: Annotated[int | None, typer.Option(help="Of the positions, from 0. Default: where it shows most.")] = None,
) -> None:
    """Draw what a DFN makes of a text or a field: where it places entities, where they flow, what comes of it.

    Example: `dfn-hf show dfn-tiny picture.png --text "To be, or not to be, that is the question"`

    An image, and what a model of fields gives back of it: `dfn-hf show my-field picture.png --field cat.png`
    """
    from .plot_command import show_field, show_text

    refuse(output.exists(), f"{output} exists: choose a new file")
    refuse(text is not None and field is not None, "--text and --field are of different models: give one")
    refuse(num_entities is not None and field is None, "--num-entities is for --field")
    if field is None:
        show_text(model, str(output), text, layer=layer, head=head)
    else:
        show_field(model, str(output), field, num_entities=num_entities, layer=layer, head=head)
    typer.echo(f"drawn: {output}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    repository: Annotated[str, typer.Argument(help="Hub repository, owner/name; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private, where it is made.")] = False,
) -> None:
    """Upload a saved model with its code, tokenizer and card to the Hugging Face Hub.

    Example: `dfn-hf push my-model me/my-model --private`
    """
    from ..hub.push import push_folder

    typer.echo(f"pushed to {push_folder(folder, repository, private=private)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
) -> None:
    """Answer requests for a causal model over HTTP, as OpenAI's servers do; options of `transformers serve` follow.

    Example: `dfn-hf serve dfn-tiny --port 8001`
    """
    from ..hub.serving import serve as serve_model

    serve_model(model, context.args)


@app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="Folder for models and pictures; replaced.")] = Path("demo"),
    architecture: Annotated[str, typer.Option("--model", help="dfn or flownetwork.")] = "dfn",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each model, to see it all sooner.")] = None,
) -> None:
    """Train a small model and a Llama of equal size on the same batches, compare them, generate, draw.

    Takes less than ten minutes on two cores. Example: `dfn-hf demo --steps 20`
    """
    from .demo import run_demo

    run_demo(output, architecture, **({} if steps is None else {"steps": steps}))


def parse_field(assignment: str) -> tuple[str, Any]:
    """Split FIELD=VALUE; the value is JSON, or else a string."""
    import json

    field, equals, value = assignment.partition("=")
    refuse(not equals, f"--set {assignment} is not of the form FIELD=VALUE")
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, {"True": True, "False": False}.get(value, value)


def refuse(mistaken: bool, message: str) -> None:
    if mistaken:
        raise ValueError(message)


def echo_rows(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:<{width}}  {value}")


def is_user_error(error: Exception) -> bool:
    """Whether the user can mend it: wrong values, files, network, memory, disk."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    mendable = ValueError | OSError | MemoryError | OutOfMemoryError | SafetensorError | StrictDataclassError
    return isinstance(error, mendable)


def one_line(error: Exception) -> str:
    """The message of an error on one line; of a configuration's error, that of the check that failed."""
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, StrictDataclassError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(app())
