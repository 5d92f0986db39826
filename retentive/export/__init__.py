"""Models for other runtimes. Each export is held against the model that it came from.

    folder      a model of one of these kinds with its tokenizer: what `retentive export` does
    models      models that can be exported
    onnx        a model as one ONNX graph (onnx_graph: its nodes and weights; onnx_mixers: retention and attention)
    onnx_run    such a graph, run by onnxruntime and numpy alone
    native      the C library's sources beside the model, for phones and whatever else has a C compiler
    browser     a page with the engine in WebAssembly, for any server of files
    writing     tokens from such a graph

Nothing is imported here, so that `onnx_run` and `writing` need no torch.
"""
