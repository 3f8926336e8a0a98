"""Stage 1: train the item tower by SimCSE and write encoder_stage1.pth, vocabularies and schema into a release.

    python train_simcse.py                 # a new release, named by the time
    python train_simcse.py --epochs 3 --batch-size 512 --temperature 0.05

Two views of one item are a positive pair; where shoppers have taken items together (item_links.py), so are, for a share of the
examples, a view of an item and a view of one of those. Instances alone teach what tells items apart, pairs what they have in
common that matters to somebody (Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020). Only events before the days that
train_user.py holds out count: the reranker must not learn from vectors that knew its answers.

Loss: NT-Xent over in-batch negatives (pytorch-metric-learning), in the form whose memory is quadratic, not cubic, in the batch:
with one positive for each anchor, SupConLoss over both views is the same value and gradient as NTXentLoss.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import Field
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from item_links import ItemLinks, group_numbers
from model_simcse import ItemTower, ItemTowerConfig
from release import ENCODER, Release, catalogue_features
from settings import UserError, run_script
from shop_data import HoldOutOptions, validation_start
from store import Store
from tensors import Histories, ItemFeatures, ItemLayout
from text_encoder import TextEncoder
from training import finish, fit, is_main_process, shuffled_batches
from vocab import FIRST_WORD, ReVocab, StdVocab

STAGE = "simcse"
VALIDATION_SHARE = 0.05
MAX_VALIDATION = 2000  # items in the retrieval check of each epoch
RETRIEVED = 10
MOST_REPEATS = 4  # of an item with links in an epoch
TEXT_SAMPLE = 2000  # titles that say what is common to all


class SimcseOptions(HoldOutOptions):
    epochs: int = Field(
        10, ge=0, le=10_000, description="passes over the catalogue at most; 0 leaves the tower untrained"
    )
    batch_size: int = Field(512, ge=4, le=65_536, description="items a step; every other item is a negative")
    temperature: float = Field(0.1, ge=0.02, le=1.0, description="of NT-Xent; below 0.02 float32 gradients vanish")
    pairs: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of items with links whose second view is of an item taken together with them",
    )
    std_dropout: float = Field(0.2, ge=0, lt=1, description="share of STD values masked in a view")
    re_dropout: float = Field(0.3, ge=0, lt=1, description="share of RE values dropped in a view")
    token_masking: float = Field(0.3, ge=0, lt=1, description="share of title tokens masked in a view")
    re_text_share: float = Field(0.2, ge=0, lt=1, description="share of RE values read from their text, not the table")
    min_count: int = Field(2, ge=1, description="products that must carry an RE value before it gets a trained row")
    embedding_dim: int = Field(64, ge=4, le=1024, description="of one STD or RE value, shared with the reranker")
    output: int = Field(128, ge=8, le=1024, description="dimensions of an item vector")
    fusion: Literal["cross", "self", "mean"] = Field(
        "cross",
        description="for ablation: STD attends to RE and title (cross), all attend to all (self), or their mean is taken",
    )
    re: bool = Field(True, description="for ablation: whether the item tower reads RE values")
    title: bool = Field(True, description="for ablation: whether the item tower reads titles")
    orthogonal: bool = Field(True, description="for ablation: whether the STD and RE tables start orthogonal")


def contrastive_loss(temperature: float) -> SupConLoss:
    """The mean over all views: by itself the library leaves out those whose loss is exactly 0, as few are at a low temperature."""
    return SupConLoss(temperature=temperature, reducer=MeanReducer())


def nt_xent(views: Tensor, groups: Tensor, loss: SupConLoss) -> Tensor:
    """NT-Xent of 2B embeddings: rows i and B + i are a positive pair (Chen et al., ICML 2020).

    groups: int [2B]; views of one group (the same product in other colours) are not each other's negatives. With a group for
    each pair this equals pytorch-metric-learning's NTXentLoss.
    """
    pair = torch.arange(len(views) // 2, device=views.device).repeat(2)
    same_pair = pair[:, None] == pair[None, :]
    positives = same_pair & ~torch.eye(len(views), dtype=torch.bool, device=views.device)
    negatives = (groups[:, None] != groups[None, :]) & ~same_pair
    return loss(views, indices_tuple=(*positives.nonzero(as_tuple=True), *negatives.nonzero(as_tuple=True)))


def gather_views(views: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """All processes' views and groups, with gradients to each: negatives come from the whole batch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return views, groups
    first, second = views.chunk(2)
    every_group = [torch.empty_like(groups) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every_group, groups)
    halves = [group.chunk(2) for group in every_group]
    views = torch.cat([*all_gather(first.contiguous()), *all_gather(second.contiguous())])
    return views, torch.cat([*(group for group, _ in halves), *(group for _, group in halves)])


