"""Timings against peers, on whatever GPU this machine has: `python -m jaxmoe bench`."""
