"""The parts of run_experiments.py: reading a table, planning and running its rows, tabulating scores.

Only run_experiments.py and compare programs use it.
"""
