"""A client of the service.

    from datetime import UTC, datetime
    from api_controller.schemas import RecommendBody
    from catalog import Event
    from client import StyleTower

    with StyleTower("http://127.0.0.1:8000", key="styletower_admin_...") as shop:
        answer = shop.recommend(RecommendBody(context="beach vacation", profile={"height_cm": 165}, k=5))
        for item in answer.items:
            print(item.rank, item.title, item.reasons)
        shop.add_events([Event(user_id="shopper-1", product_id=item.product_id, kind="click", at=datetime.now(UTC))])

Bodies and answers are the service's own types. A call that may be repeated without harm is, when the connection broke or the
service was busy (503, 429), after the time that it asks for; all may but `put_rules`. Whatever else it refuses is a
`StyleTowerError` with its own words.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter

import shopper_token
from api_controller.schemas import (
    DeletedAnswer,
    EventsAnswer,
    ExperimentBody,
    ForgottenAnswer,
    Health,
    MergeBody,
    MergedAnswer,
    NeighbourBody,
    ProductAnswer,
    ProductIdsBody,
    ProductsAnswer,
    ProfileBody,
    RecommendAnswer,
    RecommendBody,
    ReleaseAnswer,
    ReportAnswer,
    RulesAnswer,
    RulesBody,
    RulesCheckAnswer,
    RulesCheckBody,
    RulesListAnswer,
    RulesLiveBody,
    RulesVersionBody,
    StartedExperiment,
    UserAnswer,
    ViewBody,
    ViewsAnswer,
)
from catalog import Event, Profile, RawProduct, User
from rules import DEFAULT, RuleSet

Result = TypeVar("Result")

TRIES = 4
FIRST_WAIT = 0.5  # seconds before a second try, when the service names none; doubled for each further one
MOST_WAIT = 30.0  # seconds; who asks for more patience gets an error instead
BUSY = (429, 503)


class StyleTowerError(Exception):
    """The service refused: `status` and its own words, or nobody answered: status 0."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"{status}: {words}" if status else words)
        self.status, self.words = status, words


def sign_shopper(secret: str, user_id: str, expires: datetime) -> str:
    """What the shop's backend gives a page of a shopper who has logged in, to send as X-Shopper-Token:
    `sign_shopper(SHOPPER_SECRET, "shopper-1", datetime.now(UTC) + timedelta(hours=1))`.

    Raises ValueError for a time without a zone: read as another zone's, the token would live hours too long or too short.
    """
    if expires.tzinfo is None:
        raise ValueError("expires has no time zone; give it one, as in datetime.now(UTC) + timedelta(hours=1)")
    return shopper_token.sign(secret, user_id, int(expires.timestamp()))


