"""`make bench`: every part in a process of its own, then one table. Names choose some: `python tests/bench/run.py flow`."""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import Row, show

HERE = Path(__file__).parent
PARTS = [p.stem for p in sorted(HERE.glob("*.py")) if p.stem not in ("run", "table")]


def main(names: list[str]) -> int:
    "Run the parts; the number of those that did not end well."
    if unknown := set(names) - set(PARTS):
        print(f"No such part: {', '.join(sorted(unknown))}. There are: {', '.join(PARTS)}.")
        return 2
    rows, failed, began = [], [], time.monotonic()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    for name in names or PARTS:
        print(f"\n== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), "--json", str(out)])
            if done.returncode or not out.exists(): failed.append(name)
            else: rows += [Row(**o) for o in json.loads(out.read_text())]
    print()
    if len(names or PARTS) > 1: show(rows, f"All parts, {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f} after")
    if failed: print(f"Did not end well: {', '.join(failed)}.")
    return len(failed)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