def partners(rows: np.ndarray, links: ItemLinks, share: float) -> np.ndarray:
    """For a `share` of the items `rows` int [B] that have links, one that they were taken together with, drawn by the links'
    strength; for the others the item itself: int64 [B]."""
    # torch's generator, since a resumed run restores it.
    chance, place = torch.rand(2, len(rows), dtype=torch.float64).numpy()
    return np.where(chance < share, links.draw(rows, place), rows)


def examples(rows: np.ndarray, links: ItemLinks) -> np.ndarray:
    """Items of an epoch: each of `rows` once, and those with links more often, if they are few: most of a large catalogue never
    sold, and its pairs would drown."""
    linked = rows[np.diff(links.together.indptr)[rows] > 0]
    times = min(MOST_REPEATS, (len(rows) - len(linked)) // max(1, len(linked)))
    return np.concatenate([rows, np.repeat(linked, times)])


@torch.no_grad()
def alignment_uniformity(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Alignment and uniformity of unit vectors [B, D] (Wang and Isola, ICML 2020); lower is better for both."""
    alignment = (first - second).pow(2).sum(-1).mean()
    uniformity = torch.pdist(first).pow(2).mul(-2).exp().mean().log()
    return alignment.item(), uniformity.item()


def validate(
    tower: ItemTower, features: ItemFeatures, groups: Tensor, rows: np.ndarray, options: SimcseOptions
) -> dict[str, float]:
    """How well two views of each of `rows` find each other (NT-Xent, negated: higher is better), and whether half of an
    item finds the whole among the unaugmented vectors; the latter soon reaches 1 and can choose no epoch."""
    with torch.random.fork_rng(devices=[]):  # validation must not move the training's random numbers
        torch.manual_seed(options.seed)
        batch = features.batch(rows).to(next(tower.parameters()).device)
        whole = tower(batch)
        views = [
            tower(tower.augment(batch, options.std_dropout, options.re_dropout, options.token_masking))
            for _ in range(2)
        ]
    similarity = views[0] @ whole.T
    rank = (similarity > similarity.diagonal().unsqueeze(1)).sum(1)
    alignment, uniformity = alignment_uniformity(*views)
    return {
        "-nt_xent": -nt_xent(
            torch.cat(views), groups[rows].repeat(2).to(whole.device), contrastive_loss(options.temperature)
        ).item(),
        f"recall@{RETRIEVED}": (rank < RETRIEVED).float().mean().item(),
        "recall@1": (rank < 1).float().mean().item(),
        "alignment": alignment,
        "uniformity": uniformity,
    }


def main(options: SimcseOptions) -> None:
    text_encoder = TextEncoder.load(options)
    with Store.open(options) as store:
        schema = store.schema()
        products = store.products.read_features()
        commerce = store.products.read_commerce()
        aliases = store.aliases.read()
        log = store.events.read()
    if len(products) < 2:
        raise UserError("fewer than two products have features; run import_data.py and extract_features.py first")
    release = _release(options)
    std_vocab, re_vocab = StdVocab(schema), ReVocab(schema.re, aliases)
    re_vocab.grow_from(products, options.min_count)
    layout = ItemLayout.fit(products, std_vocab, re_vocab)
    release.save_vocabularies(schema, std_vocab, re_vocab)

    features = catalogue_features(products, std_vocab, re_vocab, layout, text_encoder)
    re_text = torch.from_numpy(text_encoder.cached_pooled([value for _, value in re_vocab.words]))
    group_of = dict(zip(commerce.product_ids, commerce.group_id, strict=True))
    numbers = group_numbers([group_of.get(product.product_id) for product in products])
    groups = torch.from_numpy(numbers)
    histories = Histories.build(log, features.product_ids, options.event_weights)
    held_out_from = validation_start(histories.at, options.validation_share)
    links = ItemLinks.before(histories, held_out_from, numbers)

    torch.manual_seed(options.seed)
    config = ItemTowerConfig(
        std_vocab.fields,
        re_vocab.fields,
        text_encoder.width,
        embedding_dim=options.embedding_dim,
        output=options.output,
        fusion=options.fusion,
        re=options.re,
        title=options.title,
        orthogonal=options.orthogonal,
    )
    tower = ItemTower(config)
    sample = features.batch(np.random.default_rng(options.seed).permutation(len(products))[:TEXT_SAMPLE])
    tower.fit_text(sample.tokens[sample.token_mask], re_text[FIRST_WORD:])
    shuffled = np.random.default_rng(options.seed).permutation(len(products))
    held_out = max(2, min(MAX_VALIDATION, round(VALIDATION_SHARE * len(products))))
    # A catalogue too small to spare items is judged on the items it learns from: the metric is then only a sanity check.
    train_rows = shuffled[held_out:] if len(products) >= 10 * held_out else shuffled
    shown = examples(train_rows, links) if options.pairs else train_rows
    contrastive = contrastive_loss(options.temperature)

    def loss(model: nn.Module, rows: np.ndarray) -> Tensor:
        both = np.concatenate([rows, partners(rows, links, options.pairs)])
        batch = features.batch(both).to(tower.masked_token.device)
        rates = (options.std_dropout, options.re_dropout, options.token_masking)
        # One forward for both views: a wrapped model in several processes allows no second one before backward.
        views = model(tower.augment(batch, *rates), re_text.to(tower.masked_token.device), options.re_text_share)
        return nt_xent(*gather_views(views, groups[both].to(views.device)), contrastive)

    report = fit(
        tower,
        lambda epoch: shuffled_batches(shown, options.batch_size, options.seed, epoch),
        loss,
        lambda model: validate(tower, features, groups, shuffled[:held_out], options),
        "-nt_xent",
        options,
        release.folder,
        STAGE,
    )
    if not is_main_process():
        return  # one process writes the release
    release.save_weights(ENCODER, tower)
    release.record(
        "item_tower",
        config=config,
        layout=layout,
        text_encoder={"name": text_encoder.name, "fingerprint": text_encoder.fingerprint},
        pairs_until=held_out_from if options.pairs and links.together.nnz else None,
        report=report,
        options=options.model_dump(mode="json", exclude={"database_url"}),
    )
    finish(release.folder, STAGE)
    print(f"release {release.name}: {ENCODER}, {report.metric} {report.best:.4f} after {report.seconds:.0f} s")


def _release(options: SimcseOptions) -> Release:
    """The release asked for; else the newest if its encoder was interrupted; else a new one. One for all processes."""
    name = options.release
    if not name and not options.fresh:
        names = Release.names(options.models_dir)
        if names and "item_tower" not in Release(options.models_dir / names[-1]).manifest:
            name = names[-1]
    Accelerator()  # joins the processes; alone, it does nothing
    return Release.create(options.models_dir, broadcast_object_list([name or Release.new_name()])[0])


if __name__ == "__main__":
    run_script(SimcseOptions, main)
