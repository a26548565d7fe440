"""Questions and edits on ``onnx_ir`` models: files, traversal, weights, shapes and cost."""
