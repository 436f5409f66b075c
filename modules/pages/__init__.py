"""What people read: HTML pages, plots and exports, made from finished scores and reports.

Nothing is scored or predicted here.
"""
