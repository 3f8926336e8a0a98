"""Bodies of requests and answers, each with an example for the interactive pages."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

import catalog
from catalog import Identifier, ListKind, Moment, Price, Profile, Text, Value, Values
from experiments import Arm, Arms
from rules import DEFAULT, Days, RuleSet

MAX_K = 100
MAX_LIST = 1000

ProductId = Annotated[Identifier, Path(description="the shop's own product id")]
ReleaseName = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="a release's name, as GET /releases shows it")
]
UserId = Annotated[catalog.UserId, Path(description="the shop's own shopper id")]
SessionId = Annotated[Identifier, Path(description="the id of a session, as events have it in session_id")]
ExperimentName = Annotated[Identifier, Path(description="what the experiment is called")]


class FilterBody(BaseModel):
    """Any of the values within a field, in every field, and none of others; a price range; in stock or not; when it arrived: from
    a moment on, before a moment, within so many days."""

    model_config = ConfigDict(extra="forbid")

    std: dict[Identifier, Values] = {}
    std_none: dict[Identifier, Values] = {}
    min_price: Price | None = None
    max_price: Price | None = None
    in_stock: bool | None = None
    arrived_after: Moment | None = None
    arrived_before: Moment | None = None
    arrived_within_days: Days | None = None


class RecommendBody(BaseModel):
    """Who asks and what they said. Every part may be left out."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "user_id": "shopper-1",
                    "history": ["product-17"],
                    "context": "beach vacation",
                    "profile": {"height_cm": 165, "weight_kg": 55},
                    "filters": {"std": {"category": ["dress"]}, "max_price": 90000, "in_stock": True},
                    "k": 5,
                },
                {"kind": "basket", "cart": ["product-17"], "k": 5},
                {"kind": "trending", "filters": {"std": {"category": ["dress"]}}, "k": 5, "explain": False},
            ]
        },
    )

    kind: Annotated[
        ListKind, Field(description="for_you; similar, because: about product_id; basket: with cart; trending; again")
    ] = "for_you"
    product_id: Annotated[Identifier | None, Field(description="of kinds similar and because")] = None
    cart: Annotated[list[Identifier], Field(max_length=MAX_LIST, description="of kind basket")] = []
    user_id: catalog.UserId | None = None
    session_id: Identifier | None = Field(None, description="instead of user_id, of a shopper who has not logged in")
    history: Annotated[list[Identifier], Field(max_length=MAX_LIST)] = []
    context: Text = ""
    profile: Profile = {}
    filters: FilterBody = Field(default_factory=FilterBody)
    exclude: Annotated[list[Identifier], Field(max_length=MAX_LIST)] = []
    exclude_history: bool = True
    explain: Annotated[bool, Field(description="say why each item is there; off saves the time")] = True
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 20
    rule_set: Annotated[Identifier, Field(description="by whose live rules the answer is arranged")] = DEFAULT
    rules: Annotated[
        RuleSet | None, Field(description="rules to try for this answer, instead of the live ones; for admins")
    ] = None


class ReasonBody(BaseModel):
    """What spoke for an item: `weight` is what its score loses without it; `text` says it in "en" and "ko"."""

    kind: str
    field: str = ""
    value: str = ""
    product_id: str = ""
    title: str = ""
    weight: float = 0.0
    text: dict[str, str] = {}


class AnchorBody(BaseModel):
    product_id: str
    title: str


class ItemBody(BaseModel):
    product_id: str
    title: str
    price: float | None
    rank: int
    score: float
    stage: str
    retrieval_rank: int
    reasons: list[ReasonBody]
    placed_by: Annotated[
        str, Field(description="the rule to which the item owes its place; empty where its score does")
    ] = ""


class EffectBody(BaseModel):
    """What a rule did: candidates it removed, items that stand elsewhere than without it, and what it could not do."""

    rule: str
    kind: str
    removed: int
    moved: int
    note: str = ""


class RulesUsedBody(BaseModel):
    """The version is null for rules that came with the request. Rules with a `problem` cannot be read, and were not applied."""

    name: str
    version: int | None
    effects: list[EffectBody]
    problem: str = ""


class RecommendAnswer(BaseModel):
    """`list_id` goes back with events and impressions; `experiment` and `arm` say what the list counts for, if it does."""

    kind: str
    anchor: AnchorBody | None
    list_id: str
    experiment: str | None
    arm: str | None
    items: list[ItemBody]
    release: str
    plan: str
    milliseconds: dict[str, float]
    warnings: list[str]
    degraded: bool
    rules: RulesUsedBody | None = None


class NeighbourBody(BaseModel):
    product_id: str
    title: str
    price: float | None
    rank: int
    score: float


class EvidenceBody(BaseModel):
    """Who said a feature value: the seller, the lexicon or a model, how sure, and by which words of the text."""

    value: str
    source: str
    confidence: float | None
    words: str


class ProductAnswer(BaseModel):
    product_id: str
    title: str
    description: str
    attributes: dict[str, list[str]]
    price: float | None
    in_stock: bool
    group_id: str | None
    std: dict[str, list[str]] | None
    re: dict[str, list[str]] | None
    evidence: dict[str, list[EvidenceBody]]


class RefusedBody(BaseModel):
    """What was not taken: the place of its row among those given, from 0, the field, and why."""

    index: int
    what: str
    reason: str


class EventsAnswer(BaseModel):
    stored: int
    duplicates: int  # their ids were there already
    refused: list[RefusedBody]


class ProductsAnswer(BaseModel):
    stored: int
    refused: list[RefusedBody]  # rows that were not stored
    refused_values: list[RefusedBody]  # of rows that were stored without them


class ProductIdsBody(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"product_ids": ["old-1", "old-2"]}]})

    product_ids: Annotated[list[Identifier], Field(min_length=1, max_length=MAX_LIST)]


