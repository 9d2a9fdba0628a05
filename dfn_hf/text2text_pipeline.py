"""`pipeline("liquid-text2text")`: text in, text out. transformers 5 has no task of this kind any more."""

from typing import Any

from transformers import AutoModelForSeq2SeqLM
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

TASK = "liquid-text2text"


class Text2TextPipeline(Pipeline):
    """What an encoder-decoder makes of a text: `[{"generated_text": …}]`, as many as sequences are returned.

    Every further argument, of the pipeline or of a call, goes to `generate()`.
    """

    model: Any
    tokenizer: Any
    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False

    def _sanitize_parameters(self, **generate_arguments: Any) -> tuple[dict, dict, dict]:
        return {}, generate_arguments, {}

    def preprocess(self, input_: Any, **parameters: Any) -> dict[str, Any]:
        if not isinstance(input_, str) or not input_:
            raise ValueError(f"the pipeline takes a text or a list of texts, got {input_!r}")
        return self.tokenizer(input_, return_tensors="pt")

    def _forward(self, input_tensors: dict[str, Any], **parameters: Any) -> Any:
        generated = self.model.generate(**input_tensors, **parameters)
        rows = input_tensors["input_ids"].shape[0]
        return {"generated": generated.reshape(rows, -1, generated.shape[-1])}

    def postprocess(self, model_outputs: Any, **parameters: Any) -> list[dict[str, str]]:
        texts = self.tokenizer.batch_decode(model_outputs["generated"][0], skip_special_tokens=True)
        return [{"generated_text": text} for text in texts]


def register() -> None:
    """Make the task known to `transformers.pipeline`."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(TASK, Text2TextPipeline, pt_model=AutoModelForSeq2SeqLM, type="text")
