"What the job does in every queue: one RPUSH of its delay from enqueue to start, and one INCR."
import os
import time

import redis
import redis.asyncio

URL = os.environ["BENCH_REDIS"]
SLOTS = 32  # jobs at once, where the queue has such a setting
_now, _later = redis.Redis.from_url(URL), redis.asyncio.Redis.from_url(URL)


def work(sent_ns: int) -> None:
    _note(_now, sent_ns).execute()


async def awork(sent_ns: int) -> None:
    await _note(_later, sent_ns).execute()


def _note(client, sent_ns: int):
    p = client.pipeline(transaction=False)
    p.rpush("bench:delays", time.time_ns() - sent_ns)
    p.incr("bench:done")
    return p
