"""The hard-negative index: text encoders, nearest reports, the index file.

What training does with a negative belongs in ithn.
"""
