"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108) and its tokenizer, as they run: plain PyTorch and the `tokenizers` library.

HuggingFace's `transformers` computes the same from the same folder, but takes longer to import than everything else that a server
needs together, and text_encoder.py then asks it only for what this module does not read. Names of weights, arguments and
outputs are those of `transformers`, so that either can stand in for the other.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
LAYER_NORM_EPSILON = 1e-12
# In a folder that `transformers` saved; one of an earlier version may lack some, and only that library knows what they then are.
CONFIG_KEYS = {
    "dim",
    "n_layers",
    "n_heads",
    "hidden_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
}
PLAIN = {
    "model_type": "distilbert",
    "architectures": ["DistilBertModel"],
    "activation": "gelu",
    "sinusoidal_pos_embds": False,
}
# Of other classes `transformers` changes the tokenizer after reading it.
TOKENIZER_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


class Output(NamedTuple):
    last_hidden_state: Tensor  # float32 [B, T, dim]


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: to draw numbers that the file's replace at once takes longer than to read these."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """As above."""


class DistilBert(nn.Module):
    """Token ids [B, T] to their vectors. Made to be loaded: dropout, which only training has, is left out."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": _Embedding(config.vocab_size, config.dim),
                "position_embeddings": _Embedding(config.max_position_embeddings, config.dim),
                "LayerNorm": nn.LayerNorm(config.dim, LAYER_NORM_EPSILON),
            }
        )
        self.transformer = _Transformer(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        """`attention_mask` [B, T] is 0 at padding; None: there is none."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.embeddings["word_embeddings"](input_ids) + self.embeddings["position_embeddings"](places)
        hidden = self.embeddings["LayerNorm"](hidden)
        mask = None
        if attention_mask is not None and not attention_mask.all():
            mask = attention_mask.bool()[:, None, None, :]  # (B, heads, queries, keys)
        return Output(self.transformer(hidden.to(next(self.transformer.parameters()).dtype), mask).float())

    def in_bfloat16(self) -> DistilBert:
        """The same function within a thousandth, by layers that compute in bfloat16; the embeddings are shared with this one."""
        brief = copy.copy(self)
        brief._modules = {**self._modules, "transformer": copy.deepcopy(self.transformer).to(torch.bfloat16)}
        return brief


class _Transformer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.n_layers))

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            hidden = layer(hidden, mask)
        return hidden


class _Layer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.heads = config.n_heads
        self.attention = nn.ModuleDict(
            {name: _Linear(config.dim, config.dim) for name in ("q_lin", "k_lin", "v_lin", "out_lin")}
        )
        self.sa_layer_norm = nn.LayerNorm(config.dim, LAYER_NORM_EPSILON)
        self.ffn = nn.ModuleDict(
            {"lin1": _Linear(config.dim, config.hidden_dim), "lin2": _Linear(config.hidden_dim, config.dim)}
        )
        self.output_layer_norm = nn.LayerNorm(config.dim, LAYER_NORM_EPSILON)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            self.attention[name](hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, dim / heads)
            for name in ("q_lin", "k_lin", "v_lin")
        )
        attended = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        hidden = self.sa_layer_norm(self.attention["out_lin"](attended) + hidden)
        return self.output_layer_norm(self.ffn["lin2"](F.gelu(self.ffn["lin1"](hidden))) + hidden)


class FileTokenizer:
    """Cuts texts as a `PreTrainedTokenizerFast` of that folder. One thread at a time."""

    is_fast = True

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / TOKENIZER_CONFIG).read_bytes())
        try:
            self.backend_tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the library has no class of its own
            raise ValueError(f"{TOKENIZER}: {error}") from error
        self.model_max_length = int(config["model_max_length"])
        self.pad_token_id = self.backend_tokenizer.token_to_id(config["pad_token"])

    def num_special_tokens_to_add(self) -> int:
        return int(self.backend_tokenizer.num_special_tokens_to_add(False))

    def __call__(self, texts: Sequence[str], max_length: int, split_special_tokens: bool, **_: Any) -> dict[str, Any]:
        """Ids, and which of them are special, of texts cut at `max_length` tokens. Padding and masks are never made."""
        self.backend_tokenizer.enable_truncation(max_length)
        self.backend_tokenizer.encode_special_tokens = split_special_tokens
        encoded = self.backend_tokenizer.encode_batch(texts)
        return {
            "input_ids": [text.ids for text in encoded],
            "special_tokens_mask": [text.special_tokens_mask for text in encoded],
        }


def can_read(folder: Path) -> bool:
    """Whether this module can stand in for `transformers` there."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        tokenizer = json.loads((folder / TOKENIZER_CONFIG).read_bytes())
        return (
            config.keys() >= CONFIG_KEYS
            and all(config.get(name) == value for name, value in PLAIN.items())
            and tokenizer["tokenizer_class"] in TOKENIZER_CLASSES
            and {"model_max_length", "pad_token"} <= tokenizer.keys()
            and all((folder / file).exists() for file in (WEIGHTS, TOKENIZER))
        )
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return False


def load(folder: Path) -> tuple[DistilBert, FileTokenizer]:
    """Raises ValueError, RuntimeError or SafetensorError when a file is damaged or does not fit the others."""
    values = json.loads((folder / CONFIG).read_bytes())
    tokenizer = FileTokenizer(folder)
    model = DistilBert(SimpleNamespace(**values, hidden_size=values["dim"], to_diff_dict=values.copy))
    weights = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    model.load_state_dict(weights, assign=True)
    return model, tokenizer
