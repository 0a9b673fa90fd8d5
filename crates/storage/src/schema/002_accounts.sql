-- Accounts and what belongs to one: devices, tokens, profiles, account data, keys, push, media.
-- Tokens are stored as SHA-256 in hexadecimal: reading the database logs nobody in.

CREATE TABLE users (
    user_id TEXT PRIMARY KEY,
    -- An argon2 hash; NULL: no password login.
    password_hash TEXT,
    created_ms BIGINT NOT NULL,
    admin BIGINT NOT NULL DEFAULT 0,
    guest BIGINT NOT NULL DEFAULT 0,
    deactivated BIGINT NOT NULL DEFAULT 0,
    erased BIGINT NOT NULL DEFAULT 0,
    locked BIGINT NOT NULL DEFAULT 0,
    -- The application service that made this account.
    appservice TEXT
);

CREATE TABLE registration_tokens (
    token TEXT PRIMARY KEY,
    -- NULL: as often as one likes.
    uses_allowed BIGINT,
    completed BIGINT NOT NULL DEFAULT 0,
    expires_ms BIGINT
);

-- One row per field of a profile, the value as JSON.
CREATE TABLE profile_fields (
    user_id TEXT NOT NULL,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (user_id, name)
);

CREATE TABLE devices (
    user_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    display_name TEXT,
    created_ms BIGINT NOT NULL,
    last_seen_ms BIGINT,
    last_seen_ip TEXT,
    -- The uploaded identity keys, canonical JSON.
    keys TEXT,
    PRIMARY KEY (user_id, device_id)
);

CREATE TABLE access_tokens (
    token TEXT PRIMARY KEY,
    user_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    expires_ms BIGINT,
    -- The refresh token that this token came from; it and its access token die at the first use of this one.
    supersedes TEXT
);
CREATE INDEX access_tokens_of_device ON access_tokens (user_id, device_id);

CREATE TABLE refresh_tokens (
    token TEXT PRIMARY KEY,
    user_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    -- The access token given out together with this one.
    access_token TEXT NOT NULL
);
CREATE INDEX refresh_tokens_of_device ON refresh_tokens (user_id, device_id);

-- Tokens of a single purpose: 'login' (used once) and 'openid'.
CREATE TABLE short_tokens (
    token TEXT PRIMARY KEY,
    purpose TEXT NOT NULL,
    user_id TEXT NOT NULL,
    expires_ms BIGINT NOT NULL
);

-- Global account data has the room id ''.
CREATE TABLE account_data (
    user_id TEXT NOT NULL,
    room_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    content TEXT NOT NULL,
    position BIGINT NOT NULL,
    PRIMARY KEY (user_id, room_id, kind)
);
CREATE INDEX account_data_by_position ON account_data (user_id, position);

CREATE TABLE filters (
    user_id TEXT NOT NULL,
    filter_id BIGINT NOT NULL,
    filter TEXT NOT NULL,
    PRIMARY KEY (user_id, filter_id)
);

CREATE TABLE pushers (
    user_id TEXT NOT NULL,
    app_id TEXT NOT NULL,
    pushkey TEXT NOT NULL,
    -- The device whose access token set it.
    device_id TEXT NOT NULL,
    pusher TEXT NOT NULL,
    -- Events up to here have been sent or were not worth a push.
    position BIGINT NOT NULL,
    PRIMARY KEY (user_id, app_id, pushkey)
);

-- What an event means to a user, kept only where the rules say to notify or to count.
CREATE TABLE push_actions (
    user_id TEXT NOT NULL,
    room_id TEXT NOT NULL,
    -- The event's position in the events stream.
    position BIGINT NOT NULL,
    event_id TEXT NOT NULL,
    -- The thread root, '' for the main timeline.
    thread_id TEXT NOT NULL,
    highlight BIGINT NOT NULL,
    -- The actions, JSON.
    actions TEXT NOT NULL,
    PRIMARY KEY (user_id, room_id, position)
);
CREATE INDEX push_actions_by_position ON push_actions (user_id, position);

-- How far the push rules have been run over a room.
CREATE TABLE push_progress (
    room_id TEXT PRIMARY KEY,
    position BIGINT NOT NULL
);

