"""The three models: what they must be equal to, what must not move them, and what must."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss
from torch.nn import functional as F

from model_reranker import (
    RE_TABLE,
    ROW_LENGTH,
    STD_TABLE,
    FusedDeepFM,
    ListwiseDeepFM,
    RerankerConfig,
    build_deepfm,
    deepfm_input,
    start_from_retrieval,
    transfer,
)
from model_simcse import ItemTower, ItemTowerConfig, starting_table
from model_user import FusedUserTower, UserTower, UserTowerConfig
from tensors import HISTORY_LENGTH, KINDS, POSITION, ItemBatch, LinkWeights, RerankBatch, UserBatch
from train_simcse import alignment_uniformity, contrastive_loss, nt_xent
from vocab import MASK, PAD

TEXT = 6  # width of the text vectors in these tests


# ---------------------------------------------------------------------------------------------------------- item tower
def item_tower(**changes):
    torch.manual_seed(0)
    config = ItemTowerConfig(
        [0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1], TEXT, embedding_dim=8, width=16, heads=2, output=12
    )
    return ItemTower(replace(config, **changes)).eval()


def items() -> ItemBatch:
    return ItemBatch(
        std=torch.tensor([[3, 5], [4, 0], [0, 0]]),
        re=torch.tensor([[3, 4], [3, 0], [0, 0]]),
        tokens=torch.arange(3 * 2 * TEXT, dtype=torch.float32).reshape(3, 2, TEXT) / 10,
        token_mask=torch.tensor([[True, True], [True, False], [False, False]]),
    )


def test_item_vectors_have_unit_length_even_of_an_item_without_anything():
    vectors = item_tower()(items())
    assert vectors.shape == (3, 12)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))


def test_padding_does_not_move_an_item_vector():
    tower, batch = item_tower(), items()
    wide = ItemBatch(
        F.pad(batch.std, (0, 3)), F.pad(batch.re, (0, 2)), F.pad(batch.tokens, (0, 0, 0, 4), value=7.0),
        F.pad(batch.token_mask, (0, 4)),
    )  # fmt: skip
    torch.testing.assert_close(tower(batch), tower(wide))


@pytest.mark.parametrize("part", ["std", "re", "tokens"])
def test_each_input_reaches_the_item_vector(part):
    tower, batch = item_tower(), items()
    changed = replace(batch, **{part: batch.tokens + 1.0 if part == "tokens" else getattr(batch, part).clamp(max=3)})
    assert not torch.allclose(tower(batch)[0], tower(changed)[0], atol=1e-4)


def test_re_and_title_reinforce_std_through_attention_alone():
    """STD is the query: with the attention's output cut, RE and title no longer matter."""
    tower, batch = item_tower(), items()
    torch.nn.init.zeros_(tower.cross_attention.out_proj.weight)
    torch.nn.init.zeros_(tower.cross_attention.out_proj.bias)
    without = replace(batch, re=torch.zeros_like(batch.re), token_mask=torch.zeros_like(batch.token_mask))
    torch.testing.assert_close(tower(batch), tower(without))


def test_tables_start_orthogonal_within_blocks_and_padding_is_zero():
    table = starting_table(20, 8)
    assert table[PAD].abs().sum() == 0
    torch.testing.assert_close(table[8:16] @ table[8:16].T, torch.eye(8), atol=1e-5, rtol=0)


def test_rows_that_start_otherwise_have_the_same_length_and_take_as_many_random_numbers():
    left = []
    for orthogonal in (True, False):
        torch.manual_seed(0)
        table = starting_table(20, 8, orthogonal)
        torch.testing.assert_close(table[1:].norm(dim=1), torch.ones(19))
        assert table[PAD].abs().sum() == 0
        left.append(torch.rand(1))
    assert (table[8:16] @ table[8:16].T - torch.eye(8)).abs().max() > 0.1
    assert left[0] == left[1]


