"""What benches share: correctness gate, roofline, interleaved runs, isolated runs, rivals, tables and plots."""
