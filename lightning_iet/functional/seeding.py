"""Seeds that depend on what is computed, never on where."""

import numpy as np


def derive_seed(*keys: int) -> int:
    """Mix integers into one seed of 63 bits.

    Seeds derive from (run seed, shard, epoch, …) and never from the rank, so that the same run on one process and on
    many draws the same numbers. The mixing is NumPy's ``SeedSequence``, made for this: neighbouring keys give
    unrelated seeds, and the order of the keys matters.

    Args:
        *keys: Integers ≥ 0, most general first.

    Returns:
        A seed in [0, 2⁶³).

    Raises:
        ValueError: If a key is negative.

    Example:
        >>> derive_seed(0, 1, 2) == derive_seed(0, 1, 2), derive_seed(0, 1, 2) == derive_seed(0, 2, 1)
        (True, False)
    """
    if any(key < 0 for key in keys):
        raise ValueError(f"Argument `keys` expected integers ≥ 0, but got {keys}.")
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))
