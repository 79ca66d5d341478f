"""Notebooks that ruin what they touch, each in a world of its own; the checks are those of `test_poison.py`."""
import random

from run import fault
from test_poison import (
    ENDS_WELL,
    FAILS,
    LIMITS,
    test_flood_of_output_is_capped_everywhere_and_the_step_ends_well,
    test_poison_fails_with_its_reason_and_harms_nothing,
)
from world import World


def poison(name: str) -> None:
    @fault(f"poison notebook: {name.replace('_', ' ')}", lease_s=20.0, **LIMITS)
    def scenario(w: World, rng: random.Random) -> None:
        "It ends with its reason, beside a job that does not notice."
        w.start("control", "w1")
        if name in FAILS: test_poison_fails_with_its_reason_and_harms_nothing(w, w.home, name)
        else: test_flood_of_output_is_capped_everywhere_and_the_step_ends_well(w, w.home, name)
        w.may_fail |= {o.id for o in w.client.jobs(status="failed")}


for _name in (*FAILS, *ENDS_WELL): poison(_name)
