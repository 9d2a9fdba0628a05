"""Programs that users run on a language model take these as they are: trl, lm-eval, sentence-transformers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import dfn_hf

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
checkpoints = pytest.mark.parametrize("checkpoint", ["dfn-tiny", "flownetwork-tiny"])


def texts() -> list[dict]:
    return [{"text": f"The number {number} is the one after {number - 1}."} for number in range(40)]


def conversations() -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {number}."},
                {"role": "assistant", "content": f"I say {number} and {number}."},
            ]
        }
        for number in range(40)
    ]


@checkpoints
@pytest.mark.parametrize("kind", ["text", "packed chat", "lora"])
def test_trl_fine_tunes(checkpoint, kind, tmp_path):
    folder = dfn_hf.checkpoint_path(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    arguments = SFTConfig(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=2e-2 if kind == "lora" else 1e-3,
        max_length=64, packing=kind == "packed chat", logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=Dataset.from_list(conversations() if kind == "packed chat" else texts()),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, task_type="CAUSAL_LM") if kind == "lora" else None,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@checkpoints
def test_sentences_are_embedded_alike_in_any_batch(checkpoint):
    model = SentenceTransformer(str(dfn_hf.checkpoint_path(checkpoint)), device="cpu")
    sentences = ["In the beginning God created the heaven", "And the earth was without form, and void", "hello"]
    together = model.encode(sentences)
    assert together.shape == (3, 128)
    for number, sentence in enumerate(sentences):
        assert np.allclose(model.encode([sentence])[0], together[number], rtol=0, atol=1e-4)


@checkpoints
def test_lm_eval_scores_a_task_of_ones_own(checkpoint, tmp_path):
    questions = [
        {"question": "In the beginning God created the", "choices": [" heaven", " xqzt"], "answer": 0},
        {"question": "And the evening and the morning were the first", "choices": [" day", " kjhg"], "answer": 0},
        {"question": "To be, or not to", "choices": [" zzqq", " be"], "answer": 1},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = {
        "task": "three_questions", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "three_questions.yaml").write_text(yaml.safe_dump(task))
    code = f"""
import dfn_hf, lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

model = HFLM(pretrained=str(dfn_hf.checkpoint_path({checkpoint!r})), batch_size=2, device="cpu")
tasks = TaskManager(include_path={str(tmp_path)!r}, include_defaults=False)
found = lm_eval.simple_evaluate(model, tasks=["three_questions"], task_manager=tasks, bootstrap_iters=0)
print("accuracy", found["results"]["three_questions"]["acc,none"])
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert "accuracy 1.0" in done.stdout, done.stderr[-2000:]
