"""Many schedules of a whole installation in one thread: `python tests/faults/simulate.py --schedules 100000 --seed 1`.

Real: `Worker` and `Conductor` with all their loops and threads, `Waiter`, the reconciler, `Plan`, `Client`, control steps, and
`MemoryBridge`. Stand-ins: the journal (`memory_journal.py`, compared with PostgreSQL in a test of its own), the notebook's run,
the store, and LangGraph, whose place a loop over `Plan` takes. Every call to a server may be late, lost, repeated, or the caller's
last.
"""
import argparse
import importlib
import sys
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]

from greenlet import getcurrent
from memory_journal import MemoryJournal
from virtual import Asyncio, Event, Fiber, Pool, Process, Threading, Time, World

from myspinbot.bridge.memory import MemoryBridge
from myspinbot.graph.catalogue import approve
from myspinbot.api.client import Client
from myspinbot.jobs import conductor
from myspinbot.jobs.conductor import Conductor
from myspinbot.core import Cancelled, Conflict, KernelDied, NotFound, ServiceUnavailable, Settings, StepFailed, hash_json
from myspinbot.executor.attempt import StepResult
from myspinbot.graph.plan import Plan, Result, Task
from myspinbot.schema import JOB_END, STEP_END, Artifact, Condition, Graph, Node, ParamRef, Port, PortRef, StepSpec
from myspinbot.jobs.worker import Worker

LEASE, SCAN = 3.0, 1.0
CFG = Settings(home=Path("/nowhere"), lease_s=LEASE, scan_s=SCAN, queues=("cpu", "gpu"), slots=2)
ANY = tuple(Port(name=n, type="any") for n in ("a", "b"))
SPECS = {s.id: s for s in (
    StepSpec(id="sim.work", inputs=ANY, outputs={"value": "any"}, source_hash="1" * 64, cache=False),
    StepSpec(id="sim.render", inputs=ANY, outputs={"value": "any"}, source_hash="2" * 64, cache=False, queue="gpu", retries=2),
    StepSpec(id="sim.again", inputs=ANY, outputs={"value": "any"}, source_hash="3" * 64, retries=0),
    StepSpec(id="sim.think", inputs=ANY, outputs={"value": "any"}, source_hash="4" * 64, kind="control", retries=1, cache=False),
    StepSpec(id="flow.approve", inputs=[Port(name="prompt", type="str", required=True), Port(name="show", type="any")],
             outputs={"approved": "bool"}, source_hash="5" * 64, kind="control", cache=False, timeout_s=86400))}
NOTEBOOK = Artifact(sha256="b" * 64, size=1, media_type="application/x-ipynb+json", name="run.ipynb")


def graphs() -> list[Graph]:
    "One to four steps in the shapes that matter."
    out, text = (lambda node, port="value": PortRef(node=node, port=port)), ParamRef(name="text")
    def graph(name: str, *nodes: Node, last: str = "") -> Graph:
        return Graph(name=name, params=[Port(name="text", type="any", default="x"),
                                        Port(name="list", type="any", default=["x", "y"])],
                     nodes=nodes, outputs={"value": out(last or nodes[-1].id)})
    work = Node(id="one", step="sim.work", inputs={"a": text})
    return [
        graph("single", work),
        graph("chain", work, Node(id="two", step="sim.render", inputs={"a": out("one")})),
        graph(
            "cached",
            Node(id="one", step="sim.again", inputs={"a": text}),
            Node(id="two", step="sim.work", inputs={"a": out("one")}),
        ),
        graph(
            "diamond",
            work,
            Node(id="two", step="sim.render", inputs={"a": out("one")}),
            Node(id="three", step="sim.think", inputs={"a": out("one")}),
            Node(id="four", step="sim.work", inputs={"a": out("two"), "b": out("three")}),
        ),
        graph(
            "mapped",
            Node(id="each", step="sim.work", inputs={"a": ParamRef(name="list")}, each=("a",)),
            Node(id="all", step="sim.think", inputs={"a": out("each")}),
        ),
        graph(
            "asks",
            work,
            Node(id="ask", step="flow.approve", inputs={"prompt": "ok?", "show": out("one")}),
            Node(id="two", step="sim.render", inputs={"a": out("one")}, after=("ask",)),
        ),
        graph(
            "skips",
            work,
            Node(id="two", step="sim.work", inputs={"a": text}, on_failure="skip"),
            Node(id="three", step="sim.render", inputs={"a": out("two")}),
            Node(id="four", step="sim.work", when=Condition(ref=text, op="falsy"), inputs={"a": text}),
            last="one",
        ),
    ]


