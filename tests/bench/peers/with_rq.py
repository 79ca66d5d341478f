import time

import redis
from rq import Queue
from work import URL, work


def noop(sent_ns: int) -> None: work(sent_ns)


def many(n: int) -> None:
    queue = Queue("bench", connection=redis.Redis.from_url(URL))
    for k in range(0, n, 500):
        queue.enqueue_many([Queue.prepare_data(noop, (time.time_ns(),)) for _ in range(min(500, n - k))])


def paced(n: int, gap_s: float) -> None:
    queue = Queue("bench", connection=redis.Redis.from_url(URL))
    for _ in range(n):
        queue.enqueue(noop, time.time_ns())
        time.sleep(gap_s)
