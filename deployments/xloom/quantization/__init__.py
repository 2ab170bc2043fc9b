"""In-situ quantisation: the base model's weights, calibrated and quantised at load from the plain checkpoint."""