GRAPHS = graphs()


# --- stand-ins

class SimBridge(MemoryBridge):
    "The bridge's twin, and what can happen to a Redis."
    drop = 0.0  # chance that a hint is lost

    def _tell(self, channel: str, data: bytes) -> None:
        if self._world.random.random() >= self.drop: super()._tell(channel, data)
    def hint_jobs(self, job: str) -> None:
        if self._world.random.random() >= self.drop: super().hint_jobs(job)

    def flush(self) -> None: self._fresh, self._held, self._jobs = {}, {}, {}

    def save(self) -> Any:
        return {s: dict(o) for s, o in self._fresh.items()}, {s: {i: list(x) for i, x in o.items()} for s, o in self._held.items()}
    def restore(self, old: Any) -> None: self._fresh, self._held = old

    def regroup(self) -> None:
        "XGROUP DESTROY: the group is made again at 0, so all that stands on the stream is delivered again."
        for s, held in self._held.items():
            self._fresh[s] = {id: o[2] for id, o in held.items()} | self._fresh.get(s, {})
            held.clear()

    def lose(self) -> None:
        "XDEL or XTRIM by somebody: an entry is gone, delivered or not."
        if found := [(d, s, id) for d in (self._fresh, self._held) for s in d for id in d[s]]:
            d, s, id = self._world.random.choice(found)
            del d[s][id]

    def duplicate(self) -> None:
        "An entry stands there twice."
        found = [(s, o) for s, d in self._fresh.items() for o in d.values()]
        if found := found + [(s, o[2]) for s, d in self._held.items() for o in d.values()]:
            self._add(*self._world.random.choice(found))

    def empty(self) -> bool: return not any(self._fresh.values()) and not any(self._held.values())


class Store:
    "An object store: a control step's notebook goes there."
    def put_bytes(self, data: bytes, media_type: str, name: str) -> Artifact: return NOTEBOOK
    def keep(self, sha256: str) -> int: return NOTEBOOK.size
    def put_file(self) -> Artifact: return NOTEBOOK


class Silent:
    "Events and log of the product: decoration, not told here."
    def __getattr__(self, name: str) -> Callable: return self.ignore
    def ignore(self, *args: Any, **kw: Any) -> None: pass


SILENT = Silent()
TRIES = dict(journal=3, redis=2, store=1)  # the clients' own repeats on a broken connection
ONCE = {"read", "read_jobs"}               # but not of a blocking read


class Wire:
    "A server as one process sees it: each call may be late, lost on its way there or back, repeated, or the last one."
    def __init__(self, sim: "Sim", process: Process, server: str, target: Any):
        self.sim, self.process, self.server, self.target = sim, process, server, target

    def __getattr__(self, name: str) -> Callable:
        fn, tries = getattr(self.target, name), 1 if name in ONCE else TRIES[self.server]
        if not name.startswith("follow"):
            raw, sim, p, server = fn, self.sim, self.process, self.server
            def fn(*args: Any, **kw: Any) -> Any: return sim.call(p, server, name, tries, raw, args, kw)
            fn.__name__ = name
        self.__dict__[name] = fn
        return fn


class Catalogue:
    "The steps of the simulation."
    def __init__(self, sim: "Sim"): self.sim = sim
    def steps(self) -> dict[str, StepSpec]: return SPECS
    def step(self, id: str) -> StepSpec: return SPECS[id]
    def code(self, id: str, learned: dict | None = None, here: bool = False) -> tuple[str, dict]:
        parts = dict(notebook=SPECS[id].source_hash, modules={}, scripts={}, files={}, packages={})
        return hash_json(parts), parts
    def control(self, id: str) -> Callable[..., Awaitable[dict]]: return approve if id == "flow.approve" else self.think
    async def think(self, ctx: Any, a: Any = None, b: Any = None) -> dict[str, Any]:
        sim = self.sim
        await sim.asyncio.sleep(sim.random.random())
        kind = sim.script(ctx.job, ctx.key)
        if kind == "broken": raise StepFailed("scripted")
        if kind == "flaky" and sim.random.random() < 0.5: raise KernelDied("scripted")
        return dict(value=f"{ctx.key}!{sim.random.random():.6f}")


