-- Staged PDUs that could not be taken because nobody was reached who knows what they stand on: how often that was
-- tried, and when it is tried again.
ALTER TABLE staged_pdus ADD COLUMN attempts BIGINT NOT NULL DEFAULT 0;
ALTER TABLE staged_pdus ADD COLUMN not_before_ms BIGINT NOT NULL DEFAULT 0;
