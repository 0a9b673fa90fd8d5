-- Aliases of this server.
CREATE TABLE room_aliases (
    alias TEXT PRIMARY KEY,
    room_id TEXT NOT NULL,
    creator TEXT NOT NULL
);
CREATE INDEX room_aliases_by_room ON room_aliases (room_id);

-- Rooms shown in the public room list.
CREATE TABLE room_list (room_id TEXT PRIMARY KEY);

-- Rooms a user has forgotten, until they are invited or join again. Nothing up to the position is shown.
CREATE TABLE forgotten_rooms (
    user_id TEXT NOT NULL,
    room_id TEXT NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (user_id, room_id)
);

-- The newest receipt of each user, kind and thread; thread '' is a receipt without one.
CREATE TABLE receipts (
    room_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    thread TEXT NOT NULL,
    event_id TEXT NOT NULL,
    ts BIGINT NOT NULL,
    position BIGINT NOT NULL,
    PRIMARY KEY (room_id, user_id, kind, thread)
);
CREATE INDEX receipts_by_room ON receipts (room_id, position);
CREATE INDEX receipts_by_position ON receipts (position);

-- m.relates_to of accepted events.
CREATE TABLE relations (
    event_nid BIGINT PRIMARY KEY,
    parent TEXT NOT NULL,
    rel_type TEXT NOT NULL,
    kind TEXT NOT NULL,
    sender TEXT NOT NULL,
    aggregation_key TEXT
);
CREATE INDEX relations_by_parent ON relations (parent, rel_type, kind);

-- Accepted redaction events by the event they name, which need not be stored (yet).
CREATE TABLE redactions (
    event_nid BIGINT PRIMARY KEY,
    target TEXT NOT NULL
);
CREATE INDEX redactions_by_target ON redactions (target);

-- Words of message bodies, names and topics.
CREATE TABLE search_words (
    word TEXT NOT NULL,
    room_nid BIGINT NOT NULL,
    event_nid BIGINT NOT NULL,
    field TEXT NOT NULL,
    PRIMARY KEY (word, room_nid, event_nid, field)
);
CREATE INDEX search_words_by_event ON search_words (event_nid);

-- Reports of events, rooms and users, for administrators.
CREATE TABLE reports (
    number BIGINT PRIMARY KEY,
    reporter TEXT NOT NULL,
    room_id TEXT,
    event_id TEXT,
    user_id TEXT,
    reason TEXT,
    ts BIGINT NOT NULL
);
