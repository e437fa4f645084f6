"""From images to training batches: image_file → image_folder → encode → latent_cache → latent_dataset → loader.

source.py opens what training can read: add a data source there.
"""
