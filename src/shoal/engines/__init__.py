"""Start, watch and end `vllm serve` processes, and talk to them."""
