"""Sphinx's settings for the documentation: `make docs`."""

project = "hpsearch"
extensions = ["myst_parser"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["reference.py"]
html_theme = "furo"
html_title = "hpsearch"
