-- What values of open fields are read as from the next training on (vocab_report.py). Products are never rewritten. Of one
-- value the newest application counts; undoing it brings back the one before.
CREATE TABLE vocabulary_aliases (
    application integer NOT NULL,
    field text COLLATE "C" NOT NULL,
    value text COLLATE "C" NOT NULL,
    becomes text[] NOT NULL,
    kind text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (application, field, value)
);
