"""Our own CPU kernels: C++ with a plain C interface (`kernels.h`), compiled once on the machine.

`target.py` says what to compile for, `build.py` compiles, loads and proves, `packed_weights.py`
packs weights and residuals, `library.py` is the interface in ctypes. Each engine adds a small
source of its own, which lends the kernels its threads. Nothing depends on the kernels: where they
cannot be had, the engines' frameworks do all products.
"""
