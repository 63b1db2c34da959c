"""Load what the first ``torch.compile`` of a process loads. Processes that are forked later have
it."""

import torch
import torch._inductor.compile_fx
import torch._inductor.fx_passes.bucketing  # noqa: F401

torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(1))
torch.compiler.reset()
