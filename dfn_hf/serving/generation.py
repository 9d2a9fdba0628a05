"""Generation for the server: bounded prompts and outputs, stopped when the client has left."""

import asyncio
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cli.serving.utils import DirectStreamer, GenerateManager
from transformers.utils import logging

from .client import CURRENT, Client
from .request_errors import RequestError
from .requests import Bounds

DEFAULT_NEW_TOKENS = 1024  # what `transformers serve` generates for a request without a generation configuration
MAX_LOGGED_MESSAGES = 1000


class ClientGone(StoppingCriteria):
    """Stops a generation whose client has left."""

    def __init__(self, client: Client):
        self.client = client

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.client.gone.is_set(), dtype=torch.bool, device=input_ids.device)


class BoundedGenerateManager(GenerateManager):
    """The queue of generations of `transformers serve`, with bounds for each request.

    Args:
        bounds: upper bounds of the prompt and of the number of generated tokens.
    """

    def __init__(self, bounds: Bounds):
        super().__init__()
        self.bounds = bounds

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        """Start a generation that stops at its next token when the client leaves.

        Raises:
            RequestError: see `bound`; also for beam search, which cannot stream.
        """
        self.bound(inputs, gen_config)
        if (gen_config.num_beams or 1) > 1:
            raise RequestError('beam search cannot stream: set "stream": false', "generation_config.num_beams")
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        CURRENT.get().call_when_gone(streamer.cancel)
        return queue, streamer

    async def generate_non_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, Any]:
        """Generate until the text ends or the client leaves.

        Raises:
            RequestError: see `bound`.
        """
        self.bound(inputs, gen_config)
        criteria = StoppingCriteriaList([ClientGone(CURRENT.get())])
        inputs = {**inputs, "stopping_criteria": criteria}
        return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> "asyncio.Future[Any]":
        """Queue a generation; it returns the prompt if the client has left before its turn."""
        client = CURRENT.get()

        def run(*args: Any, **kwargs: Any) -> Any:
            return kwargs["input_ids"] if client.gone.is_set() else fn(*args, **kwargs)

        return super().async_submit(run, *args, **kwargs)

    def bound(self, inputs: Any, config: GenerationConfig) -> None:
        """Check the length of the prompt, and limit the number of new tokens to the bound of the server.

        Raises:
            RequestError: the prompt is empty or too long.
        """
        length = inputs["input_ids"].shape[-1]
        if length == 0:
            raise RequestError("the prompt is empty: send at least one token")
        if length > self.bounds.prompt_tokens:
            raise RequestError(
                f"the prompt has {length} tokens, more than the {self.bounds.prompt_tokens} that this server reads "
                "(--max-prompt-tokens)"
            )
        config.max_new_tokens = min(config.max_new_tokens or DEFAULT_NEW_TOKENS, self.bounds.new_tokens)
        forget_logged_messages()


def explain_template_errors(processor: Any) -> None:
    """Let `apply_chat_template` raise RequestError: templates raise errors of many classes for unsuitable messages."""
    apply = processor.apply_chat_template

    def apply_or_refuse(*args: Any, **kwargs: Any) -> Any:
        if not (processor.chat_template or "chat_template" in kwargs):
            raise RequestError("the tokenizer of this model has no chat template: use /v1/completions")
        try:
            return apply(*args, **kwargs)
        except Exception as error:
            raise RequestError(f"the chat template refuses the messages: {error}", "messages") from error

    processor.apply_chat_template = apply_or_refuse


def forget_logged_messages() -> None:
    """Clear the caches of `warning_once` and `info_once`, because some messages contain values from requests."""
    for log in (logging.warning_once, logging.info_once):
        if log.cache_info().currsize > MAX_LOGGED_MESSAGES:
            log.cache_clear()
