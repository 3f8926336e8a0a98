-- Keys of the API. Of a key only its SHA-256 is kept: it is 256 random bits, which nobody finds by trying, so a slow hash would
-- cost each request and win nothing. A revoked key stays as a row: once there was a key, the service is never open again.
CREATE TABLE api_keys (
    key_id text COLLATE "C" PRIMARY KEY, -- the first hexadecimal digits of the digest: names a key, opens nothing
    digest bytea NOT NULL,
    kind text NOT NULL CHECK (kind IN ('admin', 'public')),
    note text NOT NULL,
    made_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);