class Executor:
    "Runs a step: takes time, listens to a stop, ends as the job's script says."
    def __init__(self, sim: "Sim", store: Wire): self.sim, self.process, self.store = sim, getcurrent().process, store

    def sweep(self) -> None: pass

    def run(self, spec: StepSpec, inputs: dict, context: Any, on_event: Callable, should_stop: Callable) -> StepResult:
        sim, job, key, attempt = self.sim, context.job, context.key, context.attempt
        kind, w = sim.script(job, key), sim.world
        sim.ran.append((job, key, attempt, self.process.name, w.now))
        sim.trace("run", f"{job} {key} attempt {attempt}: {kind}")
        end = w.now + sim.random.random() * (1.2 if kind != "long" else 3 * LEASE)
        while w.now < end:
            w.park(min(0.4, end - w.now))
            if why := should_stop(): return StepResult("cancelled", error=Cancelled(f"Stopped: {why}."))
        self.must_be_mine(job, key, attempt)
        if kind == "poison": sim.crash(self.process, "poison")
        if kind == "broken": return StepResult("failed", error=StepFailed("scripted"))
        if kind == "flaky" and sim.random.random() < 0.6: return StepResult("failed", error=KernelDied("scripted"))
        try: self.store.put_file()
        except ServiceUnavailable as e: return StepResult("failed", error=e)
        value = "\0" if kind == "unstorable" else f"{key}#{attempt}@{self.process.name}"
        return StepResult("succeeded", dict(value=value), NOTEBOOK)


    def must_be_mine(self, job: str, key: str, attempt: int) -> None:
        "A run comes to its own end only when it is wanted, or was until a moment ago."
        sim, now = self.sim, self.sim.world.now
        if sim.journal.mine(job, key, attempt): return
        over = next(e["seen"] for e in sim.journal.told if (e["job"], e["key"]) == (job, key)
                    and e["body"].get("attempt", 0) >= attempt
                    and (e["body"]["attempt"], e["body"]["status"]) != (attempt, "running"))
        if now - over > LEASE and not explained(sim, self.process.name, now - LEASE, now):
            sim.violations.append(f"I3: attempt {attempt} of {job}/{key} ran on for {now - over:.1f} s after it was over")


async def run_graph(graph: Graph, params: dict, execute: Callable[[Task], Awaitable[Result]]) -> dict[str, Result]:
    "`workflow.run_graph` without LangGraph around it."
    aio, plan, results = conductor.asyncio, Plan(graph, params), {}
    running = {aio.create_task(execute(t)): t.key for t in plan.start()}
    try:
        while running:
            done, _ = await aio.wait(running, return_when=aio.FIRST_COMPLETED)
            for f in done:
                key = running.pop(f)
                results[key] = f.result()
                running |= {aio.create_task(execute(t)): t.key for t in plan.apply(key, results[key])}
    finally:
        for f in running: f.cancel()
    return results


SIMULATED = ("bridge.streams", "bridge.memory", "jobs.worker", "jobs.waiting", "jobs.workflow", "jobs.conductor")


# --- one schedule

CLAIMS = ("claim_step", "lease_jobs")
KINDS = ("ok",) * 11 + ("long",) * 4 + ("flaky",) * 3 + ("broken", "poison", "unstorable")
FAULTS = (
    "crash",
    "crash",
    "stop",
    "freeze",
    "freeze",
    "cut",
    "flush",
    "restore",
    "regroup",
    "lose",
    "duplicate",
    "down",
    "down",
    "clock",
    "noise",
    "jump",
)


