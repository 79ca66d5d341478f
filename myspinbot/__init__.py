"""MySpinBot: a notebook-first workbench for AI media pipelines."""
__version__ = "0.1.0"
# What most programs need, loaded at first use: `import myspinbot` itself costs nothing.
_HOME = dict(Pipeline="run", Run="run", Client="client", Graph="schema", Artifact="schema", Image="schema", Audio="schema",
             Video="schema", Data="schema", Step="step", SpinError="core", settings="core")
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME: raise AttributeError(f"module 'myspinbot' has no attribute {name!r}")
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f"myspinbot.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]: return sorted(__all__)
