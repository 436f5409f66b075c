"""Composes a run from its Config: data, backbone, objective, training, testing, results.

The only room that sees the whole Config and imports models/; main_*.py and scripts/ call it.
"""
