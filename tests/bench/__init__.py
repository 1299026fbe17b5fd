"""Measurements on real hosts: what `make bench` runs, and the tables that the README shows of it."""
