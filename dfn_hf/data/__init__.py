"""Data: text, token blocks, pairs, fields, and the bundled corpus, verses and tokenizers."""

from ..lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__.rpartition(".")[0],
    {
        "assets.corpus": ["load_corpus"],
        "assets.tokenizers": ["load_tokenizer"],
        "assets.verses": ["load_verses"],
        "data.collators": ["PackedBlockCollator"],
        "data.contrastive": ["ContrastiveCollator", "pair_views", "text_pairs", "text_view"],
        "data.fields": [
            "FieldCollator",
            "array_field",
            "grid_coordinates",
            "psnr",
            "read_image",
            "read_sound",
            "snr",
            "sound_field",
        ],
        "data.lm_blocks": ["corpus_blocks", "text_blocks"],
        "data.packing": ["pack", "tokenize"],
        "data.pairs": ["encode_pairs", "load_pairs", "training_pairs"],
        "data.text": ["load_text"],
        "data.tokens": ["token_ids"],
    },
)
