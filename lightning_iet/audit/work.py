"""Work in blocks: each is done once, by one process, and kept."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.processes import all_or_none, rank, world_size
from lightning_iet.audit.progress import Progress, part_of, progress_bar

__all__ = ["in_blocks"]


def in_blocks(
    description: str,
    keys: Sequence[str],
    compute: Callable[[slice, Progress], dict[str, Tensor]],
    *,
    cache: BlockCache,
    total: int,
    block: int,
) -> list[dict[str, Tensor]]:
    """Compute what the cache lacks, in turns with the other processes, and return all of it.

    Blocks are cut in the same places whatever the number of processes, so that their figures have the same bits.

    Args:
        description: what is being done, for the bar.
        keys: for each block the hash of all that its result depends on.
        compute: takes the block's place in the set, and a function to tell how many of its images are done.
        cache: where results go.
        total: number of images.
        block: images in a block.

    Returns:
        The result of every block, on every process.

    Raises:
        ValueError: if the processes do not share the cache's folder.
    """
    with all_or_none(), progress_bar(description, total) as show:
        for number in range(rank(), len(keys), world_size()):
            place = slice(number * block, min((number + 1) * block, total))
            # Processes run side by side: what this one has done tells how far the others are.
            before = place.start - rank() * block
            if keys[number] not in cache:
                progress = part_of(show, start=before, scale=world_size())
                cache.store(keys[number], compute(place, progress))
            show(place.stop)
    return [cache.require(key) for key in keys]
