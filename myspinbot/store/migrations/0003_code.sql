-- what steps were made of, and what runs learned
CREATE TABLE code (hash text PRIMARY KEY, body json NOT NULL);
CREATE TABLE learned (source text PRIMARY KEY, body json NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp());
ALTER TABLE step ADD COLUMN code text NOT NULL DEFAULT '';
CREATE INDEX step_last ON step (step, queued_at) WHERE status = 'succeeded';
