"""What benches share: correctness gates, rooflines, rivals, interleaved clocks, isolated runs, tables and plots."""
