"""Steps and pipelines from notebooks; graphs, checked, drawn and planned."""
from .. import _front

_HOME = dict(Catalogue="catalogue", Declined="catalogue", approve="catalogue", control_step="catalogue",
             load_step="catalogue", NotebookError="catalogue", validate_graph="check", params_from_text="params",
             resolve_params="params", file_values="files", replace_files="files", store_files="files",
             Pipeline="builder", StepHandle="builder", Value="builder", When="builder")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