class Sim:
    "An installation, its users and its nemesis."
    def __init__(self, seed: int, tell: Callable[[str], None] | None = None):
        self.seed, self.tell = seed, tell
        self.world = World(seed)
        self.random, self.ids = self.world.random, 0
        self.asyncio, self.threading = Asyncio(self.world), Threading(self.world)
        self.journal = MemoryJournal(lambda: self.world.now + self.shift, lambda: self.world.now)
        self.journal.new_id = self.new_id
        self.catalogue, self.store = Catalogue(self), Store()
        self.live: dict[str, tuple[Process, Event, Any]] = {}     # workers and conductors by name
        self.ran: list[tuple[str, str, int, str, float]] = []     # the witness
        self.scripts: dict[tuple[str, str], str] = {}
        self.accepted: dict[str, str] = {}                        # idempotency key -> job, as a user was told
        self.keys: dict[str, dict] = {}                           # all that users asked for
        self.asked: list[tuple[float, str, str]] = []             # cancel and retry that were answered
        self.troubles: dict[str, list[tuple[float, float, str]]] = {}  # process name, or "" for everybody -> spans, what
        self.counts, self.violations = Counter(), []
        self.down: dict[str, float] = {}                          # server -> until
        self.users, self.healed, self.shift = 0, False, 0.0  # shift: how wrong the database's clock is
        r = self.random
        self.calm = r.random() < 0.1
        self.lost = 0.0 if self.calm else r.choice((0, 0, 0.003, 0.02, 0.1))       # of each call, there and back
        self.dying = 0.0 if self.calm else r.choice((0, 0, 0.001, 0.004))          # of each call, before and after
        self.slow = 0.0 if self.calm else r.choice((0, 0, 0.002, 0.02))            # of each call: up to two leases
        self.unanswered = r.choice((0, 0.3)) if self.calm else 0                   # of each claim, back: nothing else is wrong
        self.noise: dict[str, float] = {}                                          # process -> lost calls, for a while

    def new_id(self, kind: str = "job") -> str:
        self.ids += 1
        return f"{kind}_{self.ids}"

    def script(self, job: str, key: str) -> str:
        "How this step behaves, in all its attempts."
        if (job, key) not in self.scripts: self.scripts[job, key] = self.random.choice(KINDS)
        return self.scripts[job, key]

    def trace(self, what: str, text: str = "") -> None:
        if self.tell:
            f = getcurrent()
            self.tell(f"{self.world.now:8.3f} {f.process.name if isinstance(f, Fiber) else '':10} {what:16} {text}")

    def trouble(self, name: str, seconds: float = 0.0, what: str = "") -> None:
        self.troubles.setdefault(name, []).append((self.world.now, self.world.now + seconds, what))

    def call(self, p: Process, server: str, name: str, tries: int, fn: Callable, args: tuple, kw: dict) -> Any:
        "One call of a process to a server."
        w, r = self.world, self.random
        for left in range(tries - 1, -1, -1):
            delay = r.random() * 0.004
            if self.slow and r.random() < self.slow:
                delay = r.random() * 2 * LEASE
                self.trouble(p.name, delay)
            w.park(delay)
            if self.dying and r.random() < self.dying: self.crash(p, f"before {name}")
            lost = self.noise.get(p.name, self.lost)
            away = self.down.get(server, 0) > w.now or self.down.get(server + p.name, 0) > w.now
            if away or (lost and r.random() < lost):
                self.trouble(p.name)
                self.trace("no request", name)
            else:
                result = fn(*args, **kw)
                if self.tell: self.trace(name, f"{args} {kw or ''} -> {result}"[:300])
                if self.dying and r.random() < self.dying: self.crash(p, f"after {name}")
                if self.unanswered and name in CLAIMS: lost = self.unanswered
                if not (lost and r.random() < lost): return result
                self.counts["lost replies"] += 1
                self.trouble(p.name, what=name)
                self.trace("no reply", name)
            if left and r.random() < 0.7: continue
            if left:  # connecting again takes a while
                self.trouble(p.name, delay := r.random() * 2 * LEASE)
                w.park(delay)
                continue
            raise ServiceUnavailable(f"{server} does not answer {name}.")
        raise AssertionError("not reached")

    def wires(self, p: Process) -> list[Any]:
        return [Wire(self, p, "journal", self.journal), Wire(self, p, "redis", self.bridge), SILENT,
                Wire(self, p, "store", self.store),
                self.catalogue]

    def start(self, name: str) -> None:
        "Start a worker or conductor."
        p = Process(name)
        if not self.calm and self.random.random() < 0.2:
            p.rate, p.shift = self.random.choice((0.5, 1.5)), self.random.choice((-86400, 3600))

        def main() -> None:
            stop = Event(self.world)
            thing = Worker(*self.wires(p), name, CFG, drain_s=0.4) if name[0] == "w" else Conductor(*self.wires(p), name, CFG)
            self.live[name] = p, stop, thing
            thing.run(stop)
            self.trace("exit")
            if self.live.get(name, [None])[0] is p: del self.live[name]
        self.live[name] = p, None, None
        self.world.spawn(p, main, self.random.random() * 0.2)

    def crash(self, p: Process, why: str) -> None:
        "SIGKILL, and a restart by whoever watches: under the old name, or under a new one."
        if p.dead or p.name not in self.live or self.live[p.name][0] is not p: return
        self.trace("CRASH", f"{p.name} {why}")
        self.counts["crashes"] += 1
        self.trouble(p.name)
        self.live.pop(p.name)
        self.again(p.name)
        self.world.kill(p)

    def again(self, name: str) -> None:
        self.ids += 1
        new = name if self.random.random() < 0.7 else f"{name[0]}{self.ids}"
        self.world.spawn(self.nobody, lambda: self.start(new), self.random.random() * 4)

    # --- the nemesis

    def nemesis(self) -> None:
        r, w = self.random, self.world
        for at in sorted(r.random() * 5 for _ in range(0 if self.calm else 1 + r.randrange(6))):
            w.sleep(at - w.now)
            what, targets = r.choice(FAULTS), [o for o in self.live.values() if o[2] is not None]
            if not targets: continue
            busy = [o for o in targets if getattr(o[2], "running", None) or getattr(o[2], "jobs", None)]
            p, stop, _ = r.choice(busy if busy and r.random() < 0.7 else targets)
            self.trace("FAULT", f"{what} {p.name}")
            self.counts[what] += what != "crash"
            self.fault(what, p, stop)
        w.sleep(1)
        self.trace("HEALED")
        self.lost = self.dying = self.slow = self.bridge.drop = 0.0
        self.noise, self.down, self.healed = {}, {}, True
        for p, *_ in self.live.values(): p.frozen_until = 0.0

    def fault(self, what: str, p: Process, stop: Event) -> None:
        r, w, seconds = self.random, self.world, self.random.random() * 3 * LEASE
        if what == "crash": self.crash(p, "by the nemesis")
        elif what == "stop":
            self.trouble(p.name, 60, "stop")
            stop.set()
            self.again(p.name) if r.random() < 0.5 else w.spawn(self.nobody, lambda: self.start(f"{p.name}x"), 0.1)
        elif what == "freeze":
            p.frozen_until = w.now + seconds
            self.trouble(p.name, seconds)
        elif what in ("cut", "noise"):
            if what == "noise": self.noise[p.name] = 0.4
            else: self.down[r.choice(("journal", "redis", "store")) + p.name] = w.now + seconds
            self.trouble(p.name, seconds if what == "cut" else 60)
        elif what == "down":
            self.down[r.choice(("journal", "redis", "store"))] = w.now + seconds
            self.trouble("", seconds)
        elif what == "restore":
            old = self.bridge.save()
            w.spawn(self.nobody, lambda: self.bridge.restore(old), seconds / 3)
        elif what == "jump":  # set back by less than MAX_LEASE_S, it would keep a dead holder's lease for as long
            self.shift += r.choice((-86400, 3600, 86400))
            self.trouble("", 2 * LEASE, "jump")  # who starts just then cannot know; a takeover is fenced
        elif what == "clock": p.rate, p.shift = r.choice((0.5, 1.0, 1.5)), r.choice((-86400, 3600, 86400))
        else: getattr(self.bridge, what)()

    # --- users

    def user(self, i: int) -> None:
        "Submits, perhaps twice, perhaps cancels, retries, answers; says it again when there was no answer."
        r, w = self.random, self.world
        c, p = Client.__new__(Client), getcurrent().process
        c.journal, c.bridge, c.events, c.store, c.catalogue = self.wires(p)
        c.cfg, key = CFG, f"k{r.randrange(3)}"
        asked = self.keys.setdefault(key, dict(pipeline=r.choice(GRAPHS), params=dict(text=r.choice("xyz"))))
        w.sleep(r.random() * 2)
        job = self.insist(lambda: c.submit(**asked, idempotency_key=key)).id
        if self.accepted.setdefault(key, job) != job: self.violations.append(f"key {key} is job {self.accepted[key]} and {job}")
        for _ in range(r.choice((0, 0, 1, 2, 3, 8))):
            w.sleep(r.choice((0.0, 0.01, 1.0, 3.0)) * r.random())
            what = r.choice((c.cancel, c.cancel, c.retry))
            try: got = self.insist(lambda: what(job))  # noqa: B023
            except Conflict: continue
            if got.status == ("cancelled" if what == c.cancel else "queued"): self.asked.append((w.now, got.status, job))
        while not all(j["status"] in JOB_END for j in self.journal.job_rows.values()):
            w.sleep(0.3 + r.random())
            for (j, k), a in list(self.journal.approvals.items()):
                if a["approved"] is None and r.random() < 0.5:
                    try: self.insist(lambda: c.approve(j, k, r.random() < 0.8))  # noqa: B023
                    except (Conflict, NotFound): pass
        self.users -= 1

    def insist(self, fn: Callable) -> Any:
        while True:
            try: return fn()
            except ServiceUnavailable: self.world.sleep(0.3)

    # --- the whole

    def quiet(self) -> bool:
        "Nothing is left to do."
        return (
            self.healed
            and self.users == 0
            and self.bridge.empty()
            and len(self.live) >= 2
            and all(
                o[2] is not None and not getattr(o[2], "entries", None) and not getattr(o[2], "jobs", None)
                for o in self.live.values()
            )
        )

    def watch(self) -> None:
        while not self.quiet(): self.world.sleep(0.25)
        self.ended = True

    def run(self) -> "Sim":
        w, self.nobody, self.ended = self.world, Process(""), False
        new = dict(asyncio=self.asyncio, threading=self.threading, time=Time(w), new_id=self.new_id, log=SILENT,
                   ThreadPoolExecutor=lambda n, thread_name_prefix="": Pool(w, n),
                   Executor=lambda store, *_, **__: Executor(self, store), pool_of=lambda *_: SILENT,
                   run_graph=run_graph, import_module=lambda _: None, control_notebook=lambda *_: b"{}")
        modules = [importlib.import_module(f"myspinbot.{o}") for o in SIMULATED]
        saved = [(m, n, getattr(m, n)) for m in modules for n in new if hasattr(m, n)]
        for m, n, _ in saved: setattr(m, n, Time(w, server=True) if n == "time" and "bridge" in m.__name__ else new[n])
        try:
            self.bridge = SimBridge()
            self.bridge._world = w
            if not self.calm and self.random.random() < 0.3: self.bridge.drop = self.random.choice((0.2, 1.0))
            for i in range(1 + self.random.randrange(3)): self.start(f"w{i}")
            for i in range(1 + self.random.randrange(2)): self.start(f"c{i}")
            self.users = 1 + self.random.randrange(3)
            for i in range(self.users): w.spawn(Process(f"u{i}"), lambda i=i: self.user(i))
            w.spawn(self.nobody, self.nemesis)
            w.spawn(self.nobody, self.watch)
            w.run(120.0, lambda: self.ended)
            self.check()
        finally:
            for p in {f.process: None for *_, f in w.heap} | {o[0]: None for o in self.live.values()}: w.kill(p)
            for m, n, o in saved: setattr(m, n, o)
        return self


