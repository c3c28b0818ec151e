"""uvicorn's connections with limits: nobody holds one without asking for something, and no fault fills the log."""

import logging
import math
import resource
import time

import uvicorn
import websockets  # noqa: F401  uvicorn finds it only when a connection asks for it
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS = 10  # seconds for a request's headers
BODY = 60  # seconds for its body
LARGEST_MESSAGE = 2**20  # bytes of one that comes by a WebSocket
SELDOM = 10  # seconds between two lines of the same message


class Connection(H11Protocol):
    """A connection that is closed if its request does not come. Where there are too many, the oldest such one goes."""

    most = 1024  # connections
    since, timer = 0.0, None  # when it began to wait for the client; what closes it
    begun = None  # the request whose body it waits for

    def wait(self, seconds):
        self.stop_waiting()
        self.since, self.timer = self.loop.time(), self.loop.call_later(seconds, self.transport.abort)

    def stop_waiting(self):
        if self.timer:
            self.timer.cancel()
        self.timer = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self.wait(HEADERS)
        if len(self.connections) > self.most:
            idle = [other for other in self.connections if getattr(other, "timer", None)]  # WebSockets have none
            oldest = min(idle, key=lambda other: other.since)
            oldest.stop_waiting()  # it is gone only later: do not find it again
            oldest.transport.abort()

    def connection_lost(self, exc):
        self.stop_waiting()
        super().connection_lost(exc)

    def handle_events(self):
        super().handle_events()
        if self.cycle is None or self.cycle.response_complete:
            return
        if not self.cycle.more_body:
            self.stop_waiting()
        elif self.cycle is not self.begun:
            self.begun = self.cycle
            self.wait(BODY)

    def handle_websocket_upgrade(self, event):
        self.stop_waiting()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self):
        self.wait(HEADERS)
        super().on_response_complete()  # which may take the next request that came along


class Seldom(logging.Filter):
    """Lets a message through once in SELDOM seconds, and then says how many were like it."""

    def __init__(self):
        super().__init__()
        self.seen = {}  # message -> when it was let through, how many since

    def filter(self, record):
        message, now = str(record.msg).partition("\n")[0], time.monotonic()
        last, n = self.seen.get(message, (-math.inf, 0))
        if now - last < SELDOM:
            self.seen[message] = last, n + 1
            return False
        if len(self.seen) > 100:
            self.seen.clear()
        self.seen[message] = now, 0
        if n:
            record.msg = f"{record.msg} ({n} more like it)"
        return True


def configure(app, grace):
    """The uvicorn.Config of an application: as many connections as there are descriptors for, and deadlines."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        descriptors = 2048
    Connection.most = max(16, min(1024, descriptors // 2))
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(Seldom())
    return uvicorn.Config(
        app,
        http=Connection,
        ws="websockets-sansio",
        ws_max_size=LARGEST_MESSAGE,
        ws_per_message_deflate=False,  # little text goes in, and sound does not get smaller
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=grace,
        limit_concurrency=Connection.most * 5 // 4,
        backlog=Connection.most // 4,
    )
