"""Files, processes, devices, logs and errors: what every program needs whatever it computes.

Imports nothing else of this project.
"""
