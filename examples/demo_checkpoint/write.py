"""Put trained weights into a checkpoint of the published layout, in its own dtypes.

python write.py RUN CHECKPOINT
"""

import sys
from pathlib import Path

import mlx.core as mx

from mlx_diffusiongemma import load_adapter

run, checkpoint = sys.argv[1:]
file = Path(checkpoint) / "model.safetensors"
tensors = dict(mx.load(str(file)))
mx.eval(tensors)
for name, array in load_adapter(run).arrays.items():
    published = name if name in tensors else name.removesuffix(".weight")  # experts are published without it
    tensors[published] = array.astype(tensors[published].dtype).reshape(tensors[published].shape)
mx.save_safetensors(str(file), tensors, {"format": "pt"})
