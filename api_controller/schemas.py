"""Bodies of requests and answers, each with an example for the interactive pages."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from catalog import Identifier, Price, Profile, Text, Values

MAX_K = 100
MAX_LIST = 1000

ProductId = Annotated[Identifier, Path(description="the shop's own product id")]
UserId = Annotated[Identifier, Path(description="the shop's own shopper id")]


class FilterBody(BaseModel):
    """Any of the values within a field, in every field; a price range; in stock or not."""

    model_config = ConfigDict(extra="forbid")

    std: dict[Identifier, Values] = {}
    min_price: Price | None = None
    max_price: Price | None = None
    in_stock: bool | None = None


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
                }
            ]
        },
    )

    user_id: Identifier | None = None
    history: Annotated[list[Identifier], Field(max_length=MAX_LIST)] = []
    context: Text = ""
    profile: Profile = {}
    filters: FilterBody = FilterBody()
    exclude: Annotated[list[Identifier], Field(max_length=MAX_LIST)] = []
    exclude_history: bool = True
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 20


class ReasonBody(BaseModel):
    kind: str
    field: str = ""
    value: str = ""


class ItemBody(BaseModel):
    product_id: str
    title: str
    price: float | None
    rank: int
    score: float
    stage: str
    retrieval_rank: int
    reasons: list[ReasonBody]


class RecommendAnswer(BaseModel):
    items: list[ItemBody]
    release: str
    plan: str
    milliseconds: dict[str, float]
    warnings: list[str]
    degraded: bool


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


class EventsAnswer(BaseModel):
    stored: int
    duplicates: int
    unknown_products: list[str]


class ProductsAnswer(BaseModel):
    stored: int
    refused: list[str]


class ProfileBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"profile": {"height_cm": 172, "weight_kg": 64}}]}
    )

    profile: Profile


class Health(BaseModel):
    status: str
    release: str | None = None
    reason: str | None = None