def test_a_tower_draws_the_random_numbers_that_it_always_drew_and_ablated_ones_start_like_it():
    """Measured results stay those of their seed: the next number of the generator tells how many were taken."""
    tower = item_tower()
    assert torch.rand(1).item() == pytest.approx(0.5241241455078125)
    for change in ({"fusion": "mean"}, {"re": False}, {"title": False}):
        assert all(torch.equal(own, other) for own, other in pairs_of(item_tower(**change), tower))
        assert torch.rand(1).item() == pytest.approx(0.5241241455078125)
    plain = item_tower(fusion="self").state_dict()
    assert all(torch.equal(plain.pop(name), weight) for name, weight in tower.state_dict().items())
    assert {name.partition(".")[0] for name in plain} == {"together"}
    torch.manual_seed(0)
    UserTower(USER)
    assert torch.rand(1).item() == pytest.approx(0.3491668105125427)


def pairs_of(one: torch.nn.Module, other: torch.nn.Module):
    return zip(one.state_dict().values(), other.state_dict().values(), strict=True)


@pytest.mark.parametrize("fusion", ["self", "mean"])
def test_other_fusions_read_the_same_inputs_and_no_padding(fusion):
    tower, batch = item_tower(fusion=fusion), items()
    vectors = tower(batch)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    wide = ItemBatch(
        F.pad(batch.std, (0, 3)), F.pad(batch.re, (0, 2)), F.pad(batch.tokens, (0, 0, 0, 4), value=7.0),
        F.pad(batch.token_mask, (0, 4)),
    )  # fmt: skip
    torch.testing.assert_close(vectors, tower(wide))
    for changed in (
        {"std": batch.std.clamp(max=3)}, {"re": batch.re.clamp(max=3)}, {"tokens": batch.tokens + 1.0},
    ):  # fmt: skip
        assert not torch.allclose(vectors[0], tower(replace(batch, **changed))[0], atol=1e-4)
    for part in (tower.cross_attention.out_proj, tower.feed_forward[-1]):  # of these towers nothing goes through them
        torch.nn.init.normal_(part.weight, std=9.0)
    torch.testing.assert_close(vectors, tower(batch))


def test_mean_pooling_is_the_mean_of_all_inputs():
    tower, batch = item_tower(fusion="mean"), items()
    query, mask = tower._query(batch)
    context, context_mask = tower._context(batch, None, 0.0)
    every = [*tower.query_norm(query)[1][mask[1]], *context[1][context_mask[1]]]  # item, STD; nothing, RE, title token
    assert len(every) == 5
    first = tower.query_norm(query)[1, 0]
    expected = F.normalize(tower.head(torch.cat([first, torch.stack(every).mean(0)])), dim=-1)
    torch.testing.assert_close(tower(batch)[1], expected)


@pytest.mark.parametrize(("part", "change"), [("re", {"re": False}), ("tokens", {"title": False})])
def test_a_tower_without_an_input_is_not_moved_by_it(part, change):
    tower, batch = item_tower(**change), items()
    changed = replace(batch, **{part: batch.tokens + 1.0 if part == "tokens" else batch.re.clamp(max=3)})
    torch.testing.assert_close(tower(batch), tower(changed))


def test_augment_masks_drops_and_keeps_the_rest():
    tower, batch = item_tower(), items()
    view = tower.augment(batch, std_dropout=1.0 - 1e-9, re_dropout=1.0, token_masking=1.0)
    assert view.std.tolist() == [[MASK, MASK], [MASK, 0], [0, 0]]
    assert view.re.abs().sum() == 0
    assert torch.equal(view.tokens[0, 0], tower.masked_token)
    assert torch.equal(view.tokens[2], batch.tokens[2])  # nothing there to mask
    same = tower.augment(batch, 0.0, 0.0, 0.0)
    assert torch.equal(same.std, batch.std)
    assert torch.equal(same.tokens, batch.tokens)


def test_a_new_word_gets_the_projection_of_its_text_and_old_rows_stay():
    tower, batch = item_tower(), items()
    before, text = tower(batch), torch.randn(2, TEXT)
    tower.grow([1, 1], text)
    torch.testing.assert_close(tower(batch), before)
    torch.testing.assert_close(tower.re_table.weight[5:], tower.re_from_text(text))
    grown = tower(replace(batch, re=torch.tensor([[5, 4], [3, 6], [0, 0]])))
    assert not torch.allclose(grown[0], before[0], atol=1e-5)


