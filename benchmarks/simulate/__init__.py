"""A simulation around the real reducer and the real submission code: random histories of one run, in memory.

    python -m benchmarks.simulate --histories 2000          many histories; failures with their seed
    python -m benchmarks.simulate --seed N --trace          one history, told operation by operation

See docs/simulation.md for what is modelled and which invariants hold.
"""
