"""Build MySpinBot from the metadata in settings.ini (tool settings live in pyproject.toml)."""
from configparser import ConfigParser
from pathlib import Path
import re

from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
version = re.search(r'__version__ = "(.+?)"', (here / "myspinbot/__init__.py").read_text(encoding="utf-8")).group(1)


def lines(key: str) -> list[str]: return [o.strip() for o in cfg.get(key, "").splitlines() if o.strip()]


readme = here / "README.md"
setup(
    name=cfg["lib_name"], version=version, description=cfg["description"], license=cfg["license"],
    author=cfg["author"], author_email=cfg["author_email"], keywords=cfg["keywords"].split(),
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    packages=["myspinbot"], python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements") + lines("media_requirements") + lines("embedded_requirements"),
    extras_require={"dev": lines("dev_requirements")},
    entry_points={
        "console_scripts": ["myspinbot=myspinbot.cli:main"],
        "papermill.engine": ["spin=myspinbot.engine:SpinEngine"],
        "myspinbot.control": ["script=myspinbot.llm"],
    },
)
