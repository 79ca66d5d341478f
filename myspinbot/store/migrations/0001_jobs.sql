-- jobs, steps, events, approvals
-- Graphs are stored once and named by their hash.
CREATE TABLE graph (hash text PRIMARY KEY, body json NOT NULL);
CREATE TABLE job (
  id text PRIMARY KEY, pipeline text NOT NULL, graph text NOT NULL REFERENCES graph, params json NOT NULL,
  status text NOT NULL DEFAULT 'queued'
    CHECK (status IN ('queued', 'running', 'waiting', 'succeeded', 'failed', 'cancelled')),
  priority smallint NOT NULL DEFAULT 1, idempotency_key text UNIQUE, request text NOT NULL, parent text,
  fresh text[] NOT NULL DEFAULT '{}', outputs json NOT NULL DEFAULT '{}', error json,
  epoch bigint NOT NULL DEFAULT 0, owner text, lease_until timestamptz,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(), started_at timestamptz, ended_at timestamptz
) WITH (fillfactor = 80);
CREATE INDEX job_active ON job (priority, created_at, id) WHERE status IN ('queued', 'running', 'waiting');
CREATE INDEX job_recent ON job (created_at, id);
CREATE INDEX job_status ON job (status, created_at, id);
CREATE INDEX job_pipeline ON job (pipeline, created_at, id);
CREATE INDEX job_parent ON job (parent, created_at, id) WHERE parent IS NOT NULL;
CREATE INDEX job_graph ON job (graph);

-- What is running has few rows whatever the history holds: partial indexes. No lease is indexed, so a renewal stays in place.
CREATE TABLE step (
  job text NOT NULL REFERENCES job ON DELETE CASCADE, key text NOT NULL, n bigint GENERATED ALWAYS AS IDENTITY,
  node text NOT NULL, step text NOT NULL, version text NOT NULL, queue text NOT NULL, priority smallint NOT NULL,
  status text NOT NULL CHECK (status IN ('pending', 'queued', 'running', 'waiting', 'succeeded', 'failed', 'cancelled',
    'cached', 'skipped')),
  attempt integer NOT NULL DEFAULT 0, lost integer NOT NULL DEFAULT 0, worker text, lease_until timestamptz,
  input_hash text NOT NULL, source_hash text NOT NULL, inputs json NOT NULL, outputs json NOT NULL DEFAULT '{}',
  error json, notebook json, origin text, record json NOT NULL DEFAULT '{}', entry_id text, published_at timestamptz,
  weight double precision NOT NULL, retries integer NOT NULL, timeout_s double precision NOT NULL,
  queued_at timestamptz, started_at timestamptz, ended_at timestamptz,
  PRIMARY KEY (job, key)
) WITH (fillfactor = 80);
CREATE INDEX step_queued ON step (queued_at) WHERE status = 'queued';
CREATE INDEX step_running ON step (worker) WHERE status = 'running';
CREATE INDEX step_result ON step (input_hash, ended_at) WHERE status = 'succeeded' AND input_hash <> '';
CREATE TABLE approval (
  job text NOT NULL REFERENCES job ON DELETE CASCADE, key text NOT NULL, prompt text NOT NULL, show json,
  asked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  approved boolean, decided_by text, comment text, decided_at timestamptz,
  PRIMARY KEY (job, key)
);

-- Every change of a status, an epoch or an attempt writes its event in the same transaction, whichever statement made it.
CREATE TABLE event (
  seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, job text NOT NULL, kind text NOT NULL,
  key text NOT NULL DEFAULT '', body json NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp(),
  xid xid8 NOT NULL DEFAULT pg_current_xact_id()
);
CREATE INDEX event_job ON event (job, seq);
CREATE FUNCTION spin_job_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO event (job, kind, body) VALUES (NEW.id, 'job', json_strip_nulls(json_build_object(
    'status', NEW.status, 'owner', NEW.owner, 'epoch', nullif(NEW.epoch, 0), 'error', NEW.error ->> 'message')));
  RETURN NULL;
END $$;
CREATE TRIGGER job_insert AFTER INSERT ON job FOR EACH ROW EXECUTE FUNCTION spin_job_event();
CREATE TRIGGER job_update AFTER UPDATE ON job FOR EACH ROW
  WHEN (OLD.status <> NEW.status OR OLD.epoch <> NEW.epoch) EXECUTE FUNCTION spin_job_event();
CREATE FUNCTION spin_step_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO event (job, kind, key, body) VALUES (NEW.job, 'step', NEW.key, json_strip_nulls(json_build_object(
    'status', NEW.status, 'step', NEW.step, 'attempt', nullif(NEW.attempt, 0), 'lost', nullif(NEW.lost, 0),
    'worker', NEW.worker, 'origin', NEW.origin, 'error', NEW.error ->> 'message')));
  RETURN NULL;
END $$;
CREATE TRIGGER step_insert AFTER INSERT ON step FOR EACH ROW EXECUTE FUNCTION spin_step_event();
CREATE TRIGGER step_update AFTER UPDATE ON step FOR EACH ROW
  WHEN (OLD.status <> NEW.status OR OLD.attempt <> NEW.attempt) EXECUTE FUNCTION spin_step_event();
