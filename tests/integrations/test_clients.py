"""Tests trl, lm-eval and sentence-transformers with the bundled checkpoints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import dfn_hf
from tests.support.marks import first_quickly

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
checkpoints = pytest.mark.parametrize("checkpoint", first_quickly(["dfn-tiny", "flownetwork-tiny"]))


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
def test_trl_fine_tuning(checkpoint, kind, tmp_path):
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
def test_sentence_embeddings_do_not_depend_on_the_batch(checkpoint):
    model = SentenceTransformer(str(dfn_hf.checkpoint_path(checkpoint)), device="cpu")
    sentences = ["In the beginning God created the heaven", "And the earth was without form, and void", "hello"]
    together = model.encode(sentences)
    assert together.shape == (3, 128)
    for number, sentence in enumerate(sentences):
        assert np.allclose(model.encode([sentence])[0], together[number], rtol=0, atol=1e-4)


@checkpoints
def test_lm_eval_with_a_custom_task_as_documented(checkpoint, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "clients.md").read_text(encoding="utf-8")
    (task,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (command,) = re.findall(r"```bash\n(python -c .*?lm_eval.*?)```", page, flags=re.DOTALL)
    assert "pretrained=my-model" in command
    (tmp_path / "my-model").symlink_to(dfn_hf.checkpoint_path(checkpoint))
    (tmp_path / "my-tasks").mkdir()
    (tmp_path / "my-tasks" / "my_task.yaml").write_text(task)
    questions = [
        {"question": "In the beginning God created the", "choices": [" heaven", " xqzt"], "answer": 0},
        {"question": "And the evening and the morning were the first", "choices": [" day", " kjhg"], "answer": 0},
        {"question": "To be, or not to", "choices": [" zzqq", " be"], "answer": 1},
    ]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (tmp_path / "my-tasks" / "questions.jsonl").write_text(lines)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": path}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|my_task")]
    assert "acc" in found[5] and float(found[7]) == 1.0, done.stdout
