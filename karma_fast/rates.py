"""How far a step may move a parameter, beside the rate of its part of the model."""

OF_ORDER_ONE = ("log_scale", "gain", "age_logits")  # parameters, by the last part of their name
LONGER_STEPS = 10.0  # they take, as matrices' entries are far smaller and rates fit for those hardly move them


def rate_factor(name: str) -> float:
    """What the learning rate of a parameter is multiplied by.

    >>> rate_factor("shortcut.gain"), rate_factor("shortcut.projection.weight")
    (10.0, 1.0)
    """
    return LONGER_STEPS if name.rpartition(".")[2] in OF_ORDER_ONE else 1.0
