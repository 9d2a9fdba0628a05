"""Registers the task `liquid-text2text` with `transformers.pipeline`."""

from .import_hook import when_imported

TASK = "liquid-text2text"


def register_text2text_pipeline() -> None:
    """Register the task when `transformers.pipelines` is imported."""
    when_imported("transformers.pipelines", _register)


def _register() -> None:
    from transformers import AutoModelForSeq2SeqLM
    from transformers.pipelines import PIPELINE_REGISTRY

    from .text2text_pipeline import Text2TextPipeline

    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(TASK, Text2TextPipeline, pt_model=AutoModelForSeq2SeqLM, type="text")
