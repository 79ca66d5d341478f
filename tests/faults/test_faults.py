"""The short matrix: each of these faults once, with the seed that `make faults` begins with."""
import pytest
from run import SEEDS, load, run_one

SHORT = [f for f in load().values() if f.short]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("f", SHORT, ids=lambda f: f.name.replace(" ", "-"))
def test_the_promise_holds(f) -> None:
    report = run_one(f, SEEDS[0])
    assert not report.violations, "\n".join(report.violations)
