-- Business rules (rules.py). A version never changes once it is there.
CREATE TABLE rules (
    name text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    rules json NOT NULL,
    who text NOT NULL,
    note text NOT NULL,
    made_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (name, version)
);

-- Which version was made live when. The latest turn of a name counts; a rollback is a turn too.
CREATE TABLE rules_turns (
    turn bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    who text NOT NULL,
    note text NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (name, version) REFERENCES rules (name, version)
);
CREATE INDEX rules_turns_name ON rules_turns (name, turn);
