"""A text encoder small enough to make and load in a moment, for tests that need one but not a good one."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

TINY_WIDTH = 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "shirt", "dress", "skirt", "jeans", "jacket", "coat", "sweater", "blouse", "pants", "boots", "sneakers",
    "bag", "hat", "linen", "cotton", "wool", "silk", "leather", "denim", "red", "blue", "black", "white",
    "green", "floral", "striped", "casual", "formal", "party", "wedding", "office", "summer", "winter", "men",
    "women", "kids", "oversized", "slim", "long", "short", "size", "small", "large",
]  # fmt: skip


def tiny_text_encoder(folder: Path, seed: int = 0) -> Path:
    """Saves a random two-layer DistilBertModel of width 32 and its tokenizer in `folder`, to be TEXT_ENCODER.

    The same seed gives the same weights. The tokenizer knows some words of a shop, and spells all others by Latin letters or
    Hangul syllables, so that different words have different vectors.
    """
    characters = [
        *string.ascii_lowercase,
        *string.digits,
        *string.punctuation,
        *map(chr, range(ord("가"), ord("힣") + 1)),
    ]
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters), *WORDS]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.BertNormalizer(strip_accents=False, lowercase=True)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(folder)
    config = DistilBertConfig(
        vocab_size=len(pieces), dim=TINY_WIDTH, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        DistilBertModel(config).save_pretrained(folder)
    return folder
