"""`dfn-hf generate`, `evaluate` and `translate`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..training.settings import MAX_COUNT, MAX_SEED
from .errors import refuse
from .options import ModelSource
from .paths import check_data, check_models, check_new_file
from .rows import echo_rows

Split = Literal["train", "validation", "test"]


def generate(
    model: ModelSource,
    prompt: Annotated[str, typer.Option(help="Text to continue. Default: start a new document.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Maximum number of new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy decoding.")] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, max=MAX_COUNT, help="Sample from the k most probable tokens; 0: from all.")
    ] = 50,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from tokens with this total probability.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Random seed. Default: a new one each time.")
    ] = None,
) -> None:
    """Continue a prompt; the text is printed as it is generated.

    Example: `dfn-hf generate my-model --prompt "To be, or not" --max-new-tokens 100 --temperature 0.7`
    """
    check_models(model)

    from transformers import TextStreamer

    from ..evaluation.generation import generate_text
    from ..loading.models import load_causal_lm

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


def evaluate(
    model: ModelSource,
    data: Annotated[str | None, typer.Option(help="Text: a file or a folder. Default: the bundled corpus.")] = None,
    split: Annotated[Split, typer.Option(help="Split of the bundled corpus.")] = "validation",
    text_field: Annotated[str, typer.Option(help="Field of JSON Lines that holds the text.")] = "text",
    context_length: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Tokens per window.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_COUNT,
            help="Tokens between windows; smaller values give more context. Default: the context length.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Windows per forward pass.")] = 8,
) -> None:
    """Print loss, perplexity, bits per byte and accuracy of a causal language model; each token is scored once.

    Example: `dfn-hf evaluate my-model --data book.txt --context-length 1024 --stride 512`
    """
    check_models(model)
    check_data(data)

    from ..assets.corpus import load_corpus
    from ..data.text import load_text
    from ..evaluation.language_model import evaluate_causal_lm
    from ..loading.models import load_causal_lm

    documents = load_corpus(split) if data is None else load_text(data, text_field=text_field, streaming=True)
    loaded, tokenizer = load_causal_lm(model)
    result = evaluate_causal_lm(
        loaded,
        tokenizer,
        (document["text"] for document in documents),
        context_length=context_length,
        stride=stride,
        batch_size=batch_size,
    )
    rows = {
        "loss": f"{result.loss:.4f} nats per token",
        "perplexity": f"{result.perplexity:.3f}",
        "bits per byte": f"{result.bits_per_byte:.4f}",
        "top-1 accuracy": f"{result.top1_accuracy:.2%}",
        "top-5 accuracy": f"{result.top5_accuracy:.2%}",
        "scored": f"{result.num_tokens:,} tokens, {result.num_bytes:,} bytes, {result.num_documents:,} documents",
    }
    echo_rows(rows)


def translate(
    model: ModelSource,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to translate, each in quotes.")] = None,
    data: Annotated[str | None, typer.Option(help="Score translations of these pairs: JSON Lines.")] = None,
    source_field: Annotated[str, typer.Option(help="Field that holds a pair's source, such as en.")] = "source",
    target_field: Annotated[str, typer.Option(help="Field that holds a pair's target, such as es.")] = "target",
    split: Annotated[Split | None, typer.Option(help="Score this split of the bundled verses.")] = None,
    num_beams: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="Beams of beam search; 1: greedy decoding.")
    ] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Maximum tokens per translation.")] = 128,
    shuffle_sources: Annotated[
        bool, typer.Option("--shuffle-sources", help="Control: pair each target with the source of another pair.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="New JSON Lines file for pairs and translations.")] = None,
) -> None:
    """Translate texts, or score the translations of pairs by chrF and BLEU.

    Example: `dfn-hf translate my-translator "In the beginning God created the heavens." --num-beams 4`

    Score the bundled test pairs: `dfn-hf translate liquid-tiny --split test`
    """
    inputs = [bool(texts), data is not None, split is not None]
    refuse(sum(inputs) != 1, "give one of three inputs: texts, --data or --split")
    for option, given in {"--shuffle-sources": shuffle_sources, "--output": output is not None}.items():
        refuse(bool(texts) and given, f"{option} is for --data and --split: leave it out")
    check_models(model)
    check_data(data)
    check_new_file(output)

    from ..evaluation.translation import score_translations
    from ..evaluation.translation import shuffle_sources as shuffle
    from ..evaluation.translation import translate as translate_texts
    from ..loading.models import load_seq2seq_lm

    pairs: Any = None if texts else load_translation_pairs(data, source_field, target_field, split)
    loaded, tokenizer = load_seq2seq_lm(model)
    generation: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    if texts:
        for text in translate_texts(loaded, tokenizer, texts, **generation):
            typer.echo(text)
        return
    sources = list(pairs["source"])
    translations = translate_texts(loaded, tokenizer, shuffle(sources) if shuffle_sources else sources, **generation)
    if output is not None:
        write_translations(output, pairs, translations)
    scores = score_translations(translations, list(pairs["target"]))
    echo_rows({"chrF": f"{scores.chrf:.2f}", "BLEU": f"{scores.bleu:.2f}", "pairs": f"{len(pairs):,}"})


def load_translation_pairs(data: str | None, source_field: str, target_field: str, split: str | None) -> Any:
    """The pairs in `data`, or those of a split of the bundled verses."""
    if data is None:
        from ..assets.verses import load_verses

        return load_verses(split or "test")
    from ..data.pairs import load_pairs

    return load_pairs(data, source_field=source_field, target_field=target_field)


def write_translations(path: Path, pairs: Any, translations: Sequence[str]) -> None:
    """Write one JSON line per pair with its source, target and translation."""
    with path.open("x", encoding="utf-8") as file:
        for pair, translation in zip(pairs, translations, strict=True):
            line = {"source": pair["source"], "target": pair["target"], "translation": translation}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
