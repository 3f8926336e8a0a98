"""The sample shop: a fashion shop that exists only here, so that the right answer to every request is known.

Shoppers choose by a hidden utility: what they like (styles, colours, brands, ...), what suits their body, and what suits
the occasion they name. Events are sampled from it with popularity, trends, seasons and noise on top. `generate` returns
the data together with that truth; `read` gives the importer the data alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from catalog import Event, FeatureSchema, Product, RawProduct, User
from datasets import Source
from datasets.events import event_frame
from datasets.sample_shop_listings import Features
from datasets.sample_shop_products import OCCASIONS, SCHEMA, Item, draw_group, suitability
from datasets.sample_shop_words import BRANDS, CONTEXTS, RE_FIELDS, STD_FIELDS, WORDS

NOW = datetime(2026, 6, 30, tzinfo=UTC)
"""The instant at which the shop's data ends; events are before it."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_DAY = timedelta(days=1)
_LATE_SHARE = 0.3  # products that arrive within the observed days
_LAST_WEEK_SHARE = 0.02  # products that arrive in the last week: cold items
_STOCK_SHARE = 0.97
_SILENT_SHARE, _NEAR_COLD_SHARE = 0.03, 0.07  # shoppers with no event; with one or two
_CONTEXT_SHARE = 0.4
_LONGEST_SESSION = 20  # events
_HOURS = 23  # a session starts in one of a day's first 23 hours, so that it ends before midnight
_CONTEXT_WEIGHT = 5.0  # utility of an item that suits the named occasion perfectly
_OTHER_GENDER = -6.0  # utility of clothes for the other gender: bought by nobody but by accident
_FRONT_PAGE = 40  # items of the day that everybody sees

# Columns of the feature matrix: one for each `field=value`.
_FIELDS = tuple(field for field in (*STD_FIELDS, *RE_FIELDS) if field not in ("price_band", "occasion"))
_COLUMNS = {key: n for n, key in enumerate((field, value) for field in _FIELDS for value in WORDS[field])}

_OCCASION_OF = {text: OCCASIONS.index(occasion) for occasion, texts in CONTEXTS.items() for text in texts}

# What a body likes: utility per standard deviation of (height, body mass index) within one's sex.
_BODY = {
    ("fit", "long"): (2.6, 0.0),
    ("fit", "wide"): (1.8, 0.6),
    ("fit", "cropped"): (-1.9, -0.8),
    ("fit", "petite"): (-3.2, 0.0),
    ("fit", "oversized"): (0.2, 2.4),
    ("fit", "relaxed"): (0.0, 2.0),
    ("fit", "slim"): (0.4, -2.6),
    ("fit", "tailored"): (0.4, -1.5),
    ("fit", "a line"): (-0.4, 1.2),
    ("fit", "straight"): (0.9, 0.3),
    ("category", "heels"): (-1.3, -0.4),
    ("detail", "platform"): (-1.8, 0.0),
}


@dataclass(frozen=True)
class Taste:
    """The hidden truth of one shopper, in words."""

    wears: str  # "women" or "men"; unisex goods are for both
    styles: tuple[str, ...]  # the favourite first
    colours: tuple[str, ...]
    materials: tuple[str, ...]
    brands: tuple[str, ...]
    price_level: float  # where in a category's prices they buy, in standard deviations of log price
    height_cm: float  # the real body, also of shoppers who do not tell it
    weight_kg: float


@dataclass(frozen=True)
class SampleShop:
    """The shop's data and the truth behind it. Arrays follow the order of `users` and `products`."""

    schema: FeatureSchema
    products: list[RawProduct]
    users: list[User]
    events: list[Event]  # by time
    gold: dict[str, Product]  # the right structured features of each product
    tastes: dict[str, Taste]
    utility: Floats  # (users, products): taste and body, without context
    suitability: Floats  # (products, occasions): how well a product suits each of OCCASIONS

    @cached_property
    def user_rows(self) -> dict[str, int]:
        return {user.user_id: row for row, user in enumerate(self.users)}

    @cached_property
    def product_rows(self) -> dict[str, int]:
        return {raw.product_id: row for row, raw in enumerate(self.products)}

    def affinity(self, shopper: str, product: str, context: str = "") -> float:
        """The true utility of a product for a shopper who shops for `context` (one of CONTEXTS' texts, or anything)."""
        column = self.product_rows[product]
        return float(self.utility[self.user_rows[shopper], column] + context_utility(self.suitability, context)[column])


