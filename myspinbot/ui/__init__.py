"""For browsers: the studio and its server."""
from .. import _front

_HOME = dict(Form="fields", Upload="fields", JobView="job_view", Studio="page", studio="page")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
