"""What scenarios with servers that go away have in common: a load, submits that go on meanwhile, logs that stay readable."""
import random
import re
import threading
import time
from typing import Any

from world import World

from myspinbot.core import SpinError

LINES_PER_S = 12.0  # of warnings and errors in one process' log


class Submitter(threading.Thread):
    "Submits small jobs until told to stop; what was refused is repeated under its key, and must then be one job."
    def __init__(self, w: World, client: Any = None, pause_s: float = 0.25):
        super().__init__(name="submitter", daemon=True)
        self.w, self.client, self.pause_s = w, client or w.client, pause_s
        self.stop, self.refused, self.sent = threading.Event(), [], 0

    def run(self) -> None:
        while not self.stop.wait(self.pause_s):
            graph, key = self.w.chain(1), f"key-{next(self.w.names)}"
            self.sent += 1
            try: self.w.accepted.append(self.client.submit(graph, {}, idempotency_key=key).id)
            except SpinError as e:
                if not e.retryable: self.w.violate(f"a submit was refused for good: {e}")
                self.refused.append((graph, key))

    def end(self) -> None:
        "Stop, and repeat what was refused."
        self.stop.set()
        self.join(60)
        if self.is_alive(): self.w.violate("a submit has had no answer for 60 s")
        for graph, key in self.refused: self.w.submit(graph, tries=50, key=key)


class Load:
    "Steps at work and waiting, logs measured from here; on leaving: nothing ran twice, where `once`, and no log ran over."
    def __init__(self, w: World, workers: int = 2, jobs: int = 3, seconds: float = 0.4, once: bool = True):
        self.w, self.once = w, once
        w.start(*(n for n in ["control", *(f"w{i + 1}" for i in range(workers))] if n not in w.procs))
        for _ in range(jobs): w.submit(w.chain(3, seconds=seconds))
        w.submit(w.fan(4, seconds=seconds))
        self.began, self.said = time.monotonic(), {n: len(w.farm.log(n)) for n in w.procs}
        self.submitter = Submitter(w)

    def __enter__(self) -> "Load":
        first = self.w.accepted[0]
        self.w.at_work(first, "s0")
        self.submitter.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.submitter.stop.set()
        if kind: return
        back = time.time()
        self.submitter.end()
        self.w.quiet()
        self.w.report.recovery_s.append(max(0.0, self.last() - back))
        self.logs()
        if self.once: only_once(self.w)

    def last(self) -> float:
        "When the last job ended."
        rows = self.w.client.journal.rows("SELECT extract(epoch FROM max(ended_at))::float8 AS at FROM job")
        return rows[0]["at"]

    def logs(self) -> None:
        "No process says more than a reader can follow, and none talks of a lost group for long."
        took = time.monotonic() - self.began
        for n, start in self.said.items():
            said = self.w.farm.log(n)[start:]
            loud = len(re.findall(r"\[(?:warning|error) *\]|^Traceback", said, re.M))
            if loud / took > LINES_PER_S: self.w.violate(f"{n} wrote {loud} warnings in {took:.0f} s")
            if (lost := said.count("NOGROUP")) > 5: self.w.violate(f"{n} spoke {lost} times of NOGROUP")


def only_once(w: World) -> None:
    "No step ran a second time: its holder was alive, and no server that was away makes it look dead."
    for o in w.marks():
        if o["word"] == "start" and o["attempt"] > 1: w.violate(f"attempt {o['attempt']} of {o['key']} of {o['job']} ran")


def pause(rng: random.Random, least: float, most: float) -> float:
    "Let the fault last; how long it did."
    time.sleep(s := rng.uniform(least, most))
    return s
