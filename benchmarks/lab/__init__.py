"""Parts of the operator's benchmarks: correctness gate, rivals, each alone in a process, the roofline model."""
