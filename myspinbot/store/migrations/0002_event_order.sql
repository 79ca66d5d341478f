-- the events of a job are numbered in the order of their commits
-- The trigger takes the job's lock before the number: numbers of one job become visible in their order.
CREATE OR REPLACE FUNCTION spin_job_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended(NEW.id, 0));
  INSERT INTO event (job, kind, body) VALUES (NEW.id, 'job', json_strip_nulls(json_build_object(
    'status', NEW.status, 'owner', NEW.owner, 'epoch', nullif(NEW.epoch, 0), 'error', NEW.error ->> 'message')));
  RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION spin_step_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended(NEW.job, 0));
  INSERT INTO event (job, kind, key, body) VALUES (NEW.job, 'step', NEW.key, json_strip_nulls(json_build_object(
    'status', NEW.status, 'step', NEW.step, 'attempt', nullif(NEW.attempt, 0), 'lost', nullif(NEW.lost, 0),
    'worker', NEW.worker, 'origin', NEW.origin, 'error', NEW.error ->> 'message')));
  RETURN NULL;
END $$;
ALTER TABLE event DROP COLUMN xid;
