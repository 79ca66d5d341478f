"""For browsers: the studio and its server."""
from .. import _front

_HOME = dict(Form="widgets", JobView="widgets", Studio="widgets", Upload="widgets", job_view="widgets",
             studio="widgets")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
