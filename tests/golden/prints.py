#!/usr/bin/env python3
"""Makes prints.json: how PyTorch prints tensors. tests/lua/golden_spec.lua holds tostring against it.

    build/peers/bin/python tests/golden/prints.py
"""
import json
import os

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
CASES = []


def case(name, dtype, shape, data):
    """Data as in ops.json; shape says how it is nested."""
    kinds = dict(f32=torch.float32, bf16=torch.bfloat16, f16=torch.float16, f64=torch.float64,
                 i64=torch.int64, i32=torch.int32, u8=torch.uint8, bool=torch.bool)
    t = torch.tensor([float(v) if isinstance(v, str) else v for v in data], dtype=kinds[dtype]).view(shape)
    CASES.append(dict(name=name, dtype=dtype, shape=shape, data=data, text=str(t)))


def main():
    case("scalar", "f32", [], [3.14159265])
    case("whole scalar", "f32", [], [2])
    case("whole numbers", "f32", [2, 3], [1, 2, 3, 4, 5, 600])
    case("fractions", "f32", [2, 2], [0.5, -1.25, 3.14159, 100])
    case("small", "f32", [3], [1e-5, 2e-5, 1])
    case("wide range", "f32", [3], [1e-8, 1, 1e5])
    case("large", "f32", [2], [123456.789, 1e9])
    case("large whole", "f32", [2], [1e8, 1])
    case("not finite", "f32", [4], ["inf", "-inf", "nan", 1.5])
    case("not finite, whole", "f32", [3], ["inf", "nan", 2])
    case("negative zero", "f32", [2], [-0.0, 0.0])
    case("integers", "i64", [2, 2], [1, -20, 300, 4])
    case("scalar integer", "i64", [], [7])
    case("i32", "i32", [3], [1, 2, 3])
    case("u8", "u8", [2], [1, 255])
    case("bool", "bool", [3], [True, False, True])
    case("f64", "f64", [2], [0.1, 2])
    case("bf16", "bf16", [2], [0.1, 2])
    case("f16", "f16", [2], [0.5, 2])
    case("three dims", "f32", [2, 2, 2], [1, 2, 3, 4, 5, 6, 7, 8])
    case("empty", "f32", [0], [])
    case("empty rows", "f32", [2, 0], [])
    case("long row", "i64", [30], list(range(30)))
    case("long row of fractions", "f32", [13], [i / 4 for i in range(13)])
    case("summary of one dim", "i64", [1200], list(range(1200)))
    case("summary of two dims", "f32", [60, 50], [i % 7 for i in range(3000)])
    with open(os.path.join(HERE, "prints.json"), "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(c) for c in CASES) + "\n]\n")


if __name__ == "__main__":
    main()
