-- Filters by price and by arrival: without these a bound that keeps a thousand of a million products reads the million.
CREATE INDEX products_price ON products (price);
CREATE INDEX products_arrived ON products (arrived_at);
