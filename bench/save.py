"""Time how long a save stalls training, and how long it takes until the checkpoint is complete.

    python bench/save.py --model bench-1.3b --dir /tmp/saved

The state is the weights and AdamW's two moments, on one device. The same state is saved three
times; the first save may wait for the host's buffers. Prints one JSON line: seconds of the stall,
seconds until the checkpoint is complete, GiB."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from datetime import date
from pathlib import Path

import torch

from dtron import checkpoint
from dtron.checkpoint.async_saver import AsyncSaver
from dtron.mesh import Layout
from dtron.model.presets import preset
from dtron.params import init
from dtron.training.optim_config import OptimConfig, build_optimizer
from dtron.training.optimizer import init_state
from dtron.training.pipeline import one_stage


def main() -> None:
    p = argparse.ArgumentParser(description="Time saves.")
    p.add_argument("--model", default="bench-1.3b", help="name of a preset")
    p.add_argument(
        "--dir", type=Path, default=Path("/tmp/saved"), help="folder to write to; it is emptied"
    )
    o = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    m, layout = preset(o.model), Layout()
    spec = one_stage(m, 1, layout).spec
    params = init(spec, m.dims(), 0, layout, torch.float32, device)
    opt = init_state(build_optimizer(OptimConfig()), spec, params)
    shutil.rmtree(o.dir, ignore_errors=True)
    saver = AsyncSaver(o.dir, keep=1)
    start = time.perf_counter()
    saver.prepare(checkpoint.tensors(checkpoint.TrainState(0, 0, params, opt), spec))
    saver.wait()
    buffers, stalls, whole = time.perf_counter() - start, [], []
    for step in range(3):
        start = time.perf_counter()
        stalls.append(
            checkpoint.start_save(saver, checkpoint.TrainState(step, 0, params, opt), spec, {})
        )
        saver.wait()
        whole.append(time.perf_counter() - start)
    saver.close()
    size = sum(f.stat().st_size for f in checkpoint.newest(o.dir).iterdir())
    shutil.rmtree(o.dir)
    line = {
        "model": o.model,
        "gib": round(size / 2**30, 2),
        "buffers_s": round(buffers, 2),
        "stall_s": [round(x, 3) for x in stalls],
        "whole_s": [round(x, 1) for x in whole],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