# --- what must hold

def explained(sim: Sim, name: str, since: float, until: float, but: str = "-") -> bool:
    "Did something happen to this process, or to all, in this time? A claim whose answer was lost is asked for again."
    return any(a <= until and b >= since and what not in (but, *CLAIMS)
               for who in (name, "") for a, b, what in sim.troubles.get(who, ()))


def check(sim: Sim) -> None:
    "I1 to I5 of the issue, over the rows, the events, the streams and the witness."
    bad, j = sim.violations.append, sim.journal
    for name, e in sim.world.errors:
        bad(f"{name} raised {type(e).__name__}: {e} {traceback.format_tb(e.__traceback__)[-1].strip()}")
    if not sim.ended:
        open_ = [f"{o['id']} {o['status']}" for o in j.job_rows.values() if o["status"] not in JOB_END]
        steps = [f"{s['job']}/{s['key']} {s['status']} {s['attempt']} {s['entry_id']}" for s in j.step_rows.values()
                 if s["status"] not in STEP_END]
        bad(f"not quiet after {sim.world.now:.0f} s: {open_} {steps} {sim.bridge._fresh} {sim.bridge._held}")
        return
    for key, job in sim.accepted.items():
        if job not in j.job_rows: bad(f"job {job} of {key} is lost")
    if len(j.job_rows) != len({o["idempotency_key"] for o in j.job_rows.values()}): bad("two jobs for one key")
    for job in j.job_rows.values(): check_job(sim, job)
    for s in j.step_rows.values():
        if s["status"] not in STEP_END and s["status"] != "pending": bad(f"I3: step {s['job']}/{s['key']} is left {s['status']}")
        if s["lease_until"] is not None: bad(f"I3: step {s['job']}/{s['key']} is left with a lease")
    if twice := [o for o, n in Counter(o[:3] for o in sim.ran).items() if n > 1]: bad(f"I4: one attempt ran twice: {twice}")


