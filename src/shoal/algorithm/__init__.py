"""Pure functions of the algorithm: rewards to advantages, logits to logprobs, logprobs to a loss and its metrics."""
