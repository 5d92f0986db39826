"""Parts shared by benches: correctness gate, roofline, interleaved runs, isolated runs, rivals and plots."""