def context_utility(suitability: Floats, context: str) -> Floats:
    """What the occasion named in `context` adds to each product's utility: (products,)."""
    occasion = _OCCASION_OF.get(context)
    if occasion is None:
        return np.zeros(len(suitability))
    return _CONTEXT_WEIGHT * suitability[:, occasion]


def read(path: Path | None) -> Source:
    """The sample shop as a source. It is made, not read: `path` is ignored. Features are left to the extraction."""
    shop = generate()
    return Source(schema=shop.schema, products=shop.products, users=shop.users, events=[event_frame(shop.events)])


def generate(
    seed: int = 0, products: int = 3000, shoppers: int = 2000, events: int = 60_000, days: int = 90
) -> SampleShop:
    """Make the shop. The same arguments give the same shop, whatever the platform or the day.

    Raises:
        ValueError: fewer than 8 events a shopper, too few to give each the history meant for them.
    """
    if events < 8 * shoppers:
        raise ValueError(f"{events} events are too few for {shoppers} shoppers; ask for at least {8 * shoppers}")
    # A stream of random numbers for each part, so that a change in one leaves the others as they were.
    goods, people, visits = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3))
    start = NOW - days * _DAY
    items, groups = _draw_items(goods, products)
    arrived = _draw_arrivals(goods, products, days)
    raws, gold = _list_products(goods, items, groups, arrived, start)
    features = _feature_matrix([item.features for item in items])
    price_levels = _price_levels(items)
    suited = np.array([suitability(item.features) for item in items])

    tastes, users, weights = _draw_shoppers(people, shoppers)
    levels = np.array([taste.price_level for taste in tastes.values()])
    utility = weights @ features.T - 0.9 * np.abs(levels[:, None] - price_levels[None, :])
    # Sums of products may differ in the last bits between platforms; rounded, they do not.
    utility = np.round(utility, 6)

    appeal = np.round(_daily_appeal(goods, items, groups, arrived, days), 6)
    categories = np.array([list(WORDS["category"]).index(item.features["category"][0]) for item in items])
    history = _Visits(visits, utility, suited, appeal, categories, _spread_events(visits, shoppers, events)).run()
    user_ids, product_ids = [user.user_id for user in users], [raw.product_id for raw in raws]
    log = [
        Event(
            user_id=user_ids[visit.shopper],
            product_id=product_ids[visit.product],
            kind=visit.kind,
            at=start + timedelta(seconds=visit.second),
            context=visit.context,
        )
        for visit in history
    ]
    return SampleShop(SCHEMA, raws, users, log, gold, tastes, utility, suited)


def _draw_items(rng: np.random.Generator, count: int) -> tuple[list[Item], list[int]]:
    """Items and the number of the group that each belongs to."""
    items: list[Item] = []
    groups: list[int] = []
    while len(items) < count:
        variants = draw_group(rng)[: count - len(items)]
        groups += [groups[-1] + 1 if groups else 0] * len(variants)
        items += variants
    return items, groups


def _draw_arrivals(rng: np.random.Generator, count: int, days: int) -> Floats:
    """Days since the start at which products arrived: most before it (negative), some of them in the last week."""
    late, newest = round(count * _LATE_SHARE), round(count * _LAST_WEEK_SHARE)
    arrived = np.concatenate(
        [
            -rng.uniform(0, 300, count - late),
            rng.uniform(0, days - 7, late - newest),
            rng.uniform(days - 7, days, newest),
        ]
    )
    return rng.permutation(arrived)


def _list_products(
    rng: np.random.Generator, items: list[Item], groups: list[int], arrived: Floats, start: datetime
) -> tuple[list[RawProduct], dict[str, Product]]:
    in_stock = rng.random(len(items)) < _STOCK_SHARE
    sizes = np.bincount(groups)
    raws, gold = [], {}
    for row, (item, group) in enumerate(zip(items, groups, strict=True)):
        product_id, title = f"p{row + 1:05d}", item.listing.title
        raws.append(
            RawProduct(
                product_id=product_id,
                title=title,
                description=item.listing.description,
                attributes=item.listing.attributes,
                price=item.price,
                in_stock=bool(in_stock[row]),
                group_id=f"g{group + 1:05d}" if sizes[group] > 1 else None,
                arrived_at=start + timedelta(seconds=round(arrived[row] * 86_400)),
            )
        )
        std = {name: item.features[name] for name in STD_FIELDS if item.features[name]}
        re = {name: item.features[name] for name in RE_FIELDS if item.features[name]}
        gold[product_id] = Product(product_id=product_id, title=title, std=std, re=re)
    return raws, gold


