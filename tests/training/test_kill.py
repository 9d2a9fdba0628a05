"""Tests that a run killed between two forward passes of a step resumes with the same losses and weights."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, TrainerCallback

from dfn_hf.assets.corpus import load_corpus
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.data.packing import pack, tokenize
from dfn_hf.presets import new_causal_lm
from dfn_hf.seq2seq_presets import new_seq2seq_lm
from dfn_hf.training.checkpoints import newest_complete_checkpoint
from dfn_hf.training.settings import TrainingSettings
from dfn_hf.training.trainer import train_model
from tests.support.marks import first_quickly

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "hidden_dropout": 0.1,
}
OPTIONS = {"dfn": {"memory_slots": 2}, "flownetwork": {"memory_size": 2}, "liquid": {"frame_length": 8}}
SETTINGS = TrainingSettings(max_steps=9, batch_size=2, gradient_accumulation_steps=2, save_steps=3, learning_rate=1e-2)
KILLED_AFTER = 7


def train(family: str, folder: Path, *, resume: bool = False, killed: bool = False) -> tuple[list[float], dict]:
    """Return the loss of each training forward pass and the weights of the best checkpoint."""
    text = load_corpus("validation")["text"][3][:4000]
    tokenizer = load_tokenizer("byte")
    collator = None
    if family == "liquid":
        model = new_seq2seq_lm(tokenizer, seed=1, **TINY, **OPTIONS[family])
        pieces = [list(text[at : at + 30].encode()) for at in range(0, 1800, 30)]
        blocks = Dataset.from_list([{"input_ids": ids, "labels": ids[::-1]} for ids in pieces])
        collator = DataCollatorForSeq2Seq(tokenizer, model)
    else:
        model = new_causal_lm(tokenizer, architecture=family, seed=1, **TINY, **OPTIONS[family])
        blocks = pack(tokenize(Dataset.from_dict({"text": [text]}), tokenizer), 64)
    losses = []
    model.register_forward_hook(
        lambda module, _, outputs: losses.append(outputs.loss.item()) if module.training else None
    )
    train_model(
        model,
        tokenizer,
        blocks.select(range(4, len(blocks))),
        blocks.select(range(4)),
        folder,
        SETTINGS,
        resume=resume,
        progress=False,
        callbacks=[KillInAStep()] if killed else [],
        data_collator=collator,
    )
    auto_class = AutoModelForSeq2SeqLM if family == "liquid" else AutoModelForCausalLM
    return losses, auto_class.from_pretrained(folder).state_dict()


class KillInAStep(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("family", first_quickly(OPTIONS))
def test_resumed_with_the_same_losses(family, tmp_path):
    root = Path(__file__).parents[2]
    call = f"train({family!r}, Path({str(tmp_path / 'broken')!r}), killed=True)"
    code = f"from pathlib import Path; from tests.training.test_kill import train; {call}"
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    assert newest_complete_checkpoint(tmp_path / "broken" / "checkpoints")[0].name == "checkpoint-6"

    losses, weights = train(family, tmp_path / "whole")
    rest, resumed = train(family, tmp_path / "broken", resume=True)
    assert len(losses) == 18 and len(set(losses)) == 18
    assert rest == pytest.approx(losses[12:], abs=1e-5)
    assert weights.keys() == resumed.keys()
    for name, weight in weights.items():
        assert torch.allclose(resumed[name], weight, rtol=0, atol=1e-5), name
