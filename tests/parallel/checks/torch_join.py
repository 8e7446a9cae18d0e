"""hvd.join() and tensors that are not in Horovod's cache, or were cached with another rank's shapes. Rank 0 joins first."""

import torch

from hvd_syncbn import horovod

hvd = horovod.load("torch")


def _others_go_on(work) -> None:
    """Run `work` on all ranks but 0, which has joined meanwhile."""
    if hvd.rank() > 0:
        work()
    hvd.join()


def check_sums_while_a_rank_has_joined() -> list[list[float]]:
    """New names, and their second use, which comes from the cache; then with rank 0, in the shape that it does not know."""
    sums = []

    def work() -> None:
        for _ in range(2):
            for name in ("a", "b", "c"):
                sums.append(hvd.allreduce(torch.ones(2, 3), name=name, op=hvd.Sum).flatten().tolist())

    _others_go_on(work)
    assert sums == ([[hvd.size() - 1] * 6] * 6 if hvd.rank() else [])
    return [hvd.allreduce(torch.ones(2, 3), name=name, op=hvd.Sum).flatten().tolist() for name in ("a", "b", "c")]


def check_barrier_while_a_rank_has_joined() -> None:
    _others_go_on(hvd.barrier)


def check_allgather_while_a_rank_has_joined() -> str | None:
    """An error, also for one that is in the cache, and the job goes on."""
    for _ in range(2):
        hvd.allgather(torch.ones(2), name="gathered")
    said = []

    def work() -> None:
        try:
            hvd.allgather(torch.ones(2), name="gathered")
        except Exception as error:
            said.append(str(error))

    _others_go_on(work)
    assert hvd.allgather(torch.ones(2), name="gathered").tolist() == [1.0] * 2 * hvd.size()
    return said[0] if said else None
