// Joins a room through matrix-js-sdk, an unmodified client library, as a browser client does:
// with end-to-end encryption set up and members loaded lazily. Reads what to do, as JSON, from
// its argument; prints a line of JSON for each step done.

import * as sdk from "matrix-js-sdk";

const task = JSON.parse(process.argv[2]);
const say = (step, details = {}) => console.log(JSON.stringify({ step, ...details }));

/** Resolves when `find`, called now and at every event of the client, returns something. */
function eventually(client, event, find) {
    return new Promise((resolve) => {
        const look = () => {
            const found = find();
            if (found) {
                client.off(event, look);
                resolve(found);
            }
        };
        client.on(event, look);
        look();
    });
}

const timelineEvents = (client) =>
    client.getRoom(task.roomId)?.getLiveTimeline().getEvents() ?? [];

const login = await sdk.createClient({ baseUrl: task.baseUrl }).loginRequest({
    type: "m.login.password",
    identifier: { type: "m.id.user", user: task.user },
    password: task.password,
});
const client = sdk.createClient({
    baseUrl: task.baseUrl,
    userId: login.user_id,
    deviceId: login.device_id,
    accessToken: login.access_token,
});
say("login", { userId: login.user_id });

await client.initRustCrypto({ useIndexedDB: false });
await client.startClient({ lazyLoadMembers: true });
await eventually(client, sdk.ClientEvent.Sync, () => client.isInitialSyncComplete());
say("sync");

const { roomId } = await client.joinRoom(task.alias);
await eventually(client, sdk.ClientEvent.Sync, () => client.getRoom(task.roomId));
say("join", { roomId, name: client.getRoom(task.roomId).name });

const { event_id: eventId } = await client.sendTextMessage(task.roomId, task.send);
say("send", { eventId });

const received = await eventually(client, sdk.RoomEvent.Timeline, () =>
    timelineEvents(client).find((event) => event.getContent().body === task.receive),
);
say("receive", { sender: received.getSender() });

const room = client.getRoom(task.roomId);
await room.loadMembersIfNeeded();
say("members", { members: room.getJoinedMembers().map((member) => member.userId) });

client.stopClient();
process.exit(0);
