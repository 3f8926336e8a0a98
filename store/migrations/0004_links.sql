-- Links from item to item (item_links.py). Vectors written before have none.
CREATE INDEX products_group ON products (group_id) WHERE group_id IS NOT NULL;

DO $$
DECLARE
    vectors text;
BEGIN
    FOR vectors IN
        SELECT tablename FROM pg_tables WHERE schemaname = current_schema() AND starts_with(tablename, 'item_vectors_')
    LOOP
        EXECUTE format(
            'ALTER TABLE %I ADD COLUMN linked text[] NOT NULL DEFAULT ''{}'','
            ' ADD COLUMN link_strength float4[] NOT NULL DEFAULT ''{}''', vectors
        );
    END LOOP;
END
$$;