class StyleTower:
    """The service at `url`, asked with `key` (none as long as the service has no keys) and, with a public key, `token` of the one
    shopper for whom it asks. Safe to share between threads."""

    def __init__(self, url: str, key: str = "", timeout: float = 10.0, tries: int = TRIES, token: str = "") -> None:
        self.tries = tries
        given = {"X-API-Key": key, "X-Shopper-Token": token}
        headers = {name: value for name, value in given.items() if value}
        self._http = httpx.Client(base_url=url, timeout=timeout, headers=headers)

    def __enter__(self) -> StyleTower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # ------------------------------------------------------------------------------------------------------------- lists
    def recommend(self, body: RecommendBody) -> RecommendAnswer:
        """A ranked list: `shop.recommend(RecommendBody(user_id="shopper-1", k=5)).items[0].product_id`."""
        return self._call("POST", "/recommend", RecommendAnswer, body)

    def similar(self, product_id: str, k: int = 20) -> list[NeighbourBody]:
        """The items most like one: `shop.similar("product-17", k=5)`."""
        return self._call("GET", f"/items/{_part(product_id)}/similar", list[NeighbourBody], params={"k": k})

    # ---------------------------------------------------------------------------------------------------- goods, shoppers
    def item(self, product_id: str) -> ProductAnswer:
        """A product and its features: `shop.item("product-17").std["category"]`."""
        return self._call("GET", f"/items/{_part(product_id)}", ProductAnswer)

    def put_products(self, products: Sequence[RawProduct]) -> ProductsAnswer:
        """Add or replace products: `shop.put_products([RawProduct(product_id="new-1", title="Linen wrap dress", price=59000)])`."""
        return self._call("PUT", "/products", ProductsAnswer, products)

    def delete_products(self, product_ids: Sequence[str]) -> DeletedAnswer:
        """Take products out of every answer: `shop.delete_products(["new-1"]).unknown` were not there."""
        return self._call("POST", "/products/delete", DeletedAnswer, ProductIdsBody(product_ids=list(product_ids)))

    def add_events(self, events: Sequence[Event]) -> EventsAnswer:
        """What shoppers did; bad ones are in the answer's `refused`. Each event has an id from the moment it is made, so one that
        is sent twice counts once:
        `shop.add_events([Event(user_id="shopper-1", product_id="product-17", kind="cart", at=datetime.now(UTC))])`."""
        return self._call("POST", "/events", EventsAnswer, events)

    def add_views(self, views: Sequence[ViewBody]) -> ViewsAnswer:
        """Which places of a list were seen: `shop.add_views([ViewBody(list_id=answer.list_id, positions=[1, 2, 3])])`."""
        return self._call("POST", "/impressions", ViewsAnswer, views)

    def put_user(self, user_id: str, profile: Profile) -> User:
        """Set a shopper's profile: `shop.put_user("shopper-1", {"height_cm": 172, "weight_kg": 64})`."""
        return self._call("PUT", f"/users/{_part(user_id)}", User, ProfileBody(profile=profile))

    def user(self, user_id: str) -> UserAnswer:
        """What is known of a shopper: `shop.user("shopper-1").events["purchase"]`."""
        return self._call("GET", f"/users/{_part(user_id)}", UserAnswer)

    def merge_session(self, user_id: str, session_id: str) -> MergedAnswer:
        """At login, what the session did is the user's: `shop.merge_session("shopper-1", "browser-8f2c")`."""
        return self._call("POST", f"/users/{_part(user_id)}/merge", MergedAnswer, MergeBody(session_id=session_id))

    def forget_user(self, user_id: str) -> ForgottenAnswer:
        """Remove every trace of a shopper: `shop.forget_user("shopper-1").removed`."""
        return self._call("DELETE", f"/users/{_part(user_id)}", ForgottenAnswer)

    def forget_session(self, session_id: str) -> ForgottenAnswer:
        """Remove every trace of a session that nobody logged in from: `shop.forget_session("browser-8f2c").removed`."""
        return self._call("DELETE", f"/sessions/{_part(session_id)}", ForgottenAnswer)

    # ------------------------------------------------------------------------------------------------------------- rules
    def rules(self, name: str | None = None) -> RulesListAnswer:
        """What rules there are, of one name or of all, and which were live when."""
        return self._call("GET", "/rules", RulesListAnswer, params=None if name is None else {"name": name})

    def rules_version(self, version: int, name: str = DEFAULT) -> RulesAnswer:
        """One version, with its rules: `shop.rules_version(3).rules`."""
        return self._call("GET", f"/rules/{version}", RulesAnswer, params={"name": name})

    def check_rules(self, rules: RuleSet) -> RulesCheckAnswer:
        """Whether rules would be taken: `shop.check_rules(RuleSet([{"kind": "at_most", "n": 2, "std": "category"}]))`."""
        return self._call("POST", "/rules/check", RulesCheckAnswer, RulesCheckBody(rules=rules))

    def put_rules(self, body: RulesBody) -> RulesAnswer:
        """A new version, live at once unless `live=False`. Never repeated by itself: twice would be two versions."""
        return self._call("PUT", "/rules", RulesAnswer, body, repeatable=False)

    def make_rules_live(self, version: int, body: RulesLiveBody) -> RulesVersionBody:
        """Make any version live, an earlier one too: `shop.make_rules_live(2, RulesLiveBody(note="back"))`."""
        return self._call("POST", f"/rules/{version}/live", RulesVersionBody, body)

    # ------------------------------------------------------------------------------------------------------- experiments
    def experiments(self) -> list[StartedExperiment]:
        """Every version of every experiment, the newest first."""
        return self._call("GET", "/experiments", list[StartedExperiment])

    def start_experiment(self, name: str, body: ExperimentBody) -> StartedExperiment:
        """Two releases, or rule sets, side by side:
        `shop.start_experiment("new", ExperimentBody(arms=[Arm(name="old", share=0.5), Arm(name="new", share=0.5, release=...)]))`.
        """
        return self._call("PUT", f"/experiments/{_part(name)}", StartedExperiment, body)

    def stop_experiment(self, name: str) -> StartedExperiment:
        """From now on the live release answers everybody."""
        return self._call("POST", f"/experiments/{_part(name)}/stop", StartedExperiment)

    def report(self, name: str, version: int | None = None) -> ReportAnswer:
        """What the shoppers of each arm did, and whether the arms differ: `shop.report("new").differences`."""
        params = None if version is None else {"version": version}
        return self._call("GET", f"/experiments/{_part(name)}/report", ReportAnswer, params=params)

    # ---------------------------------------------------------------------------------------------------------- releases
    def releases(self) -> list[ReleaseAnswer]:
        """All releases, the oldest first: `[release.name for release in shop.releases() if release.live]`."""
        return self._call("GET", "/releases", list[ReleaseAnswer])

    def promote(self, name: str, leaving: str | None = None) -> ReleaseAnswer:
        """Make a release live, in place of `leaving` if that is given and nothing else is live:
        `shop.promote("20260101-120000")`."""
        params = None if leaving is None else {"from": leaving}
        return self._call("POST", f"/releases/{_part(name)}/live", ReleaseAnswer, params=params)

    def rollback(self, leaving: str | None = None) -> ReleaseAnswer:
        """Make live what was live before `leaving`, or before what is live now. It says which release it leaves, so that a call
        that is repeated goes back once."""
        if leaving is None:
            leaving = next((release.name for release in self.releases() if release.live), None)
        params = None if leaving is None else {"from": leaving}
        return self._call("POST", "/releases/rollback", ReleaseAnswer, params=params, repeatable=leaving is not None)

    # ------------------------------------------------------------------------------------------------------------- state
    def health(self) -> Health:
        """It lives."""
        return self._call("GET", "/health", Health)

    def ready(self) -> Health:
        """It can answer; a StyleTowerError with the reason when not."""
        return self._call("GET", "/ready", Health)

    def metrics(self) -> str:
        """Prometheus' text."""
        return self._send("GET", "/metrics").text

    # --------------------------------------------------------------------------------------------------------------- HTTP
    def _call(
        self,
        method: str,
        path: str,
        answer: type[Result],
        body: BaseModel | Sequence[BaseModel] | None = None,
        params: dict[str, Any] | None = None,
        repeatable: bool = True,
    ) -> Result:
        """Ask, and read the answer as the type `answer`. Every route is one line by this."""
        content = b"" if body is None else _json(body)
        sent = self._send(method, path, content, params, repeatable)
        return TypeAdapter(answer).validate_json(sent.content)

    def _send(
        self,
        method: str,
        path: str,
        content: bytes = b"",
        params: dict[str, Any] | None = None,
        repeatable: bool = True,
    ) -> httpx.Response:
        """The answer if it is a success. Raises StyleTowerError otherwise."""
        headers = {"Content-Type": "application/json"} if content else {}
        for again in range(self.tries if repeatable else 1)[::-1]:
            wait = FIRST_WAIT * 2 ** (self.tries - 1 - again)
            try:
                answer = self._http.request(method, path, content=content or None, params=params, headers=headers)
            except httpx.TransportError as error:
                if not again:
                    reason = str(error) or type(error).__name__
                    raise StyleTowerError(0, f"no answer from {self._http.base_url}: {reason}") from error
            else:
                if answer.is_success:
                    return answer
                if asked := answer.headers.get("retry-after", ""):
                    wait = float(asked) if asked.isdigit() else MOST_WAIT + 1
                if not again or answer.status_code not in BUSY or not asked or wait > MOST_WAIT:
                    raise StyleTowerError(answer.status_code, _words(answer))
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def _part(name: str) -> str:
    """An id as one part of a path, whatever is in it."""
    return quote(name, safe="")


def _json(body: BaseModel | Sequence[BaseModel]) -> bytes:
    """Only what was set: a service of another version may not know the rest."""
    if isinstance(body, BaseModel):
        return body.model_dump_json(exclude_unset=True).encode()
    return b"[" + b",".join(_json(row) for row in body) + b"]"


def _words(answer: httpx.Response) -> str:
    """What the service said: `detail` of its errors, field by field if there are several; `reason` of /ready."""
    try:
        said = answer.json()
    except ValueError:
        return answer.text or answer.reason_phrase
    detail = said.get("detail", said.get("reason")) if isinstance(said, dict) else said
    if isinstance(detail, list):
        return "; ".join(f"{'.'.join(map(str, one.get('loc', [])))}: {one.get('msg', one)}" for one in detail)
    return str(detail if detail is not None else said)
