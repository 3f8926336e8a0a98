"""PostgreSQL: start or connect, migrations, products, events, users, vectors, releases. All SQL is here."""

from catalog import Rejected
from store.aliases import Alias, Applied
from store.database import Store
from store.events import EventLog, Purchases, PutEvents
from store.impressions import Impression, ShownList
from store.keys import ApiKey
from store.products import Commerce, Standing, StoredProduct
from store.quarantine import QuarantinedRow
from store.releases import RecordedRelease
from store.rules import RulesTurn, RulesVersion, UnreadableRulesError
from store.sessions import SessionTakenError
from store.tombstones import LONGEST_WAIT
from store.users import UserState, UserSummary
from store.vectors import Filters, Found, Hide, History, ItemRows, Links

__all__ = [
    "LONGEST_WAIT",
    "Alias",
    "ApiKey",
    "Applied",
    "Commerce",
    "EventLog",
    "Filters",
    "Found",
    "Hide",
    "History",
    "Impression",
    "ItemRows",
    "Links",
    "Purchases",
    "PutEvents",
    "QuarantinedRow",
    "RecordedRelease",
    "Rejected",
    "RulesTurn",
    "RulesVersion",
    "SessionTakenError",
    "ShownList",
    "Standing",
    "Store",
    "StoredProduct",
    "UnreadableRulesError",
    "UserState",
    "UserSummary",
]
