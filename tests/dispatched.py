"""Which of ddt_kernels' operators a function runs."""

from torch.utils._python_dispatch import TorchDispatchMode


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ddt_kernels":
            self.names.append(function.name().removeprefix("ddt_kernels::"))
        return function(*args, **(kwargs or {}))


def operators_of(function, *arguments):
    """(result, names of the operators in the order they ran)."""
    with _Operators() as seen:
        result = function(*arguments)
    return result, seen.names
