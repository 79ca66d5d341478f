"""A TCP proxy that a scenario puts before a server, and that breaks as networks do; switched while it runs.

pass     nothing is wrong
drop     connections are closed, new ones as well
reset    the same, by RST
hole     connections are accepted and stay open, and nothing comes through
mute     requests vanish, replies pass
deaf     requests pass, replies vanish
slow     each piece of data comes late
slice    data comes in pieces of 1 to 7 bytes

A connection that lost bytes stays dead after the proxy is healed, without any sign: its ends must find out by themselves.
"""
import asyncio
import random
import socket
import struct
import threading
from pathlib import Path
from typing import Any

LOSES = dict(hole=("up", "down"), mute=("up",), deaf=("down",))
MODES = ("pass", "drop", "reset", *LOSES, "slow", "slice")


class Pair:
    "One connection of a client, with its own to the server."
    def __init__(self, client: asyncio.StreamWriter):
        self.writers, self.lost = [client], set()  # directions in which bytes were lost
        self.mode: str | None = None               # None: the proxy's

    def close(self, reset: bool = False) -> None:
        for w in self.writers:
            if reset:
                s = w.get_extra_info("socket")
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                w.transport.abort()
            else: w.close()


class Proxy:
    "Listens on a port of its own and passes all on to one server: (host, port), or the path of a Unix socket."
    def __init__(self, server: tuple[str, int] | Path, latency_s: float = 2.0, seed: int = 0):
        self.server, self.latency_s, self.rng = server, latency_s, random.Random(seed)
        self.mode, self.pairs, self.seen = "pass", set(), 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="proxy", daemon=True)
        self.thread.start()
        self.listener = self.call(asyncio.start_server(self.serve, "127.0.0.1", 0))
        self.port: int = self.listener.sockets[0].getsockname()[1]

    def call(self, coroutine: Any) -> Any: return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def set(self, mode: str, share: float | None = None) -> None:
        "Switch; with a share, only that part of the connections that are open now, and new ones pass."
        if mode not in MODES: raise ValueError(f"No mode {mode!r}; there are {', '.join(MODES)}.")
        self.call(self.switch(mode, share))

    def to(self, server: tuple[str, int] | Path) -> None:
        "Move the address to another server; connections to the old one are reset."
        async def move() -> None:
            self.server = server
            for p in list(self.pairs): p.close(reset=True)
        self.call(move())

    async def switch(self, mode: str, share: float | None) -> None:
        if share is None: self.mode = mode
        for p in list(self.pairs):
            if share is not None and self.rng.random() > share: continue
            p.mode = None if share is None else mode
            if mode in ("drop", "reset"): p.close(mode == "reset")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        "One connection of a client, to its end."
        pair, self.seen = Pair(writer), self.seen + 1
        if self.mode in ("drop", "reset"): return pair.close(self.mode == "reset")
        self.pairs.add(pair)
        try:
            opened = (asyncio.open_unix_connection(str(self.server)) if isinstance(self.server, Path)
                      else asyncio.open_connection(*self.server))
            server_reader, server_writer = await opened
            pair.writers.append(server_writer)
            await asyncio.gather(self.pump(pair, "up", reader, server_writer), self.pump(pair, "down", server_reader, writer))
        except (OSError, asyncio.CancelledError): pass
        finally:
            pair.close()
            self.pairs.discard(pair)

    async def pump(self, pair: Pair, way: str, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            mode = pair.mode or self.mode
            if way in LOSES.get(mode, ()): pair.lost.add(way)
            if way in pair.lost: continue
            if mode == "slow": await asyncio.sleep(self.latency_s)
            while mode == "slice" and data:
                n = self.rng.randint(1, 7)
                target.write(data[:n])
                await target.drain()
                await asyncio.sleep(0)
                data = data[n:]
            target.write(data)
            await target.drain()
        if pair.lost: await asyncio.Event().wait()  # the end of a connection is not heard through a hole, either
        pair.close()

    def close(self) -> None:
        "End everything."
        async def end() -> None:
            self.listener.close()
            for p in list(self.pairs): p.close()
            for t in asyncio.all_tasks() - {asyncio.current_task()}: t.cancel()
            await asyncio.sleep(0)
        self.call(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    def __enter__(self) -> "Proxy": return self
    def __exit__(self, *_: Any) -> None: self.close()
