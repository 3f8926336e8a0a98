-- With the id in them, bounds on price and arrival are answered by these alone: of a million products ten thousand need not be looked up
-- for their ids.
DROP INDEX products_price;
DROP INDEX products_arrived;
CREATE INDEX products_price ON products (price) INCLUDE (product_id) WHERE std IS NOT NULL;
CREATE INDEX products_arrived ON products (arrived_at) INCLUDE (product_id) WHERE std IS NOT NULL;
