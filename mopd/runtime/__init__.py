"""Puts the parts together and runs the loop."""