def check_job(sim: Sim, row: dict) -> None:
    "One job: its end, its steps, its events."
    bad, id, j = sim.violations.append, row["id"], sim.journal
    if row["status"] not in JOB_END: bad(f"I1: {id} is {row['status']}")
    if row["owner"] or row["lease_until"]: bad(f"I3: {id} has a lease")
    steps, events = j.by_job[id], [e for e in j.told if e["job"] == id]
    last, life, epoch_at, leased_at, owner, ends = {}, None, 0.0, 0.0, "", {e["transaction"] for e in events if e["kind"] == "job"}
    for e in events:
        key, status = e["key"], e["body"]["status"]
        old = last.get(key)
        if e["kind"] == "job":
            if life in JOB_END and not (status == "queued" and life != "succeeded"):
                bad(f"I1: {id} was {life} and became {status}")
            if old and {life, status} <= {"running", "waiting"} and e["body"]["epoch"] > old["body"]["epoch"]:
                if not explained(sim, owner, leased_at, e["seen"]):
                    bad(f"I4: {id} was taken from {owner}, to whom nothing had happened")
            if old is None or e["body"].get("epoch", 0) > old["body"].get("epoch", 0): leased_at = e["seen"]
            owner = e["body"].get("owner", owner)
            life, epoch_at = status, e["seen"]
        else:
            if life in JOB_END and e["transaction"] not in ends: bad(f"I1: {id}/{key} became {status} after the job was {life}")
            if old: check_change(sim, id, key, old, e, epoch_at)
        last[key] = e
    if life != row["status"] or last[""]["body"].get("epoch", 0) != row["epoch"]:
        bad(f"I5: events of {id} end as {life}, the row says {row['status']}")
    for key, s in steps.items():
        told = last[key]["body"]
        if (told["status"], told.get("attempt", 0), told.get("lost", 0)) != (s["status"], s["attempt"], s["lost"]):
            bad(f"I5: events of {id}/{key} end as {told}, the row says {s['status']} {s['attempt']} {s['lost']}")
    check_results(sim, row, steps)