class DeletedAnswer(BaseModel):
    deleted: int
    unknown: list[str]


class ProfileBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"profile": {"height_cm": 172, "weight_kg": 64}}]}
    )

    profile: Profile


class UserAnswer(BaseModel):
    user_id: str
    profile: Profile
    events: dict[str, int]  # by kind
    last_seen: datetime | None


class MergeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"session_id": "session-1"}]})

    session_id: Identifier


class MergedAnswer(BaseModel):
    moved: int  # events


class ForgottenAnswer(BaseModel):
    removed: dict[str, int]  # rows by table


RULES_EXAMPLE: list[Any] = [
    {"kind": "filter", "keep": {"in_stock": True}},
    {"kind": "hide", "events": ["purchase"], "days": 90},
    {
        "kind": "bury",
        "when": {"std": "category", "any_of": ["coat", "puffer"]},
        "factor": 4,
        "name": "winter coats down",
    },
    {"kind": "at_most", "n": 2, "group": True},
    {"kind": "promote", "when": {"arrived": {"within_days": 30}}, "share": 0.2},
    {"kind": "diversity", "strength": 0.2},
]


class _Signed(BaseModel):
    model_config = ConfigDict(extra="forbid")

    who: Value = ""
    note: Text = ""


class RulesBody(_Signed):
    """A new version of the rules of a name."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "summer", "rules": RULES_EXAMPLE, "who": "Jin", "note": "summer sale, first week"}]
        }
    )

    name: Identifier = DEFAULT
    rules: RuleSet
    live: Annotated[bool, Field(description="whether requests get it at once")] = True


class RulesCheckBody(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"rules": RULES_EXAMPLE}]})

    rules: RuleSet


class RulesLiveBody(_Signed):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "summer", "who": "Jin", "note": "back to last week's"}]}
    )

    name: Identifier = DEFAULT


class RulesVersionBody(BaseModel):
    name: str
    version: int
    live: bool
    who: str
    note: str
    made_at: datetime
    problem: Annotated[
        str, Field(description="why this version of the program cannot read it, so that it is skipped")
    ] = ""


class RulesAnswer(RulesVersionBody):
    """Of a version with a `problem` the rules are empty, and `unreadable` has what is stored."""

    rules: RuleSet
    warnings: list[str] = []
    unreadable: Any = None


class RulesTurnBody(BaseModel):
    name: str
    version: int
    who: str
    note: str
    at: datetime


class RulesListAnswer(BaseModel):
    """Every version, and which was made live when; the latest first."""

    versions: list[RulesVersionBody]
    history: list[RulesTurnBody]


class RulesCheckAnswer(BaseModel):
    """How the rules are named in answers, and what in them no product has yet."""

    rules: list[str]
    warnings: list[str]


class Refusal(BaseModel):
    detail: str  # why, in words for people


class WrongValue(BaseModel):
    loc: list[str | int]  # its place: "body" or "query" or "path", then names and numbers of rows
    msg: str
    type: str  # as pydantic names kinds of errors


class Invalid(BaseModel):
    detail: list[WrongValue]


class Health(BaseModel):
    status: str
    release: str | None = None
    reason: str | None = None
    warnings: list[str] = []


class ReleaseAnswer(BaseModel):
    name: str
    created_at: str
    parts: list[str]  # "item_tower", "user_tower", "reranker", "index": those that are finished
    metrics: dict[str, dict[str, float]]  # of each part, on the days or items it held out
    items: int | None  # in its index
    live: bool


class ViewBody(BaseModel):
    """Places of one list, from 1, that a shopper saw."""

    model_config = ConfigDict(extra="forbid")

    list_id: Identifier
    positions: Annotated[list[Annotated[int, Field(ge=1, le=MAX_K)]], Field(min_length=1, max_length=MAX_K)]


class ViewsAnswer(BaseModel):
    stored: int


class ExperimentBody(BaseModel):
    """The first arm is what the others are compared with, and what anonymous shoppers get. Two arms that are alike are a test of
    the experiment itself: they must not differ."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "arms": [{"name": "control", "share": 0.5}, {"name": "same again", "share": 0.5}],
                    "note": "are two halves of the shoppers alike?",
                }
            ]
        },
    )

    arms: Arms
    note: Text = ""


class StartedExperiment(BaseModel):
    name: str
    version: int
    arms: list[Arm]
    note: str
    started_at: datetime
    stopped_at: datetime | None


class RateBody(BaseModel):
    """A share with its 95 % interval; null where there are too few shoppers to say."""

    value: float
    low: float | None
    high: float | None


class AnsweredByBody(BaseModel):
    """Lists of an arm by one release and one version of one rule set (null: no rules of that name were live)."""

    release: str
    rules: str
    rules_version: int | None
    lists: int
    first_at: datetime
    last_at: datetime


class ArmReport(BaseModel):
    """By outcome (click, cart, purchase): of shoppers, the share that did so at least once; of lists, the share out of which
    somebody did. Two entries of `answered_by` with the same rules, or another release, mean that the arm changed meanwhile."""

    arm: str
    shoppers: int
    lists: int
    per_shopper: dict[str, RateBody | None]
    per_list: dict[str, RateBody | None]
    answered_by: list[AnsweredByBody]


class DifferenceBody(BaseModel):
    arm: str
    outcome: str
    per: str
    difference: float
    low: float | None
    high: float | None


class SampleRatioBody(BaseModel):
    expected: dict[str, float]
    chi_square: float
    p: float
    broken: bool


class ReportAnswer(StartedExperiment):
    report: list[ArmReport]
    differences: list[DifferenceBody]
    sample_ratio: SampleRatioBody
    warnings: list[str]
