"""Why: which of the shopper's items, words or figures, and what of the item itself, moved its score most.

Computed from the models by leaving out (occlusion: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks",
ECCV 2014): the weight of a part is the item's score less its score without that part, in logits. The shopper's parts (each
product of the history, the context, each figure of the body) are left out of the user tower in one batch, with the links that the
history loses, and what that makes of the features goes through the reranker in another. The item's own parts (each attribute, its
popularity, what similar shoppers took, its likeness to the query) are left out of the reranker alone, or stand at the mean of the
candidates. The candidates themselves stay those that were found with every part there.

Weights are no shares of the score: parts act together, and one may stand in for another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import wording
from loaded_release import LoadedRelease
from store import Found, Links, Store, UserState
from tensors import (
    DAY,
    ITEM_DENSE,
    OTHER_KIND_WEIGHT,
    Candidates,
    Past,
    RerankBatch,
    UserBatch,
    rerank_batch,
)
from vocab import FIRST_WORD, normalise

if TYPE_CHECKING:
    from list_kinds import Plan, Sought

MAX_REASONS = 4
MAX_PRODUCTS = 20  # of the history that are left out in turn, the latest
LEAST_WEIGHT = 0.001  # logits: less is no reason
# The shopper's history "often" has an attribute when at least this share of it does.
OFTEN = 0.2

_RETRIEVAL, _LOG_RANK = ITEM_DENSE.index("retrieval"), ITEM_DENSE.index("log_rank")


@dataclass(frozen=True)
class Reason:
    """What spoke for an item, and how much."""

    # Of the shopper: "history", "taken_together", "variant" and "because" name a product of theirs, "context" what of the item it
    # names (else the context), "body" a figure. Of the item: "attribute", "popular", "similar_shoppers", "match". Of kinds of list
    # that ask no reranker: "similar", "trending", "again".
    kind: str
    field: str = ""
    value: str = ""
    product_id: str = ""
    title: str = ""
    weight: float = 0.0  # logits; of "similar" the cosine, of "trending" and "again" the list's own score
    text: wording.Text = dataclasses.field(default_factory=dict)


Weighed = tuple[float, Callable[[float], Reason]]  # only what is told gets its words


def general_reason(kind: str, weight: float = 0.0) -> Reason:
    """A reason that names nothing."""
    return Reason(kind, weight=round(weight, 4), text=wording.GENERAL[kind])


def explain(
    store: Store, loaded: LoadedRelease, plan: Plan, sought: Sought, scores: np.ndarray, chosen: np.ndarray, past: Past,
    batch: UserBatch, now: float, kind_weights: Mapping[str, float],
) -> list[list[Reason]]:  # fmt: skip
    """Reasons for each of the rows `chosen` of what was sought, those that weigh most first, at least one each.

    scores: float [N] of all rows. past, batch: the shopper's, B = 1. kind_weights: what an event of a kind counts in this shop,
    OTHER_KIND_WEIGHT if it is not named. One round trip to the database for a shopper with a history.
    """
    if not len(chosen):
        return []
    if sought.scores is not None:
        return [[_of_list(plan, sought, row, float(scores[row]), now)] for row in chosen]
    columns = _latest(plan.state)
    links = _links(store, loaded, plan, sought.found, list(columns))
    parts = _parts(loaded, plan, past, batch, columns, links.titles, kind_weights)
    with torch.inference_mode():
        left = _leave_out(loaded, plan, sought, chosen, past, batch, parts, links)
        of_items = _leave_out_of_items(loaded, sought, chosen, past, left)
    reasons = []
    for place, of_item in enumerate(of_items):
        of_shopper = [
            (weight, partial(_of_part, loaded, plan, sought, left, part, number, chosen[place]))
            for number, (part, weight) in enumerate(zip(parts, left.lost[:, place].tolist(), strict=True), start=1)
        ]
        told, own = _heaviest(of_shopper + of_item), _heaviest(of_shopper)
        if own and own[0] not in told:  # what of the shopper speaks most for an item is always told
            told = [*told[: MAX_REASONS - 1], own[0]]
        reasons.append([reason(weight) for weight, reason in told] or [general_reason("match")])
    return reasons


def _heaviest(weighed: Sequence[Weighed]) -> list[Weighed]:
    return sorted((one for one in weighed if one[0] > LEAST_WEIGHT), key=lambda one: -one[0])[:MAX_REASONS]


def _of_list(plan: Plan, sought: Sought, row: int, score: float, now: float) -> Reason:
    """Of a kind of list that asks no reranker: nothing but its own order put the item there."""
    if sought.stages[row] == "again":
        product_id = sought.found.product_ids[row]
        bought = next(bought for bought in plan.purchases if bought.product_id == product_id)
        text = wording.of_purchases(bought.days, max(0, int((now - bought.last) / DAY)))
        return Reason("again", "", str(bought.days), product_id, sought.found.titles[row], round(score, 4), text)
    if sought.stages[row] == "trending":
        return general_reason("trending", score)
    if plan.anchor is not None:
        anchor = plan.anchor
        text = wording.of_likeness(anchor.title)
        return Reason("similar", "", "", anchor.product_id, anchor.title, round(score, 4), text)
    return general_reason("match")


# ------------------------------------------------------------------------------------------------------ the shopper's parts
@dataclass(frozen=True)
class _Product:
    """A product of the history: all that the shopper did with it is one part."""

    product_id: str
    title: str
    deed: str  # the kind of event that says most
    interest: bool  # whether it says any
    columns: list[int]  # of the history


@dataclass(frozen=True)
class _Context:
    pass


@dataclass(frozen=True)
class _Figure:
    name: str
    number: int  # among the figures that the release knows
    value: float


_Part = _Product | _Context | _Figure


@dataclass(frozen=True)
class _Left:
    """What is left without each part. Row 0 has everything, row 1 lacks the first part, and so on: P + 1 rows, N candidates, k
    chosen ones."""

    query: np.ndarray  # float32 [P + 1, D]
    by_query: np.ndarray  # float32 [P + 1, N], inner products
    together: np.ndarray  # float32 [P + 1, N]
    variant: np.ndarray  # float32 [P + 1, N]
    bonus: np.ndarray  # float [P + 1, N], what the kind of list adds
    features: RerankBatch  # of the chosen
    user: Tensor  # embedding [P + 1, 2, dim + 1]
    items: tuple[Tensor, Tensor]  # of the chosen: STD and RE embeddings [1, k, fields, dim + 1]
    logits: np.ndarray  # float [P + 1, k]

    @property
    def lost(self) -> np.ndarray:
        """float [P, k]: what each part is worth to each of the chosen."""
        return self.logits[0] - self.logits[1:]


def _latest(state: UserState) -> dict[str, list[int]]:
    """The latest distinct products of a history, at most MAX_PRODUCTS, and their columns."""
    columns: dict[str, list[int]] = {}
    for column in reversed(range(len(state.product_ids))):
        columns.setdefault(state.product_ids[column], []).append(column)
    return dict(list(columns.items())[:MAX_PRODUCTS])


def _links(store: Store, loaded: LoadedRelease, plan: Plan, found: Found, titled: list[str]) -> Links:
    """What leads to the candidates that gain by links, and those titles."""
    linked = np.flatnonzero((found.together > 0) | (found.variant > 0)).tolist()
    if not linked and not titled:
        return Links([], [], {})
    return store.vectors.links(loaded.name, plan.linked_from, [found.product_ids[row] for row in linked], titled)


def _parts(
    loaded: LoadedRelease, plan: Plan, past: Past, batch: UserBatch, columns: Mapping[str, list[int]],
    titles: Mapping[str, str], kind_weights: Mapping[str, float],
) -> list[_Part]:  # fmt: skip
    """Products that are not sold any more, and so have no title, are no part."""
    state = plan.state

    def product(product_id: str, of: list[int]) -> _Product:
        weights = [kind_weights.get(state.kinds[column], OTHER_KIND_WEIGHT) for column in of]
        most = max(weights)
        return _Product(product_id, titles[product_id], state.kinds[of[weights.index(most)]], most > 0, of)

    parts: list[_Part] = [product(product_id, of) for product_id, of in columns.items() if product_id in titles]
    if (batch.context != 0).any():
        parts.append(_Context())
    names, profile = loaded.scaler.fields, {**state.profile, **plan.request.profile}
    missing = past.profile[0, len(names) :]
    parts += [
        _Figure(names[number], number, profile[names[number]]) for number in np.flatnonzero(missing == 0).tolist()
    ]
    return parts


def _leave_out(
    loaded: LoadedRelease, plan: Plan, sought: Sought, chosen: np.ndarray, past: Past, batch: UserBatch,
    parts: Sequence[_Part], links: Links,
) -> _Left:  # fmt: skip
    found, weights, count = sought.found, loaded.weights_of(plan.kind), 1 + len(parts)
    without, without_past = _without_each(batch, past, parts)
    query = loaded.fused_tower(without).numpy()
    together, variant = np.tile(found.together, (count, 1)), np.tile(found.variant, (count, 1))
    _lose_links(found, parts, links, together, variant)
    bonus = np.zeros((count, len(found.product_ids)))
    if plan.kind == "basket":
        bonus = weights.gain(together, 0.0)
    elif sought.bonus is not None:
        bonus += sought.bonus
        named = 0.0 if sought.named is None else sought.named
        for row, part in enumerate(parts, start=1):
            if isinstance(part, _Context):
                bonus[row] -= named
            if plan.anchor is not None and isinstance(part, _Product) and part.product_id == plan.anchor.product_id:
                bonus[row] = named
    by_query = query @ found.vectors.T
    retrieval = by_query + weights.gain(together, variant)
    features = _features(loaded, sought, chosen, without_past, query, retrieval, together, variant)
    model = loaded.reranker
    items = model.embed_std(features.item_std[:1]), model.embed_re(features.item_re[:1])
    user = model.embed_user(features.user_std, features.user_re)
    logits = model.score(user, features.user_dense, torch.cat(items, dim=2), features.item_dense).numpy()
    return _Left(query, by_query, together, variant, bonus, features, user, items, logits + bonus[:, chosen])


def _without_each(batch: UserBatch, past: Past, parts: Sequence[_Part]) -> tuple[UserBatch, Past]:
    """The shopper whole, and without each part; what the events were stands in the batch once (see FusedUserTower)."""
    count = 1 + len(parts)
    mask, profile = np.repeat(past.mask, count, axis=0), np.repeat(past.profile, count, axis=0)
    context = batch.context.repeat(count, 1)
    for row, part in enumerate(parts, start=1):
        if isinstance(part, _Product):
            mask[row, part.columns] = False
        elif isinstance(part, _Context):
            context[row] = 0.0
        else:
            profile[row, part.number] = 0.0
            profile[row, profile.shape[1] // 2 + part.number] = 1.0

    def each(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array, (count, *array.shape[1:]))

    without = dataclasses.replace(
        batch, history_mask=torch.from_numpy(mask), context=context, profile=torch.from_numpy(profile)
    )
    return without, Past(each(past.vectors), mask, each(past.std), each(past.re), each(past.price), profile)


def _lose_links(found: Found, parts: Sequence[_Part], links: Links, together: np.ndarray, variant: np.ndarray) -> None:
    """Take from each row of `together` and `variant`, in place, what candidates are linked to through the row's product alone."""
    row_of = {part.product_id: row for row, part in enumerate(parts, start=1) if isinstance(part, _Product)}
    column_of = {product_id: column for column, product_id in enumerate(found.product_ids)}
    for met, item, strength in links.together:
        if met in row_of:
            together[row_of[met], column_of[item]] -= strength
    np.maximum(together, 0.0, out=together)
    variants_of: dict[str, list[str]] = {}
    for met, item in links.variants:
        variants_of.setdefault(item, []).append(met)
    for item, all_met in variants_of.items():
        if len(all_met) == 1 and all_met[0] in row_of:
            variant[row_of[all_met[0]], column_of[item]] = 0.0


