"""Scores of generated reports, their intervals and tests, and the training-free baselines.

Nothing is shown here: pages does that.
"""
