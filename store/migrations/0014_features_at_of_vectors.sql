-- Of which features a vector was made: a release that goes live makes those anew whose product has others by now. Null: before this
-- column, or of a product whose features are older than products.features_at.
DO $$
DECLARE release text;
BEGIN
    FOR release IN
        SELECT tablename FROM pg_tables WHERE schemaname = current_schema() AND starts_with(tablename, 'item_vectors_')
    LOOP
        EXECUTE format('ALTER TABLE %I ADD COLUMN features_at timestamptz', release);
    END LOOP;
END $$;
