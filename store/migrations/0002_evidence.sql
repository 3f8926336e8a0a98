-- Who said each feature value: {field: [{value, source, confidence, words}]}. Null where the features came with an import.
ALTER TABLE products ADD COLUMN features_evidence jsonb;
