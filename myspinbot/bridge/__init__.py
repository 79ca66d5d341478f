"""Redis Streams for work, Pub/Sub for what happens: transport, never the truth."""
from .. import _front

_HOME = dict(Bridge="streams", MemoryBridge="streams", connect="streams", open_bridge="streams",
             redis_errors="streams", Events="live", MemoryEvents="live", open_events="live")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
