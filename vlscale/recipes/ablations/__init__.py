"""Ablations that ship with vlscale: named rows of overrides, one YAML file per table."""
