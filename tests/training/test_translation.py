"""Tests encoder-decoders: pairs, training, translation, scores, commands and the pipeline."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    pipeline,
)
from typer.testing import CliRunner

from dfn_hf import LiquidForSeq2SeqLM
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.assets.verses import load_verses
from dfn_hf.cli.app import app
from dfn_hf.data.pairs import encode_pairs, load_pairs, training_pairs
from dfn_hf.evaluation.translation import score_translations, shuffle_sources, translate
from dfn_hf.loading.models import load_seq2seq_lm
from dfn_hf.seq2seq_presets import new_seq2seq_lm

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "moe_intermediate_size": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bpe-en-es")


@pytest.fixture(scope="module")
def model(tokenizer):
    return new_seq2seq_lm(tokenizer, **SMALL)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_pairs_are_read_from_flat_and_wmt_json_lines(tmp_path):
    plain = write_lines(tmp_path / "plain.jsonl", [{"source": " a ", "target": "b"}, {"source": " ", "target": "c"}])
    wmt = write_lines(tmp_path / "wmt.jsonl", [{"translation": {"en": "one", "es": "uno"}}])
    assert load_pairs(plain).to_list() == [{"source": "a", "target": "b"}]
    read = load_pairs(wmt, source_field="en", target_field="es")
    assert read.to_list() == [{"source": "one", "target": "uno"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"source": "a"}\n', "line 1 has no field 'target', only 'source'"),
        ('{"source": "a", "target": 3}\n', "line 1: the field 'target' is 3: give a string"),
        ('{"translation": ["a", "b"]}\n', "line 1 has no field 'source'"),
        ('{"source": "", "target": ""}\n', "are not blank"),
        ("[1]\n", "line 1 is not a JSON object"),
        ("not json\n", "line 1 is not JSON"),
    ],
)
def test_error_names_the_invalid_line(content, message, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pairs(path)


def test_encoded_pairs_have_end_tokens_and_long_pairs_are_skipped(tokenizer):
    pairs = Dataset.from_list(
        [{"source": "In the beginning", "target": "En el principio"}, {"source": "a " * 50, "target": "b"}]
    )
    encoded = encode_pairs(pairs, tokenizer, max_length=20)
    assert len(encoded) == 1
    assert encoded[0]["input_ids"][-1] == encoded[0]["labels"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded[0]["labels"], skip_special_tokens=True) == "En el principio"
    with pytest.raises(ValueError, match=r"exceeds max_length 1.*--max-length"):
        encode_pairs(pairs, tokenizer, max_length=1)


def test_part_of_the_pairs_is_held_out(tokenizer):
    pairs = Dataset.from_list([{"source": f"word {number}", "target": f"palabra {number}"} for number in range(40)])
    train, held_out, left_out = training_pairs(tokenizer, 20, pairs)
    assert (len(train), len(held_out), left_out) == (38, 2, 0)
    assert (
        training_pairs(tokenizer, 20, pairs, Dataset.from_list([{"source": "a " * 50, "target": "b"}, pairs[0]]))[2]
        == 1
    )
    again = training_pairs(tokenizer, 20, pairs)[1]
    assert again.to_list() == held_out.to_list()
    with pytest.raises(ValueError, match="1 pairs but"):
        training_pairs(tokenizer, 20, pairs.select(range(1)))


def test_t5_baseline_has_equally_many_parameters(tokenizer):
    liquid, t5 = (new_seq2seq_lm(tokenizer, architecture=name) for name in ("liquid", "t5"))
    assert isinstance(liquid, LiquidForSeq2SeqLM)
    assert abs(t5.num_parameters() / liquid.num_parameters() - 1) < 0.001
    assert t5.config.decoder_start_token_id == liquid.config.decoder_start_token_id == tokenizer.pad_token_id
    with pytest.raises(ValueError, match="choose one of liquid, t5"):
        new_seq2seq_lm(tokenizer, architecture="bart")
    with pytest.raises(ValueError, match="no field 'width'"):
        new_seq2seq_lm(tokenizer, width=3)


def test_translations_keep_their_order_for_all_batch_sizes(model, tokenizer):
    texts = ["In the beginning God created the heavens and the earth.", "And", "God said, Let there be light."]
    together = translate(model, tokenizer, texts, num_beams=2, max_new_tokens=8)
    alone = [translate(model, tokenizer, [text], num_beams=2, max_new_tokens=8)[0] for text in texts]
    assert together == alone


def test_scores_equal_sacrebleu_and_shuffling_moves_every_source():
    references = [
        "Y dijo Dios: Sea la luz: y fué la luz.",
        "Y llamó Dios á la luz Día, y á las tinieblas llamó Noche.",
    ]
    perfect = score_translations(references, references)
    assert perfect.chrf == pytest.approx(100) and perfect.bleu == pytest.approx(100)
    assert score_translations(references[::-1], references).chrf < 60
    sources = [str(number) for number in range(7)]
    shuffled = shuffle_sources(sources)
    assert sorted(shuffled) == sources and all(one != other for one, other in zip(sources, shuffled, strict=True))


def test_seq2seq_trainer_predicts_with_generate(model, tokenizer, tmp_path):
    pairs = encode_pairs(
        load_verses("validation").select(range(6)).select_columns(["source", "target"]), tokenizer, 96
    )
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=3, report_to="none",
        predict_with_generate=True, learning_rate=1e-2, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs,
        eval_dataset=pairs,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
    )
    trainer.train()
    predictions = trainer.predict(pairs, max_new_tokens=8).predictions
    assert len(predictions) == 6
    assert (predictions[:, 0] == model.config.decoder_start_token_id).all()
    assert (predictions[:, 9:] == tokenizer.pad_token_id).all()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]


def test_gradient_accumulation_equals_one_step(tokenizer, tmp_path):
    pairs = encode_pairs(
        load_verses("validation").select(range(6)).select_columns(["source", "target"]), tokenizer, 96
    )
    trained = []
    for batch_size in (6, 1):
        model = new_seq2seq_lm(
            tokenizer, **SMALL, router_entropy_coef=1.0, reconstruction_loss_coef=1.0, hidden_dropout=0.0
        )
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch_size, report_to="none", optim="sgd",
            gradient_accumulation_steps=6 // batch_size, learning_rate=0.1, lr_scheduler_type="constant",
            max_grad_norm=0.0, disable_tqdm=True,
        )  # fmt: skip
        before = model.model.decoder.layers[0].moe.gate.weight.detach().clone()
        Seq2SeqTrainer(
            model, arguments, DataCollatorForSeq2Seq(tokenizer, model), train_dataset=pairs, processing_class=tokenizer
        ).train()
        assert not torch.equal(model.model.decoder.layers[0].moe.gate.weight, before)
        trained.append(model.state_dict())
    assert all(torch.allclose(trained[0][name], trained[1][name], rtol=1e-5, atol=1e-5) for name in trained[0])


def test_pipeline_equals_translate(folder):
    write = pipeline("liquid-text2text", model=str(folder))
    text = "In the beginning God created the heavens and the earth."
    model, tokenizer = load_seq2seq_lm(str(folder))
    expected = translate(model, tokenizer, [text], num_beams=2, max_new_tokens=8)[0]
    assert write(text, num_beams=2, max_new_tokens=8) == [{"generated_text": expected}]
    several = write([text, "And"], num_beams=2, num_return_sequences=2, max_new_tokens=8, batch_size=2)
    assert [len(one) for one in several] == [2, 2]
    assert several[0][0]["generated_text"] == expected
    with pytest.raises(ValueError, match="give a text"):
        write("")


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_train_and_translate_user_pairs(tmp_path, tokenizer):
    lines = [{"translation": {"en": f"the number {n}", "es": f"el número {n}"}} for n in range(12)]
    data = write_lines(tmp_path / "pairs.jsonl", lines)
    fields = ["--source-field", "en", "--target-field", "es"]
    settings = [part for field, value in SMALL.items() for part in ("--config-override", f"{field}={value}")]
    write_lines(data, [*lines, {"translation": {"en": "long " * 40, "es": "largo"}}])
    trained = run(
        "train", "seq2seq", tmp_path / "model", "--data", data, *fields, *settings, "--max-steps", 2,
        "--batch-size", 4, "--max-length", 32,
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert "1 pairs are longer than 32 tokens" in trained.output
    write_lines(data, lines)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(model) is LiquidForSeq2SeqLM
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "liquid-text2text" in card and "pairs of at most 32 tokens" in card
    said = run("translate", tmp_path / "model", "the number 3", "the number 4", "--max-new-tokens", 5)
    assert said.exit_code == 0 and len(said.stdout.splitlines()) == 2
    scored = run("translate", tmp_path / "model", "--data", data, *fields, "--num-beams", 1, "--max-new-tokens", 5)
    assert "chrF" in scored.stdout and "BLEU" in scored.stdout
    said = run("translate", tmp_path / "model", "--data", data, *fields, "--output", tmp_path / "said.jsonl")
    assert said.exit_code == 0, said.output
    written = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(written) == 12 and written[3].keys() == {"source", "target", "translation"}
    assert written[3]["source"] == "the number 3"
    assert f"{model.num_parameters():,}" in run("info", tmp_path / "model").stdout
    more = run(
        "train",
        "seq2seq",
        tmp_path / "more",
        "--init-from",
        tmp_path / "model",
        "--data",
        data,
        *fields,
        "--max-steps",
        1,
    )
    assert more.exit_code == 0, more.output


def test_lora_saves_the_merged_model_and_the_adapter(folder, tmp_path):
    data = write_lines(tmp_path / "pairs.jsonl", [{"source": f"number {n}", "target": f"{n}"} for n in range(12)])
    trained = run(
        "train", "seq2seq", tmp_path / "tuned", "--init-from", folder, "--data", data, "--lora", "--lora-rank", 2,
        "--max-steps", 3, "--learning-rate", 0.1, "--warmup-ratio", 0, "--batch-size", 4,
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    base, merged = (load_seq2seq_lm(str(place))[0].eval() for place in (folder, tmp_path / "tuned"))
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    with torch.no_grad():
        before = base(**batch).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "tuned" / "adapter").eval()(**batch).logits
        after = merged(**batch).logits
    assert torch.allclose(after, adapted, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["translate", "MODEL"], "one of three"),
        (["translate", "MODEL", "a text", "--split", "test"], "one of three"),
        (["train", "seq2seq", "OUT", "--config-override", "width=3"], "no field 'width'"),
        (["train", "seq2seq", "OUT", "--data", "nowhere.jsonl"], "no file or folder"),
        (["train", "seq2seq", "OUT", "--source-field", "en"], "fields of --data"),
        (["train", "seq2seq", "OUT", "--init-from", "dfn-tiny"], "an encoder-decoder is needed"),
        (["train", "lm", "OUT", "--init-from", "liquid-tiny"], "a causal language model is needed"),
        (["translate", "MODEL", "a text", "--shuffle-sources"], "--shuffle-sources is for --data and --split"),
        (["translate", "MODEL", " "], "a text is blank"),
        (["translate", "dfn-tiny", "a text"], "an encoder-decoder is needed"),
        (["generate", "liquid-tiny"], "an encoder-decoder"),
    ],
)
def test_mistakes_are_one_line_errors(arguments, message, folder, tmp_path):
    places = {"MODEL": str(folder), "OUT": str(tmp_path / "out")}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
