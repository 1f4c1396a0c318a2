"""The edge side: drafting with ONNX Runtime, the gRPC stream, the command line."""
