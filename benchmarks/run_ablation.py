"""Take HyLoRADA apart, part by part: `hylorada ablate`, out of a source tree.

python benchmarks/run_ablation.py --num_train 500 --epochs 1 --seeds 0 1 2
"""

import sys
from pathlib import Path

# started as a script, Python looks beside it only
sys.path.insert(0, str(Path(__file__).parents[1]))

from hylorada.cli import main

if __name__ == "__main__":
    main(["ablate", *sys.argv[1:]])
