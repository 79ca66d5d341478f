"""MySpinBot: a notebook-first workbench for AI media pipelines."""
import sys

__version__ = "0.1.0"
# What most programs need, loaded at first use: `import myspinbot` itself costs nothing.
_HOME = dict(Pipeline="api.run", Run="api.run", Client="api.client", Graph="schema", Artifact="schema",
             Image="schema", Audio="schema", Video="schema", Data="schema", Step="executor.step", SpinError="core",
             settings="core")
# Modules that stood here in 0.1 before there were chapters. Their old names work, with a warning, until 0.2; some are several now.
_MOVED = dict(spec="graph.spec", catalogue="graph.catalogue", check=("graph.check", "graph.params", "graph.files"),
              draw="graph.draw", plan="graph.plan", why="graph.why", keys="bridge.keys", events="bridge.live",
              pg="store.postgres", tables="store.tables", attempts="store.steps", journal="store.journal",
              artifacts="store.artifacts", retention="store.retention", step="executor.step",
              inside="executor.inside", launch="executor.launcher", kernels="executor.kernel", pool="executor.pool",
              engine=("executor.engine", "executor.document", "executor.outputs", "executor.papermill"),
              runner=("jobs.local", "jobs.workflow"), worker="jobs.worker", conductor=("jobs.conductor",
              "jobs.waiting"), numbers="language.numbers", rules="language.rules", amounts="language.amounts",
              names="language.names", reading="language.reading", words="language.words", markup="language.markup",
              text="language.text", sound="media.sound", speech="media.speech", gates="media.gates",
              picture="media.picture", mesh="media.mesh", matte="media.matte", face="media.face", lips="media.lips",
              skin="media.skin", eyes="media.eyes", rig="media.rig", head="media.head", visemes="media.visemes",
              film="media.video", talk="media.talk", fitness="media.fitness", video="media.quality",
              samples="media.samples", llm="control.script", client="api.client", run="api.run", doors="api.doors",
              limits="api.limits", look="ui.theme", studio_server="ui.server", services="cli.services")
__all__ = ["__version__", *_HOME]


def _front(package: str, homes: dict[str, str]):
    "The `__getattr__` and `__dir__` of a package that loads what it offers at first use."
    def get(name: str):
        if name not in homes: raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from importlib import import_module
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value
    return get, lambda: sorted({*vars(sys.modules[package]), *homes})


__getattr__, __dir__ = _front(__name__, _HOME)


def _parts(name: str) -> list[str]:
    "Where a module is that had this name; empty: it has not moved."
    new = _MOVED.get(name.removeprefix("myspinbot."), ()) if name.startswith("myspinbot.") else ()
    return [f"myspinbot.{o}" for o in ([new] if isinstance(new, str) else new)]


class _Moved:
    "Finds a module under the name that it had."
    def find_spec(self, name: str, path=None, target=None):
        if not _parts(name): return None
        from importlib.machinery import ModuleSpec
        from warnings import warn
        now = " and ".join(_parts(name))
        warn(f"{name} is {now} now; the old name goes with 0.2.", DeprecationWarning, stacklevel=2)
        return ModuleSpec(name, self)

    def create_module(self, spec): return None

    def exec_module(self, module):
        from importlib import import_module
        parts = [*map(import_module, _parts(module.__name__))]
        if len(parts) == 1: sys.modules[module.__name__] = parts[0]
        else: vars(module).update({k: v for o in parts[::-1] for k, v in vars(o).items() if not k.startswith("__")})


sys.meta_path.append(_Moved())
