"""Text from a prompt."""

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

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
        tokenizer: its tokenizer.
        prompt: an empty prompt starts a new document.
        max_new_tokens: how many tokens to add at most.
        temperature: 0 takes the most probable token each time; above, samples from the logits divided by it.
        top_k: sample among so many most probable tokens; 0 means all.
        top_p: sample among the most probable tokens that together hold this share.
        seed: of the sampling; None takes another each time.
        streamer: shown the text as it grows.

    Raises:
        ValueError: an option out of range, a tokenizer with ids outside the model's vocabulary, or no prompt and no
            token that starts a document.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    check_vocabulary(model, tokenizer)
    token_ids = tokenizer(prompt)["input_ids"] or [document_start_token(tokenizer)]
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
    output = model.generate(  # type: ignore[operator]
        input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, streamer=streamer
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
