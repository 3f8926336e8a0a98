"""The user tower: behaviour, context and body, fused into item space.

An item's row is `[unit vector ; popularity coordinates ; collaborative coordinates]`. The query is
`[scaled unit vector ; learned weights ; collaborative vector]`, so that one inner product says what a shopper is
drawn to, how much they follow what is wanted now, and what shoppers like them took. The item tower stays frozen; a residual
adapter, if there is one, turns its vectors by what an item's STD and RE values say to shoppers, also where nobody met it yet
(a sum of feature embeddings, as in LightFM: Kula, CBRecSys 2015); the collaborative coordinates belong to this tower, start near
zero, and count as zero for items nobody touched yet.

Beside that deep part stands a wide one, which no vector holds: learned weights of links from the items of the history (see
item_links.py). Retrieval adds them to the inner product.

The reading of the history by its latest event: Kang and McAuley, "Self-attentive sequential recommendation", ICDM 2018. The loss:
train_user.py. `UserTower` is trained; `FusedUserTower` serves what was trained, to one shopper at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensors import KINDS, LinkWeights, TextScaler, UserBatch, log_strength
from vocab import PAD

# Where the weights of links start, in logits. Their logarithms are learned, at many times the pace of other weights, for each is
# met but a few hundred times an epoch.
LINK_START = (2.0, 2.0)  # log strength of what is taken together, variant
LINK_PACE = 20.0
# Of a tower that learned nothing, in logits: what e times the events are worth, in all windows of popularity together, and what a
# product loses from its first day to its e^6th.
UNTAUGHT_WANTED, UNTAUGHT_AGE = 8.0, 2.0


@dataclass(frozen=True)
class UserTowerConfig:
    items: int  # rows of the collaborative table: the catalogue at training time
    item_width: int  # of the frozen unit vectors
    popularity_width: int
    profile_width: int
    text_width: int
    collaborative: int = 32  # 0 switches collaborative coordinates off
    adapter: bool = False  # whether item vectors are turned by their values
    std_words: int = 0  # of the vocabularies at training time, for the adapter's table
    re_words: int = 0
    width: int = 128
    heads: int = 4
    layers: int = 1
    history: int = 50  # events read, the latest ones
    dropout: float = 0.2
    # Ablations: which inputs count, and whether the query has weights for popularity.
    behaviour: bool = True
    context: bool = True
    profile: bool = True
    popularity: bool = True
    # As far as the held-out days bear them out, see train_user.trusted_config: the share of a query in which the history speaks,
    # the rest being what a stranger of the same context and body would ask; how many times the learned weights of links count.
    history_trust: float = 1.0
    link_trust: float = 1.0

    @property
    def row_width(self) -> int:
        """Dimensions of an item's row."""
        return self.item_width + self.popularity_width + self.collaborative

    @property
    def untouched_column(self) -> int:
        """Of an item's row: 1 where nobody met the item yet (the last popularity coordinate)."""
        return self.item_width + self.popularity_width - 1


