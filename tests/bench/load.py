"""Ten thousand jobs in the queue, then a hundred thousand rows of history: rates, lists, memory.

JOBS and ROWS set other numbers. The story itself is `tests/faults/test_load.py`.
"""
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[1:1] = [str(HERE.parent), str(HERE.parent / "faults")]

import test_load
from table import Row, main, percentile

JOBS, ROWS = int(os.environ.get("JOBS", "10000")), int(os.environ.get("ROWS", "100000"))


def rows() -> list[Row]:
    seen = test_load.main(JOBS, ROWS)
    assert not any(seen["pending"].values()) and not any(seen["pending_with_history"].values()), seen
    slow = {name: percentile(took, 0.99) for name, took in seen["lists"].items()}
    worst = max(slow, key=slow.get)
    memory, third = seen["memory"], len(seen["memory"]) // 3
    said = f"one control step each, one in {test_load.NOTEBOOK_EACH} a notebook step; one conductor, one worker"
    return [Row(f"submit, one after the other, {JOBS:,} jobs, p99", [percentile(seen["submit_ms"], 0.99)],
                note=f"{1000 * len(seen['submit_ms']) / sum(seen['submit_ms']):.0f} submits/s"),
            Row(f"{JOBS:,} queued jobs drained", [seen["jobs_per_s"]], "/s", more=True, note=said),
            Row(f"  with {ROWS:,} rows of history", [seen["with_history_per_s"]], "/s", more=True,
                note=f"submit p99 {percentile(seen['submit_with_history_ms'], 0.99):.1f} ms; nothing pending after either"),
            Row(f"lists with {ROWS:,} rows of history, worst p99", [slow[worst]], reach=200, note=worst),
            *[Row(f"  {name}, p99", [ms]) for name, ms in slow.items()],
            Row("control process, growth of resident memory over the run", [max(memory) - max(memory[:third])], "MB",
                note=f"most in the first third {max(memory[:third]):.0f} MB, most at all {max(memory):.0f} MB")]


if __name__ == "__main__": main(rows)
