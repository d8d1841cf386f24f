"""The command line: `python -m hylorada_kernels tune` and `doctor`."""

import argparse
import sys

import torch

from . import backend, doctor


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="hylorada_kernels", description="Fused low-rank adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tune", help="measure on this GPU which kernels to use at which size, and keep the result")
    commands.add_parser("doctor", help="say what was found here, and which path each op takes and why")
    return {"tune": _tune, "doctor": _doctor}[parser.parse_args(arguments).command]()


def _doctor() -> int:
    print("\n".join(doctor.findings()))
    return 0


def _tune() -> int:
    if not backend.HAS_TRITON:
        print("tune needs Triton: install triton", file=sys.stderr)
        return 1
    from . import tuning
    from .ops.hybrid_linear import dispatch

    try:
        measurement = tuning.tune()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    gpu = torch.cuda.get_device_name()
    print(f"{'in-features':>12}  fused / library")
    for columns, ratio in measurement.ratios.items():
        print(f"{columns:>12}  {ratio:.3f}")
    print(f"fused up to {measurement.fused_up_to} in-features on {gpu}")
    path = dispatch.tuning_file(gpu)
    if path is None:
        print("not kept: this process has no home directory; set HOME and run tune again", file=sys.stderr)
        return 1
    tuning.write(path, measurement, gpu)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
