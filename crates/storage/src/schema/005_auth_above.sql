-- State events by the events that they name in auth_events: the column `auth` of events, the other way round.
CREATE TABLE auth_above (
    auth_nid BIGINT NOT NULL,
    -- The largest event number of the row.
    newest BIGINT NOT NULL,
    -- Those of one commit: event number and state key number in turns, eight bytes each, little endian.
    above BYTEA NOT NULL,
    PRIMARY KEY (auth_nid, newest)
);
