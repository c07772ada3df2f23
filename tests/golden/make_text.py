"""Write text.npz: what Transformers computes for every case, in float64, and how far its float32 is off.

python tests/golden/make_text.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cases import CASES
from reference import measure


def main() -> None:
    arrays = {}
    for case in CASES:
        exact, errors = measure(case)
        for name, array in exact.items():
            arrays[f"{case.name}/{name}"] = array
            arrays[f"{case.name}/{name}/error"] = np.float32(errors[name])
        worst = max(errors[name] / np.abs(exact[name]).max() for name in exact)
        print(f"{case.name}: float32 is off by {worst:.1e} of the largest value, at most")
    path = Path(__file__).with_name("text.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
