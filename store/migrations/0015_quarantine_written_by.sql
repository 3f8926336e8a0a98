-- The transaction that a row came with: who looks through all of them for a shopper, which takes long, finds by it in a moment what
-- may have come meanwhile.
ALTER TABLE quarantine ADD COLUMN written_by xid8 NOT NULL DEFAULT pg_current_xact_id();
CREATE INDEX quarantine_written_by ON quarantine (written_by);
