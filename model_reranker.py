"""The reranker: DeepFM (Guo et al., IJCAI 2017) by deepctr-torch, with tables transferred from the item tower.

Sparse features read two shared tables, STD and RE: each STD field of the item, the item's RE values, and the STD and RE values
most common in the shopper's history. Dense features are the shopper's body and what retrieval knows about the pair. The
model gives a logit; lists are ordered by it.

`build_deepfm` makes deepctr-torch's own model, `transfer` copies the item tower's tables into it. The same mathematics with the
shopper's half computed once a list: `ListwiseDeepFM` trains that model, `FusedDeepFM` serves what was trained.

What is shown first is clicked most, liked or not. Trained on lists that were shown, the model has the place of each item as its
last dense feature and need not find another reason for those clicks; served, every item stands at the first place, whose feature
is 0 (Haldar et al., "Improving Deep Learning for Airbnb Search", KDD 2020).
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensors import HISTORY_LENGTH, POSITION, RerankBatch
from vocab import PAD

# deepctr_torch.utils asks a package index for its newest version from a thread at import, with no time-out, and needs an
# undeclared package to do so. A stand-in registered first keeps imports quiet, offline and fast.
if "deepctr_torch.utils" not in sys.modules:
    _utils = types.ModuleType("deepctr_torch.utils")
    _utils.check_version = lambda version: None  # type: ignore[attr-defined]
    sys.modules["deepctr_torch.utils"] = _utils


def _no_metric(*_: object, **__: object) -> float:
    raise NotImplementedError("deepctr-torch's own metrics are not imported; see model_reranker.py")


@contextmanager
def _without_sklearn() -> Iterator[None]:
    """deepctr-torch wants four metrics for its own training, which nothing here uses, and they take longer to import than all the
    rest of it: stand-ins, that are gone again for whoever needs the real ones."""
    standing = {name: types.ModuleType(name) for name in ("sklearn", "sklearn.metrics") if name not in sys.modules}
    if "sklearn.metrics" in standing:
        metrics = ("accuracy_score", "log_loss", "mean_squared_error", "roc_auc_score")
        vars(standing["sklearn.metrics"]).update(dict.fromkeys(metrics, _no_metric))
    sys.modules.update(standing)
    try:
        yield
    finally:
        for name in standing:
            del sys.modules[name]


with _without_sklearn():
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import DeepFM as DeepFM

STD_TABLE, RE_TABLE = "STD_table", "RE_table"
RETRIEVAL = "retrieval"  # of the dense features, the one that an order starts from

ROW_LENGTH = 0.5  # of a transferred row
EPSILON = 1e-8  # in the divisor of a mean, as in deepctr-torch

# deepctr-torch carries ids in a float32 tensor, which counts exactly only up to here; beyond, an id becomes its neighbour.
MAX_TABLE_ROWS = 2**24


@dataclass(frozen=True)
class RerankerConfig:
    std_rows: int
    re_rows: int
    std_slots: dict[str, int]  # of an item, by field: see tensors.ItemLayout
    re_slots: int
    history_ids: int  # STD and RE ids that summarise a history
    user_dense: list[str]  # names, in the order of RerankBatch.user_dense
    item_dense: list[str]  # and POSITION as the last, if it was trained with places
    embedding_dim: int = 64
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.2
    # How far a list's order follows the model, 0 being retrieval's own: the list of a shopper with a history, and a stranger's. The
    # user tower knows the one well, and of the other no more than what anybody wants.
    trust: float = 1.0
    stranger_trust: float = 1.0

    def retrieval_of(self, batch: RerankBatch) -> Tensor:
        """The logit that retrieval gave each candidate: [B, N]."""
        return batch.item_dense[..., self.item_dense.index(RETRIEVAL)]

    def trusted(self, own: Tensor, retrieval: Tensor, user_dense: Tensor) -> Tensor:
        """Between retrieval's logits and the model's own, [B, N] each, as far as the model is trusted with shoppers of these dense
        features, [B, D]."""
        known = user_dense[:, self.user_dense.index(HISTORY_LENGTH)] > 0
        trust = torch.where(known, self.trust, self.stranger_trust).to(own)
        return torch.lerp(retrieval, own, trust.unsqueeze(1))


def build_deepfm(config: RerankerConfig) -> DeepFM:
    """deepctr-torch's DeepFM over the shared tables; its output is a logit (task "regression": no sigmoid)."""
    if max(config.std_rows, config.re_rows) > MAX_TABLE_ROWS:
        raise ValueError(f"a table of {max(config.std_rows, config.re_rows)} rows is beyond {MAX_TABLE_ROWS}")

    def values(name: str, rows: int, slots: int, table: str) -> VarLenSparseFeat:
        # Mean over what is there: the only combiner whose empty list is harmless.
        return VarLenSparseFeat(
            SparseFeat(name, rows, config.embedding_dim, embedding_name=table), maxlen=slots, combiner="mean"
        )

    columns = [
        values("user_STD", config.std_rows, config.history_ids, STD_TABLE),
        values("user_RE", config.re_rows, config.history_ids, RE_TABLE),
        *(values(f"STD_{field}", config.std_rows, n, STD_TABLE) for field, n in config.std_slots.items()),
        values("item_RE", config.re_rows, config.re_slots, RE_TABLE),
        *(DenseFeat(f"user_dense_{name}", 1) for name in config.user_dense),
        *(DenseFeat(f"item_dense_{name}", 1) for name in config.item_dense),
    ]
    model = DeepFM(
        columns, columns, dnn_hidden_units=config.hidden, dnn_dropout=config.dropout, init_std=0.01, l2_reg_linear=0.0,
        l2_reg_embedding=0.0, task="regression", device="cpu",
    )  # fmt: skip
    if model.embedding_size != config.embedding_dim:  # the last declaration's size wins silently in deepctr-torch
        raise ValueError(f"embedding size {model.embedding_size}, expected {config.embedding_dim}")
    return model


