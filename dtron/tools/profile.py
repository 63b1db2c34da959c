"""``python -m dtron.profile trace.json``: the time breakdown of a recorded step.

``train.py --profile`` writes the trace (runtime/profiler.py). The categories are described in
runtime/time_breakdown.py.
"""

from __future__ import annotations

from dtron.runtime.exit import Parser
from dtron.runtime.time_breakdown import show, top
from dtron.runtime.trace import read


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m dtron.profile", description="Time breakdown of a step.")
    parser.add_argument("trace", help="a Chrome trace that train.py --profile wrote")
    parser.add_argument(
        "--top", type=int, default=0, metavar="N", help="also print the N kernels with most time"
    )
    o = parser.parse_args(argv)
    spans = read(o.trace)
    show(spans)
    for line in top(spans, o.top):
        print(line)
    return 0
