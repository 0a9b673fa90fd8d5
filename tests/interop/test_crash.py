"""SIGKILL at random moments of joins and resyncs: whatever was under way goes on, and ends as it would have.

Two hundred kills on each engine. The moments come from a seed, which a failure names; what the machine
does in between is its own."""

import contextlib
import os
import random
import threading
import time

import pytest
import requests
import servers
from client import MatrixError, wait_until

KILLS = 200
KILLS_OF_ONE_JOIN = 10
MEMBERS = 20
SEED = int(os.environ.get("CRASH_SEED", "1"))


@pytest.fixture(params=["sqlite", "postgres"])
def joiner(request, tmp_path, certificates):
    """A server that is going to die a lot."""
    database = None
    if request.param == "postgres":
        if "VESTIBULE_TEST_POSTGRES" not in os.environ:
            pytest.skip("./dev test interop starts a PostgreSQL for this")
        database = servers.new_postgres_database()
    server = servers.Vestibule(tmp_path / "joiner", certificates, database)
    yield server
    server.close()


def join_for_ever(user, room_id, via):
    """What a client does: it tries until it is in. The server may be gone at any moment."""
    while True:
        try:
            user.join(room_id, via=[via])
            return
        except MatrixError as error:
            assert error.status >= 500, error
        except (requests.ConnectionError, requests.Timeout, AssertionError):
            # Not there, or killed in the middle of its answer.
            time.sleep(0.02)


def kill_at_random(server, chance):
    time.sleep(chance.uniform(0, 0.25))
    server.kill()
    server.spawn()
    if chance.random() < 0.5:
        # Sometimes it gets to its feet first.
        with contextlib.suppress(AssertionError):
            server.wait_until_it_answers()


@pytest.mark.timeout(900)
def test_killed_two_hundred_times(ours, joiner):
    chance = random.Random(SEED)
    bob = ours.user("bob")
    for n in range(KILLS // KILLS_OF_ONE_JOIN):
        where = f"seed {SEED}, join {n}"
        room_id = bob.create_room("11", name="Interop")
        ours.crowd(room_id, MEMBERS)
        carol = joiner.user("carol")
        client = threading.Thread(target=join_for_ever, args=(carol, room_id, ours.name), daemon=True)
        client.start()
        for _ in range(KILLS_OF_ONE_JOIN):
            kill_at_random(joiner, chance)
        joiner.wait_until_it_answers()
        client.join(60)
        assert not client.is_alive(), f"{where}: the client never gets in"
        wait_until(lambda room_id=room_id: not joiner.is_partial(room_id), f"{where}: full", 60)
        # What an undisturbed server would hold: what the resident does, with one join of carol's.
        wait_until(
            lambda room_id=room_id: carol.state(room_id) == bob.state(room_id),
            f"{where}: both agree",
        )
        members = bob.members(room_id)
        assert members == carol.members(room_id), where
        assert list(members.values()).count("join") == MEMBERS + 2, where
        text = carol.send(room_id, "alive")
        bob.wait_for_event(room_id, text)
