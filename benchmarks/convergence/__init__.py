"""Does CLARS need no warm-up? A study on Fashion-MNIST that anyone can rerun.

`python -m benchmarks.convergence` trains what a preset says (`study.py`) and reports it
(`report.py`); `README.md` beside it says what came out.
"""