def _features(
    loaded: LoadedRelease, sought: Sought, chosen: np.ndarray, past: Past, query: np.ndarray, retrieval: np.ndarray,
    together: np.ndarray, variant: np.ndarray,
) -> RerankBatch:  # fmt: skip
    """The reranker's inputs for the chosen; what is relative to a list is so to all that was found."""
    found = sought.found

    def each(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array[chosen], (len(query), len(chosen), *array.shape[1:]))

    candidates = Candidates(
        query, each(found.vectors), retrieval[:, chosen], together[:, chosen], variant[:, chosen], each(found.std_ids),
        each(found.re_ids), each(found.price),
    )  # fmt: skip
    features = rerank_batch(candidates, past, loaded.prices, loaded.item_width, loaded.popularity_width)
    features.item_dense[:, :, _RETRIEVAL] = torch.from_numpy(
        retrieval[:, chosen] - retrieval.mean(axis=1, keepdims=True)
    )
    rank = (-retrieval).argsort(axis=1, kind="stable").argsort(axis=1)[:, chosen]
    features.item_dense[:, :, _LOG_RANK] = torch.from_numpy(_log_rank(rank))
    return features


def _log_rank(rank: np.ndarray) -> np.ndarray:
    return (np.log1p(rank) / 4.0).astype(np.float32)


