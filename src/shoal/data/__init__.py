"""From a dataset to what ranks train on: prompts, their order, micro-batches, and the table that ranks exchange."""
