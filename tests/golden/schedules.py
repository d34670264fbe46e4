"""Writes schedules.json: the rates and momenta that DeepSpeed's schedulers give, step by step.

    python3 -m venv env && env/bin/pip install torch numpy
    env/bin/pip install hjson einops msgpack packaging psutil py-cpuinfo pydantic tqdm
    DS_BUILD_OPS=0 env/bin/pip install --no-build-isolation --no-deps deepspeed
    env/bin/python tests/golden/schedules.py > tests/golden/schedules.json

Each case holds what the parameter groups say before each update: first the values that making the
scheduler wrote, then those after each step(). Made with DeepSpeed 0.19.8.
"""

import contextlib
import json
import os
import sys

with contextlib.redirect_stdout(sys.stderr):
    import torch
    from deepspeed.runtime import lr_schedules

STEPS = 14

CASES = [
    ("WarmupLR", {"warmup_num_steps": 4}),
    ("WarmupLR", {"warmup_num_steps": 4, "warmup_type": "linear"}),
    ("WarmupLR", {"warmup_num_steps": 1}),
    ("WarmupLR", {"warmup_num_steps": 7, "warmup_min_lr": 1e-5, "warmup_max_lr": 3e-4}),
    ("WarmupLR", {"warmup_num_steps": 5, "warmup_min_lr": 2e-4, "warmup_type": "linear"}),
    ("WarmupLR", {}),
    ("WarmupDecayLR", {"total_num_steps": 10, "warmup_num_steps": 4}),
    ("WarmupDecayLR", {"total_num_steps": 11, "warmup_num_steps": 3, "warmup_min_lr": 1e-4,
                       "warmup_max_lr": 7e-3, "warmup_type": "linear"}),
    ("WarmupDecayLR", {"total_num_steps": 3, "warmup_num_steps": 6}),
    ("WarmupDecayLR", {"total_num_steps": 100}),
    ("WarmupCosineLR", {"total_num_steps": 10, "warmup_num_steps": 4, "warmup_min_ratio": 0.1}),
    ("WarmupCosineLR", {"total_num_steps": 10, "warmup_num_steps": 4, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"total_num_steps": 9, "warmup_num_steps": 2, "cos_min_ratio": 0.3}),
    ("WarmupCosineLR", {"total_num_steps": 2, "warmup_num_steps": 5}),
    ("WarmupCosineLR", {"total_num_steps": 50}),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4,
                  "decay_lr_rate": 0.5, "decay_step_size": 2}),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.3, "cycle_first_step_size": 3,
                  "cycle_second_step_size": 6, "cycle_min_mom": 0.7, "cycle_max_mom": 0.95,
                  "decay_mom_rate": 0.02, "decay_step_size": 3}),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.3, "cycle_first_step_size": 5,
                  "cycle_second_step_size": 7, "cycle_first_stair_count": 2,
                  "cycle_second_stair_count": 3}),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.3, "cycle_first_step_size": 6,
                  "cycle_first_stair_count": 3}),
    ("OneCycle", {"cycle_min_lr": 0.02, "cycle_max_lr": 0.3, "cycle_first_step_size": 4,
                  "cycle_second_step_size": 0, "cycle_momentum": False, "decay_lr_rate": 0.1,
                  "decay_step_size": 1}),
    ("OneCycle", {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1}),
    ("LRRangeTest", {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2}),
    ("LRRangeTest", {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2,
                     "lr_range_test_staircase": True}),
    ("LRRangeTest", {"lr_range_test_min_lr": 3e-5, "lr_range_test_step_size": 7,
                     "lr_range_test_step_rate": 5.0}),
    ("LRRangeTest", {}),
]


def run(name, params):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-3, 2.5e-4)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999))
    scheduler = getattr(lr_schedules, name)(optimizer, **params)
    lrs, moms = [], []
    for _ in range(STEPS):
        lrs.append([float(group["lr"]) for group in optimizer.param_groups])
        moms.append(float(optimizer.param_groups[0]["betas"][0]))
        scheduler.step()
    return {"type": name, "params": params, "lr": lrs, "beta1": moms}


def main():
    os.environ["DS_ACCELERATOR"] = "cpu"
    cases = ["  " + json.dumps(run(*case)) for case in CASES]
    print("[\n" + ",\n".join(cases) + "\n]")


main()
