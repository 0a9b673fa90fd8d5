-- With all that is asked of it in the index: with less, SQLite reads every member of the room in the order of
-- the primary key.
DROP INDEX memberships_local;
CREATE INDEX memberships_local ON memberships (room_nid, membership, user_id) WHERE local = 1;