def test_re_text_share_trains_the_projection():
    tower, batch = item_tower(), items()
    tower(batch, torch.randn(5, TEXT), text_share=1.0).sum().backward()
    assert tower.re_from_text.weight.grad.abs().sum() > 0
    assert tower.re_table.weight.grad.abs().sum() == 0


# ------------------------------------------------------------------------------------------------------------- NT-Xent
@settings(deadline=None, max_examples=20)
@given(st.integers(2, 12), st.floats(0.02, 1.0), st.integers(0, 1000))
@example(2, 0.021484375, 304)  # one view finds its pair with certainty
def test_nt_xent_equals_the_librarys_value_and_gradient(items_count, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2 * items_count, 5, dtype=torch.float64, generator=generator)
    ours, theirs = (F.normalize(views, dim=-1).requires_grad_() for _ in range(2))
    loss = nt_xent(ours, torch.arange(items_count).repeat(2), contrastive_loss(temperature))
    reference = SelfSupervisedLoss(NTXentLoss(temperature=temperature))(theirs[:items_count], theirs[items_count:])
    loss.backward()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_other_colours_of_a_product_are_no_negatives():
    """Items 0 and 1 are one product and lie on the same spot; only item 2 may push them."""
    views = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).repeat(2, 1), dim=-1)
    loss = nt_xent(views, torch.tensor([0, 0, 1]).repeat(2), contrastive_loss(0.5))
    expected = [math.log(math.e**2 + 2) - 2] * 2 + [math.log(math.e**2 + 4) - 2]
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_alignment_and_uniformity_of_known_points():
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    alignment, uniformity = alignment_uniformity(points, points.flip(0))
    assert alignment == pytest.approx(4.0)
    assert uniformity == pytest.approx(-8.0)


# ---------------------------------------------------------------------------------------------------------- user tower
USER = UserTowerConfig(
    items=4,
    item_width=5,
    popularity_width=3,
    profile_width=4,
    text_width=TEXT,
    collaborative=2,
    width=16,
    heads=2,
    history=6,
)


def user_tower(config: UserTowerConfig = USER) -> UserTower:
    torch.manual_seed(0)
    tower = UserTower(config).eval()
    torch.nn.init.normal_(tower.collaborative.weight)
    return tower


def shoppers(lists: int = 2, length: int = 3) -> UserBatch:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return UserBatch(
        F.normalize(random(lists, length, 5), dim=-1), random(lists, length, 2), torch.ones(lists, length, dtype=torch.int64),
        random(lists, length).abs(), torch.ones(lists, length, dtype=torch.bool), F.normalize(random(lists, TEXT), dim=-1),
        torch.cat([random(lists, 2), torch.zeros(lists, 2)], dim=1),
    )  # fmt: skip


NOBODY = UserBatch(
    torch.zeros(1, 1, 5), torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1),
    torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, TEXT), torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
)  # fmt: skip


def test_a_tower_that_learned_nothing_asks_for_what_is_like_the_history_for_what_many_want_and_for_what_is_new():
    tower = UserTower.untaught(replace(USER, adapter=True, std_words=3, re_words=3)).eval()
    batch = shoppers()
    query, stranger = tower(batch), tower(NOBODY)
    assert query.shape == (2, tower.config.row_width) == (2, 8)  # without collaborative coordinates
    assert torch.allclose(query[:, :5], 10.0 * F.normalize(batch.history.mean(dim=1), dim=-1), atol=1e-5)
    assert torch.equal(query[:, 5:], stranger[:, 5:].expand(2, -1))  # whatever the body and the context are
    assert torch.equal(stranger[0, :5], torch.zeros(5))
    wanted, age, untouched = stranger[0, 5:].tolist()
    assert wanted > 0 > age
    assert untouched == 0
    assert tower.link_weights == UserTower(USER).link_weights
    one = replace(batch, **{name: value[:1] for name, value in vars(batch).items()})
    assert torch.allclose(FusedUserTower(tower)(one), query[:1], atol=1e-5)
    assert torch.allclose(FusedUserTower(tower)(NOBODY), stranger, atol=1e-5)


