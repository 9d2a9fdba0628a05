"""Generates text from a prompt."""

import math

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from ..data.tokens import encode_texts
from .language_model import check_vocabulary, document_start_token


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    streamer: TextStreamer | None = None,
) -> str:
    """Continue `prompt` with `model.generate`, and return prompt and continuation.

    Args:
        model: a causal language model.
        tokenizer: the model's tokenizer.
        prompt: text to continue; an empty prompt starts a new document.
        max_new_tokens: maximum number of new tokens.
        temperature: divisor of the logits for sampling; 0 means greedy decoding.
        top_k: sample from the `top_k` most probable tokens; 0 means all tokens.
        top_p: sample from the most probable tokens whose total probability reaches `top_p`.
        seed: seed of the sampling; None draws a different sample in each call.
        streamer: receives the text during generation.

    Raises:
        ValueError: an option is out of range, the tokenizer has ids outside the model's vocabulary or cannot encode
            the prompt, the prompt is empty and the tokenizer has no start token, or the logits are not finite.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    check_vocabulary(model, tokenizer)
    token_ids = encode_texts([prompt], tokenizer)["input_ids"][0] or [document_start_token(tokenizer)]
    input_ids = torch.tensor([token_ids], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else token_ids[0],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    if seed is not None:
        set_seed(seed)
    try:
        output = model.generate(  # type: ignore[operator]
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, streamer=streamer
        )
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise ValueError(
            "the model's logits are not finite: its weights are damaged, or the temperature is too low"
        ) from error
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
