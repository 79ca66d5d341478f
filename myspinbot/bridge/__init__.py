"""Redis Streams for work, Pub/Sub for what happens: transport, never the truth."""
from .. import _front

_HOME = dict(connect="connection", redis_errors="connection", Bridge="streams", Entry="streams",
             MemoryBridge="memory", Events="live", MemoryEvents="live")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
