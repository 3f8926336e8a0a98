-- When features last changed: a release that goes live again embeds anew what changed since it was indexed. Null: before this
-- column, or never.
ALTER TABLE products ADD COLUMN features_at timestamptz;
