"""Synthetic chest radiographs: structured findings, drawings of them in two views, and written reports."""
