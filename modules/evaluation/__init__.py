"""Scores of generated reports, their intervals and their training-free baselines.

How scores are shown belongs in pages.
"""
