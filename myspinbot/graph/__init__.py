"""Steps and pipelines from notebooks; graphs, checked, drawn and planned."""
from .. import _front

_HOME = dict(Catalogue="catalogue", Declined="catalogue", approve="catalogue", control_step="catalogue",
             load_step="catalogue", NotebookError="catalogue", file_values="check", params_from_text="check",
             replace_files="check", resolve_params="check", store_files="check", validate_graph="check",
             mermaid="draw", Pipeline="builder", StepHandle="builder", Value="builder", When="builder")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