def _of_part(
    loaded: LoadedRelease, plan: Plan, sought: Sought, left: _Left, part: _Part, number: int, row: int, weight: float
) -> Reason:
    """A part of the shopper that speaks for the candidate `row`; `number` is its own row in `left`."""
    weight = round(weight, 4)
    if isinstance(part, _Figure):
        return Reason(
            "body", part.name, f"{part.value:g}", weight=weight, text=wording.of_figure(part.name, part.value)
        )
    if isinstance(part, _Context):
        context = plan.request.context.strip()
        field, value = _named(loaded, sought.found.std_ids[row], sought.found.re_ids[row], plan)
        return Reason("context", field, value or context, weight=weight, text=wording.of_context(context, field, value))
    if plan.kind == "because" and plan.anchor is not None and part.product_id == plan.anchor.product_id:
        kind, text = "because", wording.of_anchor(part.title)
    else:

        def fall(of: np.ndarray) -> float:
            return float(of[0, row] - of[number, row])

        weights = loaded.weights_of(plan.kind)
        # What of the loss at retrieval is most.
        by_kind = {
            "history": fall(left.by_query),
            "taken_together": fall(weights.gain(left.together, 0.0)) + fall(left.bonus),
            "variant": weights.variant * fall(left.variant),
        }
        kind = max(by_kind, key=lambda name: by_kind[name])
        if kind == "history":
            text = wording.of_history(part.title, part.deed, part.interest)
        else:
            text = wording.taken_together(part.title) if kind == "taken_together" else wording.of_variant(part.title)
    return Reason(kind, "", "", part.product_id, part.title, weight, text)


