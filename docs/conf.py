"""Sphinx configuration: MyST Markdown, executed notebooks, an API reference read from the sources."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import baichuan_omni_jax

project = "baichuan_omni_jax"
author = "the baichuan_omni_jax authors"
version = release = baichuan_omni_jax.__version__

extensions = ["myst_nb", "api_pages"]
exclude_patterns = ["_build", "decisions.md"]
# Types of the same name in several modules: signatures are read from the sources, without their imports.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"baichuan_omni_jax {release}"
html_static_path = ["_static"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
myst_links_external_new_tab = True

# Notebooks run when their text changed since the last build. One that fails fails the build.
nb_execution_mode = "cache"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
