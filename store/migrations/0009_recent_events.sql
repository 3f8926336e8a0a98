-- What is trending reads the latest events, how soon things are bought again the latest purchases (list_kinds.py).
CREATE INDEX events_at ON events (at);
CREATE INDEX events_purchase_at ON events (at) WHERE kind = 'purchase';
