"""What can be proven of the kernels without an accelerator: by the vendors' compilers and by interpreters.

`python -m efficient_tx.kernels.verify --all` runs everything. Which calls of an operation that are, it says itself, in
`kernels/<operation>/cases.py`: see `efficient_tx.kernels.case`.
"""
