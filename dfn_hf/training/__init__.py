"""Training: language models, encoder-decoders, fields, contrastive pairs and distillation."""

from ..lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "contrastive": ["train_contrastive"],
        "distillation": ["DistillationSettings", "distill_model"],
        "field": ["load_arrays", "new_field_model", "train_fields"],
        "lora": ["add_lora"],
        "recipes": ["train_new_contrastive_model", "train_new_field_model"],
        "run": ["TrainingResult"],
        "settings": ["TrainingSettings"],
        "trainer": ["MatrixDecayTrainer", "train_model"],
    },
)
