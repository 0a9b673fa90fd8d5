"""The two homeservers, as processes on loopback addresses, each behind a proxy of its own.

A server's name is 127.0.0.1 with the proxy's port, so nothing needs DNS. Certificates come from a
CA made for the run, and both servers check them."""

import base64
import contextlib
import hashlib
import hmac
import itertools
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import requests
from client import PATIENCE, Client, MatrixError, wait_until
from proxy import Proxy

ROOT = Path(__file__).resolve().parents[2]
CROWD_TOKEN = "crowd-token"
SHARED_SECRET = "interop"
START_LIMIT = 60  # seconds
_fresh = itertools.count(1)


def fresh(word):
    """A name that no user and no alias has yet."""
    return f"{word}{next(_fresh)}"


def free_port():
    """A port outside the range that the kernel gives to outgoing connections, so that it is
    still free when a killed server wants it back."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Certificates:
    def __init__(self, directory):
        self.ca, self.certificate, self.key = (
            directory / name for name in ("ca.crt", "tls.crt", "tls.key")
        )
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "7"]
        ca_key = directory / "ca.key"
        openssl("req", "-x509", *new_key, "-keyout", ca_key, "-out", self.ca, "-subj", "/CN=interop CA")
        openssl(
            *("req", "-x509", *new_key, "-keyout", self.key, "-out", self.certificate),
            *("-CA", self.ca, "-CAkey", ca_key, "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
        )


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class Server:
    """A homeserver. Subclasses say how to configure and run it, and how it is doing in a join."""

    def __init__(self, directory, certificates):
        directory.mkdir(parents=True)
        self.directory, self.certificates = directory, certificates
        self.proxy = Proxy(certificates.certificate, certificates.key)
        self.name = f"127.0.0.1:{self.proxy.port}"
        self.client_port, self.federation_port = free_port(), free_port()
        self.proxy.upstream_port = self.federation_port
        self.base_url = f"http://127.0.0.1:{self.client_port}"
        self.log_path = directory / "log"
        self.process = None
        self.configure()
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self):
        self.spawn()
        self.wait_until_it_answers()

    def spawn(self):
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests, which then end the servers
            )

    def wait_until_it_answers(self):
        def answers():
            if self.process.poll() is not None:
                tail = self.log_path.read_text(errors="replace")[-3000:]
                raise AssertionError(f"{self.command()[0]} ended at its start:\n{tail}")
            with contextlib.suppress(requests.ConnectionError):
                return requests.get(self.base_url + "/_matrix/client/versions", timeout=5 * PATIENCE).ok

        wait_until(answers, f"{self.directory.name} answers", START_LIMIT)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        """Ends it gracefully; fails the test if it takes long."""
        self.process.terminate()
        try:
            self.process.wait(20 * PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.directory.name} does not end on SIGTERM") from None

    def close(self):
        try:
            if self.process and self.process.poll() is None:
                self.stop()
        finally:
            self.proxy.close()

    def user(self, localpart="user", admin=False):
        """A new user, logged in."""
        localpart, password = fresh(localpart), "correct horse battery staple"
        path = self.base_url + "/_synapse/admin/v1/register"
        nonce = requests.get(path, timeout=30 * PATIENCE).json()["nonce"]
        fields = [nonce, localpart, password, "admin" if admin else "notadmin"]
        mac = hmac.new(SHARED_SECRET.encode(), "\0".join(fields).encode(), hashlib.sha1)
        body = {
            "nonce": nonce,
            "username": localpart,
            "password": password,
            "admin": admin,
            "mac": mac.hexdigest(),
        }
        response = requests.post(path, json=body, timeout=30 * PATIENCE)
        assert response.ok, f"registering {localpart}: {response.status_code} {response.text}"
        account = response.json()
        return Client(self.base_url, account["user_id"], account["access_token"], password)

    def wait_full(self, room_id):
        wait_until(lambda: not self.is_partial(room_id), f"{room_id} is full", 60)


class Synapse(Server):
    def configure(self):
        unlimited = {"per_second": 9999, "burst_count": 9999}
        bind = {"bind_addresses": ["127.0.0.1"], "type": "http"}
        config = {
            "server_name": self.name,
            "public_baseurl": self.base_url,
            "report_stats": False,
            "pid_file": str(self.directory / "pid"),
            "log_config": str(self.directory / "log.json"),
            "signing_key_path": str(self.directory / "signing.key"),
            "macaroon_secret_key": "interop",
            "registration_shared_secret": SHARED_SECRET,
            "bcrypt_rounds": 4,
            "media_store_path": str(self.directory / "media"),
            "tls_certificate_path": str(self.certificates.certificate),
            "tls_private_key_path": str(self.certificates.key),
            "listeners": [
                {"port": self.client_port, **bind, "resources": [{"names": ["client"]}]},
                {
                    "port": self.federation_port,
                    "tls": True,
                    **bind,
                    "resources": [{"names": ["federation"]}],
                },
            ],
            "database": {
                "name": "sqlite3",
                "args": {"database": str(self.directory / "homeserver.db")},
            },
            "trusted_key_servers": [],
            "federation_custom_ca_list": [str(self.certificates.ca)],
            "federation_ip_range_blacklist": [],
            # In ms, so that a server that a test kills is soon tried again.
            "federation": {
                "destination_min_retry_interval": 100,
                "destination_max_retry_interval": 1000,
            },
            "presence": {"enabled": False},
            "rc_federation": {"reject_limit": 99999, "concurrent": 10, "sleep_limit": 9999},
            "rc_message": unlimited,
            "rc_login": {"address": unlimited, "account": unlimited, "failed_attempts": unlimited},
            "rc_joins": {"local": unlimited, "remote": unlimited},
            "rc_joins_per_room": unlimited,
            "rc_invites": {"per_room": unlimited, "per_user": unlimited, "per_issuer": unlimited},
            "rc_room_creation": unlimited,
        }
        log = {
            "version": 1,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(request)s %(message)s"}},
            "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
            "root": {"level": "INFO", "handlers": ["console"]},
            "disable_existing_loggers": False,
        }
        # JSON is YAML.
        (self.directory / "homeserver.yaml").write_text(json.dumps(config, indent=1))
        (self.directory / "log.json").write_text(json.dumps(log))
        seed = base64.b64encode(os.urandom(32)).decode().rstrip("=")
        (self.directory / "signing.key").write_text(f"ed25519 a_test {seed}\n")

    def command(self):
        config = str(self.directory / "homeserver.yaml")
        return [sys.executable, "-m", "synapse.app.homeserver", "--config-path", config]

    def is_partial(self, room_id):
        # Synapse tells nobody, so its database is asked.
        database = sqlite3.connect(f"file:{self.directory}/homeserver.db?mode=ro", uri=True)
        with contextlib.closing(database):
            query = "SELECT 1 FROM partial_state_rooms WHERE room_id = ?"
            return database.execute(query, (room_id,)).fetchone() is not None


def new_postgres_database():
    """The URL of an empty database of the PostgreSQL that `./dev` has started."""
    url = os.environ["VESTIBULE_TEST_POSTGRES"]
    name = f"crash_{os.getpid()}_{next(_fresh)}"
    # Debian keeps it out of PATH in some versions.
    psql = ["psql", *sorted(Path("/usr/lib/postgresql").glob("*/bin/psql"))][-1]
    subprocess.run([str(psql), "-q", "-c", f"CREATE DATABASE {name}", url], check=True)
    return url.rpartition("/")[0] + "/" + name


class Vestibule(Server):
    def __init__(self, directory, certificates, database=None):
        self.database = database or f"sqlite:{directory}/vestibule.db"
        super().__init__(directory, certificates)

    def configure(self):
        binary = os.environ.get("VESTIBULE_BINARY") or ROOT / "target/debug/vestibule"
        self.binary = Path(binary).resolve()
        assert self.binary.is_file(), f"{self.binary} is missing: cargo build"
        sections = {
            "server": {
                "name": self.name,
                "public_base_url": self.base_url,
                "signing_key_path": f"{self.directory}/signing.key",
            },
            "database": {"url": self.database},
            "media": {"path": f"{self.directory}/media"},
            "client": {"listen": [f"127.0.0.1:{self.client_port}"]},
            "federation": {
                "listen": [f"127.0.0.1:{self.federation_port}"],
                "tls_certificate": str(self.certificates.certificate),
                "tls_private_key": str(self.certificates.key),
                "allow_ip_ranges": ["127.0.0.0/8"],
                "trusted_key_servers": [],
                "extra_ca": str(self.certificates.ca),
            },
            "registration": {"mode": "closed", "shared_secret": SHARED_SECRET},
            "appservices": {"files": [f"{self.directory}/crowd.json"]},
            "limits": {"enabled": False},
            "log": {"level": os.environ.get("VESTIBULE_LOG", "info")},
        }
        lines = []
        for section, settings in sections.items():
            lines.append(f"[{section}]")
            # JSON's strings, arrays and booleans are TOML's.
            lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        (self.directory / "vestibule.toml").write_text("\n".join(lines) + "\n")
        crowd = {
            "id": "crowd",
            "url": None,
            "as_token": CROWD_TOKEN,
            "hs_token": "unused",
            "sender_localpart": "crowd",
            "namespaces": {"users": [{"exclusive": True, "regex": "@crowd-.*"}]},
        }
        # JSON is YAML.
        (self.directory / "crowd.json").write_text(json.dumps(crowd))
        self.admin = None

    def command(self):
        return [str(self.binary), "serve", "--config", str(self.directory / "vestibule.toml")]

    def crowd(self, room_id, count):
        """Users of an application service join a room, which takes no passwords and no devices."""
        client = Client(self.base_url, f"@crowd:{self.name}", CROWD_TOKEN, None)

        def join(n):
            localpart = f"crowd-{n}"
            kind = {"type": "m.login.application_service", "username": localpart}
            with contextlib.suppress(MatrixError):  # already there
                client.post("/register", kind)
            member = {"user_id": f"@{localpart}:{self.name}"}
            client.post(f"/rooms/{quote(room_id)}/join", query=member)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(join, range(count)))

    def joins(self):
        if self.admin is None:
            self.admin = self.user("admin", admin=True)
        return self.admin.call("GET", "/_vestibule/admin/v1/joins")["joins"]

    def is_partial(self, room_id):
        """From the newest join of the room."""
        states = [join["state"] for join in self.joins() if join["room_id"] == room_id]
        assert states, f"no join of {room_id} is listed"
        return any(state in ("usable", "resyncing") for state in states)


def subject_class():
    """The server under test. With INTEROP_SUBJECT=synapse it is a second Synapse, which shows
    whether the tests themselves are right."""
    return {"vestibule": Vestibule, "synapse": Synapse}[os.environ.get("INTEROP_SUBJECT", "vestibule")]
