"""How often the samples of each source stand in an epoch: weights become lists of sample numbers."""

import numpy as np
import numpy.typing as npt


def repeated(numbers: npt.NDArray[np.int64], weight: float, seed: int) -> npt.NDArray[np.int64]:
    """Each number as often as the whole part of the weight says, and a random choice of them once more for the rest.

    Args:
        numbers: the samples of one source; int64 [samples].
        weight: above 0; 2.5 is each twice, and every other one a third time.
        seed: of the choice.

    Returns:
        round(weight x samples) numbers, at least one if there is any; in order within each round.
    """
    wanted = max(round(weight * len(numbers)), min(len(numbers), 1))
    rounds, rest = divmod(wanted, max(len(numbers), 1))
    chosen = np.sort(np.random.default_rng(seed).choice(len(numbers), rest, replace=False))
    return np.concatenate([*[numbers] * rounds, numbers[chosen]]).astype(np.int64)
