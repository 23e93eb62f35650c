"""What runs inside vLLM's processes: the receiving end of the weight transfer, and the API-key gate."""
