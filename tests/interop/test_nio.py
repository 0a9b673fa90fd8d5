"""The join through matrix-nio, an unmodified client library."""

import asyncio
import contextlib

import nio
from client import PATIENCE
from servers import fresh
from test_join import assert_same_state, populated_room

TIME_LIMIT = 60 * PATIENCE  # seconds


def ok(response, kind):
    assert isinstance(response, kind), response
    return response


@contextlib.asynccontextmanager
async def logged_in(server):
    account = server.user("nio")
    client = nio.AsyncClient(server.base_url, account.user_id)
    try:
        ok(await client.login(account.password, device_name="interop"), nio.LoginResponse)
        ok(await client.sync(timeout=0, full_state=True), nio.SyncResponse)
        yield client
    finally:
        await client.close()


async def wait_for_text(client, room_id, text):
    """Syncs until the message comes, and returns it."""
    while True:
        response = ok(await client.sync(timeout=1000), nio.SyncResponse)
        if room_id in response.rooms.join:
            for event in response.rooms.join[room_id].timeline.events:
                if isinstance(event, nio.RoomMessageText) and event.body == text:
                    return event


async def join_and_talk(ours, alice, room_id, alias):
    async with logged_in(ours) as client:
        joined = ok(await client.join(alias), nio.JoinResponse)
        assert joined.room_id == room_id
        ok(await client.sync(timeout=0, full_state=True), nio.SyncResponse)

        content = {"msgtype": "m.text", "body": "hello from nio"}
        sent = ok(await client.room_send(room_id, "m.room.message", content), nio.RoomSendResponse)
        seen = await asyncio.to_thread(alice.wait_for_event, room_id, sent.event_id)
        assert seen["sender"] == client.user_id

        await asyncio.to_thread(alice.send, room_id, "hello from Synapse")
        assert (await wait_for_text(client, room_id, "hello from Synapse")).sender == alice.user_id

        # The members are complete only once the room is full; this waits for that.
        members = ok(await client.joined_members(room_id), nio.JoinedMembersResponse).members
        assert len(members) == 6
        assert {client.user_id, alice.user_id} <= {member.user_id for member in members}

        history = ok(await client.room_messages(room_id, client.next_batch), nio.RoomMessagesResponse)
        texts = [e.body for e in history.chunk if isinstance(e, nio.RoomMessageText)]
        assert texts[:2] == ["hello from Synapse", "hello from nio"]
        assert client.rooms[room_id].name == "Interop"


def test_join(synapse, ours, version):
    name = fresh("nio")
    alice, room_id = populated_room(synapse, version, room_alias_name=name)
    alias = f"#{name}:{synapse.name}"
    asyncio.run(asyncio.wait_for(join_and_talk(ours, alice, room_id, alias), TIME_LIMIT))