def test_the_query_is_as_wide_as_an_index_row():
    tower = user_tower()
    assert tower(shoppers()).shape == (2, USER.row_width) == (2, 10)
    rows = tower.item_rows(torch.arange(4), torch.zeros(4, 5), torch.zeros(4, 3))
    assert rows.shape == (4, USER.row_width)


def test_somebody_of_whom_nothing_is_known_gets_a_finite_query():
    assert torch.isfinite(user_tower()(NOBODY)).all()


@pytest.mark.parametrize("part", ["history", "collaborative", "kind", "age", "context", "profile"])
def test_each_input_moves_the_query(part):
    tower, batch = user_tower(), shoppers()
    value = getattr(batch, part)
    changed = replace(batch, **{part: value + 1})
    assert not torch.allclose(tower(batch), tower(changed), atol=1e-4)


@pytest.mark.parametrize(
    ("off", "parts"),
    [("behaviour", ["history", "collaborative", "kind", "age"]), ("context", ["context"]), ("profile", ["profile"])],
)
def test_a_tower_without_an_input_asks_as_if_it_were_missing(off, parts):
    tower, batch = user_tower(replace(USER, **{off: False})), shoppers()
    assert all(torch.equal(own, other) for own, other in pairs_of(tower, user_tower()))
    for part in parts:
        torch.testing.assert_close(tower(batch), tower(replace(batch, **{part: getattr(batch, part) + 1})))
    missing = {
        "behaviour": {"history_mask": torch.zeros_like(batch.history_mask)},
        "context": {"context": torch.zeros_like(batch.context)},
        "profile": {"profile": torch.zeros_like(batch.profile)},
    }[off]
    torch.testing.assert_close(tower(batch), user_tower()(replace(batch, **missing)))
    assert (tower.link_weights == LinkWeights(0.0, 0.0)) == (off == "behaviour")


def test_links_count_as_far_as_they_are_trusted_but_whole_within_a_basket():
    whole, half = user_tower(), user_tower(replace(USER, link_trust=0.5))
    together, variant = np.array([[0.0, 0.1, 2.0]], dtype=np.float32), np.array([[1.0, 0.0, 1.0]], dtype=np.float32)
    torch.testing.assert_close(half.link_scores(together, variant), 0.5 * whole.link_scores(together, variant))
    assert half.link_weights.together == pytest.approx(0.5 * whole.link_weights.together)
    assert half.basket_weights == whole.basket_weights == whole.link_weights


