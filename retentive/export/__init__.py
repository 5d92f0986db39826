"""Models for other runtimes. Each export is held against the model that it came from.

    folder          a model of one of these kinds with its tokenizer: what `retentive export` does
    retnets         which models are exported
    onnx            a RetNet as one ONNX graph
    onnx_run        such a graph, run by onnxruntime and numpy alone
    genai           that graph in a folder for onnxruntime-genai
    executorch      its decoding step as an ExecuTorch program, for phones
    executorch_run  such a program, run by ExecuTorch
    native          the C library's sources beside the model, for phones and whatever else has a C compiler
    browser         a page with the engine in WebAssembly, for any server of files
    writing         tokens from graphs and programs

Nothing is imported here, so that `onnx_run` and `writing` need no torch.
"""
