"""Where the weights to publish come from: one rank's part of a model that is plain, sharded, adapted or quantised.

How the parts fit: `variables` walks the model and names each parameter as transformers does, with a `Value` that knows
which elements this rank holds (`shards`), what LoRA adds to them (`lora`) and how 4 or 8 bits become numbers
(`quantised`). `layout` says where each parameter of the checkpoint lies in them. `model_source` sends that.
"""

from shoal.weights.sources.adapter import AdapterSource, write_adapter
from shoal.weights.sources.factory import make_source
from shoal.weights.sources.model_source import ModelSource

__all__ = ["AdapterSource", "ModelSource", "make_source", "write_adapter"]
