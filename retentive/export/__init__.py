"""Models for other runtimes. Each export says what it was made from, and is held against it.

    onnx        a RetNet as one ONNX graph, beside its tokenizer
    onnx_run    such a graph, run by onnxruntime and numpy alone

Nothing is imported here, so that `onnx_run` needs no torch.
"""