class UserTower(nn.Module):
    """UserBatch -> query float32 [B, row_width]; its inner product with an item's row is the retrieval logit."""

    def __init__(self, config: UserTowerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.collaborative = nn.Embedding(config.items, max(1, config.collaborative))
        self.item_input = nn.Linear(config.item_width + config.collaborative, width)
        if config.adapter:
            words = config.std_words + config.re_words
            self.adapter = nn.EmbeddingBag(words, config.item_width, mode="sum", padding_idx=PAD)
            nn.init.zeros_(self.adapter.weight)  # it sets out from what the item tower knows, as it is
        self.kind_embedding = nn.Embedding(KINDS, width)
        self.age_input = nn.Linear(1, width)
        # Counted from the latest event: "the last thing seen" means the same in a short and in a long history.
        self.recency_embedding = nn.Embedding(config.history, width)
        # PyTorch starts embeddings at a spread of 1: an item would be lost beside its kind and its place.
        for embedding in (self.collaborative, self.kind_embedding, self.recency_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        self.behaviour_token = nn.Parameter(torch.randn(width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, config.heads, 2 * width, config.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.behaviour = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.pool_weight = nn.Linear(width, 1)
        self.context_scaler = TextScaler(config.text_width)
        self.context = nn.Sequential(nn.Linear(config.text_width, width), nn.GELU(), nn.Linear(width, width))
        self.profile = nn.Linear(max(1, config.profile_width), width)
        self.fusion = nn.Sequential(
            nn.LayerNorm(3 * width + 3), nn.Linear(3 * width + 3, 2 * width), nn.GELU(), nn.Dropout(config.dropout),
        )  # fmt: skip
        self.to_item = nn.Linear(2 * width, config.item_width)
        self.to_popularity = nn.Linear(2 * width, config.popularity_width)
        self.to_collaborative = nn.Linear(3 * width, max(1, config.collaborative))
        self.history_gain = nn.Parameter(torch.tensor(1.0))
        # Logits of unit vectors need a scale to be sharp enough: 1 / 0.1 at the start, learned from there.
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.link_growth = nn.Parameter(torch.zeros(len(LINK_START)))

    @classmethod
    @torch.no_grad()
    def untaught(cls, config: UserTowerConfig) -> UserTower:
        """What serves while a log teaches nothing yet: shoppers are offered what is like the products they met, and linked to them,
        all of these counting the same; beyond that what many want, and what came last. Context and body say nothing."""
        tower = cls(replace(config, collaborative=0, adapter=False))
        for parameter in tower.parameters():
            parameter.zero_()
        tower.history_gain.fill_(1.0)
        tower.log_scale.fill_(math.log(10.0))
        windows = config.popularity_width - 2
        tower.to_popularity.bias[:windows] = UNTAUGHT_WANTED / max(1, windows)
        tower.to_popularity.bias[windows] = -UNTAUGHT_AGE
        return tower

    def forward(self, batch: UserBatch) -> Tensor:
        past, rest = self._past(batch), self._rest(batch)
        trust = self.config.history_trust
        if trust == 1.0 or not batch.history_mask.any():
            return self._query(past, rest)
        # As one batch: of a single shopper each operation costs about as much for two rows as for one.
        own, of_stranger = self._query(torch.cat([past, self._no_past(batch)]), torch.cat([rest, rest])).chunk(2)
        return trust * own + (1.0 - trust) * of_stranger

    def stranger_query(self, batch: UserBatch) -> Tensor:
        """What shoppers of whom no event is known would ask with the same bodies and contexts: float32 [B, row_width]."""
        return self._query(self._no_past(batch), self._rest(batch))

    def _no_past(self, batch: UserBatch) -> Tensor:
        """What `_past` says of strangers."""
        return batch.history.new_zeros(len(batch.history), self.config.width + self.config.item_width + 1)

    def _past(self, batch: UserBatch) -> Tensor:
        """What the history says: float32 [B, width + item_width + 1], the last being whether there is one. All 0 without."""
        config = self.config
        mask = batch.history_mask & config.behaviour  # (B, T)
        # The transformer is most of the work. In training it is asked all the same: processes that train together wait for the
        # gradients of each parameter from every one of them.
        if not self.training and not mask.any():
            return self._no_past(batch)
        collaborative = batch.collaborative[..., : config.collaborative]
        behaviour = self.item_input(torch.cat([batch.history, collaborative], dim=-1))
        behaviour = behaviour + self.kind_embedding(batch.kind) + self.age_input(batch.age.unsqueeze(-1))
        # A basket leaves holes in the mask, so recency counts events, not columns.
        recency = (mask.flip(1).cumsum(1).flip(1) - 1).clamp(0, config.history - 1)
        behaviour = behaviour + self.recency_embedding(recency)
        first = self.behaviour_token.expand(len(mask), 1, -1)
        always = torch.ones(len(mask), 1, dtype=torch.bool, device=mask.device)
        encoded = self.behaviour(
            torch.cat([first, behaviour], dim=1), src_key_padding_mask=~torch.cat([always, mask], dim=1)
        )  # (B, 1 + T, width)
        # Of the latest event, in the light of all: what comes next hangs on it most. Zero where there is none.
        has_history = mask.any(1, keepdim=True).float()
        latest = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
        summary = encoded[torch.arange(len(mask), device=mask.device), latest] * has_history

        # What the shopper touched, weighted by how much each event still says: a residual straight into item space.
        weights = self.pool_weight(encoded[:, 1:]).squeeze(-1).masked_fill(~mask, -torch.inf)
        weights = torch.where(mask.any(1, keepdim=True), weights, torch.zeros(1, device=mask.device)).softmax(-1)
        weights = (weights * mask).unsqueeze(1)  # (B, 1, T)
        liked = (weights @ batch.history).squeeze(1)
        return torch.cat([summary, liked, has_history], dim=-1)

    def _rest(self, batch: UserBatch) -> Tensor:
        """What context and body say: float32 [B, 2 * width + 2], the last two being whether there is any."""
        config = self.config
        has_context = (batch.context != 0).any(1, keepdim=True).float() * config.context
        profile = batch.profile if config.profile_width else batch.profile.new_zeros(len(batch.profile), 1)
        has_profile = (batch.profile[:, : config.profile_width // 2] != 0).any(1, keepdim=True).float() * config.profile
        context = self.context(self.context_scaler(batch.context)) * has_context
        return torch.cat([context, self.profile(profile) * has_profile, has_context, has_profile], dim=-1)

    def _query(self, past: Tensor, rest: Tensor) -> Tensor:
        """What both ask for together: float32 [B, row_width]."""
        config = self.config
        summary, liked, has_history = past.split([config.width, config.item_width, 1], dim=-1)
        inputs, has_others = rest.split([2 * config.width, 2], dim=-1)
        fused = self.fusion(torch.cat([summary, inputs, has_history, has_others], dim=-1))
        unit = F.normalize(self.history_gain * liked + self.to_item(fused), dim=-1)
        parts = [self.log_scale.exp() * unit, self.to_popularity(fused) * config.popularity]
        if config.collaborative:
            parts.append(self.to_collaborative(torch.cat([summary, fused], dim=-1)))
        return torch.cat(parts, dim=-1)

    @property
    def link_weights(self) -> LinkWeights:
        """As far as they are trusted."""
        return LinkWeights(*(self._link_weights * self.config.link_trust).tolist())

    @property
    def basket_weights(self) -> LinkWeights:
        """As learned: what else is taken on the same visit is what they know best."""
        return LinkWeights(*self._link_weights.tolist())

    @property
    def _link_weights(self) -> Tensor:
        """[2], positive; 0 without behaviour, to which they belong."""
        start = torch.tensor(LINK_START, device=self.link_growth.device) * self.config.behaviour
        return start * (LINK_PACE * self.link_growth).exp()

    def link_scores(self, together: np.ndarray, variant: np.ndarray) -> Tensor:
        """What links (float32 [B, N] each, see ItemLinks.scores) add to the logits: [B, N], as `LinkWeights.gain`."""
        weights = self._link_weights * self.config.link_trust
        return weights[0] * torch.from_numpy(log_strength(together)) + weights[1] * torch.from_numpy(variant)

    def item_rows(self, items: Tensor, vectors: Tensor, popularity: Tensor) -> Tensor:
        """Index rows [M, row_width] of catalogue rows `items` int64 [M], their vectors as `adapted` and popularity.

        An item without events has no collaborative coordinates: whatever its row drifted to as a negative is not
        evidence. The last popularity coordinate says so (see tensors.Popularity).
        """
        return torch.cat([vectors, popularity, self.collaborative_of(items, popularity)], dim=-1)

    def adapted(self, vectors: Tensor, std: Tensor, re: Tensor) -> Tensor:
        """What stands in index rows and in histories for the item tower's unit vectors [M, item_width] of items with STD and RE ids
        int [M, S] and [M, R]: of unit length too. A word that is newer than this tower says nothing."""
        config = self.config
        if not config.adapter:
            return vectors
        re = torch.where((re != PAD) & (re < config.re_words), re + config.std_words, PAD)
        words = torch.cat([std, re], dim=1)
        count = (words != PAD).sum(1, keepdim=True).clamp(min=1)
        return F.normalize(vectors + self.adapter(words) / count.sqrt(), dim=-1)

    def collaborative_of(self, items: Tensor, popularity: Tensor) -> Tensor:
        """[..., collaborative] of catalogue rows, zero where the item had no event yet."""
        known = 1.0 - popularity[..., -1:]
        return (self.collaborative(items) * known)[..., : self.config.collaborative]

    @torch.no_grad()
    def realign(self, rows: list[int]) -> None:
        """Reorder the collaborative table to another catalogue: `rows[i]` is item i's trained row, -1 if it has none.

        Items that came after training start at zero, and learn when the tower is trained again, or goes on learning.
        """
        index = torch.tensor(rows, dtype=torch.int64)
        weight = self.collaborative.weight[index.clamp(min=0)] * (index >= 0).unsqueeze(1)
        self.collaborative = nn.Embedding.from_pretrained(weight, freeze=False)
        self.config = replace(self.config, items=len(rows))

    def forget(self, batch: UserBatch, rate: float) -> UserBatch:
        """Training only: hide each of the three inputs of a shopper at `rate`, so that any of them may be missing."""

        def keep(like: Tensor) -> Tensor:
            shape = (len(like),) + (1,) * (like.dim() - 1)
            return torch.rand(shape, device=like.device) >= rate

        half = self.config.profile_width // 2
        hidden_profile = torch.cat(
            [torch.zeros_like(batch.profile[:, :half]), torch.ones_like(batch.profile[:, half:])], dim=1
        )
        return replace(
            batch,
            history_mask=batch.history_mask & keep(batch.history_mask),
            context=batch.context * keep(batch.context),
            profile=torch.where(keep(batch.profile), batch.profile, hidden_profile),
        )


class FusedUserTower:
    """A trained `UserTower` for one shopper: the same query within 1e-5, in well under half the time.

    So small a forward takes what its operations cost each, however little they compute: this one asks for no parameter by name,
    does as one what reads the same input, and leaves out what was not given. It also asks for the same shopper less one event or
    another, and reads the events once for all of these.
    """

    def __init__(self, tower: UserTower) -> None:
        def weights(*layers: Any) -> tuple[Tensor, ...]:
            return tuple(parameter.detach() for layer in layers for parameter in (layer.weight, layer.bias))

        config = self._config = tower.config
        self._event = (
            torch.cat([tower.item_input.weight, tower.age_input.weight], dim=1).detach(),
            (tower.item_input.bias + tower.age_input.bias).detach(),
        )
        self._kinds, self._recency = (
            tower.kind_embedding.weight.detach(),
            tower.recency_embedding.weight.detach().flip(0),
        )
        self._token = tower.behaviour_token.detach().view(1, 1, -1)
        self._layers = [
            (
                *weights(layer.norm1), layer.self_attn.in_proj_weight.detach(), layer.self_attn.in_proj_bias.detach(),
                *weights(layer.self_attn.out_proj, layer.norm2, layer.linear1, layer.linear2),
            )
            for layer in tower.behaviour.layers
        ]  # fmt: skip
        self._pool_weight = tower.pool_weight.weight.detach().squeeze(0)
        self._pool_raised = self._pool_weight @ self._layers[-1][-2]
        self._context_scaler, self._context = tower.context_scaler, weights(tower.context[0], tower.context[2])
        self._profile = weights(tower.profile)
        self._fusion = weights(tower.fusion[0], tower.fusion[1])
        follows = float(config.popularity)
        self._unit_and_popularity = (
            torch.cat([tower.to_item.weight, follows * tower.to_popularity.weight]).detach(),
            torch.cat([tower.to_item.bias, follows * tower.to_popularity.bias]).detach(),
        )
        self._collaborative = weights(tower.to_collaborative)
        self._history_gain, self._scale = tower.history_gain.item(), tower.log_scale.exp().item()

    @torch.inference_mode()
    def __call__(self, batch: UserBatch) -> Tensor:
        """Queries float32 [R, row_width] of one shopper, R times: what the events were is given once (B = 1), and R masks, contexts
        and bodies. Raises ValueError for more shoppers, or more events than the tower reads."""
        config, width = self._config, self._config.width
        if len(batch.history) != 1 or batch.history.shape[1] > config.history:
            raise ValueError(
                f"the history of one shopper, of up to {config.history} events, not {tuple(batch.history.shape[:2])}"
            )
        inputs = torch.zeros(len(batch.history_mask), 3 * width + 3)
        if config.context and bool(batch.context.any()):
            given = (batch.context != 0).any(1, keepdim=True)
            first, first_bias, second, second_bias = self._context
            context = F.gelu(F.linear(self._context_scaler(batch.context), first, first_bias))
            inputs[:, width : 2 * width] = F.linear(context, second, second_bias) * given
            inputs[:, 3 * width + 1 : 3 * width + 2] = given
        if config.profile and bool((figures := batch.profile[:, : config.profile_width // 2]).any()):
            given = (figures != 0).any(1, keepdim=True)
            inputs[:, 2 * width : 3 * width] = F.linear(batch.profile, *self._profile) * given
            inputs[:, 3 * width + 2 : 3 * width + 3] = given
        if not config.behaviour or not bool(batch.history_mask.any()):
            return self._query(inputs, None)
        # Where a history is trusted in part, beside each a stranger of the same context and body.
        trust = config.history_trust
        strangers = [inputs.clone()] if trust < 1.0 else []
        has_history = batch.history_mask.any(1, keepdim=True)
        latest, liked = self._past(batch)
        inputs[:, :width] = latest * has_history
        inputs[:, 3 * width : 3 * width + 1] = has_history
        queries = self._query(torch.cat([inputs, *strangers]), liked)
        if not strangers:
            return queries
        own, of_stranger = queries.chunk(2)
        return torch.lerp(of_stranger, own, trust)

    def _past(self, batch: UserBatch) -> tuple[Tensor, Tensor]:
        """The latest event in the light of all [R, width], and the mean of what was touched [R, item_width], 0 without any."""
        config, history, mask = self._config, batch.history[0], batch.history_mask
        rows, count = mask.shape
        told = torch.cat([history, batch.collaborative[0, :, : config.collaborative], batch.age[0].unsqueeze(1)], dim=1)
        events = F.linear(told, *self._event) + self._kinds[batch.kind[0]]
        seen = None
        if bool(mask.all()):
            events = (events + self._recency[-count:]).expand(rows, -1, -1)
        else:
            # The events that are there are counted, from the latest, which is the last of the table.
            later = mask.flip(1).cumsum(1).flip(1)  # and the event itself
            events = events + self._recency[(config.history - later).clamp(max=config.history - 1)]
            seen = F.pad(mask, (1, 0), value=True)[:, None, None]
        hidden = torch.cat([self._token.expand(rows, -1, -1), events], dim=1)  # (R, 1 + T, width)
        *before, last = self._layers
        for layer in before:
            hidden, raised = self._layer(layer, hidden, seen)
            hidden = hidden + F.linear(raised, *layer[-2:])
        # Of what the last layer adds only the latest event's is asked for, and of all others how much each weighs.
        hidden, raised = self._layer(last, hidden, seen)
        # The biases of the weights are the same for every event: a softmax does not see them.
        weights = hidden[:, 1:] @ self._pool_weight + raised[:, 1:] @ self._pool_raised
        if seen is None:
            hidden, raised = hidden[:, count], raised[:, count]
        else:
            every, latest = torch.arange(rows), (mask * torch.arange(1, count + 1)).amax(1)
            hidden, raised = hidden[every, latest], raised[every, latest]
            weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)
        return hidden + F.linear(raised, *last[-2:]), (weights.softmax(1) * mask) @ history

    def _layer(self, layer: tuple[Tensor, ...], hidden: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """A layer's events after attention, and what its last linear map reads."""
        config = self._config
        norm1, bias1, read, read_bias, out, out_bias, norm2, bias2, up, up_bias, _, _ = layer
        normed = F.layer_norm(hidden, (config.width,), norm1, bias1)
        parts = F.linear(normed, read, read_bias).view(*hidden.shape[:2], 3, config.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # (R, heads, 1 + T, width / heads)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)
        hidden = hidden + F.linear(attended, out, out_bias)
        normed = F.layer_norm(hidden, (config.width,), norm2, bias2)
        return hidden, F.gelu(F.linear(normed, up, up_bias))

    def _query(self, inputs: Tensor, liked: Tensor | None) -> Tensor:
        """[M, row_width] of inputs [M, 3 * width + 3]; `liked` [R, item_width] is of the first R."""
        config = self._config
        norm, norm_bias, fuse, fuse_bias = self._fusion
        fused = F.gelu(F.linear(F.layer_norm(inputs, inputs.shape[1:], norm, norm_bias), fuse, fuse_bias))
        asked = F.linear(fused, *self._unit_and_popularity)
        if liked is not None:
            asked[: len(liked), : config.item_width] += self._history_gain * liked
        unit, popularity = asked.split([config.item_width, config.popularity_width], dim=1)
        parts = [self._scale * F.normalize(unit, dim=1), popularity]
        if config.collaborative:
            parts.append(F.linear(torch.cat([inputs[:, : config.width], fused], dim=1), *self._collaborative))
        return torch.cat(parts, dim=1)
