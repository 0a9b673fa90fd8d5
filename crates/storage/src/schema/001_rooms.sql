-- Rooms, events, state, membership, federation queues. Numbers (nid) stand for names inside the house.

-- Counters. See streams.rs and sequence.rs.
CREATE TABLE streams (kind TEXT PRIMARY KEY, position BIGINT NOT NULL);
CREATE TABLE sequences (name TEXT PRIMARY KEY, last BIGINT NOT NULL);

CREATE TABLE rooms (
    nid BIGINT PRIMARY KEY,
    room_id TEXT NOT NULL UNIQUE,
    version TEXT NOT NULL,
    -- 0: the room has a number, but it was never joined.
    revision BIGINT NOT NULL,
    -- The top node of the current state, 0 for the empty state.
    state_root BIGINT NOT NULL,
    -- The number that the next new state key gets.
    next_key BIGINT NOT NULL,
    -- The smallest depth in the timeline, NULL while that is empty.
    min_depth BIGINT
);

-- The numbers of (type, state_key), dense within a room.
CREATE TABLE state_keys (
    room_nid BIGINT NOT NULL,
    key_nid BIGINT NOT NULL,
    kind TEXT NOT NULL,
    state_key TEXT NOT NULL,
    PRIMARY KEY (room_nid, key_nid)
);
CREATE UNIQUE INDEX state_keys_by_name ON state_keys (room_nid, kind, state_key);

-- An event can have a number before (or without ever) being stored.
CREATE TABLE event_ids (nid BIGINT PRIMARY KEY, event_id TEXT NOT NULL UNIQUE);

CREATE TABLE events (
    nid BIGINT PRIMARY KEY,
    room_nid BIGINT NOT NULL,
    -- NULL: no state event.
    key_nid BIGINT,
    -- 0 outlier, 1 timeline, 2 backfilled.
    place BIGINT NOT NULL,
    -- 0 accepted, 1 rejected, 2 soft-failed.
    verdict BIGINT NOT NULL,
    -- 0 full, 1 partial, 2 given up: judged on partial state that never became full.
    partial BIGINT NOT NULL,
    -- Position in the events stream, below 0 for backfilled events, NULL for outliers.
    position BIGINT,
    depth BIGINT NOT NULL,
    origin_ts BIGINT NOT NULL,
    -- Top nodes of the state before and after, 0 for the empty state, NULL for outliers.
    before_root BIGINT,
    after_root BIGINT,
    -- The numbers of prev_events (NULL for outliers) and auth_events, eight bytes each, little endian.
    prevs BYTEA,
    auth BYTEA NOT NULL,
    -- Whether the content hash was wrong, so that what is stored is the redacted form.
    redacted BIGINT NOT NULL,
    kind TEXT NOT NULL,
    state_key TEXT,
    sender TEXT NOT NULL,
    -- Why it was rejected or soft-failed.
    reason TEXT,
    json TEXT NOT NULL
);
CREATE INDEX events_of_room ON events (room_nid, position) WHERE place > 0;
CREATE INDEX events_by_depth ON events (room_nid, depth, position) WHERE place > 0;
CREATE INDEX events_by_position ON events (position) WHERE place = 1;
CREATE INDEX events_partial ON events (room_nid, position) WHERE partial = 1;
CREATE INDEX events_by_time ON events (room_nid, origin_ts) WHERE place > 0;

-- prev_events and auth_events of events that have a place, the other way round.
CREATE TABLE event_children (
    prev_nid BIGINT NOT NULL,
    event_nid BIGINT NOT NULL,
    PRIMARY KEY (prev_nid, event_nid)
);
CREATE TABLE auth_dependents (
    auth_nid BIGINT NOT NULL,
    event_nid BIGINT NOT NULL,
    PRIMARY KEY (auth_nid, event_nid)
);

-- Nodes of StateMaps. Never changed, shared by all states that contain them.
CREATE TABLE state_nodes (nid BIGINT PRIMARY KEY, node BYTEA NOT NULL);

-- The current state of a room from a stream position on.
CREATE TABLE room_states (
    room_nid BIGINT NOT NULL,
    position BIGINT NOT NULL,
    root BIGINT NOT NULL,
    PRIMARY KEY (room_nid, position)
);

CREATE TABLE forward_extremities (
    room_nid BIGINT NOT NULL,
    event_nid BIGINT NOT NULL,
    PRIMARY KEY (room_nid, event_nid)
);

-- Prev events of placed events that have no place themselves; the depth is that of the deepest child.
CREATE TABLE backward_extremities (
    room_nid BIGINT NOT NULL,
    event_nid BIGINT NOT NULL,
    depth BIGINT NOT NULL,
    PRIMARY KEY (room_nid, event_nid)
);

-- Memberships in the current state. The position is that of the change, 0 when the user was a member
-- before we saw the room.
CREATE TABLE memberships (
    room_nid BIGINT NOT NULL,
    user_id TEXT NOT NULL,
    membership TEXT NOT NULL,
    event_nid BIGINT NOT NULL,
    position BIGINT NOT NULL,
    local BIGINT NOT NULL,
    PRIMARY KEY (room_nid, user_id)
);
CREATE INDEX memberships_of_user ON memberships (user_id, membership);
CREATE INDEX memberships_by_position ON memberships (room_nid, position);
CREATE INDEX memberships_local ON memberships (room_nid) WHERE local = 1;

