"""What calibration data shows about the tensors of a model."""
