"""The pipeline of encoder-decoders, `pipeline("liquid-text2text")`: transformers 5 has no such task."""

from typing import Any

from transformers.pipelines import Pipeline


class Text2TextPipeline(Pipeline):
    """Maps a text to `[{"generated_text": ...}]`, one entry for each returned sequence.

    All further arguments, of the pipeline or of a call, are passed to `generate()`.
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
