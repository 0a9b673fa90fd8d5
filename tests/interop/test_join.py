"""Our user joins a room of Synapse's."""

import pytest
from client import MatrixError, wait_until
from servers import fresh

STATE = r"/_matrix/federation/v1/state(_ids)?/"


def populated_room(synapse, version, **options):
    """A room of Synapse's with five members, and its creator."""
    alice = synapse.user("alice")
    room_id = alice.create_room(version, name="Interop", **options)
    for _ in range(4):
        synapse.user("local").join(room_id)
    return alice, room_id


def assert_talk(room_id, one, other):
    """Each sees what the other sends."""
    for sender, reader in ((one, other), (other, one)):
        text = f"{sender.user_id} says hello"
        event = reader.wait_for_event(room_id, sender.send(room_id, text))
        assert (event["sender"], event["content"]["body"]) == (sender.user_id, text)


def assert_same_state(room_id, one, other):
    """Both servers agree on the room's state, event for event, and so on its members."""
    wait_until(lambda: one.state(room_id) == other.state(room_id), "the servers agree on the state")
    assert one.members(room_id) == other.members(room_id)


@pytest.mark.parametrize("by", ["alias", "id"])
def test_partial_then_full(synapse, ours, version, by):
    alias = fresh("partial")
    alice, room_id = populated_room(synapse, version, room_alias_name=alias)
    bob = ours.user("bob")
    with synapse.proxy.hold(STATE):
        if by == "alias":
            assert bob.join(f"#{alias}:{synapse.name}") == room_id
        else:
            assert bob.join(room_id, via=[synapse.name]) == room_id
        assert ours.is_partial(room_id)
        assert_talk(room_id, alice, bob)
        assert ours.is_partial(room_id)
    ours.wait_full(room_id)
    assert_talk(room_id, alice, bob)
    assert_same_state(room_id, alice, bob)
    assert list(bob.members(room_id).values()) == ["join"] * 6


def test_by_invite(synapse, ours, version):
    alice, room_id = populated_room(synapse, version)
    bob = ours.user("bob")
    alice.make_private(room_id)
    alice.invite(room_id, bob.user_id)
    bob.wait_for_invite(room_id)
    bob.join(room_id)
    ours.wait_full(room_id)
    assert_talk(room_id, alice, bob)
    assert_same_state(room_id, alice, bob)


def test_leave_and_rejoin(synapse, ours, version):
    alice, room_id = populated_room(synapse, version)
    bob = ours.user("bob")
    bob.join(room_id, via=[synapse.name])
    ours.wait_full(room_id)
    bob.leave(room_id)
    wait_until(lambda: alice.members(room_id)[bob.user_id] == "leave", "Synapse sees the leave")
    alice.send(room_id, "nobody of yours is here")
    bob.join(room_id, via=[synapse.name])
    ours.wait_full(room_id)
    assert_talk(room_id, alice, bob)
    assert_same_state(room_id, alice, bob)


def test_second_user_joins_locally(synapse, ours, version):
    """While the room is partial: no second handshake is needed."""
    alice, room_id = populated_room(synapse, version)
    bob, carol = ours.user("bob"), ours.user("carol")
    with synapse.proxy.hold(STATE):
        bob.join(room_id, via=[synapse.name])
        carol.join(room_id, via=[synapse.name])
        assert_talk(room_id, carol, alice)
        assert_talk(room_id, carol, bob)
    ours.wait_full(room_id)
    assert_same_state(room_id, alice, carol)


def test_state_that_comes_late(synapse, ours, version):
    """The resync is tried again after a resident's failure."""
    alice, room_id = populated_room(synapse, version)
    bob = ours.user("bob")
    with synapse.proxy.refuse(STATE, 500) as refusal:
        bob.join(room_id, via=[synapse.name])
        wait_until(lambda: refusal.hits, "state was asked for")
        assert ours.is_partial(room_id)
    ours.wait_full(room_id)
    assert_same_state(room_id, alice, bob)


def test_alias_that_does_not_exist(synapse, ours):
    with pytest.raises(MatrixError) as error:
        ours.user("bob").join(f"#nowhere:{synapse.name}")
    assert (error.value.status, error.value.errcode) == (404, "M_NOT_FOUND")


def test_banned(synapse, ours, version):
    alice, room_id = populated_room(synapse, version)
    bob = ours.user("bob")
    alice.ban(room_id, bob.user_id)
    with pytest.raises(MatrixError) as error:
        bob.join(room_id, via=[synapse.name])
    assert (error.value.status, error.value.errcode) == (403, "M_FORBIDDEN")


def test_killed_in_mid_resync(synapse, mortal, version):
    alice, room_id = populated_room(synapse, version)
    bob = mortal.user("bob")
    with synapse.proxy.hold(STATE) as held:
        bob.join(room_id, via=[synapse.name])
        wait_until(held.hit.is_set, "the resync began")
        mortal.kill()
    missed = alice.send(room_id, "sent while you were away")
    mortal.start()
    mortal.wait_full(room_id)
    assert_talk(room_id, alice, bob)
    bob.wait_for_event(room_id, missed)
    assert_same_state(room_id, alice, bob)
