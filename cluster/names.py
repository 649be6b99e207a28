"""By which names Ray knows what outlives the process that made it."""

CONTROLLER = "controller"
"""The actor; there is one per Ray cluster."""
OWNER_KEY = "control-owner"
"""Which controller is the latest: one that was cut off, and replaced, must do nothing more."""
STATE_KEY = "control-state"
"""What the controller must not forget."""
