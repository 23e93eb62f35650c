"""What `make demo` runs: a small model, a task it is bad at, and the judging before and after."""
