-- What was shown: one row a list, its places as arrays, best first. Written in batches, moments after the answer. Not partitioned:
-- what is older than the retention goes in small batches by `at`, and a row of 20 places takes about 750 bytes, and its index entries 160.
CREATE TABLE impressions (
    list_id text COLLATE "C" PRIMARY KEY,
    user_id text COLLATE "C", -- null: nobody said who asked
    kind text NOT NULL,
    context text NOT NULL,
    release text NOT NULL,
    rules text NOT NULL,
    rules_version integer,
    -- which arm of which experiment the list counts for; all three null if for none
    experiment text COLLATE "C",
    experiment_version integer,
    arm text,
    at timestamptz NOT NULL,
    product_ids text[] NOT NULL,
    scores real[] NOT NULL,
    retrieval_ranks integer[] NOT NULL
);
CREATE INDEX impressions_at ON impressions (at);
CREATE INDEX impressions_user_at ON impressions (user_id, at);
CREATE INDEX impressions_experiment ON impressions (experiment, experiment_version) WHERE experiment IS NOT NULL;

-- Which places of a list were really seen, where the shop's pages say so. A table of its own, since a page may report before the list
-- is written. It names nobody.
CREATE TABLE impression_views (
    list_id text COLLATE "C" PRIMARY KEY,
    positions smallint[] NOT NULL, -- from 1
    at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX impression_views_at ON impression_views (at);

-- The list that an event came from; empty where nobody said.
ALTER TABLE events ADD COLUMN list_id text COLLATE "C" NOT NULL DEFAULT '';
CREATE INDEX events_list ON events (list_id) WHERE list_id <> '';

-- A start is a new version; nothing is ever changed but the moment of the stop.
CREATE TABLE experiments (
    name text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    arms json NOT NULL,
    note text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    stopped_at timestamptz,
    PRIMARY KEY (name, version)
);
-- One at a time: a list has one release.
CREATE UNIQUE INDEX experiments_running ON experiments ((true)) WHERE stopped_at IS NULL;
