#!/usr/bin/env python3
"""Makes tensors.safetensors with the format's own library: every dtype, odd shapes, metadata.

    pip install safetensors torch && python tests/golden/tensors.py
"""

import os

import torch
from safetensors.torch import save_file

here = os.path.dirname(os.path.abspath(__file__))

tensors = {
    "f32": torch.tensor([[1.5, -2.25, 3.0], [0.1, float("inf"), -0.0]]),
    "bf16": torch.tensor([1.0, -0.5, 3.140625], dtype=torch.bfloat16),
    "f16": torch.tensor([[0.5], [65504.0]], dtype=torch.float16),
    "f64": torch.tensor([0.1, 1e300], dtype=torch.float64),
    "i64": torch.tensor([2**53, -1], dtype=torch.int64),
    "i32": torch.tensor([-(2**31), 7], dtype=torch.int32),
    "u8": torch.tensor([0, 255, 3], dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(42.0),
    "empty": torch.zeros(0, 4),
    'näme "with" quotes': torch.arange(4, dtype=torch.float32),
}
save_file(tensors, os.path.join(here, "tensors.safetensors"), metadata={"format": "pt", "note": "golden"})
