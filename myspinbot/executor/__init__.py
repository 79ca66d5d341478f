"""From a step's notebook to its outputs: kernels, the engine, an attempt."""
from .. import _front

_HOME = dict(Step="step", Executor="attempt", RunContext="attempt", StepResult="attempt")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
