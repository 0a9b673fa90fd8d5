-- Counters. See streams.rs and sequence.rs.
CREATE TABLE streams (kind TEXT PRIMARY KEY, position BIGINT NOT NULL);
CREATE TABLE sequences (name TEXT PRIMARY KEY, last BIGINT NOT NULL);
