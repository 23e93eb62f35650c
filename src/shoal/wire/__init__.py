"""What both ends of a weight transfer must agree on: the slice plan, the digest, how they meet. Torch only,
and the Triton that comes with torch for CUDA.

The trainer (`shoal.weights`) and the receiving end inside vLLM (`shoal.vllm_plugin`) both import this room, and
neither imports the other.
"""
