"""Chaos: everything that can be killed is killed, and afterwards nothing may be missing. `make chaos` runs it long."""
