"""This process's rank among those that share a job, from the environment that torchrun sets."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes, over all machines and (local) on this one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def who(self) -> str:
        """The prefix of a line of output: "rank 1 of 4: ", or nothing for a single process."""
        return f"rank {self.rank} of {self.world_size}: " if self.world_size > 1 else ""

    def say(self, text: str) -> None:
        """Print, in the first process only."""
        if self.rank == 0:
            print(text)


def process_ranks() -> Ranks:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; ValueError if they make no sense."""
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise ValueError(f"environment variable {name} is {text!r}; allowed: a whole number")
        values.append(int(text))
    rank, world_size, local_rank, local_size = values
    if rank >= world_size:
        raise ValueError(f"environment variable RANK is {rank}; allowed: below WORLD_SIZE ({world_size})")
    return Ranks(rank, world_size, local_rank, max(1, local_size))