def deepfm_input(batch: RerankBatch) -> Tensor:
    """The one float32 tensor [B * N, columns] that deepctr-torch reads, in `build_deepfm`'s column order."""
    lists, candidates = batch.item_std.shape[:2]

    def each(user: Tensor) -> Tensor:
        return user.unsqueeze(1).expand(lists, candidates, user.shape[-1])

    parts = [
        each(batch.user_std), each(batch.user_re), batch.item_std, batch.item_re, each(batch.user_dense), batch.item_dense,
    ]  # fmt: skip
    if batch.position is not None:
        parts.append(batch.position.unsqueeze(-1))
    return torch.cat([part.float() for part in parts], dim=-1).flatten(0, 1)


@torch.no_grad()
def transfer(model: DeepFM, std_table: Tensor, re_table: Tensor) -> None:
    """Copy the item tower's STD and RE tables into the model's shared embeddings, rows at one short length.

    In place, since replacing the Embedding would leave the optimizer on the old one. Short rows, because before training their
    products are noise on retrieval's logits, which grows with the square of their length.
    Raises ValueError on another shape or a value that is not finite.
    """
    for name, table in ((STD_TABLE, std_table), (RE_TABLE, re_table)):
        weight = model.embedding_dict[name].weight
        if weight.shape != table.shape:
            raise ValueError(f"{name}: the item tower's table is {tuple(table.shape)}, DeepFM's {tuple(weight.shape)}")
        if not torch.isfinite(table).all():
            raise ValueError(f"{name}: the item tower's table holds values that are not finite")
        weight.copy_(ROW_LENGTH * F.normalize(table, dim=-1))
        weight[0].zero_()  # padding


@torch.no_grad()
def start_from_retrieval(model: DeepFM, config: RerankerConfig, place_effect: float = 0.0) -> None:
    """Set the first-order weight of the retrieval score, so that before any training the order is retrieval's, and that of the
    place, if the model has it."""
    for feature, weight in ((RETRIEVAL, 1.0), (POSITION, place_effect)):
        if feature in config.item_dense:
            model.linear_model.weight[len(config.user_dense) + config.item_dense.index(feature)] = weight