def check_change(sim: Sim, id: str, key: str, old: dict, new: dict, epoch_at: float) -> None:
    "One change of a step: no result is lost or shown twice, and every new attempt has its reason."
    bad, a, b = sim.violations.append, old["body"], new["body"]
    if a["status"] in ("succeeded", "cached"): bad(f"I2: {id}/{key} was {a['status']} and became {b['status']}")
    elif a["status"] in STEP_END and b["status"] != "pending": bad(f"I2: {id}/{key} was {a['status']} and became {b['status']}")
    if a["status"] != "running" or b["status"] not in ("running", "queued"): return
    who, control = a.get("worker", ""), SPECS[b["step"]].kind == "control"
    if b.get("lost", 0) > a.get("lost", 0):
        if not explained(sim, who, old["seen"], new["seen"], but="stop"):
            bad(f"I4: {id}/{key} was taken from {who}, to whom nothing had happened")
    elif control:
        if epoch_at < old["seen"] and not explained(sim, who, old["seen"], new["seen"]):
            bad(f"I4: {id}/{key} began again under one conductor")
    elif b["status"] == "running": bad(f"I4: {id}/{key} was taken over, and nobody counted it")
    elif "error" not in b and not explained(sim, who, old["seen"], new["seen"]):
        bad(f"I4: {id}/{key} was queued again without a reason")


def check_results(sim: Sim, row: dict, steps: dict[str, dict]) -> None:
    "What a job shows is what its steps committed, once; it failed only by what a step did."
    bad, id = sim.violations.append, row["id"]
    commits = Counter(e["key"] for e in sim.journal.told if e["job"] == id and e["key"]
                      and e["body"]["status"] in ("succeeded", "cached"))
    for key, s in steps.items():
        if commits[key] != (s["status"] in ("succeeded", "cached")):
            bad(f"I2: {id}/{key} has {commits[key]} results and is {s['status']}")
        if s["status"] == "succeeded" and SPECS[s["step"]].kind == "notebook":
            if s["outputs"]["value"] != (want := f"{key}#{s['attempt']}@{s['worker']}"):
                bad(f"I2: {id}/{key} shows {s['outputs']}, not {want}")
            if sum(o[:3] == (id, key, s["attempt"]) for o in sim.ran) != 1:
                bad(f"I2: attempt {s['attempt']} of {id}/{key} did not run")
        if s["status"] == "failed" and s["error"].get("type") == "KernelDied" and SPECS[s["step"]].kind == "notebook":
            if s["attempt"] - s["lost"] <= s["retries"]:
                bad(f"{id}/{key} failed with a retry left: {s['attempt']} {s['lost']} {s['retries']}")
        for v in s["inputs"].values():
            shown = {str(o["outputs"].get("value")) for o in sim.journal.step_rows.values()}
            if isinstance(v, str) and ("#" in v or "!" in v) and v not in shown:
                bad(f"I2: {id}/{key} was given {v}, which nobody committed")
    if row["status"] == "succeeded":
        if any(s["status"] not in ("succeeded", "cached", "skipped") and row["graph"].node(s["node"]).on_failure == "fail"
               for s in steps.values()):
            bad(f"{id} succeeded with {[s['status'] for s in steps.values()]}")
        if not row["outputs"] or row["outputs"]["value"] not in (
            [o["outputs"].get("value") for o in steps.values()]
            + [[steps[k]["outputs"]["value"] for k in sorted(steps) if k.startswith("each")]]
        ): bad(f"{id} shows {row['outputs']}")
    elif row["outputs"]: bad(f"I2: {id} is {row['status']} and shows {row['outputs']}")
    if row["status"] == "failed" and not allowed(sim, row): bad(f"{id} failed with {row['error']}")


