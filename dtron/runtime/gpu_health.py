"""The health of GPUs: clocks, power, temperature, reasons for low clocks, and memory errors, read
through NVML (the extra ``gpu-health``).

A call of NVML may take milliseconds. So a thread makes the calls, and training never waits for it.
A number that a GPU does not report is NaN.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# Bits of nvmlDeviceGetCurrentClocksEventReasons, by what lowers the clocks.
THROTTLES = {"power_cap": 0x4, "thermal": 0x20 | 0x40, "power_brake": 0x80, "slowdown": 0x8}
HARMFUL = ("thermal", "power_brake")  # a power cap under load is normal
COLUMNS = (
    "sm_clock_mhz",
    "memory_clock_mhz",
    "power_watts",
    "temperature_c",
    "energy_joules",
    "throttles",
    "ecc_corrected",
    "ecc_uncorrected",
)


def read_health(nvml: Any, handle: Any) -> list[float]:
    """Return the numbers of ``COLUMNS``. ``energy_joules`` counts from the load of the driver, and
    memory errors from the last reset of the GPU.

    ``nvml``: the module pynvml, or an object with its functions.
    ``handle``: NVML's handle of the GPU."""
    ecc = nvml.NVML_VOLATILE_ECC
    calls: tuple[tuple[Callable[..., Any], tuple[Any, ...], float], ...] = (
        (nvml.nvmlDeviceGetClockInfo, (nvml.NVML_CLOCK_SM,), 1.0),
        (nvml.nvmlDeviceGetClockInfo, (nvml.NVML_CLOCK_MEM,), 1.0),
        (nvml.nvmlDeviceGetPowerUsage, (), 1e-3),
        (nvml.nvmlDeviceGetTemperature, (nvml.NVML_TEMPERATURE_GPU,), 1.0),
        (nvml.nvmlDeviceGetTotalEnergyConsumption, (), 1e-3),
        (nvml.nvmlDeviceGetCurrentClocksThrottleReasons, (), 1.0),
        (nvml.nvmlDeviceGetTotalEccErrors, (nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, ecc), 1.0),
        (nvml.nvmlDeviceGetTotalEccErrors, (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, ecc), 1.0),
    )
    found = []
    for call, args, unit in calls:
        try:
            found.append(unit * call(handle, *args))
        except nvml.NVMLError:  # this GPU does not report it
            found.append(math.nan)
    return found


class HealthSampler:
    """Reads the health of one GPU in a thread, when asked.

    ``read``: returns the numbers of ``COLUMNS``; None: there is no GPU, or no NVML."""

    def __init__(self, read: Callable[[], Sequence[float]] | None) -> None:
        self._read, self._newest = read, [math.nan] * len(COLUMNS)
        self._asked, self._over = threading.Event(), False
        if read is not None:
            threading.Thread(target=self._work, name="GPU health", daemon=True).start()

    def ask(self) -> None:
        """Ask for a new sample. Nothing waits here."""
        self._asked.set()

    @property
    def newest(self) -> list[float]:
        """The last sample; all NaN before the first."""
        return self._newest

    def close(self) -> None:
        """End the thread."""
        self._over = True
        self._asked.set()

    def _work(self) -> None:
        assert self._read is not None
        while True:
            self._asked.wait()
            self._asked.clear()
            if self._over:
                return
            self._newest = list(self._read())


def uuid_of(device: str) -> str:
    """Return the UUID of a GPU as NVML writes it. Its number may be another one for NVML: the
    environment may hide GPUs from torch."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return f"GPU-{uuid.removeprefix('GPU-')}"


def open_nvml(
    device: str,
    load: Callable[[str], Any] = importlib.import_module,
    uuid: Callable[[str], str] = uuid_of,
) -> tuple[Callable[[], Sequence[float]] | None, str]:
    """Return a function that reads the health of a device, and a note for the log. Without a GPU
    there is neither.

    ``load``: imports the module of NVML.
    ``uuid``: returns the UUID of the device."""
    if not device.startswith("cuda"):
        return None, ""
    try:
        nvml = load("pynvml")
    except ImportError:
        return None, "the health of GPUs is not measured; pip install 'dtron[gpu-health]'"
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid(device))
    except nvml.NVMLError as error:
        return None, f"the health of GPUs is not measured ({error})"

    def read() -> list[float]:
        return read_health(nvml, handle)

    return read, ""


def health_metrics(
    samples: Sequence[Sequence[float]], energies: Sequence[float], tokens: int
) -> dict[str, float]:
    """Return the metrics of the GPUs of all ranks; none without a GPU that reports.

    ``samples``: of each rank, the numbers of ``COLUMNS``.
    ``energies``: of each rank, the joules between two samples.
    ``tokens``: the tokens of all ranks between these samples."""
    column = {
        name: [x for x in values if not math.isnan(x)]
        for name, values in zip(COLUMNS, zip(*samples, strict=True), strict=True)
    }
    joins: Mapping[str, Callable[[list[float]], float]] = {
        "sm_clock_mhz": min,
        "memory_clock_mhz": min,
        "power_watts": sum,
        "temperature_c": max,
        "ecc_corrected": sum,
        "ecc_uncorrected": sum,
    }
    found = {f"gpu.{name}": join(column[name]) for name, join in joins.items() if column[name]}
    if column["throttles"]:
        for name, bits in THROTTLES.items():
            found[f"gpu.throttled.{name}"] = sum(int(x) & bits > 0 for x in column["throttles"])
    if tokens and energies and not any(map(math.isnan, energies)):
        found["joules_per_token"] = sum(energies) / tokens
    return found


def health_faults(before: Sequence[float], now: Sequence[float]) -> dict[str, str]:
    """Return what is wrong with a GPU, by its kind.

    ``before``: the sample of the look before."""
    old, new = dict(zip(COLUMNS, before, strict=True)), dict(zip(COLUMNS, now, strict=True))
    found = {}
    reasons = 0 if math.isnan(new["throttles"]) else int(new["throttles"])
    for name in HARMFUL:
        if reasons & THROTTLES[name]:
            found[name] = (
                f"its GPU lowers its clocks ({name.replace('_', ' ')}): "
                f"{new['sm_clock_mhz']:.0f} MHz, {new['temperature_c']:.0f} C, "
                f"{new['power_watts']:.0f} W"
            )
    errors = new["ecc_uncorrected"] - old["ecc_uncorrected"]
    if errors > 0:
        found["memory"] = f"its GPU has {errors:.0f} new uncorrected memory errors; replace it"
    return found
