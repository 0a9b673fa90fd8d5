"""A plain Matrix client, with no more than the tests need."""

import itertools
import json
import os
import time
from urllib.parse import quote

import requests

_transaction = itertools.count(1)
# On a machine that is busy with other things, everything takes longer.
PATIENCE = float(os.environ.get("INTEROP_PATIENCE", 1))
LAZY = json.dumps(
    {"room": {"state": {"lazy_load_members": True}, "timeline": {"limit": 100}}}
)


class MatrixError(Exception):
    def __init__(self, status, body):
        super().__init__(f"{status} {body}")
        self.status, self.errcode = status, body.get("errcode")


def wait_until(condition, what, timeout=30):
    """Calls `condition` until it gives something true, and returns that."""
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout} s")
        time.sleep(0.1)
    return result


class Client:
    def __init__(self, base_url, user_id, token, password):
        self.base_url, self.user_id, self.password = base_url, user_id, password
        self.localpart = user_id[1:].partition(":")[0]
        self.token = token
        self.http = requests.Session()
        self.http.headers["Authorization"] = f"Bearer {token}"
        self.since = None
        self.timelines, self.invites = {}, {}

    def call(self, method, path, body=None, query=None, timeout=60):
        response = self.http.request(
            method, self.base_url + path, json=body, params=query, timeout=timeout * PATIENCE
        )
        try:
            content = response.json()
        except ValueError:
            raise AssertionError(f"{method} {path}: not JSON: {response.text[:300]}") from None
        if response.status_code != 200:
            raise MatrixError(response.status_code, content)
        return content

    def get(self, path, **options):
        return self.call("GET", "/_matrix/client/v3" + path, **options)

    def post(self, path, body=None, **options):
        return self.call("POST", "/_matrix/client/v3" + path, body or {}, **options)

    def put(self, path, body):
        return self.call("PUT", "/_matrix/client/v3" + path, body)

    def create_room(self, version, **options):
        options = {"preset": "public_chat", "room_version": version, **options}
        return self.post("/createRoom", options)["room_id"]

    def join(self, room, via=(), timeout=60):
        return self.post(f"/join/{quote(room)}", query={"via": list(via)}, timeout=timeout)["room_id"]

    def leave(self, room_id):
        self.post(f"/rooms/{quote(room_id)}/leave")

    def invite(self, room_id, user_id):
        self.post(f"/rooms/{quote(room_id)}/invite", {"user_id": user_id})

    def ban(self, room_id, user_id):
        self.post(f"/rooms/{quote(room_id)}/ban", {"user_id": user_id})

    def make_private(self, room_id):
        path = f"/rooms/{quote(room_id)}/state/m.room.join_rules"
        self.put(path, {"join_rule": "invite"})

    def send(self, room_id, text):
        path = f"/rooms/{quote(room_id)}/send/m.room.message/t{next(_transaction)}"
        return self.put(path, {"msgtype": "m.text", "body": text})["event_id"]

    def members(self, room_id):
        """Everybody's membership. Waits until the room is full."""
        chunk = self.get(f"/rooms/{quote(room_id)}/members")["chunk"]
        return {event["state_key"]: event["content"]["membership"] for event in chunk}

    def state(self, room_id):
        """The event id of every piece of state."""
        events = self.get(f"/rooms/{quote(room_id)}/state")
        return {(e["type"], e["state_key"]): e["event_id"] for e in events}

    def sync(self, timeout=1000):
        """One sync with lazily loaded members; what it brings is kept in `timelines`."""
        query = {"filter": LAZY, "timeout": timeout}
        if self.since:
            query["since"] = self.since
        response = self.get("/sync", query=query)
        self.since = response["next_batch"]
        rooms = response.get("rooms", {})
        for room_id, room in rooms.get("join", {}).items():
            self.timelines.setdefault(room_id, []).extend(room["timeline"]["events"])
        self.invites.update(rooms.get("invite", {}))
        return response

    def wait_for_event(self, room_id, event_id, timeout=30):
        """Syncs until the event is in the room's timeline, and returns it."""

        def look():
            for event in self.timelines.get(room_id, ()):
                if event["event_id"] == event_id:
                    return event
            self.sync()

        return wait_until(look, f"{self.user_id} sees {event_id}", timeout)

    def wait_for_invite(self, room_id):
        wait_until(lambda: self.sync() and room_id in self.invites, f"{self.user_id} is invited")
