"""Synapse's user joins a room of ours."""

import pytest
from client import MatrixError, wait_until
from servers import fresh
from test_join import STATE, assert_same_state, assert_talk, populated_room


def join_and_check(synapse, ours, creator, room_id, join):
    """Synapse joins with a partial answer, and resyncs from us."""
    dora = synapse.user("dora")
    before = len(ours.proxy.exchanges)
    with ours.proxy.hold(STATE):
        join(dora)
        assert synapse.is_partial(room_id)
        assert_talk(room_id, creator, dora)
    synapse.wait_full(room_id)
    assert_talk(room_id, creator, dora)
    assert_same_state(room_id, creator, dora)
    [answer] = [e for e in ours.proxy.exchanges[before:] if "/v2/send_join/" in e.path]
    assert "omit_members=true" in answer.path
    assert answer.json()["members_omitted"] is True
    assert ours.name in answer.json()["servers_in_room"]


def test_by_alias(synapse, ours, version):
    alias = fresh("resident")
    bob, room_id = populated_room(ours, version, room_alias_name=alias)
    join_and_check(synapse, ours, bob, room_id, lambda dora: dora.join(f"#{alias}:{ours.name}"))


def test_by_invite(synapse, ours, version):
    bob, room_id = populated_room(ours, version)
    bob.make_private(room_id)

    def join(dora):
        bob.invite(room_id, dora.user_id)
        dora.wait_for_invite(room_id)
        dora.join(room_id)

    join_and_check(synapse, ours, bob, room_id, join)


def test_a_thousand_members(synapse, ours):
    """One commit, one answer and one resync of some size; then both agree, event for event."""
    bob = ours.user("bob")
    room_id = bob.create_room("11", name="Crowd")
    ours.crowd(room_id, 999)
    join_and_check(
        synapse, ours, bob, room_id, lambda dora: dora.join(room_id, via=[ours.name])
    )
    assert list(bob.members(room_id).values()).count("join") == 1001


def test_leave_and_rejoin(synapse, ours, version):
    bob, room_id = populated_room(ours, version)
    dora = synapse.user("dora")
    dora.join(room_id, via=[ours.name])
    synapse.wait_full(room_id)
    dora.leave(room_id)
    wait_until(lambda: bob.members(room_id)[dora.user_id] == "leave", "the leave arrived")
    bob.send(room_id, "nobody of yours is here")
    dora.join(room_id, via=[ours.name])
    synapse.wait_full(room_id)
    assert_talk(room_id, bob, dora)
    assert_same_state(room_id, bob, dora)


def test_alias_that_does_not_exist(synapse, ours):
    with pytest.raises(MatrixError) as error:
        synapse.user("dora").join(f"#nowhere:{ours.name}")
    assert (error.value.status, error.value.errcode) == (404, "M_NOT_FOUND")


def test_banned(synapse, ours, version):
    bob, room_id = populated_room(ours, version)
    dora = synapse.user("dora")
    bob.ban(room_id, dora.user_id)
    with pytest.raises(MatrixError) as error:
        dora.join(room_id, via=[ours.name])
    assert (error.value.status, error.value.errcode) == (403, "M_FORBIDDEN")