def _feature_matrix(features: Sequence[Features]) -> Floats:
    """(products, columns): each field's weight of 1 shared among its values."""
    matrix = np.zeros((len(features), len(_COLUMNS)))
    for row, values in enumerate(features):
        for name in _FIELDS:
            for value in values[name]:
                matrix[row, _COLUMNS[name, value]] = 1 / len(values[name])
    return matrix


def _price_levels(items: list[Item]) -> Floats:
    """Log prices in standard deviations, within each category: a dear T-shirt costs less than a cheap coat."""
    prices = np.log([item.price for item in items])
    names = np.array([item.features["category"][0] for item in items])
    levels = np.zeros(len(items))
    for name in dict.fromkeys(names):
        own = prices[names == name]
        levels[names == name] = (own - own.mean()) / max(own.std(), 0.1)
    return levels


def _draw_shoppers(rng: np.random.Generator, count: int) -> tuple[dict[str, Taste], list[User], Floats]:
    """Tastes, what the shop knows of each shopper, and the weights of taste and body on `_COLUMNS`."""
    tastes, users = {}, []
    weights = np.zeros((count, len(_COLUMNS)))
    for row in range(count):
        user_id = f"shopper-{row + 1:04d}"
        sex = "women" if rng.random() < 0.58 else "men"
        tall, heavy = np.clip(rng.standard_normal(2), -2.5, 2.5)
        height = round(float(162 + 5.5 * tall if sex == "women" else 175 + 6 * tall), 1)
        mass_index = 21.8 + 3.0 * heavy if sex == "women" else 24.2 + 3.2 * heavy
        weight = round(float(mass_index) * (height / 100) ** 2, 1)
        age = int(np.clip(18 + rng.gamma(2.5, 6.0), 18, 70))
        wears = sex if rng.random() < 0.97 else "men" if sex == "women" else "women"
        taste = _draw_taste(rng, wears, height, weight)
        tastes[user_id] = taste
        weights[row] = _taste_weights(rng, taste)
        for key, (by_height, by_mass) in _BODY.items():
            weights[row, _COLUMNS[key]] += by_height * tall + by_mass * heavy
        profile = {"height_cm": height, "weight_kg": weight, "age": float(age)}
        silence = rng.random()
        if silence < 0.05:
            profile = {}
        elif silence < 0.17:
            del profile["weight_kg"]
        users.append(User(user_id=user_id, profile=profile))
    return tastes, users, weights


def _draw_taste(rng: np.random.Generator, wears: str, height: float, weight: float) -> Taste:
    def some(values: Sequence[str], shares: Sequence[float], count: int) -> tuple[str, ...]:
        chances = np.array(shares, dtype=float)
        return tuple(map(str, rng.choice(values, size=count, replace=False, p=chances / chances.sum())))

    usual = {"romantic": 2.0, "bohemian": 1.3} if wears == "women" else {"romantic": 0.2, "outdoor": 2.0, "street": 1.5}
    styles = some(list(WORDS["style"]), [usual.get(style, 1.0) for style in WORDS["style"]], int(rng.integers(2, 4)))
    price_level = float(rng.normal(0.0, 1.0))
    tiers = np.array([brand.tier for brand in BRANDS]) / 1.2 - 1.0  # on the scale of price levels, roughly
    shared = np.array([1.0 + 3.0 * len({*brand.styles} & {*styles}) for brand in BRANDS])
    return Taste(
        wears=wears,
        styles=styles,
        colours=some(list(WORDS["colour"]), [3.0 if n < 7 else 1.0 for n in range(len(WORDS["colour"]))], 3),
        materials=some(list(WORDS["material"]), [1.0] * len(WORDS["material"]), 3),
        brands=some([brand.name for brand in BRANDS], list(shared * np.exp(-np.abs(tiers - price_level))), 3),
        price_level=price_level,
        height_cm=height,
        weight_kg=weight,
    )


