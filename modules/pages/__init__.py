"""What people look at: HTML pages, plots, tables and exports made from finished scores.

Nothing is scored or predicted here.
"""
