"""MySpinBot: a notebook-first workbench for AI media pipelines."""
__version__ = "0.1.0"
