-- who took a lease, so that a claim may be repeated
ALTER TABLE job ADD COLUMN claim text;
ALTER TABLE step ADD COLUMN claim text;
