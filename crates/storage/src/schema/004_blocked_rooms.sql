-- Rooms that the administrators let nobody into.
CREATE TABLE blocked_rooms (room_id TEXT PRIMARY KEY, blocked_by TEXT NOT NULL);
