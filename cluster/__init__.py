"""The Ray control plane: it starts, places, watches and replaces instances. Tokens never pass here.

Only this folder imports ray, and only ray_calls.py calls it.
"""
