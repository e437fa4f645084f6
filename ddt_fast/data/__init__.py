"""From images to training batches: image_folder → encode → latent_cache → latent_dataset → loader.

source.py says what training can read, and opens it: add a data source there.
"""
