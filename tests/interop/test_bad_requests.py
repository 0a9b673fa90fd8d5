"""Requests that no decent client or server sends: each gets a clear error, and nothing breaks.

Synapse fails eight of these, with 500 for wrong types and other codes than the specification's."""

import contextlib
import socket

import pytest
import requests
from client import MatrixError


@pytest.fixture(scope="module")
def bob(ours):
    return ours.user("bob")


@pytest.fixture(scope="module")
def room_id(bob):
    return bob.create_room("12")


def post(bob, path, data):
    return bob.http.post(bob.base_url + "/_matrix/client/v3" + path, data=data, timeout=30)


def assert_error(response, status, *errcodes):
    assert response.status_code == status
    assert response.json()["errcode"] in errcodes


@pytest.mark.parametrize("body", [b"{", b"nonsense", b'{"name": "\xff"}', b'{"a": 1,}', b"[" * 5000])
def test_not_json(bob, body):
    assert_error(post(bob, "/createRoom", body), 400, "M_NOT_JSON")


@pytest.mark.parametrize(
    "body", [b"[]", b'{"invite": 3}', b'{"room_version": 12}', b'{"initial_state": [1]}']
)
def test_wrong_types(bob, body):
    response = post(bob, "/createRoom", body)
    assert_error(response, 400, "M_BAD_JSON", "M_INVALID_PARAM", "M_UNKNOWN", "M_NOT_JSON")


@pytest.mark.parametrize("number", [1.5, 2**53, -(2**53)])
def test_number_that_events_cannot_hold(bob, room_id, number):
    with pytest.raises(MatrixError) as error:
        bob.put(f"/rooms/{room_id}/send/m.room.message/{number}", {"body": "x", "n": number})
    assert (error.value.status, error.value.errcode) == (400, "M_BAD_JSON")


def test_large_event(bob, room_id):
    with pytest.raises(MatrixError) as error:
        bob.send(room_id, "x" * 66000)
    assert (error.value.status, error.value.errcode) == (413, "M_TOO_LARGE")


def test_large_body(bob):
    # A server may answer and close before all of it is sent.
    with contextlib.suppress(requests.ConnectionError):
        assert post(bob, "/createRoom", b" " * (80 << 20)).status_code in (400, 413)
    bob.get("/account/whoami")


def test_tokens(ours):
    path = ours.base_url + "/_matrix/client/v3/account/whoami"
    assert_error(requests.get(path, timeout=30), 401, "M_MISSING_TOKEN")
    headers = {"Authorization": "Bearer nonsense"}
    assert_error(requests.get(path, headers=headers, timeout=30), 401, "M_UNKNOWN_TOKEN")


def test_unknown_endpoints(ours):
    for path in ("client", "federation"):
        response = requests.get(f"{ours.base_url}/_matrix/{path}/v9/nothing", timeout=30)
        assert_error(response, 404, "M_UNRECOGNIZED")
    response = requests.post(ours.base_url + "/_matrix/client/versions", timeout=30)
    assert_error(response, 405, "M_UNRECOGNIZED")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "X-Matrix",
        "Bearer x",
        'X-Matrix origin="a',
        'X-Matrix origin="{synapse}",destination="{ours}",key="ed25519:a_test",sig="AAAA"',
        'X-Matrix origin="{synapse}",destination="elsewhere",key="ed25519:a_test",sig="AAAA"',
        'X-Matrix origin="{ours}",destination="{ours}",key="ed25519:a_test",sig="AAAA"',
        'X-Matrix origin="no such server",destination="{ours}",key="ed25519:1",sig="AAAA"',
    ],
)
def test_unsigned_federation_request(synapse, ours, header):
    url = f"https://{ours.name}/_matrix/federation/v1/send/1"
    headers = {}
    if header:
        headers["Authorization"] = header.format(synapse=synapse.name, ours=ours.name)
    body = {"origin": synapse.name, "origin_server_ts": 1, "pdus": []}
    response = requests.put(
        url, json=body, headers=headers, verify=ours.certificates.ca, timeout=30
    )
    assert_error(response, 401, "M_UNAUTHORIZED", "M_FORBIDDEN")


def test_slow_bodies_keep_nobody_waiting(ours, bob):
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", ours.client_port)))
            slow.sendall(
                b"POST /_matrix/client/v3/createRoom HTTP/1.1\r\nHost: x\r\n"
                b"Authorization: Bearer " + bob.token.encode() + b"\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
        bob.get("/account/whoami", timeout=5)