def _named(loaded: LoadedRelease, std_ids: np.ndarray, re_ids: np.ndarray, plan: Plan) -> tuple[str, str]:
    """The first attribute (field, value) of an item that the context names; empty if none."""
    told = normalise(plan.request.context)
    words = {
        (field, normalise(value))
        for fields in (plan.named.std, plan.named.re)
        for field, some in fields.items()
        for value in some
    }
    for vocab, ids in ((loaded.encoder.std_vocab, std_ids), (loaded.encoder.re_vocab, re_ids)):
        for word_id in ids[ids >= FIRST_WORD]:
            field, value = vocab.word(int(word_id))
            if (field, value) in words or value in told:
                return field, value
    return "", ""


# --------------------------------------------------------------------------------------------------------- the item's parts
def _leave_out_of_items(
    loaded: LoadedRelease, sought: Sought, chosen: np.ndarray, past: Past, left: _Left
) -> list[list[Weighed]]:
    """Each attribute of each of the chosen left out of the reranker; popularity, similar shoppers and likeness at the mean of the
    candidates, in the retrieval score too."""
    model, features = loaded.reranker, left.features
    dense, (std, re) = features.item_dense[0], (left.items[0][0], left.items[1][0])
    places, embeddings, denses = [], [], []
    reasons: list[Callable[[float], Reason]] = []
    for vocab, ids, history in (
        (loaded.encoder.std_vocab, features.item_std[0], past.std[0][past.mask[0]]),
        (loaded.encoder.re_vocab, features.item_re[0], past.re[0][past.mask[0]]),
    ):
        place, slot = torch.nonzero(ids >= FIRST_WORD, as_tuple=True)
        bare = ids[place]
        words = ids[place, slot]
        bare[torch.arange(len(bare)), slot] = 0
        if vocab is loaded.encoder.std_vocab:
            embeddings.append(torch.cat([model.embed_std(bare), re[place]], dim=1))
        else:
            embeddings.append(torch.cat([std[place], model.embed_re(bare)], dim=1))
        places.append(place)
        denses.append(dense[place])
        reasons += [partial(_of_attribute, *vocab.word(word), history, word) for word in words.tolist()]
    for kind, plain in _without_groups(loaded, sought, chosen, left.query[0], dense).items():
        places.append(torch.arange(len(chosen)))
        embeddings.append(torch.cat([std, re], dim=1))
        denses.append(plain)
        reasons += [partial(general_reason, kind)] * len(chosen)

    items, item_dense = torch.cat(embeddings)[None], torch.cat(denses)[None]
    without = model.score(left.user[:1], features.user_dense[:1], items, item_dense)[0]
    place = torch.cat(places)
    whole = torch.from_numpy(left.logits[0] - left.bonus[0, chosen])
    weighed: list[list[Weighed]] = [[] for _ in chosen]
    for at, weight, reason in zip(place.tolist(), (whole[place] - without).tolist(), reasons, strict=True):
        weighed[at].append((weight, reason))
    return weighed


