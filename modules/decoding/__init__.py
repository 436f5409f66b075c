"""Search for the words of a report: greedy, beam, sampling, rules for all, their key/value cache and guidance.

A search sees a session with step() and keep(), never a backbone.
"""
