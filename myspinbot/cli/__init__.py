"""The command `myspinbot`."""
from .. import _front

_HOME = dict(client="console", read_table="jobs", watch_job="jobs", main="app")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
