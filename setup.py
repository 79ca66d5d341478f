"""Build MySpinBot from the metadata in settings.ini (tool settings live in pyproject.toml)."""
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

NOTEBOOKS = ("pipelines", "dashboards")
here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
version = re.search(r'__version__ = "(.+?)"', (here / "myspinbot/__init__.py").read_text(encoding="utf-8")).group(1)


def lines(key: str) -> list[str]: return [o.strip() for o in cfg.get(key, "").splitlines() if o.strip()]


class BuildWithNotebooks(build_py):
    "An installed package carries the step, pipeline and dashboard notebooks inside; a checkout uses its own folders."
    def run(self) -> None:
        super().run()
        if self.editable_mode: return
        for folder in NOTEBOOKS:
            skip = shutil.ignore_patterns(".*", "*.pyc", "__pycache__", "spin-steps")
            shutil.copytree(here / folder, Path(self.build_lib) / "myspinbot" / folder, ignore=skip, dirs_exist_ok=True)


class SdistWithNotebooks(sdist):
    "The source archive holds what the build reads."
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        held = [o for folder in NOTEBOOKS for o in (here / folder).rglob("*") if o.is_file()]
        own = [o.relative_to(here) for o in held if not {"__pycache__", ".ipynb_checkpoints", "spin-steps"} & set(o.parts)]
        super().make_release_tree(base_dir, sorted({*files, "settings.ini", *map(str, own)}))


readme = here / "README.md"
setup(
    name=cfg["lib_name"], version=version, description=cfg["description"], license=cfg["license"],
    author=cfg["author"], author_email=cfg["author_email"], keywords=cfg["keywords"].split(),
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    packages=find_packages(include=["myspinbot", "myspinbot.*"]),
    package_data={"myspinbot.store": ["migrations/*.sql"]},
    cmdclass={"build_py": BuildWithNotebooks, "sdist": SdistWithNotebooks},
    python_requires=cfg["python"],
    install_requires=lines("requirements") + lines("media_requirements") + lines("embedded_requirements"),
    extras_require={"dev": lines("dev_requirements")},
    entry_points={
        "console_scripts": ["myspinbot=myspinbot.cli.app:main"],
        "papermill.engine": ["spin=myspinbot.executor.papermill:SpinEngine"],
        "myspinbot.control": ["script=myspinbot.control.script"],
    },
)
