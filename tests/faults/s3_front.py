"""A reverse proxy before an S3 server that can be slow, away, broken or rude; HTTP, one thread a request."""
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500 before", "500 after", "cut request", "cut reply")


class S3Front:
    """`http://127.0.0.1:{port}` -> upstream. What is wrong is set from outside, at any time.

    It also says when each upload in parts was really begun, and gives their list in pages: moto says 2010 and knows no pages.
    """
    def __init__(self, upstream: str):
        self.upstream, self.delay_s, self.port = upstream, 0.0, 0
        self.fault, self.times = "", 0                    # one of FAULTS, for so many requests that it fits
        self.fits: Callable[[str, str], bool] = lambda method, path: method == "PUT"
        self.page = 1000
        self.begun: dict[str, datetime] = {}              # upload id -> when
        self.seen: list[tuple[str, str, int]] = []        # method, path, status told; 0: none
        self.lock = threading.Lock()
        self.server: ThreadingHTTPServer | None = None
        self.up()

    @property
    def endpoint(self) -> str: return f"127.0.0.1:{self.port}"

    def up(self) -> None:
        "Listen, on the same port as before."
        if self.server: return
        handler = type("Handler", (Handler,), dict(front=self))
        self.server = Server(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def down(self) -> None:
        "Refuse connections, and end those that are open."
        if not self.server: return
        server, self.server = self.server, None
        server.shutdown()
        server.server_close()
        for s in list(server.open): reset(s)

    def next_fault(self, method: str, path: str) -> str:
        with self.lock:
            if not (self.fault and self.times and self.fits(method, path)): return ""
            self.times -= 1
            return self.fault

    def well(self) -> None: self.fault, self.times, self.delay_s = "", 0, 0.0


def reset(s: socket.socket) -> None:
    "Close with a reset, in the middle of whatever it does."
    try:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.shutdown(socket.SHUT_RDWR)
    except OSError: return


class Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

    def __init__(self, *args: Any):
        self.open: set[socket.socket] = set()
        super().__init__(*args)

    def handle_error(self, request: Any, client_address: Any) -> None: return  # a client that was killed


class Handler(BaseHTTPRequestHandler):
    front: S3Front
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        super().finish()

    def log_message(self, *args: Any) -> None: return

    def any(self) -> None:
        f, length = self.front, int(self.headers.get("Content-Length") or 0)
        fault = f.next_fault(self.command, self.path)
        time.sleep(f.delay_s)
        if fault == "cut request":
            self.rfile.read(length // 2)
            return self.cut()
        body = self.rfile.read(length)
        if len(body) < length: return self.cut()  # the client died
        if fault == "500 before": return self.tell(500, [], ERROR)
        status, headers, answer = self.forward(body)
        if fault == "500 after": return self.tell(500, [], ERROR)
        if fault == "cut reply": return self.tell(status, headers, answer, part=len(answer) // 2)
        return self.tell(status, headers, answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = any

    def cut(self) -> None:
        self.front.seen.append((self.command, self.path, 0))
        self.close_connection = True
        reset(self.connection)

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        c = HTTPConnection(self.front.upstream, timeout=60)
        try:
            c.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for k, v in self.headers.items():
                if k.lower() not in ("connection", "transfer-encoding"): c.putheader(k, v)
            c.endheaders(body or None)
            r = c.getresponse()
            answer = r.read()
        finally: c.close()
        if self.command == "POST" and (found := re.search(rb"<UploadId>(.+?)</UploadId>", answer)) and "uploads" in self.path:
            self.front.begun[found[1].decode()] = datetime.now(UTC)
        if self.command == "GET" and b"<ListMultipartUploadsResult" in answer: answer = self.paged(answer)
        return r.status, r.getheaders(), answer

    def paged(self, answer: bytes) -> bytes:
        "The list of uploads as a server gives it that keeps time and pages."
        marker = re.search(r"[?&]key-marker=([^&]*)", self.path)
        found = []
        for o in re.findall(rb"<Upload>.*?</Upload>", answer, re.S):
            key, id = (re.search(rb"<%s>(.*?)</%s>" % (t, t), o)[1].decode() for t in (b"Key", b"UploadId"))
            when = self.front.begun.get(id, datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%S.000Z").encode()
            found.append((key, re.sub(rb"<Initiated>.*?</Initiated>", b"<Initiated>" + when + b"</Initiated>", o)))
        after = marker[1].replace("%2F", "/") if marker else ""
        left = sorted(o for o in found if o[0] > after)
        page, more = left[:self.front.page], len(left) > self.front.page
        tail = f"<NextKeyMarker>{page[-1][0]}</NextKeyMarker>" if more else ""
        return (b'<?xml version="1.0"?><ListMultipartUploadsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                + f"<IsTruncated>{str(more).lower()}</IsTruncated>{tail}".encode()
                + b"".join(o for _, o in page) + b"</ListMultipartUploadsResult>")

    def tell(self, status: int, headers: list[tuple[str, str]], answer: bytes, part: int | None = None) -> None:
        self.front.seen.append((self.command, self.path, status))
        self.send_response_only(status)
        length = str(len(answer))
        for k, v in headers:
            if k.lower() == "content-length" and self.command == "HEAD": length = v
            elif k.lower() not in ("connection", "transfer-encoding", "content-length"): self.send_header(k, v)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(answer if part is None else answer[:part])
        if part is not None: self.cut()


ERROR = b"<Error><Code>InternalError</Code><Message>a test broke it</Message></Error>"
