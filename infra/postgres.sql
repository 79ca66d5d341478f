-- The database of MySpinBot and its owner, who is not a superuser. The image runs this as postgres, once, on a new volume.
\set ON_ERROR_STOP on
\set password `cat "${SPIN_POSTGRES_PASSWORD_FILE:-/run/secrets/postgres_password}"`
SELECT length(:'password') = 0 AS empty \gset
\if :empty
DO $$ BEGIN RAISE 'The password of the role spin is empty: run infra/make-secrets.sh.'; END $$;
\endif
SET log_min_error_statement = panic;  -- a statement that fails is not logged: it may hold the password
CREATE ROLE spin LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'password';
CREATE DATABASE spin OWNER spin ENCODING 'UTF8' TEMPLATE template0;
REVOKE ALL ON DATABASE spin, postgres, template1 FROM PUBLIC;
\connect spin
REVOKE ALL ON SCHEMA public FROM PUBLIC;
CREATE EXTENSION vector;