def _taste_weights(rng: np.random.Generator, taste: Taste) -> Floats:
    weights = np.zeros(len(_COLUMNS))
    for (name, value), column in _COLUMNS.items():
        if name == "category":
            weights[column] = rng.normal(0.0, 0.7)
        elif name in ("pattern", "neckline", "detail", "style"):
            weights[column] = rng.normal(0.0, 0.3)
        elif (name, value) in (("gender", "women"), ("gender", "men")):
            weights[column] = 0.0 if value == taste.wears else _OTHER_GENDER
    for rank, style in enumerate(taste.styles):
        weights[_COLUMNS["style", style]] += 2.4 - 0.6 * rank
    for name, values, liking in (
        ("colour", taste.colours, 1.2),
        ("material", taste.materials, 1.0),
        ("brand", taste.brands, 1.5),
    ):
        for value in values:
            weights[_COLUMNS[name, value]] += liking
    return weights


def _daily_appeal(rng: np.random.Generator, items: list[Item], groups: list[int], arrived: Floats, days: int) -> Floats:
    """(days, products): what makes a product wanted by everyone that day; minus infinity before it has arrived."""
    group_quality = rng.normal(0.0, 0.5, groups[-1] + 1)
    quality = group_quality[groups] + rng.normal(0.0, 0.3, len(items))
    names = list(WORDS["style"])
    slope, phase = rng.uniform(-0.8, 0.8, len(names)), rng.uniform(0, 2 * np.pi, len(names))
    features = _feature_matrix([item.features for item in items])
    belongs = features[:, [_COLUMNS["style", name] for name in names]]
    in_season = features[:, [_COLUMNS["season", name] for name in WORDS["season"]]] > 0
    appeal = np.zeros((days, len(items)))
    for day in range(days):
        passed = day / days
        styles = slope * (2 * passed - 1) + 0.5 * np.sin(2 * np.pi * 1.5 * passed + phase)
        # Spring turns to summer: the data covers the three months up to NOW.
        warmth = {"spring": 0.7 - 1.2 * passed, "summer": -0.3 + 1.2 * passed, "autumn": -0.9, "winter": -1.8}
        season = np.where(in_season, [warmth[name] for name in WORDS["season"]], -np.inf).max(axis=1)
        age = day - np.floor(arrived)
        novelty = np.where((arrived > 0) & (age >= 0), 0.7 * np.exp(-np.maximum(age, 0) / 7), 0.0)
        appeal[day] = np.where(arrived <= day, quality + belongs @ styles + season + novelty, -np.inf)
    return appeal


def _top(scores: Floats, count: int) -> Ints:
    """Positions of the `count` highest scores, best first; of equal ones the earlier."""
    count = min(count, len(scores))
    bar = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= bar)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]


@dataclass(frozen=True)
class _Session:
    shopper: int
    size: int  # events
    slot: int  # day * _HOURS + hour


def _spread_events(rng: np.random.Generator, shoppers: int, events: int) -> Ints:
    """How many events each shopper has: a few have none, some one or two, the rest a long-tailed many."""
    order = rng.permutation(shoppers)
    silent, near_cold = round(shoppers * _SILENT_SHARE), round(shoppers * _NEAR_COLD_SHARE)
    counts = np.zeros(shoppers, dtype=np.int64)
    few, many = order[silent : silent + near_cold], order[silent + near_cold :]
    counts[few] = rng.integers(1, 3, len(few))
    activity = np.exp(rng.normal(0.0, 0.8, len(many)))
    counts[many] = 3 + rng.multinomial(events - counts.sum() - 3 * len(many), activity / activity.sum())
    return counts


@dataclass(frozen=True)
class _Act:
    """One event by numbers."""

    second: int  # since the start
    shopper: int
    product: int
    kind: str
    context: str


