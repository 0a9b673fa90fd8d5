"""A TLS proxy in front of a homeserver's federation port, which records requests and can hold
back, refuse or spoil chosen ones. Its port is the one in the homeserver's name, so that every other
server reaches the homeserver through it."""

import http.client
import http.server
import json
import re
import ssl
import threading
from dataclasses import dataclass


@dataclass
class Exchange:
    method: str
    path: str
    status: int
    response: bytes

    def json(self):
        return json.loads(self.response)


class Rule:
    """Applies to the requests whose path matches. `lift` ends it."""

    def __init__(self, proxy, pattern, *, hold=False, status=None, spoil=None, cut=False):
        self.proxy, self.pattern = proxy, re.compile(pattern)
        self.hold, self.status, self.spoil, self.cut = hold, status, spoil, cut
        self.hits = 0
        self.hit, self.lifted = threading.Event(), threading.Event()

    def lift(self):
        self.proxy.rules.remove(self)
        self.lifted.set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.lifted.is_set():
            self.lift()


class Proxy:
    HOLD_LIMIT = 120  # seconds; longer than any test waits

    def __init__(self, certificate, key):
        self.rules, self.exchanges = [], []
        self.upstream_port = None  # set once the server behind it has a port
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
        proxy = self

        class Handler(_Handler):
            def setup(self):
                # Here, and not around the listening socket, so that one slow handshake does
                # not keep other connections from being accepted.
                self.request = tls.wrap_socket(self.request, server_side=True)
                super().setup()

            def forward(self):
                proxy.forward(self)

            do_GET = do_POST = do_PUT = do_DELETE = forward

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        for rule in list(self.rules):
            rule.lift()
        self.server.shutdown()
        self.server.server_close()

    def hold(self, pattern):
        """Requests for matching paths wait until the rule is lifted."""
        return self.add(Rule(self, pattern, hold=True))

    def refuse(self, pattern, status=500):
        """Requests for matching paths are answered with an error."""
        return self.add(Rule(self, pattern, status=status))

    def spoil(self, pattern, change):
        """The server's answers for matching paths are what `change` makes of them (bytes)."""
        return self.add(Rule(self, pattern, spoil=change))

    def cut(self, pattern):
        """The server's answers for matching paths break off in the middle."""
        return self.add(Rule(self, pattern, cut=True))

    def add(self, rule):
        self.rules.append(rule)
        return rule

    def seen(self, pattern):
        """The finished requests whose path matches, oldest first."""
        return [e for e in list(self.exchanges) if re.search(pattern, e.path)]

    def forward(self, handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        rules = [rule for rule in list(self.rules) if rule.pattern.search(handler.path)]
        for rule in rules:
            rule.hits += 1
            rule.hit.set()
            if rule.status is not None:
                error = b'{"errcode": "M_UNKNOWN", "error": "refused by the test"}'
                return self.answer(handler, rule.status, [("Content-Type", "application/json")], error)
            if rule.hold:
                rule.lifted.wait(self.HOLD_LIMIT)
        try:
            tls = ssl._create_unverified_context()  # this machine, and a server we started
            upstream = http.client.HTTPSConnection(
                "127.0.0.1", self.upstream_port, timeout=self.HOLD_LIMIT, context=tls
            )
            upstream.putrequest(
                handler.command, handler.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in handler.headers.items():
                if name.lower() != "connection":
                    upstream.putheader(name, value)
            upstream.putheader("Connection", "close")
            upstream.endheaders(body)
            response = upstream.getresponse()
            content, status, headers = response.read(), response.status, response.getheaders()
            upstream.close()
        except (OSError, http.client.HTTPException):
            handler.close_connection = True  # the server is down: so is this connection
            return
        for rule in rules:
            content = rule.spoil(content) if rule.spoil else content
        self.answer(handler, status, headers, content, any(rule.cut for rule in rules))

    def answer(self, handler, status, headers, content, cut=False):
        self.exchanges.append(Exchange(handler.command, handler.path, status, content))
        handler.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if cut:
            content = content[: len(content) // 2]
            handler.close_connection = True
        handler.wfile.write(content)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # a peer that went away, as killed servers do
