"""Residents that are down, broken or lying, when our user joins."""

import json
import time

import pytest
from client import PATIENCE, MatrixError
from servers import free_port
from test_join import assert_same_state, assert_talk, populated_room

MAKE_JOIN = "/_matrix/federation/v1/make_join/"
SEND_JOIN = "/_matrix/federation/v2/send_join/"


@pytest.fixture
def room(synapse, ours):
    """A room of Synapse's, its creator, and our user who is to join it."""
    alice, room_id = populated_room(synapse, "12")
    return room_id, alice, ours.user("bob")


def edit(change):
    """A JSON answer with something changed."""

    def apply(content):
        answer = json.loads(content)
        change(answer)
        return json.dumps(answer).encode()

    return apply


def assert_join_fails(bob, room_id, synapse):
    with pytest.raises(MatrixError) as error:
        bob.join(room_id, via=[synapse.name])
    assert error.value.status >= 400 and error.value.errcode, error.value
    joined = bob.get("/joined_rooms")["joined_rooms"]
    assert room_id not in joined


def assert_join_works(synapse, ours, room, via=None):
    room_id, alice, bob = room
    bob.join(room_id, via=via or [synapse.name])
    ours.wait_full(room_id)
    assert_talk(room_id, alice, bob)
    assert_same_state(room_id, alice, bob)


def test_first_candidate_is_down(synapse, ours, room):
    began = time.monotonic()
    assert_join_works(synapse, ours, room, via=[f"127.0.0.1:{free_port()}", synapse.name])
    assert time.monotonic() - began < 20 * PATIENCE


@pytest.mark.parametrize("step", [MAKE_JOIN, SEND_JOIN])
@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", b"{}", b'{"room_version": 12, "event": [], "state": 1}', b"\xff\xfe"]
)
def test_nonsense(synapse, ours, room, step, answer):
    room_id, _, bob = room
    with synapse.proxy.spoil(step, lambda _: answer):
        assert_join_fails(bob, room_id, synapse)
    assert_join_works(synapse, ours, room)


@pytest.mark.parametrize("step", [MAKE_JOIN, SEND_JOIN])
def test_answer_that_breaks_off(synapse, ours, room, step):
    room_id, _, bob = room
    with synapse.proxy.cut(step):
        assert_join_fails(bob, room_id, synapse)
    assert_join_works(synapse, ours, room)


def test_unknown_room_version(synapse, ours, room):
    room_id, _, bob = room

    def change(answer):
        answer["room_version"] = "org.example.unheard-of"

    with synapse.proxy.spoil(MAKE_JOIN, edit(change)):
        assert_join_fails(bob, room_id, synapse)
    assert_join_works(synapse, ours, room)


def test_changed_create_event(synapse, ours, room):
    room_id, _, bob = room

    def change(answer):
        for event in answer["state"] + answer["auth_chain"]:
            if event["type"] == "m.room.create":
                event["content"]["room_version"] = "11"

    with synapse.proxy.spoil(SEND_JOIN, edit(change)):
        assert_join_fails(bob, room_id, synapse)
    assert_join_works(synapse, ours, room)


def test_missing_create_event(synapse, ours, room):
    room_id, _, bob = room

    def change(answer):
        for key in ("state", "auth_chain"):
            answer[key] = [e for e in answer[key] if e["type"] != "m.room.create"]

    with synapse.proxy.spoil(SEND_JOIN, edit(change)):
        assert_join_fails(bob, room_id, synapse)
    assert_join_works(synapse, ours, room)


def lie_about_servers(servers):
    def change(answer):
        answer["servers_in_room"] = servers

    return edit(change)


def test_no_servers_in_the_room(synapse, ours, room):
    # The answer is of no use, so the same join goes again and asks for the whole room.
    with synapse.proxy.spoil(SEND_JOIN, lie_about_servers([])):
        assert_join_works(synapse, ours, room)


def test_wrong_servers_in_the_room(synapse, ours, room):
    lie = lie_about_servers(["nowhere.invalid", "not a server name"])
    with synapse.proxy.spoil(SEND_JOIN, lie):
        assert_join_works(synapse, ours, room)
