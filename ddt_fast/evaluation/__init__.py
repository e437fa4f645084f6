"""Evaluation of samples: FID, sFID, Inception Score, precision and recall, KID."""
