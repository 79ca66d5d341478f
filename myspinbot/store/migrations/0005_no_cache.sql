-- the nodes that must not come from the cache, under the name that they have everywhere
ALTER TABLE job RENAME COLUMN fresh TO no_cache;
