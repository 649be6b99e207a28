"""The stages: each has `run(StageRun)`, and imports only in it what may be missing."""
