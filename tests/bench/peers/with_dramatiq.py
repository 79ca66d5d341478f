import time

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from work import URL, work

dramatiq.set_broker(RedisBroker(url=URL))


@dramatiq.actor
def noop(sent_ns: int) -> None: work(sent_ns)


def many(n: int) -> None:
    for _ in range(n): noop.send(time.time_ns())


def paced(n: int, gap_s: float) -> None:
    for _ in range(n):
        noop.send(time.time_ns())
        time.sleep(gap_s)
