"""From a model and seeds to image files: job.py opens, runs and finishes a job."""
