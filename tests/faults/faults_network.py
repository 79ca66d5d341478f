"""A network between one of us and one server that drops, resets, swallows, delays and slices."""
import itertools
import random
import threading
import time
from collections.abc import Callable

from faults_processes import within_a_lease
from outage import Load, Submitter, pause
from proxy import MODES, Proxy
from run import fault
from world import World, wait_for

from myspinbot.store.artifacts import open_store
from myspinbot.api.client import Client
from myspinbot.core import ServiceUnavailable

BROKEN = [m for m in MODES if m != "pass"]
SERVERS = ("Redis", "PostgreSQL", "S3")


class Network:
    "Proxies before the servers of a world, and the settings of a process that stands behind them."
    def __init__(self, w: World, *servers: str):
        self.w, self.env = w, {}
        self.proxies: list[Proxy] = []
        for s in servers: getattr(self, s.lower())()
        w.heals.append(lambda: self.set("pass"))

    def proxy(self, server: object) -> int:
        self.proxies.append(p := Proxy(server, seed=self.w.report.seed))
        self.w.ends.append(p.close)
        return p.port

    def redis(self) -> None:
        self.env["SPIN_REDIS_URL"] = f"redis://127.0.0.1:{self.proxy(self.w.servers.redis_socket())}/0"

    def postgresql(self) -> None:
        port = self.proxy(self.w.servers.postgres_socket())
        self.env["SPIN_POSTGRES_URL"] = f"postgresql://postgres@127.0.0.1:{port}/myspinbot"

    def s3(self) -> None:
        "A bucket for the whole world; only who has `env` goes through the proxy."
        from moto.server import ThreadedMotoServer
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        self.w.ends.append(server.stop)
        def url(port: int) -> str: return f"s3://key:secret@127.0.0.1:{port}/spin?secure=false"
        port = server.get_host_and_port()[1]
        self.w.farm.env["SPIN_STORE_URL"] = url(port)
        self.w.client.store = open_store(url(port), self.w.home / "fetched")
        self.env["SPIN_STORE_URL"] = url(self.proxy(("127.0.0.1", port)))

    def set(self, mode: str, share: float | None = None) -> None:
        for p in self.proxies: p.set(mode, share)

    def client(self) -> Client:
        "A client behind the proxies."
        cfg = {k.removeprefix("SPIN_").lower(): v for k, v in self.env.items()}
        c = Client(self.w.farm.cfg.changed(**cfg), self.w.client.catalogue)
        self.w.ends.append(c.close)
        return c

    def trouble(self, rng: random.Random) -> None:
        "Three of the faults for a while each, sometimes for a part of the connections only; three seeds show all."
        first = 3 * self.w.report.seed
        for mode in rng.sample([BROKEN[(first + k) % len(BROKEN)] for k in range(3)], 3):
            self.set(mode, rng.choice([None, None, 0.5]))
            pause(rng, 1.0, 4.0)
            self.set("pass")
            pause(rng, 0.2, 1.0)


def behind(who: str, server: str, short: bool = False) -> None:
    "One process behind a network that breaks; the others reach all servers."
    @fault(f"network: {who} and {server}", short=short)
    def scenario(w: World, rng: random.Random) -> None:
        net = Network(w, server)
        if who == "conductor": w.start("control", **net.env)
        if who == "worker":
            w.start("control")
            w.start("w1", **net.env)
        client = net.client() if who == "client" else None
        with Load(w, once=(who, server) != ("worker", "PostgreSQL")):
            if client and server == "S3": stores_through(w, client, lambda: net.trouble(rng))
            elif client: submits_through(w, client, lambda: net.trouble(rng))
            else: net.trouble(rng)
        if who == "worker": comes_back(w, "w1")


def submits_through(w: World, client: Client, trouble: Callable[[], None]) -> None:
    "Submit through a broken network; each key is one job, whatever was answered."
    s = Submitter(w, client)
    s.start()
    trouble()
    s.end()
    keys = w.client.journal.rows("SELECT idempotency_key AS key, count(*) AS n FROM job GROUP BY 1 HAVING count(*) > 1")
    for r in keys: w.violate(f"{r['n']} jobs for the key {r['key']}")


def stores_through(w: World, client: Client, trouble: Callable[[], None]) -> None:
    "Store and read files through a broken network: each call ends, by the right bytes or by a clear error."
    ends, done = threading.Event(), []
    def go() -> None:
        for k in itertools.count():
            if ends.is_set(): return
            data = f"{k} ".encode() * 20_000
            try:
                with client.store.open(client.store.put_bytes(data, name=f"{k}.txt")) as f: done.append(f.read() == data)
            except ServiceUnavailable: pass
            except Exception as e: w.violate(f"storing a file raised {e!r}")
            time.sleep(0.05)
    t = threading.Thread(target=go, daemon=True)
    t.start()
    trouble()
    before = len(done)
    wait_for("files are stored again", lambda: len(done) > before + 1, 90)
    ends.set()
    t.join(60)
    if t.is_alive(): w.violate("storing a file has had no end for 60 s")
    if not all(done): w.violate("a file came back with other bytes")


def comes_back(w: World, name: str) -> None:
    "The others go; this worker takes work again without a restart."
    others = [n for n in w.procs if not n.startswith("control") and n != name]
    w.stop(*others)
    at = time.time()
    job = w.submit(w.chain(1))
    wait_for(f"{name} works again", lambda: w.client.job(job).status == "succeeded", 60)
    w.report.recovery_s.append(time.time() - at)
    if (by := w.row(job, "s0").worker) != name: w.violate(f"{by} did the work of {name}")
    def keeps_a_step() -> bool:
        "Its heartbeat works, too: a step of two leases is run once."
        return w.client.wait(long := w.submit(w.chain(1, seconds=2 * w.lease_s)), 60) and w.row(long, "s0").attempt == 1
    wait_for(f"{name} keeps a long step", keeps_a_step, 60)


for _who in ("worker", "client", "conductor"):
    for _server in SERVERS:
        behind(_who, _server, short=(_who, _server) == ("client", "PostgreSQL"))


@fault("network: a black-holed worker is fenced", short=True)
def fenced(w: World, rng: random.Random) -> None:
    net, gate = Network(w, "Redis", "PostgreSQL"), w.home / "gate"
    w.start("control")
    w.start("w1", **net.env)
    job = w.submit(w.chain(2, gate=str(gate)))
    w.at_work(job, "s0")
    pause(rng, 0.0, 1.0)
    w.start("w2")
    net.set(rng.choice(["hole", "hole", "mute"]))
    since = time.time()
    w.at_work(job, "s0", 2)
    within_a_lease(w, since)
    gate.touch()                     # both attempts end now; only the second may write
    w.quiet()
    net.set("pass")
    wait_for("the first attempt is refused", lambda: "refused" in w.farm.log("w1") or "step stopped" in w.farm.log("w1"))
    row = w.row(job, "s0")
    if (row.attempt, row.worker) != (2, "w2"): w.violate(f"s0 shows attempt {row.attempt} of {row.worker}")
    comes_back(w, "w1")
