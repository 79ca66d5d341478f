import asyncio
import time

from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker
from work import URL, awork

broker = RedisStreamBroker(url=URL).with_result_backend(RedisAsyncResultBackend(redis_url=URL))


@broker.task
async def noop(sent_ns: int) -> None: await awork(sent_ns)


async def many(n: int) -> None:
    await broker.startup()
    for k in range(0, n, 100): await asyncio.gather(*[noop.kiq(time.time_ns()) for _ in range(min(100, n - k))])
    await broker.shutdown()


async def paced(n: int, gap_s: float) -> None:
    await broker.startup()
    for _ in range(n):
        await noop.kiq(time.time_ns())
        await asyncio.sleep(gap_s)
    await broker.shutdown()
