"""Compare fine-tuning methods on one model and one text: `hylorada benchmark`, out of a source tree.

python benchmarks/run_benchmark.py --methods baseline lora dora hylorada --steps 30 --seeds 0 1 2
"""

import sys
from pathlib import Path

# started as a script, Python looks beside it only
sys.path.insert(0, str(Path(__file__).parents[1]))

from hylorada.cli import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
