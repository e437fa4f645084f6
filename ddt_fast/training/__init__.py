"""Training: loop.py is the loop, run.py builds what it needs."""
