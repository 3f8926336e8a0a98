"""The item tower: standard attributes, reinforced by what they attend to, as one unit vector.

STD embeddings are the query, RE embeddings and title token vectors are key and value of a cross-attention with a
residual; the pooled result goes through an MLP projection head. Trained by SimCSE (Gao, Yao, Chen, EMNLP 2021): two views
of one item under feature dropout and token masking (`augment`) are a positive pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensors import ItemBatch, TextScaler
from vocab import MASK, PAD


@dataclass(frozen=True)
class ItemTowerConfig:
    std_fields: list[int]  # field number of every STD id
    re_fields: list[int]  # field number of every RE id that was trained
    text_width: int  # of the text encoder
    embedding_dim: int = 64  # of one STD or RE value; the reranker shares these tables, so it stays modest
    width: int = 128  # inside the transformer
    heads: int = 4
    output: int = 128  # of the item vector
    dropout: float = 0.1
    # Ablations: how the inputs meet, which of them count, and whether the tables start orthogonal.
    fusion: Literal["cross", "self", "mean"] = "cross"
    re: bool = True
    title: bool = True
    orthogonal: bool = True


def starting_table(rows: int, dim: int, orthogonal: bool = True) -> Tensor:
    """Unit rows [rows, dim]; within each block of `dim` rows they are orthogonal, and across blocks nearly so.

    More rows than dimensions cannot all be orthogonal; blocks are the closest to it that needs no training. Not
    `orthogonal`: normal random numbers instead, as many of them, in rows of the same length. Row 0 (padding) is zero.
    """
    start = nn.init.orthogonal_ if orthogonal else nn.init.normal_
    blocks = [start(torch.empty(dim, dim)) for _ in range(math.ceil(rows / dim))]
    table = torch.cat(blocks)[:rows].clone()
    if not orthogonal:
        table = F.normalize(table, dim=-1)
    table[PAD] = 0.0
    return table


class ItemTower(nn.Module):
    """ItemBatch -> float32 [B, output], unit length."""

    std_field: Tensor
    re_field: Tensor

    def __init__(self, config: ItemTowerConfig) -> None:
        super().__init__()
        self.config = config
        dim, width = config.embedding_dim, config.width
        self.std_table = nn.Embedding(len(config.std_fields), dim, padding_idx=PAD)
        self.re_table = nn.Embedding(len(config.re_fields), dim, padding_idx=PAD)
        for table in (self.std_table, self.re_table):
            table.weight.data.copy_(starting_table(len(table.weight), dim, config.orthogonal))
        self.register_buffer("std_field", torch.tensor(config.std_fields))
        self.register_buffer("re_field", torch.tensor(config.re_fields))

        self.std_input = nn.Linear(dim, width)
        self.re_input = nn.Linear(dim, width)
        self.token_scaler = TextScaler(config.text_width)
        self.token_input = nn.Linear(config.text_width, width)
        self.std_field_embedding = nn.Embedding(max(config.std_fields) + 1, width)
        self.re_field_embedding = nn.Embedding(max(config.re_fields, default=0) + 1, width)
        self.masked_token = nn.Parameter(torch.randn(config.text_width) * 0.02)
        # Something to attend to when an item has neither RE values nor title: an empty softmax would be NaN.
        self.empty_context = nn.Parameter(torch.randn(width) * 0.02)
        # The same for a query without STD values, and a place to gather: it stands before the STD values.
        self.item_query = nn.Parameter(torch.randn(width) * 0.02)
        # A new RE word has no trained row: its text vector, projected, stands in for one. See `re_embedding`.
        self.word_scaler = TextScaler(config.text_width)
        self.re_from_text = nn.Linear(config.text_width, dim, bias=False)

        def layer() -> nn.TransformerEncoderLayer:
            return nn.TransformerEncoderLayer(
                width, config.heads, 4 * width, config.dropout, activation="gelu", batch_first=True, norm_first=True
            )

        self.encoder = layer()
        self.context_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(width)
        self.cross_attention = nn.MultiheadAttention(width, config.heads, config.dropout, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(config.dropout),
            nn.Linear(4 * width, width),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, config.output)
        )
        # Last, and beside what it stands for: of one seed, what towers have in common starts with the same random numbers.
        if config.fusion == "self":
            self.together = nn.ModuleList([layer(), layer()])  # as deep as the two attentions

    def forward(self, batch: ItemBatch, re_text: Tensor | None = None, text_share: float = 0.0) -> Tensor:
        """Unit item vectors [B, output].

        re_text [re rows, text width] and `text_share` (training only): the share of RE values whose embedding is
        projected from their text instead of read from the table, so that both live in one space.
        """
        return F.normalize(self.pooled(batch, re_text, text_share), dim=-1)

    def pooled(self, batch: ItemBatch, re_text: Tensor | None = None, text_share: float = 0.0) -> Tensor:
        query, mask = self._query(batch)
        context, context_mask = self._context(batch, re_text, text_share)
        if self.config.fusion == "cross":
            query = self.encoder(query, src_key_padding_mask=~mask)  # (B, 1 + S, width)
            attended, _ = self.cross_attention(
                self.query_norm(query), context, context, key_padding_mask=~context_mask, need_weights=False
            )
            fused = query + attended
            fused = fused + self.feed_forward(fused)
        else:
            fused = torch.cat([self.query_norm(query), context], dim=1)  # (B, 1 + S + 1 + R + T, width)
            mask = torch.cat([mask, context_mask], dim=1)
            for layer in self.together if self.config.fusion == "self" else ():
                fused = layer(fused, src_key_padding_mask=~mask)
        weights = mask.unsqueeze(-1).to(fused.dtype)
        mean = (fused * weights).sum(1) / weights.sum(1)
        return self.head(torch.cat([fused[:, 0], mean], dim=-1))  # (B, output)

    def re_embedding(self, text_vectors: Tensor) -> Tensor:
        """Embeddings [K, embedding_dim] for words that were never trained, from their text vectors [K, text width]."""
        return self.re_from_text(self.word_scaler(text_vectors))

    @torch.no_grad()
    def fit_text(self, tokens: Tensor, words: Tensor) -> None:
        """Before training: what is common to title tokens [K, text width] and to the texts of RE words [W, text width]."""
        self.token_scaler.fit(tokens)
        self.word_scaler.fit(words)
        self.masked_token.copy_(self.token_scaler.mean)  # a masked token says nothing at first

    @torch.no_grad()
    def grow(self, fields: list[int], text_vectors: Tensor) -> None:
        """Append rows for new RE words: their field numbers [K] and text vectors [K, text width]. Serving only."""
        old = self.re_table
        rows = torch.cat([old.weight, self.re_embedding(text_vectors.to(old.weight.device))])
        self.re_table = nn.Embedding.from_pretrained(rows, freeze=True, padding_idx=PAD)
        self.re_field = torch.cat([self.re_field, torch.tensor(fields, device=self.re_field.device)])

    def _query(self, batch: ItemBatch) -> tuple[Tensor, Tensor]:
        std = self.std_input(self.std_table(batch.std)) + self.std_field_embedding(self.std_field[batch.std])
        first = self.item_query.expand(len(std), 1, -1)
        always = torch.ones(len(std), 1, dtype=torch.bool, device=std.device)
        return torch.cat([first, std], dim=1), torch.cat([always, batch.std != PAD], dim=1)

    def _context(self, batch: ItemBatch, re_text: Tensor | None, text_share: float) -> tuple[Tensor, Tensor]:
        embedded = self.re_table(batch.re)  # (B, R, dim)
        if re_text is not None and text_share > 0.0:
            from_text = torch.rand(batch.re.shape, device=embedded.device) < text_share
            from_text &= batch.re > MASK
            embedded = embedded.masked_scatter(
                from_text.unsqueeze(-1), self.re_embedding(re_text[batch.re[from_text]]).to(embedded.dtype)
            )
        re = self.re_input(embedded) + self.re_field_embedding(self.re_field[batch.re])
        tokens = self.token_input(self.token_scaler(batch.tokens))
        empty = self.empty_context.expand(len(re), 1, -1)
        always = torch.ones(len(re), 1, dtype=torch.bool, device=re.device)
        context = self.context_norm(torch.cat([empty, re, tokens], dim=1))  # (B, 1 + R + T, width)
        return context, torch.cat(
            [always, (batch.re != PAD) & self.config.re, batch.token_mask & self.config.title], dim=1
        )

    def augment(self, batch: ItemBatch, std_dropout: float, re_dropout: float, token_masking: float) -> ItemBatch:
        """One view of each item: STD values masked, RE values dropped, title tokens masked, each at its own rate."""

        def chance(like: Tensor, rate: float) -> Tensor:
            return torch.rand(like.shape, device=like.device) < rate

        hide_std = chance(batch.std, std_dropout) & (batch.std != PAD)
        hide_token = chance(batch.token_mask, token_masking) & batch.token_mask
        return replace(
            batch,
            std=batch.std.masked_fill(hide_std, MASK),
            re=batch.re.masked_fill(chance(batch.re, re_dropout), PAD),
            tokens=torch.where(hide_token.unsqueeze(-1), self.masked_token, batch.tokens),
        )