-- Servers with a joined member in the current state, ours included.
CREATE TABLE room_hosts (
    room_nid BIGINT NOT NULL,
    server TEXT NOT NULL,
    joined BIGINT NOT NULL,
    PRIMARY KEY (room_nid, server)
);
CREATE INDEX room_hosts_by_server ON room_hosts (server);

-- Invites, knocks and leaves of our users in rooms we are not in. Goes when the room's state knows better.
CREATE TABLE out_of_band (
    room_nid BIGINT NOT NULL,
    user_id TEXT NOT NULL,
    membership TEXT NOT NULL,
    event_nid BIGINT NOT NULL,
    -- A JSON list of events as they stood.
    stripped_state TEXT NOT NULL,
    via TEXT NOT NULL,
    position BIGINT NOT NULL,
    PRIMARY KEY (room_nid, user_id)
);
CREATE INDEX out_of_band_of_user ON out_of_band (user_id, position);

-- Partial rooms (joins.md P-1).
CREATE TABLE partial_rooms (
    room_nid BIGINT PRIMARY KEY,
    joined_via TEXT NOT NULL,
    join_event TEXT NOT NULL,
    device_lists_at BIGINT NOT NULL
);
CREATE TABLE partial_servers (
    room_nid BIGINT NOT NULL,
    server TEXT NOT NULL,
    place BIGINT NOT NULL,
    PRIMARY KEY (room_nid, server)
);
CREATE TABLE became_full (
    position BIGINT PRIMARY KEY,
    room_nid BIGINT NOT NULL
);

-- Signed events that left, or may have left, for another server (the ghost-join law).
CREATE TABLE intents (
    job BIGINT NOT NULL,
    via TEXT NOT NULL,
    event_id TEXT NOT NULL,
    room_nid BIGINT NOT NULL,
    user_id TEXT NOT NULL,
    event TEXT NOT NULL,
    omit_members BIGINT NOT NULL,
    -- 1: the handshake is over and failed; somebody may hold us as a member.
    owe_leave BIGINT NOT NULL,
    PRIMARY KEY (job, via, event_id)
);
CREATE INDEX intents_by_room ON intents (room_nid);

-- Durable background work that can be looked at: joins, resyncs, owed leaves.
CREATE TABLE jobs (
    number BIGINT PRIMARY KEY,
    kind TEXT NOT NULL,
    room_id TEXT NOT NULL,
    user_id TEXT,
    state TEXT NOT NULL,
    donor TEXT,
    last_error TEXT,
    -- JSON, the kind's own.
    progress TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    updated_ms BIGINT NOT NULL,
    -- NULL while it goes on.
    finished_ms BIGINT
);
CREATE INDEX jobs_by_room ON jobs (room_id);
CREATE INDEX jobs_open ON jobs (kind) WHERE finished_ms IS NULL;
CREATE TABLE job_attempts (
    job BIGINT NOT NULL,
    nth BIGINT NOT NULL,
    server TEXT NOT NULL,
    began_ms BIGINT NOT NULL,
    ended_ms BIGINT,
    outcome TEXT,
    PRIMARY KEY (job, nth)
);

-- PDUs that were answered for and not yet taken (joins.md P-22a).
CREATE TABLE staged_pdus (
    number BIGINT PRIMARY KEY,
    room_id TEXT NOT NULL,
    origin TEXT NOT NULL,
    pdu TEXT NOT NULL,
    received_ms BIGINT NOT NULL
);
CREATE INDEX staged_pdus_by_room ON staged_pdus (room_id, number);

-- Federation transactions that were answered, with the answer.
CREATE TABLE transactions_seen (
    origin TEXT NOT NULL,
    txn_id TEXT NOT NULL,
    answer TEXT NOT NULL,
    received_ms BIGINT NOT NULL,
    PRIMARY KEY (origin, txn_id)
);
CREATE INDEX transactions_seen_by_time ON transactions_seen (received_ms);

-- Which request of a client made which event.
CREATE TABLE client_transactions (
    user_id TEXT NOT NULL,
    device TEXT NOT NULL,
    room_nid BIGINT NOT NULL,
    txn_id TEXT NOT NULL,
    event_nid BIGINT NOT NULL,
    PRIMARY KEY (user_id, device, room_nid, txn_id)
);
CREATE INDEX client_transactions_by_event ON client_transactions (event_nid);

-- What other servers must be sent, in order: a stored event or the text of an EDU.
CREATE TABLE outbox (
    server TEXT NOT NULL,
    number BIGINT NOT NULL,
    event_nid BIGINT,
    edu TEXT,
    PRIMARY KEY (server, number)
);

CREATE TABLE destinations (
    server TEXT PRIMARY KEY,
    -- All NULL while it answers.
    failing_since_ms BIGINT,
    retry_at_ms BIGINT,
    interval_ms BIGINT,
    last_success_ms BIGINT
);

-- Signing keys of other servers, and what they signed them with.
CREATE TABLE server_keys (
    server TEXT NOT NULL,
    key_id TEXT NOT NULL,
    public_key TEXT NOT NULL,
    valid_until_ms BIGINT NOT NULL,
    -- 1: listed under old_verify_keys, where valid_until_ms is its expiry.
    old BIGINT NOT NULL,
    fetched_ms BIGINT NOT NULL,
    -- The signed key object it came in.
    response TEXT NOT NULL,
    PRIMARY KEY (server, key_id)
);

-- Which process may work on what. The token grows with each holder; stale holders are refused by it.
CREATE TABLE leases (
    name TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    token BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL
);
