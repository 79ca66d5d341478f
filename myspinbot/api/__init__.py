"""For programs: the client, pipelines that run, doors and HTTP."""
from .. import _front

_HOME = dict(Client="client", Pipeline="run", Run="run", create_app="http")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
