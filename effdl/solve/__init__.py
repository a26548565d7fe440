"""The mathematics of the passes: numpy in, numpy out, no ONNX."""
