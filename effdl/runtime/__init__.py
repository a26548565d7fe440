"""The machine, the target a model is made for, and ONNX Runtime sessions on it."""
