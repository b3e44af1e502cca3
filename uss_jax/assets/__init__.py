"""Data that travels with the package: the AudioSet ontology, demo sounds, and bundles."""

import importlib.resources
import pathlib

FOLDER = pathlib.Path(str(importlib.resources.files(__name__)))