def test_a_history_speaks_as_far_as_it_is_trusted_and_a_stranger_is_served_as_ever():
    whole, half = user_tower(), user_tower(replace(USER, history_trust=0.25))
    batch = shoppers(3, 4)
    batch = replace(batch, history_mask=torch.tensor([[True] * 4, [False, True, False, True], [False] * 4]))
    nobody = replace(batch, history_mask=torch.zeros(3, 4, dtype=torch.bool))
    own, strangers = whole(batch), whole(nobody)
    torch.testing.assert_close(half(batch), 0.25 * own + 0.75 * strangers)
    assert not torch.allclose(half(batch)[:2], own[:2])
    torch.testing.assert_close(half(batch)[2], own[2])
    torch.testing.assert_close(half(nobody), strangers)
    torch.testing.assert_close(half.stranger_query(batch), strangers)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(0, USER.history), trust=st.sampled_from([1.0, 0.75]), collaborative=st.sampled_from([0, 2]),
    layers=st.integers(1, 2), off=st.sampled_from(["", "behaviour", "context", "profile", "popularity"]), context=st.booleans(),
    profile=st.booleans(),
)  # fmt: skip
def test_the_tower_that_serves_asks_the_same(length, trust, collaborative, layers, off, context, profile):
    config = replace(
        USER, history_trust=trust, collaborative=collaborative, layers=layers, **({off: False} if off else {})
    )
    tower, batch = user_tower(config), shoppers(1, length) if length else NOBODY
    for layer in tower.behaviour.layers:  # biases start at 0, and would not be missed
        torch.nn.init.normal_(layer.self_attn.in_proj_bias)
    batch = replace(
        batch,
        kind=torch.arange(max(1, length)).unsqueeze(0) % KINDS,
        context=shoppers(1).context if context else NOBODY.context,
        profile=shoppers(1).profile if profile else NOBODY.profile,
    )
    torch.testing.assert_close(FusedUserTower(tower)(batch), tower(batch), atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    present=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), data=st.data(),
    trust=st.sampled_from([1.0, 0.75]), layers=st.integers(1, 2), off=st.sampled_from(["", "behaviour", "context", "profile"]),
)  # fmt: skip
def test_the_tower_that_serves_asks_for_one_shopper_less_this_or_that(present, data, trust, layers, off):
    config = replace(USER, history_trust=trust, layers=layers, **({off: False} if off else {}))
    tower, one, rows = user_tower(config), shoppers(1, 5), len(present)
    told = st.lists(st.booleans(), min_size=rows, max_size=rows)

    def some(given, else_):
        return torch.cat([given if told_of else else_ for told_of in data.draw(told)])

    of_rows = {
        "history_mask": torch.tensor(present),
        "context": some(one.context, NOBODY.context), "profile": some(one.profile, NOBODY.profile),
    }  # fmt: skip
    as_shoppers = {
        name: getattr(one, name).expand(rows, *getattr(one, name).shape[1:])
        for name in ("history", "collaborative", "kind", "age")
    }
    expected = tower(replace(one, **as_shoppers, **of_rows))
    torch.testing.assert_close(FusedUserTower(tower)(replace(one, **of_rows)), expected, atol=1e-5, rtol=1e-5)


def test_the_tower_that_serves_takes_one_shopper():
    fused = FusedUserTower(user_tower())
    for wrong in (shoppers(2, 3), shoppers(1, USER.history + 1)):
        with pytest.raises(ValueError, match="one shopper, of up to 6 events"):
            fused(wrong)


def test_a_history_is_encoded_once_and_where_there_is_none_only_in_training():
    tower, batch = user_tower(replace(USER, history_trust=0.25)), shoppers(3, 4)
    nobody = replace(batch, history_mask=torch.zeros(3, 4, dtype=torch.bool))
    reads: list[int] = []
    tower.behaviour.register_forward_hook(lambda *_: reads.append(1))
    tower(batch)
    assert len(reads) == 1
    tower(nobody)
    assert len(reads) == 1
    tower.train()
    tower(nobody).sum().backward()
    assert len(reads) == 2
    # Several processes wait for each other's gradients of every parameter.
    assert all(weight.grad is not None for weight in tower.behaviour.parameters())


class Same(torch.nn.Module):
    """In the place of a transformer: each event as it was."""

    def forward(self, events: torch.Tensor, **_) -> torch.Tensor:
        return events


def test_the_query_is_read_at_the_latest_event_wherever_holes_and_padding_are():
    """Without attention the others move nothing but the likeness in the unit part."""
    tower, latest = user_tower(), [3, 2, 0]
    tower.behaviour = Same()
    mask = torch.tensor([[True] * 4, [True, False, True, False], [True, False, False, False]])
    batch = replace(shoppers(3, 4), history_mask=mask)
    before = tower(batch)[:, 5:]  # weights of popularity, and the collaborative vector
    for column in range(4):
        history = batch.history.clone()
        history[:, column] += 1.0
        moved = (tower(replace(batch, history=history))[:, 5:] - before).abs().amax(1) > 1e-4
        assert moved.tolist() == [column == one for one in latest]


def test_at_the_start_an_item_says_more_than_its_kind_and_its_place():
    torch.manual_seed(0)
    tower = UserTower(USER)
    item = (
        tower.item_input(torch.cat([F.normalize(torch.randn(9, 5), dim=-1), torch.zeros(9, 2)], dim=-1)).std(0).mean()
    )
    assert tower.kind_embedding.weight.std() < item
    assert tower.recency_embedding.weight.std() < item


