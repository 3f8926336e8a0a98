"""What is sold: products and their features."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import TypeAdapter

from api_controller.access import ADMIN, PUBLIC
from api_controller.refusals import MISSING, unavailable
from api_controller.rows import read_rows, rows_body
from api_controller.schemas import (
    MAX_LIST,
    DeletedAnswer,
    EvidenceBody,
    ProductAnswer,
    ProductId,
    ProductIdsBody,
    ProductsAnswer,
    RefusedBody,
)
from api_controller.service import Service, ServiceDep
from catalog import RawProduct, Rejected
from settings import UserError

router = APIRouter(tags=["goods"])

PUT_SECONDS = 60.0  # a thousand new titles are embedded in some seconds, and not undone when nobody waits for them
PRODUCTS: TypeAdapter[RawProduct] = TypeAdapter(RawProduct)
PRODUCT_EXAMPLE: list[Any] = [
    {"product_id": "new-1", "title": "Women's linen wrap dress", "attributes": {"category": "dress"}, "price": 59000}
]


@router.get("/items/{product_id}", dependencies=[PUBLIC], responses=MISSING)
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


@router.put("/products", dependencies=[ADMIN], openapi_extra=rows_body(RawProduct, MAX_LIST, PRODUCT_EXAMPLE))
async def products(request: Request, service: ServiceDep) -> ProductsAnswer:
    """Add or replace one product or up to 1,000: read, embedded and searchable when this returns. One of which only the price, the
    stock or the arrival changed is not read again. Of many the bad ones are refused, the others stored."""
    store, recommender = service.parts()
    reader = service.reader
    assert reader is not None
    body = await request.body()

    def work() -> tuple[ProductsAnswer, int]:
        given = read_rows(body, PRODUCTS, MAX_LIST)
        # Releases that answer an experiment's shoppers must know of them too.
        put = recommender.put_products(given.rows, reader, service.answering_releases())
        store.quarantine.add_refused(given.rejected(given.refused, "PUT /products"))
        values = [_refused_value(given.places[place], value) for place, value in put.refused]
        return ProductsAnswer(stored=len(given.rows), refused=given.refused, refused_values=values), put.embedded

    try:
        answer, embedded = await service.run(work, PUT_SECONDS)
    except UserError as error:  # no schema yet, by which to read them
        raise unavailable(str(error)) from error
    for outcome, count in (("stored", answer.stored), ("refused", len(answer.refused)), ("embedded", embedded)):
        service.rows.labels("product", outcome).inc(count)
    return answer


def _refused_value(place: int, value: Rejected) -> RefusedBody:
    what, _, reason = value.reason.partition(": ")
    return RefusedBody(index=place, what=what, reason=f"{reason}: {value.raw}")


@router.delete("/products/{product_id}", dependencies=[ADMIN], responses=MISSING)
async def delete(product_id: ProductId, service: ServiceDep) -> DeletedAnswer:
    """Take a product out of every answer at once. What shoppers did with it stays known."""
    answer = await _delete([product_id], service)
    if answer.unknown:
        raise HTTPException(404, f"no product {product_id!r}")
    return answer


@router.post("/products/delete", dependencies=[ADMIN])
async def delete_many(body: ProductIdsBody, service: ServiceDep) -> DeletedAnswer:
    """Take up to 1,000 products out of every answer at once; those that are not there are named."""
    return await _delete(body.product_ids, service)


async def _delete(product_ids: list[str], service: Service) -> DeletedAnswer:
    _, recommender = service.parts()
    deleted = await service.run(lambda: recommender.delete_products(product_ids))
    service.rows.labels("product", "deleted").inc(len(deleted))
    return DeletedAnswer(
        deleted=len(deleted), unknown=[name for name in dict.fromkeys(product_ids) if name not in deleted]
    )
