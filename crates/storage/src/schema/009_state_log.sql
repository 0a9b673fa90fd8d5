-- The state events of a room once more, with no more than answers about its state and auth chains need of them: number,
-- id, auth events. A row is what one commit stored, so that a room that came in bulk is read in a few.
CREATE TABLE state_log (
    room_nid BIGINT NOT NULL,
    -- The largest event number of the row.
    newest BIGINT NOT NULL,
    -- See state_log.rs.
    events BYTEA NOT NULL,
    PRIMARY KEY (room_nid, newest)
);
-- Events that go to more servers than a commit should write rows for. Whoever comes to it next moves them to `outbox`.
CREATE TABLE fan_outs (
    -- The number that the first of the servers has in the outbox; those after it follow.
    number BIGINT PRIMARY KEY,
    event_nid BIGINT NOT NULL,
    -- Names, each with a space behind it.
    servers TEXT NOT NULL
);