def test_without_popularity_a_query_has_no_weight_for_it():
    query, usual = user_tower(replace(USER, popularity=False))(shoppers()), user_tower()(shoppers())
    assert (query[:, 5:8] == 0).all()
    assert (usual[:, 5:8] != 0).all()
    torch.testing.assert_close(query[:, :5], usual[:, :5])
    torch.testing.assert_close(query[:, 8:], usual[:, 8:])


def test_what_is_masked_does_not_move_the_query():
    tower, batch = user_tower(), shoppers(1, 3)
    hidden = replace(batch, history_mask=torch.tensor([[False, True, True]]))
    junk = replace(hidden, history=torch.cat([torch.full((1, 1, 5), 9.0), batch.history[:, 1:]], dim=1))
    torch.testing.assert_close(tower(hidden), tower(junk))


def test_padding_on_the_right_does_not_move_the_query():
    tower, batch = user_tower(), shoppers(1, 3)
    padded = UserBatch(
        F.pad(batch.history, (0, 0, 0, 2)), F.pad(batch.collaborative, (0, 0, 0, 2)), F.pad(batch.kind, (0, 2)),
        F.pad(batch.age, (0, 2)), F.pad(batch.history_mask, (0, 2)), batch.context, batch.profile,
    )  # fmt: skip
    torch.testing.assert_close(tower(batch), tower(padded))


def test_the_order_of_the_history_matters():
    tower, batch = user_tower(), shoppers(1, 3)
    assert not torch.allclose(tower(batch), tower(replace(batch, history=batch.history.flip(1))), atol=1e-4)


def test_an_item_without_events_has_no_collaborative_coordinates():
    popularity = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    rows = user_tower().item_rows(torch.arange(2), torch.zeros(2, 5), popularity)
    assert rows[0, -3:-1].abs().sum() > 0
    assert rows[1, -2:].abs().sum() == 0


def test_collaborative_coordinates_can_be_switched_off():
    tower = user_tower(replace(USER, collaborative=0))
    assert tower(shoppers()).shape == (2, 8)
    assert tower.item_rows(torch.arange(4), torch.zeros(4, 5), torch.zeros(4, 3)).shape == (4, 8)


ADAPTING = replace(USER, adapter=True, std_words=5, re_words=4)


def test_an_adapter_adds_nothing_at_first_and_turns_unit_vectors_when_it_has_learned():
    tower, vectors = user_tower(ADAPTING), shoppers().history[0]
    std, re = torch.tensor([[3, 0], [4, 3], [4, 0]]), torch.tensor([[3], [0], [3]])
    assert torch.allclose(tower.adapted(vectors, std, re), vectors, atol=1e-6)
    assert torch.equal(user_tower().adapted(vectors, std, re), vectors)
    wanted = vectors.roll(1, dims=0)
    optimizer = torch.optim.Adam(tower.adapter.parameters(), 0.05)
    for _ in range(300):
        loss = -(tower.adapted(vectors, std, re) * wanted).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < -0.99
    assert torch.allclose(tower.adapted(vectors, std, re).norm(dim=-1), torch.ones(3), atol=1e-5)


def test_an_adapter_tells_std_from_re_words_and_reads_none_that_is_newer_than_it():
    tower, vectors = user_tower(ADAPTING), shoppers().history[0][:1]
    torch.nn.init.normal_(tower.adapter.weight)
    with torch.no_grad():
        tower.adapter.weight[0] = 0.0

    def adapted(std: list[int], re: list[int]) -> torch.Tensor:
        return tower.adapted(vectors, torch.tensor([std]), torch.tensor([re]))

    assert not torch.allclose(adapted([3, 0], [0]), adapted([0, 0], [3]), atol=1e-3)
    assert torch.equal(adapted([3, 0], [4]), adapted([3, 0], [0]))
    assert torch.equal(adapted([0, 3], [99]), adapted([3, 0], [0]))
    assert torch.allclose(adapted([0, 0], [0]), vectors, atol=1e-6)


