-- Who was forgotten a short while ago (store/tombstones.py): what was shown to them and still waits in some worker's memory must not be
-- written afterwards. A digest stands for the id, since forgetting means forgetting.
CREATE TABLE tombstones (
    digest bytea PRIMARY KEY, -- SHA-256 of the id; of a session, of its name in events
    forgotten_at timestamptz NOT NULL
);

-- Merged sessions go by age (store/sessions.py).
CREATE INDEX merged_sessions_at ON merged_sessions (merged_at);