def _without_groups(
    loaded: LoadedRelease, sought: Sought, chosen: np.ndarray, query: np.ndarray, dense: Tensor
) -> dict[str, Tensor]:
    """The chosen items' dense features [k, I] with a group of coordinates at the mean of the candidates, by kind of reason."""
    found, width, popular = sought.found, loaded.item_width, loaded.popularity_width
    norm = float(np.linalg.norm(query[:width])) or 1.0
    groups = {
        "popular": (slice(width, width + popular), "popularity", 4.0),  # divisors as in rerank_batch
        "similar_shoppers": (slice(width + popular, None), "collaborative", 1.0),
        "match": (slice(0, width), "content", norm),
    }
    without = {}
    for kind, (coordinates, feature, divisor) in groups.items():
        part = found.vectors[:, coordinates] @ query[coordinates]
        excess = part[chosen] - part.mean()
        plain = dense.clone()
        plain[:, ITEM_DENSE.index(feature)] = float(part.mean() / divisor)
        if kind == "popular":
            plain[:, len(ITEM_DENSE) : len(ITEM_DENSE) + popular] = torch.from_numpy(
                found.vectors[:, coordinates].mean(axis=0)
            )
        plain[:, _RETRIEVAL] -= torch.from_numpy(excess)
        ahead = found.scores[None, :] > (found.scores[chosen] - excess)[:, None]
        plain[:, _LOG_RANK] = torch.from_numpy(_log_rank(ahead.sum(axis=1)))
        without[kind] = plain
    return without


def _of_attribute(field: str, value: str, history: np.ndarray, word: int, weight: float) -> Reason:
    """history: int [T, slots], ids of what the shopper met."""
    often = len(history) > 0 and float((history == word).any(axis=1).mean()) >= OFTEN
    return Reason("attribute", field, value, weight=round(weight, 4), text=wording.of_attribute(field, value, often))
