"""When an optimiser last took a step, for what is kept of weights for as long as nobody writes to them.

A tensor's version does not tell: torch's fused optimisers, and those with kernels of their own, write without counting.
Every `torch.optim.Optimizer` calls the hook here, whoever made it. To drop what is kept at each pass with gradients
instead would not do: a pass without them may come between the last backward and the step.
"""

from torch.optim.optimizer import register_optimizer_step_post_hook


class Steps:
    """`last` is another object after every step, of whatever optimiser: what is kept from before is found anew.

    No number: a compiled step that counted would be guarded by the count and compiled again.
    """

    last = object()


def _step_taken(*_: object) -> None:
    Steps.last = object()


register_optimizer_step_post_hook(_step_taken)
