"""Pipeline `liquid-text2text` for encoder-decoders; transformers 5 has no text2text pipeline."""

from typing import Any

from transformers.pipelines import Pipeline


class Text2TextPipeline(Pipeline):
    """Maps a text to `[{"generated_text": ...}]`, one entry for each returned sequence.

    Other arguments of the pipeline or of a call are passed to `generate()`.
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
            raise ValueError(f"the pipeline got {input_!r}: give a text that is not empty, or a list of such texts")
        return self.tokenizer(input_, return_tensors="pt")

    def _forward(self, input_tensors: dict[str, Any], **parameters: Any) -> Any:
        generated = self.model.generate(**input_tensors, **parameters)
        rows = input_tensors["input_ids"].shape[0]
        return {"generated": generated.reshape(rows, -1, generated.shape[-1])}

    def postprocess(self, model_outputs: Any, **parameters: Any) -> list[dict[str, str]]:
        texts = self.tokenizer.batch_decode(model_outputs["generated"][0], skip_special_tokens=True)
        return [{"generated_text": text} for text in texts]
