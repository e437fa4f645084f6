"""Which of ddt_kernels' operators a function runs."""

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Within, `calls` gets (name, arguments) of every operator of ddt_kernels, in the order they run."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ddt_kernels":
            self.calls.append((function.name().removeprefix("ddt_kernels::"), args))
        return function(*args, **(kwargs or {}))


def operators_of(function, *arguments):
    """(result, names of the operators in the order they ran)."""
    with Dispatched() as seen:
        result = function(*arguments)
    return result, [name for name, _ in seen.calls]
