"""Evaluation: language models, translation, retrieval and streamed generation."""

from ..lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "generation": ["generate_text"],
        "language_model": ["Evaluation", "evaluate_causal_lm"],
        "retrieval_metrics": ["embed", "retrieval", "second_views"],
        "translation": ["TranslationScores", "score_translations", "shuffle_sources", "translate"],
    },
)
