"""Frameworks that cannot share an environment with the rest have one of their own: making it, and working in it."""
