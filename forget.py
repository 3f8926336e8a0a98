"""Let go of what a shop must not keep: events that are too old, or all that is known of one shopper.

    python forget.py retention          # events older than EVENT_RETENTION_DAYS, for cron
    python forget.py user USER          # the same as DELETE /users/USER
    python forget.py session SESSION    # the same as DELETE /sessions/SESSION

Events go in small transactions: nobody waits for long, and what a stopped run left goes with the next. Those that are sent or
imported again later are refused for their age.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

from catalog import oldest_event, session_key
from settings import Settings, UserError, run_script
from store import SessionTakenError, Store


class ForgetOptions(Settings):
    """Let go of events that are too old, or of all that is known of one shopper."""

    what: CliPositionalArg[Literal["retention", "user", "session"]] = Field(description="events by age, or one shopper")
    shopper: CliPositionalArg[str] = Field("", description="the id of the user or the session")


def apply_retention(store: Store, oldest: datetime) -> tuple[int, int]:
    """Remove events, and rows in quarantine, from before `oldest`; how many of each."""
    with tqdm(desc="forget", unit=" events", disable=None, leave=False) as progress:
        events = 0
        for removed in store.events.delete_before(oldest):
            events += removed
            progress.update(removed)
    return events, store.quarantine.delete_before(oldest)


def main(options: ForgetOptions) -> None:
    if options.what != "retention" and not options.shopper:
        raise UserError(f"whom? give the id: forget.py {options.what} {options.what.upper()}")
    if options.what == "retention" and not options.event_retention_days:
        raise UserError("events are kept for ever; set EVENT_RETENTION_DAYS, or give --event-retention-days")
    with Store.open(options) as store:
        if options.what != "retention":
            try:
                removed = store.users.forget(
                    options.shopper if options.what == "user" else session_key(options.shopper)
                )
            except SessionTakenError as error:
                raise UserError(
                    f"session {options.shopper!r} was merged into the user {error.owner!r}, and what it did is theirs: nothing was "
                    f"removed; forget.py user {error.owner} removes both"
                ) from error
            print("removed " + ", ".join(f"{count:,} of {table}" for table, count in removed.items()))
            return
        oldest = oldest_event(options.event_retention_days)
        events, quarantined = apply_retention(store, oldest)
    print(f"before {oldest:%Y-%m-%d %H:%M} UTC: {events:,} events and {quarantined:,} rows in quarantine removed")


if __name__ == "__main__":
    run_script(ForgetOptions, main)
