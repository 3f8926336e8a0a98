-- Sessions that turned out to be a user's, by the name that they have in events ("session:" and their id): what arrives late
-- under that name is the user's too.
CREATE TABLE merged_sessions (
    session_id text COLLATE "C" PRIMARY KEY,
    user_id text COLLATE "C" NOT NULL,
    merged_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX merged_sessions_user ON merged_sessions (user_id);

-- The quarantine keeps the newest rows of what the API refused.
CREATE INDEX quarantine_source_at ON quarantine (source, at);
