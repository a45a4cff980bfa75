"""shadow += weight * (live - shadow), on lists of plain 1-D tensors.

pairs        what every kernel is given: the shadows of one weight and its live elements
eager        `UpdatePlan`: torch's own kernels, and the passes of cpu_plan where they are worth it
rounding     stochastic rounding to 16 bits
cpu_plan     one compiled pass over host memory; cpu_tables: its rows and tasks; cpu_threads: who
             moves them; cpu_numba: its code, which imports numba
gpu_plan     one launch per dtype; gpu_launch: its tables; gpu_triton: its code, for triton
"""

__all__ = ()
