-- Ids sort by code point (COLLATE "C"), as Python sorts them, whatever the locale of the server.

CREATE TABLE products (
    product_id text COLLATE "C" PRIMARY KEY,
    title text NOT NULL,
    description text NOT NULL,
    attributes jsonb NOT NULL,
    price double precision,
    in_stock boolean NOT NULL,
    group_id text,
    arrived_at timestamptz,
    -- structured features; all three are null until the product has been read
    std jsonb,
    re jsonb,
    features_origin text
);
CREATE INDEX products_std ON products USING gin (std jsonb_path_ops);

-- `json`, not `jsonb`: the order of fields and values decides vocabulary ids.
CREATE TABLE feature_schema (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    schema json NOT NULL
);

CREATE TABLE users (
    user_id text COLLATE "C" PRIMARY KEY,
    profile jsonb NOT NULL
);

-- No foreign key: a deleted product leaves what shoppers did with it.
CREATE TABLE events (
    event_id text COLLATE "C" PRIMARY KEY,
    user_id text COLLATE "C" NOT NULL,
    product_id text COLLATE "C" NOT NULL,
    kind text NOT NULL,
    at timestamptz NOT NULL,
    context text NOT NULL
);
CREATE INDEX events_user_at ON events (user_id, at);

CREATE TABLE quarantine (
    digest text PRIMARY KEY, -- of the other columns but `at`: the same bad row sent twice is kept once
    source text NOT NULL,
    file text NOT NULL,
    line bigint NOT NULL,
    reason text NOT NULL,
    raw text NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX quarantine_source ON quarantine (source, file, line);

-- `json`: a model's answer may hold escapes (\u0000) that `jsonb` refuses.
CREATE TABLE cache (
    kind text NOT NULL,
    key text NOT NULL,
    value json NOT NULL,
    PRIMARY KEY (kind, key)
);

CREATE TABLE releases (
    name text COLLATE "C" PRIMARY KEY,
    manifest json NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now()
);

-- RE words that came after a release was trained, with the ids that its models know them by.
CREATE TABLE release_words (
    release text COLLATE "C" NOT NULL,
    field text NOT NULL,
    value text NOT NULL,
    id integer NOT NULL,
    PRIMARY KEY (release, field, value),
    UNIQUE (release, id)
);
