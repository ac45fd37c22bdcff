"""The commands: one file each, and the only place where Hydra is imported."""
