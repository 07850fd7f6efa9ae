"""`launcher: ray`: ranks and engines as actors of one cluster. The only place that imports ray.

It starts, watches and restarts; what ranks and engines tell each other never passes through here.
"""
