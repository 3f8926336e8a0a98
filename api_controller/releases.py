"""Releases: which there are, which is live, and the way forth and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query

import release as releases
from api_controller.access import ADMIN
from api_controller.refusals import CONFLICT, MISSING, unavailable
from api_controller.schemas import ReleaseAnswer, ReleaseName
from api_controller.service import Service, ServiceDep
from release import PARTS, Release
from settings import UserError

router = APIRouter(prefix="/releases", tags=["releases"], dependencies=[ADMIN])

Leaving = Annotated[
    str | None, Query(alias="from", description="the release that is live as far as you know; 409 when another one is")
]
NOT_HEARD = (
    "it may be done all the same: GET /releases says which release is live; with ?from= and the name of the one to leave, it can "
    "be asked for again without being done twice"
)


@router.get("")
async def every(service: ServiceDep) -> list[ReleaseAnswer]:
    """All releases, the oldest first."""
    models_dir = service.settings.models_dir
    return await service.run(lambda: [described(service, name) for name in Release.names(models_dir)])


@router.post("/{name}/live", responses=MISSING | CONFLICT)
async def promote(name: ReleaseName, service: ServiceDep, leaving: Leaving = None) -> ReleaseAnswer:
    """Make a release live. The next answer is its; nothing is restarted. Twice is the same as once."""
    store, recommender = service.parts()
    models_dir = service.settings.models_dir

    def work() -> ReleaseAnswer:
        if name not in Release.names(models_dir):
            raise HTTPException(404, f"no release {name!r}; GET /releases lists them")
        releases.promote(store, models_dir, name, text_encoder=recommender.text_encoder, expected=leaving)
        return described(service, name)

    return await moved(service, work)


@router.post("/rollback", responses=CONFLICT)
async def rollback(service: ServiceDep, leaving: Leaving = None) -> ReleaseAnswer:
    """Make live what was live before. Once more goes back one more, unless `from` names the release to leave: then twice is the
    same as once."""
    store, recommender = service.parts()
    models_dir = service.settings.models_dir

    def work() -> ReleaseAnswer:
        return described(service, releases.rollback(store, models_dir, recommender.text_encoder, leaving))

    return await moved(service, work)


async def moved(service: Service, work: Callable[[], ReleaseAnswer]) -> ReleaseAnswer:
    """Move the pointer; 409 when that cannot be, 503 when it is not known whether it was. Products that the release does
    not know yet, or not as they are now, are indexed behind the answer."""

    def work_to_the_end() -> ReleaseAnswer:
        answer = work()
        # Here, since a call that is answered by a 503 comes so far too.
        service.promotions.inc()
        service.catch_up()
        return answer

    try:
        return await service.run(work_to_the_end)
    except UserError as error:
        raise HTTPException(409, " ".join(str(error).split())) from error
    except HTTPException as error:
        if error.status_code != 503:
            raise
        raise unavailable(f"{error.detail}; {NOT_HEARD}") from error


def described(service: Service, name: str) -> ReleaseAnswer:
    models_dir = service.settings.models_dir
    manifest = Release.open(models_dir, name).manifest
    return ReleaseAnswer(
        name=name, created_at=manifest["created_at"], parts=[part for part in PARTS if part in manifest],
        metrics=releases.report_metrics(manifest), items=manifest.get("index", {}).get("items"),
        live=name == Release.current(models_dir),
    )  # fmt: skip
