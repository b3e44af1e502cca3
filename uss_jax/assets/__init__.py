"""Data that travels with the package: the AudioSet ontology and the demo sounds."""