def allowed(sim: Sim, row: dict) -> bool:
    "Did a step's own behaviour, or a service that stayed away over all retries, fail this job?"
    said = row["error"]["message"]
    return any(o in said for o in ("scripted", "Declined", "holds a NUL", "workers with it", "store does not answer"))


Sim.check = check


def main() -> None:
    "Run schedules and print a table; exits with 1 when an invariant was violated."
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--schedules", type=int, default=1000)
    a.add_argument("--seed", type=int, default=1, help="of the first schedule; each has the next one")
    a.add_argument("--processes", type=int, default=1)
    a.add_argument("--replay", type=int, help="print the trace of the schedule with this seed")
    o = a.parse_args()
    if o.replay is not None:
        sim = Sim(o.replay, tell=print).run()
        print(*(sim.violations or ["all invariants hold"]), sep="\n")
        sys.exit(bool(sim.violations))
    total, bad, began = Counter(), [], time.perf_counter()
    seeds = range(o.seed, o.seed + o.schedules)
    with ProcessPoolExecutor(o.processes) as pool:
        for seed, counts, violations in pool.map(one, seeds, chunksize=100) if o.processes > 1 else map(one, seeds):
            total += counts
            if violations:
                bad.append(seed)
                print(f"seed {seed}: {violations[0]}"[:400], flush=True)
    print(table(total, o.schedules, len(bad), time.perf_counter() - began))
    sys.exit(bool(bad))


def one(seed: int) -> tuple[int, Counter, list[str]]:
    "A schedule: its seed, what happened, what was violated."
    sim = Sim(seed).run()
    return seed, summary(sim), sim.violations


def summary(sim: Sim) -> Counter:
    "What happened in a schedule."
    told = sim.journal.told
    lost = sum(e["body"].get("lost", 0) > 0 and e["body"]["status"] in ("queued", "running") for e in told)
    return sim.counts + Counter(jobs=len(sim.journal.job_rows), executions=len(sim.ran), takeovers=lost, slices=sim.world.count,
                                events=len(told), seconds=int(sim.world.now),
                                calm=sim.calm and not sim.unanswered, unanswered=bool(sim.unanswered))


def table(total: Counter, schedules: int, bad: int, took: float) -> str:
    "As Markdown."
    rows = [
        ("schedules", schedules),
        ("without any fault", total["calm"]),
        ("with unanswered claims only", total["unanswered"]),
        ("jobs", total["jobs"]),
        ("executions of steps", total["executions"]),
        ("kills", total["crashes"]),
        ("graceful stops", total["stop"]),
        ("freezes", total["freeze"]),
        ("lost replies", total["lost replies"]),
        ("servers down", total["down"]),
        ("one process cut off or lossy", total["cut"] + total["noise"]),
        ("FLUSHALL", total["flush"]),
        ("failover to an old replica", total["restore"]),
        ("XGROUP DESTROY", total["regroup"]),
        ("entries lost / doubled", f"{total['lose']} / {total['duplicate']}"),
        ("a process's clock jumps and drifts", total["clock"]),
        ("the database's clock jumps", total["jump"]),
        ("takeovers", total["takeovers"]),
        ("slices", total["slices"]),
        ("virtual hours", f"{total['seconds'] / 3600:.1f}"),
        ("violations", bad),
        ("real seconds", f"{took:.1f}"),
        ("schedules a second", f"{schedules / took:.0f}"),
    ]
    return "\n".join(["| what | count |", "|---|---:|", *(f"| {k} | {v} |" for k, v in rows)])


if __name__ == "__main__": main()
