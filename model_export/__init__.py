"""The modeller's side: a PyTorch module becomes ONNX training graphs that stock ONNX Runtime can run."""
