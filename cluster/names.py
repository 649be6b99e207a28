"""By which names Ray knows what outlives the process that made it."""

CONTROLLER = "controller"
"""The actor; there is one per Ray cluster."""
STATE_KEY = "control-state"
"""What the controller must not forget."""
