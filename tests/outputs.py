"""What a notebook printed, without chance."""
from typing import Any


def joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    "Streams in one piece: where they are cut is chance."
    found: list[dict[str, Any]] = []
    for o in outputs:
        last = found[-1] if found else {}
        if o["output_type"] == last.get("output_type") == "stream" and o["name"] == last["name"]: last["text"] += o["text"]
        else: found.append(dict(o))
    return found
