"""Prefect tasks, one effect each, and the rules and records they rest on."""
