"""Enqueue jobs into one queue and print the seconds that it took: `produce.py with_saq many 5000`.

Every `with_<queue>.py` beside this file has `many(n)`, which enqueues n jobs in the fastest way the queue documents, and
`paced(n, gap_s)`, one at a time. A job's argument is the time at which it was sent.
"""
import asyncio
import importlib
import inspect
import sys
import time

if __name__ == "__main__":
    name, what, n, *gap = sys.argv[1:]
    enqueue = getattr(importlib.import_module(name), what)
    began = time.perf_counter()
    going = enqueue(int(n), *map(float, gap))
    if inspect.isawaitable(going): asyncio.run(going)
    print(time.perf_counter() - began)