def test_realign_follows_items_and_gives_new_ones_zero():
    tower = user_tower()
    old = tower.collaborative.weight.clone()
    tower.realign([2, -1, 0])
    torch.testing.assert_close(tower.collaborative.weight, torch.stack([old[2], torch.zeros(2), old[0]]))


def test_forget_hides_all_three_or_none():
    tower, batch = user_tower(), shoppers()
    everything = tower.forget(batch, rate=1.0)
    assert not everything.history_mask.any()
    assert everything.context.abs().sum() == 0
    assert everything.profile.tolist() == [[0.0, 0.0, 1.0, 1.0]] * 2
    torch.testing.assert_close(tower(everything)[0], tower(NOBODY)[0])
    torch.testing.assert_close(tower(tower.forget(batch, rate=0.0)), tower(batch))


# ------------------------------------------------------------------------------------------------------------ reranker
RERANKER = RerankerConfig(
    std_rows=12, re_rows=9, std_slots={"category": 1, "colour": 3}, re_slots=4, history_ids=5,
    user_dense=["height", HISTORY_LENGTH], item_dense=["retrieval", "price"], embedding_dim=8, hidden=(16, 8),
)  # fmt: skip


def candidates(seed: int = 0, lists: int = 3, count: int = 7) -> RerankBatch:
    generator = torch.Generator().manual_seed(seed)

    def ids(rows: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, rows, shape, generator=generator)

    return RerankBatch(
        ids(12, lists, 5), ids(9, lists, 5), torch.randn(lists, 2, generator=generator), ids(12, lists, count, 4),
        ids(9, lists, count, 4), torch.randn(lists, count, 2, generator=generator),
    )  # fmt: skip


def deepfm(config: RerankerConfig = RERANKER):
    torch.manual_seed(0)
    model = build_deepfm(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def emptied(batch: RerankBatch) -> RerankBatch:
    """The same lists without any values."""
    names = ("user_std", "user_re", "item_std", "item_re")
    return replace(batch, **{name: getattr(batch, name) * 0 for name in names})


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 9), st.booleans(), st.booleans())
def test_training_by_lists_is_training_deepctrs_model(seed, lists, count, with_places, empty):
    config = replace(RERANKER, item_dense=[*RERANKER.item_dense, POSITION]) if with_places else RERANKER
    batch = candidates(seed, lists, count)
    batch = emptied(batch) if empty else batch
    if with_places:
        batch = replace(batch, position=torch.rand(lists, count))
    found = []
    for by_lists in (False, True):
        model = deepfm(config).train()
        torch.manual_seed(seed)  # of dropout
        logits = ListwiseDeepFM(model, config)(batch) if by_lists else model(deepfm_input(batch)).view(lists, count)
        F.cross_entropy(logits, torch.zeros(lists, dtype=torch.int64), reduction="sum").backward()
        found.append((logits, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 9))
def test_the_fused_forward_equals_deepctr(seed, lists, count):
    model, batch = deepfm(), candidates(seed, lists, count)
    expected = model(deepfm_input(batch)).view(lists, count)
    torch.testing.assert_close(FusedDeepFM(model, RERANKER)(batch), expected, atol=1e-5, rtol=1e-5)