class ListwiseDeepFM(nn.Module):
    """deepctr-torch's own model as it is trained: RerankBatch -> its logits float32 [B, N].

    The same parameters, values, gradients and dropout as `deepfm(deepfm_input(batch))` but for rounding, in less than half the
    time: deepctr-torch looks the shopper's many ids up again for each candidate.
    """

    def __init__(self, deepfm: DeepFM, config: RerankerConfig) -> None:
        super().__init__()
        self.deepfm, self.config = deepfm, config

    def forward(self, batch: RerankBatch) -> Tensor:
        deepfm, dim, count = self.deepfm, self.config.embedding_dim, batch.item_std.shape[1]
        std_table, re_table = joined_table(deepfm, STD_TABLE), joined_table(deepfm, RE_TABLE)
        user = torch.stack([_mean(std_table, batch.user_std), _mean(re_table, batch.user_re)], dim=1)
        items = [_mean(std_table, ids) for ids in batch.item_std.split(list(self.config.std_slots.values()), dim=-1)]
        items.append(_mean(re_table, batch.item_re))
        values = torch.cat([user.unsqueeze(1).expand(-1, count, -1, -1), torch.stack(items, dim=2)], dim=2)
        values = values.flatten(0, 1)  # (B * N, fields, dim + 1)
        dense = [batch.user_dense.unsqueeze(1).expand(-1, count, -1), batch.item_dense]
        if batch.position is not None:
            dense.append(batch.position.unsqueeze(-1))
        dense_values = torch.cat(dense, dim=-1).flatten(0, 1)

        embedding = values[..., :dim]
        first_order = values[..., dim].sum(1, keepdim=True) + dense_values @ deepfm.linear_model.weight
        deep = deepfm.dnn_linear(deepfm.dnn(torch.cat([embedding.flatten(1), dense_values], dim=1)))
        return deepfm.out(first_order + deepfm.fm(embedding) + deep).view(-1, count)