@dataclass
class _Visits:
    """Plays the shop day by day; what was wanted on the days before is what the front page shows."""

    rng: np.random.Generator
    utility: Floats
    suitability: Floats
    appeal: Floats
    categories: Ints
    counts: Ints  # events a shopper

    def __post_init__(self) -> None:
        self.wishes: list[list[int]] = [[] for _ in self.counts]  # carted, not bought yet
        self.good_find = np.quantile(self.utility, 0.97, axis=1)  # by a shopper's own measure

    def run(self) -> list[_Act]:
        """All events, by time."""
        wanted = np.exp(self.appeal[0])  # before anybody came, what is liked stands for what was wanted
        by_day: list[list[_Session]] = [[] for _ in self.appeal]
        for session in self._plan():
            by_day[session.slot // _HOURS].append(session)
        acts: list[_Act] = []
        for day, sessions in enumerate(by_day):
            front = _top(wanted, _FRONT_PAGE)
            shown = self.appeal[day] + 0.2 * np.log1p(wanted)
            shown[front] += 1.0 / np.sqrt(1 + np.arange(len(front)))  # the first places are seen most
            today = [act for session in sessions for act in self._visit(session, shown)]
            wanted = 0.85 * wanted + np.bincount([act.product for act in today], minlength=len(wanted))
            acts += today
        return sorted(acts, key=lambda act: (act.second, act.shopper))

    def _plan(self) -> list[_Session]:
        """Cut each shopper's events into sessions, each in an hour of its own."""
        days = len(self.appeal)
        weekend = np.array([1.3 if (NOW - (days - day) * _DAY).weekday() >= 5 else 1.0 for day in range(days)])
        busy = weekend * np.linspace(0.85, 1.15, days)
        # UTC hours: the evening in Seoul is the afternoon here.
        hours = np.exp(-(((np.arange(_HOURS) - 12.5) / 4.5) ** 2)) + 0.15
        chances = np.log(np.outer(busy, hours).ravel())
        sessions = []
        for shopper in map(int, np.flatnonzero(self.counts)):
            left, sizes = int(self.counts[shopper]), []
            while left:
                sizes.append(min(1 + int(self.rng.geometric(0.22)), _LONGEST_SESSION, left))
                left -= sizes[-1]
            slots = _top(chances + self.rng.gumbel(size=len(chances)), len(sizes))
            sessions += [_Session(shopper, size, int(slot)) for size, slot in zip(sizes, slots, strict=True)]
        return sorted(sessions, key=lambda session: (session.slot, session.shopper))

    def _visit(self, session: _Session, shown: Floats) -> list[_Act]:
        """Views of what is liked and shown; liked ones go to the cart, some are bought."""
        rng, shopper = self.rng, session.shopper
        context = ""
        if rng.random() < _CONTEXT_SHARE:
            texts = CONTEXTS[OCCASIONS[rng.integers(len(OCCASIONS))]]
            context = texts[rng.integers(len(texts))]
        liking = self.utility[shopper] + context_utility(self.suitability, context)
        noisy = liking + shown + rng.gumbel(size=len(liking))
        if not context and rng.random() < 0.6:  # looking for one kind of thing
            noisy[self.categories == self.categories[np.argmax(noisy)]] += 1.5
        picks = list(_top(noisy, session.size))
        if self.wishes[shopper] and rng.random() < 0.25:
            wish = self.wishes[shopper][-1]
            picks = [wish, *(pick for pick in picks if pick != wish)]
        day, hour = divmod(session.slot, _HOURS)
        second = day * 86_400 + hour * 3_600 + int(rng.integers(0, 1_200))
        acts: list[_Act] = []
        good_find = self.good_find[shopper] + (0.5 * _CONTEXT_WEIGHT if context else 0.0)
        for pick in map(int, picks):
            fondness = liking[pick] - good_find
            kinds = ["view"]
            if rng.random() < 0.45 / (1 + np.exp(-fondness)):
                kinds.append("cart")
                if rng.random() < 0.7 / (1 + np.exp(-fondness)):
                    kinds.append("purchase")
            for kind in kinds:
                if len(acts) == session.size:
                    return acts
                acts.append(_Act(second, shopper, pick, kind, context))
                second += int(rng.integers(5, 120))
                self._remember(shopper, pick, kind)
        return acts

    def _remember(self, shopper: int, product: int, kind: str) -> None:
        wishes = self.wishes[shopper]
        if kind == "cart" and product not in wishes:
            wishes.append(product)
        elif kind == "purchase" and product in wishes:
            wishes.remove(product)
