"""Our bridge in the shape of its peers; `python with_bridge.py` is its worker: threads that read for the free slots, do the
job and finish it with a hint to the conductor."""
import threading
import time
from collections import deque

from work import SLOTS, URL, work

from myspinbot.bridge.streams import Bridge
from myspinbot.schema import StepMessage


def message() -> StepMessage: return StepMessage(job="job_bench", key=str(time.time_ns()))


def many(n: int) -> None:
    with Bridge(URL) as bridge: bridge.publish_many(("cpu", "normal", message()) for _ in range(n))


def paced(n: int, gap_s: float) -> None:
    with Bridge(URL) as bridge:
        for _ in range(n):
            bridge.publish("cpu", "normal", message())
            time.sleep(gap_s)


class Worker:
    "Slots that take turns in reading: who reads starts the first job of what came, with no hand-over to another thread."
    def __init__(self, bridge: Bridge):
        self.bridge, self.turn, self.waiting, self.busy = bridge, threading.Lock(), deque(), set()

    def slot(self) -> None:
        while True:
            with self.turn:
                while not self.waiting:
                    self.waiting.extend(self.bridge.read(["cpu"], "bench:0", SLOTS - len(self.busy)))
                entry = self.waiting.popleft()
                self.busy.add(entry.id)
            work(int(entry.message.key))
            self.bridge.finish(entry, {"job": entry.message.job, "key": entry.message.key})
            self.busy.remove(entry.id)


if __name__ == "__main__":
    worker = Worker(Bridge(URL))
    slots = [threading.Thread(target=worker.slot, daemon=True) for _ in range(SLOTS)]
    for t in slots: t.start()
    for t in slots: t.join()