class FusedDeepFM(nn.Module):
    """DeepFM's logits for lists of candidates: float32 [B, N]. The same values as deepctr-torch's model, within 1e-5, with every
    candidate at the first place and as far as the configuration trusts them.

    One table `[embedding | first-order weight]` serves every sparse feature with int64 ids, and everything that depends on the
    shopper alone (their sums in the FM, their part of the first layer) is computed once a list.
    """

    std_table: Tensor
    re_table: Tensor
    std_fields: Tensor  # float32 [STD fields, std slots], 1 where a slot is of a field
    dense_weight: Tensor
    bias: Tensor
    user_first: Tensor
    item_first: Tensor
    first_bias: Tensor

    def __init__(self, model: DeepFM, config: RerankerConfig) -> None:
        super().__init__()
        self.config = config
        linear, dim = model.linear_model, config.embedding_dim
        # The row of padding is 0, so that `embed_std` need not leave it out of sums; training lets it drift a little.
        std_table = joined_table(model, STD_TABLE).detach()
        std_table[PAD] = 0.0
        self.register_buffer("std_table", std_table)
        self.register_buffer("re_table", joined_table(model, RE_TABLE).detach())
        slots = [torch.ones(1, count) for count in config.std_slots.values()]
        self.register_buffer("std_fields", torch.block_diag(*slots))
        # A feature that is always 0 needs no weight.
        user_dense = len(config.user_dense)
        item_dense = sum(name != POSITION for name in config.item_dense)
        self.register_buffer("dense_weight", linear.weight.detach().squeeze(-1)[: user_dense + item_dense].clone())
        self.register_buffer("bias", model.out.bias.detach().clone())

        # deepctr-torch concatenates the sparse embeddings in column order, then the dense values.
        fields = 2 + len(config.std_slots) + 1
        first = model.dnn.linears[0]
        weight = first.weight.detach()
        sparse = fields * dim
        user_columns = [*range(2 * dim), *range(sparse, sparse + user_dense)]
        item_columns = [*range(2 * dim, sparse), *range(sparse + user_dense, sparse + user_dense + item_dense)]
        self.register_buffer("user_first", weight[:, user_columns].clone())
        self.register_buffer("item_first", weight[:, item_columns].clone())
        self.register_buffer("first_bias", first.bias.detach().clone())
        rest: list[nn.Module] = [nn.ReLU()]
        for layer in model.dnn.linears[1:]:
            rest += [_copy_linear(layer), nn.ReLU()]
        self.rest = nn.Sequential(*rest, _copy_linear(model.dnn_linear))
        self.requires_grad_(False)

    def forward(self, batch: RerankBatch) -> Tensor:
        user = self.embed_user(batch.user_std, batch.user_re)
        items = torch.cat([self.embed_std(batch.item_std), self.embed_re(batch.item_re)], dim=2)
        return self.score(user, batch.user_dense, items, batch.item_dense)

    def embed_user(self, std: Tensor, re: Tensor) -> Tensor:
        """[B, 2, dim + 1], the last column being the first-order weight, of ids [B, history_ids]."""
        return torch.stack([_mean(self.std_table, std), _mean(self.re_table, re)], dim=1)

    def embed_std(self, ids: Tensor) -> Tensor:
        """[..., STD fields, dim + 1] of ids [..., std slots], all fields at once."""
        known = (ids != PAD).to(self.std_table.dtype) @ self.std_fields.T
        return (self.std_fields @ F.embedding(ids, self.std_table)) / (known.unsqueeze(-1) + EPSILON)

    def embed_re(self, ids: Tensor) -> Tensor:
        """[..., 1, dim + 1] of ids [..., re slots]."""
        return _mean(self.re_table, ids).unsqueeze(-2)

    def score(self, user: Tensor, user_dense: Tensor, items: Tensor, item_dense: Tensor) -> Tensor:
        """Logits [B, N] of lists of items [B, N, fields, dim + 1], or of the same items [1, N, ...] in each list."""
        dim, user_width = self.config.embedding_dim, len(self.config.user_dense)
        sparse = dim * items.shape[2]
        user_embedding, item_embedding = user[..., :dim], items[..., :dim]
        first_order = (
            (user[..., dim].sum(1) + user_dense @ self.dense_weight[:user_width]).unsqueeze(1)
            + items[..., dim].sum(2)
            + item_dense @ self.dense_weight[user_width:]
        )
        total = user_embedding.sum(1).unsqueeze(1) + item_embedding.sum(2)  # (B, N, dim)
        squares = user_embedding.pow(2).sum((1, 2)).unsqueeze(1) + item_embedding.pow(2).sum((2, 3))
        second_order = 0.5 * (total.pow(2).sum(-1) - squares)

        user_hidden = F.linear(torch.cat([user_embedding.flatten(1), user_dense], -1), self.user_first)
        item_hidden = F.linear(item_embedding.flatten(2), self.item_first[:, :sparse])
        dense_hidden = F.linear(item_dense, self.item_first[:, sparse:])
        deep = self.rest(item_hidden + dense_hidden + (user_hidden + self.first_bias).unsqueeze(1)).squeeze(-1)
        retrieval = item_dense[..., self.config.item_dense.index(RETRIEVAL)]
        return self.config.trusted(first_order + second_order + deep + self.bias, retrieval, user_dense)

    @torch.no_grad()
    def grow(self, re_rows: Tensor) -> None:
        """Append rows for RE words that came after training: embeddings [K, dim], with no first-order weight."""
        rows = torch.cat([ROW_LENGTH * F.normalize(re_rows, dim=-1), torch.zeros(len(re_rows), 1)], dim=1)
        self.re_table = torch.cat([self.re_table, rows.to(self.re_table)])


def joined_table(model: DeepFM, name: str) -> Tensor:
    """`[embedding | first-order weight]` of a table's rows: [rows, dim + 1], a copy that passes gradients on."""
    return torch.cat([model.embedding_dict[name].weight, model.linear_model.embedding_dict[name].weight], dim=1)


def _copy_linear(layer: nn.Linear) -> nn.Linear:
    copy = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    copy.load_state_dict(layer.state_dict())
    return copy


def _mean(table: Tensor, ids: Tensor) -> Tensor:
    """Mean of the rows of the ids that are not padding: [..., dim + 1]."""
    mask = (ids != PAD).unsqueeze(-1).to(table.dtype)
    return (F.embedding(ids, table) * mask).sum(-2) / (mask.sum(-2) + EPSILON)
