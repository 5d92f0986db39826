"""Models for other runtimes. Each export is checked against its source model.

    folder      one export with its tokenizer in a folder, as `retentive export` writes it
    models      check of models that can be exported
    onnx        model as one ONNX graph (onnx_graph: nodes and weights; onnx_mixers: retention and attention)
    onnx_run    runs such a graph by onnxruntime and numpy alone
    native      sources of the C library beside the model, for phones and any machine with a C compiler
    browser     web page with the engine in WebAssembly, for any file server
    writing     generates tokens from such a graph

This module imports nothing, so that `onnx_run` and `writing` need no torch.
"""
