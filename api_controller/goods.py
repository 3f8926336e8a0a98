"""What is sold: products and their features."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException

from api_controller.access import ADMIN, PUBLIC
from api_controller.schemas import EvidenceBody, ProductAnswer, ProductId, ProductsAnswer
from api_controller.service import ServiceDep, listed
from catalog import RawProduct

router = APIRouter(tags=["goods"])

PRODUCT_EXAMPLE: list[Any] = [
    {"product_id": "new-1", "title": "Women's linen wrap dress", "attributes": {"category": "dress"}, "price": 59000}
]


@router.get("/items/{product_id}", dependencies=[PUBLIC])
async def item(product_id: ProductId, service: ServiceDep) -> ProductAnswer:
    store, _ = service.parts()
    stored = await service.run(lambda: store.products.get(product_id))
    if stored is None:
        raise HTTPException(404, f"no product {product_id!r}")
    raw, product = stored.raw, stored.product
    return ProductAnswer(
        product_id=raw.product_id, title=raw.title, description=raw.description, attributes=raw.attributes, price=raw.price,
        in_stock=raw.in_stock, group_id=raw.group_id, std=product.std if product else None, re=product.re if product else None,
        evidence={name: [EvidenceBody(**one) for one in said] for name, said in stored.evidence.items()},
    )  # fmt: skip


@router.put("/products", dependencies=[ADMIN])
async def products(
    body: Annotated[RawProduct | list[RawProduct], Body(examples=PRODUCT_EXAMPLE)], service: ServiceDep
) -> ProductsAnswer:
    """Add or replace products: read, embedded and searchable when this returns."""
    _, recommender = service.parts()
    reader = service.reader
    assert reader is not None
    given = listed(body)
    # Releases that answer an experiment's shoppers must know of them too.
    refused = await service.run(lambda: recommender.put_products(given, reader, service.answering_releases()))
    return ProductsAnswer(stored=len(given), refused=[f"{row.file} {row.reason}: {row.raw}" for row in refused])
