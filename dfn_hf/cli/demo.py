"""The demonstration: a small model and a Llama of equal size, trained on the same batches, compared and used."""

import subprocess
import sys
import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..assets.corpus import load_corpus
from ..assets.tokenizers import load_tokenizer
from ..data.lm_blocks import corpus_blocks
from ..evaluation.language_model import Evaluation, evaluate_causal_lm
from ..hub.loading import load_causal_lm
from ..plots.flow_map import flow_map, plot_flow_map, plot_loss_curves
from ..plots.flows import plot_flow_matrix, read_flows
from ..presets import ARCHITECTURES, new_causal_lm
from ..training.trainer import TrainingResult, TrainingSettings, train_model

BASELINE = "llama"
SIZE = "tiny"
BLOCK_SIZE = 256
BATCH_SIZE = 4
STEPS = 500
VALIDATION_BLOCKS = 64  # while training; the comparison at the end is over all validation documents
LEARNING_RATE = 3e-3  # of both, and tuned for neither
PROMPT = "MACBETH.\nTo-morrow, and to-morrow, and to-morrow,\n"
MAPPED = ("Wherefore was that cry?", "Signifying nothing.")  # from Macbeth, V.5, which is held out
READER = "time"


def run_demo(output: Path, architecture: str = "dfn", *, steps: int = STEPS) -> None:
    """Train both models, print how they compare, reload the first in a new process to generate, and draw pictures.

    Args:
        output: folder; a folder named by the architecture and `llama/` in it become transformers folders,
            `loss_curves.png` and `flow_map.png` (DFN) or `flow_matrix.png` (FlowNetwork) the pictures. What an earlier
            demonstration left there is replaced.
        architecture: "dfn" or "flownetwork".
        steps: optimizer steps of each model.

    Raises:
        ValueError: another architecture.
    """
    if architecture not in ARCHITECTURES or architecture == BASELINE:
        raise ValueError(f"--model is {architecture!r}: choose dfn or flownetwork")
    tokenizer = load_tokenizer("bpe")
    blocks, held_out = corpus_blocks(tokenizer, BLOCK_SIZE, num_validation=VALIDATION_BLOCKS)
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, TrainingResult] = {}
    rows = []
    for name in (architecture, BASELINE):
        model = new_causal_lm(tokenizer, architecture=name, size=SIZE)
        print(f"\n{name}: {model.num_parameters():,} parameters, {steps} steps of {BATCH_SIZE * BLOCK_SIZE:,} tokens")
        started = time.perf_counter()
        results[name] = train_model(
            model,
            tokenizer,
            blocks,
            held_out,
            output / name,
            TrainingSettings(
                max_steps=steps,
                batch_size=BATCH_SIZE,
                learning_rate=LEARNING_RATE,
                save_steps=max(1, steps // 6),
            ),
            provenance="The demonstration: trained from scratch on the embedded corpus of Shakespeare and the King "
            f"James Bible, in blocks of {BLOCK_SIZE} tokens.",
            overwrite=True,
        )
        seconds = time.perf_counter() - started
        rows.append((name, model.num_parameters(), seconds, evaluate_saved(output / name, tokenizer)))

    print_comparison(rows)
    pictures = draw(output, architecture, results)
    saved = output / architecture
    print(f"\n{saved} in a new process continues {PROMPT!r}:\n", flush=True)
    generate = [sys.executable, "-m", "dfn_hf.cli", "generate", str(saved), "--prompt", PROMPT, "--seed", "0"]
    subprocess.run(generate, check=True)
    print(f"\nModels and pictures are in {output}: {architecture}/, {BASELINE}/, {', '.join(pictures)}")


def evaluate_saved(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
    """Metrics of a saved model over the validation documents."""
    model, _ = load_causal_lm(str(folder))
    return evaluate_causal_lm(model, tokenizer, load_corpus("validation")["text"], context_length=BLOCK_SIZE)


def print_comparison(rows: list[tuple[str, int, float, Evaluation]]) -> None:
    """One line per model, over the same validation documents."""
    print("\nValidation: two plays of Shakespeare and four books of the Bible that neither model has seen\n")
    print("model         parameters  train s    loss  perplexity  bits/byte   top-1   top-5")
    for name, parameters, seconds, found in rows:
        print(
            f"{name:<12}{parameters:>12,}{seconds:>9.0f}{found.loss:>8.3f}{found.perplexity:>12.1f}"
            f"{found.bits_per_byte:>11.3f}{found.top1_accuracy:>8.1%}{found.top5_accuracy:>8.1%}"
        )


def draw(output: Path, architecture: str, results: dict[str, TrainingResult]) -> list[str]:
    """The loss curves of both runs, and what flows where in a speech that neither has seen; the files' names."""
    histories = {name: result.history for name, result in results.items()}
    plot_loss_curves(histories, path=str(output / "loss_curves.png"))
    model, tokenizer = load_causal_lm(str(output / architecture))
    macbeth = load_corpus("validation")["text"][0]
    start, end = map(macbeth.index, MAPPED)
    speech = macbeth[start:end]
    if architecture == "dfn":
        plot_flow_map(flow_map(model, tokenizer, speech, word=READER), path=str(output / "flow_map.png"))
        return ["loss_curves.png", "flow_map.png"]
    plot_flow_matrix(read_flows(model, tokenizer, speech), path=str(output / "flow_matrix.png"))
    return ["loss_curves.png", "flow_matrix.png"]
