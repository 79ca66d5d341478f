"""The command `myspinbot`."""
from .. import _front

_HOME = dict(main="app", client="app", read_table="app", watch_job="app")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
