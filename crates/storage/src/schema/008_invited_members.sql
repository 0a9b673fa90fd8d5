-- How many are invited is asked with every event that somebody may be notified of, and there are few of them among
-- tens of thousands of members.
CREATE INDEX memberships_invited ON memberships (room_nid, membership) WHERE membership = 'invite';
