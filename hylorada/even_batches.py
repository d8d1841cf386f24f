"""Rows that make the processes' last batches of an epoch equal: accelerate repeats earlier ones, which may not count.

A step is taken by all processes together, so each needs as many batches as the others. What is repeated for that is
read, and predicts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .data import IGNORED_LABEL


def own_rows(loader: Any, processes: int, process: int) -> int | None:
    """How many rows of a process's last batch are no repeats; None where all are its own, or nobody can know.

    loader: as it is before accelerate divides its batches among the processes, in their order
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    size, rest = loader.batch_size, 0
    if size is not None and not loader.drop_last:
        rest = len(loader.sampler) % (size * processes)  # type: ignore[arg-type]
    return min(max(rest - process * size, 0), size) if size and rest else None


def unlearned(batch: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """The batch with no token to predict in its rows from `first` on."""
    labels = batch.get("labels", batch["input_ids"]).clone()
    labels[first:] = IGNORED_LABEL
    return {**batch, "labels": labels}


def evened(loader: Any, processes: int) -> Any:
    """The loader; of a stream, one that makes itself even in every worker, by rows that do not count."""
    if processes == 1 or not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset):
        return loader
    if loader.batch_size is None or loader.drop_last:
        return loader
    return DataLoader(
        _EvenStream(loader.dataset, loader.batch_size * processes),
        batch_size=loader.batch_size,
        collate_fn=_Collate(loader.collate_fn),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )


class _EvenStream(IterableDataset):
    """Rows of a stream, each with whether it counts."""

    def __init__(self, rows: Any, group: int) -> None:
        self.rows, self.group = rows, group

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        count, row = 0, None
        for row in self.rows:
            count += 1
            yield row, True
        for _ in range(-count % self.group):
            yield row, False


class _Collate:
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[tuple[Any, bool]]) -> dict[str, Tensor]:
        batch = self.collate([row for row, _ in rows])
        # the last ones
        counting = sum(counts for _, counts in rows)
        return batch if counting == len(rows) else unlearned(batch, counting)