def test_with_places_the_fused_forward_is_that_of_every_item_at_the_first():
    config = replace(RERANKER, item_dense=[*RERANKER.item_dense, POSITION])
    model, batch = deepfm(config), candidates()
    fused = FusedDeepFM(model, config)(batch)

    def at(place: float) -> torch.Tensor:
        position = torch.full(batch.item_dense.shape[:2], math.log(place))
        return model(deepfm_input(replace(batch, position=position))).view(3, 7)

    torch.testing.assert_close(fused, at(1.0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fused, at(7.0), atol=1e-3)


def test_the_fused_forward_survives_empty_lists_of_values():
    empty, model = emptied(candidates()), deepfm()
    expected = model(deepfm_input(empty)).view(3, 7)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(FusedDeepFM(model, RERANKER)(empty), expected, atol=1e-5, rtol=1e-5)


def test_transferred_tables_hold_the_towers_rows_are_shared_and_still_learn():
    torch.manual_seed(1)
    std, re = torch.randn(12, 8) * 4, torch.randn(9, 8) * 4
    model = build_deepfm(RERANKER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    transfer(model, std, re)
    weight = model.embedding_dict[STD_TABLE].weight
    torch.testing.assert_close(weight[1:], ROW_LENGTH * F.normalize(std, dim=-1)[1:])
    torch.testing.assert_close(model.embedding_dict[RE_TABLE].weight[1:], ROW_LENGTH * F.normalize(re, dim=-1)[1:])
    assert weight[0].abs().sum() == 0
    # One table serves the item's fields and the shopper's history: a step on either moves the same rows.
    assert len(model.embedding_dict) == 2
    before = weight.detach().clone()
    batch = candidates()
    only_user = replace(batch, item_std=batch.item_std * 0)
    model(deepfm_input(only_user)).sum().backward()
    optimizer.step()
    touched = only_user.user_std.unique()
    touched = touched[touched > 0]
    assert (model.embedding_dict[STD_TABLE].weight[touched] != before[touched]).any(1).all()


@pytest.mark.parametrize("table", [torch.zeros(3, 8), torch.full((12, 8), float("nan"))])
def test_a_table_that_does_not_fit_is_refused(table):
    with pytest.raises(ValueError, match="STD_table"):
        transfer(build_deepfm(RERANKER), table, torch.zeros(9, 8))


def test_before_training_the_order_is_retrievals_own():
    model = build_deepfm(RERANKER).eval()
    start_from_retrieval(model, RERANKER)
    batch = candidates()
    order = model(deepfm_input(batch)).view(3, 7).argsort(dim=1)
    assert torch.equal(order, batch.item_dense[:, :, 0].argsort(dim=1))


@pytest.mark.parametrize(("trust", "stranger_trust"), [(0.0, 1.0), (0.5, 0.25), (1.0, 0.0)])
def test_a_list_follows_the_model_as_far_as_it_is_trusted_with_such_a_shopper(trust, stranger_trust):
    model, batch = deepfm(), candidates()
    batch.user_dense[:, RERANKER.user_dense.index(HISTORY_LENGTH)] = torch.tensor([0.2, 0.0, 0.9])
    own = model(deepfm_input(batch)).view(3, 7)
    retrieval = batch.item_dense[:, :, RERANKER.item_dense.index("retrieval")]
    served = FusedDeepFM(model, replace(RERANKER, trust=trust, stranger_trust=stranger_trust))(batch)
    for row, of_shopper in enumerate((trust, stranger_trust, trust)):
        expected = (1 - of_shopper) * retrieval[row] + of_shopper * own[row]
        torch.testing.assert_close(served[row], expected, atol=1e-5, rtol=0)


def test_items_shared_by_several_lists_are_scored_as_in_each_alone():
    fused, batch = FusedDeepFM(deepfm(), RERANKER), candidates()
    shared = replace(batch, item_std=batch.item_std[:1].expand(3, -1, -1), item_re=batch.item_re[:1].expand(3, -1, -1))
    items = torch.cat([fused.embed_std(batch.item_std[:1]), fused.embed_re(batch.item_re[:1])], dim=2)
    user = fused.embed_user(batch.user_std, batch.user_re)
    torch.testing.assert_close(fused.score(user, batch.user_dense, items, batch.item_dense), fused(shared))


def test_ids_beyond_what_float32_counts_are_refused_at_build():
    with pytest.raises(ValueError, match="16777216"):
        build_deepfm(replace(RERANKER, re_rows=2**24 + 1))


def test_new_words_score_like_a_transferred_row_without_first_order_weight():
    model, batch = deepfm(), candidates()
    fused = FusedDeepFM(model, RERANKER)
    fused.grow(torch.randn(2, 8))
    assert fused.re_table.shape == (11, 9)
    scores = fused(replace(batch, item_re=torch.full_like(batch.item_re, 10)))
    assert np.isfinite(scores.numpy()).all()
    torch.testing.assert_close(fused.re_table[9:, :8].norm(dim=1), torch.full((2,), ROW_LENGTH))
