"""Parts of the operator's benchmarks: correctness gate, rivals, isolated processes, the roofline model."""
