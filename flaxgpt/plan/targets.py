"""Machines that a run can be planned for: published figures, and how to have JAX compile for them while they are not there."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from flaxgpt.errors import InputError


@dataclass(frozen=True)
class Chip:
    """Published figures of one device. Rates are peaks, and so give lower bounds in time.

    Attributes:
        kind: how JAX names it (`device_kind` begins so).
        memory: bytes.
        flops: operations a second in matrix products, by the dtype of what is multiplied.
        bandwidth: bytes a second between the chip and its memory.
        link: bytes a second that it sends to its neighbours, over all links, in one direction.
        host: how many a single host has at most; slices of several hosts have four on each.
        source: where the figures are from.
    """

    kind: str
    memory: int
    flops: dict[str, float]
    bandwidth: float
    link: float
    host: int
    source: str


def _tpu(kind: str, memory_gib: int, tflops: float, gb_s: float, ici_gb_s: float, host: int, page: str) -> Chip:
    """Products of float32 go through the same units as bfloat16 by default. The published interconnect counts both directions."""
    rates = dict.fromkeys(("bf16", "f16", "f32"), tflops * 1e12)
    return Chip(kind, memory_gib * 2**30, rates, gb_s * 1e9, ici_gb_s * 1e9 / 2, host, f"https://docs.cloud.google.com/tpu/docs/{page}")


CHIPS: dict[str, Chip] = {
    "tpu:v5e": _tpu("TPU v5 lite", 16, 197, 819, 400, 8, "v5e"),
    "tpu:v5p": _tpu("TPU v5", 95, 459, 2765, 1200, 4, "v5p"),
    "tpu:v6e": _tpu("TPU v6 lite", 32, 918, 1600, 800, 8, "v6e"),
    # SXM5, without sparsity; float32 in TF32, as JAX multiplies it by default; NVLink's 900 GB/s are of both directions.
    "gpu:h100": Chip(
        "NVIDIA H100",
        84_942_979_072,
        {"bf16": 989e12, "f16": 989e12, "f32": 494e12},
        3.35e12,
        450e9,
        8,
        "https://www.nvidia.com/en-us/data-center/h100/",
    ),
}
"""The start of a target's name -> the device in it."""

EXAMPLES = "here, gpu:h100x1 to gpu:h100x8, tpu:v5e:4x4, tpu:v5p:2x2x2, tpu:v6e:2x4 (or any other shape of a slice)"


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: as it was asked for.
        devices: of JAX; nothing can be put on those that are not attached, only compiled for.
        memory: bytes of a device that a program may use.
        chip: its figures, if they are known.
        hosts: machines that the devices are attached to.
    """

    name: str
    devices: tuple[jax.Device, ...]
    memory: int
    chip: Chip | None
    hosts: int

    def peak(self, dtype: str) -> float | None:
        """Operations a second of all devices together in products of a dtype of `GPTConfig`, if that was published."""
        rates = self.chip.flops if self.chip else {}
        rate = rates.get({"bfloat16": "bf16", "float32": "f32"}.get(dtype, dtype))
        return rate and rate * len(self.devices)


def find_target(name: str) -> Target:
    """The target of a name: here, gpu:h100x8, tpu:v5e:4x4 and so on. It is to be called before JAX has looked for devices.

    Raises:
        InputError: there is no such target, what compiles for it is not installed (with the line that installs it), or
            the environment's XLA_CLIENT_MEM_FRACTION is not a share of memory.
    """
    fraction = _fraction()  # before JAX reads it, which would end in a traceback
    if name == "here":
        return present(jax.devices())
    if found := re.fullmatch(r"(gpu:h100)x([1-8])", name):
        devices, chip = _gpus(int(found[2])), CHIPS[found[1]]
        return Target(name, devices, int(chip.memory * fraction), chip, hosts=1)
    if (found := re.fullmatch(r"(tpu:\w+):(\d+(?:x\d+)+)", name)) and found[1] in CHIPS:
        devices, chip = _tpus(found[1], found[2]), CHIPS[found[1]]
        return Target(name, devices, chip.memory, chip, hosts=_hosts(devices, chip))
    raise InputError(f"unknown target {name!r}; the targets are {EXAMPLES}")


def present(devices: list[jax.Device]) -> Target:
    """The devices that are attached. CPU devices share the memory of their host."""
    kind, stats = devices[0].device_kind, jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        memory = stats["bytes_limit"]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    chips = sorted(CHIPS.values(), key=lambda chip: len(chip.kind), reverse=True)  # "TPU v5 lite" before "TPU v5"
    chip = next((chip for chip in chips if kind.startswith(chip.kind)), None)
    return Target("here", tuple(devices), memory, chip, hosts=len({device.process_index for device in devices}))


def _hosts(devices: tuple[jax.Device, ...], chip: Chip) -> int:
    """Of a slice that is described as hosts of 2x2 chips, which is so unless one larger host holds all of it."""
    return 1 if len(devices) <= chip.host else len({device.process_index for device in devices})


def _fraction() -> float:
    """The share of a GPU's memory that JAX takes: three quarters, unless the environment says otherwise."""
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # the second is JAX's older name for it
    name, said = next(((name, os.environ[name]) for name in names if os.environ.get(name)), ("", "0.75"))
    try:
        fraction = float(said)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < math.inf:
        raise InputError(f"{name}={said!r}: expected a share of the GPU's memory, 0.75 for instance")
    return fraction


def _tpus(generation: str, shape: str) -> tuple[jax.Device, ...]:
    if not importlib.util.find_spec("libtpu"):
        raise InputError(f'{generation}: libtpu compiles for TPUs, and is not installed: pip install "jax[tpu]=={jax.__version__}"')
    # libtpu would ask the cloud's metadata server which machine it is on, and let one process at a time use its TPUs, of which there are
    # none here. None of these says what is compiled for.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu")
    generation = generation.removeprefix("tpu:")
    sides = tuple(map(int, shape.split("x")))
    # A slice is made of hosts of 2x2 chips; smaller ones are part of a host.
    host = {} if math.prod(sides) >= 4 else {"chips_per_host_bounds": [*sides, *(1,) * (3 - len(sides))]}
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{shape}", **host).devices)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"tpu:{generation}:{shape}: libtpu knows no such slice, or can't be used: {str(error).splitlines()[0]}") from None


def _gpus(count: int) -> tuple[jax.Device, ...]:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        version = jax.__version__
        wheels = f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
        raise InputError(
            f"gpu: JAX's CUDA plugin compiles for GPUs, and is not installed: pip install --no-deps {wheels} nvidia-cudnn-cu13"
        )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no driver is needed to compile
    jax.config.update("jax_platforms", "cpu")
    description = topologies.get_topology_desc(topology_name="h100", platform="cuda", target_config=_H100, topology=f"1x1x{count}")
    return tuple(description.devices)


# XLA's GpuTargetConfig of an H100 SXM5, as NVIDIA's Hopper tuning guide and CUDA's device query give the figures.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