CREATE TABLE one_time_keys (
    user_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    algorithm TEXT NOT NULL,
    key_id TEXT NOT NULL,
    key_json TEXT NOT NULL,
    -- Keys are given out in the order of their upload.
    place BIGINT NOT NULL,
    PRIMARY KEY (user_id, device_id, algorithm, key_id)
);

CREATE TABLE fallback_keys (
    user_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    algorithm TEXT NOT NULL,
    key_id TEXT NOT NULL,
    key_json TEXT NOT NULL,
    used BIGINT NOT NULL,
    PRIMARY KEY (user_id, device_id, algorithm)
);

-- Usage is 'master', 'self_signing' or 'user_signing'; of remote users those that a cached list brought.
CREATE TABLE cross_signing_keys (
    user_id TEXT NOT NULL,
    usage TEXT NOT NULL,
    key_json TEXT NOT NULL,
    PRIMARY KEY (user_id, usage)
);

CREATE TABLE key_signatures (
    target_user TEXT NOT NULL,
    -- A device id, or the public part of a cross-signing key.
    target TEXT NOT NULL,
    signer TEXT NOT NULL,
    signer_key TEXT NOT NULL,
    signature TEXT NOT NULL,
    PRIMARY KEY (target_user, target, signer, signer_key)
);

-- Each change of a user's devices or cross-signing keys, ours and those of others that we track.
CREATE TABLE device_list_changes (
    position BIGINT PRIMARY KEY,
    user_id TEXT NOT NULL,
    -- '' for a change of cross-signing keys, or of an unknown set of devices.
    device_id TEXT NOT NULL
);
CREATE INDEX device_list_changes_of_user ON device_list_changes (user_id, position);

-- The device lists of remote users that are kept up to date by m.device_list_update.
CREATE TABLE remote_device_lists (
    user_id TEXT PRIMARY KEY,
    stream_id BIGINT NOT NULL,
    -- 1: an update was missed, the list must be fetched before it is used again.
    stale BIGINT NOT NULL
);

CREATE TABLE remote_devices (
    user_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    display_name TEXT,
    keys TEXT,
    PRIMARY KEY (user_id, device_id)
);

-- Updates about users who may be in a room that was partial when they came (joins.md P-4, P-53).
CREATE TABLE pending_device_updates (
    position BIGINT PRIMARY KEY,
    user_id TEXT NOT NULL
);

CREATE TABLE to_device (
    position BIGINT PRIMARY KEY,
    user_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    message TEXT NOT NULL
);
CREATE INDEX to_device_inbox ON to_device (user_id, device_id, position);

-- Requests that were carried out: a client's by 'user|device' and txn id, a server's by name and message id.
CREATE TABLE to_device_done (
    origin TEXT NOT NULL,
    message_id TEXT NOT NULL,
    done_ms BIGINT NOT NULL,
    PRIMARY KEY (origin, message_id)
);

CREATE TABLE backup_versions (
    user_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    algorithm TEXT NOT NULL,
    auth_data TEXT NOT NULL,
    etag BIGINT NOT NULL,
    deleted BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (user_id, version)
);

CREATE TABLE backup_keys (
    user_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    room_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    first_message_index BIGINT NOT NULL,
    forwarded_count BIGINT NOT NULL,
    is_verified BIGINT NOT NULL,
    session_data TEXT NOT NULL,
    PRIMARY KEY (user_id, version, room_id, session_id)
);

CREATE TABLE presence (
    user_id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    status_msg TEXT,
    last_active_ms BIGINT NOT NULL,
    currently_active BIGINT NOT NULL,
    position BIGINT NOT NULL
);
CREATE INDEX presence_by_position ON presence (position);

-- The bytes are a file named by their SHA-256.
CREATE TABLE media (
    origin TEXT NOT NULL,
    media_id TEXT NOT NULL,
    -- NULL until the content is uploaded.
    sha256 TEXT,
    content_type TEXT,
    filename TEXT,
    bytes BIGINT NOT NULL DEFAULT 0,
    uploader TEXT,
    created_ms BIGINT NOT NULL,
    quarantined BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (origin, media_id)
);

-- How far an application service has been told, and the batch under way with its transaction id.
CREATE TABLE appservice_progress (
    appservice TEXT PRIMARY KEY,
    position BIGINT NOT NULL,
    txn_id BIGINT NOT NULL
);
