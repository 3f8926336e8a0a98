"""Experiments: start, stop, list, report; and which arm a request gets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated
from uuid import uuid4

from fastapi import APIRouter, HTTPException, Query

import recommender as pipeline
from api_controller.access import ADMIN
from api_controller.refusals import CONFLICT, MISSING, invalid
from api_controller.schemas import (
    AnsweredByBody,
    ArmReport,
    DifferenceBody,
    ExperimentBody,
    ExperimentName,
    RateBody,
    RecommendBody,
    ReportAnswer,
    SampleRatioBody,
    StartedExperiment,
)
from api_controller.service import Service, ServiceDep
from experiments import Arm, Experiment, Rate, differences, figures, fraction, mixed, sample_ratio
from loaded_release import MAX_RELEASES
from rules import DEFAULT
from settings import UserError
from store import Impression
from store.experiments import REPORT_SECONDS

router = APIRouter(tags=["experiments"], dependencies=[ADMIN])

FEW_SHOPPERS = 100  # of an arm; with fewer, 95 % intervals by the normal distribution promise too much


# ------------------------------------------------------------------------------------------------------- of a request
@dataclass(frozen=True)
class Assignment:
    """How a request is answered, and for what its list counts."""

    experiment: Experiment | None = None
    arm: Arm | None = None

    @property
    def release(self) -> str | None:
        return None if self.arm is None else self.arm.release

    @property
    def rules(self) -> str | None:
        return None if self.arm is None else self.arm.rules


def assign(service: Service, shopper: str | None, body: RecommendBody) -> Assignment:
    """The arm of a shopper in the experiment that runs. Who says by what rules to be answered is in no arm that says otherwise, and
    rules that are only tried are in none. Asks the database now and then: call it in the pool."""
    experiment = service.running_experiment()
    if experiment is None or body.rules is not None:
        return Assignment()
    arm = experiment.arm_of(shopper)
    asked = "rule_set" in body.model_fields_set
    return Assignment() if asked and arm.rules not in (None, body.rule_set) else Assignment(experiment, arm)


def log_list(
    service: Service,
    shopper: str | None,
    assignment: Assignment,
    body: RecommendBody,
    answer: pipeline.Answer,
) -> tuple[str, Arm | None]:
    """Note a list that is about to be shown: its id, and the arm that it counts for, if it counts for one.

    A list that counts is by an arm's own release and rules and for somebody known. Neither lists of popular items given while the
    database is away nor lists by rules that are only tried are logged.
    """
    list_id = uuid4().hex
    experiment, arm = assignment.experiment, assignment.arm
    rules = answer.rules
    if shopper is None:
        experiment = arm = None
    if experiment is not None and arm is not None:
        by_rules = arm.rules in (None, DEFAULT if rules is None else rules.name) and not (rules and rules.problem)
        own = not answer.degraded and by_rules and arm.release in (None, answer.release)
        (service.exposures if own else service.missed).labels(experiment.name, arm.name).inc()
        if not own:
            experiment = arm = None
    # By shopper: somebody half of whose lists are known would look as if they took less.
    share = fraction("impressions", list_id if shopper is None else shopper)
    shown = not answer.degraded and body.rules is None
    if shown and service.impressions is not None and share < service.settings.impression_share:
        service.impressions.add(
            Impression(
                list_id=list_id, user_id=shopper, kind=answer.kind, context=body.context, release=answer.release,
                rules=rules.name if rules else DEFAULT, rules_version=rules.version if rules else None,
                experiment=experiment.name if experiment else None,
                experiment_version=experiment.version if experiment else None, arm=arm.name if arm else None,
                at=datetime.now(UTC), product_ids=[item.product_id for item in answer.items],
                scores=[item.score for item in answer.items],
                retrieval_ranks=[item.retrieval_rank for item in answer.items],
            )
        )  # fmt: skip
    return list_id, arm


# ------------------------------------------------------------------------------------------------------------- routes
@router.put("/experiments/{name}", responses=CONFLICT)
async def start(name: ExperimentName, body: ExperimentBody, service: ServiceDep) -> StartedExperiment:
    """Start an experiment, as a new version. The same again while it runs changes nothing; other arms stop it and start the
    next version. One experiment runs at a time."""
    store, recommender = service.parts()
    if service.settings.impression_share == 0:
        raise HTTPException(
            409, "IMPRESSION_SHARE is 0: without a log of what is shown, an experiment cannot be judged"
        )
    releases = {arm.release for arm in body.arms if arm.release is not None}
    if len(releases) > MAX_RELEASES:
        raise invalid((["body", "arms"], f"{len(releases)} releases; at most {MAX_RELEASES} answer side by side"))

    def work() -> Experiment | None:
        for number, arm in enumerate(body.arms):
            rules = recommender.rules(arm.rules or DEFAULT)
            if rules is None and arm.rules not in (None, DEFAULT):
                raise invalid((["body", "arms", number, "rules"], f"no rules of the name {arm.rules!r} are live"))
            if rules is not None and rules.problem:
                raise invalid(
                    (["body", "arms", number, "rules"], f"the rules {rules.name!r} cannot be read: {rules.problem}")
                )
            try:
                if arm.release is not None:
                    recommender.releases.check(arm.release)
            except UserError as error:
                raise invalid((["body", "arms", number, "release"], str(error))) from error
        started = store.experiments.start(name, body.arms, body.note)
        if started is not None:
            service.catch_up()  # what came or changed since its releases were indexed went into the live one alone
        return started

    started = await service.run(work)
    if started is None:
        raise HTTPException(409, "another experiment runs; stop it first (GET /experiments lists them)")
    return StartedExperiment(**vars(started))


@router.post("/experiments/{name}/stop", responses=MISSING)
async def stop(name: ExperimentName, service: ServiceDep) -> StartedExperiment:
    """Stop an experiment: from now on everybody is answered by the live release. Stopped already, it stays as it is."""
    store, _ = service.parts()
    stopped = await service.run(lambda: store.experiments.stop(name))
    if stopped is None:
        raise _unknown(name)
    return StartedExperiment(**vars(stopped))


@router.get("/experiments")
async def experiments(service: ServiceDep) -> list[StartedExperiment]:
    """Every version of every experiment, the newest first."""
    store, _ = service.parts()
    return [StartedExperiment(**vars(one)) for one in await service.run(store.experiments.read)]


@router.get("/experiments/{name}/report", responses=MISSING)
async def report(
    name: ExperimentName, service: ServiceDep, version: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None
) -> ReportAnswer:
    """What the shoppers of each arm did, how the arms differ, and whether the split is sound. The newest version, or one by
    number."""
    store, _ = service.parts()
    runs = await service.run(lambda: store.experiments.read(name))
    chosen = [run for run in runs if version in (None, run.version)]
    if not chosen:
        raise _unknown(name if version is None else f"{name} version {version}")
    experiment = chosen[0]
    tallies, answered = await service.run(
        lambda: (
            store.experiments.tallies(name, experiment.version),
            store.experiments.answered_by(name, experiment.version),
        ),
        REPORT_SECONDS,
        service.reports,
    )
    found = [figures(arm.name, tallies) for arm in experiment.arms]
    ratio = sample_ratio(experiment.arms, found)
    warnings = []
    if ratio.broken:
        warnings.append(
            f"the arms did not get their shares of shoppers (p = {ratio.p:.2g}): something loses shoppers of one arm, and no"
            " figure here is to be trusted until it is found"
        )
    if few := [arm.arm for arm in found if arm.shoppers < FEW_SHOPPERS]:
        warnings.append(f"fewer than {FEW_SHOPPERS} shoppers in {', '.join(few)}: the intervals are too narrow")
    warnings += [said for arm in experiment.arms for said in mixed(arm.name, answered)]
    return ReportAnswer(
        **vars(experiment),
        report=[
            ArmReport(
                arm=one.arm, shoppers=one.shoppers, lists=one.lists, per_shopper=_rates(one.per_shopper),
                per_list=_rates(one.per_list),
                answered_by=[AnsweredByBody(**vars(by)) for by in answered if by.arm == one.arm],
            )
            for one in found
        ],
        differences=[DifferenceBody(**vars(one)) for one in differences(found)],
        sample_ratio=SampleRatioBody(**vars(ratio)),
        warnings=warnings,
    )  # fmt: skip


def _rates(rates: dict[str, Rate]) -> dict[str, RateBody | None]:
    return {outcome: None if math.isnan(rate.value) else RateBody(**_interval(rate)) for outcome, rate in rates.items()}


def _interval(rate: Rate) -> dict[str, float | None]:
    low, high = rate.interval()
    return {"value": rate.value, "low": low, "high": high}


def _unknown(name: str) -> HTTPException:
    return HTTPException(404, f"no experiment {name!r}")
